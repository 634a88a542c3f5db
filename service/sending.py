"""Appending messages, many calls at a time, none waiting for another's conversation.

A batch takes only the locks that are free. A conversation whose lock is taken gets a lane of its
own, which waits for it in a transaction that holds nothing else, while the other conversations go
on. (Without lanes, one conversation held for 2 s took all the others from thousands of messages a
second to none.)
"""

import asyncio
from datetime import datetime
from functools import partial
from uuid import UUID

from service.batcher import Batcher
from service.errors import ParleyError
from service.identity import Call
from service.repositories.messages import Times
from service.rules.messages import Accepted, Append, Numbered, Outcome, Replayed
from service.store import Store

MAX_BATCH_ITEMS = 64
MAX_BATCH_BYTES = 1 << 20
# Transactions that may wait for a lock at once: fewer than the pool has connections.
MAX_WAITING_LANES = 4


class Busy:
    """The outcome of an item whose conversation is locked by somebody else."""


# An accepted item comes with the time at which each of its messages was made.
Appended = list[tuple[Numbered, datetime | None]]
Result = Appended | Replayed | Busy | ParleyError


def lock_of(conversation_id: UUID) -> int:
    """The advisory lock of a conversation: the random half of its id."""
    return int.from_bytes(conversation_id.bytes[8:], signed=True)


class Sender:
    """Appends what it is given, in order of arrival within each conversation."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._fast = _batcher(self._append_free)
        self._lanes: dict[UUID, Lane] = {}
        self._waiting_lanes = asyncio.Semaphore(MAX_WAITING_LANES)

    async def append(self, item: Append, call: Call) -> Appended | Replayed:
        """The messages stored, or what an earlier call under the same request_id stored."""
        lane = self._lanes.get(item.conversation_id)
        if lane is None:
            result = await self._fast.submit(item, is_wanted=call.is_wanted)
            if not isinstance(result, Busy):
                return _require(result)
            lane = self._lanes.setdefault(item.conversation_id, self._new_lane(item))
        lane.users += 1
        try:
            return _require(await lane.batcher.submit(item, is_wanted=call.is_wanted))
        finally:
            lane.users -= 1
            if not lane.users:
                self._lanes.pop(item.conversation_id, None)

    def _new_lane(self, item: Append) -> "Lane":
        return Lane(_batcher(partial(self._append_waiting, item.conversation_id)))

    async def _append_free(self, items: list[Append]) -> list[Result]:
        async with self._store.transaction() as transaction:
            free = await transaction.try_locks({lock_of(item.conversation_id) for item in items})
            ready = [item for item in items if lock_of(item.conversation_id) in free]
            outcomes, times = await transaction.messages.append(ready) if ready else ([], {})
        results = iter(_results(ready, outcomes, times))
        return [
            next(results) if lock_of(item.conversation_id) in free else Busy() for item in items
        ]

    async def _append_waiting(self, conversation_id: UUID, items: list[Append]) -> list[Result]:
        async with (
            self._waiting_lanes,
            self._store.transaction(lock=lock_of(conversation_id)) as transaction,
        ):
            outcomes, times = await transaction.messages.append(items)
        return _results(items, outcomes, times)


class Lane:
    """One busy conversation's queue, kept while anybody stands in it."""

    def __init__(self, batcher: Batcher[Append, Result]) -> None:
        self.batcher = batcher
        self.users = 0


def _batcher(run: "partial[object] | object") -> Batcher[Append, Result]:
    return Batcher(
        run,  # type: ignore[arg-type]
        max_items=MAX_BATCH_ITEMS,
        weigh=lambda item: sum(len(draft.content) for draft in item.drafts),
        max_weight=MAX_BATCH_BYTES,
    )


def _results(items: list[Append], outcomes: list[Outcome], times: Times) -> list[Result]:
    """Each outcome with its times: those of a dry run, or of nothing, have none."""
    return [
        [
            (message, None if item.dry_run else times[item.conversation_id, message.sequence])
            for message in outcome.messages
        ]
        if isinstance(outcome, Accepted)
        else outcome
        for item, outcome in zip(items, outcomes, strict=True)
    ]


def _require(result: Result) -> Appended | Replayed:
    if isinstance(result, ParleyError):
        raise result
    assert not isinstance(result, Busy)
    return result
