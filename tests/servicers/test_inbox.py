"""ListUserConversations: everything once, newest activity first, and nothing that is hidden."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from google.protobuf.struct_pb2 import Struct
from sqlalchemy import event

from parley.v1 import conversation_pb2 as pb
from parley.v1 import participant_pb2
from service.repositories.inbox import LIST
from service.server import Server

from ..make import NOBODY, SYSTEM, Client, Conversation, Participant, User, failure

INVITED, JOINED = Participant.STATUS_INVITED, Participant.STATUS_JOINED
DECLINED, REVOKED = Participant.STATUS_DECLINED, Participant.STATUS_REVOKED
LEFT, REMOVED = Participant.STATUS_LEFT, Participant.STATUS_REMOVED
EVERY = [INVITED, JOINED, DECLINED, REVOKED, LEFT, REMOVED]


async def inbox(client: Client, **values: Any) -> pb.ListUserConversationsResponse:
    request = pb.ListUserConversationsRequest(**values)
    return await client.conversations.ListUserConversations(request)  # type: ignore[no-any-return]


async def lines(client: Client, **values: Any) -> list[pb.UserConversation]:
    """Every line, page by page."""
    found: list[pb.UserConversation] = []
    token = ""
    while True:
        page = await inbox(client, page_token=token, **values)
        found += page.user_conversations
        token = page.next_page_token
        if not token:
            return found


async def line(client: Client, talk: Conversation, **values: Any) -> pb.UserConversation:
    (found,) = [each for each in await lines(client, **values) if each.conversation.id == talk.id]
    return found


def ids(found: Sequence[pb.UserConversation]) -> list[str]:
    return [each.conversation.id for each in found]


def struct(**values: Any) -> Struct:
    made = Struct()
    made.update(values)
    return made


# What a line shows


async def test_a_line_is_all_that_an_inbox_shows(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob, title="Lunch", metadata=struct(a=1))
    await parley.message(talk, ada, "one")
    last = await parley.message(talk, ada, "two", metadata=struct(b=2))
    bobs = parley.acting_as(bob)

    (shown,) = (await inbox(bobs)).user_conversations

    assert shown.conversation == await bobs.seen(talk)
    assert shown.participant == await bobs.participant(talk, bob)
    assert shown.last_message == last
    assert shown.unread_count == 2


async def test_without_messages_there_is_none_to_show(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    shown = await line(parley.acting_as(ada), talk)

    assert (shown.HasField("last_message"), shown.unread_count) == (False, 0)
    assert shown.conversation.last_activity_time == talk.create_time


async def test_nobody_has_no_conversations_and_no_page_after(parley: Client) -> None:
    ada = await parley.user("ada")

    assert await inbox(parley.acting_as(ada)) == pb.ListUserConversationsResponse()


async def test_the_latest_activity_comes_first(parley: Client) -> None:
    ada = await parley.user("ada")
    talks = [await parley.conversation(ada) for _ in range(4)]
    for n in (2, 0, 3):
        await parley.message(talks[n], ada)

    found = await lines(parley.acting_as(ada))

    assert ids(found) == [talks[n].id for n in (3, 0, 2, 1)]
    times = [each.conversation.last_activity_time.ToNanoseconds() for each in found]
    assert times == sorted(times, reverse=True)


async def test_what_was_said_long_ago_is_no_new_activity(parley: Client) -> None:
    ada = await parley.user("ada")
    old, new = await parley.conversation(ada), await parley.conversation(ada)
    sent = await parley.message(new, ada)
    long_ago = sent.create_time
    long_ago.seconds -= 1_000_000
    await parley.message(old, ada, sent_time=long_ago)

    assert ids(await lines(parley.acting_as(ada))) == [new.id, old.id]


async def test_a_deleted_message_is_shown_as_a_tombstone_and_counts_no_more(
    parley: Client,
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    for _ in range(3):
        await parley.message(talk, ada, "a secret")
    await parley.delete_message(talk, sequence=3)

    shown = await line(parley.acting_as(bob), talk)

    assert (shown.last_message.sequence, shown.last_message.content) == (3, "")
    assert shown.last_message.HasField("delete_time")
    assert shown.unread_count == 2


async def test_unread_are_the_others_messages_after_the_cursor(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    bobs = parley.acting_as(bob)

    async def unread() -> int:
        return (await line(bobs, talk)).unread_count

    for _ in range(4):
        await parley.message(talk, ada)
    assert await unread() == 4
    await parley.mark_read(talk, bob, 1)
    assert await unread() == 3
    await parley.delete_message(talk, sequence=3)
    assert await unread() == 2
    await parley.undelete_message(talk, sequence=3)
    assert await unread() == 3
    # Who says something has read what was said before.
    await parley.message(talk, bob)
    assert await unread() == 0
    await parley.send(talk, role=SYSTEM)
    assert await unread() == 1


async def test_own_messages_are_never_unread_wherever_the_cursor_is(
    parley: Client, database: asyncpg.Connection
) -> None:
    """As somebody has them who was brought in from elsewhere, with a cursor of its own."""
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    for n in range(6):
        await parley.message(talk, ada if n % 3 else bob)
    await parley.delete_message(talk, sequence=1)
    await parley.delete_message(talk, sequence=3)
    await database.execute("UPDATE participants SET last_read_sequence = 0")

    assert (await line(parley.acting_as(bob), talk)).unread_count == 3
    assert (await parley.mark_read(talk, bob, 0)).unread_count == 3


@pytest.mark.parametrize(("count", "shown"), [(999, 999), (1_000, 1_000), (1_001, 1_000)])
async def test_unread_messages_are_counted_up_to_a_thousand(
    parley: Client, database: asyncpg.Connection, count: int, shown: int
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    await grow(database, talk, ada, count)

    assert (await line(parley.acting_as(bob), talk)).unread_count == shown
    assert (await parley.mark_read(talk, bob, 1)).unread_count == min(count - 1, 1_000)


# Who sees what


async def test_who_left_sees_the_conversation_as_it_left_it(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob, title="Lunch", metadata=struct(a=1))
    before = await parley.message(talk, ada, "before")
    bobs = parley.acting_as(bob)
    await bobs.leave(talk, bob)
    await parley.message(talk, ada, "after")

    assert await lines(bobs) == []
    shown = await line(bobs, talk, statuses=[LEFT])

    assert shown.conversation == Conversation(
        id=talk.id, slug=talk.slug, title="Lunch", last_sequence=1
    )
    assert shown.last_message == before
    assert shown.unread_count == 1
    assert shown.participant.visible_to_sequence == 1


async def test_what_is_said_after_one_left_does_not_move_its_line(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    first, second = await parley.conversation(ada, bob), await parley.conversation(ada, bob)
    bobs = parley.acting_as(bob)
    for talk in (first, second):
        await bobs.leave(talk, bob)
    await parley.message(first, ada)

    assert ids(await lines(bobs, statuses=[LEFT])) == [second.id, first.id]


async def test_who_is_invited_sees_the_invitation_and_its_message(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, invited=[bob], first="welcome", title="Lunch")
    await parley.message(talk, ada, "a secret")
    bobs = parley.acting_as(bob)

    assert await lines(bobs) == []
    shown = await line(bobs, talk, statuses=[INVITED])

    assert shown.conversation == Conversation(id=talk.id, title="Lunch", creator_id=ada.id)
    assert shown.last_message.content == "welcome"
    assert shown.participant.status == INVITED
    assert shown.unread_count == 0


async def test_who_is_invited_again_sees_its_old_window_and_the_new_message(
    parley: Client,
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    for content in ("one", "two"):
        await parley.message(talk, ada, content)
    bobs = parley.acting_as(bob)
    await bobs.leave(talk, bob)
    for content in ("three", "four", "five"):
        await parley.message(talk, ada, content)

    await parley.acting_as(ada).invite(talk, bob, initial_message_sequence=4)
    assert (await line(bobs, talk, statuses=[INVITED])).last_message.content == "four"
    await parley.acting_as(ada).revoke(talk, bob)
    assert (await line(bobs, talk, statuses=[REVOKED])).last_message.content == "two"
    await parley.acting_as(ada).invite(talk, bob, initial_message_sequence=1)
    assert (await line(bobs, talk, statuses=[INVITED])).last_message.content == "two"


async def test_history_that_is_hidden_is_neither_shown_nor_counted(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    await parley.message(talk, ada, "before")
    await parley.add(talk, bob, invited_by_user_id=ada.id, hide_history=True)
    bobs = parley.acting_as(bob)

    shown = await line(bobs, talk)
    assert (shown.HasField("last_message"), shown.unread_count) == (False, 0)
    await parley.message(talk, ada, "after")
    shown = await line(bobs, talk)
    assert (shown.last_message.content, shown.unread_count) == ("after", 1)


async def test_what_an_invitation_showed_is_gone_with_it(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    declined = await parley.conversation(ada, invited=[bob], first="hello")
    await parley.conversation(ada, invited=[bob], first="hello")
    bobs = parley.acting_as(bob)
    await bobs.decline(declined, bob)

    assert len(await lines(bobs, statuses=EVERY)) == 1
    assert await lines(parley, user_id="bob", statuses=[DECLINED]) == []


async def test_deleted_conversations_are_passed_over_and_archived_ones_are_not(
    parley: Client,
) -> None:
    ada = await parley.user("ada")
    deleted, archived = await parley.conversation(ada), await parley.conversation(ada)
    await parley.delete(deleted)
    await parley.update(archived, is_active=False)
    own = parley.acting_as(ada)

    assert ids(await lines(own)) == [archived.id]
    await parley.undelete(deleted)
    assert set(ids(await lines(own))) == {deleted.id, archived.id}


async def test_the_system_sees_a_users_inbox_as_the_user_does(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob, first="hello")
    await parley.conversation(ada)
    left = await parley.conversation(ada, bob, first="hello")
    await parley.acting_as(bob).leave(left, bob)
    await parley.message(left, ada, "after")

    for named in ("bob", bob.id):
        seen = await lines(parley, user_id=named, statuses=[JOINED, LEFT])
        assert seen == await lines(parley.acting_as(bob), statuses=[JOINED, LEFT])
        assert ids(seen) == [left.id, talk.id]


# Filters


async def test_filters_choose_and_all_must_hold(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    lunch = await parley.conversation(ada, bob, title="LUNCH at 12%", metadata=struct(a=1, b=[2]))
    dinner = await parley.conversation(ada, bob, title="Dinner_", metadata=struct(a=1))
    await parley.message(dinner, ada)
    await parley.update(dinner, is_active=False)
    bobs = parley.acting_as(bob)

    async def found(**filters: Any) -> list[str]:
        return ids(await lines(bobs, **filters))

    both = [dinner.id, lunch.id]
    assert await found() == both
    assert await found(is_active=True) == [lunch.id]
    assert await found(is_active=False) == [dinner.id]
    assert await found(unread_only=True) == [dinner.id]
    assert await found(title_contains="lunch AT") == await found(title_contains="%") == [lunch.id]
    assert await found(title_contains="_") == [dinner.id]
    assert await found(title_contains="\\") == []
    assert await found(metadata_contains=struct(a=1)) == both
    assert await found(metadata_contains=struct(b=[2])) == [lunch.id]
    assert await found(metadata_contains=struct(**{"'; DROP TABLE users": 1})) == []
    assert await found(metadata_contains=struct(a=1), is_active=True, unread_only=True) == []
    await bobs.mark_read(dinner, bob, 1)
    assert await found(unread_only=True) == []


async def test_a_filter_tells_no_more_than_the_line_does(parley: Client) -> None:
    """Who left does not find out by asking whether it was archived, or what its metadata says."""
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob, title="Lunch", metadata=struct(a=1))
    bobs = parley.acting_as(bob)
    await bobs.leave(talk, bob)

    async def found(**filters: Any) -> list[str]:
        return ids(await lines(bobs, statuses=[LEFT], **filters))

    assert await found() == await found(title_contains="lunch") == [talk.id]
    assert await found(is_active=True) == await found(is_active=False) == []
    assert await found(metadata_contains=struct(a=1)) == []


async def test_statuses_choose_and_the_default_is_joined(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    joined = await parley.conversation(ada, bob)
    invited = await parley.conversation(ada, invited=[bob])
    left, removed = await parley.conversation(ada, bob), await parley.conversation(ada, bob)
    bobs = parley.acting_as(bob)
    await bobs.leave(left, bob)
    await parley.remove(removed, bob)

    async def found(*statuses: Any) -> list[str]:
        return ids(await lines(bobs, statuses=statuses))

    assert await found() == await found(JOINED) == [joined.id]
    assert await found(INVITED) == [invited.id]
    assert await found(LEFT) == [left.id]
    assert await found(REMOVED, INVITED) == [removed.id, invited.id]
    assert set(await found(*EVERY)) == {joined.id, invited.id, left.id, removed.id}


# Pages


@pytest.mark.parametrize("size", [1, 3, 4, 11, 12, 13, 1000])
async def test_pages_lead_through_everything_once(parley: Client, size: int) -> None:
    ada = await parley.user("ada")
    talks = [await parley.conversation(ada) for _ in range(12)]

    found = await lines(parley.acting_as(ada), page_size=size)

    assert ids(found) == [talk.id for talk in reversed(talks)]


async def test_conversations_of_one_moment_are_all_shown(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talks = {(await parley.conversation(ada)).id for _ in range(5)}
    await database.execute("UPDATE conversations SET created_at = '2020-01-01'")

    found = ids(await lines(parley.acting_as(ada), page_size=2))

    assert (len(found), set(found)) == (5, talks)


@pytest.mark.parametrize("sent_long_ago", [False, True], ids=["live", "imported"])
async def test_what_becomes_active_meanwhile_is_shown_once_where_it_was(
    parley: Client, sent_long_ago: bool
) -> None:
    ada = await parley.user("ada")
    talks = [await parley.conversation(ada) for _ in range(6)]
    when = talks[0].create_time
    for n, talk in enumerate(talks):
        when.seconds += n + 1 - sent_long_ago * 1_000_000
        sent: dict[str, Any] = {"sent_time": when} if sent_long_ago else {}
        await parley.message(talk, ada, **sent)
        when.seconds += sent_long_ago * 1_000_000
    own = parley.acting_as(ada)

    found: list[pb.UserConversation] = []
    page = await inbox(own, page_size=2)
    while True:
        found += page.user_conversations
        if not page.next_page_token:
            break
        # Those to come as well as those that were shown.
        for talk in talks:
            await parley.message(talk, ada)
        page = await inbox(own, page_size=2, page_token=page.next_page_token)

    assert ids(found) == [talk.id for talk in reversed(talks)]
    assert [each.last_message.sequence for each in found] == [1, 1, 2, 2, 3, 3]
    assert ids(await lines(own)) == ids(found)


async def test_a_conversation_that_was_empty_keeps_its_place_too(parley: Client) -> None:
    ada = await parley.user("ada")
    talks = [await parley.conversation(ada) for _ in range(4)]
    own = parley.acting_as(ada)

    first = await inbox(own, page_size=1)
    await parley.message(talks[0], ada)
    await parley.conversation(ada)
    rest = await lines_after(own, first, page_size=1)

    assert ids(rest) == [talks[n].id for n in (2, 1, 0)]


async def lines_after(
    client: Client, page: pb.ListUserConversationsResponse, **values: Any
) -> list[pb.UserConversation]:
    found: list[pb.UserConversation] = []
    while page.next_page_token:
        page = await inbox(client, page_token=page.next_page_token, **values)
        found += page.user_conversations
    return found


async def test_in_a_storm_of_messages_pages_neither_repeat_nor_miss(parley: Client) -> None:
    """Messages commit while a page is read: which of them it saw, no clock can tell."""
    ada = await parley.user("ada")
    talks = [await parley.conversation(ada, first="hello") for _ in range(20)]
    everything = {talk.id for talk in talks}
    own = parley.acting_as(ada)
    walking = True

    async def speak(seed: int) -> int:
        chance = random.Random(seed)
        count = 0
        while walking:
            await parley.message(chance.choice(talks), ada)
            count += 1
        return count

    async def walk() -> None:
        nonlocal walking
        for _ in range(15):
            found = ids(await lines(own, page_size=3))
            assert (len(found), set(found)) == (20, everything)
        walking = False

    async with asyncio.TaskGroup() as group:
        speaking = [group.create_task(speak(seed)) for seed in range(6)]
        group.create_task(walk())
    assert sum(task.result() for task in speaking) > 100


async def test_a_page_of_long_messages_is_cut_at_a_mebibyte(parley: Client) -> None:
    ada = await parley.user("ada")
    talks = [await parley.conversation(ada, first="x" * 250_000) for _ in range(6)]
    own = parley.acting_as(ada)

    first = await inbox(own)

    assert len(first.user_conversations) == 4
    assert first.ByteSize() < 1 << 20
    assert ids(await lines(own)) == [talk.id for talk in reversed(talks)]


@pytest.mark.parametrize(
    "metadata", ["repeat('x', 1_500)", "array_fill('[]'::jsonb, ARRAY[170])"], ids=["wire", "disk"]
)
async def test_whichever_measure_cuts_a_page_it_is_not_the_last(
    parley: Client, database: asyncpg.Connection, metadata: str
) -> None:
    """Lists of nothing are larger in the database than on the wire."""
    ada = await parley.user("ada")
    await settle(database, ada, 950)
    await database.execute(
        f"UPDATE conversations SET metadata = jsonb_build_object('k', {metadata})"
    )
    own = parley.acting_as(ada)

    first = await inbox(own, page_size=1_000)
    rest = await lines_after(own, first, page_size=1_000)

    assert first.ByteSize() <= 1 << 20
    assert 0 < len(first.user_conversations) < 950
    assert len({*ids(first.user_conversations), *ids(rest)}) == 950


# Bad input


@pytest.mark.parametrize(
    ("values", "violations"),
    [
        ({"user_id": ""}, {"user_id": "REQUIRED"}),
        ({"user_id": "\0"}, {"user_id": "INVALID_REFERENCE"}),
        ({"page_size": -1}, {"page_size": "INVALID_PAGE_SIZE"}),
        ({"statuses": [2, 0, 9]}, {"statuses[1]": "REQUIRED", "statuses[2]": "INVALID_ENUM_VALUE"}),
        ({"title_contains": "x" * 257}, {"title_contains": "FIELD_TOO_LONG"}),
        ({"title_contains": "a\nb"}, {"title_contains": "INVALID_CHARACTER"}),
        (
            {"metadata_contains": struct(a=float("nan"))},
            {"metadata_contains.a": "INVALID_METADATA"},
        ),
        ({"metadata_contains": struct(a="\0")}, {"metadata_contains.a": "INVALID_METADATA"}),
        ({"page_token": "x"}, {"page_token": "INVALID_PAGE_TOKEN"}),
        ({"page_token": "é"}, {"page_token": "INVALID_PAGE_TOKEN"}),
        (
            {"page_size": -1, "title_contains": "\0"},
            {"page_size": "INVALID_PAGE_SIZE", "title_contains": "INVALID_CHARACTER"},
        ),
    ],
    ids=lambda values: str(values).replace("\n", " ")[:60],
)
async def test_a_bad_field_is_named(
    parley: Client, values: dict[str, Any], violations: dict[str, str]
) -> None:
    refused = await failure(inbox(parley, **{"user_id": NOBODY, **values}))

    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)


async def test_page_sizes_are_50_and_at_most_1000(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    await settle(database, ada, 1_001)
    own = parley.acting_as(ada)

    assert len((await inbox(own)).user_conversations) == 50
    most = await inbox(own, page_size=2**31 - 1)
    rest = await inbox(own, page_size=2**31 - 1, page_token=most.next_page_token)
    assert (len(most.user_conversations), len(rest.user_conversations)) == (1_000, 1)
    assert rest.next_page_token == ""


@pytest.mark.parametrize("named", ["nemo", NOBODY])
async def test_the_inbox_of_nobody_is_not_found(parley: Client, named: str) -> None:
    refused = await failure(inbox(parley, user_id=named))

    assert (refused.code, refused.reason) == ("NOT_FOUND", "USER_NOT_FOUND")
    assert refused.resource == ("parley.v1.User", named)


async def test_an_actor_sees_its_own_inbox_and_no_other(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    await parley.conversation(ada, bob)
    bobs = parley.acting_as(bob)

    for named in ("", "bob", bob.id):
        assert len(await lines(bobs, user_id=named)) == 1
    for named in ("ada", ada.id, "nemo", NOBODY):
        refused = await failure(inbox(bobs, user_id=named))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")


async def test_a_page_token_is_bound_to_the_request_it_was_issued_for(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    for _ in range(3):
        await parley.conversation(ada, bob)
    own = parley.acting_as(ada)
    token = (await inbox(own, page_size=1)).next_page_token
    assert len((await inbox(own, page_size=7, page_token=token)).user_conversations) == 2

    moves: list[tuple[Client, dict[str, Any]]] = [
        (parley, {"user_id": "ada"}),
        (parley.acting_as(bob), {}),
        (own, {"is_active": True}),
        (own, {"unread_only": True}),
        (own, {"statuses": [JOINED]}),
        (own, {"title_contains": "x"}),
        (own, {"metadata_contains": struct(a=1)}),
    ]
    for client, moved in moves:
        refused = await failure(inbox(client, page_token=token, **moved))
        assert refused.violations == {"page_token": "PAGE_TOKEN_MISMATCH"}, moved
    # Of another list.
    request = participant_pb2.ListInvitationsRequest(page_token=token)
    refused = await failure(own.participants.ListInvitations(request))
    assert refused.violations == {"page_token": "PAGE_TOKEN_MISMATCH"}
    # Cut, longer, each of its characters another one.
    letters = [
        token[:n] + ("A" if token[n] != "A" else "B") + token[n + 1 :] for n in range(len(token))
    ]
    for forged in (token[:-1], token + "A", token + "=", *letters):
        refused = await failure(inbox(own, page_token=forged))
        assert refused.reason in ("INVALID_PAGE_TOKEN", "PAGE_TOKEN_MISMATCH")


async def test_a_page_token_grants_no_access(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talks = [await parley.conversation(ada, bob, first="hello") for _ in range(3)]
    bobs = parley.acting_as(bob)
    first = await inbox(bobs, page_size=1)

    await parley.remove(talks[0], bob)

    assert ids(await lines_after(bobs, first, page_size=1)) == [talks[1].id]


# Scale


@contextmanager
def statements(server: Server) -> Iterator[list[str]]:
    """What the service asks of its database meanwhile, but for who its callers are."""
    asked: list[str] = []

    def note(query: Any) -> None:
        if "FROM tokens" not in query.query:
            asked.append(query.query)

    def on_checkout(dbapi_connection: Any, *_: object) -> None:
        # Adding it again adds nothing.
        dbapi_connection.driver_connection.add_query_logger(note)

    engine = server.store._engine.sync_engine
    event.listen(engine, "checkout", on_checkout)
    yield asked
    event.remove(engine, "checkout", on_checkout)


async def test_an_inbox_is_one_statement_whatever_is_in_it(
    parley: Client, database: asyncpg.Connection, server: Server
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    await settle(database, ada, 1_000)
    rooms = [await parley.conversation(bob, ada) for _ in range(3)]
    for room in rooms:
        await grow(database, room, bob, 20_000)
    own = parley.acting_as(ada)
    first = await inbox(own, page_size=10)

    for size in (1, 25, 1_000):
        for token in ("", first.next_page_token):
            with statements(server) as asked:
                page = await inbox(own, page_size=size, page_token=token)
            assert len(page.user_conversations) == min(size, 1_003 if not token else 993)
            # It tells who the actor is, too.
            assert asked == [LIST]

    unread = {each.conversation.id: each.unread_count for each in first.user_conversations}
    assert [unread[room.id] for room in rooms] == [1_000] * 3
    assert [each.last_message.content for each in first.user_conversations[:3]] == [
        "line 20000"
    ] * 3


async def settle(database: asyncpg.Connection, user: User, count: int) -> None:
    """Conversations of the user, long ago, without a message."""
    await database.execute(
        """
        WITH made AS (
          INSERT INTO conversations (slug, creator_id, version, participant_count, created_at)
          SELECT 'settled-' || n, $1, 1, 1, '2020-01-01'::timestamptz + n * interval '1 second'
          FROM generate_series(1, $2::int) AS n RETURNING id
        )
        INSERT INTO participants (conversation_id, user_id, status, role, joined_at, status_at)
        SELECT id, $1, 'JOINED', 'OWNER', now(), now() FROM made
        """,
        UUID(user.id),
        count,
    )


async def grow(database: asyncpg.Connection, talk: Conversation, sender: User, count: int) -> None:
    """So many messages of the sender in a conversation that has none."""
    await database.execute(
        """
        INSERT INTO messages (conversation_id, sequence, sender_id, role, content, created_at)
        SELECT $1, n, $2, 'USER', 'line ' || n, '2020-01-01'::timestamptz + n * interval '1 second'
        FROM generate_series(1, $3::int) AS n
        """,
        UUID(talk.id),
        UUID(sender.id),
        count,
    )
    await database.execute(
        "UPDATE conversations SET last_sequence = $2, last_message_at = t, last_activity_at = t"
        " FROM (SELECT max(created_at) AS t FROM messages WHERE conversation_id = $1) AS m"
        " WHERE id = $1",
        UUID(talk.id),
        count,
    )
