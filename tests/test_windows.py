"""Nobody reads what is not theirs, whoever comes and goes meanwhile.

Users join, leave, are removed, invited again and accept, at random, while others send without a
pause; everybody reads all the time, by every read there is. Each message that somebody saw must lie
in a window that was theirs at some moment of that read. `SEED` in the environment repeats the
choices of a run, `SENDS` sets its size.
"""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from parley.v1 import conversation_pb2, message_pb2, participant_pb2

from .make import ASSISTANT, SYSTEM, USER, Client, Conversation, Event, User
from .process import Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

USERS = 32
SENDS = int(os.environ.get("SENDS", "20000"))
SENDS_IN_FLIGHT = 64
SEED = int(os.environ.get("SEED", "1"))
# The longest pause between two moves, and two reads, of a user; and how long it watches.
MOVE_SECONDS, READ_SECONDS = 1.0, 0.5
WATCH_SECONDS = 0.5

MOVES = (
    "InviteParticipant",
    "AddParticipant",
    "AcceptInvitation",
    "DeclineInvitation",
    "LeaveConversation",
    "RemoveParticipant",
)
MESSAGES = (
    "get",
    "list_newest",
    "list_oldest",
    "list_by_sender",
    "list_around",
    "list_events",
    "watch",
    "follow",
    "list_around_first_unread",
    "batch_get",
    "search_here",
    "search_everywhere",
    "inbox",
)
COUNTS = ("last_sequence", "cursors")
READS = (*MESSAGES, *COUNTS)

JOINED = participant_pb2.Participant.STATUS_JOINED
INVITED = participant_pb2.Participant.STATUS_INVITED
STATUSES = [each for each in participant_pb2.Participant.Status.values() if each]


@dataclass
class Window:
    """What a user may read from `started` on, until the next window's operation has `ended`."""

    first: int
    final: int | None
    started: float
    ended: float = float("inf")

    def allows(self, sequence: int, call: str) -> bool:
        # How far others are is known back to the beginning, what they said is not.
        first = 1 if call in COUNTS else self.first
        return first <= sequence and (self.final is None or sequence <= self.final)


@dataclass
class Reader:
    """One user: its windows in order, and each of its reads."""

    user: User
    windows: list[Window] = field(default_factory=lambda: [Window(1, 0, 0.0)])
    # When a read began and ended, by which call, and what it showed.
    seen: list[tuple[float, float, str, list[int]]] = field(default_factory=list)

    def moved(self, started: float, participant: participant_pb2.Participant) -> None:
        self.windows[-1].ended = time.monotonic()
        final = (
            participant.visible_to_sequence if participant.HasField("visible_to_sequence") else None
        )
        self.windows.append(Window(participant.visible_from_sequence, final, started))

    def intrusions(self) -> list[str]:
        """Every message that no window of that moment allowed."""
        return [
            f"{self.user.username} saw {sequence} by {call} from {started} to {ended}: "
            f"{self.windows}"
            for started, ended, call, sequences in self.seen
            for sequence in sequences
            if not any(
                window.allows(sequence, call)
                for window in self.windows
                if window.started <= ended and window.ended >= started
            )
        ]


class Storm:
    """The conversation, everybody in it, and a count of what happened."""

    def __init__(self, parley: Client, talk: Conversation, owner: User) -> None:
        self.parley, self.talk, self.owner = parley, talk, owner
        self.random = random.Random(SEED)
        self.counted: Counter[str] = Counter()
        self.sent = 0

    @property
    def over(self) -> bool:
        return self.sent >= SENDS

    async def insist(self, call: Callable[[Any], Any], request: Any) -> Any:
        """Call, and again whenever the answer is that it is too busy, and had no effect."""
        while True:
            try:
                return await call(request)
            except grpc.aio.AioRpcError as error:
                if error.code().name not in ("UNAVAILABLE", "ABORTED"):
                    raise
                self.counted["overloaded"] += 1
                await asyncio.sleep(0.1)

    async def send(self) -> None:
        """One message, or several at once."""
        messages = self.parley.messages
        while not self.over:
            count = self.random.choice((1, 1, 30))
            drafts = [
                message_pb2.NewMessage(
                    sender_id=self.owner.id,
                    role=self.random.choice((USER, ASSISTANT, SYSTEM)),
                    content="x",
                )
                for _ in range(count)
            ]
            if count == 1:
                await self.insist(
                    messages.SendMessage,
                    message_pb2.SendMessageRequest(
                        conversation_id=self.talk.id,
                        sender_id=drafts[0].sender_id,
                        role=drafts[0].role,
                        content=drafts[0].content,
                    ),
                )
            else:
                await self.insist(
                    messages.BatchSendMessages,
                    message_pb2.BatchSendMessagesRequest(
                        conversation_id=self.talk.id, messages=drafts
                    ),
                )
            self.sent += count

    async def come_and_go(self, reader: Reader) -> None:
        """One move after the other, by the user itself or by the owner."""
        status = 0
        participants = self.parley.participants
        own = self.parley.acting_as(reader.user).participants
        pair = {"conversation_id": self.talk.id, "user_id": reader.user.id}
        while not self.over:
            hide = self.random.random() < 0.3
            started = time.monotonic()
            if status == JOINED:
                kind = self.random.choice(("LeaveConversation", "RemoveParticipant"))
                stub = own if kind.startswith("Leave") else participants
                request = getattr(participant_pb2, f"{kind}Request")(**pair)
            elif status == INVITED:
                kind = self.random.choice(("AcceptInvitation", "DeclineInvitation"))
                stub, request = own, getattr(participant_pb2, f"{kind}Request")(**pair)
            else:
                kind = self.random.choice(("AddParticipant", "InviteParticipant"))
                stub = participants
                request = getattr(participant_pb2, f"{kind}Request")(
                    **pair, invited_by_user_id=self.owner.id, hide_history=hide
                )
            participant = (await self.insist(getattr(stub, kind), request)).participant
            reader.moved(started, participant)
            status = participant.status
            self.counted[kind] += 1
            await asyncio.sleep(self.random.random() * MOVE_SECONDS)

    async def read(self, reader: Reader) -> None:
        """Every read that shows messages, at random."""
        client = self.parley.acting_as(reader.user)
        reads = [getattr(self, name) for name in READS]
        while not self.over:
            read = self.random.choice(reads)
            started = time.monotonic()
            try:
                sequences = await read(client)
                self.counted[read.__name__] += 1
            except grpc.aio.AioRpcError as error:
                code = error.code().name
                if code not in ("NOT_FOUND", "PERMISSION_DENIED", "UNAVAILABLE"):
                    raise
                self.counted["overloaded" if code == "UNAVAILABLE" else "refused"] += 1
                sequences = []
            reader.seen.append((started, time.monotonic(), read.__name__, sequences))
            await asyncio.sleep(self.random.random() * READ_SECONDS)

    async def get(self, client: Client) -> list[int]:
        sequence = self.random.randint(1, self.sent + 5)
        request = message_pb2.GetMessageRequest(conversation_id=self.talk.id, sequence=sequence)
        return [(await client.messages.GetMessage(request)).message.sequence]

    async def list_newest(self, client: Client) -> list[int]:
        return await self._list(client, page_size=20)

    async def list_oldest(self, client: Client) -> list[int]:
        return await self._list(client, page_size=20, order_by="sequence")

    async def list_by_sender(self, client: Client) -> list[int]:
        return await self._list(client, page_size=20, sender_id=self.owner.id)

    async def list_around(self, client: Client) -> list[int]:
        around = self.random.randint(1, self.sent + 5)
        return await self._list(client, page_size=20, around_sequence=around)

    async def list_around_first_unread(self, client: Client) -> list[int]:
        return await self._list(client, page_size=20, around_first_unread=True)

    async def batch_get(self, client: Client) -> list[int]:
        sequences = [self.random.randint(1, self.sent + 5) for _ in range(20)]
        request = message_pb2.BatchGetMessagesRequest(
            conversation_id=self.talk.id, sequences=sequences
        )
        found = (await client.messages.BatchGetMessages(request)).messages
        return [message.sequence for message in found]

    async def search_here(self, client: Client) -> list[int]:
        return await self._search(client, self.talk.id)

    async def search_everywhere(self, client: Client) -> list[int]:
        return await self._search(client)

    async def _search(self, client: Client, conversation_id: str = "") -> list[int]:
        """Every message says the same: whatever is looked at is found."""
        request = message_pb2.SearchMessagesRequest(
            query="x", conversation_id=conversation_id, page_size=20
        )
        response = await client.messages.SearchMessages(request)
        found = [result.message.sequence for result in response.results]
        if response.next_page_token:
            request.page_token = response.next_page_token
            response = await client.messages.SearchMessages(request)
            found += [result.message.sequence for result in response.results]
        return found

    async def inbox(self, client: Client) -> list[int]:
        """The last message that is shown there, whose unread ones are counted from the window."""
        request = conversation_pb2.ListUserConversationsRequest(statuses=STATUSES)
        lines = (await client.conversations.ListUserConversations(request)).user_conversations
        return [line.last_message.sequence for line in lines if line.HasField("last_message")]

    async def _list(self, client: Client, **filters: Any) -> list[int]:
        """Two pages: what a token leads to is authorised like any first page."""
        request = message_pb2.ListMessagesRequest(conversation_id=self.talk.id, **filters)
        page = await client.messages.ListMessages(request)
        found = [message.sequence for message in page.messages]
        if page.next_page_token:
            request.page_token = page.next_page_token
            page = await client.messages.ListMessages(request)
            found += [message.sequence for message in page.messages]
        return found

    async def list_events(self, client: Client) -> list[int]:
        page = await client.list_events(conversation_id=self.talk.id, page_size=1000)
        return _shown(page.events)

    async def watch(self, client: Client) -> list[int]:
        return await self._watch(client, conversation_id=self.talk.id)

    async def follow(self, client: Client) -> list[int]:
        return await self._watch(client, user_id="")

    async def _watch(self, client: Client, **scope: Any) -> list[int]:
        """A little of what happens now."""
        events: list[Event] = []
        call = client.watch(**scope)
        try:
            async with asyncio.timeout(WATCH_SECONDS):
                while response := await call.read():
                    events += response.events
        except TimeoutError:
            pass
        except grpc.aio.AioRpcError:
            if not events:
                raise
        finally:
            call.cancel()
        return _shown(events)

    async def last_sequence(self, client: Client) -> list[int]:
        """The last sequence that the conversation itself gives away."""
        request = conversation_pb2.GetConversationRequest(conversation_id=self.talk.id)
        last = (await client.conversations.GetConversation(request)).conversation.last_sequence
        return [last] if last else []

    async def cursors(self, client: Client) -> list[int]:
        """How far each participant that is shown has read."""
        request = participant_pb2.ListParticipantsRequest(conversation_id=self.talk.id)
        shown = (await client.participants.ListParticipants(request)).participants
        return [each.last_read_sequence for each in shown if each.last_read_sequence]


def _shown(events: Iterable[Event]) -> list[int]:
    """The messages that events show; in order, none twice."""
    told = [event.version for event in events]
    assert told == sorted(set(told))
    return [event.message.sequence for event in events if event.HasField("message")]


async def test_nobody_sees_what_is_outside_their_window(tmp_path: Path) -> None:
    service = Service(tmp_path)
    await service.start()
    async with service.channel() as channel:
        parley = Client(channel, service.token)
        owner = await parley.user("owner")
        talk = await parley.conversation(owner)
        readers = [Reader(await parley.user()) for _ in range(USERS)]
        storm = Storm(parley, talk, owner)

        await asyncio.gather(
            *(storm.send() for _ in range(SENDS_IN_FLIGHT)),
            *(storm.come_and_go(reader) for reader in readers),
            *(storm.read(reader) for reader in readers),
        )
    await service.stop()

    shown = sum(len(sequences) for reader in readers for _, _, _, sequences in reader.seen)
    print(f"\nseed {SEED}: {storm.sent} sends, {shown} messages shown, {dict(storm.counted)}")
    assert [each for reader in readers for each in reader.intrusions()] == []
    # A run in which nothing happened would prove nothing.
    assert all(storm.counted[each] >= 10 for each in (*MOVES, *READS, "refused")), storm.counted
    assert shown > 1_000


def test_the_checker_notices_an_intrusion() -> None:
    reader = Reader(User(username="eve"))
    reader.windows = [Window(1, 0, 0.0, 2.5), Window(3, None, 2.0, 5.5), Window(3, 7, 5.0)]

    def intrusions(started: float, ended: float, sequence: int, call: str = "get") -> int:
        reader.seen = [(started, ended, call, [sequence])]
        return len(reader.intrusions())

    assert intrusions(0.0, 1.0, 3) == 1
    assert intrusions(2.2, 2.3, 3) == 0
    assert intrusions(2.2, 2.3, 2) == 1
    assert intrusions(2.2, 2.3, 2, "last_sequence") == 0
    assert intrusions(6.0, 7.0, 8) == 1
    assert intrusions(6.0, 7.0, 8, "last_sequence") == 1
    assert intrusions(6.0, 7.0, 7) == 0
