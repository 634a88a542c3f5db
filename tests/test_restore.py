"""A database that was dumped and restored: everything is replayed from it, and cursors of its life
before are told that they are over.
"""

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import grpc
import pytest
import pytest_asyncio

from service import eras, schema
from service.domain import EventType
from service.embedded import EmbeddedPostgres, _binaries
from service.repositories.events import Fact
from service.server import Server
from service.settings import load
from service.store import Store

from .feed_history import holes, unfaithful
from .make import Client, Conversation, Event, User, failure
from .process import parley as command
from .proxy import proxy
from .storm import state_of
from .test_feed import crowd_of, keys

pytestmark = pytest.mark.slow

ACTIONS = 40
PAGE_SIZE = 7


@dataclass
class Dump:
    """What there was when it was dumped: the log of each scope, and each cursor on the way through
    it; also some cursors that were given out only afterwards.
    """

    talk: Conversation
    user: User
    file: Path
    scopes: list[dict[str, Any]]
    logs: list[list[Event]]
    cursors: list[tuple[dict[str, Any], str]]


@pytest_asyncio.fixture
async def dumped(parley: Client, postgres: EmbeddedPostgres, tmp_path: Path) -> Dump:
    crowd = await crowd_of(parley)
    user = crowd.users[0]
    talk = await parley.conversation(user, first="one of many")

    async def live_on() -> None:
        for _ in range(ACTIONS):
            await crowd.act()
            await parley.message(talk, user)

    await live_on()
    scopes: list[dict[str, Any]] = [
        {"everything": True},
        {"conversation_id": talk.id},
        {"user_id": user.id},
    ]
    logs = [await parley.log(**scope) for scope in scopes]
    file = tmp_path / "dump"
    await tool(postgres.url, "pg_dump", "--format=custom", f"--file={file}")
    # Of this only those know who have read it: no restore brings it back.
    await live_on()
    cursors = [(scope, cursor) for scope in scopes for cursor in await cursors_of(parley, scope)]
    return Dump(talk, user, file, scopes, logs, cursors)


async def cursors_of(client: Client, scope: dict[str, Any]) -> list[str]:
    """Every cursor on the way through the log of a scope."""
    cursors: list[str] = []
    while True:
        start = {"resume_cursor": cursors[-1]} if cursors else {}
        page = await client.list_events(**scope, **start, page_size=PAGE_SIZE)
        cursors.append(page.cursor)
        if page.caught_up:
            return cursors


async def tool(url: str, name: str, *arguments: str, user: str = "parley") -> None:
    """One of PostgreSQL's own, with the database at that URL."""
    parts = urlsplit(url)
    (host,) = parse_qs(parts.query)["host"]
    database = parts.path.removeprefix("/")
    where = (f"--host={host}", f"--username={user}", f"--dbname={database}")
    process = await asyncio.create_subprocess_exec(
        str(_binaries() / name), *where, *arguments, stderr=subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()


async def restore(dump: Dump, url: str) -> None:
    await tool(url, "pg_restore", "--no-owner", "--exit-on-error", str(dump.file))


@pytest_asyncio.fixture
async def elsewhere(tmp_path: Path) -> AsyncIterator[EmbeddedPostgres]:
    """Another PostgreSQL, with nothing in it."""
    embedded = EmbeddedPostgres(tmp_path / "elsewhere")
    await embedded.start()
    yield embedded
    await embedded.stop()


@pytest_asyncio.fixture
async def beside(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """Another database of the same PostgreSQL, with nothing in it."""
    await tool(postgres.url, "psql", "-c", "CREATE DATABASE beside OWNER parley", user="postgres")
    yield postgres.url.replace("/parley?", "/beside?")
    await tool(postgres.url, "psql", "-c", "DROP DATABASE beside WITH (FORCE)", user="postgres")


@asynccontextmanager
async def serving(url: str, folder: Path) -> AsyncIterator[Client]:
    server = Server(load(address="127.0.0.1:0", data_dir=folder), url)
    server.bind()
    await server.start()
    try:
        await asyncio.wait_for(server.readiness.ready.wait(), 10)
        async with grpc.aio.insecure_channel(server.address) as channel:
            assert server.token
            yield Client(channel, server.token)
    finally:
        await server.stop()


async def everything_is_there(client: Client, dump: Dump) -> None:
    for scope, log in zip(dump.scopes, dump.logs, strict=True):
        assert await client.log(**scope) == log
    state = await state_of(client, dump.talk)
    assert list(unfaithful(dump.logs[0], [state])) == []


async def old_cursors_are_expired(client: Client, dump: Dump) -> None:
    """By both who read."""
    assert len(dump.cursors) > 3 * 2 * ACTIONS // PAGE_SIZE
    for n, (scope, cursor) in enumerate(dump.cursors):
        if n % 2:
            told = await failure(client.list_events(**scope, resume_cursor=cursor))
        else:
            told = await failure(client.watch(**scope, resume_cursor=cursor).read())
        assert (told.code, told.reason) == ("OUT_OF_RANGE", "CURSOR_EXPIRED")


async def it_goes_on(client: Client, dump: Dump) -> list[str]:
    """What happens now comes after all that was, in every scope; the cursors after it."""
    before = [await cursors_of(client, scope) for scope in dump.scopes]
    versions = {event.version for event in dump.logs[1]}
    sent = [await client.message(dump.talk, dump.user, f"number {n}") for n in range(5)]
    for scope, log, cursors in zip(dump.scopes, dump.logs, before, strict=True):
        for cursor in (cursors[0], cursors[-1]):
            rest = await client.log(**scope, resume_cursor=cursor)
            assert [event.message for event in rest[-5:]] == sent
        assert len(await client.log(**scope)) == len(log) + 5
        assert [event.version for event in rest] == [max(versions) + n for n in range(1, 6)]
    return [(await cursors_of(client, scope))[-1] for scope in dump.scopes]


async def test_a_dump_restored_elsewhere_replays_everything_and_expires_cursors(
    dumped: Dump, elsewhere: EmbeddedPostgres, tmp_path: Path
) -> None:
    await restore(dumped, elsewhere.url)
    async with serving(elsewhere.url, tmp_path) as client:
        await everything_is_there(client, dumped)
        await old_cursors_are_expired(client, dumped)
        cursors = await it_goes_on(client, dumped)
    # Not at every start: those of its own life go on.
    async with serving(elsewhere.url, tmp_path) as client:
        await client.message(dumped.talk, dumped.user, "after a restart")
        for scope, cursor in zip(dumped.scopes, cursors, strict=True):
            (event,) = await client.log(**scope, resume_cursor=cursor)
            assert event.message.content == "after a restart"


async def test_a_dump_restored_into_the_same_postgresql_is_recognised_as_well(
    dumped: Dump, beside: str, tmp_path: Path
) -> None:
    await restore(dumped, beside)
    async with serving(beside, tmp_path) as client:
        await everything_is_there(client, dumped)
        await old_cursors_are_expired(client, dumped)
        await it_goes_on(client, dumped)


async def test_a_cursor_of_a_database_that_was_never_this_one_is_no_cursor(
    dumped: Dump, elsewhere: EmbeddedPostgres, tmp_path: Path
) -> None:
    await schema.migrate(elsewhere.url)
    async with serving(elsewhere.url, tmp_path) as client:
        user = await client.user()
        await client.conversation(user)
        (cursor, *_) = [cursor for scope, cursor in dumped.cursors if "everything" in scope]
        told = await failure(client.list_events(everything=True, resume_cursor=cursor))

    assert (told.code, told.reason) == ("INVALID_ARGUMENT", "INVALID_CURSOR")


async def test_after_going_back_in_time_an_operator_begins_an_era(
    dumped: Dump, parley: Client, postgres: EmbeddedPostgres
) -> None:
    """As after a recovery to a point in time, of which nothing in the database tells."""
    watching = parley.watch(conversation_id=dumped.talk.id)
    assert (await watching.read()).caught_up
    said = await asyncio.to_thread(command, "db", "new-era", database_url=plain(postgres.url))
    await parley.message(dumped.talk, dumped.user, "to wake who waits")
    told = await failure(watching.read())

    assert (said.returncode, said.stderr) == (0, "")
    assert re.fullmatch(r"Era \d+ has begun: cursors .* are expired\.\n", said.stdout)
    assert (told.code, told.reason) == ("OUT_OF_RANGE", "CURSOR_EXPIRED")
    await old_cursors_are_expired(parley, dumped)
    fresh = await parley.log(conversation_id=dumped.talk.id)
    assert [event.version for event in fresh] == list(range(1, len(fresh) + 1))


async def test_an_era_waits_for_whoever_still_writes_in_the_one_before(
    parley: Client, postgres: EmbeddedPostgres
) -> None:
    """Or an event would come into the past of somebody who has read on in the new one."""
    doors = Store(postgres.url, pool_size=1)
    before = (await parley.list_events(everything=True)).cursor
    fact = Fact(type=EventType.CONVERSATION_UPDATED, actor_id=None)
    async with doors.transaction() as transaction:
        await transaction.events.record(conversation_id=uuid4(), after_version=0, facts=[fact])
        beginning = asyncio.create_task(eras.begin(postgres.url))
        await asyncio.sleep(0.5)
        assert not beginning.done()
    await beginning
    await doors.close()

    told = await failure(parley.list_events(everything=True, resume_cursor=before))
    assert told.reason == "CURSOR_EXPIRED"


async def test_a_restored_database_in_the_place_of_one_that_is_served_begins_an_era_first(
    dumped: Dump, postgres: EmbeddedPostgres, elsewhere: EmbeddedPostgres, tmp_path: Path
) -> None:
    """Nothing is written to it as if it were the one before, and who watches is told."""
    await restore(dumped, elsewhere.url)
    folder = tmp_path / "proxy"
    folder.mkdir()
    sent = 0
    async with proxy(folder, postgres.url) as between, serving(between.url, tmp_path) as client:
        watching = [client.watch(**scope) for scope in dumped.scopes]
        for each in watching:
            assert (await each.read()).caught_up
        stopping = asyncio.Event()

        async def write() -> None:
            nonlocal sent
            while not stopping.is_set():
                with suppress(grpc.aio.AioRpcError):
                    await client.message(dumped.talk, dumped.user, "whoever you are")
                    sent += 1

        writing = [asyncio.create_task(write()) for _ in range(4)]
        await asyncio.sleep(0.3)
        await between.lead_to(elsewhere.url)
        before = sent
        async with asyncio.timeout(20):
            while sent < before + 20:
                await asyncio.sleep(0.02)
        stopping.set()
        await asyncio.gather(*writing)
        ends = [await failure(_drained(each)) for each in watching]
        await old_cursors_are_expired(client, dumped)
        log = await client.log(everything=True)

    for told in ends:
        assert (told.code, told.reason) == ("OUT_OF_RANGE", "CURSOR_EXPIRED")
    assert keys(log[: len(dumped.logs[0])]) == keys(dumped.logs[0])
    assert len(log) > len(dumped.logs[0]) + 10
    assert list(holes(log, {})) == []


async def _drained(watching: Any) -> None:
    while await watching.read():
        pass


def plain(url: str) -> str:
    return url.replace("postgresql+asyncpg", "postgresql")
