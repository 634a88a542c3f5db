"""Writers, watchers and those who come and go, over one or several replicas, while somebody breaks
things; and in the end, what all of them saw.

Every change carries a request_id. Choices follow from the seed; their moments do not.
"""

import asyncio
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from parley.v1 import message_pb2, participant_pb2

from . import history as sends
from .feed_history import (
    ACCESS_LOST,
    Batch,
    FeedHistory,
    Reading,
    Resumption,
    Scope,
    State,
    due,
    places,
    violations,
)
from .history import Operation, Outcome, Stored, outcome_of
from .make import USER, Client, Conversation, Event, Message, Participant, User, failure_of

CALL_SECONDS = 6.0
# How long a call is repeated that has to succeed, and on a server that is known to be broken.
INSIST_SECONDS, BROKEN_SECONDS = 20.0, 1.0
# After so long a watch is cut.
CUT_SECONDS = (0.05, 0.5)
# A writer's pause between two calls, and a guest's between coming and going.
PAUSE_SECONDS, STAY_SECONDS = (0.0, 0.2), (0.1, 0.6)
# What a call may be told while the server, or what it needs, is away or busy.
AWAY = {"UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED"}
# And what it is told by a server that is broken: that is a finding, not the end of the storm.
DEFECTS = {"INTERNAL", "DATA_LOSS"}
# After these nothing more comes.
ENDS = {ACCESS_LOST, "CURSOR_EXPIRED", "INVALID_CURSOR"}


async def nothing() -> None:
    pass


@dataclass
class Storm:
    """`clients`: each on a channel of its own, to whichever replicas there are. `seconds`: how long
    it is meant to last.
    """

    clients: Sequence[Client]
    seed: int
    seconds: float
    talks: list[Conversation] = field(default_factory=list)
    log: list[Event] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    resumptions: list[Resumption] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    cuts: int = 0
    # How many cursors were resumed, by the kind of their scope.
    resumed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.choices = random.Random(self.seed)
        self._numbers = itertools.count()
        # The highest sequence that was acknowledged in each conversation.
        self._said: dict[str, int] = defaultdict(lambda: 1)
        self._stopping = False

    async def prepare(self, *, writers: int, talks: int) -> None:
        """Conversations with everybody in them who writes, and one who will go for good; in the
        first one some come and go, and some come late and are not to see what was before.
        """
        client = self.clients[0]
        self.writers = [await client.user() for _ in range(writers)]
        self.leavers = [await client.user() for _ in range(talks)]
        self.guests = [await client.user() for _ in range(2)]
        self.newcomers = [await client.user() for _ in range(2)]
        for n, leaver in enumerate(self.leavers):
            talk = await client.conversation(*self.writers, leaver, first=f"start {n}")
            self.talks.append(talk)
            self._note(self.writers[0], talk, f"start {n}", "", time.monotonic(), Outcome.OK)
        here = self.talks[0].id
        scopes = [
            Scope("everything"),
            *(Scope("conversation", talk.id) for talk in self.talks),
            *(
                Scope("conversation", talk.id, actor=leaver.id)
                for talk, leaver in zip(self.talks, self.leavers, strict=True)
            ),
            Scope("conversation", here, actor=self.newcomers[0].id, is_newcomer=True),
            Scope("user", self.writers[0].id),
            Scope("user", self.guests[0].id),
            Scope("user", self.leavers[0].id, actor=self.leavers[0].id),
            Scope("user", self.newcomers[1].id, actor=self.newcomers[1].id, is_newcomer=True),
        ]
        # Each scope twice: by one that is cut all the time, and by one that is not.
        self.readings = [Reading(scope) for scope in scopes for _ in range(2)]

    async def rage(
        self,
        meanwhile: Callable[[], Awaitable[None]],
        *,
        finale: Callable[[], Awaitable[None]] = nothing,
        patience: float,
    ) -> None:
        """Everybody at work until `meanwhile` ends; then `finale`, alone. Those who watch get so
        many seconds to come to the end of what they are due.
        """
        watching = [
            asyncio.create_task(self._watch(reading, is_cut=n % 2 == 0))
            for n, reading in enumerate(self.readings)
        ]
        try:
            async with asyncio.TaskGroup() as work:
                for n, writer in enumerate(self.writers):
                    work.create_task(self._write(n, writer))
                for n, leaver in enumerate(self.leavers):
                    work.create_task(self._leave(self.talks[n], leaver))
                for guest in self.guests:
                    work.create_task(self._come_and_go(guest))
                for newcomer in self.newcomers:
                    work.create_task(self._come_late(newcomer))
                await meanwhile()
                self._stopping = True
            await finale()
            self.log = await self._whole_log(time.monotonic() + patience)
            await self._until_read(time.monotonic() + patience)
        finally:
            for task in watching:
                task.cancel()
            ends = await asyncio.gather(*watching, return_exceptions=True)
        for end in ends:
            if end is not None and not isinstance(end, asyncio.CancelledError):
                raise end
        self.states = [await self._state(talk) for talk in self.talks]

    async def say(self, client: Client, talk: Conversation) -> None:
        """One more message, by this client, whatever comes of it."""
        await self._send(self.writers[0], talk, self._key(), client)

    async def entitle(self, client: Client, talk: Conversation) -> None:
        """One more title, in the same way."""
        await self._entitle(self.writers[0], talk, self._key(), client)

    async def resume(self, count: int) -> None:
        """Read each scope once more from its beginning; and what follows so many of the cursors
        seen, as many of each kind of scope.
        """
        points: dict[str, list[tuple[Scope, str, int]]] = defaultdict(list)
        for reading in self.readings:
            points[reading.scope.kind] += [(reading.scope, *point) for point in reading.points()]
        chosen = itertools.chain.from_iterable(
            zip(*(self.choices.sample(each, len(each)) for each in points.values()), strict=False)
        )
        picked = list(itertools.islice(chosen, count))
        self.resumed.update(scope.kind for scope, *_ in picked)
        scopes = dict.fromkeys(reading.scope for reading in self.readings)
        some = iter([*((scope, "", 0) for scope in scopes), *picked])

        async def work() -> None:
            for scope, cursor, before in some:
                self.resumptions.append(await self._resumed(scope, cursor, before))

        await asyncio.gather(*(work() for _ in range(4)))

    def violations(self) -> list[str]:
        """Everything that cannot be true of what was seen."""
        final = [_stored(message) for state in self.states for message in state.messages]
        acknowledged = [
            (each.conversation, each.stored.sequence) for each in self.operations if each.stored
        ]
        return [
            *(f"defect: {failed}" for failed in self._defects),
            *sends.violations(self.operations, final),
            *violations(
                FeedHistory(
                    log=self.log,
                    states=self.states,
                    readings=self.readings,
                    resumptions=self.resumptions,
                    batches=self.batches,
                    acknowledged=acknowledged,
                )
            ),
        ]

    def report(self) -> str:
        told = sum(len(places(reading.events)) for reading in self.readings)
        return (
            f"SEED={self.seed}: {len(self.log)} events in {len(self.talks)} conversations,"
            f" checked {told} times by {len(self.readings)} watchers with {self.cuts} cuts;"
            f" {self.resumed.total()} cursors resumed {dict(self.resumed)};"
            f" {sum(map(bool, (each.stored for each in self.operations)))} messages acknowledged;"
            f" calls that failed: {dict(self.failures)}"
        )

    # Those who write

    async def _write(self, n: int, writer: User) -> None:
        """Every other one is stubborn: it repeats a call under its request_id until it succeeds."""
        talk = self.talks[n % len(self.talks)]
        acts: list[Callable[[User, Conversation, str], Awaitable[bool]]] = [
            self._send,
            self._send_batch,
            self._entitle,
            self._read,
        ]
        while not self._stopping:
            (act,) = self.choices.choices(acts, [8, 2, 1, 2])
            key = self._key()
            while not await act(writer, talk, key) and n % 2 and not self._stopping:
                pass
            await asyncio.sleep(self.choices.uniform(*PAUSE_SECONDS))

    async def _send(
        self, writer: User, talk: Conversation, key: str, client: Client | None = None
    ) -> bool:
        started = time.monotonic()
        request = message_pb2.SendMessageRequest(
            conversation_id=talk.id, sender_id=writer.id, role=USER, content=key, request_id=key
        )
        response, outcome = await self._try(
            lambda client: client.messages.SendMessage(request, timeout=CALL_SECONDS), client
        )
        stored = _stored(response.message) if response else None
        self._note(writer, talk, key, key, started, outcome, stored)
        return response is not None

    async def _send_batch(self, writer: User, talk: Conversation, key: str) -> bool:
        started = time.monotonic()
        contents = [f"{key}, {n}" for n in range(3)]
        request = message_pb2.BatchSendMessagesRequest(
            conversation_id=talk.id,
            request_id=key,
            messages=[
                message_pb2.NewMessage(sender_id=writer.id, role=USER, content=content)
                for content in contents
            ],
        )
        response, outcome = await self._try(
            lambda client: client.messages.BatchSendMessages(request, timeout=CALL_SECONDS)
        )
        sent = response.sent_messages if response else [None] * len(contents)
        for content, each in zip(contents, sent, strict=True):
            stored = each and Stored(
                conversation=talk.id,
                sequence=each.sequence,
                id=each.id,
                content=content,
                sender=writer.id,
                created=each.create_time.ToNanoseconds(),
            )
            self._note(writer, talk, content, content, started, outcome, stored)
        if response:
            self.batches.append(Batch(talk.id, [each.sequence for each in response.sent_messages]))
        return response is not None

    async def _entitle(
        self, _writer: User, talk: Conversation, key: str, client: Client | None = None
    ) -> bool:
        response, _ = await self._try(
            lambda client: client.update(talk, title=f"as {key} says", request_id=key), client
        )
        return response is not None

    async def _read(self, writer: User, talk: Conversation, key: str) -> bool:
        sequence = self._said[talk.id]
        response, _ = await self._try(
            lambda client: client.mark_read(talk, writer, sequence, request_id=key)
        )
        return response is not None

    # Those who come and go

    async def _leave(self, talk: Conversation, leaver: User) -> None:
        await self._pause(self.choices.uniform(0.2, 0.8) * self.seconds)
        await self._remove(talk, leaver)

    async def _come_late(self, newcomer: User) -> None:
        await self._pause(self.choices.uniform(0.2, 0.6) * self.seconds)
        await self._add(newcomer, hide_history=True)

    async def _come_and_go(self, guest: User) -> None:
        while not self._stopping:
            await self._add(guest)
            await self._pause(self.choices.uniform(*STAY_SECONDS))
            await self._remove(self.talks[0], guest)
            await self._pause(self.choices.uniform(*STAY_SECONDS))

    async def _add(self, user: User, **values: Any) -> None:
        values |= {"request_id": self._key(), "invited_by_user_id": self.writers[0].id}
        await self._insist(lambda client: client.add(self.talks[0], user, **values))

    async def _remove(self, talk: Conversation, user: User) -> None:
        key = self._key()
        await self._insist(lambda client: client.remove(talk, user, request_id=key))

    async def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < until:
            await asyncio.sleep(0.05)

    # Those who watch

    async def _watch(self, reading: Reading, *, is_cut: bool) -> None:
        """Read for as long as there is something to read, from the last cursor each time, wherever
        that may be.
        """
        while not reading.ended:
            start = {"resume_cursor": reading.cursor} if reading.cursor else {"oldest": True}
            # In the end nobody comes anew: whoever does, has everybody look who waits beside it.
            goes_on = self._stopping or not is_cut
            limit = None if goes_on else self.choices.uniform(*CUT_SECONDS)
            call = self._as(reading.scope).watch(**reading.scope.asked, **start)
            stream: list[Any] = []
            reading.streams.append(stream)
            try:
                async with asyncio.timeout(limit):
                    while response := await call.read():
                        stream.append(response)
            except TimeoutError:
                self.cuts += 1
            except grpc.aio.AioRpcError as error:
                failed = failure_of(error)
                if failed.reason in ENDS:
                    reading.ended = failed.reason
                elif failed.code not in AWAY | DEFECTS | {"NOT_FOUND"}:
                    raise
                await asyncio.sleep(0.05)
            finally:
                call.cancel()

    async def _whole_log(self, deadline: float) -> list[Event]:
        """The whole log, once it has come to the versions that there are: a transaction of anybody
        else's may hold it up for a moment.
        """
        while True:
            log: list[Event] = await self._insist(lambda client: client.log(everything=True))
            reached = {event.conversation_id: event.version for event in log}
            states = [await self._state(talk) for talk in self.talks]
            versions = {each.conversation.id: each.conversation.version for each in states}
            if reached == versions or time.monotonic() > deadline:
                return log
            await asyncio.sleep(0.1)

    async def _until_read(self, deadline: float) -> None:
        for reading in self.readings:
            dues = len(due(self.log, reading.scope))
            while len(places(reading.events)) < dues and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
        # Whatever came twice, or was not to come, still may.
        await asyncio.sleep(0.1)

    async def _resumed(self, scope: Scope, cursor: str, before: int) -> Resumption:
        """What follows a cursor: page by page, or by a watch that catches up."""
        found: list[Event] = []
        read = self._catch_up if self.choices.random() < 0.5 else self._page
        try:
            await read(scope, cursor, found)
        except grpc.aio.AioRpcError as error:
            failed = failure_of(error)
            # Who has lost its access, or never had any, is due nothing more.
            if failed.reason != ACCESS_LOST and failed.code != "NOT_FOUND":
                if failed.reason not in ENDS:
                    raise
                return Resumption(scope, before, found, failed.reason)
        return Resumption(scope, before, found)

    async def _catch_up(self, scope: Scope, cursor: str, found: list[Event]) -> None:
        start = {"resume_cursor": cursor} if cursor else {"oldest": True}
        call = self._as(scope).watch(**scope.asked, **start)
        while response := await call.read():
            found += response.events
            if response.caught_up:
                call.cancel()
                return

    async def _page(self, scope: Scope, cursor: str, found: list[Event]) -> None:
        client, size = self._as(scope), self.choices.choice((100, 1000))
        # A cursor that does not move on is found out by what it leads to.
        while len(found) <= len(self.log):
            page = await client.list_events(**scope.asked, resume_cursor=cursor, page_size=size)
            found += page.events
            cursor = page.cursor
            if page.caught_up:
                return

    def _as(self, scope: Scope) -> Client:
        client = self.choices.choice(self.clients)
        return client.acting_as(scope.actor) if scope.actor else client

    # Calls

    def _key(self) -> str:
        return f"storm {self.seed}: {next(self._numbers)}"

    async def _try(
        self, call: Callable[[Client], Awaitable[Any]], client: Client | None = None
    ) -> tuple[Any, Outcome]:
        """The answer to a call by that client, or by any; None where there is none for now."""
        try:
            return await call(client or self.choices.choice(self.clients)), Outcome.OK
        except grpc.aio.AioRpcError as error:
            failed = failure_of(error)
            if failed.code not in AWAY | DEFECTS:
                raise
            self.failures[f"{failed.code} {failed.reason}".strip()] += 1
            await asyncio.sleep(failed.retry_seconds or 0.02)
            return None, outcome_of(failed.code, failed.reason)

    async def _state(self, talk: Conversation) -> State:
        """As Get and List show it in the end."""
        found: State = await self._insist(lambda client: state_of(client, talk))
        return found

    async def _insist(self, call: Callable[[Client], Awaitable[Any]]) -> Any:
        """The answer, sooner or later; None where it does not come."""
        started = time.monotonic()
        while (found := (await self._try(call))[0]) is None:
            limit = BROKEN_SECONDS if self._defects else INSIST_SECONDS
            if time.monotonic() > started + limit:
                break
        return found

    @property
    def _defects(self) -> list[str]:
        return [failed for failed in self.failures if failed.split()[0] in DEFECTS]

    def _note(
        self,
        client: User,
        talk: Conversation,
        content: str,
        request_id: str,
        started: float,
        outcome: Outcome,
        stored: Stored | None = None,
    ) -> None:
        if stored:
            self._said[talk.id] = max(self._said[talk.id], stored.sequence)
        self.operations.append(
            Operation(
                client=client.id,
                conversation=talk.id,
                content=content,
                request_id=request_id,
                started=started,
                ended=time.monotonic(),
                outcome=outcome,
                stored=stored,
            )
        )


async def state_of(client: Client, talk: Conversation) -> State:
    listed = await client.participants.ListParticipants(
        participant_pb2.ListParticipantsRequest(
            conversation_id=talk.id, page_size=1000, statuses=Participant.Status.values()[1:]
        )
    )
    messages = await client.all_messages(talk)
    return State(await client.seen(talk), listed.participants, messages)


def _stored(message: Message) -> Stored:
    return Stored(
        conversation=message.conversation_id,
        sequence=message.sequence,
        id=message.id,
        content=message.content,
        sender=message.sender_id,
        created=message.create_time.ToNanoseconds(),
    )
