"""What happens around each call, in order, and the only place that aborts one.

Time it, authenticate it, decode it, admit it, run it, answer or translate its error, log one line.
The wrapping is done once, where methods are registered: an interceptor object of grpc.aio would
look up and wrap a handler anew for each call.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass
from functools import partial
from inspect import isasyncgenfunction
from typing import Any, TypeVar
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
    NotFound,
    ParleyError,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    Unknown,
)
from service.identity import Call, Scope
from service.limits import CallRate
from service.metrics import MethodMetrics
from service.store import Store

log = structlog.get_logger()

DEFAULT_DEADLINE_SECONDS = 10.0
MAX_CALLS = 1_000
MAX_ATTEMPTS = 3
# While draining: so long nobody must have called, and so long that is waited for at most.
QUIET_SECONDS = 0.05
QUIET_LIMIT_SECONDS = 1.0
# How long after its end a call is logged and counted: by then the database has the next one.
NOTE_SECONDS = 0.002
# How long a request may have been on its way.
JOURNEY_SECONDS = 0.05
# For how long a stream's client may read nothing, and after how long it must show its credentials.
STALL_SECONDS = 30.0
READMIT_SECONDS = 5.0
MAX_VIOLATIONS = 20
MAX_DETAIL_BYTES = 4_096
MAX_MESSAGE_BYTES = 500
MAX_KNOWN_BYTES = 256

# The line of a mutation is its audit record: who, for whom, what, on what, and what came of it.
AUDITED = (
    "conversation_id",
    "user_id",
    "other_user_id",
    "sender_id",
    "message_id",
    "sequence",
    "request_id",
)
MAX_AUDITED = 100

# grpc's own types speak of its synchronous server.
Handler = Any
Handlers = dict[str, Handler]
Behavior = Callable[[Any, Call], Awaitable[ProtoMessage]]
Context = Any
Record = dict[str, object]
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC: who may call it, how its request is read, and what answers it."""

    name: str
    access: Access
    request: str
    decode: Callable[[bytes], ProtoMessage]
    # A Behavior; of a stream, an asynchronous generator function.
    behavior: Any
    # Whether the behavior looks itself whether its actor may act.
    checks_actor: bool
    # What the log tells of a mutation: the request's own names for what it changes.
    audited: tuple[str, ...]
    metrics: MethodMetrics


class Work:
    """What a call does, which may go on when nobody awaits its answer any more.

    The answer is a future of its own: to be told that a task has ended takes one more turn of the
    event loop.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.call: Call | None = None
        self.abandoned = False
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def succeed(self, answer: bytes) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
        else:
            self._bury(error)

    def abandon(self) -> None:
        self.abandoned = True
        if self.call:
            self.call.abandoned = True
        if self.answer.done() and not self.answer.cancelled():
            self._bury(self.answer.exception())

    def _bury(self, error: BaseException | None) -> None:
        """Nobody is left to hear of an error; a defect must be known all the same."""
        if error is not None and not isinstance(error, ParleyError):
            log.error("defect", **self.record, exc_info=error)


class Patience:
    """Ends the task that made it once one of its responses has waited for too long to be read.

    One timer for a stream: with asyncio.timeout around each write, telling one of 500 watchers of
    an event cost 60 µs instead of 40.
    """

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task
        self._task = task
        self._since: float | None = None
        self._is_over = False
        self._timer = self._start(STALL_SECONDS)

    def _start(self, seconds: float) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        waited = 0.0 if self._since is None else time.monotonic() - self._since
        if waited < STALL_SECONDS:
            self._timer = self._start(STALL_SECONDS - waited)
        else:
            self._is_over = True
            self._task.cancel()

    def close(self) -> None:
        self._timer.cancel()

    async def write(self, context: Context, response: bytes) -> None:
        """Hand the response to the client, which takes it when it reads."""
        # Those who are told of the same event write one right after the other, and grpc sends
        # what it gets so as one: between other work, each write cost 30 µs more.
        await asyncio.sleep(0)
        self._since = time.monotonic()
        try:
            await context.write(response)
        except grpc.aio.InternalError:
            # The client has gone, and grpc is about to say so.
            raise asyncio.CancelledError from None
        except asyncio.CancelledError:
            if self._is_over and not self._task.uncancel():
                raise ResourceExhausted("WATCH_TOO_SLOW", seconds=round(STALL_SECONDS)) from None
            raise
        self._since = None


class Interceptors:
    """Wraps servicers' methods. Knows which calls are running, so that a drain can await them."""

    def __init__(
        self,
        gatekeeper: Gatekeeper,
        store: Store,
        *,
        rate: CallRate | None = None,
        max_calls: int = MAX_CALLS,
        default_deadline: float = DEFAULT_DEADLINE_SECONDS,
    ) -> None:
        self._gatekeeper = gatekeeper
        self._store = store
        self._rate = rate or CallRate(0)
        self._max_calls = max_calls
        self._default_deadline = default_deadline
        self._running: set[asyncio.Task[None]] = set()
        self._streams: set[asyncio.Task[None]] = set()
        self._draining = False
        self._refused_at = 0.0
        # Calls that have ended, of which nothing was told yet.
        self._ended: list[tuple[Record, MethodMetrics, float]] = []

    @property
    def is_busy(self) -> bool:
        """Whether any call but a stream is at work."""
        return bool(self._running)

    def drain(self) -> None:
        """Refuse what is new from now on, and end the streams: a server that stops awaits them."""
        self._draining = True
        self._refused_at = time.monotonic()
        for stream in self._streams:
            stream.cancel()

    async def quiet(self) -> None:
        """Wait until callers have heard that they must go elsewhere.

        A server that stops answers a call that has arrived and not begun with CANCELLED
        (grpc/grpc#41785), which few clients repeat: those by our policy do, others do not.
        """
        limit = time.monotonic() + QUIET_LIMIT_SECONDS
        while time.monotonic() < min(self._refused_at + QUIET_SECONDS, limit):
            await asyncio.sleep(QUIET_SECONDS / 5)

    async def drained(self, seconds: float) -> None:
        """Wait for handlers that outlived their calls: their writes are still under way."""
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=seconds)
            if late:
                log.warning("calls_cut_off", count=len(late))
        self._tell()

    def service(self, descriptor: ServiceDescriptor, servicer: object | None) -> Handlers:
        """Handlers for each method of a service, those that the servicer lacks included."""
        return {method.name: self._handler(method, servicer) for method in descriptor.methods}

    def _handler(self, descriptor: MethodDescriptor, servicer: object | None) -> Handler:
        # A generated base class has every method; only what the servicer itself defines counts.
        if servicer is not None and descriptor.name in vars(type(servicer)):
            behavior: Any = getattr(servicer, descriptor.name)
        else:
            behavior = _unimplemented(descriptor.full_name)
        name = f"{descriptor.containing_service.full_name}/{descriptor.name}"
        kind = "server_stream" if descriptor.server_streaming else "unary"
        method = Method(
            name=name,
            access=access_of(descriptor),
            request=descriptor.input_type.name,
            decode=GetMessageClass(descriptor.input_type).FromString,
            behavior=behavior,
            checks_actor=getattr(behavior, "checks_actor", False),
            audited=_audited(descriptor),
            metrics=MethodMetrics("bidi_stream" if descriptor.client_streaming else kind, name),
        )

        # grpc asks what it is given whether it is a coroutine function, and believes it.
        async def unary(raw: bytes, context: Context) -> bytes:
            work = Work({"method": method.name})
            doing = self._outlive(work, method, raw, context)
            return await self._around(work.record, method.metrics, context, doing)

        async def stream(raw: bytes, context: Context) -> None:
            record: Record = {"method": method.name}
            send = partial(self._send, record, method, raw, context)
            await self._stream(record, method.metrics, context, send)

        async def stream_not_served(_: object, context: Context) -> None:
            refuse = partial(self._refuse, method, context)
            await self._stream({"method": method.name}, method.metrics, context, refuse)

        if descriptor.client_streaming:
            return grpc.stream_stream_rpc_method_handler(_released(stream_not_served))
        if descriptor.server_streaming and isasyncgenfunction(behavior):
            return grpc.unary_stream_rpc_method_handler(_released(stream))
        if descriptor.server_streaming:
            return grpc.unary_stream_rpc_method_handler(_released(stream_not_served))
        return grpc.unary_unary_rpc_method_handler(_released(unary))

    async def _outlive(self, work: Work, method: Method, raw: bytes, context: Context) -> bytes:
        """Do the work in a task of its own, which a client's cancel does not reach.

        A cancelled query would cost a pooled connection, and a write might be half told: the client
        is answered at once, the work ends as it must.
        """
        # Those that nobody awaits any more count too: they are at work all the same.
        if len(self._running) >= self._max_calls:
            raise Unavailable("OVERLOADED")
        metadata = context.invocation_metadata()
        task = asyncio.create_task(self._finish(work, method, raw, metadata))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        limit = self._default_deadline if context.time_remaining() is None else None
        try:
            answer = await asyncio.wait_for(work.answer, limit)
        except asyncio.CancelledError:
            work.abandon()
            raise
        except TimeoutError:
            if not work.answer.cancelled():
                raise
            work.abandon()
            raise DeadlineExceeded("DEADLINE_EXCEEDED") from None
        if work.call and work.call.trailers:
            context.set_trailing_metadata(tuple(work.call.trailers))
        return answer

    async def _finish(self, work: Work, method: Method, raw: bytes, metadata: Any) -> None:
        try:
            work.succeed(await self._do(work, method, raw, metadata))
        except Exception as error:
            work.fail(error)
        finally:
            work.answer.cancel()

    async def _do(self, work: Work, method: Method, raw: bytes, metadata: Any) -> bytes:
        request, call = await self._admit(work.record, method, raw, metadata)
        work.call = call
        if work.abandoned:
            raise DeadlineExceeded("DEADLINE_EXCEEDED")
        try:
            response = await _attempt(method.behavior, request, call)
        except (DeadlineExceeded, Unavailable, Unknown):
            raise
        except ParleyError:
            # Who may not act at all is told that, and nothing else.
            await self._gatekeeper.require_actor(call)
            raise
        return response.SerializeToString()

    async def _admit(
        self, record: Record, method: Method, raw: bytes, metadata: Any
    ) -> tuple[ProtoMessage, Call]:
        """The request and who makes it, noted in the record, if it may be made."""
        caller = await self._gatekeeper.authenticate(metadata)
        record["caller"] = caller.service
        request = _decode(method, raw)
        self._rate.take(caller.service)
        for name in method.audited:
            if value := getattr(request, name):
                record[name] = str(value)[:MAX_AUDITED]
        self._store.require_reachable()
        call = await self._gatekeeper.admit(
            method.name, method.access, caller, metadata, presume=method.checks_actor
        )
        record["actor"] = call.actor_id and str(call.actor_id)
        return request, call

    async def _send(self, record: Record, method: Method, raw: bytes, context: Context) -> None:
        """Send what a stream's method yields, as fast as the client reads.

        A stream may outlive the right to it: whether its caller and actor may still come in is
        asked again from time to time.
        """
        metadata = context.invocation_metadata()
        request, call = await self._admit(record, method, raw, metadata)
        admitted_at = time.monotonic()
        record["responses"] = count = 0
        try:
            with closing(Patience()) as patience:
                async with aclosing(method.behavior(request, call)) as responses:
                    async for response in responses:
                        if time.monotonic() - admitted_at > READMIT_SECONDS:
                            with suppress(Unavailable):
                                await self._readmit(method, metadata)
                            admitted_at = time.monotonic()
                        await patience.write(context, response.SerializeToString())
                        record["responses"] = count = count + 1
        except (NotFound, PermissionDenied):
            # Who may not act at all is told that, and nothing else.
            await self._readmit(method, metadata)
            raise

    async def _readmit(self, method: Method, metadata: Any) -> None:
        """Raise if the stream could not be opened any more."""
        caller = await self._gatekeeper.authenticate(metadata)
        await self._gatekeeper.admit(method.name, method.access, caller, metadata)

    def authenticated(self, service: str, handlers: Handlers) -> Handlers:
        """Bidirectional handlers of somebody else's (reflection), behind our credentials."""
        return {
            name: self._authenticated(f"{service}/{name}", handler)
            for name, handler in handlers.items()
        }

    def _authenticated(self, name: str, handler: Handler) -> Handler:
        metrics = MethodMetrics("bidi_stream", name)

        async def converse(requests: AsyncIterator[Any], context: Context) -> None:
            await self._gatekeeper.authenticate(context.invocation_metadata())
            async for response in handler.stream_stream(requests, context):
                await context.write(response)

        async def handle(requests: AsyncIterator[Any], context: Context) -> None:
            run = partial(converse, requests, context)
            await self._stream({"method": name}, metrics, context, run)

        return grpc.stream_stream_rpc_method_handler(
            _released(handle), handler.request_deserializer, handler.response_serializer
        )

    async def _refuse(self, method: Method, context: Context) -> None:
        await self._readmit(method, context.invocation_metadata())
        raise Unimplemented("NOT_IMPLEMENTED", method=method.name.replace("/", "."))

    async def _stream(
        self,
        record: Record,
        metrics: MethodMetrics,
        context: Context,
        run: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """Run a stream in a task of its own, which a drain can end."""

        async def until_drained() -> None:
            task = asyncio.create_task(run())
            self._streams.add(task)
            task.add_done_callback(self._streams.discard)
            try:
                await task
            except asyncio.CancelledError:
                if self._draining:
                    raise Unavailable("SHUTTING_DOWN") from None
                raise

        await self._around(record, metrics, context, until_drained())

    async def _around(
        self,
        record: Record,
        metrics: MethodMetrics,
        context: Context,
        work: Coroutine[Any, Any, Answer],
    ) -> Answer:
        """Time and count the work, translate its error, log one line once it is answered."""
        started = time.perf_counter()
        metrics.started()
        try:
            if self._draining:
                work.close()
                self._refused_at = time.monotonic()
                raise Unavailable("SHUTTING_DOWN")
            answer = await work
            record["code"] = "OK"
            return answer
        except asyncio.CancelledError:
            # The client's own deadline looks the same from here, and the clock began there first.
            left = context.time_remaining()
            is_late = left is not None and left <= JOURNEY_SECONDS
            record["code"] = "DEADLINE_EXCEEDED" if is_late else "CANCELLED"
            raise
        except Exception as raised:
            error = _known(raised)
            record.update(code=error.status, reason=error.reason)
            if isinstance(error, Internal):
                log.error("defect", **error.known, method=record["method"], exc_info=raised)
            raised.__traceback__ = None  # see _released
            await _abort(context, error)
            raise
        finally:
            self._note(record, metrics, time.perf_counter() - started)

    def _note(self, record: Record, metrics: MethodMetrics, seconds: float) -> None:
        """Log and count it, once nobody waits for that: neither for this answer, nor for the next
        one, for which a lone caller asks as soon as it has this one.
        """
        if not self._ended:
            asyncio.get_running_loop().call_later(NOTE_SECONDS, self._tell)
        self._ended.append((record, metrics, seconds))

    def _tell(self) -> None:
        ended, self._ended = self._ended, []
        for record, metrics, seconds in ended:
            record["ms"] = round(seconds * 1000, 2)
            metrics.ended(str(record.get("code", "UNKNOWN")), seconds)
            log.info("call", **record)


def _audited(method: MethodDescriptor) -> tuple[str, ...]:
    """The fields by which a mutation's or a stream's request names things; of a read, none.

    Nor of a login: people type their password where their name belongs.
    """
    scope = access_of(method).scope
    if scope is Scope.VERIFY_PASSWORD or (scope is Scope.READ and not method.server_streaming):
        return ()
    return tuple(name for name in AUDITED if name in method.input_type.fields_by_name)


async def _attempt(behavior: Behavior, request: Any, call: Call) -> ProtoMessage:
    """The method's answer. One that met another transaction and had no effect is tried again."""
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return await behavior(request, call)
        except Aborted as error:
            if error.reason != "CONFLICT":
                raise
            call.trailers.clear()
        except Unknown as error:
            return await _ask_again(behavior, request, call, error)
    return await behavior(request, call)


async def _ask_again(
    behavior: Behavior, request: Any, call: Call, unknown: Unknown
) -> ProtoMessage:
    """The answer of a call whose outcome could not be established: its request_id may know.

    A repetition that fails proves nothing about the first time.
    """
    if not getattr(request, "request_id", ""):
        raise unknown
    for _ in range(MAX_ATTEMPTS):
        call.trailers.clear()
        try:
            return await behavior(request, call)
        except Unavailable as error:
            await asyncio.sleep(error.retry_after or 0)
        except ParleyError:
            break
    raise unknown


def _unimplemented(method: str) -> Behavior:
    async def behavior(_: object, __: Call) -> ProtoMessage:
        raise Unimplemented("NOT_IMPLEMENTED", method=method)

    return behavior


def _decode(method: Method, raw: bytes) -> ProtoMessage:
    try:
        return method.decode(raw)
    except DecodeError:
        raise InvalidArgument("MALFORMED_REQUEST", message=method.request) from None


def _known(error: Exception) -> ParleyError:
    """The error as the caller may know it: everything unexpected is one opaque INTERNAL."""
    if isinstance(error, ParleyError):
        return error
    return Internal("INTERNAL", correlation_id=uuid4().hex)


def _released(
    handle: Callable[[Any, Context], Coroutine[Any, Any, Answer]],
) -> Callable[[Any, Context], Coroutine[Any, Any, Answer]]:
    """The same handler, which leaves nothing behind of a call that fails.

    A context holds the error that ended it, whose traceback holds the frames that hold the context:
    a ring, which goes when the garbage collector next comes by. Until then gRPC keeps the stream,
    and its overload protection counts it: a hundred failures in a row ended a connection for good,
    as nothing happened any more that would have made the collector come.
    """

    async def handle_and_forget(request: Any, context: Context) -> Answer:
        try:
            return await handle(request, context)
        except grpc.aio.AbortError as aborted:
            aborted.__traceback__ = None
            raise
        finally:
            del context

    return handle_and_forget


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
    status = status_pb2.Status(code=code, message=_cut(error.message, MAX_MESSAGE_BYTES))
    known = {key: _cut(value) for key, value in error.known.items()}
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
                resource_name=_cut(name),
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
                field=_cut(violation.field),
                reason=violation.reason,
                description=_cut(violation.description),
            )
        # Trailers beyond 8 KiB are dropped, and the error with them. This one travels in base64,
        # beside the message, in which a byte may become three.
        while status.ByteSize() + bad_request.ByteSize() > MAX_DETAIL_BYTES - 64:
            del bad_request.field_violations[-1]
        _add(status, bad_request)
    return status


def _cut(text: str, limit: int = MAX_KNOWN_BYTES) -> str:
    """The text as far as so many bytes hold it."""
    return text if len(text) * 4 <= limit else text.encode()[:limit].decode(errors="ignore")


def _add(status: status_pb2.Status, detail: ProtoMessage) -> None:
    status.details.add().Pack(detail)
