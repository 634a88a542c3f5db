"""What clients saw of a service under faults, and whether it can be true.

A history has one `Operation` for each call of a sequential client. Each checker is a pure function
over it and what the conversations hold in the end, and returns what is wrong, in words. The numbers
are those of the invariants in the design.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

# Reasons of UNAVAILABLE which promise that nothing happened.
WITHOUT_EFFECT = {"OVERLOADED", "SHUTTING_DOWN", "DATABASE_UNAVAILABLE", "DATABASE_READ_ONLY"}
DEFINITE = {
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "ABORTED",
    "RESOURCE_EXHAUSTED",
}


class Outcome(StrEnum):
    OK = "ok"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Stored:
    """A message as the service shows it."""

    conversation: str
    sequence: int
    id: str
    content: str
    sender: str
    created: int


@dataclass(frozen=True)
class Operation:
    """One SendMessage: who, what, when from when to when, and what came of it."""

    client: str
    conversation: str
    content: str
    request_id: str
    started: float
    ended: float
    outcome: Outcome
    stored: Stored | None = None


def outcome_of(code: str, reason: str) -> Outcome:
    """What an error tells about the effect of a call."""
    if (code in DEFINITE and reason) or (code == "UNAVAILABLE" and reason in WITHOUT_EFFECT):
        return Outcome.FAIL
    return Outcome.UNKNOWN


def violations(history: Sequence[Operation], final: Sequence[Stored]) -> list[str]:
    """Everything that is wrong, by every checker."""
    return [
        *lost(history, final),
        *doubled(final),
        *invented(history, final),
        *failures_with_effect(history, final),
        *gaps(final),
        *out_of_real_time(history),
        *out_of_session(history),
        *times_going_back(final),
        *two_answers(history),
    ]


def lost(history: Iterable[Operation], final: Iterable[Stored]) -> Iterator[str]:
    """I1: what was acknowledged is there, as it was acknowledged."""
    there = set(final)
    for operation in history:
        if operation.stored and operation.stored not in there:
            yield f"I1 lost: {operation}"


def doubled(final: Iterable[Stored]) -> Iterator[str]:
    """I2: nothing is there twice."""
    for content, count in Counter(message.content for message in final).items():
        if count > 1:
            yield f"I2 doubled: {content!r} is there {count} times"


def invented(history: Iterable[Operation], final: Iterable[Stored]) -> Iterator[str]:
    """I3: what is there was sent, there and by whom it says."""
    sent = {(each.conversation, each.content, each.client) for each in history}
    for message in final:
        if (message.conversation, message.content, message.sender) not in sent:
            yield f"I3 invented: {message}"


def failures_with_effect(history: Iterable[Operation], final: Iterable[Stored]) -> Iterator[str]:
    """I4: what certainly failed, every time it was tried, is not there."""
    outcomes: dict[str, set[Outcome]] = defaultdict(set)
    for operation in history:
        outcomes[operation.content].add(operation.outcome)
    for message in final:
        if outcomes[message.content] == {Outcome.FAIL}:
            yield f"I4 a failure with an effect: {message}"


def gaps(final: Iterable[Stored]) -> Iterator[str]:
    """I5: a conversation's messages are 1, 2, 3, …"""
    sequences: dict[str, list[int]] = defaultdict(list)
    for message in final:
        sequences[message.conversation].append(message.sequence)
    for conversation, found in sequences.items():
        if sorted(found) != list(range(1, len(found) + 1)):
            missing = sorted(set(range(1, max(found) + 1)) - set(found))
            yield f"I5 gaps in {conversation}: {missing} of {len(found)}"


def out_of_real_time(history: Iterable[Operation]) -> Iterator[str]:
    """I6: a message whose call began after another's was answered comes after it.

    A sweep: at each beginning, nothing answered before it may have a higher number.
    """
    answered = defaultdict(list)
    for operation in _whole(history):
        answered[operation.conversation].append(operation)
    for operations in answered.values():
        by_end = sorted(operations, key=lambda each: each.ended)
        highest, done = 0, 0
        for operation in sorted(operations, key=lambda each: each.started):
            while done < len(by_end) and by_end[done].ended < operation.started:
                highest = max(highest, _sequence(by_end[done]))
                done += 1
            if _sequence(operation) < highest:
                yield f"I6 before {highest}, which was answered before it began: {operation}"


def out_of_session(history: Iterable[Operation]) -> Iterator[str]:
    """I7: one client's messages have the order in which it sent them."""
    last: dict[tuple[str, str], int] = defaultdict(int)
    for operation in sorted(_whole(history), key=lambda each: each.started):
        key = (operation.client, operation.conversation)
        if _sequence(operation) <= last[key]:
            yield f"I7 not after {last[key]}: {operation}"
        last[key] = _sequence(operation)


def times_going_back(final: Iterable[Stored]) -> Iterator[str]:
    """I7: a later message is not older."""
    newest: dict[str, int] = defaultdict(int)
    for message in sorted(final, key=lambda each: each.sequence):
        if message.created < newest[message.conversation]:
            yield f"I7 older than the one before: {message}"
        newest[message.conversation] = message.created


def two_answers(history: Iterable[Operation]) -> Iterator[str]:
    """I10: a request_id has one answer."""
    answers: dict[str, set[Stored]] = defaultdict(set)
    for operation in history:
        if operation.stored:
            answers[operation.request_id].add(operation.stored)
    for request_id, found in answers.items():
        if len(found) > 1:
            yield f"I10 two answers for {request_id}: {found}"


def _whole(history: Iterable[Operation]) -> list[Operation]:
    """What was answered in the end: from the first attempt under its request_id to that answer."""
    begun: dict[str, float] = {}
    answered: dict[str, Operation] = {}
    for operation in sorted(history, key=lambda each: each.started):
        started = begun.setdefault(operation.request_id, operation.started)
        if operation.stored:
            answered.setdefault(operation.request_id, replace(operation, started=started))
    return list(answered.values())


def _sequence(operation: Operation) -> int:
    assert operation.stored
    return operation.stored.sequence
