"""The doorbell: processes hear of each other's commits, by a line that may break at any time."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
import structlog

from service import doorbell, driver
from service.doorbell import ASK, MAX_LOCKS, Doorbell
from service.embedded import EmbeddedPostgres

from .proxy import proxy


class Stranger:
    """Another process: what it hears of the others, and when."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._heard: asyncio.Queue[tuple[str, float]] = asyncio.Queue()

    async def listen(self) -> None:
        await self._connection.add_listener(doorbell.CHANNEL, self._hear)

    def _hear(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        self._heard.put_nowait((str(payload), time.monotonic()))

    async def hears(self, payload: str, seconds: float = 3) -> float:
        """When it does, next."""
        async with asyncio.timeout(seconds):
            while True:
                heard, at = await self._heard.get()
                if heard == payload:
                    return at

    async def heard(self, seconds: float) -> list[str]:
        """What it hears for so long."""
        await asyncio.sleep(seconds)
        return [self._heard.get_nowait()[0] for _ in range(self._heard.qsize())]

    async def say(self, payload: str) -> None:
        await self._connection.execute(f"NOTIFY {doorbell.CHANNEL}, '{payload}'")


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is heard but those of the test."""
    monkeypatch.setattr(doorbell, "CHANNEL", "apart")


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest_asyncio.fixture
async def stranger(postgres: EmbeddedPostgres) -> AsyncIterator[Stranger]:
    connection = await asyncpg.connect(postgres.url.replace("+asyncpg", ""))
    stranger = Stranger(connection)
    await stranger.listen()
    yield stranger
    await connection.close()


@asynccontextmanager
async def process(url: str) -> AsyncIterator[Doorbell]:
    bell = Doorbell(url)
    running = asyncio.create_task(bell.run())
    try:
        yield bell
    finally:
        running.cancel()
        await asyncio.wait({running}, timeout=5)
        assert running.done()


async def until(is_so: Callable[[], Awaitable[bool]], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not await is_so():
            await asyncio.sleep(0.01)


async def test_a_ring_says_where_in_so_far_as_it_fits(
    postgres: EmbeddedPostgres, stranger: Stranger
) -> None:
    async with process(postgres.url) as one, process(postgres.url) as other:
        for _ in range(2):
            await stranger.hears("")
        await other.wait(0.1)
        told = []
        for locks in ({5, -(1 << 63)}, set(), range(MAX_LOCKS), range(MAX_LOCKS + 1)):
            one.ring(set(locks))
            told.append(await other.wait(3))

    assert told == [{5, -(1 << 63)}, set(), set(range(MAX_LOCKS)), None]


async def test_a_ring_too_long_to_be_told_means_everywhere(
    postgres: EmbeddedPostgres, stranger: Stranger, lines: list[Any]
) -> None:
    async with process(postgres.url) as bell:
        await stranger.hears("")
        bell.ring(range(1 << 62, (1 << 62) + MAX_LOCKS))
        await stranger.hears("")

    assert lines == []


@pytest.mark.parametrize("payload", ["", "at 1 x", "something of a later version"])
async def test_what_another_version_rings_means_everywhere(
    postgres: EmbeddedPostgres, stranger: Stranger, payload: str
) -> None:
    async with process(postgres.url) as bell:
        await stranger.hears("")
        await stranger.say(payload)

        assert await bell.wait(3) is None
        assert bell.rings == 1


async def test_who_waits_asks_as_often_whatever_else_is_said(
    postgres: EmbeddedPostgres, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ring just before the time to ask was followed by a whole pause."""
    monkeypatch.setattr(doorbell, "ASK_SECONDS", 0.3)
    async with process(postgres.url) as bell:
        await stranger.hears("")
        bell.listen(True)
        asked = [await stranger.hears(ASK)]
        for _ in range(3):
            await asyncio.sleep(0.25)
            bell.ring({1})
            asked.append(await stranger.hears(ASK))

    gaps = [later - earlier for earlier, later in pairwise(asked)]
    assert max(gaps) < 0.45, gaps


async def test_a_line_that_died_silently_is_noticed_though_nobody_here_waits(
    postgres: EmbeddedPostgres, stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorbell, "ASK_SECONDS", 0.3)
    monkeypatch.setattr(driver, "COMMAND_SECONDS", 0.3)
    async with proxy(tmp_path, postgres.url) as between, process(between.url):
        await stranger.hears("")
        # Nothing is under way.
        await asyncio.sleep(0.15)
        between.silence()
        # A new one, which rings.
        await stranger.hears("")


async def test_who_has_just_come_rings_without_having_been_asked_and_then_no_more(
    postgres: EmbeddedPostgres, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorbell, "ASKED_SECONDS", 0.4)
    async with process(postgres.url) as bell:
        await stranger.hears("")
        bell.ring({7})
        await stranger.hears("at 7")
        await asyncio.sleep(0.5)
        bell.ring({8})

        assert await stranger.heard(0.2) == []


async def test_the_first_who_asks_is_told_of_what_was_committed_before(
    postgres: EmbeddedPostgres, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have begun to wait before, and been told of nothing."""
    monkeypatch.setattr(doorbell, "ASKED_SECONDS", 0.3)
    async with process(postgres.url):
        await stranger.hears("")
        await asyncio.sleep(0.4)
        await stranger.say(ASK)
        await stranger.say(ASK)

        assert (await stranger.heard(0.2)).count("") == 1


async def test_a_line_that_had_held_is_made_anew_at_once(
    postgres: EmbeddedPostgres, stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorbell, "RECONNECT_SECONDS", 0.5)
    async with proxy(tmp_path, postgres.url) as between, process(between.url):
        await stranger.hears("")
        await asyncio.sleep(0.6)
        between.cut()
        await stranger.hears("", seconds=0.4)


async def test_one_that_breaks_at_once_is_not(
    postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = 0

    @asynccontextmanager
    async def breaking(url: str) -> AsyncIterator[Any]:
        nonlocal lines
        lines += 1
        async with driver.line(url) as connection:
            connection.terminate()
            yield connection

    monkeypatch.setattr(doorbell, "line", breaking)
    monkeypatch.setattr(doorbell, "RECONNECT_SECONDS", 0.2)
    async with process(postgres.url):
        await asyncio.sleep(0.9)

    assert 2 <= lines <= 5


async def test_the_log_says_once_that_nobody_is_heard_and_once_that_they_are_again(
    postgres: EmbeddedPostgres,
    stranger: Stranger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[Any],
) -> None:
    monkeypatch.setattr(doorbell, "RECONNECT_SECONDS", 0.05)
    url = postgres.url
    async with (
        proxy(tmp_path, url) as between,
        process(between.url.replace("parley@", "parley:hunter2@")),
    ):
        await stranger.hears("")
        assert lines == []
        await between.close()
        await asyncio.sleep(0.3)
        await between.open()
        await stranger.hears("")

    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("not_listening", "warning"),
        ("listening", "info"),
    ]
    assert ": " in lines[0]["reason"]
    assert "hunter2" not in str(lines)


async def test_what_was_committed_last_is_rung_for_at_a_stop(
    postgres: EmbeddedPostgres, stranger: Stranger
) -> None:
    """The first ring goes at once, and the next with those of 20 ms."""
    async with process(postgres.url) as bell:
        await stranger.hears("")
        await asyncio.sleep(0.1)
        bell.ring({1})
        await stranger.hears("at 1")
        bell.ring({2})
    await stranger.hears("at 2")


async def test_a_stop_waits_for_no_database_that_says_nothing(
    postgres: EmbeddedPostgres, stranger: Stranger, tmp_path: Path
) -> None:
    async with proxy(tmp_path, postgres.url) as between, process(between.url) as bell:
        await stranger.hears("")
        await asyncio.sleep(0.1)
        between.silence()
        bell.ring({1})
        await asyncio.sleep(0.01)
        bell.ring({2})
        stopped = time.monotonic()

    assert time.monotonic() - stopped < 1
