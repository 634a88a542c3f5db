"""Batches: several messages as one, all or none, with nobody's in between."""

from typing import Any

import asyncpg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from parley.v1 import message_pb2 as pb

from ..make import AGENT, ASSISTANT, SYSTEM, USER, Client, Conversation, failure


def drafts(count: int, **values: Any) -> list[pb.NewMessage]:
    return [pb.NewMessage(role=USER, content=f"line {n}", **values) for n in range(count)]


def batch(
    talk: Conversation, messages: list[pb.NewMessage], **values: Any
) -> pb.BatchSendMessagesRequest:
    return pb.BatchSendMessagesRequest(conversation_id=talk.id, messages=messages, **values)


async def test_a_batch_is_stored_in_its_order_with_consecutive_numbers(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="before")

    response = await parley.acting_as(ada).messages.BatchSendMessages(
        batch(talk, drafts(500, tokens_used=2))
    )

    stored = (await parley.all_messages(talk))[1:]
    assert [each.content for each in stored] == [f"line {n}" for n in range(500)]
    assert [
        (each.id, each.sequence, each.etag, each.create_time) for each in response.sent_messages
    ] == [(each.id, each.sequence, each.etag, each.create_time) for each in stored]
    seen = await parley.seen(talk)
    assert (seen.last_sequence, seen.total_tokens_used) == (501, 1000)
    versions = await database.fetch("SELECT version FROM events ORDER BY version")
    assert [row["version"] for row in versions] == list(range(1, seen.version + 1))


@pytest.mark.parametrize(
    ("count", "reason"), [(0, "REQUIRED"), (501, "TOO_MANY_ITEMS"), (100_000, "TOO_MANY_ITEMS")]
)
async def test_a_batch_has_1_to_500_messages(parley: Client, count: int, reason: str) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    refused = await failure(
        parley.acting_as(ada).messages.BatchSendMessages(batch(talk, drafts(count)))
    )

    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", {"messages": reason})


async def test_a_batch_has_3_mib_at_most(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)
    request = batch(talk, [pb.NewMessage(role=USER, content="x" * (1 << 18)) for _ in range(12)])
    assert request.ByteSize() > 3 << 20

    refused = await failure(actor.messages.BatchSendMessages(request))
    request.messages[-1].content = "x" * ((1 << 18) - (request.ByteSize() - (3 << 20)))
    assert request.ByteSize() == 3 << 20
    response = await actor.messages.BatchSendMessages(request)

    assert (refused.code, refused.violations) == (
        "INVALID_ARGUMENT",
        {"messages": "FIELD_TOO_LONG"},
    )
    assert len(response.sent_messages) == 12


async def test_a_request_beyond_4_mib_is_refused_by_the_library(parley: Client) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    request = batch(talk, [pb.NewMessage(role=USER, content="x" * (4 << 20))])

    assert (await failure(parley.messages.BatchSendMessages(request))).code == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize(
    ("bad", "code", "field", "reason"),
    [
        ({"content": ""}, "INVALID_ARGUMENT", "messages[37].content", "REQUIRED"),
        ({"content": "\0"}, "INVALID_ARGUMENT", "messages[37].content", "INVALID_CHARACTER"),
        ({"role": 99}, "INVALID_ARGUMENT", "messages[37].role", "INVALID_ENUM_VALUE"),
        ({"tokens_used": -1}, "INVALID_ARGUMENT", "messages[37].tokens_used", "OUT_OF_BOUNDS"),
        ({"role": SYSTEM}, "PERMISSION_DENIED", "messages[37].role", "ROLE_NOT_ALLOWED"),
        ({"sender_id": "bob"}, "PERMISSION_DENIED", "", "PERMISSION_DENIED"),
        ({"reply_to_sequence": 38}, "FAILED_PRECONDITION", "messages[37].reply_to_sequence",
         "REPLY_TO_NOT_FOUND"),
        ({"parent_message_id": "01890000-0000-7000-8000-000000000001"}, "FAILED_PRECONDITION",
         "messages[37].parent_message_id", "PARENT_NOT_FOUND"),
        ({"external_id": "taken"}, "ALREADY_EXISTS", "messages[37].external_id",
         "EXTERNAL_ID_TAKEN"),
        ({"external_id": "x-36"}, "ALREADY_EXISTS", "messages[37].external_id",
         "EXTERNAL_ID_TAKEN"),
    ],
    ids=str,
)  # fmt: skip
async def test_one_bad_message_of_a_hundred_stores_none(
    parley: Client, bad: dict[str, Any], code: str, field: str, reason: str
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    first = await parley.acting_as(ada).send(talk, external_id="taken")
    messages = drafts(100)
    messages[36].external_id = "x-36"
    for name, value in bad.items():
        setattr(messages[37], name, value)

    refused = await failure(parley.acting_as(ada).messages.BatchSendMessages(batch(talk, messages)))

    assert (refused.code, refused.reason) == (code, reason)
    assert refused.known.get("field", "") == field
    assert await parley.all_messages(talk) == [first]
    assert (await parley.seen(talk)).last_sequence == 1


async def test_the_system_sends_for_many_by_name_and_id(parley: Client) -> None:
    ada, bot = await parley.user("ada"), await parley.user("bot", kind=AGENT)
    talk = await parley.conversation(ada, bot)
    messages = [
        pb.NewMessage(role=USER, content="?", sender_id="ada"),
        pb.NewMessage(role=ASSISTANT, content="!", sender_id=bot.id),
        pb.NewMessage(role=USER, content="thanks", sender_id=ada.id),
        pb.NewMessage(role=SYSTEM, content="end"),
    ]

    await parley.messages.BatchSendMessages(batch(talk, messages))

    stored = await parley.all_messages(talk)
    assert [each.sender_id for each in stored] == [ada.id, bot.id, ada.id, ""]


async def test_a_sender_who_is_missing_is_named_by_its_place(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    messages = [*drafts(2, sender_id="ada"), *drafts(1, sender_id="nemo")]

    refused = await failure(parley.messages.BatchSendMessages(batch(talk, messages)))

    assert (refused.reason, refused.known["field"]) == ("USER_NOT_FOUND", "messages[2].sender_id")
    assert await parley.all_messages(talk) == []


async def test_thousands_of_violations_are_counted_and_twenty_at_most_told(parley: Client) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    wrong = pb.NewMessage(
        sender_id="a b",
        role=99,  # type: ignore[arg-type]
        content="\0",
        tokens_used=-1,
        input_tokens=-1,
        output_tokens=-1,
        model="m" * 129,
        reply_to_sequence=0,
        parent_sequence=0,
        sent_time=Timestamp(nanos=-1),
        external_id="\n",
    )

    refused = await failure(parley.messages.BatchSendMessages(batch(talk, [wrong] * 500)))

    assert (refused.code, refused.known["violations"]) == ("INVALID_ARGUMENT", str(11 * 500))
    assert 0 < len(refused.violations) <= 20
    assert len(refused.trailers["grpc-status-details-bin"]) < 4096


# Among themselves


async def test_messages_of_a_batch_name_each_other_where_its_beginning_is_known(
    parley: Client,
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="before")
    messages = drafts(3)
    messages[0].reply_to_sequence = 1
    messages[1].reply_to_sequence = 2
    messages[2].parent_sequence = 2

    await parley.acting_as(ada).messages.BatchSendMessages(
        batch(talk, messages, expected_last_sequence=1)
    )

    before, first, second, third = await parley.all_messages(talk)
    assert first.reply_to_message_id == before.id
    assert second.reply_to_message_id == first.id
    assert third.parent_message_id == first.id


@pytest.mark.parametrize(
    ("pointing", "expected"), [(2, None), (3, 1), (4, 1)], ids=["unknown start", "itself", "later"]
)
async def test_messages_of_a_batch_name_no_other(
    parley: Client, pointing: int, expected: int | None
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="before")
    messages = drafts(3)
    messages[1].reply_to_sequence = pointing

    refused = await failure(
        parley.acting_as(ada).messages.BatchSendMessages(
            batch(talk, messages, expected_last_sequence=expected)
        )
    )

    assert refused.reason == "REPLY_TO_NOT_FOUND"
    assert refused.known["field"] == "messages[1].reply_to_sequence"
    assert (await parley.seen(talk)).last_sequence == 1


async def test_a_batch_begins_where_it_expects_to(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)

    await actor.messages.BatchSendMessages(batch(talk, drafts(3), expected_last_sequence=0))
    refused = await failure(
        actor.messages.BatchSendMessages(batch(talk, drafts(3), expected_last_sequence=0))
    )

    assert (refused.code, refused.known) == ("ABORTED", {"last_sequence": "3"})


async def test_a_dry_run_of_a_batch_answers_as_many_empty_places(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    messages = drafts(2)
    messages[1].reply_to_sequence = 1

    response = await parley.acting_as(ada).messages.BatchSendMessages(
        batch(talk, messages, expected_last_sequence=0, validate_only=True, request_id="r-1")
    )

    assert list(response.sent_messages) == [pb.SentMessage(), pb.SentMessage()]
    assert await parley.all_messages(talk) == []
