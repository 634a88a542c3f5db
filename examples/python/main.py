"""Parley from Python, on the generated stubs alone: the story that each example here tells."""

import asyncio
import os
from collections.abc import AsyncIterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from parley.v1.conversation_pb2 import Conversation, CreateConversationRequest
from parley.v1.conversation_pb2_grpc import ConversationServiceStub
from parley.v1.event_pb2 import Event, WatchRequest, WatchResponse
from parley.v1.event_pb2_grpc import EventServiceStub
from parley.v1.message_pb2 import ListMessagesRequest, Message, SendMessageRequest
from parley.v1.message_pb2_grpc import MessageServiceStub
from parley.v1.participant_pb2 import (
    AcceptInvitationRequest,
    InviteParticipantRequest,
    Participant,
)
from parley.v1.participant_pb2_grpc import ParticipantServiceStub
from parley.v1.user_pb2 import CreateUserRequest, User
from parley.v1.user_pb2_grpc import UserServiceStub

DEADLINE = 10.0  # seconds, of one call with its retries

# Which calls are made again, and when: published with the protos, carried out by gRPC.
SERVICE_CONFIG = Path(__file__).parents[2] / "clients" / "service-config.json"


async def main() -> None:
    options = [("grpc.service_config", SERVICE_CONFIG.read_text())]
    async with grpc.aio.insecure_channel(os.environ["PARLEY_ADDRESS"], options) as channel:
        story = Story(channel, run=uuid4().hex[:8])
        await story.meet()
        await story.invite()
        await story.talk()
        await story.collide()
        await story.page_back()
        await story.follow()


def acting_as(actor: str) -> list[tuple[str, str]]:
    """The metadata that says who calls, and for which user; for none, the caller is the system."""
    metadata = [("authorization", f"Bearer {os.environ['PARLEY_TOKEN']}")]
    return [*metadata, ("x-parley-actor", actor)] if actor else metadata


def reason(error: grpc.aio.AioRpcError) -> str:
    """Why the server refused a call, to branch on; empty where it did not say."""
    status, info = rpc_status.from_call(error), ErrorInfo()
    unpacked = any(detail.Unpack(info) for detail in (status.details if status else ()))
    return info.reason if unpacked else ""


class Story:
    def __init__(self, channel: grpc.aio.Channel, *, run: str) -> None:
        self.users = UserServiceStub(channel)
        self.conversations = ConversationServiceStub(channel)
        self.participants = ParticipantServiceStub(channel)
        self.messages = MessageServiceStub(channel)
        self.events = EventServiceStub(channel)
        self.ada, self.ben, self.slug = f"ada-{run}", f"ben-{run}", f"lunch-{run}"

    async def meet(self) -> None:
        """Make two users, which only the system may, and a conversation of one of them."""
        for username in (self.ada, self.ben):
            request = CreateUserRequest(user=User(username=username), request_id=str(uuid4()))
            await self.users.CreateUser(request, metadata=acting_as(""), timeout=DEADLINE)
        print(f"users: {self.ada} and {self.ben}")

        await self.create(self.slug)
        print(f"conversation: {self.slug}")

    async def create(self, slug: str) -> None:
        conversation = Conversation(slug=slug, title="Lunch")
        request = CreateConversationRequest(conversation=conversation, request_id=str(uuid4()))
        await self.conversations.CreateConversation(
            request, metadata=acting_as(self.ada), timeout=DEADLINE
        )

    async def invite(self) -> None:
        """Bring Ben in: Ada asks, he accepts."""
        invited = await self.participants.InviteParticipant(
            InviteParticipantRequest(
                conversation_id=self.slug, user_id=self.ben, request_id=str(uuid4())
            ),
            metadata=acting_as(self.ada),
            timeout=DEADLINE,
        )
        print(f"invited: {Participant.Status.Name(invited.participant.status)}")

        accepted = await self.participants.AcceptInvitation(
            AcceptInvitationRequest(conversation_id=self.slug, request_id=str(uuid4())),
            metadata=acting_as(self.ben),
            timeout=DEADLINE,
        )
        print(f"accepted: {Participant.Status.Name(accepted.participant.status)}")

    async def talk(self) -> None:
        """Send a message twice under one request_id, as if the answer had been lost: it is one."""
        request_id = str(uuid4())
        first = await self.send(self.ada, "Lunch?", request_id)
        again = await self.send(self.ada, "Lunch?", request_id)
        print(f"sent: {first.sequence} {first.content}")
        print(f"sent again: {again.sequence} {again.content}")

        await self.send(self.ben, "At one.", str(uuid4()))
        await self.send(self.ada, "Where?", str(uuid4()))
        await self.send(self.ben, "The usual place.", str(uuid4()))
        await self.send(self.ada, "See you.", str(uuid4()))

    async def send(self, sender: str, content: str, request_id: str) -> Message:
        request = SendMessageRequest(
            conversation_id=self.slug,
            role=Message.ROLE_USER,
            content=content,
            request_id=request_id,
        )
        response = await self.messages.SendMessage(
            request, metadata=acting_as(sender), timeout=DEADLINE
        )
        return response.message

    async def collide(self) -> None:
        """Ask for a slug that is taken: the status tells the kind of error, the reason which."""
        try:
            await self.create(self.slug)
        except grpc.aio.AioRpcError as error:
            if reason(error) != "SLUG_TAKEN":
                raise
            await self.create(f"{self.slug}-2")
            print(f"refused: SLUG_TAKEN, so {self.slug}-2")

    async def page_back(self) -> None:
        """Read from the newest message to the first; the last page has no next_page_token."""
        request = ListMessagesRequest(conversation_id=self.slug, page_size=2)
        while True:
            page = await self.messages.ListMessages(
                request, metadata=acting_as(self.ada), timeout=DEADLINE
            )
            lines = [f"{message.sequence} {message.content}" for message in page.messages]
            print(f"page: {' | '.join(lines)}")
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token

    async def follow(self) -> None:
        """Watch from the first event on, be cut off, and go on from the cursor."""
        stream = self.watch(oldest=True)
        live = await self.send(self.ben, "On my way.", str(uuid4()))
        cursor = await read_until(stream, live)
        stream.cancel()
        print("cut")

        missed = await self.send(self.ben, "Here I am.", str(uuid4()))
        await read_until(self.watch(resume_cursor=cursor), missed)

    def watch(self, **start: Any) -> grpc.aio.UnaryStreamCall[WatchRequest, WatchResponse]:
        """A stream lasts as long as it is wanted: it has no deadline."""
        request = WatchRequest(conversation_id=self.slug, **start)
        return self.events.Watch(request, metadata=acting_as(self.ada))


async def read_until(stream: AsyncIterable[WatchResponse], message: Message) -> str:
    """Print events until the message has come; the cursor to go on from.

    A cursor stands behind all events of its response: keep it only when they are dealt with.
    """
    async for response in stream:
        for event in response.events:
            print(f"event: {event.version} {Event.Type.Name(event.type)}")
        if any(event.sequence == message.sequence for event in response.events):
            return response.cursor
    raise EOFError("The watch ended.")


if __name__ == "__main__":
    asyncio.run(main())
