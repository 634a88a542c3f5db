"""The baseline: the service that one writes in an afternoon.

SQLAlchemy's ORM over the same tables in the same PostgreSQL; one transaction a call: lock the
conversation's row, look for the participant, add the message, count it, commit. It knows no
request_id, no event, no credentials.
"""

import os
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import grpc
import uvloop
from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from parley.v1 import message_pb2, message_pb2_grpc
from service.models import Conversation, Message, Participant

# As many connections as Parley has.
POOL_SIZE = 10


class ObviousMessages(message_pb2_grpc.MessageServiceServicer):
    def __init__(self, url: str) -> None:
        engine = create_async_engine(url, pool_size=POOL_SIZE, max_overflow=0)
        self._session = async_sessionmaker(engine, expire_on_commit=False)

    async def SendMessage(
        self, request: message_pb2.SendMessageRequest, context: Any
    ) -> message_pb2.SendMessageResponse:
        actor = UUID(dict(context.invocation_metadata())["x-parley-actor"])
        id = UUID(request.conversation_id)
        async with self._session() as session, session.begin():
            conversation = await session.scalar(
                select(Conversation).where(Conversation.id == id).with_for_update()
            )
            participant = await session.scalar(
                select(Participant).where(
                    Participant.conversation_id == id,
                    Participant.user_id == actor,
                    Participant.status == "JOINED",
                )
            )
            if conversation is None or participant is None:
                await context.abort(grpc.StatusCode.NOT_FOUND, "no such conversation")
            assert conversation
            conversation.last_sequence += 1
            conversation.last_message_at = datetime.now(UTC)
            message = Message(
                conversation_id=id,
                sequence=conversation.last_sequence,
                sender_id=actor,
                role=message_pb2.Message.Role.Name(request.role).removeprefix("ROLE_"),
                content=request.content,
            )
            session.add(message)
        return message_pb2.SendMessageResponse(message=_message(message))


def _message(row: Message) -> message_pb2.Message:
    message = message_pb2.Message(
        id=str(row.id),
        conversation_id=str(row.conversation_id),
        sequence=row.sequence,
        sender_id=str(row.sender_id),
        role=message_pb2.Message.Role.Value(f"ROLE_{row.role}"),
        status=message_pb2.Message.STATUS_COMPLETE,
        content=row.content,
        revision=row.revision,
    )
    message.create_time.FromDatetime(row.created_at)
    message.update_time.FromDatetime(row.updated_at)
    return message


async def serve(address: str, url: str) -> None:
    server = grpc.aio.server()
    message_pb2_grpc.add_MessageServiceServicer_to_server(ObviousMessages(url), server)
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(os.environ["PARLEY_ADDRESS"], os.environ["PARLEY_DATABASE_URL"]))
