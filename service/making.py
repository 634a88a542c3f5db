"""Making users and conversations, many calls in one transaction."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Protocol, TypeVar
from uuid import UUID

from service.batcher import Batcher
from service.errors import NotFound, ParleyError
from service.identity import Call
from service.repositories.base import Row
from service.rules.requests import RequestId
from service.store import Store, Transaction

# A weight is a number of rows, or the kilobytes of what is long.
MAX_BATCH_ITEMS, MAX_BATCH_WEIGHT = 64, 1_000


class Wanted(Protocol):
    """What is to be made, by a call that may be repeated, or that only asks whether it could be."""

    @property
    def request(self) -> RequestId | None: ...
    @property
    def dry_run(self) -> bool: ...


New = TypeVar("New", bound=Wanted)
Made = TypeVar("Made")


class Maker(Generic[New, Made]):
    """Makes what it is given, and answers it as it is then.

    `make` answers one id or error an item, `show` what has these ids, in order. What either raises
    takes the batch back, and each of its items is tried alone.
    """

    def __init__(
        self,
        store: Store,
        make: Callable[[Transaction, list[New]], Awaitable[Sequence[UUID | ParleyError]]],
        show: Callable[[Transaction, list[tuple[New, UUID]]], Awaitable[Sequence[Made]]],
        *,
        name: str,
        weigh: Callable[[New], int] = lambda _: 1,
    ) -> None:
        """`name`: of its batches, in the metrics."""
        self._store = store
        self._make = make
        self._show = show
        self._batcher: Batcher[New, Made] = Batcher(
            self._gathered,
            max_items=MAX_BATCH_ITEMS,
            weigh=weigh,
            max_weight=MAX_BATCH_WEIGHT,
            name=name,
        )

    async def make(self, new: New, call: Call) -> Made:
        """What was made, or what an earlier call under the same request_id made."""
        if new.request is None and not new.dry_run:
            return await self._batcher.submit(new, is_wanted=call.is_wanted)
        return await self._alone(new, call)

    async def _gathered(self, several: list[New]) -> Sequence[Made | ParleyError]:
        async with self._store.transaction() as transaction:
            outcomes = await self._make(transaction, several)
            made = [
                (new, outcome)
                for new, outcome in zip(several, outcomes, strict=True)
                if isinstance(outcome, UUID)
            ]
            shown = iter(await self._show(transaction, made) if made else ())
        return [
            outcome if isinstance(outcome, ParleyError) else next(shown) for outcome in outcomes
        ]

    async def _alone(self, new: New, call: Call) -> Made:
        """Under the lock of its request_id, and taken back if that is what was asked for."""
        lock = new.request.lock if new.request else None
        async with self._store.transaction(lock=lock) as transaction:
            transaction.dry_run = new.dry_run
            if done := await transaction.requests.find(new.request):
                call.mark_replayed()
                id = done["subject_id"]
            else:
                (id,) = await self._make(transaction, [new])
                if isinstance(id, ParleyError):
                    raise id
                await transaction.requests.record(new.request, subject_id=id)
            (shown,) = await self._show(transaction, [(new, id)])
        return shown


def found(row: Row | None, kind: str, name: object) -> Row:
    """Raise where what an earlier call made is there no more, or hidden by now."""
    if row is None:
        raise NotFound(kind, name)
    return row
