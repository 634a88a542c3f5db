"""Checking passwords: one answer for every failure, in the same time, and not too often.

Failures are counted in the database, so that replicas share them and a restart forgets none.
"""

import asyncio
import hmac
import json
from weakref import WeakValueDictionary

from service.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from service.identity import Call
from service.passwords import Hasher
from service.repositories.base import Row
from service.store import Store

MAX_FAILURES = 5
# Of all that one caller's users give; each of them is a login page's visitor.
MAX_FAILURES_OF_CALLER = 300


class Verifier:
    """Tells whether a password is a user's."""

    def __init__(self, store: Store, hasher: Hasher) -> None:
        self._store = store
        self._hasher = hasher
        self._key: bytes | None = None
        # One at a time of each user: those that come together must not all count as the fifth.
        self._turns: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    def use(self, key: bytes) -> None:
        """Digest with this key what is counted; all replicas have the same."""
        self._key = key

    async def verify(self, login: str, user: Row | None, password: str, call: Call) -> bool:
        """Whether `user`, whom `login` names if anybody, may come in with that password.

        Does the same work whatever is wrong. Whoever does not exist is counted by its login, so
        that it is refused after as many failures as anybody.
        """
        subject = self._digest("user", str(user["id"])) if user else self._digest("login", login)
        caller = self._digest("caller", call.caller.service)
        async with self._turns.setdefault(subject, asyncio.Lock()):
            if not call.is_wanted():
                raise DeadlineExceeded("DEADLINE_EXCEEDED")
            async with self._store.snapshot() as snapshot:
                waits = await snapshot.passwords.waits(
                    {subject: MAX_FAILURES, caller: MAX_FAILURES_OF_CALLER}
                )
            if waits:
                whose = "user" if subject in waits else "caller"
                raise ResourceExhausted(
                    "RATE_LIMITED",
                    retry_after=max(waits.values()),
                    subject=f"failed passwords of one {whose} in a minute",
                )
            matches = await self._hasher.verify(user["password_hash"] if user else None, password)
            verified = matches and user is not None and _may_enter(user)
            if not verified:
                async with self._store.transaction() as transaction:
                    await transaction.passwords.record_failure([subject, caller])
        return verified

    def _digest(self, *named: str) -> bytes:
        if self._key is None:
            raise Unavailable("DATABASE_UNAVAILABLE")
        return hmac.digest(self._key, json.dumps(named).encode(), "sha256")


def _may_enter(user: Row) -> bool:
    return bool(user["is_active"]) and user["deleted_at"] is None
