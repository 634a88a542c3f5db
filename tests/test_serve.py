"""`parley serve` and `parley migrate` as an operator meets them: starting, stopping, saying no."""

import asyncio
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from parley.v1 import user_pb2
from service import schema
from service.embedded import EmbeddedPostgres
from service.server import end

from .make import Client, failure
from .process import SERVING, Service, parley

# What the first answered call may have cost, where there is a database already: so many times as
# much as to import what it stands on.
START_COST = 2.5
IMPORTS = "import alembic, asyncpg, grpc.aio, sqlalchemy.ext.asyncio"


@pytest_asyncio.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """A folder in which Parley has served; whoever wants one running starts it."""
    service = Service(tmp_path_factory.mktemp("served"))
    await service.start()
    yield service
    await service.stop()


async def test_a_start_says_that_it_serves_and_how_it_is_called(served: Service) -> None:
    token = served.folder / "data" / "token"
    await served.said(f"Parley serves on {served.address}.")

    assert f"Bearer {served.token}" in served.output
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert served.events("serving")


async def test_an_address_that_is_taken_is_one_line(served: Service, tmp_path: Path) -> None:
    refused = await asyncio.to_thread(parley, "serve", address=served.address, data_dir=tmp_path)

    _one_line(refused, f"PARLEY_ADDRESS: cannot listen on {served.address}: Address already in use")


async def test_a_folder_that_is_in_use_is_one_line(served: Service) -> None:
    folder = served.folder / "data"

    refused = await asyncio.to_thread(parley, "serve", address="127.0.0.1:0", data_dir=folder)

    _one_line(refused, f"{folder} is in use by another Parley (pid {served.process.pid})")


async def test_a_stop_lets_what_runs_end_and_the_database_stops_last(served: Service) -> None:
    async with served.channel() as channel:
        client = Client(channel, served.token)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        reflection = await _reflection(client)
        ada = await client.user("ada")
        talk = await client.conversation(ada)
        postgres = served.postmaster()
        database = await asyncpg.connect(served.database_url)
        async with database.transaction():
            await database.execute("SELECT FROM conversations WHERE id = $1 FOR UPDATE", talk.id)
            running = asyncio.ensure_future(client.message(talk, ada, "in time"))
            await asyncio.sleep(0.1)

            served.process.send_signal(signal.SIGTERM)
            stopping = time.monotonic()

            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert (await failure(watch.read())).code == "UNAVAILABLE"
            ended = await failure(reflection.read())
            assert (ended.code, ended.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
            refused = await failure(client.user("late"))
            assert refused.code == "UNAVAILABLE"
            assert not running.done()
            assert postgres.is_running()

        assert (await running).sequence == 1
        await database.close()
    assert await served.ended() == 0
    print(f"ended after {time.monotonic() - stopping:.2f} s")
    assert time.monotonic() - stopping < 5
    assert not postgres.is_running()
    assert "Traceback" not in served.log


async def test_the_next_start_is_quick_and_knows_what_was_there(served: Service) -> None:
    before = served.token
    started = time.monotonic()
    served.launch()

    await served.until(SERVING, name="liveness", seconds=20)
    alive = time.monotonic() - started
    await served.until(SERVING, seconds=20)
    async with served.channel() as channel:
        found = await Client(channel, before).users.GetUser(user_pb2.GetUserRequest(user_id="ada"))
    answered = time.monotonic() - started

    spent = sum(psutil.Process(served.process.pid).cpu_times()[:2])
    print(f"alive after {alive:.2f} s, answered after {answered:.2f} s, {spent:.2f} s of a CPU")
    assert found.user.username == "ada"
    assert spent < START_COST * await asyncio.to_thread(_cost_of, IMPORTS)
    assert served.token == before


def _cost_of(code: str) -> float:
    """Seconds of a processor that Python takes for it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


async def test_a_signal_that_is_sent_twice_is_one(served: Service) -> None:
    """To a process and to its group, as by `make` when the group is told to end."""
    await _running(served)
    postgres = served.postmaster()

    for _ in range(5):
        served.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.02)

    assert await served.ended(10) == 0
    assert not postgres.is_running()


async def test_a_second_signal_ends_it_at_once_and_the_next_start_adopts_the_database(
    served: Service,
) -> None:
    await _running(served)
    async with served.channel() as channel:
        client = Client(channel, served.token)
        ada = await client.user()
        talk = await client.conversation(ada)
        database = await asyncpg.connect(served.database_url)
        async with database.transaction():
            await database.execute("SELECT FROM conversations WHERE id = $1 FOR UPDATE", talk.id)
            running = asyncio.ensure_future(client.message(talk, ada))
            await asyncio.sleep(0.1)
            served.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(1.1)
            assert served.process.poll() is None

            served.process.send_signal(signal.SIGTERM)

            assert await served.ended(1) == 1
        assert (await failure(running)).code == "UNAVAILABLE"
        await database.close()

    orphan = served.postmaster()
    await served.start()
    assert served.postmaster() == orphan


async def test_control_c_ends_it_without_a_traceback(served: Service) -> None:
    await _running(served)

    # The terminal sends it to the whole group; PostgreSQL is not in it.
    os.killpg(served.process.pid, signal.SIGINT)

    assert await served.ended(10) == 0
    assert "Traceback" not in served.log
    assert "Aborted" not in served.log


async def test_a_signal_during_the_start_ends_it_too(served: Service) -> None:
    await served.stop()
    served.launch()
    await served.until(SERVING, name="liveness", seconds=10)

    served.process.send_signal(signal.SIGTERM)

    assert await served.ended(10) == 0
    assert "Traceback" not in served.log


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pool_size": "abc"}, "PARLEY_POOL_SIZE"),
        ({"database_url": "mysql://parley:hunter2@localhost/parley"}, "PARLEY_DATABASE_URL"),
    ],
)
async def test_a_setting_that_cannot_be_right_is_one_line(
    tmp_path: Path, settings: dict[str, str], named: str
) -> None:
    given = {"address": "127.0.0.1:0", "data_dir": tmp_path} | settings

    refused = await asyncio.to_thread(lambda: parley("serve", **given))

    _one_line(refused, named)
    assert "hunter2" not in refused.stderr


async def test_a_migration_can_be_repeated_and_raced(
    postgres: EmbeddedPostgres, database: asyncpg.Connection
) -> None:
    await database.execute("CREATE DATABASE other")
    url = postgres.url.replace("/parley?", "/other?").replace("+asyncpg", "")

    raced = await asyncio.gather(
        *(asyncio.to_thread(parley, "migrate", database_url=url) for _ in range(2))
    )
    await schema.migrate(url)

    for done in raced:
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"The schema is at revision {schema.needed_revision()}.\n"
    other = await asyncpg.connect(url)
    found = await other.fetchval("SELECT version_num FROM alembic_version")
    assert found == schema.needed_revision()

    # A newer version of Parley was here.
    await other.execute("UPDATE alembic_version SET version_num = '9999'")
    await other.close()
    with pytest.raises(schema.MigrationFailed, match="9999"):
        await schema.migrate(url)
    await database.execute("DROP DATABASE other")


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("", "PARLEY_DATABASE_URL"),
        ("postgresql://parley:hunter2@127.0.0.1:1/parley", "ConnectionRefusedError"),
    ],
)
async def test_a_migration_that_cannot_be_is_one_line(url: str, named: str) -> None:
    # What listens elsewhere is none of its business.
    refused = await asyncio.to_thread(parley, "migrate", database_url=url, address="0.0.0.0:50051")

    _one_line(refused, named)
    assert "hunter2" not in refused.stderr


def _one_line(refused: subprocess.CompletedProcess[str], said: str) -> None:
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert refused.stderr.startswith("parley: ")
    assert said in refused.stderr


async def _running(service: Service) -> None:
    if service.process.poll() is not None:
        await service.start()


async def _reflection(client: Client) -> Any:
    """A reflection stream that has answered once and stays open."""
    converse: Any = client.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    stream = converse(metadata=client.metadata)
    await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    assert (await stream.read()).list_services_response.service
    return stream


async def test_a_stop_is_not_missed_by_who_takes_it_for_an_error() -> None:
    """A cancel amid a query came out as an error of the database: the server never ended."""
    began, cancels = asyncio.Event(), 0

    async def survive() -> None:
        nonlocal cancels
        while True:
            try:
                began.set()
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancels += 1
                if cancels > 1:
                    raise

    surviving = asyncio.create_task(survive())
    await began.wait()
    await end([surviving])

    assert surviving.cancelled()
    assert cancels == 2
