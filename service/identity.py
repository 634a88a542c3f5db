"""Who calls, and for whom.

The *caller* is the authenticated service. The *actor* is the end user it acts for; a call without
one is made by the system itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar
from uuid import UUID

Behavior = TypeVar("Behavior", bound=Callable[..., Any])


class Scope(StrEnum):
    """What a caller's token lets it do. `act-as`: name an actor; `system`: come without one."""

    READ = "read"
    WRITE = "write"
    ACT_AS = "act-as"
    SYSTEM = "system"
    VERIFY_PASSWORD = "verify-password"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated service."""

    service: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Actor:
    """The end user that the caller acts for: exists, is active, is not deleted."""

    id: UUID


@dataclass(slots=True)
class Call:
    """One call as a servicer sees it: who, and what goes back beside the answer."""

    method: str
    caller: Caller
    actor: Actor | None
    # The actor as it was named, where nobody has yet looked whether it may act; see below.
    presumed: str = ""
    trailers: list[tuple[str, str]] = field(default_factory=list)
    # The client has gone: cancelled, or past its deadline.
    abandoned: bool = False

    @property
    def actor_id(self) -> UUID | None:
        return self.actor.id if self.actor else None

    def is_wanted(self) -> bool:
        return not self.abandoned

    def mark_replayed(self) -> None:
        """Tell the client that this answer was first given to an earlier call."""
        self.trailers.append(("x-parley-replayed", "true"))


def checks_actor(behavior: Behavior) -> Behavior:
    """Marks an RPC whose own first statement says whether the actor may act, so that nobody need
    ask before: it has no success for an actor who may not.
    """
    behavior.checks_actor = True  # type: ignore[attr-defined]
    return behavior
