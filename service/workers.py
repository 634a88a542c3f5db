"""`serve --workers N`: N processes on one port, and this one, which keeps them alive.

The supervisor owns what they share: the port's number, the embedded PostgreSQL, the first token,
the admin address. It serves no call itself. A worker is a `parley serve` in a session of its own,
so that Ctrl-C reaches the supervisor alone; it says on its standard output whether it serves, and
ends when its standard input does: it outlives no supervisor, however that one ended.
"""

import asyncio
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import structlog
from prometheus_client import multiprocess

from service.server import require_free
from service.settings import ConfigurationError, Settings

log = structlog.get_logger()

COMMAND = (sys.executable, "-m", "service", "serve", "--worker")
SERVING, NOT_SERVING = "serving", "not serving"
# Set where a worker begins, for prometheus-client, which reads it when it is imported.
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

# A worker that ends so soon has not worked; so many times in a row, none ever will.
SETTLED_SECONDS = 5.0
MAX_FAILURES = 5
PAUSE_SECONDS = 0.2
# A worker ends with this when a setting cannot be right: no other start would help.
HOPELESS = 2
# After its calls have had their time.
STOP_SECONDS = 10.0


class Workers:
    """So many workers, each replaced when it ends."""

    def __init__(self, settings: Settings, database_url: str) -> None:
        self._settings = settings
        self._port = _Port(settings.host, int(settings.port))
        self.address = f"{settings.host}:{self._port.number}"
        self._folder = tempfile.TemporaryDirectory(prefix="parley-metrics-")
        self.metrics_folder = Path(self._folder.name)
        self._environment = _environment(
            settings,
            address=self.address,
            database_url=database_url,
            metrics_folder=self.metrics_folder,
        )
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._serving: set[int] = set()
        self._changed = asyncio.Event()
        self._stopping = False

    @property
    def are_ready(self) -> bool:
        """Whether every one of them serves."""
        return len(self._serving) == self._settings.workers

    async def ready(self) -> None:
        while not self.are_ready:
            self._changed.clear()
            await self._changed.wait()

    async def run(self) -> None:
        """Keep them running; raises ConfigurationError when one cannot be kept."""
        await asyncio.gather(*map(self._keep, range(1, self._settings.workers + 1)))

    async def stop(self) -> None:
        """Let each drain, and wait for it."""
        self._stopping = True
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.terminate()
        late = self._settings.drain_seconds + STOP_SECONDS
        for number, process in self._processes.items():
            try:
                await asyncio.wait_for(process.wait(), late)
            except TimeoutError:
                log.error("worker_killed", worker=number)
                process.kill()
                await process.wait()
        self._port.close()
        self._folder.cleanup()

    async def _keep(self, number: int) -> None:
        failures = 0
        while True:
            started = time.monotonic()
            code = await self._live(number)
            if self._stopping:
                return
            settled = time.monotonic() - started > SETTLED_SECONDS
            failures = 0 if settled else failures + 1
            if code == HOPELESS or failures == MAX_FAILURES:
                raise ConfigurationError(
                    f"worker {number} cannot be kept running: it ended {_how(code)}. "
                    "The log says why."
                )
            log.warning("worker_ended", worker=number, how=_how(code))
            await asyncio.sleep(PAUSE_SECONDS)

    async def _live(self, number: int) -> int:
        """One worker's life, and its exit code."""
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            str(number),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        self._processes[number] = process
        assert process.stdout
        async for line in process.stdout:
            self._note(number, is_serving=line.decode().strip() == SERVING)
        self._note(number, is_serving=False)
        code = await process.wait()
        multiprocess.mark_process_dead(process.pid, self.metrics_folder)  # type: ignore[no-untyped-call]
        return code

    def _note(self, number: int, *, is_serving: bool) -> None:
        if is_serving:
            self._serving.add(number)
        else:
            self._serving.discard(number)
        self._changed.set()


def end_with_standard_input() -> None:
    """Drain and end when the supervisor is gone: then nobody holds the other end any more."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


class _Port:
    """A port number held for the workers: bound, so that nobody else takes it, and not listened
    on, so that no connection comes here.
    """

    def __init__(self, host: str, port: int) -> None:
        try:
            # Another server's workers would share their port with ours.
            require_free(host, port)
            family, kind, protocol, _, address = socket.getaddrinfo(
                host.strip("[]"), port, type=socket.SOCK_STREAM
            )[0]
            self._socket = socket.socket(family, kind, protocol)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._socket.bind(address)
        except OSError as error:
            raise ConfigurationError(
                f"PARLEY_ADDRESS: cannot listen on {host}:{port}: {error.strerror}."
            ) from None
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()


def _environment(
    settings: Settings, *, address: str, database_url: str, metrics_folder: Path
) -> Mapping[str, str]:
    """Every setting as the supervisor has it, but for what it does itself."""
    given = settings.model_dump(exclude={"workers", "admin_address"}, exclude_none=True)
    given |= {"address": address, "database_url": database_url}
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PARLEY_")}
    theirs = {f"PARLEY_{name.upper()}": str(value) for name, value in given.items()}
    return ours | theirs | {METRICS_FOLDER: str(metrics_folder)}


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
