"""Marking messages as read, many calls in one transaction."""

from dataclasses import dataclass

from service.coalescer import Coalescer
from service.errors import ParleyError
from service.identity import Call
from service.repositories.base import Row
from service.rules.cursors import Reading, Replayed
from service.store import Store, Transaction


@dataclass(frozen=True, slots=True)
class Read:
    """The participant as it stands then, with its `unread_count`."""

    participant: Row
    replayed: bool


class Reader:
    """Moves read cursors, in order of arrival within each conversation."""

    def __init__(self, store: Store) -> None:
        self._coalescer: Coalescer[Reading, Read] = Coalescer(store, _mark, name="read")

    async def mark(self, item: Reading, call: Call) -> Read:
        """How far the user has read by now."""
        return await self._coalescer.submit(item, call)


async def _mark(transaction: Transaction, items: list[Reading]) -> list[Read | ParleyError]:
    """Reads the answers before COMMIT: afterwards a lost connection would make a failure of them,
    and of a failure we say that it had no effect.
    """
    outcomes = await transaction.cursors.move(items)
    marked = [
        (item.conversation_id, outcome.user_id)
        for item, outcome in zip(items, outcomes, strict=True)
        if not isinstance(outcome, ParleyError)
    ]
    rows = await transaction.cursors.find(marked) if marked else {}
    return [
        outcome
        if isinstance(outcome, ParleyError)
        else Read(rows[item.conversation_id, outcome.user_id], isinstance(outcome, Replayed))
        for item, outcome in zip(items, outcomes, strict=True)
    ]
