"""The harness itself: each of the mistakes that a change feed is known for is caught by it, and
where none is made it finds nothing.

Two servers over one database; some commits of the first are held, some are cut off. `SEED` in the
environment repeats the choices of other runs.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import asyncpg
import grpc
import pytest
from sqlalchemy import URL

from service import following, watching
from service.doorbell import Doorbell
from service.embedded import EmbeddedPostgres
from service.paging import FeedCursors
from service.repositories import feed
from service.repositories.base import Connection
from service.repositories.events import Events
from service.rules.feed import Place, is_whole
from service.server import Server
from service.settings import load
from service.store import Store

from .conftest import TABLES
from .make import Client
from .proxy import Fault, Proxy, proxy
from .storm import Storm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SEED = int(os.environ.get("SEED", "1"))
RUNS = 3
SECONDS = 1.5
# How long a held COMMIT is held, and how long those who watch have to read what is left.
HELD_SECONDS, PATIENCE_SECONDS = 0.4, 5.0
# Until nobody is cut any more, and every ring is heard.
QUIET_SECONDS = 0.7
WRITERS, TALKS, CURSORS = 8, 4, 20


@asynccontextmanager
async def replicas(
    folder: Path, between: Proxy, postgres: EmbeddedPostgres
) -> AsyncIterator[list[Client]]:
    """Two servers over one database, the first of them through the proxy; a client of each."""
    async with AsyncExitStack() as exits:
        clients = []
        for name, url in (("held", between.url), ("direct", postgres.url)):
            (folder / name).mkdir(exist_ok=True)
            server = Server(load(address="127.0.0.1:0", data_dir=folder / name), url)
            server.bind()
            await server.start()
            exits.push_async_callback(server.stop)
            await server.readiness.ready.wait()
            channel = await exits.enter_async_context(
                grpc.aio.insecure_channel(
                    server.address, options=[("grpc.use_local_subchannel_pool", 1)]
                )
            )
            assert server.token
            clients.append(Client(channel, server.token))
        yield clients


async def storm(seed: int, folder: Path, postgres: EmbeddedPostgres) -> Storm:
    async with (
        proxy(folder, postgres.url) as between,
        replicas(folder, between, postgres) as clients,
    ):
        raging = Storm(clients, seed, SECONDS)
        await raging.prepare(writers=WRITERS, talks=TALKS)
        between.meanwhile = lambda: asyncio.sleep(HELD_SECONDS)

        async def break_things() -> None:
            for fault in (Fault.HELD, Fault.CUT_BEFORE, Fault.HELD):
                between.faults.append(fault)
                await asyncio.sleep(SECONDS / 3)

        async def one_cut_and_one_overtaken() -> None:
            """Alone: nothing that comes later makes good for them."""
            between.faults.clear()
            held, direct = clients
            await asyncio.sleep(QUIET_SECONDS)
            between.faults.append(Fault.CUT_BEFORE)
            await raging.entitle(held, raging.talks[0])
            await asyncio.sleep(QUIET_SECONDS)
            between.faults.append(Fault.HELD)
            saying = asyncio.create_task(raging.say(held, raging.talks[0]))
            while between.faults and not saying.done():
                await asyncio.sleep(0.01)
            # It has its number by now, and this one overtakes it.
            await raging.say(direct, raging.talks[1])
            await saying

        await raging.rage(break_things, finale=one_cut_and_one_overtaken, patience=PATIENCE_SECONDS)
        await raging.resume(CURSORS)
        assert between.fired >= 2
        return raging


async def found(seed: int, folder: Path, postgres: EmbeddedPostgres) -> list[str]:
    """What is wrong in one run, which leaves nothing behind."""
    try:
        raging = await storm(seed, folder, postgres)
    finally:
        connection = await asyncpg.connect(postgres.url.replace("postgresql+asyncpg", "postgresql"))
        await connection.execute(f"TRUNCATE {TABLES}")
        await connection.close()
    print(raging.report())
    return raging.violations()


async def test_nothing_is_found_where_nothing_is_wrong(
    tmp_path: Path, postgres: EmbeddedPostgres
) -> None:
    for seed in range(SEED, SEED + RUNS):
        assert await found(seed, tmp_path, postgres) == []


async def test_a_lost_ring_is_no_mistake_while_somebody_looks(
    tmp_path: Path, postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_ring_between_processes(monkeypatch)
    assert await found(SEED, tmp_path, postgres) == []


# The mistakes


def no_horizon(patch: pytest.MonkeyPatch) -> None:
    """The wide scopes read what has the next number, whoever is still to commit a smaller one."""
    for name in ("OF_EVERYTHING", "OF_USERS", "STIRRED", "NOW_OF_EVERYTHING"):
        _edit(patch, name, "pg_snapshot_xmin(", "pg_snapshot_xmax(")


def ring_before_commit(patch: pytest.MonkeyPatch) -> None:
    """Whoever hears it looks, finds nothing yet, and is not told again."""
    commit = Store._commit

    async def ring_and_commit(self: Any, pooled: Any, mark: Any) -> None:
        ring = self.__dict__.setdefault("early", self.on_commit)
        self.on_commit = lambda _: None
        if mark:
            # Where it is to be looked, only what comes after COMMIT knows: everywhere.
            ring(())
            ring.__self__._hear("")
        await commit(self, pooled, mark)

    patch.setattr(Store, "_commit", ring_and_commit)
    no_poll(patch)


def no_ring_between_processes(patch: pytest.MonkeyPatch) -> None:
    async def deaf(_self: Doorbell) -> None:
        await asyncio.Event().wait()

    patch.setattr(Doorbell, "_carry", deaf)


def lost_ring_without_poll(patch: pytest.MonkeyPatch) -> None:
    no_ring_between_processes(patch)
    no_poll(patch)


def no_poll(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(watching, "POLL_SECONDS", 3600.0)


def cursor_one_ahead(patch: pytest.MonkeyPatch) -> None:
    _move_cursors(patch, 1)


def cursor_one_behind(patch: pytest.MonkeyPatch) -> None:
    _move_cursors(patch, -1)


def membership_checked_only_at_the_start(patch: pytest.MonkeyPatch) -> None:
    """Who was joined once is taken to be joined still."""
    views = following._views
    first: dict[following.Person, Any] = {}

    async def as_at_first(*arguments: Any) -> following.Views:
        found = await views(*arguments)
        for person, view in found.items():
            if person[1] and is_whole(view):
                first.setdefault(person, view)
        return found | {person: first[person] for person in found if person in first}

    patch.setattr(following, "_views", as_at_first)


def membership_as_it_is_now(patch: pytest.MonkeyPatch) -> None:
    """A user's log has what happened wherever it is joined now, whatever it was then."""
    start, end = "(SELECT own.status", "ORDER BY own.version DESC LIMIT 1)"
    statement = feed.OF_USERS
    part = statement[statement.index(start) : statement.index(end) + len(end)]
    _edit(patch, "OF_USERS", part, "p.status")


def event_outside_the_transaction(patch: pytest.MonkeyPatch) -> None:
    """Written by a connection of its own, so that it is there whatever becomes of the rest."""
    record = Events.record

    async def apart(self: Events, **values: Any) -> None:
        await record(Events(cast(Connection, Outside(self._connection._engine.url))), **values)

    patch.setattr(Events, "record", apart)


class Outside:
    """What `Events` wants of a connection, in a transaction of its own."""

    def __init__(self, url: URL) -> None:
        self._url = url.set(drivername="postgresql").render_as_string()

    async def fetch(self, sql: str, *arguments: object) -> None:
        connection = await asyncpg.connect(self._url)
        try:
            await connection.fetch(sql, *arguments)
        finally:
            await connection.close()


def _edit(patch: pytest.MonkeyPatch, name: str, old: str, new: str) -> None:
    statement = getattr(feed, name)
    assert old in statement
    patch.setattr(feed, name, statement.replace(old, new))


def _move_cursors(patch: pytest.MonkeyPatch, by: int) -> None:
    sealer = FeedCursors.sealer

    def elsewhere(self: FeedCursors, **values: Any) -> Callable[[Place], str]:
        seal = sealer(self, **values)
        return lambda place: seal(replace(place, version=place.version + by))

    patch.setattr(FeedCursors, "sealer", elsewhere)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (no_horizon, "I19 missed"),
        (ring_before_commit, "I19 missed"),
        (lost_ring_without_poll, "I19 missed"),
        (cursor_one_ahead, "I19 missed"),
        (cursor_one_behind, "I19 twice"),
        (membership_checked_only_at_the_start, "I14"),
        (membership_as_it_is_now, "I20 I19 missed"),
        (event_outside_the_transaction, "I19"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_a_mistake_is_caught(
    mistake: Callable[[pytest.MonkeyPatch], None],
    said: str,
    tmp_path: Path,
    postgres: EmbeddedPostgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(monkeypatch)
    for seed in range(SEED, SEED + RUNS):
        wrong = await found(seed, tmp_path, postgres)
        print(*wrong[:5], sep="\n")
        if any(each.startswith(said) for each in wrong):
            print(f"{mistake.__name__}: caught in run {seed - SEED + 1}")
            return
    raise AssertionError(f"{mistake.__name__} was not caught in {RUNS} runs")
