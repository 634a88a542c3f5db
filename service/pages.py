"""Pages of a conversation's messages, of which only what is not known is read.

The newest messages of a conversation are read by everybody in it, and again by whoever comes back,
or takes the next turn. A conversation counts how often its messages are changed, in the transaction
that changes one; so while the count stays what it was, what is known is as it is stored. The count
comes with what decides whether the caller may read at all, which is looked up for each call, and
with the messages, whose statement sees both at the same moment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from service import paging, wire
from service.lookups import Lookups
from service.repositories.base import Row
from service.repositories.messages import Stretch

MAX_BYTES = 16 * 2**20
# A message that takes more is read each time.
MAX_MESSAGE_BYTES = 16 * 2**10
# What Python needs to keep a message, beside its bytes, and a conversation.
MESSAGE_OVERHEAD, CONVERSATION_OVERHEAD = 160, 1_000


@dataclass(frozen=True, slots=True)
class Part:
    """Messages as items of a response's list, each with its sequence, and whether there are more
    beyond the last.
    """

    items: Sequence[tuple[int, bytes]]
    more: bool

    @classmethod
    def of(cls, rows: Sequence[Row], *, more: bool, byte_limit: int) -> "Part":
        """Of rows, as many as fit."""
        return cls([(row["sequence"], encoded(row)) for row in rows], more).within(byte_limit)

    def first(self, count: int) -> "Part":
        return Part(self.items[:count], self.more or len(self.items) > count)

    def within(self, byte_limit: int) -> "Part":
        items = paging.cut(self.items, limit=byte_limit, size=lambda item: len(item[1]))
        return Part(items, self.more or len(items) < len(self.items))


class Pages:
    """Reads pages, and keeps them."""

    def __init__(self, lookups: Lookups) -> None:
        self._lookups = lookups
        self._known = KnownMessages()

    async def read(self, view: Row, stretch: Stretch, *, descending: bool, byte_limit: int) -> Part:
        """As many messages of the view's stretch as its limits allow."""
        wanted = _sequences(stretch, descending=descending)
        known = self._known.of(view["id"], view["message_state"])
        missing = [sequence for sequence in wanted if sequence not in known]
        read: dict[int, bytes] = {}
        if missing:
            # Also what is known in between, which there hardly ever is.
            gap = wanted[wanted.index(missing[0]) : wanted.index(missing[-1]) + 1]
            between = replace(stretch, first=min(gap), final=max(gap), limit=len(gap))
            rows, cut = await self._lookups.page(between, descending=descending)
            read = {row["sequence"]: encoded(row) for row in rows}
            reached = gap[: len(rows)] if cut else gap
            if rows:
                self._known.keep(view["id"], rows[0]["message_state"], read)
            if list(read) != list(reached) or rows[0]["message_state"] != view["message_state"]:
                # What is known goes with it no longer; or somebody else has torn a gap, of which a
                # conversation has none.
                rows, more = await self._lookups.page(stretch, descending=descending)
                return Part.of(rows, more=more, byte_limit=byte_limit)
            if cut:
                wanted = wanted[: wanted.index(reached[-1]) + 1]
        items = [(sequence, read.get(sequence) or known[sequence]) for sequence in wanted]
        more = len(wanted) < stretch.final - stretch.first + 1
        return Part(items, more).within(byte_limit)


class KnownMessages:
    """Messages of each conversation in one state, by sequence; those of the conversation that was
    longest not read make room for others.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._left = max_bytes
        # The conversation that was read last is last.
        self._known: dict[UUID, tuple[str, dict[int, bytes]]] = {}

    def of(self, id: UUID, state: str) -> dict[int, bytes]:
        if known := self._known.pop(id, None):
            self._known[id] = known
        return known[1] if known and known[0] == state else {}

    def keep(self, id: UUID, state: str, messages: Mapping[int, bytes]) -> None:
        known = self.of(id, state)
        new = {
            sequence: item
            for sequence, item in messages.items()
            if sequence not in known and len(item) <= MAX_MESSAGE_BYTES
        }
        if new:
            if not known:
                self._forget(id)
                self._left -= CONVERSATION_OVERHEAD
            known.update(new)
            self._known[id] = state, known
            self._left -= _size(new)
        while self._left < 0:
            self._forget(next(iter(self._known)))

    def _forget(self, id: UUID) -> None:
        if known := self._known.pop(id, None):
            self._left += CONVERSATION_OVERHEAD + _size(known[1])


def encoded(row: Row) -> bytes:
    """The row's message as an item of a response's list."""
    return wire.item(wire.message(row))


def _size(messages: Mapping[int, bytes]) -> int:
    """What they take, without their conversation."""
    return sum(len(item) + MESSAGE_OVERHEAD for item in messages.values())


def _sequences(stretch: Stretch, *, descending: bool) -> range:
    """Those of a page, in its order."""
    first, final, limit = stretch.first, stretch.final, stretch.limit
    if descending:
        return range(final, max(first, final - limit + 1) - 1, -1)
    return range(first, min(final, first + limit - 1) + 1)
