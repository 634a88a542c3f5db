"""What readers of the change feed were told under faults, and whether it can be true.

The measure is the whole log as the system reads it in the end: what each reader should have got
follows from it, membership included. Each checker is a pure function, and returns what is wrong, in
words. The numbers are those of the invariants in the design.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from parley.v1 import event_pb2, participant_pb2

from .make import Conversation, Event, Message, Participant

ACCESS_LOST = "ACCESS_LOST"
JOINED = participant_pb2.Participant.STATUS_JOINED
DEPARTED = {
    participant_pb2.Participant.STATUS_LEFT,
    participant_pb2.Participant.STATUS_REMOVED,
}


class Due(NamedTuple):
    """A place in what a reader is told, and whether it is shown or withheld there."""

    conversation: str
    version: int
    is_shown: bool = True


@dataclass(frozen=True)
class Scope:
    """What is read (of a conversation or a user: its id), and as whom, if not as the system.

    `is_newcomer`: history before its joining is hidden from the actor.
    """

    kind: str
    id: str = ""
    actor: str = ""
    is_newcomer: bool = False

    @property
    def asked(self) -> dict[str, Any]:
        """It, as a request names it."""
        if self.kind == "everything":
            return {"everything": True}
        return {f"{self.kind}_id": self.id}


@dataclass
class Reading:
    """What one reader was given: the responses of each of its streams, one resumed from the last
    cursor of the one before.
    """

    scope: Scope
    streams: list[list[event_pb2.WatchResponse]] = field(default_factory=list)
    # The reason for which nothing more was given, if there is one.
    ended: str = ""

    @property
    def responses(self) -> list[event_pb2.WatchResponse]:
        return [response for stream in self.streams for response in stream]

    @property
    def events(self) -> list[Event]:
        return [event for response in self.responses for event in response.events]

    @property
    def cursor(self) -> str:
        """The last one; empty where none came yet."""
        for stream in reversed(self.streams):
            if stream:
                return stream[-1].cursor
        return ""

    def points(self) -> Iterator[tuple[str, int]]:
        """Each cursor, and how many places were behind it."""
        before = 0
        for response in self.responses:
            before += len(places(response.events))
            yield response.cursor, before


@dataclass(frozen=True)
class Resumption:
    """What was read in the end from a cursor, before which there were so many places."""

    scope: Scope
    before: int
    events: Sequence[Event]
    # Why it was refused, if it was.
    refused: str = ""


@dataclass(frozen=True)
class Batch:
    """Messages that one call stored, as it was answered."""

    conversation: str
    sequences: Sequence[int]


@dataclass(frozen=True)
class State:
    """A conversation as Get and List show it."""

    conversation: Conversation
    participants: Sequence[Participant]
    messages: Sequence[Message]


@dataclass
class FeedHistory:
    """All that was seen: the whole log in the end, the readers, and what Get and List show."""

    log: Sequence[Event]
    states: Sequence[State]
    readings: Sequence[Reading] = ()
    resumptions: Sequence[Resumption] = ()
    batches: Sequence[Batch] = ()
    # Messages that were acknowledged: conversation and sequence.
    acknowledged: Sequence[tuple[str, int]] = ()


def violations(history: FeedHistory) -> list[str]:
    """Everything that is wrong, by every checker."""
    log = history.log
    dues = {scope: due(log, scope) for scope in {r.scope for r in history.readings}}
    return [
        *holes(log, {each.conversation.id: each.conversation.version for each in history.states}),
        *untold(history),
        *(f"I23 replayed log: {wrong}" for wrong in unfaithful(log, history.states)),
        *(wrong for each in history.readings for wrong in astray(dues[each.scope], each)),
        *(wrong for each in history.readings for wrong in torn(each, history.batches)),
        *(wrong for each in history.readings for wrong in caught_up_again(each)),
        *(wrong for each in history.resumptions for wrong in resumed_elsewhere(log, each)),
        *(
            f"I23 replayed as it happened: {wrong}"
            for each in history.readings
            if each.scope == Scope("everything")
            for wrong in unfaithful(each.events, history.states)
        ),
    ]


def places(events: Iterable[Event]) -> list[Due]:
    """The places that the events stand for: a run that is withheld for each of its versions."""
    found = []
    for event in events:
        is_shown = event.type != Event.TYPE_WITHHELD
        last = event.version if is_shown else event.through_version
        for version in range(event.version, last + 1):
            found.append(Due(event.conversation_id, version, is_shown))
    return found


def due(log: Iterable[Event], scope: Scope) -> list[Due]:
    """What the scope has of the whole log, by the memberships that the log itself tells of."""
    user = scope.actor or (scope.id if scope.kind == "user" else "")
    standing: dict[str, int] = {}
    said: dict[str, int] = defaultdict(int)
    first: dict[str, int] = {}
    found: list[tuple[Due, Event]] = []
    for event in log:
        id = event.conversation_id
        is_own = event.type == Event.TYPE_PARTICIPANT_CHANGED and event.user_id == user
        if is_own:
            standing[id] = event.status
            if event.status == JOINED and scope.is_newcomer:
                first.setdefault(id, said[id] + 1)
        if event.type == Event.TYPE_MESSAGE_CREATED:
            said[id] = event.sequence
        if scope.kind == "conversation" and id != scope.id:
            continue
        if scope.kind == "user" and not is_own and standing.get(id) != JOINED:
            continue
        found.append((Due(id, event.version), event))
    if scope.kind == "conversation" and scope.actor and standing.get(scope.id) != JOINED:
        # Who has gone reads up to its going.
        while found and not _is_departure(found[-1][1], scope.actor):
            found.pop()
    if not scope.is_newcomer:
        return [place for place, _ in found]
    return [
        place._replace(is_shown=not _is_hidden(event, first.get(event.conversation_id, 0)))
        for place, event in found
    ]


def holes(log: Iterable[Event], versions: Mapping[str, int]) -> Iterator[str]:
    """I19: a conversation's events are 1, 2, 3 … up to its version, in the whole log as well."""
    reached: dict[str, int] = defaultdict(int)
    for event in log:
        if event.version != reached[event.conversation_id] + 1:
            yield f"I19 hole: {_name(event)} follows {reached[event.conversation_id]}"
        reached[event.conversation_id] = event.version
    for conversation, version in versions.items():
        if reached[conversation] != version:
            yield f"I19 {conversation} is at version {version}, its log at {reached[conversation]}"


def untold(history: FeedHistory) -> Iterator[str]:
    """I23: each message that was acknowledged, and each that is there, was told of once; and no
    other was.
    """
    told = Counter(
        (event.conversation_id, event.sequence)
        for event in history.log
        if event.type == Event.TYPE_MESSAGE_CREATED
    )
    stored = {
        (each.conversation.id, message.sequence)
        for each in history.states
        for message in each.messages
    }
    for key in sorted(stored | set(history.acknowledged)):
        if told[key] != 1:
            yield f"I23 message {key} was told of {told[key]} times"
    for key in sorted(set(told) - stored):
        yield f"I23 message {key} was told of and is not there"


def astray(dues: Sequence[Due], reading: Reading) -> Iterator[str]:
    """I13, I14, I19: what a reader was told, through all its streams, is what it was due: once, in
    order, and nothing else.
    """
    if reading.ended not in ("", ACCESS_LOST):
        yield f"I20 a cursor was refused, {reading.ended}: {reading.scope}"
    yield from _compared(dues, places(reading.events), f"{reading.scope}")


def resumed_elsewhere(log: Iterable[Event], resumption: Resumption) -> Iterator[str]:
    """I20: what follows a cursor is what follows its place in the whole log."""
    rest = due(log, resumption.scope)[resumption.before :]
    name = f"{resumption.scope} resumed after {resumption.before}"
    if resumption.refused:
        yield f"I20 a cursor was refused, {resumption.refused}: {name}"
        return
    for wrong in _compared(rest, places(resumption.events), name):
        yield f"I20 {wrong}"


def torn(reading: Reading, batches: Iterable[Batch]) -> Iterator[str]:
    """I21: the events of one call follow each other, in one response unless that says that they go
    on.
    """
    if reading.scope.kind == "user":
        return
    responses = reading.responses
    at = {
        (event.conversation_id, event.sequence): (n, event.version)
        for n, response in enumerate(responses)
        for event in response.events
        if event.type == Event.TYPE_MESSAGE_CREATED
    }
    for batch in batches:
        found = [at[key] for each in batch.sequences if (key := (batch.conversation, each)) in at]
        for (one, version), (other, following) in itertools.pairwise(found):
            if following != version + 1:
                yield f"I21 a call's events are versions {version} and {following}: {batch}"
            if one != other and not responses[one].incomplete:
                yield f"I21 a call's events are in two responses: {batch}"


def caught_up_again(reading: Reading) -> Iterator[str]:
    """I22: a stream says once at most that it has caught up."""
    for stream in reading.streams:
        if sum(response.caught_up for response in stream) > 1:
            yield f"I22 caught up twice: {reading.scope}"


class Copy:
    """What somebody knows who has only the events: the latest resource of each kind and id."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.conversations: dict[str, Conversation] = {}
        self.participants: dict[tuple[str, str], Participant] = {}
        self.messages: dict[tuple[str, int], Message] = {}
        self.versions: dict[str, int] = defaultdict(int)
        # By the facts alone: who is what where, and whose last change did not begin there.
        self.standing: dict[tuple[str, str], int] = defaultdict(int)
        self.leaps: list[Event] = []
        for event in events:
            self._apply(event)

    def _apply(self, event: Event) -> None:
        id = event.conversation_id
        self.versions[id] = max(self.versions[id], event.version)
        if event.HasField("conversation"):
            self.conversations[id] = event.conversation
        if event.HasField("participant"):
            self.participants[id, event.user_id] = event.participant
        if event.HasField("message"):
            self.messages[id, event.sequence] = event.message
        if event.type == Event.TYPE_PARTICIPANT_CHANGED:
            if self.standing[id, event.user_id] != event.previous_status:
                self.leaps.append(event)
            self.standing[id, event.user_id] = event.status


def unfaithful(events: Iterable[Event], states: Iterable[State]) -> Iterator[str]:
    """I23: whoever replays the events has what Get and List show, and the facts tell the same."""
    copy = Copy(events)
    for event in copy.leaps:
        yield f"{_name(event)} begins elsewhere than the one before ended"
    for state in states:
        seen, id = state.conversation, state.conversation.id
        copied = copy.conversations.get(id, Conversation())
        if copy.versions[id] != seen.version:
            yield f"{id} is at version {seen.version}, not {copy.versions[id]}"
        if (copied.title, copied.slug, copied.etag) != (seen.title, seen.slug, seen.etag):
            yield f"{id} is\n{seen}\nnot\n{copied}"
        if copied.HasField("delete_time") != seen.HasField("delete_time"):
            yield f"{id} is deleted, or not"
        for message in state.messages:
            # One that was told of while the conversation was deleted came without itself.
            if copy.messages.get((id, message.sequence), message) != message:
                yield f"message {message.sequence} of {id} is\n{message}"
        for participant in state.participants:
            own = Participant()
            own.CopyFrom(copy.participants.get((id, participant.user_id), Participant()))
            # Who sends has read: that is told by the message alone.
            own.last_read_sequence = participant.last_read_sequence
            if own != participant:
                yield f"{participant.user_id} in {id} is\n{participant}\nnot\n{own}"
            if copy.standing[id, participant.user_id] != participant.status:
                yield f"{participant.user_id} in {id} is {participant.status} by the facts, too"


def _compared(wanted: Sequence[Due], got: Sequence[Due], name: str) -> Iterator[str]:
    if got == wanted:
        return
    there = Counter((place.conversation, place.version) for place in got)
    shown = {(place.conversation, place.version): place.is_shown for place in got}
    due_there = {(place.conversation, place.version): place.is_shown for place in wanted}
    twice = [key for key, count in there.items() if count > 1]
    missed = [key for key in due_there if not there[key]]
    strange = [key for key in there if key not in due_there]
    leaked = [key for key in due_there if shown.get(key) and not due_there[key]]
    kept = [key for key in due_there if due_there[key] and shown.get(key) is False]
    for number, what, keys in (
        ("I19", "missed", missed),
        ("I19", "twice", twice),
        ("I14", "not its to be told of", strange),
        ("I13", "shown", leaked),
        ("I13", "withheld", kept),
    ):
        if keys:
            yield f"{number} {what}: {len(keys)} of {len(wanted)}, as {keys[:3]}: {name}"
    if not (twice or missed or strange or leaked or kept):
        first = next(
            n for n, (one, other) in enumerate(zip(got, wanted, strict=True)) if one != other
        )
        yield f"I19 out of order: {got[first]} before {wanted[first]}: {name}"


def _is_departure(event: Event, user: str) -> bool:
    return (
        event.type == Event.TYPE_PARTICIPANT_CHANGED
        and event.user_id == user
        and event.status in DEPARTED
    )


def _is_hidden(event: Event, first: int) -> bool:
    is_said = Event.Type.Name(event.type).startswith("TYPE_MESSAGE_")
    return is_said and event.sequence < first


def _name(event: Event) -> str:
    return f"version {event.version} of {event.conversation_id} ({Event.Type.Name(event.type)})"
