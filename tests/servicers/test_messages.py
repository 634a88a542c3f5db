"""Messages: numbered from 1, kept byte for byte, found again by id and by sequence."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from parley.v1 import message_pb2 as pb

from ..make import AGENT, ASSISTANT, SYSTEM, TOOL, USER, Client, failure

NOBODY = "01890000-0000-7000-8000-000000000001"
KIB = 1024
# 0001-01-01T00:00:00Z, where Timestamps begin.
FIRST_SECOND = -62_135_596_800


async def got(parley: Client, message: pb.Message) -> pb.Message:
    """The message as GetMessage shows it by id, which is as it shows it by sequence."""
    talk = message.conversation_id
    by_id = await parley.messages.GetMessage(
        pb.GetMessageRequest(conversation_id=talk, message_id=message.id)
    )
    by_sequence = await parley.messages.GetMessage(
        pb.GetMessageRequest(conversation_id=talk, sequence=message.sequence)
    )
    assert by_id == by_sequence
    return by_id.message  # type: ignore[no-any-return]


def struct(**fields: Any) -> Struct:
    made = Struct()
    made.update(fields)
    return made


def nested(depth: int) -> Struct:
    """A Struct that is `depth` objects deep."""
    made = inner = Struct()
    for _ in range(depth - 1):
        inner = inner.fields["in"].struct_value
        inner.SetInParent()
    return made


def stamp(time: datetime) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(time)
    return made


# Numbers, echoes


async def test_messages_are_numbered_from_one(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    sent = [await parley.message(talk, ada, f"line {n}") for n in range(3)]

    assert [message.sequence for message in sent] == [1, 2, 3]
    assert await parley.all_messages(talk) == sent


async def test_what_send_answers_is_what_get_then_returns(parley: Client) -> None:
    ada, bot = await parley.user("ada"), await parley.user("bot", kind=AGENT)
    talk = await parley.conversation(ada, bot)
    first = await parley.acting_as(ada).send(talk, "What is the answer?")

    sent = await parley.acting_as(bot).send(
        talk,
        "42",
        role=ASSISTANT,
        metadata=struct(trace={"spans": [1, 2.5, None, True, "x"]}),
        input_tokens=7,
        output_tokens=5,
        model="deep-thought",
        reply_to_sequence=1,
        parent_message_id=first.id,
        sent_time=Timestamp(seconds=1_700_000_000, nanos=123_456_789),
        external_id="42/1",
    )

    assert await got(parley, sent) == sent
    assert sent == pb.Message(
        id=sent.id,
        conversation_id=talk.id,
        sequence=2,
        sender_id=bot.id,
        role=ASSISTANT,
        status=pb.Message.STATUS_COMPLETE,
        content="42",
        metadata=struct(trace={"spans": [1, 2.5, None, True, "x"]}),
        tokens_used=12,
        input_tokens=7,
        output_tokens=5,
        model="deep-thought",
        reply_to_message_id=first.id,
        parent_message_id=first.id,
        sent_time=Timestamp(seconds=1_700_000_000, nanos=123_456_000),
        external_id="42/1",
        revision=1,
        etag=sent.etag,
        create_time=sent.create_time,
        update_time=sent.create_time,
    )


async def test_a_bare_message_is_answered_as_it_is_stored(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    by_actor = await parley.acting_as(ada).send(talk)
    by_system = await parley.send(talk, "", role=SYSTEM)

    assert [await got(parley, each) for each in (by_actor, by_system)] == [by_actor, by_system]
    assert by_system.sender_id == ""


async def test_counters_and_events_tell_what_the_messages_tell(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob, first="hello")
    await parley.acting_as(ada).send(talk, tokens_used=5)
    await parley.acting_as(bob).send(talk, sent_time=stamp(datetime.now(UTC) + timedelta(0, 60)))
    await parley.acting_as(bob).send(talk, sent_time=Timestamp(seconds=86_400), output_tokens=3)
    await parley.send(talk, "notice", role=SYSTEM)

    seen = await parley.seen(talk)
    told = await database.fetch("SELECT * FROM events ORDER BY version")
    row = await database.fetchrow(
        "SELECT count(*) AS messages, sum(tokens_used) AS tokens,"
        " max(COALESCE(sent_at, created_at)) AS active_at FROM messages"
    )

    assert row is not None
    assert seen.last_sequence == row["messages"] == 5
    assert seen.total_tokens_used == row["tokens"] == 8
    assert seen.last_activity_time.ToDatetime(UTC) == row["active_at"]
    assert [event["version"] for event in told] == list(range(1, seen.version + 1))
    facts = [
        (event["sequence"], event["revision"], event["actor_id"] and str(event["actor_id"]))
        for event in told
        if event["type"] == "MESSAGE_CREATED"
    ]
    assert facts == [(1, 1, None), (2, 1, ada.id), (3, 1, bob.id), (4, 1, bob.id), (5, 1, None)]
    assert all(event["reason"] == "" for event in told)


async def test_sending_moves_the_senders_own_cursor_and_nobody_elses(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)

    await parley.acting_as(ada).send(talk)
    await parley.acting_as(ada).send(talk)

    assert (await parley.participant(talk, ada)).last_read_sequence == 2
    assert (await parley.participant(talk, bob)).last_read_sequence == 0


# Content


@pytest.mark.parametrize(
    "content",
    [
        "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
        "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u2066x\u2069",
        "e" + "\u0301" * 10_000,
        "\u0301\u0301",
        "n\u0303 is not \u00f1, nor \ufb01 fi",
        "a\rb\r\nc\n\n",
        "one\u2028two\u2029three\u0085four",
        " \t\v\f before and after \n",
        "\ufeff\u200b\u200d\ufffe\uffff\U0010ffff",
        "\x01\x1b[31m\x7f",
        "'; DROP TABLE messages; -- $1 %s \\x00 \\",
        "x" * 200_000,
        " ".join(f"{n:x}z" for n in range(42_000)),
        "x" * 256 * KIB,
        "é" * 128 * KIB,
        "🙂" * 64 * KIB,
    ],
    ids=lambda content: f"{content[:8]!a}-{len(content)}",
)
async def test_content_is_kept_byte_for_byte(parley: Client, content: str) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    sent = await parley.acting_as(ada).send(talk, content)

    assert sent.content == content
    assert (await got(parley, sent)).content == content
    assert [each.content for each in await parley.all_messages(talk)] == [content]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("x" * 256 * KIB + "x", "FIELD_TOO_LONG"),
        ("é" * 128 * KIB + "x", "FIELD_TOO_LONG"),
        ("nu\0l", "INVALID_CHARACTER"),
        ("", "REQUIRED"),
    ],
    ids=["a byte too long", "a byte too long in fewer characters", "NUL", "empty"],
)
async def test_content_that_cannot_be_kept_is_refused(
    parley: Client, content: str, reason: str
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    refused = await failure(parley.acting_as(ada).send(talk, content))

    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", {"content": reason})
    assert await parley.all_messages(talk) == []


async def test_content_may_be_empty_beside_metadata_or_from_the_system(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    by_actor = await parley.acting_as(ada).send(talk, "", metadata=struct(image="1.png"))
    by_system = await parley.message(talk, ada, "")

    assert [by_actor.sequence, by_system.sequence] == [1, 2]


# Metadata


@pytest.mark.parametrize(
    "metadata",
    [
        struct(nothing=None, truth=True, lie=False, text="", number=0.1),
        struct(nested={"list": [[], {}, [[None]], {"": 1} and {"a": []}]}),
        struct(**{f"key {n}": n for n in range(64)}),
        struct(**{"$where": "1", "__proto__": {"x": 1}, "'; DROP TABLE users": "\\", "a.b": "%"}),
        struct(**{"k" * 128: "ключ", "emoji 🙂": "\u2028\x01\x7f\\u0000"}),
        struct(big=2.0**53 + 2, small=-(2.0**53) - 2, whole=9007199254740991),
        struct(huge=1.7976931348623157e308, tiny=5e-324, negative=-1.5e-7, third=1 / 3),
        nested(16),
    ],
    ids=["kinds", "nested", "64 keys", "injections", "texts", "big", "extreme", "depth 16"],
)
async def test_metadata_comes_back_as_it_was(parley: Client, metadata: Struct) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    sent = await parley.acting_as(ada).send(talk, "", metadata=metadata)

    assert sent.metadata == metadata
    assert await got(parley, sent) == sent


async def test_a_metadata_value_of_no_kind_counts_as_null(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    metadata = Struct(fields={"unset": Value()})

    sent = await parley.acting_as(ada).send(talk, "", metadata=metadata)

    assert sent.metadata == struct(unset=None)
    assert await got(parley, sent) == sent


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        (struct(**{f"key {n}": n for n in range(65)}), "metadata"),
        (nested(17), "metadata" + ".in" * 16),
        (struct(a={"b": [float("nan")]}), "metadata.a.b"),
        (struct(a=float("inf")), "metadata.a"),
        (struct(a=-float("inf")), "metadata.a"),
        (struct(a="nu\0l"), "metadata.a"),
        (struct(**{"nu\0l": 1}), "metadata"),
        (struct(**{"": 1}), "metadata"),
        (struct(**{"k" * 129: 1}), "metadata." + "k" * 40),
        (struct(a="x" * 16 * KIB), "metadata"),
        (struct(**{str(n): 1e308 for n in range(60)}), "metadata"),
    ],
    ids=["65 keys", "depth 17", "NaN", "Inf", "-Inf", "NUL in a value", "NUL in a key", "empty key",
         "key of 129", "16 KiB and its frame", "1e308 is 309 digits"],
)  # fmt: skip
async def test_metadata_that_cannot_be_kept_is_refused(
    parley: Client, metadata: Struct, field: str
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    refused = await failure(parley.acting_as(ada).send(talk, metadata=metadata))

    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", {field: "INVALID_METADATA"})


# Tokens, times, ids


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"tokens_used": 0}, 0),
        ({"input_tokens": 0}, 0),
        ({"input_tokens": 3, "output_tokens": 4}, 7),
        ({"tokens_used": 1, "input_tokens": 3, "output_tokens": 4}, 1),
        ({"tokens_used": 2**31 - 1}, 2**31 - 1),
    ],
)
async def test_absent_tokens_are_their_sum_or_unknown(
    parley: Client, given: dict[str, Any], expected: int | None
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    sent = await got(parley, await parley.acting_as(ada).send(talk, **given))

    known = {
        name: getattr(sent, name)
        for name in ("tokens_used", "input_tokens", "output_tokens")
        if sent.HasField(name)
    }
    assert known == given | ({} if expected is None else {"tokens_used": expected})


async def test_many_tokens_are_summed_beyond_32_bits(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    for _ in range(3):
        await parley.acting_as(ada).send(talk, tokens_used=2**31 - 1)

    assert (await parley.seen(talk)).total_tokens_used == 3 * (2**31 - 1)


async def test_the_time_of_an_old_message_orders_nothing(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    times = [Timestamp(seconds=1_000), Timestamp(seconds=FIRST_SECOND + 1), Timestamp(seconds=500)]

    sent = [await parley.acting_as(ada).send(talk, sent_time=time) for time in times]

    assert [each.sequence for each in sent] == [1, 2, 3]
    assert [(await got(parley, each)).sent_time for each in sent] == times
    assert (await parley.seen(talk)).last_activity_time == times[0]


async def test_the_first_moment_of_all_breaks_no_list(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    refused = await failure(
        parley.acting_as(ada).send(talk, sent_time=Timestamp(seconds=FIRST_SECOND))
    )
    soonest = Timestamp(seconds=FIRST_SECOND, nanos=1_000)
    await parley.acting_as(ada).send(talk, sent_time=soonest)

    assert refused.violations == {"sent_time": "INVALID_TIME"}
    assert [each.sent_time for each in await parley.all_messages(talk)] == [soonest]


async def test_a_message_may_be_said_five_minutes_ahead_and_no_more(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    soon = stamp(datetime.now(UTC) + timedelta(minutes=4, seconds=50))
    late = stamp(datetime.now(UTC) + timedelta(minutes=5, seconds=10))

    await parley.acting_as(ada).send(talk, sent_time=soon)
    refused = await failure(parley.acting_as(ada).send(talk, sent_time=late))

    assert refused.violations == {"sent_time": "INVALID_TIME"}
    assert (await parley.seen(talk)).last_activity_time.ToDatetime() == soon.ToDatetime()


async def test_an_external_id_is_unique_within_its_conversation(parley: Client) -> None:
    ada = await parley.user("ada")
    talk, other = await parley.conversation(ada), await parley.conversation(ada)
    first = await parley.acting_as(ada).send(talk, external_id="irc/1")

    refused = await failure(parley.acting_as(ada).send(talk, external_id="irc/1"))
    elsewhere = await parley.acting_as(ada).send(other, external_id="irc/1")

    assert (refused.code, refused.reason) == ("ALREADY_EXISTS", "EXTERNAL_ID_TAKEN")
    assert refused.resource == ("parley.v1.Message", first.id)
    assert (first.external_id, elsewhere.external_id) == ("irc/1", "irc/1")
    assert len(await parley.all_messages(talk)) == 1


# References


async def test_a_reply_and_a_branch_point_at_messages_of_the_same_conversation(
    parley: Client,
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)
    first, second = await actor.send(talk), await actor.send(talk)

    sent = await actor.send(talk, reply_to_message_id=first.id, parent_sequence=2)

    assert (sent.reply_to_message_id, sent.parent_message_id) == (first.id, second.id)
    assert await got(parley, sent) == sent


@pytest.mark.parametrize("kind", ["reply_to", "parent"])
async def test_a_reference_reveals_nothing_of_what_it_does_not_reach(
    parley: Client, kind: str
) -> None:
    """Missing, in another conversation, before the sender's window: one answer, same bytes."""
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk, other = await parley.conversation(ada), await parley.conversation(ada, bob)
    hidden = await parley.acting_as(ada).send(talk)
    elsewhere = await parley.acting_as(ada).send(other)
    await parley.acting_as(ada).invite(talk, bob, hide_history=True)
    await parley.acting_as(bob).accept(talk, bob)
    actor = parley.acting_as(bob)

    by_id = [
        await failure(actor.send(talk, **{f"{kind}_message_id": id}))
        for id in (str(uuid4()), elsewhere.id, hidden.id)
    ]
    numbers: list[Any] = [hidden.sequence, 2, 99]
    by_sequence = [
        await failure(actor.send(talk, **{f"{kind}_sequence": number})) for number in numbers
    ]

    for answers in (by_id, by_sequence):
        assert {answer.code for answer in answers} == {"FAILED_PRECONDITION"}
        assert {answer.reason for answer in answers} == {f"{kind.upper()}_NOT_FOUND"}
        assert answers[0] == answers[1] == answers[2]
    assert [each.sequence for each in await parley.all_messages(talk)] == [1]


async def test_the_system_may_point_at_any_message_of_the_conversation(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    await parley.acting_as(ada).send(talk)
    await parley.acting_as(ada).invite(talk, bob, hide_history=True)
    await parley.acting_as(bob).accept(talk, bob)

    assert (await parley.message(talk, bob, reply_to_sequence=1)).sequence == 2


# Expected sequence, dry run


async def test_expected_last_sequence_lets_a_message_in_only_at_its_place(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)

    await actor.send(talk, expected_last_sequence=0)
    stale = await failure(actor.send(talk, expected_last_sequence=0))
    early = await failure(actor.send(talk, expected_last_sequence=2))
    await actor.send(talk, expected_last_sequence=1)

    for refused in (stale, early):
        assert (refused.code, refused.reason) == ("ABORTED", "SEQUENCE_MISMATCH")
        assert refused.known == {"last_sequence": "1"}
        assert refused.retry_seconds is None
    assert (await parley.seen(talk)).last_sequence == 2


async def test_a_dry_run_answers_the_would_be_message_and_stores_nothing(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)
    before = await parley.seen(talk)

    would_be = await actor.send(
        talk, "hello", tokens_used=3, external_id="x", request_id="r", validate_only=True
    )
    again = await actor.send(talk, "something else", request_id="r", validate_only=True)

    assert would_be == pb.Message(
        conversation_id=talk.id,
        sender_id=ada.id,
        role=USER,
        status=pb.Message.STATUS_COMPLETE,
        content="hello",
        tokens_used=3,
        external_id="x",
        revision=1,
    )
    assert again.content == "something else"
    assert await parley.seen(talk) == before
    assert await database.fetchval("SELECT count(*) FROM requests WHERE sequence IS NOT NULL") == 0
    # Not even its request_id was taken.
    assert (await actor.send(talk, request_id="r")).sequence == 1


async def test_a_dry_run_is_refused_what_the_real_one_would_be(parley: Client) -> None:
    ada, eve = await parley.user("ada"), await parley.user("eve")
    talk = await parley.conversation(ada, first="hello")

    def dry(client: Client, **values: Any) -> Any:
        return failure(client.send(talk, validate_only=True, **values))

    assert (await dry(parley.acting_as(eve))).code == "NOT_FOUND"
    assert (await dry(parley.acting_as(ada), role=SYSTEM)).reason == "ROLE_NOT_ALLOWED"
    assert (await dry(parley.acting_as(ada), reply_to_sequence=2)).reason == "REPLY_TO_NOT_FOUND"
    assert (await dry(parley.acting_as(ada), expected_last_sequence=0)).reason == (
        "SEQUENCE_MISMATCH"
    )


# What the request alone decides


@pytest.mark.parametrize(
    ("values", "violations"),
    [
        ({"conversation_id": ""}, {"conversation_id": "REQUIRED"}),
        ({"conversation_id": "../x"}, {"conversation_id": "INVALID_REFERENCE"}),
        ({"conversation_id": "Not A Slug"}, {"conversation_id": "INVALID_REFERENCE"}),
        ({"conversation_id": "x" * 300}, {"conversation_id": "INVALID_REFERENCE"}),
        (
            {"conversation_id": "00000000-0000-0000-0000-000000000000"},
            {"conversation_id": "INVALID_REFERENCE"},
        ),
        ({"role": 0}, {"role": "REQUIRED"}),
        ({"role": 99}, {"role": "INVALID_ENUM_VALUE"}),
        ({"role": -1}, {"role": "INVALID_ENUM_VALUE"}),
        ({"tokens_used": -1}, {"tokens_used": "OUT_OF_BOUNDS"}),
        ({"input_tokens": -1}, {"input_tokens": "OUT_OF_BOUNDS"}),
        (
            {"input_tokens": 2**31 - 1, "output_tokens": 1},
            {"output_tokens": "OUT_OF_BOUNDS"},
        ),
        ({"model": "m" * 129}, {"model": "FIELD_TOO_LONG"}),
        ({"model": "a\nb"}, {"model": "INVALID_CHARACTER"}),
        ({"external_id": "é" * 128 + "x"}, {"external_id": "FIELD_TOO_LONG"}),
        ({"reply_to_message_id": "nonsense"}, {"reply_to_message_id": "INVALID_REFERENCE"}),
        ({"reply_to_sequence": 0}, {"reply_to_sequence": "OUT_OF_BOUNDS"}),
        ({"parent_sequence": -5}, {"parent_sequence": "OUT_OF_BOUNDS"}),
        ({"sender_id": "a b"}, {"sender_id": "INVALID_REFERENCE"}),
        ({"sender_id": "\u200b"}, {"sender_id": "INVALID_REFERENCE"}),
        ({"expected_last_sequence": -1}, {"expected_last_sequence": "OUT_OF_BOUNDS"}),
        ({"request_id": "r" * 65}, {"request_id": "INVALID_REQUEST_ID"}),
        ({"request_id": "é"}, {"request_id": "INVALID_REQUEST_ID"}),
        ({"request_id": "a\n"}, {"request_id": "INVALID_REQUEST_ID"}),
        ({"sent_time": Timestamp(seconds=2**40)}, {"sent_time": "INVALID_TIME"}),
        ({"sent_time": Timestamp(seconds=-(2**40))}, {"sent_time": "INVALID_TIME"}),
        ({"sent_time": Timestamp(nanos=-1)}, {"sent_time": "INVALID_TIME"}),
        (
            {"role": 0, "content": "", "tokens_used": -1},
            {"role": "REQUIRED", "content": "REQUIRED", "tokens_used": "OUT_OF_BOUNDS"},
        ),
    ],
    ids=str,
)
async def test_a_bad_field_is_named_before_anything_is_asked_of_the_database(
    parley: Client, values: dict[str, Any], violations: dict[str, str]
) -> None:
    """The conversation named does not exist: whoever looked for it would say so."""
    actor = parley.acting_as(await parley.user("ada"))
    asked: dict[str, Any] = {"conversation_id": NOBODY, "role": USER, "content": "hello", **values}

    refused = await failure(actor.messages.SendMessage(pb.SendMessageRequest(**asked)))

    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)
    assert refused.reason == next(iter(violations.values()))


async def test_the_edges_of_the_limits_are_inside(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    sent = await parley.acting_as(ada).send(
        talk, model="µ" * 128, external_id="é" * 128, request_id="r" * 64
    )

    assert await got(parley, sent) == sent
    assert sent.external_id == "é" * 128


# Get


async def test_get_needs_a_key_that_can_be_one(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    async def get(**key: Any) -> dict[str, str]:
        request = pb.GetMessageRequest(**{"conversation_id": talk.id} | key)
        refused = await failure(parley.messages.GetMessage(request))
        assert refused.code == "INVALID_ARGUMENT"
        return refused.violations

    assert await get() == {"message_id": "REQUIRED"}
    assert await get(message_id="") == {"message_id": "INVALID_REFERENCE"}
    assert await get(message_id="../x") == {"message_id": "INVALID_REFERENCE"}
    assert await get(message_id="0" * 300) == {"message_id": "INVALID_REFERENCE"}
    assert await get(message_id="00000000-0000-0000-0000-000000000000") == {
        "message_id": "INVALID_REFERENCE"
    }
    assert await get(sequence=0) == {"sequence": "OUT_OF_BOUNDS"}
    assert await get(conversation_id="", sequence=1) == {"conversation_id": "REQUIRED"}


async def test_a_message_is_found_only_under_its_own_conversation(parley: Client) -> None:
    ada = await parley.user("ada")
    talk, other = await parley.conversation(ada), await parley.conversation(ada)
    sent = await parley.acting_as(ada).send(talk)

    async def get(id: str) -> Any:
        request = pb.GetMessageRequest(conversation_id=other.slug, message_id=id)
        return await failure(parley.acting_as(ada).messages.GetMessage(request))

    elsewhere, missing = await get(sent.id), await get(NOBODY)

    assert (elsewhere.code, elsewhere.reason) == ("NOT_FOUND", "MESSAGE_NOT_FOUND")
    assert elsewhere.resource == ("parley.v1.Message", sent.id)
    assert elsewhere.message.replace(sent.id, NOBODY) == missing.message


async def test_a_deleted_message_is_a_tombstone(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    sent = await parley.acting_as(ada).send(talk, metadata=struct(a=1), tokens_used=3)

    await database.execute("UPDATE messages SET deleted_at = clock_timestamp()")
    tombstone = await got(parley, sent)

    assert tombstone.HasField("delete_time")
    tombstone.ClearField("delete_time")
    sent.ClearField("content")
    sent.ClearField("metadata")
    assert tombstone == sent


# Bytes that are no request


def raw(parley: Client, method: str, request: bytes) -> Any:
    """The call, with the request's bytes as they are."""
    call: Any = parley.channel.unary_unary(f"/parley.v1.MessageService/{method}")
    return call(request, metadata=parley.metadata, timeout=20)


def sized(body: bytes) -> bytes:
    """With its length before it, as protobuf writes it."""
    low, high = len(body) & 0x7F | 0x80, len(body) >> 7
    return bytes([low, high]) + body


def too_deep(depth: int) -> bytes:
    """A Struct of so many objects; protobuf's own Python neither makes nor writes such a one."""
    body = b""
    for _ in range(depth):
        body = b"\x0a" + sized(b"\x0a\x02in\x12" + sized(b"\x2a" + sized(body)))
    return body


VALID = pb.SendMessageRequest(conversation_id=NOBODY, role=USER, content="hello")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\xff\xff\xff\xff",
        VALID.SerializeToString()[:-1],
        b"\x0a\x02\xc3\x28",
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\x2a" + sized(too_deep(60)),
    ],
    ids=["garbage", "truncated", "invalid UTF-8", "an absurd length", "nested too deep"],
)
async def test_bytes_that_are_no_request_are_refused_as_such(
    parley: Client, request_bytes: bytes
) -> None:
    refused = await failure(raw(parley, "SendMessage", request_bytes))

    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "MALFORMED_REQUEST")


@pytest.mark.parametrize("method", ["BatchSendMessages", "GetMessage", "ListMessages"])
async def test_every_method_refuses_a_name_that_is_not_utf_8(parley: Client, method: str) -> None:
    refused = await failure(raw(parley, method, b"\x0a\x02\xc3\x28"))

    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "MALFORMED_REQUEST")


async def test_unknown_fields_are_ignored_and_not_stored(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    known = pb.SendMessageRequest(
        conversation_id=talk.id, sender_id=ada.id, role=USER, content="hello"
    )
    unknown = b"\xfa\x3f\x06secret"

    answer = await raw(parley, "SendMessage", known.SerializeToString() + unknown)
    response = pb.SendMessageResponse.FromString(answer)

    assert b"secret" not in answer
    assert await got(parley, response.message) == response.message


async def test_role_tool_is_kept(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    assert (await got(parley, await parley.send(talk, role=TOOL))).role == TOOL
