"""The door to the database: `transaction()` writes, `snapshot()` reads, `statements()` does both in
single statements; driver errors stop here.

Every connection but that of the statements is read-only until a transaction says otherwise, so
PostgreSQL itself refuses a write through a snapshot. A transaction locks its conversation in a
statement of its own, before anything is read or written: a statement takes its snapshot before it
waits, so one that locks and checks at once would check the past. A statement that does it all
checks, when it writes, that what it was decided on is still so.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from uuid import uuid4

import asyncpg
import structlog
from sqlalchemy import event, exc
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolProxiedConnection

from service.errors import (
    Aborted,
    DataLoss,
    InvalidArgument,
    ParleyError,
    Unavailable,
    Unknown,
)
from service.logs import text_of
from service.metrics import CONNECTIONS
from service.repositories.base import Connection, Mark, Query, Row
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
from service.settings import ConfigurationError

log = structlog.get_logger()

T = TypeVar("T")

POOL_WAIT_SECONDS = 0.25
CONNECT_SECONDS = 3.0
# The server ends a statement first; the client's limit is for a server that says nothing at all.
STATEMENT_MILLISECONDS = 4_000
COMMAND_SECONDS = 5.0
RESOLVE_SECONDS = 10.0
PING_SECONDS = 1.0
# How long a call queues before it may ask for a lock.
QUEUE_SECONDS = 5.0
CLOSE_SECONDS = 2.0

SESSION = {
    "application_name": "parley",
    "statement_timeout": str(STATEMENT_MILLISECONDS),
    "lock_timeout": "2000",
    "idle_in_transaction_session_timeout": "10000",
    "transaction_timeout": "15000",
    # Every statement of ours is short; compiling one costs more than it could save.
    "jit": "off",
    # Every statement of ours finds its rows by an index. Planned while tables are small, it would
    # rather read them whole, and go on with it until the next ANALYZE, however they grow: with
    # 20,000 new conversations a send took 55 ms instead of 3, and reading one message 70.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_material": "off",
    # A plan for all calls, made once a connection. Left to choose, PostgreSQL plans a write of few
    # messages anew each time, as it takes the plan for all calls to be one for many.
    "plan_cache_mode": "force_generic_plan",
    "timezone": "UTC",
}
READ_ONLY_SESSION = {**SESSION, "default_transaction_read_only": "on"}
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"

# "off" on a primary, unless somebody has made it, its database or our role read-only by default.
PING = """
SELECT version_num AS revision, current_setting('transaction_read_only') = 'off' AS writable,
       (SELECT system_identifier::text FROM pg_control_system()) AS cluster,
       pg_snapshot_xmin(pg_current_snapshot())::text AS oldest_xid,
       pg_snapshot_xmax(pg_current_snapshot())::text AS end_xid
FROM alembic_version
"""

# When this database last recovered from a crash: then all statistics begin anew, and only then.
LIFE = "SELECT stats_reset::text FROM pg_stat_checkpointer"
CONNECTED = f"""
SELECT ({LIFE}) AS life, system_identifier::text AS cluster, pid, backend_start::text AS started
FROM pg_control_system(), pg_stat_get_activity(pg_backend_pid())
"""
TIMELINE = "left(pg_walfile_name(pg_current_wal_lsn()), 8)"
# Asked for before COMMIT, to find out afterwards what became of the transaction.
MARK = f"SELECT pg_current_xact_id_if_assigned()::text AS xid, {TIMELINE} AS timeline"
# Fails on a standby, which may lag behind and must not be asked.
HISTORY = f"SELECT {TIMELINE} AS timeline, ({LIFE}) AS life"
STATUS = "SELECT pg_xact_status($1::text::xid8)"
# Nobody will send this transaction its COMMIT any more, and it may hold a conversation's lock.
END_BACKEND = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_xid = $1::text::xid8::xid
"""
# The same for a statement that commits by itself: a row as long as that session lives.
END_SESSION = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = $1 AND backend_start::text = $2
"""

# What a database that is refused, lost, frozen or gone looks like. A TimeoutError is an OSError.
LOST = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)

# A statement was prepared before somebody changed the schema: the next time it is prepared anew.
STALE = (
    asyncpg.InvalidCachedStatementError,
    asyncpg.exceptions.OutdatedSchemaCacheError,
)

# What may follow the question mark in a URL: asyncpg's names, and libpq's for the same.
URL_PARAMETERS = {
    "host": "host",
    "port": "port",
    "ssl": "ssl",
    "sslmode": "ssl",
    "passfile": "passfile",
    "target_session_attrs": "target_session_attrs",
}


def driver_url(url: str) -> str:
    """SQLAlchemy's spelling of a PostgreSQL URL; raises ConfigurationError for any other."""
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        parsed = None
    if parsed is None or parsed.drivername not in ("postgres", "postgresql", "postgresql+asyncpg"):
        raise ConfigurationError(
            "PARLEY_DATABASE_URL: it must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE, "
            "with what is not a letter or a digit in USER and PASSWORD percent-encoded."
        )
    unknown = ", ".join(sorted(set(parsed.query) - set(URL_PARAMETERS)))
    if unknown:
        raise ConfigurationError(f"PARLEY_DATABASE_URL: there is no parameter {unknown}.")
    query = {URL_PARAMETERS[name]: value for name, value in parsed.query.items()}
    parsed = parsed.set(drivername="postgresql+asyncpg", query=query)
    return parsed.render_as_string(hide_password=False)


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

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
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
        self._engine = _engine(
            url, READ_ONLY_SESSION, pool_size=pool_size, pool_wait=POOL_WAIT_SECONDS
        )
        # For statements that write and commit by themselves. One batch at a time does that.
        self._writing_engine = _engine(url, SESSION, pool_size=1, pool_wait=POOL_WAIT_SECONDS)
        # A ping must not queue behind the calls whose fate it foretells.
        self._ping_engine = _engine(url, SESSION, pool_size=1, pool_wait=PING_SECONDS)
        # Kept by whoever pings. While False, calls are refused at once instead of waiting.
        self.reachable = True
        self.writable = True
        # Which PostgreSQL was prepared for us. Another one that answers in its place, restored
        # from a backup, is not used before it has begun an era of its own. None: any.
        self.cluster: str | None = None
        # Called whenever something was committed, with the locks under which it was.
        self.on_commit: Callable[[Collection[int]], None] = lambda _: None
        # Whoever waits for a lock holds a connection: half of them at the most, so that a
        # conversation that many want to change takes none from those who want to read.
        self._waiting = asyncio.Semaphore(pool_size // 2)

    async def close(self) -> None:
        """Take leave of the database, unless that says nothing."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                for engine in (self._engine, self._writing_engine, self._ping_engine):
                    await engine.dispose()

    def require_reachable(self) -> None:
        if not self.reachable:
            raise Unavailable("DATABASE_UNAVAILABLE")

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        async with self._connect(self._engine) as pooled:
            yield Snapshot(Connection(self._engine, pooled))

    @asynccontextmanager
    async def statements(self) -> AsyncIterator[Statements]:
        """A connection on which `write` commits by itself."""
        self._require_writable()
        async with self._connect(self._writing_engine) as pooled:
            statements = Statements(SelfCommitting(self, self._writing_engine, pooled))
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
                    mark = await _mark(driver)
            except BaseException as error:
                if not _is_lost(error):
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
            async with self._turn() if may_wait else nullcontext():
                pooled = await exits.enter_async_context(self._connect(self._engine))
                status = await _begin(pooled.driver_connection, first)
            yield pooled, status

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Queue for the right to wait for a lock. Costs no connection."""
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._waiting.acquire()
        except TimeoutError:
            raise Aborted("LOCK_TIMEOUT", retry_after=0.5) from None
        try:
            yield
        finally:
            self._waiting.release()

    async def ping(self) -> Condition:
        """Ask the database how it is, within PING_SECONDS; raises Unavailable."""
        try:
            async with (
                asyncio.timeout(PING_SECONDS),
                _checkout(self._ping_engine) as pooled,
            ):
                driver: Any = pooled.driver_connection
                row = await driver.fetchrow(PING)
        except asyncpg.UndefinedTableError:
            return Condition(None)
        except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
            raise Unavailable("DATABASE_UNAVAILABLE") from _cause(error)
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
            async with _checkout(self._ping_engine) as pooled:
                return await Events(Connection(self._ping_engine, pooled)).begin_era()
        except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
            raise Unavailable("DATABASE_UNAVAILABLE") from _cause(error)

    @asynccontextmanager
    async def _connect(self, engine: AsyncEngine) -> AsyncIterator[PoolProxiedConnection]:
        self.require_reachable()
        try:
            async with _checkout(engine) as pooled:
                if self.cluster not in (None, pooled.info["cluster"]):
                    _discard(pooled)
                    raise Unavailable("DATABASE_UNAVAILABLE")
                with CONNECTIONS.track_inprogress():
                    yield pooled
        except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
            translated = translate(error)
            if translated.reason == "DATABASE_READ_ONLY":
                # The writer may be elsewhere by now: connect anew.
                await self._engine.dispose()
                await self._writing_engine.dispose()
            raise translated from error

    async def _commit(self, pooled: PoolProxiedConnection, mark: Mark | None) -> None:
        """COMMIT, once. When its answer is lost, find out what happened instead of repeating it."""
        driver: Any = pooled.driver_connection
        try:
            await driver.execute("COMMIT")
        except (*LOST, asyncpg.PostgresError) as error:
            if mark is None:
                # Nothing was written, so nothing can be lost.
                return _discard(pooled)
            if not _is_lost(error):
                raise
            life = pooled.info["life"]
            _discard(pooled)
            await self._resolve(mark, life)

    async def _resolve(self, mark: Mark, life: str) -> None:
        """Return if it took effect; raise Unavailable if not, Unknown if nobody knows."""
        log.warning("commit_uncertain", xid=mark.xid)
        fate = await _asked(lambda: self._fate(mark, life)) or "unknown"
        log.warning("commit_resolved", xid=mark.xid, fate=fate)
        if fate == "aborted":
            raise Unavailable("DATABASE_UNAVAILABLE")
        if fate != "committed":
            raise Unknown("COMMIT_OUTCOME_UNKNOWN")

    async def resolve_write(self, session: "Session", told_by: Query) -> list[Row]:
        """What a statement did that committed by itself, in a session that is lost; raises
        Unavailable if that was nothing, Unknown if nobody knows.
        """
        log.warning("commit_uncertain", pid=session.pid)
        rows = await _asked(lambda: self._written(session, told_by))
        fate = "unknown" if rows is None else "committed" if rows else "aborted"
        log.warning("commit_resolved", pid=session.pid, fate=fate)
        if rows is None:
            raise Unknown("COMMIT_OUTCOME_UNKNOWN")
        if not rows:
            raise Unavailable("DATABASE_UNAVAILABLE")
        return rows

    async def _written(self, session: "Session", told_by: Query) -> list[Row] | None:
        """The rows that say what was written; None while that may still change, or nobody tells."""
        try:
            async with _checkout(self._ping_engine) as pooled:
                driver: Any = pooled.driver_connection
                await driver.fetchrow(HISTORY)
                self.reachable = True
                if await driver.fetchrow(END_SESSION, session.pid, session.started):
                    return None
                rows: list[Row] = await driver.fetch(*told_by)
                return rows
        except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
            log.info("commit_resolving", pid=session.pid, error=text_of(_cause(error)))
            return None

    async def _fate(self, mark: Mark, life: str) -> str | None:
        """What became of a transaction, by PostgreSQL's own record; None while it does not tell.

        A transaction that had not reached the disk when PostgreSQL crashed is forgotten together
        with its number, and the number is given out anew: after a crash, or on another timeline,
        "committed" may be somebody else's. Everything else then means that ours is not there.
        """
        # Not through a pool that may be empty, nor refused by what a ping thinks.
        try:
            async with _checkout(self._ping_engine) as pooled:
                driver: Any = pooled.driver_connection
                history = await driver.fetchrow(HISTORY)
                self.reachable = True
                is_ours = (history["timeline"], history["life"]) == (mark.timeline, life)
                try:
                    status = await driver.fetchval(STATUS, mark.xid)
                except asyncpg.InvalidParameterValueError:
                    return "aborted"  # a number of the future: not given out anew yet
                if status == "in progress" and is_ours:
                    await driver.execute(END_BACKEND, mark.xid)
                    return None
        except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
            log.info("commit_resolving", xid=mark.xid, error=text_of(_cause(error)))
            return None
        if status is None or (status == "committed" and not is_ours):
            return "unknown"
        return "committed" if status == "committed" else "aborted"


@dataclass(frozen=True, slots=True)
class Session:
    """Names one session of PostgreSQL; numbers of processes alone are used again."""

    pid: int
    started: str


class SelfCommitting(Connection):
    """A connection on which what is written is committed by the same statement."""

    def __init__(self, store: Store, engine: AsyncEngine, pooled: PoolProxiedConnection) -> None:
        super().__init__(engine, pooled)
        self._store = store

    async def write(self, sql: str, *arguments: object, told_by: Query) -> list[Row]:
        """When the answer is lost, what was written is looked up instead of written again."""
        try:
            return await super().write(sql, *arguments, told_by=told_by)
        except (*LOST, asyncpg.PostgresError) as error:
            if not _is_lost(error):
                raise
            session = Session(self._pooled.info["pid"], self._pooled.info["started"])
            _discard(self._pooled)
            return await self._store.resolve_write(session, told_by)


async def _asked(ask: Callable[[], Awaitable[T | None]]) -> T | None:
    """The first answer, within RESOLVE_SECONDS."""
    with suppress(TimeoutError):
        async with asyncio.timeout(RESOLVE_SECONDS):
            while (answer := await ask()) is None:
                await asyncio.sleep(0.05)
            return answer
    return None


@asynccontextmanager
async def line(url: str) -> AsyncIterator[Any]:
    """A driver's connection outside the pools, for as long as it holds; raises Unavailable."""
    engine = _engine(url, SESSION, pool_size=1, pool_wait=PING_SECONDS)
    try:
        async with _checkout(engine) as pooled:
            yield pooled.driver_connection
    except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
        raise Unavailable("DATABASE_UNAVAILABLE") from _cause(error)
    finally:
        await engine.dispose()


@asynccontextmanager
async def _checkout(engine: AsyncEngine) -> AsyncIterator[PoolProxiedConnection]:
    """A connection of the pool; not to be used again if it broke."""
    # Not `engine.connect()`: that is three greenlets for what takes one.
    try:
        pooled = await engine.raw_connection()
    except Exception as error:
        # SQLAlchemy has its own word for what the driver said.
        if isinstance(error.__cause__, asyncpg.PostgresError):
            raise error.__cause__ from None
        raise
    try:
        yield pooled
    except BaseException as error:
        if _is_lost(error):
            _discard(pooled)
        raise
    finally:
        pooled.close()


def _discard(pooled: PoolProxiedConnection) -> None:
    driver: Any = pooled.driver_connection
    # None: it broke under a statement of SQLAlchemy's, which has thrown it away by itself.
    if driver is not None:
        driver.terminate()
        pooled.invalidate()


def _engine(url: str, session: dict[str, str], *, pool_size: int, pool_wait: float) -> AsyncEngine:
    engine = create_async_engine(
        driver_url(url),
        isolation_level="AUTOCOMMIT",
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=pool_wait,
        pool_use_lifo=True,
        # A transaction that was begun here is ended here, too.
        pool_reset_on_return=None,
        connect_args={
            "timeout": CONNECT_SECONDS,
            "command_timeout": COMMAND_SECONDS,
            "server_settings": session,
        },
        # JSON stays text between the database and the wire.
        json_serializer=str,
        json_deserializer=str,
        # They are what our users say.
        hide_parameters=True,
    )
    event.listen(engine.sync_engine, "connect", _note_life)
    event.listen(engine.sync_engine, "checkout", _refuse_closed)
    return engine


def _note_life(dbapi_connection: Any, record: Any) -> None:
    """Remember which database this is, and which life of it: no connection outlives a crash."""
    record.info.update(dbapi_connection.run_async(lambda driver: driver.fetchrow(CONNECTED)))


def _refuse_closed(dbapi_connection: Any, _record: object, _proxy: object) -> None:
    """Never hand out a connection whose socket is known to be gone. Costs no round trip."""
    if dbapi_connection.driver_connection.is_closed():
        raise exc.DisconnectionError


async def _begin(driver: Any, first: str) -> str:
    """Begin with this statement, if there is one; its status, as "SELECT 3"."""
    try:
        return str(await driver.execute(f"{BEGIN}; {first}"))
    except asyncpg.PostgresError as error:
        if not _is_lost(error):
            await driver.execute("ROLLBACK")
        if not isinstance(error, asyncpg.FeatureNotSupportedError):
            raise
        # How a standby answers READ WRITE.
        raise asyncpg.ReadOnlySQLTransactionError(*error.args) from error


async def _mark(driver: Any) -> Mark | None:
    row = await driver.fetchrow(MARK)
    return Mark(row["xid"], row["timeline"]) if row["xid"] else None


def _cause(error: BaseException) -> BaseException:
    """The driver's own exception behind SQLAlchemy's."""
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        return error.orig.__cause__ or error.orig
    return error


def _is_lost(error: BaseException) -> bool:
    """Whether the connection is of no use any more, rather than that the server said no."""
    cause = _cause(error)
    if isinstance(cause, asyncpg.PostgresError):
        # 25P03, 25P04: it was idle, or at work, for longer than a transaction may be.
        return (cause.sqlstate or "").startswith(("08", "57P", "25P03", "25P04"))
    return isinstance(cause, (*LOST, asyncio.CancelledError)) and not _is_bad_value(cause)


def _is_bad_value(cause: BaseException) -> bool:
    """Whether the driver refused an argument: an InterfaceError too, of all things."""
    return isinstance(cause, ValueError) and isinstance(cause, asyncpg.InterfaceError)


def translate(error: BaseException) -> ParleyError:
    """The domain's error for the database's, by SQLSTATE; what is nobody's fault but ours, raises.

    Certain to have had no effect: only COMMIT itself is uncertain, and COMMIT is resolved before
    its error comes here.
    """
    if isinstance(error, exc.TimeoutError):
        return Unavailable("OVERLOADED")
    cause = _cause(error)
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
    if _is_lost(error) or state.startswith(("53", "28", "3D")):
        return Unavailable("DATABASE_UNAVAILABLE")
    if state.startswith(("22", "54")) or _is_bad_value(cause):
        log.error("validation_gap", exc_info=error)
        return InvalidArgument("INVALID_VALUE", field="request", rule="the database refused it")
    if state.startswith("XX00"):
        correlation_id = uuid4().hex
        log.error("data_loss", correlation_id=correlation_id, exc_info=error)
        return DataLoss("DATA_LOSS", correlation_id=correlation_id)
    raise error
