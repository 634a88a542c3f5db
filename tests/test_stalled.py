"""Watchers that read nothing: what they cost the service, and those who do read."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import asyncpg
import grpc
import psutil
import pytest

from parley.v1 import event_pb2

from .make import Client, Conversation, User
from .process import Service

STALLED, CHANNELS = 200, 4
# By turns without them and with them, a minute of each, in windows of the same length: whatever
# else the machine does lengthens the p99 of those in which it does, and long ones meet more of it.
# So the better windows are compared: what those who read nothing cost the others is in all of them.
ROUNDS, WINDOWS, WINDOW_SECONDS = 3, 4, 5
READERS, WRITERS, PAUSE_SECONDS = 8, 4, 0.04
# A connection of its own, with windows that do not grow: they are full soon.
SMALL = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
MIB = 1 << 20


class Reader:
    """Follows a conversation, and notes how many milliseconds after its commit each event came."""

    def __init__(self, client: Client, talk: Conversation) -> None:
        request = event_pb2.WatchRequest(conversation_id=talk.id)
        self.call = client.events.Watch(request, timeout=None)
        self.took: list[float] = []

    async def run(self) -> None:
        while response := await self.call.read():
            now = time.time()
            for event in response.events:
                committed = event.commit_time.seconds + event.commit_time.nanos / 1e9
                self.took.append((now - committed) * 1000)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_two_hundred_who_read_nothing_cost_little_and_hold_nobody_up(tmp_path: Path) -> None:
    service = Service(tmp_path)
    await service.start()
    try:
        async with AsyncExitStack() as open_channels:
            channels = [
                await open_channels.enter_async_context(
                    grpc.aio.insecure_channel(service.address, options=SMALL)
                )
                for _ in range(CHANNELS + 1)
            ]
            clients = [Client(channel, service.token) for channel in channels]
            await _compare(service, clients[0], clients[1:])
        assert service.events("defect") == []
    finally:
        await service.stop()


async def _compare(service: Service, parley: Client, others: list[Client]) -> None:
    ada = await parley.user("ada")
    # More than any window takes, of which they read nothing.
    talk = await parley.conversation(ada)
    for _ in range(100):
        await parley.message(talk, ada, "x" * 50_000)
    readers = [Reader(parley, talk) for _ in range(READERS)]
    for reader in readers:
        await reader.call.read()
    tasks = [asyncio.create_task(reader.run()) for reader in readers]
    process = psutil.Process(service.process.pid)

    await _talk(parley, talk, ada, readers, seconds=3)
    before = process.memory_info().rss / MIB
    without: list[float] = []
    beside: list[float] = []
    most = before
    for _ in range(ROUNDS):
        without += await _windows(parley, talk, ada, readers)
        async with _stalled(others, talk):
            await _at_rest(process)
            talking = asyncio.create_task(_windows(parley, talk, ada, readers))
            while not talking.done():
                most = max(most, process.memory_info().rss / MIB)
                await asyncio.sleep(0.2)
            beside += await talking
            assert await _in_transaction(service) == 0
    for task in tasks:
        assert not task.done(), task
        task.cancel()

    print(
        f"\n{STALLED} stalled: {before:.0f} MiB before, {most:.0f} at most; p99 from commit to"
        f" delivery without them {[round(p99) for p99 in without]} ms,"
        f" with them {[round(p99) for p99 in beside]} ms"
    )
    assert most - before <= 64
    assert _better(beside) <= 2 * _better(without)


def _better(p99s: list[float]) -> float:
    """The p99 that a quarter of the windows do not exceed."""
    return quantiles(p99s, n=4)[0]


async def _windows(
    parley: Client, talk: Conversation, by: User, readers: list[Reader]
) -> list[float]:
    return [await _talk(parley, talk, by, readers, seconds=WINDOW_SECONDS) for _ in range(WINDOWS)]


async def _talk(
    parley: Client, talk: Conversation, by: User, readers: list[Reader], *, seconds: float
) -> float:
    """Write for so long; the p99 of what the readers noted meanwhile, all of it delivered."""
    start = [len(reader.took) for reader in readers]
    end = time.monotonic() + seconds

    async def write() -> int:
        count = 0
        while time.monotonic() < end:
            await parley.message(talk, by, "a line")
            count += 1
            await asyncio.sleep(PAUSE_SECONDS)
        return count

    sent = sum(await asyncio.gather(*(write() for _ in range(WRITERS))))
    async with asyncio.timeout(10):
        while any(
            len(reader.took) < first + sent for reader, first in zip(readers, start, strict=True)
        ):
            await asyncio.sleep(0.01)
    took = sorted(
        each for reader, first in zip(readers, start, strict=True) for each in reader.took[first:]
    )
    assert len(took) > 500
    return took[int(0.99 * len(took))]


@asynccontextmanager
async def _stalled(clients: list[Client], talk: Conversation) -> AsyncIterator[None]:
    """So many watches of all that was said, from which nothing is read but that they are there."""
    calls: list[Any] = [
        clients[n % len(clients)].watch(conversation_id=talk.id, oldest=True)
        for n in range(STALLED)
    ]
    try:
        await asyncio.gather(*(call.initial_metadata() for call in calls))
        yield
    finally:
        for call in calls:
            call.cancel()


async def _at_rest(process: psutil.Process) -> None:
    """Return once the service has little to do: nobody takes any more of what it has to say."""
    async with asyncio.timeout(30):
        while True:
            used = sum(process.cpu_times()[:2])
            await asyncio.sleep(1)
            if sum(process.cpu_times()[:2]) - used < 0.2:
                return


async def _in_transaction(service: Service) -> int:
    """How many of the service's connections are amid a transaction that waits for nobody."""
    connection = await asyncpg.connect(service.database_url)
    try:
        return await connection.fetchval(  # type: ignore[no-any-return]
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'parley'"
            " AND state = 'idle in transaction' AND state_change < now() - interval '1 s'"
        )
    finally:
        await connection.close()
