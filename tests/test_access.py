"""Who may call: every RPC found by its descriptor, every credential that is not good enough."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool

from parley.v1 import access_pb2, conversation_pb2, user_pb2
from service import access
from service.access import access_of, hash_of
from service.identity import Scope

from .make import Client, Failure, User, failure, failure_of, in_spite_of_the_client

Access = access_pb2.Access
Metadata = Sequence[tuple[str, str | bytes]]
NewToken = Callable[..., Awaitable[str]]

PROTOS = Path(__file__).parent.parent / "protos" / "parley" / "v1"
METHODS = [
    method
    for proto in sorted(PROTOS.glob("*.proto"))
    for service in import_module(f"parley.v1.{proto.stem}_pb2").DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
each_method = pytest.mark.parametrize(
    "method", METHODS, ids=[method.full_name.removeprefix("parley.v1.") for method in METHODS]
)
# What the first version serves; all else may answer that it is not served yet.
SERVED = {
    "UserService": {
        "CreateUser",
        "GetUser",
        "BatchGetUsers",
        "ListUsers",
        "UpdateUser",
        "DeleteUser",
        "UndeleteUser",
        "PurgeUser",
        "SetPassword",
        "VerifyPassword",
    },
    "ConversationService": {"CreateConversation", "GetConversation", "ListConversations"},
    "ParticipantService": {
        "InviteParticipant",
        "AcceptInvitation",
        "DeclineInvitation",
        "LeaveConversation",
        "GetParticipant",
        "ListParticipants",
    },
    "MessageService": {
        "SendMessage",
        "BatchSendMessages",
        "GetMessage",
        "ListMessages",
        "SearchMessages",
        "UpdateMessage",
        "ListMessageRevisions",
    },
    "EventService": {"Watch", "ListEvents"},
}
# No message of ours: a field of an unknown type, cut off.
GARBAGE = b"\xff\xff\xff"


async def call(
    channel: Any, method: MethodDescriptor, metadata: Metadata = (), raw: bytes = b""
) -> Any:
    """Call any method with any bytes: the first response."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming and method.server_streaming:
        return await in_spite_of_the_client(
            lambda: channel.stream_stream(path)(iter([raw]), metadata=metadata, timeout=20).read()
        )
    if method.server_streaming:
        return await channel.unary_stream(path)(raw, metadata=metadata, timeout=20).read()
    assert not method.client_streaming
    return await channel.unary_unary(path)(raw, metadata=metadata, timeout=20)


def bearer(token: str, *others: tuple[str, str | bytes]) -> Metadata:
    return (("authorization", f"Bearer {token}"), *others)


@pytest.fixture
def new_token(parley: Client, database: asyncpg.Connection) -> NewToken:
    """Make tokens by SQL: with all scopes but some, expired, revoked."""

    async def make(*, but: Iterable[Scope] = (), **columns: Any) -> str:
        key_id, secret = uuid4().hex, "s3cr3t_with-an_underscore"
        scopes = [scope.value for scope in Scope if scope not in but]
        await database.execute(
            "INSERT INTO tokens (key_id, secret_hash, service, scopes, expires_at, revoked_at)"
            " VALUES ($1, $2, 'test', $3, $4, $5)",
            key_id,
            hash_of(secret),
            scopes,
            columns.get("expires_at"),
            columns.get("revoked_at"),
        )
        return f"parley_{key_id}_{secret}"

    return make


def in_(delta: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=delta)


# Every method


@each_method
async def test_nobody_calls_anything_without_credentials(
    channel: grpc.aio.Channel, method: MethodDescriptor
) -> None:
    refused = await failure(call(channel, method, raw=GARBAGE))
    assert (refused.code, refused.reason) == ("UNAUTHENTICATED", "MISSING_CREDENTIALS")


@each_method
async def test_each_method_needs_its_scope(
    channel: grpc.aio.Channel, new_token: NewToken, method: MethodDescriptor
) -> None:
    needed = access_of(method).scope
    refused = await failure(call(channel, method, bearer(await new_token(but=[needed]))))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "SCOPE_REQUIRED")
    assert refused.known == {"scope": needed}


@each_method
async def test_each_method_takes_an_actor_only_as_its_proto_says(
    channel: grpc.aio.Channel, parley: Client, new_token: NewToken, method: MethodDescriptor
) -> None:
    rule = access_of(method).rule
    no_system, no_act_as = await new_token(but=["system"]), await new_token(but=["act-as"])
    actor = ("x-parley-actor", (await parley.user()).id)

    alone = await failure(call(channel, method, bearer(no_system)))
    acting = await failure(call(channel, method, bearer(no_act_as, actor)))

    if rule == Access.ACTOR_NONE:
        assert "PERMISSION_DENIED" not in (alone.code, acting.code)
        return
    assert (alone.code, alone.reason) == ("PERMISSION_DENIED", "SCOPE_REQUIRED")
    assert alone.known == {"scope": "system"}
    refused = rule == Access.ACTOR_REFUSED
    assert acting.code == "PERMISSION_DENIED"
    assert acting.reason == ("ACTOR_NOT_ALLOWED" if refused else "ACT_AS_DENIED")


@each_method
async def test_each_method_is_served_or_says_that_it_is_not_yet(
    channel: grpc.aio.Channel, parley: Client, method: MethodDescriptor
) -> None:
    try:
        await call(channel, method, bearer(parley.token))
        return
    except grpc.aio.AioRpcError as error:
        told = failure_of(error)
    if told.code == "UNIMPLEMENTED":
        assert method.name not in SERVED.get(method.containing_service.name, ())
        assert told.reason == "NOT_IMPLEMENTED"
        assert told.message == (
            f"{method.full_name} is part of the contract, but not served by this version yet."
        )
    else:
        # There is nothing in the request.
        assert (told.code, told.reason) == ("INVALID_ARGUMENT", "REQUIRED")


@each_method
def test_each_method_declares_its_access(method: MethodDescriptor) -> None:
    assert access_of(method).scope in Scope


@pytest.mark.parametrize(
    "option",
    [
        None,
        Access(actor=Access.ACTOR_OPTIONAL),
        Access(scope=Access.SCOPE_READ),
    ],
)
def test_a_method_that_declares_no_access_stops_the_server(option: Access | None) -> None:
    file = FileDescriptorProto(name="x.proto", package="x", syntax="proto3")
    file.message_type.add(name="Nothing")
    method = file.service.add(name="S").method.add(
        name="M", input_type=".x.Nothing", output_type=".x.Nothing"
    )
    if option:
        method.options.Extensions[access_pb2.access].CopyFrom(option)
    pool = DescriptorPool()
    pool.Add(file)
    with pytest.raises(RuntimeError, match=r"x\.S\.M declares no access"):
        access_of(pool.FindMethodByName("x.S.M"))


# Credentials


def get_user(channel: grpc.aio.Channel, metadata: Metadata, user_id: str = "nobody") -> Any:
    method = user_pb2.DESCRIPTOR.services_by_name["UserService"].methods_by_name["GetUser"]
    request = user_pb2.GetUserRequest(user_id=user_id)
    return call(channel, method, metadata, request.SerializeToString())


async def test_every_bad_credential_gets_the_same_answer(
    channel: grpc.aio.Channel, new_token: NewToken
) -> None:
    good = await new_token()
    bad: list[Metadata] = [
        bearer(""),
        bearer("x"),
        bearer("parley_unknown_secret"),
        bearer(good[:-1]),
        bearer(f"{good}x"),
        bearer(f" {good}"),
        bearer(good.upper()),
        bearer(good.rpartition("_")[0]),
        bearer("parley__"),
        bearer("parley_" + "x" * 40 + "_secret"),
        bearer(good, ("authorization", f"Bearer {good}")),
        bearer("wrong", ("authorization", f"Bearer {good}")),
        (("authorization", good),),
        (("authorization", ""),),
        (("authorization", f"Basic {good}"),),
        (("authorization", "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9."),),
        bearer(await new_token(expires_at=in_(-1))),
        bearer(await new_token(revoked_at=in_(-1))),
    ]

    answers = [await failure(get_user(channel, metadata)) for metadata in bad]

    assert {answer.reason for answer in answers} == {"INVALID_CREDENTIALS"}
    assert {answer.code for answer in answers} == {"UNAUTHENTICATED"}
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_a_good_token_is_let_in(
    channel: grpc.aio.Channel, new_token: NewToken, scheme: str
) -> None:
    token = await new_token(expires_at=in_(60))
    answer = await failure(get_user(channel, (("authorization", f"{scheme} {token}"),)))
    assert answer.code == "NOT_FOUND"


async def test_a_token_ends_with_its_time_though_it_was_good_a_moment_ago(
    channel: grpc.aio.Channel, new_token: NewToken
) -> None:
    token = bearer(await new_token(expires_at=in_(0.3)))
    assert (await failure(get_user(channel, token))).code == "NOT_FOUND"
    await asyncio.sleep(0.35)
    assert (await failure(get_user(channel, token))).code == "UNAUTHENTICATED"


async def test_a_revoked_token_ends_when_the_cache_does(
    channel: grpc.aio.Channel,
    new_token: NewToken,
    database: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert access.TOKEN_CACHE_SECONDS <= 5
    monkeypatch.setattr(access, "TOKEN_CACHE_SECONDS", 0.1)
    token = bearer(await new_token())
    assert (await failure(get_user(channel, token))).code == "NOT_FOUND"
    await database.execute("UPDATE tokens SET revoked_at = now() WHERE service = 'test'")
    await asyncio.sleep(0.15)
    assert (await failure(get_user(channel, token))).code == "UNAUTHENTICATED"


async def test_who_may_not_call_is_told_so_before_what_is_wrong_with_the_request(
    channel: grpc.aio.Channel, new_token: NewToken
) -> None:
    method = user_pb2.DESCRIPTOR.services_by_name["UserService"].methods_by_name["CreateUser"]
    token = bearer(await new_token(but=["write"]))
    assert (await failure(call(channel, method, token))).reason == "SCOPE_REQUIRED"
    garbled = await failure(call(channel, method, token, GARBAGE))
    assert (garbled.code, garbled.reason) == ("INVALID_ARGUMENT", "MALFORMED_REQUEST")


@pytest.mark.parametrize(
    "raw",
    [
        GARBAGE,
        user_pb2.GetUserRequest(user_id="ada").SerializeToString()[:-1],
        b"\x0a\x02\xff\xfe",
        b"\x0a\x03\xed\xa0\x80",
    ],
    ids=["garbage", "truncated", "no UTF-8", "a surrogate"],
)
async def test_bytes_that_are_no_request_are_malformed(
    parley: Client, channel: grpc.aio.Channel, raw: bytes
) -> None:
    method = user_pb2.DESCRIPTOR.services_by_name["UserService"].methods_by_name["GetUser"]
    refused = await failure(call(channel, method, bearer(parley.token), raw))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "MALFORMED_REQUEST")


async def test_a_request_id_belongs_to_one_caller(
    channel: grpc.aio.Channel, parley: Client, new_token: NewToken
) -> None:
    other = Client(channel, await new_token())
    request = user_pb2.CreateUserRequest(user=User(username="ada"), request_id="r-1")
    await parley.users.CreateUser(request)
    refused = await failure(other.users.CreateUser(request))
    assert (refused.code, refused.reason) == ("ALREADY_EXISTS", "USERNAME_TAKEN")


# Actors


async def seen_by(parley: Client, actor: str | bytes, user: User) -> User | Failure:
    """The user as the actor sees it, or why it does not."""
    request = user_pb2.GetUserRequest(user_id=user.id)
    try:
        response = await parley.acting_as(actor).users.GetUser(request)
    except grpc.aio.AioRpcError:
        return await failure(parley.acting_as(actor).users.GetUser(request))
    return response.user  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "username", ["ada", "|QuaD-|", "[w00t]^\\{}`", "%41da", "Žofie", "🚀", "李雷"]
)
async def test_an_actor_is_named_by_id_or_username_in_any_script(
    parley: Client, username: str
) -> None:
    user = await parley.user(username, email="somebody@example.org")
    assert await seen_by(parley, user.id, user) == user
    assert await seen_by(parley, user.id.upper(), user) == user
    assert await seen_by(parley, username.encode(), user) == user
    if username.isascii():
        assert await seen_by(parley, username, user) == user


async def test_actors_whose_names_differ_only_in_case_are_two(parley: Client) -> None:
    lower, upper = await parley.user("quad"), await parley.user("QuaD")
    assert await seen_by(parley, "quad", lower) == lower
    assert await seen_by(parley, "quad", upper) != upper


async def test_an_actor_is_somebody_who_may_act(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    await parley.user("idle", is_active=False)
    gone = await parley.user("gone")
    await database.execute("UPDATE users SET deleted_at = now() WHERE username = 'gone'")
    expected: dict[str | bytes, tuple[str, str]] = {
        "nobody": ("FAILED_PRECONDITION", "USER_NOT_FOUND"),
        str(uuid4()): ("FAILED_PRECONDITION", "USER_NOT_FOUND"),
        "idle": ("PERMISSION_DENIED", "ACTOR_NOT_ALLOWED"),
        "gone": ("PERMISSION_DENIED", "ACTOR_NOT_ALLOWED"),
        gone.id: ("PERMISSION_DENIED", "ACTOR_NOT_ALLOWED"),
        "two words": ("INVALID_ARGUMENT", "INVALID_ACTOR"),
        "x" * 65: ("INVALID_ARGUMENT", "INVALID_ACTOR"),
        "00000000-0000-0000-0000-000000000000": ("INVALID_ARGUMENT", "INVALID_ACTOR"),
        b"\xff\xfe": ("INVALID_ARGUMENT", "INVALID_ACTOR"),
        b"nul\0": ("INVALID_ARGUMENT", "INVALID_ACTOR"),
        b"": ("INVALID_ARGUMENT", "INVALID_ACTOR"),
    }
    for actor, answer in expected.items():
        refused = await seen_by(parley, actor, ada)
        assert isinstance(refused, Failure)
        assert (refused.code, refused.reason) == answer, actor
        if answer[0] != "PERMISSION_DENIED":
            assert refused.known["field"] == "x-parley-actor"


async def test_an_empty_or_a_second_actor_never_makes_a_call_the_systems(
    parley: Client, channel: grpc.aio.Channel
) -> None:
    ada = await parley.user("ada")
    one, two = ("x-parley-actor", "ada"), ("x-parley-actor-bin", b"ada")
    for actors in ([("x-parley-actor", "")], [one, one], [one, two]):
        refused = await failure(get_user(channel, bearer(parley.token, *actors), ada.id))
        assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "INVALID_ACTOR")


async def test_an_actor_lists_only_its_own_with_the_same_token(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    await parley.conversation(ada)
    request = conversation_pb2.ListConversationsRequest()
    mine = await parley.acting_as(bob).conversations.ListConversations(request)
    everything = await parley.conversations.ListConversations(request)
    assert (len(mine.conversations), len(everything.conversations)) == (0, 1)
