"""The door to the database: `transaction()` writes, `snapshot()` reads; driver errors stop here.

Every connection is read-only until a transaction says otherwise, so PostgreSQL itself refuses a
write through a snapshot. A transaction locks its conversation in a statement of its own, before
anything is read or written: a statement takes its snapshot before it waits, so one that locks and
checks at once would check the past.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import asyncpg
import structlog
from sqlalchemy import event, exc, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from service.errors import (
    Aborted,
    DataLoss,
    DeadlineExceeded,
    InvalidArgument,
    ParleyError,
    Unavailable,
    Unknown,
)
from service.repositories.base import Connection, Mark
from service.repositories.conversations import Conversations
from service.repositories.events import Events
from service.repositories.messages import Messages
from service.repositories.participants import Participants
from service.repositories.requests import Requests
from service.repositories.tokens import Tokens
from service.repositories.users import Users

log = structlog.get_logger()

POOL_WAIT_SECONDS = 0.25
CONNECT_SECONDS = 3.0
# The server ends a statement first; the client's limit is for a server that says nothing at all.
STATEMENT_MILLISECONDS = 4_000
COMMAND_SECONDS = 5.0
RESOLVE_SECONDS = 10.0
PING_SECONDS = 2.0

SESSION = {
    "application_name": "parley",
    "default_transaction_read_only": "on",
    "statement_timeout": str(STATEMENT_MILLISECONDS),
    "lock_timeout": "2000",
    "idle_in_transaction_session_timeout": "10000",
    "transaction_timeout": "15000",
    # Every statement of ours is short; compiling one costs more than it could save.
    "jit": "off",
    "timezone": "UTC",
}
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
# Asked for before COMMIT, to find out afterwards what became of the transaction. The timeline
# belongs to it: after a failover the same number may be another transaction's.
MARK = (
    "SELECT pg_current_xact_id_if_assigned()::text AS xid,"
    " left(pg_walfile_name(pg_current_wal_lsn()), 8) AS timeline"
)
OUTCOME = (
    "SELECT pg_xact_status($1::text::xid8) AS status,"
    " left(pg_walfile_name(pg_current_wal_lsn()), 8) AS timeline"
)
# What a database that is refused, lost, frozen or gone looks like from here.
LOST = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)


def driver_url(url: str) -> str:
    """SQLAlchemy's spelling of a PostgreSQL URL that names no driver."""
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgres", "postgresql"):
        scheme = "postgresql+asyncpg"
    return f"{scheme}{separator}{rest}"


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
    def messages(self) -> Messages:
        return Messages(self.connection)

    @cached_property
    def requests(self) -> Requests:
        return Requests(self.connection)

    @cached_property
    def events(self) -> Events:
        return Events(self.connection)

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self.connection)


class Transaction(Snapshot):
    """Reads and writes, all or nothing: ends in COMMIT unless it raises or is a dry run."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.dry_run = False

    async def try_locks(self, locks: Iterable[int]) -> set[int]:
        """Those of the advisory locks that are free, held from now until the transaction ends."""
        rows = await self.connection.fetch(
            "SELECT k FROM unnest($1::bigint[]) AS k WHERE pg_try_advisory_xact_lock(k)",
            sorted(locks),
        )
        return {row["k"] for row in rows}


@dataclass(frozen=True, slots=True)
class Condition:
    """What a ping found: the schema's revision (None: no schema), and whether writes are taken."""

    revision: str | None
    writable: bool


class Store:
    """A pool of connections, and whether the database behind it answers."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        self._engine = _engine(url, pool_size=pool_size, pool_wait=POOL_WAIT_SECONDS)
        # A ping must not queue behind the calls whose fate it foretells.
        self._ping_engine = _engine(url, pool_size=1, pool_wait=PING_SECONDS)
        # Kept by whoever pings. While False, calls are refused at once instead of waiting.
        self.reachable = True

    async def close(self) -> None:
        await self._engine.dispose()
        await self._ping_engine.dispose()

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        async with self._connect() as (connection, driver):
            try:
                yield Snapshot(Connection(connection, driver))
            except LOST:
                await connection.invalidate()
                raise

    @asynccontextmanager
    async def transaction(self, *, lock: int | None = None) -> AsyncIterator[Transaction]:
        """One transaction; with `lock`, alone under that advisory lock from its first moment."""
        async with self._connect() as (connection, driver):
            begin = BEGIN if lock is None else f"{BEGIN}; SELECT pg_advisory_xact_lock({lock})"
            try:
                await driver.execute(begin)
                transaction = Transaction(Connection(connection, driver))
                yield transaction
                if transaction.dry_run:
                    await driver.execute("ROLLBACK")
                    return
                mark = transaction.connection.mark or await _mark(driver)
            except BaseException as error:
                await _roll_back(connection, driver, error)
                raise
            await self._commit(connection, driver, mark)

    async def ping(self) -> Condition:
        """Ask the database how it is, within PING_SECONDS; raises Unavailable."""
        try:
            async with asyncio.timeout(PING_SECONDS), self._ping_engine.connect() as connection:
                row = (
                    await connection.execute(
                        text(
                            "SELECT NOT pg_is_in_recovery() AS writable,"
                            " to_regclass('alembic_version') IS NOT NULL AS migrated"
                        )
                    )
                ).one()
                revision = row.migrated and await connection.scalar(
                    text("SELECT version_num FROM alembic_version")
                )
                return Condition(revision or None, row.writable)
        except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
            raise Unavailable("DATABASE_UNAVAILABLE") from error

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[tuple[AsyncConnection, Any]]:
        if not self.reachable:
            raise Unavailable("DATABASE_UNAVAILABLE")
        try:
            async with self._engine.connect() as connection:
                proxy = await connection.get_raw_connection()
                yield connection, proxy.driver_connection
        except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
            raise translate(error) from error

    async def _commit(self, connection: AsyncConnection, driver: Any, mark: Mark | None) -> None:
        """COMMIT, once. When its answer is lost, find out what happened instead of repeating it."""
        try:
            await driver.execute("COMMIT")
        except (*LOST, asyncpg.PostgresError) as error:
            await connection.invalidate()
            if mark is None:
                return
            if not _lost(error):
                raise
            # Not through a pool that may be empty, nor refused by what a ping thinks.
            await asyncio.shield(self._resolve(mark))

    async def _resolve(self, mark: Mark) -> None:
        """Return if the transaction took effect; raise Unavailable if not, Unknown if unknowable.

        After a crash an unfinished transaction counts as aborted; "in progress" is a backend that
        has not noticed yet that its client is gone.
        """
        log.warning("commit_uncertain", xid=mark.xid)
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                while (status := await self._outcome(mark)) in (None, "in progress"):
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            status = "unknown"
            log.error("commit_unresolved", xid=mark.xid)
            raise Unknown("COMMIT_OUTCOME_UNKNOWN") from error
        finally:
            log.warning("commit_resolved", xid=mark.xid, status=status)
        if status == "aborted":
            raise Unavailable("DATABASE_UNAVAILABLE")
        if status != "committed":
            raise Unknown("COMMIT_OUTCOME_UNKNOWN")

    async def _outcome(self, mark: Mark) -> str | None:
        """The transaction's status by PostgreSQL's own record; None while nobody answers."""
        try:
            async with self._ping_engine.connect() as connection:
                proxy = await connection.get_raw_connection()
                driver: Any = proxy.driver_connection
                row = await driver.fetchrow(OUTCOME, mark.xid)
        except (*LOST, exc.SQLAlchemyError) as error:
            log.info("commit_resolving", xid=mark.xid, error=str(error))
            return None
        except asyncpg.PostgresError as error:
            # Starting up again, or a standby; a number from the future (22023) is for good.
            return "unknown" if error.sqlstate == "22023" else None
        if row["timeline"] != mark.timeline:
            return "unknown"
        return str(row["status"] or "unknown")


def _engine(url: str, *, pool_size: int, pool_wait: float) -> AsyncEngine:
    engine = create_async_engine(
        driver_url(url),
        isolation_level="AUTOCOMMIT",
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=pool_wait,
        pool_use_lifo=True,
        connect_args={
            "timeout": CONNECT_SECONDS,
            "command_timeout": COMMAND_SECONDS,
            "server_settings": SESSION,
        },
        # JSON stays text between the database and the wire.
        json_serializer=str,
        json_deserializer=str,
    )
    event.listen(engine.sync_engine, "checkout", _refuse_closed)
    return engine


def _refuse_closed(dbapi_connection: Any, _record: object, _proxy: object) -> None:
    """Never hand out a connection whose socket is known to be gone. Costs no round trip."""
    if dbapi_connection.driver_connection.is_closed():
        raise exc.DisconnectionError


async def _mark(driver: Any) -> Mark | None:
    row = await driver.fetchrow(MARK)
    return Mark(row["xid"], row["timeline"]) if row["xid"] else None


async def _roll_back(connection: AsyncConnection, driver: Any, error: BaseException) -> None:
    """Leave a clean connection, or none."""
    try:
        if isinstance(error, TimeoutError | asyncio.CancelledError) or driver.is_closed():
            await connection.invalidate()
        else:
            await driver.execute("ROLLBACK")
    except (*LOST, asyncpg.PostgresError):
        await connection.invalidate()


def _cause(error: BaseException) -> BaseException:
    """The driver's own exception behind SQLAlchemy's."""
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        error = error.orig
    return error.__cause__ if isinstance(error.__cause__, asyncpg.PostgresError) else error


def _lost(error: BaseException) -> bool:
    """Whether the connection went, rather than that the server said no."""
    state = getattr(_cause(error), "sqlstate", None) or ""
    return not state or state.startswith(("08", "57P"))


def translate(error: BaseException) -> ParleyError:
    """The domain's error for the database's, by SQLSTATE; what is nobody's fault but ours, raises.

    Certain to have had no effect, except where the name says otherwise: only COMMIT itself is
    uncertain, and COMMIT is resolved before its error comes here.
    """
    if isinstance(error, exc.TimeoutError):
        return Unavailable("OVERLOADED")
    cause = _cause(error)
    state = getattr(cause, "sqlstate", None) or ""
    if state in ("40001", "40P01"):
        return Aborted("CONFLICT", retry_after=0.05)
    if state == "55P03":
        return Aborted("LOCK_TIMEOUT", retry_after=0.5)
    if state == "57014":
        return DeadlineExceeded("DEADLINE_EXCEEDED")
    if state == "25006":
        return Unavailable("DATABASE_READ_ONLY")
    if state.startswith(("53", "57P", "08", "25P")):
        return Unavailable("DATABASE_UNAVAILABLE")
    if state.startswith(("22", "54")):
        log.error("validation_gap", sqlstate=state, error=str(cause))
        return InvalidArgument("INVALID_VALUE", field="request", rule="the database refused it")
    if state.startswith("XX00"):
        return DataLoss("DATA_LOSS", correlation_id="in the log")
    if not state and _is_lost(cause):
        return Unavailable("DATABASE_UNAVAILABLE")
    raise error


def _is_lost(cause: BaseException) -> bool:
    if isinstance(cause, exc.DBAPIError):
        return bool(cause.connection_invalidated)
    return isinstance(cause, LOST) or isinstance(cause.__cause__, LOST)
