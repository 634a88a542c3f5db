"""What every repository stands on: one checked-out connection, and the shape of a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Column, Executable
from sqlalchemy.ext.asyncio import AsyncConnection

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


class Connection:
    """One connection, inside a transaction or not.

    `rows` and `row` run SQLAlchemy statements. `fetch` hands SQL to asyncpg as it is, for the few
    statements that work on sets and are called all the time.
    """

    def __init__(self, connection: AsyncConnection, driver: Any) -> None:
        self._connection = connection
        self._driver = driver
        # Whoever learns it from the transaction's last statement leaves it here, and saves the
        # store a round trip.
        self.mark: Mark | None = None

    async def rows(self, statement: Executable) -> Sequence[Row]:
        result = await self._connection.execute(statement)
        return cast(Sequence[Row], result.mappings().all())

    async def row(self, statement: Executable) -> Row | None:
        result = await self._connection.execute(statement)
        return cast(Row | None, result.mappings().first())

    async def execute(self, statement: Executable) -> None:
        await self._connection.execute(statement)

    async def fetch(self, sql: str, *arguments: object) -> list[Row]:
        rows: list[Row] = await self._driver.fetch(sql, *arguments)
        return rows


class Repository:
    """The SQL of one resource, in the domain's verbs, on an open connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection


def columns_of(table: str, alias: str, *, but: str = "", prefix: str = "") -> str:
    """Every column that is read, by name: a plan must not go stale because one is added.

    With a prefix they are told from those of another table in the same row; see `part`.
    """
    return ", ".join(
        f"{alias}.{column.name}" + (f" AS {prefix}{column.name}" if prefix else "")
        for column in read_columns(table)
        if column.name != but
    )


def read_columns(table: str) -> list[Column[Any]]:
    """The columns of a table but those that only PostgreSQL looks into."""
    return [column for column in tables[table].columns if not column.info.get("never_read")]


def part(row: Row, prefix: str) -> Row | None:
    """The columns that bear the prefix, without it; None where the table had no such row."""
    found = {
        name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)
    }
    return found if found["created_at"] else None
