from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert

from service.repositories.base import Repository, Row, tables

tokens = tables["tokens"]
signing_keys = tables["signing_keys"]


class Tokens(Repository):
    """The credentials of calling services, and the keys that sign page tokens and cursors."""

    async def find(self, key_id: str) -> Row | None:
        return await self._connection.row(select(tokens).where(tokens.c.key_id == key_id))

    async def register(
        self,
        *,
        key_id: str,
        secret_hash: bytes,
        service: str,
        scopes: list[str],
        expires_at: datetime | None = None,
    ) -> None:
        """Store a token's hash; one that is there already stays as it is."""
        await self._connection.execute(
            insert(tokens)
            .values(
                key_id=key_id,
                secret_hash=secret_hash,
                service=service,
                scopes=scopes,
                expires_at=expires_at,
            )
            .on_conflict_do_nothing()
        )

    async def list(self) -> Sequence[Row]:
        """Every token there ever was, newest first; never its hash."""
        c = tokens.c
        return await self._connection.rows(
            select(c.key_id, c.service, c.scopes, c.created_at, c.expires_at, c.revoked_at)
            .order_by(c.created_at.desc(), c.key_id)
            .limit(1000)
        )

    async def revoke(self, key_id: str) -> Row | None:
        """End a token now; when it was ended, or None if there is no such token."""
        return await self._connection.row(
            update(tokens)
            .where(tokens.c.key_id == key_id)
            .values(revoked_at=func.coalesce(tokens.c.revoked_at, func.clock_timestamp()))
            .returning(tokens.c.revoked_at)
        )

    async def signing_key(self, name: str, candidate: bytes) -> bytes:
        """The key of that name; the candidate becomes it where there is none."""
        await self._connection.execute(
            insert(signing_keys).values(name=name, key=candidate).on_conflict_do_nothing()
        )
        row = await self._connection.row(
            select(signing_keys.c.key).where(signing_keys.c.name == name)
        )
        assert row is not None
        key: bytes = row["key"]
        return key
