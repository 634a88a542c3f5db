"""The doorbell: somebody has committed something, here or in another process.

It says where as far as it knows, and a ring may be lost: whoever waits looks from time to time
anyway. Processes hear each other by NOTIFY, sent every 20 milliseconds at most, on a connection of
its own and outside any transaction that writes: inside one it takes a lock of the whole cluster.
They ring for those who have asked for it lately: most of the time nobody waits, or not elsewhere.
"""

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import structlog

from service.driver import driver_url, line
from service.errors import Unavailable
from service.logs import reason_of

log = structlog.get_logger()

CHANNEL = "parley"
# The first ring goes at once, those that follow it go together: each costs PostgreSQL a commit, and
# every process a look. At 5 ms it made each of many sends, one after the other, 0.2 ms longer.
GATHER_SECONDS = 0.02
# Between the beginnings of two connections: one that has held is made anew at once.
RECONNECT_SECONDS = 1.0
# For the last ring, when the server stops.
LAST_SECONDS = 0.25
# What somebody says who waits, how often, and for how long that holds: one may be lost, or two.
ASK = "ask"
ASK_SECONDS, ASKED_SECONDS = 1.0, 3.5
# What a ring begins with that says where. Any other payload means everywhere, as it did always.
AT = "at"
# PostgreSQL takes less than 8,000.
MAX_PAYLOAD_BYTES = 7_900
# Who has more to look at looks everywhere.
MAX_LOCKS = 1_000


class Rung:
    """Whether something has happened since somebody looked, and where; None is everywhere."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self._where: set[int] | None = set()

    def add(self, where: Collection[int] | None) -> None:
        if where is None or self._where is None:
            self._where = None
        else:
            self._where.update(where)
            if len(self._where) > MAX_LOCKS:
                self._where = None
        self.event.set()

    def take(self) -> set[int] | None:
        where, self._where = self._where, set()
        self.event.clear()
        return where


class Doorbell:
    def __init__(self, url: str) -> None:
        self._url = driver_url(url, "PARLEY_LISTEN_URL")
        # What those here have not looked at yet, and what the others have not been told.
        self._here, self._owed = Rung(), Rung()
        # There is something to say to the others.
        self._due = asyncio.Event()
        self._is_listening = False
        # When the others are to be asked again, and until when they have asked.
        self._ask_at = self._asked_until = 0.0
        # Whether the others were heard, when that was last logged.
        self._hears = True
        # How often it rang.
        self.rings = 0

    def ring(self, locks: Collection[int]) -> None:
        """Something was committed here under these locks: wake who waits, here and soon elsewhere.

        A hint: that of a transaction that took none leads to no conversation.
        """
        self.rings += 1
        self._here.add(locks)
        if time.monotonic() < self._asked_until:
            self._owe(locks)

    def listen(self, on: bool) -> None:
        """Whether somebody here waits for what others commit."""
        self._is_listening = on
        if on:
            self._due.set()

    def nudge(self, *locks: int) -> None:
        """Let those here look once more at what these are the locks of."""
        self._here.add(locks)

    async def wait(self, seconds: float) -> set[int] | None:
        """Return when it rings, or has rung since the last time, with the locks under which
        something happened; with None, for everything, if nobody knows, or after so many seconds.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._here.event.wait()
        return self._here.take() if self._here.event.is_set() else None

    def _owe(self, where: Collection[int] | None) -> None:
        self._owed.add(where)
        self._due.set()

    def _hear(self, payload: str) -> None:
        """What somebody else says."""
        if payload == ASK:
            self._heed()
        else:
            self.rings += 1
            self._here.add(_where_of(payload))

    def _heed(self) -> None:
        """Somebody else waits, and may have begun to before it was heard: that is one ring."""
        now = time.monotonic()
        if now >= self._asked_until:
            self._owe(None)
        self._asked_until = now + ASKED_SECONDS

    async def run(self) -> None:
        """Carry rings between the processes, whenever the database is there."""
        while True:
            started = time.monotonic()
            try:
                await self._carry()
            except Unavailable as error:
                self._tell(reason_of(error))
            except Exception:
                log.exception("defect")
            await asyncio.sleep(started + RECONNECT_SECONDS - time.monotonic())

    async def _carry(self) -> None:
        async with line(self._url) as driver:
            own = driver.get_server_pid()

            def hear(_connection: object, pid: int, _channel: str, payload: str) -> None:
                if pid != own:
                    self._hear(payload)

            await driver.add_listener(CHANNEL, hear)
            # Then to say something fails, and a new connection is made.
            driver.add_termination_listener(lambda _: self._due.set())
            self._tell(None)
            # Who asked meanwhile was not heard, and who was asked before may be another one.
            self._ask_at = self._asked_until = 0.0
            self._heed()
            try:
                while True:
                    await self._say(driver)
                    await asyncio.sleep(GATHER_SECONDS)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._pause()):
                            await self._due.wait()
                    self._due.clear()
            except asyncio.CancelledError:
                # What was committed last is said by nobody else.
                if self._owed.event.is_set():
                    with suppress(Exception):
                        async with asyncio.timeout(LAST_SECONDS):
                            await self._say(driver)
                raise

    async def _say(self, driver: Any) -> None:
        """What is due, or something: whether a line is dead shows when nothing is answered."""
        said = []
        if self._is_listening and time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + ASK_SECONDS
            said.append(f"NOTIFY {CHANNEL}, '{ASK}'")
        if self._owed.event.is_set():
            said.append(f"NOTIFY {CHANNEL}, '{_payload_of(self._owed.take())}'")
        await driver.execute("; ".join(said) or "SELECT 1")

    def _pause(self) -> float:
        """For how long there is nothing to say, unless something happens."""
        return self._ask_at - time.monotonic() if self._is_listening else ASK_SECONDS

    def _tell(self, reason: str | None) -> None:
        """Log once that the others are not heard, and once that they are again."""
        hears = reason is None
        if hears != self._hears:
            log.info("listening") if hears else log.warning("not_listening", reason=reason)
            self._hears = hears


def _payload_of(where: set[int] | None) -> str:
    """What a ring says: where, if it fits."""
    said = " ".join([AT, *map(str, where)]) if where is not None else ""
    return said if len(said) <= MAX_PAYLOAD_BYTES else ""


def _where_of(payload: str) -> set[int] | None:
    """What a ring says, of whichever version."""
    if payload.startswith(AT):
        with suppress(ValueError):
            return set(map(int, payload.removeprefix(AT).split()))
    return None
