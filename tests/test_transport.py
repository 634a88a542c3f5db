"""What arrives below the calls: too much of it, the wrong kind, or nothing at all."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import psutil
import pytest

from parley.v1 import message_pb2, user_pb2
from service.server import MAX_REQUEST_BYTES, Server

from .make import Client, failure

CREATE_USER = "/parley.v1.UserService/CreateUser"


def open_call(parley: Client) -> Any:
    """A unary method, called with as many messages as one likes."""
    return parley.channel.stream_unary(CREATE_USER)


async def code(call: Awaitable[Any]) -> str:
    return (await failure(call)).code


async def test_a_request_beyond_the_limit_is_refused_and_one_below_is_read(parley: Client) -> None:
    def user(size: int) -> user_pb2.CreateUserRequest:
        return user_pb2.CreateUserRequest(user=user_pb2.User(full_name="x" * size))

    assert await code(parley.users.CreateUser(user(MAX_REQUEST_BYTES))) == "RESOURCE_EXHAUSTED"
    below = await failure(parley.users.CreateUser(user(MAX_REQUEST_BYTES - 100)))
    assert below.code == "INVALID_ARGUMENT"


async def test_a_compressed_request_is_read_and_one_that_bursts_is_not(parley: Client) -> None:
    def content(size: int) -> message_pb2.SendMessageRequest:
        return message_pb2.SendMessageRequest(content="0" * size)

    send = parley.messages.SendMessage
    before = psutil.Process().memory_info().rss
    bursting = content(64 << 20)
    beside = psutil.Process().memory_info().rss

    small = await failure(send(content(1_000), compression=grpc.Compression.Gzip))
    bomb = await failure(send(bursting, compression=grpc.Compression.Gzip))

    assert small.code == "INVALID_ARGUMENT"
    assert bomb.code == "RESOURCE_EXHAUSTED"
    # The client's own copies of it, and no server's.
    assert psutil.Process().memory_info().rss - before < 3 * (beside - before) + (32 << 20)


async def test_metadata_beyond_the_limit_is_refused(parley: Client) -> None:
    metadata = (*parley.metadata, ("x-long", "x" * (20 << 10)))

    assert await code(parley.users.CreateUser(user_pb2.CreateUserRequest(), metadata=metadata)) == (
        "RESOURCE_EXHAUSTED"
    )


@pytest.mark.parametrize(
    "path", ["/parley.v1.UserService/Nothing", "/parley.v1.Nothing/Get", "/", "/a/b/c"]
)
async def test_what_is_not_there_is_unimplemented(parley: Client, path: str) -> None:
    method: Any = parley.channel.unary_unary(path)
    call = method(b"", metadata=parley.metadata, timeout=5)

    assert await code(call) == "UNIMPLEMENTED"


async def test_a_unary_call_of_no_message_or_two_disturbs_nobody(parley: Client) -> None:
    """What gRPC does by itself: take the first of two, and for none let time run out."""

    def call(count: int) -> Any:
        return open_call(parley)(iter([b""] * count), metadata=parley.metadata, timeout=0.5)

    assert await code(call(2)) == "INVALID_ARGUMENT"
    assert await code(call(0)) == "DEADLINE_EXCEEDED"
    await parley.user()


async def test_a_request_that_never_comes_takes_nobodys_place(
    parley: Client, server: Server
) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    half = [open_call(parley)(nothing(), metadata=parley.metadata, timeout=0.5) for _ in range(50)]
    await asyncio.sleep(0.1)

    await parley.user("ada")
    assert {await code(each) for each in half} == {"DEADLINE_EXCEEDED"}


@pytest.mark.parametrize(
    "opening",
    [
        b"GET / HTTP/1.1\r\nHost: parley\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
        b"\x00\xff" * 5_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    ],
    ids=["HTTP/1", "TLS", "noise", "a bad frame"],
)
async def test_who_does_not_speak_grpc_is_hung_up_on_and_others_go_on(
    parley: Client, server: Server, opening: bytes
) -> None:
    host, _, port = server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(opening)

    await asyncio.wait_for(reader.read(), 15)  # until it is closed
    writer.close()
    await parley.user()
