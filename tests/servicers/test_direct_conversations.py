"""The one direct conversation of two users: whoever asks, however many ask at once."""

import asyncio
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from parley.v1 import conversation_pb2 as pb
from parley.v1 import participant_pb2
from service.ids import lock_of

from ..make import (
    OWNER,
    Client,
    Conversation,
    Participant,
    facts,
    failure,
    insist,
    is_replay,
    miscounted,
    row_count,
)
from .test_update_conversation import outcome

JOINED = Participant.STATUS_JOINED
NOBODY = "01890000-0000-7000-8000-000000000001"


def meet(client: Client, other: str, **values: Any) -> Any:
    return client.conversations.GetOrCreateDirectConversation(
        pb.GetOrCreateDirectConversationRequest(other_user_id=other, **values)
    )


async def test_two_users_have_one_direct_conversation_whoever_asks(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")

    first = await meet(parley.acting_as(ada), "bob")

    talk = first.conversation
    assert first.created
    assert talk.is_direct
    assert talk.is_active
    assert (talk.creator_id, talk.title, talk.participant_count) == (ada.id, "", 2)
    assert talk == await parley.acting_as(ada).seen(talk)
    for user, inviter in ((ada, ""), (bob, ada.id)):
        row = await parley.participant(talk, user)
        assert (row.status, row.role, row.invited_by_user_id) == (JOINED, OWNER, inviter)
    assert [each["type"] for each in await facts(database, talk)] == [
        "CONVERSATION_CREATED",
        "PARTICIPANT_CHANGED",
        "PARTICIPANT_CHANGED",
    ]
    for call in (
        meet(parley.acting_as(ada), bob.id),
        meet(parley.acting_as(ada), "bob", user_id="ada"),
        meet(parley.acting_as(bob), "ada"),
        meet(parley, "ada", user_id=bob.id),
    ):
        again = await call
        assert (again.conversation, again.created) == (talk, False)
    assert not await miscounted(database)


async def test_each_pair_has_its_own(parley: Client) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    talks = [await parley.direct(*pair) for pair in ((ada, bob), (bob, cy), (cy, ada))]
    assert len({talk.id for talk in talks}) == 3


async def test_of_64_racers_in_both_orders_one_makes_it(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    answers = await asyncio.gather(
        *(
            insist(partial(meet, parley.acting_as(a), b.id))
            for a, b in [(ada, bob), (bob, ada)] * 32
        )
    )
    assert len({answer.conversation.id for answer in answers}) == 1
    assert sum(answer.created for answer in answers) == 1
    assert await database.fetchval("SELECT count(*) FROM conversations") == 1
    assert len(await facts(database, answers[0].conversation)) == 3
    assert not await miscounted(database)


async def test_whoever_left_joins_again_and_reads_on(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.direct(ada, bob)
    await parley.message(talk, ada, "one")
    await parley.acting_as(bob).leave(talk, bob)
    await parley.message(talk, ada, "two")

    again = await meet(parley.acting_as(ada), "bob")

    assert (again.conversation.id, again.created) == (talk.id, False)
    assert again.conversation.participant_count == 2
    row = await parley.participant(talk, bob)
    assert (row.status, row.role) == (JOINED, OWNER)
    seen = await parley.acting_as(bob).all_messages(talk)
    assert [each.content for each in seen] == ["one", "two"]

    await parley.acting_as(ada).leave(talk, ada)
    await parley.acting_as(bob).leave(talk, bob)
    assert (await meet(parley.acting_as(bob), "ada")).conversation.participant_count == 2
    assert not await miscounted(database)


async def test_with_oneself_there_is_none(parley: Client, database: asyncpg.Connection) -> None:
    ada = await parley.user("ada")
    before = await row_count(database)
    for call in (
        meet(parley.acting_as(ada), "ada"),
        meet(parley.acting_as(ada), ada.id, user_id="ada"),
        meet(parley, "ada", user_id=ada.id),
    ):
        refused = await failure(call)
        assert (refused.code, refused.violations) == (
            "INVALID_ARGUMENT",
            {"other_user_id": "DUPLICATE"},
        )
    assert await row_count(database) == before


async def test_an_actor_asks_in_nobody_elses_name(parley: Client) -> None:
    ada, _, _ = [await parley.user(name) for name in ("ada", "bob", "cy")]
    for name in ("bob", "nobody"):
        refused = await failure(meet(parley.acting_as(ada), "cy", user_id=name))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")


@pytest.mark.parametrize(
    ("values", "violations"),
    [
        ({}, {"user_id": "REQUIRED", "other_user_id": "REQUIRED"}),
        ({"user_id": " ", "other_user_id": "\t"}, {
            "user_id": "INVALID_REFERENCE", "other_user_id": "INVALID_REFERENCE"}),
        ({"user_id": "ada", "other_user_id": "bob", "request_id": "x" * 65}, {
            "request_id": "INVALID_REQUEST_ID"}),
    ],
)  # fmt: skip
async def test_a_bad_field_is_named_with_its_rule(
    parley: Client, values: dict[str, str], violations: dict[str, str]
) -> None:
    request = pb.GetOrCreateDirectConversationRequest(**values)
    refused = await failure(parley.conversations.GetOrCreateDirectConversation(request))
    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)


@pytest.mark.parametrize("name", ["nobody", NOBODY])
async def test_a_user_who_does_not_exist_is_told_by_its_field(parley: Client, name: str) -> None:
    await parley.user("ada")
    for field, call in (
        ("other_user_id", meet(parley, name, user_id="ada")),
        ("user_id", meet(parley, "ada", user_id=name)),
    ):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "USER_NOT_FOUND")
        assert (refused.known["field"], refused.known["name"]) == (field, name)


@pytest.mark.parametrize("how", ["is_active = false", "deleted_at = now()"])
@pytest.mark.parametrize("before", [True, False])
async def test_nobody_inactive_or_deleted_meets_anybody(
    parley: Client, database: asyncpg.Connection, how: str, before: bool
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    if before:
        await parley.direct(ada, bob)
    await database.execute(f"UPDATE users SET {how} WHERE username = 'bob'")
    rows = await row_count(database)
    for field, call in (
        ("other_user_id", meet(parley.acting_as(ada), "bob")),
        ("user_id", meet(parley, "ada", user_id="bob")),
    ):
        refused = await failure(call)
        assert (refused.code, refused.precondition) == ("FAILED_PRECONDITION", "USER_INACTIVE")
        assert refused.known["field"] == field
    assert await row_count(database) == rows


async def test_a_deleted_one_is_not_replaced_and_a_purged_one_is(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.direct(ada, bob)
    await parley.delete(talk)
    deleted = await outcome(meet(parley.acting_as(bob), "ada"))
    assert deleted == "FAILED_PRECONDITION CONVERSATION_DELETED"
    await parley.purge(talk)
    again = await meet(parley.acting_as(bob), "ada")
    assert again.created
    assert again.conversation.id != talk.id


async def test_an_archived_one_is_found_and_not_joined_again(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.direct(ada, bob)
    await parley.update(talk, is_active=False)
    assert (await meet(parley.acting_as(ada), "bob")).conversation.id == talk.id
    await parley.leave(talk, bob)
    archived = await outcome(meet(parley.acting_as(ada), "bob"))
    assert archived == "FAILED_PRECONDITION CONVERSATION_ARCHIVED"


async def test_nobody_else_comes_in_and_nobody_is_put_out(parley: Client) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    talk = await parley.direct(ada, bob)
    calls = parley.acting_as(ada).participants
    p = participant_pb2
    for call in (
        calls.InviteParticipant(p.InviteParticipantRequest(conversation_id=talk.id, user_id="cy")),
        calls.AddParticipant(p.AddParticipantRequest(conversation_id=talk.id, user_id=cy.id)),
        calls.RemoveParticipant(p.RemoveParticipantRequest(conversation_id=talk.id, user_id="bob")),
    ):
        assert await outcome(call) == "FAILED_PRECONDITION DIRECT_CONVERSATION"


async def test_a_repeated_request_id_answers_created_as_at_first(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    actor = parley.acting_as(ada)
    first = await meet(actor, "bob", request_id="r-1")
    second = await meet(actor, "bob", request_id="r-2")
    await parley.leave(first.conversation, bob)

    for id, created in (("r-1", True), ("r-2", False)):
        call = meet(actor, "bob", request_id=id)
        assert await is_replay(call)
        assert ((await call).created, (await call).conversation.id) == (
            created,
            second.conversation.id,
        )
    # It answers; it does not bring back who has left since.
    assert (await parley.seen(first.conversation)).participant_count == 1
    await parley.user("cy")
    refused = await failure(meet(actor, "cy", request_id="r-1"))
    assert refused.reason == "REQUEST_ID_REUSED"


async def test_of_32_racers_under_one_request_id_all_are_told_the_same(parley: Client) -> None:
    ada, _ = await parley.user("ada"), await parley.user("bob")
    actor = parley.acting_as(ada)
    answers = await asyncio.gather(
        *(insist(lambda: meet(actor, "bob", request_id="r")) for _ in range(32))
    )
    assert len({answer.SerializeToString(deterministic=True) for answer in answers}) == 1
    assert answers[0].created


async def test_one_that_was_purged_while_a_meeting_waited_for_it_is_made_anew(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.direct(ada, bob)
    lock = lock_of(UUID(talk.id))
    await database.execute("SELECT pg_advisory_lock($1)", lock)
    meeting = asyncio.ensure_future(meet(parley.acting_as(ada), "bob"))
    while not await database.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
        await asyncio.sleep(0.01)

    await database.execute("DELETE FROM conversations")
    await database.execute("SELECT pg_advisory_unlock($1)", lock)

    answer = await meeting
    assert answer.created
    assert answer.conversation.id != talk.id
    assert answer.conversation.participant_count == 2


async def test_meeting_while_it_is_deleted_and_purged_never_breaks(
    parley: Client, database: asyncpg.Connection
) -> None:
    """A purge takes the conversation's lock, a meeting the pair's and then the conversation's."""
    ada, bob = await parley.user("ada"), await parley.user("bob")

    async def end(talk: Conversation) -> str:
        await insist(lambda: parley.delete(talk, allow_missing=True))
        return await outcome(insist(lambda: parley.purge(talk, allow_missing=True)))

    for _ in range(5):
        talk = await insist(lambda: parley.direct(ada, bob))
        ended, *met = await asyncio.gather(
            end(talk),
            *(outcome(insist(lambda: meet(parley.acting_as(ada), "bob"))) for _ in range(16)),
        )
        assert ended == "OK"
        assert set(met) <= {"OK", "FAILED_PRECONDITION CONVERSATION_DELETED"}
    assert await database.fetchval("SELECT count(*) FROM conversations") <= 1
    assert not await miscounted(database)
