"""Who may do what: one table of roles, and the one way to say no.

What an actor may not see does not exist for it; what it sees but may not do is refused. Whether it
sees is decided by SQL, in repositories/visibility.py, and arrives here as `person["sees"]`.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from service.domain import ParticipantRole as Role
from service.domain import ParticipantStatus as Status
from service.errors import FailedPrecondition, NotFound, PermissionDenied

Person = Mapping[str, Any]


class Right(StrEnum):
    SEND = "send messages"
    INVITE = "invite"


OWNER, MODERATOR, MEMBER, OBSERVER = Role.OWNER, Role.MODERATOR, Role.MEMBER, Role.OBSERVER

RIGHTS: dict[Right, frozenset[Role]] = {
    Right.SEND: frozenset({OWNER, MODERATOR, MEMBER}),
    Right.INVITE: frozenset({OWNER, MODERATOR, MEMBER}),
}

# The roles that a holder of a role may give to somebody it invites.
MAY_GRANT: dict[Role, frozenset[Role]] = {
    OWNER: frozenset(Role),
    MODERATOR: frozenset({MODERATOR, MEMBER, OBSERVER}),
    MEMBER: frozenset({MEMBER, OBSERVER}),
    OBSERVER: frozenset(),
}


def require_right(right: Right, person: Person | None, *, conversation: str) -> Person:
    """The joined participant who has the right; NOT_FOUND or PERMISSION_DENIED for anybody else."""
    if person is None or not person["sees"]:
        raise NotFound("conversation", conversation)
    if person["status"] != Status.JOINED:
        raise PermissionDenied("NOT_A_PARTICIPANT", field="x-parley-actor")
    if person["role"] not in RIGHTS[right]:
        raise PermissionDenied(
            "PERMISSION_DENIED", rule=f"a participant with role {person['role']} may not {right}"
        )
    return person


def require_writable(conversation: Mapping[str, Any]) -> None:
    """Raise unless the conversation takes changes."""
    if conversation["deleted_at"] is not None:
        raise FailedPrecondition("CONVERSATION_DELETED")
    if not conversation["is_active"]:
        raise FailedPrecondition("CONVERSATION_ARCHIVED")


def require_usable(user: Mapping[str, Any], *, field: str) -> None:
    """Raise unless the user may act and be invited."""
    if not user["usable"]:
        raise FailedPrecondition("USER_INACTIVE", field=field)
