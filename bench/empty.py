"""The limit: a grpc.aio server with our messages that does nothing.

What it answers lies in memory. So what it costs is grpc itself, and what we cost beyond that is
ours.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop
from google.protobuf.timestamp_pb2 import Timestamp

from bench.corpus import bodies
from parley.v1 import (
    conversation_pb2,
    conversation_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
    message_pb2,
    message_pb2_grpc,
)

ID = "019a2b3c-4d5e-7f60-8123-456789abcdef"
ETAG = "1-89abcdef"
CURSOR = 132 * "c"
NOW = Timestamp(seconds=1_763_800_000, nanos=123_456_000)


class EmptyMessages(message_pb2_grpc.MessageServiceServicer):
    def __init__(self, events: "EmptyEvents") -> None:
        self._events = events
        self._texts = bodies(50)
        middle = sorted(self._texts, key=len)[len(self._texts) // 2]
        self._sent = message_pb2.SendMessageResponse(message=message(1, middle))
        self._got = message_pb2.GetMessageResponse(message=message(1, middle))

    async def SendMessage(
        self, request: message_pb2.SendMessageRequest, context: Any
    ) -> message_pb2.SendMessageResponse:
        self._events.tell(request.content)
        return self._sent

    async def GetMessage(
        self, request: message_pb2.GetMessageRequest, context: Any
    ) -> message_pb2.GetMessageResponse:
        return self._got

    async def ListMessages(
        self, request: message_pb2.ListMessagesRequest, context: Any
    ) -> message_pb2.ListMessagesResponse:
        """Builds its page anew, as whoever reads messages from anywhere must."""
        page = [message(sequence, text) for sequence, text in enumerate(self._texts, start=1)]
        return message_pb2.ListMessagesResponse(messages=page, next_page_token=64 * "t")


class EmptyConversations(conversation_pb2_grpc.ConversationServiceServicer):
    _got = conversation_pb2.GetConversationResponse(
        conversation=conversation_pb2.Conversation(
            id=ID,
            slug="a-conversation-k3x9",
            title="A conversation",
            creator_id=ID,
            is_active=True,
            members_may_invite=True,
            last_sequence=60,
            version=65,
            participant_count=5,
            etag=ETAG,
            last_activity_time=NOW,
            create_time=NOW,
            update_time=NOW,
        )
    )

    async def GetConversation(
        self, request: conversation_pb2.GetConversationRequest, context: Any
    ) -> conversation_pb2.GetConversationResponse:
        return self._got


class EmptyEvents(event_pb2_grpc.EventServiceServicer):
    """Whoever watches is told of every message as it comes, from memory, whatever it asked for."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[event_pb2.WatchResponse]] = set()

    def tell(self, content: str) -> None:
        if not self._queues:
            return
        event = event_pb2.Event(
            conversation_id=ID,
            version=66,
            type=event_pb2.Event.TYPE_MESSAGE_CREATED,
            actor_id=ID,
            sequence=61,
            revision=1,
            user_id=ID,
            message=message(61, content),
        )
        event.commit_time.GetCurrentTime()
        told = event_pb2.WatchResponse(events=[event], cursor=CURSOR)
        for queue in self._queues:
            queue.put_nowait(told)

    async def Watch(
        self, request: event_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[event_pb2.WatchResponse]:
        queue: asyncio.Queue[event_pb2.WatchResponse] = asyncio.Queue()
        self._queues.add(queue)
        try:
            yield event_pb2.WatchResponse(cursor=CURSOR, caught_up=True)
            while True:
                yield await queue.get()
        finally:
            self._queues.discard(queue)


def message(sequence: int, content: str) -> message_pb2.Message:
    """A message as large as ours, with the fields that ours has."""
    return message_pb2.Message(
        id=ID,
        conversation_id=ID,
        sequence=sequence,
        sender_id=ID,
        role=message_pb2.Message.ROLE_USER,
        status=message_pb2.Message.STATUS_COMPLETE,
        content=content,
        revision=1,
        etag=ETAG,
        create_time=NOW,
        update_time=NOW,
    )


async def serve(address: str) -> None:
    server = grpc.aio.server()
    events = EmptyEvents()
    event_pb2_grpc.add_EventServiceServicer_to_server(events, server)
    message_pb2_grpc.add_MessageServiceServicer_to_server(EmptyMessages(events), server)
    conversation_pb2_grpc.add_ConversationServiceServicer_to_server(EmptyConversations(), server)
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(os.environ["PARLEY_ADDRESS"]))
