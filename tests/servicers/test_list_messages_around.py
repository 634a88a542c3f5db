"""ListMessages around a message: a page with its neighbours, and the way on in both directions."""

from typing import Any
from uuid import UUID

import asyncpg
import pytest

from parley.v1 import message_pb2 as pb

from ..make import NOBODY, SYSTEM, Client, Conversation, failure
from .test_list_messages import (
    BOTH_ORDERS,
    MIB,
    NEWEST_FIRST,
    OLDEST_FIRST,
    fill,
    filled,
    ordered,
    page,
    pages_back,
    sequences,
)


async def message_id(parley: Client, talk: Conversation, sequence: int) -> str:
    request = pb.GetMessageRequest(conversation_id=talk.id, sequence=sequence)
    response = await parley.messages.GetMessage(request)
    return response.message.id  # type: ignore[no-any-return]


async def pages_on(
    parley: Client, talk: Conversation, first: pb.ListMessagesResponse, **values: Any
) -> list[pb.ListMessagesResponse]:
    """All pages after this one."""
    found = [first]
    while found[-1].next_page_token:
        token = found[-1].next_page_token
        found.append(await page(parley, talk, page_token=token, **values))
    return found[1:]


# The window


@BOTH_ORDERS
@pytest.mark.parametrize("anchor", [1, 2, 10, 19, 20])
async def test_a_window_holds_the_message_and_its_neighbours(
    parley: Client, order_by: str, anchor: int
) -> None:
    talk = await filled(parley, 20)
    asked: dict[str, Any] = {"order_by": order_by, "before_count": 3, "after_count": 2}
    shown = ordered(range(max(anchor - 3, 1), min(anchor + 2, 20) + 1), order_by)

    by_sequence = await page(parley, talk, around_sequence=anchor, **asked)
    id = await message_id(parley, talk, anchor)
    by_id = await page(parley, talk, around_message_id=id, **asked)

    assert sequences(by_sequence) == shown
    assert by_sequence.anchor_sequence == anchor
    assert by_id == by_sequence
    on = by_sequence.next_page_token, by_sequence.previous_page_token
    lower, upper = on if order_by == NEWEST_FIRST else on[::-1]
    assert (lower == "", upper == "") == (anchor <= 4, anchor >= 18)


@BOTH_ORDERS
@pytest.mark.parametrize("anchor", [1, 7, 20])
@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (3, 3), (500, 500)])
async def test_from_a_window_the_tokens_lead_to_everything_once(
    parley: Client, order_by: str, anchor: int, before: int, after: int
) -> None:
    talk = await filled(parley, 20)
    asked: dict[str, Any] = {
        "around_sequence": anchor,
        "before_count": before,
        "after_count": after,
        "order_by": order_by,
        "page_size": 3,
    }

    window = await page(parley, talk, **asked)
    on = await pages_on(parley, talk, window, **asked)
    back = await pages_back(parley, talk, window, **asked)

    assert sequences(*back[::-1], window, *on) == ordered(range(1, 21), order_by)
    assert {each.anchor_sequence for each in (*on, *back)} <= {0}


async def test_the_way_on_need_not_repeat_where_it_began(parley: Client) -> None:
    talk = await filled(parley, 20)

    window = await page(parley, talk, around_sequence=10, before_count=1, after_count=1)
    on = await page(parley, talk, page_token=window.next_page_token, page_size=2)
    back = await page(parley, talk, page_token=window.previous_page_token, page_size=2)

    assert [sequences(each) for each in (back, window, on)] == [[13, 12], [11, 10, 9], [8, 7]]


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({}, range(15, 66)),
        ({"before_count": 2}, range(38, 41)),
        ({"after_count": 2}, range(40, 43)),
        ({"before_count": 500, "after_count": 500}, range(1, 81)),
    ],
    ids=str,
)
async def test_a_window_has_25_on_each_side_unless_told_otherwise(
    parley: Client, counts: dict[str, int], shown: range
) -> None:
    talk = await filled(parley, 80)

    window = await page(
        parley, talk, around_sequence=40, order_by=OLDEST_FIRST, page_size=1, **counts
    )

    assert sequences(window) == list(shown)


async def test_a_window_may_be_as_large_as_1001(parley: Client) -> None:
    talk = await filled(parley, 1_100, "")

    window = await page(
        parley, talk, around_sequence=550, before_count=500, after_count=500, order_by=OLDEST_FIRST
    )

    assert sequences(window) == list(range(50, 1_051))


async def test_a_window_is_cut_at_a_mebibyte_and_leads_on(parley: Client) -> None:
    talk = await filled(parley, 0)
    for _ in range(2):
        await fill(parley, talk, 8, "x" * 250_000)
    asked: dict[str, Any] = {"around_sequence": 8, "order_by": OLDEST_FIRST}

    window = await page(parley, talk, **asked)
    on = await pages_on(parley, talk, window, **asked)
    back = await pages_back(parley, talk, window, **asked)

    assert sequences(window) == [6, 7, 8, 9]
    assert sequences(*back[::-1], window, *on) == list(range(1, 17))
    assert all(each.ByteSize() <= MIB for each in (window, *on, *back))


# Filters


@BOTH_ORDERS
@pytest.mark.parametrize("anchor", [6, 7])
async def test_filters_choose_the_neighbours_and_the_message_too(
    parley: Client, order_by: str, anchor: int
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    for n in range(1, 13):
        await parley.message(talk, ada if n % 2 else bob)
    asked: dict[str, Any] = {
        "around_sequence": anchor,
        "sender_id": "ada",
        "before_count": 2,
        "after_count": 2,
        "order_by": order_by,
        "page_size": 1,
    }

    window = await page(parley, talk, **asked)
    on = await pages_on(parley, talk, window, **asked)
    back = await pages_back(parley, talk, window, **asked)

    assert sequences(window) == ordered([3, 5, 7, 9, *([11] if anchor == 7 else [])], order_by)
    assert window.anchor_sequence == anchor
    assert sequences(*back[::-1], window, *on) == ordered([1, 3, 5, 7, 9, 11], order_by)


async def test_where_no_neighbour_passes_the_tokens_lead_to_those_who_do(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    for sender in (ada, ada, bob, bob):
        await parley.message(talk, sender)
    asked: dict[str, Any] = {"around_sequence": 4, "sender_id": "ada", "after_count": 1}

    window = await page(parley, talk, **asked)
    on = await page(parley, talk, page_token=window.next_page_token, **asked)

    assert (sequences(window), window.anchor_sequence) == ([], 4)
    assert (sequences(on), window.previous_page_token) == ([2, 1], "")


# The first unread


async def test_a_list_begins_at_the_first_unread_message(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    bobs = parley.acting_as(bob)

    async def anchor() -> int:
        found = await page(bobs, talk, around_first_unread=True)
        assert found.anchor_sequence in [*sequences(found), 0]
        return found.anchor_sequence

    assert await anchor() == 0
    for _ in range(4):
        await parley.message(talk, ada)
    assert await anchor() == 1
    await bobs.mark_read(talk, bob, 2)
    assert await anchor() == 3
    # What is deleted is not unread.
    await parley.delete_message(talk, sequence=3)
    assert await anchor() == 4
    # All is read: around the newest.
    await bobs.mark_read(talk, bob, 4)
    assert await anchor() == 4
    await parley.message(talk, bob)
    assert await anchor() == 5
    await parley.message(talk, ada)
    assert await anchor() == 6


async def test_the_first_unread_message_lies_within_the_window(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    await parley.message(talk, ada)
    await parley.add(talk, bob, invited_by_user_id=ada.id, hide_history=True)
    bobs = parley.acting_as(bob)

    assert await page(bobs, talk, around_first_unread=True) == pb.ListMessagesResponse()
    await parley.message(talk, ada)
    assert (await page(bobs, talk, around_first_unread=True)).anchor_sequence == 2
    await bobs.mark_read(talk, bob, 2)
    await bobs.leave(talk, bob)
    await parley.message(talk, ada)
    left = await page(bobs, talk, around_first_unread=True)
    assert (left.anchor_sequence, sequences(left)) == (2, [2])
    assert (left.next_page_token, left.previous_page_token) == ("", "")


async def test_own_messages_are_passed_over_wherever_the_cursor_is(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    for sender in (bob, bob, ada, bob):
        await parley.message(talk, sender)
    await database.execute(
        "UPDATE participants SET last_read_sequence = 0 WHERE user_id = $1", UUID(bob.id)
    )

    found = await page(parley.acting_as(bob), talk, around_first_unread=True)

    assert found.anchor_sequence == 3


async def test_not_asked_for_the_first_unread_is_not_asked_at_all(parley: Client) -> None:
    talk = await filled(parley, 3)

    assert await page(parley, talk, around_first_unread=False) == await page(parley, talk)


# What is hidden


async def test_a_list_does_not_begin_where_one_may_not_read(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk, other = await parley.conversation(ada), await parley.conversation(ada, bob)
    await parley.message(talk, ada)
    await parley.add(talk, bob, invited_by_user_id=ada.id, hide_history=True)
    await parley.message(talk, ada)
    bobs = parley.acting_as(bob)
    await bobs.leave(talk, bob)
    await parley.message(talk, ada)
    elsewhere = await parley.message(other, ada)

    seen = await page(bobs, talk, around_sequence=2)
    assert (sequences(seen), seen.next_page_token, seen.previous_page_token) == ([2], "", "")
    missing = await failure(page(bobs, talk, around_sequence=4))
    assert (missing.code, missing.reason) == ("NOT_FOUND", "MESSAGE_NOT_FOUND")
    for hidden in (1, 3):
        refused = await failure(page(bobs, talk, around_sequence=hidden))
        assert refused.message == missing.message.replace("4", str(hidden))
        refused = await failure(
            page(bobs, talk, around_message_id=await message_id(parley, talk, hidden))
        )
        assert refused.reason == "MESSAGE_NOT_FOUND"
    for id in (elsewhere.id, NOBODY):
        refused = await failure(page(parley, talk, around_message_id=id))
        assert (refused.code, refused.reason) == ("NOT_FOUND", "MESSAGE_NOT_FOUND")


async def test_who_is_invited_or_a_stranger_gets_no_window(parley: Client) -> None:
    ada, bob, eve = [await parley.user(name) for name in ("ada", "bob", "eve")]
    talk = await parley.conversation(ada, invited=[bob], first="hello")

    invited = await failure(page(parley.acting_as(bob), talk, around_sequence=1))
    stranger = await failure(page(parley.acting_as(eve), talk, around_sequence=1))

    assert (invited.code, invited.reason) == ("PERMISSION_DENIED", "NOT_A_PARTICIPANT")
    assert (stranger.code, stranger.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")


async def test_a_tombstone_can_be_listed_around(parley: Client) -> None:
    talk = await filled(parley, 3)
    await parley.delete_message(talk, sequence=2)

    window = await page(parley, talk, around_sequence=2)

    assert sequences(window) == [3, 2, 1]
    assert window.messages[1].content == ""


# What the request alone decides


@pytest.mark.parametrize(
    ("values", "violations"),
    [
        ({"around_sequence": 0}, {"around_sequence": "OUT_OF_BOUNDS"}),
        ({"around_sequence": -1}, {"around_sequence": "OUT_OF_BOUNDS"}),
        ({"around_message_id": ""}, {"around_message_id": "INVALID_REFERENCE"}),
        ({"around_message_id": "../x"}, {"around_message_id": "INVALID_REFERENCE"}),
        ({"around_first_unread": True}, {"around_first_unread": "INVALID_VALUE"}),
        ({"before_count": -1}, {"before_count": "OUT_OF_BOUNDS"}),
        ({"after_count": 501}, {"after_count": "OUT_OF_BOUNDS"}),
        (
            {"around_sequence": 1, "before_count": 2**31 - 1, "after_count": -(2**31)},
            {"before_count": "OUT_OF_BOUNDS", "after_count": "OUT_OF_BOUNDS"},
        ),
    ],
    ids=str,
)
async def test_a_bad_window_is_named(
    parley: Client, values: dict[str, Any], violations: dict[str, str]
) -> None:
    talk = Conversation(id=NOBODY)

    refused = await failure(page(parley, talk, **values))

    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)


async def test_a_sequence_beyond_all_is_not_found(parley: Client) -> None:
    talk = await parley.conversation(await parley.user())
    await parley.send(talk, role=SYSTEM)

    refused = await failure(page(parley, talk, around_sequence=2**63 - 1))

    assert (refused.code, refused.reason) == ("NOT_FOUND", "MESSAGE_NOT_FOUND")
