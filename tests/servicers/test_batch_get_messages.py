"""BatchGetMessages: several messages of one conversation, each once, and what is not there."""

from typing import Any

import pytest

from parley.v1 import message_pb2 as pb

from ..make import NOBODY, SYSTEM, Client, Conversation, Message, failure
from .test_list_messages import MIB, fill, filled


async def get(parley: Client, talk: Conversation | str, *keys: Any) -> pb.BatchGetMessagesResponse:
    """The messages with these ids and sequences."""
    request = pb.BatchGetMessagesRequest(
        conversation_id=talk if isinstance(talk, str) else talk.id,
        message_ids=[key for key in keys if isinstance(key, str)],
        sequences=[key for key in keys if isinstance(key, int)],
    )
    return await parley.messages.BatchGetMessages(request)  # type: ignore[no-any-return]


def sequences(found: pb.BatchGetMessagesResponse) -> list[int]:
    return [message.sequence for message in found.messages]


async def test_messages_come_by_sequence_each_once(parley: Client) -> None:
    talk = await filled(parley, 6)
    one, two, *_, six = await parley.all_messages(talk)

    found = await get(parley, talk, 6, two.id, 4, one.id, 4, two.id, six.id.upper(), six.id, 2)

    assert sequences(found) == [1, 2, 4, 6]
    assert (found.messages[0], found.messages[-1]) == (one, six)
    assert (list(found.missing_message_ids), list(found.missing_sequences)) == ([], [])
    assert not found.truncated


async def test_a_conversation_may_be_named_by_its_slug(parley: Client) -> None:
    talk = await filled(parley, 2)

    assert sequences(await get(parley, talk.slug, 1)) == [1]


async def test_what_is_missing_is_listed_as_it_was_named(parley: Client) -> None:
    talk, other = await filled(parley, 2), await filled(parley, 1)
    (elsewhere,) = await parley.all_messages(other)

    found = await get(parley, talk, 2**63 - 1, 3, 2, 3, elsewhere.id, NOBODY.upper(), elsewhere.id)

    assert sequences(found) == [2]
    assert list(found.missing_message_ids) == [elsewhere.id, NOBODY.upper()]
    assert list(found.missing_sequences) == [2**63 - 1, 3]
    assert not found.truncated


async def test_what_is_hidden_is_missing(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    before = await parley.message(talk, ada)
    await parley.add(talk, bob, invited_by_user_id=ada.id, hide_history=True)
    within = await parley.message(talk, ada)
    bobs = parley.acting_as(bob)
    await bobs.leave(talk, bob)
    after = await parley.message(talk, ada)

    found = await get(bobs, talk, 1, 2, 3, 4, before.id, within.id, after.id, NOBODY)

    assert list(found.messages) == [within]
    assert list(found.missing_sequences) == [1, 3, 4]
    assert list(found.missing_message_ids) == [before.id, after.id, NOBODY]


async def test_who_is_invited_finds_the_message_that_came_with_it(parley: Client) -> None:
    ada, bob, eve = [await parley.user(name) for name in ("ada", "bob", "eve")]
    talk = await parley.conversation(ada, invited=[bob], first="welcome")
    await parley.message(talk, ada, "a secret")

    found = await get(parley.acting_as(bob), talk, 1, 2)
    stranger = await failure(get(parley.acting_as(eve), talk, 1))
    missing = await failure(get(parley.acting_as(eve), NOBODY, 1))

    assert [message.content for message in found.messages] == ["welcome"]
    assert list(found.missing_sequences) == [2]
    assert (stranger.code, stranger.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")
    assert stranger.message == missing.message.replace(NOBODY, talk.id)


async def test_a_deleted_message_is_found_as_a_tombstone(parley: Client) -> None:
    talk = await filled(parley, 1)
    await parley.delete_message(talk, sequence=1)

    (tombstone,) = (await get(parley, talk, 1)).messages

    assert tombstone.content == ""
    assert tombstone.HasField("delete_time")


async def test_in_a_deleted_conversation_nothing_is_found(parley: Client) -> None:
    talk = await filled(parley, 1)
    await parley.update(talk, is_active=False)
    assert sequences(await get(parley, talk, 1)) == [1]

    await parley.delete(talk)

    assert (await failure(get(parley, talk, 1))).reason == "CONVERSATION_DELETED"


async def test_an_answer_is_cut_at_a_mebibyte_and_says_so(parley: Client) -> None:
    talk = await filled(parley, 0)
    await fill(parley, talk, 8, "x" * 250_000)

    found = await get(parley, talk, *range(10, 0, -1))
    rest = await get(parley, talk, *range(5, 9))

    assert (sequences(found), list(found.missing_sequences)) == ([1, 2, 3, 4], [10, 9])
    assert (found.truncated, rest.truncated) == (True, False)
    assert sequences(rest) == [5, 6, 7, 8]
    assert found.ByteSize() < MIB


async def test_five_hundred_are_found_at_once(parley: Client) -> None:
    talk = await filled(parley, 501)
    ids = [message.id for message in await parley.all_messages(talk)]

    assert len((await get(parley, talk, *range(1, 501))).messages) == 500
    assert len((await get(parley, talk, *ids[:250], *range(251, 501))).messages) == 500
    for keys in (range(1, 502), ids, [*ids[:250], *range(1, 252)]):
        refused = await failure(get(parley, talk, *keys))
        assert refused.code == "INVALID_ARGUMENT"
        assert list(refused.violations.values()) == ["TOO_MANY_ITEMS"]


@pytest.mark.parametrize(
    ("keys", "violations"),
    [
        ((), {"message_ids": "REQUIRED"}),
        ((0, 1, -1), {"sequences[0]": "OUT_OF_BOUNDS", "sequences[2]": "OUT_OF_BOUNDS"}),
        (("", "../x"), {f"message_ids[{n}]": "INVALID_REFERENCE" for n in range(2)}),
        (("00000000-0000-0000-0000-000000000000",), {"message_ids[0]": "INVALID_REFERENCE"}),
        (("x" * 300, 0), {"message_ids[0]": "INVALID_REFERENCE", "sequences[0]": "OUT_OF_BOUNDS"}),
    ],
    ids=str,
)
async def test_a_bad_key_is_named(
    parley: Client, keys: tuple[Any, ...], violations: dict[str, str]
) -> None:
    refused = await failure(get(parley, NOBODY, *keys))

    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)


async def test_a_conversation_must_be_named(parley: Client) -> None:
    for named, reason in (("", "REQUIRED"), ("A B", "INVALID_REFERENCE")):
        refused = await failure(get(parley, named, 1))
        assert refused.violations == {"conversation_id": reason}


async def test_what_was_just_sent_is_found(parley: Client) -> None:
    talk = await filled(parley, 0)
    sent: Message = await parley.send(talk, "hello", role=SYSTEM)

    assert list((await get(parley, talk, sent.id)).messages) == [sent]
