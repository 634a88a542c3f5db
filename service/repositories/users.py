from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Text, func, literal, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql import ColumnElement

from service.errors import AlreadyExists
from service.repositories.base import Repository, Row, columns_of, tables

users = tables["users"]

FIND = f"""
SELECT k.position, {columns_of("users", "u")}
FROM unnest($1::uuid[], $2::text[]) WITH ORDINALITY AS k(id, username, position)
CROSS JOIN LATERAL (
  SELECT {columns_of("users", "u")} FROM users u
  WHERE u.id = COALESCE(k.id, (SELECT n.id FROM users n WHERE n.username = k.username)) OFFSET 0
) AS u
"""


class Users(Repository):
    async def find(self, references: Sequence[UUID | str]) -> list[Row | None]:
        """The user behind each id or username, in the same order; None where there is none."""
        found: list[Row | None] = [None] * len(references)
        rows = await self._connection.fetch(
            FIND,
            [reference if isinstance(reference, UUID) else None for reference in references],
            [reference if isinstance(reference, str) else None for reference in references],
        )
        for row in rows:
            found[row["position"] - 1] = row
        return found

    async def create(self, **columns: Any) -> Row:
        """Insert one, or raise AlreadyExists naming whoever has one of its unique names."""
        row = await self._connection.row(
            insert(users).values(**columns).on_conflict_do_nothing().returning(*users.columns)
        )
        if row is None:
            raise await self._taken(columns)
        return row

    async def _taken(self, columns: dict[str, Any]) -> AlreadyExists:
        username, external_id = columns["username"], columns["external_id"]
        # NULL = NULL is not true: what was not given is not taken.
        holder = await self._connection.row(
            select(users.c.id, users.c.username, users.c.external_id).where(
                or_(
                    users.c.username == username,
                    users.c.external_id == literal(external_id, Text),
                    _lower(users.c.email) == _lower(literal(columns["email"], Text)),
                )
            )
        )
        if holder is None or holder["username"] == username:
            return AlreadyExists("USERNAME_TAKEN", "user", username, field="user.username")
        if external_id is not None and holder["external_id"] == external_id:
            return AlreadyExists(
                "EXTERNAL_ID_TAKEN",
                "user",
                holder["id"],
                field="user.external_id",
                external_id=external_id,
            )
        return AlreadyExists("EMAIL_TAKEN", "user", holder["id"], field="user.email")


def _lower(email: ColumnElement[Any]) -> ColumnElement[Any]:
    """As the unique index has it, whatever the database's own locale."""
    return func.lower(email.collate("pg_c_utf8"))
