"""The schema's history: it ends at the models, runs once whoever races, waits for nobody long."""

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from io import StringIO
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import create_async_engine
from structlog.testing import capture_logs
from structlog.types import EventDict

import migrations
from service import schema
from service.embedded import EmbeddedPostgres
from service.models import Base

# Everything that a definition can differ in, and that autogenerate does not see: checks, partial
# indexes, operator classes, collations, actions, storage.
CATALOGUE = {
    "columns": """
        SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
               a.attcollation::regcollation::text, pg_get_expr(d.adbin, d.adrelid)
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid AND c.relkind = 'r'
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND a.attnum > 0 AND NOT a.attisdropped""",
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid), convalidated
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace""",
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    "relations": """
        SELECT relname, relkind::text, relreplident::text, reloptions::text, relpersistence::text
        FROM pg_class WHERE relnamespace = 'public'::regnamespace""",
    "functions": "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
    "types": """
        SELECT typname FROM pg_type
        WHERE typnamespace = 'public'::regnamespace AND typrelid = 0 AND typelem = 0""",
    "triggers": "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal",
}

Catalogue = dict[str, set[tuple[object, ...]]]
NewDatabase = Callable[[], Awaitable[str]]
NextRevision = Callable[..., str]


@pytest_asyncio.fixture
async def new_database(
    postgres: EmbeddedPostgres, database: asyncpg.Connection
) -> AsyncIterator[NewDatabase]:
    """Makes an empty database and gives its URL."""
    names: list[str] = []

    async def create() -> str:
        names.append(f"migrations_{len(names)}")
        await database.execute(f"CREATE DATABASE {names[-1]}")
        return postgres.url.replace("/parley?", f"/{names[-1]}?")

    yield create
    # As the superuser, whose an autovacuum at work in it is.
    superuser = await connect(postgres.url.replace("parley@", "postgres@"))
    for name in names:
        await superuser.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await superuser.close()


@pytest.fixture
def next_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NextRevision:
    """Adds a revision that runs statements to a copy of the history, which is then used."""
    folder = Path(shutil.copytree(schema.FOLDER, tmp_path / "migrations"))
    monkeypatch.setattr(schema, "FOLDER", folder)

    def add(*statements: str) -> str:
        number = len(list(folder.glob("versions/[0-9]*.py")))
        before, after = f"{number:04}", f"{number + 1:04}"
        (folder / f"versions/{after}_next.py").write_text(
            "from alembic import op\n"
            f"revision, down_revision = {after!r}, {before!r}\n"
            f"def upgrade():\n    for statement in {statements!r}:\n        op.execute(statement)\n"
        )
        return after

    return add


def alembic(url: str) -> Config:
    config = Config(output_buffer=StringIO())
    config.set_main_option("script_location", str(schema.FOLDER))
    config.attributes["url"] = url
    return config


async def connect(url: str) -> asyncpg.Connection:
    return await asyncpg.connect(url.replace("postgresql+asyncpg", "postgresql"))


async def catalogue(url: str) -> Catalogue:
    """Everything that is defined in the database but Alembic's own table."""
    connection = await connect(url)
    found = {name: await connection.fetch(query) for name, query in CATALOGUE.items()}
    await connection.close()
    return {
        name: {tuple(row) for row in rows if not str(row[0]).startswith("alembic_version")}
        for name, rows in found.items()
    }


async def revision(url: str) -> str | None:
    connection = await connect(url)
    found: str | None = await connection.fetchval("SELECT version_num FROM alembic_version")
    await connection.close()
    return found


async def first_of(logs: list[EventDict], migrating: asyncio.Task[None]) -> None:
    """Return when the migrator, who is held up, says so."""
    while not logs:
        assert not migrating.done(), migrating
        await asyncio.sleep(0.02)


async def test_the_history_ends_at_the_models(
    postgres: EmbeddedPostgres, new_database: NewDatabase
) -> None:
    modelled = await new_database()
    engine = create_async_engine(modelled)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()

    assert await catalogue(postgres.url) == await catalogue(modelled)


async def test_autogenerate_would_find_nothing(postgres: EmbeddedPostgres) -> None:
    await asyncio.to_thread(command.check, alembic(postgres.url))


async def test_down_leaves_nothing_and_up_again_everything(new_database: NewDatabase) -> None:
    url = await new_database()
    empty = await catalogue(url)
    await schema.migrate(url)
    full = await catalogue(url)

    await asyncio.to_thread(command.downgrade, alembic(url), "base")
    assert await catalogue(url) == empty

    await schema.migrate(url)
    assert await catalogue(url) == full


async def test_migrating_twice_changes_nothing(new_database: NewDatabase) -> None:
    url = await new_database()
    await schema.migrate(url)
    once = await catalogue(url)

    await schema.migrate(url)

    assert await catalogue(url) == once


async def test_the_sql_script_makes_the_same_schema(
    postgres: EmbeddedPostgres, new_database: NewDatabase
) -> None:
    url = await new_database()
    config = alembic("nowhere")
    await asyncio.to_thread(command.upgrade, config, "head", sql=True)
    assert isinstance(config.output_buffer, StringIO)

    connection = await connect(url)
    # One by one, as psql does: some must not be in a transaction.
    for part in config.output_buffer.getvalue().split("\n\n"):
        if statement := "\n".join(line for line in part.splitlines() if line[:2] != "--"):
            await connection.execute(statement)
    assert await connection.fetchval("SHOW lock_timeout") == migrations.LOCK_TIMEOUT
    await connection.close()

    assert await revision(url) == schema.needed_revision()
    assert await catalogue(url) == await catalogue(postgres.url)


async def test_of_two_migrators_one_migrates_and_both_succeed(new_database: NewDatabase) -> None:
    url = await new_database()
    connection = await connect(url)
    await connection.execute(f"SELECT pg_advisory_lock({migrations.LOCK})")
    migrate = f"import asyncio; from service import schema; asyncio.run(schema.migrate({url!r}))"
    racers = [await asyncio.create_subprocess_exec(sys.executable, "-c", migrate) for _ in range(2)]
    others = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    while await connection.fetchval(others) < len(racers):
        assert [racer.returncode for racer in racers] == [None, None]
        await asyncio.sleep(0.02)

    await connection.close()

    assert [await racer.wait() for racer in racers] == [0, 0]
    assert await revision(url) == schema.needed_revision()


async def test_a_migrator_that_waits_for_its_turn_holds_nobody_up(
    new_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in no transaction meanwhile (the other's CREATE INDEX CONCURRENTLY would wait for its
    end), and the time limit of locks is not for this wait: the other may need an hour."""
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", "50ms")
    url = await new_database()
    other = await connect(url)
    await other.execute(f"SELECT pg_advisory_lock({migrations.LOCK}); CREATE TABLE big (n int)")
    with capture_logs() as logs:
        migrating = asyncio.create_task(schema.migrate(url))
        await first_of(logs, migrating)

        await other.execute("CREATE INDEX CONCURRENTLY ON big (n)", timeout=5)
        assert not migrating.done()
        await other.close()
        await migrating

    assert {log["event"] for log in logs} == {"another_migrator_is_at_work"}


async def test_a_migrator_that_meets_a_locked_table_gives_up_and_tries_again(
    new_database: NewDatabase,
    next_revision: NextRevision,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = await new_database()
    await schema.migrate(url)
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", "50ms")
    newest = next_revision("ALTER TABLE users ADD COLUMN shoe_size integer")
    reader = await connect(url)
    await reader.execute("BEGIN; SELECT FROM users")

    with capture_logs() as logs:
        migrating = asyncio.create_task(schema.migrate(url))
        await first_of(logs, migrating)
        # It has let go: whoever comes now does not queue behind it.
        assert await revision(url) == schema.needed_revision()
        writer = await connect(url)
        await writer.execute("INSERT INTO users (username) VALUES ('ada')", timeout=1)
        await writer.close()
        await reader.close()
        await migrating

    assert [log["event"] for log in logs] == ["migration_waits"]
    assert await revision(url) == newest


async def test_a_migration_that_fails_leaves_those_before_it(
    new_database: NewDatabase, next_revision: NextRevision
) -> None:
    url = await new_database()
    good = next_revision("CREATE TABLE shoes (size integer)")
    next_revision("CREATE TABLE hats (size integer)", "SELECT 1 / 0")

    with pytest.raises(schema.MigrationFailed):
        await schema.migrate(url)

    assert await revision(url) == good
    relations = {name for name, *_ in (await catalogue(url))["relations"]}
    assert "shoes" in relations
    assert "hats" not in relations


async def test_limits_of_the_database_do_not_end_a_migration(
    new_database: NewDatabase, next_revision: NextRevision
) -> None:
    url = await new_database()
    connection = await connect(url)
    name = await connection.fetchval("SELECT current_database()")
    for limit in ("statement_timeout", "transaction_timeout"):
        await connection.execute(f"ALTER DATABASE {name} SET {limit} = '100ms'")
    await connection.close()
    newest = next_revision("SELECT pg_sleep(0.2)")

    await schema.migrate(url)

    assert await revision(url) == newest


async def test_revisions_are_numbered_in_one_line(
    postgres: EmbeddedPostgres, next_revision: NextRevision
) -> None:
    """`needed_revision` takes the greatest number for the newest, without importing Alembic."""
    config = alembic(postgres.url)
    await asyncio.to_thread(command.revision, config, "something new", autogenerate=True)

    script = ScriptDirectory.from_config(config)
    revisions = [each.revision for each in script.walk_revisions()][::-1]
    assert revisions == [f"{n + 1:04}" for n in range(len(revisions))]
    assert script.get_heads() == [f"{int(schema.needed_revision()) + 1:04}"]
