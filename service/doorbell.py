"""The doorbell: somebody has committed something, here or in another process.

It says where at the most, and a ring may be lost: whoever waits looks from time to time anyway.
Processes hear each other by NOTIFY, sent every 20 milliseconds at most, on a connection of its own
and outside any transaction that writes: inside one it takes a lock of the whole cluster. They ring
for those who have asked for it lately: most of the time nobody waits, or nobody elsewhere.
"""

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress

import structlog

from service.driver import driver_url, line
from service.errors import Unavailable

log = structlog.get_logger()

CHANNEL = "parley"
# The first ring goes at once, those that follow it go together: each costs PostgreSQL a commit, and
# every process a look. At 5 ms it made each of many sends, one after the other, 0.2 ms longer.
GATHER_SECONDS = 0.02
RECONNECT_SECONDS = 1.0
# What somebody says who waits, how often, and for how long that holds: one may be lost, or two.
ASK = "ask"
ASK_SECONDS, ASKED_SECONDS = 1.0, 3.5
# Who has more to look at looks everywhere.
MAX_LOCKS = 1_000


class Doorbell:
    def __init__(self, url: str) -> None:
        self._url = driver_url(url, "PARLEY_LISTEN_URL")
        self._rung = asyncio.Event()
        # There is something to tell the others.
        self._due = asyncio.Event()
        self._owes_ring = False
        self._is_listening = False
        # When the others are to be asked again, and until when they have asked.
        self._ask_at = self._asked_until = 0.0
        # How often it rang.
        self.rings = 0
        # Where something may have happened since somebody looked; None is everywhere.
        self._where: set[int] | None = set()

    def ring(self, locks: Collection[int]) -> None:
        """Something was committed here under these locks: wake who waits, here and soon elsewhere.

        A hint: that of a transaction that took none leads to no conversation.
        """
        self.rings += 1
        self.nudge(*locks)
        if time.monotonic() < self._asked_until:
            self._owes_ring = True
            self._due.set()

    def listen(self, on: bool) -> None:
        """Whether somebody here waits for what others commit."""
        self._is_listening = on
        if on:
            self._due.set()

    def nudge(self, *locks: int) -> None:
        """Let those here look once more at what these are the locks of."""
        if self._where is not None:
            self._where.update(locks)
            if len(self._where) > MAX_LOCKS:
                self._where = None
        self._rung.set()

    async def wait(self, seconds: float) -> set[int] | None:
        """Return when it rings, or has rung since the last time, with the locks under which
        something happened; with None, for everything, if nobody knows, or after so many seconds.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        where = self._where if self._rung.is_set() else None
        self._where = set()
        self._rung.clear()
        return where

    def _hear(self) -> None:
        """Somebody else has committed something."""
        self.rings += 1
        self._where = None
        self._rung.set()

    async def run(self) -> None:
        """Carry rings between the processes, whenever the database is there."""
        while True:
            try:
                await self._carry()
            except Unavailable:
                pass
            except Exception:
                log.exception("defect")
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _carry(self) -> None:
        async with line(self._url) as driver:
            own = driver.get_server_pid()

            def hear(_connection: object, pid: int, _channel: str, payload: str) -> None:
                if pid == own:
                    return
                if payload == ASK:
                    self._asked_until = time.monotonic() + ASKED_SECONDS
                else:
                    self._hear()

            await driver.add_listener(CHANNEL, hear)
            # Then a new connection is made, which asks anew.
            driver.add_termination_listener(lambda _: self._due.set())
            self._ask_at = 0.0
            while not driver.is_closed():
                if self._is_listening and time.monotonic() >= self._ask_at:
                    self._ask_at = time.monotonic() + ASK_SECONDS
                    await driver.execute(f"NOTIFY {CHANNEL}, '{ASK}'")
                if self._owes_ring:
                    self._owes_ring = False
                    await driver.execute(f"NOTIFY {CHANNEL}")
                await asyncio.sleep(GATHER_SECONDS)
                with suppress(TimeoutError):
                    async with asyncio.timeout(ASK_SECONDS if self._is_listening else None):
                        await self._due.wait()
                self._due.clear()
