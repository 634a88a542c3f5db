"""What every repository stands on: one checked-out connection, and the shape of a row."""

import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from operator import itemgetter
from typing import Any, cast

from sqlalchemy import Column, Executable
from sqlalchemy import Connection as SyncConnection
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import PoolProxiedConnection

from service.models import Base

tables = Base.metadata.tables

# Columns by name, from SQLAlchemy and from the driver alike. `metadata` is JSON text: only the
# wire takes it apart.
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Mark:
    """Names one transaction in one history of the database, to ask later what became of it."""

    xid: str
    timeline: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """What shows whether a statement took effect: once these advisory locks are free, which it took
    first, the rows of this query. They are none if it did not.
    """

    locks: Sequence[int]
    sql: str
    arguments: tuple[object, ...]


class Connection:
    """One connection, inside a transaction or not.

    `rows` and `row` run SQLAlchemy statements. `fetch` hands SQL to asyncpg as it is, for the few
    statements that work on sets and are called all the time.
    """

    def __init__(self, engine: AsyncEngine, pooled: PoolProxiedConnection) -> None:
        self._engine = engine
        self._pooled = pooled
        self._driver: Any = pooled.driver_connection
        # Whoever learns it from the transaction's last statement leaves it here, and saves the
        # store a round trip.
        self.mark: Mark | None = None

    async def rows(self, statement: Executable, *, replan: bool = False) -> Sequence[Row]:
        """With `replan`, by a plan for these very values."""
        async with self._planned_anew() if replan else nullcontext():
            result = await self._built.execute(statement)
            return cast(Sequence[Row], result.mappings().all())

    async def row(self, statement: Executable) -> Row | None:
        result = await self._built.execute(statement)
        return cast(Row | None, result.mappings().first())

    async def execute(self, statement: Executable) -> None:
        await self._built.execute(statement)

    @cached_property
    def _built(self) -> AsyncConnection:
        """SQLAlchemy's view of the connection, made where a statement is built with it."""
        sync_engine = self._engine.sync_engine
        return AsyncConnection(self._engine, SyncConnection(sync_engine, self._pooled))

    async def fetch(self, sql: str, *arguments: object, replan: bool = False) -> list[Row]:
        """With `replan`, by a plan for these very values."""
        if replan:
            async with self._planned_anew():
                return await self.fetch(sql, *arguments)
        rows: list[Row] = await self._driver.fetch(sql, *arguments)
        return rows

    async def write(
        self,
        sql: str,
        *arguments: object,
        evidence: Evidence,  # noqa: ARG002
    ) -> list[Row]:
        """The one statement of a transaction that writes; each row bears `xid` and `timeline`.

        `evidence` is for whoever lets it commit by itself, and never hears its answer.
        """
        rows = await self.fetch(sql, *arguments)
        if rows and rows[0]["xid"]:
            self.mark = Mark(rows[0]["xid"], rows[0]["timeline"])
        return rows

    @asynccontextmanager
    async def _planned_anew(self) -> AsyncIterator[None]:
        """The plan that PostgreSQL makes once for all calls, and prefers after the fifth, does not
        know whether metadata is rare or common: on a conversation of 20,000 messages it took 7.5 ms
        instead of 0.1. Costs two round trips.
        """
        await self._driver.execute("SET plan_cache_mode = force_custom_plan")
        try:
            yield
        except Exception:  # A connection whose call was cancelled is not used again.
            await self._driver.execute("RESET plan_cache_mode")
            raise
        await self._driver.execute("RESET plan_cache_mode")


class Repository:
    """The SQL of one resource, in the domain's verbs, on an open connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection


def columns_of(table: str, alias: str, *, but: str = "", prefix: str = "") -> str:
    """Every column that is read, by name: a plan must not go stale because one is added.

    With a prefix they are told from those of another table in the same row; see `part`. JSON comes
    as text, which the driver reads in C.
    """
    return ", ".join(
        f"{alias}.{column.name}{_cast(column)} AS {prefix}{column.name}"
        for column in read_columns(table)
        if column.name != but
    )


def _cast(column: Column[Any]) -> str:
    return "::text" if isinstance(column.type, JSONB) else ""


# Of a key `k`.
BY_SLUG = "(SELECT s.id FROM conversations s WHERE s.slug = k.slug)"


def looked_up(table: str, alias: str, on: str) -> str:
    """SQL to follow FROM: the row of a table that has this key, or NULLs.

    OFFSET 0 keeps it a look-up. Joined plainly, half a key was as good as the whole one while
    tables were small, to a plan that stayed: a send read all requests of its conversation.
    """
    return f"LEFT JOIN LATERAL (SELECT * FROM {table} {alias} WHERE {on} OFFSET 0) {alias} ON true"


def with_named_arguments(sql: str, types: Mapping[str, str]) -> tuple[str, list[str]]:
    """SQL with numbers for its arguments' names, as "@content", and those names in order."""
    names = list(dict.fromkeys(re.findall(r"@(\w+)", sql)))

    def numbered(name: re.Match[str]) -> str:
        return f"${names.index(name[1]) + 1}::{types[name[1]]}"

    return re.sub(r"@(\w+)", numbered, sql), names


def read_columns(table: str) -> list[Column[Any]]:
    """The columns of a table but those that only PostgreSQL looks into."""
    return [column for column in tables[table].columns if not column.info.get("never_read")]


def part(row: Row, prefix: str, table: str, *others: str) -> Row | None:
    """The columns of a table, and others, that bear a prefix in the row, without it; None where the
    table had no such row.

    By name: to sort out the seventy columns of an inbox's line took longer than to make the line.
    """
    if row[prefix + "created_at"] is None:
        return None
    names, values_of = _taken(prefix, table, others)
    return dict(zip(names, values_of(row), strict=True))


@cache
def _taken(
    prefix: str, table: str, others: tuple[str, ...]
) -> tuple[list[str], Callable[[Row], tuple[Any, ...]]]:
    """Names of columns, and what takes their values out of a row that has them with a prefix."""
    names = [*(column.name for column in read_columns(table)), *others]
    return names, itemgetter(*(prefix + name for name in names))
