"""Where it happens: Parley with its PostgreSQL, the empty server and the obvious one, and what is
stored before anything is measured.
"""

import json
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from bench import corpus
from bench.processes import AROUND, CORES, SERVER, Target, pin, serving
from service import schema
from service.embedded import EmbeddedPostgres
from service.importer import import_files
from service.server import development_token

CONVERSATIONS = 200
# In each conversation: more than a page of 50, and five people.
MESSAGES, PEOPLE = 60, 5
CROWD = 500
PAGES = 1_000
INBOX = 1_000

# What was promised is there, all of it and nothing else: the promise is `last_sequence`.
STORED = """
SELECT sum(stored)::bigint AS stored,
       count(*) FILTER (WHERE stored <> last_sequence OR highest <> last_sequence) AS torn
FROM (SELECT c.last_sequence, count(m.id) AS stored, COALESCE(max(m.sequence), 0) AS highest
      FROM conversations c LEFT JOIN messages m ON m.conversation_id = c.id
      GROUP BY c.id) AS counted
"""

# With twenty messages in each, of the texts that are there already.
MAKE_INBOX = f"""
WITH reader AS (INSERT INTO users (username) VALUES ('reader') RETURNING id),
talk AS (
  INSERT INTO conversations (slug, title, creator_id, last_sequence, version, participant_count,
                             last_activity_at, last_message_at)
  SELECT 'inbox-' || n, 'Inbox ' || n, reader.id, 20, 21, 1, now() - n * interval '1 min', now()
  FROM reader, generate_series(1, {INBOX}) AS n
  RETURNING id, creator_id
),
person AS (
  INSERT INTO participants (conversation_id, user_id, status, role, joined_at, status_at)
  SELECT id, creator_id, 'JOINED', 'OWNER', now(), now() FROM talk
  RETURNING conversation_id, user_id
),
said AS (
  SELECT content, ts_delete(search, '#' || right(conversation_id::text, 12)) AS words,
         row_number() OVER () AS n
  FROM (SELECT * FROM messages WHERE search IS NOT NULL LIMIT 1000) AS stored
)
INSERT INTO messages (conversation_id, sequence, role, content, search)
SELECT p.conversation_id, s, 'ASSISTANT', t.content,
       (quote_literal('#' || right(p.conversation_id::text, 12)) || ':1')::tsvector || t.words
FROM (SELECT *, row_number() OVER () AS number FROM person) AS p
CROSS JOIN generate_series(1, 20) AS s
JOIN said t ON t.n = 1 + (p.number * 20 + s) % 1000
"""
READER = "SELECT id::text FROM users WHERE username = 'reader'"

GROUP = """
SELECT c.id::text, c.last_sequence, array_agg(p.user_id::text) AS actors
FROM conversations c JOIN participants p ON p.conversation_id = c.id
WHERE c.external_id LIKE $1 || '/%' GROUP BY c.id
"""

# Conversations as the load generator takes them: id, last_sequence, actors.
Group = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Stage:
    """Everything that is measured, running."""

    folder: Path
    parley: Target
    # Another Parley over the same database, of two workers, on all cores.
    pair: Target
    empty: Target
    # Two of them behind one address, on all cores.
    empty_pair: Target
    obvious: Target
    # PostgreSQL: Parley's database, and one with the same tables that Parley does not know.
    postmaster: psutil.Process
    dsn: str
    database: asyncpg.Connection
    copied: asyncpg.Connection
    # 200 conversations; as many for the obvious service and for pgbench; one to write to; one to
    # read, in PAGES pages of `page_size`.
    wide: Group
    obvious_wide: Group
    single: Group
    # One that many people are in, and watch.
    crowd: Group
    long: Group
    # Somebody who is in INBOX conversations, none of which is named.
    inbox: Group
    page_size: int

    async def stored(self) -> int:
        """How many messages there are; raises if a conversation has a gap."""
        found = await self.database.fetchrow(STORED)
        assert found
        if found["torn"]:
            raise AssertionError(f"{found['torn']} conversations have a gap")
        return int(found["stored"])


@asynccontextmanager
async def stage(folder: Path, *, page_size: int) -> AsyncIterator[Stage]:
    """Start everything, each on its core, and store what is to be read."""
    data = folder / "data"
    url = EmbeddedPostgres(data).url
    dsn = url.replace("+asyncpg", "")
    token = development_token(data / "token")
    async with AsyncExitStack() as running:

        async def serve(
            *module: str,
            token: str = "",
            cores: list[int] = SERVER,
            address: str = "",
            **settings: str | Path,
        ) -> Target:
            command = (sys.executable, "-m", *module)
            log = folder / f"{module[0]}.log"
            server = serving(
                *command, log=log, token=token, cores=cores, address=address, **settings
            )
            return await running.enter_async_context(server)

        parley = await serve("service", "serve", token=token, data_dir=data)
        pair = await serve(
            *("service", "serve", "--workers", "2"),
            token=token,
            cores=CORES,
            data_dir=data,
            database_url=url,
        )
        pair = replace(pair, workers=pair.process.children())
        empty = await serve("bench.empty")
        empty_pair = await serve("bench.empty", cores=CORES)
        other = await serve("bench.empty", cores=CORES, address=empty_pair.address)
        empty_pair = replace(empty_pair, workers=[other.process])
        obvious = await serve("bench.obvious", database_url=url)
        pid_file = data / "postgres" / "data" / "postmaster.pid"
        postmaster = psutil.Process(int(pid_file.read_text().splitlines()[0]))
        pin(postmaster, AROUND)

        database = await asyncpg.connect(dsn)
        running.push_async_callback(database.close)
        await database.execute("CREATE DATABASE copied")
        await schema.migrate(url.replace("/parley?", "/copied?"))
        copied = await asyncpg.connect(dsn.replace("/parley?", "/copied?"))
        running.push_async_callback(copied.close)

        seed = folder / "seed.jsonl"
        _write_seed(seed, page_size)
        await import_files([seed], address=parley.address, token=token)
        await database.execute(MAKE_INBOX)
        reader = await database.fetchval(READER)
        await database.execute("VACUUM ANALYZE")

        async def group(name: str) -> Group:
            return [dict(row) for row in await database.fetch(GROUP, name)]

        yield Stage(
            folder=folder,
            parley=parley,
            pair=pair,
            empty=empty,
            empty_pair=empty_pair,
            obvious=obvious,
            postmaster=postmaster,
            dsn=dsn,
            database=database,
            copied=copied,
            wide=await group("wide"),
            obvious_wide=await group("obvious"),
            single=await group("single"),
            crowd=await group("crowd"),
            long=await group("long"),
            inbox=[{"id": "", "last_sequence": 1, "actors": [reader]}],
            page_size=page_size,
        )


def _write_seed(path: Path, page_size: int) -> None:
    texts = cycle(corpus.bodies(10_000))
    with path.open("w") as file:
        # What is only written to need not hold anything.
        for name, messages in (("wide", MESSAGES), ("obvious", 0), ("pgbench", 0)):
            for number in range(CONVERSATIONS):
                file.write(_conversation(name, number, islice(texts, messages), PEOPLE))
        file.write(_conversation("single", 0, [], PEOPLE))
        file.write(_conversation("crowd", 0, [], CROWD))
        # Each page has the same texts: only its place differs.
        page = list(islice(texts, page_size))
        file.write(_conversation("long", 0, islice(cycle(page), PAGES * page_size), 1))


def _conversation(name: str, number: int, texts: Iterable[str], people: int) -> str:
    """A line of an import, in which so many people talk in turn."""
    names = [f"person-{(number + n) % max(CONVERSATIONS, people)}" for n in range(people)]
    return (
        json.dumps(
            {
                "source": name,
                "source_id": str(number),
                "participants": [{"username": name} for name in names],
                "messages": [
                    {"sender": sender, "role": "user", "content": text}
                    for sender, text in zip(cycle(names), texts, strict=False)
                ],
            }
        )
        + "\n"
    )
