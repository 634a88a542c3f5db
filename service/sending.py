"""Appending messages: many calls in one statement, by what is remembered where that will do.

Whoever wrote to a conversation knows who may send and which number comes next. The next message is
decided by that, and the statement that stores it stores nothing where anything but messages has
changed the conversation, or its sender is another one by then. So what is remembered may be out of
date, and does no harm. (Optimistic concurrency control: Kung and Robinson, 1981.)
"""

from datetime import datetime

from service.coalescer import Busy, Coalescer, Overtaken
from service.errors import ParleyError
from service.identity import Call
from service.ids import lock_of, new_id
from service.memory import Memory
from service.repositories.messages import Stored, Written
from service.rules.messages import Accepted, Append, Numbered, Outcome, Replayed, decide
from service.store import Store, Transaction

# An accepted item comes with the time at which each of its messages was made; that of a dry run
# has none.
Appended = list[tuple[Numbered, datetime | None]]
Sent = Appended | Replayed

NEW_IDS = iter(new_id, None)


class Sender:
    """Appends what it is given, in order of arrival within each conversation."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._memory = Memory()
        self._coalescer: Coalescer[Append, Sent] = Coalescer(
            store, append, apply_free=self._append_free, name="send", weigh=_bytes
        )

    async def append(self, item: Append, call: Call) -> Sent:
        """The messages stored, or what an earlier call under the same request_id stored."""
        return await self._coalescer.submit(item, call)

    async def _append_free(self, items: list[Append]) -> list[Sent | Busy | ParleyError]:
        """Append to the conversations whose locks are free."""
        async with self._store.statements() as statements:
            self._memory.bind(statements.session)
            history = self._memory.history or await statements.messages.history()
            known = self._memory.recall(items)
            unknown = [item for item in items if item.conversation_id not in known]
            loaded = await statements.messages.load(unknown) if unknown else {}
            outcomes = decide(items, known | loaded, NEW_IDS)
            accepted = _accepted(items, outcomes)
            written = await statements.messages.write(accepted, history=history)
            statements.locks.update(map(lock_of, written.stored))
        if accepted:
            tried = {item.conversation_id for item, _ in accepted}
            recalled = {id: known[id] for id in known.keys() & tried}
            self._memory.keep(recalled, loaded, written)
        doubtful = known.keys() - written.taken
        return [
            # It was refused by what was remembered: that may not be so any more.
            Overtaken()
            if isinstance(sent, Busy | ParleyError) and item.conversation_id in doubtful
            else sent
            for item, sent in zip(items, _settled(items, outcomes, written), strict=True)
        ]


async def append(transaction: Transaction, items: list[Append]) -> list[Sent | Busy | ParleyError]:
    """Append to conversations whose locks are held: steps 2 to 4 of the write protocol."""
    states = await transaction.messages.load(items)
    outcomes = decide(items, states, NEW_IDS)
    written = await transaction.messages.write(_accepted(items, outcomes))
    return _settled(items, outcomes, written)


def _accepted(items: list[Append], outcomes: list[Outcome]) -> list[tuple[Append, Accepted]]:
    """What is to be stored."""
    return [
        (item, outcome)
        for item, outcome in zip(items, outcomes, strict=True)
        if isinstance(outcome, Accepted) and not item.dry_run
    ]


def _settled(
    items: list[Append], outcomes: list[Outcome], written: Written
) -> list[Sent | Busy | ParleyError]:
    """What to tell of each item. Where something was to be stored and was not, nothing is true that
    was decided after it: neither that a request was repeated, nor that a number was wrong.
    """
    tried = {item.conversation_id for item, _ in _accepted(items, outcomes)}
    undone = tried.difference(written.stored)
    return [
        Busy()
        if item.conversation_id in undone
        else _told(item, outcome, written.stored.get(item.conversation_id))
        for item, outcome in zip(items, outcomes, strict=True)
    ]


def _told(item: Append, outcome: Outcome, stored: Stored | None) -> Sent | ParleyError:
    by = stored.moved_by if stored else 0
    if isinstance(outcome, Replayed):
        return outcome.moved(by)
    if isinstance(outcome, ParleyError):
        return outcome
    at = None if item.dry_run or not stored else stored.at
    return [(message.moved(by), at) for message in outcome.messages]


def _bytes(item: Append) -> int:
    return sum(len(draft.content) for draft in item.drafts)
