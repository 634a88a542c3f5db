"""asyncpg in SQLAlchemy's pools: how we connect, what our sessions are like, and which connections
are of no use any more.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import event, exc
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolProxiedConnection

from service.errors import Unavailable
from service.settings import ConfigurationError

CONNECT_SECONDS = 3.0
# The server ends a statement first; the client's limit is for a server that says nothing at all.
STATEMENT_MILLISECONDS = 4_000
COMMAND_SECONDS = 5.0
# How long to wait for a connection of a pool that is for a moment's work.
PING_SECONDS = 1.0

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

# When this database last recovered from a crash: then all statistics begin anew, and only then.
LIFE = "SELECT stats_reset::text FROM pg_stat_checkpointer"
CONNECTED = f"""
SELECT ({LIFE}) AS life, system_identifier::text AS cluster, pid, backend_start::text AS started
FROM pg_control_system(), pg_stat_get_activity(pg_backend_pid())
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


def driver_url(url: str, setting: str = "PARLEY_DATABASE_URL") -> str:
    """SQLAlchemy's spelling of a PostgreSQL URL; raises ConfigurationError for any other, by the
    name of the setting.
    """
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        parsed = None
    if parsed is None or parsed.drivername not in ("postgres", "postgresql", "postgresql+asyncpg"):
        raise ConfigurationError(
            f"{setting}: it must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE, "
            "with what is not a letter or a digit in USER and PASSWORD percent-encoded."
        )
    unknown = ", ".join(sorted(set(parsed.query) - set(URL_PARAMETERS)))
    if unknown:
        raise ConfigurationError(f"{setting}: there is no parameter {unknown}.")
    query = {URL_PARAMETERS[name]: value for name, value in parsed.query.items()}
    parsed = parsed.set(drivername="postgresql+asyncpg", query=query)
    return parsed.render_as_string(hide_password=False)


@asynccontextmanager
async def line(url: str) -> AsyncIterator[Any]:
    """A driver's connection outside the pools, for as long as it holds; raises Unavailable."""
    engine = new_engine(url, SESSION, pool_size=1, pool_wait=PING_SECONDS)
    try:
        async with checkout(engine) as pooled:
            yield pooled.driver_connection
    except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
        raise Unavailable("DATABASE_UNAVAILABLE") from cause_of(error)
    finally:
        await engine.dispose()


async def _take(engine: AsyncEngine) -> PoolProxiedConnection:
    # Not `engine.connect()`: that is three greenlets for what takes one.
    try:
        return await engine.raw_connection()
    except Exception as error:
        # SQLAlchemy has its own word for what the driver said.
        if isinstance(error.__cause__, asyncpg.PostgresError):
            raise error.__cause__ from None
        raise


@asynccontextmanager
async def checkout(engine: AsyncEngine) -> AsyncIterator[PoolProxiedConnection]:
    """A connection of the pool; not to be used again if it broke."""
    pooled = await _take(engine)
    try:
        yield pooled
    except BaseException as error:
        if is_lost(error):
            discard(pooled)
        raise
    finally:
        pooled.close()


class Kept:
    """A pool's one connection, out of the pool for as long as it holds, for whoever uses it all the
    time and alone: to take it and give it back was 4 % of a lone send.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._pooled: PoolProxiedConnection | None = None

    @asynccontextmanager
    async def checkout(self) -> AsyncIterator[PoolProxiedConnection]:
        """The connection; a new one if it broke."""
        pooled, self._pooled = self._pooled, None
        if pooled and _is_closed(pooled):
            pooled.close()
            pooled = None
        pooled = pooled or await _take(self.engine)
        try:
            yield pooled
        except BaseException as error:
            if is_lost(error):
                discard(pooled)
            pooled.close()
            raise
        if pooled.is_valid:
            self._pooled = pooled
        else:
            pooled.close()

    async def dispose(self) -> None:
        if self._pooled:
            self._pooled.close()
            self._pooled = None
        await self.engine.dispose()


def _is_closed(connection: Any) -> bool:
    """Whether its socket is known to be gone. Costs no round trip."""
    return bool(connection.driver_connection.is_closed())


def discard(pooled: PoolProxiedConnection) -> None:
    driver: Any = pooled.driver_connection
    # None: it broke under a statement of SQLAlchemy's, which has thrown it away by itself.
    if driver is not None:
        driver.terminate()
        pooled.invalidate()


def new_engine(
    url: str, session: dict[str, str], *, pool_size: int, pool_wait: float
) -> AsyncEngine:
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
    """Never hand out a connection that is gone."""
    if _is_closed(dbapi_connection):
        raise exc.DisconnectionError


def cause_of(error: BaseException) -> BaseException:
    """The driver's own exception behind SQLAlchemy's."""
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        return error.orig.__cause__ or error.orig
    return error


def is_lost(error: BaseException) -> bool:
    """Whether the connection is of no use any more, rather than that the server said no."""
    cause = cause_of(error)
    if isinstance(cause, asyncpg.PostgresError):
        # 25P03, 25P04: it was idle, or at work, for longer than a transaction may be.
        return (cause.sqlstate or "").startswith(("08", "57P", "25P03", "25P04"))
    return isinstance(cause, (*LOST, asyncio.CancelledError)) and not is_bad_value(cause)


def is_bad_value(cause: BaseException) -> bool:
    """Whether the driver refused an argument: an InterfaceError too, of all things."""
    return isinstance(cause, ValueError) and isinstance(cause, asyncpg.InterfaceError)
