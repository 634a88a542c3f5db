"""After a storm of calls each counter is what one counts oneself, by reading what it counts."""

import asyncio
import random
from collections.abc import Awaitable
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from parley.v1 import conversation_pb2, message_pb2

from .make import (
    MEMBER,
    USER,
    Client,
    Conversation,
    Message,
    Participant,
    User,
    failure,
    insist,
    miscounted,
)

pytestmark = pytest.mark.slow

EVERY = [number for number in Participant.Status.values() if number]
REFUSALS = {
    "NOT_FOUND", "PERMISSION_DENIED", "FAILED_PRECONDITION", "OUT_OF_RANGE", "ALREADY_EXISTS",
}  # fmt: skip


async def storm(parley: Client, talks: list[Conversation], users: list[User], seed: int) -> int:
    """Many calls at once, of every kind that moves a counter: how many of them did something."""
    chance = random.Random(seed)
    owner = parley.acting_as(users[0])

    def call() -> Awaitable[Any]:
        talk, subject = chance.choice(talks), chance.choice(users[1:])
        itself = parley.acting_as(subject)
        sequence = chance.randrange(1, 120)
        sent_time = Timestamp(seconds=chance.randrange(1_700_000_000, 1_760_000_000))
        drafts = [
            message_pb2.NewMessage(role=USER, content="x", tokens_used=n or None) for n in range(3)
        ]
        batch = message_pb2.BatchSendMessagesRequest(conversation_id=talk.id, messages=drafts)
        calls: list[Any] = [
            lambda: itself.send(talk, tokens_used=chance.randrange(50)),
            lambda: itself.send(talk, sent_time=sent_time, input_tokens=3, output_tokens=4),
            lambda: itself.messages.BatchSendMessages(batch),
            lambda: owner.send(talk),
            lambda: owner.delete_message(talk, sequence=sequence),
            lambda: owner.undelete_message(talk, sequence=sequence),
            lambda: itself.delete_message(talk, sequence=sequence),
            lambda: itself.mark_read(talk, subject, sequence),
            lambda: owner.add(talk, subject, role=MEMBER, hide_history=chance.random() < 0.5),
            lambda: owner.invite(talk, subject, initial_message_sequence=sequence),
            lambda: itself.accept(talk, subject),
            lambda: itself.decline(talk, subject),
            lambda: itself.leave(talk, subject),
            lambda: owner.remove(talk, subject),
        ]
        return insist(chance.choice(calls))

    made = 0
    for _ in range(30):
        answers = await asyncio.gather(*(call() for _ in range(16)), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                assert isinstance(answer, grpc.aio.AioRpcError)
                assert answer.code().name in REFUSALS, answer
            else:
                made += 1
    return made


async def inbox(client: Client) -> dict[str, conversation_pb2.UserConversation]:
    """Every line, by the id of its conversation."""
    request = conversation_pb2.ListUserConversationsRequest(statuses=EVERY, page_size=1000)
    response = await client.conversations.ListUserConversations(request)
    return {line.conversation.id: line for line in response.user_conversations}


async def readable(client: Client, talk: Conversation) -> list[Message]:
    """All that the user may list; nothing for who was only ever invited."""
    try:
        return await client.all_messages(talk)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.PERMISSION_DENIED:
            raise
        return []


@pytest.mark.parametrize("seed", range(3))
async def test_after_a_storm_every_counter_is_what_one_counts_oneself(
    parley: Client, database: asyncpg.Connection, seed: int
) -> None:
    users = [await parley.user(f"user-{n}") for n in range(6)]
    talks = [await parley.conversation(*users[:4], first="hello") for _ in range(2)]

    assert await storm(parley, talks, users, seed) > 150

    assert not await miscounted(database)
    for talk in talks:
        seen, messages = await parley.seen(talk), await parley.all_messages(talk)
        assert seen.last_sequence == len(messages)
        assert seen.total_tokens_used == sum(message.tokens_used for message in messages)
        said = [m.sent_time if m.HasField("sent_time") else m.create_time for m in messages]
        assert seen.last_activity_time == max(said, key=Timestamp.ToNanoseconds)

    counts = []
    for user in users:
        client = parley.acting_as(user)
        lines = await inbox(client)
        for talk in talks:
            if talk.id not in lines:
                # It was invited, and is no more.
                assert (await failure(parley.acting_as(user).seen(talk))).code == "NOT_FOUND"
                continue
            line, messages = lines[talk.id], await readable(client, talk)
            participant = line.participant
            assert participant == await parley.participant(talk, user)
            assert line.conversation == await client.seen(talk)
            unread = [
                message.sequence
                for message in messages
                if message.sequence > participant.last_read_sequence
                and message.sender_id != user.id
                and not message.HasField("delete_time")
            ]
            counts.append(line.unread_count)
            assert line.unread_count == len(unread)
            shown = [message.sequence for message in messages[-1:]]
            if participant.status == Participant.STATUS_INVITED:
                request = message_pb2.GetMessageRequest(
                    conversation_id=talk.id, message_id=participant.initial_message_id
                )
                shown.append((await client.messages.GetMessage(request)).message.sequence)
            assert [line.last_message.sequence] == ([max(shown)] if shown else [0])
            if participant.status == Participant.STATUS_JOINED:
                read = await parley.mark_read(talk, user, participant.last_read_sequence)
                assert read.unread_count == len(unread)
            if messages:
                around = message_pb2.ListMessagesRequest(
                    conversation_id=talk.id, around_first_unread=True
                )
                page = await client.messages.ListMessages(around)
                assert page.anchor_sequence == (unread or [messages[-1].sequence])[0]
    # Some have read all, some have not: otherwise nothing was tried.
    assert len(set(counts)) > 2
