"""Writing to conversations, many calls at a time, none waiting for another's conversation.

A batch writes to the conversations whose locks are free. What it finds taken, by a batch of another
process for the most part, it tries again with the next ones. A conversation whose lock stays taken
gets a lane of its own, which waits for it in a transaction that holds nothing else, while the other
conversations go on. (Without lanes, one conversation held for 2 s took all the others from
thousands of messages a second to none.)
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import compress
from typing import Generic, Protocol, TypeVar
from uuid import UUID

from service.batcher import Batcher
from service.errors import ParleyError
from service.identity import Call
from service.ids import lock_of
from service.store import Store, Transaction

# With 64 calls in flight, two batches of 32 take turns: one is at the database, the other one's
# callers are answered and come again. All 64 at once took turns with us.
MAX_BATCH_ITEMS, ENOUGH_ITEMS = 64, 32
MAX_BATCH_BYTES = 1 << 20
# Other processes' batches are over in milliseconds; a lane is a transaction for one conversation.
MAX_TRIES, PAUSE_SECONDS = 3, 0.003


class Concerning(Protocol):
    """What concerns one conversation."""

    @property
    def conversation_id(self) -> UUID: ...


Item = TypeVar("Item", bound=Concerning)
Outcome = TypeVar("Outcome")


class Busy:
    """The outcome of an item whose conversation somebody else is at: nothing came of it."""


class Overtaken(Busy):
    """The same, where somebody else was quicker, and is done."""


class Coalescer(Generic[Item, Outcome]):
    """Applies what it is given, in order of arrival within each conversation.

    `apply` is given a transaction that holds the locks of its items' conversations, and answers
    one outcome an item: an error is raised to its caller alone, what is busy is tried again.
    """

    def __init__(
        self,
        store: Store,
        apply: Callable[
            [Transaction, list[Item]], Awaitable[Sequence[Outcome | Busy | ParleyError]]
        ],
        *,
        name: str,
        apply_free: Callable[[list[Item]], Awaitable[Sequence[Outcome | Busy | ParleyError]]]
        | None = None,
        weigh: Callable[[Item], int] = lambda _: 0,
    ) -> None:
        """`name`: of its batches, in the metrics. `apply_free` does the same as `apply` for those
        items whose locks it finds free, in its own way.
        """
        self._store = store
        self._name = name
        self._apply = apply
        self._weigh = weigh
        self._fast = self._batcher(apply_free or self._apply_free)
        self._lanes: dict[UUID, Lane[Item, Outcome]] = {}

    async def submit(self, item: Item, call: Call) -> Outcome:
        """What came of the item, once it is committed."""
        tries = 0
        while True:
            lane = self._lanes.get(item.conversation_id)
            if lane and not lane.is_open:
                await lane.emptied.wait()
                continue
            if lane:
                outcome = await self._submit_in(lane, item, call)
            else:
                outcome = await self._fast.submit(item, is_wanted=call.is_wanted)
            if not isinstance(outcome, Busy):
                return outcome
            tries += 1
            if tries >= MAX_TRIES:
                if item.conversation_id not in self._lanes:
                    self._lanes[item.conversation_id] = self._new_lane()
            elif not isinstance(outcome, Overtaken):
                await asyncio.sleep(PAUSE_SECONDS)

    async def _submit_in(
        self, lane: "Lane[Item, Outcome]", item: Item, call: Call
    ) -> Outcome | Busy:
        lane.users += 1
        try:
            return await lane.batcher.submit(item, is_wanted=call.is_wanted)
        finally:
            lane.users -= 1
            if not lane.users:
                self._lanes.pop(item.conversation_id, None)
                lane.emptied.set()

    async def _apply_free(self, items: list[Item]) -> list[Outcome | Busy | ParleyError]:
        locks = [lock_of(item.conversation_id) for item in items]
        async with self._store.transaction(try_locks=set(locks)) as transaction:
            is_free = [lock in transaction.locks for lock in locks]
            ready = list(compress(items, is_free))
            outcomes = iter(await self._apply(transaction, ready) if ready else ())
        return [next(outcomes) if free else Busy() for free in is_free]

    async def _apply_waiting(
        self, lane: "Lane[Item, Outcome]", items: list[Item]
    ) -> Sequence[Outcome | Busy | ParleyError]:
        lock = lock_of(items[0].conversation_id)
        async with self._store.transaction(lock=lock) as transaction:
            lane.is_open = False
            return await self._apply(transaction, items)

    def _new_lane(self) -> "Lane[Item, Outcome]":
        lane: Lane[Item, Outcome] = Lane()
        lane.batcher = self._batcher(partial(self._apply_waiting, lane))
        return lane

    def _batcher(
        self, run: Callable[[list[Item]], Awaitable[Sequence[Outcome | Busy | ParleyError]]]
    ) -> Batcher[Item, Outcome | Busy]:
        return Batcher(
            run,
            max_items=MAX_BATCH_ITEMS,
            enough=ENOUGH_ITEMS,
            weigh=self._weigh,
            max_weight=MAX_BATCH_BYTES,
            name=self._name,
        )


class Lane(Generic[Item, Outcome]):
    """One busy conversation's queue.

    It takes in whoever comes until the lock is held, then empties for good; those who come
    meanwhile wait for that and go the fast way again, together with other conversations. (A lane
    that stayed open while anybody stood in it was never left under a steady load.)
    """

    batcher: Batcher[Item, Outcome | Busy]

    def __init__(self) -> None:
        self.users = 0
        self.is_open = True
        self.emptied = asyncio.Event()
