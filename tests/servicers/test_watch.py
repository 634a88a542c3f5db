"""Watch: history, then what happens, each event once and in order, until the watcher has to go."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import pytest
import pytest_asyncio
import structlog
from prometheus_client import REGISTRY

from parley.v1 import message_pb2
from service import doorbell, following, interceptors, watching
from service.embedded import EmbeddedPostgres
from service.ids import lock_of
from service.server import Server
from service.settings import load

from ..make import USER, Client, Conversation, Event, User, failure
from ..proxy import proxy


class Watcher:
    """What a watch has given so far."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.cursor = ""
        self.events: list[Event] = []
        self.responses = 0

    async def next(self, seconds: float = 5) -> Any:
        """The next response."""
        async with asyncio.timeout(seconds):
            response = await self.call.read()
        assert response, "the stream has ended"
        self.events += response.events
        self.cursor = response.cursor
        self.responses += 1
        return response

    async def until(self, version: int) -> list[Event]:
        """Read up to that version of the conversation that comes."""
        while not self.events or self.events[-1].version < version:
            await self.next()
        return self.events

    async def caught_up(self) -> list[Event]:
        """Read until it says so."""
        while not (await self.next()).caught_up:
            pass
        return self.events


@asynccontextmanager
async def watch(client: Client, **asked: Any) -> AsyncIterator[Watcher]:
    call = client.watch(**asked)
    try:
        yield Watcher(call)
    finally:
        call.cancel()


@pytest_asyncio.fixture
async def ada(parley: Client) -> User:
    return await parley.user("ada")


@pytest_asyncio.fixture
async def bob(parley: Client) -> User:
    return await parley.user("bob")


@pytest_asyncio.fixture
async def talk(parley: Client, ada: User, bob: User) -> Conversation:
    return await parley.conversation(ada, bob, first="Tea?")


@pytest_asyncio.fixture
async def beside(postgres: EmbeddedPostgres, tmp_path: Path) -> AsyncIterator[Server]:
    """Another server over the same database."""
    server = Server(load(address="127.0.0.1:0", data_dir=tmp_path), postgres.url)
    server.bind()
    await server.start()
    await server.readiness.ready.wait()
    yield server
    await server.stop()


def scope(name: str, talk: Conversation, user: User) -> dict[str, Any]:
    scopes: dict[str, dict[str, Any]] = {
        "conversation": {"conversation_id": talk.id},
        "user": {"user_id": user.id},
        "everything": {"everything": True},
    }
    return scopes[name]


each_scope = pytest.mark.parametrize("name", ["conversation", "user", "everything"])


@each_scope
async def test_history_comes_first_and_then_what_happens(
    parley: Client, ada: User, bob: User, talk: Conversation, name: str
) -> None:
    asked = scope(name, talk, ada)
    async with watch(parley, oldest=True, **asked) as watcher:
        history = len(await watcher.caught_up())
        sent = [await parley.message(talk, ada, f"number {n}") for n in range(3)]
        events = await watcher.until(7)

    assert history == len(events) - 3
    assert [event.message for event in events[-3:]] == sent
    # The conversation itself has changed since it was told of.
    again = await parley.log(**asked)
    assert [(e.version, e.type) for e in events] == [(e.version, e.type) for e in again]


@each_scope
async def test_without_a_start_it_begins_now_and_says_where(
    parley: Client, ada: User, talk: Conversation, name: str
) -> None:
    asked = scope(name, talk, ada)
    async with watch(parley, **asked) as watcher:
        first = await watcher.next()
        await parley.message(talk, ada, "news")
        events = await watcher.until(5)

    assert (list(first.events), first.caught_up) == ([], True)
    assert [event.version for event in events] == [5]
    assert await parley.log(resume_cursor=first.cursor, **asked) == events
    assert await parley.log(resume_cursor=watcher.cursor, **asked) == []


@each_scope
async def test_it_goes_on_after_a_cursor(
    parley: Client, ada: User, talk: Conversation, name: str
) -> None:
    asked = scope(name, talk, ada)
    page = await parley.list_events(**asked)
    await parley.message(talk, ada, "one")
    async with watch(parley, resume_cursor=page.cursor, **asked) as watcher:
        await watcher.until(5)
    await parley.message(talk, ada, "two")
    async with watch(parley, resume_cursor=watcher.cursor, **asked) as again:
        await again.until(6)

    contents = [event.message.content for event in watcher.events + again.events]
    assert contents == ["one", "two"]


async def test_it_is_told_within_milliseconds(
    parley: Client, ada: User, talk: Conversation
) -> None:
    took = []
    async with watch(parley, conversation_id=talk.id) as watcher:
        await watcher.next()
        for n in range(20):
            await parley.message(talk, ada, f"number {n}")
            started = time.monotonic()
            await watcher.until(5 + n)
            took.append(time.monotonic() - started)

    assert sorted(took)[10] < watching.POLL_SECONDS / 2, took


@each_scope
async def test_what_another_process_commits_is_told_as_soon(
    parley: Client, ada: User, talk: Conversation, beside: Server, name: str
) -> None:
    took = []
    async with (
        grpc.aio.insecure_channel(beside.address) as channel,
        watch(Client(channel, parley.token), **scope(name, talk, ada)) as watcher,
    ):
        await watcher.next()
        for n in range(20):
            await parley.message(talk, ada, f"number {n}")
            started = time.monotonic()
            await watcher.until(5 + n)
            took.append(time.monotonic() - started)

    assert sorted(took)[10] < watching.POLL_SECONDS / 2, took


async def test_what_another_process_commits_lets_nobody_look_elsewhere(
    parley: Client, ada: User, talk: Conversation, beside: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = await parley.conversation(ada)
    looked: Counter[object] = Counter()
    news = beside.watching._follower.news

    async def noted(asks: Sequence[following.Ask]) -> Any:
        looked.update(str(ask.subject.conversation_id) for ask in asks)
        return await news(asks)

    monkeypatch.setattr(beside.watching._follower, "news", noted)
    async with (
        grpc.aio.insecure_channel(beside.address) as channel,
        watch(Client(channel, parley.token), conversation_id=talk.id) as watcher,
        watch(Client(channel, parley.token), conversation_id=quiet.id) as other,
    ):
        await watcher.next()
        await other.next()
        # The others have rung everywhere once, and nobody looks by himself any more.
        await asyncio.sleep(0.2)
        monkeypatch.setattr(watching, "POLL_SECONDS", 3600.0)
        await asyncio.sleep(0.2)
        looked.clear()
        for n in range(10):
            await parley.message(talk, ada)
            await watcher.until(5 + n)
        monkeypatch.undo()

    # Once, where its last heartbeat was taken late.
    assert looked[quiet.id] <= 1 < 10 <= looked[talk.id]


async def test_other_processes_are_rung_for_while_they_ask_and_asked_while_somebody_watches(
    parley: Client,
    ada: User,
    talk: Conversation,
    postgres: EmbeddedPostgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doorbell, "ASKED_SECONDS", 0.5)
    monkeypatch.setattr(doorbell, "ASK_SECONDS", 0.1)
    heard: asyncio.Queue[object] = asyncio.Queue()
    other = await asyncpg.connect(postgres.url.replace("+asyncpg", ""))
    await other.add_listener(doorbell.CHANNEL, lambda *told: heard.put_nowait(told[3]))

    async def rings_of_a_message() -> list[object]:
        await asyncio.sleep(0.6)
        while not heard.empty():
            heard.get_nowait()
        await parley.message(talk, ada)
        await asyncio.sleep(0.2)
        return [heard.get_nowait() for _ in range(heard.qsize())]

    async def silence() -> None:
        """Whoever asked before is rung for, for a while."""
        async with asyncio.timeout(10):
            while await rings_of_a_message():
                pass

    try:
        await silence()

        asking = asyncio.create_task(ask_again_and_again(other))
        assert f"at {lock_of(UUID(talk.id))}" in await rings_of_a_message()
        asking.cancel()

        async with watch(parley, conversation_id=talk.id) as watcher:
            await watcher.next()
            assert doorbell.ASK in await rings_of_a_message()
        await silence()
    finally:
        await other.close()


async def ask_again_and_again(other: asyncpg.Connection) -> None:
    while True:
        await other.execute(f"NOTIFY {doorbell.CHANNEL}, '{doorbell.ASK}'")
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("way", ["past the pooler", "nowhere"])
async def test_another_process_is_heard_past_a_pooler_or_found_by_looking(
    parley: Client,
    ada: User,
    talk: Conversation,
    postgres: EmbeddedPostgres,
    tmp_path: Path,
    way: str,
) -> None:
    """`nowhere`: nothing is rung from there, as behind a pooler that swallows what is told."""
    url = postgres.url if way == "past the pooler" else "postgresql://parley@127.0.0.1:1/parley"
    beside = Server(load(address="127.0.0.1:0", data_dir=tmp_path, listen_url=url), postgres.url)
    beside.bind()
    await beside.start()
    try:
        await beside.readiness.ready.wait()
        async with (
            grpc.aio.insecure_channel(beside.address) as channel,
            watch(Client(channel, parley.token), conversation_id=talk.id) as watcher,
        ):
            await watcher.next()
            before = beside.doorbell.rings
            for n in range(20):
                await parley.message(talk, ada, f"number {n}")
                await watcher.until(5 + n)
            heard = beside.doorbell.rings - before
    finally:
        await beside.stop()

    assert (heard > 0) == (way == "past the pooler")


async def test_no_connection_is_held_for_who_does_not_read(
    parley: Client, ada: User, talk: Conversation, server: Server
) -> None:
    for _ in range(60):
        await parley.message(talk, ada, "x" * 250_000)
    async with watch(parley, conversation_id=talk.id, oldest=True) as watcher:
        await watcher.next()
        await at_rest()
        assert server.watching.count == 1


async def at_rest() -> None:
    """Return once no connection of the pool has been at work for a while."""
    name, since = "parley_database_connections_in_use", time.monotonic()
    async with asyncio.timeout(10):
        while time.monotonic() - since < 0.3:
            if REGISTRY.get_sample_value(name):
                since = time.monotonic()
            await asyncio.sleep(0.005)


async def test_a_lost_ring_costs_milliseconds_only(
    parley: Client, ada: User, talk: Conversation, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.store, "on_commit", lambda _: None)
    async with watch(parley, conversation_id=talk.id) as watcher:
        await watcher.next()
        await parley.message(talk, ada, "unheard")
        started = time.monotonic()
        await watcher.until(5)

    assert time.monotonic() - started < 1


async def test_an_invitation_rings_at_its_invitee(
    parley: Client, ada: User, talk: Conversation
) -> None:
    cleo = await parley.user("cleo")
    async with watch(parley.acting_as(cleo), user_id="cleo") as watcher:
        await watcher.next()
        await parley.message(talk, ada, "not for cleo")
        await parley.invite(talk, cleo, invited_by_user_id=ada.id)
        (event,) = await watcher.until(6)
        await parley.accept(talk, cleo)
        sent = await parley.message(talk, ada, "for cleo")
        await watcher.until(8)

    assert event.participant.user_id == cleo.id
    assert [event.version for event in watcher.events] == [6, 7, 8]
    assert watcher.events[-1].message == sent


async def test_many_who_watch_the_same_see_what_each_of_them_may(
    parley: Client, ada: User, bob: User, talk: Conversation
) -> None:
    dan = await parley.user("dan")
    await parley.add(talk, dan, invited_by_user_id=ada.id, hide_history=True)
    clients = [parley, parley.acting_as(bob), parley.acting_as(dan)]
    async with AsyncExitStack() as open_watches:
        watchers = [
            await open_watches.enter_async_context(watch(client, **asked))
            for asked in ({"conversation_id": talk.id}, {"user_id": dan.id})
            for client in clients
            if "user_id" not in asked or client is not clients[1]
        ]
        for each in watchers:
            await each.next()
        await parley.delete_message(talk, sequence=1)
        sent = await parley.message(talk, ada, "for all")
        for each in watchers:
            await each.until(7)

    shown = [[event.HasField("message") for event in each.events] for each in watchers]
    assert [len(each) for each in shown] == [2] * 5
    assert all(each.events[1].message == sent for each in watchers)
    # The system sees all; bob, what was before dan came.
    assert [each[0] for each in shown] == [True, True, False, True, False]
    for hidden in (watchers[2], watchers[4]):
        assert hidden.events[0].type == Event.TYPE_WITHHELD


@pytest.mark.parametrize("how", ["leave", "remove"])
async def test_who_goes_is_told_so_and_nothing_more(
    parley: Client, ada: User, bob: User, talk: Conversation, how: str
) -> None:
    async with watch(parley.acting_as(bob), conversation_id=talk.id) as watcher:
        await watcher.next()
        await parley.message(talk, ada, "heard")
        await watcher.until(5)
        await getattr(parley, how)(talk, bob)
        await parley.message(talk, ada, "not heard")
        await watcher.until(6)
        lost = await failure(watcher.next())
    again = await failure(parley.acting_as(bob).watch(conversation_id=talk.id).read())

    assert [event.version for event in watcher.events] == [5, 6]
    assert watcher.events[-1].participant.user_id == bob.id
    assert (lost.code, lost.reason) == ("PERMISSION_DENIED", "ACCESS_LOST")
    assert again.reason == "ACCESS_LOST"


async def test_a_purge_ends_an_actors_watch_and_is_told_to_the_system(
    parley: Client, bob: User, talk: Conversation
) -> None:
    async with (
        watch(parley.acting_as(bob), conversation_id=talk.id) as own,
        watch(parley, conversation_id=talk.id) as systems,
    ):
        await own.next()
        await systems.next()
        await parley.delete(talk)
        await own.until(5)
        await parley.purge(talk)
        gone = await failure(own.next())
        await systems.until(6)

    assert (gone.code, gone.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")
    assert systems.events[-1].type == Event.TYPE_CONVERSATION_PURGED


@each_scope
async def test_silence_is_broken_by_a_fresh_cursor(
    parley: Client,
    ada: User,
    talk: Conversation,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(server.watching, "_heartbeat", 0.2)
    asked = scope(name, talk, ada)
    async with watch(parley, **asked) as watcher:
        first = await watcher.next()
        beats = [await watcher.next() for _ in range(3)]

    assert first.caught_up
    for beat in beats:
        assert (list(beat.events), beat.caught_up) == ([], False)
    assert await parley.log(resume_cursor=beats[-1].cursor, **asked) == []


async def test_a_call_of_five_hundred_messages_comes_as_one(
    parley: Client, ada: User, talk: Conversation
) -> None:
    batch = [message_pb2.NewMessage(sender_id=ada.id, role=USER, content="x") for _ in range(500)]
    request = message_pb2.BatchSendMessagesRequest(conversation_id=talk.id, messages=batch)
    async with watch(parley, conversation_id=talk.id) as watcher:
        await watcher.next()
        await parley.messages.BatchSendMessages(request)
        response = await watcher.next()

    assert (len(response.events), response.incomplete) == (500, False)


async def test_a_large_call_is_read_once_for_all_who_watch(
    parley: Client, ada: User, talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read it for itself, two at a time: the last of 200 was told after seven seconds."""
    readings = 0
    tell = following._tell

    async def counted(*arguments: Any) -> Any:
        nonlocal readings
        readings += 1
        return await tell(*arguments)

    batch = [message_pb2.NewMessage(sender_id=ada.id, role=USER, content="x") for _ in range(500)]
    request = message_pb2.BatchSendMessagesRequest(conversation_id=talk.id, messages=batch)
    async with AsyncExitStack() as open_watches:
        watchers = [
            await open_watches.enter_async_context(watch(parley, conversation_id=talk.id))
            for _ in range(30)
        ]
        for each in watchers:
            await each.next()
        monkeypatch.setattr(following, "_tell", counted)
        await parley.messages.BatchSendMessages(request)
        for each in watchers:
            await each.next()

    assert [len(each.events) for each in watchers] == [500] * 30
    assert readings < 10


async def test_a_large_call_comes_whole_to_each_of_those_who_see_different_parts(
    parley: Client, ada: User, talk: Conversation
) -> None:
    """600 KB for each: those who share a response's megabyte would be cut."""
    batch = [
        message_pb2.NewMessage(sender_id=ada.id, role=USER, content="x" * 1_200) for _ in range(500)
    ]
    request = message_pb2.BatchSendMessagesRequest(conversation_id=talk.id, messages=batch)
    async with AsyncExitStack() as open_watches:
        watchers = []
        for name in ("dan", "eve", "fay", "gus", "hal"):
            newcomer = await parley.user(name)
            await parley.message(talk, ada, "before")
            await parley.add(talk, newcomer, invited_by_user_id=ada.id, hide_history=True)
            own = parley.acting_as(newcomer)
            watchers += [
                await open_watches.enter_async_context(watch(own, conversation_id=talk.id))
                for _ in range(2)
            ]
        for each in watchers:
            await each.next()
        await parley.messages.BatchSendMessages(request)
        responses = []
        for each in watchers:
            while len((response := await each.next()).events) < 10:
                pass
            responses.append((len(response.events), response.incomplete))

    assert responses == [(500, False)] * len(watchers)


# Limits and ends


async def test_watches_are_counted(
    parley: Client, ada: User, bob: User, talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "MAX_WATCHES_OF_ACTOR", 2)
    monkeypatch.setattr(watching, "MAX_WATCHES", 3)
    own = parley.acting_as(ada)
    async with (
        watch(own, conversation_id=talk.id) as one,
        watch(own, user_id="ada") as two,
        watch(parley, everything=True) as three,
    ):
        for each in (one, two, three):
            await each.next()
        of_actor = await failure(own.watch(user_id="ada").read())
        of_server = await failure(parley.acting_as(bob).watch(user_id="bob").read())
    await asyncio.sleep(0.3)
    async with watch(own, user_id="ada") as again:
        await again.next()

    assert (of_actor.code, of_actor.quota) == ("RESOURCE_EXHAUSTED", "watches of this actor")
    assert (of_server.code, of_server.quota) == ("RESOURCE_EXHAUSTED", "watches of this server")


async def test_a_client_that_goes_leaves_nothing(
    parley: Client, talk: Conversation, server: Server
) -> None:
    watchers = [Watcher(parley.watch(conversation_id=talk.id)) for _ in range(50)]
    for each in watchers:
        await each.next()
    assert server.watching.count == 50
    for each in watchers:
        each.call.cancel()

    async with asyncio.timeout(1):
        while server.watching.count:
            await asyncio.sleep(0.02)


async def test_a_client_that_reads_nothing_is_let_go(
    parley: Client, ada: User, talk: Conversation, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setattr(interceptors, "STALL_SECONDS", 0.5)
    for _ in range(60):
        await parley.message(talk, ada, "x" * 250_000)
    call = parley.watch(conversation_id=talk.id, oldest=True)
    first = await call.read()
    async with asyncio.timeout(5):
        while server.watching.count:
            await asyncio.sleep(0.05)

    seen = [first]

    async def read_on() -> None:
        while response := await call.read():
            seen.append(response)

    failed = await failure(read_on())
    assert (failed.code, failed.reason) == ("RESOURCE_EXHAUSTED", "WATCH_TOO_SLOW")
    rest = await parley.log(conversation_id=talk.id, resume_cursor=seen[-1].cursor)
    assert [event.version for response in seen for event in response.events] + [
        event.version for event in rest
    ] == list(range(1, 65))


async def test_an_actor_who_is_deactivated_does_not_watch_on(
    parley: Client,
    ada: User,
    talk: Conversation,
    database: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interceptors, "READMIT_SECONDS", 0.0)
    async with watch(parley.acting_as(ada), conversation_id=talk.id) as watcher:
        await watcher.next()
        await database.execute("UPDATE users SET is_active = false WHERE username = 'ada'")
        await parley.update(talk, title="Coffee")
        refused = await failure(watcher.next())

    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "ACTOR_NOT_ALLOWED")


async def test_one_line_tells_of_a_watch(parley: Client, ada: User, talk: Conversation) -> None:
    with structlog.testing.capture_logs() as lines:
        async with watch(parley.acting_as(ada), conversation_id=talk.slug) as watcher:
            await watcher.next()
        async with asyncio.timeout(5):
            while not (told := [line for line in lines if "Watch" in line.get("method", "")]):
                await asyncio.sleep(0.02)

    (line,) = told
    assert (line["caller"], line["actor"]) == ("development", ada.id)
    assert (line["conversation_id"], line["code"]) == (talk.slug, "CANCELLED")
    assert line["responses"] == 1


async def test_a_drain_ends_watches_which_go_on_elsewhere(
    parley: Client, ada: User, talk: Conversation, beside: Server
) -> None:
    async with grpc.aio.insecure_channel(beside.address) as channel:
        watcher = Watcher(Client(channel, parley.token).watch(conversation_id=talk.id))
        await watcher.next()
        await parley.message(talk, ada, "before")
        await watcher.until(5)
        stopping = asyncio.create_task(beside.stop())
        ended = await failure(watcher.next())
        await stopping
    await parley.message(talk, ada, "after")

    assert (ended.code, ended.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
    again = await parley.log(conversation_id=talk.id, resume_cursor=watcher.cursor)
    assert [event.message.content for event in again] == ["after"]


async def test_a_client_that_reads_nothing_holds_no_drain_up(
    parley: Client, ada: User, talk: Conversation, beside: Server
) -> None:
    for _ in range(60):
        await parley.message(talk, ada, "x" * 250_000)
    async with grpc.aio.insecure_channel(beside.address) as channel:
        call = Client(channel, parley.token).watch(conversation_id=talk.id, oldest=True)
        await call.read()
        await asyncio.sleep(0.5)
        started = time.monotonic()
        await beside.stop()

    assert time.monotonic() - started < 5


async def test_a_watch_ends_when_the_database_is_away_for_long(
    parley: Client,
    talk: Conversation,
    postgres: EmbeddedPostgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "PATIENCE_SECONDS", 1.0)
    async with proxy(tmp_path, postgres.url) as between:
        server = Server(load(address="127.0.0.1:0", data_dir=tmp_path), between.url)
        server.bind()
        await server.start()
        await server.readiness.ready.wait()
        async with grpc.aio.insecure_channel(server.address) as channel:
            watcher = Watcher(Client(channel, parley.token).watch(conversation_id=talk.id))
            await watcher.next()
            between.cut()
            await parley.update(talk, title="told all the same")
            await watcher.until(5)
            await between.close()
            ended = await failure(watcher.next())
        await server.stop()

    assert (ended.code, ended.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
