"""Watching the change feed: history first, then what comes, with nothing lost in between.

A watcher is a place in the log and nothing else: it reads from there, waits until there is more,
and reads again. So there is no seam between history and the present, nothing queues for a reader
that is slow, and no connection is held while a response is under way.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from uuid import UUID

import structlog

from service.doorbell import Doorbell
from service.errors import Aborted, ParleyError, ResourceExhausted, Unavailable
from service.following import Ask, Follower, Page
from service.ids import lock_of
from service.metrics import DELIVERED, WATCHES
from service.paging import MAX_RESPONSE_BYTES
from service.rules.feed import Place, Subject, expired
from service.store import Store

log = structlog.get_logger()

MAX_WATCHES = 2_000
MAX_WATCHES_OF_ACTOR = 32
# A page waits in memory, several times over, until its reader takes it: a small one, unless a call
# made more at once; with 1,000 participants that is no more than the larger number.
EVENTS, PAGE_BYTES = 250, 64 << 10
MAX_EVENTS = 1_100
HEARTBEAT_SECONDS = 15.0
# A ring may be lost, and the horizon moves without one.
POLL_SECONDS = 0.1
# Between two looks: what happens meanwhile is seen together.
GATHER_SECONDS = 0.005
# How long the database may be away before a watch ends.
PATIENCE_SECONDS = 5.0
RETRY_SECONDS = 0.1


class Waiter:
    """Somebody who has read everything up to a place, and waits for more, or until it is due.

    `seen`: how often it had rung when it was last looked for news.
    """

    __slots__ = ("ask", "due", "seen", "told")

    def __init__(self, ask: Ask, *, due: float, seen: int) -> None:
        self.ask = ask
        self.due = due
        self.seen = seen
        # None: whoever waits reads for itself.
        self.told: asyncio.Future[Page | None] = asyncio.get_running_loop().create_future()

    def tell(self, news: Page | ParleyError | None) -> None:
        if self.told.done():
            return
        if isinstance(news, ParleyError):
            self.told.set_exception(news)
        else:
            self.told.set_result(news)


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
        # There is one.
        self._watched = asyncio.Event()
        # By the lock of the conversation that they follow; those who follow more, under None.
        self._waiting: defaultdict[int | None, set[Waiter]] = defaultdict(set)

    @property
    def count(self) -> int:
        """How many watches there are."""
        return self._watches.total()

    async def follow(
        self, subject: Subject, place: Place, actor_id: UUID | None, era: int, *, is_new: bool
    ) -> AsyncGenerator[tuple[Page, bool], None]:
        """What happened after the place, and what happens from now on, until the reader may not
        see any more, or the era ends; with the page that catches up, True. One without events is a
        heartbeat.

        `is_new`: the place is the end of the log, or was a moment ago.
        """
        ask = Ask(subject, place, actor_id, EVENTS, era, PAGE_BYTES)
        has_caught_up = False
        with self._counted(actor_id):
            due = time.monotonic() + self._heartbeat
            waiter = Waiter(ask, due=due, seen=self._doorbell.rings)
            read = self._follower.read_new if is_new else self._follower.read
            page = await _patiently(read, ask)
            while True:
                if page.incomplete:
                    whole = replace(ask, limit=MAX_EVENTS, byte_limit=MAX_RESPONSE_BYTES)
                    page = await _patiently(self._follower.read, whole)
                catches_up = page.caught_up and not has_caught_up
                if page.events or catches_up or time.monotonic() >= due - POLL_SECONDS:
                    DELIVERED.inc(len(page.events))
                    yield page, catches_up
                    has_caught_up |= catches_up
                    due = time.monotonic() + self._heartbeat
                # Of a history of large messages, not many more than the next page takes.
                limit = EVENTS if page.caught_up else min(EVENTS, 2 * page.count + 8)
                ask = replace(ask, place=page.place, limit=limit)
                if page.caught_up:
                    waiter = Waiter(ask, due=due, seen=waiter.seen)
                    page = await self._news(waiter)
                else:
                    waiter.seen = self._doorbell.rings
                    page = await _patiently(self._follower.read, ask)

    async def run(self) -> None:
        """Tell those who wait what there is to read, as soon as there is."""
        due = 0.0
        while True:
            await self._watched.wait()
            where = await self._doorbell.wait(POLL_SECONDS)
            if where is None or time.monotonic() >= due:
                where, due = None, time.monotonic() + POLL_SECONDS
            try:
                if self._waiting:
                    await self._look(where)
            except ParleyError:
                # Whoever reads now finds out for how long the database is away.
                self._release()
                await asyncio.sleep(POLL_SECONDS)
            except Exception:
                log.exception("defect")
                # What is wrong may be wrong with one of them, who will be told so.
                self._release()
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.sleep(GATHER_SECONDS)

    def _beat(self) -> None:
        """Let those speak who would be silent for too long."""
        soon = time.monotonic() + POLL_SECONDS
        for each in self._at(self._waiting):
            if each.due <= soon:
                each.tell(Page((), each.ask.place, caught_up=True))

    async def _expire(self) -> None:
        """Tell those whose places are of a database that was since restored."""
        era = await self._follower.era()
        for each in self._at(self._waiting):
            if each.ask.era != era:
                each.tell(expired())

    def _release(self) -> None:
        for each in self._at(self._waiting):
            each.tell(None)

    def _at(self, locks: Iterable[int | None]) -> list[Waiter]:
        return [each for lock in locks for each in self._waiting.get(lock, ())]

    async def _look(self, where: set[int] | None) -> None:
        """Tell those who follow a conversation behind one of these locks (None: any), and those who
        follow more than one.
        """
        rings = self._doorbell.rings
        if where is None:
            self._beat()
            await self._expire()
        narrow = [lock for lock in self._waiting if lock is not None] if where is None else where
        concerned = [each for each in self._at(narrow) if not each.told.done()]
        wide = [each for each in self._at([None]) if not each.told.done()]
        if wide:
            concerned += await self._stirred(wide)
        if not concerned:
            return
        news = await self._follower.news([each.ask for each in concerned])
        for each, page in zip(concerned, news, strict=True):
            each.seen = rings
            if page:
                each.tell(page)

    async def _stirred(self, wide: list[Waiter]) -> list[Waiter]:
        """Those whom something may concern; the others' places move on."""
        concerned = []
        async with self._store.snapshot() as snapshot:
            for place in {each.ask.place for each in wide}:
                there = [each for each in wide if each.ask.place == place]
                users = {each.ask.subject.user_id for each in there}
                found = await snapshot.feed.stirred(place, [id for id in users if id])
                if not found:
                    continue
                end, user_ids = found
                for each in there:
                    if each.ask.subject.user_id in {None, *user_ids}:
                        concerned.append(each)
                    else:
                        each.ask = replace(each.ask, place=end)
        return concerned

    async def _news(self, waiter: Waiter) -> Page:
        """What comes after the waiter's place, once it does."""
        id = waiter.ask.subject.conversation_id
        lock = lock_of(id) if id else None
        self._waiting[lock].add(waiter)
        if waiter.seen != self._doorbell.rings:
            # What was committed since it has read was rung for before it waited.
            self._doorbell.nudge(*([lock] if lock is not None else []))
        try:
            told = await waiter.told
        finally:
            self._waiting[lock].discard(waiter)
            if not self._waiting[lock]:
                del self._waiting[lock]
        return told or await _patiently(self._follower.read_new, waiter.ask)

    @contextmanager
    def _counted(self, actor_id: UUID | None) -> Iterator[None]:
        if actor_id and self._watches[actor_id] >= MAX_WATCHES_OF_ACTOR:
            raise ResourceExhausted("RATE_LIMITED", subject="watches of this actor")
        if self.count >= MAX_WATCHES:
            raise ResourceExhausted("RATE_LIMITED", subject="watches of this server")
        self._watches[actor_id] += 1
        self._heed()
        try:
            with WATCHES.track_inprogress():
                yield
        finally:
            self._watches[actor_id] -= 1
            if not self._watches[actor_id]:
                del self._watches[actor_id]
            self._heed()

    def _heed(self) -> None:
        """Look, and be rung for, while there is somebody to tell."""
        if not self.count:
            self._watched.clear()
            self._doorbell.listen(False)
        elif not self._watched.is_set():
            self._watched.set()
            self._doorbell.listen(True)


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
