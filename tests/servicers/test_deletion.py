"""Conversations deleted, undeleted, purged: who may, what is left, and what a race ends in."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from parley.v1 import conversation_pb2 as pb
from parley.v1 import message_pb2, participant_pb2

from ..make import (
    USER,
    Client,
    Conversation,
    facts,
    failure,
    insist,
    is_replay,
    miscounted,
)
from .test_update_conversation import everybody, outcome

NOBODY = "01890000-0000-7000-8000-000000000001"


async def listed(client: Client, **filters: Any) -> list[str]:
    answer = await client.conversations.ListConversations(pb.ListConversationsRequest(**filters))
    return [each.id for each in answer.conversations]


# Delete and undelete


async def test_a_deleted_conversation_is_marked_and_nothing_beneath_it_changes(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob, slug="talk", first="hello")
    actor = parley.acting_as(ada)

    deleted = (await actor.delete("talk")).conversation

    assert deleted == await actor.seen(talk) == await parley.acting_as(bob).seen(talk)
    assert deleted.HasField("delete_time")
    assert deleted.etag != talk.etag
    assert deleted.version == talk.version + 1
    deleted.ClearField("delete_time")
    deleted.etag, deleted.version = talk.etag, talk.version
    assert deleted == talk
    assert await listed(parley) == await listed(actor) == []
    assert await listed(parley, show_deleted=True) == [talk.id]
    assert await listed(actor, show_deleted=True) == [talk.id]
    taken = await failure(parley.conversation(ada, slug="talk"))
    assert (taken.code, taken.reason) == ("ALREADY_EXISTS", "SLUG_TAKEN")
    assert (await facts(database, talk))[-1] == {
        "version": 5,
        "type": "CONVERSATION_DELETED",
        "actor_id": ada.id,
        "revision": 2,
    }

    back = (await actor.undelete(talk)).conversation

    assert not back.HasField("delete_time")
    assert back.etag not in (talk.etag, deleted.etag)
    assert back.update_time == talk.update_time
    assert [each.content for each in await actor.all_messages(talk)] == ["hello"]
    assert (await parley.participant(talk, bob)).status == participant_pb2.Participant.STATUS_JOINED
    assert (await facts(database, talk))[-1] == {
        "version": 6,
        "type": "CONVERSATION_UNDELETED",
        "actor_id": ada.id,
        "revision": 3,
    }
    assert not await miscounted(database)


@pytest.mark.parametrize(
    ("standing", "expected"),
    [
        ("owner", "OK"),
        ("moderator", "PERMISSION_DENIED PERMISSION_DENIED"),
        ("member", "PERMISSION_DENIED PERMISSION_DENIED"),
        ("observer", "PERMISSION_DENIED PERMISSION_DENIED"),
        ("invited", "PERMISSION_DENIED NOT_A_PARTICIPANT"),
        ("left", "PERMISSION_DENIED NOT_A_PARTICIPANT"),
        ("stranger", "NOT_FOUND CONVERSATION_NOT_FOUND"),
        ("system", "OK"),
    ],
)
async def test_owners_delete_and_undelete_and_the_system_purges(
    parley: Client, standing: str, expected: str
) -> None:
    talk, clients = await everybody(parley)
    client = clients[standing]

    assert await outcome(client.delete(talk)) == expected
    assert (await parley.seen(talk)).HasField("delete_time") is (expected == "OK")
    await parley.delete(talk, allow_missing=True)
    # What is deleted already is refused for the same reason as what is not.
    again = "NOT_FOUND CONVERSATION_NOT_FOUND" if expected == "OK" else expected
    assert await outcome(client.delete(talk)) == again
    assert await outcome(client.undelete(talk)) == expected
    await parley.delete(talk, allow_missing=True)
    assert await outcome(client.purge(talk)) == (
        "OK" if standing == "system" else "PERMISSION_DENIED ACTOR_NOT_ALLOWED"
    )


async def test_delete_again_is_not_found_unless_that_is_allowed(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)
    await actor.delete(talk)
    before = await facts(database, talk)

    refused = await failure(actor.delete(talk))
    assert (refused.code, refused.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")
    assert refused.resource == ("parley.v1.Conversation", talk.id)
    nothing = pb.DeleteConversationResponse()
    for name in (talk.id, NOBODY, "nobody-there"):
        assert await actor.delete(name, allow_missing=True) == nothing
    assert await facts(database, talk) == before


async def test_undelete_of_a_live_one_says_so(parley: Client) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    refused = await failure(parley.undelete(talk))
    assert (refused.code, refused.reason) == ("ALREADY_EXISTS", "NOT_DELETED")
    assert refused.resource == ("parley.v1.Conversation", talk.id)


async def test_a_stale_etag_stops_each_of_the_three(parley: Client) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    stale = "ABORTED ETAG_MISMATCH"
    assert await outcome(parley.delete(talk, etag="9" + talk.etag[1:])) == stale
    deleted = (await parley.delete(talk, etag=talk.etag)).conversation
    assert await outcome(parley.undelete(talk, etag=talk.etag)) == stale
    assert await outcome(parley.purge(talk, etag=talk.etag)) == stale
    back = (await parley.undelete(talk, etag=deleted.etag)).conversation
    # State is told before etags.
    assert await outcome(parley.undelete(talk, etag=talk.etag)) == "ALREADY_EXISTS NOT_DELETED"
    assert await outcome(parley.purge(talk, etag=talk.etag)) == "FAILED_PRECONDITION NOT_DELETED"
    now = (await parley.delete(talk, etag=back.etag)).conversation
    assert await outcome(parley.delete(talk, etag=talk.etag, allow_missing=True)) == "OK"
    assert await outcome(parley.purge(talk, etag=now.etag)) == "OK"


@pytest.mark.parametrize("call", ["delete", "undelete", "purge"])
async def test_a_bad_field_is_named_with_its_rule(parley: Client, call: str) -> None:
    for name, reason in (("", "REQUIRED"), ("../x", "INVALID_REFERENCE")):
        refused = await failure(getattr(parley, call)(name, etag="?", request_id="\n"))
        assert refused.code == "INVALID_ARGUMENT"
        assert refused.violations == {
            "conversation_id": reason,
            "etag": "INVALID_ETAG",
            "request_id": "INVALID_REQUEST_ID",
        }


async def test_an_archived_conversation_is_deleted_and_comes_back_archived(
    parley: Client,
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    await parley.update(talk, is_active=False)
    await parley.acting_as(ada).delete(talk)
    assert not (await parley.acting_as(ada).undelete(talk)).conversation.is_active


async def test_repeated_request_ids_delete_and_undelete_once(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)
    await actor.delete(talk, request_id="r")
    await actor.undelete(talk, request_id="r")

    for call in (actor.delete(talk, request_id="r"), actor.undelete(talk, request_id="r")):
        assert await is_replay(call)
        assert (await call).conversation == await actor.seen(talk)
    assert len(await facts(database, talk)) == 4
    refused = await failure(actor.delete(talk, request_id="r", etag=talk.etag))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "REQUEST_ID_REUSED")


async def test_what_was_already_done_is_remembered_as_nothing_to_do(parley: Client) -> None:
    """Repeated after an undelete, the call must not delete what it did not delete before."""
    talk = await parley.conversation(await parley.user("ada"))
    await parley.delete(talk)
    await parley.delete(talk, allow_missing=True, request_id="r")
    await parley.undelete(talk)

    call = parley.delete(talk, allow_missing=True, request_id="r")

    assert await is_replay(call)
    assert await call == pb.DeleteConversationResponse()
    assert not (await parley.seen(talk)).HasField("delete_time")


# What a deleted conversation answers


def on_a_deleted_one(talk: Conversation, other: str) -> dict[str, Callable[[Client], Any]]:
    """Every call that a deleted conversation refuses."""
    id = talk.id
    m, p = message_pb2, participant_pb2
    new = m.NewMessage(role=USER, content="x")
    return {
        "update": lambda c: c.update(id, title="x"),
        "send": lambda c: c.send(talk),
        "batch": lambda c: c.messages.BatchSendMessages(
            m.BatchSendMessagesRequest(conversation_id=id, messages=[new])
        ),
        "get message": lambda c: c.messages.GetMessage(
            m.GetMessageRequest(conversation_id=id, sequence=1)
        ),
        "list messages": lambda c: c.messages.ListMessages(
            m.ListMessagesRequest(conversation_id=id)
        ),
        "delete message": lambda c: c.delete_message(id, sequence=1),
        "delete nothing": lambda c: c.delete_message(id, sequence=99, allow_missing=True),
        "undelete message": lambda c: c.undelete_message(id, sequence=1),
        "invite": lambda c: c.participants.InviteParticipant(
            p.InviteParticipantRequest(conversation_id=id, user_id=other)
        ),
        "add": lambda c: c.participants.AddParticipant(
            p.AddParticipantRequest(conversation_id=id, user_id=other)
        ),
        "remove": lambda c: c.participants.RemoveParticipant(
            p.RemoveParticipantRequest(conversation_id=id, user_id="bob")
        ),
        "mark read": lambda c: c.participants.MarkRead(
            p.MarkReadRequest(conversation_id=id, sequence=1)
        ),
        "get participant": lambda c: c.participants.GetParticipant(
            p.GetParticipantRequest(conversation_id=id, user_id="bob")
        ),
        "list participants": lambda c: c.participants.ListParticipants(
            p.ListParticipantsRequest(conversation_id=id)
        ),
    }


async def test_a_deleted_conversation_refuses_every_read_and_write_but_get(parley: Client) -> None:
    ada, bob, cy, eve = [await parley.user(name) for name in ("ada", "bob", "cy", "eve")]
    talk = await parley.conversation(ada, bob, invited=[cy], first="hello")
    calls = on_a_deleted_one(talk, eve.id)
    await parley.delete(talk)

    owner, stranger = parley.acting_as(ada), parley.acting_as(eve)
    answers = {name: await outcome(call(owner)) for name, call in calls.items()}
    assert answers == dict.fromkeys(calls, "FAILED_PRECONDITION CONVERSATION_DELETED")
    hidden = {name: await outcome(call(stranger)) for name, call in calls.items()}
    assert hidden == dict.fromkeys(calls, "NOT_FOUND CONVERSATION_NOT_FOUND")

    accepted = await outcome(parley.acting_as(cy).accept(talk, cy))
    assert accepted == "FAILED_PRECONDITION CONVERSATION_DELETED"
    assert await outcome(parley.acting_as(cy).decline(talk, cy)) == "OK"
    assert await outcome(parley.acting_as(bob).leave(talk, bob)) == "OK"


# Purge


async def test_a_purge_removes_all_but_one_event(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    kept = await parley.conversation(ada, first="stays")
    talk = await parley.conversation(ada, bob, slug="talk", external_id="x-1", first="one")
    first = (await parley.all_messages(talk))[0]
    # Rows that point at each other in every way there is.
    reply = await parley.message(
        talk, bob, "two", reply_to_message_id=first.id, parent_message_id=first.id, request_id="r"
    )
    await parley.delete_message(talk, message_id=reply.id)
    await parley.acting_as(ada).invite(talk, cy, initial_message_id=first.id)
    await parley.leave(talk, bob)
    deleted = (await parley.delete(talk)).conversation

    purged = await parley.purge("talk")

    assert purged == pb.PurgeConversationResponse(message_count=2, participant_count=3)
    assert await facts(database, talk) == [
        {"version": deleted.version + 1, "type": "CONVERSATION_PURGED"}
    ]
    for table in ("participants", "messages", "requests"):
        left = await database.fetchval(
            f"SELECT count(*) FROM {table} WHERE conversation_id = $1", UUID(talk.id)
        )
        assert left == 0
    for call in (
        lambda: parley.seen(talk),
        lambda: parley.acting_as(ada).seen(talk),
        lambda: parley.delete(talk),
        lambda: parley.undelete(talk),
        lambda: parley.purge(talk),
        lambda: parley.purge("talk"),
        lambda: parley.update(talk, title="x"),
    ):
        assert await outcome(call()) == "NOT_FOUND CONVERSATION_NOT_FOUND"
    again = await parley.conversation(ada, slug="talk", external_id="x-1")
    assert again.id != talk.id
    assert [each.content for each in await parley.all_messages(kept)] == ["stays"]
    assert not await miscounted(database)


async def test_only_what_is_deleted_is_purged(parley: Client) -> None:
    talk = await parley.conversation(await parley.user("ada"), first="hello")
    refused = await failure(parley.purge(talk, allow_missing=True))
    assert (refused.code, refused.precondition) == ("FAILED_PRECONDITION", "NOT_DELETED")
    assert len(await parley.all_messages(talk)) == 1


async def test_a_purge_of_nothing_is_not_found_unless_that_is_allowed(parley: Client) -> None:
    for name in (NOBODY, "nobody-there"):
        assert await outcome(parley.purge(name)) == "NOT_FOUND CONVERSATION_NOT_FOUND"
        assert await parley.purge(name, allow_missing=True) == pb.PurgeConversationResponse()


@pytest.mark.parametrize("by_slug", [True, False])
async def test_a_repeated_purge_answers_what_was_counted_then(
    parley: Client, by_slug: bool
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob, slug="talk", first="hello")
    name = "talk" if by_slug else talk.id
    await parley.delete(talk)
    first = await parley.purge(name, request_id="r")

    # Somebody else's by now.
    await parley.conversation(ada, slug="talk")
    call = parley.purge(name, request_id="r")

    assert await is_replay(call)
    assert await call == first == pb.PurgeConversationResponse(message_count=1, participant_count=2)
    refused = await failure(parley.purge(name, request_id="r", allow_missing=True))
    assert refused.reason == "REQUEST_ID_REUSED"
    assert await outcome(parley.purge("other", request_id="r")) == (
        "NOT_FOUND CONVERSATION_NOT_FOUND"
    )


async def test_of_32_who_purge_at_once_one_does(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="hello")
    await parley.delete(talk)
    answers = await asyncio.gather(
        *(insist(lambda: parley.purge(talk, allow_missing=True)) for _ in range(32))
    )
    assert sorted(each.message_count for each in answers) == [0] * 31 + [1]
    assert len(await facts(database, talk)) == 1


# Races


async def test_deletes_undeletes_and_sends_at_once_end_in_a_serial_story(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    actor = parley.acting_as(ada)
    expected = {
        "CONVERSATION_DELETED": {"OK", "NOT_FOUND CONVERSATION_NOT_FOUND"},
        "CONVERSATION_UNDELETED": {"OK", "ALREADY_EXISTS NOT_DELETED"},
        "MESSAGE_CREATED": {"OK", "FAILED_PRECONDITION CONVERSATION_DELETED"},
    }
    for _ in range(3):
        talk = await parley.conversation(ada)
        calls: list[tuple[str, Callable[[], Any]]] = [
            ("CONVERSATION_DELETED", partial(actor.delete, talk)),
            ("CONVERSATION_UNDELETED", partial(actor.undelete, talk)),
            ("MESSAGE_CREATED", partial(actor.send, talk)),
        ]
        racers = [calls[number % 3] for number in range(64)]
        answers = await asyncio.gather(*(outcome(insist(call)) for _, call in racers))

        done = [kind for (kind, _), answer in zip(racers, answers, strict=True) if answer == "OK"]
        for (kind, _), answer in zip(racers, answers, strict=True):
            assert answer in expected[kind]
        # What is told is one order of what was acknowledged, each possible where it stands.
        told = [each["type"] for each in (await facts(database, talk))[2:]]
        assert sorted(told) == sorted(done)
        deleted = False
        for kind in told:
            assert deleted is (kind == "CONVERSATION_UNDELETED")
            deleted = kind == "CONVERSATION_DELETED"
        assert (await actor.seen(talk)).HasField("delete_time") is deleted
    assert not await miscounted(database)


async def test_a_delete_an_undelete_and_a_send_end_as_in_one_of_their_six_orders(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    actor = parley.acting_as(ada)
    # Outcomes of delete, undelete and send, by whether each is OK, and whether it ends deleted.
    serial = {
        (True, True, True, False),  # d u s, s d u
        (True, True, False, False),  # d s u
        (True, False, False, True),  # u d s
        (True, False, True, True),  # u s d, s u d
    }
    seen = set()
    for _ in range(20):
        talk = await parley.conversation(ada)
        answers = await asyncio.gather(
            outcome(insist(partial(actor.delete, talk))),
            outcome(insist(partial(actor.undelete, talk))),
            outcome(insist(partial(actor.send, talk))),
        )
        deleted = (await actor.seen(talk)).HasField("delete_time")
        seen.add((*(answer == "OK" for answer in answers), deleted))
    assert seen <= serial
    assert not await miscounted(database)
