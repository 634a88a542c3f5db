"""Who may send, in whose name, in which role; and what everybody else is told."""

from collections.abc import Awaitable
from typing import Any

import asyncpg
import pytest

from parley.v1 import message_pb2 as pb

from ..make import (
    AGENT,
    ASSISTANT,
    HUMAN,
    MODERATOR,
    OBSERVER,
    SYSTEM,
    TOOL,
    USER,
    Client,
    Conversation,
    Failure,
    User,
    failure,
)

NOBODY = "01890000-0000-7000-8000-000000000001"

# How one comes to stand in a conversation, from nothing.
PATHS = {
    "stranger": [],
    "invited": ["invite"],
    "declined": ["invite", "decline"],
    "revoked": ["invite", "revoke"],
    "left": ["invite", "accept", "leave"],
    "removed": ["invite", "accept", "remove"],
    "invited again": ["invite", "accept", "leave", "invite"],
}


async def bring(
    parley: Client, database: asyncpg.Connection, talk: Conversation, user: User, standing: str
) -> None:
    for step in PATHS[standing]:
        if step == "invite":
            await parley.invite(talk, user, invited_by_user_id=talk.creator_id)
        elif step == "revoke":
            await database.execute(
                "UPDATE participants SET status = 'REVOKED' WHERE role <> 'OWNER'"
            )
        elif step == "remove":
            await database.execute(
                "UPDATE participants SET status = 'REMOVED', visible_to_sequence = 0,"
                " left_at = clock_timestamp() WHERE role <> 'OWNER'"
            )
        else:
            await getattr(parley, step)(talk, user)


@pytest.mark.parametrize(
    ("standing", "code", "reason"),
    [
        ("stranger", "NOT_FOUND", "CONVERSATION_NOT_FOUND"),
        ("declined", "NOT_FOUND", "CONVERSATION_NOT_FOUND"),
        ("revoked", "NOT_FOUND", "CONVERSATION_NOT_FOUND"),
        ("invited", "PERMISSION_DENIED", "NOT_A_PARTICIPANT"),
        ("invited again", "PERMISSION_DENIED", "NOT_A_PARTICIPANT"),
        ("left", "PERMISSION_DENIED", "NOT_A_PARTICIPANT"),
        ("removed", "PERMISSION_DENIED", "NOT_A_PARTICIPANT"),
    ],
)
async def test_only_who_is_joined_may_send(
    parley: Client, database: asyncpg.Connection, standing: str, code: str, reason: str
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    await bring(parley, database, talk, bob, standing)

    by_himself = await failure(parley.acting_as(bob).send(talk))
    by_the_system = await failure(parley.message(talk, bob))

    assert (by_himself.code, by_himself.reason) == (code, reason)
    assert (by_the_system.code, by_the_system.known["field"]) == (
        "FAILED_PRECONDITION",
        "sender_id",
    )
    assert by_the_system.precondition == "NOT_A_PARTICIPANT"
    assert await parley.all_messages(talk) == []


@pytest.mark.parametrize(
    ("role", "may"), [(MODERATOR, True), (pb.Message.ROLE_UNSPECIFIED, True), (OBSERVER, False)]
)
async def test_an_observer_may_not_send(parley: Client, role: Any, may: bool) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    await parley.acting_as(ada).invite(talk, bob, role=role)
    await parley.acting_as(bob).accept(talk, bob)

    if may:
        assert (await parley.acting_as(bob).send(talk)).sender_id == bob.id
    else:
        refused = await failure(parley.acting_as(bob).send(talk))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")


def without_the_name(refused: Failure, name: str) -> tuple[str, str, bytes]:
    details = refused.trailers["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    return refused.code, refused.message.replace(name, "…"), details.replace(name.encode(), b"...")


@pytest.mark.parametrize("method", ["SendMessage", "BatchSendMessages", "GetMessage", "List"])
@pytest.mark.parametrize("by_slug", [False, True])
async def test_a_hidden_conversation_looks_like_a_missing_one(
    parley: Client, method: str, by_slug: bool
) -> None:
    ada, eve = await parley.user("ada"), await parley.user("eve")
    talk = await parley.conversation(ada, slug="secret-plans", first="hello")
    hidden, missing = ("secret-plans", "nobody-knows") if by_slug else (talk.id, NOBODY)

    async def refused(name: str) -> tuple[str, str, bytes]:
        calls = parley.acting_as(eve).messages
        draft = pb.NewMessage(role=USER, content="x", sender_id="ada")
        made: Awaitable[Any] = {
            "SendMessage": lambda: calls.SendMessage(
                pb.SendMessageRequest(
                    conversation_id=name, role=SYSTEM, content="x", sender_id="ada"
                )
            ),
            "BatchSendMessages": lambda: calls.BatchSendMessages(
                pb.BatchSendMessagesRequest(conversation_id=name, messages=[draft])
            ),
            "GetMessage": lambda: calls.GetMessage(
                pb.GetMessageRequest(conversation_id=name, sequence=1)
            ),
            "List": lambda: calls.ListMessages(pb.ListMessagesRequest(conversation_id=name)),
        }[method]()
        answer = await failure(made)
        assert answer.reason == "CONVERSATION_NOT_FOUND"
        return without_the_name(answer, name)

    assert await refused(hidden) == await refused(missing)


# In whose name


async def test_an_actor_may_name_itself_however_it_likes(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)

    sent = [await actor.send(talk, sender_id=name) for name in ("", "ada", ada.id, ada.id.upper())]

    assert {message.sender_id for message in sent} == {ada.id}


@pytest.mark.parametrize("named", ["username", "id", "unknown username", "unknown id"])
async def test_an_actor_may_not_name_anybody_else(parley: Client, named: str) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    name = {"username": "bob", "id": bob.id, "unknown username": "nemo", "unknown id": NOBODY}[
        named
    ]

    refused = await failure(parley.acting_as(ada).send(talk, sender_id=name))

    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert await parley.all_messages(talk) == []


@pytest.mark.parametrize("named", ["bob", NOBODY])
async def test_the_system_must_name_somebody_who_exists(parley: Client, named: str) -> None:
    talk = await parley.conversation(await parley.user("ada"))

    refused = await failure(parley.send(talk, sender_id=named))

    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "USER_NOT_FOUND")
    assert refused.known == {"field": "sender_id", "name": named}
    assert refused.resource == ("parley.v1.User", named)


@pytest.mark.parametrize("change", ["is_active = false", "deleted_at = clock_timestamp()"])
async def test_an_inactive_user_neither_sends_nor_is_sent_for(
    parley: Client, database: asyncpg.Connection, change: str
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    await database.execute(f"UPDATE users SET {change} WHERE username = 'bob'")

    by_himself = await failure(parley.acting_as(bob).send(talk))
    by_the_system = await failure(parley.message(talk, bob))

    assert (by_himself.code, by_himself.reason) == ("PERMISSION_DENIED", "ACTOR_NOT_ALLOWED")
    assert (by_the_system.code, by_the_system.reason) == ("FAILED_PRECONDITION", "USER_INACTIVE")
    assert by_the_system.known["field"] == "sender_id"


# In which role


@pytest.mark.parametrize(
    ("kind", "role", "may"),
    [
        (HUMAN, USER, True),
        (HUMAN, ASSISTANT, False),
        (HUMAN, SYSTEM, False),
        (HUMAN, TOOL, False),
        (AGENT, USER, True),
        (AGENT, ASSISTANT, True),
        (AGENT, SYSTEM, False),
        (AGENT, TOOL, True),
    ],
)
async def test_an_actor_speaks_in_the_roles_of_its_kind(
    parley: Client, kind: Any, role: Any, may: bool
) -> None:
    user = await parley.user("someone", kind=kind)
    talk = await parley.conversation(user)

    if may:
        assert (await parley.acting_as(user).send(talk, role=role)).role == role
    else:
        refused = await failure(parley.acting_as(user).send(talk, role=role))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "ROLE_NOT_ALLOWED")
        assert refused.known["field"] == "role"
        assert await parley.all_messages(talk) == []


@pytest.mark.parametrize("role", [USER, ASSISTANT, SYSTEM, TOOL])
async def test_the_system_speaks_in_every_role_for_anybody(parley: Client, role: Any) -> None:
    """Real logs hold people who answer as assistants, and notices that somebody caused."""
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    assert (await parley.message(talk, ada, role=role)).role == role


async def test_only_a_user_message_needs_a_sender(parley: Client) -> None:
    talk = await parley.conversation(await parley.user("ada"))

    sent = [await parley.send(talk, role=role) for role in (ASSISTANT, SYSTEM, TOOL)]
    refused = await failure(parley.send(talk, role=USER))

    assert [message.sender_id for message in sent] == ["", "", ""]
    assert refused.violations == {"sender_id": "REQUIRED"}


# In which state


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("is_active = false", "CONVERSATION_ARCHIVED"),
        ("deleted_at = clock_timestamp()", "CONVERSATION_DELETED"),
    ],
)
async def test_a_closed_conversation_takes_no_message(
    parley: Client, database: asyncpg.Connection, change: str, reason: str
) -> None:
    ada, eve = await parley.user("ada"), await parley.user("eve")
    talk = await parley.conversation(ada)
    await database.execute(f"UPDATE conversations SET {change}")

    for refused in (
        await failure(parley.acting_as(ada).send(talk)),
        await failure(parley.message(talk, ada)),
    ):
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", reason)
        assert refused.precondition == reason
    assert (await failure(parley.acting_as(eve).send(talk))).code == "NOT_FOUND"


async def test_an_archived_conversation_is_read_and_a_deleted_one_is_not(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="hello")
    get = pb.GetMessageRequest(conversation_id=talk.id, sequence=1)
    actor = parley.acting_as(ada)

    await database.execute("UPDATE conversations SET is_active = false")
    assert (await actor.messages.GetMessage(get)).message.content == "hello"
    assert len(await actor.all_messages(talk)) == 1

    await database.execute("UPDATE conversations SET deleted_at = clock_timestamp()")
    for client in (actor, parley):
        assert (await failure(client.messages.GetMessage(get))).reason == "CONVERSATION_DELETED"
        assert (await failure(client.all_messages(talk))).reason == "CONVERSATION_DELETED"


# Windows


async def test_who_was_invited_without_history_reads_from_the_join_on(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    for n in range(3):
        await parley.acting_as(ada).send(talk, f"before {n}")
    await parley.acting_as(ada).invite(talk, bob, hide_history=True)
    await parley.acting_as(bob).accept(talk, bob)
    await parley.acting_as(ada).send(talk, "after")

    assert [each.sequence for each in await parley.acting_as(bob).all_messages(talk)] == [4]
    assert [each.sequence for each in await parley.acting_as(ada).all_messages(talk)] == [
        1,
        2,
        3,
        4,
    ]


async def test_who_left_reads_up_to_its_leave(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    await parley.acting_as(ada).send(talk, "before")
    await parley.acting_as(bob).leave(talk, bob)
    await parley.acting_as(ada).send(talk, "after")
    bobs = parley.acting_as(bob)

    assert [each.content for each in await bobs.all_messages(talk)] == ["before"]
    assert [each.content for each in await bobs.all_messages(talk, sender_id="ada")] == ["before"]


async def test_an_invitee_reads_the_initial_message_and_no_other(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, invited=[bob], first="welcome")
    await parley.acting_as(ada).send(talk, "a secret")
    bobs = parley.acting_as(bob)

    shown = await bobs.messages.GetMessage(
        pb.GetMessageRequest(conversation_id=talk.id, sequence=1)
    )
    other = await failure(
        bobs.messages.GetMessage(pb.GetMessageRequest(conversation_id=talk.id, sequence=2))
    )
    listed = await failure(bobs.all_messages(talk))

    assert shown.message.content == "welcome"
    assert other.reason == "MESSAGE_NOT_FOUND"
    assert (listed.code, listed.reason) == ("PERMISSION_DENIED", "NOT_A_PARTICIPANT")


async def test_a_message_outside_the_window_looks_like_a_missing_one(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk, other = await parley.conversation(ada, bob), await parley.conversation(ada)
    empty = await parley.conversation(ada, bob)
    await parley.acting_as(bob).leave(talk, bob)
    after = await parley.acting_as(ada).send(talk)
    before = await parley.acting_as(ada).send(other)
    await parley.acting_as(ada).invite(other, bob, hide_history=True)
    await parley.acting_as(bob).accept(other, bob)

    async def refused(conversation: Conversation, **key: Any) -> Failure:
        request = pb.GetMessageRequest(conversation_id=conversation.id, **key)
        answer = await failure(parley.acting_as(bob).messages.GetMessage(request))
        assert answer.reason == "MESSAGE_NOT_FOUND"
        return answer

    missing = await refused(empty, sequence=1)
    assert await refused(talk, sequence=1) == await refused(other, sequence=1) == missing
    for hidden, conversation in ((after, talk), (before, other)):
        missing = await refused(empty, message_id=hidden.id)
        assert await refused(conversation, message_id=hidden.id) == missing
