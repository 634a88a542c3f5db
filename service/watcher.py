"""`parley watch`: what happens, a line an event, over gRPC like anybody else.

It goes on where it was when the server was away for a while.
"""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc

from parley.v1 import event_pb2, event_pb2_grpc, participant_pb2, user_pb2, user_pb2_grpc
from service.importer import channel_to

RETRY_SECONDS = 1.0
MAX_SHOWN = 100

Event = event_pb2.Event
Participant = participant_pb2.Participant
Metadata = tuple[tuple[str, str | bytes], ...]


class WatchFailedError(Exception):
    """The watch cannot go on; the text is one line that says why."""


def watch_request(
    *, conversation: str | None, user: str | None, oldest: bool
) -> event_pb2.WatchRequest:
    """A request to watch a conversation, a user or (neither) everything, as they are named."""
    request = event_pb2.WatchRequest()
    if conversation:
        request.conversation_id = conversation
    elif user:
        request.user_id = user
    else:
        request.everything = True
    if oldest:
        request.oldest = True
    return request


async def watch_lines(
    request: event_pb2.WatchRequest,
    *,
    address: str,
    token: str,
    actor: str | None = None,
    ca: Path | None = None,
) -> AsyncGenerator[str, None]:
    """A line for each event. By TLS where `ca` is given: the authority to trust."""
    metadata: Metadata = (("authorization", f"Bearer {token}"),)
    if actor:
        metadata += (("x-parley-actor-bin", actor.encode()),)
    async with channel_to(address, ca) as channel:
        stub = event_pb2_grpc.EventServiceStub(channel)
        names = Names(user_pb2_grpc.UserServiceStub(channel), metadata)
        while True:
            call = stub.Watch(request, metadata=metadata)
            try:
                async for response in call:
                    for event in response.events:
                        yield await names.line(event)
                    request.resume_cursor = response.cursor
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise WatchFailedError(error.details() or error.code().name) from error
                await asyncio.sleep(RETRY_SECONDS)
            finally:
                call.cancel()


class Names:
    """Tells events by the names of those who are concerned."""

    def __init__(self, users: "user_pb2_grpc.UserServiceAsyncStub", metadata: Metadata) -> None:
        self._users = users
        self._metadata = metadata
        self._names: dict[str, str] = {}

    async def line(self, event: Event) -> str:
        """The event in one line, whatever anybody wrote into it."""
        version = f"{event.version}"
        if event.through_version > event.version:
            version += f"-{event.through_version}"
        at = f"{event.commit_time.ToDatetime():%Y-%m-%d %H:%M:%S}"
        words = [
            at if event.HasField("commit_time") else " " * len(at),
            event.conversation_id,
            f"{version:>5}",
            Event.Type.Name(event.type).removeprefix("TYPE_").lower().replace("_", " "),
        ]
        if event.sequence:
            words.append(f"#{event.sequence}")
        if event.user_id:
            words.append(await self._name(event.user_id))
        if event.status:
            words.append(_standing(event.status, event.role))
        if event.HasField("message"):
            words.append(
                f"{await self._name(event.message.sender_id)}: {_shown(event.message.content)}"
            )
        if event.HasField("conversation"):
            words.append(_shown(event.conversation.title))
        if event.actor_id:
            words.append(f"by {await self._name(event.actor_id)}")
        if event.reason:
            words.append(f"({_shown(event.reason)})")
        return " ".join(words)

    async def _name(self, user_id: str) -> str:
        if not user_id:
            return "the system"
        if user_id not in self._names:
            request = user_pb2.GetUserRequest(user_id=user_id)
            try:
                found = await self._users.GetUser(request, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                return user_id
            self._names[user_id] = found.user.username
        return self._names[user_id]


def _standing(status: "Participant.Status.ValueType", role: "Participant.Role.ValueType") -> str:
    names = Participant.Status.Name(status), Participant.Role.Name(role)
    joined, as_what = (name.partition("_")[2].lower() for name in names)
    return f"is {joined} as {as_what}"


def _shown(text: str) -> str:
    """The beginning of a text, on one line and without anything that a terminal obeys."""
    short = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
    return "".join(c if c.isprintable() else " " for c in short)
