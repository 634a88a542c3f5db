"""The schema's revision: which one the code needs, and how to get there."""

import asyncio
from functools import cache
from pathlib import Path

import structlog
from asyncpg import PostgresError
from sqlalchemy.exc import SQLAlchemyError

import migrations

log = structlog.get_logger()

ATTEMPTS = 5
FOLDER = Path(migrations.__file__).parent


@cache
def needed_revision() -> str:
    """The newest revision in the migrations folder: the one whose number is the greatest."""
    return max(path.name.split("_")[0] for path in (FOLDER / "versions").glob("[0-9]*.py"))


class MigrationFailed(Exception):
    """The schema could not be changed; the text is one line that says why."""


async def migrate(url: str, revision: str = "head") -> None:
    """Bring the database to a revision, under an advisory lock. Safe to repeat and to race.

    A migration gives up soon where others hold its tables, and tries again a few times.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await asyncio.to_thread(_upgrade, url, revision)
        except (SQLAlchemyError, PostgresError, OSError) as error:
            busy = "LockNotAvailable" in str(error)
            if not busy or attempt == ATTEMPTS:
                raise MigrationFailed(f"cannot migrate: {str(error).splitlines()[0]}") from error
            log.warning("migration_waits", attempt=attempt)
            await asyncio.sleep(attempt)


def _upgrade(url: str, revision: str) -> None:
    # Alembic takes a third of a second to import; most starts have nothing to migrate.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    config.attributes["url"] = url
    command.upgrade(config, revision)
