"""The change feed while workers, a replica and PostgreSQL are killed, and while a stranger's
transaction stays open: nothing is lost, doubled or out of order, wherever a watcher resumes.

`SEED` in the environment repeats the choices of other runs, `PARLEY_FAULT_CYCLES` makes it longer.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from service.embedded import EmbeddedPostgres

from .feed_history import Scope, places
from .make import Client
from .process import SERVING, Service, kill
from .storm import Storm

CYCLES = int(os.environ.get("PARLEY_FAULT_CYCLES", "1"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180 + 60 * CYCLES)]

SEED = int(os.environ.get("SEED", "1"))
WRITERS, TALKS, CURSORS = 16, 4, 200
# A PostgreSQL that dies within its first second is given a rest, and so is a worker.
PAUSE_SECONDS = 1.5
# How long those who watch may take for what is left when nothing more happens.
PATIENCE_SECONDS = 20.0
FOREIGN_SECONDS = 20.0


@dataclass
class Replicas:
    """`crew` serves by two workers and has the PostgreSQL, which `other` uses as well."""

    crew: Service
    other: Service

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[list[Client]]:
        """Some of them reach each worker, others the other replica."""
        async with AsyncExitStack() as channels:
            clients = []
            for service in (self.crew, self.crew, self.crew, self.crew, self.other, self.other):
                channel = await channels.enter_async_context(service.channel(alone=True))
                clients.append(Client(channel, service.token))
            yield clients

    # Each breaks something, and returns when it is whole again.

    async def worker_dies(self) -> None:
        before = self.crew.workers()
        before[0].kill()
        async with asyncio.timeout(20):
            while len(workers := self.crew.workers()) < len(before) or before[0] in workers:
                await asyncio.sleep(0.05)

    async def replica_dies(self) -> None:
        self.other.kill()
        await self.other.start()

    async def postgres_dies(self) -> None:
        dead = self.crew.postmaster()
        kill(self.crew.postgres())
        async with asyncio.timeout(20):
            await self.crew.reachable()
        assert self.crew.postmaster() != dead

    async def connections_are_ended(self) -> None:
        connection = await asyncpg.connect(self.crew.database_url)
        ended = await connection.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'parley'"
        )
        assert ended
        await connection.close()


@asynccontextmanager
async def replicas(folder: Path) -> AsyncIterator[Replicas]:
    crew = Service(folder / "crew", workers=2)
    other = Service(folder / "other", database_url=crew.database_url)
    for service in (crew, other):
        service.folder.mkdir()
    try:
        crew.launch()
        await crew.said("Parley serves on", seconds=30)
        await other.start()
        yield Replicas(crew, other)
    finally:
        await other.stop()
        await crew.stop()


async def test_whatever_is_killed_watchers_miss_nothing_wherever_they_resume(
    tmp_path: Path,
) -> None:
    fired: Counter[str] = Counter()
    async with replicas(tmp_path) as both, both.clients() as clients:
        faults: list[Callable[[], Awaitable[None]]] = [
            both.worker_dies,
            both.postgres_dies,
            both.replica_dies,
            both.connections_are_ended,
            both.postgres_dies,
            both.worker_dies,
        ]
        raging = Storm(clients, SEED, (PAUSE_SECONDS + 1) * len(faults) * CYCLES)
        await raging.prepare(writers=WRITERS, talks=TALKS)

        async def break_things() -> None:
            for fault in faults * CYCLES:
                await asyncio.sleep(PAUSE_SECONDS)
                await fault()
                fired[fault.__name__] += 1
                for service in (both.crew, both.other):
                    await service.until(SERVING, seconds=20)
            await asyncio.sleep(PAUSE_SECONDS)

        await raging.rage(break_things, patience=PATIENCE_SECONDS)
        await raging.resume(CURSORS)
        print(f"{fired.total()} faults fired: {dict(fired)}")
        print(raging.report())

    assert raging.violations() == []
    assert [*both.crew.events("defect"), *both.other.events("defect")] == []
    assert raging.resumed.total() == CURSORS
    assert len(raging.resumed) == 3
    assert raging.failures.total() > 10 * CYCLES
    assert raging.cuts > 100 * CYCLES
    assert len(raging.log) > 200 * CYCLES


async def test_a_stranger_who_writes_for_20_seconds_delays_the_wide_scopes_and_nothing_is_lost(
    parley: Client, postgres: EmbeddedPostgres
) -> None:
    raging = Storm([parley], SEED, FOREIGN_SECONDS)
    await raging.prepare(writers=WRITERS, talks=TALKS)
    wide = [each for each in raging.readings if each.scope.kind != "conversation"]
    narrow = [each for each in raging.readings if not each.scope.actor and each not in wide]
    told: list[list[int]] = []
    lags: list[float] = []

    async def write_for_long() -> None:
        stranger = await asyncpg.connect(postgres.url.replace("postgresql+asyncpg", "postgresql"))
        await asyncio.sleep(1)
        await stranger.execute("CREATE TABLE IF NOT EXISTS strangers (said text)")
        try:
            await stranger.execute("BEGIN; INSERT INTO strangers VALUES ('still here')")
            opened = time.monotonic()
            # What was begun before it is told of yet.
            await asyncio.sleep(1)
            told.append([len(places(each.events)) for each in wide])
            while time.monotonic() < opened + FOREIGN_SECONDS:
                lags.append(await caught_up_narrowly())
                await asyncio.sleep(0.5)
            told.append([len(places(each.events)) for each in wide])
            await stranger.execute("COMMIT")
        finally:
            await stranger.execute("ROLLBACK")
            await stranger.execute("DROP TABLE strangers")
            await stranger.close()

    async def caught_up_narrowly() -> float:
        """The seconds until those who follow one conversation have what has happened by now."""
        versions = {talk.id: (await parley.seen(talk)).version for talk in raging.talks}
        started = time.monotonic()
        async with asyncio.timeout(10):
            for each in narrow:
                while len(places(each.events)) < versions[each.scope.id]:
                    await asyncio.sleep(0.01)
        return time.monotonic() - started

    await raging.rage(write_for_long, patience=PATIENCE_SECONDS)
    await raging.resume(CURSORS // 10)
    lags.sort()
    print(raging.report())
    print(f"one conversation was {lags[len(lags) // 2]:.3f} s behind, {lags[-1]:.3f} s at the most")

    assert raging.violations() == []
    before, after = told
    assert before == after
    (everything, *_) = [n for n, each in enumerate(wide) if each.scope == Scope("everything")]
    assert len(raging.log) - after[everything] > 100
    assert lags[len(lags) // 2] < 1
