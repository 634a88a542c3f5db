"""What becomes of a conversation when one of its users is erased: who inherits it, what goes."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from service.domain import ParticipantRole as Role
from service.domain import ParticipantStatus as Status
from service.rules.users import Parting, part

GONE, ANN, BEN, CAT = (UUID(int=n) for n in range(1, 5))


def person(
    user_id: UUID,
    role: Role = Role.MEMBER,
    *,
    since: int = 2020,
    usable: bool = True,
    status: Status = Status.JOINED,
) -> dict[str, Any]:
    joined = status is Status.JOINED
    return {
        "user_id": user_id,
        "username": str(user_id),
        "status": status,
        "role": role,
        "usable": usable,
        "joined_at": datetime(since, 1, 1, tzinfo=UTC) if joined else None,
        "invited_by_user_id": None,
        "initial_message_id": None,
        "hide_history": False,
        "visible_from_sequence": 1,
        "visible_to_sequence": None if joined else 0,
    }


def parting(*people: dict[str, Any], creator: UUID = GONE, delete_shared: bool = False) -> Parting:
    conversation = {"creator_id": creator, "last_sequence": 7}
    return part(GONE, conversation, people, delete_shared=delete_shared)


def told(parting: Parting) -> list[tuple[UUID, Status, Role]]:
    return [(change.user_id, change.status, change.role) for change in parting.changes]


OWNER = person(GONE, Role.OWNER)


@pytest.mark.parametrize(
    ("others", "heir"),
    [
        # An owner that is left needs no promotion, even if it cannot act: nothing changed for it.
        ([person(ANN, Role.MODERATOR), person(BEN, Role.OWNER, usable=False)], BEN),
        ([person(ANN, Role.OWNER), person(BEN, Role.OWNER, since=2019)], BEN),
        # A moderator before a member, however long it has been there.
        ([person(ANN, Role.MODERATOR), person(BEN, since=2000)], ANN),
        ([person(ANN, Role.MODERATOR), person(BEN, Role.MODERATOR, since=2019)], BEN),
        ([person(ANN, since=2021), person(BEN), person(CAT, Role.OBSERVER, since=2000)], BEN),
        # Whoever cannot act is no good as an owner, unless there is nobody else.
        ([person(ANN, Role.MODERATOR, usable=False), person(BEN)], BEN),
        ([person(ANN, usable=False)], ANN),
        ([person(ANN, Role.OBSERVER)], ANN),
        # An invitation is no membership.
        ([person(ANN, Role.OWNER, status=Status.INVITED), person(BEN)], BEN),
    ],
)
def test_what_it_created_passes_to_the_best_of_those_who_are_left(
    others: list[dict[str, Any]], heir: UUID
) -> None:
    decided = parting(OWNER, *others)

    assert decided.creator_id == heir
    assert decided.transfers
    assert decided.ends
    assert not decided.purges
    was_owner = any(each["user_id"] == heir and each["role"] is Role.OWNER for each in others)
    promotion = [] if was_owner else [(heir, Status.JOINED, Role.OWNER)]
    assert told(decided) == [*promotion, (GONE, Status.REMOVED, Role.OWNER)]
    assert decided.changes[-1].visible_to_sequence == 7


def test_the_last_owner_is_followed_by_another_wherever_it_was() -> None:
    decided = parting(OWNER, person(ANN, Role.MODERATOR), creator=BEN)
    assert told(decided) == [
        (ANN, Status.JOINED, Role.OWNER),
        (GONE, Status.REMOVED, Role.OWNER),
    ]
    assert decided.transfers
    assert decided.creator_id is None


@pytest.mark.parametrize(
    ("own", "status"),
    [(person(GONE), Status.REMOVED), (person(GONE, status=Status.INVITED), Status.REVOKED)],
)
def test_a_guest_just_goes(own: dict[str, Any], status: Status) -> None:
    decided = parting(own, person(ANN, Role.OWNER), creator=ANN)
    assert told(decided) == [(GONE, status, Role.MEMBER)]
    assert (decided.ends, decided.transfers, decided.purges) == (True, False, False)
    # Though it may be there alone: it is not its to take away.
    assert not parting(own, creator=ANN).purges


@pytest.mark.parametrize(
    ("people", "delete_shared", "purges"),
    [
        ([OWNER], False, True),
        ([], False, True),
        ([OWNER, person(ANN, status=Status.INVITED)], False, True),
        ([OWNER, person(ANN)], False, False),
        ([OWNER, person(ANN)], True, True),
        # Left long ago, and still the one who created it.
        ([person(ANN, Role.OWNER)], False, False),
        ([person(ANN, Role.OWNER)], True, True),
    ],
)
def test_what_nobody_else_is_in_goes_with_its_creator_and_what_is_shared_on_request(
    people: list[dict[str, Any]], delete_shared: bool, purges: bool
) -> None:
    decided = parting(*people, delete_shared=delete_shared)
    assert decided.purges is purges
    assert decided.ends is (OWNER in people)
    assert (decided.creator_id is None) is purges
    if purges:
        assert decided.changes == ()


def test_where_nothing_of_it_is_left_nothing_is_done() -> None:
    assert parting(person(ANN, Role.OWNER), creator=ANN) == Parting()
