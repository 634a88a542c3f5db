"""request_id: however often a message is sent, it is there once."""

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from google.protobuf.struct_pb2 import Struct

from parley.v1 import message_pb2 as pb
from service.access import hash_of
from service.repositories.base import Row
from service.repositories.messages import Key, Messages

from ..make import ASSISTANT, USER, Client, Conversation, User, failure


def sending(talk: Conversation, content: str = "once", **values: Any) -> pb.SendMessageRequest:
    values = {"conversation_id": talk.id, "role": USER, "request_id": "r-1", **values}
    return pb.SendMessageRequest(content=content, **values)


async def sent(client: Client, request: pb.SendMessageRequest) -> tuple[pb.Message, bool]:
    """The message answered, and whether the answer says that it was given before."""
    call = client.messages.SendMessage(request)
    response = await call
    return response.message, await was_given_before(call)


async def was_given_before(call: Any) -> bool:
    return ("x-parley-replayed", "true") in list(await call.trailing_metadata())


async def test_a_repeated_request_id_gives_the_first_answer(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    request = sending(talk, metadata=Struct(), tokens_used=3, external_id="x")

    first, first_is_replay = await sent(parley.acting_as(ada), request)
    again, again_is_replay = await sent(parley.acting_as(ada), request)

    assert again == first
    assert (first_is_replay, again_is_replay) == (False, True)
    assert await parley.all_messages(talk) == [first]


async def test_a_batch_is_repeated_as_a_whole(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="before")
    request = pb.BatchSendMessagesRequest(
        conversation_id=talk.id,
        messages=[pb.NewMessage(role=USER, content=f"line {n}") for n in range(5)],
        request_id="r-1",
    )
    actor = parley.acting_as(ada)

    first = await actor.messages.BatchSendMessages(request)
    await actor.send(talk, "between")
    call = actor.messages.BatchSendMessages(request)

    assert await call == first
    assert await was_given_before(call)
    assert [each.sequence for each in first.sent_messages] == [2, 3, 4, 5, 6]
    assert (await parley.seen(talk)).last_sequence == 7


async def test_many_that_repeat_at_once_share_what_is_read(
    parley: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)
    firsts = [await sent(actor, sending(talk, request_id=f"r-{n}")) for n in range(4)]
    find, batches = Messages.find, []

    async def counted(self: Messages, keys: Sequence[Key]) -> list[Row | None]:
        batches.append(len(keys))
        # Time for all the others to come.
        await asyncio.sleep(0.2)
        return await find(self, keys)

    monkeypatch.setattr(Messages, "find", counted)
    again = await asyncio.gather(
        *(sent(actor, sending(talk, request_id=f"r-{n % 4}")) for n in range(64))
    )

    assert again == [(firsts[n % 4][0], True) for n in range(64)]
    assert sum(batches) == 64
    assert len(batches) < 16, batches


async def test_without_a_request_id_every_call_sends(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    request = sending(talk, request_id="")

    answers = [await sent(parley.acting_as(ada), request) for _ in range(2)]

    assert [message.sequence for message, _ in answers] == [1, 2]
    assert not any(replayed for _, replayed in answers)


@pytest.mark.parametrize(
    "other",
    [
        {"content": "twice"},
        {"metadata": {"a": 1}},
        {"role": ASSISTANT},
        {"tokens_used": 0},
        {"expected_last_sequence": 0},
        {"sender_id": "ada"},
        {"conversation_id": "the-slug"},
    ],
    ids=str,
)
async def test_the_same_id_for_another_request_is_refused(
    parley: Client, other: dict[str, Any]
) -> None:
    """References count as they were sent: a slug is another request than the id behind it."""
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, slug="the-slug")
    first, _ = await sent(parley, sending(talk, sender_id=ada.id))

    refused = await failure(
        parley.messages.SendMessage(sending(talk, **{"sender_id": ada.id, **other}))
    )

    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "REQUEST_ID_REUSED")
    assert refused.known == {}
    assert await parley.all_messages(talk) == [first]


async def send_bytes(parley: Client, request: bytes) -> pb.Message:
    call: Any = parley.channel.unary_unary("/parley.v1.MessageService/SendMessage")
    answer = await call(request, metadata=parley.metadata)
    return pb.SendMessageResponse.FromString(answer).message


async def test_unknown_fields_make_no_other_request(parley: Client) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    request = sending(talk, sender_id="ada")
    first, _ = await sent(parley, request)

    newer = request.SerializeToString() + b"\xfa\x3f\x05newer"

    assert await send_bytes(parley, newer) == first


async def test_metadata_in_another_order_makes_no_other_request(parley: Client) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    known = sending(talk, sender_id="ada").SerializeToString()
    entries = []
    for key in ("one", "two"):
        metadata = Struct()
        metadata.update({key: key})
        entries.append(pb.SendMessageRequest(metadata=metadata).SerializeToString())

    first = await send_bytes(parley, known + entries[0] + entries[1])
    again = await send_bytes(parley, known + entries[1] + entries[0])

    assert dict(first.metadata.items()) == {"one": "one", "two": "two"}
    assert again == first


# Whose id it is


async def other_caller(parley: Client, database: asyncpg.Connection) -> Client:
    """The client of another service."""
    key_id = uuid4().hex
    await database.execute(
        "INSERT INTO tokens (key_id, secret_hash, service, scopes) VALUES ($1, $2, 'other', $3)",
        key_id,
        hash_of("secret"),
        ["read", "write", "act-as", "system"],
    )
    return Client(parley.channel, f"parley_{key_id}_secret")


async def test_an_id_belongs_to_one_caller_actor_method_and_conversation(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk, elsewhere = await parley.conversation(ada, bob), await parley.conversation(ada)
    other = await other_caller(parley, database)
    batch = pb.BatchSendMessagesRequest(
        conversation_id=talk.id,
        messages=[pb.NewMessage(role=USER, content="batch")],
        request_id="r-1",
    )

    answers = [
        await sent(parley.acting_as(ada), sending(talk)),
        await sent(parley.acting_as(bob), sending(talk, "another's")),
        await sent(parley, sending(talk, "the system's", sender_id="ada")),
        await sent(other.acting_as(ada), sending(talk, "another service's")),
        await sent(parley.acting_as(ada), sending(elsewhere, "elsewhere")),
    ]
    batch_call = parley.acting_as(ada).messages.BatchSendMessages(batch)

    assert [message.sequence for message, _ in answers] == [1, 2, 3, 4, 1]
    assert not any(replayed for _, replayed in answers)
    assert (await batch_call).sent_messages[0].sequence == 5


# Whatever happened meanwhile


async def leaves(parley: Client, database: asyncpg.Connection, talk: Conversation) -> None:
    await parley.leave(talk, User(id="bob"))


async def is_removed(parley: Client, database: asyncpg.Connection, talk: Conversation) -> None:
    await database.execute(
        "UPDATE participants SET status = 'REMOVED', visible_to_sequence = 0,"
        " left_at = clock_timestamp() WHERE role <> 'OWNER'"
    )


async def archived(parley: Client, database: asyncpg.Connection, talk: Conversation) -> None:
    await database.execute("UPDATE conversations SET is_active = false")


async def deleted(parley: Client, database: asyncpg.Connection, talk: Conversation) -> None:
    await database.execute("UPDATE conversations SET deleted_at = clock_timestamp()")


@pytest.mark.parametrize("happened", [leaves, is_removed, archived, deleted])
@pytest.mark.parametrize("name", ["id", "slug"])
async def test_the_first_answer_is_given_whatever_happened_meanwhile(
    parley: Client, database: asyncpg.Connection, happened: Any, name: str
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    request = sending(talk, conversation_id=getattr(talk, name), expected_last_sequence=0)
    first, _ = await sent(parley.acting_as(bob), request)

    await happened(parley, database, talk)
    again, replayed = await sent(parley.acting_as(bob), request)
    anew = await failure(parley.acting_as(bob).send(talk))

    assert (again, replayed) == (first, True)
    assert anew.code in ("PERMISSION_DENIED", "FAILED_PRECONDITION")


async def test_the_answer_is_the_message_as_it_stands_now(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    first, _ = await sent(parley.acting_as(ada), sending(talk))

    await database.execute("UPDATE messages SET deleted_at = clock_timestamp(), revision = 2")
    again, _ = await sent(parley.acting_as(ada), sending(talk))

    assert (again.content, again.revision) == ("", 2)
    assert again.HasField("delete_time")
    assert (again.id, again.sequence, again.create_time) == (
        first.id,
        first.sequence,
        first.create_time,
    )


async def test_a_call_that_failed_leaves_its_id_free(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)
    await failure(actor.messages.SendMessage(sending(talk, reply_to_sequence=1)))
    await failure(actor.messages.SendMessage(sending(talk, expected_last_sequence=1)))
    await failure(actor.messages.SendMessage(sending(talk, role=ASSISTANT)))
    assert await database.fetchval("SELECT count(*) FROM requests") == 0

    message, replayed = await sent(actor, sending(talk, "now"))

    assert (message.sequence, replayed) == (1, False)
