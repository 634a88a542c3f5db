"""A real PostgreSQL, migrated; a real server; a real channel. Tables are emptied between tests."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import grpc
import pytest
import pytest_asyncio
import uvloop
from hypothesis import settings

from service import schema
from service.embedded import EmbeddedPostgres
from service.server import Server
from service.settings import load

from .make import Client

# The same examples each time: a change is what should make a test fail, not chance.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

TABLES = (
    "events, requests, message_revisions, messages, participants, conversations, users, "
    "password_failures"
)


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], uvloop.Loop]]:
    """The loop that the server runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture(scope="session")
async def postgres(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedPostgres]:
    embedded = EmbeddedPostgres(tmp_path_factory.mktemp("postgres"))
    await embedded.start()
    await schema.migrate(embedded.url)
    yield embedded
    await embedded.stop()


@pytest_asyncio.fixture(scope="session")
async def database(postgres: EmbeddedPostgres) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the test's own, to look behind the service and to empty its tables."""
    connection = await asyncpg.connect(postgres.url.replace("postgresql+asyncpg", "postgresql"))
    yield connection
    await connection.close()


@pytest_asyncio.fixture(scope="session")
async def server(
    postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    settings = load(address="127.0.0.1:0", data_dir=tmp_path_factory.mktemp("data"))
    server = Server(settings, postgres.url)
    server.bind()
    await server.start()
    await server.readiness.ready.wait()
    yield server
    await server.stop()


@pytest_asyncio.fixture(scope="session")
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel


@pytest_asyncio.fixture
async def parley(
    server: Server, channel: grpc.aio.Channel, database: asyncpg.Connection
) -> AsyncIterator[Client]:
    """The system's client: a token with every scope, no actor."""
    assert server.token
    yield Client(channel, server.token)
    # One that has just been cut may still read, and meet what is done here.
    async with asyncio.timeout(5):
        while server.watching.count:
            await asyncio.sleep(0.05)
    await database.execute(f"TRUNCATE {TABLES}")


@pytest_asyncio.fixture(scope="session")
async def replica(
    postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    """A second server over the same database."""
    settings = load(address="127.0.0.1:0", data_dir=tmp_path_factory.mktemp("replica"))
    replica = Server(settings, postgres.url)
    replica.bind()
    await replica.start()
    await replica.readiness.ready.wait()
    yield replica
    await replica.stop()


@pytest_asyncio.fixture
async def elsewhere(parley: Client, replica: Server) -> AsyncIterator[Client]:
    """The system's client of the second server."""
    assert replica.token
    async with grpc.aio.insecure_channel(replica.address) as channel:
        yield Client(channel, replica.token)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real conversations, where the machine has them."""
    folder = Path(__file__).parent.parent.parent / "shared" / "data"
    if not (folder / "small.jsonl.gz").exists():
        pytest.skip("no shared/data beside the project")
    return folder
