"""How far somebody has read, decided without a database."""

from typing import Any
from uuid import UUID, uuid4

import pytest

from service.domain import ParticipantRole, ParticipantStatus
from service.errors import ParleyError
from service.rules.cursors import Moved, Outcome, Reading, Replayed, State, Unmoved, decide
from service.rules.requests import RequestId

TALK, BOB, MESSAGE = uuid4(), uuid4(), uuid4()


def state(
    status: str | None = "JOINED",
    *,
    read: int = 0,
    exists: bool = True,
    sees: bool = True,
    role: ParticipantRole = ParticipantRole.OBSERVER,
    deleted_at: object = None,
) -> State:
    """A conversation of ten messages and twenty events, and what bob is in it."""
    return State(
        {"last_sequence": 10, "deleted_at": deleted_at} if exists else None,
        version=20,
        people={BOB: {"user_id": BOB, "status": status, "role": role, "sees": sees}},
        cursors={BOB: read},
        messages={(BOB, MESSAGE): 7},
    )


def reading(key: UUID | int, **values: Any) -> Reading:
    given = {"actor_id": BOB, "user": "bob", "user_id": BOB, **values}
    return Reading(conversation="tea", conversation_id=TALK, key=key, **given)


def decided(where: State, *items: Reading) -> list[Outcome]:
    return decide([*items], {TALK: where})


def refusal(where: State, item: Reading) -> str:
    (outcome,) = decided(where, item)
    assert isinstance(outcome, ParleyError)
    return f"{outcome.status} {outcome.reason}"


def test_a_cursor_moves_forward_only_and_each_move_is_an_event() -> None:
    assert decided(state(read=3), *map(reading, (2, 3, 5, 4, 10, 10))) == [
        Unmoved(BOB),
        Unmoved(BOB),
        Moved(BOB, 5, 21),
        Unmoved(BOB),
        Moved(BOB, 10, 22),
        Unmoved(BOB),
    ]


def test_what_is_refused_holds_up_nothing_and_takes_no_number() -> None:
    past, known, unknown = reading(11), reading(MESSAGE), reading(uuid4())
    error, moved, missing, last = decided(state(), past, known, unknown, reading(10))
    assert (moved, last) == (Moved(BOB, 7, 21), Moved(BOB, 10, 22))
    assert isinstance(error, ParleyError)
    assert (error.status, error.reason) == ("OUT_OF_RANGE", "READ_PAST_END")
    assert error.known == {"field": "sequence", "last_sequence": "10"}
    assert isinstance(missing, ParleyError)
    assert missing.reason == "MESSAGE_NOT_FOUND"


def test_nothing_read_is_no_move_even_where_there_is_nothing() -> None:
    empty = state()
    empty.conversation = {"last_sequence": 0, "deleted_at": None}
    assert decided(empty, reading(0)) == [Unmoved(BOB)]


@pytest.mark.parametrize("role", ParticipantRole)
def test_every_role_reads(role: ParticipantRole) -> None:
    assert decided(state(role=role), reading(1)) == [Moved(BOB, 1, 21)]


@pytest.mark.parametrize("status", [*ParticipantStatus, None])
def test_an_actor_who_is_not_joined_has_no_cursor_to_move(status: str | None) -> None:
    if status == "JOINED":
        return
    hidden = state(status, sees=False)
    assert refusal(hidden, reading(1)) == "NOT_FOUND CONVERSATION_NOT_FOUND"
    assert refusal(state(status), reading(1)) == "PERMISSION_DENIED NOT_A_PARTICIPANT"
    # From the system it is the state that is wrong, or nobody is there.
    system = reading(1, actor_id=None)
    nobody = "NOT_FOUND PARTICIPANT_NOT_FOUND"
    gone = "FAILED_PRECONDITION NOT_A_PARTICIPANT"
    assert refusal(state(status), system) == (gone if status else nobody)


def test_an_actor_moves_nobody_elses() -> None:
    assert refusal(state(), reading(1, user_id=uuid4())) == "PERMISSION_DENIED PERMISSION_DENIED"
    assert refusal(state(sees=False), reading(1, user_id=uuid4())).startswith("NOT_FOUND")
    nobody = reading(1, actor_id=None, user_id=uuid4())
    assert refusal(state(), nobody) == "NOT_FOUND PARTICIPANT_NOT_FOUND"


def test_a_missing_and_a_deleted_conversation_are_told() -> None:
    assert refusal(state(exists=False), reading(1)) == "NOT_FOUND CONVERSATION_NOT_FOUND"
    deleted = state(deleted_at="now")
    assert refusal(deleted, reading(11)) == "FAILED_PRECONDITION CONVERSATION_DELETED"


def test_a_request_id_is_one_request_also_within_a_batch() -> None:
    request, other = RequestId(b"k" * 16, b"p" * 32), RequestId(b"k" * 16, b"q" * 32)
    first, twin, reused = decided(
        state(), reading(5, request=request), reading(5, request=request), reading(6, request=other)
    )
    assert (first, twin) == (Moved(BOB, 5, 21), Replayed(BOB))
    assert isinstance(reused, ParleyError)
    assert reused.reason == "REQUEST_ID_REUSED"


def test_what_failed_leaves_nothing_under_its_request_id() -> None:
    request = RequestId(b"k" * 16, b"p" * 32)
    where = state()
    decided(where, reading(11, request=request))
    assert not where.requests


def test_a_replay_is_answered_before_rights_and_state_are_asked() -> None:
    where = state("LEFT", deleted_at="now")
    request = RequestId(b"k" * 16, b"p" * 32)
    where.requests[request.key] = {"payload_hash": request.payload_hash, "subject_id": BOB}
    assert decided(where, reading(5, request=request)) == [Replayed(BOB)]
