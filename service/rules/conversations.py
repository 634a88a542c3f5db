"""What may become of a conversation."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Self
from uuid import UUID

from service.rules.rights import require_writable
from service.rules.updates import news

Row = Mapping[str, Any]


def update(conversation: Row, wanted: Row) -> dict[str, Any]:
    """What of the wanted values is new; raises where the conversation takes no such change.

    An archived one takes only what makes it active again. What is so already, it takes too.
    """
    changes = news(conversation, wanted)
    active = not changes or conversation["is_active"] or changes.get("is_active")
    require_writable({**conversation, "is_active": active})
    return changes


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
