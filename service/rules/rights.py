"""Who may do what: one table of roles, and the one way to say no.

What an actor may not see does not exist for it; what it sees but may not do is refused. Whether it
sees is decided by SQL, in repositories/visibility.py, and arrives here as `person["sees"]`.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any
from uuid import UUID

from service.domain import ParticipantRole as Role
from service.domain import ParticipantStatus as Status
from service.errors import FailedPrecondition, NotFound, PermissionDenied

Person = Mapping[str, Any]


class Right(StrEnum):
    SEND = "send messages"
    MARK_READ = "mark messages as read"
    INVITE = "invite"
    ADD = "add participants"
    DISMISS = "remove participants or take invitations back"
    APPOINT = "change roles"
    UPDATE = "change the conversation"
    DELETE = "delete or undelete the conversation"
    EDIT = "edit messages"
    DELETE_MESSAGES = "delete or undelete messages"
    DELETE_OTHERS_MESSAGES = "delete or undelete what others sent or deleted"


OWNER, MODERATOR, MEMBER, OBSERVER = Role.OWNER, Role.MODERATOR, Role.MEMBER, Role.OBSERVER

RIGHTS: dict[Right, frozenset[Role]] = {
    Right.SEND: frozenset({OWNER, MODERATOR, MEMBER}),
    Right.MARK_READ: frozenset(Role),
    Right.INVITE: frozenset({OWNER, MODERATOR, MEMBER}),
    Right.ADD: frozenset({OWNER, MODERATOR}),
    Right.DISMISS: frozenset({OWNER, MODERATOR, MEMBER}),
    Right.APPOINT: frozenset({OWNER, MODERATOR}),
    Right.UPDATE: frozenset({OWNER, MODERATOR}),
    Right.DELETE: frozenset({OWNER}),
    Right.EDIT: frozenset({OWNER, MODERATOR, MEMBER}),
    Right.DELETE_MESSAGES: frozenset({OWNER, MODERATOR, MEMBER}),
    Right.DELETE_OTHERS_MESSAGES: frozenset({OWNER, MODERATOR}),
}

# The roles that a holder of a role may give, and take: an OWNER is beyond a MODERATOR's reach.
MAY_GRANT: dict[Role, frozenset[Role]] = {
    OWNER: frozenset(Role),
    MODERATOR: frozenset({MODERATOR, MEMBER, OBSERVER}),
    MEMBER: frozenset({MEMBER, OBSERVER}),
    OBSERVER: frozenset(),
}


def require_may_act(person: Person | None) -> None:
    """Raise for an actor that is not there, is deactivated or is deleted."""
    if person is None or not person["usable"]:
        raise PermissionDenied("ACTOR_NOT_ALLOWED", rule="the user is deactivated or deleted")


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


def require_may_edit(
    person: Person | None, sender_id: UUID | None, *, actor_id: UUID, conversation: str
) -> None:
    """Raise unless the actor may edit a message that `sender_id` sent."""
    require_right(Right.EDIT, person, conversation=conversation)
    if sender_id != actor_id:
        raise PermissionDenied("PERMISSION_DENIED", rule="only its sender may edit a message")


def require_may_delete(
    person: Person | None, owner_id: UUID | None, *, actor_id: UUID, conversation: str
) -> None:
    """Raise unless the actor may delete, or undelete, a message that is `owner_id`'s."""
    own = owner_id == actor_id
    right = Right.DELETE_MESSAGES if own else Right.DELETE_OTHERS_MESSAGES
    require_right(right, person, conversation=conversation)


def require_grantable(own: Role, role: Role, *, field: str) -> None:
    """Raise unless one who has the role `own` may give `role`."""
    if role not in MAY_GRANT[own]:
        rule = f"one with role {own} may not give {role}"
        raise PermissionDenied("ROLE_NOT_ALLOWED", field=field, rule=rule)


def require_within_reach(own: Role, person: Person) -> None:
    """Raise unless one who has the role `own` may decide about this person."""
    if person["role"] not in MAY_GRANT[own]:
        rule = f"one with role {own} has no say over one with role {person['role']}"
        raise PermissionDenied("PERMISSION_DENIED", rule=rule)


def require_live(conversation: Mapping[str, Any]) -> None:
    """Raise if the conversation is deleted."""
    if conversation["deleted_at"] is not None:
        raise FailedPrecondition("CONVERSATION_DELETED")


def require_writable(conversation: Mapping[str, Any]) -> None:
    """Raise unless the conversation takes changes."""
    require_live(conversation)
    if not conversation["is_active"]:
        raise FailedPrecondition("CONVERSATION_ARCHIVED")


def user_not_found(field: str, name: str) -> FailedPrecondition:
    """Somebody whom a request names beside its target does not exist."""
    return FailedPrecondition("USER_NOT_FOUND", resource=("user", name), field=field, name=name)


def require_usable(user: Mapping[str, Any], *, field: str) -> None:
    """Raise unless the user may act and be invited."""
    if not user["usable"]:
        raise FailedPrecondition("USER_INACTIVE", field=field)
