"""Watching the change feed: history first, then what comes, with nothing lost in between.

A watcher is a place in the log and nothing else: it reads from there, waits until there is more,
and reads again. So there is no seam between history and the present, nothing queues for a reader
that is slow, and no connection is held while a response is under way.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from uuid import UUID

import structlog

from service.doorbell import Doorbell
from service.errors import Aborted, ParleyError, ResourceExhausted, Unavailable
from service.following import Ask, Follower, Page
from service.rules.feed import Place, Subject
from service.store import Store

log = structlog.get_logger()

MAX_WATCHES = 2_000
MAX_WATCHES_OF_ACTOR = 32
# More than one call can make: a conversation with 1,000 participants.
MAX_EVENTS = 1_100
HEARTBEAT_SECONDS = 15.0
# A ring may be lost, and the horizon moves without one.
POLL_SECONDS = 0.1
# Between two looks: what happens meanwhile is seen together.
GATHER_SECONDS = 0.005
# How long the database may be away before a watch ends.
PATIENCE_SECONDS = 5.0
RETRY_SECONDS = 0.1


@dataclass(slots=True, eq=False)
class Waiter:
    """Somebody who has read everything up to a place."""

    subject: Subject
    place: Place
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class Watching:
    """The watches of this process: one look at the log tells which of them have something to read.

    `heartbeat`: the longest silence, in seconds.
    """

    def __init__(
        self,
        store: Store,
        follower: Follower,
        doorbell: Doorbell,
        *,
        heartbeat: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._store = store
        self._follower = follower
        self._doorbell = doorbell
        self._heartbeat = heartbeat
        self._watches: Counter[UUID | None] = Counter()
        self._waiting: set[Waiter] = set()

    @property
    def count(self) -> int:
        """How many watches there are."""
        return self._watches.total()

    async def follow(
        self, subject: Subject, place: Place, actor_id: UUID | None, era: int
    ) -> AsyncGenerator[Page, None]:
        """What happened after the place, and what happens from now on, until the reader may not
        see any more, or the era ends. `caught_up` is True once; a page without events is a
        heartbeat.
        """
        ask = Ask(subject, place, actor_id, MAX_EVENTS, era)
        has_caught_up = False
        due = time.monotonic() + self._heartbeat
        read = self._follower.read
        with self._counted(actor_id):
            while True:
                page = await _patiently(read, ask)
                ask = replace(ask, place=page.place)
                catches_up = page.caught_up and not has_caught_up
                if page.events or catches_up or time.monotonic() >= due:
                    yield replace(page, caught_up=catches_up)
                    has_caught_up |= catches_up
                    due = time.monotonic() + self._heartbeat
                read = self._follower.read
                if page.caught_up:
                    ask = replace(ask, place=await self._wait(ask, due - time.monotonic()))
                    read = self._follower.read_new

    async def run(self) -> None:
        """Wake those for whom there is something to read, as soon as there is."""
        while True:
            await self._doorbell.wait(POLL_SECONDS)
            try:
                if self._waiting:
                    await self._look()
            except ParleyError:
                # Whoever reads now finds out for how long the database is away.
                for each in self._waiting:
                    each.woken.set()
                await asyncio.sleep(POLL_SECONDS)
            except Exception:
                log.exception("defect")
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.sleep(GATHER_SECONDS)

    async def _look(self) -> None:
        waiting = list(self._waiting)
        narrow = {(each.subject.conversation_id, each.place) for each in waiting}
        places = {each.place for each in waiting if each.subject.is_wide}
        async with self._store.snapshot() as snapshot:
            moved = await snapshot.feed.moved([(id, place) for id, place in narrow if id])
            stirred = {}
            for place in places:
                there = [each.subject.user_id for each in waiting if each.place == place]
                users = {user_id for user_id in there if user_id}
                stirred[place] = await snapshot.feed.stirred(place, users)
        for each in waiting:
            if not each.subject.is_wide:
                if each.subject.conversation_id in moved:
                    each.woken.set()
            elif found := stirred[each.place]:
                end, user_ids = found
                if each.subject.user_id in {None, *user_ids}:
                    each.woken.set()
                else:
                    each.place = end

    async def _wait(self, ask: Ask, seconds: float) -> Place:
        """Wait until there may be something to read, or so long; the place to read on from."""
        waiter = Waiter(ask.subject, ask.place)
        self._waiting.add(waiter)
        # What was committed since it has read was rung for before it waited.
        self._doorbell.nudge()
        try:
            await asyncio.wait_for(waiter.woken.wait(), max(seconds, 0))
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(waiter)
        return waiter.place

    @contextmanager
    def _counted(self, actor_id: UUID | None) -> Iterator[None]:
        if actor_id and self._watches[actor_id] >= MAX_WATCHES_OF_ACTOR:
            raise ResourceExhausted("RATE_LIMITED", subject="watches of this actor")
        if self.count >= MAX_WATCHES:
            raise ResourceExhausted("RATE_LIMITED", subject="watches of this server")
        self._watches[actor_id] += 1
        try:
            yield
        finally:
            self._watches[actor_id] -= 1
            if not self._watches[actor_id]:
                del self._watches[actor_id]


async def _patiently(read: Callable[[Ask], Awaitable[Page]], ask: Ask) -> Page:
    """The page, though the database may be away for a while."""
    limit = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await read(ask)
        except (Aborted, Unavailable):
            if time.monotonic() > limit:
                raise
            await asyncio.sleep(RETRY_SECONDS)
