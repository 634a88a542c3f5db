"""The door to the database: `transaction()` writes, `snapshot()` reads, `statements()` does both in
single statements; driver errors stop here.

Every connection but that of the statements is read-only until a transaction says otherwise, so
PostgreSQL itself refuses a write through a snapshot. A transaction locks its conversation in a
statement of its own, before anything is read or written: a statement takes its snapshot before it
waits, so one that locks and checks at once would check the past. A statement that does it all
checks, when it writes, that what it was decided on is still so.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import uuid4

import asyncpg
import structlog
from sqlalchemy import exc
from sqlalchemy.pool import PoolProxiedConnection

from service.driver import (
    LOST,
    PING_SECONDS,
    READ_ONLY_SESSION,
    SESSION,
    STALE,
    Kept,
    cause_of,
    checkout,
    discard,
    is_bad_value,
    is_lost,
    new_engine,
)
from service.errors import Aborted, DataLoss, InvalidArgument, ParleyError, Unavailable
from service.indoubt import Inquiry, SelfCommitting, mark_of
from service.metrics import CONNECTIONS
from service.repositories.base import Connection, Mark
from service.repositories.conversations import Conversations
from service.repositories.cursors import Cursors
from service.repositories.events import Events
from service.repositories.feed import Feed
from service.repositories.inbox import Inbox
from service.repositories.invitations import Invitations
from service.repositories.messages import Messages
from service.repositories.participants import Participants
from service.repositories.passwords import Passwords
from service.repositories.requests import Requests
from service.repositories.search import Search
from service.repositories.tokens import Tokens
from service.repositories.users import Users

log = structlog.get_logger()

POOL_WAIT_SECONDS = 0.25
# How long a call queues before it may ask for a lock, or search.
QUEUE_SECONDS = 5.0
CLOSE_SECONDS = 2.0

BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"

# "off" on a primary, unless somebody has made it, its database or our role read-only by default.
PING = """
SELECT version_num AS revision, current_setting('transaction_read_only') = 'off' AS writable,
       (SELECT system_identifier::text FROM pg_control_system()) AS cluster,
       pg_snapshot_xmin(pg_current_snapshot())::text AS oldest_xid,
       pg_snapshot_xmax(pg_current_snapshot())::text AS end_xid
FROM alembic_version
"""


class Snapshot:
    """Reads. Each statement sees what was committed when it began."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @cached_property
    def users(self) -> Users:
        return Users(self.connection)

    @cached_property
    def conversations(self) -> Conversations:
        return Conversations(self.connection)

    @cached_property
    def participants(self) -> Participants:
        return Participants(self.connection)

    @cached_property
    def inbox(self) -> Inbox:
        return Inbox(self.connection)

    @cached_property
    def invitations(self) -> Invitations:
        return Invitations(self.connection)

    @cached_property
    def cursors(self) -> Cursors:
        return Cursors(self.connection)

    @cached_property
    def messages(self) -> Messages:
        return Messages(self.connection)

    @cached_property
    def search(self) -> Search:
        return Search(self.connection)

    @cached_property
    def requests(self) -> Requests:
        return Requests(self.connection)

    @cached_property
    def events(self) -> Events:
        return Events(self.connection)

    @cached_property
    def feed(self) -> Feed:
        return Feed(self.connection)

    @cached_property
    def passwords(self) -> Passwords:
        return Passwords(self.connection)

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self.connection)


class Transaction(Snapshot):
    """Reads and writes, all or nothing: ends in COMMIT unless it raises or is a dry run."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.dry_run = False
        # The advisory locks that it holds.
        self.locks: set[int] = set()

    async def lock(self, lock: int) -> None:
        """One more advisory lock: of a wider scope first, and never a second conversation's."""
        self.locks.add(lock)
        await self.connection.fetch("SELECT pg_advisory_xact_lock($1)", lock)

    async def try_locks(self, locks: Iterable[int]) -> set[int]:
        """Those of the advisory locks that are free, held until the transaction ends."""
        rows = await self.connection.fetch(
            "SELECT k FROM unnest($1::bigint[]) AS k WHERE pg_try_advisory_xact_lock(k)",
            sorted(locks),
        )
        held = {row["k"] for row in rows}
        self.locks |= held
        return held


class Statements(Snapshot):
    """Reads and writes, each statement a transaction of its own."""

    def __init__(self, connection: SelfCommitting) -> None:
        super().__init__(connection)
        self.session = connection.session
        # The advisory locks under which something was written.
        self.locks: set[int] = set()


@dataclass(frozen=True, slots=True)
class Condition:
    """What a ping found: the schema's revision (None: no schema), whether writes are taken, which
    PostgreSQL it is that answered, the oldest transaction that has not ended, and the first one
    after which none has ended.
    """

    revision: str | None
    writable: bool = True
    cluster: str = ""
    oldest_xid: int = 0
    end_xid: int = 0


class Store:
    """A pool of connections, and whether the database behind it answers."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        self._engine = new_engine(
            url, READ_ONLY_SESSION, pool_size=pool_size, pool_wait=POOL_WAIT_SECONDS
        )
        # For statements that write and commit by themselves. One batch at a time does that.
        self._writer = Kept(new_engine(url, SESSION, pool_size=1, pool_wait=POOL_WAIT_SECONDS))
        # A ping must not queue behind the calls whose fate it foretells.
        self._ping_engine = new_engine(url, SESSION, pool_size=1, pool_wait=PING_SECONDS)
        self._inquiry = Inquiry(self._ping_engine, on_answer=self._note_answer)
        # Kept by whoever pings. While False, calls are refused at once instead of waiting.
        self.reachable = True
        self.writable = True
        # Which PostgreSQL was prepared for us. Another one that answers in its place, restored
        # from a backup, is not used before it has begun an era of its own. None: any.
        self.cluster: str | None = None
        # Called whenever something was committed, with the locks under which it was.
        self.on_commit: Callable[[Collection[int]], None] = lambda _: None
        # Whoever waits for a lock holds a connection: half of them at the most, so that a
        # conversation that many want to change takes none from those who want to read. A search of
        # much may hold one for seconds: two fifths, or ten searches would stop all others.
        self._waiting = asyncio.Semaphore(pool_size // 2)
        self._searching = asyncio.Semaphore(max(1, pool_size * 2 // 5))

    async def close(self) -> None:
        """Take leave of the database, unless that says nothing."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                for pool in (self._engine, self._writer, self._ping_engine):
                    await pool.dispose()

    def _note_answer(self) -> None:
        self.reachable = True

    def require_reachable(self) -> None:
        if not self.reachable:
            raise Unavailable("DATABASE_UNAVAILABLE")

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        async with self._connect(checkout(self._engine)) as pooled:
            yield Snapshot(Connection(self._engine, pooled))

    @asynccontextmanager
    async def long_snapshot(self) -> AsyncIterator[Snapshot]:
        """A snapshot for what may have to look at much: few at a time."""
        turn = self._turn(self._searching, lambda: Unavailable("OVERLOADED"))
        async with turn, self.snapshot() as snapshot:
            yield snapshot

    @asynccontextmanager
    async def statements(self) -> AsyncIterator[Statements]:
        """A connection on which `write` commits by itself."""
        self._require_writable()
        async with self._connect(self._writer.checkout()) as pooled:
            statements = Statements(SelfCommitting(self._inquiry, self._writer.engine, pooled))
            try:
                yield statements
            finally:
                if statements.locks:
                    self.on_commit(statements.locks)

    @asynccontextmanager
    async def transaction(
        self, *, lock: int | None = None, try_locks: Collection[int] = ()
    ) -> AsyncIterator[Transaction]:
        """One transaction; with `lock`, alone under that advisory lock from its first moment; with
        `try_locks`, under those of them that are free.
        """
        self._require_writable()
        first = ""
        if lock is not None:
            first = f"SELECT pg_advisory_xact_lock({lock})"
        elif try_locks:
            locks = ",".join(map(str, sorted(try_locks)))
            first = (
                f"SELECT FROM unnest('{{{locks}}}'::bigint[]) k WHERE pg_try_advisory_xact_lock(k)"
            )
        async with self._begun(first, may_wait=lock is not None) as (pooled, status):
            driver: Any = pooled.driver_connection
            try:
                transaction = Transaction(Connection(self._engine, pooled))
                if lock is not None:
                    transaction.locks.add(lock)
                if status == f"SELECT {len(try_locks)}":
                    # Nearly always all of them; only their number comes with BEGIN.
                    transaction.locks.update(try_locks)
                elif try_locks:
                    await transaction.try_locks(try_locks)
                yield transaction
                mark = transaction.connection.mark
                if not transaction.dry_run and mark is None:
                    mark = await mark_of(driver)
            except BaseException as error:
                if not is_lost(error):
                    await driver.execute("ROLLBACK")
                raise
            if transaction.dry_run:
                await driver.execute("ROLLBACK")
            else:
                await self._commit(pooled, mark)
                if mark:
                    self.on_commit(transaction.locks)

    def _require_writable(self) -> None:
        if self.reachable and not self.writable:
            raise Unavailable("DATABASE_READ_ONLY")

    @asynccontextmanager
    async def _begun(
        self, first: str, *, may_wait: bool
    ) -> AsyncIterator[tuple[PoolProxiedConnection, str]]:
        """A connection in a transaction, and the status of its first statement, which comes with
        BEGIN and may wait for a lock.
        """
        async with AsyncExitStack() as exits:
            async with self._turn_to_wait() if may_wait else nullcontext():
                pooled = await exits.enter_async_context(self._connect(checkout(self._engine)))
                status = await _begin(pooled.driver_connection, first)
            yield pooled, status

    def _turn_to_wait(self) -> AbstractAsyncContextManager[None]:
        return self._turn(self._waiting, lambda: Aborted("LOCK_TIMEOUT", retry_after=0.5))

    @asynccontextmanager
    async def _turn(
        self, turns: asyncio.Semaphore, refusal: Callable[[], ParleyError]
    ) -> AsyncIterator[None]:
        """Queue for the right to hold a connection for long. Costs none; refused in the end."""
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await turns.acquire()
        except TimeoutError:
            raise refusal() from None
        try:
            yield
        finally:
            turns.release()

    async def ping(self) -> Condition:
        """Ask the database how it is, within PING_SECONDS; raises Unavailable."""
        try:
            async with (
                asyncio.timeout(PING_SECONDS),
                checkout(self._ping_engine) as pooled,
            ):
                driver: Any = pooled.driver_connection
                row = await driver.fetchrow(PING)
        except asyncpg.UndefinedTableError:
            return Condition(None)
        except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
            raise Unavailable("DATABASE_UNAVAILABLE") from cause_of(error)
        if row is None:
            return Condition(None)
        return Condition(
            row["revision"],
            row["writable"],
            row["cluster"],
            int(row["oldest_xid"]),
            int(row["end_xid"]),
        )

    async def begin_era(self) -> int | None:
        """Start a new era if the database was restored, before anybody else may use it: its number;
        else None. Raises Unavailable.
        """
        try:
            async with checkout(self._ping_engine) as pooled:
                return await Events(Connection(self._ping_engine, pooled)).begin_era()
        except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
            raise Unavailable("DATABASE_UNAVAILABLE") from cause_of(error)

    @asynccontextmanager
    async def _connect(
        self, taken: AbstractAsyncContextManager[PoolProxiedConnection]
    ) -> AsyncIterator[PoolProxiedConnection]:
        self.require_reachable()
        try:
            async with taken as pooled:
                if self.cluster not in (None, pooled.info["cluster"]):
                    discard(pooled)
                    raise Unavailable("DATABASE_UNAVAILABLE")
                with CONNECTIONS.track_inprogress():
                    yield pooled
        except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
            translated = translate(error)
            if translated.reason == "DATABASE_READ_ONLY":
                # The writer may be elsewhere by now: connect anew.
                await self._engine.dispose()
                await self._writer.dispose()
            raise translated from error

    async def _commit(self, pooled: PoolProxiedConnection, mark: Mark | None) -> None:
        """COMMIT, once. When its answer is lost, find out what happened instead of repeating it."""
        driver: Any = pooled.driver_connection
        try:
            await driver.execute("COMMIT")
        except (*LOST, asyncpg.PostgresError) as error:
            if mark is None:
                # Nothing was written, so nothing can be lost.
                return discard(pooled)
            if not is_lost(error):
                raise
            life = pooled.info["life"]
            discard(pooled)
            await self._inquiry.committed(mark, life)


async def _begin(driver: Any, first: str) -> str:
    """Begin with this statement, if there is one; its status, as "SELECT 3"."""
    try:
        return str(await driver.execute(f"{BEGIN}; {first}"))
    except asyncpg.PostgresError as error:
        if not is_lost(error):
            await driver.execute("ROLLBACK")
        if not isinstance(error, asyncpg.FeatureNotSupportedError):
            raise
        # How a standby answers READ WRITE.
        raise asyncpg.ReadOnlySQLTransactionError(*error.args) from error


def translate(error: BaseException) -> ParleyError:
    """The domain's error for the database's, by SQLSTATE; what is nobody's fault but ours, raises.

    Certain to have had no effect: only COMMIT itself is uncertain, and COMMIT is resolved before
    its error comes here.
    """
    if isinstance(error, exc.TimeoutError):
        return Unavailable("OVERLOADED")
    cause = cause_of(error)
    state = getattr(cause, "sqlstate", None) or ""
    if state in ("40001", "40P01") or isinstance(cause, STALE):
        return Aborted("CONFLICT", retry_after=0.05)
    if state == "55P03":
        return Aborted("LOCK_TIMEOUT", retry_after=0.5)
    if state == "57014":
        # No client's deadline does that: it is the limit of every statement.
        return Unavailable("OVERLOADED")
    if state == "25006":
        return Unavailable("DATABASE_READ_ONLY")
    # 28, 3D: the database does not let us in.
    if is_lost(error) or state.startswith(("53", "28", "3D")):
        return Unavailable("DATABASE_UNAVAILABLE")
    if state.startswith(("22", "54")) or is_bad_value(cause):
        log.error("validation_gap", exc_info=error)
        return InvalidArgument("INVALID_VALUE", field="request", rule="the database refused it")
    if state.startswith("XX00"):
        correlation_id = uuid4().hex
        log.error("data_loss", correlation_id=correlation_id, exc_info=error)
        return DataLoss("DATA_LOSS", correlation_id=correlation_id)
    raise error
