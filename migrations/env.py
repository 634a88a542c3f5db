"""How a migration runs: async engine, one migrator at a time, never waiting long for a lock."""

import asyncio
import os

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine

from service.models import Base
from service.store import driver_url

# "parley" in ASCII: the advisory lock that one migrator holds, so that replicas started together
# migrate once.
MIGRATION_LOCK = 0x7061726C6579
# A migration that waits for a table's lock makes everybody queue behind it: give up early.
LOCK_TIMEOUT = "5s"


def database_url() -> str:
    url = context.config.attributes.get("url") or os.environ.get("PARLEY_DATABASE_URL")
    if not url:
        raise SystemExit("Set PARLEY_DATABASE_URL to the database to migrate.")
    return driver_url(url)


def run(connection: Connection) -> None:
    connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
    connection.execute(text(f"SELECT pg_advisory_lock({MIGRATION_LOCK})"))
    connection.commit()
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_type=True,
        compare_server_default=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


async def migrate() -> None:
    engine = create_async_engine(database_url())
    try:
        async with engine.connect() as connection:
            await connection.run_sync(run)
    finally:
        await engine.dispose()


if context.is_offline_mode():
    context.configure(
        dialect_name="postgresql",
        target_metadata=Base.metadata,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(migrate())
