"""The schema's revision: which one the code needs, and how to get there."""

import asyncio
from functools import cache
from pathlib import Path

import structlog
from asyncpg import InterfaceError, PostgresError
from sqlalchemy.exc import SQLAlchemyError

import migrations
from service.logs import text_of

log = structlog.get_logger()

ATTEMPTS = 5
FOLDER = Path(migrations.__file__).parent


@cache
def needed_revision() -> str:
    """The newest revision in the migrations folder: the one whose number is the greatest."""
    return max(path.name.split("_")[0] for path in (FOLDER / "versions").glob("[0-9]*.py"))


def fits(revision: str | None) -> bool:
    """Whether the code works on a schema: a newer one too, as replicas follow the migration."""
    return revision is not None and revision >= needed_revision()


class MigrationFailed(Exception):
    """The schema could not be changed; the text is one line that says why."""


async def migrate(url: str, revision: str = "head") -> None:
    """Bring the database to a revision, under an advisory lock. Safe to repeat and to race.

    A migration gives up soon where others hold its tables, and tries again a few times.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await asyncio.to_thread(_upgrade, url, revision)
        except (SQLAlchemyError, PostgresError, InterfaceError, OSError) as error:
            busy = getattr(getattr(error, "orig", error), "sqlstate", None) == "55P03"
            if not busy or attempt == ATTEMPTS:
                why = f"{type(error).__name__}: {text_of(error)}"
                raise MigrationFailed(f"cannot migrate: {why}") from error
            log.warning("migration_waits", attempt=attempt)
            await asyncio.sleep(attempt)


def _upgrade(url: str, revision: str) -> None:
    # Alembic takes a third of a second to import; most starts have nothing to migrate.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    config.attributes["url"] = url
    try:
        command.upgrade(config, revision)
    except CommandError as error:
        # It knows only the revisions of this version.
        raise MigrationFailed(f"cannot migrate: {error}") from None
