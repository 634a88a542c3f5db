"""What operators see of watches, batches and connections."""

import asyncio
from collections.abc import Callable

import asyncpg
import pytest_asyncio
from prometheus_client import REGISTRY

from service.embedded import EmbeddedPostgres
from service.rules.feed import Horizon
from service.server import Server

from .make import Client


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.02)


async def test_watches_and_what_they_are_told_are_counted(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    before = value("parley_events_delivered_total")
    call = parley.watch(conversation_id=talk.id)
    await call.read()
    assert value("parley_watches") == 1

    await parley.message(talk, ada)
    assert len((await call.read()).events) == 1

    assert value("parley_events_delivered_total") == before + 1
    call.cancel()
    await until(lambda: value("parley_watches") == 0)


async def test_batches_are_counted_by_kind_with_what_was_in_them(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    names = ("parley_batch_items_count", "parley_batch_items_sum")
    batches, items = (value(name, batch="send") for name in names)

    await asyncio.gather(*(parley.message(talk, ada) for _ in range(20)))

    assert 1 <= value(names[0], batch="send") - batches <= 20
    assert value(names[1], batch="send") - items == 20


async def test_connections_are_counted_while_they_are_at_work(server: Server) -> None:
    name = "parley_database_connections_in_use"
    await until(lambda: value(name) == 0)
    async with server.store.snapshot(), server.store.snapshot():
        assert value(name) >= 2
    await until(lambda: value(name) == 0)


@pytest_asyncio.fixture
async def foreign(postgres: EmbeddedPostgres) -> asyncpg.Connection:
    return await asyncpg.connect(postgres.url.replace("postgresql+asyncpg", "postgresql"))


async def test_the_horizon_grows_old_behind_a_transaction_that_stays_open(
    parley: Client, foreign: asyncpg.Connection
) -> None:
    name = "parley_horizon_age_seconds"
    await foreign.execute("BEGIN; SELECT pg_current_xact_id()")
    try:
        # It holds up nothing until somebody else has written.
        await parley.user()
        await until(lambda: value(name) > 1)
    finally:
        await foreign.close()

    await until(lambda: value(name) < 1)


def test_a_horizon_is_as_old_as_its_transaction() -> None:
    horizon = Horizon()
    # 8 ends while 7 goes on; then that has ended, too, and 9 goes on while 10 ends.
    looks = [(7, 7, 1.0), (7, 8, 2.0), (7, 9, 5.0), (9, 11, 6.0), (9, 11, 8.0), (11, 11, 9.0)]
    assert [horizon.age(oldest, end, at=at) for oldest, end, at in looks] == [0, 1, 4, 0, 2, 0]
