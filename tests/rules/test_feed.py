"""The change feed, decided: places, cursors' lives, responses, what is withheld."""

from math import inf
from typing import Any
from uuid import UUID

import pytest

from service.errors import OutOfRange
from service.rules.feed import (
    BEGINNING,
    Head,
    Place,
    Subject,
    fitting,
    require_present,
    told,
)

TALK, OTHER = UUID(int=1), UUID(int=2)
MIB = 1 << 20


def facts(*xids: int, conversation_id: UUID = TALK, first: int = 1) -> list[dict[str, Any]]:
    """Facts of one conversation, each by the transaction of that number."""
    return [
        {"conversation_id": conversation_id, "era": 1, "xid": str(xid), "version": first + n}
        for n, xid in enumerate(xids)
    ]


def test_places_are_ordered_as_the_log_is() -> None:
    places = [
        BEGINNING,
        Place(1, 9, OTHER, 7),
        Place(1, 10, TALK, 8),
        Place(1, 10, TALK, 9),
        Place(1, 10, OTHER, 1),
        Place(2, 3, TALK, 10),
    ]

    assert sorted(places, reverse=True) == places[::-1]
    assert Place.of(facts(10, first=8)[0]) == places[2]


HEAD = Head(era=2, newest=Place(2, 50, TALK, 7), end_xid=60)


@pytest.mark.parametrize(
    ("place", "subject"),
    [
        (BEGINNING, Subject()),
        (Place(2, 59, OTHER, 100), Subject()),
        (Place(1, 900, OTHER, 1), Subject(user_id=OTHER)),
        (Place(2, 900, TALK, 7), Subject(conversation_id=TALK)),
    ],
)
def test_a_cursor_of_this_life_opens(place: Place, subject: Subject) -> None:
    require_present(place, era=2, head=HEAD, subject=subject)


@pytest.mark.parametrize(
    ("place", "era", "subject"),
    [
        (BEGINNING, 1, Subject()),
        (BEGINNING, 3, Subject()),
        (Place(2, 60, TALK, 1), 2, Subject()),
        (Place(3, 1, TALK, 1), 2, Subject(user_id=OTHER)),
        (Place(2, 50, TALK, 8), 2, Subject(conversation_id=TALK)),
        (Place(2, 50, TALK, 7), 1, Subject(conversation_id=TALK)),
    ],
)
def test_a_cursor_of_another_life_or_of_the_future_is_expired(
    place: Place, era: int, subject: Subject
) -> None:
    with pytest.raises(OutOfRange) as raised:
        require_present(place, era=era, head=HEAD, subject=subject)
    assert raised.value.reason == "CURSOR_EXPIRED"


@pytest.mark.parametrize(
    ("xids", "limit", "expected"),
    [
        ([1, 2, 3], 3, (3, False)),
        ([1, 2, 3], 2, (2, False)),
        # The second call's events stay together.
        ([1, 2, 2], 2, (1, False)),
        ([1, 1, 2, 2, 2], 4, (2, False)),
        # They alone are too many.
        ([1, 1, 1], 2, (2, True)),
        ([1, 1], 1, (1, True)),
        ([1], 1, (1, False)),
        ([], 5, (0, False)),
    ],
)
def test_what_one_call_made_stays_together_unless_it_alone_is_too_much(
    xids: list[int], limit: int, expected: tuple[int, bool]
) -> None:
    assert fitting(facts(*xids), [10.0] * len(xids), limit=limit, byte_limit=MIB) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([MIB // 2, MIB // 2, 1], (2, False)),
        ([MIB // 2, MIB, 1], (1, False)),
        # One is always given, or nothing would ever be.
        ([3 * MIB, 1, 1], (1, False)),
        # Not even looked up: that is for the next time.
        ([inf, inf, inf], (0, False)),
        ([1, inf, inf], (1, False)),
    ],
)
def test_a_response_ends_at_a_mebibyte(sizes: list[float], expected: tuple[int, bool]) -> None:
    assert fitting(facts(1, 2, 3), sizes, limit=10, byte_limit=MIB) == expected


def test_a_call_beyond_a_mebibyte_is_cut_where_it_must_be() -> None:
    made = facts(1, 2, 2, 2)

    assert fitting(made, [1, MIB, MIB, MIB], limit=10, byte_limit=MIB) == (1, False)
    assert fitting(made[1:], [MIB, MIB, MIB], limit=10, byte_limit=MIB) == (1, True)
    assert fitting(made[3:], [MIB], limit=10, byte_limit=MIB) == (1, False)


def test_the_same_transaction_in_another_conversation_is_another_call() -> None:
    made = [*facts(5, 5), *facts(5, conversation_id=OTHER)]

    assert fitting(made, [1.0] * 3, limit=2, byte_limit=MIB) == (2, False)


def test_what_is_withheld_comes_in_runs() -> None:
    made = [*facts(1, 2, 3, 4, 5, 6), *facts(7, 8, conversation_id=OTHER, first=7)]
    visible = [False, False, True, False, True, False, False, False]

    assert told(made, visible) == [(0, 2), (2, 0), (3, 4), (4, 0), (5, 6), (6, 8)]


def test_a_run_ends_where_versions_do_not_follow_each_other() -> None:
    made = [*facts(1, 2), *facts(9, first=5)]

    assert told(made, [False, False, False]) == [(0, 2), (2, 5)]


def test_everything_visible_and_nothing() -> None:
    assert told(facts(1, 2), [True, True]) == [(0, 0), (1, 0)]
    assert told(facts(1, 2), [False, False]) == [(0, 2)]
    assert told([], []) == []
