"""The change feed under everything at once: nothing is lost, doubled or out of order, and whoever
replays it has what Get and List show.

`SEED` in the environment repeats the choices of a run, `PARLEY_FAULT_CYCLES` makes it longer.
"""

import asyncio
import os
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio

from parley.v1 import message_pb2, participant_pb2
from service.embedded import EmbeddedPostgres

from .make import MODERATOR, USER, Client, Conversation, Event, Message, Participant, User
from .process import CHANNEL, SERVING, Service, kill

SEED = int(os.environ.get("SEED", "0")) or random.randrange(1, 1 << 31)
CYCLES = int(os.environ.get("PARLEY_FAULT_CYCLES", "1"))
ACTIONS = 300 * CYCLES
# So many conversations, in which so many write at a time.
CONVERSATIONS, WRITERS = 3, 6
# A watch is cut after so long at the most.
CUT_SECONDS = 0.3

# What a call may be told where it makes no sense, or meets another.
EXPECTED = {
    "ABORTED",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "NOT_FOUND",
    "OUT_OF_RANGE",
    "PERMISSION_DENIED",
}


@dataclass
class Crowd:
    """Some users in some conversations, who do at random whatever there is to do."""

    parley: Client
    users: list[User]
    talks: list[Conversation]
    choices: random.Random = field(default_factory=lambda: random.Random(SEED))
    done: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    async def act(self) -> None:
        talk = self.choices.choice(self.talks)
        user, by = self.choices.choice(self.users), self.choices.choice(self.users)
        parley, actor = self.parley, self.parley.acting_as(by)
        sequence = self.choices.randint(1, 5)
        actions: dict[str, Callable[[], Awaitable[Any]]] = {
            "send": lambda: actor.send(talk, f"{self.done['send']}", tokens_used=3),
            "batch": lambda: actor.messages.BatchSendMessages(
                message_pb2.BatchSendMessagesRequest(
                    conversation_id=talk.id,
                    messages=[message_pb2.NewMessage(role=USER, content="b")] * sequence,
                )
            ),
            "delete message": lambda: actor.delete_message(talk, sequence=sequence),
            "undelete message": lambda: parley.undelete_message(talk, sequence=sequence),
            "read": lambda: actor.mark_read(talk, by, sequence),
            "title": lambda: actor.update(talk, title=f"Title {sequence}"),
            "invite": lambda: actor.invite(talk, user, hide_history=sequence > 3),
            "add": lambda: actor.add(talk, user, role=MODERATOR),
            "accept": lambda: parley.accept(talk, user),
            "decline": lambda: parley.decline(talk, user),
            "leave": lambda: parley.leave(talk, user),
            "remove": lambda: actor.remove(talk, user, reason="who knows"),
            "appoint": lambda: actor.appoint(talk, user, MODERATOR),
            "delete": lambda: parley.delete(talk),
            "undelete": lambda: parley.undelete(talk),
        }
        weights = [8, 3, 3, 3, 5, 3, 4, 4, 4, 1, 2, 2, 2, 1, 8]
        (name,) = self.choices.choices(list(actions), weights)
        try:
            await actions[name]()
            self.done[name] += 1
        except grpc.aio.AioRpcError as error:
            if error.code().name not in EXPECTED:
                raise


@pytest_asyncio.fixture
async def crowd(parley: Client) -> Crowd:
    return await crowd_of(parley)


async def crowd_of(parley: Client) -> Crowd:
    users = [await parley.user(f"user{n}") for n in range(5)]
    talks = [
        await parley.conversation(users[n], *users[:n], *users[n + 1 :], first="start")
        for n in range(CONVERSATIONS)
    ]
    return Crowd(parley, users, talks)


class Copy:
    """What somebody knows who has only the events: the latest resource of each kind and id."""

    def __init__(self) -> None:
        self.conversations: dict[str, Conversation] = {}
        self.participants: dict[tuple[str, str], Participant] = {}
        self.messages: dict[tuple[str, int], Message] = {}
        self.versions: dict[str, int] = defaultdict(int)
        self.standing: dict[tuple[str, str], int] = {}

    def apply(self, event: Event) -> None:
        id = event.conversation_id
        assert event.version == self.versions[id] + 1, event
        self.versions[id] = event.version
        if event.HasField("conversation"):
            self.conversations[id] = event.conversation
        if event.HasField("participant"):
            self.participants[id, event.user_id] = event.participant
        if event.type == Event.TYPE_PARTICIPANT_CHANGED:
            key = (id, event.user_id)
            assert self.standing.get(key, 0) == event.previous_status, event
            self.standing[key] = event.status
        if event.HasField("message"):
            self.messages[id, event.sequence] = event.message


async def test_who_replays_the_log_has_what_get_and_list_show(crowd: Crowd) -> None:
    """Twice: by watching from the first event on, and by reading everything afterwards."""
    async with following(crowd, {"everything": True}) as (live,):
        for _ in range(ACTIONS):
            await crowd.act()
        for talk in crowd.talks:
            # What a deleted one holds is not shown, to nobody.
            if (await crowd.parley.seen(talk)).HasField("delete_time"):
                await crowd.parley.undelete(talk)
        log = await crowd.parley.log(everything=True)
        await live.reaches(len(log))

    assert live.cuts > 1
    for copied, events in (("as it happened", live.events), ("afterwards", log)):
        copy = Copy()
        for event in events:
            copy.apply(event)
        for talk in crowd.talks:
            await compare(crowd.parley, talk, copy, f"{copied}, SEED={SEED}")
    assert len(crowd.done) > 10, crowd.done
    assert sum(crowd.done.values()) > ACTIONS // 4, crowd.done


async def compare(parley: Client, talk: Conversation, copy: Copy, hint: str) -> None:
    seen = await parley.seen(talk)
    messages = {message.sequence: message for message in await parley.all_messages(talk)}
    listed = await parley.participants.ListParticipants(
        participant_pb2.ListParticipantsRequest(
            conversation_id=talk.id, page_size=1000, statuses=Participant.Status.values()[1:]
        )
    )
    copied = copy.conversations[talk.id]
    assert copy.versions[talk.id] == seen.version, hint
    assert (copied.title, copied.etag) == (seen.title, seen.etag), hint
    assert copied.HasField("delete_time") == seen.HasField("delete_time"), hint
    # A message shown in a deleted conversation would be one too many: those came without.
    for sequence, message in messages.items():
        if (talk.id, sequence) in copy.messages:
            assert copy.messages[talk.id, sequence] == message, hint
    for participant in listed.participants:
        own = copy.participants[talk.id, participant.user_id]
        # Who sends has read: that is told by the message alone.
        own.last_read_sequence = participant.last_read_sequence
        assert own == participant, hint
        assert copy.standing[talk.id, participant.user_id] == participant.status, hint


class Follower:
    """A watcher that is cut at random and resumes from its last cursor."""

    def __init__(self, client: Client, asked: dict[str, Any], choices: random.Random) -> None:
        self.client, self.asked, self.random = client, asked, choices
        self.events: list[Event] = []
        # Each cursor, and how many events came before it.
        self.cursors: list[tuple[str, int]] = [("", 0)]
        self.cuts = 0

    async def run(self) -> None:
        while True:
            cursor = self.cursors[-1][0]
            start = {"resume_cursor": cursor} if cursor else {"oldest": True}
            call = self.client.watch(**self.asked, **start)
            try:
                async with asyncio.timeout(self.random.uniform(0.02, CUT_SECONDS)):
                    while response := await call.read():
                        self.events += response.events
                        self.cursors.append((response.cursor, len(self.events)))
            except TimeoutError:
                self.cuts += 1
            except grpc.aio.AioRpcError as error:
                if error.code().name != "UNAVAILABLE":
                    raise
                await asyncio.sleep(0.05)
            finally:
                call.cancel()

    async def reaches(self, count: int, seconds: float = 20) -> None:
        """Read on until there are so many events, and then a little longer."""
        async with asyncio.timeout(seconds):
            while len(self.events) < count:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)


@asynccontextmanager
async def following(crowd: Crowd, *scopes: dict[str, Any]) -> AsyncIterator[list[Follower]]:
    """A follower of each scope, as long as it takes."""
    followers = [Follower(crowd.parley, scope, crowd.choices) for scope in scopes]
    tasks = [asyncio.create_task(follower.run()) for follower in followers]
    try:
        yield followers
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


def keys(events: list[Event]) -> list[tuple[str, int, int]]:
    return [(event.conversation_id, event.version, event.type) for event in events]


async def test_watchers_that_are_cut_see_each_event_once_and_in_order(crowd: Crowd) -> None:
    parley, choices = crowd.parley, crowd.choices
    scopes: list[dict[str, Any]] = [
        {"everything": True},
        *({"conversation_id": talk.id} for talk in crowd.talks),
        *({"user_id": user.id} for user in crowd.users[:2]),
    ]

    async def work() -> None:
        for _ in range(ACTIONS // WRITERS):
            await crowd.act()

    async with following(crowd, *scopes, *scopes) as followers:
        await asyncio.gather(*(work() for _ in range(WRITERS)))
        logs = [keys(await parley.log(**follower.asked)) for follower in followers]
        for follower, log in zip(followers, logs, strict=True):
            await follower.reaches(len(log))

    for follower, log in zip(followers, logs, strict=True):
        assert keys(follower.events) == log, f"SEED={SEED} {follower.asked}"
        assert follower.cuts > 1
        for cursor, before in choices.sample(follower.cursors, 10):
            rest = await parley.log(resume_cursor=cursor, **follower.asked)
            assert keys(rest) == log[before:], f"SEED={SEED} {follower.asked} {before}"


@pytest_asyncio.fixture
async def foreign(parley: Client, postgres: EmbeddedPostgres) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else's transaction in the same cluster, which has written and stays open."""
    connection = await asyncpg.connect(postgres.url.replace("postgresql+asyncpg", "postgresql"))
    await connection.execute("BEGIN; SELECT pg_current_xact_id()")
    yield connection
    await connection.close()


async def test_a_foreign_transaction_holds_wide_watchers_up_and_nothing_is_lost(
    crowd: Crowd, foreign: asyncpg.Connection
) -> None:
    parley, talk, ada = crowd.parley, crowd.talks[0], crowd.users[0]
    scopes: list[dict[str, Any]] = [
        {"conversation_id": talk.id},
        {"everything": True},
        {"user_id": ada.id},
    ]
    before = [len(await parley.log(**scope)) for scope in scopes]
    async with following(crowd, *scopes) as followers:
        for n in range(10):
            await parley.message(talk, ada, f"number {n}")
        await followers[0].reaches(before[0] + 10)
        await asyncio.sleep(1)
        held = [len(follower.events) for follower in followers]

        await foreign.execute("COMMIT")

        for follower, count in zip(followers, before, strict=True):
            await follower.reaches(count + 10, seconds=3)
    assert held == [before[0] + 10, before[1], before[2]]
    for follower in followers:
        assert keys(follower.events) == keys(await parley.log(**follower.asked))


@pytest.mark.slow
async def test_watchers_outlive_the_death_of_postgresql(tmp_path: Path) -> None:
    service = Service(tmp_path)
    await service.start()
    try:
        async with grpc.aio.insecure_channel(service.address, options=CHANNEL) as channel:
            await _outlive(service, Client(channel, service.token))
        assert service.events("defect") == []
    finally:
        await service.stop()


async def _outlive(service: Service, parley: Client) -> None:
    crowd = await crowd_of(parley)
    scopes: list[dict[str, Any]] = [
        {"everything": True},
        {"conversation_id": crowd.talks[0].id},
        {"user_id": crowd.users[0].id},
    ]
    stopping = asyncio.Event()

    async def write(n: int) -> None:
        while not stopping.is_set():
            try:
                await parley.message(crowd.talks[n % CONVERSATIONS], crowd.users[n % CONVERSATIONS])
            except grpc.aio.AioRpcError as error:
                if error.code().name not in ("UNAVAILABLE", "UNKNOWN"):
                    raise
                await asyncio.sleep(0.05)

    async with following(crowd, *scopes) as followers:
        writers = [asyncio.create_task(write(n)) for n in range(WRITERS)]
        for _ in range(3 * CYCLES):
            await asyncio.sleep(1)
            kill(service.postgres())
            await service.until(SERVING, seconds=20)
            await asyncio.sleep(1)
        stopping.set()
        await asyncio.gather(*writers)
        logs = [keys(await parley.log(**scope)) for scope in scopes]
        for follower, log in zip(followers, logs, strict=True):
            await follower.reaches(len(log))

    for follower, log in zip(followers, logs, strict=True):
        assert keys(follower.events) == log, f"SEED={SEED} {follower.asked}"
        assert len(log) > 100
