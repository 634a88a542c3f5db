"""Messages as they go into lists, encoded once.

The newest page of a conversation is read by everybody in it, and again whenever they come back; to
make fifty messages of fifty rows was a third of what a page cost. What a message is on the wire
depends on its row alone, and whatever changes that changes the row's version. So the rows are read
as ever, and nothing that is kept here can be out of date.
"""

from collections.abc import Hashable
from uuid import UUID

from service import wire
from service.repositories.base import Row

# Together 16 MiB at the most; a message of a chat takes some 300 bytes.
MAX_MESSAGES = 16_384
MAX_BYTES = 1_024


class EncodedMessages:
    """Items of lists, by the message's id; the oldest make room for new ones."""

    def __init__(self, max_messages: int = MAX_MESSAGES) -> None:
        self._max_messages = max_messages
        self._items: dict[UUID, tuple[Hashable, bytes]] = {}

    def item(self, row: Row) -> bytes:
        """The row's message as an item of a response's list."""
        id, version = row["id"], _version(row)
        known = self._items.get(id)
        if known and known[0] == version:
            return known[1]
        item = wire.item(wire.message(row))
        if len(item) <= MAX_BYTES:
            if len(self._items) >= self._max_messages and id not in self._items:
                del self._items[next(iter(self._items))]
            self._items[id] = (version, item)
        return item


def _version(row: Row) -> Hashable:
    """What no two states of a message have in common, also when the database was taken back to an
    earlier one and went on differently: the times, beside how often it was edited and marked.
    """
    return row["revision"], row["mark_count"], row["updated_at"], row["deleted_at"]
