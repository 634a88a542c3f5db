"""Reading the change feed, for as many readers at a time as come.

Facts are read first, then what each reader may see, then what the facts are about: so a resource is
at least as new as its event, and nothing that came after the reader's rights were taken away is
shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from service import wire
from service.batcher import Batcher
from service.errors import NotFound, ParleyError, PermissionDenied
from service.paging import MAX_RESPONSE_BYTES
from service.repositories.base import Row
from service.repositories.feed import MAX_SCANNED, Stretch
from service.rules.feed import (
    MESSAGE_EVENTS,
    PARTICIPANT_EVENTS,
    Place,
    Subject,
    expired,
    fitting,
    is_whole,
    told,
)
from service.store import Snapshot, Store

# What a withheld event weighs, and what an event's place in a response adds to it.
ENVELOPE_BYTES = 64
# Of a message that was not looked up, since there are too many bytes before it.
UNKNOWN = float("inf")
# How many events are looked through for how many users.
MIN_SCANNED, MAX_FACTS = 100, 20_000

Person = tuple[UUID, UUID | None]


@dataclass(frozen=True, slots=True)
class Ask:
    """What to read, after which place, for whom, and how many events at the most; and in which era
    of the database that place was one.
    """

    subject: Subject
    place: Place
    actor_id: UUID | None
    limit: int
    era: int


@dataclass(frozen=True, slots=True)
class Page:
    """Events that go together into one response, and the place after them."""

    events: Sequence[wire.Event]
    place: Place
    caught_up: bool
    incomplete: bool


class Follower:
    """Reads the log for those who ask for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # A page of history is heavy: two at a time, so that connections are left for others.
        self._history = Batcher(self._read, max_items=1, concurrency=2)
        # What is new is little, and the same for many.
        self._news = Batcher(self._read, max_items=2_000)

    async def read(self, ask: Ask) -> Page:
        """The next page; raises for who may not see any more."""
        return await self._history.submit(ask)

    async def read_new(self, ask: Ask) -> Page:
        """The same, for one of many who wait at the end of the log."""
        return await self._news.submit(ask)

    async def _read(self, asks: list[Ask]) -> list[Page | ParleyError]:
        async with self._store.snapshot() as snapshot:
            stretches = await _stretches(snapshot, asks)
            views = await _views(snapshot, asks, stretches)
            stretches = await _within_reach(snapshot, asks, stretches, views)
            people = await _people(snapshot, stretches)
            messages = await _messages(snapshot, asks, stretches, views)
            # On the same connection: none leads from one database to another.
            era = await snapshot.feed.era()
        made: dict[tuple[UUID, int, UUID | None], wire.Event] = {}
        pages: list[Page | ParleyError] = []
        for ask, stretch in zip(asks, stretches, strict=True):
            if ask.era != era:
                pages.append(expired())
            elif isinstance(stretch, ParleyError):
                pages.append(stretch)
            else:
                pages.append(_page(ask, stretch, views, people, messages, made))
        return pages


Stretches = list[Stretch | ParleyError]
Views = dict[Person, Row | None]
# By (conversation, actor, sequence): None where the actor may not read it.
Messages = dict[tuple[UUID, UUID | None, int], Row | None]


async def _stretches(snapshot: Snapshot, asks: list[Ask]) -> Stretches:
    """What follows each ask's place; read once for all who stand at the same."""
    found: dict[tuple[Subject, Place], Stretch] = {}
    limit = max(ask.limit for ask in asks) + 1
    wanted = {(ask.subject, ask.place) for ask in asks}
    narrow = [(s.conversation_id, place) for s, place in wanted if s.conversation_id]
    logs = await snapshot.feed.of_conversations(narrow, limit=limit) if narrow else []
    for (id, place), facts in zip(narrow, logs, strict=True):
        found[Subject(conversation_id=id), place] = _stretch(place, facts, limit)
    for place in {place for _, place in wanted}:
        if (Subject(), place) in wanted:
            facts = await snapshot.feed.of_everything(place, limit=limit)
            found[Subject(), place] = _stretch(place, facts, limit)
        users = [s.user_id for s, at in wanted if s.user_id and at == place]
        if users:
            # Of few, each may have far to go; of many, each gets all that is looked through.
            scanned = min(MAX_SCANNED, max(MIN_SCANNED, MAX_FACTS // len(users)))
            each = await snapshot.feed.of_users(place, users, scanned=scanned)
            found |= {(Subject(user_id=id), place): stretch for id, stretch in each.items()}
    return [found[ask.subject, ask.place] for ask in asks]


def _stretch(place: Place, facts: list[Row], limit: int) -> Stretch:
    return Stretch(facts, Place.of(facts[-1]) if facts else place, len(facts) < limit)


async def _views(snapshot: Snapshot, asks: list[Ask], stretches: Stretches) -> Views:
    """What each reader may see of the conversations that its events are of."""
    keys = {
        (fact["conversation_id"], ask.actor_id): None
        for ask, stretch in zip(asks, stretches, strict=True)
        if isinstance(stretch, Stretch)
        for fact in stretch.facts
    } | {
        (ask.subject.conversation_id, ask.actor_id): None
        for ask in asks
        if ask.subject.conversation_id
    }
    found = await snapshot.conversations.views(list(keys)) if keys else []
    return dict(zip(keys, found, strict=True))


async def _within_reach(
    snapshot: Snapshot, asks: list[Ask], stretches: Stretches, views: Views
) -> Stretches:
    """Of a conversation, what happened until the reader went, if it did; it is told when that is
    all.
    """
    gone = {
        (ask.subject.conversation_id, ask.actor_id)
        for ask in asks
        if ask.subject.conversation_id and ask.actor_id
        if not is_whole(views[ask.subject.conversation_id, ask.actor_id])
    }
    departures = await snapshot.feed.departures(list(gone)) if gone else {}
    reached: Stretches = []
    for ask, stretch in zip(asks, stretches, strict=True):
        id = ask.subject.conversation_id
        if not id or not ask.actor_id or (id, ask.actor_id) not in gone:
            reached.append(stretch)
        elif views[id, ask.actor_id] is None:
            reached.append(NotFound("conversation", id))
        elif ask.place.version >= (last := departures.get((id, ask.actor_id), 0)):
            reached.append(PermissionDenied("ACCESS_LOST"))
        elif isinstance(stretch, Stretch):
            facts = [fact for fact in stretch.facts if fact["version"] <= last]
            end = Place.of(facts[-1]) if facts else ask.place
            reached.append(Stretch(facts, end, is_last=False))
    return reached


async def _people(snapshot: Snapshot, stretches: Stretches) -> dict[tuple[UUID, UUID], Row]:
    """The participants that the events are about."""
    wanted = {
        (fact["conversation_id"], fact["user_id"])
        for stretch in stretches
        if isinstance(stretch, Stretch)
        for fact in stretch.facts
        if fact["type"] in PARTICIPANT_EVENTS
    }
    return await snapshot.feed.participants(list(wanted)) if wanted else {}


async def _messages(
    snapshot: Snapshot, asks: list[Ask], stretches: Stretches, views: Views
) -> Messages:
    """The messages that the events are about, in the order of events, as far as they are seen.

    Those who see the same of a conversation share one look-up.
    """
    wanted: dict[tuple[UUID, int, int, int, UUID | None], tuple[Row, int]] = {}
    shared: dict[tuple[UUID, UUID | None, int], tuple[UUID, int, int, int, UUID | None]] = {}
    for ask, stretch in zip(asks, stretches, strict=True):
        for fact in stretch.facts[: ask.limit] if isinstance(stretch, Stretch) else ():
            view = views[fact["conversation_id"], ask.actor_id]
            if view is None or fact["type"] not in MESSAGE_EVENTS:
                continue
            window = (view["first_sequence"], view["final_sequence"], view["shown_message_id"])
            key = (view["id"], fact["sequence"], *window)
            wanted[key] = (view, fact["sequence"])
            shared[view["id"], ask.actor_id, fact["sequence"]] = key
    if not wanted:
        return {}
    rows = await snapshot.feed.messages(list(wanted.values()), byte_limit=MAX_RESPONSE_BYTES)
    found = dict(zip(wanted, rows, strict=True))
    return {reader: found[key] for reader, key in shared.items()}


def _page(
    ask: Ask,
    stretch: Stretch,
    views: Views,
    people: dict[tuple[UUID, UUID], Row],
    messages: Messages,
    made: dict[tuple[UUID, int, UUID | None], wire.Event],
) -> Page:
    """As much of the stretch as one response takes. `made` is shared: an event is made once for all
    who see the same of it.
    """
    events: list[wire.Event | None] = []
    sizes: list[float] = []
    for fact in stretch.facts[: ask.limit]:
        view = views[fact["conversation_id"], ask.actor_id]
        said = None
        if fact["type"] in MESSAGE_EVENTS:
            said = messages.get((fact["conversation_id"], ask.actor_id, fact["sequence"]))
        if said is not None and said["id"] is None:
            sizes.append(UNKNOWN)
            break
        if not _is_visible(fact, ask.actor_id, view, said):
            events.append(None)
            sizes.append(ENVELOPE_BYTES)
            continue
        key = (fact["conversation_id"], fact["version"], None if is_whole(view) else ask.actor_id)
        if key not in made:
            made[key] = _event(fact, ask.actor_id, view, people, said)
        events.append(made[key])
        sizes.append(made[key].ByteSize() + ENVELOPE_BYTES)
    limit = min(ask.limit, len(sizes))
    count, incomplete = fitting(stretch.facts, sizes, limit=limit, byte_limit=MAX_RESPONSE_BYTES)
    is_all = count == len(stretch.facts)
    facts = stretch.facts[:count]
    return Page(
        events=[
            events[n] or wire.withheld(facts[n], through)
            for n, through in told(facts, [event is not None for event in events[:count]])
        ],
        place=stretch.end if is_all else Place.of(facts[-1]) if facts else ask.place,
        caught_up=is_all and stretch.is_last,
        incomplete=incomplete or (is_all and stretch.is_cut),
    )


def _is_visible(fact: Row, actor_id: UUID | None, view: Row | None, said: Row | None) -> bool:
    """Whether the reader may know what happened: a message's events are shown with the message."""
    if actor_id is None or (fact["type"] in PARTICIPANT_EVENTS and fact["user_id"] == actor_id):
        return True
    return view is not None and (fact["type"] not in MESSAGE_EVENTS or said is not None)


def _event(
    fact: Row,
    actor_id: UUID | None,
    view: Row | None,
    people: dict[tuple[UUID, UUID], Row],
    said: Row | None,
) -> wire.Event:
    """The event with what it is about, as far as the reader would be shown that by Get."""
    if view is None:
        return wire.event(fact)
    if fact["type"] in MESSAGE_EVENTS:
        return wire.event(fact, said=said if view["deleted_at"] is None else None)
    if fact["type"] in PARTICIPANT_EVENTS:
        shown = is_whole(view) or fact["user_id"] == actor_id
        person = people.get((fact["conversation_id"], fact["user_id"]))
        return wire.event(fact, person=person if shown else None)
    return wire.event(fact, view=view)
