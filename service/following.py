"""Reading the change feed, for as many readers at a time as come.

Facts are read first, then what each reader may see, then what the facts are about: so a resource is
at least as new as its event, and nothing that came after the reader's rights were taken away is
shown.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
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
    Head,
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
# How many may share a page of history, and one of what is new: all the watches there are.
MAX_SHARED, MAX_TOLD = 200, 2_000

Person = tuple[UUID, UUID | None]
Views = dict[Person, Row | None]


@dataclass(frozen=True, slots=True)
class Ask:
    """What to read, after which place, for whom, and how many events and bytes at the most; and in
    which era of the database that place was one.
    """

    subject: Subject
    place: Place
    actor_id: UUID | None
    limit: int
    era: int
    byte_limit: int = MAX_RESPONSE_BYTES


@dataclass(frozen=True)
class Page:
    """Events that go together into one response, and the place after them. All who stand at the
    same place and see the same share one.
    """

    events: Sequence[wire.Event]
    place: Place
    caught_up: bool
    incomplete: bool = False
    # How many facts they tell of: those that are withheld go together.
    count: int = 0

    @cached_property
    def encoded(self) -> bytes:
        """The events on the wire, as part of a response: made once, however many get it."""
        return wire.watched(self.events, incomplete=self.incomplete)


class Follower:
    """Reads the log for those who ask for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # A page of history is heavy: two at a time, so that connections are left for others. Those
        # who stand at the same place share one: 200 were told of 500 messages in 4 s, one by one.
        self._history = Batcher(self._read_page, max_items=MAX_SHARED, alike=_stand, concurrency=2)
        # What is new is little, and the same for many.
        self._news = Batcher(self._read, max_items=MAX_TOLD)
        # Many come back at once, to the same conversations.
        self._heads = Batcher(self._find_heads)

    async def head(self, conversation_id: UUID | None) -> Head:
        """How far the log goes, of one conversation or (None) of all."""
        return await self._heads.submit(conversation_id)

    async def read(self, ask: Ask) -> Page:
        """The next page; raises for who may not see any more."""
        while not (page := await self._history.submit(ask)):
            pass
        return page

    async def read_new(self, ask: Ask) -> Page:
        """The same, for one of many who stand at the end of the log."""
        return await self._news.submit(ask)

    async def news(self, asks: Sequence[Ask]) -> list[Page | ParleyError | None]:
        """The same for all of them at once; None for whom there is nothing new."""
        async with self._store.snapshot() as snapshot:
            stretches = await _stretches(snapshot, asks)
            moved = [n for n, ask in enumerate(asks) if stretches[n].end != ask.place]
            told = await _tell(snapshot, [asks[n] for n in moved], [stretches[n] for n in moved])
        news: list[Page | ParleyError | None] = [None] * len(asks)
        for n, page in zip(moved, told, strict=True):
            news[n] = page
        return news

    async def era(self) -> int:
        """In which era the database is."""
        async with self._store.snapshot() as snapshot:
            return await snapshot.feed.era()

    async def _find_heads(self, ids: list[UUID | None]) -> list[Head]:
        async with self._store.snapshot() as snapshot:
            found = {id: await snapshot.feed.now(id) for id in set(ids)}
        return [found[id] for id in ids]

    async def _read_page(self, asks: list[Ask]) -> list[Page | ParleyError | None]:
        """One page, for the first and all who see the same there; None for the others: what they
        see would take room in its response.
        """
        async with self._store.snapshot() as snapshot:
            stretches = await _stretches(snapshot, asks)
            views = await _views(snapshot, asks, stretches)
            sights = [_sight(ask, views) for ask in asks]
            same = [sight == sights[0] for sight in sights]
            told = iter(
                await _tell(
                    snapshot, list(compress(asks, same)), list(compress(stretches, same)), views
                )
            )
        return [next(told) if is_same else None for is_same in same]

    async def _read(self, asks: list[Ask]) -> list[Page | ParleyError]:
        async with self._store.snapshot() as snapshot:
            return await _tell(snapshot, asks, await _stretches(snapshot, asks))


async def _tell(
    snapshot: Snapshot,
    asks: Sequence[Ask],
    stretches: Sequence[Stretch],
    views: Views | None = None,
) -> list[Page | ParleyError]:
    """What each is told of what follows its place."""
    if views is None:
        views = await _views(snapshot, asks, stretches)
    reached = await _within_reach(snapshot, asks, stretches, views)
    # One of those who see the same stands for all of them.
    numbers: dict[Hashable, int] = {}
    readings: list[Reading] = []
    outcomes: list[int | ParleyError] = []
    for ask, stretch in zip(asks, reached, strict=True):
        if isinstance(stretch, ParleyError):
            outcomes.append(stretch)
            continue
        number = numbers.setdefault(_sight(ask, views), len(readings))
        if number == len(readings):
            readings.append((ask, stretch))
        outcomes.append(number)
    people = await _people(snapshot, [stretch for _, stretch in readings])
    messages = await _messages(snapshot, readings, views)
    made: dict[tuple[UUID, int, UUID | None], wire.Event] = {}
    pages = [_page(ask, stretch, views, people, messages, made) for ask, stretch in readings]
    # On the same connection: none leads from one database to another.
    known = (fact["present_era"] for stretch in stretches for fact in stretch.facts)
    era = next(known, None) or await snapshot.feed.era()
    return [
        expired() if ask.era != era else pages[found] if isinstance(found, int) else found
        for ask, found in zip(asks, outcomes, strict=True)
    ]


Reading = tuple[Ask, Stretch]
# By (conversation, actor, sequence): None where the actor may not read it.
Messages = dict[tuple[UUID, UUID | None, int], Row | None]


async def _stretches(snapshot: Snapshot, asks: Sequence[Ask]) -> list[Stretch]:
    """What follows each ask's place; read once for all who stand at the same."""
    limit = max(ask.limit for ask in asks) + 1
    narrow: dict[tuple[UUID, int], Place] = {}
    wide: dict[Place, set[UUID | None]] = {}
    for ask in asks:
        if id := ask.subject.conversation_id:
            narrow[id, ask.place.version] = ask.place
        else:
            wide.setdefault(ask.place, set()).add(ask.subject.user_id)

    found: dict[tuple[UUID | None, Place | int], Stretch] = {}
    logs = await snapshot.feed.of_conversations(list(narrow), limit=limit) if narrow else []
    for (key, place), facts in zip(narrow.items(), logs, strict=True):
        found[key] = _stretch(place, facts, limit)
    for place, user_ids in wide.items():
        if None in user_ids:
            facts = await snapshot.feed.of_everything(place, limit=limit)
            found[None, place] = _stretch(place, facts, limit)
        if users := [user_id for user_id in user_ids if user_id]:
            # Of few, each may have far to go; of many, each gets all that is looked through.
            scanned = min(MAX_SCANNED, max(MIN_SCANNED, MAX_FACTS // len(users)))
            each = await snapshot.feed.of_users(place, users, scanned=scanned)
            found |= {(user_id, place): stretch for user_id, stretch in each.items()}
    return [
        found[id, ask.place.version]
        if (id := ask.subject.conversation_id)
        else found[ask.subject.user_id, ask.place]
        for ask in asks
    ]


def _stretch(place: Place, facts: list[Row], limit: int) -> Stretch:
    return Stretch(facts, Place.of(facts[-1]) if facts else place, len(facts) < limit)


async def _views(snapshot: Snapshot, asks: Sequence[Ask], stretches: Sequence[Stretch]) -> Views:
    """What each reader may see of the conversations that its events are of."""
    keys: dict[Person, None] = {}
    for ask, stretch in zip(asks, stretches, strict=True):
        if ask.subject.conversation_id:
            keys[ask.subject.conversation_id, ask.actor_id] = None
        else:
            keys |= {(fact["conversation_id"], ask.actor_id): None for fact in stretch.facts}
    found = await snapshot.conversations.views(list(keys)) if keys else []
    return dict(zip(keys, found, strict=True))


async def _within_reach(
    snapshot: Snapshot, asks: Sequence[Ask], stretches: Sequence[Stretch], views: Views
) -> list[Stretch | ParleyError]:
    """Of a conversation, what happened until the reader went, if it did; it is told when that is
    all.
    """
    gone = {
        (ask.subject.conversation_id, ask.actor_id)
        for ask in asks
        if ask.subject.conversation_id and ask.actor_id
        if not is_whole(views[ask.subject.conversation_id, ask.actor_id])
    }
    if not gone:
        return list(stretches)
    departures = await snapshot.feed.departures(list(gone))
    reached: list[Stretch | ParleyError] = []
    for ask, stretch in zip(asks, stretches, strict=True):
        id = ask.subject.conversation_id
        if not id or not ask.actor_id or (id, ask.actor_id) not in gone:
            reached.append(stretch)
        elif views[id, ask.actor_id] is None:
            reached.append(NotFound("conversation", id))
        elif ask.place.version >= (last := departures.get((id, ask.actor_id), 0)):
            reached.append(PermissionDenied("ACCESS_LOST"))
        else:
            facts = [fact for fact in stretch.facts if fact["version"] <= last]
            end = Place.of(facts[-1]) if facts else ask.place
            reached.append(Stretch(facts, end, is_last=False))
    return reached


def _stand(ask: Ask) -> Hashable:
    """Where the ask's reader stands, and how far it wants to go."""
    return ask.subject, ask.place, ask.limit, ask.byte_limit


def _sight(ask: Ask, views: Views) -> Hashable:
    """What the ask's page depends on: whoever has the same is told the same."""
    id = ask.subject.conversation_id
    if id is None:
        return ask.subject, ask.place, ask.actor_id, ask.limit, ask.byte_limit
    view = views[id, ask.actor_id]
    sees: Hashable = ask.actor_id
    if ask.actor_id is not None and view is not None and is_whole(view):
        sees = _window(view)
    return id, ask.place.version, sees, ask.limit, ask.byte_limit


def _window(view: Row) -> tuple[int, int, UUID | None]:
    """What the view's actor may read of the conversation."""
    return view["first_sequence"], view["final_sequence"], view["shown_message_id"]


async def _people(snapshot: Snapshot, stretches: Iterable[Stretch]) -> dict[tuple[UUID, UUID], Row]:
    """The participants that the events are about."""
    wanted = {
        (fact["conversation_id"], fact["user_id"])
        for stretch in stretches
        for fact in stretch.facts
        if fact["type"] in PARTICIPANT_EVENTS
    }
    return await snapshot.feed.participants(list(wanted)) if wanted else {}


async def _messages(snapshot: Snapshot, readings: Sequence[Reading], views: Views) -> Messages:
    """The messages that the events are about, in the order of events, as far as they are seen.

    Those who see the same of a conversation share one look-up.
    """
    wanted: dict[Hashable, tuple[Row, int]] = {}
    shared: dict[tuple[UUID, UUID | None, int], Hashable] = {}
    for ask, stretch in readings:
        for fact in stretch.facts[: ask.limit]:
            view = views[fact["conversation_id"], ask.actor_id]
            if view is None or fact["type"] not in MESSAGE_EVENTS:
                continue
            key = (view["id"], fact["sequence"], _window(view))
            wanted[key] = (view, fact["sequence"])
            shared[view["id"], ask.actor_id, fact["sequence"]] = key
    if not wanted:
        return {}
    # No more than their pages take together, nor more than one response.
    byte_limit = min(MAX_RESPONSE_BYTES, sum(ask.byte_limit for ask, _ in readings))
    rows = await snapshot.feed.messages(list(wanted.values()), byte_limit=byte_limit)
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
    count, incomplete = fitting(stretch.facts, sizes, limit=limit, byte_limit=ask.byte_limit)
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
        count=count,
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
