"""Messages in lists are encoded once, and never shown as they were."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from parley.v1 import message_pb2 as pb
from service.encoded import MAX_BYTES, EncodedMessages

from .make import Client, Conversation

AT = datetime(2026, 11, 30, 12, tzinfo=UTC)
LATER = AT.replace(hour=13)


def row(number: int = 1, **values: Any) -> dict[str, Any]:
    """A message as it is stored."""
    return {
        "id": UUID(int=number),
        "conversation_id": UUID(int=99),
        "sequence": number,
        "sender_id": None,
        "role": "ASSISTANT",
        "status": "COMPLETE",
        "content": "hello",
        "metadata": "{}",
        "tokens_used": None,
        "input_tokens": None,
        "output_tokens": None,
        "model": "",
        "reply_to_message_id": None,
        "parent_message_id": None,
        "sent_at": None,
        "external_id": None,
        "revision": 1,
        "mark_count": 0,
        "created_at": AT,
        "updated_at": AT,
        "deleted_at": None,
    } | values


def content(item: bytes) -> str:
    """What the only message of a list says."""
    (message,) = pb.ListMessagesResponse.FromString(item).messages
    return message.content


def test_a_message_is_encoded_once() -> None:
    encoded = EncodedMessages()

    assert encoded.item(row()) is encoded.item(row())
    assert content(encoded.item(row())) == "hello"


@pytest.mark.parametrize(
    "change", [{"revision": 2}, {"mark_count": 1}, {"updated_at": LATER}, {"deleted_at": LATER}]
)
def test_a_message_that_has_changed_is_encoded_anew(change: dict[str, Any]) -> None:
    encoded = EncodedMessages()
    encoded.item(row())

    shown = content(encoded.item(row(content="goodbye", **change)))

    assert shown == ("" if "deleted_at" in change else "goodbye")


def test_the_oldest_makes_room() -> None:
    encoded = EncodedMessages(max_messages=2)
    first, second, _ = (encoded.item(row(number)) for number in (1, 2, 3))

    assert encoded.item(row(2)) is second
    assert encoded.item(row(1)) is not first


@pytest.mark.parametrize("size", [0, 90, 10_000, 20_000])
def test_items_of_all_sizes_are_a_list(size: int) -> None:
    encoded = EncodedMessages()
    items = [encoded.item(row(number, content=size * "x")) for number in (1, 2)]

    shown = pb.ListMessagesResponse.FromString(b"".join(items)).messages

    assert [message.content for message in shown] == [size * "x"] * 2
    assert (encoded.item(row()) is items[0]) == (len(items[0]) <= MAX_BYTES)


async def listed(parley: Client, talk: Conversation) -> list[tuple[str, int, bool]]:
    return [
        (message.content, message.revision, message.HasField("delete_time"))
        for message in await parley.all_messages(talk)
    ]


async def test_a_list_shows_each_change_of_a_message(parley: Client) -> None:
    talk = await parley.conversation(await parley.user(), first="hello")
    assert await listed(parley, talk) == [("hello", 1, False)]

    await parley.edit(talk, sequence=1, content="goodbye")
    assert await listed(parley, talk) == [("goodbye", 2, False)]

    await parley.delete_message(talk, sequence=1)
    assert await listed(parley, talk) == [("", 2, True)]

    await parley.undelete_message(talk, sequence=1)
    assert await listed(parley, talk) == [("goodbye", 2, False)]


async def test_a_list_shows_what_a_restored_database_holds(
    parley: Client, database: asyncpg.Connection
) -> None:
    """It went back to before an edit, and the message was edited otherwise."""
    talk = await parley.conversation(await parley.user(), first="hello")
    await parley.edit(talk, sequence=1, content="goodbye")
    assert await listed(parley, talk) == [("goodbye", 2, False)]

    await database.execute(
        "UPDATE messages SET content = 'farewell', updated_at = clock_timestamp()"
        " WHERE conversation_id = $1",
        talk.id,
    )

    assert await listed(parley, talk) == [("farewell", 2, False)]
