"""Page tokens: signed, bound, in one spelling; and answers that stay within a mebibyte."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from parley.v1 import message_pb2 as pb
from service import paging
from service.errors import InvalidArgument, Unavailable
from service.identity import Actor, Call, Caller, Scope
from service.paging import MAX_RESPONSE_BYTES, FeedCursors, PageTokens
from service.rules.feed import Place, Subject

USER, TOOL = pb.Message.ROLE_USER, pb.Message.ROLE_TOOL
ADA = Actor(UUID(int=1))
TALK = UUID(int=9)
BINDING = b"12345678"


def tokens(key: bytes = b"key") -> PageTokens:
    made = PageTokens()
    made.use(key)
    return made


def call(method: str = "parley.v1.MessageService/ListMessages", actor: Actor | None = ADA) -> Call:
    return Call(method, Caller("tests", frozenset(Scope)), actor)


def reason_of(token: str, binding: bytes = BINDING, key: bytes = b"key") -> str:
    with pytest.raises(InvalidArgument) as raised:
        tokens(key).open(token, binding)
    assert raised.value.field == "page_token"
    return raised.value.reason


@pytest.mark.parametrize("position", [[1, "next"], [2**63 - 1, "previous"], ["a", "é"]])
def test_a_token_opens_to_the_position_it_was_sealed_from(position: paging.Position) -> None:
    assert tokens().open(tokens().seal(position, BINDING), BINDING) == position


def test_no_token_is_no_position() -> None:
    assert tokens().open("", BINDING) is None


@pytest.mark.parametrize("position", [[1, "next"], [12, "next"], [123, "next"]])
def test_no_bit_of_a_token_can_be_changed(position: paging.Position) -> None:
    """Not even those that Base64 leaves unused in a last character."""
    token = tokens().seal(position, BINDING)

    for place in range(len(token)):
        for bit in range(7):
            flipped = chr(ord(token[place]) ^ 1 << bit)
            assert reason_of(token[:place] + flipped + token[place + 1 :]) == "INVALID_PAGE_TOKEN"


@pytest.mark.parametrize("ending", ["=", "==", "A", "\n", " "])
def test_nothing_can_be_appended_to_a_token(ending: str) -> None:
    assert reason_of(tokens().seal([1, "next"], BINDING) + ending) == "INVALID_PAGE_TOKEN"


def test_a_token_cannot_be_cut() -> None:
    token = tokens().seal([1, "next"], BINDING)

    assert {reason_of(token[:end]) for end in range(1, len(token))} == {"INVALID_PAGE_TOKEN"}


def test_a_token_of_another_key_is_not_ours() -> None:
    assert reason_of(tokens(b"other").seal([1, "next"], BINDING)) == "INVALID_PAGE_TOKEN"


def test_a_token_for_another_request_is_told_apart_from_a_forged_one() -> None:
    assert reason_of(tokens().seal([1, "next"], b"87654321")) == "PAGE_TOKEN_MISMATCH"


def test_there_are_no_tokens_before_the_database_gave_the_key() -> None:
    with pytest.raises(Unavailable):
        PageTokens().seal([1, "next"], BINDING)
    with pytest.raises(Unavailable):
        PageTokens().open("AAAA", BINDING)


# What a token is bound to


def asked(**values: Any) -> pb.ListMessagesRequest:
    values = {"conversation_id": "slug", "order_by": "sequence", "roles": [USER, TOOL], **values}
    return pb.ListMessagesRequest(**values)


ASKED = asked()


@pytest.mark.parametrize(
    "other",
    [
        paging.binding(call("parley.v1.MessageService/SearchMessages"), ASKED, TALK),
        paging.binding(call(actor=None), ASKED, TALK),
        paging.binding(call(actor=Actor(UUID(int=2))), ASKED, TALK),
        paging.binding(call(), ASKED, UUID(int=8)),
        paging.binding(call(), ASKED),
        paging.binding(call(), asked(order_by=""), TALK),
        paging.binding(call(), asked(roles=[USER]), TALK),
    ],
    ids=["method", "system", "actor", "parent", "no parent", "order", "filter"],
)
def test_a_token_is_bound_to(other: bytes) -> None:
    assert paging.binding(call(), ASKED, TALK) != other


def test_a_token_is_not_bound_to_page_size_spelling_of_the_parent_or_unknown_fields() -> None:
    same = pb.ListMessagesRequest.FromString(
        asked(conversation_id=str(TALK), page_size=7, page_token="x").SerializeToString()
        + b"\xfa\x3f\x05newer"
    )

    assert paging.binding(call(), same, TALK) == paging.binding(call(), ASKED, TALK)


def test_a_place_in_time_comes_back_to_the_microsecond() -> None:
    place = (datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC), UUID(int=7))

    assert paging.time_and_id(paging.place(*place)) == place
    assert paging.time_and_id(None) is None


# Cutting


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ([], 0),
        ([10, 10], 2),
        ([MAX_RESPONSE_BYTES // 2] * 3, 1),
        ([MAX_RESPONSE_BYTES // 4] * 9, 3),
        ([2 * MAX_RESPONSE_BYTES, 1], 1),
    ],
)
def test_an_answer_is_cut_at_a_mebibyte_but_never_to_nothing(sizes: list[int], kept: int) -> None:
    messages = [StringValue(value="x" * size) for size in sizes]

    assert paging.cut(messages) == messages[:kept]


# Cursors of the change feed

PLACE = Place(2, 2**40, TALK, 7)
SUBJECTS = (
    Subject(conversation_id=TALK),
    Subject(conversation_id=UUID(int=8)),
    Subject(user_id=TALK),
    Subject(),
)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_cursor_opens_to_its_place_and_era(subject: Subject) -> None:
    cursors = FeedCursors(tokens())
    cursor = cursors.sealer(era=3, subject=subject, actor_id=ADA.id)(PLACE)

    assert cursors.open(cursor, subject=subject, actor_id=ADA.id) == (PLACE, 3)
    for other in SUBJECTS:
        for actor_id in (ADA.id, TALK, None):
            if (other, actor_id) != (subject, ADA.id):
                with pytest.raises(InvalidArgument) as raised:
                    cursors.open(cursor, subject=other, actor_id=actor_id)
                assert raised.value.reason == "INVALID_CURSOR"
                assert raised.value.field == "resume_cursor"


def test_a_page_token_is_no_cursor() -> None:
    token = tokens().seal([1, 2, 3, TALK.hex, 5], BINDING)

    with pytest.raises(InvalidArgument) as raised:
        FeedCursors(tokens()).open(token, subject=Subject(), actor_id=None)
    assert raised.value.reason == "INVALID_CURSOR"
