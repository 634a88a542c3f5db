"""Participants: invited, joined, gone; who may, what each sees of it, and that it happens once."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import grpc
import pytest

from parley.v1 import conversation_pb2, message_pb2
from parley.v1 import participant_pb2 as pb
from service.domain import ParticipantStatus
from service.rules.participants import MOVES, Move

from ..make import (
    MEMBER,
    MODERATOR,
    NOBODY,
    OBSERVER,
    OWNER,
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
DECLINED, REVOKED = Participant.STATUS_DECLINED, Participant.STATUS_REVOKED
LEFT, REMOVED = Participant.STATUS_LEFT, Participant.STATUS_REMOVED
STATUSES = [None, INVITED, JOINED, DECLINED, REVOKED, LEFT, REMOVED]

Call = Callable[..., Awaitable[Participant]]


def name_of(status: "Participant.Status.ValueType | None") -> str:
    return Participant.Status.Name(status).removeprefix("STATUS_") if status else "none"


async def put(
    parley: Client,
    database: asyncpg.Connection,
    talk: Conversation,
    user: User,
    status: "Participant.Status.ValueType | None",
) -> None:
    """Bring a user into a status, by the calls that lead there."""
    if status is None:
        return
    await parley.invite(talk, user, invited_by_user_id=talk.creator_id, reason="as arranged")
    if status in (JOINED, LEFT, REMOVED):
        await parley.accept(talk, user)
    if status == LEFT:
        await parley.leave(talk, user)
    if status == DECLINED:
        await parley.decline(talk, user)
    if status == REVOKED:
        await parley.revoke(talk, user)
    if status == REMOVED:
        await parley.remove(talk, user)


# A participant makes these moves itself; the others, somebody makes for it.
OWN_MOVES = (Move.ACCEPT, Move.DECLINE, Move.LEAVE)


async def trio(parley: Client, **values: Any) -> tuple[Conversation, User, User]:
    """A conversation of ada, who owns it and has said something; and bob, who is not in it."""
    ada, bob = await parley.user("ada"), await parley.user("bob")
    return await parley.conversation(ada, first="hello", **values), ada, bob


def by(client: Client, call: Move) -> Call:
    """The client's method of that name."""
    return getattr(client, call.lower())  # type: ignore[no-any-return]


async def read(client: Client, talk: Conversation) -> list[int]:
    """The sequences of the messages that the client may read."""
    return [message.sequence for message in await client.all_messages(talk)]


def list_(client: Client, talk: Conversation | str, **values: Any) -> Any:
    reference = talk if isinstance(talk, str) else talk.id
    return client.participants.ListParticipants(
        pb.ListParticipantsRequest(conversation_id=reference, **values)
    )


async def names(client: Client, talk: Conversation, **filters: Any) -> list[str]:
    return [each.username for each in (await list_(client, talk, **filters)).participants]


# The state machine


@pytest.mark.parametrize("as_system", [False, True], ids=["itself", "the system"])
@pytest.mark.parametrize("status", STATUSES, ids=name_of)
@pytest.mark.parametrize("call", Move)
async def test_each_call_leads_where_the_table_says(
    parley: Client,
    database: asyncpg.Connection,
    call: Move,
    status: "Participant.Status.ValueType | None",
    as_system: bool,
) -> None:
    talk, ada, bob = await trio(parley)
    await put(parley, database, talk, bob, status)
    before = await facts(database, talk)
    then = await parley.participant(talk, bob) if status else None
    values: dict[str, Any] = {} if call is Move.ACCEPT else {"reason": "because"}
    if call in (Move.INVITE, Move.ADD) and as_system:
        values["invited_by_user_id"] = "ada"
    actor = None if as_system else bob if call in OWN_MOVES else ada
    move = by(parley.acting_as(actor) if actor else parley, call)(talk, bob, **values)
    current = ParticipantStatus(name_of(status)) if status else None

    if current not in MOVES[call]:
        refused = await failure(move)
        if status:
            assert (refused.code, refused.reason) == (
                "FAILED_PRECONDITION",
                "INVALID_STATE_TRANSITION",
            )
            assert refused.known["current_status"] == current
            assert refused.known["allowed"] == ", ".join(filter(None, MOVES[call]))
            assert refused.precondition == "INVALID_STATE_TRANSITION"
        else:
            kind = "PARTICIPANT" if as_system or call not in OWN_MOVES else "CONVERSATION"
            assert (refused.code, refused.reason) == ("NOT_FOUND", f"{kind}_NOT_FOUND")
    else:
        now = await move
        target = MOVES[call][current]
        assert name_of(now.status) == target
        assert now == await parley.participant(talk, bob)
        if target == current:
            assert now == then
        else:
            assert (await facts(database, talk))[-1] == {
                "version": len(before) + 1,
                "type": "PARTICIPANT_CHANGED",
                "user_id": bob.id,
                **({"actor_id": actor.id} if actor else {}),
                **({"previous_status": current, "previous_role": "MEMBER"} if current else {}),
                "status": target,
                "role": "MEMBER",
                **({"reason": "because"} if values else {}),
            }
            assert now.status_actor_id == (actor.id if actor else "")
            assert now.status_reason == ("because" if values else "")
            assert now.status_time == now.update_time
            assert then is None or now.etag != then.etag
            before.append({})
    assert len(await facts(database, talk)) == len(before)
    assert not await miscounted(database)


async def test_a_participant_tells_how_it_came_to_be(parley: Client) -> None:
    talk, ada, bob = await trio(parley)

    invited = await parley.acting_as(ada).invite(
        talk, bob, role=OBSERVER, initial_message_sequence=1, reason="old friend"
    )

    assert (invited.conversation_id, invited.user_id) == (talk.id, bob.id)
    assert (invited.username, invited.status, invited.role) == ("bob", INVITED, OBSERVER)
    assert invited.invited_by_user_id == invited.status_actor_id == ada.id
    assert invited.initial_message_id == (await parley.all_messages(talk))[0].id
    assert (invited.visible_from_sequence, invited.visible_to_sequence) == (1, 0)
    assert not invited.HasField("join_time")
    assert invited.create_time == invited.update_time == invited.status_time

    joined = await parley.acting_as(bob).accept(talk, bob)

    assert (joined.status, joined.role, joined.invited_by_user_id) == (JOINED, OBSERVER, ada.id)
    assert joined.join_time == joined.status_time == joined.update_time
    assert joined.create_time == invited.create_time
    assert not joined.HasField("visible_to_sequence")
    assert not joined.HasField("leave_time")

    left = await parley.acting_as(bob).leave(talk, bob, reason="enough")

    assert (left.status, left.status_reason, left.status_actor_id) == (LEFT, "enough", bob.id)
    assert left.leave_time == left.status_time
    assert left.join_time == joined.join_time
    assert left.visible_to_sequence == 1

    await parley.acting_as(ada).invite(talk, bob)
    again = await parley.acting_as(bob).accept(talk, bob)

    assert again.leave_time == left.leave_time
    assert again.join_time.ToDatetime() > left.leave_time.ToDatetime()


async def test_an_answer_does_not_wait_for_an_actor_to_be_named(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    own = parley.acting_as("bob").participants
    await parley.acting_as(ada).invite(talk, bob)
    accepted = await own.AcceptInvitation(pb.AcceptInvitationRequest(conversation_id=talk.slug))
    assert accepted.participant.user_id == bob.id
    left = await own.LeaveConversation(pb.LeaveConversationRequest(conversation_id=talk.slug))
    assert left.participant.status == LEFT
    got = await own.GetParticipant(pb.GetParticipantRequest(conversation_id=talk.slug))
    assert got.participant == left.participant


async def test_every_name_in_a_request_may_be_an_id_or_a_readable_one(parley: Client) -> None:
    talk, ada, bob = await trio(parley, slug="tea")
    cy = await parley.user("|QuaD-|")
    for reference in ("tea", talk.id, talk.id.upper()):
        for user in (bob.id, "bob", cy.id.upper(), "|QuaD-|"):
            invited = await parley.participants.InviteParticipant(
                pb.InviteParticipantRequest(
                    conversation_id=reference, user_id=user, invited_by_user_id="ada"
                )
            )
            assert invited.participant.user_id == (bob.id if user in (bob.id, "bob") else cy.id)
            assert invited.participant.conversation_id == talk.id
    for user in ("bob", "|QuaD-|"):
        request = pb.AcceptInvitationRequest(conversation_id="tea", user_id=user)
        assert (await parley.participants.AcceptInvitation(request)).participant.username == user
    leave = pb.LeaveConversationRequest(
        conversation_id="tea", user_id="ada", successor_user_id="|QuaD-|"
    )
    assert (await parley.participants.LeaveConversation(leave)).participant.user_id == ada.id
    assert (await parley.participant(talk, cy)).role == OWNER


# What is wrong with a request


REQUESTS: dict[str, Any] = {
    "InviteParticipant": pb.InviteParticipantRequest,
    "AddParticipant": pb.AddParticipantRequest,
    "AcceptInvitation": pb.AcceptInvitationRequest,
    "DeclineInvitation": pb.DeclineInvitationRequest,
    "LeaveConversation": pb.LeaveConversationRequest,
    "RevokeInvitation": pb.RevokeInvitationRequest,
    "RemoveParticipant": pb.RemoveParticipantRequest,
    "UpdateParticipant": pb.UpdateParticipantRequest,
    "MarkRead": pb.MarkReadRequest,
    "GetParticipant": pb.GetParticipantRequest,
    "ListParticipants": pb.ListParticipantsRequest,
}


def request_of(rpc: str, **values: Any) -> Any:
    """A request, with those of the values that it has fields for."""
    fields = REQUESTS[rpc].DESCRIPTOR.fields_by_name
    return REQUESTS[rpc](**{name: value for name, value in values.items() if name in fields})


BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("conversation_id", "", "REQUIRED"),
    ("conversation_id", "../x", "INVALID_REFERENCE"),
    ("conversation_id", NIL, "INVALID_REFERENCE"),
    ("conversation_id", "x" * 300, "INVALID_REFERENCE"),
    ("user_id", "", "REQUIRED"),
    ("user_id", NIL, "INVALID_REFERENCE"),
    ("user_id", "a b", "INVALID_REFERENCE"),
    ("invited_by_user_id", "", "REQUIRED"),
    ("invited_by_user_id", "\0", "INVALID_REFERENCE"),
    ("successor_user_id", NIL, "INVALID_REFERENCE"),
    ("role", 5, "INVALID_ENUM_VALUE"),
    ("reason", "x" * 501, "FIELD_TOO_LONG"),
    ("reason", "a\nb", "INVALID_CHARACTER"),
    ("initial_message_id", "1", "INVALID_REFERENCE"),
    ("initial_message_sequence", 0, "OUT_OF_BOUNDS"),
    ("initial_message_sequence", -1, "OUT_OF_BOUNDS"),
    ("etag", "stale", "INVALID_ETAG"),
    ("request_id", "x" * 65, "INVALID_REQUEST_ID"),
    ("participant", Participant(), "participant.role: REQUIRED"),
    ("participant", Participant(role=MEMBER, etag="x"), "participant.etag: INVALID_ETAG"),
    ("update_mask", {"paths": ["role", "status"]}, "INVALID_UPDATE_MASK"),
    ("update_mask", {"paths": ["..", "role"]}, "INVALID_UPDATE_MASK"),
    ("update_mask", {"paths": [""]}, "INVALID_UPDATE_MASK"),
    ("message_id", "1", "INVALID_REFERENCE"),
    ("message_id", "", "INVALID_REFERENCE"),
    ("sequence", -1, "OUT_OF_BOUNDS"),
    ("sequence", None, "message_id: REQUIRED"),
    ("page_size", -1, "INVALID_PAGE_SIZE"),
    ("statuses", [INVITED, 0], "statuses[1]: REQUIRED"),
    ("statuses", [99], "statuses[0]: INVALID_ENUM_VALUE"),
    ("roles", [OWNER, -1], "roles[1]: INVALID_ENUM_VALUE"),
]


@pytest.mark.parametrize(
    ("rpc", "field", "value", "reason"),
    [
        (rpc, *bad)
        for rpc, request in REQUESTS.items()
        for bad in BAD_FIELDS
        if bad[0] in request.DESCRIPTOR.fields_by_name
    ],
)
async def test_a_bad_field_is_named_with_its_rule(
    parley: Client, rpc: str, field: str, value: Any, reason: str
) -> None:
    given = {
        "conversation_id": "tea",
        "user_id": "bob",
        "invited_by_user_id": "ada",
        "participant": Participant(role=MEMBER),
        "sequence": 1,
        field: value,
    }
    refused = await failure(getattr(parley.participants, rpc)(request_of(rpc, **given)))
    place, _, why = reason.rpartition(": ")
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", why)
    assert refused.violations == {place or field: why}


async def test_every_violation_is_told_at_once(parley: Client) -> None:
    request = pb.InviteParticipantRequest(
        role=5,  # type: ignore[arg-type]
        initial_message_sequence=-1,
        reason="\r",
        etag="x",
        request_id="é",
    )
    refused = await failure(parley.participants.InviteParticipant(request))
    assert refused.violations == {
        "conversation_id": "REQUIRED",
        "user_id": "REQUIRED",
        "invited_by_user_id": "REQUIRED",
        "role": "INVALID_ENUM_VALUE",
        "initial_message_sequence": "OUT_OF_BOUNDS",
        "reason": "INVALID_CHARACTER",
        "etag": "INVALID_ETAG",
        "request_id": "INVALID_REQUEST_ID",
    }


async def test_ten_thousand_violations_are_counted_and_twenty_told(parley: Client) -> None:
    refused = await failure(list_(parley, "tea", roles=[99] * 10_000))
    assert refused.known["violations"] == "10000"
    assert len(refused.violations) == 20
    assert len(refused.trailers["grpc-status-details-bin"]) <= 4_096


@pytest.mark.parametrize("size", [499, 500])
async def test_a_reason_within_its_limit_is_kept_as_given(parley: Client, size: int) -> None:
    talk, ada, bob = await trio(parley)
    reason = "🚀" * size
    assert (await parley.acting_as(ada).invite(talk, bob, reason=reason)).status_reason == reason


@pytest.mark.parametrize("rpc", REQUESTS)
@pytest.mark.parametrize("reference", ["nowhere", NOBODY])
async def test_a_conversation_that_is_not_there_is_not_found(
    parley: Client, rpc: str, reference: str
) -> None:
    await parley.user("ada")
    request = request_of(
        rpc,
        conversation_id=reference,
        user_id="ada",
        invited_by_user_id="ada",
        participant=Participant(role=MEMBER),
        sequence=1,
    )
    missing = await failure(getattr(parley.participants, rpc)(request))
    assert (missing.code, missing.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")
    assert missing.resource == ("parley.v1.Conversation", reference)


@pytest.mark.parametrize("rpc", [*REQUESTS][:5])
async def test_a_user_named_who_does_not_exist_is_told_by_its_field(
    parley: Client, rpc: str
) -> None:
    await trio(parley, slug="tea")
    request = request_of(rpc, conversation_id="tea", user_id="nobody", invited_by_user_id="ada")
    missing = await failure(getattr(parley.participants, rpc)(request))
    assert (missing.code, missing.reason) == ("FAILED_PRECONDITION", "USER_NOT_FOUND")
    assert (missing.known["field"], missing.known["name"]) == ("user_id", "nobody")


@pytest.mark.parametrize("as_system", [False, True], ids=["an owner", "the system"])
@pytest.mark.parametrize("name", ["nobody", "bob"], ids=["no user", "never in it"])
@pytest.mark.parametrize(
    "rpc", ["RevokeInvitation", "RemoveParticipant", "UpdateParticipant", "GetParticipant"]
)
async def test_who_was_never_in_it_and_who_does_not_exist_are_told_alike(
    parley: Client, rpc: str, name: str, as_system: bool
) -> None:
    await trio(parley, slug="tea")
    client = parley if as_system else parley.acting_as("ada")
    changed = Participant(role=MEMBER)
    request = request_of(rpc, conversation_id="tea", user_id=name, participant=changed)
    missing = await failure(getattr(client.participants, rpc)(request))
    assert (missing.code, missing.reason) == ("NOT_FOUND", "PARTICIPANT_NOT_FOUND")
    assert missing.resource == ("parley.v1.Participant", name)


# Inviting: who may


@pytest.mark.parametrize("role", [OWNER, MODERATOR, MEMBER, OBSERVER], ids=Participant.Role.Name)
@pytest.mark.parametrize(
    ("inviter", "may"),
    [
        ("owner", {OWNER, MODERATOR, MEMBER, OBSERVER}),
        ("moderator", {MODERATOR, MEMBER, OBSERVER}),
        ("member", {MEMBER, OBSERVER}),
        ("observer", set()),
        ("system", {OWNER, MODERATOR, MEMBER, OBSERVER}),
    ],
)
async def test_each_role_invites_to_roles_up_to_its_own(
    parley: Client, inviter: str, may: set[int], role: "Participant.Role.ValueType"
) -> None:
    owner, new = await parley.user("owner"), await parley.user("new")
    members = {
        name: pb.NewParticipant(user_id=(await parley.user(name)).id, role=own)
        for name, own in (("moderator", MODERATOR), ("member", MEMBER), ("observer", OBSERVER))
    }
    request = conversation_pb2.CreateConversationRequest(
        conversation=Conversation(creator_id=owner.id), participants=members.values()
    )
    talk = (await parley.conversations.CreateConversation(request)).conversation
    client = parley if inviter == "system" else parley.acting_as(inviter)
    values = {"invited_by_user_id": "observer"} if inviter == "system" else {}

    invite = client.invite(talk, new, role=role, **values)

    if role in may:
        assert ((await invite).status, (await parley.participant(talk, new)).role) == (
            INVITED,
            role,
        )
    else:
        refused = await failure(invite)
        reason = "ROLE_NOT_ALLOWED" if may else "PERMISSION_DENIED"
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", reason)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (None, "NOT_FOUND", "CONVERSATION_NOT_FOUND"),
        (INVITED, "PERMISSION_DENIED", "NOT_A_PARTICIPANT"),
        (DECLINED, "NOT_FOUND", "CONVERSATION_NOT_FOUND"),
        (REVOKED, "NOT_FOUND", "CONVERSATION_NOT_FOUND"),
        (LEFT, "PERMISSION_DENIED", "NOT_A_PARTICIPANT"),
        (REMOVED, "PERMISSION_DENIED", "NOT_A_PARTICIPANT"),
    ],
    ids=["none", "INVITED", "DECLINED", "REVOKED", "LEFT", "REMOVED"],
)
async def test_who_is_not_joined_invites_nobody(
    parley: Client,
    database: asyncpg.Connection,
    status: "Participant.Status.ValueType | None",
    code: str,
    reason: str,
) -> None:
    talk, _, bob = await trio(parley)
    cy = await parley.user("cy")
    await put(parley, database, talk, bob, status)
    refused = await failure(parley.acting_as(bob).invite(talk, cy))
    assert (refused.code, refused.reason) == (code, reason)
    named = await failure(parley.invite(talk, cy, invited_by_user_id="bob"))
    assert (named.code, named.reason) == ("FAILED_PRECONDITION", "NOT_A_PARTICIPANT")
    assert named.known["field"] == "invited_by_user_id"


async def test_members_invite_unless_the_conversation_says_no(parley: Client) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    talk = await parley.conversation(ada, bob, members_may_invite=False)
    refused = await failure(parley.acting_as(bob).invite(talk, cy))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert "members may not invite" in refused.message
    assert (await parley.acting_as(ada).invite(talk, cy)).status == INVITED


async def test_who_was_removed_is_invited_by_a_moderator_and_no_member(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    talk = await parley.conversation(ada, bob)
    await put(parley, database, talk, cy, REMOVED)
    refused = await failure(parley.acting_as(bob).invite(talk, cy))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    await database.execute("UPDATE participants SET role = 'MODERATOR' WHERE role = 'MEMBER'")
    assert (await parley.acting_as(bob).invite(talk, cy)).status == INVITED


@pytest.mark.parametrize("how", ["is_active = false", "deleted_at = now()"])
async def test_nobody_inactive_or_deleted_is_invited_or_accepts(
    parley: Client, database: asyncpg.Connection, how: str
) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    await parley.acting_as(ada).invite(talk, cy)
    await database.execute(f"UPDATE users SET {how} WHERE username IN ('bob', 'cy')")
    for call in (parley.acting_as(ada).invite(talk, bob), parley.accept(talk, cy)):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "USER_INACTIVE")
        assert refused.known["field"] == "user_id"
    # It may still be let go.
    assert (await parley.decline(talk, cy)).status == DECLINED


async def test_an_actor_invites_in_nobody_elses_name(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    await put(parley, None, talk, bob, JOINED)  # type: ignore[arg-type]
    for inviter in (bob.id, "bob", "nobody", str(uuid4())):
        refused = await failure(parley.acting_as(ada).invite(talk, cy, invited_by_user_id=inviter))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert (await parley.acting_as(ada).invite(talk, cy, invited_by_user_id="ada")).username == "cy"
    nobody = await failure(parley.invite(talk, cy, invited_by_user_id="nobody"))
    assert (nobody.code, nobody.reason) == ("FAILED_PRECONDITION", "USER_NOT_FOUND")
    assert nobody.known["field"] == "invited_by_user_id"


async def test_an_answer_for_somebody_else_is_refused_or_hidden(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    eve = await parley.user("eve")
    await parley.acting_as(ada).invite(talk, bob)
    for call in (Move.ACCEPT, Move.DECLINE, Move.LEAVE):
        visible = await failure(by(parley.acting_as(ada), call)(talk, bob))
        assert (visible.code, visible.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
        hidden = await failure(by(parley.acting_as(eve), call)(talk, bob))
        assert (hidden.code, hidden.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")
    assert (await parley.participant(talk, bob)).status == INVITED


# Inviting: what goes with it


async def test_an_invitation_carries_a_message_by_id_or_sequence(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    second = await parley.message(talk, ada)
    by_id, by_sequence = {"initial_message_id": second.id}, {"initial_message_sequence": 2}
    for user, key in ((bob, by_id), (cy, by_sequence)):
        invited = await parley.acting_as(ada).invite(talk, user, **key)
        assert invited.initial_message_id == second.id
        # That one may be read, and no other.
        own = parley.acting_as(user).messages
        shown = message_pb2.GetMessageRequest(conversation_id=talk.id, sequence=2)
        assert (await own.GetMessage(shown)).message == second
        other = message_pb2.GetMessageRequest(conversation_id=talk.id, sequence=1)
        assert (await failure(own.GetMessage(other))).reason == "MESSAGE_NOT_FOUND"
        assert (await failure(read(parley.acting_as(user), talk))).reason == "NOT_A_PARTICIPANT"


async def test_a_message_that_the_inviter_may_not_read_goes_with_no_invitation(
    parley: Client,
) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    elsewhere = await parley.message(await parley.conversation(ada), ada)
    first = (await parley.all_messages(talk))[0]
    await parley.acting_as(ada).invite(talk, bob, hide_history=True)
    await parley.acting_as(bob).accept(talk, bob)

    for client, key, field in (
        (parley.acting_as(bob), {"initial_message_id": first.id}, "initial_message_id"),
        (parley.acting_as(bob), {"initial_message_sequence": 1}, "initial_message_sequence"),
        (parley.acting_as(ada), {"initial_message_sequence": 2}, "initial_message_sequence"),
        (parley.acting_as(ada), {"initial_message_id": elsewhere.id}, "initial_message_id"),
        (parley.acting_as(ada), {"initial_message_id": str(uuid4())}, "initial_message_id"),
    ):
        refused = await failure(client.invite(talk, cy, **key))
        assert (refused.code, refused.reason) == (
            "FAILED_PRECONDITION",
            "INITIAL_MESSAGE_NOT_FOUND",
        )
        assert refused.known["field"] == field
    assert await names(parley, talk) == ["ada", "bob"]


async def test_the_thousand_and_first_is_one_too_many(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    await database.execute(
        "WITH u AS (INSERT INTO users (username) SELECT 'u' || n FROM generate_series(1, 998) AS n"
        " RETURNING id) INSERT INTO participants"
        " (conversation_id, user_id, status, role, joined_at, status_at, visible_to_sequence)"
        " SELECT $1, id, 'INVITED', 'MEMBER', NULL, now(), 0 FROM u",
        UUID(talk.id),
    )

    answers = await asyncio.gather(
        *(parley.acting_as(ada).invite(talk, user) for user in (bob, cy)), return_exceptions=True
    )

    invited = [answer for answer in answers if isinstance(answer, Participant)]
    assert len(invited) == 1
    other = cy if invited[0].user_id == bob.id else bob
    refused = await failure(parley.acting_as(ada).invite(talk, other))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "TOO_MANY_PARTICIPANTS")
    assert refused.known["limit"] == "1000"
    # Whoever is there already stays, and whoever goes makes room.
    again = bob if other is cy else cy
    assert (await parley.acting_as(ada).invite(talk, again)).status == INVITED
    await parley.decline(talk, again)
    assert (await parley.acting_as(ada).invite(talk, other)).status == INVITED


# Archived, deleted, direct


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("is_active = false", "CONVERSATION_ARCHIVED"),
        ("deleted_at = now()", "CONVERSATION_DELETED"),
    ],
)
async def test_an_archived_or_deleted_conversation_is_only_declined_and_left(
    parley: Client, database: asyncpg.Connection, how: str, reason: str
) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    await parley.acting_as(ada).invite(talk, bob)
    await database.execute(f"UPDATE conversations SET {how}")

    for call in (parley.acting_as(ada).invite(talk, cy), parley.acting_as(bob).accept(talk, bob)):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", reason)
    reads = (list_(parley.acting_as(ada), talk), parley.acting_as(ada).participant(talk, ada))
    if reason == "CONVERSATION_DELETED":
        for call in reads:
            assert (await failure(call)).reason == reason
    else:
        assert (await asyncio.gather(*reads))[1].role == OWNER

    assert (await parley.acting_as(bob).decline(talk, bob)).status == DECLINED
    assert (await parley.acting_as(ada).leave(talk, ada)).status == LEFT


async def test_nobody_is_invited_to_a_direct_conversation(
    parley: Client, database: asyncpg.Connection
) -> None:
    _, ada, bob = await trio(parley)
    talk = await parley.direct(ada, await parley.user("cy"))
    refused = await failure(parley.acting_as(ada).invite(talk, bob))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "DIRECT_CONVERSATION")


# Windows


async def test_who_joins_reads_from_the_start_or_from_then_on(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    await parley.acting_as(ada).invite(talk, bob)
    await parley.acting_as(ada).invite(talk, cy, hide_history=True)
    await parley.message(talk, ada)
    for user in (bob, cy):
        await parley.acting_as(user).accept(talk, user)
    await parley.message(talk, ada)
    assert await read(parley.acting_as(bob), talk) == [1, 2, 3]
    assert await read(parley.acting_as(cy), talk) == [3]


@pytest.mark.parametrize(("hide_history", "back"), [(False, [1, 2, 3, 4]), (True, [4])])
async def test_who_leaves_reads_on_up_to_then_and_after_joining_again_one_interval(
    parley: Client, hide_history: bool, back: list[int]
) -> None:
    talk, ada, bob = await trio(parley)
    own = parley.acting_as(bob)
    await put(parley, None, talk, bob, JOINED)  # type: ignore[arg-type]
    await parley.message(talk, ada)
    await own.leave(talk, bob)
    await parley.message(talk, ada, "while bob is away")
    assert await read(own, talk) == [1, 2]

    await parley.acting_as(ada).invite(talk, bob, hide_history=hide_history)
    assert await read(own, talk) == [1, 2]
    await own.decline(talk, bob)
    assert await read(own, talk) == [1, 2]
    await parley.acting_as(ada).invite(talk, bob, hide_history=hide_history)
    await own.accept(talk, bob)
    await parley.message(talk, ada)

    assert await read(own, talk) == back


# Owners


async def test_the_last_owner_passes_the_conversation_on_in_the_same_step(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    await put(parley, database, talk, bob, JOINED)
    then = await parley.participant(talk, bob)
    refused = await failure(parley.acting_as(ada).leave(talk, ada))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "LAST_OWNER")
    assert refused.precondition == "LAST_OWNER"

    left = await parley.acting_as(ada).leave(talk, ada, successor_user_id="bob", reason="enough")

    assert left.status == LEFT
    heir = await parley.participant(talk, bob)
    assert (heir.status, heir.role) == (JOINED, OWNER)
    assert heir.etag != then.etag
    for name in ("join_time", "status_time", "status_actor_id", "status_reason", "create_time"):
        assert getattr(heir, name) == getattr(then, name)
    promotion, leaving = (await facts(database, talk))[-2:]
    assert promotion == {
        "version": 5,
        "type": "PARTICIPANT_CHANGED",
        "actor_id": ada.id,
        "user_id": bob.id,
        "previous_status": "JOINED",
        "status": "JOINED",
        "previous_role": "MEMBER",
        "role": "OWNER",
    }
    assert (leaving["user_id"], leaving["reason"]) == (ada.id, "enough")
    assert not await miscounted(database)


@pytest.mark.parametrize(
    ("successor", "code", "reason"),
    [
        ("nobody", "FAILED_PRECONDITION", "USER_NOT_FOUND"),
        (NOBODY, "FAILED_PRECONDITION", "USER_NOT_FOUND"),
        ("eve", "FAILED_PRECONDITION", "NOT_A_PARTICIPANT"),
        ("dee", "FAILED_PRECONDITION", "NOT_A_PARTICIPANT"),
        ("ada", "FAILED_PRECONDITION", "NOT_A_PARTICIPANT"),
    ],
)
async def test_a_successor_is_somebody_else_who_is_joined(
    parley: Client, successor: str, code: str, reason: str
) -> None:
    ada, bob, dee, _ = [await parley.user(name) for name in ("ada", "bob", "dee", "eve")]
    talk = await parley.conversation(ada, bob, invited=[dee])
    for client in (parley, parley.acting_as(ada)):
        refused = await failure(client.leave(talk, ada, successor_user_id=successor))
        assert (refused.code, refused.reason) == (code, reason)
        assert refused.known["field"] == "successor_user_id"
    assert (await parley.seen(talk)).participant_count == 2


async def test_no_member_makes_an_owner_by_leaving(parley: Client) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    talk = await parley.conversation(ada, bob, cy)
    refused = await failure(parley.acting_as(bob).leave(talk, bob, successor_user_id="cy"))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert (await parley.participant(talk, cy)).role == MEMBER


async def test_the_very_last_may_leave_and_take_its_invitations_with_it(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    await parley.acting_as(ada).invite(talk, bob)
    assert (await parley.acting_as(ada).leave(talk, ada)).status == LEFT
    assert (await parley.seen(talk)).participant_count == 0


async def test_of_two_owners_who_leave_at_once_one_stays(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    for _ in range(8):
        talk = await parley.conversation(ada, cy)
        await parley.invite(talk, bob, invited_by_user_id="ada", role=OWNER)
        await parley.accept(talk, bob)
        answers = await asyncio.gather(
            parley.acting_as(ada).leave(talk, ada),
            parley.acting_as(bob).leave(talk, bob),
            return_exceptions=True,
        )
        refused = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        assert [each.code().name for each in refused] == ["FAILED_PRECONDITION"]
        assert len(await names(parley, talk, roles=[OWNER])) == 1
    assert not await miscounted(database)


# At once


@pytest.mark.parametrize("other", [Move.LEAVE, Move.DECLINE])
async def test_of_an_acceptance_and_its_opposite_at_once_the_story_is_one(
    parley: Client, database: asyncpg.Connection, other: Move
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talks = [await parley.conversation(ada, invited=[bob]) for _ in range(64)]
    own = parley.acting_as(bob)

    await asyncio.gather(
        *(
            insist(lambda talk=talk, call=call: by(own, call)(talk, bob))  # type: ignore[misc]
            for talk in talks
            for call in (Move.ACCEPT, other)
        ),
        return_exceptions=True,
    )

    stories = set()
    for talk in talks:
        story = [fact for fact in await facts(database, talk) if fact.get("user_id") == bob.id]
        for before, after in pairwise(story):
            assert after["previous_status"] == before["status"]
        stories.add(tuple(fact["status"] for fact in story))
    joined = ("INVITED", "JOINED", "LEFT") if other is Move.LEAVE else ("INVITED", "JOINED")
    assert stories <= {joined, ("INVITED", "DECLINED")}
    assert not await miscounted(database)


async def test_of_16_who_invite_one_user_at_once_one_does(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await trio(parley)
    invited = await asyncio.gather(
        *(insist(lambda: parley.acting_as(ada).invite(talk, bob)) for _ in range(16))
    )
    assert all(each == invited[0] for each in invited)
    assert len(await facts(database, talk)) == 4


# Repeated


@pytest.mark.parametrize("call", Move)
async def test_a_repeated_request_id_answers_the_participant_as_it_is_now(
    parley: Client, database: asyncpg.Connection, call: Move
) -> None:
    talk, ada, bob = await trio(parley)
    if call not in (Move.INVITE, Move.ADD):
        await parley.acting_as(ada).invite(talk, bob)
    actor = parley.acting_as(bob if call in OWN_MOVES else ada)
    (rpc,) = [rpc for rpc in REQUESTS if rpc.startswith(call)]

    def again(**values: Any) -> Any:
        given = {"conversation_id": talk.id, "user_id": "bob", "request_id": "r-1", **values}
        return getattr(actor.participants, rpc)(request_of(rpc, **given))

    answers = await asyncio.gather(*(insist(again) for _ in range(32)))
    assert all(answer == answers[0] for answer in answers)
    first = answers[0].participant
    version = (await parley.seen(talk)).version

    # The state moves on, and so does the user's name.
    if call is Move.INVITE:
        await parley.accept(talk, bob)
    else:
        await database.execute("UPDATE participants SET status_reason = 'later'")
    await database.execute("UPDATE users SET username = 'rob' WHERE username = 'bob'")
    now = await parley.participant(talk, bob)

    assert await is_replay(again())
    assert (await again()).participant == now
    assert now.create_time == first.create_time
    assert (await parley.seen(talk)).version == version + (call is Move.INVITE)

    reused = await failure(again(user_id="rob"))
    assert (reused.code, reused.reason) == ("FAILED_PRECONDITION", "REQUEST_ID_REUSED")
    await database.execute("UPDATE conversations SET deleted_at = now()")
    assert await is_replay(again())


async def test_a_request_id_is_one_conversations_and_one_methods(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    own = parley.acting_as(bob)
    for _ in range(2):
        talk = await parley.conversation(ada)
        invited = parley.acting_as(ada).invite(talk, bob, request_id="r-1")
        assert (await invited).conversation_id == talk.id
        assert (await own.accept(talk, bob, request_id="r-1")).status == JOINED
        assert (await own.leave(talk, bob, request_id="r-1")).status == LEFT


async def test_a_replay_shows_no_more_than_one_may_see_today(parley: Client) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    talk = await parley.conversation(ada, bob)
    own = parley.acting_as(bob)
    await own.invite(talk, cy, request_id="r-1")
    await own.leave(talk, bob, request_id="r-2")
    # What bob did for another is no more his to see; what he did himself he still does.
    hidden = await failure(own.invite(talk, cy, request_id="r-1"))
    assert (hidden.code, hidden.reason) == ("NOT_FOUND", "PARTICIPANT_NOT_FOUND")
    assert (await own.leave(talk, bob, request_id="r-2")).status == LEFT


async def test_who_declined_and_sees_no_more_still_gets_its_own_answer_again(
    parley: Client,
) -> None:
    talk, ada, bob = await trio(parley)
    await parley.acting_as(ada).invite(talk, bob)
    first = await parley.acting_as(bob).decline(talk, bob, request_id="r-1")
    assert await parley.acting_as(bob).decline(talk, bob, request_id="r-1") == first
    assert (await failure(parley.acting_as(bob).participant(talk, bob))).code == "NOT_FOUND"


# Etags, dry runs


async def test_an_etag_that_is_stale_stops_the_call(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    own, owner = parley.acting_as(bob), parley.acting_as(ada)
    early = await failure(owner.invite(talk, bob, etag=f"1-{bob.id[-8:]}"))
    assert (early.code, early.reason) == ("ABORTED", "ETAG_MISMATCH")

    invited = await owner.invite(talk, bob)
    joined = await own.accept(talk, bob, etag=invited.etag)
    assert joined.etag != invited.etag

    for call in (
        owner.invite(talk, bob, etag=invited.etag),
        own.accept(talk, bob, etag=invited.etag),
        own.leave(talk, bob, etag=invited.etag),
        own.leave(talk, bob, etag=f"2-{ada.id[-8:]}"),
    ):
        stale = await failure(call)
        assert (stale.code, stale.reason) == ("ABORTED", "ETAG_MISMATCH")
    assert (await own.leave(talk, bob, etag=joined.etag)).status == LEFT


async def test_an_etag_outlives_what_is_said_and_read(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    invited = await parley.acting_as(ada).invite(talk, bob)
    joined = await parley.acting_as(bob).accept(talk, bob, etag=invited.etag)
    await parley.message(talk, bob)
    now = await parley.participant(talk, bob)
    assert (now.last_read_sequence, now.etag) == (2, joined.etag)


async def test_rights_and_state_are_told_before_a_stale_etag(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    await put(parley, None, talk, bob, JOINED)  # type: ignore[arg-type]
    stale = "7-00000000"
    refused = await failure(parley.acting_as(bob).invite(talk, cy, role=OWNER, etag=stale))
    assert refused.reason == "ROLE_NOT_ALLOWED"
    refused = await failure(parley.acting_as(bob).decline(talk, bob, etag=stale))
    assert refused.reason == "INVALID_STATE_TRANSITION"
    refused = await failure(parley.acting_as(ada).leave(talk, ada, etag=stale))
    assert refused.reason == "LAST_OWNER"


async def test_a_dry_invitation_checks_everything_and_leaves_nothing(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await trio(parley)
    own = parley.acting_as(ada)
    before = await row_count(database), await facts(database, talk)

    dry = await own.invite(
        talk,
        bob,
        role=MODERATOR,
        initial_message_sequence=1,
        reason="old friend",
        validate_only=True,
        request_id="r-1",
    )

    expected = Participant(
        conversation_id=talk.id,
        user_id=bob.id,
        username="bob",
        status=INVITED,
        role=MODERATOR,
        invited_by_user_id=ada.id,
        initial_message_id=(await parley.all_messages(talk))[0].id,
        status_actor_id=ada.id,
        status_reason="old friend",
        visible_from_sequence=1,
        visible_to_sequence=0,
    )
    assert dry == expected
    refused = await failure(own.invite(talk, bob, initial_message_sequence=2, validate_only=True))
    assert refused.reason == "INITIAL_MESSAGE_NOT_FOUND"
    assert (await row_count(database), await facts(database, talk)) == before
    assert (await failure(parley.participant(talk, bob))).reason == "PARTICIPANT_NOT_FOUND"


# Seen


async def test_who_is_joined_sees_everybody_and_who_is_not_itself(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    others = {}
    for status in (INVITED, DECLINED, REVOKED, LEFT, REMOVED):
        others[status] = await parley.user(name_of(status).lower())
        await put(parley, database, talk, others[status], status)
    everybody = ["ada", "bob", "invited", "declined", "revoked", "left", "removed"]

    for client in (parley, parley.acting_as(ada), parley.acting_as(bob)):
        assert await names(client, talk, statuses=STATUSES[1:]) == everybody
        assert await names(client, talk) == ["ada", "bob", "invited"]
        assert (await client.participant(talk, others[LEFT])).status == LEFT
    for status in (INVITED, LEFT, REMOVED):
        own = parley.acting_as(others[status])
        assert await names(own, talk, statuses=STATUSES[1:]) == [name_of(status).lower()]
        assert (await own.participant(talk, others[status])).status == status
        hidden = await failure(own.participant(talk, ada))
        nobody = await failure(
            own.participants.GetParticipant(
                pb.GetParticipantRequest(conversation_id=talk.id, user_id=str(uuid4()))
            )
        )
        assert (hidden.code, hidden.reason) == ("NOT_FOUND", "PARTICIPANT_NOT_FOUND")
        assert (nobody.code, nobody.reason) == ("NOT_FOUND", "PARTICIPANT_NOT_FOUND")
    for status in (DECLINED, REVOKED):
        own = parley.acting_as(others[status])
        for call in (list_(own, talk), own.participant(talk, others[status])):
            assert (await failure(call)).reason == "CONVERSATION_NOT_FOUND"


async def test_a_participant_hidden_and_one_missing_are_the_same_bytes(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await trio(parley)
    await parley.user("cy")
    await parley.acting_as(ada).invite(talk, bob)
    request = pb.GetParticipantRequest(conversation_id=talk.slug, user_id="cy")
    own = parley.acting_as(bob).participants
    missing = await failure(own.GetParticipant(request))
    await database.execute("UPDATE users SET username = 'cyril' WHERE username = 'cy'")
    unknown = await failure(own.GetParticipant(request))
    await database.execute("UPDATE users SET username = 'cy' WHERE username = 'ada'")
    hidden = await failure(own.GetParticipant(request))
    assert missing == unknown == hidden


async def test_participants_are_filtered_by_status_and_role(parley: Client) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    talk = await parley.conversation(ada, bob)
    await parley.acting_as(ada).invite(talk, cy, role=MODERATOR)
    for filters, expected in (
        ({"statuses": [INVITED]}, ["cy"]),
        ({"statuses": [JOINED]}, ["ada", "bob"]),
        ({"roles": [OWNER, MODERATOR]}, ["ada", "cy"]),
        ({"roles": [MODERATOR], "statuses": [JOINED]}, []),
        ({"statuses": [LEFT, REMOVED]}, []),
    ):
        assert await names(parley, talk, **filters) == expected


async def test_pages_show_who_was_there_once_each_while_more_come(
    parley: Client, database: asyncpg.Connection
) -> None:
    members = [await parley.user() for _ in range(9)]
    talk = await parley.conversation(*members)
    # All in one moment, as they were made in one statement: their ids decide.
    there = sorted(member.id for member in members)
    seen: list[str] = []
    token = ""
    while True:
        page = await list_(parley.acting_as(members[0]), talk, page_size=2, page_token=token)
        seen += [each.user_id for each in page.participants]
        await parley.invite(talk, await parley.user(), invited_by_user_id=members[0].id)
        if len(seen) >= 9:
            break
        token = page.next_page_token
        assert token
    assert seen[:9] == there
    rest = await list_(
        parley.acting_as(members[0]), talk, page_size=1_000, page_token=page.next_page_token
    )
    assert not {each.user_id for each in rest.participants} & set(seen)
    assert rest.next_page_token == ""


async def test_a_page_token_is_for_its_own_list_alone(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk, other = await parley.conversation(ada, bob), await parley.conversation(ada, bob)
    own = parley.acting_as(ada)
    token = (await list_(own, talk, page_size=1)).next_page_token

    # By slug it is the same conversation.
    assert len((await list_(own, talk.slug, page_size=5, page_token=token)).participants) == 1
    for call in (
        list_(own, other, page_token=token),
        list_(own, talk, page_token=token, statuses=[JOINED]),
        list_(own, talk, page_token=token, roles=[OWNER]),
        list_(parley.acting_as(bob), talk, page_token=token),
        list_(parley, talk, page_token=token),
        own.conversations.ListConversations(
            conversation_pb2.ListConversationsRequest(page_token=token)
        ),
    ):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "PAGE_TOKEN_MISMATCH")
        assert refused.violations == {"page_token": "PAGE_TOKEN_MISMATCH"}
    # It grants nothing: whoever left since goes on with its own row alone.
    await parley.leave(talk, ada, successor_user_id="bob")
    page = await list_(own, talk, page_token=token, statuses=[])
    assert [each.username for each in page.participants] == []
