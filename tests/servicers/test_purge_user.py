"""PurgeUser: who it was is gone at once, and then it goes, conversation by conversation."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from parley.v1 import conversation_pb2, participant_pb2
from parley.v1 import user_pb2 as pb
from service.ids import lock_of
from service.repositories.conversations import TIED

from ..make import (
    MODERATOR,
    NOBODY,
    OWNER,
    Client,
    Conversation,
    User,
    facts,
    failure,
    miscounted,
    until,
)
from ..process import Service

REMOVED = participant_pb2.Participant.STATUS_REMOVED
REVOKED = participant_pb2.Participant.STATUS_REVOKED


def counts(answer: pb.PurgeUserResponse) -> tuple[int, int, int, int]:
    """Purged conversations, their messages; conversations passed on; memberships ended."""
    return (
        answer.purged_conversation_count,
        answer.purged_message_count,
        answer.transferred_conversation_count,
        answer.ended_participant_count,
    )


async def purge(parley: Client, user: User | str, **values: Any) -> pb.PurgeUserResponse:
    """Delete and purge."""
    await parley.delete_user(user, allow_missing=True)
    return await parley.purge_user(user, **values)  # type: ignore[no-any-return]


# Who it was


async def test_a_purged_user_is_nobody_and_its_names_are_free(
    parley: Client, database: asyncpg.Connection
) -> None:
    values = {"email": "ada@example.org", "external_id": "7", "full_name": "Ada Lovelace"}
    ada = await parley.user("ada", **values)
    await parley.update_user(ada, patch={"shoe": 38})
    await parley.set_password(ada, "secret")

    answer = await purge(parley, "ada")

    assert answer == pb.PurgeUserResponse(done=True)
    for name in ("ada", ada.id):
        assert (await failure(parley.who(name))).reason == "USER_NOT_FOUND"
    missing = await parley.users.BatchGetUsers(pb.BatchGetUsersRequest(user_ids=[ada.id]))
    assert list(missing.missing_user_ids) == [ada.id]
    row = await database.fetchrow("SELECT * FROM users WHERE id = $1", UUID(ada.id))
    left = {name: value for name, value in row.items() if value} if row else {}
    assert set(left) == {
        "id", "kind", "is_active", "metadata", "revision", "created_at", "updated_at",
        "deleted_at", "purged_at",
    }  # fmt: skip
    assert left["metadata"] == "{}"
    again = await parley.user("ada", **values)
    assert again.id != ada.id


async def test_its_messages_stay_and_point_at_a_user_without_a_name(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(bob, ada, first="hello")
    said = await parley.message(talk, ada, "bye")

    assert counts(await purge(parley, ada)) == (0, 0, 0, 1)

    assert (await parley.acting_as(bob).all_messages(talk))[-1] == said
    gone = await parley.participant(talk, ada)
    assert (gone.user_id, gone.username, gone.status) == (ada.id, "", REMOVED)
    assert gone.visible_to_sequence == 2
    page = await parley.acting_as(bob).participants.ListParticipants(
        participant_pb2.ListParticipantsRequest(conversation_id=talk.id, statuses=[REMOVED])
    )
    assert list(page.participants) == [gone]
    assert not await miscounted(database)


async def test_whoever_names_a_purged_user_is_told_that_there_is_none(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(bob)
    await parley.set_password(ada, "secret")
    await purge(parley, ada)

    for call in (
        parley.update_user(ada, full_name="x"),
        parley.delete_user(ada),
        parley.undelete_user(ada),
        parley.set_password(ada, "secret"),
    ):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("NOT_FOUND", "USER_NOT_FOUND")
    for call in (
        parley.acting_as(ada).who(bob),
        parley.conversation(bob, ada),
        parley.conversation(ada),
        parley.direct(bob, ada),
    ):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "USER_NOT_FOUND")
    assert (await failure(parley.invite(talk, ada, invited_by_user_id="bob"))).code == (
        "FAILED_PRECONDITION"
    )
    assert not (await parley.verify("secret", user_id=ada.id)).verified


async def test_what_was_asked_of_a_purged_user_is_not_answered_again(parley: Client) -> None:
    made = pb.CreateUserRequest(user=User(username="ada"), request_id="c")
    ada = (await parley.users.CreateUser(made)).user
    await parley.update_user(ada, full_name="Ada", request_id="u")
    await purge(parley, ada)

    for call in (
        parley.users.CreateUser(made),
        parley.update_user(ada, full_name="Ada", request_id="u"),
    ):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("NOT_FOUND", "USER_NOT_FOUND")


async def test_only_a_deleted_user_is_purged(parley: Client) -> None:
    ada = await parley.user("ada")
    refused = await failure(parley.purge_user(ada))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "NOT_DELETED")
    for name in (NOBODY, "nobody"):
        refused = await failure(parley.purge_user(name))
        assert (refused.code, refused.reason) == ("NOT_FOUND", "USER_NOT_FOUND")
    deleted = (await parley.delete_user(ada)).user
    refused = await failure(parley.purge_user(ada, etag=ada.etag))
    assert (refused.code, refused.reason) == ("ABORTED", "ETAG_MISMATCH")
    assert (await parley.who(ada)) == deleted
    assert (await parley.purge_user(ada, etag=deleted.etag)).done
    # Once it has begun, the etag is no longer looked at; nor is there anything to do.
    assert await parley.purge_user(ada, etag=deleted.etag) == pb.PurgeUserResponse(done=True)
    assert (await failure(parley.purge_user("ada"))).reason == "USER_NOT_FOUND"


async def test_what_it_invited_others_to_is_still_an_invitation(parley: Client) -> None:
    ada, bob, eve = [await parley.user(name) for name in ("ada", "bob", "eve")]
    talk = await parley.conversation(ada, bob, title="Tea", first="hello")
    await parley.acting_as(ada).invite(talk, eve, initial_message_sequence=1)
    await purge(parley, ada)

    request = participant_pb2.ListInvitationsRequest()
    (invited,) = (await parley.acting_as(eve).participants.ListInvitations(request)).invitations

    assert invited.inviter == User(id=ada.id, kind=User.KIND_HUMAN)
    assert invited.initial_message.content == "hello"
    assert (await parley.accept(talk, eve)).invited_by_user_id == ada.id


# Its conversations


async def test_each_conversation_gets_what_the_contract_says(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob, eve = [await parley.user(name) for name in ("ada", "bob", "eve")]
    alone = await parley.conversation(ada, first="a diary")
    await parley.message(alone, ada)
    shared = await parley.conversation(ada, bob, eve)
    await parley.appoint(shared, eve, MODERATOR)
    guest = await parley.conversation(bob, ada)
    asked = await parley.conversation(bob, invited=[ada])
    left = await parley.conversation(ada, bob)
    await parley.leave(left, ada, successor_user_id=bob.id)
    pair = await parley.direct(ada, bob)
    foreign = await parley.conversation(bob, eve)
    untouched = await facts(database, foreign)

    answer = await purge(parley, ada)

    assert answer.done
    assert counts(answer) == (1, 2, 3, 5)
    assert (await failure(parley.seen(alone))).reason == "CONVERSATION_NOT_FOUND"
    assert [fact["type"] for fact in await facts(database, alone)] == ["CONVERSATION_PURGED"]

    now = await parley.seen(shared)
    assert (now.creator_id, now.participant_count) == (eve.id, 2)
    assert now.etag != (shared.etag)
    assert (await parley.participant(shared, eve)).role == OWNER
    assert (await facts(database, shared))[-3:] == [
        {
            "version": 6,
            "type": "PARTICIPANT_CHANGED",
            "user_id": eve.id,
            "previous_status": "JOINED",
            "status": "JOINED",
            "previous_role": "MODERATOR",
            "role": "OWNER",
        },
        {
            "version": 7,
            "type": "PARTICIPANT_CHANGED",
            "user_id": ada.id,
            "previous_status": "JOINED",
            "status": "REMOVED",
            "previous_role": "OWNER",
            "role": "OWNER",
        },
        {"version": 8, "type": "CONVERSATION_UPDATED", "revision": 2},
    ]
    assert now.version == 8

    assert (await parley.participant(guest, ada)).status == REMOVED
    assert (await parley.seen(guest)).etag == guest.etag
    assert (await parley.participant(asked, ada)).status == REVOKED
    assert (await parley.seen(left)).creator_id == bob.id
    assert (await parley.seen(pair)).creator_id == bob.id
    assert await facts(database, foreign) == untouched
    assert not await miscounted(database)
    assert await purge(parley, ada.id) == pb.PurgeUserResponse(done=True)


async def test_shared_conversations_go_too_on_request_but_not_those_of_others(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    own = await parley.conversation(ada, bob, first="hello")
    guest = await parley.conversation(bob, ada, first="hello")

    answer = await purge(parley, ada, delete_shared_conversations=True)

    assert (answer.done, *counts(answer)) == (True, 1, 1, 0, 2)
    assert (await failure(parley.seen(own))).code == "NOT_FOUND"
    assert (await parley.seen(guest)).participant_count == 1
    assert not await miscounted(database)


async def test_a_deleted_or_archived_conversation_is_left_like_any_other(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    deleted, archived = [await parley.conversation(ada, bob) for _ in range(2)]
    await parley.delete(deleted)
    await parley.update(archived, is_active=False)

    assert counts(await purge(parley, ada)) == (0, 0, 2, 2)

    now = await parley.seen(deleted)
    assert (now.creator_id, now.HasField("delete_time")) == (bob.id, True)
    now = await parley.seen(archived)
    assert (now.creator_id, now.is_active) == (bob.id, False)
    assert not await miscounted(database)


async def test_of_two_who_are_erased_together_neither_inherits_for_long(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob, eve = [await parley.user(name) for name in ("ada", "bob", "eve")]
    both = [await parley.conversation(ada, bob) for _ in range(4)]
    three = [await parley.conversation(bob, ada, eve) for _ in range(4)]
    for user in (ada, bob):
        await parley.delete_user(user)

    answers = await asyncio.gather(parley.purge_user(ada), parley.purge_user(bob))

    assert all(answer.done for answer in answers)
    for talk in both:
        assert (await failure(parley.seen(talk))).code == "NOT_FOUND"
    for talk in three:
        assert (await parley.seen(talk)).creator_id == eve.id
        assert (await parley.participant(talk, eve)).role == OWNER
    assert sum(answer.ended_participant_count for answer in answers) == 16
    assert not await miscounted(database)


async def test_what_is_left_to_do_is_found_by_indexes(
    parley: Client, database: asyncpg.Connection
) -> None:
    async with database.transaction():
        await database.execute(
            "INSERT INTO users (username) SELECT 'user-' || n FROM generate_series(1, 500) AS n"
        )
        await database.execute(
            "INSERT INTO conversations (slug, creator_id)"
            " SELECT u.username || '-' || n, u.id FROM users u, generate_series(1, 40) AS n"
        )
        await database.execute(
            "INSERT INTO participants (conversation_id, user_id, status, role, joined_at,"
            " status_at) SELECT id, creator_id, 'JOINED', 'OWNER', now(), now() FROM conversations"
        )
        await database.execute("ANALYZE conversations, participants")
        for user_id in (await database.fetchval("SELECT id FROM users LIMIT 1"), UUID(NOBODY)):
            rows = await database.fetch(f"EXPLAIN {TIED}", user_id, 101)
            plan = "\n".join(row[0] for row in rows)
            assert "uq_participants_user_conversation" in plan
            assert "ix_conversations_creator" in plan
            assert "Seq Scan" not in plan


async def test_whoever_was_being_added_while_it_was_erased_is_taken_out_again(
    parley: Client, database: asyncpg.Connection
) -> None:
    """The one who adds has seen that the user is live, and has yet to write it down."""
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(bob)
    async with database.transaction():
        await database.execute("SELECT FROM conversations FOR UPDATE")
        adding = asyncio.ensure_future(parley.acting_as(bob).add(talk, ada))
        await until(lambda: waiting(database, 1))
        await parley.delete_user(ada)
        purging = asyncio.ensure_future(parley.purge_user(ada))
        await asyncio.wait(
            [purging, asyncio.ensure_future(until(lambda: waiting(database, 2)))],
            return_when=asyncio.FIRST_COMPLETED,
        )

    assert (await adding).user_id == ada.id
    assert counts(await purging) == (0, 0, 0, 1)
    assert (await parley.participant(talk, ada)).status == REMOVED
    assert not await miscounted(database)


async def waiting(database: asyncpg.Connection, count: int) -> bool:
    """Whether so many wait for what somebody else holds."""
    query = "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted"
    return bool(await database.fetchval(query) >= count)


# In steps


async def test_a_long_purge_goes_on_where_the_last_call_ended(
    parley: Client, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.servicers.users.PURGE_STEP", 3)
    ada, bob = await parley.user("ada"), await parley.user("bob")
    for _ in range(4):
        await parley.conversation(ada, first="hello")
        await parley.conversation(ada, bob)
    await parley.delete_user(ada)

    answers: list[pb.PurgeUserResponse] = []
    while not (answers and answers[-1].done):
        answers.append(await parley.purge_user(ada.id))

    assert [answer.done for answer in answers] == [False, False, True]
    assert [sum(part) for part in zip(*map(counts, answers), strict=True)] == [4, 4, 4, 8]
    assert not await miscounted(database)


async def test_a_purge_that_takes_long_answers_in_time_with_one_done_at_least(
    parley: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.servicers.users.PURGE_SECONDS", -1)
    ada = await parley.user("ada")
    for _ in range(3):
        await parley.conversation(ada)
    await parley.delete_user(ada)
    answers = [await parley.purge_user(ada.id) for _ in range(3)]
    assert [(answer.done, *counts(answer)) for answer in answers] == [
        (False, 1, 0, 0, 1),
        (False, 1, 0, 0, 1),
        (True, 1, 0, 0, 1),
    ]


async def test_eight_who_purge_one_user_at_once_do_everything_once(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    for _ in range(5):
        await parley.conversation(ada, first="hello")
        await parley.conversation(ada, bob)
    await parley.delete_user(ada)

    answers = await asyncio.gather(*(parley.purge_user(ada.id) for _ in range(8)))

    assert [sum(part) for part in zip(*map(counts, answers), strict=True)] == [5, 5, 5, 10]
    assert (await parley.purge_user(ada.id)) == pb.PurgeUserResponse(done=True)
    assert not await miscounted(database)


async def test_a_busy_conversation_is_left_for_the_next_call_and_what_was_done_is_told(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    first, busy, last = [await parley.conversation(ada, first="hello") for _ in range(3)]
    await parley.delete_user(ada)

    async with database.transaction():
        await hold(database, busy)
        answer = await parley.purge_user(ada)

        # Who it was is gone, all the same.
        assert (await failure(parley.who("ada"))).code == "NOT_FOUND"
        assert (answer.done, *counts(answer)) == (False, 2, 2, 0, 2)
        for talk in (first, last):
            assert (await failure(parley.seen(talk))).code == "NOT_FOUND"
        # A call that can do nothing says why.
        refused = await failure(parley.purge_user(ada.id))
        assert (refused.code, refused.reason) == ("ABORTED", "LOCK_TIMEOUT")
        assert refused.retry_seconds

    answer = await parley.purge_user(ada.id)
    assert (answer.done, *counts(answer)) == (True, 1, 1, 0, 1)


async def hold(database: asyncpg.Connection, talk: Conversation) -> None:
    """Be the one who writes to the conversation, until the transaction ends."""
    await database.execute(f"SELECT pg_advisory_xact_lock({lock_of(UUID(talk.id))})")


@pytest.mark.slow
async def test_kill_9_in_the_middle_of_a_purge_is_harmless(tmp_path: Path) -> None:
    service = Service(tmp_path)
    await service.start()
    try:
        async with service.channel() as channel:
            parley = Client(channel, service.token)
            ada, bob = await parley.user("ada", email="ada@example.org"), await parley.user("bob")
            talks = []
            for _ in range(5):
                talks.append(await parley.conversation(ada, first="hello"))
                talks.append(await parley.conversation(ada, bob))
            await parley.delete_user(ada)
        database = await asyncpg.connect(service.database_url)
        transaction = database.transaction()
        await transaction.start()
        await hold(database, talks[5])

        async with service.channel() as channel:
            parley = Client(channel, service.token)
            call = asyncio.ensure_future(parley.purge_user(ada))
            await until(lambda: waiting(database, 1))
            assert not call.done()
            service.kill()
            await failure(call)
        await transaction.rollback()
        service.launch()
        await service.until("SERVING", seconds=20)

        async with service.channel() as channel:
            parley = Client(channel, service.token)
            # Each was done or not: the first five, and nothing of the sixth.
            done = [len(await facts(database, talk)) for talk in talks]
            assert done == [1, 6, 1, 6, 1, 3, 3, 3, 3, 3]
            assert (await failure(parley.who("ada"))).code == "NOT_FOUND"
            answer = await parley.purge_user(ada.id)
            assert (answer.done, *counts(answer)) == (True, 2, 2, 3, 5)
            assert not await miscounted(database)
            listed = await parley.conversations.ListConversations(
                conversation_pb2.ListConversationsRequest(creator_id="bob")
            )
            assert {talk.id for talk in listed.conversations} == {talk.id for talk in talks[1::2]}
            assert await parley.purge_user(ada.id) == pb.PurgeUserResponse(done=True)
        await database.close()
    finally:
        await service.stop()
