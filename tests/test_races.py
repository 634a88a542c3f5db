"""The races of sending, raced: on two servers over one database."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import pytest
from structlog.testing import capture_logs

from parley.v1 import message_pb2 as pb
from service.domain import MessageRole
from service.embedded import EmbeddedPostgres
from service.identity import Call, Caller, Scope
from service.ids import lock_of
from service.rules.messages import Append, Draft
from service.sending import Sender
from service.store import Store

from .history import Operation, Outcome, Stored, violations
from .make import (
    USER,
    Client,
    Conversation,
    Failure,
    User,
    failure,
    failure_of,
    require_sums,
    until,
)


@asynccontextmanager
async def held(postgres: EmbeddedPostgres, talk: Conversation) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else's transaction, under the conversation's lock until the block ends."""
    url = postgres.url.replace("postgresql+asyncpg", "postgresql")
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", lock_of(UUID(talk.id)))
            yield connection
    finally:
        await connection.close()


async def waiting(database: asyncpg.Connection, count: int) -> None:
    """Return when so many transactions wait for a conversation."""
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"

    async def as_many() -> bool:
        return bool(await database.fetchval(query) == count)

    await until(as_many)


def together(*calls: Awaitable[Any]) -> "asyncio.Future[list[Any]]":
    """All calls at once; their errors among their answers."""
    return asyncio.gather(*calls, return_exceptions=True)


def split(answers: list[Any]) -> tuple[list[pb.Message], list[Failure]]:
    """The messages, and the failures."""
    errors = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
    messages = [each for each in answers if isinstance(each, pb.Message)]
    assert len(errors) + len(messages) == len(answers), answers
    return messages, [failure_of(error) for error in errors]


def stored(message: pb.Message) -> Stored:
    return Stored(
        conversation=message.conversation_id,
        sequence=message.sequence,
        id=message.id,
        content=message.content,
        sender=message.sender_id,
        created=message.create_time.ToNanoseconds(),
    )


# Order


@pytest.mark.parametrize("conversations", [1, 5])
async def test_sixteen_writers_leave_no_gap_and_keep_every_order(
    parley: Client, elsewhere: Client, database: asyncpg.Connection, conversations: int
) -> None:
    users = [await parley.user(f"user-{n}") for n in range(16)]
    talks = [await parley.conversation(*users) for _ in range(conversations)]
    history: list[Operation] = []

    async def write(user: User, client: Client) -> None:
        for n in range(12):
            talk = talks[n % conversations]
            content = f"{user.username} {n}"
            started = time.monotonic()
            message = await client.acting_as(user).send(talk, content, tokens_used=n)
            history.append(
                Operation(
                    client=user.id,
                    conversation=talk.id,
                    content=content,
                    request_id=content,
                    started=started,
                    ended=time.monotonic(),
                    outcome=Outcome.OK,
                    stored=stored(message),
                )
            )

    await asyncio.gather(*(write(user, (parley, elsewhere)[n % 2]) for n, user in enumerate(users)))

    final = [stored(each) for talk in talks for each in await parley.all_messages(talk)]
    assert len(final) == len(history) == 16 * 12
    assert violations(history, final) == []
    for talk in talks:
        await require_sums(parley, database, talk)


async def test_what_was_read_once_is_read_so_for_ever(parley: Client, elsewhere: Client) -> None:
    """Every reading is 1, 2, 3, … to some end that is never behind what was acknowledged."""
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    known: dict[int, bytes] = {}
    acknowledged = 0
    writing = True

    async def write(client: Client, name: str) -> None:
        nonlocal acknowledged
        for n in range(15):
            message = await client.acting_as(ada).send(talk, f"{name} {n}")
            acknowledged = max(acknowledged, message.sequence)

    async def read(client: Client) -> int:
        readings = 0
        while writing:
            at_least = acknowledged
            messages = await client.all_messages(talk)
            assert [each.sequence for each in messages] == list(range(1, len(messages) + 1))
            assert len(messages) >= at_least
            for each in messages:
                now = each.SerializeToString(deterministic=True)
                assert known.setdefault(each.sequence, now) == now
            readings += 1
        return readings

    readers = [asyncio.create_task(read(client)) for client in (parley, elsewhere)]
    await asyncio.gather(*(write((parley, elsewhere)[n % 2], f"writer {n}") for n in range(8)))
    writing = False

    assert min(await asyncio.gather(*readers)) > 3
    assert acknowledged == 8 * 15


async def test_nobody_writes_into_the_middle_of_a_batch(
    parley: Client, elsewhere: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    async def batch(client: Client, name: str) -> list[int]:
        drafts = [pb.NewMessage(role=USER, content=f"{name} {n}") for n in range(20)]
        request = pb.BatchSendMessagesRequest(conversation_id=talk.id, messages=drafts)
        response = await client.acting_as(ada).messages.BatchSendMessages(request)
        return [each.sequence for each in response.sent_messages]

    clients = [(parley, elsewhere)[n % 2] for n in range(12)]
    batches, singles = await asyncio.gather(
        asyncio.gather(*(batch(client, f"batch {n}") for n, client in enumerate(clients))),
        asyncio.gather(*(client.acting_as(ada).send(talk) for client in clients)),
    )

    for sequences in batches:
        assert sequences == list(range(sequences[0], sequences[0] + 20))
    everything = [each.sequence for each in singles] + list(chain.from_iterable(batches))
    assert sorted(everything) == list(range(1, 12 * 21 + 1))
    await require_sums(parley, database, talk)


# Once


@pytest.mark.parametrize("is_held", [False, True], ids=["free", "held"])
async def test_however_many_send_under_one_request_id_there_is_one_message(
    parley: Client,
    elsewhere: Client,
    postgres: EmbeddedPostgres,
    database: asyncpg.Connection,
    is_held: bool,
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    def send(n: int, content: str) -> Awaitable[pb.Message]:
        client = (parley, elsewhere)[n % 2].acting_as(ada)
        return client.send(talk, content, request_id="r-1")

    async with AsyncExitStack() as stack:
        if is_held:
            await stack.enter_async_context(held(postgres, talk))
        racers = together(
            *(send(n, "one") for n in range(64)), *(send(n, "other") for n in range(16))
        )
        if is_held:
            await waiting(database, 2)
    messages, failures = split(await racers)

    (only,) = await parley.all_messages(talk)
    assert len(messages) == (64 if only.content == "one" else 16)
    assert messages == [only] * len(messages)
    assert {(each.code, each.reason) for each in failures} == {
        ("FAILED_PRECONDITION", "REQUEST_ID_REUSED")
    }
    await require_sums(parley, database, talk)


@pytest.mark.parametrize("last_sequence", [0, 1])
async def test_of_32_who_expect_the_same_last_sequence_one_wins(
    parley: Client, elsewhere: Client, last_sequence: int
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="hello" if last_sequence else "")

    messages, failures = split(
        await together(
            *(
                (parley, elsewhere)[n % 2]
                .acting_as(ada)
                .send(talk, f"racer {n}", expected_last_sequence=last_sequence)
                for n in range(32)
            )
        )
    )

    assert [each.sequence for each in messages] == [last_sequence + 1]
    assert len(failures) == 31
    assert {(each.code, each.reason, each.known["last_sequence"]) for each in failures} == {
        ("ABORTED", "SEQUENCE_MISMATCH", str(last_sequence + 1))
    }
    assert (await parley.all_messages(talk))[-1] == messages[0]


async def test_another_server_knows_what_the_first_one_answered(
    parley: Client, elsewhere: Client
) -> None:
    """As a server does after a restart."""
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    first = await parley.acting_as(ada).send(talk, request_id="r-1")
    await parley.acting_as(ada).send(talk)
    request = pb.ListMessagesRequest(conversation_id=talk.id, page_size=1)
    page = await parley.acting_as(ada).messages.ListMessages(request)

    assert await elsewhere.acting_as(ada).send(talk, request_id="r-1") == first
    request.page_token = page.next_page_token
    rest = await elsewhere.acting_as(ada).messages.ListMessages(request)
    assert list(rest.messages) == [first]


# Leaving


async def test_who_leaves_while_its_messages_wait_has_none_after_the_leave(
    parley: Client, elsewhere: Client, postgres: EmbeddedPostgres, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)

    async with held(postgres, talk):
        before = together(*(parley.acting_as(bob).send(talk, f"before {n}") for n in range(4)))
        await waiting(database, 1)
        leaving = asyncio.ensure_future(parley.acting_as(bob).leave(talk, bob))
        await waiting(database, 2)
        after = together(
            *(elsewhere.acting_as(bob).send(talk, f"after {n}") for n in range(4)),
            *(elsewhere.message(talk, bob, f"for bob {n}") for n in range(4)),
        )
        await waiting(database, 3)
    left = await leaving
    in_time, too_late = split(await before)
    accepted, refused = split(await after)

    # What stood before the leave in the queue is there, what stood behind it is not.
    assert in_time
    assert all(each.sequence <= left.visible_to_sequence for each in in_time)
    assert accepted == []
    assert {(each.code, each.reason) for each in (*too_late, *refused)} == {
        ("PERMISSION_DENIED", "NOT_A_PARTICIPANT"),
        ("FAILED_PRECONDITION", "NOT_A_PARTICIPANT"),
    }
    assert await parley.all_messages(talk) == sorted(in_time, key=lambda each: each.sequence)
    await require_sums(parley, database, talk)


async def test_who_is_removed_while_its_messages_wait_has_none_at_all(
    parley: Client, postgres: EmbeddedPostgres, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob, first="hello")

    async with held(postgres, talk) as remover:
        sending = together(*(parley.acting_as(bob).send(talk) for _ in range(8)))
        await waiting(database, 1)
        await remover.execute(
            "UPDATE participants SET status = 'REMOVED', visible_to_sequence = 1,"
            " left_at = clock_timestamp() WHERE user_id = $1",
            bob.id,
        )

    messages, failures = split(await sending)
    assert messages == []
    assert {each.reason for each in failures} == {"NOT_A_PARTICIPANT"}
    assert len(await parley.all_messages(talk)) == 1


# One held, the others free

# As many transactions wait for a lock at once as half the connections of a pool.
MAX_WAITING = 5


@pytest.mark.parametrize("count", [1, MAX_WAITING + 2])
async def test_conversations_that_are_held_hold_up_no_other(
    parley: Client, postgres: EmbeddedPostgres, database: asyncpg.Connection, count: int
) -> None:
    ada = await parley.user("ada")
    talks = [await parley.conversation(ada) for _ in range(20)]
    actor = parley.acting_as(ada)

    async with AsyncExitStack() as stack:
        for talk in talks[:count]:
            await stack.enter_async_context(held(postgres, talk))
        queued = together(*(actor.send(talk) for talk in talks[:count] for _ in range(3)))
        await waiting(database, min(count, MAX_WAITING))
        others = await asyncio.gather(*(actor.send(talk) for talk in talks[count:] * 3))
        assert not queued.done()

    messages, failures = split(await queued)
    assert (len(messages), failures) == (3 * count, [])
    assert len(others) == 3 * (20 - count)
    for talk in talks:
        assert [each.sequence for each in await parley.all_messages(talk)] == [1, 2, 3]


async def test_a_call_that_waited_in_vain_is_told_so_and_had_no_effect(
    parley: Client, postgres: EmbeddedPostgres
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    async with held(postgres, talk):
        refused = await failure(parley.acting_as(ada).send(talk, "first", request_id="r-1"))

    assert (refused.code, refused.reason) == ("ABORTED", "LOCK_TIMEOUT")
    assert refused.retry_seconds
    again = await parley.acting_as(ada).send(talk, "second", request_id="r-1")
    assert await parley.all_messages(talk) == [again]


async def test_under_a_steady_load_a_conversation_leaves_its_lane(
    parley: Client, postgres: EmbeddedPostgres, database: asyncpg.Connection
) -> None:
    """It was held once, and went alone from then on, for as long as anybody wrote."""
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    store = Store(postgres.url)
    sender = Sender(store)
    call = Call("test", Caller("test", frozenset(Scope)), None)
    draft = Draft(role=MessageRole.USER, content="x", sender="ada", sender_id=UUID(ada.id))
    item = Append(conversation=talk.id, conversation_id=UUID(talk.id), actor=None, drafts=(draft,))
    loading = True

    async def load_it() -> None:
        while loading:
            await sender.append(item, call)

    async def lane_is_gone() -> bool:
        return not sender._coalescer._lanes

    async with held(postgres, talk):
        writers = [asyncio.create_task(load_it()) for _ in range(4)]
        await waiting(database, 1)
        assert sender._coalescer._lanes
    try:
        await until(lane_is_gone)
    finally:
        loading = False
        await asyncio.gather(*writers)
        await store.close()
    await require_sums(parley, database, talk)


# Callers who go


async def test_a_caller_that_is_cancelled_disturbs_nobody(
    parley: Client, postgres: EmbeddedPostgres, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)
    backends = (
        "SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE application_name = 'parley'"
    )

    async with held(postgres, talk):
        calls = [asyncio.ensure_future(actor.send(talk, f"line {n}")) for n in range(12)]
        await waiting(database, 1)
        before = await database.fetchval(backends)
        for call in calls[::2]:
            call.cancel()
        await asyncio.wait(calls[::2])
    messages, failures = split(await together(*calls[1::2]))

    assert failures == []
    assert [each.content for each in messages] == [f"line {n}" for n in range(1, 12, 2)]
    there = await parley.all_messages(talk)
    assert [each.sequence for each in there] == list(range(1, len(there) + 1))
    assert {each.id for each in messages} <= {each.id for each in there}
    assert set(before) <= set(await database.fetchval(backends))
    await require_sums(parley, database, talk)


async def test_a_storm_of_cancels_loses_and_doubles_nothing(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)

    async def fickle(n: int) -> None:
        call = asyncio.ensure_future(actor.send(talk, f"fickle {n}", request_id=f"fickle {n}"))
        for _ in range(n % 40):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])

    steady, _ = await asyncio.gather(
        asyncio.gather(*(actor.send(talk, f"steady {n}") for n in range(50))),
        asyncio.gather(*(fickle(n) for n in range(100))),
    )
    again = [await actor.send(talk, f"fickle {n}", request_id=f"fickle {n}") for n in range(100)]

    there = await parley.all_messages(talk)
    assert {each.id for each in there} == {each.id for each in (*steady, *again)}
    assert len(there) == 150
    await require_sums(parley, database, talk)


async def test_a_call_whose_deadline_passed_in_the_queue_is_dropped(
    parley: Client, postgres: EmbeddedPostgres, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    actor = parley.acting_as(ada)
    late = pb.SendMessageRequest(conversation_id=talk.id, role=USER, content="late")

    async with held(postgres, talk):
        first = asyncio.ensure_future(actor.send(talk, "first"))
        await waiting(database, 1)
        expired = await failure(actor.messages.SendMessage(late, timeout=0.2))
        # Its lane waits with the first one; the late one stood behind it.
    await first

    assert expired.code == "DEADLINE_EXCEEDED"
    await actor.send(talk, "last")
    assert [each.content for each in await parley.all_messages(talk)] == ["first", "last"]


# Poison


async def test_a_message_that_the_database_refuses_fails_alone(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    contents = [f"line {n}" for n in range(40)]
    contents[20] = "poison"
    await database.execute(
        "ALTER TABLE messages ADD CONSTRAINT poison CHECK (content <> 'poison') NOT VALID"
    )
    try:
        with capture_logs() as lines:
            messages, failures = split(
                await together(*(parley.acting_as(ada).send(talk, content) for content in contents))
            )
    finally:
        await database.execute("ALTER TABLE messages DROP CONSTRAINT poison")

    assert {each.content for each in messages} == {*contents} - {"poison"}
    assert [(each.code, each.reason) for each in failures] == [("INTERNAL", "INTERNAL")]
    (defect,) = [line for line in lines if line["log_level"] == "error"]
    assert defect["correlation_id"] == failures[0].known["correlation_id"]
    there = await parley.all_messages(talk)
    assert [each.sequence for each in there] == list(range(1, len(contents)))
    await require_sums(parley, database, talk)
