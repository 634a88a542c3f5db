"""Callers' credentials, as an operator handles them: `parley token create | list | revoke`.

A token is `parley_<key id>_<256 random bits>`. It is shown once, when it is made; the database
keeps its key id, the SHA-256 of its secret, the service, its scopes and its end. A service may hold
several at once, so that one can be replaced without an interruption.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from service.access import hash_of, new_token, split_token
from service.repositories.base import Row
from service.store import Store


async def create(
    url: str, *, service: str, scopes: Sequence[str], expires_in: timedelta | None
) -> str:
    """A new token for the service. Nobody can show it again."""
    token = new_token()
    key_id, secret = split_token(token)
    async with _store(url) as store, store.transaction() as transaction:
        await transaction.tokens.register(
            key_id=key_id,
            secret_hash=hash_of(secret),
            service=service,
            scopes=sorted(set(scopes)),
            expires_at=datetime.now(UTC) + expires_in if expires_in else None,
        )
    return token


async def every(url: str) -> Sequence[Row]:
    """All tokens, newest first, without their secrets."""
    async with _store(url) as store, store.snapshot() as snapshot:
        return await snapshot.tokens.list()


async def revoke(url: str, key_id: str) -> bool:
    """End a token, for every server within the seconds that it remembers one; False if unknown."""
    async with _store(url) as store, store.transaction() as transaction:
        return await transaction.tokens.revoke(key_id) is not None


@asynccontextmanager
async def _store(url: str) -> AsyncIterator[Store]:
    store = Store(url, pool_size=2)
    try:
        yield store
    finally:
        await store.close()
