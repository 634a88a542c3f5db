from collections.abc import Mapping, Sequence

from sqlalchemy import delete, func, text

from service.repositories.base import Repository, tables

failures = tables["password_failures"]

# How long ago the last failure but (allowed - 1) was: one more may follow when that is a minute.
WAIT = """
SELECT k.key, extract(epoch FROM n.failed_at + interval '1 minute' - clock_timestamp())::float8
         AS seconds
FROM unnest($1::bytea[], $2::int[]) AS k(key, allowed)
CROSS JOIN LATERAL (
  SELECT f.failed_at FROM password_failures f
  WHERE f.key = k.key AND f.failed_at > clock_timestamp() - interval '1 minute'
  ORDER BY f.failed_at DESC OFFSET k.allowed - 1 LIMIT 1
) AS n
"""
RECORD = "INSERT INTO password_failures (key) SELECT unnest($1::bytea[])"


class Passwords(Repository):
    """Who gave a wrong password in the last minute."""

    async def waits(self, allowed: Mapping[bytes, int]) -> dict[bytes, float]:
        """For each key that has as many failures as a minute allows: the seconds to the next."""
        rows = await self._connection.fetch(WAIT, [*allowed], [*allowed.values()])
        return {row["key"]: row["seconds"] for row in rows}

    async def record_failure(self, keys: Sequence[bytes]) -> None:
        await self._connection.fetch(RECORD, keys)

    async def prune(self) -> None:
        """Forget what is of no interest any more."""
        await self._connection.execute(
            delete(failures).where(failures.c.failed_at < func.now() - text("interval '1 minute'"))
        )
