"""The synchronous client. (aio.py is the same for asyncio, line by line.)"""

import time
from collections.abc import Callable, Generator, Iterator
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
    """A client of the servers at a target: "parley.example:443", "ipv4:10.0.0.1:443,10.0.0.2:443".

    actor: the id or username of the user to act for; without, the calls are the system's.
    credentials: for TLS, if not with the authorities that grpc trusts by itself.
    plaintext: without TLS, on this machine or where something in front has it.
    timeout: the seconds that a call may take, all attempts together, unless it says otherwise;
        streams have no such limit.
    options: of the channel, beside ours and instead of those with the same names.
    """
    merged = tuple((CHANNEL | (options or {})).items())
    channel = (
        grpc.insecure_channel(target, merged)
        if plaintext
        else grpc.secure_channel(target, credentials or grpc.ssl_channel_credentials(), merged)
    )
    return Client(Calls(channel, Defaults.of(token, actor, timeout), _Unary, _Stream))


class Client:
    """Parley's services. Each has the RPCs of its proto, under their names:

    `parley.users.CreateUser(user_pb2.CreateUserRequest(...))`
    """

    def __init__(self, calls: Calls) -> None:
        """See connect."""
        self._calls = calls
        self._channel = cast(grpc.Channel, calls)

    @cached_property
    def users(self) -> user_pb2_grpc.UserServiceStub:
        return user_pb2_grpc.UserServiceStub(self._channel)

    @cached_property
    def conversations(self) -> conversation_pb2_grpc.ConversationServiceStub:
        return conversation_pb2_grpc.ConversationServiceStub(self._channel)

    @cached_property
    def participants(self) -> participant_pb2_grpc.ParticipantServiceStub:
        return participant_pb2_grpc.ParticipantServiceStub(self._channel)

    @cached_property
    def messages(self) -> message_pb2_grpc.MessageServiceStub:
        return message_pb2_grpc.MessageServiceStub(self._channel)

    @cached_property
    def events(self) -> event_pb2_grpc.EventServiceStub:
        return event_pb2_grpc.EventServiceStub(self._channel)

    @cached_property
    def live_messages(self) -> live_message_pb2_grpc.LiveMessageServiceStub:
        return live_message_pb2_grpc.LiveMessageServiceStub(self._channel)

    @cached_property
    def transfer(self) -> transfer_pb2_grpc.TransferServiceStub:
        return transfer_pb2_grpc.TransferServiceStub(self._channel)

    @cached_property
    def usage(self) -> usage_pb2_grpc.UsageServiceStub:
        return usage_pb2_grpc.UsageServiceStub(self._channel)

    def acting_as(self, actor: str | None) -> "Client":
        """The same for another user (id or username), or for the system, on the same connection."""
        return Client(self._calls.acting_as(actor))

    def watch(
        self, request: event_pb2.WatchRequest
    ) -> Generator[event_pb2.WatchResponse, None, None]:
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
                for response in call:
                    watch.received(response)
                    yield response
            except ParleyError as error:
                if not watch.helps_against(error):
                    raise
                broken = error
            finally:
                call.cancel()
            time.sleep(watch.pause(broken))

    def close(self) -> None:
        """Close the connection, and with it that of all who were made by acting_as."""
        self._calls.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def pages(method: Callable[[PageRequestT], PageT], request: PageRequestT) -> Iterator[PageT]:
    """Every page of a list from the request's on, each asked for when it is wanted:

    `for page in pages(parley.messages.ListMessages, request): ...page.messages...`
    """
    request = deepcopy(request)
    while True:
        page = method(request)
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


class _Unary:
    """A method that answers once."""

    def __init__(self, method: Any, defaults: Defaults) -> None:
        self._method = method
        self._defaults = defaults

    def __call__(self, request: Any, timeout: float | None = None, **options: Any) -> Any:
        return self.with_call(request, timeout, **options)[0]

    def with_call(self, request: Any, timeout: float | None = None, **options: Any) -> Any:
        """The answer, and the call, which knows the trailing metadata."""
        options = self._defaults.unary(timeout, options)
        with Translated():
            return self._method.with_call(repeatable(request), **options)

    def future(self, request: Any, timeout: float | None = None, **options: Any) -> "_Call":
        options = self._defaults.unary(timeout, options)
        return _Call(self._method.future(repeatable(request), **options))


class _Stream:
    """A method that answers with a stream, and perhaps takes one."""

    def __init__(self, method: Any, defaults: Defaults) -> None:
        self._method = method
        self._defaults = defaults

    def __call__(self, request: Any, timeout: float | None = None, **options: Any) -> "_Call":
        options = self._defaults.stream(timeout, options)
        return _Call(self._method(request, **options))


class _Call:
    """A call under way: grpc's, but for its errors."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        with Translated():
            return next(self._call)

    def result(self, timeout: float | None = None) -> Any:
        with Translated():
            return self._call.result(timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)
