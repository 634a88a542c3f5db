"""The feed's checkers: each must see what it is there to see, and believe what can be true."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from parley.v1 import event_pb2

from .feed_history import (
    Batch,
    Due,
    FeedHistory,
    Reading,
    Resumption,
    Scope,
    State,
    due,
    places,
    violations,
)
from .make import Conversation, Event, Message, Participant

JOINED, REMOVED = Participant.STATUS_JOINED, Participant.STATUS_REMOVED
NOBODY = Participant.STATUS_UNSPECIFIED


def created(talk: str = "tea", title: str = "") -> Event:
    conversation = Conversation(id=talk, title=title)
    kind = Event.TYPE_CONVERSATION_CREATED
    return Event(conversation_id=talk, version=1, type=kind, conversation=conversation)


def said(version: int, sequence: int, talk: str = "tea", content: str = "") -> Event:
    message = Message(conversation_id=talk, sequence=sequence, content=content or f"#{sequence}")
    return Event(
        conversation_id=talk,
        version=version,
        type=Event.TYPE_MESSAGE_CREATED,
        sequence=sequence,
        message=message,
    )


def moved(
    version: int,
    user: str,
    before: "Participant.Status.ValueType",
    after: "Participant.Status.ValueType",
    talk: str = "tea",
) -> Event:
    return Event(
        conversation_id=talk,
        version=version,
        type=Event.TYPE_PARTICIPANT_CHANGED,
        user_id=user,
        previous_status=before,
        status=after,
        participant=Participant(conversation_id=talk, user_id=user, status=after),
    )


def withheld(version: int, through: int, talk: str = "tea") -> Event:
    return Event(
        conversation_id=talk, version=version, through_version=through, type=Event.TYPE_WITHHELD
    )


# Ada is there from the beginning, bob is removed, cleo comes late and is not to see what was.
LOG = [
    created(),
    moved(2, "ada", NOBODY, JOINED),
    created("cake"),
    moved(3, "bob", NOBODY, JOINED),
    said(4, 1),
    said(5, 2),
    said(2, 1, "cake"),
    moved(6, "bob", JOINED, REMOVED),
    moved(7, "cleo", NOBODY, JOINED),
    said(8, 3),
]
TEA = [event for event in LOG if event.conversation_id == "tea"]
STATES = [
    State(
        Conversation(id="tea", version=8),
        [event.participant for event in (LOG[1], LOG[7], LOG[8])],
        [event.message for event in (LOG[4], LOG[5], LOG[9])],
    ),
    State(Conversation(id="cake", version=2), [], [LOG[6].message]),
]
EVERYTHING, NARROW = Scope("everything"), Scope("conversation", "tea")
OF_BOB, AS_BOB = Scope("user", "bob"), Scope("conversation", "tea", actor="bob")
AS_CLEO = Scope("conversation", "tea", actor="cleo", is_newcomer=True)
SEEN_BY_CLEO = [*TEA[:3], withheld(4, 5), *TEA[5:]]


def response(*events: Event, caught_up: bool = False) -> event_pb2.WatchResponse:
    cursor = str(events[-1].version) if events else ""
    return event_pb2.WatchResponse(events=events, cursor=cursor, caught_up=caught_up)


def read(scope: Scope, *responses: Sequence[Event], ended: str = "") -> Reading:
    """One stream of such responses."""
    return Reading(scope, [[response(*events) for events in responses]], ended)


GOOD = FeedHistory(
    log=LOG,
    states=STATES,
    readings=[
        read(EVERYTHING, LOG[:4], LOG[4:]),
        read(NARROW, TEA),
        read(OF_BOB, [LOG[3], LOG[4], LOG[5], LOG[7]]),
        read(AS_BOB, TEA[:6], ended="ACCESS_LOST"),
        read(AS_CLEO, SEEN_BY_CLEO),
        # Where a run is withheld in two pieces, or a response holds nothing, is all the same.
        read(AS_CLEO, [*TEA[:3], withheld(4, 4)], [], [withheld(5, 5), *TEA[5:]]),
    ],
    resumptions=[Resumption(EVERYTHING, 4, LOG[4:]), Resumption(AS_BOB, 6, [])],
    batches=[Batch("tea", [1, 2])],
    acknowledged=[("tea", 1), ("tea", 3), ("cake", 1)],
)


def test_a_history_that_can_be_true_is_believed() -> None:
    assert violations(GOOD) == []


def test_memberships_are_what_the_log_tells() -> None:
    assert [place.version for place in due(LOG, OF_BOB)] == [3, 4, 5, 6]
    assert [place.version for place in due(LOG, AS_BOB)] == [1, 2, 3, 4, 5, 6]
    hidden = [place.version for place in due(LOG, AS_CLEO) if not place.is_shown]
    assert hidden == [4, 5]
    assert places([withheld(4, 5)]) == [Due("tea", 4, False), Due("tea", 5, False)]


def log(*events: Event) -> FeedHistory:
    return replace(GOOD, log=events, readings=[], resumptions=[], batches=[])


def reading(*readings: Reading) -> FeedHistory:
    return replace(GOOD, readings=readings)


def stored(*states: State) -> FeedHistory:
    return replace(GOOD, states=states)


def again() -> Reading:
    twice = response(caught_up=True)
    return Reading(NARROW, [[response(*TEA), twice, twice]])


BAD: dict[str, tuple[str, FeedHistory]] = {
    "a version is missing": ("I19 hole", log(*LOG[:4], *LOG[5:])),
    "a version is there twice": ("I19 hole", log(*LOG, LOG[9])),
    "versions are out of order": ("I19 hole", log(*LOG[:4], LOG[5], LOG[4], *LOG[6:])),
    "the log ends too early": ("I19 tea is at version 8", log(*LOG[:9])),
    "an event of nothing": ("I19 tea is at version 8", log(*LOG, said(9, 4))),
    "a message was told of twice": ("I23 message", log(*LOG, said(9, 3))),
    "an acknowledged message was not told of": (
        "I23 message ('tea', 4) was told of 0 times",
        replace(GOOD, acknowledged=[("tea", 4)]),
    ),
    "a message is told of and is not there": (
        "I23 message ('cake', 1) was told of and is not there",
        stored(STATES[0], replace(STATES[1], messages=[])),
    ),
    "a title was not told of": (
        "I23 replayed log",
        stored(replace(STATES[0], conversation=Conversation(id="tea", version=8, title="Tea"))),
    ),
    "a message is another": (
        "I23 replayed as it happened: message 1",
        reading(read(EVERYTHING, [*LOG[:6], said(2, 1, "cake", "other"), *LOG[7:]])),
    ),
    "a status was not told of": (
        "I23 replayed log",
        log(*LOG[:7], moved(6, "bob", JOINED, JOINED), *LOG[8:]),
    ),
    "a status begins elsewhere": (
        "I23 replayed log: version 6",
        log(*LOG[:7], moved(6, "bob", NOBODY, REMOVED), *LOG[8:]),
    ),
    "one missed": ("I19 missed: 1 of 10", reading(read(EVERYTHING, LOG[:4], LOG[5:]))),
    "the last one missed": ("I19 missed: 1 of 8", reading(read(NARROW, TEA[:-1]))),
    "one twice": ("I19 twice: 1 of 10", reading(read(EVERYTHING, LOG[:5], LOG[4:]))),
    "two the other way round": (
        "I19 out of order",
        reading(read(EVERYTHING, [LOG[0], LOG[2], LOG[1], *LOG[3:]])),
    ),
    "told of what came after it left": ("I14", reading(read(AS_BOB, TEA, ended="ACCESS_LOST"))),
    "told of a conversation it is not in": ("I14", reading(read(OF_BOB, [LOG[2], *TEA[2:6]]))),
    "shown what was said before it came": ("I13 shown: 2", reading(read(AS_CLEO, TEA))),
    "not shown what it may see": (
        "I13 withheld: 1",
        reading(read(AS_CLEO, [*TEA[:3], withheld(4, 5), *TEA[5:7], withheld(8, 8)])),
    ),
    "a cursor was refused": (
        "I20 a cursor was refused, CURSOR_EXPIRED",
        reading(read(NARROW, TEA, ended="CURSOR_EXPIRED")),
    ),
    "a cursor leads too far": (
        "I20 I19 missed",
        replace(GOOD, resumptions=[Resumption(EVERYTHING, 4, LOG[5:])]),
    ),
    "a cursor leads back": (
        "I20 I14",
        replace(GOOD, resumptions=[Resumption(NARROW, 4, TEA[3:])]),
    ),
    "a cursor leads nowhere": (
        "I20 a cursor was refused",
        replace(GOOD, resumptions=[Resumption(NARROW, 4, [], "INVALID_CURSOR")]),
    ),
    "a call's events are apart": (
        "I21 a call's events are versions 5 and 8",
        replace(GOOD, batches=[Batch("tea", [2, 3])]),
    ),
    "a call's events are in two responses": (
        "I21 a call's events are in two responses",
        reading(read(NARROW, TEA[:4], TEA[4:])),
    ),
    "caught up twice": ("I22", reading(again())),
}


@pytest.mark.parametrize(("said", "history"), BAD.values(), ids=BAD.keys())
def test_a_checker_sees_what_it_is_there_for(said: str, history: FeedHistory) -> None:
    assert any(found.startswith(said) for found in violations(history)), violations(history)
