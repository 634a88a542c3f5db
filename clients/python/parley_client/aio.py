"""The client for asyncio: what client.py is for threads, line by line."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from copy import deepcopy
from functools import cached_property
from types import TracebackType
from typing import Any, Self, cast

import grpc

from parley.v1 import (
    conversation_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
    live_message_pb2_grpc,
    message_pb2_grpc,
    participant_pb2_grpc,
    transfer_pb2_grpc,
    usage_pb2_grpc,
    user_pb2_grpc,
)
from parley_client.calls import (
    CHANNEL,
    DEADLINE_SECONDS,
    Calls,
    Defaults,
    Options,
    PageRequestT,
    PageT,
    Resumption,
    Translated,
    repeatable,
)
from parley_client.errors import ParleyError


def connect(
    target: str,
    *,
    token: str,
    actor: str | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    plaintext: bool = False,
    timeout: float = DEADLINE_SECONDS,
    options: Options | None = None,
) -> "Client":
    """As parley_client.connect, for `async with`; made where the event loop runs."""
    merged = tuple((CHANNEL | (options or {})).items())
    channel = (
        grpc.aio.insecure_channel(target, merged)
        if plaintext
        else grpc.aio.secure_channel(target, credentials or grpc.ssl_channel_credentials(), merged)
    )
    return Client(Calls(channel, Defaults.of(token, actor, timeout), _Unary, _Stream))


class Client:
    """Parley's services. Each has the RPCs of its proto, under their names:

    `await parley.users.CreateUser(user_pb2.CreateUserRequest(...))`
    """

    def __init__(self, calls: Calls) -> None:
        """See connect."""
        self._calls = calls
        self._channel = cast(grpc.aio.Channel, calls)

    @cached_property
    def users(self) -> "user_pb2_grpc.UserServiceAsyncStub":
        return user_pb2_grpc.UserServiceStub(self._channel)

    @cached_property
    def conversations(self) -> "conversation_pb2_grpc.ConversationServiceAsyncStub":
        return conversation_pb2_grpc.ConversationServiceStub(self._channel)

    @cached_property
    def participants(self) -> "participant_pb2_grpc.ParticipantServiceAsyncStub":
        return participant_pb2_grpc.ParticipantServiceStub(self._channel)

    @cached_property
    def messages(self) -> "message_pb2_grpc.MessageServiceAsyncStub":
        return message_pb2_grpc.MessageServiceStub(self._channel)

    @cached_property
    def events(self) -> "event_pb2_grpc.EventServiceAsyncStub":
        return event_pb2_grpc.EventServiceStub(self._channel)

    @cached_property
    def live_messages(self) -> "live_message_pb2_grpc.LiveMessageServiceAsyncStub":
        return live_message_pb2_grpc.LiveMessageServiceStub(self._channel)

    @cached_property
    def transfer(self) -> "transfer_pb2_grpc.TransferServiceAsyncStub":
        return transfer_pb2_grpc.TransferServiceStub(self._channel)

    @cached_property
    def usage(self) -> "usage_pb2_grpc.UsageServiceAsyncStub":
        return usage_pb2_grpc.UsageServiceStub(self._channel)

    def acting_as(self, actor: str | None) -> "Client":
        """The same for another user (id or username), or for the system, on the same connection."""
        return Client(self._calls.acting_as(actor))

    async def watch(
        self, request: event_pb2.WatchRequest
    ) -> AsyncGenerator[event_pb2.WatchResponse, None]:
        """What happens, for ever: where the stream breaks off, it goes on after what was yielded.

        To go on after a restart of your own, keep `response.cursor` beside what you made of
        `response.events`, and begin with it as the request's `resume_cursor`.

        Raises whatever repeating does not mend, such as PermissionDenied ACCESS_LOST or OutOfRange
        CURSOR_EXPIRED.
        """
        watch = Resumption(request)
        while True:
            call = self.events.Watch(watch.request)
            broken = None
            try:
                async for response in call:
                    watch.received(response)
                    yield response
            except ParleyError as error:
                if not watch.helps_against(error):
                    raise
                broken = error
            finally:
                call.cancel()
            await asyncio.sleep(watch.pause(broken))

    async def close(self) -> None:
        """Close the connection, and with it that of all who were made by acting_as."""
        await self._calls.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


async def pages(
    method: Callable[[PageRequestT], Awaitable[PageT]], request: PageRequestT
) -> AsyncGenerator[PageT, None]:
    """Every page of a list from the request's on, each asked for when it is wanted:

    `async for page in pages(parley.messages.ListMessages, request): ...page.messages...`
    """
    request = deepcopy(request)
    while True:
        page = await method(request)
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


class _Unary:
    """A method that answers once."""

    def __init__(self, method: Any, defaults: Defaults) -> None:
        self._method = method
        self._defaults = defaults

    def __call__(self, request: Any, timeout: float | None = None, **options: Any) -> "_Call":
        options = self._defaults.unary(timeout, options)
        return _Call(self._method(repeatable(request), **options))


class _Stream:
    """A method that answers with a stream, and perhaps takes one."""

    def __init__(self, method: Any, defaults: Defaults) -> None:
        self._method = method
        self._defaults = defaults

    def __call__(
        self, request: Any = None, timeout: float | None = None, **options: Any
    ) -> "_Call":
        options = self._defaults.stream(timeout, options)
        return _Call(self._method(request, **options))


class _Call:
    """A call under way: grpc's, but for its errors."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __await__(self) -> Generator[Any, None, Any]:
        with Translated():
            return (yield from self._call.__await__())

    async def __aiter__(self) -> AsyncGenerator[Any, None]:
        with Translated():
            async for response in self._call:
                yield response

    async def read(self) -> Any:
        with Translated():
            return await self._call.read()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)
