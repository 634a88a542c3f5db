from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Text, and_, func, literal, or_, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql import ColumnElement

from service.errors import Aborted, AlreadyExists
from service.models.base import HAS_METADATA
from service.repositories.base import Repository, Row, columns_of, tables

users = tables["users"]

FIND = f"""
SELECT k.position, {columns_of("users", "u")}
FROM unnest($1::uuid[], $2::text[]) WITH ORDINALITY AS k(id, username, position)
CROSS JOIN LATERAL (
  SELECT {columns_of("users", "u")} FROM users u
  WHERE u.id = COALESCE(k.id, (SELECT n.id FROM users n WHERE n.username = k.username)) OFFSET 0
) AS u
WHERE u.purged_at IS NULL OR $3
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
        found: list[Row | None] = [None] * len(references)
        rows = await self._connection.fetch(
            FIND,
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

    async def create(self, **columns: Any) -> Row:
        """Insert one, or raise AlreadyExists naming whoever has one of its unique names."""
        now = func.statement_timestamp()
        row = await self._connection.row(
            insert(users)
            .values(**columns, created_at=now, updated_at=now)
            .on_conflict_do_nothing()
            .returning(*users.columns)
        )
        if row is None:
            taken = await self._taken(columns)
            username = columns["username"]
            # Whoever had it may be gone by now.
            raise taken or AlreadyExists("USERNAME_TAKEN", "user", username, field="user.username")
        return row

    async def update(self, user: Row, changes: Mapping[str, Any]) -> None:
        """Store new values, or raise AlreadyExists naming whoever has one of the unique ones."""
        if taken := await self._taken(changes, but=user["id"]):
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
        self, wanted: Mapping[str, Any], *, but: UUID | None = None
    ) -> AlreadyExists | None:
        """The first of the unique names wanted that somebody else has, and who that is."""
        username, email = wanted.get("username"), wanted.get("email")
        external_id = wanted.get("external_id")
        # NULL = NULL is not true: what is not wanted is not taken.
        holder = await self._connection.row(
            select(users.c.id, users.c.username, users.c.external_id)
            .where(
                or_(
                    users.c.username == literal(username, Text),
                    users.c.external_id == literal(external_id, Text),
                    _has_email(email),
                ),
                users.c.id.is_distinct_from(but),
            )
            .order_by((users.c.username == literal(username, Text)).desc().nulls_last())
            .limit(1)
        )
        if holder is None:
            return None
        if username is not None and holder["username"] == username:
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


def _has_email(email: str | None) -> ColumnElement[bool]:
    return _lower(users.c.email) == _lower(literal(email, Text))


def _lower(value: ColumnElement[Any]) -> ColumnElement[Any]:
    """As the unique index of e-mails has it, whatever the database's own locale."""
    return func.lower(value.collate("pg_c_utf8"))
