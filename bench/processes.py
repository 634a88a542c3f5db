"""Processes on their cores, and what they used of them."""

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from parley.v1 import conversation_pb2, conversation_pb2_grpc

# A server has one core; what is around it has another one, where there is another one.
CORES = sorted(os.sched_getaffinity(0))[:2]
SERVER, AROUND = CORES[:1], CORES[-1:]

# In which whoever is throttled runs and rests once.
TURN_SECONDS = 0.02
START_SECONDS, STOP_SECONDS = 60.0, 30.0
EAGER = [(f"grpc.{name}_reconnect_backoff_ms", 20) for name in ("initial", "min", "max")]
# What a server says once it serves: the empty one has no list of conversations.
ANSWERS = (grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED)


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers."""

    process: psutil.Process
    address: str
    token: str = ""
    # Others that serve for it.
    workers: Sequence[psutil.Process] = ()

    def seconds(self) -> float:
        """Processor time of all of it."""
        return seconds_of(self.process) + sum(map(seconds_of, self.workers))


@asynccontextmanager
async def serving(
    *command: str,
    log: Path,
    token: str = "",
    cores: list[int] = SERVER,
    address: str = "",
    **settings: str | Path,
) -> AsyncIterator[Target]:
    """Run a server on these cores, with these settings of Parley's and no others; beside another
    one if that has this address.
    """
    address = address or _free_address()
    environment = {name: value for name, value in os.environ.items() if name[:7] != "PARLEY_"}
    for name, value in (settings | {"address": address}).items():
        environment[f"PARLEY_{name.upper()}"] = str(value)
    with log.open("ab") as output:
        process = psutil.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, cores)), *command],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        answer = asyncio.create_task(_first_answer(address, token))
        while not answer.done():
            if process.poll() is not None:
                answer.cancel()
                raise RuntimeError(f"it ended: {' '.join(command)}\n{_end_of(log)}")
            await asyncio.wait([answer], timeout=0.5)
        await answer
        yield Target(process, address, token)
    finally:
        # All of its session: `make` may pass it on or not. PostgreSQL has a session of its own.
        family = [process, *process.children(recursive=True)]
        os.killpg(process.pid, signal.SIGTERM)
        await asyncio.to_thread(psutil.wait_procs, family, STOP_SECONDS)


def _end_of(log: Path) -> str:
    return log.read_text()[-2_000:]


async def _first_answer(address: str, token: str) -> None:
    give_up = time.monotonic() + START_SECONDS
    code = grpc.StatusCode.UNAVAILABLE
    async with grpc.aio.insecure_channel(address, options=EAGER) as channel:
        list_conversations = conversation_pb2_grpc.ConversationServiceStub(
            channel
        ).ListConversations
        while code not in ANSWERS:
            code = await list_conversations(
                conversation_pb2.ListConversationsRequest(page_size=1),
                metadata=[("authorization", f"Bearer {token}")],
                wait_for_ready=True,
                timeout=START_SECONDS,
            ).code()
            if time.monotonic() > give_up:
                raise TimeoutError(f"{address} says {code.name} for {START_SECONDS} s")
            await asyncio.sleep(0.005)


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def pin(process: psutil.Process, cores: list[int]) -> None:
    """The process with its threads, its children, and those that they will have."""
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            for thread in each.threads():
                os.sched_setaffinity(thread.id, cores)


@contextmanager
def unpinned(server: psutil.Process, postmaster: psutil.Process) -> Iterator[None]:
    """A server, PostgreSQL, and what is started meanwhile, on whatever core they like."""
    # In this order: PostgreSQL may be the server's child.
    pin(server, CORES)
    pin(postmaster, CORES)
    os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        pin(server, SERVER)
        pin(postmaster, AROUND)
        os.sched_setaffinity(0, AROUND)


@contextmanager
def throttled(processes: Sequence[psutil.Process], share: float) -> Iterator[None]:
    """Each runs for this share of the time, one after the other: stopped and continued, as by
    cpulimit.
    """
    is_over = threading.Event()

    def throttle(process: psutil.Process, offset: float) -> None:
        is_over.wait(offset)
        while not is_over.is_set():
            process.suspend()
            is_over.wait((1 - share) * TURN_SECONDS)
            process.resume()
            is_over.wait(share * TURN_SECONDS)

    threads = [
        threading.Thread(target=throttle, args=(process, n / len(processes) * TURN_SECONDS))
        for n, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
        # Also one that a thread left behind that has failed.
        for process in processes:
            process.resume()


def seconds_of(process: psutil.Process) -> float:
    """Processor time of a process."""
    times = process.cpu_times()
    return float(times.user + times.system)


def seconds_of_all(process: psutil.Process) -> float:
    """Processor time of a process and its children, also of those that have ended."""
    times = process.cpu_times()
    total = float(times.user + times.system + times.children_user + times.children_system)
    for child in process.children():
        try:
            total += seconds_of(child)
        except psutil.NoSuchProcess:
            continue
    return total


def resident_mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


def peak_mib(process: psutil.Process) -> float:
    """The most that was ever resident, by the kernel's own account."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**10
