"""Hashing passwords: slow on purpose, and therefore never where others wait.

A few threads of their own, and a queue with an end: a flood of passwords is refused, and takes
neither memory nor the event loop from anybody. Why these numbers: docs/decisions/0004-passwords.md.
"""

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError

from service.errors import ResourceExhausted

# One hash takes 19 MiB and about 16 ms of a core.
MEMORY_KIB = 19 * 1024
PASSES = 2
LANES = 1
THREADS = 2
# Those at work included: the last one in the queue waits a quarter of a second.
MAX_PENDING = 32
RETRY_SECONDS = 0.5

Answer = TypeVar("Answer")


class Hasher:
    """argon2id in threads of its own."""

    def __init__(self) -> None:
        self._argon2 = PasswordHasher(time_cost=PASSES, memory_cost=MEMORY_KIB, parallelism=LANES)
        # Checked where there is nothing to check, which must take as long.
        self._nobodys = self._argon2.hash(secrets.token_hex())
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="password")
        self._pending = 0

    async def hash(self, password: str) -> str:
        """What to store of a password: algorithm, parameters, salt and hash as one text."""
        return await self._run(lambda: self._argon2.hash(password))

    async def verify(self, password_hash: str | None, password: str) -> bool:
        """Whether the hash is the password's; without a hash False, in the same time."""
        return await self._run(lambda: self._matches(password_hash or self._nobodys, password))

    def _matches(self, password_hash: str, password: str) -> bool:
        try:
            return self._argon2.verify(password_hash, password)
        except VerifyMismatchError:
            return False

    async def _run(self, work: Callable[[], Answer]) -> Answer:
        if self._pending >= MAX_PENDING:
            raise ResourceExhausted(
                "TOO_MANY_PASSWORDS", retry_after=RETRY_SECONDS, subject="passwords being hashed"
            )
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._pending -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
