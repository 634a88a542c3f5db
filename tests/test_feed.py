"""The change feed under everything at once: nothing is lost, doubled or out of order, and whoever
replays it has what Get and List show.

`SEED` in the environment repeats the choices of other runs, `PARLEY_FAULT_CYCLES` makes it longer.
"""

import asyncio
import os
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import grpc
import pytest_asyncio

from parley.v1 import message_pb2
from service.embedded import EmbeddedPostgres

from .feed_history import holes, unfaithful
from .make import MODERATOR, USER, Client, Conversation, Event, User
from .storm import state_of

SEED = int(os.environ.get("SEED", "1"))
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
    states = [await state_of(crowd.parley, talk) for talk in crowd.talks]
    versions = {each.conversation.id: each.conversation.version for each in states}
    for events in (live.events, log):
        assert list(holes(events, versions)) == [], f"SEED={SEED}"
        assert list(unfaithful(events, states)) == [], f"SEED={SEED}"
    assert len(crowd.done) > 10, crowd.done
    assert sum(crowd.done.values()) > ACTIONS // 4, crowd.done


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
