"""How a user begins and what may become of it, and of its conversations when it is erased."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from service.domain import ParticipantRole as Role
from service.domain import ParticipantStatus as Status
from service.errors import FailedPrecondition, NotFound, PermissionDenied
from service.rules.participants import Change, Move, appoint, move
from service.rules.requests import RequestId
from service.rules.rights import Person
from service.rules.updates import news

Row = Mapping[str, Any]

# What a user may change of itself; the rest is the system's.
OWN = frozenset({"email", "full_name", "metadata"})

# Who inherits a conversation.
RANKS = (Role.OWNER, Role.MODERATOR, Role.MEMBER, Role.OBSERVER)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewUser:
    """Everything that a CreateUser asks for."""

    columns: dict[str, Any]
    request: RequestId | None
    dry_run: bool


def require_self(user: Row | None, *, actor_id: UUID | None, name: object) -> Row:
    """The user, which must be the actor, where there is one."""
    if user is None:
        raise NotFound("user", name)
    if actor_id not in (None, user["id"]):
        raise PermissionDenied("PERMISSION_DENIED", rule="only the user itself may do that")
    return user


def require_live(user: Row) -> None:
    """Raise if the user is deleted."""
    if user["deleted_at"] is not None:
        raise FailedPrecondition("USER_DELETED")


def update(user: Row, wanted: Row, *, by_itself: bool) -> dict[str, Any]:
    """What of the wanted values is new; raises where the user takes no such change.

    A user that changes its own e-mail address has yet to show that it is its own.
    """
    changes = news(user, wanted)
    if by_itself:
        if foreign := sorted(changes.keys() - OWN):
            rule = f"a user may not change its own {foreign[0]}"
            raise PermissionDenied("PERMISSION_DENIED", rule=rule)
        if "email" in changes:
            changes["is_verified"] = False
    require_live(user)
    return changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """What the end of a user does to one conversation."""

    # The user was joined or invited.
    ends: bool = False
    # The conversation goes with it.
    purges: bool = False
    changes: tuple[Change, ...] = ()
    # Whose conversation it is from now on, if it was the user's.
    creator_id: UUID | None = None
    # Somebody else has it now: as its owner, as its creator, or both.
    transfers: bool = False


def part(
    user_id: UUID, conversation: Row, people: Sequence[Person], *, delete_shared: bool
) -> Parting:
    """How the user leaves; `people` are all who are joined or invited.

    Whoever is joined has an owner afterwards. What the user created belongs to an owner that is
    left, or goes with it.
    """
    own = next((person for person in people if person["user_id"] == user_id), None)
    others = [
        person
        for person in people
        if person["status"] == Status.JOINED and person["user_id"] != user_id
    ]
    created = conversation["creator_id"] == user_id
    if created and (delete_shared or not others):
        return Parting(ends=own is not None, purges=True)
    gone = own and move(
        Move.REMOVE, own, last_sequence=conversation["last_sequence"], actor_id=None
    )
    heir = min(others, key=_claim, default=None)
    promoted = heir and appoint(heir, Role.OWNER, actor_id=None)
    return Parting(
        ends=own is not None,
        changes=tuple(change for change in (promoted, gone) if change),
        creator_id=heir["user_id"] if heir and created else None,
        transfers=heir is not None and (created or promoted is not None),
    )


def _claim(person: Person) -> tuple[Any, ...]:
    """The least has the best claim: an owner; who can act; the higher role; who joined first."""
    return (
        person["role"] != Role.OWNER,
        not person["usable"],
        RANKS.index(person["role"]),
        person["joined_at"],
    )
