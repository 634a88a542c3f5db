"""What happens around each call, in order, and the only place that aborts one.

Time it, authenticate it, decode it, admit it, run it, answer or translate its error, log one line.
The wrapping is done once, where methods are registered: an interceptor object of grpc.aio would
look up and wrap a handler anew for each call.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any
from uuid import uuid4

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from service.access import Access, Gatekeeper, access_of
from service.errors import (
    DOMAIN,
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ParleyError,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from service.identity import Call

log = structlog.get_logger()

DEFAULT_DEADLINE_SECONDS = 10.0
MAX_ATTEMPTS = 3
MAX_VIOLATIONS = 20
MAX_DETAIL_BYTES = 4_096
MAX_MESSAGE_LENGTH = 500
MAX_KNOWN_LENGTH = 256

# grpc's own types speak of its synchronous server.
Handler = Any
Handlers = dict[str, Handler]
Behavior = Callable[[Any, Call], Awaitable[ProtoMessage]]
Context = Any


class Interceptors:
    """Wraps servicers' methods. Knows which calls are running, so that a drain can await them."""

    def __init__(self, gatekeeper: Gatekeeper) -> None:
        self._gatekeeper = gatekeeper
        self._running: set[asyncio.Task[ProtoMessage]] = set()
        self.draining = False

    async def drained(self) -> None:
        """Wait for handlers that outlived their calls: their writes are still under way."""
        while self._running:
            await asyncio.wait(self._running)

    def service(self, descriptor: ServiceDescriptor, servicer: object | None) -> Handlers:
        """Handlers for each method of a service, those that the servicer lacks included."""
        return {method.name: self._method(method, servicer) for method in descriptor.methods}

    def _method(self, method: MethodDescriptor, servicer: object | None) -> Handler:
        access = access_of(method)
        # A generated base class has every method; only what the servicer itself defines counts.
        if servicer is not None and method.name in vars(type(servicer)):
            behavior: Behavior = getattr(servicer, method.name)
        else:
            behavior = _unimplemented(method.full_name)
        if method.server_streaming or method.client_streaming:
            return self._stream_not_served(method, access)
        handle = self._unary(method, access, behavior)
        return grpc.unary_unary_rpc_method_handler(handle)

    def _unary(
        self, method: MethodDescriptor, access: Access, behavior: Behavior
    ) -> Callable[[bytes, Context], Coroutine[Any, Any, bytes]]:
        name = method.full_name.rpartition(".")[0] + "/" + method.name
        decode = GetMessageClass(method.input_type).FromString

        async def handle(raw: bytes, context: Context) -> bytes:
            started = time.perf_counter()
            record: dict[str, object] = {"method": name}
            try:
                if self.draining:
                    raise Unavailable("SHUTTING_DOWN")
                metadata = context.invocation_metadata()
                caller = await self._gatekeeper.authenticate(metadata)
                record["caller"] = caller.service
                request = _decode(decode, raw, method)
                call = await self._gatekeeper.admit(name, access, caller, metadata)
                record["actor"] = call.actor_id and str(call.actor_id)
                response = await self._run(behavior, request, call, context)
                if call.trailers:
                    context.set_trailing_metadata(tuple(call.trailers))
                answer = response.SerializeToString()
                record["code"] = "OK"
                return answer
            except asyncio.CancelledError:
                record["code"] = "CANCELLED"
                raise
            except Exception as raised:
                error = _known(raised)
                record.update(code=error.status, reason=error.reason)
                if isinstance(error, Internal):
                    log.error("defect", **error.known, method=name, exc_info=raised)
                await _abort(context, error)
                raise
            finally:
                record["ms"] = round((time.perf_counter() - started) * 1000, 2)
                log.info("call", **record)

        return handle

    async def _run(
        self, behavior: Behavior, request: ProtoMessage, call: Call, context: Context
    ) -> ProtoMessage:
        """Run the method in a task of its own, which a client's cancel does not reach.

        A cancelled query would cost a pooled connection, and a write might be half told: the client
        is answered at once, the work ends as it must.
        """
        task = asyncio.ensure_future(_attempt(behavior, request, call))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        remaining = context.time_remaining()
        limit = DEFAULT_DEADLINE_SECONDS if remaining is None else None
        try:
            return await asyncio.wait_for(asyncio.shield(task), limit)
        except TimeoutError:
            call.abandoned = True
            raise DeadlineExceeded("DEADLINE_EXCEEDED") from None
        except asyncio.CancelledError:
            call.abandoned = True
            # Nobody is left to hear of an error.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    def _stream_not_served(self, method: MethodDescriptor, access: Access) -> Handler:
        name = method.full_name.rpartition(".")[0] + "/" + method.name

        async def handle(_: object, context: Context) -> AsyncIterator[bytes]:
            metadata = context.invocation_metadata()
            try:
                caller = await self._gatekeeper.authenticate(metadata)
                await self._gatekeeper.admit(name, access, caller, metadata)
                raise Unimplemented("NOT_IMPLEMENTED", method=method.full_name)
            except ParleyError as error:
                log.info("call", method=name, code=error.status, reason=error.reason)
                await _abort(context, error)
            yield b""

        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(handle)
        return grpc.unary_stream_rpc_method_handler(handle)

    def authenticated(self, handlers: Handlers) -> Handlers:
        """Bidirectional handlers of somebody else's (reflection), behind our credentials."""
        return {name: self._authenticated(handler) for name, handler in handlers.items()}

    def _authenticated(self, handler: Handler) -> Handler:
        async def handle(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            try:
                await self._gatekeeper.authenticate(context.invocation_metadata())
            except ParleyError as error:
                await _abort(context, error)
            async for response in handler.stream_stream(requests, context):
                yield response

        return grpc.stream_stream_rpc_method_handler(
            handle, handler.request_deserializer, handler.response_serializer
        )


async def _attempt(behavior: Behavior, request: ProtoMessage, call: Call) -> ProtoMessage:
    """The method's answer. One that met another transaction and had no effect is tried again."""
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return await behavior(request, call)
        except Aborted as error:
            if error.reason != "CONFLICT":
                raise
            call.trailers.clear()
    return await behavior(request, call)


def _unimplemented(method: str) -> Behavior:
    async def behavior(_: object, __: Call) -> ProtoMessage:
        raise Unimplemented("NOT_IMPLEMENTED", method=method)

    return behavior


def _decode(
    decode: Callable[[bytes], ProtoMessage], raw: bytes, method: MethodDescriptor
) -> ProtoMessage:
    try:
        return decode(raw)
    except DecodeError:
        raise InvalidArgument("MALFORMED_REQUEST", message=method.input_type.name) from None


def _known(error: Exception) -> ParleyError:
    """The error as the caller may know it: everything unexpected is one opaque INTERNAL."""
    if isinstance(error, ParleyError):
        return error
    return Internal("INTERNAL", correlation_id=uuid4().hex)


async def _abort(context: Context, error: ParleyError) -> None:
    status = status_of(error)
    trailers: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", status.SerializeToString())
    ]
    if error.retry_after is not None:
        trailers.append(("grpc-retry-pushback-ms", str(int(error.retry_after * 1000))))
    await context.abort(
        grpc.StatusCode[error.status], status.message, trailing_metadata=tuple(trailers)
    )


def status_of(error: ParleyError) -> status_pb2.Status:
    """The error as google.rpc details: ErrorInfo always, the others where they apply."""
    code, _ = grpc.StatusCode[error.status].value
    status = status_pb2.Status(code=code, message=error.message[:MAX_MESSAGE_LENGTH])
    known = {key: value[:MAX_KNOWN_LENGTH] for key, value in error.known.items()}
    _add(
        status,
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=known),
    )
    if error.resource:
        kind, name = error.resource
        _add(
            status,
            error_details_pb2.ResourceInfo(
                resource_type=f"parley.v1.{kind.capitalize()}",
                resource_name=name[:MAX_KNOWN_LENGTH],
            ),
        )
    if isinstance(error, FailedPrecondition):
        precondition = error_details_pb2.PreconditionFailure()
        precondition.violations.add(
            type=error.reason, subject=error.field, description=status.message
        )
        _add(status, precondition)
    if isinstance(error, ResourceExhausted):
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject=error.known.get("subject", ""), description=status.message)
        _add(status, quota)
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_after * 1000))
        _add(status, retry)
    if isinstance(error, InvalidArgument):
        bad_request = error_details_pb2.BadRequest()
        for violation in error.violations[:MAX_VIOLATIONS]:
            bad_request.field_violations.add(
                field=violation.field[:MAX_KNOWN_LENGTH],
                reason=violation.reason,
                description=violation.description[:MAX_KNOWN_LENGTH],
            )
        # Trailers beyond 8 KiB are dropped, and the error with them.
        while status.ByteSize() + bad_request.ByteSize() > MAX_DETAIL_BYTES - 64:
            del bad_request.field_violations[-1]
        _add(status, bad_request)
    return status


def _add(status: status_pb2.Status, detail: ProtoMessage) -> None:
    status.details.add().Pack(detail)
