"""UpdateConversation: what it takes, from whom, and what it leaves."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from parley.v1 import conversation_pb2 as pb

from ..make import (
    MODERATOR,
    OBSERVER,
    Client,
    Conversation,
    User,
    facts,
    failure,
    failure_of,
    insist,
    is_replay,
    miscounted,
    row_count,
)


async def outcome(call: Any) -> str:
    """OK, or the status and reason of a refusal."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        refused = failure_of(error)
        return f"{refused.code} {refused.reason}"
    return "OK"


def struct(**values: Any) -> Struct:
    made = Struct()
    made.update(values)
    return made


async def updated(client: Client, talk: Conversation, **values: Any) -> Conversation:
    return (await client.update(talk, **values)).conversation  # type: ignore[no-any-return]


async def test_a_change_is_stored_with_its_event_and_a_new_etag(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, title="Tea", slug="tea")

    now = await updated(
        parley.acting_as(ada),
        talk,
        title="Coffee",
        slug="coffee",
        members_may_invite=False,
        metadata=struct(kind="hot"),
    )

    assert now == await parley.acting_as(ada).seen(talk)
    assert (now.title, now.slug, now.members_may_invite) == ("Coffee", "coffee", False)
    assert dict(now.metadata) == {"kind": "hot"}
    assert now.is_active
    assert now.version == talk.version + 1
    assert now.etag != talk.etag
    assert now.update_time.ToNanoseconds() > talk.update_time.ToNanoseconds()
    assert (now.create_time, now.last_activity_time) == (talk.create_time, talk.last_activity_time)
    assert (await facts(database, talk))[-1] == {
        "version": 3,
        "type": "CONVERSATION_UPDATED",
        "actor_id": ada.id,
        "revision": 2,
    }
    assert not await miscounted(database)


async def test_without_a_mask_only_what_is_populated_changes(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, title="Tea", metadata=struct(kind="hot"))

    now = await updated(parley, talk, members_may_invite=False)

    assert (now.title, now.slug, dict(now.metadata)) == ("Tea", talk.slug, {"kind": "hot"})
    assert not now.members_may_invite


async def test_a_mask_resets_what_it_names_and_touches_nothing_else(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(
        ada, title="Tea", members_may_invite=False, metadata=struct(kind="hot")
    )

    now = await updated(parley, talk, mask=["title", "title"], is_active=False)
    assert (now.title, now.is_active, now.members_may_invite) == ("", True, False)

    now = await updated(parley, talk, mask=["*"], slug="tea")
    assert (now.slug, now.title, dict(now.metadata)) == ("tea", "", {})
    assert now.members_may_invite


@pytest.mark.parametrize(
    ("mask", "values", "violations"),
    [
        (["titel"], {"title": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        (["version"], {"title": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        (["creator_id"], {"title": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        (["external_id"], {"title": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        ([".."], {"title": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        (["title"], {}, {"conversation": "REQUIRED"}),
        # A link does not change because nobody said what to.
        (["*"], {"title": "x"}, {"conversation.slug": "INVALID_SLUG"}),
        (None, {"slug": "A B"}, {"conversation.slug": "INVALID_SLUG"}),
        (None, {"title": "x" * 257}, {"conversation.title": "FIELD_TOO_LONG"}),
        (None, {"title": "a\nb"}, {"conversation.title": "INVALID_CHARACTER"}),
        (None, {"title": "x", "etag": "nonsense"}, {"etag": "INVALID_ETAG"}),
        (None, {"request_id": "x" * 65}, {"request_id": "INVALID_REQUEST_ID"}),
        (None, {"patch": {"": 1}}, {"metadata_patch": "INVALID_METADATA"}),
    ],
)
async def test_a_bad_field_is_named_with_its_rule(
    parley: Client, mask: list[str] | None, values: dict[str, Any], violations: dict[str, str]
) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    refused = await failure(parley.update(talk, mask=mask, **values))
    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)


async def test_fields_outside_the_mask_are_not_even_looked_at(parley: Client) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    now = await updated(parley, talk, mask=["title"], title="Tea", slug="NOT A SLUG")
    assert (now.title, now.slug) == ("Tea", talk.slug)


async def test_a_patch_merges_into_the_metadata_after_the_mask(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, metadata=struct(a={"x": 1, "y": 2}, b=1))

    now = await updated(parley, talk, patch={"a": {"x": None, "z": 3}, "b": None, "c": [None]})
    assert now.metadata == struct(a={"y": 2, "z": 3}, c=[None])

    now = await updated(parley, talk, metadata=struct(new=1, old=1), patch={"old": None})
    assert now.metadata == struct(new=1)


async def test_a_patch_cannot_grow_metadata_beyond_its_limits(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, metadata=struct(a="x" * 9000))
    refused = await failure(parley.update(talk, patch={"b": "x" * 9000}))
    assert (refused.code, refused.violations) == (
        "INVALID_ARGUMENT",
        {"metadata_patch": "INVALID_METADATA"},
    )
    assert (await parley.seen(talk)).metadata == struct(a="x" * 9000)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"title": "Tea"},
        {"mask": ["*"], "slug": "tea", "title": "Tea", "metadata": struct(a=1e308, b=[1.5, 2])},
        {"patch": {}},
        {"patch": {"b": [1.5, 2], "nobody": None}},
        {"is_active": True},
    ],
)
async def test_what_is_so_already_changes_nothing(
    parley: Client, database: asyncpg.Connection, values: dict[str, Any]
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(
        ada, title="Tea", slug="tea", metadata=struct(a=1e308, b=[1.5, 2])
    )
    before = await facts(database, talk)

    assert await updated(parley.acting_as(ada), talk, **values) == talk

    assert await facts(database, talk) == before


@pytest.mark.parametrize("deleted", [False, True])
async def test_a_slug_that_is_taken_stays_with_its_holder(parley: Client, deleted: bool) -> None:
    ada = await parley.user("ada")
    other = await parley.conversation(ada, slug="taken")
    talk = await parley.conversation(ada)
    if deleted:
        await parley.delete(other)

    refused = await failure(parley.update(talk, slug="taken"))

    assert (refused.code, refused.reason) == ("ALREADY_EXISTS", "SLUG_TAKEN")
    assert refused.resource == ("parley.v1.Conversation", "taken")
    assert refused.known["field"] == "conversation.slug"
    assert await parley.seen(talk) == talk


async def test_of_16_who_want_one_slug_at_once_one_gets_it(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talks = [await parley.conversation(ada) for _ in range(16)]

    outcomes = await asyncio.gather(
        *(outcome(insist(partial(parley.update, talk, slug="wanted"))) for talk in talks)
    )

    assert sorted(outcomes) == ["ALREADY_EXISTS SLUG_TAKEN"] * 15 + ["OK"]
    assert not await miscounted(database)


@pytest.mark.parametrize(
    ("standing", "outcome"),
    [
        ("owner", "OK"),
        ("moderator", "OK"),
        ("member", "PERMISSION_DENIED PERMISSION_DENIED"),
        ("observer", "PERMISSION_DENIED PERMISSION_DENIED"),
        ("invited", "PERMISSION_DENIED NOT_A_PARTICIPANT"),
        ("left", "PERMISSION_DENIED NOT_A_PARTICIPANT"),
        ("stranger", "NOT_FOUND CONVERSATION_NOT_FOUND"),
        ("system", "OK"),
    ],
)
async def test_owners_and_moderators_change_a_conversation(
    parley: Client, standing: str, outcome: str
) -> None:
    talk, clients = await everybody(parley)
    if outcome == "OK":
        assert (await updated(clients[standing], talk, title="New")).title == "New"
    else:
        refused = await failure(clients[standing].update(talk, title="New"))
        assert f"{refused.code} {refused.reason}" == outcome
        assert (await parley.seen(talk)).title == talk.title


async def everybody(parley: Client) -> tuple[Conversation, dict[str, Client]]:
    """A conversation, and a client for each standing that one can have in it."""
    names = ("owner", "moderator", "member", "observer", "invited", "left", "stranger")
    users: dict[str, User] = {name: await parley.user(name) for name in names}
    talk = await parley.conversation(users["owner"], users["member"], users["left"], slug="talk")
    for name, role in (("moderator", MODERATOR), ("observer", OBSERVER)):
        await parley.acting_as(users["owner"]).invite(talk, users[name], role=role)
        await parley.accept(talk, users[name])
    await parley.acting_as(users["owner"]).invite(talk, users["invited"])
    await parley.leave(talk, users["left"])
    clients = {name: parley.acting_as(user) for name, user in users.items()}
    return await parley.seen(talk), clients | {"system": parley}


async def test_an_archived_conversation_takes_only_its_way_back(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, title="Tea")
    actor = parley.acting_as(ada)

    assert not (await updated(actor, talk, is_active=False, title="Old tea")).is_active

    for values in ({"title": "x"}, {"title": "x", "is_active": False}, {"patch": {"a": 1}}):
        refused = await failure(actor.update(talk, **values))
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "CONVERSATION_ARCHIVED")
    # Archived is what it is already.
    assert not (await updated(actor, talk, is_active=False)).is_active
    now = await updated(actor, talk, is_active=True, title="New tea")
    assert (now.is_active, now.title) == (True, "New tea")


async def test_a_deleted_conversation_is_not_changed(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    await parley.delete(talk)
    for client in (parley, parley.acting_as(ada)):
        for values in ({"title": "x"}, {"is_active": True}, {}):
            refused = await failure(client.update(talk, **values))
            assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "CONVERSATION_DELETED")
    # Rights come before state.
    assert (await failure(parley.acting_as(bob).update(talk, title="x"))).reason == (
        "PERMISSION_DENIED"
    )


async def test_an_etag_counts_wherever_it_stands_and_the_requests_own_first(
    parley: Client,
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, title="Tea")
    now = await updated(parley, talk, title="Coffee", etag=talk.etag)

    inside = pb.UpdateConversationRequest(
        conversation_id=talk.id, conversation=Conversation(title="Milk", etag=talk.etag)
    )
    for call in (
        parley.update(talk, title="Milk", etag=talk.etag),
        parley.conversations.UpdateConversation(inside),
        # Even if there is nothing to change.
        parley.update(talk, title="Coffee", etag=talk.etag),
    ):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("ABORTED", "ETAG_MISMATCH")
    inside.etag = now.etag
    assert (await parley.conversations.UpdateConversation(inside)).conversation.title == "Milk"
    inside.etag, inside.conversation.etag = "", "nonsense"
    refused = await failure(parley.conversations.UpdateConversation(inside))
    assert refused.violations == {"conversation.etag": "INVALID_ETAG"}


async def test_an_etag_outlives_what_is_said_and_who_comes(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    await parley.message(talk, ada)
    await parley.acting_as(ada).invite(talk, bob)
    assert (await updated(parley, talk, title="Tea", etag=talk.etag)).title == "Tea"


async def test_without_an_etag_the_last_write_wins(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    await updated(parley, talk, title="one")
    now = await updated(parley, talk, title="two")
    assert (now.title, now.version) == ("two", talk.version + 2)


async def test_32_clients_who_update_by_etag_make_one_chain(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    rounds = 12
    won: list[tuple[str, str, int]] = []
    lost = 0

    async def client(number: int) -> None:
        nonlocal lost
        for turn in range(rounds):
            before = await insist(lambda: parley.seen(talk))
            title = f"{number}.{turn}"
            try:
                now = await insist(partial(updated, parley, talk, title=title, etag=before.etag))
            except grpc.aio.AioRpcError as error:
                if failure_of(error).reason != "ETAG_MISMATCH":
                    raise
                lost += 1
            else:
                won.append((before.etag, now.etag, now.version))

    await asyncio.gather(*map(client, range(32)))

    assert len(won) + lost == 32 * rounds
    assert lost
    won.sort(key=lambda each: each[2])
    # One winner an etag, each on top of the one before: a path from the first to the last.
    assert [before for before, _, _ in won] == [talk.etag, *(after for _, after, _ in won[:-1])]
    assert [version for _, _, version in won] == list(range(3, 3 + len(won)))
    assert (await parley.seen(talk)).etag == won[-1][1]
    assert not await miscounted(database)


async def test_a_repeated_request_id_changes_once_and_answers_what_is_now(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)
    await actor.update(talk, title="one", request_id="r")
    await actor.update(talk, title="two")

    call = actor.update(talk, title="one", request_id="r")

    assert await is_replay(call)
    assert (await call).conversation.title == "two"
    assert len(await facts(database, talk)) == 4
    refused = await failure(actor.update(talk, title="three", request_id="r"))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "REQUEST_ID_REUSED")


async def test_a_rename_can_be_repeated_by_the_old_name(parley: Client) -> None:
    """The name in the request is nobody's any more, and then somebody else's."""
    ada = await parley.user("ada")
    await parley.conversation(ada, slug="old-name")
    actor = parley.acting_as(ada)
    first = (await actor.update("old-name", slug="new-name", request_id="r")).conversation

    assert await is_replay(actor.update("old-name", slug="new-name", request_id="r"))
    other = await parley.conversation(ada, slug="old-name")
    call = actor.update("old-name", slug="new-name", request_id="r")

    assert await is_replay(call)
    assert (await call).conversation == first
    assert await parley.seen(other) == other


async def test_a_request_id_is_one_conversations(parley: Client) -> None:
    ada = await parley.user("ada")
    for talk in [await parley.conversation(ada) for _ in range(2)]:
        assert (await updated(parley, talk, title="Tea", request_id="r")).title == "Tea"


async def test_of_32_racers_under_one_request_id_one_changes(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    answers = await asyncio.gather(
        *(insist(lambda: parley.update(talk, title="Tea", request_id="r")) for _ in range(32))
    )
    assert len({answer.SerializeToString(deterministic=True) for answer in answers}) == 1
    assert len(await facts(database, talk)) == 3


async def test_a_replay_shows_no_more_than_one_may_see_today(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    await parley.acting_as(ada).invite(talk, bob, role=MODERATOR)
    await parley.accept(talk, bob)
    await parley.acting_as(bob).update(talk, title="Tea", request_id="r")
    await parley.leave(talk, bob)
    again = (await parley.acting_as(bob).update(talk, title="Tea", request_id="r")).conversation
    assert again == await parley.acting_as(bob).seen(talk)
    assert not again.etag


async def test_a_dry_update_checks_everything_and_leaves_nothing(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    await parley.conversation(ada, slug="taken")
    talk = await parley.conversation(ada, title="Tea")
    before = await row_count(database)

    answer = await parley.update(
        talk, title="Coffee", patch={"a": 1}, validate_only=True, request_id="r"
    )

    assert (answer.conversation.title, dict(answer.conversation.metadata)) == ("Coffee", {"a": 1})
    assert not answer.conversation.id
    assert not answer.conversation.etag
    assert not answer.conversation.HasField("update_time")
    assert (await failure(parley.update(talk, slug="taken", validate_only=True))).reason == (
        "SLUG_TAKEN"
    )
    assert await parley.seen(talk) == talk
    assert await row_count(database) == before


@pytest.mark.parametrize("by_slug", [True, False])
async def test_hidden_and_missing_are_the_same_bytes(
    parley: Client, database: asyncpg.Connection, by_slug: bool
) -> None:
    ada, eve = await parley.user("ada"), await parley.user("eve")
    talk = await parley.conversation(ada, slug="secret")
    name = "secret" if by_slug else talk.id
    actor = parley.acting_as(eve)
    calls: list[Callable[[], Any]] = [
        lambda: actor.update(name, title="x", etag="7-01234567"),
        lambda: actor.update(name, slug="other", request_id="r"),
        lambda: actor.delete(name, etag="7-01234567"),
        lambda: actor.undelete(name),
        lambda: actor.delete_message(name, sequence=1),
        lambda: actor.undelete_message(name, sequence=1),
        lambda: actor.delete_message(name, sequence=1, allow_missing=True),
    ]

    hidden = [await failure(call()) for call in calls]
    assert await actor.delete(name, allow_missing=True) == pb.DeleteConversationResponse()
    await database.execute("DELETE FROM conversations")
    missing = [await failure(call()) for call in calls]
    assert await actor.delete(name, allow_missing=True) == pb.DeleteConversationResponse()

    assert hidden == missing
    assert {(each.code, each.reason, each.resource) for each in hidden} == {
        ("NOT_FOUND", "CONVERSATION_NOT_FOUND", ("parley.v1.Conversation", name))
    }
