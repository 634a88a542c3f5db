"""`make bench-scale`: what ten million stored messages cost, against ten thousand.

Two Parleys, each with its own PostgreSQL, hold the same kind of conversations of real texts, made
set-wise in the database; the same calls go to both, in turns. Writes docs/scale.md.
"""

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import asyncpg
import psutil

from bench import corpus
from bench.measure import Run, drive
from bench.processes import AROUND, Target, pin, serving
from bench.run import ROOT, build_load, tell
from bench.stage import Group
from service.driver import SESSION
from service.embedded import EmbeddedPostgres
from service.repositories.base import Connection, Row
from service.repositories.inbox import Inbox
from service.repositories.search import Search, Wanted
from service.rules import search
from service.server import development_token

MESSAGES = 100  # in each conversation
PEOPLE = 5
USERS = 1_000
TEXTS = 20_000
INBOX = 100  # conversations that one user is in
CHUNK = 2_500
CALLED = 500

WORKS = {
    "SendMessage": "SendMessage",
    "GetMessage": "GetMessage",
    "ListMessages, pages of 50 from the database": "ListFiltered",
    "ListUserConversations, 25 of 100": "ListUserConversations",
    "SearchMessages in a conversation": "SearchMessages",
    "SearchMessages in 100 conversations": "SearchEverywhere",
}

BUILD_PEOPLE = """
INSERT INTO users (username)
SELECT 'person-' || n FROM generate_series(0, $1::int - 1) AS n UNION ALL SELECT 'reader'
"""
BUILD_CONVERSATIONS = """
INSERT INTO conversations (slug, title, creator_id, last_sequence, version, participant_count,
                           last_activity_at, last_message_at)
SELECT 'talk-' || n, 'Talk ' || n, u.id, $3::int, $3::int + 1, $4::int,
       '2026-01-01'::timestamptz + n * interval '1 min', now()
FROM generate_series($1::int, $2::int - 1) AS n
JOIN users u ON u.username = 'person-' || n % $5::int
"""
# One user is in the first conversations and no others, however many there are.
BUILD_PARTICIPANTS = """
INSERT INTO participants (conversation_id, user_id, status, role, joined_at, status_at)
SELECT DISTINCT ON (c.id, u.id) c.id, u.id, 'JOINED', 'OWNER', now(), now()
FROM generate_series($1::int, $2::int - 1) AS n
JOIN conversations c ON c.slug = 'talk-' || n
CROSS JOIN LATERAL (
  SELECT 'person-' || (n + k * 199) % $4::int AS name FROM generate_series(0, $3::int - 1) AS k
  UNION ALL SELECT 'reader' WHERE n < $5::int
) AS p
JOIN users u ON u.username = p.name
"""
BUILD_MESSAGES = """
INSERT INTO messages (conversation_id, sequence, sender_id, role, content, created_at, updated_at,
                      search)
SELECT c.id, s, u.id, 'USER', t.content, at, at,
       (quote_literal('#' || right(c.id::text, 12)) || ':1')::tsvector || t.words
FROM (
  SELECT n, conversations.* FROM generate_series($1::int, $2::int - 1) AS n
  JOIN conversations ON slug = 'talk-' || n
) AS c
CROSS JOIN generate_series(1, $3::int) AS s
JOIN texts t ON t.n = (c.n * 7919::bigint + s * 104729) % $4::int
JOIN users u ON u.username = 'person-' || (c.n + s % $5::int * 199) % $6::int
CROSS JOIN LATERAL (SELECT c.last_activity_at - ($3::int - s) * interval '1 s' AS at) AS said
ORDER BY c.id, s
"""
BUILD_EVENTS = """
INSERT INTO events (conversation_id, version, era, type, sequence, revision, user_id)
SELECT c.id, s + 1, (SELECT max(era) FROM eras),
       CASE WHEN s = 0 THEN 'CONVERSATION_CREATED' ELSE 'MESSAGE_CREATED' END,
       nullif(s, 0), CASE WHEN s > 0 THEN 1 END, CASE WHEN s > 0 THEN c.creator_id END
FROM generate_series($1::int, $2::int - 1) AS n
JOIN conversations c ON c.slug = 'talk-' || n
CROSS JOIN generate_series(0, $3::int) AS s
ORDER BY c.id, s
"""

# What can be built faster once the rows are there.
INDEXES = """
SELECT i.indexname AS name, i.indexdef AS definition FROM pg_indexes i
WHERE i.tablename IN ('messages', 'events')
  AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conname = i.indexname)
"""
SIZES = """
SELECT c.relname AS name, pg_relation_size(c.oid) AS bytes, c.relkind = 'i' AS is_index
FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid
WHERE COALESCE(i.indrelid, c.oid) IN ('messages'::regclass, 'events'::regclass)
ORDER BY i.indrelid IS NOT NULL, bytes DESC
"""
GROUP = """
SELECT c.id::text, c.last_sequence, array_agg(p.user_id::text) AS actors
FROM (SELECT * FROM conversations ORDER BY md5(id::text) LIMIT $1) AS c
JOIN participants p ON p.conversation_id = c.id GROUP BY c.id, c.last_sequence
"""


@dataclass(frozen=True, slots=True)
class Archive:
    """A Parley with so many messages stored."""

    messages: int
    target: Target
    postmaster: psutil.Process
    database: asyncpg.Connection
    group: Group
    # One "conversation": the user who reads all of its own.
    inbox: Group


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure Parley with very much stored.")
    parser.add_argument("--large", type=int, default=10_000_000, help="messages, at the most")
    parser.add_argument("--small", type=int, default=10_000, help="messages to compare it with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=".bench-", dir=ROOT))
    try:
        load = build_load(folder)
        for name in ("small", "large"):
            (folder / name).mkdir()
        os.sched_setaffinity(0, AROUND)
        asyncio.run(bench(folder, load, given))
    finally:
        shutil.rmtree(folder)


async def bench(folder: Path, load: Path, given: argparse.Namespace) -> None:
    queries = [" ".join(text.split()[:2]) for text in corpus.bodies(200)]
    queries = [query for query in queries if query.strip()]
    async with (
        archive(folder / "small", given.small) as small,
        archive(folder / "large", given.large) as large,
    ):
        runs: dict[tuple[str, int], list[Run]] = defaultdict(list)
        for number in range(given.rounds + 1):
            for name, work in WORKS.items():
                for where in (small, large):
                    seconds = given.seconds if number else 1.0
                    run = await call(load, where, work, seconds, queries)
                    if number:  # the first one warms up
                        runs[name, where.messages].append(run)
                    tell(
                        f"{number}/{given.rounds} {where.messages:>10,} {name:42} "
                        f"p50 {run.millis.get('p50', 0):7.2f} ms {run.errors or ''}"
                    )
        explained = await plans(large, given)
        if given.large >= 10_000_000:
            (ROOT / "docs" / "scale-plans.md").write_text(explained)
        sizes = [dict(row) for row in await large.database.fetch(SIZES)]
        vacuum = await vacuumed(large)
        text = report(runs, small, large, sizes, vacuum, given)
    print(text)
    if given.large >= 10_000_000 and given.rounds >= 5:
        (ROOT / "docs" / "scale.md").write_text(text)


@asynccontextmanager
async def archive(folder: Path, messages: int) -> AsyncIterator[Archive]:
    """A server that holds so many messages already."""
    data = folder / "data"
    url = EmbeddedPostgres(data).url.replace("+asyncpg", "")
    token = development_token(data / "token")
    async with serving(
        sys.executable, "-m", "service", "serve", log=folder / "log", token=token, data_dir=data
    ) as target:
        superuser = await asyncpg.connect(url.replace("parley@/parley", "postgres@/parley"))
        started = time.monotonic()
        await build(superuser, messages // MESSAGES)
        tell(f"{messages:,} messages stored in {time.monotonic() - started:.0f} s")
        pid_file = data / "postgres" / "data" / "postmaster.pid"
        postmaster = psutil.Process(int(pid_file.read_text().splitlines()[0]))
        pin(postmaster, AROUND)
        group = [dict(row) for row in await superuser.fetch(GROUP, CALLED)]
        person = await superuser.fetchval("SELECT id::text FROM users WHERE username = 'reader'")
        inbox = [{"id": "", "last_sequence": 1, "actors": [person]}]
        yield Archive(messages, target, postmaster, superuser, group, inbox)
        await superuser.close()


async def build(database: asyncpg.Connection, conversations: int) -> None:
    """Rows as the service would have made them, without asking it ten million times."""
    # No foreign key is checked: every reference is made from the row that it means.
    await database.execute("SET session_replication_role = replica")
    await database.execute("SET maintenance_work_mem = '1GB'")
    await database.execute("SET synchronous_commit = off")
    await database.execute("CREATE TEMP TABLE texts (n int PRIMARY KEY, content text, said text)")
    texts = [(n, text, _words(text)) for n, text in enumerate(corpus.bodies(TEXTS))]
    await database.copy_records_to_table("texts", records=texts)
    await database.execute("ALTER TABLE texts ALTER said TYPE tsvector USING said::tsvector")
    await database.execute("ALTER TABLE texts RENAME said TO words")
    await database.execute("ANALYZE texts")
    indexes = await database.fetch(INDEXES)
    for index in indexes:
        await database.execute(f"DROP INDEX {index['name']}")

    await database.execute(BUILD_PEOPLE, USERS)
    for first in range(0, conversations, CHUNK):
        last = min(first + CHUNK, conversations)
        await database.execute(BUILD_CONVERSATIONS, first, last, MESSAGES, PEOPLE, USERS)
        await database.execute("ANALYZE conversations")
        await database.execute(BUILD_PARTICIPANTS, first, last, PEOPLE, USERS, INBOX)
        await database.execute(BUILD_MESSAGES, first, last, MESSAGES, TEXTS, PEOPLE, USERS)
        await database.execute(BUILD_EVENTS, first, last, MESSAGES)
        if last % (10 * CHUNK) == 0:
            tell(f"  {last * MESSAGES:,} of {conversations * MESSAGES:,} messages")
    for index in indexes:
        started = time.monotonic()
        await database.execute(index["definition"])
        if time.monotonic() - started > 5:
            tell(f"  {index['name']}: {time.monotonic() - started:.0f} s")
    await database.execute("RESET session_replication_role")
    await database.execute("VACUUM ANALYZE")
    await database.execute("CHECKPOINT")


def command(given: argparse.Namespace) -> str:
    return f"python -m bench.scale --rounds {given.rounds} --seconds {given.seconds:g}"


def _words(text: str) -> str:
    """Its words as they are indexed, without the key of a conversation, which comes later."""
    words = search.terms(search.fold(text[: search.MAX_INDEXED_CHARACTERS]))
    return " ".join(f"'{word}':{n}" for n, word in enumerate(words[:16_000], start=1))


async def call(load: Path, where: Archive, work: str, seconds: float, queries: list[str]) -> Run:
    everywhere = work in ("ListUserConversations", "SearchEverywhere")
    return await drive(
        load,
        where.target,
        where.postmaster,
        method="SearchMessages" if work == "SearchEverywhere" else work,
        conversations=where.inbox if everywhere else where.group,
        bodies=queries if work.startswith("Search") else corpus.bodies(TEXTS),
        seconds=seconds,
        in_flight=1,
        page_size=25 if everywhere else 50,
    )


class Explaining(Connection):
    """A connection that runs what a repository asks, and keeps how PostgreSQL did it."""

    def __init__(self, database: asyncpg.Connection) -> None:
        self._database = database
        self.plans: list[str] = []

    async def fetch(self, sql: str, *arguments: object, replan: bool = False) -> list[Row]:
        rows = await self._database.fetch(f"EXPLAIN (ANALYZE, BUFFERS) {sql}", *arguments)
        self.plans.append("\n".join(row[0] for row in rows))
        return cast(list[Row], await self._database.fetch(sql, *arguments))


async def plans(where: Archive, given: argparse.Namespace) -> str:
    """The inbox's and the search's plans, with the settings of the service's own sessions."""
    database = where.database
    for name, value in SESSION.items():
        await database.execute("SELECT set_config($1, $2, false)", name, value)
    # What would be cut off in the service is shown whole here.
    await database.execute("SET statement_timeout = '120s'")
    reader = await database.fetchval("SELECT id FROM users WHERE username = 'reader'")
    busy = await database.fetchval("SELECT id FROM users WHERE username = 'person-0'")
    count = "SELECT count(*) FROM participants WHERE user_id = $1"
    lines = [
        "# Plans at scale",
        "",
        f"Written by `{command(given)}`: how PostgreSQL reads the inbox and searches, with "
        f"{where.messages:,} messages stored.",
    ]

    async def explain(title: str, ask: Callable[[Connection], Awaitable[object]]) -> None:
        connection = Explaining(database)
        started = time.monotonic()
        for _ in range(2):  # the second time from memory
            connection.plans.clear()
            await ask(connection)
        tell(f"{title}: twice in {time.monotonic() - started:.2f} s")
        lines.extend(["", f"## {title}", "", "```", *connection.plans, "```"])

    for user in (reader, busy):
        conversations = await database.fetchval(count, user)
        await explain(
            f"The inbox, 25 of {conversations}",
            lambda on, user=user: Inbox(on).list(  # type: ignore[misc]
                user, statuses=["JOINED"], after=None, limit=25, byte_limit=1 << 20
            ),
        )
        for text in ("the", "tea time", "zzzz"):
            wanted = Wanted(query=str(search.parse(text)), actor_id=user, view=None)
            await explain(
                f"Search for `{text}` in {conversations} conversations",
                lambda on, wanted=wanted: Search(on).find(  # type: ignore[misc]
                    wanted, after=None, limit=50, byte_limit=1 << 20
                ),
            )
    await database.execute("RESET ALL")
    return "\n".join([*lines, ""])


async def vacuumed(where: Archive) -> str:
    """What it takes to clean up after one message in a hundred was changed."""
    await where.database.execute("UPDATE messages SET revision = revision + 1 WHERE sequence = 50")
    dead = "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'messages'"
    await where.database.execute("SELECT pg_stat_force_next_flush()")
    before = await where.database.fetchval(dead)
    started = time.monotonic()
    await where.database.execute("VACUUM messages")
    seconds = time.monotonic() - started
    await where.database.execute("SELECT pg_stat_force_next_flush()")
    after = await where.database.fetchval(dead)
    return (
        f"After one message in a hundred was changed at once, {before:,} dead rows lay in the "
        f"table; `VACUUM messages` took {seconds:.1f} s and left {after:,}."
    )


def report(
    runs: dict[tuple[str, int], list[Run]],
    small: Archive,
    large: Archive,
    sizes: list[dict[str, Any]],
    vacuum: str,
    given: argparse.Namespace,
) -> str:
    def cost(name: str, where: Archive) -> tuple[float, float]:
        of = runs[name, where.messages]
        return (
            median(run.millis.get("p50", 0.0) for run in of),
            median(run.postgres_micros for run in of),
        )

    lines = [
        "# Scale",
        "",
        f"Written by `{command(given)}`: {large.messages:,} messages in "
        f"{large.messages // MESSAGES:,} conversations, against {small.messages:,} in "
        f"{small.messages // MESSAGES:,}, on {os.cpu_count()} cores and "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB. The texts are {corpus.name()}, of which "
        f"{TEXTS:,} different ones; one call at a time, {given.rounds} runs of "
        f"{given.seconds:.0f} s each, in turns, medians.",
        "",
        f"| call | p50 of {small.messages:,} | of {large.messages:,} | ratio | "
        "PostgreSQL's CPU µs | of the large one |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in WORKS:
        few, many = cost(name, small), cost(name, large)
        ratio = many[0] / few[0] if few[0] else 0.0
        lines.append(
            f"| {name} | {few[0]:.2f} ms | {many[0]:.2f} ms | {ratio:.2f} | {few[1]:.0f} | "
            f"{many[1]:.0f} |"
        )
    lines += [
        "",
        "The floor for Send, List and the inbox is 1.5, the goal 1.2.",
        "",
        "## Where the bytes are",
        "",
        "| | GiB | bytes a message |",
        "|---|---:|---:|",
    ]
    for row in sizes:
        kind = "index" if row["is_index"] else "table"
        lines.append(
            f"| {kind} `{row['name']}` | {row['bytes'] / 2**30:.2f} | "
            f"{row['bytes'] / large.messages:.0f} |"
        )
    total = sum(row["bytes"] for row in sizes)
    lines += [
        f"| together | {total / 2**30:.2f} | {total / large.messages:.0f} |",
        "",
        vacuum,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
