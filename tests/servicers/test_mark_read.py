"""How far somebody has read: forward only, told once, and never in anybody's way."""

import asyncio
from collections import Counter
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from parley.v1 import message_pb2
from parley.v1 import participant_pb2 as pb
from service.embedded import EmbeddedPostgres
from service.ids import lock_of

from ..make import (
    MEMBER,
    MODERATOR,
    OBSERVER,
    OWNER,
    USER,
    Client,
    Conversation,
    Participant,
    User,
    facts,
    failure,
    insist,
    is_replay,
    miscounted,
)
from .test_participants import DECLINED, INVITED, LEFT, REMOVED, REVOKED, name_of, put


async def pair(parley: Client, count: int = 3) -> tuple[Conversation, User, User]:
    """A conversation of ada and bob, in which ada has sent so many messages."""
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    await say(parley, talk, ada, count)
    return talk, ada, bob


async def say(parley: Client, talk: Conversation, sender: User, count: int) -> None:
    for start in range(0, count, 500):
        message = message_pb2.NewMessage(sender_id=sender.id, role=USER, content="hello")
        await parley.messages.BatchSendMessages(
            message_pb2.BatchSendMessagesRequest(
                conversation_id=talk.id, messages=[message] * min(500, count - start)
            )
        )


def mark(client: Client, talk: Conversation, **values: Any) -> Any:
    request = pb.MarkReadRequest(conversation_id=talk.id, **values)
    return client.participants.MarkRead(request)


async def test_a_move_is_an_event_and_no_change_of_the_participant(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, _, bob = await pair(parley)
    then = await parley.participant(talk, bob)
    version = (await parley.seen(talk)).version

    answer = await mark(parley.acting_as(bob), talk, sequence=2)

    assert (answer.participant.last_read_sequence, answer.unread_count) == (2, 1)
    assert answer.participant == await parley.participant(talk, bob)
    then.last_read_sequence = 2
    assert answer.participant == then
    assert (await facts(database, talk))[-1] == {
        "version": version + 1,
        "type": "READ_CURSOR_MOVED",
        "actor_id": bob.id,
        "user_id": bob.id,
        "sequence": 2,
    }
    assert not await miscounted(database)


async def test_what_was_read_stays_read(parley: Client, database: asyncpg.Connection) -> None:
    talk, _, bob = await pair(parley)
    own = parley.acting_as(bob)
    first = await mark(own, talk, sequence=2)
    before = await facts(database, talk)
    for sequence in (2, 1, 0):
        assert await mark(own, talk, sequence=sequence) == first
    assert await facts(database, talk) == before


async def test_nobody_reads_what_is_not_said_yet(parley: Client) -> None:
    talk, _, bob = await pair(parley)
    for sequence in (4, 2**63 - 1):
        refused = await failure(mark(parley.acting_as(bob), talk, sequence=sequence))
        assert (refused.code, refused.reason) == ("OUT_OF_RANGE", "READ_PAST_END")
        assert refused.known == {"field": "sequence", "last_sequence": "3"}
    assert (await parley.participant(talk, bob)).last_read_sequence == 0


async def test_an_empty_conversation_is_read_to_its_end(parley: Client) -> None:
    talk, _, bob = await pair(parley, 0)
    answer = await mark(parley.acting_as(bob), talk, sequence=0)
    assert (answer.participant.last_read_sequence, answer.unread_count) == (0, 0)


async def test_a_message_is_named_by_id_where_it_may_be_read(parley: Client) -> None:
    talk, ada, _ = await pair(parley)
    cy = await parley.user("cy")
    hidden = await parley.message(talk, ada)
    await parley.acting_as(ada).add(talk, cy, hide_history=True)
    shown = await parley.message(talk, ada)
    elsewhere = await parley.message(await parley.conversation(ada), ada)
    own = parley.acting_as(cy)
    for id in (hidden.id, elsewhere.id, str(uuid4())):
        refused = await failure(mark(own, talk, message_id=id))
        assert (refused.code, refused.reason) == ("NOT_FOUND", "MESSAGE_NOT_FOUND")
        assert refused.resource == ("parley.v1.Message", id)
    assert (await parley.participant(talk, cy)).last_read_sequence == 0
    assert (await mark(own, talk, message_id=shown.id)).participant.last_read_sequence == 5
    # The system sees everything.
    answer = await mark(parley, talk, user_id="bob", message_id=hidden.id)
    assert (answer.participant.last_read_sequence, answer.unread_count) == (4, 1)


@pytest.mark.parametrize("role", [OWNER, MODERATOR, MEMBER, OBSERVER], ids=Participant.Role.Name)
async def test_whoever_is_joined_moves_its_own(
    parley: Client, role: "Participant.Role.ValueType"
) -> None:
    talk, ada, _ = await pair(parley)
    cy = await parley.user("cy")
    await parley.acting_as(ada).add(talk, cy, role=role)
    assert (await mark(parley.acting_as(cy), talk, sequence=3)).unread_count == 0


@pytest.mark.parametrize("status", [None, INVITED, DECLINED, REVOKED, LEFT, REMOVED], ids=name_of)
async def test_whoever_is_not_joined_has_none_to_move(
    parley: Client,
    database: asyncpg.Connection,
    status: "Participant.Status.ValueType | None",
) -> None:
    talk, *_ = await pair(parley)
    cy = await parley.user("cy")
    await put(parley, database, talk, cy, status)
    refused = await failure(mark(parley.acting_as(cy), talk, sequence=1))
    if status in (None, DECLINED, REVOKED):
        assert (refused.code, refused.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")
    else:
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "NOT_A_PARTICIPANT")
    named = await failure(mark(parley, talk, user_id="cy", sequence=1))
    reason = "NOT_A_PARTICIPANT" if status else "PARTICIPANT_NOT_FOUND"
    assert (named.code, named.reason) == (
        "FAILED_PRECONDITION" if status else "NOT_FOUND",
        reason,
    )


async def test_nobody_moves_anothers_and_the_system_says_whose(parley: Client) -> None:
    talk, ada, bob = await pair(parley)
    eve = await parley.user("eve")
    for name in ("bob", bob.id, "nobody", str(uuid4())):
        refused = await failure(mark(parley.acting_as(ada), talk, user_id=name, sequence=1))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
        hidden = await failure(mark(parley.acting_as(eve), talk, user_id=name, sequence=1))
        assert (hidden.code, hidden.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")
    assert (await failure(mark(parley, talk, sequence=1))).violations == {"user_id": "REQUIRED"}
    nobody = await failure(mark(parley, talk, user_id="nobody", sequence=1))
    assert (nobody.code, nobody.reason) == ("NOT_FOUND", "PARTICIPANT_NOT_FOUND")
    assert (await mark(parley.acting_as(bob), talk, user_id="bob", sequence=1)).unread_count == 2


async def test_what_is_archived_is_read_on_and_what_is_deleted_is_not(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, _, bob = await pair(parley)
    await database.execute("UPDATE conversations SET is_active = false")
    assert (await mark(parley.acting_as(bob), talk, sequence=1)).unread_count == 2
    await database.execute("UPDATE conversations SET deleted_at = now()")
    refused = await failure(mark(parley.acting_as(bob), talk, sequence=2))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "CONVERSATION_DELETED")


# What is left


async def test_unread_is_what_others_said_later_and_is_still_there(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await pair(parley, 6)
    # His own, sent for him before the cursor that sending moves is set back.
    await parley.message(talk, bob)
    await database.execute("UPDATE participants SET last_read_sequence = 0")
    await database.execute("UPDATE messages SET deleted_at = now() WHERE sequence = 4")
    await parley.message(talk, ada)
    answer = await mark(parley.acting_as(bob), talk, sequence=2)
    assert answer.unread_count == len([3, 5, 6, 8])
    assert (await mark(parley.acting_as(bob), talk, sequence=8)).unread_count == 0


async def test_unread_begins_where_the_window_does(parley: Client) -> None:
    talk, ada, _ = await pair(parley)
    cy = await parley.user("cy")
    await parley.acting_as(ada).add(talk, cy, hide_history=True)
    await parley.message(talk, ada)
    assert (await mark(parley.acting_as(cy), talk, sequence=0)).unread_count == 1


@pytest.mark.parametrize(("said", "told"), [(999, 999), (1_000, 1_000), (1_001, 1_000)])
async def test_unread_is_counted_to_a_thousand(parley: Client, said: int, told: int) -> None:
    talk, _, bob = await pair(parley, said)
    assert (await mark(parley.acting_as(bob), talk, sequence=0)).unread_count == told


# Repeated


async def test_a_repeated_request_id_answers_how_far_the_user_has_read_now(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await pair(parley)
    own = parley.acting_as(bob)
    once = {"sequence": 2, "request_id": "r-1"}
    answers = await asyncio.gather(*(insist(lambda: mark(own, talk, **once)) for _ in range(32)))
    assert all(answer == answers[0] for answer in answers)
    assert [fact["type"] for fact in await facts(database, talk)].count("READ_CURSOR_MOVED") == 1

    await mark(own, talk, sequence=3)
    await parley.message(talk, ada)
    assert await is_replay(mark(own, talk, **once))
    again = await mark(own, talk, **once)
    assert (again.participant.last_read_sequence, again.unread_count) == (3, 1)

    reused = await failure(mark(own, talk, sequence=1, request_id="r-1"))
    assert (reused.code, reused.reason) == ("FAILED_PRECONDITION", "REQUEST_ID_REUSED")
    await own.leave(talk, bob)
    gone = await mark(own, talk, **once)
    assert (gone.participant.status, gone.unread_count) == (LEFT, 1)


async def test_a_move_that_moved_nothing_is_remembered_and_one_that_failed_is_not(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await pair(parley, 1)
    own = parley.acting_as(bob)
    await mark(own, talk, sequence=0, request_id="r-1")
    assert await is_replay(mark(own, talk, sequence=0, request_id="r-1"))
    await failure(mark(own, talk, sequence=2, request_id="r-2"))
    await parley.message(talk, ada)
    assert (await mark(own, talk, sequence=2, request_id="r-2")).unread_count == 0
    assert await database.fetchval("SELECT count(*) FROM requests") == 2


# At once


async def test_a_crowd_that_reads_and_writes_at_once_makes_one_story(
    parley: Client, database: asyncpg.Connection
) -> None:
    users = [await parley.user() for _ in range(8)]
    talks = [await parley.conversation(*users, first="hello") for _ in range(4)]

    async def read(talk: Conversation, user: User) -> None:
        own = parley.acting_as(user)
        for _ in range(4):
            last = (await own.seen(talk)).last_sequence
            await insist(lambda: mark(own, talk, sequence=last))  # noqa: B023
            await insist(lambda: own.send(talk))

    await asyncio.gather(*(read(talk, user) for talk in talks for user in users))

    assert not await miscounted(database)
    for talk in talks:
        cursors = Counter[str]()
        for fact in await facts(database, talk):
            user = fact.get("user_id", "")
            if fact["type"] == "READ_CURSOR_MOVED":
                assert fact["sequence"] > cursors[user]
            if fact["type"] in ("READ_CURSOR_MOVED", "MESSAGE_CREATED"):
                cursors[user] = fact["sequence"]
        for user in users:
            assert (await parley.participant(talk, user)).last_read_sequence == cursors[user.id]


async def test_a_conversation_that_is_held_holds_up_no_other(
    parley: Client, postgres: EmbeddedPostgres
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    held, *free = [await parley.conversation(ada, bob, first="hello") for _ in range(8)]
    own = parley.acting_as(bob)
    holder = await asyncpg.connect(postgres.url.replace("postgresql+asyncpg", "postgresql"))
    async with holder.transaction():
        await holder.execute("SELECT pg_advisory_xact_lock($1)", lock_of(UUID(held.id)))
        waiting = [asyncio.ensure_future(mark(own, held, sequence=1)) for _ in range(4)]
        await asyncio.gather(*(mark(own, talk, sequence=1) for talk in free))
        assert not any(each.done() for each in waiting)
    await holder.close()
    for answer in await asyncio.gather(*waiting):
        assert answer.unread_count == 0
