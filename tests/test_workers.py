"""Several workers: one port, one story, and somebody who keeps them alive."""

import asyncio
import re
import signal
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import pytest_asyncio

from .make import Client, failure
from .process import SERVING, Service, free_port

pytestmark = pytest.mark.slow

WORKERS = 2
CHANNELS = 24


@pytest_asyncio.fixture(scope="module")
async def crew(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator["Crew"]:
    async with Crew(tmp_path_factory.mktemp("crew")) as crew:
        await crew.start()
        yield crew


class Crew:
    """`parley serve --workers 2`, and its admin address."""

    def __init__(self, folder: Path) -> None:
        self.admin = f"127.0.0.1:{free_port()}"
        self.service = Service(folder, workers=WORKERS, admin_address=self.admin)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.service.stop()

    async def start(self) -> None:
        self.service.launch()
        await self.service.said("Parley serves on", seconds=30)

    def lines_of(self, method: str) -> list[dict[str, Any]]:
        return [call for call in self.service.events("call") if method in str(call["method"])]

    async def asked(self, path: str) -> tuple[int, str]:
        def ask() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://{self.admin}{path}", timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        return await asyncio.to_thread(ask)

    async def until_ready(self, seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while (await self.asked("/readyz"))[0] != 200:
                await asyncio.sleep(0.05)

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[list[Client]]:
        """Clients with connections of their own, some of which reach each worker."""
        async with AsyncExitStack() as channels:
            yield [
                Client(
                    await channels.enter_async_context(self.service.channel(alone=True)),
                    self.service.token,
                )
                for _ in range(CHANNELS)
            ]


def has_ended(process: psutil.Process) -> bool:
    """An orphan that ended is a zombie for as long as nobody looks."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_all_workers_serve_and_their_numbers_are_shown_together(crew: Crew) -> None:
    async with crew.clients() as clients:
        await asyncio.gather(*(client.user() for client in clients))
        await failure(clients[0].user("a b"))

    # A line is written a moment after its call was answered.
    async with asyncio.timeout(5):
        while len(calls := crew.lines_of("CreateUser")) <= CHANNELS:
            await asyncio.sleep(0.02)
    assert {line["worker"] for line in calls} == {1, 2}
    labels = 'grpc_method="CreateUser",grpc_service="parley.v1.UserService",grpc_type="unary"'
    _, text = await crew.asked("/metrics")
    handled = dict(re.findall(rf'handled_total{{grpc_code="(\w+)",{labels}}} ([\d.]+)', text))
    assert float(handled["OK"]) >= CHANNELS
    assert float(handled["INVALID_ARGUMENT"]) >= 1
    assert sum(map(float, handled.values())) == len(calls)
    assert await crew.asked("/healthz") == (200, "ok\n")
    assert (await crew.asked("/nothing"))[0] == 404


async def test_no_promise_depends_on_there_being_one(crew: Crew) -> None:
    """Once, in order, without a gap, whichever workers it came to."""
    async with crew.clients() as clients:
        ada = await clients[0].user()
        talk = await clients[0].conversation(ada)
        twins = await asyncio.gather(
            *(client.message(talk, ada, request_id="one") for client in clients)
        )
        sent = await asyncio.gather(
            *(client.message(talk, ada) for client in clients for _ in range(10))
        )
        stored = await clients[0].all_messages(talk)

    assert {each.id for each in twins} == {stored[0].id}
    assert sorted(each.sequence for each in sent) == list(range(2, 10 * CHANNELS + 2))
    assert [each.sequence for each in stored] == list(range(1, 10 * CHANNELS + 2))


async def test_a_worker_that_is_killed_is_replaced_and_nothing_acknowledged_is_lost(
    crew: Crew,
) -> None:
    async with crew.clients() as clients:
        ada = await clients[0].user()
        talk = await clients[0].conversation(ada)
        victim = crew.service.workers()[0]
        sends = [asyncio.ensure_future(client.message(talk, ada)) for client in clients * 10]
        await asyncio.sleep(0.05)
        victim.kill()
        answers = await asyncio.gather(*sends, return_exceptions=True)

    await crew.until_ready()
    assert len(crew.service.workers()) == WORKERS
    assert victim not in crew.service.workers()
    async with crew.clients() as clients:
        stored = await clients[0].all_messages(talk)
    acknowledged = {each.id for each in answers if not isinstance(each, BaseException)}
    assert acknowledged <= {each.id for each in stored}
    assert [each.sequence for each in stored] == list(range(1, len(stored) + 1))
    (told,) = crew.service.events("worker_ended")
    assert told["how"] == "by SIGKILL"


async def test_a_frozen_database_is_told_by_readyz(crew: Crew) -> None:
    postgres = crew.service.postgres()
    for process in postgres:
        process.suspend()
    async with asyncio.timeout(20):
        while (await crew.asked("/readyz"))[0] != 503:
            await asyncio.sleep(0.05)
    assert (await crew.asked("/healthz"))[0] == 200
    for process in postgres:
        process.resume()
    await crew.until_ready()


async def test_workers_end_with_a_supervisor_that_is_killed_and_the_next_one_starts(
    crew: Crew,
) -> None:
    workers = crew.service.workers()

    crew.service.kill()

    _, alive = await asyncio.to_thread(psutil.wait_procs, workers, 10)
    assert not alive
    crew.service.forget_output()
    await crew.start()
    await crew.until_ready()


async def test_a_stop_ends_the_workers_then_the_database(crew: Crew) -> None:
    workers, postmaster = crew.service.workers(), crew.service.postmaster()

    crew.service.process.send_signal(signal.SIGTERM)

    assert await crew.service.ended() == 0
    assert all(map(has_ended, (*workers, postmaster)))
    assert not crew.service.events("worker_killed")


async def test_workers_that_never_work_end_it_with_one_line(tmp_path: Path) -> None:
    async with Crew(tmp_path) as crew:
        await crew.start()
        async with asyncio.timeout(30):
            while crew.service.process.poll() is None:
                for worker in crew.service.workers():
                    worker.kill()
                await asyncio.sleep(0.05)

    assert await crew.service.ended() == 2
    last = crew.service.log.splitlines()[-1]
    assert re.fullmatch(r"parley: worker \d cannot be kept running: .* by SIGKILL\. .*", last)


async def test_another_server_on_the_port_is_told_in_one_line(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    async with Crew(tmp_path / "one") as one, Crew(tmp_path / "other") as other:
        await one.start()
        other.service.set(address=one.service.address)
        other.service.launch()

        assert await other.service.ended() == 2
        assert other.service.log.startswith("parley: PARLEY_ADDRESS: cannot listen on")
        assert await one.service.health() == SERVING
