"""What may become of a conversation."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Self
from uuid import UUID

from service.rules.metadata import is_same
from service.rules.rights import require_writable

Row = Mapping[str, Any]


def update(conversation: Row, wanted: Row) -> dict[str, Any]:
    """What of the wanted values is new; raises where the conversation takes no such change.

    An archived one takes only what makes it active again. What is so already, it takes too.
    """
    changes = {
        name: value for name, value in wanted.items() if not _holds(conversation, name, value)
    }
    active = not changes or conversation["is_active"] or changes.get("is_active")
    require_writable({**conversation, "is_active": active})
    return changes


def _holds(conversation: Row, name: str, value: Any) -> bool:
    if name == "metadata":
        return is_same(conversation[name], value)
    return bool(conversation[name] == value)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two users of a direct conversation, whoever of them asked."""

    first: UUID
    second: UUID

    @classmethod
    def of(cls, one: UUID, other: UUID) -> Self:
        return cls(*sorted((one, other)))

    @property
    def lock(self) -> int:
        """The advisory lock of the conversation that they have or do not have yet."""
        digest = sha256(self.first.bytes + self.second.bytes).digest()
        return int.from_bytes(digest[:8], signed=True)
