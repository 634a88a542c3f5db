"""The service under kill -9 and SIGSTOP: nothing acknowledged is lost, nothing is there twice.

`PARLEY_FAULT_CYCLES` multiplies the cycles: 1 is a cut of some seconds, 30 a night's run.
"""

import asyncio
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
import psutil
import pytest
import pytest_asyncio

from parley.v1 import message_pb2
from service.embedded import EmbeddedPostgres

from .history import Operation, Outcome, Stored, outcome_of, violations
from .make import USER, Client, Conversation, Failure, User, failure, failure_of
from .process import CHANNEL, NOT_SERVING, SERVING, Service, frozen, kill
from .proxy import proxy

pytestmark = pytest.mark.slow

CYCLES = int(os.environ.get("PARLEY_FAULT_CYCLES", "1"))
WRITERS = 12
CONVERSATIONS = 4
CALL_SECONDS = 3.0
# How soon after the fault is over a call must succeed.
RECOVERY_SECONDS = 3.0


@dataclass
class Load:
    """Clients that write all the time, each of them one call after the other, and what they saw."""

    service: Service
    users: list[User]
    talks: list[Conversation]
    history: list[Operation] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    stopping: bool = False

    async def write(self, n: int) -> None:
        """Every other client is stubborn: it repeats a call under its request_id until it succeeds.

        The others go on with something new, whatever happened.
        """
        user, talk = self.users[n], self.talks[n % len(self.talks)]
        async with grpc.aio.insecure_channel(
            self.service.address, options=[*CHANNEL, ("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            client = Client(channel, self.service.token)
            for count in itertools.count():
                content, request_id = f"{user.username} says {count}", str(uuid4())
                while not self.stopping:
                    outcome = await self._send(client, user, talk, content, request_id)
                    if outcome is Outcome.OK or n % 2:
                        break
                if self.stopping:
                    return

    async def _send(
        self, client: Client, user: User, talk: Conversation, content: str, request_id: str
    ) -> Outcome:
        call = client.messages.SendMessage(
            message_pb2.SendMessageRequest(
                conversation_id=talk.id,
                sender_id=user.id,
                role=USER,
                content=content,
                request_id=request_id,
            ),
            timeout=CALL_SECONDS,
        )
        started = time.monotonic()
        operation = Operation(
            client=user.id,
            conversation=talk.id,
            content=content,
            request_id=request_id,
            started=started,
            ended=started,
            outcome=Outcome.UNKNOWN,
        )
        pause = 0.0
        try:
            stored = stored_of((await call).message)
            operation = replace(operation, outcome=Outcome.OK, stored=stored)
        except grpc.aio.AioRpcError as error:
            failed = failure_of(error)
            self.failures.append(failed)
            pause = failed.retry_seconds or 0.02
            operation = replace(operation, outcome=outcome_of(failed.code, failed.reason))
        operation = replace(operation, ended=time.monotonic())
        self.history.append(operation)
        await asyncio.sleep(pause)
        return operation.outcome

    async def recovered(self, back: float) -> None:
        """Wait until every client has succeeded with a call that it made after that moment."""
        while True:
            done = {each.client for each in self.history if each.stored and each.started > back}
            if len(done) == len(self.users):
                return
            waited = time.monotonic() - back
            assert waited < RECOVERY_SECONDS, f"{len(done)} clients after {waited:.1f} s"
            await asyncio.sleep(0.01)

    def first_success(self, back: float) -> float:
        return min(each.ended for each in self.history if each.stored and each.ended > back) - back


def stored_of(message: message_pb2.Message) -> Stored:
    return Stored(
        conversation=message.conversation_id,
        sequence=message.sequence,
        id=message.id,
        content=message.content,
        sender=message.sender_id,
        created=message.create_time.ToNanoseconds(),
    )


@pytest_asyncio.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"))
    await service.start()
    yield service
    await service.stop()


@asynccontextmanager
async def load(service: Service) -> AsyncIterator[Load]:
    """Clients at work; in the end, what they saw must be true."""
    async with service.channel() as channel:
        client = Client(channel, service.token)
        users = [await client.user() for _ in range(WRITERS)]
        talks = [
            await client.conversation(users[n], *users[n + CONVERSATIONS :: CONVERSATIONS])
            for n in range(CONVERSATIONS)
        ]
        running = Load(service, users, talks)
        async with asyncio.TaskGroup() as writers:
            for n in range(WRITERS):
                writers.create_task(running.write(n))
            try:
                await running.recovered(time.monotonic())
                yield running
            finally:
                running.stopping = True
        messages = [each for talk in talks for each in await client.all_messages(talk)]
        assert violations(running.history, [stored_of(message) for message in messages]) == []


# Each breaks something, sees that it is broken, and returns when it can be reached again.


async def postgres_dies(service: Service) -> float:
    """kill -9 of PostgreSQL, all of it."""
    return await _dies(service, service.postgres())


async def postmaster_dies(service: Service) -> float:
    """kill -9 of the postmaster alone. Its children must not go on without it."""
    return await _dies(service, service.postgres()[:1])


async def backend_dies(service: Service) -> float:
    """kill -9 of one backend: PostgreSQL then ends all others, and recovers by itself."""
    backend = await _backend_of_ours(service)
    backend.kill()
    return await service.reachable()


async def connections_are_ended(service: Service) -> float:
    connection = await asyncpg.connect(service.database_url)
    ended = await connection.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'parley' AND pid <> pg_backend_pid()"
    )
    assert ended
    await connection.close()
    return time.monotonic()


async def service_dies(service: Service) -> float:
    """kill -9 of the service, which then finds its PostgreSQL still running."""
    orphan = service.postmaster().pid
    service.kill()
    await service.start()
    assert service.postmaster().pid == orphan
    return time.monotonic()


async def service_restarts(service: Service) -> float:
    """SIGTERM: what runs may end."""
    service.process.send_signal(signal.SIGTERM)
    assert await service.ended() == 0
    await service.start()
    return time.monotonic()


async def both_die(service: Service) -> float:
    postgres = service.postgres()
    service.kill()
    kill(postgres)
    await service.start()
    assert service.postmaster().pid != postgres[0].pid
    return time.monotonic()


FAULTS = [
    postgres_dies,
    postmaster_dies,
    backend_dies,
    connections_are_ended,
    service_dies,
    service_restarts,
    both_die,
]


async def test_whatever_is_killed_nothing_is_lost_doubled_or_out_of_order(
    service: Service,
) -> None:
    async with load(service) as running:
        for fault in FAULTS * CYCLES:
            # Not in the first second of a PostgreSQL, which would be given a rest.
            await asyncio.sleep(max(0.0, service.postmaster().create_time() + 1.5 - time.time()))
            begun, before = time.monotonic(), len(running.failures)
            back = await fault(service)
            await running.recovered(back)
            print(
                f"{fault.__name__}: back after {back - begun:.2f} s, first success"
                f" {running.first_success(back):.2f} s later;"
                f" {len(running.failures) - before} calls failed"
            )

    print(Counter(each.outcome.value for each in running.history))
    print(Counter(line["event"] for line in service.events()))
    assert service.events("defect") == []
    assert len(running.failures) > 10 * CYCLES
    assert sum(each.outcome is Outcome.OK for each in running.history) > 100 * CYCLES
    assert max(each.ended - each.started for each in running.history) < CALL_SECONDS + 0.5
    for each in running.failures:
        if each.code == "UNAVAILABLE" and each.reason:
            assert each.retry_seconds
            assert each.trailers["grpc-retry-pushback-ms"]
        else:
            # The service itself was away, or a commit's fate remained unknown.
            assert each.code in ("UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED"), each


async def test_a_frozen_database_is_noticed_and_forgiven(service: Service) -> None:
    async with load(service) as running:
        postgres = service.postgres()
        stopped = list(frozen(postgres))
        assert len(stopped) == len(postgres)
        froze = time.monotonic()
        try:
            noticed = await service.until(NOT_SERVING, seconds=4)
            assert await service.health("liveness") == SERVING
            # Until even those have been answered who called a moment before.
            await asyncio.sleep(froze + CALL_SECONDS + 0.7 - time.monotonic())
            answered = [each for each in running.history if each.ended > froze + 0.2]
        finally:
            for process in stopped:
                process.resume()
        await service.until(SERVING, seconds=RECOVERY_SECONDS)
        await running.recovered(time.monotonic())
        print(f"noticed after {noticed:.2f} s; {len(answered)} calls were answered meanwhile")

    assert {each.client for each in answered} == {user.id for user in running.users}
    assert not any(each.stored for each in answered)
    assert {failed.code for failed in running.failures} <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert max(each.ended - each.started for each in running.history) < CALL_SECONDS + 0.5


async def test_a_service_whose_database_is_away_starts_and_waits_for_it(
    postgres: EmbeddedPostgres, parley: Client, tmp_path: Path
) -> None:
    async with proxy(tmp_path, postgres.url) as between:
        await between.close()
        service = Service(tmp_path, database_url=between.url)
        service.launch()
        await service.until(SERVING, name="liveness", seconds=10)

        async with service.channel() as channel:
            client = Client(channel, service.token)
            refused = await failure(client.user("ada"))
            assert (refused.code, refused.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
            assert refused.retry_seconds
            assert await service.health() == NOT_SERVING
            assert await service.health("parley.v1.MessageService") == NOT_SERVING

            await between.open()
            await service.until(SERVING, seconds=RECOVERY_SECONDS)
            await client.user("ada")

            await between.close()
            await service.until(NOT_SERVING, seconds=RECOVERY_SECONDS)
            await between.open()
            await service.until(SERVING, seconds=RECOVERY_SECONDS)
            await client.user("grace")
        await service.stop()

    assert any("cannot be reached" in line["reason"] for line in service.events("not_serving"))


async def _dies(service: Service, processes: list[psutil.Process]) -> float:
    dead = service.postmaster()
    kill(processes)
    back = await service.reachable()
    assert service.postmaster().pid != dead.pid
    return back


async def _backend_of_ours(service: Service) -> psutil.Process:
    connection = await asyncpg.connect(service.database_url)
    pid = await connection.fetchval(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'parley' LIMIT 1"
    )
    await connection.close()
    return psutil.Process(pid)


# The checkers themselves: each must see what it is there to see.


def message(sequence: int, content: str = "", **values: Any) -> Stored:
    made = Stored(
        conversation="talk",
        sequence=sequence,
        id=f"id-{sequence}",
        content=content or f"text {sequence}",
        sender="ada",
        created=sequence,
    )
    return replace(made, **values)


def sent(stored: Stored, started: float, ended: float, **values: Any) -> Operation:
    made = Operation(
        client=stored.sender,
        conversation=stored.conversation,
        content=stored.content,
        request_id=stored.content,
        started=started,
        ended=ended,
        outcome=Outcome.OK,
        stored=stored,
    )
    return replace(made, **values)


FINAL = [message(1), message(2), message(3)]
HISTORY = [sent(each, each.sequence, each.sequence + 0.5) for each in FINAL]
FAILED = replace(HISTORY[2], outcome=Outcome.FAIL, stored=None)


@pytest.mark.parametrize(
    ("invariant", "history", "final"),
    [
        ("I1", HISTORY, FINAL[:2]),
        ("I1", HISTORY, [*FINAL[:2], message(3, id="another")]),
        ("I2", HISTORY, [*FINAL, message(4, "text 3")]),
        ("I3", HISTORY, [*FINAL, message(4)]),
        ("I3", HISTORY, [*FINAL[:2], message(3, sender="eve")]),
        ("I4", [*HISTORY[:2], FAILED], FINAL),
        ("I5", [HISTORY[0], HISTORY[2]], [FINAL[0], FINAL[2]]),
        ("I6", [replace(HISTORY[1], ended=2.1), sent(message(1), 2.2, 2.3)], FINAL[:2]),
        ("I7", [sent(message(2), 1, 1.5), sent(message(1), 1.2, 2.5)], FINAL[:2]),
        ("I7", HISTORY, [*FINAL[:2], message(3, created=1)]),
        ("I10", [*HISTORY, sent(message(4), 9, 9.5, request_id="text 3")], [*FINAL, message(4)]),
    ],
)
def test_a_checker_sees_what_it_is_there_for(
    invariant: str, history: list[Operation], final: list[Stored]
) -> None:
    assert any(found.startswith(f"{invariant} ") for found in violations(history, final))


def test_a_history_that_can_be_true_is_believed() -> None:
    # Repeated under its request_id until it was answered: the number may be from the first try.
    tried = replace(HISTORY[0], outcome=Outcome.UNKNOWN, stored=None)
    answered = replace(HISTORY[0], started=7, ended=7.5)

    assert violations([tried, *HISTORY[1:], answered], FINAL) == []
