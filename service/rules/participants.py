"""The life of a participant: which call leads from which status to which, and what it changes.

A `Change` is the participant's row as it will be; None stands for "already so": OK, no event.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any
from uuid import UUID

from service.domain import ParticipantRole as Role
from service.domain import ParticipantStatus as Status
from service.errors import FailedPrecondition, NotFound, PermissionDenied
from service.rules.rights import Person, require_grantable, require_within_reach

MAX_PARTICIPANTS = 1_000

Row = Mapping[str, Any]


class Move(StrEnum):
    """The calls that move a participant from one status to another."""

    INVITE = "Invite"
    ADD = "Add"
    ACCEPT = "Accept"
    DECLINE = "Decline"
    REVOKE = "Revoke"
    LEAVE = "Leave"
    REMOVE = "Remove"


INVITED, JOINED, DECLINED = Status.INVITED, Status.JOINED, Status.DECLINED
REVOKED, LEFT, REMOVED = Status.REVOKED, Status.LEFT, Status.REMOVED

# From each status, where each call leads; what is not listed is not possible. Leading to the
# present status means that nothing is left to do.
MOVES: dict[Move, dict[Status | None, Status]] = {
    Move.INVITE: {
        None: INVITED,
        INVITED: INVITED,
        JOINED: JOINED,
        DECLINED: INVITED,
        REVOKED: INVITED,
        LEFT: INVITED,
        REMOVED: INVITED,
    },
    Move.ADD: {
        None: JOINED,
        INVITED: JOINED,
        JOINED: JOINED,
        DECLINED: JOINED,
        REVOKED: JOINED,
        LEFT: JOINED,
        REMOVED: JOINED,
    },
    Move.ACCEPT: {INVITED: JOINED, JOINED: JOINED},
    Move.DECLINE: {INVITED: DECLINED, DECLINED: DECLINED},
    Move.REVOKE: {INVITED: REVOKED, REVOKED: REVOKED},
    Move.LEAVE: {INVITED: DECLINED, JOINED: LEFT, DECLINED: DECLINED, LEFT: LEFT},
    Move.REMOVE: {INVITED: REVOKED, JOINED: REMOVED, REVOKED: REVOKED, REMOVED: REMOVED},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A participant's row after a move, and what it was before."""

    user_id: UUID
    previous_status: Status | None
    status: Status
    previous_role: Role | None
    role: Role
    invited_by_user_id: UUID | None
    initial_message_id: UUID | None
    hide_history: bool
    visible_from_sequence: int
    visible_to_sequence: int | None
    actor_id: UUID | None
    reason: str

    @property
    def joins(self) -> bool:
        return self.status is JOINED and self.previous_status is not JOINED

    @property
    def leaves(self) -> bool:
        return self.previous_status is JOINED and self.status is not JOINED


def newcomer(user: Row) -> Person:
    """A user as somebody who was never in the conversation."""
    return {
        "user_id": user["id"],
        "username": user["username"],
        "usable": user["is_active"] and user["deleted_at"] is None,
        "status": None,
        "role": None,
        "visible_from_sequence": None,
        "visible_to_sequence": None,
    }


def move(
    call: Move, person: Person, *, last_sequence: int, actor_id: UUID | None, reason: str = ""
) -> Change | None:
    """The person's row after the call, or None where it is there already.

    Joining opens the window: from the old start, or from the next message if history is hidden.
    Leaving closes it at the last message. Raises for a move that does not exist.
    """
    current = Status(person["status"]) if person["status"] else None
    if current not in MOVES[call]:
        if current is None:
            raise NotFound("participant", person["username"])
        allowed = ", ".join(status for status in MOVES[call] if status)
        raise FailedPrecondition(
            "INVALID_STATE_TRANSITION", current_status=current, allowed=allowed
        )
    status = MOVES[call][current]
    if status is current:
        return None
    change = Change(
        user_id=person["user_id"],
        previous_status=current,
        status=status,
        previous_role=Role(person["role"]) if person["role"] else None,
        role=Role(person["role"] or Role.MEMBER),
        invited_by_user_id=person["invited_by_user_id"],
        initial_message_id=person["initial_message_id"],
        hide_history=bool(person["hide_history"]),
        visible_from_sequence=person["visible_from_sequence"] or 1,
        # Whoever has never joined reads nothing.
        visible_to_sequence=person["visible_to_sequence"] or 0,
        actor_id=actor_id,
        reason=reason,
    )
    if change.joins:
        start = last_sequence + 1 if change.hide_history else change.visible_from_sequence
        return replace(change, visible_from_sequence=start, visible_to_sequence=None)
    if change.leaves:
        return replace(change, visible_to_sequence=last_sequence)
    return change


def enter(
    call: Move,
    person: Person,
    *,
    last_sequence: int,
    role: Role,
    invited_by: UUID | None,
    actor_id: UUID | None,
    initial_message_id: UUID | None = None,
    reason: str = "",
    hide_history: bool = False,
) -> Change | None:
    """Invite or Add: a move that also says as what, by whom and with which message."""
    terms = dict(
        person,
        role=role,
        invited_by_user_id=invited_by,
        initial_message_id=initial_message_id,
        hide_history=hide_history,
    )
    change = move(call, terms, last_sequence=last_sequence, actor_id=actor_id, reason=reason)
    if change is None:
        return None
    previous = Role(person["role"]) if person["role"] else None
    return replace(change, previous_role=previous)


def leave(
    person: Person,
    successor: Person | None,
    *,
    owners: int,
    joined: int,
    last_sequence: int,
    actor_id: UUID | None,
    reason: str,
) -> list[Change]:
    """Leaving, and the ownership passed on. `owners` and `joined` count the leaver too."""
    gone = move(Move.LEAVE, person, last_sequence=last_sequence, actor_id=actor_id, reason=reason)
    if gone is None:
        return []
    if successor is None:
        require_owner_remains(gone, owners=owners, joined=joined)
        return [gone]
    if not gone.leaves or gone.role is not Role.OWNER:
        raise PermissionDenied("PERMISSION_DENIED", rule="only an owner may name a successor")
    if successor["status"] != JOINED or successor["user_id"] == person["user_id"]:
        raise FailedPrecondition("NOT_A_PARTICIPANT", field="successor_user_id")
    promoted = appoint(successor, Role.OWNER, actor_id=actor_id)
    return [promoted, gone] if promoted else [gone]


def dismiss(
    call: Move,
    person: Person,
    *,
    owners: int,
    joined: int,
    last_sequence: int,
    actor_id: UUID | None,
    reason: str,
) -> Change | None:
    """Revoke or Remove. `owners` and `joined` count the person too."""
    gone = move(call, person, last_sequence=last_sequence, actor_id=actor_id, reason=reason)
    if gone is not None:
        require_owner_remains(gone, owners=owners, joined=joined)
    return gone


def require_owner_remains(change: Change, *, owners: int, joined: int) -> None:
    """Raise if the change would take the last owner from those who are joined."""
    owned = change.previous_status is JOINED and change.previous_role is Role.OWNER
    owns = change.status is JOINED and change.role is Role.OWNER
    if owned and not owns and owners == 1 and joined > change.leaves:
        raise FailedPrecondition("LAST_OWNER")


def appoint(person: Person, role: Role, *, actor_id: UUID | None) -> Change | None:
    """The same standing under another role, of somebody who is invited or joined."""
    if person["status"] not in (INVITED, JOINED):
        raise FailedPrecondition("NOT_A_PARTICIPANT", field="user_id")
    if person["role"] == role:
        return None
    return Change(
        user_id=person["user_id"],
        previous_status=Status(person["status"]),
        status=Status(person["status"]),
        previous_role=Role(person["role"]),
        role=role,
        invited_by_user_id=person["invited_by_user_id"],
        initial_message_id=person["initial_message_id"],
        hide_history=person["hide_history"],
        visible_from_sequence=person["visible_from_sequence"],
        visible_to_sequence=person["visible_to_sequence"],
        actor_id=actor_id,
        reason="",
    )


def require_may_invite(
    inviter: Person, invitee: Person, role: Role, *, members_may_invite: bool
) -> None:
    """Raise unless the inviter may bring in this person in this role."""
    own = Role(inviter["role"])
    if own is Role.MEMBER and not members_may_invite:
        raise PermissionDenied("PERMISSION_DENIED", rule="members may not invite here")
    if own is Role.MEMBER and invitee["status"] == REMOVED:
        raise PermissionDenied(
            "PERMISSION_DENIED", rule="only an owner or moderator may invite whom one removed"
        )
    require_grantable(own, role, field="role")


def require_may_add(adder: Person, person: Person, role: Role) -> None:
    """Raise unless the adder may make this person a participant in this role.

    An invitation to a higher role than it may give is not its to replace.
    """
    own = Role(adder["role"])
    if person["status"] == INVITED:
        require_within_reach(own, person)
    require_grantable(own, role, field="role")


def require_may_dismiss(call: Move, actor: Person, person: Person) -> None:
    """Raise unless the actor may revoke or remove this person."""
    own = Role(actor["role"])
    if own is not Role.MEMBER:
        return require_within_reach(own, person)
    took_part = call is Move.REMOVE and person["status"] == JOINED
    if took_part or person["invited_by_user_id"] != actor["user_id"]:
        raise PermissionDenied(
            "PERMISSION_DENIED", rule="a member may only take back invitations of its own"
        )


def require_may_appoint(actor: Person, person: Person, role: Role) -> None:
    """Raise unless the actor may give this role to this person."""
    own = Role(actor["role"])
    require_within_reach(own, person)
    require_grantable(own, role, field="participant.role")


def require_room(occupied: int, changes: Iterable[Change]) -> None:
    """Raise if the changes would fill the conversation beyond its limit."""
    entering = sum(1 for change in changes if change.previous_status not in (INVITED, JOINED))
    if occupied + entering > MAX_PARTICIPANTS:
        raise FailedPrecondition("TOO_MANY_PARTICIPANTS", limit=MAX_PARTICIPANTS)
