"""ListMessages: page by page in both directions, everything once, and nothing hidden."""

from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from parley.v1 import message_pb2 as pb

from ..make import AGENT, ASSISTANT, SYSTEM, USER, Client, Conversation, failure

MIB = 1 << 20
NEWEST_FIRST, OLDEST_FIRST = "sequence desc", "sequence"
BOTH_ORDERS = pytest.mark.parametrize("order_by", [NEWEST_FIRST, OLDEST_FIRST])


async def filled(parley: Client, count: int, content: str = "line {}") -> Conversation:
    """A conversation with so many messages, stored by as few calls as possible."""
    talk = await parley.conversation(await parley.user())
    await fill(parley, talk, count, content)
    return talk


async def fill(parley: Client, talk: Conversation, count: int, content: str = "line {}") -> None:
    for start in range(0, count, 500):
        numbers = range(start, min(start + 500, count))
        messages = [pb.NewMessage(role=SYSTEM, content=content.format(n)) for n in numbers]
        await parley.messages.BatchSendMessages(
            pb.BatchSendMessagesRequest(conversation_id=talk.id, messages=messages)
        )


async def page(parley: Client, talk: Conversation, **values: Any) -> pb.ListMessagesResponse:
    request = pb.ListMessagesRequest(**{"conversation_id": talk.id, **values})
    return await parley.messages.ListMessages(request)  # type: ignore[no-any-return]


async def pages(parley: Client, talk: Conversation, **values: Any) -> list[pb.ListMessagesResponse]:
    """All pages, from the first one on."""
    found = [await page(parley, talk, **values)]
    while found[-1].next_page_token:
        found.append(await page(parley, talk, page_token=found[-1].next_page_token, **values))
    return found


async def pages_back(
    parley: Client, talk: Conversation, last: pb.ListMessagesResponse, **values: Any
) -> list[pb.ListMessagesResponse]:
    """All pages before this one, the nearest first."""
    found = [last]
    while found[-1].previous_page_token:
        token = found[-1].previous_page_token
        found.append(await page(parley, talk, page_token=token, **values))
    return found[1:]


def sequences(*responses: pb.ListMessagesResponse) -> list[int]:
    return [message.sequence for response in responses for message in response.messages]


def ordered(numbers: Sequence[int], order_by: str) -> list[int]:
    return sorted(numbers, reverse=order_by == NEWEST_FIRST)


# Paging


@BOTH_ORDERS
@pytest.mark.parametrize("size", [1, 3, 4, 11, 12, 13, 1000])
async def test_pages_lead_through_everything_once_and_back_again(
    parley: Client, order_by: str, size: int
) -> None:
    talk = await filled(parley, 12)
    asked: dict[str, Any] = {"order_by": order_by, "page_size": size}

    there = await pages(parley, talk, **asked)
    back = await pages_back(parley, talk, there[-1], **asked)

    assert sequences(*there) == ordered(range(1, 13), order_by)
    assert [len(each.messages) for each in there[:-1]] == [size] * (len(there) - 1)
    assert [sequences(each) for each in back] == [sequences(each) for each in there[-2::-1]]
    assert (there[0].previous_page_token, there[-1].next_page_token) == ("", "")
    if back:
        again = await page(parley, talk, page_token=back[-1].next_page_token, **asked)
        assert sequences(again) == sequences(there[1])


async def test_an_empty_conversation_is_one_empty_page(parley: Client) -> None:
    talk = await filled(parley, 0)

    assert await page(parley, talk) == pb.ListMessagesResponse()


async def test_the_newest_come_first_unless_asked_otherwise(parley: Client) -> None:
    talk = await filled(parley, 3)

    assert sequences(await page(parley, talk)) == [3, 2, 1]
    assert sequences(await page(parley, talk, order_by=OLDEST_FIRST)) == [1, 2, 3]


@BOTH_ORDERS
async def test_paging_misses_and_repeats_nothing_while_others_write(
    parley: Client, order_by: str
) -> None:
    talk = await filled(parley, 10)
    asked: dict[str, Any] = {"order_by": order_by, "page_size": 3}

    there = [await page(parley, talk, **asked)]
    while there[-1].next_page_token and len(there) < 6:
        await fill(parley, talk, 2)
        there.append(await page(parley, talk, page_token=there[-1].next_page_token, **asked))
    back = await pages_back(parley, talk, there[-1], **asked)

    if order_by == NEWEST_FIRST:
        assert sequences(*there) == list(range(10, 0, -1))
        # What was written meanwhile lies before the page that was the first then.
        assert sequences(*back[::-1], there[-1]) == list(range(16, 0, -1))
    else:
        assert sequences(*there) == list(range(1, 19))
        assert sequences(*back[::-1], there[-1]) == list(range(1, 19))


async def test_a_page_has_50_messages_or_as_many_as_asked_up_to_1000(parley: Client) -> None:
    talk = await filled(parley, 1_001, "")

    assert len((await page(parley, talk)).messages) == 50
    assert len((await page(parley, talk, page_size=1_000)).messages) == 1_000
    most = await page(parley, talk, page_size=2**31 - 1)
    assert len(most.messages) == 1_000
    rest = await page(parley, talk, page_size=2**31 - 1, page_token=most.next_page_token)
    assert (sequences(rest), rest.next_page_token) == ([1], "")


async def test_the_page_size_may_change_on_the_way(parley: Client) -> None:
    talk = await filled(parley, 9)

    first = await page(parley, talk, page_size=2)
    second = await page(parley, talk, page_size=5, page_token=first.next_page_token)
    back = await page(parley, talk, page_size=1, page_token=second.previous_page_token)

    assert sequences(first, second) == [9, 8, 7, 6, 5, 4, 3]
    assert sequences(back) == [8]


# One MiB


@BOTH_ORDERS
async def test_a_page_is_cut_before_it_outgrows_a_mebibyte(parley: Client, order_by: str) -> None:
    talk = await filled(parley, 0)
    for _ in range(2):
        await fill(parley, talk, 8, "x" * 250_000)

    there = await pages(parley, talk, order_by=order_by)
    back = await pages_back(parley, talk, there[-1], order_by=order_by)

    assert sequences(*there) == ordered(range(1, 17), order_by)
    assert [len(each.messages) for each in there] == [4, 4, 4, 4]
    assert [sequences(each) for each in back] == [sequences(each) for each in there[-2::-1]]
    assert all(each.ByteSize() <= MIB for each in (*there, *back))


@pytest.mark.parametrize(
    ("values", "count"), [(["x"] * 3_000, 90), ([[]] * 150, 950)], ids=["on the wire", "on disk"]
)
async def test_a_page_is_cut_by_the_size_of_its_metadata_too(
    parley: Client, values: list[Any], count: int
) -> None:
    """Whichever measure cuts it, a page that was cut is not the last."""
    talk = await parley.conversation(await parley.user("ada"))
    metadata = Struct()
    metadata.update({"k": values})
    drafts = [pb.NewMessage(role=SYSTEM, metadata=metadata) for _ in range(count)]
    for start in range(0, count, 500):
        await parley.messages.BatchSendMessages(
            pb.BatchSendMessagesRequest(
                conversation_id=talk.id, messages=drafts[start : start + 500]
            )
        )

    there = await pages(parley, talk, page_size=1_000)

    assert sequences(*there) == list(range(count, 0, -1))
    assert len(there) > 1
    assert all(each.ByteSize() <= MIB for each in there)


# Filters


async def test_filters_choose_and_all_must_hold(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bot = await parley.user("ada"), await parley.user("bot", kind=AGENT)
    talk = await parley.conversation(ada, bot)
    await parley.message(talk, ada, external_id="x/1")
    await parley.message(talk, bot, role=ASSISTANT)
    await parley.message(talk, ada)
    await parley.send(talk, role=SYSTEM)
    await database.execute("UPDATE messages SET status = 'FAILED' WHERE sequence = 2")

    async def found(**filters: Any) -> list[int]:
        return sequences(await page(parley, talk, **filters))

    assert await found(sender_id="ada") == await found(sender_id=ada.id) == [3, 1]
    assert await found(external_id="x/1") == [1]
    assert await found(external_id="x") == []
    assert await found(roles=[ASSISTANT, SYSTEM]) == [4, 2]
    assert await found(statuses=[pb.Message.STATUS_FAILED]) == [2]
    assert await found(statuses=[1, 2, 3]) == [4, 3, 2, 1]
    assert await found(sender_id="ada", roles=[ASSISTANT]) == []
    assert await found(sender_id="bot", roles=[ASSISTANT], statuses=[3]) == [2]


async def test_a_span_of_time_includes_its_beginning_and_not_its_end(parley: Client) -> None:
    talk = await parley.conversation(await parley.user())
    one, two, three = [(await parley.send(talk, role=SYSTEM)).create_time for _ in range(3)]
    first, last = Timestamp(seconds=-62_135_596_799), Timestamp(seconds=253_402_300_799)

    async def found(**span: Any) -> list[int]:
        return sequences(await page(parley, talk, **span))

    assert await found(created_after=two) == [3, 2]
    assert await found(created_before=two) == [1]
    assert await found(created_after=one, created_before=three) == [2, 1]
    assert await found(created_after=first, created_before=last) == [3, 2, 1]


async def test_metadata_is_found_by_what_it_contains(parley: Client) -> None:
    talk = await parley.conversation(await parley.user())
    stored: list[Any] = [{"a": 1, "b": {"c": ["x", "y"], "d": None}}, {"a": 2}, {"b": {}}, {}]
    for metadata in stored:
        made = Struct()
        made.update(metadata)
        await parley.send(talk, role=SYSTEM, metadata=made)

    async def found(**contained: Any) -> list[int]:
        made = Struct()
        made.update(contained)
        return sequences(await page(parley, talk, metadata_contains=made))

    assert await found(a=1) == [1]
    assert await found(b={"c": ["y"]}) == [1]
    assert await found(b={"d": None}) == [1]
    assert await found(b={}) == [3, 1]
    assert await found(a="1") == []
    assert await found() == [4, 3, 2, 1]
    assert await found(**{"'; DROP TABLE messages": "%"}) == []


@BOTH_ORDERS
async def test_filtered_pages_lead_there_and_back(parley: Client, order_by: str) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    for n in range(9):
        await parley.message(talk, ada if n % 2 else bob)
    asked: dict[str, Any] = {"order_by": order_by, "page_size": 2, "sender_id": "bob"}

    there = await pages(parley, talk, **asked)
    back = await pages_back(parley, talk, there[-1], **asked)

    assert sequences(*there) == ordered([1, 3, 5, 7, 9], order_by)
    assert [sequences(each) for each in back] == [sequences(each) for each in there[-2::-1]]


async def test_tombstones_are_listed_without_what_they_held(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    metadata = Struct()
    metadata.update({"secret": "plan"})
    await parley.message(talk, ada, "kept", metadata=metadata)
    await parley.message(talk, ada, "a secret", metadata=metadata)
    await database.execute("UPDATE messages SET deleted_at = clock_timestamp() WHERE sequence = 2")

    tombstone, kept = (await page(parley, talk)).messages
    found = await page(parley, talk, metadata_contains=metadata)

    assert kept.content == "kept"
    assert (tombstone.sequence, tombstone.content, tombstone.HasField("metadata")) == (2, "", False)
    assert tombstone.HasField("delete_time")
    assert sequences(found) == [1]
    assert sequences(await page(parley, talk, sender_id="ada")) == [2, 1]


# What the request alone decides


@pytest.mark.parametrize(
    ("values", "violations"),
    [
        ({"conversation_id": ""}, {"conversation_id": "REQUIRED"}),
        ({"page_size": -1}, {"page_size": "INVALID_PAGE_SIZE"}),
        ({"order_by": "create_time"}, {"order_by": "INVALID_ORDER_BY"}),
        ({"order_by": "sequence; DROP TABLE messages"}, {"order_by": "INVALID_ORDER_BY"}),
        ({"order_by": "SEQUENCE"}, {"order_by": "INVALID_ORDER_BY"}),
        ({"sender_id": "\0"}, {"sender_id": "INVALID_REFERENCE"}),
        ({"external_id": "a\nb"}, {"external_id": "INVALID_CHARACTER"}),
        ({"roles": [1, 0, 9]}, {"roles[1]": "REQUIRED", "roles[2]": "INVALID_ENUM_VALUE"}),
        ({"statuses": [4]}, {"statuses[0]": "INVALID_ENUM_VALUE"}),
        ({"created_after": Timestamp(nanos=-1)}, {"created_after": "INVALID_TIME"}),
        (
            {"created_after": Timestamp(seconds=2), "created_before": Timestamp(seconds=1)},
            {"created_before": "INVALID_TIME_RANGE"},
        ),
        (
            {"created_after": Timestamp(seconds=1), "created_before": Timestamp(seconds=1)},
            {"created_before": "INVALID_TIME_RANGE"},
        ),
    ],
    ids=str,
)
async def test_a_bad_field_is_named(
    parley: Client, values: dict[str, Any], violations: dict[str, str]
) -> None:
    talk = Conversation(id="01890000-0000-7000-8000-000000000001")

    refused = await failure(page(parley, talk, **values))

    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)


@pytest.mark.parametrize("sender", ["nemo", "01890000-0000-7000-8000-000000000001"])
async def test_a_sender_who_does_not_exist_is_named(parley: Client, sender: str) -> None:
    talk = await filled(parley, 1)

    refused = await failure(page(parley, talk, sender_id=sender))

    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "USER_NOT_FOUND")
    assert refused.known == {"field": "sender_id", "name": sender}


# Tokens


@pytest.mark.parametrize("token", ["x", "=", "AAAA", "!" * 40, "é", "\n", "A" * 10_000])
async def test_garbage_is_no_page_token(parley: Client, token: str) -> None:
    talk = await filled(parley, 1)

    refused = await failure(page(parley, talk, page_token=token))

    assert (refused.code, refused.violations) == (
        "INVALID_ARGUMENT",
        {"page_token": "INVALID_PAGE_TOKEN"},
    )


async def test_a_page_token_is_bound_to_the_request_it_was_issued_for(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk, other = await parley.conversation(ada, bob), await parley.conversation(ada, bob)
    for conversation in (talk, other):
        await fill(parley, conversation, 4)
    actor = parley.acting_as(ada)
    first = await page(actor, talk, page_size=1)
    metadata = Struct()
    metadata.update({"a": 1})

    moves: list[tuple[Client, Conversation, dict[str, Any]]] = [
        (parley, talk, {}),
        (parley.acting_as(bob), talk, {}),
        (actor, other, {}),
        (actor, talk, {"order_by": OLDEST_FIRST}),
        (actor, talk, {"sender_id": "ada"}),
        (actor, talk, {"external_id": "x"}),
        (actor, talk, {"roles": [USER]}),
        (actor, talk, {"statuses": [1]}),
        (actor, talk, {"created_after": Timestamp(seconds=1)}),
        (actor, talk, {"created_before": Timestamp(seconds=2**32)}),
        (actor, talk, {"metadata_contains": metadata}),
    ]
    for client, conversation, moved in moves:
        refused = await failure(
            page(client, conversation, page_token=first.next_page_token, **moved)
        )
        assert refused.violations == {"page_token": "PAGE_TOKEN_MISMATCH"}, moved

    by_slug = pb.ListMessagesRequest(
        conversation_id=talk.slug, page_size=3, page_token=first.next_page_token
    )
    assert sequences(await actor.messages.ListMessages(by_slug)) == [3, 2, 1]


async def test_a_page_token_grants_no_access(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    await fill(parley, talk, 2)
    bobs = parley.acting_as(bob)
    first = await page(bobs, talk, page_size=1, order_by=OLDEST_FIRST)

    await bobs.leave(talk, bob)
    await fill(parley, talk, 3)
    rest = await page(bobs, talk, page_token=first.next_page_token, order_by=OLDEST_FIRST)

    assert (sequences(rest), rest.next_page_token) == ([2], "")
