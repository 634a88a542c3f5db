"""What a search costs among very many messages: what is read, and through which index."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio

from service.repositories import search
from service.repositories.search import Search, Wanted
from service.server import Server

from ..make import Client, User

pytestmark = pytest.mark.slow

MIB = 1 << 20
BIG, SMALL, CONVERSATIONS = 150_000, 150, 400

# One conversation of 150,000 messages and 400 of 150 that say the same from the start: `common` is
# in every third message, `medium` in every hundredth, `rare` in one message of each hundredth
# conversation. The small ones came first.
FILL = f"""
INSERT INTO messages (conversation_id, sequence, sender_id, role, content, created_at, updated_at,
                      search)
SELECT id, n, creator_id, 'USER', said, at, at,
       (quote_literal('#' || right(id::text, 12)) || ':1')::tsvector || to_tsvector('simple', said)
FROM (
  SELECT c.id, c.creator_id, n,
         timestamptz '2026-01-01' + n * interval '1 s' + c.number * interval '1 ms'
           + CASE WHEN c.number = 0 THEN interval '1 day' ELSE interval '0' END AS at,
         'filler' || n % 5000 || ' word' || n % 977
           || CASE WHEN n % 3 = 0 THEN ' common' ELSE '' END
           || CASE WHEN n % 100 = 0 THEN ' medium' ELSE '' END
           || CASE WHEN n = 77 AND c.number % 100 = 0 THEN ' rare' ELSE '' END AS said
  FROM (SELECT id, creator_id, substring(slug, 5)::int AS number FROM conversations) AS c
  CROSS JOIN LATERAL
    generate_series(1, CASE WHEN c.number = 0 THEN {BIG} ELSE {SMALL} END) AS n
) AS made
"""


@dataclass(frozen=True)
class Archive:
    """Who is in it: Ada in every conversation, Bob in all but the big one."""

    ada: User
    bob: User
    big: UUID
    small: UUID


@pytest_asyncio.fixture(scope="module")
async def archive(
    server: Server, channel: Any, database: asyncpg.Connection
) -> AsyncIterator[Archive]:
    assert server.token
    parley = Client(channel, server.token)
    ada, bob = await parley.user("ada"), await parley.user("bob")
    await database.execute(
        "INSERT INTO conversations (slug, creator_id, last_sequence)"
        f" SELECT 'big-' || n, $1, CASE WHEN n = 0 THEN {BIG} ELSE {SMALL} END"
        f" FROM generate_series(0, {CONVERSATIONS}) AS n",
        ada.id,
    )
    for user, first in ((ada, 0), (bob, 1)):
        await database.execute(
            "INSERT INTO participants (conversation_id, user_id, status, role, joined_at,"
            " status_at) SELECT id, $1, 'JOINED', 'MEMBER', now(), now() FROM conversations"
            " WHERE substring(slug, 5)::int >= $2",
            user.id,
            first,
        )
    await database.execute(FILL)
    for table in ("messages", "participants", "conversations"):
        await database.execute(f"VACUUM ANALYZE {table}")
    ids = {
        row["slug"]: row["id"] for row in await database.fetch("SELECT slug, id FROM conversations")
    }
    yield Archive(ada, bob, ids["big-0"], ids["big-1"])
    await database.execute(
        "TRUNCATE events, requests, message_revisions, messages, participants, conversations, users"
    )


class Recorder:
    """A connection that explains, with what was read, whatever is asked of it."""

    def __init__(self, database: asyncpg.Connection) -> None:
        self.database = database
        self.plans: list[str] = []

    async def fetch(self, sql: str, *arguments: object) -> list[Any]:
        rows = await self.database.fetch(f"EXPLAIN (ANALYZE, BUFFERS OFF) {sql}", *arguments)
        self.plans.append("\n".join(row[0] for row in rows))
        found: list[Any] = await self.database.fetch(sql, *arguments)
        return found


async def searched(
    database: asyncpg.Connection,
    query: str,
    actor: User | None,
    where: UUID | None,
    after: Any = None,
) -> tuple[int, list[str]]:
    """How many are on the first page, and the plans of all statements."""
    recorder = Recorder(database)
    view = {"id": where, "final_sequence": BIG, "shown_message_id": None} if where else None
    wanted = Wanted(query=query, actor_id=UUID(actor.id) if actor else None, view=view)
    rows, _ = await Search(recorder).find(  # type: ignore[arg-type]
        wanted, after=after, limit=50, byte_limit=MIB
    )
    return len(rows), recorder.plans


def most_rows(plan: str) -> int:
    """The most rows that any one node gave, in all its loops."""
    given = re.findall(r"actual time=\S+ rows=([\d.]+) loops=(\d+)", plan)
    return max(round(float(rows) * int(loops)) for rows, loops in given)


async def test_a_table_worth_the_name(archive: Archive, database: asyncpg.Connection) -> None:
    assert await database.fetchval("SELECT count(*) FROM messages") == 210_000


@pytest.mark.parametrize(
    ("who", "where", "index"),
    [
        ("ada", "big", "uq_messages_conversation_sequence"),
        ("ada", None, "ix_messages_created_at"),
        (None, None, "ix_messages_created_at"),
    ],
)
async def test_a_common_word_is_found_among_the_newest(
    archive: Archive,
    database: asyncpg.Connection,
    who: str | None,
    where: str | None,
    index: str,
) -> None:
    actor = getattr(archive, who) if who else None
    place = getattr(archive, where) if where else None
    count, plans = await searched(database, "'common'", actor, place)
    assert count == 50
    (plan,) = plans
    assert f"using {index} on messages" in plan
    assert not re.search("Seq Scan on (messages|conversations|participants)", plan)
    assert most_rows(plan) == search.NEWEST


@pytest.mark.parametrize(
    ("query", "who", "where", "count", "candidates"),
    [
        ("'rare'", "ada", "big", 1, 10),
        ("'rare'", "ada", None, 5, CONVERSATIONS + 10),
        ("'rare'", "bob", None, 4, CONVERSATIONS + 10),
        ("'rare'", None, None, 5, 10),
        ("'absent'", None, None, 0, 1),
        ("'medium'", "ada", "big", 50, BIG // 100),
        # One of two words, and one that is common, are as rare as the rarer of them.
        ("'common' & 'medium'", "bob", None, 0, CONVERSATIONS + 10),
        ("'common' & 'rare'", "bob", None, 0, CONVERSATIONS + 10),
        ("'rare' <2> 'medium'", "bob", None, 0, CONVERSATIONS + 10),
    ],
)
async def test_a_rarer_word_is_found_by_the_index(
    archive: Archive,
    database: asyncpg.Connection,
    query: str,
    who: str | None,
    where: str | None,
    count: int,
    candidates: int,
) -> None:
    actor = getattr(archive, who) if who else None
    place = getattr(archive, where) if where else None
    found, plans = await searched(database, query, actor, place)
    assert found == count
    newest, *_, indexed = plans
    assert most_rows(newest) <= search.NEWEST
    assert "Bitmap Index Scan on ix_messages_search" in indexed
    assert not re.search("Seq Scan on (messages|conversations|participants)", indexed)
    read = re.search(r"Bitmap Heap Scan on messages.*?rows=([\d.]+) loops=(\d+)", indexed)
    assert read
    assert round(float(read[1]) * int(read[2])) <= candidates


async def test_what_an_actor_does_not_see_costs_it_little(
    archive: Archive, database: asyncpg.Connection
) -> None:
    """Of 70,000 messages with a common word a third are Bob's; no more are looked at."""
    found, plans = await searched(database, "'common'", archive.bob, None)
    assert found == 50
    assert most_rows(plans[-1]) <= CONVERSATIONS * SMALL // 3


async def test_a_deep_page_costs_what_the_first_one_does(
    archive: Archive, database: asyncpg.Connection
) -> None:
    place = await database.fetchrow(
        "SELECT created_at, conversation_id, sequence FROM messages"
        " WHERE conversation_id = $1 AND sequence = 1000",
        archive.big,
    )
    assert place
    for where in (archive.big, None):
        count, plans = await searched(
            database, "'common'", archive.ada, where, after=tuple(place.values())
        )
        assert count == 50
        (plan,) = plans
        assert most_rows(plan) <= search.NEWEST
