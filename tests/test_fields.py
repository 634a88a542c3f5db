"""What a request alone decides: each rule at its edge, and all violations at once."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import asyncpg
import pytest
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from parley.v1 import conversation_pb2, event_pb2, message_pb2, participant_pb2, user_pb2
from service.domain import (
    EventType,
    MessageRole,
    MessageStatus,
    ParticipantRole,
    ParticipantStatus,
    UserKind,
)
from service.errors import InvalidArgument
from service.fields import Fields, _struct, payload_hash

ID = "01890a5d-ac96-774b-bcce-b302099a8057"
NIL = "00000000-0000-0000-0000-000000000000"
NINE = datetime(2026, 5, 6, 9, tzinfo=UTC)


def refusal(rule: Callable[..., object], *given: object, **known: object) -> str:
    """The reason for which a value is refused; empty where it is taken."""
    try:
        with Fields() as fields:
            rule(fields, "field", *given, **known)
    except InvalidArgument as error:
        return error.reason
    return ""


@pytest.mark.parametrize(
    "username",
    [
        "|QuaD-|", "[w00t]^\\{}`", "Ada", "a", "x" * 64, "🚀" * 64, "Žofie", "Ελένη", "李雷",
        "❤\ufe0f", "नेहा", "o'brien;--", "../x", "100%_\\", ID[:-1], f"{ID}0",
    ],
)  # fmt: skip
def test_names_that_real_people_chose_are_usernames_and_references(username: str) -> None:
    assert refusal(Fields.username, username) == ""
    assert refusal(Fields.user, username) == ""


@pytest.mark.parametrize(
    ("username", "reason"),
    [
        ("", "REQUIRED"),
        ("x" * 65, "FIELD_TOO_LONG"),
        ("🚀" * 65, "FIELD_TOO_LONG"),
        (" ", "INVALID_CHARACTER"),
        ("ada lovelace", "INVALID_CHARACTER"),
        ("ada\u00a0", "INVALID_CHARACTER"),
        ("\u200b\u200d\ufeff", "INVALID_CHARACTER"),
        ("\ufe0f", "INVALID_CHARACTER"),
        ("\u034f", "INVALID_CHARACTER"),
        ("\u3164", "INVALID_CHARACTER"),
        ("\u2800", "INVALID_CHARACTER"),
        ("ada\0", "INVALID_CHARACTER"),
        ("ada\r\n", "INVALID_CHARACTER"),
        ("ada\u2028", "INVALID_CHARACTER"),
        ("\u202eada", "INVALID_CHARACTER"),
        ("ada\ue000", "INVALID_CHARACTER"),
        ("\u0301ada", "INVALID_CHARACTER"),
        ("Zofi\u0065\u0301", "NOT_NORMALIZED"),
        (ID, "INVALID_VALUE"),
        (ID.upper(), "INVALID_VALUE"),
        (NIL, "INVALID_VALUE"),
    ],
)
def test_a_username_is_visible_normalised_and_no_uuid(username: str, reason: str) -> None:
    assert refusal(Fields.username, username) == reason


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("", "REQUIRED"),
        ("x" * 300, "INVALID_REFERENCE"),
        ("two words", "INVALID_REFERENCE"),
        ("nul\0", "INVALID_REFERENCE"),
        (NIL, "INVALID_REFERENCE"),
    ],
)
def test_what_can_be_nobodys_name_is_no_reference_to_a_user(reference: str, reason: str) -> None:
    assert refusal(Fields.user, reference) == reason


@pytest.mark.parametrize("slug", ["abc", "4chan", "a--b", "x" * 62, "x" * 63, "0" * 36])
def test_slugs_name_conversations(slug: str) -> None:
    assert refusal(Fields.slug, slug) == ""
    assert refusal(Fields.conversation, slug) == ""


@pytest.mark.parametrize(
    "slug", ["ab", "A B", "ABC", "-abc", "abc-", "..", "../x", "a_b", "é-é", "x" * 64, "abc\n"]
)
def test_a_malformed_slug_is_refused_with_the_pattern(slug: str) -> None:
    assert refusal(Fields.slug, slug) == "INVALID_SLUG"
    assert refusal(Fields.conversation, slug) == "INVALID_REFERENCE"


def test_an_id_is_never_a_slug_and_nil_is_nobodys_id() -> None:
    assert refusal(Fields.slug, ID) == "INVALID_SLUG"
    assert refusal(Fields.conversation, ID.upper()) == ""
    assert refusal(Fields.conversation, NIL) == "INVALID_REFERENCE"
    assert refusal(Fields.conversation, "") == "REQUIRED"
    assert refusal(Fields.id, "tea-at-four") == "INVALID_REFERENCE"


@pytest.mark.parametrize(
    ("email", "accepted"),
    [
        ("", True),
        ("ada@example.org", True),
        ("Ada.Lovelace+tea@sub.example.co.uk", True),
        ("žofie@příklad.cz", True),
        ("a" * 242 + "@example.org", True),
        ("a" * 243 + "@example.org", False),
        ("ada", False),
        ("ada@localhost", False),
        ("ada@@example.org", False),
        ("@example.org", False),
        ("ada@example..org", False),
        ("ada@example.org\r\nBcc: all@example.org", False),
        ("ada@exam ple.org", False),
        ("ada@example.org\0", False),
        ("a\u200bda@example.org", False),
    ],
)
def test_an_email_is_an_address_of_at_most_254_characters(email: str, accepted: bool) -> None:
    reason = refusal(Fields.email, email)
    assert reason == ("" if accepted else "INVALID_EMAIL")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", ""),
        ("   ", ""),
        ("x" * 9, ""),
        ("x" * 10, ""),
        ("x" * 11, "FIELD_TOO_LONG"),
        ("🚀" * 10, ""),
        ("🚀" * 11, "FIELD_TOO_LONG"),
        ("e" + "\u0301" * 10_000, "FIELD_TOO_LONG"),
        ("שלום\u200f!", ""),
        ("a\0b", "INVALID_CHARACTER"),
        ("a\r\nb", "INVALID_CHARACTER"),
        ("a\x1bb", "INVALID_CHARACTER"),
        ("a\x85b", "INVALID_CHARACTER"),
        ("a\u2029b", "INVALID_CHARACTER"),
        ("a\u202eb", "INVALID_CHARACTER"),
        ("a\u2066b", "INVALID_CHARACTER"),
    ],
)
def test_a_line_is_counted_in_characters_and_stays_one_line(line: str, reason: str) -> None:
    assert refusal(Fields.line, line, limit=10) == reason


def test_an_external_id_is_counted_in_bytes() -> None:
    for size in (255, 256):
        assert refusal(Fields.external_id, "x" * size) == ""
    assert refusal(Fields.external_id, "é" * 128) == ""
    assert refusal(Fields.external_id, "é" * 128 + "x") == "FIELD_TOO_LONG"
    assert refusal(Fields.external_id, "a\nb") == "INVALID_CHARACTER"


@pytest.mark.parametrize(
    ("etag", "accepted"),
    [
        ("", True),
        ("1-0123abcd", True),
        ("1-0123ABCD", False),
        ("x", False),
        ("1-0123abcd\n", False),
    ],
)
def test_an_etag_is_one_of_ours(etag: str, accepted: bool) -> None:
    reason = refusal(Fields.etag, etag)
    assert reason == ("" if accepted else "INVALID_ETAG")


def test_an_enum_has_its_values_its_default_and_nothing_else() -> None:
    with Fields() as fields:
        assert fields.enum("role", 0, ParticipantRole, ParticipantRole.MEMBER) == "MEMBER"
        assert [fields.enum("role", n, ParticipantRole) for n in (1, 2, 3, 4)] == [*ParticipantRole]
    for number in (5, 99, -1, 2**31 - 1):
        assert refusal(Fields.enum, number, ParticipantRole) == "INVALID_ENUM_VALUE"
    assert refusal(Fields.enum, 0, ParticipantRole) == "REQUIRED"


@pytest.mark.parametrize(
    ("proto", "prefix", "words"),
    [
        (user_pb2.User.Kind, ["KIND_UNSPECIFIED"], UserKind),
        (participant_pb2.Participant.Status, ["STATUS_UNSPECIFIED"], ParticipantStatus),
        (participant_pb2.Participant.Role, ["ROLE_UNSPECIFIED"], ParticipantRole),
        (message_pb2.Message.Role, ["ROLE_UNSPECIFIED"], MessageRole),
        (message_pb2.Message.Status, ["STATUS_UNSPECIFIED"], MessageStatus),
        # WITHHELD is what a reader sees of an event, and no event.
        (event_pb2.Event.Type, ["TYPE_UNSPECIFIED", "TYPE_WITHHELD"], EventType),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else "",
)
def test_the_domains_words_stand_in_the_order_of_their_numbers(
    proto: Any, prefix: list[str], words: type[StrEnum]
) -> None:
    kind = prefix[0].partition("_")[0]
    assert proto.keys() == [*prefix, *(f"{kind}_{word}" for word in words)]
    assert proto.values() == list(range(len(proto.keys())))


@pytest.mark.parametrize(
    ("seconds", "nanos", "reason"),
    [
        (-62_135_596_800, 1_000, ""),
        (-62_135_596_800, 0, "INVALID_TIME"),
        (-62_135_596_801, 0, "INVALID_TIME"),
        (253_402_300_799, 999_998_999, ""),
        (253_402_300_799, 999_999_999, "INVALID_TIME"),
        (253_402_300_800, 0, "INVALID_TIME"),
        (0, -1, "INVALID_TIME"),
        (0, 1_000_000_000, "INVALID_TIME"),
        (2**63 - 1, 0, "INVALID_TIME"),
    ],
)
def test_a_time_lies_within_the_years_1_to_9999(seconds: int, nanos: int, reason: str) -> None:
    request = conversation_pb2.ListConversationsRequest(
        created_after=Timestamp(seconds=seconds, nanos=nanos)
    )
    assert refusal(Fields.time, request, "created_after") == reason


def test_a_span_of_time_is_not_empty() -> None:
    request = conversation_pb2.ListConversationsRequest()
    request.created_after.FromDatetime(NINE)
    request.created_before.FromDatetime(NINE + timedelta(microseconds=1))
    with Fields() as fields:
        span = fields.span(request, after="created_after", before="created_before")
    assert span == (NINE, NINE + timedelta(microseconds=1))

    request.created_before.FromDatetime(NINE)
    with pytest.raises(InvalidArgument, match="INVALID_TIME_RANGE"), Fields() as fields:
        fields.span(request, after="created_after", before="created_before")


def test_a_page_has_fifty_unless_asked_and_a_thousand_at_most() -> None:
    with Fields() as fields:
        assert [fields.page_size(asked) for asked in (0, 1, 999, 1_000, 1_001, 2**31 - 1)] == [
            50, 1, 999, 1_000, 1_000, 1_000,
        ]  # fmt: skip
    with pytest.raises(InvalidArgument, match="INVALID_PAGE_SIZE"), Fields() as fields:
        fields.page_size(-1)


def nested(levels: int) -> Struct:
    """An object in an object in an object …"""
    inner = Struct()
    for _ in range(levels - 1):
        outer = Struct()
        outer.fields["in"].struct_value.CopyFrom(inner)
        inner = outer
    return inner


def listed(levels: int) -> Struct:
    """A list in a list in a list … in an object."""
    inner = Value(null_value=0)  # type: ignore[arg-type]
    for _ in range(levels - 1):
        outer = Value()
        outer.list_value.values.append(inner)
        inner = outer
    return Struct(fields={"in": inner})


def struct(**values: Any) -> Struct:
    made = Struct()
    made.update(values)
    return made


@pytest.mark.parametrize(
    ("metadata", "accepted"),
    [
        (Struct(), True),
        (nested(16), True),
        (nested(17), False),
        (listed(16), True),
        (listed(17), False),
        (struct(**{f"k{n}": n for n in range(64)}), True),
        (struct(**{f"k{n}": n for n in range(65)}), False),
        (struct(**{"k" * 128: 1}), True),
        (struct(**{"🚀" * 128: 1}), True),
        (struct(**{"k" * 129: 1}), False),
        (struct(**{"": 1}), False),
        (struct(**{"nul\0": 1}), False),
        (struct(text="nul\0"), False),
        (struct(deep=[{"text": "nul\0"}]), False),
        (struct(number=float("nan")), False),
        (struct(number=float("-inf")), False),
        (struct(**{"$where": "1", "__proto__": {}, "'; DROP TABLE users; --": "%"}), True),
        # {"a": "xxx…"} is nine bytes more than its text.
        (struct(a="x" * (16_384 - 9)), True),
        (struct(a="x" * (16_384 - 8)), False),
        (struct(a="é" * 8_187), True),
        (struct(a="é" * 8_188), False),
        # Six bytes each once PostgreSQL has escaped them.
        (struct(a="\x01" * 2_729), True),
        (struct(a="\x01" * 2_730), False),
        # 309 digits each once PostgreSQL has stored them.
        (struct(a=[1e308] * 52), True),
        (struct(a=[1e308] * 53), False),
    ],
)
def test_metadata_keeps_its_limits(metadata: Struct, accepted: bool) -> None:
    reason = refusal(Fields.metadata, metadata)
    assert reason == ("" if accepted else "INVALID_METADATA")


def test_a_violation_in_metadata_tells_its_path() -> None:
    with pytest.raises(InvalidArgument) as caught, Fields() as fields:
        fields.metadata("user.metadata", struct(order={"lines": [{"price": float("inf")}]}))
    assert caught.value.field == "user.metadata.order.lines.price"


def test_a_value_without_a_kind_is_null() -> None:
    with Fields() as fields:
        assert fields.metadata("metadata", Struct(fields={"a": Value()})) == '{"a":null}'


@pytest.mark.parametrize(
    "plain",
    [
        {"a": [], "b": {}, "c": "", "d": None, "e": True, "f": False},
        {"quo\"te": "back\\slash", "tab\t": "\n\r\b\f\x01\x7f", "é": "🚀", "l": [1, "two", [3.5]]},
        {"n": [0.1, -7, 1e16, 1e308, -5e-324, 1.7976931348623157e308, 2.0**53, 2**53 - 1, 1e-7]},
    ],
)  # fmt: skip
async def test_the_size_of_metadata_is_what_the_database_prints(
    database: asyncpg.Connection, plain: dict[str, Any]
) -> None:
    size, _ = _struct(struct(**plain), path="", depth=1)
    with Fields() as fields:
        text = fields.metadata("metadata", struct(**plain))
    printed = await database.fetchval("SELECT $1::text::jsonb::text", text)
    assert (size, json.loads(text)) == (len(printed.encode()), plain)


def test_all_violations_are_told_at_once_and_the_first_names_the_reason() -> None:
    fields = Fields()
    fields.username("user.username", "a b")
    fields.email("user.email", "nowhere")
    fields.page_size(-1)
    with pytest.raises(InvalidArgument) as caught, fields:
        pass
    assert caught.value.reason == "INVALID_CHARACTER"
    assert [(each.field, each.reason) for each in caught.value.violations] == [
        ("user.username", "INVALID_CHARACTER"),
        ("user.email", "INVALID_EMAIL"),
        ("page_size", "INVALID_PAGE_SIZE"),
    ]


def test_a_payload_is_the_same_whatever_its_request_id_unknown_fields_and_order() -> None:
    user = user_pb2.User(username="ada", metadata=struct(a=1, b=2, c=3))
    request = user_pb2.CreateUserRequest(user=user, request_id="one")
    unknown = b"\xfa\x7f\x03abc"
    again = user_pb2.CreateUserRequest.FromString(
        user_pb2.CreateUserRequest(
            user=user_pb2.User(username="ada", metadata=struct(c=3, b=2, a=1)),
            request_id="two",
            validate_only=True,
        ).SerializeToString()
        + unknown
    )
    other = user_pb2.CreateUserRequest(user=user_pb2.User(username="Ada"), request_id="one")
    assert payload_hash(request) == payload_hash(again)
    assert payload_hash(request) != payload_hash(other)
