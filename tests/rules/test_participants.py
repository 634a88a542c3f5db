"""The life of a participant, without a database: which call leads where, and what it changes."""

from typing import Any
from uuid import UUID, uuid4

import pytest

from service.domain import ParticipantRole as Role
from service.domain import ParticipantStatus as Status
from service.errors import FailedPrecondition, NotFound, PermissionDenied
from service.rules.participants import (
    MAX_PARTICIPANTS,
    MOVES,
    Change,
    Move,
    enter,
    leave,
    move,
    require_may_invite,
    require_room,
)
from service.rules.rights import MAY_GRANT, RIGHTS, Right, require_right

# As in the contract: from each status, where each call leads; `-` is a refusal.
TABLE = """
          Invite   Add     Accept  Decline   Revoke   Leave     Remove
none      INVITED  JOINED  -       -         -        -         -
INVITED   INVITED  JOINED  JOINED  DECLINED  REVOKED  DECLINED  REVOKED
JOINED    JOINED   JOINED  JOINED  -         -        LEFT      REMOVED
DECLINED  INVITED  JOINED  -       DECLINED  -        DECLINED  -
REVOKED   INVITED  JOINED  -       -         REVOKED  -         REVOKED
LEFT      INVITED  JOINED  -       -         -        LEFT      -
REMOVED   INVITED  JOINED  -       -         -        -         REMOVED
"""
CALLS, *LINES = [line.split() for line in TABLE.strip().splitlines()]
CELLS = [
    (Move(call), None if before == "none" else Status(before), after)
    for before, *afters in LINES
    for call, after in zip(CALLS, afters, strict=True)
]


def person(
    status: Status | None = None, role: Role = Role.MEMBER, **columns: Any
) -> dict[str, Any]:
    """A user and its participant's row; all None where there is none."""
    row = {
        "user_id": uuid4(),
        "username": "bob",
        "usable": True,
        "sees": status in (Status.INVITED, Status.JOINED),
        "status": status,
        "role": role if status else None,
        "invited_by_user_id": None,
        "initial_message_id": None,
        "hide_history": False if status else None,
        "visible_from_sequence": 1 if status else None,
        "visible_to_sequence": None if status in (None, Status.JOINED) else 0,
        "status_reason": "",
    }
    return {**row, **columns}


def moved(call: Move, who: dict[str, Any], last_sequence: int = 10) -> Change:
    change = move(call, who, last_sequence=last_sequence, actor_id=who["user_id"])
    assert change
    return change


@pytest.mark.parametrize(("call", "before", "after"), CELLS)
def test_each_call_leads_where_the_contract_says(
    call: Move, before: Status | None, after: str
) -> None:
    who = person(before)

    if after == "-" and before is None:
        with pytest.raises(NotFound):
            moved(call, who)
    elif after == "-":
        with pytest.raises(FailedPrecondition) as refused:
            moved(call, who)
        assert refused.value.reason == "INVALID_STATE_TRANSITION"
        assert refused.value.known["current_status"] == before
        leading = [cell[1] for cell in CELLS if cell[0] is call and cell[2] != "-" and cell[1]]
        assert refused.value.known["allowed"] == ", ".join(leading)
    elif after == before:
        assert move(call, who, last_sequence=10, actor_id=None) is None
    else:
        change = moved(call, who)
        assert (change.previous_status, change.status) == (before, after)
        assert change.joins == (after == "JOINED")
        assert change.leaves == (before == "JOINED")


def test_the_contracts_table_is_all_there_is() -> None:
    assert sum(after != "-" for _, _, after in CELLS) == sum(map(len, MOVES.values()))


# Windows: (from, to); `to` None is open, 0 is nothing.


def window(change: Change) -> tuple[int, int | None]:
    return change.visible_from_sequence, change.visible_to_sequence


def rejoined(**columns: Any) -> tuple[int, int | None]:
    return window(moved(Move.ACCEPT, person(Status.INVITED, **columns), last_sequence=20))


def test_whoever_is_invited_reads_nothing_yet() -> None:
    assert window(moved(Move.INVITE, person())) == (1, 0)


def test_whoever_joins_reads_from_the_start_unless_history_is_hidden() -> None:
    assert rejoined() == (1, None)
    assert rejoined(hide_history=True) == (21, None)


def test_whoever_leaves_reads_up_to_the_last_message_and_keeps_it_whatever_comes() -> None:
    assert window(moved(Move.LEAVE, person(Status.JOINED, visible_from_sequence=3))) == (3, 10)
    left: dict[str, Any] = {"visible_from_sequence": 3, "visible_to_sequence": 7}
    assert window(moved(Move.INVITE, person(Status.LEFT, **left))) == (3, 7)
    assert window(moved(Move.DECLINE, person(Status.INVITED, **left))) == (3, 7)
    assert window(moved(Move.REVOKE, person(Status.INVITED, **left))) == (3, 7)


def test_whoever_joins_again_keeps_the_old_start_unless_history_is_hidden() -> None:
    left: dict[str, Any] = {"visible_from_sequence": 3, "visible_to_sequence": 7}
    assert rejoined(**left) == (3, None)
    assert rejoined(**left, hide_history=True) == (21, None)


def test_whoever_declines_has_read_nothing() -> None:
    assert window(moved(Move.DECLINE, person(Status.INVITED))) == (1, 0)


def test_an_invitation_renews_the_terms_and_accepting_keeps_them() -> None:
    inviter, message = uuid4(), uuid4()
    change = enter(
        Move.INVITE,
        person(Status.LEFT, Role.OWNER, visible_to_sequence=7),
        last_sequence=10,
        role=Role.OBSERVER,
        invited_by=inviter,
        actor_id=inviter,
        initial_message_id=message,
        reason="come back",
        hide_history=True,
    )
    assert change
    assert (change.previous_role, change.role) == (Role.OWNER, Role.OBSERVER)
    assert (change.invited_by_user_id, change.initial_message_id) == (inviter, message)
    assert (change.hide_history, change.reason, window(change)) == (True, "come back", (1, 7))


# Leaving


def left(
    who: dict[str, Any], successor: dict[str, Any] | None = None, *, owners: int, joined: int
) -> list[tuple[UUID, Status, Role]]:
    changes = leave(
        who,
        successor,
        owners=owners,
        joined=joined,
        last_sequence=10,
        actor_id=who["user_id"],
        reason="enough",
    )
    return [(change.user_id, change.status, change.role) for change in changes]


def test_the_last_owner_of_others_needs_a_successor_who_is_promoted_first() -> None:
    owner, heir = person(Status.JOINED, Role.OWNER), person(Status.JOINED, Role.OBSERVER)
    with pytest.raises(FailedPrecondition, match="LAST_OWNER"):
        left(owner, owners=1, joined=2)
    assert left(owner, heir, owners=1, joined=2) == [
        (heir["user_id"], Status.JOINED, Role.OWNER),
        (owner["user_id"], Status.LEFT, Role.OWNER),
    ]


def test_who_is_alone_or_not_the_last_owner_needs_none() -> None:
    owner, member = person(Status.JOINED, Role.OWNER), person(Status.JOINED)
    assert left(owner, owners=1, joined=1) == [(owner["user_id"], Status.LEFT, Role.OWNER)]
    assert left(owner, owners=2, joined=2) == [(owner["user_id"], Status.LEFT, Role.OWNER)]
    assert left(member, owners=1, joined=2) == [(member["user_id"], Status.LEFT, Role.MEMBER)]


def test_a_successor_who_owns_already_is_left_as_it_is() -> None:
    owner, other = person(Status.JOINED, Role.OWNER), person(Status.JOINED, Role.OWNER)
    assert left(owner, other, owners=2, joined=2) == [(owner["user_id"], Status.LEFT, Role.OWNER)]


@pytest.mark.parametrize("status", [None, *(each for each in Status if each is not Status.JOINED)])
def test_a_successor_is_joined(status: Status | None) -> None:
    owner = person(Status.JOINED, Role.OWNER)
    with pytest.raises(FailedPrecondition, match="NOT_A_PARTICIPANT"):
        left(owner, person(status), owners=1, joined=1)


def test_nobody_succeeds_itself() -> None:
    owner = person(Status.JOINED, Role.OWNER)
    with pytest.raises(FailedPrecondition, match="NOT_A_PARTICIPANT"):
        left(owner, owner, owners=1, joined=2)


@pytest.mark.parametrize(
    "who",
    [person(Status.JOINED, Role.MODERATOR), person(Status.INVITED, Role.OWNER)],
    ids=["a moderator", "who is invited to own"],
)
def test_only_an_owner_makes_an_owner_by_leaving(who: dict[str, Any]) -> None:
    with pytest.raises(PermissionDenied, match="successor"):
        left(who, person(Status.JOINED), owners=1, joined=3)


def test_a_promotion_says_nothing_new_of_how_the_successor_came_in() -> None:
    owner = person(Status.JOINED, Role.OWNER)
    heir = person(Status.JOINED, status_reason="old friend", visible_from_sequence=3)
    promotion, _ = leave(
        owner, heir, owners=1, joined=2, last_sequence=10, actor_id=None, reason="enough"
    )
    assert (promotion.previous_status, promotion.previous_role) == (Status.JOINED, Role.MEMBER)
    assert (promotion.reason, window(promotion)) == ("", (3, None))
    assert not promotion.joins
    assert not promotion.leaves


# Rights


@pytest.mark.parametrize(
    ("own", "grantable"),
    [
        (Role.OWNER, {Role.OWNER, Role.MODERATOR, Role.MEMBER, Role.OBSERVER}),
        (Role.MODERATOR, {Role.MODERATOR, Role.MEMBER, Role.OBSERVER}),
        (Role.MEMBER, {Role.MEMBER, Role.OBSERVER}),
        (Role.OBSERVER, set()),
    ],
)
def test_nobody_gives_a_role_above_its_own(own: Role, grantable: set[Role]) -> None:
    assert MAY_GRANT[own] == grantable
    for role in set(Role) - grantable:
        with pytest.raises(PermissionDenied, match="ROLE_NOT_ALLOWED"):
            require_may_invite(person(Status.JOINED, own), person(), role, members_may_invite=True)


def test_members_invite_where_they_may_and_nobody_who_was_removed() -> None:
    member, moderator = person(Status.JOINED), person(Status.JOINED, Role.MODERATOR)
    require_may_invite(member, person(Status.LEFT), Role.MEMBER, members_may_invite=True)
    with pytest.raises(PermissionDenied, match="members may not invite"):
        require_may_invite(member, person(), Role.MEMBER, members_may_invite=False)
    require_may_invite(moderator, person(), Role.MEMBER, members_may_invite=False)
    with pytest.raises(PermissionDenied, match="removed"):
        require_may_invite(member, person(Status.REMOVED), Role.MEMBER, members_may_invite=True)
    require_may_invite(moderator, person(Status.REMOVED), Role.MEMBER, members_may_invite=True)


@pytest.mark.parametrize("right", [Right.SEND, Right.INVITE])
@pytest.mark.parametrize("role", Role)
def test_every_role_but_observer_sends_and_invites(right: Right, role: Role) -> None:
    assert (role in RIGHTS[right]) == (role is not Role.OBSERVER)


@pytest.mark.parametrize(
    ("right", "roles"),
    [
        (Right.MARK_READ, {Role.OWNER, Role.MODERATOR, Role.MEMBER, Role.OBSERVER}),
        (Right.DISMISS, {Role.OWNER, Role.MODERATOR, Role.MEMBER}),
        (Right.ADD, {Role.OWNER, Role.MODERATOR}),
        (Right.APPOINT, {Role.OWNER, Role.MODERATOR}),
    ],
)
def test_each_right_is_of_these_roles(right: Right, roles: set[Role]) -> None:
    assert RIGHTS[right] == roles


@pytest.mark.parametrize(
    ("who", "error"),
    [
        (None, NotFound),
        (person(), NotFound),
        (person(Status.DECLINED), NotFound),
        (person(Status.INVITED, Role.OWNER), PermissionDenied),
        (person(Status.LEFT, Role.OWNER, sees=True), PermissionDenied),
        (person(Status.JOINED, Role.OBSERVER), PermissionDenied),
    ],
)
def test_who_does_not_see_is_told_of_nothing_and_who_does_is_refused(
    who: dict[str, Any] | None, error: type[Exception]
) -> None:
    with pytest.raises(error):
        require_right(Right.INVITE, who, conversation="tea")


def test_a_conversation_has_room_for_a_thousand_joined_or_invited() -> None:
    invited = moved(Move.INVITE, person())
    joined = moved(Move.ACCEPT, person(Status.INVITED))
    require_room(MAX_PARTICIPANTS - 1, [invited, joined])
    require_room(MAX_PARTICIPANTS, [joined])
    with pytest.raises(FailedPrecondition, match="TOO_MANY_PARTICIPANTS"):
        require_room(MAX_PARTICIPANTS, [invited])
    with pytest.raises(FailedPrecondition, match="TOO_MANY_PARTICIPANTS"):
        require_room(MAX_PARTICIPANTS - 1, [invited, moved(Move.INVITE, person(Status.LEFT))])
