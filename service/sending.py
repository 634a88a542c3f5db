"""Appending messages, many calls in one transaction."""

from datetime import datetime

from service.coalescer import Coalescer
from service.errors import ParleyError
from service.identity import Call
from service.rules.messages import Accepted, Append, Numbered, Replayed
from service.store import Store, Transaction

# An accepted item comes with the time at which each of its messages was made; that of a dry run
# has none.
Appended = list[tuple[Numbered, datetime | None]]
Sent = Appended | Replayed


class Sender:
    """Appends what it is given, in order of arrival within each conversation."""

    def __init__(self, store: Store) -> None:
        self._coalescer: Coalescer[Append, Sent] = Coalescer(
            store, _append, name="send", weigh=_bytes
        )

    async def append(self, item: Append, call: Call) -> Sent:
        """The messages stored, or what an earlier call under the same request_id stored."""
        return await self._coalescer.submit(item, call)


async def _append(transaction: Transaction, items: list[Append]) -> list[Sent | ParleyError]:
    outcomes, times = await transaction.messages.append(items)
    return [
        [
            (message, None if item.dry_run else times[item.conversation_id, message.sequence])
            for message in outcome.messages
        ]
        if isinstance(outcome, Accepted)
        else outcome
        for item, outcome in zip(items, outcomes, strict=True)
    ]


def _bytes(item: Append) -> int:
    return sum(len(draft.content) for draft in item.drafts)
