"""UpdateUser, DeleteUser, UndeleteUser: what they take, from whom, and what they leave."""

import asyncio
from functools import partial
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from parley.v1 import participant_pb2
from parley.v1 import user_pb2 as pb

from ..make import (
    AGENT,
    HUMAN,
    NOBODY,
    Client,
    User,
    failure,
    failure_of,
    insist,
    is_replay,
    miscounted,
    row_count,
)


def struct(**values: Any) -> Struct:
    made = Struct()
    made.update(values)
    return made


async def updated(client: Client, user: User | str, **values: Any) -> User:
    return (await client.update_user(user, **values)).user  # type: ignore[no-any-return]


# Update


async def test_the_system_changes_everything_that_may_change(parley: Client) -> None:
    ada = await parley.user("ada", external_id="7")

    now = await updated(
        parley,
        "ada",
        username="Ada",
        email="ada@example.org",
        full_name="Ada Lovelace",
        kind=AGENT,
        is_active=False,
        is_verified=True,
        metadata=struct(team="red"),
    )

    assert now == await parley.who("Ada")
    assert (now.id, now.create_time, now.external_id) == (ada.id, ada.create_time, "7")
    assert (now.email, now.full_name, now.kind) == ("ada@example.org", "Ada Lovelace", AGENT)
    assert (now.is_active, now.is_verified, dict(now.metadata)) == (False, True, {"team": "red"})
    assert now.etag != ada.etag
    assert now.update_time.ToNanoseconds() > ada.update_time.ToNanoseconds()
    assert (await failure(parley.who("ada"))).code == "NOT_FOUND"
    # The old name is free.
    await parley.user("ada")


async def test_without_a_mask_only_what_is_populated_changes(parley: Client) -> None:
    ada = await parley.user("ada", email="ada@example.org", full_name="Ada", is_verified=True)
    now = await updated(parley, ada, full_name="A. L.")
    assert (now.username, now.email, now.full_name) == ("ada", "ada@example.org", "A. L.")
    assert now.is_verified
    assert not (await updated(parley, ada, is_verified=False)).is_verified


async def test_a_mask_resets_what_it_names_and_touches_nothing_else(parley: Client) -> None:
    ada = await parley.user(
        "ada", email="ada@example.org", full_name="Ada", kind=AGENT, metadata=struct(a=1)
    )

    now = await updated(parley, ada, mask=["email", "email"], full_name="ignored")
    assert (now.email, now.full_name, now.kind) == ("", "Ada", AGENT)

    now = await updated(parley, ada, mask=["*"], username="lady", is_active=False)
    assert (now.username, now.full_name, now.kind) == ("lady", "", HUMAN)
    assert (now.is_active, now.is_verified, dict(now.metadata)) == (False, False, {})
    assert (await updated(parley, ada, mask=["*"], username="lady")).is_active


@pytest.mark.parametrize(
    ("mask", "values", "violations"),
    [
        (["name"], {"full_name": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        (["etag"], {"full_name": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        (["create_time"], {"full_name": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        (["external_id"], {"external_id": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        (["password"], {"full_name": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        ([".."], {"full_name": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        (["full_name"], {}, {"user": "REQUIRED"}),
        (["*"], {"full_name": "x"}, {"user.username": "REQUIRED"}),
        (["username"], {"full_name": "x"}, {"user.username": "REQUIRED"}),
        (None, {"username": "a b"}, {"user.username": "INVALID_CHARACTER"}),
        (None, {"username": "e\u0301"}, {"user.username": "NOT_NORMALIZED"}),
        (None, {"username": NOBODY}, {"user.username": "INVALID_VALUE"}),
        (None, {"email": "nowhere"}, {"user.email": "INVALID_EMAIL"}),
        (None, {"full_name": "x" * 257}, {"user.full_name": "FIELD_TOO_LONG"}),
        (None, {"full_name": "a\nb"}, {"user.full_name": "INVALID_CHARACTER"}),
        (None, {"kind": 99}, {"user.kind": "INVALID_ENUM_VALUE"}),
        (None, {"full_name": "x", "etag": "nonsense"}, {"etag": "INVALID_ETAG"}),
        (None, {"request_id": "x" * 65}, {"request_id": "INVALID_REQUEST_ID"}),
        (None, {"patch": {"": 1}}, {"metadata_patch": "INVALID_METADATA"}),
    ],
)
async def test_a_bad_field_is_named_with_its_rule(
    parley: Client, mask: list[str] | None, values: dict[str, Any], violations: dict[str, str]
) -> None:
    ada = await parley.user("ada")
    refused = await failure(parley.update_user(ada, mask=mask, **values))
    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)
    assert await parley.who(ada) == ada


async def test_what_only_the_server_says_is_ignored(parley: Client) -> None:
    ada = await parley.user("ada", external_id="7")
    given = User(id=NOBODY, external_id="8", full_name="Ada")
    for name in ("create_time", "update_time", "delete_time"):
        getattr(given, name).FromSeconds(1)
    now = (await parley.users.UpdateUser(pb.UpdateUserRequest(user_id="ada", user=given))).user
    assert (now.id, now.external_id, now.create_time) == (ada.id, "7", ada.create_time)
    assert (now.full_name, now.HasField("delete_time")) == ("Ada", False)


async def test_a_patch_merges_into_the_metadata_after_the_mask(parley: Client) -> None:
    ada = await parley.user("ada", metadata=struct(a={"x": 1, "y": 2}, b=1))

    now = await updated(parley, ada, patch={"a": {"x": None, "z": 3}, "b": None, "c": [None]})
    assert now.metadata == struct(a={"y": 2, "z": 3}, c=[None])

    now = await updated(parley, ada, metadata=struct(new=1, old=1), patch={"old": None})
    assert now.metadata == struct(new=1)


async def test_a_patch_cannot_grow_metadata_beyond_its_limits(parley: Client) -> None:
    ada = await parley.user("ada", metadata=struct(a="x" * 9000))
    refused = await failure(parley.update_user(ada, patch={"b": "x" * 9000}))
    assert refused.violations == {"metadata_patch": "INVALID_METADATA"}
    assert await parley.who(ada) == ada


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"full_name": "Ada", "email": "ada@example.org"},
        {"patch": {}},
        {"patch": {"b": [1.5, 2], "nobody": None}},
        {"is_active": True},
    ],
    ids=str,
)
async def test_what_is_so_already_changes_nothing(parley: Client, values: dict[str, Any]) -> None:
    ada = await parley.user(
        "ada", full_name="Ada", email="ada@example.org", metadata=struct(a=1e308, b=[1.5, 2])
    )
    assert await updated(parley, ada, **values) == ada


@pytest.mark.parametrize("is_deleted", [False, True])
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"username": "ada"}, "USERNAME_TAKEN"),
        ({"email": "ADA@example.org"}, "EMAIL_TAKEN"),
        ({"username": "free", "email": "ada@example.org"}, "EMAIL_TAKEN"),
    ],
)
async def test_a_name_that_is_taken_stays_with_its_holder(
    parley: Client, values: dict[str, Any], reason: str, is_deleted: bool
) -> None:
    ada = await parley.user("ada", email="ada@example.org")
    eve = await parley.user("eve", email="eve@example.org")
    if is_deleted:
        await parley.delete_user(ada)

    refused = await failure(parley.update_user(eve, **values))

    assert (refused.code, refused.reason) == ("ALREADY_EXISTS", reason)
    name = "ada" if reason == "USERNAME_TAKEN" else ada.id
    assert refused.resource == ("parley.v1.User", name)
    assert await parley.who(eve) == eve
    # One's own is not taken, in another case neither.
    assert (await updated(parley, eve, username="eve", email="EVE@example.org")).email[0] == "E"


async def test_of_16_who_want_one_name_at_once_one_gets_it(parley: Client) -> None:
    users = [await parley.user() for _ in range(16)]

    async def outcome(user: User) -> str:
        try:
            await insist(partial(parley.update_user, user, username="wanted"))
        except grpc.aio.AioRpcError as error:
            return failure_of(error).reason
        return "OK"

    outcomes = await asyncio.gather(*map(outcome, users))

    assert sorted(outcomes) == ["OK"] + ["USERNAME_TAKEN"] * 15


async def test_an_actor_changes_its_own_email_name_and_metadata(parley: Client) -> None:
    ada = await parley.user("ada", email="ada@example.org", is_verified=True)
    own = parley.acting_as(ada)

    # What it sends back unchanged is no change.
    now = await updated(own, "ada", full_name="Ada", username="ada", kind=HUMAN, is_verified=True)
    assert (now.full_name, now.is_verified) == ("Ada", True)
    now = await updated(own, ada, email="lovelace@example.org", patch={"a": 1})
    assert (now.email, now.is_verified, dict(now.metadata)) == (
        "lovelace@example.org",
        False,
        {"a": 1},
    )
    assert now == await own.who(ada)


@pytest.mark.parametrize(
    "values",
    [
        {"username": "lady"},
        {"kind": AGENT},
        {"is_active": False},
        {"is_verified": True},
        {"email": "new@example.org", "is_verified": True},
        {"mask": ["*"], "username": "lady"},
    ],
    ids=str,
)
async def test_an_actor_may_not_change_what_the_system_says_of_it(
    parley: Client, values: dict[str, Any]
) -> None:
    ada = await parley.user("ada")
    refused = await failure(parley.acting_as(ada).update_user(ada, **values))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert await parley.who(ada) == ada


async def test_an_actor_changes_nobody_else(parley: Client) -> None:
    ada, eve = await parley.user("ada"), await parley.user("eve")
    refused = await failure(parley.acting_as(eve).update_user(ada, full_name="x"))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    # Not even to see whether an etag is theirs.
    refused = await failure(parley.acting_as(eve).update_user(ada, etag=eve.etag))
    assert refused.code == "PERMISSION_DENIED"
    missing = await failure(parley.acting_as(eve).update_user(NOBODY, full_name="x"))
    assert (missing.code, missing.reason) == ("NOT_FOUND", "USER_NOT_FOUND")


async def test_a_deactivated_user_acts_no_more_until_the_system_says_so(parley: Client) -> None:
    ada = await parley.user("ada")
    await updated(parley, ada, is_active=False)
    refused = await failure(parley.acting_as(ada).who(ada))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "ACTOR_NOT_ALLOWED")
    await updated(parley, ada, is_active=True)
    assert (await parley.acting_as(ada).who(ada)).is_active


async def test_an_etag_counts_wherever_it_stands_and_the_requests_own_first(
    parley: Client,
) -> None:
    ada = await parley.user("ada")
    now = await updated(parley, ada, full_name="Ada", etag=ada.etag)

    inside = pb.UpdateUserRequest(user_id="ada", user=User(full_name="x", etag=ada.etag))
    for call in (
        parley.update_user(ada, full_name="x", etag=ada.etag),
        parley.users.UpdateUser(inside),
        # Even if there is nothing to change; and another user's is no etag of this one.
        parley.update_user(ada, full_name="Ada", etag=ada.etag),
        parley.update_user(ada, full_name="x", etag="2-00000000"),
    ):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("ABORTED", "ETAG_MISMATCH")
    inside.etag = now.etag
    assert (await parley.users.UpdateUser(inside)).user.full_name == "x"
    inside.etag, inside.user.etag = "", "nonsense"
    refused = await failure(parley.users.UpdateUser(inside))
    assert refused.violations == {"user.etag": "INVALID_ETAG"}


async def test_24_clients_who_update_by_etag_make_one_chain(
    parley: Client,
) -> None:
    ada = await parley.user("ada")
    won: list[tuple[str, str]] = []
    lost = 0

    async def client(number: int) -> None:
        nonlocal lost
        for turn in range(6):
            before = await insist(lambda: parley.who(ada))
            change = partial(updated, parley, ada, full_name=f"{number}.{turn}", etag=before.etag)
            try:
                now = await insist(change)
            except grpc.aio.AioRpcError as error:
                if failure_of(error).reason != "ETAG_MISMATCH":
                    raise
                lost += 1
            else:
                won.append((before.etag, now.etag))

    await asyncio.gather(*map(client, range(24)))

    assert len(won) + lost == 24 * 6
    assert lost
    # A path: each change lies on top of the one before.
    steps = dict(won)
    assert len(steps) == len(won)
    etag = ada.etag
    for _ in won:
        etag = steps[etag]
    assert (await parley.who(ada)).etag == etag


async def test_a_repeated_request_id_changes_once_and_answers_what_is_now(parley: Client) -> None:
    ada = await parley.user("ada")
    own = parley.acting_as(ada)
    await own.update_user("ada", full_name="one", request_id="r")
    # By another name, and as it was changed since.
    await parley.update_user(ada, username="lady", full_name="two")

    call = own.update_user("ada", full_name="one", request_id="r")

    assert await is_replay(call)
    assert (await call).user == await parley.who(ada)
    refused = await failure(own.update_user("ada", full_name="three", request_id="r"))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "REQUEST_ID_REUSED")


async def test_of_16_racers_under_one_request_id_one_changes(parley: Client) -> None:
    ada = await parley.user("ada")
    answers = await asyncio.gather(
        *(
            insist(lambda: parley.update_user(ada, full_name="Ada", request_id="r"))
            for _ in range(16)
        )
    )
    assert len({answer.SerializeToString(deterministic=True) for answer in answers}) == 1


async def test_a_dry_update_checks_everything_and_leaves_nothing(
    parley: Client, database: asyncpg.Connection
) -> None:
    await parley.user("taken")
    ada = await parley.user("ada")
    before = await row_count(database)

    answer = await parley.update_user(
        ada, full_name="Ada", patch={"a": 1}, validate_only=True, request_id="r"
    )

    assert (answer.user.full_name, dict(answer.user.metadata)) == ("Ada", {"a": 1})
    assert not answer.user.id
    assert not answer.user.etag
    assert not answer.user.HasField("update_time")
    refused = await failure(parley.update_user(ada, username="taken", validate_only=True))
    assert refused.reason == "USERNAME_TAKEN"
    assert await parley.who(ada) == ada
    assert await row_count(database) == before


# Delete and undelete


async def test_a_deleted_user_is_marked_and_nothing_else_changes(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada", email="ada@example.org"), await parley.user("bob")
    talk = await parley.conversation(ada, bob, first="hello")

    deleted = (await parley.delete_user("ada")).user

    assert deleted == await parley.who("ada")
    assert deleted.HasField("delete_time")
    assert deleted.etag != ada.etag
    deleted.ClearField("delete_time")
    deleted.etag = ada.etag
    assert deleted == ada
    # Its memberships and what it said stay; so do its names.
    assert await parley.acting_as(bob).seen(talk) == talk
    assert (await parley.participant(talk, ada)).status == (
        participant_pb2.Participant.STATUS_JOINED
    )
    assert (await failure(parley.user("ada"))).reason == "USERNAME_TAKEN"
    assert (await failure(parley.user("eve", email="ADA@example.org"))).reason == "EMAIL_TAKEN"
    assert not await miscounted(database)

    back = (await parley.undelete_user("ada")).user

    assert back == await parley.who("ada")
    assert back.etag not in (ada.etag, deleted.etag)
    back.etag = ada.etag
    assert back == ada
    assert await parley.acting_as(ada).seen(talk) == talk


async def test_a_deleted_user_may_not_act_nor_be_invited_nor_changed(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(bob)
    await parley.delete_user(ada)

    for call, expected in (
        (parley.acting_as(ada).who(ada), "PERMISSION_DENIED ACTOR_NOT_ALLOWED"),
        (parley.acting_as(bob).invite(talk, ada), "FAILED_PRECONDITION USER_INACTIVE"),
        (parley.acting_as(bob).add(talk, ada), "FAILED_PRECONDITION USER_INACTIVE"),
        (parley.update_user(ada, full_name="x"), "FAILED_PRECONDITION USER_DELETED"),
        (parley.update_user(ada), "FAILED_PRECONDITION USER_DELETED"),
        (parley.set_password(ada, "secret"), "FAILED_PRECONDITION USER_DELETED"),
    ):
        refused = await failure(call)
        assert f"{refused.code} {refused.reason}" == expected


async def test_delete_again_is_not_found_unless_that_is_allowed(parley: Client) -> None:
    ada = await parley.user("ada")
    await parley.delete_user(ada)
    for user in (ada, NOBODY, "nobody"):
        refused = await failure(parley.delete_user(user))
        assert (refused.code, refused.reason) == ("NOT_FOUND", "USER_NOT_FOUND")
        assert await parley.delete_user(user, allow_missing=True) == pb.DeleteUserResponse()


async def test_undelete_is_for_what_is_deleted(parley: Client) -> None:
    ada = await parley.user("ada")
    live = await failure(parley.undelete_user(ada))
    assert (live.code, live.reason) == ("ALREADY_EXISTS", "NOT_DELETED")
    missing = await failure(parley.undelete_user(NOBODY))
    assert (missing.code, missing.reason) == ("NOT_FOUND", "USER_NOT_FOUND")


async def test_a_stale_etag_deletes_and_undeletes_nobody(parley: Client) -> None:
    ada = await parley.user("ada")
    now = await updated(parley, ada, full_name="Ada")
    refused = await failure(parley.delete_user(ada, etag=ada.etag))
    assert (refused.code, refused.reason) == ("ABORTED", "ETAG_MISMATCH")
    deleted = (await parley.delete_user(ada, etag=now.etag)).user
    refused = await failure(parley.undelete_user(ada, etag=now.etag))
    assert (refused.code, refused.reason) == ("ABORTED", "ETAG_MISMATCH")
    assert not (await parley.undelete_user(ada, etag=deleted.etag)).user.HasField("delete_time")


async def test_a_repeated_deletion_is_one_and_answers_what_is_now(parley: Client) -> None:
    ada = await parley.user("ada")
    await parley.delete_user(ada, request_id="d")
    await parley.undelete_user(ada, request_id="u")

    call = parley.delete_user(ada, request_id="d")

    assert await is_replay(call)
    assert (await call).user == await parley.who(ada)
    assert not (await call).user.HasField("delete_time")
    assert await is_replay(parley.undelete_user(ada, request_id="u"))
    # That there was nothing to do is remembered too.
    await parley.delete_user("eve", allow_missing=True, request_id="e")
    await parley.user("eve")
    call = parley.delete_user("eve", allow_missing=True, request_id="e")
    assert await is_replay(call)
    assert await call == pb.DeleteUserResponse()


@pytest.mark.parametrize("reference", ["", "two words", "x" * 300])
async def test_what_names_nobody_is_refused(parley: Client, reference: str) -> None:
    for call in (
        parley.update_user(reference),
        parley.delete_user(reference, allow_missing=True),
        parley.undelete_user(reference),
        parley.purge_user(reference),
        parley.set_password(reference, "secret"),
    ):
        refused = await failure(call)
        assert refused.code == "INVALID_ARGUMENT"
        assert list(refused.violations) == ["user_id"]
