"""The decision about messages that want to be appended, without a database."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import count
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain import MessageRole, UserKind
from service.errors import ParleyError
from service.identity import Actor
from service.rules.messages import (
    Accepted,
    Append,
    Draft,
    Numbered,
    Outcome,
    Reference,
    Replayed,
    State,
    decide,
)
from service.rules.requests import RequestId

TALK, MISSING = UUID(int=1), UUID(int=2)
ADA, BOB, OLIVIA, IVAN, EVE = (UUID(int=n) for n in range(11, 16))


def person(role: str, status: str = "JOINED", **values: Any) -> dict[str, Any]:
    standing = {
        "kind": UserKind.HUMAN,
        "user_revision": 1,
        "usable": True,
        "status": status,
        "role": role,
        "first_sequence": 1,
        "sees": True,
    }
    return standing | values


def state(last_sequence: int = 5, **conversation: Any) -> State:
    """A conversation with as many messages, whose ids are 100 and their number."""
    stored = [(UUID(int=100 + n), n) for n in range(1, last_sequence + 1)]
    messages: dict[Reference, tuple[UUID, int]] = {id: (id, n) for id, n in stored}
    messages.update((n, (id, n)) for id, n in stored)
    return State(
        {"deleted_at": None, "is_active": True, **conversation},
        last_sequence=last_sequence,
        version=last_sequence + 3,
        people={
            ADA: person("OWNER"),
            # Joined after the third message, without history.
            BOB: person("MEMBER", first_sequence=4),
            OLIVIA: person("OBSERVER"),
            IVAN: person("MEMBER", "INVITED"),
            EVE: person("MEMBER", sees=False),
        },
        messages=messages,
        external_ids={"taken": UUID(int=101)},
    )


def draft(content: str = "hello", **values: Any) -> Draft:
    return Draft(role=MessageRole.USER, content=content, **values)


def append(*drafts: Draft, by: UUID | None = ADA, **values: Any) -> Append:
    return Append(
        conversation="talk",
        **{"conversation_id": TALK, **values},
        actor=Actor(by) if by else None,
        drafts=tuple(replace(each, sender_id=each.sender_id or by) for each in drafts or [draft()]),
    )


def request(name: int, payload: int = 0) -> RequestId:
    return RequestId(bytes([name]), bytes([payload]))


def new_ids() -> Iterator[UUID]:
    return (UUID(int=n) for n in count(1_000))


def decided(items: Sequence[Append], before: State) -> list[Outcome]:
    return decide(
        list(items), {TALK: before, MISSING: State(None, 0, 0, people=before.people)}, new_ids()
    )


def reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """Each outcome in a word, or its sequences."""
    return [
        outcome.reason
        if isinstance(outcome, ParleyError)
        else " ".join(str(each.sequence) for each in outcome.messages)
        if isinstance(outcome, Accepted)
        else f"as {outcome.sequence}"
        for outcome in outcomes
    ]


def test_numbers_go_to_those_that_pass_and_to_no_other() -> None:
    before = state()

    outcomes = decided([append(), append(by=OLIVIA), append(draft(), draft()), append()], before)

    assert reasons(outcomes) == ["6", "PERMISSION_DENIED", "7 8", "9"]
    assert (before.last_sequence, before.version) == (9, 12)


def test_twins_in_one_batch_share_the_first_ones_outcome() -> None:
    first = append(draft(), draft(), request=request(1))

    outcomes = decided([first, append(), first, first], state())

    assert outcomes[2] == outcomes[3] == Replayed(6, 2, is_stored=False)
    assert reasons(outcomes) == ["6 7", "8", "as 6", "as 6"]


def test_a_twin_with_another_payload_is_refused() -> None:
    items = [append(request=request(1)), append(request=request(1, payload=1))]

    assert reasons(decided(items, state())) == ["6", "REQUEST_ID_REUSED"]


def test_a_twin_of_one_that_was_refused_is_decided_for_itself() -> None:
    items = [
        append(by=OLIVIA, request=request(1)),
        append(request=request(1), expected_last_sequence=4),
        append(request=request(1, payload=1)),
        append(request=request(1)),
    ]

    assert reasons(decided(items, state())) == [
        "PERMISSION_DENIED",
        "SEQUENCE_MISMATCH",
        "6",
        "REQUEST_ID_REUSED",
    ]


def test_a_dry_run_takes_neither_number_nor_id() -> None:
    before = state()
    items = [append(draft(external_id="x"), dry_run=True), append(draft(external_id="x"))]

    assert reasons(decided(items, before)) == ["6", "6"]
    assert before.last_sequence == 6


def test_each_check_comes_in_its_order() -> None:
    """Replay, then sight, right, sender, state, expected sequence, references."""
    recorded = {"payload_hash": b"\0", "sequence": 2, "message_count": 1}
    wrong = draft(sender="x", sender_id=BOB, reply_to=99)

    def told(by: UUID, message: Draft, request_id: int = 9, **values: Any) -> str:
        before = state(**values)
        before.requests[b"\1"] = recorded
        item = append(message, by=by, expected_last_sequence=0, request=request(request_id))
        return reasons(decided([item], before))[0]

    archived: dict[str, Any] = {"is_active": False}
    deleted: dict[str, Any] = {"deleted_at": "now", "is_active": False}
    assert told(EVE, wrong, 1, **deleted) == "as 2"
    assert told(EVE, wrong, **deleted) == "CONVERSATION_NOT_FOUND"
    assert told(IVAN, wrong, **deleted) == "NOT_A_PARTICIPANT"
    assert told(OLIVIA, wrong, **deleted) == "PERMISSION_DENIED"
    assert told(ADA, wrong, **deleted) == "PERMISSION_DENIED"
    assert told(ADA, draft(reply_to=99), **deleted) == "CONVERSATION_DELETED"
    assert told(ADA, draft(reply_to=99), **archived) == "CONVERSATION_ARCHIVED"
    assert told(ADA, draft(reply_to=99)) == "SEQUENCE_MISMATCH"


def test_a_message_accepted_before_in_the_same_batch_can_be_pointed_at() -> None:
    first, second = decided([append(), append(draft(reply_to=6))], state())

    assert isinstance(first, Accepted)
    assert isinstance(second, Accepted)
    assert second.messages[0].reply_to_message_id == first.messages[0].id


def test_an_external_id_is_taken_by_whoever_comes_first() -> None:
    items = [append(draft(external_id="x")), append(draft(), draft(external_id="x"))]

    first, second = decided(items, state())

    assert isinstance(first, Accepted)
    assert isinstance(second, ParleyError)
    assert second.resource == ("message", str(first.messages[0].id))


def test_a_conversation_that_does_not_exist_is_not_found() -> None:
    items = [append(conversation_id=MISSING), append(by=None, conversation_id=MISSING)]

    assert reasons(decided(items, state())) == ["CONVERSATION_NOT_FOUND"] * 2


@pytest.mark.parametrize(("reference", "may"), [(3, False), (4, True), (UUID(int=103), False)])
def test_who_reads_from_the_fourth_message_on_points_at_none_before(
    reference: UUID | int, may: bool
) -> None:
    (outcome,) = decided([append(draft(parent=reference), by=BOB)], state())

    assert isinstance(outcome, Accepted) == may


# Whatever comes

references = st.none() | st.integers(1, 12) | st.integers(101, 107).map(lambda n: UUID(int=n))
drafts = st.builds(
    draft,
    sender=st.just(""),
    sender_id=st.none(),
    reply_to=references,
    parent=references,
    external_id=st.none() | st.sampled_from(["taken", "x", "y"]),
)
items = st.builds(
    lambda drafts, **values: append(*drafts, **values),
    st.lists(drafts, min_size=1, max_size=3),
    by=st.sampled_from([ADA, ADA, BOB, OLIVIA, IVAN, EVE]),
    conversation_id=st.sampled_from([TALK, TALK, TALK, MISSING]),
    expected_last_sequence=st.none() | st.integers(0, 9),
    request=st.none() | st.builds(request, st.integers(1, 3), st.integers(0, 1)),
    dry_run=st.booleans(),
)
states = st.builds(state, st.integers(0, 6))


def kept(item: Append, outcome: Outcome) -> bool:
    """Whether the item was stored."""
    return isinstance(outcome, Accepted) and not item.dry_run


@settings(max_examples=100, deadline=None)
@given(st.lists(items, max_size=12), states)
def test_numbers_are_contiguous_and_items_all_or_nothing(
    items: list[Append], before: State
) -> None:
    sequence, version = before.last_sequence, before.version
    outcomes = decided(items, before)

    stored: list[Numbered] = []
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(outcome, Accepted):
            assert tuple(each.draft for each in outcome.messages) == item.drafts
        if isinstance(outcome, Accepted) and not item.dry_run:
            stored += outcome.messages
    assert [each.sequence - sequence for each in stored] == list(range(1, len(stored) + 1))
    assert [each.version - version for each in stored] == list(range(1, len(stored) + 1))
    assert (before.last_sequence, before.version) == (
        sequence + len(stored),
        version + len(stored),
    )
    assert len({each.id for each in stored}) == len(stored)
    external_ids = [each.draft.external_id for each in stored if each.draft.external_id]
    assert len(set(external_ids)) == len(external_ids)
    assert "taken" not in external_ids


@settings(max_examples=100, deadline=None)
@given(st.lists(items, max_size=12), states)
def test_twins_share_the_outcome_of_the_first_that_was_stored(
    items: list[Append], before: State
) -> None:
    first: dict[bytes, tuple[Append, Accepted]] = {}

    for item, outcome in zip(items, decided(items, before), strict=True):
        if item.request is None or item.conversation_id == MISSING:
            assert not isinstance(outcome, Replayed)
        elif known := first.get(item.request.key):
            twin, accepted = known
            if twin.request == item.request:
                assert outcome == Replayed(accepted.messages[0].sequence, len(twin.drafts))
            else:
                assert isinstance(outcome, ParleyError)
                assert outcome.reason == "REQUEST_ID_REUSED"
        else:
            assert not isinstance(outcome, Replayed)
            if isinstance(outcome, Accepted) and not item.dry_run:
                first[item.request.key] = (item, outcome)


@settings(max_examples=100, deadline=None)
@given(st.lists(items, max_size=12), states)
def test_what_was_not_stored_might_as_well_not_have_come(
    items: list[Append], before: State
) -> None:
    """Neither a refusal, nor a replay, nor a dry run changes what becomes of the others."""
    alone = deepcopy(before)

    outcomes = decided(items, before)
    stored = [item for item, outcome in zip(items, outcomes, strict=True) if kept(item, outcome)]
    again = decided(stored, alone)

    assert reasons(again) == reasons(
        [outcome for item, outcome in zip(items, outcomes, strict=True) if kept(item, outcome)]
    )
    assert (alone.last_sequence, alone.version) == (before.last_sequence, before.version)
    assert alone.requests == before.requests
    assert alone.external_ids.keys() == before.external_ids.keys()
    assert alone.messages.keys() == before.messages.keys()


@settings(max_examples=100, deadline=None)
@given(st.lists(items, max_size=8), states)
def test_together_or_one_by_one_makes_no_difference(items: list[Append], before: State) -> None:
    one_by_one = deepcopy(before)

    together = reasons(decided(items, before))

    assert [reasons(decided([item], one_by_one))[0] for item in items] == together


def test_an_actor_who_may_not_act_is_refused_whatever_it_asks_again() -> None:
    before = state()
    before.people[ADA] = person("OWNER", usable=False)
    before.requests[bytes([1])] = {"payload_hash": bytes([0]), "sequence": 2, "message_count": 1}
    del before.people[BOB]

    outcomes = decided([append(), append(request=request(1)), append(by=BOB)], before)

    assert reasons(outcomes) == ["ACTOR_NOT_ALLOWED"] * 3
