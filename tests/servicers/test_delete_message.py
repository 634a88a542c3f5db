"""Messages deleted and undeleted: by whom, what is left, what is not undone."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import asyncpg
import pytest

from parley.v1 import message_pb2 as pb
from parley.v1 import participant_pb2

from ..make import (
    MODERATOR,
    OBSERVER,
    Client,
    Conversation,
    Message,
    User,
    facts,
    failure,
    insist,
    is_replay,
    miscounted,
)
from .test_update_conversation import outcome, struct

NOBODY = "01890000-0000-7000-8000-000000000001"
NOT_FOUND = "NOT_FOUND MESSAGE_NOT_FOUND"
DENIED = "PERMISSION_DENIED PERMISSION_DENIED"


async def get(client: Client, message: Message) -> Message:
    request = pb.GetMessageRequest(conversation_id=message.conversation_id, message_id=message.id)
    return (await client.messages.GetMessage(request)).message  # type: ignore[no-any-return]


async def crowd(parley: Client) -> tuple[Conversation, dict[str, User]]:
    """A conversation of an owner, a moderator, two members, an observer, and one who left."""
    names = ("owner", "moderator", "author", "member", "observer", "left", "invited", "stranger")
    users = {name: await parley.user(name) for name in names}
    talk = await parley.conversation(
        users["owner"], users["author"], users["member"], users["left"]
    )
    owner = parley.acting_as(users["owner"])
    for name, role in (("moderator", MODERATOR), ("observer", OBSERVER)):
        await owner.invite(talk, users[name], role=role)
        await parley.accept(talk, users[name])
    await owner.invite(talk, users["invited"])
    return talk, users


async def test_a_deleted_message_is_a_tombstone_and_comes_back_whole(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    sent = await parley.message(talk, ada, "hello", metadata=struct(a=1), tokens_used=7)
    actor = parley.acting_as(ada)
    before = await actor.seen(talk)

    tombstone = (await actor.delete_message(talk, message_id=sent.id)).message

    assert tombstone == await get(actor, sent) == (await actor.all_messages(talk))[0]
    assert tombstone.HasField("delete_time")
    assert (tombstone.content, dict(tombstone.metadata)) == ("", {})
    assert (tombstone.id, tombstone.sequence, tombstone.revision) == (sent.id, 1, 1)
    assert tombstone.update_time == sent.update_time
    assert tombstone.etag != sent.etag
    now = await actor.seen(talk)
    assert now.version == before.version + 1
    assert now.etag == before.etag
    assert (now.total_tokens_used, now.last_sequence) == (7, 1)
    assert now.last_activity_time == before.last_activity_time
    assert (await facts(database, talk))[-1] == {
        "version": 4,
        "type": "MESSAGE_DELETED",
        "actor_id": ada.id,
        "sequence": 1,
        "revision": 1,
    }

    back = (await actor.undelete_message(talk, sequence=1)).message

    assert back == await get(actor, sent)
    # An etag from before does not fit what has been gone meanwhile.
    assert back.etag not in (sent.etag, tombstone.etag)
    back.etag = sent.etag
    assert back == sent
    assert (await facts(database, talk))[-1]["type"] == "MESSAGE_UNDELETED"
    assert not await miscounted(database)


async def test_the_number_of_a_deleted_message_is_never_given_again(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="one")
    await parley.delete_message(talk, sequence=1)
    assert (await parley.message(talk, ada, "two")).sequence == 2
    assert [each.sequence for each in await parley.all_messages(talk)] == [1, 2]


@pytest.mark.parametrize(
    ("who", "own", "others"),
    [
        ("owner", "OK", "OK"),
        ("moderator", "OK", "OK"),
        ("member", "OK", DENIED),
        ("observer", DENIED, DENIED),
        ("left", "PERMISSION_DENIED NOT_A_PARTICIPANT", "PERMISSION_DENIED NOT_A_PARTICIPANT"),
        ("invited", "PERMISSION_DENIED NOT_A_PARTICIPANT", "PERMISSION_DENIED NOT_A_PARTICIPANT"),
        ("stranger", "NOT_FOUND CONVERSATION_NOT_FOUND", "NOT_FOUND CONVERSATION_NOT_FOUND"),
    ],
)
async def test_one_deletes_ones_own_and_a_moderator_anybodys(
    parley: Client, database: asyncpg.Connection, who: str, own: str, others: str
) -> None:
    talk, users = await crowd(parley)
    await parley.message(talk, users["author"], "the author's")
    if who in ("observer", "left", "owner", "moderator", "member"):
        await parley.message(talk, users[who], "one's own") if who != "observer" else (
            await speak_and_fall_silent(parley, database, talk, users["observer"])
        )
    await parley.leave(talk, users["left"])
    client = parley.acting_as(users[who])

    assert await outcome(client.delete_message(talk, sequence=1)) == others
    if who in ("invited", "stranger"):
        return
    assert await outcome(client.delete_message(talk, sequence=2)) == own
    # The same who may delete may bring back what it deleted.
    if own == "OK":
        assert await outcome(client.undelete_message(talk, sequence=2)) == "OK"
    else:
        await parley.delete_message(talk, sequence=2)
        assert await outcome(client.undelete_message(talk, sequence=2)) == own


async def speak_and_fall_silent(
    parley: Client, database: asyncpg.Connection, talk: Conversation, user: User
) -> None:
    """A message by somebody who was a member once and is an observer now."""
    role = "UPDATE participants SET role = $1 WHERE user_id = $2::text::uuid"
    await database.execute(role, "MEMBER", user.id)
    await parley.message(talk, user, "one's own")
    await database.execute(role, "OBSERVER", user.id)


async def test_the_system_deletes_and_undeletes_whatever_it_likes(parley: Client) -> None:
    talk, users = await crowd(parley)
    await parley.message(talk, users["author"])
    assert await outcome(parley.delete_message(talk, sequence=1)) == "OK"
    assert await outcome(parley.undelete_message(talk, sequence=1)) == "OK"


@pytest.mark.parametrize("by", ["owner", "moderator", "system"])
async def test_an_author_cannot_bring_back_what_somebody_else_removed(
    parley: Client, by: str
) -> None:
    talk, users = await crowd(parley)
    await parley.message(talk, users["author"])
    remover = parley if by == "system" else parley.acting_as(users[by])
    author, moderator = parley.acting_as(users["author"]), parley.acting_as(users["moderator"])
    await remover.delete_message(talk, sequence=1)

    assert await outcome(author.undelete_message(talk, sequence=1)) == DENIED
    # It is gone already, and being asked twice does not make it the author's deletion.
    assert await outcome(author.delete_message(talk, sequence=1)) == NOT_FOUND
    await author.delete_message(talk, sequence=1, allow_missing=True)
    assert await outcome(author.undelete_message(talk, sequence=1)) == DENIED
    assert await outcome(moderator.undelete_message(talk, sequence=1)) == "OK"
    # And what the author deletes itself, it brings back itself; nobody but a moderator else.
    await author.delete_message(talk, sequence=1)
    assert await outcome(parley.acting_as(users["member"]).undelete_message(talk, sequence=1)) == (
        DENIED
    )
    assert await outcome(author.undelete_message(talk, sequence=1)) == "OK"


async def test_delete_again_is_not_found_unless_that_is_allowed(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="hello")
    actor = parley.acting_as(ada)
    await actor.delete_message(talk, sequence=1)
    before = await facts(database, talk)

    refused = await failure(actor.delete_message(talk, sequence=1))
    assert (refused.code, refused.reason) == ("NOT_FOUND", "MESSAGE_NOT_FOUND")
    assert refused.resource == ("parley.v1.Message", "1")
    for key in ({"sequence": 1}, {"sequence": 2}, {"message_id": NOBODY}):
        answer = await actor.delete_message(talk, allow_missing=True, **key)
        assert answer == pb.DeleteMessageResponse()
    assert await facts(database, talk) == before


async def test_undelete_of_a_live_one_says_so(parley: Client) -> None:
    talk, users = await crowd(parley)
    await parley.message(talk, users["author"])
    for name in ("author", "moderator"):
        refused = await failure(parley.acting_as(users[name]).undelete_message(talk, sequence=1))
        assert (refused.code, refused.reason) == ("ALREADY_EXISTS", "NOT_DELETED")
        assert refused.resource == ("parley.v1.Message", "1")
    assert await outcome(parley.undelete_message(talk, sequence=2)) == NOT_FOUND


async def test_a_stale_etag_stops_both(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    sent = await parley.message(talk, ada)
    gone = (await parley.delete_message(talk, sequence=1, etag=sent.etag)).message
    stale = await outcome(parley.undelete_message(talk, sequence=1, etag=sent.etag))
    assert stale == "ABORTED ETAG_MISMATCH"
    back = (await parley.undelete_message(talk, sequence=1, etag=gone.etag)).message
    stale = await outcome(parley.delete_message(talk, sequence=1, etag=sent.etag))
    assert stale == "ABORTED ETAG_MISMATCH"
    assert await outcome(parley.delete_message(talk, sequence=1, etag=back.etag)) == "OK"


@pytest.mark.parametrize("call", ["delete_message", "undelete_message"])
@pytest.mark.parametrize(
    ("values", "violations"),
    [
        ({}, {"message_id": "REQUIRED"}),
        ({"message_id": "../x"}, {"message_id": "INVALID_REFERENCE"}),
        ({"sequence": 0}, {"sequence": "OUT_OF_BOUNDS"}),
        ({"sequence": 1, "etag": "?"}, {"etag": "INVALID_ETAG"}),
        ({"sequence": 1, "request_id": "é"}, {"request_id": "INVALID_REQUEST_ID"}),
    ],
)
async def test_a_bad_field_is_named_with_its_rule(
    parley: Client, call: str, values: dict[str, Any], violations: dict[str, str]
) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    refused = await failure(getattr(parley, call)(talk, **values))
    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)


async def test_a_message_outside_the_window_or_of_another_place_is_one_that_is_missing(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, first="before bob's time")
    elsewhere = await parley.conversation(bob)
    other = await parley.message(elsewhere, bob)
    (hidden,) = await parley.all_messages(talk)
    await parley.acting_as(ada).invite(talk, bob, role=MODERATOR, hide_history=True)
    await parley.accept(talk, bob)
    actor = parley.acting_as(bob)

    keys: list[dict[str, Any]] = [
        {"sequence": 1},
        {"message_id": hidden.id},
        {"message_id": other.id},
    ]
    calls: list[Callable[[], Any]] = [
        partial(getattr(actor, call), talk, **key)
        for key in keys
        for call in ("delete_message", "undelete_message")
    ]
    before = [await failure(call()) for call in calls]
    allowed = await actor.delete_message(talk, sequence=1, allow_missing=True)
    assert allowed == pb.DeleteMessageResponse()
    assert not (await get(parley, hidden)).HasField("delete_time")
    await database.execute("DELETE FROM messages")
    assert [await failure(call()) for call in calls] == before
    assert {(each.code, each.reason) for each in before} == {("NOT_FOUND", "MESSAGE_NOT_FOUND")}


async def test_a_closed_conversation_keeps_its_messages_as_they_are(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="one")
    await parley.message(talk, ada, "two")
    await parley.delete_message(talk, sequence=2)
    closing: list[tuple[str, Callable[[], Any]]] = [
        ("CONVERSATION_ARCHIVED", lambda: parley.update(talk, is_active=False)),
        ("CONVERSATION_DELETED", lambda: parley.delete(talk)),
    ]
    for reason, close in closing:
        await close()
        for client in (parley, parley.acting_as(ada)):
            for call in (
                client.delete_message(talk, sequence=1),
                client.undelete_message(talk, sequence=2),
                client.delete_message(talk, sequence=9, allow_missing=True),
            ):
                assert await outcome(call) == f"FAILED_PRECONDITION {reason}"


async def test_repeated_request_ids_delete_and_undelete_once(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="hello")
    actor = parley.acting_as(ada)
    await actor.delete_message(talk, sequence=1, request_id="r")
    await actor.undelete_message(talk, sequence=1, request_id="r")

    for call in (
        actor.delete_message(talk, sequence=1, request_id="r"),
        actor.undelete_message(talk, sequence=1, request_id="r"),
    ):
        assert await is_replay(call)
        assert (await call).message.content == "hello"
    assert len(await facts(database, talk)) == 5
    reused = await outcome(actor.delete_message(talk, sequence=2, request_id="r"))
    assert reused == "FAILED_PRECONDITION REQUEST_ID_REUSED"
    await actor.leave(talk, ada)
    # One's own stays one's own.
    again = await actor.delete_message(talk, sequence=1, request_id="r")
    assert again.message.content == "hello"


async def test_a_replay_shows_no_more_than_one_may_see_today(parley: Client) -> None:
    talk, users = await crowd(parley)
    await parley.message(talk, users["author"])
    moderator = parley.acting_as(users["moderator"])
    await moderator.delete_message(talk, sequence=1, request_id="r")
    await moderator.leave(talk, users["moderator"])
    await parley.undelete_message(talk, sequence=1)
    again = (await moderator.delete_message(talk, sequence=1, request_id="r")).message
    assert again == (await get(moderator, again))


async def test_what_was_already_done_is_remembered_as_nothing_to_do(parley: Client) -> None:
    talk = await parley.conversation(await parley.user("ada"), first="hello")
    await parley.delete_message(talk, sequence=1)
    await parley.delete_message(talk, sequence=1, allow_missing=True, request_id="r")
    await parley.undelete_message(talk, sequence=1)
    call = parley.delete_message(talk, sequence=1, allow_missing=True, request_id="r")
    assert await is_replay(call)
    assert await call == pb.DeleteMessageResponse()
    assert (await parley.all_messages(talk))[0].content == "hello"


async def test_a_deleted_message_is_not_unread_and_moves_no_cursor(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    for content in ("one", "two", "three"):
        await parley.message(talk, ada, content)
    await parley.delete_message(talk, sequence=2)
    reader = parley.acting_as(bob)

    async def unread(sequence: int) -> int:
        answer = await reader.participants.MarkRead(
            participant_pb2.MarkReadRequest(conversation_id=talk.id, sequence=sequence)
        )
        assert answer.participant.last_read_sequence == sequence
        return int(answer.unread_count)

    assert await unread(1) == 1
    await parley.undelete_message(talk, sequence=2)
    assert await unread(1) == 2


async def test_of_64_who_delete_and_undelete_at_once_the_story_is_one(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="hello")
    actor = parley.acting_as(ada)
    answers = await asyncio.gather(
        *(
            outcome(insist(partial(call, talk, sequence=1)))
            for call in [actor.delete_message, actor.undelete_message] * 32
        )
    )
    assert set(answers[::2]) <= {"OK", NOT_FOUND}
    assert set(answers[1::2]) <= {"OK", "ALREADY_EXISTS NOT_DELETED"}
    told = [each["type"] for each in (await facts(database, talk))[3:]]
    assert len(told) == answers.count("OK")
    assert told == (["MESSAGE_DELETED", "MESSAGE_UNDELETED"] * 32)[: len(told)]
    assert not await miscounted(database)
