"""Too much at once: who asks for more than its share, and what a full server says."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import pytest

from parley.v1 import user_pb2
from service import tokens
from service.embedded import EmbeddedPostgres
from service.errors import ResourceExhausted
from service.ids import lock_of
from service.limits import CallRate
from service.server import Server
from service.settings import load

from .make import Client, failure
from .process import SERVING, health


@asynccontextmanager
async def serving(url: str, folder: Path, **settings: Any) -> AsyncIterator[Client]:
    server = Server(load(address="127.0.0.1:0", data_dir=folder, **settings), url)
    server.bind()
    await server.start()
    await server.readiness.ready.wait()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            assert server.token
            yield Client(channel, server.token)
    finally:
        await server.stop()


def nobody(client: Client) -> Awaitable[Any]:
    return client.users.GetUser(user_pb2.GetUserRequest(user_id="nobody"))  # type: ignore[no-any-return]


async def test_a_caller_over_its_rate_is_told_when_to_come_back_and_others_go_on(
    parley: Client, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    other = await tokens.create(
        postgres.url, service="other", scopes=["read", "system"], expires_in=None
    )
    async with serving(postgres.url, tmp_path, calls_per_second=0.5) as client:
        answers = await asyncio.gather(*(client.user() for _ in range(30)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        told = await failure(client.user())
        unknown = await failure(nobody(Client(client.channel, other)))
        assert told.retry_seconds
        await asyncio.sleep(told.retry_seconds)
        await client.user()

    # One at first, and another one at most if this took two seconds.
    assert len(refused) >= 28
    assert (told.code, told.reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")
    assert told.quota == "calls of development"
    assert told.retry_seconds <= 2
    assert unknown.code == "NOT_FOUND"


async def test_a_full_server_says_so_at_once_is_healthy_and_goes_on(
    parley: Client, postgres: EmbeddedPostgres, database: asyncpg.Connection, tmp_path: Path
) -> None:
    async with serving(postgres.url, tmp_path, max_calls=8) as client:
        ada = await client.user()
        talk = await client.conversation(ada)
        async with database.transaction():
            await database.execute("SELECT pg_advisory_xact_lock($1)", lock_of(UUID(talk.id)))
            waiting = [asyncio.ensure_future(client.message(talk, ada)) for _ in range(8)]
            while not await database.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)

            told = await failure(client.user())
            assert await health(client.channel) == SERVING

        assert (told.code, told.reason) == ("UNAVAILABLE", "OVERLOADED")
        assert told.retry_seconds
        assert sorted([(await each).sequence for each in waiting]) == list(range(1, 9))
        await client.user()


def test_a_bucket_fills_with_time_and_never_over_its_rim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rate = CallRate(4)

    def taken() -> int:
        for count in range(10):
            try:
                rate.take("ada")
            except ResourceExhausted:
                return count
        raise AssertionError("it has no bottom")

    assert taken() == 4
    now += 0.5
    assert taken() == 2
    now += 3600
    assert taken() == 4


def test_less_than_one_call_a_second_can_be_had_too() -> None:
    CallRate(0.1).take("ada")
