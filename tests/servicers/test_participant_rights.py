"""Who may add, revoke, remove and appoint whom; what that does; and that it happens once."""

import asyncio
import random
from collections.abc import Awaitable
from typing import Any

import asyncpg
import grpc
import pytest

from parley.v1 import conversation_pb2
from parley.v1 import participant_pb2 as pb

from ..make import (
    MEMBER,
    MODERATOR,
    OBSERVER,
    OWNER,
    Client,
    Conversation,
    Participant,
    User,
    facts,
    failure,
    insist,
    miscounted,
    row_count,
)
from .test_participants import (
    DECLINED,
    INVITED,
    JOINED,
    LEFT,
    REMOVED,
    REVOKED,
    name_of,
    names,
    put,
    read,
)

Role = Participant.Role
ROLES = {"OWNER": OWNER, "MODERATOR": MODERATOR, "MEMBER": MEMBER, "OBSERVER": OBSERVER}

# Who may do what to whom: y, or - for a refusal. `own` is an invitation of the actor's making.
TABLE = """
call                     OWNER  MODERATOR  MEMBER  OBSERVER
add OWNER                  y        -        -        -
add MODERATOR              y        y        -        -
add MEMBER                 y        y        -        -
add OBSERVER               y        y        -        -
revoke OWNER               y        -        -        -
revoke MODERATOR           y        y        -        -
revoke MEMBER              y        y        -        -
revoke OBSERVER            y        y        -        -
revoke own                 y        y        y        -
remove OWNER               y        -        -        -
remove MODERATOR           y        y        -        -
remove MEMBER              y        y        -        -
remove OBSERVER            y        y        -        -
remove own                 y        y        y        -
remove own-joined          y        y        -        -
appoint MEMBER-OWNER       y        -        -        -
appoint MEMBER-MODERATOR   y        y        -        -
appoint MEMBER-OBSERVER    y        y        -        -
appoint MODERATOR-MEMBER   y        y        -        -
appoint OWNER-MEMBER       y        -        -        -
"""
HEAD, *LINES = [line.split() for line in TABLE.strip().splitlines()]
CELLS = [
    (call, target, actor, answer == "y")
    for call, target, *answers in LINES
    for actor, answer in zip([*HEAD[1:], "the system"], [*answers, "y"], strict=True)
]


async def trio(parley: Client, **values: Any) -> tuple[Conversation, User, User]:
    """A conversation of ada, who owns it and has said something; and bob, who is not in it."""
    ada, bob = await parley.user("ada"), await parley.user("bob")
    return await parley.conversation(ada, first="hello", **values), ada, bob


@pytest.mark.parametrize(("call", "target", "actor", "may"), CELLS)
async def test_each_role_may_do_to_each_what_the_table_says(
    parley: Client, database: asyncpg.Connection, call: str, target: str, actor: str, may: bool
) -> None:
    talk, _, bob = await trio(parley)
    cy = await parley.user("cy")
    client, values = parley, {"invited_by_user_id": "ada"} if call == "add" else {}
    if actor != "the system":
        await parley.add(talk, cy, role=ROLES[actor], invited_by_user_id="ada")
        client, values = parley.acting_as(cy), {}
    role, _, new_role = target.partition("-")
    if call == "revoke" or target == "own":
        inviter = "cy" if target == "own" and actor != "the system" else "ada"
        await parley.invite(talk, bob, role=ROLES.get(role), invited_by_user_id=inviter)
    elif call != "add":
        inviter = "cy" if target == "own-joined" and actor != "the system" else "ada"
        await parley.add(talk, bob, role=ROLES.get(role), invited_by_user_id=inviter)
    before = await facts(database, talk)

    calls = {
        "add": lambda: client.add(talk, bob, role=ROLES[role], **values),
        "revoke": lambda: client.revoke(talk, bob),
        "remove": lambda: client.remove(talk, bob),
        "appoint": lambda: client.appoint(talk, bob, ROLES[new_role]),
    }
    if may:
        now = await calls[call]()
        status = {"add": JOINED, "revoke": REVOKED, "remove": REMOVED, "appoint": JOINED}[call]
        assert now.status == (REVOKED if target == "own" else status)
        assert now == await parley.participant(talk, bob)
        assert len(await facts(database, talk)) == len(before) + 1
    else:
        refused = await failure(calls[call]())
        assert refused.code == "PERMISSION_DENIED"
        assert refused.reason in ("PERMISSION_DENIED", "ROLE_NOT_ALLOWED")
        assert await facts(database, talk) == before
    assert not await miscounted(database)


@pytest.mark.parametrize("call", ["add", "revoke", "remove", "appoint"])
@pytest.mark.parametrize("status", [None, INVITED, DECLINED, REVOKED, LEFT, REMOVED], ids=name_of)
async def test_who_is_not_joined_decides_about_nobody(
    parley: Client,
    database: asyncpg.Connection,
    call: str,
    status: "Participant.Status.ValueType | None",
) -> None:
    talk, ada, bob = await trio(parley)
    await put(parley, database, talk, bob, status)
    own = parley.acting_as(bob)
    about: dict[str, Awaitable[Any]] = {
        "add": own.add(talk, ada),
        "revoke": own.revoke(talk, ada),
        "remove": own.remove(talk, ada),
        "appoint": own.appoint(talk, ada, MEMBER),
    }
    refused = await failure(about.pop(call))
    for other in about.values():
        other.close()  # type: ignore[attr-defined]
    if status in (None, DECLINED, REVOKED):
        assert (refused.code, refused.reason) == ("NOT_FOUND", "CONVERSATION_NOT_FOUND")
    else:
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "NOT_A_PARTICIPANT")


# Adding


async def test_who_is_added_is_joined_at_once_with_all_that_tells_how(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await trio(parley)

    added = await parley.acting_as(ada).add(talk, bob, role=OBSERVER, reason="needed")

    assert (added.status, added.role, added.status_reason) == (JOINED, OBSERVER, "needed")
    assert added.invited_by_user_id == added.status_actor_id == ada.id
    assert added.join_time == added.status_time == added.create_time
    assert not added.HasField("visible_to_sequence")
    assert (await parley.seen(talk)).participant_count == 2
    assert (await facts(database, talk))[-1] == {
        "version": 4,
        "type": "PARTICIPANT_CHANGED",
        "actor_id": ada.id,
        "user_id": bob.id,
        "status": "JOINED",
        "role": "OBSERVER",
        "reason": "needed",
    }
    assert await parley.acting_as(ada).add(talk, bob, role=OWNER) == added


async def test_adding_renews_the_terms_of_an_invitation(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    await parley.acting_as(ada).invite(talk, bob, role=OBSERVER, initial_message_sequence=1)
    await parley.message(talk, ada)
    added = await parley.acting_as(ada).add(talk, bob, role=MODERATOR, hide_history=True)
    assert (added.role, added.initial_message_id) == (MODERATOR, "")
    await parley.message(talk, ada)
    assert await read(parley.acting_as(bob), talk) == [3]


async def test_no_moderator_makes_less_of_an_invitation_to_own(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    await parley.acting_as(ada).add(talk, cy, role=MODERATOR)
    await parley.acting_as(ada).invite(talk, bob, role=OWNER)
    refused = await failure(parley.acting_as(cy).add(talk, bob, role=MEMBER))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert (await parley.acting_as(bob).accept(talk, bob)).role == OWNER


async def test_the_system_names_who_adds_and_an_actor_nobody_but_itself(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    missing = await failure(parley.add(talk, bob))
    assert missing.violations == {"invited_by_user_id": "REQUIRED"}
    await put(parley, database, talk, cy, LEFT)
    for inviter, reason in (("cy", "NOT_A_PARTICIPANT"), ("nobody", "USER_NOT_FOUND")):
        refused = await failure(parley.add(talk, bob, invited_by_user_id=inviter))
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", reason)
        assert refused.known["field"] == "invited_by_user_id"
        mine = await failure(parley.acting_as(ada).add(talk, bob, invited_by_user_id=inviter))
        assert (mine.code, mine.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert (await parley.add(talk, bob, invited_by_user_id="ada")).invited_by_user_id == ada.id


@pytest.mark.parametrize("how", ["is_active = false", "deleted_at = now()"])
async def test_nobody_inactive_or_deleted_is_added(
    parley: Client, database: asyncpg.Connection, how: str
) -> None:
    talk, ada, bob = await trio(parley)
    await database.execute(f"UPDATE users SET {how} WHERE username = 'bob'")
    refused = await failure(parley.acting_as(ada).add(talk, bob))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "USER_INACTIVE")
    assert refused.known["field"] == "user_id"


async def test_a_full_conversation_takes_nobody_but_who_is_invited(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    await parley.acting_as(ada).invite(talk, cy)
    await database.execute(
        "WITH u AS (INSERT INTO users (username) SELECT 'u' || n FROM generate_series(1, 998) AS n"
        " RETURNING id) INSERT INTO participants"
        " (conversation_id, user_id, status, role, status_at, visible_to_sequence)"
        " SELECT $1, id, 'INVITED', 'MEMBER', now(), 0 FROM u",
        talk.id,
    )
    refused = await failure(parley.acting_as(ada).add(talk, bob))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "TOO_MANY_PARTICIPANTS")
    assert (await parley.acting_as(ada).add(talk, cy)).status == JOINED
    await parley.acting_as(ada).remove(talk, cy)
    assert (await parley.acting_as(ada).add(talk, bob)).status == JOINED


async def test_a_dry_run_adds_and_appoints_nobody(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await trio(parley)
    cy = await parley.user("cy")
    own = parley.acting_as(ada)
    await own.add(talk, cy)
    before = await row_count(database), await facts(database, talk)
    dry = {"validate_only": True, "request_id": "r-1"}

    added = await own.add(talk, bob, role=MODERATOR, reason="why", **dry)
    appointed = await own.appoint(talk, cy, MODERATOR, **dry)

    assert added == Participant(
        conversation_id=talk.id,
        user_id=bob.id,
        username="bob",
        status=JOINED,
        role=MODERATOR,
        invited_by_user_id=ada.id,
        status_actor_id=ada.id,
        status_reason="why",
        visible_from_sequence=1,
    )
    assert (appointed.user_id, appointed.role, appointed.etag) == (cy.id, MODERATOR, "")
    assert (await failure(own.appoint(talk, ada, MEMBER, **dry))).reason == "LAST_OWNER"
    assert (await row_count(database), await facts(database, talk)) == before
    assert (await parley.participant(talk, cy)).role == MEMBER


# Archived, deleted, direct


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("is_active = false", "CONVERSATION_ARCHIVED"),
        ("deleted_at = now()", "CONVERSATION_DELETED"),
    ],
)
async def test_an_invitation_can_be_ended_whatever_became_of_the_conversation(
    parley: Client, database: asyncpg.Connection, how: str, reason: str
) -> None:
    ada, *others = [await parley.user(name) for name in ("ada", "bob", "cy", "dee", "eve")]
    talk = await parley.conversation(ada, invited=others[:3])
    bob, cy, dee, eve = others
    await database.execute(f"UPDATE conversations SET {how}")
    own = parley.acting_as(ada)

    for call in (own.add(talk, eve), own.remove(talk, bob), own.appoint(talk, bob, OBSERVER)):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", reason)

    assert (await own.revoke(talk, bob)).status == REVOKED
    assert (await parley.acting_as(cy).decline(talk, cy)).status == DECLINED
    assert (await parley.acting_as(dee).leave(talk, dee)).status == DECLINED


async def test_nobody_is_added_to_or_removed_from_a_direct_conversation(parley: Client) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    request = conversation_pb2.GetOrCreateDirectConversationRequest(
        user_id="ada", other_user_id="bob"
    )
    talk = (await parley.conversations.GetOrCreateDirectConversation(request)).conversation
    own = parley.acting_as(ada)
    for call in (own.add(talk, cy), own.remove(talk, bob), own.remove(talk, ada)):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "DIRECT_CONVERSATION")
    assert await names(own, talk, statuses=[JOINED]) == sorted(
        ["ada", "bob"], key=lambda name: {"ada": ada.id, "bob": bob.id}[name]
    )


# Revoking and removing


async def test_each_ending_tells_who_and_why(parley: Client, database: asyncpg.Connection) -> None:
    talk, ada, bob = await trio(parley)
    own = parley.acting_as(ada)
    await own.add(talk, bob)
    joined = await parley.participant(talk, bob)

    removed = await own.remove(talk, bob, reason="spam", etag=joined.etag)

    assert (removed.status, removed.status_reason) == (REMOVED, "spam")
    assert (removed.status_actor_id, removed.leave_time) == (ada.id, removed.status_time)
    assert (removed.join_time, removed.visible_to_sequence) == (joined.join_time, 1)
    assert (await facts(database, talk))[-1] == {
        "version": 5,
        "type": "PARTICIPANT_CHANGED",
        "actor_id": ada.id,
        "user_id": bob.id,
        "previous_status": "JOINED",
        "status": "REMOVED",
        "previous_role": "MEMBER",
        "role": "MEMBER",
        "reason": "spam",
    }
    assert (await parley.seen(talk)).participant_count == 1
    stale = await failure(own.remove(talk, bob, etag=joined.etag))
    assert (stale.code, stale.reason) == ("ABORTED", "ETAG_MISMATCH")


async def test_a_member_takes_back_its_own_invitation_however_high_its_role_became(
    parley: Client,
) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    talk = await parley.conversation(ada, bob)
    await parley.acting_as(bob).invite(talk, cy)
    await parley.acting_as(ada).appoint(talk, cy, OWNER)
    assert (await parley.acting_as(bob).revoke(talk, cy, reason="oh")).status == REVOKED
    # Renewed by another, it is no more its own.
    await parley.acting_as(ada).invite(talk, cy)
    refused = await failure(parley.acting_as(bob).revoke(talk, cy))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")


@pytest.mark.parametrize(("hide_history", "back"), [(False, [1, 2, 3, 4]), (True, [4])])
@pytest.mark.parametrize("again", ["invite", "add"])
async def test_who_was_removed_reads_on_up_to_then_and_after_joining_again_one_interval(
    parley: Client, again: str, hide_history: bool, back: list[int]
) -> None:
    talk, ada, bob = await trio(parley)
    own, owner = parley.acting_as(bob), parley.acting_as(ada)
    await owner.add(talk, bob)
    await parley.message(talk, ada)
    await owner.remove(talk, bob)
    await parley.message(talk, ada, "while bob is away")
    assert await read(own, talk) == [1, 2]

    await owner.invite(talk, bob, hide_history=hide_history)
    assert await read(own, talk) == [1, 2]
    await owner.revoke(talk, bob)
    assert await read(own, talk) == [1, 2]
    if again == "invite":
        await owner.invite(talk, bob, hide_history=hide_history)
        await own.accept(talk, bob)
    else:
        await owner.add(talk, bob, hide_history=hide_history)
    await parley.message(talk, ada)

    assert await read(own, talk) == back


async def test_whose_invitation_was_revoked_sees_nothing_any_more(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    eve = await parley.user("eve")
    await parley.acting_as(ada).invite(talk, bob, initial_message_sequence=1)
    await parley.acting_as(ada).revoke(talk, bob)
    for call in ("seen", "all_messages"):
        hidden = await failure(getattr(parley.acting_as(bob), call)(talk))
        never = await failure(getattr(parley.acting_as(eve), call)(talk))
        assert hidden == never
        assert hidden.reason == "CONVERSATION_NOT_FOUND"


# Roles


async def test_a_change_of_role_is_told_and_nothing_else_changes(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await trio(parley)
    then = await parley.acting_as(ada).add(talk, bob, reason="needed")

    now = await parley.acting_as(ada).appoint(talk, bob, MODERATOR, etag=then.etag)

    assert (now.role, now.etag != then.etag) == (MODERATOR, True)
    assert now.update_time.ToNanoseconds() > then.update_time.ToNanoseconds()
    for kept in (now, then):
        for name in ("role", "etag", "update_time"):
            kept.ClearField(name)
    assert now == then
    assert (await facts(database, talk))[-1] == {
        "version": 5,
        "type": "PARTICIPANT_CHANGED",
        "actor_id": ada.id,
        "user_id": bob.id,
        "previous_status": "JOINED",
        "status": "JOINED",
        "previous_role": "MEMBER",
        "role": "MODERATOR",
    }


@pytest.mark.parametrize("mask", [None, [], ["role"], ["role", "role"], ["*"]])
async def test_a_role_may_be_masked_or_not(parley: Client, mask: list[str] | None) -> None:
    talk, ada, bob = await trio(parley)
    await parley.acting_as(ada).add(talk, bob)
    values = {} if mask is None else {"update_mask": {"paths": mask}}
    assert (await parley.acting_as(ada).appoint(talk, bob, OBSERVER, **values)).role == OBSERVER


async def test_the_role_that_is_there_already_changes_nothing(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, bob = await trio(parley)
    then = await parley.acting_as(ada).add(talk, bob)
    before = await facts(database, talk)
    assert await parley.acting_as(ada).appoint(talk, bob, MEMBER) == then
    assert (await parley.acting_as(ada).appoint(talk, ada, OWNER)).role == OWNER
    assert await facts(database, talk) == before


async def test_the_etag_inside_the_resource_counts_where_no_other_is_given(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    then = await parley.acting_as(ada).add(talk, bob)
    now = await parley.acting_as(ada).appoint(talk, bob, OBSERVER)

    def update(etag: str, inside: str) -> Any:
        return parley.acting_as(ada).participants.UpdateParticipant(
            pb.UpdateParticipantRequest(
                conversation_id=talk.id,
                user_id="bob",
                participant=Participant(role=MEMBER, etag=inside),
                etag=etag,
            )
        )

    for etag, inside in ((then.etag, ""), ("", then.etag), (then.etag, now.etag)):
        assert (await failure(update(etag, inside))).reason == "ETAG_MISMATCH"
    assert (await update(now.etag, then.etag)).participant.role == MEMBER


async def test_an_invitation_may_be_to_another_role(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    await parley.acting_as(ada).invite(talk, bob)
    assert (await parley.acting_as(ada).appoint(talk, bob, OWNER)).status == INVITED
    # Nobody owns it by being invited to.
    assert (await failure(parley.acting_as(ada).appoint(talk, ada, MEMBER))).reason == "LAST_OWNER"
    assert (await parley.acting_as(bob).accept(talk, bob)).role == OWNER


@pytest.mark.parametrize("status", [DECLINED, REVOKED, LEFT, REMOVED], ids=name_of)
async def test_who_has_gone_has_no_role_to_change(
    parley: Client, database: asyncpg.Connection, status: "Participant.Status.ValueType"
) -> None:
    talk, ada, bob = await trio(parley)
    await put(parley, database, talk, bob, status)
    refused = await failure(parley.acting_as(ada).appoint(talk, bob, OBSERVER))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "NOT_A_PARTICIPANT")
    assert refused.known["field"] == "user_id"


async def test_whoever_is_joined_has_an_owner(parley: Client) -> None:
    talk, ada, bob = await trio(parley)
    own = parley.acting_as(ada)
    # Alone, one may leave or be removed, and not give the ownership away to nobody.
    assert (await failure(own.appoint(talk, ada, MEMBER))).reason == "LAST_OWNER"
    await own.add(talk, bob)
    for client in (parley, own):
        for call in (client.remove(talk, ada), client.appoint(talk, ada, MODERATOR)):
            refused = await failure(call)
            assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "LAST_OWNER")
            assert refused.precondition == "LAST_OWNER"
    await own.appoint(talk, bob, OWNER)
    assert (await own.appoint(talk, ada, MEMBER)).role == MEMBER
    assert (await parley.acting_as(bob).remove(talk, ada)).status == REMOVED
    assert (await parley.acting_as(bob).remove(talk, bob)).status == REMOVED
    assert (await parley.seen(talk)).participant_count == 0


# At once


async def test_of_two_owners_who_end_each_other_at_once_one_stays(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    for call in ("remove", "appoint"):
        for _ in range(8):
            talk = await parley.conversation(ada, cy)
            await parley.acting_as(ada).add(talk, bob, role=OWNER)
            values = (MEMBER,) if call == "appoint" else ()
            answers = await asyncio.gather(
                getattr(parley.acting_as(ada), call)(talk, bob, *values),
                getattr(parley.acting_as(bob), call)(talk, ada, *values),
                return_exceptions=True,
            )
            # Who came second was no owner any more.
            refused = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
            assert [each.code().name for each in refused] == ["PERMISSION_DENIED"]
            assert len(await names(parley, talk, roles=[OWNER], statuses=[JOINED])) == 1
    assert not await miscounted(database)


async def test_of_an_acceptance_and_a_revocation_at_once_exactly_one_wins(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talks = [await parley.conversation(ada, invited=[bob]) for _ in range(64)]

    async def race(talk: Conversation) -> list[Any]:
        calls = [
            lambda: parley.acting_as(bob).accept(talk, bob),
            lambda: parley.acting_as(ada).revoke(talk, bob),
        ]
        random.shuffle(calls)
        return await asyncio.gather(*(insist(call) for call in calls), return_exceptions=True)

    answers = await asyncio.gather(*(race(talk) for talk in talks))

    for talk, pair in zip(talks, answers, strict=True):
        (won,) = [each for each in pair if isinstance(each, Participant)]
        (lost,) = [each for each in pair if isinstance(each, grpc.aio.AioRpcError)]
        assert lost.code() is grpc.StatusCode.FAILED_PRECONDITION
        story = [fact for fact in await facts(database, talk) if fact.get("user_id") == bob.id]
        assert [fact["status"] for fact in story] == ["INVITED", name_of(won.status)]
        assert won.status in (JOINED, REVOKED)
    assert not await miscounted(database)


@pytest.mark.parametrize("seed", range(4))
async def test_after_a_storm_of_calls_the_counters_and_the_story_agree_with_the_rows(
    parley: Client, database: asyncpg.Connection, seed: int
) -> None:
    chance = random.Random(seed)
    users = [await parley.user(f"user-{n}") for n in range(6)]
    talk = await parley.conversation(*users[:3], first="hello")

    def call() -> Awaitable[Any]:
        # In every other storm nobody touches the first owner, so that it goes on for longer.
        actor, subject, other = [chance.choice(each) for each in (users, users[seed % 2 :], users)]
        client, itself = parley.acting_as(actor), parley.acting_as(subject)
        role = chance.choice([*ROLES.values()])
        calls: list[Any] = [
            lambda: client.invite(talk, subject, role=role, hide_history=chance.random() < 0.5),
            lambda: client.add(talk, subject, role=role, hide_history=chance.random() < 0.5),
            lambda: client.revoke(talk, subject, reason="storm"),
            lambda: client.remove(talk, subject, reason="storm"),
            lambda: client.appoint(talk, subject, role),
            lambda: itself.accept(talk, subject),
            lambda: itself.decline(talk, subject),
            lambda: itself.leave(talk, subject),
            lambda: itself.leave(talk, subject, successor_user_id=other.id),
            lambda: itself.send(talk),
            lambda: itself.mark_read(talk, subject, chance.randrange(20)),
        ]
        return insist(chance.choice(calls))

    made = 0
    for _ in range(20):
        answers = await asyncio.gather(*(call() for _ in range(16)), return_exceptions=True)
        for answer in answers:
            if not isinstance(answer, BaseException):
                made += 1
                continue
            assert isinstance(answer, grpc.aio.AioRpcError)
            assert answer.code().name in {
                "NOT_FOUND", "PERMISSION_DENIED", "FAILED_PRECONDITION", "OUT_OF_RANGE",
            }  # fmt: skip
    assert made > (50 if seed % 2 else 10)

    assert not await miscounted(database)
    told: dict[str, dict[str, Any]] = {}
    cursors: dict[str, int] = {}
    for fact in await facts(database, talk):
        user = fact.get("user_id", "")
        if fact["type"] == "READ_CURSOR_MOVED":
            assert fact["sequence"] > cursors.get(user, 0)
            assert told[user]["status"] == "JOINED"
        if fact["type"] in ("READ_CURSOR_MOVED", "MESSAGE_CREATED"):
            cursors[user] = fact["sequence"]
        if fact["type"] == "PARTICIPANT_CHANGED":
            before = told.get(user, {})
            assert fact.get("previous_status") == before.get("status")
            assert fact.get("previous_role") == before.get("role")
            assert (fact["status"], fact["role"]) != (before.get("status"), before.get("role"))
            told[user] = fact
            joined = [each for each in told.values() if each["status"] == "JOINED"]
            assert not joined or "OWNER" in {each["role"] for each in joined}
    rows = await database.fetch(
        "SELECT user_id::text, status, role, last_read_sequence FROM participants"
    )
    assert {row["user_id"]: (row["status"], row["role"]) for row in rows} == {
        user: (fact["status"], fact["role"]) for user, fact in told.items()
    }
    assert {row["user_id"]: row["last_read_sequence"] for row in rows} == {
        row["user_id"]: cursors.get(row["user_id"], 0) for row in rows
    }
