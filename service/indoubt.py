"""Writes in doubt: what became of one whose answer was lost, found out instead of repeating it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import asyncpg
import structlog
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import PoolProxiedConnection

from service.driver import LIFE, LOST, cause_of, checkout, discard, is_lost
from service.errors import Unavailable, Unknown
from service.logs import text_of
from service.repositories.base import Connection, Evidence, Mark, Row

log = structlog.get_logger()

T = TypeVar("T")

RESOLVE_SECONDS = 10.0

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

ARE_FREE = "SELECT bool_and(pg_try_advisory_xact_lock(k)) FROM unnest($1::bigint[]) AS k"


@dataclass(frozen=True, slots=True)
class Session:
    """Names one session of PostgreSQL; numbers of processes alone are used again."""

    pid: int
    started: str


class Inquiry:
    """Asks the database, through a pool that is not empty when it matters. `on_answer` is called
    whenever it answers.
    """

    def __init__(self, engine: AsyncEngine, *, on_answer: Callable[[], None]) -> None:
        self._engine = engine
        self._on_answer = on_answer

    async def committed(self, mark: Mark, life: str) -> None:
        """Return if the transaction took effect; raise Unavailable if not, Unknown if nobody knows.
        `life`: of the database, when the transaction's connection was made.
        """
        log.warning("commit_uncertain", xid=mark.xid)
        fate = await self._ask(partial(_fate, mark, life), xid=mark.xid) or "unknown"
        log.warning("commit_resolved", xid=mark.xid, fate=fate)
        if fate == "aborted":
            raise Unavailable("DATABASE_UNAVAILABLE")
        if fate != "committed":
            raise Unknown("COMMIT_OUTCOME_UNKNOWN")

    async def written(self, session: Session, evidence: Evidence) -> list[Row]:
        """What a statement did that committed by itself, in a session that is lost; raises
        Unavailable if that was nothing, Unknown if nobody knows.
        """
        log.warning("commit_uncertain", pid=session.pid)
        rows = await self._ask(partial(_written, session, evidence), pid=session.pid)
        fate = "unknown" if rows is None else "committed" if rows else "aborted"
        log.warning("commit_resolved", pid=session.pid, fate=fate)
        if rows is None:
            raise Unknown("COMMIT_OUTCOME_UNKNOWN")
        if not rows:
            raise Unavailable("DATABASE_UNAVAILABLE")
        return rows

    async def _ask(
        self, ask: Callable[[Any, Row], Awaitable[T | None]], **known: object
    ) -> T | None:
        """The first answer of a primary, within RESOLVE_SECONDS."""
        with suppress(TimeoutError):
            async with asyncio.timeout(RESOLVE_SECONDS):
                while (answer := await self._ask_once(ask, known)) is None:
                    await asyncio.sleep(0.05)
                return answer
        return None

    async def _ask_once(
        self, ask: Callable[[Any, Row], Awaitable[T | None]], known: dict[str, object]
    ) -> T | None:
        try:
            async with checkout(self._engine) as pooled:
                driver: Any = pooled.driver_connection
                history = await driver.fetchrow(HISTORY)
                self._on_answer()
                return await ask(driver, history)
        except (*LOST, exc.SQLAlchemyError, asyncpg.PostgresError) as error:
            log.info("commit_resolving", **known, error=text_of(cause_of(error)))
            return None


async def _fate(mark: Mark, life: str, driver: Any, history: Row) -> str | None:
    """What became of a transaction, by PostgreSQL's own record; None while it does not tell.

    A transaction that had not reached the disk when PostgreSQL crashed is forgotten together with
    its number, and the number is given out anew: after a crash, or on another timeline, "committed"
    may be somebody else's. Everything else then means that ours is not there.
    """
    is_ours = (history["timeline"], history["life"]) == (mark.timeline, life)
    try:
        status = await driver.fetchval(STATUS, mark.xid)
    except asyncpg.InvalidParameterValueError:
        return "aborted"  # a number of the future: not given out anew yet
    if status == "in progress" and is_ours:
        await driver.execute(END_BACKEND, mark.xid)
        return None
    if status is None or (status == "committed" and not is_ours):
        return "unknown"
    return "committed" if status == "committed" else "aborted"


async def _written(
    session: Session, evidence: Evidence, driver: Any, _history: Row
) -> list[Row] | None:
    """The rows that say what was written; None while that may still change."""
    if await driver.fetchrow(END_SESSION, session.pid, session.started):
        return None
    if rows := await driver.fetch(evidence.sql, *evidence.arguments):
        return list(rows)
    # Behind a pooler it was another session, which may be at it still. Not waited for: this
    # connection is the one that pings need.
    if not await driver.fetchval(ARE_FREE, evidence.locks):
        return None
    return list(await driver.fetch(evidence.sql, *evidence.arguments))


async def mark_of(driver: Any) -> Mark | None:
    """The name of the transaction that the connection is in; None if it has written nothing."""
    row = await driver.fetchrow(MARK)
    return Mark(row["xid"], row["timeline"]) if row["xid"] else None


class SelfCommitting(Connection):
    """A connection on which what is written is committed by the same statement."""

    def __init__(
        self, inquiry: Inquiry, engine: AsyncEngine, pooled: PoolProxiedConnection
    ) -> None:
        super().__init__(engine, pooled)
        self._inquiry = inquiry
        self.session = Session(pooled.info["pid"], pooled.info["started"])

    async def write(self, sql: str, *arguments: object, evidence: Evidence) -> list[Row]:
        """When the answer is lost, what was written is looked up instead of written again."""
        try:
            return await super().write(sql, *arguments, evidence=evidence)
        except (*LOST, asyncpg.PostgresError) as error:
            if not is_lost(error):
                raise
            discard(self._pooled)
            return await self._inquiry.written(self.session, evidence)
