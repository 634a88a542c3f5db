"""A call that fails is over, and leaves nothing behind that only the garbage collector finds."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from uuid import uuid4

import grpc
import pytest

from parley.v1 import event_pb2, message_pb2
from parley.v1 import participant_pb2 as pb

from .make import USER, Client, failure

MANY = 50


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    """Whatever goes, goes by itself: without load the collector may not come for minutes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def get(client: Client, **options: Any) -> Awaitable[Any]:
    request = message_pb2.GetMessageRequest(conversation_id=str(uuid4()), sequence=1)
    return client.messages.GetMessage(request, **options)  # type: ignore[no-any-return]


def send(client: Client, **options: Any) -> Awaitable[Any]:
    request = message_pb2.SendMessageRequest(
        conversation_id=str(uuid4()), role=USER, sender_id=str(uuid4()), content="hello"
    )
    return client.messages.SendMessage(request, **options)  # type: ignore[no-any-return]


async def cancelled(client: Client) -> None:
    call: Any = send(client)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def watch(client: Client) -> None:
    request = event_pb2.WatchRequest(conversation_id=str(uuid4()))
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in client.events.Watch(request):
            pass


CALLS: dict[str, Callable[[Client], Awaitable[Any]]] = {
    "a read of nothing": lambda client: failure(get(client)),
    "a write to nothing": lambda client: failure(send(client)),
    "a write under a lock": lambda client: failure(
        client.participants.AcceptInvitation(
            pb.AcceptInvitationRequest(conversation_id=str(uuid4()), user_id=str(uuid4()))
        )
    ),
    "a bad request": lambda client: failure(
        client.messages.SendMessage(message_pb2.SendMessageRequest())
    ),
    "a stranger": lambda client: failure(get(client, metadata=())),
    "too late": lambda client: failure(send(client, timeout=0.001)),
    "cancelled": cancelled,
    "a stream": watch,
}


@pytest.mark.parametrize("kind", CALLS)
async def test_a_burst_of_failures_leaves_no_call_behind(parley: Client, kind: str) -> None:
    for _ in range(MANY):
        await CALLS[kind](parley)
    await parley.user("ada")
    # What answers the last ones may still be on its way.
    async with asyncio.timeout(5):
        while contexts() > MANY // 10:
            await asyncio.sleep(0.05)


def contexts() -> int:
    """How many calls the server still knows."""
    return sum(type(each).__name__ == "_ServicerContext" for each in gc.get_objects())
