from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Text, and_, func, literal, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql import ColumnElement

from service.errors import Aborted, AlreadyExists
from service.models.base import HAS_METADATA
from service.repositories.base import Repository, Row, columns_of, tables

users = tables["users"]

USER = columns_of("users", "u")


def _finding(lock: str = "") -> str:
    return f"""
SELECT k.position, {USER}
FROM unnest($1::uuid[], $2::text[]) WITH ORDINALITY AS k(id, username, position)
CROSS JOIN LATERAL (
  SELECT * FROM users u
  WHERE u.id = COALESCE(k.id, (SELECT n.id FROM users n WHERE n.username = k.username))
  OFFSET 0 {lock}
) AS u
WHERE u.purged_at IS NULL OR $3
"""


FIND = _finding()
# The row lock is a foreign key's own: whoever is live now is not purged before we commit.
HOLD = _finding("FOR KEY SHARE")

# In the order of their names: two that are made elsewhere at the same time, the other way round,
# would wait for each other.
CREATE = """
WITH k AS MATERIALIZED (
  SELECT uuidv7() AS id, statement_timestamp() AS now, k.*
  FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bool[], $6::bool[], $7::text[],
              $8::text[]) WITH ORDINALITY
    AS k(username, email, full_name, kind, is_active, is_verified, metadata, external_id, position)
),
made AS (
  INSERT INTO users (id, username, email, full_name, kind, is_active, is_verified, metadata,
                     external_id, created_at, updated_at)
  SELECT id, username, email, full_name, kind, is_active, is_verified, metadata::jsonb,
         external_id, now, now
  FROM k ORDER BY username, position
  ON CONFLICT DO NOTHING
  RETURNING id
)
SELECT k.position, k.id FROM k WHERE k.id IN (SELECT id FROM made)
"""

# Of each, the first of its names that somebody else has, and who that is. NULL = NULL is not true:
# what is not wanted is not taken.
TAKEN = """
SELECT k.position, u.id, u.username, u.external_id
FROM unnest($1::text[], $2::text[], $3::text[], $4::uuid[]) WITH ORDINALITY
  AS k(username, email, external_id, but, position)
CROSS JOIN LATERAL (
  SELECT u.id, u.username, u.external_id FROM users u
  WHERE (u.username = k.username OR u.external_id = k.external_id
         OR lower(u.email COLLATE "pg_c_utf8") = lower(k.email COLLATE "pg_c_utf8"))
    AND u.id IS DISTINCT FROM k.but
  ORDER BY u.username = k.username DESC NULLS LAST LIMIT 1
) AS u
"""

# What a user is when nobody can tell any more who it was.
NAMELESS: dict[str, Any] = {
    "username": None,
    "email": None,
    "full_name": "",
    "is_verified": False,
    "password_hash": None,
    "metadata": "{}",
    "external_id": None,
}


class Users(Repository):
    async def find(
        self, references: Sequence[UUID | str], *, even_purged: bool = False
    ) -> list[Row | None]:
        """The user behind each id or username, in the same order; None where there is none."""
        return list(await self._find(FIND, references, even_purged=even_purged))

    async def hold(self, references: Sequence[UUID | str]) -> dict[UUID | str, Row]:
        """Whoever there is of these, by what it is called here; live ones stay until we commit."""
        rows = await self._find(HOLD, references)
        return {name: row for name, row in zip(references, rows, strict=True) if row is not None}

    async def _find(
        self, statement: str, references: Sequence[UUID | str], *, even_purged: bool = False
    ) -> Sequence[Row | None]:
        found: list[Row | None] = [None] * len(references)
        rows = await self._connection.fetch(
            statement,
            [reference if isinstance(reference, UUID) else None for reference in references],
            [reference if isinstance(reference, str) else None for reference in references],
            even_purged,
        )
        for row in rows:
            found[row["position"] - 1] = row
        return found

    async def find_by_email(self, email: str) -> Row | None:
        return await self._connection.row(select(users).where(_has_email(email)))

    async def list(
        self,
        *,
        show_deleted: bool,
        username_prefix: str = "",
        email: str | None = None,
        external_id: str | None = None,
        full_name_contains: str = "",
        is_active: bool | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        metadata_contains: str = "{}",
        after: tuple[datetime, UUID] | None,
        limit: int,
    ) -> Sequence[Row]:
        """Newest first. `after` is the (created_at, id) of the last one seen."""
        c = users.c
        where: list[ColumnElement[bool]] = [c.purged_at.is_(None)]
        if not show_deleted:
            where.append(c.deleted_at.is_(None))
        if username_prefix:
            where.append(c.username.startswith(username_prefix, autoescape=True))
        if email:
            where.append(_has_email(email))
        if external_id:
            where.append(c.external_id == external_id)
        if full_name_contains:
            part = _lower(literal(full_name_contains, Text))
            where.append(func.strpos(_lower(c.full_name), part) > 0)
        if is_active is not None:
            where.append(c.is_active if is_active else ~c.is_active)
        if created_after:
            where.append(c.created_at >= created_after)
        if created_before:
            where.append(c.created_at < created_before)
        if metadata_contains != "{}":
            has = c.metadata.contains(literal(metadata_contains, JSONB))
            where.append(and_(text(f"users.{HAS_METADATA}"), has))
        if after:
            where.append(tuple_(c.created_at, c.id) < tuple_(*after))
        return await self._connection.rows(
            select(users).where(*where).order_by(c.created_at.desc(), c.id.desc()).limit(limit)
        )

    async def create(self, wanted: Sequence[Row]) -> Sequence[UUID | AlreadyExists]:
        """Insert each, or say who has one of its unique names: another one of these, perhaps."""
        rows = await self._connection.fetch(
            CREATE,
            [each["username"] for each in wanted],
            [each["email"] for each in wanted],
            [each["full_name"] for each in wanted],
            [each["kind"] for each in wanted],
            [each["is_active"] for each in wanted],
            [each["is_verified"] for each in wanted],
            [each["metadata"] for each in wanted],
            [each["external_id"] for each in wanted],
        )
        made = {row["position"] - 1: row["id"] for row in rows}
        losers = [n for n in range(len(wanted)) if n not in made]
        if losers:
            taken = await self._taken([wanted[n] for n in losers])
            for n, error in zip(losers, taken, strict=True):
                # Whoever had it may be gone by now.
                made[n] = error or _username_taken(wanted[n]["username"])
        return [made[n] for n in range(len(wanted))]

    async def update(self, user: Row, changes: Mapping[str, Any]) -> None:
        """Store new values, or raise AlreadyExists naming whoever has one of the unique ones."""
        (taken,) = await self._taken([changes], but=user["id"])
        if taken:
            raise taken
        try:
            await self._change(user, {**changes, "updated_at": func.clock_timestamp()})
        except IntegrityError as error:
            # Somebody took it just now: whoever tries again finds out who.
            raise Aborted("CONFLICT", retry_after=0.05) from error

    async def delete(self, user: Row) -> None:
        """Mark it as deleted; nothing else is touched."""
        await self._change(user, {"deleted_at": func.clock_timestamp()})

    async def undelete(self, user: Row) -> None:
        await self._change(user, {"deleted_at": None})

    async def erase(self, user: Row) -> None:
        """Forget who it was; its names are free from now on."""
        now = func.clock_timestamp()
        await self._change(user, {**NAMELESS, "purged_at": now, "updated_at": now})

    async def set_password(self, user: Row, password_hash: str) -> None:
        """Nothing that a client sees of the user changes, so neither does its etag."""
        await self._connection.execute(
            update(users).where(users.c.id == user["id"]).values(password_hash=password_hash)
        )

    async def _change(self, user: Row, columns: Mapping[str, Any]) -> None:
        await self._connection.execute(
            update(users)
            .where(users.c.id == user["id"])
            .values(**columns, revision=user["revision"] + 1)
        )

    async def _taken(
        self, wanted: Sequence[Row], *, but: UUID | None = None
    ) -> Sequence[AlreadyExists | None]:
        """For each, the first of the unique names wanted that somebody else has."""
        rows = await self._connection.fetch(
            TAKEN,
            [each.get("username") for each in wanted],
            [each.get("email") for each in wanted],
            [each.get("external_id") for each in wanted],
            [but] * len(wanted),
        )
        holders = {row["position"] - 1: row for row in rows}
        return [_taken(each, holders[n]) if n in holders else None for n, each in enumerate(wanted)]


def _taken(wanted: Row, holder: Row) -> AlreadyExists:
    """What of the wanted the holder has."""
    username, external_id = wanted.get("username"), wanted.get("external_id")
    if username is not None and holder["username"] == username:
        return _username_taken(username)
    if external_id is not None and holder["external_id"] == external_id:
        return AlreadyExists(
            "EXTERNAL_ID_TAKEN",
            "user",
            holder["id"],
            field="user.external_id",
            external_id=external_id,
        )
    return AlreadyExists("EMAIL_TAKEN", "user", holder["id"], field="user.email")


def _username_taken(username: str) -> AlreadyExists:
    return AlreadyExists("USERNAME_TAKEN", "user", username, field="user.username")


def _has_email(email: str | None) -> ColumnElement[bool]:
    return _lower(users.c.email) == _lower(literal(email, Text))


def _lower(value: ColumnElement[Any]) -> ColumnElement[Any]:
    """As the unique index of e-mails has it, whatever the database's own locale."""
    return func.lower(value.collate("pg_c_utf8"))
