"""A proxy before PostgreSQL that breaks connections at a chosen moment.

It listens on a Unix socket and knows of PostgreSQL's protocol only what commits: a COMMIT, and a
prepared statement that stores messages outside a transaction.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from enum import Enum
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

# A simple query: its type, its length, itself. asyncpg writes it in one piece.
COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"
BEGIN = re.compile(rb"Q.{4}BEGIN", re.DOTALL)
END = re.compile(rb"Q.{4}(COMMIT|ROLLBACK)\0", re.DOTALL)
# A statement is given a name when it is prepared, and run by that name.
PREPARED = re.compile(rb"P.{4}(\w+)\0[^\0]*INSERT INTO messages", re.DOTALL)
BOUND = re.compile(rb"B.{4}\0(\w+)\0", re.DOTALL)


class Fault(Enum):
    """What befalls the next commit."""

    # PostgreSQL gets it later.
    HELD = "held"
    # The connection is cut before PostgreSQL gets it; after it took effect.
    CUT_BEFORE = "cut before"
    CUT_AFTER = "cut after"
    # It, or its answer, is swallowed, and the connection stays open.
    SWALLOWED_BEFORE = "swallowed before"
    SWALLOWED_AFTER = "swallowed after"


class Proxy:
    def __init__(self, folder: Path, database_url: str) -> None:
        self._folder = folder
        self._upstream = _socket(database_url)
        self._links: set[Link] = set()
        self._server: asyncio.Server | None = None
        # What befalls the next commits, first to last; and how many that happened to.
        self.faults: list[Fault] = []
        self.fired = 0
        # What else happens then, while the client waits for its answer.
        self.meanwhile: Callable[[], Awaitable[None]] = _nothing
        # What went wrong with that: then the test has tested nothing.
        self.failure: Exception | None = None

    @property
    def url(self) -> str:
        return f"postgresql://parley@/parley?host={self._folder}"

    async def open(self) -> None:
        """Take connections in."""
        path = self._folder / ".s.PGSQL.5432"
        self._server = await asyncio.start_unix_server(self._accept, path)

    async def close(self) -> None:
        """Refuse connections, and cut those there are."""
        if self._server:
            self._server.close()
            self._server = None
        (self._folder / ".s.PGSQL.5432").unlink(missing_ok=True)
        self.cut()

    async def lead_to(self, database_url: str) -> None:
        """Another database, in the place of the one that there was."""
        await self.close()
        self._upstream = _socket(database_url)
        await self.open()

    def cut(self) -> None:
        for link in list(self._links):
            link.cut()

    def silence(self) -> None:
        """Swallow what is said on the connections that there are, and leave them open."""
        for link in self._links:
            link.silence()

    async def happen(self) -> None:
        try:
            await self.meanwhile()
        except Exception as error:
            self.failure = error

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await asyncio.open_unix_connection(self._upstream)
        except OSError:
            writer.transport.abort()
            return
        link = Link(self, (reader, writer), upstream)
        self._links.add(link)
        await link.run()
        self._links.discard(link)


class Link:
    """One connection through the proxy."""

    def __init__(
        self,
        proxy: Proxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._client, self._to_client = client
        self._server, self._to_server = server
        self._fault: Fault | None = None
        self._over = asyncio.Event()
        self._in_transaction = False
        self._stores: set[bytes] = set()

    def cut(self) -> None:
        self._to_client.transport.abort()
        self._to_server.transport.abort()
        self._over.set()

    def silence(self) -> None:
        self._fault = Fault.SWALLOWED_BEFORE

    async def run(self) -> None:
        ways = [asyncio.create_task(self._ask()), asyncio.create_task(self._answer())]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        self.cut()

    async def _ask(self) -> None:
        with suppress(OSError):
            while chunk := await self._client.read(1 << 16):
                if self._commits(chunk) and self._proxy.faults:
                    self._fault = self._proxy.faults.pop(0)
                    self._proxy.fired += 1
                    if self._fault in (Fault.HELD, Fault.CUT_BEFORE):
                        await self._proxy.happen()
                    if self._fault is Fault.CUT_BEFORE:
                        return
                    if self._fault is Fault.HELD:
                        self._fault = None
                if self._fault is not Fault.SWALLOWED_BEFORE:
                    self._to_server.write(chunk)
        if self._fault in (Fault.SWALLOWED_BEFORE, Fault.SWALLOWED_AFTER):
            # The client has given up; PostgreSQL is not to know.
            await self._over.wait()

    def _commits(self, chunk: bytes) -> bool:
        """Whether this, written in one piece, ends a transaction for good."""
        self._stores.update(PREPARED.findall(chunk))
        if BEGIN.match(chunk):
            self._in_transaction = True
        elif END.match(chunk):
            self._in_transaction = False
            return chunk == COMMIT
        bound = BOUND.match(chunk)
        return bool(bound and bound[1] in self._stores and not self._in_transaction)

    async def _answer(self) -> None:
        with suppress(OSError):
            while chunk := await self._server.read(1 << 16):
                if self._fault is Fault.CUT_AFTER:
                    await self._proxy.happen()
                    return
                if self._fault is None:
                    self._to_client.write(chunk)
        if self._fault is not None:
            # PostgreSQL may have ended the session; the client is not to know.
            await self._over.wait()


def _socket(database_url: str) -> str:
    (folder,) = parse_qs(urlsplit(database_url).query)["host"]
    return f"{folder}/.s.PGSQL.5432"


async def _nothing() -> None:
    pass


@asynccontextmanager
async def proxy(folder: Path, database_url: str) -> AsyncIterator[Proxy]:
    between = Proxy(folder, database_url)
    await between.open()
    try:
        yield between
    finally:
        await between.close()
        if between.failure:
            raise between.failure
