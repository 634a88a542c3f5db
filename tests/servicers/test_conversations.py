"""Conversations: made in one step or not at all, seen by who may, listed once each."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from parley.v1 import conversation_pb2 as pb
from parley.v1 import message_pb2, participant_pb2
from service import wire
from service.servicers.conversations import slug_from

from ..make import (
    AGENT,
    ASSISTANT,
    MEMBER,
    MODERATOR,
    NOBODY,
    OBSERVER,
    OWNER,
    SYSTEM,
    USER,
    Client,
    Conversation,
    Participant,
    User,
    facts,
    failure,
    insist,
    is_replay,
    miscounted,
    row_count,
)

NIL = "00000000-0000-0000-0000-000000000000"
INVITED, JOINED = Participant.STATUS_INVITED, Participant.STATUS_JOINED
LEFT = Participant.STATUS_LEFT


def person(user: User | str, **values: Any) -> participant_pb2.NewParticipant:
    user_id = user if isinstance(user, str) else user.id
    return participant_pb2.NewParticipant(user_id=user_id, **values)


def said(content: str = "Who brings the biscuits?", **values: Any) -> message_pb2.NewMessage:
    values.setdefault("role", USER)
    return message_pb2.NewMessage(content=content, **values)


def create(client: Client, conversation: Conversation | None = None, **values: Any) -> Any:
    return client.conversations.CreateConversation(
        pb.CreateConversationRequest(conversation=conversation or Conversation(), **values)
    )


async def get(client: Client, reference: str) -> Conversation:
    request = pb.GetConversationRequest(conversation_id=reference)
    response = await client.conversations.GetConversation(request)
    return response.conversation  # type: ignore[no-any-return]


def list_(client: Client, **values: Any) -> Any:
    return client.conversations.ListConversations(pb.ListConversationsRequest(**values))


async def titles(client: Client, **filters: Any) -> list[str]:
    return [each.title for each in (await list_(client, **filters)).conversations]


async def people(parley: Client, conversation: Conversation) -> dict[str, Participant]:
    """Everybody in the conversation by username."""
    request = participant_pb2.ListParticipantsRequest(conversation_id=conversation.id)
    response = await parley.participants.ListParticipants(request)
    return {each.username: each for each in response.participants}


def struct(**values: Any) -> Struct:
    made = Struct()
    made.update(values)
    return made


# Made


async def test_a_conversation_is_made_as_it_was_given(parley: Client) -> None:
    ada = await parley.user("ada")
    given = Conversation(
        slug="tea-at-four",
        title="Tea, 四時 🫖",
        creator_id=ada.id,
        is_active=False,
        members_may_invite=False,
        metadata=struct(kettle=["on", None]),
        external_id="room:7",
    )

    made = (await create(parley, given)).conversation

    assert await get(parley, made.id) == await get(parley, "tea-at-four") == made
    assert (made.participant_count, made.version, made.last_sequence) == (1, 2, 0)
    assert made.last_activity_time == made.create_time == made.update_time
    assert made.etag
    wire.unmade(made)
    made.ClearField("participant_count")
    made.ClearField("version")
    given.is_direct = False
    assert made == given


async def test_what_is_not_said_of_a_conversation_has_its_default(parley: Client) -> None:
    ada = await parley.user("ada")
    made = (await create(parley.acting_as(ada), Conversation(title="Tea at Four!"))).conversation
    assert (made.creator_id, made.is_active, made.members_may_invite) == (ada.id, True, True)
    assert made.slug.startswith("tea-at-four-")


@pytest.mark.parametrize(
    ("title", "start"),
    [
        ("Tea at Four!", "tea-at-four-"),
        ("Žofie & Ελένη", "zofie-"),
        ("四時", "conversation-"),
        ("", "conversation-"),
        ("-" * 256, "conversation-"),
        ("x" * 256, "x" * 48 + "-"),
        ("ab " * 80, "ab-ab-"),
    ],
)
def test_a_made_up_slug_reads_like_the_title_and_is_well_formed(title: str, start: str) -> None:
    slugs = {slug_from(title) for _ in range(100)}
    assert len(slugs) == 100
    for slug in slugs:
        assert slug.startswith(start)
        assert 3 <= len(slug) <= 63
        assert slug.replace("-", "").isalnum()
        assert slug[-1] != "-"


async def test_output_only_fields_are_ignored(parley: Client) -> None:
    ada = await parley.user("ada")
    given = Conversation(id=str(uuid4()), creator_id="ada", last_sequence=7, version=7)
    given.is_direct = True
    given.etag = "no etag at all"
    given.delete_time.FromSeconds(1)
    made = (await create(parley, given)).conversation
    assert made.id != given.id
    assert (made.creator_id, made.last_sequence, made.version) == (ada.id, 0, 2)
    assert (made.is_direct, made.HasField("delete_time")) == (False, False)


async def test_a_conversation_begins_with_all_its_people_and_its_first_message(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob, cy, dee = [await parley.user(name) for name in ("ada", "bob", "cy", "dee")]

    made = await create(
        parley.acting_as(ada),
        Conversation(title="Tea"),
        participants=[
            person("bob", role=MODERATOR, reason="old friend"),
            person(cy, hide_history=True),
        ],
        invitations=[person("dee", role=OBSERVER, reason="curious")],
        initial_message=said(tokens_used=5),
    )

    talk, first = made.conversation, made.initial_message
    assert (first.sequence, first.sender_id, first.content) == (
        1,
        ada.id,
        "Who brings the biscuits?",
    )
    assert (talk.last_sequence, talk.participant_count, talk.total_tokens_used) == (1, 3, 5)
    assert talk.last_activity_time == first.create_time
    everybody = await people(parley, talk)
    assert {name: (each.status, each.role) for name, each in everybody.items()} == {
        "ada": (JOINED, OWNER),
        "bob": (JOINED, MODERATOR),
        "cy": (JOINED, MEMBER),
        "dee": (INVITED, OBSERVER),
    }
    assert everybody["ada"].invited_by_user_id == ""
    assert {everybody[name].invited_by_user_id for name in ("bob", "cy", "dee")} == {ada.id}
    assert everybody["dee"].initial_message_id == first.id
    assert everybody["bob"].initial_message_id == ""
    # Whoever was there when it began reads all of it; the sender has read its own.
    assert {everybody[name].visible_from_sequence for name in ("ada", "bob", "cy")} == {1}
    assert [everybody[name].last_read_sequence for name in ("ada", "bob")] == [1, 0]

    def entered(version: int, user: User, status: str, role: str, **more: str) -> dict[str, Any]:
        fact = {"version": version, "type": "PARTICIPANT_CHANGED", "actor_id": ada.id}
        return {**fact, "user_id": user.id, "status": status, "role": role, **more}

    assert await facts(database, talk) == [
        {"version": 1, "type": "CONVERSATION_CREATED", "actor_id": ada.id},
        entered(2, ada, "JOINED", "OWNER"),
        entered(3, bob, "JOINED", "MODERATOR", reason="old friend"),
        entered(4, cy, "JOINED", "MEMBER"),
        {
            "version": 5,
            "type": "MESSAGE_CREATED",
            "actor_id": ada.id,
            "sequence": 1,
            "revision": 1,
            "user_id": ada.id,
        },
        entered(6, dee, "INVITED", "OBSERVER", reason="curious"),
    ]
    assert talk.version == 6
    assert not await miscounted(database)


async def test_the_creator_may_be_named_among_the_people_and_is_there_once(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = (
        await create(
            parley,
            Conversation(creator_id="ada"),
            participants=[person(ada, role=OBSERVER), person("ada")],
            invitations=[person("ada")],
        )
    ).conversation
    everybody = await people(parley, talk)
    assert [(each.status, each.role) for each in everybody.values()] == [(JOINED, OWNER)]
    assert not await miscounted(database)


async def test_an_agent_may_open_with_its_own_role_and_the_system_with_any(parley: Client) -> None:
    bot = await parley.user("bot", kind=AGENT)
    opened = await create(parley.acting_as(bot), initial_message=said(role=ASSISTANT))
    assert opened.initial_message.sender_id == bot.id
    opened = await create(parley, Conversation(creator_id="bot"), initial_message=said(role=SYSTEM))
    assert opened.initial_message.sender_id == ""


# Refused


@pytest.mark.parametrize(
    ("values", "field", "reason"),
    [
        ({"slug": "A B"}, "conversation.slug", "INVALID_SLUG"),
        ({"slug": "-x-"}, "conversation.slug", "INVALID_SLUG"),
        ({"slug": ".."}, "conversation.slug", "INVALID_SLUG"),
        ({"slug": "x" * 64}, "conversation.slug", "INVALID_SLUG"),
        ({"slug": str(uuid4())}, "conversation.slug", "INVALID_SLUG"),
        ({"title": "x" * 257}, "conversation.title", "FIELD_TOO_LONG"),
        ({"title": "e" + "\u0301" * 10_000}, "conversation.title", "FIELD_TOO_LONG"),
        ({"title": "a\r\nb"}, "conversation.title", "INVALID_CHARACTER"),
        ({"title": "\u202eevil"}, "conversation.title", "INVALID_CHARACTER"),
        ({"title": "a\0b"}, "conversation.title", "INVALID_CHARACTER"),
        ({"creator_id": NIL}, "conversation.creator_id", "INVALID_REFERENCE"),
        ({"creator_id": ""}, "conversation.creator_id", "REQUIRED"),
        ({"external_id": "x" * 257}, "conversation.external_id", "FIELD_TOO_LONG"),
        ({"metadata": struct(**{"": 1})}, "conversation.metadata", "INVALID_METADATA"),
    ],
)
async def test_a_bad_field_is_named_with_its_rule(
    parley: Client, values: dict[str, Any], field: str, reason: str
) -> None:
    await parley.user("ada")
    refused = await failure(create(parley, Conversation(**{"creator_id": "ada", **values})))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", reason)
    assert refused.violations == {field: reason}
    assert field in refused.message


@pytest.mark.parametrize("size", [255, 256])
async def test_a_title_within_its_limit_is_kept_as_given(parley: Client, size: int) -> None:
    ada = await parley.user("ada")
    title = (" " + "🚀" * size)[:size]
    assert (await parley.conversation(ada, title=title)).title == title


async def test_every_violation_is_told_at_once(parley: Client) -> None:
    request = pb.CreateConversationRequest(
        participants=[person(""), person("a b", role=9)],
        invitations=[person("x", reason="a\nb"), person("y", reason="x" * 501)],
        initial_message=message_pb2.NewMessage(tokens_used=-1),
        request_id="é",
    )
    refused = await failure(parley.conversations.CreateConversation(request))
    assert refused.violations == {
        "conversation": "REQUIRED",
        "conversation.creator_id": "REQUIRED",
        "participants[0].user_id": "REQUIRED",
        "participants[1].user_id": "INVALID_REFERENCE",
        "participants[1].role": "INVALID_ENUM_VALUE",
        "invitations[0].reason": "INVALID_CHARACTER",
        "invitations[1].reason": "FIELD_TOO_LONG",
        "initial_message.role": "REQUIRED",
        "initial_message.tokens_used": "OUT_OF_BOUNDS",
        "request_id": "INVALID_REQUEST_ID",
    }


async def test_an_actor_need_not_say_anything_of_the_conversation(parley: Client) -> None:
    ada = await parley.user("ada")
    empty = pb.CreateConversationRequest()
    refused = await failure(parley.acting_as(ada).conversations.CreateConversation(empty))
    assert refused.violations == {"conversation": "REQUIRED"}
    assert (await create(parley.acting_as(ada))).conversation.creator_id == ada.id


async def test_users_named_twice_are_told_each_by_its_place(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    before = await row_count(database)
    refused = await failure(
        create(
            parley.acting_as(ada),
            participants=[person(bob), person("bob")],
            invitations=[person("bob")],
        )
    )
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "DUPLICATE")
    assert refused.violations == {
        "participants[1].user_id": "DUPLICATE",
        "invitations[0].user_id": "DUPLICATE",
    }
    assert await row_count(database) == before


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"conversation": Conversation(creator_id="nobody")}, "conversation.creator_id"),
        ({"participants": [person("bob"), person("nobody")]}, "participants[1].user_id"),
        ({"invitations": [person("nobody")]}, "invitations[0].user_id"),
        ({"initial_message": said(sender_id="nobody")}, "initial_message.sender_id"),
    ],
)
async def test_somebody_named_who_does_not_exist_fails_the_whole_call(
    parley: Client, database: asyncpg.Connection, values: dict[str, Any], field: str
) -> None:
    await parley.user("ada")
    await parley.user("bob")
    before = await row_count(database)
    by_ada = Conversation(creator_id="ada")
    refused = await failure(create(parley, **{"conversation": by_ada, **values}))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "USER_NOT_FOUND")
    assert (refused.known["field"], refused.known["name"]) == (field, "nobody")
    assert refused.precondition == "USER_NOT_FOUND"
    assert await row_count(database) == before


@pytest.mark.parametrize("how", ["is_active = false", "deleted_at = now()"])
@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"conversation": Conversation(creator_id="idle")}, "conversation.creator_id"),
        ({"participants": [person("idle")]}, "participants[0].user_id"),
        ({"invitations": [person("idle")]}, "invitations[0].user_id"),
    ],
)
async def test_nobody_inactive_or_deleted_is_in_a_new_conversation(
    parley: Client, database: asyncpg.Connection, how: str, values: dict[str, Any], field: str
) -> None:
    await parley.user("ada")
    await parley.user("idle")
    await database.execute(f"UPDATE users SET {how} WHERE username = 'idle'")
    by_ada = Conversation(creator_id="ada")
    refused = await failure(create(parley, **{"conversation": by_ada, **values}))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "USER_INACTIVE")
    assert refused.known["field"] == field


@pytest.mark.parametrize("by_id", [True, False])
async def test_an_actor_neither_creates_nor_speaks_in_anothers_name(
    parley: Client, database: asyncpg.Connection, by_id: bool
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    name = bob.id if by_id else "bob"
    before = await row_count(database)
    for values in (
        {"conversation": Conversation(creator_id=name)},
        {"participants": [person(bob)], "initial_message": said(sender_id=name)},
    ):
        refused = await failure(create(parley.acting_as(ada), **values))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert await row_count(database) == before
    own = await create(
        parley.acting_as(bob), Conversation(creator_id=name), initial_message=said(sender_id=name)
    )
    assert own.initial_message.sender_id == own.conversation.creator_id == bob.id


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (said(sender_id="eve"), "FAILED_PRECONDITION", "NOT_A_PARTICIPANT"),
        (said(sender_id="dee"), "FAILED_PRECONDITION", "NOT_A_PARTICIPANT"),
        (said(sender_id="ada", reply_to_sequence=1), "FAILED_PRECONDITION", "REPLY_TO_NOT_FOUND"),
        (said(), "INVALID_ARGUMENT", "REQUIRED"),
    ],
)
async def test_a_first_message_that_cannot_be_sent_leaves_no_conversation(
    parley: Client,
    database: asyncpg.Connection,
    message: message_pb2.NewMessage,
    code: str,
    reason: str,
) -> None:
    for name in ("ada", "dee", "eve"):
        await parley.user(name)
    before = await row_count(database)
    refused = await failure(
        create(
            parley,
            Conversation(creator_id="ada"),
            invitations=[person("dee")],
            initial_message=message,
        )
    )
    assert (refused.code, refused.reason) == (code, reason)
    assert refused.known["field"].startswith("initial_message.")
    assert await row_count(database) == before


async def test_a_person_may_not_open_in_the_role_of_a_machine(parley: Client) -> None:
    ada = await parley.user("ada")
    for role in (ASSISTANT, SYSTEM):
        refused = await failure(create(parley.acting_as(ada), initial_message=said(role=role)))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "ROLE_NOT_ALLOWED")


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_a_taken_slug_or_external_id_is_told_with_its_holder(
    parley: Client, database: asyncpg.Connection, is_deleted: bool
) -> None:
    ada = await parley.user("ada")
    # Conversations that have no external_id must not be taken for the one that has it.
    await parley.conversation(ada)
    talk = await parley.conversation(ada, slug="tea-at-four", external_id="7")
    await parley.conversation(ada)
    if is_deleted:
        await database.execute("UPDATE conversations SET deleted_at = now()")

    slug = await failure(parley.conversation(ada, slug="tea-at-four"))
    external_id = await failure(parley.conversation(ada, external_id="7"))

    assert (slug.code, slug.reason) == ("ALREADY_EXISTS", "SLUG_TAKEN")
    assert slug.resource == ("parley.v1.Conversation", "tea-at-four")
    assert (external_id.code, external_id.reason) == ("ALREADY_EXISTS", "EXTERNAL_ID_TAKEN")
    assert external_id.resource == ("parley.v1.Conversation", talk.id)


async def test_a_conversation_holds_a_thousand_people(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    await database.execute(
        "INSERT INTO users (username) SELECT 'u' || n FROM generate_series(1, 1001) AS n"
    )
    everybody = [person(f"u{n}") for n in range(1, 1_002)]

    full = await create(
        parley.acting_as(ada), participants=everybody[:500], invitations=everybody[500:999]
    )
    over = await failure(
        create(parley.acting_as(ada), participants=everybody[:500], invitations=everybody[500:1000])
    )
    far_over = await failure(create(parley.acting_as(ada), participants=everybody))

    assert full.conversation.participant_count == 501
    assert (over.code, over.reason) == ("FAILED_PRECONDITION", "TOO_MANY_PARTICIPANTS")
    assert over.known["limit"] == "1000"
    assert far_over.violations == {"participants": "TOO_MANY_ITEMS"}
    assert not await miscounted(database)


# Repeated


async def test_a_repeated_request_id_makes_one_conversation_and_answers_it_as_it_is_now(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    request: dict[str, Any] = {"initial_message": said(), "request_id": "r-1"}
    first = await create(parley.acting_as(ada), **request)
    before = await row_count(database)
    await parley.message(first.conversation, ada)
    await database.execute("UPDATE conversations SET title = 'Renamed', deleted_at = now()")

    again = create(parley.acting_as(ada), **request)

    assert await is_replay(again)
    talk = (await again).conversation
    assert (talk.id, talk.create_time) == (first.conversation.id, first.conversation.create_time)
    assert (talk.title, talk.last_sequence, talk.HasField("delete_time")) == ("Renamed", 2, True)
    assert (await again).initial_message == first.initial_message
    assert await row_count(database) == before + 2


async def test_a_replay_shows_what_the_creator_may_see_today_and_its_own_message_whole(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    request: dict[str, Any] = {
        "participants": [person(bob)],
        "initial_message": said(),
        "request_id": "r-1",
    }
    first = await create(parley.acting_as(ada), Conversation(title="Tea"), **request)
    talk = first.conversation
    await parley.leave(talk, ada, successor_user_id="bob")
    await parley.message(talk, bob, "now that she is gone")
    await parley.invite(talk, ada, invited_by_user_id="bob", hide_history=True)
    await parley.accept(talk, ada)
    await parley.leave(talk, ada)

    again = create(parley.acting_as(ada), Conversation(title="Tea"), **request)

    assert await is_replay(again)
    seen = (await again).conversation
    assert seen == Conversation(id=talk.id, slug=talk.slug, title="Tea", last_sequence=2)
    assert (await again).initial_message == first.initial_message

    await database.execute("DELETE FROM conversations")
    gone = await failure(create(parley.acting_as(ada), Conversation(title="Tea"), **request))
    assert (gone.code, gone.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")


async def test_a_request_id_belongs_to_one_actor_and_one_request(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    one = (await create(parley.acting_as(ada), request_id="r-1")).conversation
    other = (await create(parley.acting_as(bob), request_id="r-1")).conversation
    system = (await create(parley, Conversation(creator_id="ada"), request_id="r-1")).conversation
    assert len({one.id, other.id, system.id}) == 3
    reused = await failure(
        create(parley.acting_as(ada), Conversation(title="Tea"), request_id="r-1")
    )
    assert (reused.code, reused.reason) == ("FAILED_PRECONDITION", "REQUEST_ID_REUSED")


async def test_of_32_racers_under_one_request_id_all_get_one_conversation(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    request: dict[str, Any] = {"conversation": Conversation(title="Tea"), "request_id": "r-1"}

    answers = await asyncio.gather(
        *(insist(lambda: create(parley.acting_as(ada), **request)) for _ in range(32))
    )

    assert all(answer == answers[0] for answer in answers)
    assert await database.fetchval("SELECT count(*) FROM conversations") == 1


async def test_a_dry_run_answers_what_would_be_and_leaves_nothing(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    await parley.conversation(ada, slug="taken")
    before = await row_count(database)

    dry = await create(
        parley.acting_as(ada),
        Conversation(title="Tea"),
        participants=[person("bob")],
        initial_message=said(),
        request_id="r-1",
        validate_only=True,
    )

    talk = Conversation(
        title="Tea",
        creator_id=ada.id,
        is_active=True,
        members_may_invite=True,
        last_sequence=1,
        participant_count=2,
        version=4,
    )
    talk.is_direct = False
    assert dry.conversation == talk
    assert dry.initial_message == message_pb2.Message(
        sender_id=ada.id,
        role=USER,
        content="Who brings the biscuits?",
        status=message_pb2.Message.STATUS_COMPLETE,
        revision=1,
    )
    named = Conversation(slug="tea", creator_id=bob.id)
    assert (await create(parley, named, validate_only=True)).conversation.slug == "tea"
    for values, code in (
        ({"conversation": Conversation(slug="taken")}, "ALREADY_EXISTS"),
        ({"participants": [person("nobody")]}, "FAILED_PRECONDITION"),
        ({"conversation": Conversation(title="\n")}, "INVALID_ARGUMENT"),
    ):
        refused = await failure(create(parley.acting_as(ada), validate_only=True, **values))
        assert refused.code == code
    assert await row_count(database) == before


# Seen


@pytest.mark.parametrize(
    "reference", ["../x", "A B", "x" * 300, NIL, "ab", "tea at four", "a\0b", "Tea"]
)
async def test_what_names_no_conversation_is_refused(parley: Client, reference: str) -> None:
    refused = await failure(get(parley, reference))
    assert (refused.code, refused.violations) == (
        "INVALID_ARGUMENT",
        {"conversation_id": "INVALID_REFERENCE"},
    )


async def test_an_empty_reference_is_refused(parley: Client) -> None:
    assert (await failure(get(parley, ""))).violations == {"conversation_id": "REQUIRED"}


async def test_a_conversation_is_found_by_id_in_any_case_and_by_slug(parley: Client) -> None:
    talk = await parley.conversation(await parley.user("ada"), slug="tea-at-four")
    for reference in (talk.id, talk.id.upper(), "tea-at-four"):
        assert await get(parley, reference) == talk


async def test_everybody_sees_what_its_standing_shows(
    parley: Client, database: asyncpg.Connection
) -> None:
    names = ("ada", "bob", "invited", "left", "removed", "declined", "revoked", "stranger")
    user = {name: await parley.user(name) for name in names}
    made = await create(
        parley.acting_as(user["ada"]),
        Conversation(title="Tea", slug="tea", metadata=struct(secret=1), external_id="7"),
        participants=[person("bob", role=OBSERVER), person("left"), person("removed")],
        invitations=[person("invited"), person("declined"), person("revoked")],
        initial_message=said(),
    )
    talk = made.conversation
    await parley.leave(talk, user["left"])
    await parley.decline(talk, user["declined"])
    for name in ("removed", "revoked"):
        await database.execute(
            "UPDATE participants SET status = $2, visible_to_sequence = 1, left_at = joined_at"
            " WHERE user_id = $1",
            UUID(user[name].id),
            name.upper(),
        )
    await parley.message(talk, user["ada"], "they are gone")

    whole = await get(parley, "tea")

    assert whole.last_sequence == 2
    assert await get(parley.acting_as(user["ada"]), "tea") == whole
    assert await get(parley.acting_as(user["bob"]), "tea") == whole
    assert await get(parley.acting_as(user["invited"]), "tea") == Conversation(
        id=talk.id, title="Tea", creator_id=user["ada"].id
    )
    for name in ("left", "removed"):
        assert await get(parley.acting_as(user[name]), "tea") == Conversation(
            id=talk.id, slug="tea", title="Tea", last_sequence=1
        )
    for name in ("declined", "revoked", "stranger"):
        hidden = await failure(get(parley.acting_as(user[name]), "tea"))
        assert (hidden.code, hidden.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")


@pytest.mark.parametrize("by_id", [True, False])
async def test_hidden_and_missing_are_the_same_bytes(
    parley: Client, database: asyncpg.Connection, by_id: bool
) -> None:
    ada, eve = await parley.user("ada"), await parley.user("eve")
    talk = await parley.conversation(ada, slug="tea")
    name = talk.id if by_id else "tea"
    client = parley.acting_as(eve)
    calls: list[Callable[[], Any]] = [
        lambda: get(client, name),
        lambda: client.participants.GetParticipant(
            participant_pb2.GetParticipantRequest(conversation_id=name, user_id="ada")
        ),
        lambda: client.participants.ListParticipants(
            participant_pb2.ListParticipantsRequest(conversation_id=name)
        ),
        lambda: client.participants.InviteParticipant(
            participant_pb2.InviteParticipantRequest(conversation_id=name, user_id="ada")
        ),
        lambda: client.participants.AcceptInvitation(
            participant_pb2.AcceptInvitationRequest(conversation_id=name)
        ),
        lambda: client.participants.AcceptInvitation(
            participant_pb2.AcceptInvitationRequest(conversation_id=name, user_id="ada")
        ),
        lambda: client.participants.DeclineInvitation(
            participant_pb2.DeclineInvitationRequest(conversation_id=name, request_id="r-1")
        ),
        lambda: client.participants.LeaveConversation(
            participant_pb2.LeaveConversationRequest(conversation_id=name, etag="1-01234567")
        ),
    ]

    hidden = [await failure(call()) for call in calls]
    await database.execute("DELETE FROM conversations")
    missing = [await failure(call()) for call in calls]

    assert hidden == missing
    assert {(each.code, each.reason) for each in hidden} == {
        ("NOT_FOUND", "CONVERSATION_NOT_FOUND")
    }
    assert {each.resource for each in hidden} == {("parley.v1.Conversation", name)}


async def test_a_deleted_conversation_shows_that_it_is_deleted_to_those_who_see_it(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob, eve = [await parley.user(name) for name in ("ada", "bob", "eve")]
    talk = await parley.conversation(ada, invited=[bob], title="Tea")
    await database.execute("UPDATE conversations SET deleted_at = now()")
    for client in (parley, parley.acting_as(ada), parley.acting_as(bob)):
        assert (await get(client, talk.id)).HasField("delete_time")
    assert (await failure(get(parley.acting_as(eve), talk.id))).code == "NOT_FOUND"


# Listed


async def test_an_actor_lists_what_it_is_joined_in_and_the_system_everything(
    parley: Client,
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    await parley.conversation(ada, title="of ada alone")
    await parley.conversation(ada, bob, title="of both")
    await parley.conversation(ada, invited=[bob], title="with an invitation")
    left = await parley.conversation(ada, bob, title="that bob left")
    await parley.leave(left, bob)

    everything = ["that bob left", "with an invitation", "of both", "of ada alone"]
    assert await titles(parley) == everything
    assert await titles(parley.acting_as(ada)) == everything
    assert await titles(parley.acting_as(bob)) == ["of both"]
    (both,) = (await list_(parley.acting_as(bob))).conversations
    assert both == await get(parley, both.id)


async def test_each_filter_finds_what_it_says(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    await parley.conversation(ada, title="100% Tea_Time\\", metadata=struct(room={"no": 7, "a": 1}))
    await parley.conversation(bob, ada, title="100 cups", is_active=False, external_id="cups")
    await parley.conversation(bob, invited=[ada], title="Μαζί", metadata=struct(room={"no": 8}))
    tea, cups, together = "100% Tea_Time\\", "100 cups", "Μαζί"

    expectations: list[tuple[dict[str, Any], list[str]]] = [
        ({"title_contains": "tea_t"}, [tea]),
        ({"title_contains": "100%"}, [tea]),
        ({"title_contains": "0_"}, []),
        ({"title_contains": "\\"}, [tea]),
        ({"title_contains": "μαζ"}, [together]),
        ({"title_contains": "100"}, [cups, tea]),
        ({"is_active": True}, [together, tea]),
        ({"is_active": False}, [cups]),
        ({"external_id": "cups"}, [cups]),
        ({"external_id": "CUPS"}, []),
        ({"creator_id": "bob"}, [together, cups]),
        ({"creator_id": ada.id}, [tea]),
        ({"participant_id": "ada"}, [cups, tea]),
        ({"participant_id": bob.id}, [together, cups]),
        ({"metadata_contains": struct(room={"no": 7})}, [tea]),
        ({"metadata_contains": struct(room={})}, [together, tea]),
        ({"metadata_contains": struct(no=7)}, []),
        ({"metadata_contains": Struct()}, [together, cups, tea]),
        ({"creator_id": "bob", "is_active": True}, [together]),
    ]
    for filters, expected in expectations:
        assert await titles(parley, **filters) == expected, filters


async def test_times_are_half_open(parley: Client) -> None:
    ada = await parley.user("ada")
    first, second = [await parley.conversation(ada, title=title) for title in ("one", "two")]
    start, end = first.create_time, second.create_time
    later = Timestamp()
    later.FromDatetime(end.ToDatetime() + timedelta(microseconds=1))
    year_one = Timestamp(seconds=-62_135_596_800, nanos=1_000)

    assert await titles(parley, created_after=start) == ["two", "one"]
    assert await titles(parley, created_before=end) == ["one"]
    assert await titles(parley, created_after=start, created_before=end) == ["one"]
    assert await titles(parley, created_after=end, created_before=later) == ["two"]
    assert await titles(parley, created_after=year_one) == ["two", "one"]


@pytest.mark.parametrize(
    ("filters", "field", "reason"),
    [
        ({"page_size": -1}, "page_size", "INVALID_PAGE_SIZE"),
        ({"page_token": "x"}, "page_token", "INVALID_PAGE_TOKEN"),
        ({"page_token": "é"}, "page_token", "INVALID_PAGE_TOKEN"),
        ({"title_contains": "x" * 257}, "title_contains", "FIELD_TOO_LONG"),
        ({"title_contains": "\0"}, "title_contains", "INVALID_CHARACTER"),
        ({"external_id": "x" * 257}, "external_id", "FIELD_TOO_LONG"),
        ({"creator_id": NIL}, "creator_id", "INVALID_REFERENCE"),
        ({"participant_id": "a b"}, "participant_id", "INVALID_REFERENCE"),
        ({"created_after": Timestamp(nanos=-1)}, "created_after", "INVALID_TIME"),
        ({"created_before": Timestamp(seconds=1 << 60)}, "created_before", "INVALID_TIME"),
        ({"metadata_contains": struct(a=float("inf"))}, "metadata_contains.a", "INVALID_METADATA"),
    ],
)
async def test_a_bad_filter_is_named_with_its_rule(
    parley: Client, filters: dict[str, Any], field: str, reason: str
) -> None:
    refused = await failure(list_(parley, **filters))
    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", {field: reason})


async def test_a_span_that_ends_before_it_begins_is_refused(parley: Client) -> None:
    span = {"created_after": Timestamp(seconds=2), "created_before": Timestamp(seconds=1)}
    refused = await failure(list_(parley, **span))
    assert refused.violations == {"created_before": "INVALID_TIME_RANGE"}


@pytest.mark.parametrize("field", ["creator_id", "participant_id"])
@pytest.mark.parametrize("reference", ["nobody", NOBODY])
async def test_a_filter_by_somebody_who_does_not_exist_says_so(
    parley: Client, field: str, reference: str
) -> None:
    refused = await failure(list_(parley, **{field: reference}))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "USER_NOT_FOUND")
    assert (refused.known["field"], refused.known["name"]) == (field, reference)


async def test_deleted_ones_are_shown_to_the_system_and_to_their_owners_on_request(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob, eve = [await parley.user(name) for name in ("ada", "bob", "eve")]
    await parley.conversation(ada, bob, title="ada's, deleted")
    await parley.conversation(bob, ada, title="bob's, deleted")
    await database.execute("UPDATE conversations SET deleted_at = now()")
    await parley.conversation(ada, bob, eve, title="ada's")

    for client in (parley, parley.acting_as(ada), parley.acting_as(eve)):
        assert await titles(client) == ["ada's"]
    assert await titles(parley, show_deleted=True) == ["ada's", "bob's, deleted", "ada's, deleted"]
    assert await titles(parley.acting_as(ada), show_deleted=True) == ["ada's", "ada's, deleted"]
    assert await titles(parley.acting_as(bob), show_deleted=True) == ["ada's", "bob's, deleted"]
    refused = await failure(list_(parley.acting_as(eve), show_deleted=True))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")


@pytest.mark.parametrize("as_actor", [True, False])
async def test_pages_show_what_was_there_once_each_while_more_comes(
    parley: Client, database: asyncpg.Connection, as_actor: bool
) -> None:
    ada = await parley.user("ada")
    client = parley.acting_as(ada) if as_actor else parley
    there = [(await parley.conversation(ada)).id for _ in range(9)]
    # Half of them at the same moment: their ids decide.
    await database.execute(
        "UPDATE conversations SET created_at = (SELECT min(created_at) FROM conversations)"
        " WHERE id = ANY($1::uuid[])",
        there[:5],
    )
    seen: list[str] = []
    token = ""
    while True:
        page = await list_(client, page_size=2, page_token=token)
        seen += [each.id for each in page.conversations]
        await parley.conversation(ada)
        if not (token := page.next_page_token):
            break
        assert len(page.conversations) == 2
    assert seen == there[:4:-1] + sorted(there[:5], reverse=True)


async def test_a_page_ends_at_a_megabyte_and_the_next_one_goes_on(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    await database.execute(
        "INSERT INTO conversations (slug, creator_id, metadata)"
        " SELECT 'talk-' || n, $1, jsonb_build_object('a', repeat('x', 16000))"
        " FROM generate_series(1, 100) AS n",
        UUID(ada.id),
    )
    one = await list_(parley, page_size=1_000)
    two = await list_(parley, page_size=1_000, page_token=one.next_page_token)
    assert 900_000 < one.ByteSize() <= 1 << 20
    assert len({each.id for each in (*one.conversations, *two.conversations)}) == 100
    assert two.next_page_token == ""


async def test_a_page_token_is_for_its_own_list_alone(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk, other = await parley.conversation(ada, bob), await parley.conversation(ada, bob)
    token = (await list_(parley.acting_as(ada), page_size=1, is_active=True)).next_page_token
    own = parley.acting_as(ada)

    async def reason(call: Any) -> str:
        refused = await failure(call)
        assert refused.code == "INVALID_ARGUMENT"
        assert list(refused.violations) == ["page_token"]
        return refused.reason

    # Another page size is the same list.
    again = await list_(own, page_size=7, is_active=True, page_token=token)
    assert [each.id for each in again.conversations] == [talk.id]
    assert other.id not in {each.id for each in again.conversations}
    # Another filter, actor, none, method.
    for call in (
        list_(own, is_active=False, page_token=token),
        list_(own, page_token=token),
        list_(parley.acting_as(bob), is_active=True, page_token=token),
        list_(parley, is_active=True, page_token=token),
        own.participants.ListParticipants(
            participant_pb2.ListParticipantsRequest(conversation_id=talk.id, page_token=token)
        ),
    ):
        assert await reason(call) == "PAGE_TOKEN_MISMATCH"
    # Cut, longer, each of its characters another one, of another database.
    other_letters = [
        token[:n] + ("A" if token[n] != "A" else "B") + token[n + 1 :] for n in range(len(token))
    ]
    for forged in (token[:-1], token[1:], token + "A", token + "=", "A" * 64, *other_letters):
        call = list_(own, is_active=True, page_token=forged)
        assert await reason(call) in ("INVALID_PAGE_TOKEN", "PAGE_TOKEN_MISMATCH")
