"""Users: made once, found by id or name, shown to others by name only."""

import asyncio
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
import pytest
from google.protobuf.struct_pb2 import Struct, Value

from parley.v1 import user_pb2 as pb

from ..make import AGENT, HUMAN, NOBODY, Client, User, failure, insist, is_replay, row_count

NIL = "00000000-0000-0000-0000-000000000000"


def create(parley: Client, request_id: str = "", validate_only: bool = False, **user: Any) -> Any:
    return parley.users.CreateUser(
        pb.CreateUserRequest(user=User(**user), request_id=request_id, validate_only=validate_only)
    )


async def get(parley: Client, reference: str) -> User:
    response = await parley.users.GetUser(pb.GetUserRequest(user_id=reference))
    return response.user  # type: ignore[no-any-return]


# Made


async def test_a_user_is_made_as_it_was_given(parley: Client) -> None:
    metadata = Struct()
    metadata.update({"team": ["red", {"lead": None}], "$where": "'; DROP TABLE users; --"})
    given = User(
        username="|QuaD-|",
        email="Quad@Example.org",
        full_name="Žofie 李雷 🚀",
        kind=AGENT,
        is_active=False,
        is_verified=True,
        metadata=metadata,
        external_id="irc:|QuaD-|",
    )

    made = (await parley.users.CreateUser(pb.CreateUserRequest(user=given))).user

    assert made.id
    assert made.etag
    assert made.create_time.ToDatetime() == made.update_time.ToDatetime()
    assert not made.HasField("delete_time")
    assert await get(parley, made.id) == made
    for name in ("id", "etag", "create_time", "update_time"):
        made.ClearField(name)
    assert made == given


async def test_what_is_not_said_of_a_user_has_its_default(parley: Client) -> None:
    user = await parley.user("ada")
    assert (user.kind, user.is_active, user.is_verified) == (HUMAN, True, False)
    assert (user.email, user.full_name, user.external_id) == ("", "", "")
    assert user.HasField("is_active")
    assert user.HasField("is_verified")


async def test_output_only_fields_are_ignored(parley: Client) -> None:
    given = User(username="ada", id=str(uuid4()), etag="7-00000000")
    given.create_time.FromSeconds(1)
    given.delete_time.FromSeconds(1)
    made = (await parley.users.CreateUser(pb.CreateUserRequest(user=given))).user
    assert made.id != given.id
    assert made.etag != given.etag
    assert made.create_time.seconds > 1_700_000_000
    assert not made.HasField("delete_time")


@pytest.mark.parametrize(
    "values",
    [
        [1e308, -1.7976931348623157e308, 5e-324, 0.1, 2.0**53, 9007199254740993, -7],
        ["", "\n\t\x01\x7f", "a\u202eb", "\\u0000", "%s", "e\u0301"],
        [None, True, [], {}, [[[{"a": [None]}]]]],
    ],
)
async def test_metadata_comes_back_as_the_same_values(parley: Client, values: list[Any]) -> None:
    metadata = Struct()
    metadata.update({"values": values})
    user = await parley.user("ada", metadata=metadata)
    assert (await get(parley, "ada")).metadata == user.metadata == metadata


async def test_a_metadata_value_without_a_kind_is_null(parley: Client) -> None:
    user = await parley.user("ada", metadata=Struct(fields={"a": Value()}))
    assert user.metadata.fields["a"].WhichOneof("kind") == "null_value"


# Refused


@pytest.mark.parametrize(
    ("user", "field", "reason"),
    [
        ({}, "user.username", "REQUIRED"),
        ({"username": "\u200b"}, "user.username", "INVALID_CHARACTER"),
        ({"username": "x" * 65}, "user.username", "FIELD_TOO_LONG"),
        ({"username": "e\u0301"}, "user.username", "NOT_NORMALIZED"),
        ({"username": str(uuid4())}, "user.username", "INVALID_VALUE"),
        ({"email": "ada@example.org\r\nBcc: x@y.z"}, "user.email", "INVALID_EMAIL"),
        ({"full_name": "Ada\nLovelace"}, "user.full_name", "INVALID_CHARACTER"),
        ({"full_name": "🚀" * 257}, "user.full_name", "FIELD_TOO_LONG"),
        ({"kind": 99}, "user.kind", "INVALID_ENUM_VALUE"),
        ({"external_id": "é" * 129}, "user.external_id", "FIELD_TOO_LONG"),
        ({"metadata": {"a": {"b": "\0"}}}, "user.metadata.a.b", "INVALID_METADATA"),
        ({"metadata": {"a": float("nan")}}, "user.metadata.a", "INVALID_METADATA"),
    ],
)
async def test_a_bad_field_is_named_with_its_rule(
    parley: Client, database: asyncpg.Connection, user: dict[str, Any], field: str, reason: str
) -> None:
    values = {"username": "ada", **user} if user else {}
    refused = await failure(create(parley, **values))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", reason)
    assert refused.violations == {field: reason}
    assert field in refused.message
    assert await row_count(database) == 0


async def test_a_request_without_a_user_is_told_so(parley: Client) -> None:
    refused = await failure(parley.users.CreateUser(pb.CreateUserRequest()))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "REQUIRED")
    assert refused.known["field"] == "user"


async def test_every_violation_is_told_at_once(parley: Client) -> None:
    refused = await failure(
        create(parley, "é", username="a b", email="nowhere", full_name="\0", kind=7)
    )
    assert refused.reason == "INVALID_CHARACTER"
    assert refused.known["violations"] == "5"
    assert refused.violations == {
        "user.username": "INVALID_CHARACTER",
        "user.email": "INVALID_EMAIL",
        "user.full_name": "INVALID_CHARACTER",
        "user.kind": "INVALID_ENUM_VALUE",
        "request_id": "INVALID_REQUEST_ID",
    }


async def test_ten_thousand_violations_are_counted_and_twenty_told(parley: Client) -> None:
    names = ["two words"] * 10_000
    refused = await failure(parley.users.BatchGetUsers(pb.BatchGetUsersRequest(user_ids=names)))
    assert refused.known["violations"] == "10001"
    assert len(refused.violations) == 20
    assert len(refused.trailers["grpc-status-details-bin"]) <= 4_096


@pytest.mark.parametrize("key", ["k" * 40, "🚀" * 40])
async def test_a_violation_arrives_however_long_its_path(parley: Client, key: str) -> None:
    metadata = inner = Struct()
    for _ in range(15):
        inner = inner.fields[key].struct_value
    inner.update({key: float("nan")})
    refused = await failure(create(parley, username="ada", metadata=metadata))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "INVALID_METADATA")
    assert list(refused.violations.values()) == ["INVALID_METADATA"]
    assert len(refused.trailers["grpc-status-details-bin"]) <= 4_096


@pytest.mark.parametrize(
    ("taken", "wanted", "reason"),
    [
        ({}, {"username": "ada"}, "USERNAME_TAKEN"),
        ({"email": "ada@example.org"}, {"email": "ADA@example.ORG"}, "EMAIL_TAKEN"),
        ({"email": "žofie@example.org"}, {"email": "Žofie@example.org"}, "EMAIL_TAKEN"),
        ({"external_id": "7"}, {"external_id": "7"}, "EXTERNAL_ID_TAKEN"),
    ],
)
@pytest.mark.parametrize("is_deleted", [False, True])
async def test_a_taken_name_is_told_with_who_has_it(
    parley: Client,
    database: asyncpg.Connection,
    taken: dict[str, Any],
    wanted: dict[str, Any],
    reason: str,
    is_deleted: bool,
) -> None:
    # Somebody who has none of them must not be taken for whoever has.
    await parley.user("bystander")
    ada = await parley.user("ada", **taken)
    await parley.user("onlooker")
    if is_deleted:
        await database.execute("UPDATE users SET deleted_at = now() WHERE username = 'ada'")

    refused = await failure(create(parley, **{"username": "eve", **wanted}))

    assert (refused.code, refused.reason) == ("ALREADY_EXISTS", reason)
    name = "ada" if reason == "USERNAME_TAKEN" else ada.id
    assert refused.resource == ("parley.v1.User", name)


async def test_names_that_differ_only_in_case_are_two_users(parley: Client) -> None:
    lower, upper = await parley.user("quad"), await parley.user("QuaD")
    assert (await get(parley, "quad")).id == lower.id
    assert (await get(parley, "QuaD")).id == upper.id


async def test_of_32_who_want_one_name_one_gets_it(parley: Client) -> None:
    answers = await asyncio.gather(
        *(insist(lambda: create(parley, username="ada")) for _ in range(32)), return_exceptions=True
    )
    made = [answer for answer in answers if isinstance(answer, pb.CreateUserResponse)]
    codes = [answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert (len(made), codes) == (1, [grpc.StatusCode.ALREADY_EXISTS] * 31)


# Repeated


async def test_a_repeated_request_id_makes_one_user_and_answers_it_as_it_is_now(
    parley: Client, database: asyncpg.Connection
) -> None:
    first = (await create(parley, "r-1", username="ada")).user
    await database.execute("UPDATE users SET full_name = 'Ada L.', is_active = false")

    call = create(parley, "r-1", username="ada")
    again = (await call).user

    assert await is_replay(call)
    assert (again.id, again.create_time) == (first.id, first.create_time)
    assert (again.full_name, again.is_active) == ("Ada L.", False)
    assert not await is_replay(create(parley, "r-2", username="bob"))


async def test_a_request_id_is_not_for_another_request(parley: Client) -> None:
    await create(parley, "r-1", username="ada")
    refused = await failure(create(parley, "r-1", username="bob"))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "REQUEST_ID_REUSED")
    assert refused.precondition == "REQUEST_ID_REUSED"
    assert (await failure(get(parley, "bob"))).code == "NOT_FOUND"


async def test_a_failed_call_leaves_its_request_id_free(parley: Client) -> None:
    await parley.user("ada")
    await failure(create(parley, "r-1", username="ada"))
    assert (await create(parley, "r-1", username="bob")).user.username == "bob"


async def test_an_empty_request_id_is_none(parley: Client) -> None:
    await create(parley, "", username="ada")
    assert (await failure(create(parley, "", username="ada"))).code == "ALREADY_EXISTS"


@pytest.mark.parametrize(
    ("request_id", "accepted"),
    [("x" * 64, True), (" ~", True), ("x" * 65, False), ("é", False), ("a\nb", False)],
)
async def test_a_request_id_is_printable_ascii(
    parley: Client, request_id: str, accepted: bool
) -> None:
    if accepted:
        assert (await create(parley, request_id, username="ada")).user.id
        return
    refused = await failure(create(parley, request_id, username="ada"))
    assert refused.violations == {"request_id": "INVALID_REQUEST_ID"}


async def test_of_32_racers_under_one_request_id_all_get_one_user(
    parley: Client, database: asyncpg.Connection
) -> None:
    answers = await asyncio.gather(
        *(insist(lambda: create(parley, "r-1", username="ada")) for _ in range(32))
    )
    assert all(answer == answers[0] for answer in answers)
    assert await row_count(database) == 2


async def test_a_dry_run_checks_everything_and_leaves_nothing(
    parley: Client, database: asyncpg.Connection
) -> None:
    await parley.user("ada", email="ada@example.org")
    before = await row_count(database)

    dry = (await create(parley, "r-1", validate_only=True, username="eve", full_name="E.")).user

    assert dry == User(
        username="eve", full_name="E.", kind=HUMAN, is_active=True, is_verified=False
    )
    for taken in ({"username": "ada"}, {"username": "eve", "email": "ADA@example.org"}):
        assert (await failure(create(parley, validate_only=True, **taken))).code == "ALREADY_EXISTS"
    refused = await failure(create(parley, validate_only=True, username=""))
    assert refused.reason == "REQUIRED"
    assert await row_count(database) == before
    # What the dry run said is not remembered under its request_id.
    assert not await is_replay(create(parley, "r-1", username="bob"))


# Found


async def test_a_user_is_found_by_id_in_any_case_and_by_username_as_written(parley: Client) -> None:
    for username in ("ada", "|QuaD-|", "[w00t]^\\{}`", "🚀", "../x", "%", "nil"):
        user = await parley.user(username)
        assert await get(parley, user.id) == user
        assert await get(parley, user.id.upper()) == user
        assert await get(parley, username) == user


@pytest.mark.parametrize("reference", [NOBODY, "nobody", "Ada", "../x"])
async def test_a_user_that_is_not_there_is_not_found(parley: Client, reference: str) -> None:
    await parley.user("ada")
    missing = await failure(get(parley, reference))
    assert (missing.code, missing.reason) == ("NOT_FOUND", "USER_NOT_FOUND")
    assert missing.resource == ("parley.v1.User", reference)
    assert reference in missing.message


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("", "REQUIRED"),
        (NIL, "INVALID_REFERENCE"),
        ("x" * 300, "INVALID_REFERENCE"),
        ("two words", "INVALID_REFERENCE"),
        ("a\0", "INVALID_REFERENCE"),
    ],
)
async def test_what_names_nobody_is_refused(parley: Client, reference: str, reason: str) -> None:
    refused = await failure(get(parley, reference))
    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", {"user_id": reason})


async def test_a_user_sees_itself_whole_and_of_others_their_names_and_kind(parley: Client) -> None:
    metadata = Struct()
    metadata.update({"plan": "pro"})
    ada = await parley.user(
        "ada", email="ada@example.org", full_name="Ada L.", external_id="7", metadata=metadata
    )
    bob = await parley.user("bob")

    assert await get(parley.acting_as(ada), "ada") == ada
    public = User(id=ada.id, username="ada", full_name="Ada L.", kind=HUMAN)
    assert await get(parley.acting_as(bob), "ada") == public
    request = pb.BatchGetUsersRequest(user_ids=["ada", "bob"])
    assert list((await parley.acting_as(bob).users.BatchGetUsers(request)).users) == [public, bob]


async def test_a_deleted_user_is_found_with_its_delete_time(
    parley: Client, database: asyncpg.Connection
) -> None:
    await parley.user("ada")
    bob = await parley.user("bob")
    await database.execute("UPDATE users SET deleted_at = now() WHERE username = 'ada'")
    assert (await get(parley, "ada")).HasField("delete_time")
    assert not (await get(parley.acting_as(bob), "ada")).HasField("delete_time")


# Found, many at once


async def batch(parley: Client, *references: str) -> pb.BatchGetUsersResponse:
    request = pb.BatchGetUsersRequest(user_ids=references)
    return await parley.users.BatchGetUsers(request)  # type: ignore[no-any-return]


async def test_a_batch_has_the_order_asked_for_each_once_and_names_the_missing(
    parley: Client,
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    unknown = str(uuid4())

    found = await batch(parley, "bob", "nobody", ada.id, "bob", unknown, "ada", "nobody")

    assert list(found.users) == [bob, ada]
    assert list(found.missing_user_ids) == ["nobody", unknown]
    assert not found.truncated


@pytest.mark.parametrize("size", [499, 500, 501])
async def test_a_batch_is_of_1_to_500(parley: Client, size: int) -> None:
    names = [f"nobody-{n}" for n in range(size)]
    if size <= 500:
        assert list((await batch(parley, *names)).missing_user_ids) == names
        return
    refused = await failure(batch(parley, *names))
    assert refused.violations == {"user_ids": "TOO_MANY_ITEMS"}
    assert refused.known["limit"] == "500"


async def test_a_batch_of_nothing_is_refused(parley: Client) -> None:
    assert (await failure(batch(parley))).violations == {"user_ids": "REQUIRED"}


async def test_a_bad_reference_in_a_batch_is_named_by_its_place(parley: Client) -> None:
    refused = await failure(batch(parley, "ada", "ada", "two words", "", "ada", NIL))
    assert refused.violations == {
        "user_ids[2]": "INVALID_REFERENCE",
        "user_ids[3]": "REQUIRED",
        "user_ids[5]": "INVALID_REFERENCE",
    }


async def test_a_batch_too_big_for_one_answer_is_cut_and_says_so(
    parley: Client, database: asyncpg.Connection
) -> None:
    await database.execute(
        "INSERT INTO users (username, metadata)"
        " SELECT 'u' || n, jsonb_build_object('a', repeat('x', 16000))"
        " FROM generate_series(1, 100) AS n"
    )
    names = [f"u{n}" for n in range(1, 101)]

    found = await batch(parley, *names, "nobody")

    assert found.truncated
    assert 900_000 < found.ByteSize() <= 1 << 20
    assert [user.username for user in found.users] == names[: len(found.users)]
    assert list(found.missing_user_ids) == ["nobody"]
