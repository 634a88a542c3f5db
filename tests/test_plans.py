"""What each list reads of large tables: no more than its page needs.

The plans are those of prepared statements, as the service runs them: made for the values of one
call, and made once for all calls, which PostgreSQL may take after the fifth.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio
from sqlalchemy import Executable
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg

from service.repositories.base import Connection, Row
from service.repositories.conversations import Conversations
from service.repositories.inbox import Inbox, Place
from service.repositories.invitations import Invitations
from service.repositories.messages import Messages
from service.repositories.participants import Participants
from service.server import Server
from service.store import SESSION

from .conftest import TABLES

DIALECT: Any = PGDialect_asyncpg()  # type: ignore[no-untyped-call]
MIB = 1 << 20
BOTH = pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
START = datetime(2024, 1, 1, tzinfo=UTC)

# User 1 is in the first 1,000 of 20,000 conversations, and invited to the next hundred; everybody
# else is in ten. The first three are rooms of 20,000 messages; 1,000 people are in the fourth.
BUILD = """
INSERT INTO users (id, username)
SELECT md5('user ' || n)::uuid, 'user-' || n FROM generate_series(1, 2000) AS n;

INSERT INTO conversations (id, slug, title, creator_id, metadata, external_id, last_sequence,
                           version, is_active, created_at, last_activity_at, last_message_at)
SELECT md5('talk ' || n)::uuid, 'talk-' || n, 'Talk number ' || n,
       md5('user ' || 1 + n % 2000)::uuid,
       CASE WHEN n % 5000 = 77 THEN '{"rare": 1}'::jsonb
            WHEN n % 10 = 0 THEN '{"common": 1}' ELSE '{}' END,
       'x/' || n, CASE WHEN n <= 3 THEN 20000 ELSE 3 END, 1, n % 50 > 0, t, t, t
FROM generate_series(1, 20000) AS n,
     LATERAL (SELECT '2024-01-01Z'::timestamptz + n * interval '1 minute' AS t) AS at;

INSERT INTO participants (conversation_id, user_id, status, role, joined_at, status_at, created_at,
                          visible_to_sequence)
SELECT md5('talk ' || talk)::uuid, md5('user ' || person)::uuid, status, 'MEMBER',
       CASE status WHEN 'JOINED' THEN at END, at, at, CASE status WHEN 'INVITED' THEN 0 END
FROM (
  SELECT n AS talk, 1 AS person, 'JOINED' AS status FROM generate_series(1, 1000) AS n
  UNION ALL SELECT n, 1, 'INVITED' FROM generate_series(1001, 1100) AS n
  UNION ALL SELECT n, 2 + n % 1999, 'JOINED' FROM generate_series(1, 20000) AS n
  UNION ALL SELECT 4, n, 'JOINED' FROM generate_series(2, 1000) AS n WHERE n <> 6
) AS k, LATERAL (SELECT '2024-01-01Z'::timestamptz + talk * interval '1 minute'
                        + person * interval '1 second' AS at) AS at;

INSERT INTO messages (conversation_id, id, sequence, sender_id, role, status, content, metadata,
                      external_id, created_at, deleted_at)
SELECT md5('talk ' || talk)::uuid, md5(talk || '/' || n)::uuid, n,
       CASE WHEN n % 500 = 1 AND talk <= 3 THEN md5('user 1')::uuid
            WHEN n % 100 > 0 THEN md5('user ' || 2 + talk % 1999)::uuid END,
       CASE WHEN n % 100 > 0 THEN 'USER' ELSE 'SYSTEM' END,
       CASE WHEN n % 100 = 7 THEN 'FAILED' ELSE 'COMPLETE' END, 'line ' || n,
       CASE WHEN n % 5000 = 3 THEN '{"rare": 1}'::jsonb ELSE '{}' END,
       CASE WHEN n % 10 = 0 THEN 'x/' || n END,
       '2024-01-01Z'::timestamptz + n * interval '1 minute',
       CASE WHEN n % 50 = 5 THEN now() END
FROM (SELECT talk, n FROM generate_series(1, 3) AS talk, generate_series(1, 20000) AS n
      UNION ALL
      SELECT talk, n FROM generate_series(4, 2000) AS talk, generate_series(1, 3) AS n) AS k;
"""
# A thousand new messages in each of the rooms, while somebody pages through an inbox.
TOLD = """
INSERT INTO events (conversation_id, version, era, type, sequence)
SELECT md5('talk ' || talk)::uuid, n, 1, 'MESSAGE_CREATED', n
FROM generate_series(1, 3) AS talk, generate_series($1::int, $2::int) AS n
"""
ACTIVE = "UPDATE conversations SET last_message_at = now() WHERE last_sequence = 20000"


async def _id(database: asyncpg.Connection, name: str) -> UUID:
    return await database.fetchval("SELECT md5($1)::uuid", name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class World:
    """Large tables, with statistics."""

    ada: UUID
    # A room of messages, and one of people.
    room: UUID
    crowd: UUID
    # The inbox as it was before the rooms had their last thousand messages.
    place: Place


@pytest_asyncio.fixture(scope="module")
async def world(server: Server, database: asyncpg.Connection) -> AsyncIterator[World]:
    await database.execute(BUILD)
    await database.execute(TOLD, 1, 19_000)
    snapshot = await database.fetchval("SELECT pg_current_snapshot()::text")
    read_at = await database.fetchval("SELECT now()")
    await database.execute(TOLD, 19_001, 20_000)
    await database.execute(ACTIVE)
    await database.execute("VACUUM ANALYZE")
    half = await _id(database, "talk 500")
    yield World(
        ada=await _id(database, "user 1"),
        room=await _id(database, "talk 1"),
        crowd=await _id(database, "talk 4"),
        place=Place(read_at, snapshot, START + timedelta(minutes=500), half),
    )
    await database.execute(f"TRUNCATE {TABLES}")


class Recorder(Connection):
    """A connection that answers nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Sequence[Any]]] = []

    async def rows(self, statement: Executable) -> Sequence[Row]:
        compiled: Any = statement.compile(  # type: ignore[attr-defined]
            dialect=DIALECT, compile_kwargs={"render_postcompile": True}
        )
        self.asked.append((str(compiled), [compiled.params[name] for name in compiled.positiontup]))
        return []

    async def fetch(self, sql: str, *arguments: object) -> list[Row]:
        self.asked.append((sql, arguments))
        return []


def literal(value: Any) -> str:
    """A value as SQL spells it, whatever its type."""
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "'{" + ",".join(map(str, value)) + "}'"
    return "'" + str(value).replace("'", "''") + "'"


@dataclass(frozen=True)
class Plan:
    """How a statement was run."""

    root: dict[str, Any]

    def __str__(self) -> str:
        """What a failed test shows of it."""
        return "\n".join(
            f"{node['Node Type']} {node.get('Relation Name', '')} {node.get('Index Name', '')}"
            f" {node['Actual Rows']} + {node.get('Rows Removed by Filter', 0)}"
            f" x {node['Actual Loops']} in {node['Actual Total Time']} ms"
            for node in self.nodes()
        )

    def nodes(self, node: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        node = node or self.root
        yield node
        for below in node.get("Plans", ()):
            yield from self.nodes(below)

    @property
    def indexes(self) -> set[str]:
        return {node["Index Name"] for node in self.nodes() if "Index Name" in node}

    @property
    def walked(self) -> set[str]:
        """Tables that were read from one end to the other."""
        return {node["Relation Name"] for node in self.nodes() if node["Node Type"] == "Seq Scan"}

    @property
    def rows_read(self) -> float:
        """How many rows were looked at, also in vain."""
        rows: float = sum(
            (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            for node in self.nodes()
            if "Relation Name" in node
        )
        return rows

    @property
    def pages_read(self) -> int:
        """How many pages of 8 KiB, from wherever."""
        return int(self.root["Shared Hit Blocks"] + self.root["Shared Read Blocks"])


Listing = Callable[[Recorder], Awaitable[object]]


async def explain(database: asyncpg.Connection, mode: str, listing: Listing) -> Plan:
    """Run the one statement that a list consists of."""
    recorder = Recorder()
    await listing(recorder)
    ((sql, arguments),) = recorder.asked
    values = f"({', '.join(map(literal, arguments))})" if arguments else ""
    async with database.transaction():
        # As in a session of the service.
        await database.execute(f"SET LOCAL plan_cache_mode = {mode}")
        await database.execute(f"SET LOCAL jit = {SESSION['jit']}")
        await database.execute(f"PREPARE listing AS {sql}")
        try:
            (row,) = await database.fetch(
                f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE listing{values}"
            )
        finally:
            await database.execute("DEALLOCATE listing")
    return Plan(json.loads(row[0])[0]["Plan"])


# ListUserConversations


def inbox(world: World, **values: Any) -> Listing:
    page = {"statuses": ["JOINED"], "after": None, "limit": 25, "byte_limit": MIB, **values}
    return lambda recorder: Inbox(recorder).list(world.ada, **page)


@BOTH
@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ({}, 2_300),
        ({"limit": 1}, 2_120),
        ({"unread_only": True}, 3_700),
        ({"title_contains": "number 77"}, 2_300),
        ({"metadata_contains": '{"rare": 1}'}, 2_300),
        ({"is_active": False}, 2_300),
        ({"statuses": ["INVITED", "LEFT"]}, 1_500),
    ],
    ids=str,
)
async def test_an_inbox_reads_the_users_conversations_and_no_messages_but_the_last(
    world: World, database: asyncpg.Connection, mode: str, values: dict[str, Any], rows: int
) -> None:
    """1,000 conversations, 60,000 unread messages: two rows a conversation, a few a line."""
    plan = await explain(database, mode, inbox(world, **values))

    assert "uq_participants_user_conversation" in plan.indexes
    assert not plan.walked, str(plan)
    assert plan.rows_read < rows, str(plan)
    assert plan.pages_read < 20_000, str(plan)


@BOTH
async def test_a_later_page_of_an_inbox_reads_what_was_said_since_the_first(
    world: World, database: asyncpg.Connection, mode: str
) -> None:
    plan = await explain(database, mode, inbox(world, after=world.place))

    assert not plan.walked, str(plan)
    # Of each of three rooms a thousand events, and a hundred messages.
    assert 3_000 < plan.rows_read < 2_300 + 3 * 1_101, str(plan)
