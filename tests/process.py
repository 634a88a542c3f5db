"""The service as its users run it: a process of its own, which can be killed."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.embedded import EmbeddedPostgres

SERVING, NOT_SERVING = "SERVING", "NOT_SERVING"
ROOT = Path(__file__).parent.parent

# A client that comes back soon after its server did.
CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 300),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(**settings: object) -> dict[str, str]:
    """Ours without any setting of Parley's, then these."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PARLEY_")}
    return ours | {f"PARLEY_{name.upper()}": str(value) for name, value in settings.items()}


def parley(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=ROOT,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


class Service:
    """`parley serve`, with what it printed and logged."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._settings = {"data_dir": folder / "data", "address": self.address} | settings
        self._output = folder / "output"
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process
        return self._process

    def launch(self) -> None:
        with self._output.open("ab") as output, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service", "serve"],
                cwd=ROOT,
                env=environment(**self._settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                start_new_session=True,
            )

    async def start(self) -> float:
        """Start it; the seconds until it said that it serves."""
        started = time.monotonic()
        self.launch()
        await self.until(SERVING, seconds=20)
        return time.monotonic() - started

    async def ended(self, seconds: float = 30) -> int:
        """Its exit code, once it has ended."""
        return await asyncio.to_thread(self.process.wait, seconds)

    async def stop(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            await self.ended()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def token(self) -> str:
        return (self.folder / "data" / "token").read_text().strip()

    @property
    def output(self) -> str:
        return self._output.read_text()

    async def said(self, line: str, *, seconds: float = 10) -> None:
        """Wait until it has printed this: it serves a moment before it says so."""
        async with asyncio.timeout(seconds):
            while not self._output.exists() or line not in self.output:
                assert self.process.poll() is None, f"it ended: {self.log}"
                await asyncio.sleep(0.02)

    def forget_output(self) -> None:
        self._output.unlink()

    def set(self, **settings: object) -> None:
        self._settings |= settings

    @property
    def log(self) -> str:
        return self._log.read_text()

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """The lines of its log, all of them JSON objects."""
        lines = [json.loads(line) for line in self.log.splitlines()]
        return [line for line in lines if not name or line["event"] == name]

    @asynccontextmanager
    async def channel(self, *, alone: bool = False) -> AsyncIterator[grpc.aio.Channel]:
        """A channel; `alone`: on a connection that it shares with no other."""
        options = [*CHANNEL, ("grpc.use_local_subchannel_pool", int(alone))]
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            yield channel

    async def health(self, name: str = "") -> str:
        """What health says of a service; the status code where it says nothing."""
        async with self.channel() as channel:
            return await health(channel, name)

    async def until(self, status: str, *, seconds: float, name: str = "") -> float:
        """Wait for that health; the seconds it took."""
        started = time.monotonic()
        async with self.channel() as channel:
            while (found := await health(channel, name)) != status:
                assert self.process.poll() is None, f"it ended: {self.log}"
                waited = time.monotonic() - started
                assert waited < seconds, f"{found} after {waited:.1f} s: {self.log[-2000:]}"
                await asyncio.sleep(0.02)
        return time.monotonic() - started

    def workers(self) -> list[psutil.Process]:
        return children(self.process.pid, "--worker")

    # Its PostgreSQL

    @property
    def database_url(self) -> str:
        # Its socket is elsewhere where the folder's path is too long for one.
        url = EmbeddedPostgres(self.folder / "data").url
        return url.replace("postgresql+asyncpg", "postgresql")

    async def reachable(self) -> float:
        """The moment at which its PostgreSQL takes connections in and answers."""
        while True:
            try:
                connection = await asyncpg.connect(self.database_url)
                await connection.execute("SELECT 1")
                await connection.close()
                return time.monotonic()
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await asyncio.sleep(0.005)

    def postmaster(self) -> psutil.Process:
        file = self.folder / "data" / "postgres" / "data" / "postmaster.pid"
        return psutil.Process(int(file.read_text().splitlines()[0]))

    def postgres(self) -> list[psutil.Process]:
        """The postmaster first, and all its children."""
        postmaster = self.postmaster()
        return [postmaster, *postmaster.children(recursive=True)]


async def health(channel: grpc.aio.Channel, name: str = "") -> str:
    request = health_pb2.HealthCheckRequest(service=name)
    try:
        response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)  # type: ignore[no-any-return]


def children(pid: int, naming: str) -> list[psutil.Process]:
    """Those of its children whose command line matches this."""
    found = []
    for child in psutil.Process(pid).children():
        # One that has just ended has none.
        with suppress(psutil.NoSuchProcess):
            if re.search(naming, " ".join(child.cmdline())):
                found.append(child)
    return found


def kill(processes: list[psutil.Process]) -> None:
    """kill -9, each of them, at once."""
    for process in frozen(processes):
        process.kill()


def frozen(processes: list[psutil.Process]) -> Iterator[psutil.Process]:
    """Those still there, stopped first: none may notice that another one is gone."""
    there = []
    for process in processes:
        try:
            process.suspend()
            there.append(process)
        except psutil.NoSuchProcess:
            pass
    return iter(there)
