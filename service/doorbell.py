"""The doorbell: somebody has committed something, here or in another process.

It says neither what nor to whom, and a ring may be lost: whoever waits looks from time to time
anyway. Processes hear each other by NOTIFY, sent every few milliseconds at most, on a connection of
its own and outside any transaction that writes: inside one it takes a lock of the whole cluster.
"""

import asyncio
from contextlib import suppress

import structlog

from service.errors import Unavailable
from service.store import line

log = structlog.get_logger()

CHANNEL = "parley"
GATHER_SECONDS = 0.005
RECONNECT_SECONDS = 1.0


class Doorbell:
    def __init__(self, url: str) -> None:
        self._url = url
        self._rung = asyncio.Event()
        self._owed = asyncio.Event()
        # How often it rang.
        self.rings = 0

    def ring(self) -> None:
        """Something was committed here: wake who waits, here and soon elsewhere."""
        self._hear()
        self._owed.set()

    def nudge(self) -> None:
        """Let those here look once more."""
        self._rung.set()

    async def wait(self, seconds: float) -> None:
        """Return when it rings, or has rung since the last time; after so many seconds anyway."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        self._rung.clear()

    def _hear(self) -> None:
        self.rings += 1
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
