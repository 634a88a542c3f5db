"""How a migration runs: async engine, one migrator at a time, never waiting long for a lock."""

import asyncio
import os
from typing import Any

import structlog
from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

import migrations
from service.driver import driver_url
from service.models import Base
from service.models.event import Xid8

log = structlog.get_logger()

# What `alembic revision --autogenerate` would not recognise in the database.
ischema_names["xid8"] = Xid8

# Changing a big table takes the time that it takes, whatever the database's own limits are. What
# must be short is the wait for a lock, since everybody else queues behind whoever waits.
SESSION = f"""\
SET statement_timeout = 0;
SET transaction_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET lock_timeout = '{migrations.LOCK_TIMEOUT}'"""


def database_url() -> str:
    url = context.config.attributes.get("url") or os.environ.get("PARLEY_DATABASE_URL")
    if not url:
        raise SystemExit("Set PARLEY_DATABASE_URL to the database to migrate.")
    return driver_url(url)


def number(_context: object, _revision: object, directives: list[Any]) -> None:
    """Name a new revision by the next number; `service.schema` takes the greatest for newest."""
    head = context.script.get_current_head() or "0"
    directives[0].rev_id = f"{int(head) + 1:04}"


def run(connection: Connection | None = None) -> None:
    """Migrate through the connection; without one, write the SQL that would do it."""
    context.configure(
        connection=connection,
        dialect_name=None if connection else "postgresql",
        target_metadata=Base.metadata,
        compare_type=True,
        compare_server_default=True,
        transaction_per_migration=True,
        process_revision_directives=number,
    )
    if connection is None:
        context.execute(SESSION)
    with context.begin_transaction():
        context.run_migrations()


async def take_turn(connection: AsyncConnection) -> None:
    """Be the only migrator from now until the connection ends.

    The lock is asked for again and again, not waited for: a statement that waits has a snapshot,
    for whose end the other migrator's CREATE INDEX CONCURRENTLY would wait in turn.
    """
    while not await connection.scalar(text(f"SELECT pg_try_advisory_lock({migrations.LOCK})")):
        await connection.rollback()
        log.info("another_migrator_is_at_work")
        await asyncio.sleep(0.5)
    await connection.commit()


async def migrate() -> None:
    engine = create_async_engine(database_url())
    try:
        async with engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await driver.execute(SESSION)
            await take_turn(connection)
            await connection.run_sync(run)
    finally:
        await engine.dispose()


if context.is_offline_mode():
    run()
else:
    asyncio.run(migrate())
