"""What each list reads of large tables: no more than its page needs.

The plans are those of prepared statements, as the service runs them: made for the values of one
call, and made once for all calls, which PostgreSQL may take after the fifth.
"""

import json
import re
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

from service.driver import SESSION
from service.embedded import EmbeddedPostgres
from service.repositories import (
    conversations as conversations_,
)
from service.repositories import (
    cursors,
    invitations,
    participants,
    users,
)
from service.repositories import (
    inbox as inbox_,
)
from service.repositories import (
    messages as messages_,
)
from service.repositories.base import Connection, Row
from service.repositories.conversations import Conversations
from service.repositories.inbox import Inbox, Place
from service.repositories.invitations import Invitations
from service.repositories.messages import LOAD, Messages, Stretch
from service.repositories.participants import Participants
from service.server import Server
from service.store import Store

from .conftest import TABLES
from .make import Client

pytestmark = pytest.mark.slow

DIALECT: Any = PGDialect_asyncpg()  # type: ignore[no-untyped-call]
MIB = 1 << 20
# The session's settings that plans depend on.
PLANNER = [name for name in SESSION if name == "jit" or name.startswith("enable_")]
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
       CASE WHEN n % 5000 = 77 THEN '{"rare": 1}'::jsonb
            WHEN n % 10 = 3 THEN '{"common": 1}' ELSE '{}' END,
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
    await database.execute(TOLD, 17_001, 19_000)
    snapshot = await database.fetchval("SELECT pg_current_snapshot()::text")
    read_at = await database.fetchval("SELECT now()")
    await database.execute(TOLD, 19_001, 20_000)
    await database.execute(ACTIVE)
    await database.execute(f"VACUUM ANALYZE {TABLES}")
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

    async def rows(
        self,
        statement: Executable,
        *,
        replan: bool = False,  # noqa: ARG002 - it plans nothing
    ) -> Sequence[Row]:
        compiled: Any = statement.compile(  # type: ignore[attr-defined]
            dialect=DIALECT, compile_kwargs={"render_postcompile": True}
        )
        self.asked.append((str(compiled), [compiled.params[name] for name in compiled.positiontup]))
        return []

    async def fetch(
        self,
        sql: str,
        *arguments: object,
        replan: bool = False,  # noqa: ARG002 - as above
    ) -> list[Row]:
        self.asked.append((sql, arguments))
        return []


def literal(value: Any) -> str:
    """A value as SQL spells it, whatever its type."""
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "'{" + ",".join("NULL" if each is None else str(each) for each in value) + "}'"
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
        for name in PLANNER:
            await database.execute(f"SET LOCAL {name} = {SESSION[name]}")
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


# ListMessages, BatchGetMessages


def view(world: World) -> dict[str, Any]:
    """How the user sees the room: whole."""
    return {
        "id": world.room,
        "actor_id": world.ada,
        "first_sequence": 1,
        "final_sequence": 20_000,
        "shown_message_id": None,
    }


def messages(world: World, **values: Any) -> Listing:
    page = {"after": None, "descending": True, "limit": 50, "byte_limit": MIB, **values}
    after, limit = page.pop("after"), page.pop("limit")
    stretch = Stretch.beyond(view(world), after, descending=page["descending"], limit=limit)
    return lambda recorder: Messages(recorder).list(stretch, **page)


@BOTH
async def test_pages_that_are_gathered_are_read_no_further_than_each_goes(
    world: World, database: asyncpg.Connection, mode: str
) -> None:
    stretches = [
        Stretch.beyond(view(world), after, descending=True, limit=50)
        for after in range(1_000, 9_000, 1_000)
    ]

    plan = await explain(
        database,
        mode,
        lambda recorder: Messages(recorder).pages(stretches, descending=True, byte_limit=MIB),
    )

    assert not plan.walked, str(plan)
    assert plan.rows_read <= 51 * len(stretches) + len(stretches) + 1, str(plan)


# What a page tells of its state: its conversation, and the era.
STATE = {"pk_conversations", "pk_eras"}
WALK = "uq_messages_conversation_sequence"


@BOTH
@pytest.mark.parametrize(
    ("values", "index", "rows"),
    [
        ({}, WALK, 51),
        ({"after": 10_000}, WALK, 51),
        ({"after": 10_000, "descending": False}, WALK, 51),
        ({"external_id": "x/770"}, "uq_messages_external_id", 1),
        # One message in a hundred: a walk that ends when the page is full.
        ({"roles": ["SYSTEM"]}, WALK, 5_100),
        ({"statuses": ["FAILED"]}, WALK, 5_100),
        ({"created_after": START + timedelta(minutes=19_000)}, WALK, 51),
        ({"created_before": START + timedelta(minutes=1_000), "descending": False}, WALK, 51),
        # A walk over what is newer: within one conversation, and an index by time would cost every
        # message sent.
        ({"created_before": START + timedelta(minutes=1_000)}, WALK, 19_100),
    ],
    ids=str,
)
async def test_a_page_of_messages_is_a_walk_along_an_index(
    world: World,
    database: asyncpg.Connection,
    mode: str,
    values: dict[str, Any],
    index: str,
    rows: int,
) -> None:
    plan = await explain(database, mode, messages(world, **values))

    assert index in plan.indexes, str(plan)
    assert not plan.walked, str(plan)
    assert plan.rows_read <= rows + len(STATE), str(plan)


@BOTH
async def test_one_senders_messages_are_read_and_no_others(
    world: World, database: asyncpg.Connection, mode: str
) -> None:
    plan = await explain(database, mode, messages(world, sender_id=world.ada))

    assert plan.indexes == {"ix_messages_sender"} | STATE, str(plan)
    assert plan.rows_read == 40 + len(STATE), str(plan)


@pytest.mark.parametrize(
    ("metadata", "index"), [('{"rare": 1}', "ix_messages_metadata"), ('{"common": 1}', WALK)]
)
async def test_messages_are_found_by_rare_metadata_and_passed_over_for_common(
    world: World, database: asyncpg.Connection, metadata: str, index: str
) -> None:
    """Always planned for these values: see `test_what_metadata_holds_decides_on_every_call`."""
    listing = messages(world, metadata_contains=metadata)

    plan = await explain(database, "force_custom_plan", listing)

    assert index in plan.indexes, str(plan)
    assert plan.rows_read <= 600, str(plan)


@BOTH
async def test_messages_are_found_by_their_keys(
    world: World, database: asyncpg.Connection, mode: str
) -> None:
    """By the keys of one call, or of many calls that were gathered."""
    sequences = list(range(1, 20_000, 50))
    keys = [(world.room, world.ada, n) for n in sequences]

    batch = await explain(
        database,
        mode,
        lambda recorder: Messages(recorder).find_many(
            view(world), ids=[world.ada] * 100, sequences=sequences, byte_limit=MIB
        ),
    )
    gathered = await explain(database, mode, lambda recorder: Messages(recorder).find(keys))

    # Its message, id and name; of the gathered, its conversation, actor and participant as well.
    for plan, rows in (batch, 3), (gathered, 5):
        assert not plan.walked, str(plan)
        assert plan.rows_read <= rows * len(sequences), str(plan)


@BOTH
async def test_the_first_unread_message_is_the_first_that_is_read(
    world: World, database: asyncpg.Connection, mode: str
) -> None:
    plan = await explain(
        database, mode, lambda recorder: Messages(recorder).first_unread(view(world))
    )

    assert not plan.walked, str(plan)
    # The participant, the conversation, and an own message before.
    assert plan.rows_read <= 4, str(plan)


# ListParticipants, ListInvitations


@BOTH
@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ({}, 2_000),
        ({"statuses": ["LEFT"]}, 1_000),
        ({"roles": ["OWNER"]}, 1_000),
        ({"after": (START + timedelta(minutes=4, seconds=900), UUID(int=0))}, 1_200),
    ],
    ids=str,
)
async def test_participants_are_read_with_their_conversation(
    world: World, database: asyncpg.Connection, mode: str, values: dict[str, Any], rows: int
) -> None:
    """All thousand of them, in the order of whose rows there is no index: that is the most that
    there may be. Half of all users are among them, so that it may be best to read those whole.
    """
    page: dict[str, Any] = {
        "only_user_id": None,
        "statuses": ["INVITED", "JOINED"],
        "roles": [],
        "after": None,
        "limit": 51,
        **values,
    }

    plan = await explain(
        database, mode, lambda recorder: Participants(recorder).list(world.crowd, **page)
    )

    assert plan.indexes & {"pk_participants", "uq_participants_user_conversation"}, str(plan)
    assert plan.walked <= {"users"}, str(plan)
    assert plan.rows_read <= rows + 2_000 * len(plan.walked), str(plan)


@BOTH
async def test_who_sees_but_its_own_row_reads_but_that(
    world: World, database: asyncpg.Connection, mode: str
) -> None:
    plan = await explain(
        database,
        mode,
        lambda recorder: Participants(recorder).list(
            world.room, only_user_id=world.ada, statuses=["JOINED"], roles=[], after=None, limit=51
        ),
    )

    assert plan.rows_read <= 2, str(plan)


@BOTH
@pytest.mark.parametrize("after", [False, True], ids=["first page", "next page"])
async def test_invitations_are_read_with_the_users_own_rows(
    world: World, database: asyncpg.Connection, mode: str, after: bool
) -> None:
    """1,100 rows of its own; the conversations of the hundred that are invitations."""
    place = (START + timedelta(minutes=1_050), world.room) if after else None

    plan = await explain(
        database,
        mode,
        lambda recorder: Invitations(recorder).list(
            world.ada, after=place, limit=51, byte_limit=MIB
        ),
    )

    assert "uq_participants_user_conversation" in plan.indexes, str(plan)
    assert not plan.walked, str(plan)
    assert plan.rows_read <= 1_500, str(plan)


# ListConversations


def conversations(**values: Any) -> Listing:
    page = {"actor_id": None, "show_deleted": False, "after": None, "limit": 51, **values}
    return lambda recorder: Conversations(recorder).list(**page)


NEWEST = "ix_conversations_created_at_id"


@BOTH
@pytest.mark.parametrize(
    ("values", "index", "rows"),
    [
        ({}, NEWEST, 51),
        ({"show_deleted": True}, NEWEST, 51),
        ({"after": (START + timedelta(minutes=500), UUID(int=0))}, NEWEST, 51),
        ({"created_before": START + timedelta(minutes=1_000)}, NEWEST, 51),
        ({"created_after": START + timedelta(minutes=19_999)}, NEWEST, 51),
        # One in fifty: a walk that ends when the page is full.
        ({"is_active": False}, NEWEST, 2_600),
        ({"title_contains": "number 19"}, NEWEST, 1_500),
        ({"external_id": "x/7"}, "uq_conversations_external_id", 1),
    ],
    ids=str,
)
async def test_a_page_of_conversations_is_a_walk_along_an_index(
    world: World,
    database: asyncpg.Connection,
    mode: str,
    values: dict[str, Any],
    index: str,
    rows: int,
) -> None:
    plan = await explain(database, mode, conversations(**values))

    assert plan.indexes == {index}, str(plan)
    assert not plan.walked, str(plan)
    assert plan.rows_read <= rows, str(plan)


@BOTH
async def test_one_creators_conversations_are_read_and_no_others(
    world: World, database: asyncpg.Connection, mode: str
) -> None:
    plan = await explain(database, mode, conversations(creator_id=world.ada))

    assert plan.indexes == {"ix_conversations_creator"}, str(plan)
    assert plan.rows_read == 10, str(plan)


@BOTH
@pytest.mark.parametrize("role", ["actor_id", "participant_id"])
@pytest.mark.parametrize("filters", [{}, {"title_contains": "number 77"}, {"is_active": False}])
async def test_one_users_conversations_are_found_by_its_own_rows(
    world: World, database: asyncpg.Connection, mode: str, role: str, filters: dict[str, Any]
) -> None:
    """They are the oldest of all. What they are not found by is a walk from the newest on."""
    plan = await explain(database, mode, conversations(**{role: world.ada}, **filters))

    assert "uq_participants_user_conversation" in plan.indexes, str(plan)
    assert NEWEST not in plan.indexes, str(plan)
    # One in twenty is its own: then it may be best to look for rare titles first.
    assert not plan.walked, str(plan)
    assert plan.rows_read <= (20_100 if "title_contains" in filters else 2_200), str(plan)


@BOTH
async def test_a_rare_title_is_looked_for_in_all_conversations(
    world: World, database: asyncpg.Connection, mode: str
) -> None:
    """For the system alone, and once: there is no index of what titles hold. A user's own are
    looked through as above."""
    plan = await explain(database, mode, conversations(title_contains="number 77"))

    assert plan.rows_read <= 20_000, str(plan)


@pytest.mark.parametrize(
    ("metadata", "rows"), [('{"rare": 1}', 4), ('{"common": 1}', 2_000)], ids=["rare", "common"]
)
async def test_conversations_are_found_by_their_metadata(
    world: World, database: asyncpg.Connection, metadata: str, rows: int
) -> None:
    listing = conversations(metadata_contains=metadata)

    plan = await explain(database, "force_custom_plan", listing)

    assert plan.indexes <= {"ix_conversations_metadata", NEWEST}, str(plan)
    assert plan.rows_read <= rows, str(plan)


async def test_what_metadata_holds_decides_on_every_call(world: World, fresh: Store) -> None:
    """Planned for all values alike, it would read the whole room."""
    async with fresh.snapshot() as snapshot:
        for _ in range(8):
            rows, _ = await snapshot.messages.list(
                Stretch.beyond(view(world), None, descending=True, limit=50),
                descending=True,
                byte_limit=MIB,
                metadata_contains='{"rare": 1}',
            )
            assert len(rows) == 4
        (prepared,) = await snapshot.connection.fetch(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements"
            " WHERE statement LIKE '%m.metadata @>%' AND statement NOT LIKE '%generic_plans%'"
        )
        (mode,) = await snapshot.connection.fetch("SHOW plan_cache_mode")

    assert prepared["generic_plans"] == 0
    assert prepared["custom_plans"] >= 8
    assert mode["plan_cache_mode"] == "force_generic_plan"


@pytest_asyncio.fixture
async def fresh(postgres: EmbeddedPostgres) -> AsyncIterator[Store]:
    """A store that has planned nothing yet: what a connection planned while the tables were small
    counts when it compares.
    """
    opened = Store(postgres.url, pool_size=2)
    yield opened
    await opened.close()


async def test_an_inbox_is_planned_once_for_everybody(world: World, fresh: Store) -> None:
    """Planning it takes longer than reading a small one."""
    async with fresh.snapshot() as snapshot:
        for n in range(12):
            user = world.ada if n % 2 else UUID(int=n)
            await snapshot.inbox.list(
                user, statuses=["JOINED"], after=None, limit=25, byte_limit=MIB
            )
        (prepared,) = await snapshot.connection.fetch(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements"
            " WHERE statement LIKE '%k.unread_only%' AND statement NOT LIKE '%pg_prepared%'"
        )

    assert prepared["custom_plans"] == 0
    assert prepared["generic_plans"] == 12


async def test_what_a_send_loads_is_planned_once_for_all(
    world: World, fresh: Store, database: asyncpg.Connection
) -> None:
    arguments = [[world.room], [world.ada], [None], [None], [7], [None], [None], [world.crowd]]
    async with fresh.snapshot() as snapshot:
        for _ in range(12):
            (row,) = await snapshot.connection.fetch(LOAD, *arguments)
            assert row["status"] == "JOINED"
        (prepared,) = await snapshot.connection.fetch(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement = $1",
            LOAD,
        )
    plan = await explain(
        database, "force_generic_plan", lambda recorder: recorder.fetch(LOAD, *arguments)
    )

    assert prepared["custom_plans"] == 0
    assert prepared["generic_plans"] == 12
    assert not plan.walked, str(plan)
    assert plan.rows_read <= 5, str(plan)


# While tables are small

STATEMENTS = {
    "views": conversations_.VIEWS,
    "resolve": conversations_.RESOLVE,
    "people": participants.PEOPLE,
    "crowd": participants.CROWD,
    "change": participants.WRITE,
    "users": users.FIND,
    "hold users": users.HOLD,
    "create users": users.CREATE,
    "whose names": users.TAKEN,
    "create": conversations_.CREATE,
    "whose slugs": conversations_.TAKEN,
    "load": messages_.LOAD,
    "append": messages_.WRITE,
    "append one": messages_.WRITE_ONE,
    "find": messages_.FIND,
    "find many": messages_.FIND_MANY,
    "pages": messages_.PAGES.format(where="", order="DESC", **messages_.OF_EACH),
    "first unread": messages_.FIRST_UNREAD,
    "load cursors": cursors.LOAD,
    "move cursors": cursors.WRITE,
    "find cursors": cursors.FIND,
    "inbox": inbox_.LIST,
    "invitations": invitations.LIST,
}


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
async def test_a_plan_made_while_tables_are_small_bears_large_ones(
    parley: Client, database: asyncpg.Connection, statement: str
) -> None:
    """It is kept until the next ANALYZE, and tables may grow a lot until then: each row that is
    read must be found by an index, though there is but one row to read.
    """
    ada = await parley.user()
    talk = await parley.conversation(ada, first="hello")
    await parley.delete_message(talk, sequence=1)
    await database.execute(f"VACUUM ANALYZE {TABLES}")
    count = max(map(int, re.findall(r"\$([0-9]+)", statement)))
    async with database.transaction():
        for name in PLANNER:
            await database.execute(f"SET LOCAL {name} = {SESSION[name]}")
        await database.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        await database.execute(f"PREPARE statement AS {statement}")
        nothing = ", ".join(["NULL"] * count)
        (row,) = await database.fetch(f"EXPLAIN (FORMAT JSON) EXECUTE statement({nothing})")
        await database.execute("DEALLOCATE statement")

    nodes = list(Plan(json.loads(row[0])[0]["Plan"]).nodes())
    # What is asked for only where a request names a message by its id.
    seldom = [
        below for node in nodes if "One-Time Filter" in node for below in node.get("Plans", ())
    ]
    for node in nodes:
        # A key of which a part is looked up, and the rest compared, reads all that share the part.
        assert not re.search(r"\b[pr]\.\w+ = k\.", node.get("Join Filter", "")), node
        assert node in seldom or not re.search(r"\bid = k\.", node.get("Filter", "")), node
        if node["Node Type"] in ("Seq Scan", "Index Scan", "Index Only Scan"):
            assert "Index Cond" in node or node["Relation Name"] == "eras", node
