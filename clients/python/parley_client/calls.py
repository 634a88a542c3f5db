"""What the synchronous and the asynchronous client have in common: what goes with every call."""

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.resources import files
from types import TracebackType
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import grpc

from parley.v1 import event_pb2
from parley_client.errors import ParleyError, ResourceExhausted, Unavailable, error_of

Metadata = tuple[tuple[str, str | bytes], ...]
Options = dict[str, Any]
# Of a method of the channel.
Wrapper = Callable[[Any, "Defaults"], Any]

DEADLINE_SECONDS = 10.0
# Between two tries of a watch: from, to.
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.1, 5.0

CHANNEL: Options = {
    # The policy that all clients of Parley share: clients/service-config.json.
    "grpc.service_config": files(__package__).joinpath("service-config.json").read_text(),
    # What is larger is not repeated: gRPC would keep 256 KiB, and a request may have 4 MiB.
    "grpc.per_rpc_retry_buffer_size": 5 << 20,
    # A connection that died without a word is noticed within 40 seconds, a silent watch's too.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.http2.max_pings_without_data": 0,
    # A server that was restarted is found again soon.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 5_000,
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a call has unless it says otherwise."""

    # The token, and the actor if there is one.
    metadata: Metadata = field(repr=False)
    # Seconds, for a call that is not a stream.
    timeout: float

    @classmethod
    def of(cls, token: str, actor: str | None, timeout: float) -> "Defaults":
        return cls((("authorization", f"Bearer {token}"),), timeout).acting_as(actor)

    def acting_as(self, actor: str | None) -> "Defaults":
        metadata = tuple(each for each in self.metadata if each[0] == "authorization")
        if actor is not None:
            # Metadata is ASCII, but for keys that end so.
            metadata += (("x-parley-actor-bin", actor.encode()),)
        return Defaults(metadata, self.timeout)

    def unary(self, timeout: float | None, options: Options) -> Options:
        return self.stream(self.timeout if timeout is None else timeout, options)

    def stream(self, timeout: float | None, options: Options) -> Options:
        metadata = self.metadata + tuple(options.get("metadata") or ())
        return options | {"timeout": timeout, "metadata": metadata}


@dataclass(frozen=True, slots=True)
class Calls:
    """A channel, as far as a stub knows it, whose calls have our defaults and raise our errors.

    (grpc's interceptors could do it too; in grpc.aio they cost a task for each call.)
    """

    channel: Any
    defaults: Defaults
    unary: Wrapper
    stream: Wrapper
    # The channel's own methods: dear to make, and the same for every actor.
    methods: Options = field(default_factory=dict)

    def acting_as(self, actor: str | None) -> "Calls":
        return replace(self, defaults=self.defaults.acting_as(actor))

    def unary_unary(self, name: str, *codecs: Any, **named: Any) -> Any:
        return self.unary(self._method("unary_unary", name, *codecs, **named), self.defaults)

    def unary_stream(self, name: str, *codecs: Any, **named: Any) -> Any:
        return self.stream(self._method("unary_stream", name, *codecs, **named), self.defaults)

    def stream_stream(self, name: str, *codecs: Any, **named: Any) -> Any:
        return self.stream(self._method("stream_stream", name, *codecs, **named), self.defaults)

    def _method(self, kind: str, name: str, *codecs: Any, **named: Any) -> Any:
        if name not in self.methods:
            self.methods[name] = getattr(self.channel, kind)(name, *codecs, **named)
        return self.methods[name]


class Translated:
    """Lets grpc's errors out as ours."""

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, grpc.RpcError) and not isinstance(error, ParleyError):
            raise error_of(error) from None


def repeatable(request: Any) -> Any:
    """The request, under a request_id if it can have one: a retry then has no second effect.

    The caller's own stays as it is. Sent once more, it is another call.
    """
    if "request_id" not in request.DESCRIPTOR.fields_by_name or request.request_id:
        return request
    request = deepcopy(request)
    request.request_id = str(uuid4())
    return request


class PageRequest(Protocol):
    """A request for a page."""

    page_token: str


class Page(Protocol):
    """A page that says how to ask for the next one."""

    @property
    def next_page_token(self) -> str: ...


PageRequestT = TypeVar("PageRequestT", bound=PageRequest)
PageT = TypeVar("PageT", bound=Page)


class Resumption:
    """A watch that goes on: what to ask for next, and when."""

    def __init__(self, request: event_pb2.WatchRequest) -> None:
        self.request = deepcopy(request)
        self._begun = False
        self._failures = 0

    def received(self, response: event_pb2.WatchResponse) -> None:
        self.request.resume_cursor = response.cursor
        self._begun = True
        self._failures = 0

    def helps_against(self, error: ParleyError) -> bool:
        """Whether to go on after an error.

        A watch that was cut off may still be counted while the next one begins, so that there seem
        to be too many.
        """
        if isinstance(error, ResourceExhausted):
            return error.reason == "WATCH_TOO_SLOW" or (
                self._begun and error.reason == "RATE_LIMITED"
            )
        return isinstance(error, Unavailable)

    def pause(self, error: ParleyError | None = None) -> float:
        """The seconds until the next try: longer each time, and never the same for all."""
        seconds = min(FIRST_PAUSE_SECONDS * 2.0 ** min(self._failures, 10), LAST_PAUSE_SECONDS)
        self._failures += 1
        told = error.retry_after if error else None
        return max(seconds, told or 0.0) * random.uniform(1.0, 1.5)
