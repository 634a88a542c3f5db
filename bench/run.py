"""`make bench`: what performance promises, measured against the limits of this machine.

Every figure is a ratio of two runs that lay beside each other, because machines differ and are
noisy. `--quick` measures for a minute or two, for the terminal alone.
"""

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import monotonic, sleep

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from bench import document, report
from bench.measure import Meter, Run
from bench.processes import (
    AROUND,
    CORES,
    STOP_SECONDS,
    Target,
    peak_mib,
    resident_mib,
    serving,
    throttled,
    unpinned,
)
from bench.report import Results
from bench.stage import CROWD, PAGES, Group, Stage, stage
from parley.v1 import message_pb2, message_pb2_grpc

ROOT = Path(__file__).parent.parent
WARM_UP_SECONDS = 0.5
SWEEP_SECONDS, SWEEP_ROUNDS = 3.0, 3
SETTLE_SECONDS = 1.0
# Of a core, for each process of a server that leaves something to PostgreSQL and the load.
SHARE = 0.4
MIXED_SECONDS, SAMPLES = 300.0, 60


@dataclass(frozen=True, slots=True)
class Plan:
    """How often, how long and how much."""

    rounds: int
    seconds: float
    page_size: int
    imported: int


FULL = Plan(rounds=9, seconds=10, page_size=50, imported=20_000)
QUICK = Plan(rounds=3, seconds=2, page_size=10, imported=2_000)

Work = Callable[[], Awaitable[Run]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure Parley against its limits.")
    parser.add_argument("--quick", action="store_true", help="roughly, for the terminal alone")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--seconds", type=float, default=FULL.seconds)
    given = parser.parse_args()
    plan = replace(FULL, rounds=given.rounds, seconds=given.seconds)
    # Not where temporary files are: that may be memory, to which nothing is ever synced.
    folder = Path(tempfile.mkdtemp(prefix=".bench-", dir=ROOT))
    try:
        load = build_load(folder)
        os.sched_setaffinity(0, AROUND)
        asyncio.run(bench(folder, load, QUICK if given.quick else plan))
    finally:
        clear(folder)


def clear(folder: Path) -> None:
    """Remove the folder, once PostgreSQL has left it."""
    give_up = monotonic() + STOP_SECONDS
    while (folder / "data/postgres/data/postmaster.pid").exists() and monotonic() < give_up:
        sleep(0.1)
    shutil.rmtree(folder)


def build_load(folder: Path) -> Path:
    """The load generator, from bench/load."""
    if shutil.which("go") is None:
        sys.exit("make bench needs Go, of which the load generator is made: https://go.dev/dl")
    binary = folder / "load"
    subprocess.run(["go", "build", "-o", binary, "."], cwd=ROOT / "bench" / "load", check=True)
    return binary


async def bench(folder: Path, load: Path, plan: Plan) -> None:
    tell("starting the servers, and storing what is to be read")
    async with stage(folder, page_size=plan.page_size) as on:
        meter = Meter(on, load, stored=await on.stored())
        works = await all_works(on, meter, plan)
        tell("warming up")
        await measure(meter, works, rounds=1, seconds=WARM_UP_SECONDS)
        results = await measure(meter, works, rounds=plan.rounds, seconds=plan.seconds)
        sweep: Results = {}
        steady: list[float] = []
        if plan is not QUICK:
            sweep = await measure(
                meter, sweep_works(on, meter), rounds=SWEEP_ROUNDS, seconds=SWEEP_SECONDS
            )
            steady = await resident_while_mixed(on, meter, seconds=MIXED_SECONDS)
        at_most, token = peak_mib(on.parley.process), on.parley.token
    starts, at_rest = await restarts(folder, token, plan.rounds)

    rows = report.rows(results, memory=(at_rest, at_most), steady=steady, starts=starts)
    print(report.text(rows, results))
    if plan is not QUICK:
        document.write(ROOT / "docs", rows, results, sweep, steady, plan.seconds)
        tell("wrote docs/performance.md")


async def all_works(on: Stage, meter: Meter, plan: Plan) -> dict[str, Work]:
    """What is measured, by name; what is compared stands together."""
    parley, empty, obvious = on.parley, on.empty, on.obvious
    deep = await last_page_token(on)

    async def freely(target: Target, method: str) -> Run:
        """On whatever cores they like: two servers, PostgreSQL and the load share two of them."""
        with unpinned(parley.process, on.postmaster):
            return await meter.calls(target, method, on.wide)

    async def in_part(target: Target) -> Run:
        """The same, where each of its processes may use a part of a core: something is left."""
        with throttled(target.workers or [target.process], SHARE):
            return await freely(target, "SendMessage")

    return {
        "send to one": lambda: meter.calls(parley, "SendMessage", on.single),
        "send empty": lambda: meter.calls(empty, "SendMessage", on.wide),
        "send": lambda: meter.calls(parley, "SendMessage", on.wide),
        "send obvious": lambda: meter.calls(obvious, "SendMessage", on.obvious_wide),
        "alone": lambda: meter.calls(parley, "SendMessage", on.wide, in_flight=1),
        "alone empty": lambda: meter.calls(empty, "SendMessage", on.wide, in_flight=1),
        "transaction": meter.transaction,
        "get": lambda: meter.calls(parley, "GetMessage", on.wide),
        "get empty": lambda: meter.calls(empty, "GetMessage", on.wide),
        "conversation": lambda: meter.calls(parley, "GetConversation", on.wide),
        "conversation empty": lambda: meter.calls(empty, "GetConversation", on.wide),
        "list": lambda: meter.calls(parley, "ListMessages", on.wide),
        "list empty": lambda: meter.calls(empty, "ListMessages", on.wide),
        "fan-out": lambda: meter.watched(
            parley, on.crowd, watchers=CROWD, in_flight=1, in_step=True
        ),
        "fan-out empty": lambda: meter.watched(
            empty, on.crowd, watchers=CROWD, in_flight=1, in_step=True
        ),
        "watched": lambda: meter.saturated(parley, on.wide),
        "half load": lambda: meter.half(parley, on.wide),
        "mixed": lambda: meter.calls(parley, "Mixed", on.wide),
        "two workers mixed": lambda: freely(on.pair, "Mixed"),
        "two workers send": lambda: freely(on.pair, "SendMessage"),
        "one worker send": lambda: freely(parley, "SendMessage"),
        "two workers in part": lambda: in_part(on.pair),
        "one worker in part": lambda: in_part(parley),
        "two workers get": lambda: freely(on.pair, "GetMessage"),
        "two workers list": lambda: freely(on.pair, "ListMessages"),
        "list from the database": lambda: meter.calls(parley, "ListFiltered", on.wide),
        "two empty": lambda: meter.read(on.empty_pair, "SendMessage", on.wide, in_flight=64),
        "conversation alone": lambda: meter.calls(parley, "GetConversation", on.wide, in_flight=1),
        "inbox": lambda: meter.calls(
            parley, "ListUserConversations", on.inbox, in_flight=1, page_size=25
        ),
        "search": lambda: meter.calls(parley, "SearchMessages", on.wide, in_flight=1),
        "search all": lambda: meter.calls(parley, "SearchMessages", on.inbox, in_flight=1),
        "around": lambda: meter.calls(parley, "ListAround", on.wide, in_flight=1, page_size=50),
        "first page": lambda: meter.calls(
            parley, "ListFiltered", on.long, in_flight=1, page_size=on.page_size
        ),
        "last page": lambda: meter.calls(
            parley, "ListFiltered", on.long, in_flight=1, page_size=on.page_size, page_token=deep
        ),
        "import": lambda: meter.imported(plan.imported),
        "copy": meter.copied,
    }


def sweep_works(on: Stage, meter: Meter) -> dict[str, Work]:
    """SendMessage by how many are in flight."""

    def sends(target: Target, group: Group, in_flight: int) -> Work:
        return lambda: meter.calls(target, "SendMessage", group, in_flight=in_flight)

    servers = {
        "Parley": (on.parley, on.wide),
        "empty": (on.empty, on.wide),
        "obvious": (on.obvious, on.obvious_wide),
    }
    return {
        f"{name} {in_flight}": sends(target, group, in_flight)
        for in_flight in document.IN_FLIGHT
        for name, (target, group) in servers.items()
    }


async def measure(
    meter: Meter, works: dict[str, Work], *, rounds: int, seconds: float
) -> dict[str, list[Run]]:
    """Everything once in a round, forwards and backwards in turn."""
    meter.seconds = seconds
    results: dict[str, list[Run]] = defaultdict(list)
    for number in range(rounds):
        for name, work in list(works.items())[:: -1 if number % 2 else 1]:
            run = await work()
            results[name].append(run)
            told = " ".join(f"{name} {value:.2f}" for name, value in run.millis.items())
            failed = f" ERRORS {run.errors}" if run.errors else ""
            tell(f"{number + 1}/{rounds} {name:20} {run.rate:9,.0f}/s  {told}{failed}")
    return results


async def resident_while_mixed(on: Stage, meter: Meter, *, seconds: float) -> list[float]:
    """MiB of Parley's process, SAMPLES times in the course of calls of every kind."""
    meter.seconds = seconds
    mixed = asyncio.gather(
        meter.calls(on.parley, "SendMessage", on.wide, in_flight=16),
        *(
            meter.read(on.parley, method, on.wide, in_flight=8)
            for method in ("GetMessage", "ListMessages", "GetConversation", "SearchMessages")
        ),
        meter.read(on.parley, "ListUserConversations", on.inbox, in_flight=2),
    )
    found = []
    for number in range(SAMPLES):
        await asyncio.sleep(seconds / SAMPLES)
        found.append(resident_mib(on.parley.process))
        if number % 10 == 9:
            tell(f"mixed calls, {(number + 1) * seconds / SAMPLES:.0f} s: {found[-1]:.0f} MiB")
    await mixed
    return found


async def last_page_token(on: Stage) -> str:
    """The token of the long conversation's page PAGES, found by leafing through it."""
    (conversation,) = on.long
    metadata = [
        ("authorization", f"Bearer {on.parley.token}"),
        ("x-parley-actor", conversation["actors"][0]),
    ]
    token, ahead = "", (PAGES - 1) * on.page_size
    async with grpc.aio.insecure_channel(on.parley.address) as channel:
        list_messages = message_pb2_grpc.MessageServiceStub(channel).ListMessages
        while ahead:
            request = message_pb2.ListMessagesRequest(
                conversation_id=conversation["id"],
                page_size=min(ahead, 1_000),
                page_token=token,
                # As in bench/load's ListFiltered.
                created_after=Timestamp(seconds=1),
            )
            page = await list_messages(request, metadata=metadata)
            token, ahead = page.next_page_token, ahead - len(page.messages)
    return token


async def restarts(folder: Path, token: str, count: int) -> tuple[list[float], float]:
    """Seconds from `make run` to the first answer, where all is set up; MiB at rest."""
    seconds, mib = [], []
    for _ in range(count):
        started = monotonic()
        async with serving(
            "make",
            "run",
            log=folder / "make.log",
            token=token,
            cores=CORES,
            data_dir=folder / "data",
        ) as made:
            seconds.append(monotonic() - started)
            await asyncio.sleep(SETTLE_SECONDS)
            (parley,) = made.process.children()
            mib.append(resident_mib(parley))
        tell(f"make run: {seconds[-1]:.2f} s, {mib[-1]:.0f} MiB")
    return seconds, median(mib)


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
