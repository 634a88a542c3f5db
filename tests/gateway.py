"""A gateway that refuses each call once: what a retry policy is for.

But none of health, by which a client decides where to send calls at all.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

PASSED_ON = ("authorization", "x-parley-actor")


class Gateway(grpc.GenericRpcHandler):
    """Hands calls on to a service as they are, but is UNAVAILABLE when it first sees one."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        # Untyped, since it passes on bytes.
        self._channel: Any = channel
        self._seen: set[tuple[str, bytes]] = set()

    def service(self, call: Any) -> Any:
        metadata = [(key, value) for key, value in call.invocation_metadata if key in PASSED_ON]

        async def unary(request: bytes, context: Any) -> Any:
            await self._refuse_once(call.method, request, context)
            send = self._channel.unary_unary(call.method)
            try:
                return await send(request, metadata=metadata, timeout=context.time_remaining())
            except grpc.aio.AioRpcError as error:
                await _refuse(error, context)

        async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
            await self._refuse_once(call.method, request, context)
            receive = self._channel.unary_stream(call.method)
            try:
                async for response in receive(request, metadata=metadata):
                    yield response
            except grpc.aio.AioRpcError as error:
                await _refuse(error, context)

        if call.method.endswith("/Watch"):
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)

    async def _refuse_once(self, method: str, request: bytes, context: Any) -> None:
        if (method, request) not in self._seen and not method.startswith("/grpc.health."):
            self._seen.add((method, request))
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Not this time.")


async def _refuse(error: grpc.aio.AioRpcError, context: Any) -> None:
    await context.abort(error.code(), error.details(), tuple(error.trailing_metadata()))


@asynccontextmanager
async def refusing_once(address: str) -> AsyncIterator[str]:
    """The address of a gateway to the service at this one."""
    async with grpc.aio.insecure_channel(address) as channel:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Gateway(channel),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(grace=None)
