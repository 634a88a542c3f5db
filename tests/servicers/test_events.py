"""ListEvents: what happened, told to those who may know, with what it is about as it is now."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio

from parley.v1 import access_pb2, conversation_pb2, message_pb2, participant_pb2
from service import following
from service.embedded import EmbeddedPostgres
from service.ids import lock_of
from service.repositories import feed
from service.server import Server

from ..access_matrix import MATRIX, rpcs
from ..make import (
    MODERATOR,
    NOBODY,
    OBSERVER,
    OWNER,
    USER,
    Client,
    Conversation,
    Event,
    Message,
    User,
    failure,
    told,
)

WITHHELD = Event.TYPE_WITHHELD


@dataclass
class World:
    """A talk of ada (owner), bob (member) and cleo (invited); ada has said one thing."""

    parley: Client
    ada: User
    bob: User
    cleo: User
    dan: User
    talk: Conversation

    def acting(self, user: User) -> Client:
        return self.parley.acting_as(user)

    @property
    def people(self) -> dict[str, str]:
        return {user.id: user.username for user in (self.ada, self.bob, self.cleo, self.dan)}


@pytest_asyncio.fixture
async def world(parley: Client) -> World:
    ada, bob, cleo, dan = [await parley.user(name) for name in ("ada", "bob", "cleo", "dan")]
    talk = await parley.conversation(ada, bob, invited=[cleo], first="Tea?", title="Tea")
    return World(parley, ada, bob, cleo, dan, talk)


# Every RPC that changes a conversation


async def _deleted(world: World) -> None:
    await world.parley.delete(world.talk)


async def _without_a_message(world: World) -> None:
    await world.parley.delete_message(world.talk, sequence=1)


async def _as_it_is(_: World) -> None:
    pass


Act = Callable[[World], Awaitable[Any]]


@dataclass(frozen=True)
class Case:
    act: Act
    facts: list[str]
    before: Act = _as_it_is


def _create(world: World) -> Awaitable[Any]:
    request = conversation_pb2.CreateConversationRequest(
        conversation=Conversation(),
        participants=[participant_pb2.NewParticipant(user_id="bob", role=MODERATOR)],
        invitations=[participant_pb2.NewParticipant(user_id="cleo", reason="we need you")],
        initial_message=message_pb2.NewMessage(role=USER, content="Welcome"),
    )
    return world.acting(world.ada).conversations.CreateConversation(request)  # type: ignore[no-any-return]


def _direct(world: World) -> Awaitable[Any]:
    request = conversation_pb2.GetOrCreateDirectConversationRequest(other_user_id="bob")
    return world.acting(world.ada).conversations.GetOrCreateDirectConversation(request)  # type: ignore[no-any-return]


def _batch(world: World) -> Awaitable[Any]:
    request = message_pb2.BatchSendMessagesRequest(
        conversation_id=world.talk.id,
        messages=[message_pb2.NewMessage(role=USER, content=text) for text in ("a", "b")],
    )
    return world.acting(world.bob).messages.BatchSendMessages(request)  # type: ignore[no-any-return]


def _edit(world: World) -> Awaitable[Any]:
    request = message_pb2.UpdateMessageRequest(
        conversation_id=world.talk.id, sequence=1, message=Message(content="Tea!")
    )
    return world.acting(world.ada).messages.UpdateMessage(request)  # type: ignore[no-any-return]


async def _without_ada(world: World) -> None:
    await world.parley.delete_user(world.ada)


# In the world above, what each RPC adds to the log.
CASES = {
    "ConversationService/CreateConversation": Case(
        _create,
        [
            "CONVERSATION_CREATED by ada",
            "PARTICIPANT_CHANGED ada nobody > JOINED OWNER by ada",
            "PARTICIPANT_CHANGED bob nobody > JOINED MODERATOR by ada",
            "MESSAGE_CREATED #1 r1 by ada",
            "PARTICIPANT_CHANGED cleo nobody > INVITED MEMBER (we need you) by ada",
        ],
    ),
    "ConversationService/GetOrCreateDirectConversation": Case(
        _direct,
        [
            "CONVERSATION_CREATED by ada",
            "PARTICIPANT_CHANGED ada nobody > JOINED OWNER by ada",
            "PARTICIPANT_CHANGED bob nobody > JOINED OWNER by ada",
        ],
    ),
    "ConversationService/UpdateConversation": Case(
        lambda world: world.acting(world.ada).update(world.talk, title="Coffee"),
        ["CONVERSATION_UPDATED r2 by ada"],
    ),
    "ConversationService/DeleteConversation": Case(
        lambda world: world.acting(world.ada).delete(world.talk),
        ["CONVERSATION_DELETED r2 by ada"],
    ),
    "ConversationService/UndeleteConversation": Case(
        lambda world: world.parley.undelete(world.talk),
        ["CONVERSATION_UNDELETED r3"],
        before=_deleted,
    ),
    "ConversationService/PurgeConversation": Case(
        lambda world: world.parley.purge(world.talk),
        ["CONVERSATION_PURGED"],
        before=_deleted,
    ),
    "ParticipantService/InviteParticipant": Case(
        lambda world: world.acting(world.ada).invite(world.talk, world.dan, reason="biscuits"),
        ["PARTICIPANT_CHANGED dan nobody > INVITED MEMBER (biscuits) by ada"],
    ),
    "ParticipantService/AddParticipant": Case(
        lambda world: world.acting(world.ada).add(world.talk, world.cleo, role=OBSERVER),
        ["PARTICIPANT_CHANGED cleo INVITED MEMBER > JOINED OBSERVER by ada"],
    ),
    "ParticipantService/AcceptInvitation": Case(
        lambda world: world.acting(world.cleo).accept(world.talk, world.cleo),
        ["PARTICIPANT_CHANGED cleo INVITED MEMBER > JOINED MEMBER by cleo"],
    ),
    "ParticipantService/DeclineInvitation": Case(
        lambda world: world.acting(world.cleo).decline(world.talk, world.cleo, reason="busy"),
        ["PARTICIPANT_CHANGED cleo INVITED MEMBER > DECLINED MEMBER (busy) by cleo"],
    ),
    "ParticipantService/RevokeInvitation": Case(
        lambda world: world.parley.revoke(world.talk, world.cleo),
        ["PARTICIPANT_CHANGED cleo INVITED MEMBER > REVOKED MEMBER"],
    ),
    "ParticipantService/LeaveConversation": Case(
        lambda world: world.acting(world.ada).leave(
            world.talk, world.ada, successor_user_id="bob", reason="dinner"
        ),
        [
            "PARTICIPANT_CHANGED bob JOINED MEMBER > JOINED OWNER by ada",
            "PARTICIPANT_CHANGED ada JOINED OWNER > LEFT OWNER (dinner) by ada",
        ],
    ),
    "ParticipantService/RemoveParticipant": Case(
        lambda world: world.acting(world.ada).remove(world.talk, world.bob, reason="rude"),
        ["PARTICIPANT_CHANGED bob JOINED MEMBER > REMOVED MEMBER (rude) by ada"],
    ),
    "ParticipantService/UpdateParticipant": Case(
        lambda world: world.acting(world.ada).appoint(world.talk, world.bob, OWNER),
        ["PARTICIPANT_CHANGED bob JOINED MEMBER > JOINED OWNER by ada"],
    ),
    "ParticipantService/MarkRead": Case(
        lambda world: world.acting(world.bob).mark_read(world.talk, world.bob, 1),
        ["READ_CURSOR_MOVED #1 bob by bob"],
    ),
    "UserService/PurgeUser": Case(
        lambda world: world.parley.purge_user(world.ada),
        [
            "PARTICIPANT_CHANGED bob JOINED MEMBER > JOINED OWNER",
            "PARTICIPANT_CHANGED ada JOINED OWNER > REMOVED OWNER",
            "CONVERSATION_UPDATED r2",
        ],
        before=_without_ada,
    ),
    "MessageService/SendMessage": Case(
        lambda world: world.acting(world.bob).send(world.talk),
        ["MESSAGE_CREATED #2 r1 by bob"],
    ),
    "MessageService/BatchSendMessages": Case(
        _batch, ["MESSAGE_CREATED #2 r1 by bob", "MESSAGE_CREATED #3 r1 by bob"]
    ),
    "MessageService/UpdateMessage": Case(_edit, ["MESSAGE_UPDATED #1 r2 by ada"]),
    "MessageService/DeleteMessage": Case(
        lambda world: world.acting(world.ada).delete_message(world.talk, sequence=1),
        ["MESSAGE_DELETED #1 r1 by ada"],
    ),
    "MessageService/UndeleteMessage": Case(
        lambda world: world.parley.undelete_message(world.talk, sequence=1),
        ["MESSAGE_UNDELETED #1 r1"],
        before=_without_a_message,
    ),
}
# They change no conversation.
NONE = {
    "UserService/CreateUser",
    "UserService/UpdateUser",
    "UserService/DeleteUser",
    "UserService/UndeleteUser",
    "UserService/SetPassword",
    "UserService/VerifyPassword",
}
SERVED = {rpc.name: rpc for rpc in rpcs() if "UI" not in MATRIX[rpc.name].split()}


def test_no_rpc_that_writes_is_forgotten_here() -> None:
    writing = {
        name for name, rpc in SERVED.items() if rpc.access.scope != access_pb2.Access.SCOPE_READ
    }

    assert writing - NONE == set(CASES)


@pytest.mark.parametrize("name", sorted(CASES))
async def test_each_rpc_that_changes_a_conversation_tells_it(world: World, name: str) -> None:
    case = CASES[name]
    await case.before(world)
    before = await world.parley.list_events(everything=True, page_size=1000)

    await case.act(world)

    after = await world.parley.list_events(everything=True, resume_cursor=before.cursor)
    assert [told(event, world.people) for event in after.events] == case.facts
    assert after.caught_up
    # Those of one conversation, and none without its number and its time.
    assert len({event.conversation_id for event in after.events}) == 1
    first = after.events[0].version
    assert [event.version for event in after.events] == list(
        range(first, first + len(after.events))
    )
    assert all(event.commit_time.seconds for event in after.events)


# One conversation


def lines(events: list[Event], world: World) -> list[str]:
    return [f"{event.version} {told(event, world.people)}" for event in events]


async def test_a_member_reads_its_conversation_without_a_hole(world: World) -> None:
    await world.parley.message(world.talk, world.bob, "Yes!")

    seen = await world.acting(world.bob).log(conversation_id=world.talk.slug)

    assert lines(seen, world) == [
        "1 CONVERSATION_CREATED",
        "2 PARTICIPANT_CHANGED ada nobody > JOINED OWNER",
        "3 PARTICIPANT_CHANGED bob nobody > JOINED MEMBER",
        "4 MESSAGE_CREATED #1 r1",
        "5 PARTICIPANT_CHANGED cleo nobody > INVITED MEMBER",
        "6 MESSAGE_CREATED #2 r1",
    ]
    assert seen == await world.parley.log(conversation_id=world.talk.id)


async def test_an_event_comes_with_what_it_is_about_as_it_is_now(world: World) -> None:
    await world.acting(world.ada).update(world.talk, title="Coffee")
    await world.acting(world.ada).delete_message(world.talk, sequence=1)
    bob = world.acting(world.bob)

    seen = await bob.log(conversation_id=world.talk.id)

    created, _, joined, said, *_, updated, removed = seen
    assert created.conversation == updated.conversation == await bob.seen(world.talk)
    assert joined.participant == await bob.participant(world.talk, world.bob)
    (tombstone,) = await bob.all_messages(world.talk)
    assert said.message == removed.message == tombstone
    assert not said.message.content
    assert said.message.HasField("delete_time")


async def test_of_a_deleted_conversation_messages_are_not_shown(world: World) -> None:
    await world.parley.delete(world.talk)

    seen = await world.acting(world.bob).log(conversation_id=world.talk.id)

    assert [told(seen[3], world.people), told(seen[-1], world.people)] == [
        "MESSAGE_CREATED #1 r1",
        "CONVERSATION_DELETED r2",
    ]
    assert seen[3].WhichOneof("resource") is None
    assert seen[-1].conversation.HasField("delete_time")


async def test_what_was_said_before_a_newcomer_is_withheld(world: World) -> None:
    for text in ("two", "three"):
        await world.parley.message(world.talk, world.ada, text)
    await world.parley.add(
        world.talk, world.dan, invited_by_user_id=world.ada.id, hide_history=True
    )
    await world.parley.message(world.talk, world.ada, "four")

    seen = await world.acting(world.dan).log(conversation_id=world.talk.id)

    assert lines(seen, world) == [
        "1 CONVERSATION_CREATED",
        "2 PARTICIPANT_CHANGED ada nobody > JOINED OWNER",
        "3 PARTICIPANT_CHANGED bob nobody > JOINED MEMBER",
        "4 WITHHELD",
        "5 PARTICIPANT_CHANGED cleo nobody > INVITED MEMBER",
        "6 WITHHELD",
        "8 PARTICIPANT_CHANGED dan nobody > JOINED MEMBER",
        "9 MESSAGE_CREATED #4 r1",
    ]
    assert [event.through_version for event in seen] == [0, 0, 0, 4, 0, 7, 0, 0]
    assert seen[3] == Event(
        conversation_id=world.talk.id, version=4, through_version=4, type=WITHHELD
    )


async def test_a_leaver_reads_up_to_the_event_of_its_leaving(world: World) -> None:
    await world.parley.message(world.talk, world.ada, "heard")
    await world.parley.leave(world.talk, world.bob)
    await world.parley.message(world.talk, world.ada, "not heard")
    await world.parley.invite(world.talk, world.bob, invited_by_user_id=world.ada.id)
    bob = world.acting(world.bob)

    page = await bob.list_events(conversation_id=world.talk.id)
    refused = await failure(
        bob.list_events(conversation_id=world.talk.id, resume_cursor=page.cursor)
    )

    assert lines(page.events[-2:], world) == [
        "6 MESSAGE_CREATED #2 r1",
        "7 PARTICIPANT_CHANGED bob JOINED MEMBER > LEFT MEMBER",
    ]
    assert page.events[-2].message.content == "heard"
    assert page.events[0].conversation == await bob.seen(world.talk)
    # Nobody's row but its own is shown to it any more.
    assert not page.events[1].HasField("participant")
    assert page.events[-1].participant.user_id == world.bob.id
    assert not page.caught_up
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "ACCESS_LOST")


async def test_who_comes_back_reads_on_with_its_old_cursor(world: World) -> None:
    await world.parley.leave(world.talk, world.bob)
    await world.parley.message(world.talk, world.ada, "meanwhile")
    bob = world.acting(world.bob)
    page = await bob.list_events(conversation_id=world.talk.id)
    await world.parley.add(world.talk, world.bob, invited_by_user_id=world.ada.id)

    seen = await bob.log(conversation_id=world.talk.id, resume_cursor=page.cursor)

    assert lines(seen, world) == [
        "7 MESSAGE_CREATED #2 r1",
        "8 PARTICIPANT_CHANGED bob LEFT MEMBER > JOINED MEMBER",
    ]


async def test_a_stranger_learns_nothing_and_an_invitee_not_yet(world: World) -> None:
    stranger, invitee = world.acting(world.dan), world.acting(world.cleo)

    hidden = await failure(stranger.list_events(conversation_id=world.talk.id))
    missing = await failure(stranger.list_events(conversation_id=NOBODY))
    invited = await failure(invitee.list_events(conversation_id=world.talk.id))

    assert (hidden.code, hidden.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")
    assert hidden.message.replace(world.talk.id, NOBODY) == missing.message
    assert (invited.code, invited.reason) == ("PERMISSION_DENIED", "NOT_A_PARTICIPANT")


async def test_of_a_purged_conversation_the_system_learns_that_it_was(world: World) -> None:
    before = await world.parley.list_events(conversation_id=world.talk.id)
    await world.parley.delete(world.talk)
    await world.parley.purge(world.talk)

    fresh = await world.parley.log(conversation_id=world.talk.id)
    resumed = await world.parley.log(conversation_id=world.talk.id, resume_cursor=before.cursor)
    missing = await failure(world.parley.list_events(conversation_id=NOBODY))
    member = await failure(world.acting(world.bob).list_events(conversation_id=world.talk.id))

    assert lines(fresh, world) == ["7 CONVERSATION_PURGED"]
    assert resumed == fresh
    assert missing.reason == member.reason == "CONVERSATION_NOT_FOUND"


# One user


async def test_an_invitation_reaches_its_invitee_and_nothing_else_of_the_conversation(
    world: World,
) -> None:
    cleo = world.acting(world.cleo)
    await world.parley.message(world.talk, world.bob, "Does she come?")

    seen = await cleo.log(user_id="cleo")

    assert lines(seen, world) == ["5 PARTICIPANT_CHANGED cleo nobody > INVITED MEMBER"]
    assert seen[0].participant == await cleo.participant(world.talk, world.cleo)
    assert seen == await cleo.log(user_id="") == await world.parley.log(user_id=world.cleo.id)


async def test_a_user_reads_what_happened_while_it_was_joined(world: World) -> None:
    cleo = world.acting(world.cleo)
    await world.parley.message(world.talk, world.ada, "before")
    await cleo.accept(world.talk, world.cleo)
    await world.parley.message(world.talk, world.ada, "while")
    await cleo.leave(world.talk, world.cleo)
    await world.parley.message(world.talk, world.ada, "after")
    await world.parley.invite(world.talk, world.cleo, invited_by_user_id=world.ada.id)
    other = await world.parley.conversation(world.cleo, first="My own")

    seen = await cleo.log(user_id=world.cleo.id)

    assert lines(seen, world) == [
        "5 PARTICIPANT_CHANGED cleo nobody > INVITED MEMBER",
        "7 PARTICIPANT_CHANGED cleo INVITED MEMBER > JOINED MEMBER by cleo",
        "8 MESSAGE_CREATED #3 r1",
        "9 PARTICIPANT_CHANGED cleo JOINED MEMBER > LEFT MEMBER by cleo",
        "11 PARTICIPANT_CHANGED cleo LEFT MEMBER > INVITED MEMBER",
        "2 PARTICIPANT_CHANGED cleo nobody > JOINED OWNER",
        "3 MESSAGE_CREATED #1 r1",
    ]
    assert seen[-1].conversation_id == other.id
    assert seen[2].message.content == "while"


async def test_what_a_user_may_no_longer_see_is_withheld_from_it(world: World) -> None:
    await world.parley.message(world.talk, world.bob, "my words")
    await world.parley.leave(world.talk, world.bob)
    await world.parley.add(
        world.talk, world.bob, invited_by_user_id=world.ada.id, hide_history=True
    )

    seen = await world.acting(world.bob).log(user_id="bob")
    of_system = await world.parley.log(user_id="bob")

    assert lines(seen, world) == [
        "3 PARTICIPANT_CHANGED bob nobody > JOINED MEMBER",
        "4 WITHHELD",
        "5 PARTICIPANT_CHANGED cleo nobody > INVITED MEMBER",
        "6 WITHHELD",
        "7 PARTICIPANT_CHANGED bob JOINED MEMBER > LEFT MEMBER",
        "8 PARTICIPANT_CHANGED bob LEFT MEMBER > JOINED MEMBER",
    ]
    assert [event.message.content for event in of_system if event.sequence] == [
        "Tea?",
        "my words",
    ]


@pytest.mark.parametrize("scanned", [1, 2, 3])
async def test_a_user_finds_its_events_among_all_others(
    world: World, monkeypatch: pytest.MonkeyPatch, scanned: int
) -> None:
    """However few events are looked through at a time."""
    for _ in range(5):
        await world.parley.conversation(world.ada, first="not for bob")
    await world.parley.message(world.talk, world.ada, "for bob")
    whole = await world.parley.log(user_id="bob")

    monkeypatch.setattr(following, "MAX_SCANNED", scanned)
    found, cursor, pages = [], "", 0
    while True:
        page = await world.acting(world.bob).list_events(user_id="bob", resume_cursor=cursor)
        found += page.events
        cursor = page.cursor
        pages += 1
        if page.caught_up:
            break
        # Whoever is cut off amid what one call made is told so.
        assert page.incomplete or not page.events or page.events[-1].version != 3

    assert lines(found, world) == lines(whole, world)
    assert pages > 20 // scanned


async def test_an_invitation_taken_back_is_told_without_the_participant(world: World) -> None:
    await world.parley.revoke(world.talk, world.cleo)

    seen = await world.acting(world.cleo).log(user_id="cleo")

    assert lines(seen[1:], world) == ["6 PARTICIPANT_CHANGED cleo INVITED MEMBER > REVOKED MEMBER"]
    assert seen[1].WhichOneof("resource") is None


async def test_an_actor_reads_its_own_events_only(world: World) -> None:
    ada = world.acting(world.ada)

    other = await failure(ada.list_events(user_id="bob"))
    everything = await failure(ada.list_events(everything=True))
    missing = await failure(world.parley.list_events(user_id="nobody"))

    assert (other.code, other.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert (everything.code, everything.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert (missing.code, missing.reason) == ("NOT_FOUND", "USER_NOT_FOUND")


# Everything


async def test_the_system_reads_everything(world: World) -> None:
    other = await world.parley.conversation(world.dan, first="Elsewhere")

    seen = await world.parley.log(everything=True)

    by_conversation = [
        await world.parley.log(conversation_id=talk.id) for talk in (world.talk, other)
    ]
    assert seen == [event for events in by_conversation for event in events]


async def test_purged_conversations_are_told_of(world: World) -> None:
    await world.parley.delete(world.talk)
    await world.parley.purge(world.talk)

    seen = await world.parley.log(everything=True)

    assert lines(seen, world) == ["7 CONVERSATION_PURGED"]


# Scopes and cursors


@pytest.mark.parametrize(
    ("scope", "reason"),
    [
        ({}, "REQUIRED"),
        ({"everything": False}, "INVALID_VALUE"),
        ({"user_id": ""}, "REQUIRED"),
        ({"conversation_id": ""}, "REQUIRED"),
        ({"conversation_id": "?"}, "INVALID_REFERENCE"),
        ({"everything": True, "page_size": -1}, "INVALID_PAGE_SIZE"),
        ({"everything": True, "resume_cursor": "garbage"}, "INVALID_CURSOR"),
    ],
)
async def test_a_request_that_cannot_be_right(
    parley: Client, scope: dict[str, Any], reason: str
) -> None:
    refused = await failure(parley.list_events(**scope))

    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", reason)


async def test_a_cursor_works_for_its_scope_and_actor_alone(world: World) -> None:
    ada = world.acting(world.ada)
    other = await world.parley.conversation(world.ada)
    page = await ada.list_events(conversation_id=world.talk.id)

    for client, scope in (
        (ada, {"conversation_id": other.id}),
        (ada, {"user_id": "ada"}),
        (world.acting(world.bob), {"conversation_id": world.talk.id}),
        (world.parley, {"conversation_id": world.talk.id}),
        (world.parley, {"everything": True}),
    ):
        refused = await failure(client.list_events(resume_cursor=page.cursor, **scope))
        assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "INVALID_CURSOR")
        assert refused.violations == {"resume_cursor": "INVALID_CURSOR"}
    again = await ada.list_events(conversation_id=world.talk.slug, resume_cursor=page.cursor)
    assert (list(again.events), again.caught_up) == ([], True)


async def test_a_cursor_of_the_future_or_of_another_life_is_expired(
    world: World, database: asyncpg.Connection
) -> None:
    scopes: list[dict[str, Any]] = [
        {"conversation_id": world.talk.id},
        {"user_id": "ada"},
        {"everything": True},
    ]
    cursors = [(await world.parley.list_events(**scope)).cursor for scope in scopes]

    # As after a restore of an older backup, first of this database, then noticed as another one.
    await database.execute("DELETE FROM events WHERE version > 3")
    lost = await failure(world.parley.list_events(resume_cursor=cursors[0], **scopes[0]))
    await database.execute("INSERT INTO eras VALUES (99, 'elsewhere')")
    try:
        others = [
            await failure(world.parley.list_events(resume_cursor=cursor, **scope))
            for cursor, scope in zip(cursors, scopes, strict=True)
        ]
        fresh = await world.parley.log(everything=True)
    finally:
        await database.execute("DELETE FROM eras WHERE era = 99")

    for expired in (lost, *others):
        assert (expired.code, expired.reason) == ("OUT_OF_RANGE", "CURSOR_EXPIRED")
    assert [event.version for event in fresh] == [1, 2, 3]


@pytest.mark.parametrize("page_size", [1, 2, 3, 4])
@pytest.mark.parametrize("scope", ["conversation", "user", "everything"])
async def test_pages_give_the_same_events_however_many_at_a_time(
    world: World, scope: str, page_size: int
) -> None:
    for n in range(3):
        await world.parley.message(world.talk, world.ada, f"number {n}")
    scopes: dict[str, dict[str, Any]] = {
        "conversation": {"conversation_id": world.talk.id},
        "user": {"user_id": world.bob.id},
        "everything": {"everything": True},
    }
    asked = scopes[scope]
    whole = await world.parley.list_events(**asked)
    found, sizes, cursor, caught_up = [], [], "", False

    while not caught_up:
        page = await world.parley.list_events(resume_cursor=cursor, page_size=page_size, **asked)
        found += page.events
        sizes.append((len(page.events), page.incomplete))
        cursor, caught_up = page.cursor, page.caught_up

    assert found == list(whole.events)
    assert whole.caught_up
    if scope != "user":
        # The first call made five events: they are cut, and it is said.
        expected = {
            1: [(1, True)] * 4 + [(1, False)] * 4,
            2: [(2, True), (2, True), (2, False), (2, False)],
            3: [(3, True), (3, False), (2, False)],
            4: [(4, True), (4, False)],
        }[page_size]
        assert [size for size in sizes if size[0]] == expected


async def test_a_page_ends_at_a_mebibyte(world: World) -> None:
    for _ in range(6):
        await world.parley.message(world.talk, world.ada, "x" * 250_000)

    pages: list[Any] = []
    cursor = ""
    while not (pages and pages[-1].caught_up):
        pages.append(
            await world.parley.list_events(everything=True, resume_cursor=cursor, page_size=1000)
        )
        cursor = pages[-1].cursor

    assert max(page.ByteSize() for page in pages) <= 1 << 20
    assert len(pages) == 2
    assert [event.version for page in pages for event in page.events] == list(range(1, 12))


# The horizon


@pytest_asyncio.fixture
async def foreign(world: World, postgres: EmbeddedPostgres) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else's transaction in the same cluster, which has written and stays open."""
    connection = await asyncpg.connect(postgres.url.replace("postgresql+asyncpg", "postgresql"))
    await connection.execute("BEGIN; SELECT pg_current_xact_id()")
    yield connection
    await connection.close()


async def test_an_open_transaction_delays_wide_scopes_and_loses_nothing(
    world: World, foreign: asyncpg.Connection
) -> None:
    before = await world.parley.list_events(everything=True)
    await world.parley.message(world.talk, world.ada, "meanwhile")

    held = await world.parley.list_events(everything=True, resume_cursor=before.cursor)
    own = await world.parley.log(user_id="bob")
    narrow = await world.parley.log(conversation_id=world.talk.id)
    await foreign.execute("COMMIT")
    freed = await world.parley.list_events(everything=True, resume_cursor=held.cursor)

    assert (list(held.events), held.caught_up) == ([], True)
    assert own[-1].version == 5
    assert narrow[-1].message.content == "meanwhile"
    assert lines(freed.events, world) == ["6 MESSAGE_CREATED #2 r1"]


async def test_what_commits_late_is_not_skipped(
    world: World, server: Server, database: asyncpg.Connection
) -> None:
    """Its transaction id is lower than that of another which is committed and could be read."""
    other = await world.parley.conversation(world.dan)
    before = await world.parley.list_events(everything=True)
    async with server.store.transaction(lock=lock_of(UUID(world.talk.id))) as late:
        row = await late.conversations.find(UUID(world.talk.id))
        assert row
        await late.conversations.delete(row, actor_id=None)
        await world.parley.message(other, world.dan, "I was faster")
        early = await world.parley.list_events(everything=True, resume_cursor=before.cursor)

    after = await world.parley.list_events(everything=True, resume_cursor=early.cursor)

    assert lines(early.events, world) == []
    assert lines(after.events, world) == ["6 CONVERSATION_DELETED r2", "3 MESSAGE_CREATED #1 r1"]


# Each statement, by its index


@pytest.mark.parametrize(
    ("statement", "arguments", "index"),
    [
        (feed.OF_CONVERSATIONS, [[UUID(NOBODY)], [0], 10], "pk_events"),
        (feed.OF_EVERYTHING, [1, "5", UUID(NOBODY), 1, 10], "ix_events_feed"),
        (feed.OF_USERS, [1, "5", UUID(NOBODY), 1, [UUID(NOBODY)], 10], "ix_events_feed"),
        (feed.OF_USERS, [1, "5", UUID(NOBODY), 1, [UUID(NOBODY)], 10], "ix_events_membership"),
        (feed.STIRRED, [1, "5", UUID(NOBODY), 1, [UUID(NOBODY)], 10], "ix_events_feed"),
        (feed.NOW_OF_CONVERSATION, [UUID(NOBODY)], "pk_events"),
        (feed.NOW_OF_EVERYTHING, [0, "0", UUID(NOBODY), 0], "ix_events_feed"),
        (feed.LEFT, [[UUID(NOBODY)], [UUID(NOBODY)]], "ix_events_membership"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.islower() else None,
)
async def test_each_statement_reads_the_log_by_an_index(
    world: World, database: asyncpg.Connection, statement: str, arguments: list[Any], index: str
) -> None:
    async with database.transaction():
        await database.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off")
        rows = await database.fetch(f"EXPLAIN {statement}", *arguments)

    plan = "\n".join(row[0] for row in rows)
    assert index in plan, plan
    assert "Seq Scan on events" not in plan, plan
