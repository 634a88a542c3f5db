"""Coalescing: while one batch runs, the next one gathers.

Calls that arrive together share one statement or one transaction, and each gets an outcome of its
own. There is no timer: a call that comes alone goes at once. A call never joins work that has
already begun, so what it is told was true after it asked.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.errors import Unavailable, Unknown

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Batcher(Generic[Item, Outcome]):
    """Hands gathered items to `run`, which returns one outcome an item, in order.

    An outcome that is an exception is raised to its own caller alone. If `run` itself raises
    for reasons that may lie in one item, each item is run again alone, so that only a poisoned one
    fails. A batch ends at `max_items`, or where its weights (by `weigh`) pass `max_weight`. At most
    `concurrency` batches run at once.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Outcome | Exception]]],
        *,
        max_items: int = 64,
        weigh: Callable[[Item], int] = lambda _: 0,
        max_weight: int = 1,
        concurrency: int = 1,
    ) -> None:
        self._run = run
        self._max_items = max_items
        self._weigh = weigh
        self._max_weight = max_weight
        self._free = concurrency
        self._waiting: deque[Waiting[Item, Outcome]] = deque()
        # The loop itself holds its tasks only weakly.
        self._batches: set[asyncio.Task[None]] = set()

    async def submit(self, item: Item, *, is_wanted: Callable[[], bool] = lambda: True) -> Outcome:
        """The outcome of this item. One that nobody wants any more when its batch forms is dropped;
        a caller that is cancelled disturbs no other.
        """
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append(Waiting(item, future, is_wanted))
        self._start()
        return await future

    def _start(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            batch = asyncio.create_task(self._work())
            self._batches.add(batch)
            batch.add_done_callback(self._batches.discard)

    async def _work(self) -> None:
        """Run batches until nobody waits."""
        try:
            while batch := self._next():
                await self._settle(batch)
        finally:
            self._free += 1

    def _next(self) -> list["Waiting[Item, Outcome]"]:
        batch: list[Waiting[Item, Outcome]] = []
        weight = 0
        while self._waiting and len(batch) < self._max_items:
            weight += self._weigh(self._waiting[0].item)
            if batch and weight > self._max_weight:
                break
            waiting = self._waiting.popleft()
            if waiting.future.done():
                continue
            if waiting.is_wanted():
                batch.append(waiting)
            else:
                waiting.future.cancel()
        return batch

    async def _settle(self, batch: list["Waiting[Item, Outcome]"]) -> None:
        outcomes = await self._outcomes([waiting.item for waiting in batch])
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if waiting.future.done():
                continue
            if isinstance(outcome, Exception):
                waiting.future.set_exception(outcome)
            else:
                waiting.future.set_result(outcome)

    async def _outcomes(self, items: list[Item]) -> Sequence[Outcome | Exception]:
        try:
            return await self._run(items)
        except (Unavailable, Unknown) as error:
            return [error] * len(items)
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [(await self._outcomes([item]))[0] for item in items]


@dataclass(frozen=True, slots=True)
class Waiting(Generic[Item, Outcome]):
    """An item, who awaits it, and whether it is still wanted."""

    item: Item
    future: asyncio.Future[Outcome]
    is_wanted: Callable[[], bool]
