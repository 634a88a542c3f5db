"""The doorbell: somebody has committed something, here or in another process.

It says where at the most, and a ring may be lost: whoever waits looks from time to time anyway.
Processes hear each other by NOTIFY, sent every 20 milliseconds at most, on a connection of its own
and outside any transaction that writes: inside one it takes a lock of the whole cluster.
"""

import asyncio
from collections.abc import Collection
from contextlib import suppress

import structlog

from service.driver import line
from service.errors import Unavailable

log = structlog.get_logger()

CHANNEL = "parley"
# The first ring goes at once, those that follow it go together: each costs PostgreSQL a commit, and
# every process a look. At 5 ms it made each of many sends, one after the other, 0.2 ms longer.
GATHER_SECONDS = 0.02
RECONNECT_SECONDS = 1.0


class Doorbell:
    def __init__(self, url: str) -> None:
        self._url = url
        self._rung = asyncio.Event()
        self._owed = asyncio.Event()
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
        self._owed.set()

    def nudge(self, *locks: int) -> None:
        """Let those here look once more at what these are the locks of."""
        if self._where is not None:
            self._where.update(locks)
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

            def hear(_connection: object, pid: int, _channel: str, _payload: str) -> None:
                if pid != own:
                    self._hear()

            await driver.add_listener(CHANNEL, hear)
            # Then the next NOTIFY fails, and a new connection is made.
            driver.add_termination_listener(lambda _: self._owed.set())
            while True:
                await self._owed.wait()
                self._owed.clear()
                await driver.execute(f"NOTIFY {CHANNEL}")
                await asyncio.sleep(GATHER_SECONDS)
