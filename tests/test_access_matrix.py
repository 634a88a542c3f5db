"""Every RPC, called by every kind of caller and actor, answers as the matrix says."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
import pytest
import pytest_asyncio
from google.protobuf.message_factory import GetMessageClass

from parley.v1 import (
    conversation_pb2,
    message_pb2,
    participant_pb2,
    user_pb2,
)
from service import tokens
from service.embedded import EmbeddedPostgres
from service.identity import Scope
from service.server import Server

from .access_matrix import ACTORS, DOORS, MATRIX, PAGE, REQUESTS, Rpc, World, page, rpcs
from .make import MEMBER, MODERATOR, OBSERVER, OWNER, USER, Client, in_spite_of_the_client

pytestmark = pytest.mark.slow

JOINED = {
    "other": MEMBER,
    "deputy": OWNER,
    "left": MEMBER,
    "removed": MEMBER,
    "observer": OBSERVER,
    "member": MEMBER,
    "moderator": MODERATOR,
}
SCOPES: dict[str, list[Scope]] = {
    "no scope": [Scope.ACT_AS, Scope.SYSTEM],
    "no act-as": [scope for scope in Scope if scope is not Scope.ACT_AS],
    "no system": [scope for scope in Scope if scope is not Scope.SYSTEM],
}

ALL = list(rpcs())


@pytest_asyncio.fixture
async def people(parley: Client, database: asyncpg.Connection) -> dict[str, user_pb2.User]:
    names = [*ACTORS[:-1], "other", "deputy", "pending", "fresh", "inactive"]
    people = {name: await parley.user(f"{name}-{uuid4().hex[:6]}") for name in names}
    await database.execute(
        "UPDATE users SET is_active = false WHERE id = $1", people["inactive"].id
    )
    return people


@pytest_asyncio.fixture
async def callers(parley: Client, postgres: EmbeddedPostgres) -> AsyncIterator[dict[str, str]]:
    """A token for each way of not having enough; and one that nobody knows."""
    made = {
        name: await tokens.create(postgres.url, service=name, scopes=scopes, expires_in=None)
        for name, scopes in SCOPES.items()
    }
    yield {**made, "bad token": "parley_feed_beef"}


async def world_for(parley: Client, people: dict[str, user_pb2.User], rpc: Rpc) -> World:
    """A conversation with one of each kind, in the state in which the RPC makes sense."""
    request = conversation_pb2.CreateConversationRequest(
        conversation=conversation_pb2.Conversation(creator_id=people["owner"].id),
        participants=[
            participant_pb2.NewParticipant(user_id=people[name].id, role=role)
            for name, role in JOINED.items()
        ],
        invitations=[
            participant_pb2.NewParticipant(user_id=people[name].id)
            for name in ("invited", "pending")
        ],
    )
    made = await parley.conversations.CreateConversation(request)
    id = made.conversation.id
    await parley.messages.SendMessage(
        message_pb2.SendMessageRequest(
            conversation_id=id, sender_id=people["deputy"].id, role=USER, content="first"
        )
    )
    for kind, name in (("LeaveConversation", "left"), ("RemoveParticipant", "removed")):
        of = getattr(participant_pb2, f"{kind}Request")
        request = of(conversation_id=id, user_id=people[name].id)
        await getattr(parley.participants, kind)(request)
    if rpc.name in ("UserService/UndeleteUser", "UserService/PurgeUser"):
        await parley.users.DeleteUser(
            user_pb2.DeleteUserRequest(user_id=people["fresh"].id, allow_missing=True)
        )
    if rpc.name in ("ConversationService/UndeleteConversation", PURGE):
        await parley.conversations.DeleteConversation(
            conversation_pb2.DeleteConversationRequest(conversation_id=id)
        )
    if rpc.name == "MessageService/UndeleteMessage":
        await parley.messages.DeleteMessage(
            message_pb2.DeleteMessageRequest(conversation_id=id, sequence=1)
        )
    return World(id, people)


PURGE = "ConversationService/PurgeConversation"


async def code_of(
    channel: grpc.aio.Channel, rpc: Rpc, request: Any, metadata: list[tuple[str, str]]
) -> str:
    """The status with which the call ends."""
    method = rpc.descriptor
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = GetMessageClass(method.output_type).FromString
    options: dict[str, Any] = {"metadata": metadata, "timeout": 20}
    raw = request.SerializeToString()
    try:
        if method.client_streaming:
            stream: Any = channel.stream_stream(path, None, kind)
            await in_spite_of_the_client(lambda: stream(iter([raw]), **options).read())
        elif method.server_streaming:
            # It may go on for ever: one that answers is a yes.
            answering: Any = channel.unary_stream(path, None, kind)(raw, **options)
            await answering.read()
            answering.cancel()
        else:
            await channel.unary_unary(path, None, kind)(raw, **options)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def metadata_for(
    column: str, callers: dict[str, str], token: str, people: dict[str, user_pb2.User], rpc: Rpc
) -> list[tuple[str, str]]:
    token = callers.get(column, token)
    actor = {"inactive": "inactive", "no act-as": "owner"}.get(column)
    if column in ACTORS[:-1]:
        actor = column
    metadata = [] if column == "no token" else [("authorization", f"Bearer {token}")]
    return [*metadata, ("x-parley-actor", people[actor].id)] if actor else metadata


@pytest.mark.parametrize("rpc", ALL, ids=[rpc.name for rpc in ALL])
async def test_every_kind_of_caller_is_answered_as_the_matrix_says(
    parley: Client,
    server: Server,
    people: dict[str, user_pb2.User],
    callers: dict[str, str],
    rpc: Rpc,
) -> None:
    assert server.token
    expected, answered = {}, {}
    world = await world_for(parley, people, rpc)
    for column in (*DOORS, *ACTORS):
        # Whoever gets through to a conversation leaves it changed for the next.
        if column in ACTORS and rpc.name in REQUESTS and not rpc.reads:
            world = await world_for(parley, people, rpc)
        build = REQUESTS.get(rpc.name)
        who = column if column in ACTORS else "system"
        request = build(world, who) if build else GetMessageClass(rpc.descriptor.input_type)()
        metadata = metadata_for(column, callers, server.token, people, rpc)

        expected[column] = rpc.expected(column)
        answered[column] = await code_of(parley.channel, rpc, request, metadata)

    assert answered == expected


def test_the_matrix_has_a_row_for_every_rpc_and_no_other() -> None:
    assert sorted(MATRIX) == sorted(rpc.name for rpc in ALL)
    for rpc in ALL:
        assert len(MATRIX[rpc.name].split()) == (1 if rpc.refuses_actors else len(ACTORS))


def test_every_rpc_that_is_served_is_called_in_earnest() -> None:
    """A row that says OK or refuses by role must not be answered for want of a request."""
    served = {name for name, row in MATRIX.items() if "UI" not in row.split()}

    assert served - set(REQUESTS) == {
        "UserService/ListUsers",
        "ConversationService/ListConversations",
    }


def test_the_page_is_what_the_matrix_says() -> None:
    assert PAGE.read_text() == page(), "run `make matrix`"
