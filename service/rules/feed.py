"""The change feed, decided: where a reader is in the log, how much it is given at a time, and how
what it may not see is told.

Facts (rows of `events`) come in as mappings, oldest first. Those that one call made in one
conversation bear the same transaction id and follow each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import inf
from typing import Any
from uuid import UUID

from service.domain import EventType, ParticipantStatus
from service.errors import OutOfRange

Fact = Mapping[str, Any]

MESSAGE_EVENTS = frozenset(type for type in EventType if type.startswith("MESSAGE_"))
PARTICIPANT_EVENTS = frozenset({EventType.PARTICIPANT_CHANGED, EventType.READ_CURSOR_MOVED})


@dataclass(frozen=True, slots=True)
class Subject:
    """What is read: one conversation, one user, or (neither) everything."""

    conversation_id: UUID | None = None
    user_id: UUID | None = None

    @property
    def is_wide(self) -> bool:
        return self.conversation_id is None


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """An event in the log: it and all before it are behind. As it is now, before the first.

    Places compare as the log is ordered. Only an event that was read makes a place, never a mere
    transaction id: after a crash PostgreSQL gives those out anew that left no trace.
    """

    era: int
    xid: int
    conversation_id: UUID
    version: int

    @classmethod
    def of(cls, fact: Fact) -> "Place":
        return cls(fact["era"], int(fact["xid"]), fact["conversation_id"], fact["version"])


BEGINNING = Place(0, 0, UUID(int=0), 0)


@dataclass(frozen=True, slots=True)
class Head:
    """How far the log goes: the database's present era, its newest event that can be read, and the
    first transaction id that it has not given out.
    """

    era: int
    newest: Place
    end_xid: int


class Horizon:
    """How long the oldest transaction that still runs has held up what lies beyond it."""

    def __init__(self) -> None:
        self._oldest = 0
        self._since = 0.0

    def age(self, oldest_xid: int, end_xid: int, *, at: float) -> float:
        """Seconds, as far as anybody has looked; `at` is the time of this look. `end_xid`: the one
        that has not ended, and after which none has.
        """
        # Nothing has been written beyond it: nothing is held up.
        if oldest_xid == end_xid or oldest_xid != self._oldest:
            self._oldest, self._since = oldest_xid, at
        return at - self._since


def require_present(place: Place, *, era: int, head: Head, subject: Subject) -> None:
    """Raise for a cursor that was made in another life of the database, or in its future."""
    if subject.is_wide:
        is_future = (place.era, place.xid) >= (head.era, head.end_xid)
    else:
        is_future = place.version > head.newest.version
    if era != head.era or is_future:
        raise expired()


def expired() -> OutOfRange:
    """The error for a place in another life of the database."""
    return OutOfRange("CURSOR_EXPIRED", field="resume_cursor")


def fitting(
    facts: Sequence[Fact], sizes: Sequence[float], *, limit: int, byte_limit: int
) -> tuple[int, bool]:
    """How many of the facts go into one response, and whether that cuts through what one call made.

    `sizes` are those of the first facts, at least of as many as `limit`: one that is infinite goes
    into none. A call's events stay together, unless they alone are too much.
    """
    count, total = 0, 0.0
    for size in sizes[:limit]:
        total += size
        if total > byte_limit and (count or size == inf):
            break
        count += 1
    if count in (0, len(facts)):
        return count, False
    cut = sum(1 for _ in takewhile(lambda fact: _same(fact, facts[count]), facts[count - 1 :: -1]))
    return (count - cut, False) if cut < count else (count, True)


def _same(one: Fact, other: Fact) -> bool:
    """Whether one transaction made both in one conversation."""
    return all(one[name] == other[name] for name in ("conversation_id", "era", "xid"))


def told(facts: Sequence[Fact], visible: Sequence[bool]) -> list[tuple[int, int]]:
    """What is told of the facts: of a visible one its position, and 0; of those between, the first
    one's position and the last one's version, as long as they follow each other.
    """
    events: list[tuple[int, int]] = []
    for n, fact in enumerate(facts):
        if visible[n]:
            events.append((n, 0))
            continue
        first, through = events[-1] if events else (n, 0)
        follows = facts[first]["conversation_id"] == fact["conversation_id"]
        if through and follows and through + 1 == fact["version"]:
            events[-1] = (first, fact["version"])
        else:
            events.append((n, fact["version"]))
    return events


def is_whole(view: Mapping[str, Any] | None) -> bool:
    """Whether the conversation, and everybody in it, is shown as to any other who is joined."""
    return view is not None and (
        view["actor_id"] is None or view["status"] == ParticipantStatus.JOINED
    )
