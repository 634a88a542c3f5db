"""`parley import`: conversations from files into a running server, over gRPC like anybody else.

A file holds one conversation a line (`.jsonl`, `.jsonl.gz`): see docs/import.md. Running it again
changes nothing: a conversation is found by its external_id, and continued where an earlier run was
cut off. Each batch carries the sequence at which it must begin and a request_id of its own, so it
can be repeated blindly, and somebody else's message in between is noticed.
"""

import asyncio
import gzip
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

import grpc
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from parley.v1 import (
    conversation_pb2,
    conversation_pb2_grpc,
    message_pb2,
    message_pb2_grpc,
    participant_pb2,
    user_pb2,
    user_pb2_grpc,
)
from service.batcher import Batcher

MAX_CHUNK_MESSAGES = 500
# Below the 3 MiB of a batch, with room for everything that is not content.
MAX_CHUNK_BYTES = 1 << 20
MAX_NAMES = 500
# Conversations at a time, and calls: as many as the server takes into one transaction.
CONCURRENCY = 32
# Batches of one conversation on their way at a time.
MAX_AHEAD = 4
MAX_CALLS = 64
CALL_SECONDS = 30.0
ATTEMPTS = 8
# Certain or likely to succeed if repeated; each call can be.
REPEATABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,
)

ResponseT = TypeVar("ResponseT", bound=ProtoMessage)


class SourceParticipant(BaseModel):
    model_config = ConfigDict(extra="ignore")

    username: str
    full_name: str | None = None


class SourceMessage(BaseModel):
    """One message. `reply_to` is the place of an earlier message, counted from 0."""

    model_config = ConfigDict(extra="ignore")

    sender: str
    role: Literal["user", "assistant", "system", "tool"]
    content: str
    metadata: dict[str, Any] = {}
    sent_at: datetime | None = None
    reply_to: int | None = None


class SourceConversation(BaseModel):
    """One line of a file."""

    model_config = ConfigDict(extra="ignore")

    source: str
    source_id: str
    title: str = ""
    participants: list[SourceParticipant]
    messages: list[SourceMessage]


class ImportFailedError(Exception):
    """The import cannot go on; the text is one line that says why."""


class _RefusedError(Exception):
    """One conversation cannot be imported; the others can."""


@dataclass(slots=True)
class Report:
    """What came of an import."""

    users: int = 0
    conversations: int = 0
    messages: int = 0
    known_conversations: int = 0
    known_messages: int = 0
    failures: list[str] = field(default_factory=list)


async def import_files(
    paths: Iterable[Path], *, address: str, token: str, ca: Path | None = None
) -> Report:
    """Import the files in order, several conversations at a time, showing progress.

    By TLS where `ca` is given: the certificate of the authority to trust.
    """
    report = Report()
    try:
        async with channel_to(address, ca) as channel:
            target = Importer(channel, token, report)
            with _progress(list(paths)) as lines:
                await _in_parallel(lines, target.conversation, report)
    except (OSError, EOFError) as error:
        raise ImportFailedError(f"cannot read the files: {error}") from error
    return report


def channel_to(address: str, ca: Path | None) -> grpc.aio.Channel:
    """By TLS where there is an authority's certificate to trust."""
    if ca is None:
        return grpc.aio.insecure_channel(address)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca.read_bytes()))


class Importer:
    """Puts conversations into a server, making the users that they need."""

    def __init__(self, channel: grpc.aio.Channel, token: str, report: Report) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._users = user_pb2_grpc.UserServiceStub(channel)
        self._conversations = conversation_pb2_grpc.ConversationServiceStub(channel)
        self._messages = message_pb2_grpc.MessageServiceStub(channel)
        self._report = report
        self._turns = asyncio.Semaphore(MAX_CALLS)
        # Of users that exist, or are being made: the id, or the name where that is not known.
        self._known: dict[str, asyncio.Task[str]] = {}
        self._found: Batcher[str, str] = Batcher(self._find, max_items=MAX_NAMES)

    async def conversation(self, external_id: str, source: SourceConversation) -> None:
        """One conversation with all that belongs to it; only what is missing of it."""
        people = await self._ensure_users(source)
        id, stored = await self._ensure_conversation(external_id, source.title, [*people.values()])
        if 0 < stored < len(source.messages):
            await self._require_prefix(id, stored, source)
        self._report.known_messages += min(stored, len(source.messages))
        await self._send(_batches(id, stored, source.messages, people))

    async def _send(self, batches: Iterable[message_pb2.BatchSendMessagesRequest]) -> None:
        """All in order, a few at a time: while one is stored, the next is made and on its way."""
        sending: list[asyncio.Task[None]] = []
        try:
            for batch in batches:
                before = sending[-1] if sending else None
                sending.append(asyncio.create_task(self._send_after(before, batch)))
                if len(sending) == MAX_AHEAD:
                    await sending.pop(0)
        finally:
            # What befell one befalls those behind it.
            ends = await asyncio.gather(*sending, return_exceptions=True)
        for end in ends:
            if end:
                raise end

    async def _send_after(
        self, before: asyncio.Task[None] | None, batch: message_pb2.BatchSendMessagesRequest
    ) -> None:
        try:
            await self._call(self._messages.BatchSendMessages, batch)
        except _CallError as error:
            if before is None or error.reason != "SEQUENCE_MISMATCH":
                raise
            # It has overtaken the one before it, or that one failed.
            await before
            await self._call(self._messages.BatchSendMessages, batch)
        self._report.messages += len(batch.messages)

    async def _ensure_users(self, source: SourceConversation) -> dict[str, str]:
        """By what the server knows each participant."""
        people = {person.username: person for person in source.participants}
        if new := people.keys() - self._known.keys():
            agents = _agents(source)
            for name in new:
                ensuring = self._ensure_user(people[name], is_agent=name in agents)
                self._known[name] = asyncio.create_task(ensuring)
        known = await asyncio.gather(*(self._known[name] for name in people))
        return dict(zip(people, known, strict=True))

    async def _ensure_user(self, person: SourceParticipant, *, is_agent: bool) -> str:
        found = await self._found.submit(person.username)
        return found or await self._make_user(person, is_agent=is_agent)

    async def _find(self, names: list[str]) -> list[str | Exception]:
        """The id of each user, the name where that is not told; nothing for those there are not."""
        request = user_pb2.BatchGetUsersRequest(user_ids=names)
        try:
            response = await self._call(self._users.BatchGetUsers, request)
        except ImportFailedError as error:
            # To ask for one at a time would not help.
            return [error] * len(names)
        ids = dict.fromkeys(response.missing_user_ids, "")
        ids.update((user.username, user.id) for user in response.users)
        return [ids.get(name, name) for name in names]

    async def _make_user(self, person: SourceParticipant, *, is_agent: bool) -> str:
        user = user_pb2.User(
            username=person.username,
            full_name=person.full_name or "",
            kind=user_pb2.User.KIND_AGENT if is_agent else user_pb2.User.KIND_HUMAN,
        )
        try:
            made = await self._call(self._users.CreateUser, user_pb2.CreateUserRequest(user=user))
        except _CallError as error:
            # Made by somebody else meanwhile, or by a call whose answer was lost.
            if error.reason != "USERNAME_TAKEN":
                raise
            return person.username
        self._report.users += 1
        return made.user.id

    async def _ensure_conversation(
        self, external_id: str, title: str, people: list[str]
    ) -> tuple[str, int]:
        """The conversation's id, and how many messages it has."""
        creator, *others = people
        request = conversation_pb2.CreateConversationRequest(
            conversation=conversation_pb2.Conversation(
                title=title, external_id=external_id, creator_id=creator
            ),
            participants=[participant_pb2.NewParticipant(user_id=other) for other in others],
        )
        try:
            made = await self._call(self._conversations.CreateConversation, request)
            self._report.conversations += 1
            return made.conversation.id, 0
        except _CallError as error:
            if error.reason != "EXTERNAL_ID_TAKEN":
                raise
            get = conversation_pb2.GetConversationRequest(conversation_id=error.resource)
        found = (await self._call(self._conversations.GetConversation, get)).conversation
        self._report.known_conversations += 1
        return found.id, found.last_sequence

    async def _require_prefix(self, id: str, stored: int, source: SourceConversation) -> None:
        """Raise unless what is stored is the beginning of what is to be imported."""
        request = message_pb2.GetMessageRequest(conversation_id=id, sequence=stored)
        last = (await self._call(self._messages.GetMessage, request)).message
        if last.content != source.messages[stored - 1].content:
            raise _RefusedError(f"message {stored} is another one there: somebody wrote to it")

    async def _call(
        self, method: Callable[..., Awaitable[ResponseT]], request: ProtoMessage
    ) -> ResponseT:
        """Call, and call again while that may help."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with self._turns:
                    return await method(request, metadata=self._metadata, timeout=CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                    raise ImportFailedError(f"{error.details()} Is PARLEY_TOKEN right?") from None
                if error.code() not in REPEATABLE:
                    raise _CallError(error) from None
                if attempt == ATTEMPTS:
                    raise ImportFailedError(
                        f"the server does not answer: {error.details()}"
                    ) from None
                await asyncio.sleep(min(0.1 * 2**attempt, 3.0))
        raise AssertionError("unreachable")


class _CallError(_RefusedError):
    """A call that was refused: its reason, and the record that the refusal names."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        super().__init__(error.details())
        self.reason = self.resource = ""
        # grpc.aio's Metadata is a mapping to look at, but not to copy from: go by its pairs.
        trailers = {key: value for key, value in error.trailing_metadata() or ()}  # noqa: C416
        status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
        for detail in status.details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                self.reason = error_details_pb2.ErrorInfo.FromString(detail.value).reason
            elif detail.Is(error_details_pb2.ResourceInfo.DESCRIPTOR):
                info = error_details_pb2.ResourceInfo.FromString(detail.value)
                self.resource = info.resource_name


def chunks(messages: list[SourceMessage], start: int) -> Iterator[range]:
    """The places from `start` on, cut into batches that one call may carry."""
    begin, size = start, 0
    for place in range(start, len(messages)):
        weight = len(messages[place].content.encode()) + 512
        if place > begin and (
            place - begin == MAX_CHUNK_MESSAGES or size + weight > MAX_CHUNK_BYTES
        ):
            yield range(begin, place)
            begin, size = place, 0
        size += weight
    if begin < len(messages):
        yield range(begin, len(messages))


def _batches(
    id: str, stored: int, messages: list[SourceMessage], people: dict[str, str]
) -> Iterator[message_pb2.BatchSendMessagesRequest]:
    for chunk in chunks(messages, stored):
        yield _batch(id, chunk, messages, people)


def _batch(
    id: str, chunk: range, messages: list[SourceMessage], people: dict[str, str]
) -> message_pb2.BatchSendMessagesRequest:
    request = message_pb2.BatchSendMessagesRequest(
        conversation_id=id,
        expected_last_sequence=chunk.start,
        request_id=f"import-{chunk.start}",
    )
    for place in chunk:
        source = messages[place]
        message = request.messages.add(
            sender_id=people[source.sender],
            role=message_pb2.Message.Role.Value(f"ROLE_{source.role.upper()}"),
            content=source.content,
        )
        if source.metadata:
            message.metadata.update(source.metadata)
        if source.sent_at:
            message.sent_time.FromDatetime(source.sent_at)
        if source.reply_to is not None:
            message.reply_to_sequence = source.reply_to + 1
    return request


def _agents(source: SourceConversation) -> set[str]:
    """Those who answer or call tools here, and never speak as a user."""
    roles: dict[str, set[str]] = {}
    for message in source.messages:
        roles.setdefault(message.sender, set()).add(message.role)
    return {
        name
        for name, spoken in roles.items()
        if spoken & {"assistant", "tool"} and "user" not in spoken
    }


# Reading

# Where a line stands, and the line.
Line = tuple[str, bytes]


async def _in_parallel(
    lines: Iterable[Line],
    work: Callable[[str, SourceConversation], Awaitable[None]],
    report: Report,
) -> None:
    """Several conversations at a time; one that is refused is noted, and the others go on."""
    seen: Counter[str] = Counter()

    async def one(place: str, line: bytes) -> None:
        try:
            source = SourceConversation.model_validate_json(line)
            await work(external_id_of(source, seen), source)
        except (_RefusedError, ValueError) as error:
            report.failures.append(f"{place}: {_why(error)}")

    # The file is read no faster than its conversations are taken.
    running: set[asyncio.Task[None]] = set()
    try:
        for place, line in lines:
            running.add(asyncio.create_task(one(place, line)))
            if len(running) == CONCURRENCY:
                running = await _any_of(running)
        while running:
            running = await _any_of(running)
    finally:
        for task in running:
            task.cancel()


async def _any_of(running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Wait for one, and raise what it raised; returns the others."""
    done, others = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return others


def external_id_of(source: SourceConversation, seen: Counter[str]) -> str:
    """Source and id; a second line that shares both is `#2`. Raises for one that cannot be."""
    if not source.participants:
        raise ValueError("it has no participants")
    strangers = {each.sender for each in source.messages} - {
        each.username for each in source.participants
    }
    if strangers:
        raise ValueError(f"'{min(strangers)}' speaks, but is no participant")
    name = f"{source.source}/{source.source_id}"
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


def _why(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


@contextmanager
def _progress(paths: list[Path]) -> Iterator[Iterator[Line]]:
    """The lines of all files, and a bar that follows how much of them was read."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task("reading", total=sum(path.stat().st_size for path in paths))

        def lines() -> Iterator[Line]:
            done = 0
            for path in paths:
                progress.update(bar, description=path.name)
                with path.open("rb") as raw, _plain(raw, path) as opened:
                    for number, line in enumerate(opened, start=1):
                        if line.strip():
                            yield f"{path.name}:{number}", line
                        progress.update(bar, completed=done + raw.tell())
                    done += raw.tell()

        yield lines()


def _plain(raw: BinaryIO, path: Path) -> BinaryIO:
    """The file's text, unpacked where its name says that it is packed."""
    return cast(BinaryIO, gzip.open(raw)) if path.suffix == ".gz" else raw
