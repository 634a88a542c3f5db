"""Coalescing: while one batch runs, the next one gathers.

Calls that arrive together share one statement or one transaction, and each gets an outcome of its
own. There is no timer: a call that comes alone goes at once. A call never joins work that has
already begun, so what it is told was true after it asked.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.errors import Aborted, DeadlineExceeded, Unavailable, Unknown
from service.metrics import BATCH_ITEMS

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

PATIENCE = 12
# After so many batches of one, one after the other, nobody is waited for any more.
LONELY = 3

# What befalls a batch as a whole, whatever is in it. To try its items one by one would be to wait
# as many times as there are items for what did not come once.
SHARED = (Aborted, DeadlineExceeded, Unavailable, Unknown)


class Batcher(Generic[Item, Outcome]):
    """Hands gathered items to `run`, which returns one outcome an item, in order.

    An outcome that is an exception is raised to its own caller alone. If `run` itself raises
    for reasons that may lie in one item, each item is run again alone, so that only a poisoned one
    fails. A batch ends at `max_items`, or before its weights (by `weigh`) pass `max_weight`; its
    items are `alike`, which says the same of each. It begins once `enough` items wait, and takes
    half of those that wait if they are more: while it runs, the others are read and answered. At
    most `concurrency` batches run at once. Under a name their sizes are shown as metrics.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Outcome | Exception]]],
        *,
        max_items: int = 64,
        enough: int | None = None,
        weigh: Callable[[Item], int] = lambda _: 0,
        max_weight: int = 1,
        alike: Callable[[Item], Hashable] = lambda _: None,
        concurrency: int = 1,
        name: str = "",
    ) -> None:
        self._run = run
        self._sizes = BATCH_ITEMS.labels(name) if name else None
        self._max_items = max_items
        self._enough = enough or max_items
        self._weigh = weigh
        self._max_weight = max_weight
        self._alike = alike
        self._free = concurrency
        # How many batches of one there were since the last larger one.
        self._lone = 0
        self._waiting: deque[Waiting[Item, Outcome]] = deque()
        # The loop itself holds its tasks only weakly.
        self._batches: set[asyncio.Task[None]] = set()

    async def submit(self, item: Item, *, is_wanted: Callable[[], bool] = lambda: True) -> Outcome:
        """The outcome of this item. One that nobody wants any more when its batch forms is dropped;
        a caller that is cancelled disturbs no other.
        """
        if self._free and not self._waiting and self._lone >= LONELY:
            return await self._run_alone(item)
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append(Waiting(item, future, is_wanted))
        self._start()
        return await future

    async def _run_alone(self, item: Item) -> Outcome:
        """In the caller's own task, without waiting for others: where nobody came for a while, the
        twelve turns and another task's are 8 % of a send. A caller that is cancelled takes its own
        item with it.
        """
        self._free -= 1
        try:
            if self._sizes:
                self._sizes.observe(1)
            (outcome,) = await self._run([item])
        finally:
            self._free += 1
            if self._waiting:
                self._start()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _start(self) -> None:
        if self._free:
            self._free -= 1
            batch = asyncio.create_task(self._work())
            self._batches.add(batch)
            batch.add_done_callback(self._batches.discard)

    async def _work(self) -> None:
        """Run batches until nobody waits."""
        try:
            while self._waiting:
                await self._gather()
                if batch := self._next():
                    self._lone = self._lone + 1 if len(batch) == 1 else 0
                    if self._sizes:
                        self._sizes.observe(len(batch))
                    await self._settle(batch)
        finally:
            self._free += 1

    async def _gather(self) -> None:
        """Let those come who are on their way, until so many turns of the loop bring nobody.

        A call that arrives takes several turns from the network to here, and grpc lets in one at a
        time: batches that did not wait for that held three of 64 calls, and a call cost twice as
        much. The turns of an idle loop take microseconds.
        """
        quiet_turns = 0
        while quiet_turns < PATIENCE and len(self._waiting) < self._enough:
            count = len(self._waiting)
            await asyncio.sleep(0)
            quiet_turns = quiet_turns + 1 if len(self._waiting) == count else 0

    def _next(self) -> list["Waiting[Item, Outcome]"]:
        batch: list[Waiting[Item, Outcome]] = []
        others: list[Waiting[Item, Outcome]] = []
        weight, kind = 0, None
        most = min(self._max_items, max(self._enough, len(self._waiting) // 2))
        while self._waiting and len(batch) + len(others) < most:
            waiting = self._waiting[0]
            if waiting.is_over():
                self._waiting.popleft()
                continue
            alike = self._alike(waiting.item)
            if batch and alike != kind:
                others.append(self._waiting.popleft())
                continue
            kind = alike
            weight += self._weigh(waiting.item)
            if batch and weight > self._max_weight:
                break
            batch.append(self._waiting.popleft())
        self._waiting.extendleft(reversed(others))
        return batch

    async def _settle(self, batch: list["Waiting[Item, Outcome]"]) -> None:
        outcomes: Sequence[Outcome | Exception]
        try:
            outcomes = await self._run([waiting.item for waiting in batch])
        except SHARED as error:
            outcomes = [error] * len(batch)
        except Exception as error:
            if len(batch) > 1:
                for waiting in batch:
                    if not waiting.is_over():
                        await self._settle([waiting])
                return
            outcomes = [error]
        for waiting, outcome in zip(batch, outcomes, strict=True):
            waiting.settle(outcome)


@dataclass(frozen=True, slots=True)
class Waiting(Generic[Item, Outcome]):
    """An item, who awaits it, and whether it is still wanted."""

    item: Item
    future: asyncio.Future[Outcome]
    is_wanted: Callable[[], bool]

    def is_over(self) -> bool:
        """Whether nobody awaits the outcome any more."""
        if not self.future.done() and not self.is_wanted():
            self.future.cancel()
        return self.future.done()

    def settle(self, outcome: Outcome | Exception) -> None:
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)
