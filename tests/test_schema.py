"""What the database itself holds, whoever writes to it: the shape of the schema, the rows that it
refuses, what goes when a conversation goes, and the relationships that the models draw."""

import re
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio
from sqlalchemy import inspect, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import selectinload

from service.embedded import EmbeddedPostgres
from service.models import Base, Conversation, Message, MessageRevision, Participant, User

# The shape

OURS = "c.relnamespace = 'public'::regnamespace AND c.relname <> 'alembic_version'"


async def test_every_foreign_key_has_an_index_that_begins_with_it(
    database: asyncpg.Connection,
) -> None:
    """Without one, deleting what it points at reads its whole table, row by row."""
    unindexed = await database.fetch(
        f"""SELECT f.conname FROM pg_constraint f JOIN pg_class c ON c.oid = f.conrelid
        WHERE f.contype = 'f' AND {OURS} AND NOT EXISTS (
          SELECT FROM pg_index i WHERE i.indrelid = f.conrelid AND i.indisvalid
          -- Its columns, in any order, and then perhaps more.
          AND (i.indkey::int2[])[0:cardinality(f.conkey) - 1] @> f.conkey
          -- Of a partial one, all that is asked is that the key is there at all.
          AND (i.indpred IS NULL
               OR pg_get_expr(i.indpred, i.indrelid) ~ '^\\(\\w+ IS NOT NULL\\)$'))"""
    )
    assert unindexed == []


async def test_every_constraint_and_index_is_named_for_its_table(
    database: asyncpg.Connection,
) -> None:
    names = await database.fetch(
        f"""SELECT c.relname, k.conname AS name, k.contype::text AS kind
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
        WHERE {OURS} AND k.contype <> 'n'
        UNION ALL
        SELECT c.relname, i.indexrelid::regclass::text,
               CASE WHEN i.indisprimary THEN 'p' WHEN i.indisunique THEN 'u' ELSE 'i' END
        FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE {OURS}"""
    )
    prefix = {"p": "pk", "u": "uq", "f": "fk", "c": "ck", "i": "ix"}

    odd = [
        name
        for table, name, kind in names
        if not re.fullmatch(f"{prefix[kind]}_{table}{'' if kind == 'p' else '_[a-z_]+'}", name)
    ]

    assert len(names) > 50
    assert odd == []


async def test_every_table_has_a_primary_key(database: asyncpg.Connection) -> None:
    """But requests: part of their unique key, the conversation, may be absent. A replica knows
    their rows by all that is in them."""
    keyless = await database.fetch(
        f"""SELECT c.relname, c.relreplident::text AS identity FROM pg_class c
        WHERE c.relkind = 'r' AND {OURS} AND NOT EXISTS (
          SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)"""
    )
    assert [tuple(row) for row in keyless] == [("requests", "f")]


async def test_every_time_is_aware(database: asyncpg.Connection) -> None:
    times = await database.fetch(
        f"""SELECT a.attname, format_type(a.atttypid, a.atttypmod) AS type
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid AND c.relkind = 'r'
        WHERE {OURS} AND a.attnum > 0
        AND (a.attname LIKE '%\\_at' OR format_type(a.atttypid, -1) ~ '^(timestamp|date|time)')"""
    )
    assert {row["type"] for row in times} == {"timestamp with time zone"}
    assert all(row["attname"].endswith("_at") for row in times)


async def test_names_are_compared_byte_by_byte(database: asyncpg.Connection) -> None:
    """An upgrade of the operating system must never break a unique index."""
    names = await database.fetch(
        f"""SELECT c.relname || '.' || a.attname AS name
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid AND c.relkind = 'r'
        WHERE {OURS} AND a.attcollation = '"C"'::regcollation"""
    )
    indexed = await database.fetch(
        f"""SELECT DISTINCT c.relname || '.' || a.attname AS name
        FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY (i.indkey)
        WHERE {OURS} AND a.atttypid = 'text'::regtype"""
    )

    assert {row["name"] for row in names} == {
        "users.username",
        "users.external_id",
        "conversations.slug",
        "conversations.external_id",
        "messages.external_id",
        "tokens.key_id",
        "signing_keys.name",
    }
    assert {row["name"] for row in indexed} <= {row["name"] for row in names}


async def test_nothing_happens_behind_a_statement(database: asyncpg.Connection) -> None:
    assert await database.fetch("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal") == []
    assert await database.fetch("SELECT rulename FROM pg_rules WHERE schemaname = 'public'") == []


# The rows that it refuses

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def uuid(n: int) -> UUID:
    return UUID(int=n)


ADA, BOB, NOBODY = uuid(1), uuid(2), uuid(3)
TEA, TALK, PAIR, NOWHERE = uuid(11), uuid(12), uuid(13), uuid(14)
IN_TEA, IN_TALK, NEW = uuid(21), uuid(22), uuid(23)

# A row of each table that is accepted beside the record below.
GOOD: dict[str, dict[str, Any]] = {
    "users": {"id": NEW, "username": "new"},
    "conversations": {"id": NEW, "slug": "new", "creator_id": ADA},
    "participants": {
        "conversation_id": TEA,
        "user_id": BOB,
        "status": "JOINED",
        "role": "MEMBER",
        "joined_at": NOW,
        "status_at": NOW,
    },
    "messages": {
        "conversation_id": TEA,
        "id": NEW,
        "sequence": 2,
        "sender_id": ADA,
        "role": "USER",
        "content": "More?",
    },
    "message_revisions": {
        "conversation_id": TEA,
        "message_id": IN_TEA,
        "revision": 2,
        "content": "Tea!",
        "editor_id": ADA,
        "created_at": NOW,
    },
    "events": {"conversation_id": TEA, "version": 2, "era": 1, "type": "MESSAGE_CREATED"},
    "requests": {"conversation_id": TEA, "key": b"k" * 16, "payload_hash": b"h" * 32},
    "password_failures": {"key": b"k" * 32},
    "tokens": {"key_id": "new", "secret_hash": b"h" * 32, "service": "s", "scopes": ["read"]},
}


def direct(first: UUID | None, second: UUID | None) -> dict[str, Any]:
    return {"is_direct": True, "direct_first_user_id": first, "direct_second_user_id": second}


# Ada says something in two conversations. She has another one with Bob alone.
RECORD: list[tuple[str, dict[str, Any]]] = [
    ("users", {"id": ADA, "username": "ada", "email": "zoé@example.org", "external_id": "x"}),
    ("users", {"id": BOB, "username": "bob"}),
    ("conversations", {"id": TEA, "slug": "tea", "external_id": "x"}),
    ("conversations", {"id": TALK, "slug": "talk"}),
    ("conversations", {"id": PAIR, "slug": "pair"} | direct(ADA, BOB)),
    ("participants", {"user_id": ADA}),
    ("participants", {"user_id": ADA, "conversation_id": TALK}),
    ("messages", {"id": IN_TEA, "sequence": 1, "external_id": "x"}),
    ("messages", {"id": IN_TALK, "sequence": 1, "conversation_id": TALK}),
    ("message_revisions", {"revision": 1}),
    ("message_revisions", {"revision": 1, "conversation_id": TALK, "message_id": IN_TALK}),
    ("events", {"version": 1}),
    ("requests", {"key": b"0" * 16}),
    ("requests", {"key": b"0" * 16, "conversation_id": None}),
]

INVITED = {"status": "INVITED", "joined_at": None, "visible_to_sequence": 0}
LEFT = {"status": "LEFT", "left_at": NOW, "visible_to_sequence": 7}


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("pk_users", "users", {"id": ADA}),
    ("uq_users_username", "users", {"username": "ada"}),
    ("uq_users_email", "users", {"email": "zoé@example.org"}),
    ("uq_users_email", "users", {"email": "Zoé@Example.ORG"}),
    ("uq_users_email", "users", {"email": "ZOÉ@EXAMPLE.ORG"}),
    ("uq_users_external_id", "users", {"external_id": "x"}),
    ("ck_users_username_length", "users", {"username": ""}),
    ("ck_users_username_length", "users", {"username": "é" * 65}),
    ("ck_users_kind", "users", {"kind": "ROBOT"}),
    ("ck_users_metadata_object", "users", {"metadata": "[]"}),
    # Who was purged is nobody, and nobody else is.
    ("ck_users_purged", "users", {"username": None}),
    ("ck_users_purged", "users", {"purged_at": NOW}),
    *(
        ("ck_users_purged", "users", {"username": None, "purged_at": NOW, name: "x"})
        for name in ("email", "password_hash", "external_id")
    ),
    ("pk_conversations", "conversations", {"id": TEA}),
    ("uq_conversations_slug", "conversations", {"slug": "tea"}),
    ("uq_conversations_external_id", "conversations", {"external_id": "x"}),
    ("fk_conversations_creator_id", "conversations", {"creator_id": NOBODY}),
    *(
        ("ck_conversations_slug_form", "conversations", {"slug": slug})
        for slug in ("", "ab", "a" * 64, "Tea", "téa", "tea time", "-tea", "tea-", "tea\n", "t_a")
    ),
    ("uq_conversations_direct", "conversations", direct(ADA, BOB)),
    ("fk_conversations_direct_first_user_id", "conversations", direct(uuid(0), BOB)),
    ("fk_conversations_direct_second_user_id", "conversations", direct(BOB, NOBODY)),
    ("ck_conversations_direct_order", "conversations", direct(BOB, ADA)),
    ("ck_conversations_direct_order", "conversations", direct(BOB, BOB)),
    ("ck_conversations_direct_pair", "conversations", direct(ADA, None)),
    ("ck_conversations_direct_pair", "conversations", direct(None, None)),
    ("ck_conversations_direct_pair", "conversations", direct(ADA, BOB) | {"is_direct": False}),
    ("ck_conversations_metadata_object", "conversations", {"metadata": "null"}),
    ("ck_conversations_counters", "conversations", {"last_sequence": -1}),
    ("ck_conversations_counters", "conversations", {"version": -1}),
    ("ck_conversations_counters", "conversations", {"participant_count": -1}),
    ("ck_conversations_counters", "conversations", {"total_tokens_used": -1}),
    ("pk_participants", "participants", {"user_id": ADA}),
    ("fk_participants_conversation_id", "participants", {"conversation_id": NOWHERE}),
    ("fk_participants_user_id", "participants", {"user_id": NOBODY}),
    ("fk_participants_invited_by_user_id", "participants", {"invited_by_user_id": NOBODY}),
    ("fk_participants_status_actor_id", "participants", {"status_actor_id": NOBODY}),
    ("fk_participants_initial_message", "participants", {"initial_message_id": IN_TALK}),
    ("ck_participants_status", "participants", LEFT | {"status": "ASLEEP"}),
    ("ck_participants_role", "participants", {"role": "KING"}),
    # Two windows: open while joined, closed otherwise, and never both.
    ("ck_participants_window_open", "participants", {"visible_to_sequence": 5}),
    ("ck_participants_window_open", "participants", INVITED | {"visible_to_sequence": None}),
    ("ck_participants_window_open", "participants", LEFT | {"visible_to_sequence": None}),
    ("ck_participants_joined_at", "participants", {"joined_at": None}),
    ("ck_participants_left_at", "participants", LEFT | {"left_at": None}),
    ("ck_participants_left_at", "participants", LEFT | {"left_at": None, "status": "REMOVED"}),
    ("ck_participants_cursors", "participants", {"visible_from_sequence": 0}),
    ("ck_participants_cursors", "participants", {"last_read_sequence": -1}),
    ("ck_participants_cursors", "participants", LEFT | {"visible_to_sequence": -1}),
    ("pk_messages", "messages", {"id": IN_TEA}),
    ("uq_messages_conversation_sequence", "messages", {"sequence": 1}),
    ("uq_messages_external_id", "messages", {"external_id": "x"}),
    (
        "fk_messages_conversation_id",
        "messages",
        {"conversation_id": NOWHERE, "role": "SYSTEM", "sender_id": None},
    ),
    ("fk_messages_sender", "messages", {"sender_id": BOB}),
    ("fk_messages_reply_to", "messages", {"reply_to_message_id": IN_TALK}),
    ("fk_messages_parent", "messages", {"parent_message_id": IN_TALK}),
    ("fk_messages_deleted_by_user_id", "messages", {"deleted_by_user_id": NOBODY}),
    ("ck_messages_not_about_itself", "messages", {"reply_to_message_id": NEW}),
    ("ck_messages_not_about_itself", "messages", {"parent_message_id": NEW}),
    ("ck_messages_user_has_sender", "messages", {"sender_id": None}),
    ("ck_messages_role", "messages", {"role": "GHOST"}),
    ("ck_messages_status", "messages", {"status": "LOST"}),
    ("ck_messages_sequence_positive", "messages", {"sequence": 0}),
    ("ck_messages_tokens", "messages", {"tokens_used": -1}),
    ("ck_messages_tokens", "messages", {"input_tokens": -1}),
    ("ck_messages_tokens", "messages", {"output_tokens": -1}),
    ("ck_messages_content_length", "messages", {"content": "é" * 131_072 + "!"}),
    ("ck_messages_metadata_object", "messages", {"metadata": '"text"'}),
    ("fk_messages_edited_by_user_id", "messages", {"edited_by_user_id": NOBODY}),
    ("pk_message_revisions", "message_revisions", {"revision": 1}),
    ("fk_message_revisions_message", "message_revisions", {"message_id": IN_TALK}),
    ("fk_message_revisions_editor_id", "message_revisions", {"editor_id": NOBODY}),
    ("ck_message_revisions_revision_positive", "message_revisions", {"revision": 0}),
    (
        "ck_message_revisions_content_length",
        "message_revisions",
        {"content": "é" * 131_072 + "!"},
    ),
    ("ck_message_revisions_metadata_object", "message_revisions", {"metadata": "[]"}),
    ("ck_message_revisions_tokens", "message_revisions", {"tokens_used": -1}),
    ("pk_events", "events", {"version": 1}),
    ("ck_events_version_positive", "events", {"version": 0}),
    ("ck_events_type", "events", {"type": "RUMOUR"}),
    ("uq_requests_conversation_key", "requests", {"key": b"0" * 16}),
    ("uq_requests_conversation_key", "requests", {"key": b"0" * 16, "conversation_id": None}),
    ("fk_requests_conversation_id", "requests", {"conversation_id": NOWHERE}),
    ("ck_requests_digests", "requests", {"key": b"0" * 15}),
    ("ck_requests_digests", "requests", {"payload_hash": b"0" * 33}),
    ("ck_password_failures_key_length", "password_failures", {"key": b"ada"}),
    # Of a secret nothing is stored but its SHA-256, by mistake neither.
    ("ck_tokens_secret_hash_length", "tokens", {"secret_hash": b"the secret itself"}),
]

FINE: list[tuple[str, dict[str, Any]]] = [
    *((table, {}) for table in GOOD),
    ("users", {"username": "Ada"}),
    ("users", {"username": None, "purged_at": NOW, "deleted_at": NOW}),
    ("users", {"username": "é" * 64, "email": "zoe@example.org"}),
    ("conversations", {"slug": "a" * 63}),
    ("participants", INVITED),
    ("participants", LEFT),
    ("participants", {"initial_message_id": IN_TEA}),
    ("messages", {"content": "é" * 131_072}),
    ("messages", {"reply_to_message_id": IN_TEA, "parent_message_id": IN_TEA}),
    ("messages", {"role": "ASSISTANT", "sender_id": None}),
    ("messages", {"conversation_id": TALK, "external_id": "x"}),
    ("message_revisions", {"editor_id": None, "tokens_used": 0, "content": ""}),
    ("requests", {"conversation_id": None}),
    ("requests", {"conversation_id": TALK, "key": b"0" * 16}),
]


@pytest_asyncio.fixture
async def record(database: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """A connection in a transaction of its own, in which the record above is written."""
    transaction = database.transaction()
    await transaction.start()
    for table, changes in RECORD:
        await insert(database, table, changes)
    yield database
    await transaction.rollback()


async def insert(database: asyncpg.Connection, table: str, changes: dict[str, Any]) -> None:
    row = GOOD[table] | changes
    values = ", ".join(f"${n}" for n, _ in enumerate(row, start=1))
    await database.execute(
        f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})", *row.values()
    )


@pytest.mark.parametrize(("constraint", "table", "changes"), BAD)
async def test_the_record_never_holds(
    record: asyncpg.Connection, constraint: str, table: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(asyncpg.IntegrityConstraintViolationError) as refused:
        await insert(record, table, changes)
    assert refused.value.constraint_name == constraint


@pytest.mark.parametrize(("table", "changes"), FINE)
async def test_the_record_may_hold(
    record: asyncpg.Connection, table: str, changes: dict[str, Any]
) -> None:
    await insert(record, table, changes)


async def test_every_constraint_is_tried(database: asyncpg.Connection) -> None:
    """A constraint without a row that it refuses may as well not be there."""
    names = await database.fetch(
        f"""SELECT conname AS name FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
        WHERE {OURS} AND k.contype IN ('c', 'f')
        UNION SELECT n.indexrelid::regclass::text FROM pg_index n
        JOIN pg_class c ON c.oid = n.indrelid WHERE {OURS} AND n.indisunique"""
    )
    assert {row["name"] for row in names} - {constraint for constraint, *_ in BAD} == {
        # The same pair as the primary key, which speaks first; here for who looks up by user.
        "uq_participants_user_conversation",
        "pk_eras",
        "pk_password_failures",
        "pk_signing_keys",
        "pk_tokens",
    }


# What goes when a conversation goes


async def tie_knots(record: asyncpg.Connection) -> None:
    """In the record's first conversation, everything that can point at something does."""
    await insert(record, "participants", INVITED | {"initial_message_id": IN_TEA})
    await insert(record, "messages", {"reply_to_message_id": IN_TEA, "parent_message_id": IN_TEA})
    await record.execute("UPDATE messages SET reply_to_message_id = $1 WHERE id = $2", NEW, IN_TEA)


async def test_one_statement_deletes_a_conversation_and_all_that_is_in_it(
    record: asyncpg.Connection,
) -> None:
    await tie_knots(record)

    await record.execute("DELETE FROM conversations WHERE id = $1", TEA)

    for table in ("participants", "messages", "message_revisions", "requests"):
        left = await record.fetch(f"SELECT conversation_id FROM {table}")
        assert TEA not in {row["conversation_id"] for row in left}
        assert left != []
    # They tell of it even then.
    assert await record.fetchval("SELECT count(*) FROM events WHERE conversation_id = $1", TEA) == 1


@pytest.mark.parametrize(
    ("constraint", "statement"),
    [
        ("fk_messages_sender", "DELETE FROM participants WHERE user_id = $1"),
        ("fk_participants_user_id", "DELETE FROM users WHERE id = $1"),
    ],
)
async def test_who_has_said_something_stays(
    record: asyncpg.Connection, constraint: str, statement: str
) -> None:
    await record.execute("UPDATE conversations SET creator_id = $1", BOB)
    with pytest.raises(asyncpg.ForeignKeyViolationError) as refused:
        await record.execute(statement, ADA)
    assert refused.value.constraint_name == constraint


async def test_purging_can_be_replicated(record: asyncpg.Connection) -> None:
    """A table of a publication refuses deletions unless a replica can tell its rows apart."""
    tables = ", ".join(sorted(Base.metadata.tables))
    await record.execute(f"CREATE PUBLICATION everything FOR TABLE {tables}")

    await record.execute("DELETE FROM conversations")
    await record.execute("DELETE FROM requests")


# The relationships


def test_the_mappers_agree_without_a_warning() -> None:
    program = "import service.models, sqlalchemy.orm as orm; orm.configure_mappers()"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_every_relationship_has_two_sides_and_loads_only_what_it_is_told() -> None:
    relationships = [each for mapper in Base.registry.mappers for each in mapper.relationships]

    assert relationships
    for relationship in relationships:
        other = inspect(relationship.entity.class_).relationships[relationship.back_populates]
        assert other.back_populates == relationship.key
        assert other.entity is relationship.parent
        assert relationship.lazy == "raise"


@pytest_asyncio.fixture
async def session(
    postgres: EmbeddedPostgres, database: asyncpg.Connection
) -> AsyncIterator[AsyncSession]:
    """A session in a transaction in which the record is written, with all its knots."""
    engine = create_async_engine(postgres.url)
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await connection.exec_driver_sql("SELECT 'a transaction begins with its first statement'")
        for table, changes in RECORD:
            await insert(driver, table, changes)
        await tie_knots(driver)
        async with AsyncSession(connection) as session:
            yield session
    await engine.dispose()


async def test_the_relationships_can_be_walked(session: AsyncSession) -> None:
    inside = selectinload(Conversation.messages)
    people = selectinload(Conversation.participants)
    tea = await session.get_one(
        Conversation,
        TEA,
        options=[
            selectinload(Conversation.creator),
            people.selectinload(Participant.user),
            people.selectinload(Participant.initial_message),
            people.selectinload(Participant.sent_messages),
            inside.selectinload(Message.sender),
            inside.selectinload(Message.reply_to),
            inside.selectinload(Message.replies),
            inside.selectinload(Message.parent),
            inside.selectinload(Message.branches),
            inside.selectinload(Message.invitations),
            inside.selectinload(Message.revisions).selectinload(MessageRevision.message),
        ],
    )

    assert tea.creator.username == "ada"
    first, second = tea.messages
    assert (first.id, second.id) == (IN_TEA, NEW)
    assert (first.reply_to, second.reply_to) == (second, first)
    assert (first.replies, second.replies) == ([second], [first])
    assert (first.parent, second.parent) == (None, first)
    assert (first.branches, second.branches) == ([second], [])
    ada, bob = sorted(tea.participants, key=lambda each: each.user.username or "")
    assert (ada.user.username, bob.user.username) == ("ada", "bob")
    assert first.sender is second.sender is ada
    # Of this conversation alone, though she speaks in another one too.
    assert ada.sent_messages == [first, second]
    assert bob.initial_message is first
    assert first.invitations == [bob]
    assert [each.revision for each in first.revisions] == [1]
    assert first.revisions[0].message is first


async def test_from_a_user_to_what_is_its_own(session: AsyncSession) -> None:
    query = select(User).order_by(User.username)
    ada, bob = await session.scalars(
        query.options(
            selectinload(User.created_conversations),
            selectinload(User.participations).selectinload(Participant.conversation),
            selectinload(User.invitations_made),
        )
    )
    assert {each.slug for each in ada.created_conversations} == {"tea", "talk", "pair"}
    assert [each.conversation.slug for each in bob.participations] == ["tea"]
    assert ada.invitations_made == []


async def test_nothing_is_loaded_unasked(session: AsyncSession) -> None:
    tea = await session.get_one(Conversation, TEA)
    with pytest.raises(InvalidRequestError, match="lazy='raise'"):
        _ = tea.messages


async def test_the_session_deletes_like_the_database(session: AsyncSession) -> None:
    await session.delete(await session.get_one(Conversation, TEA))
    await session.flush()
    assert {each.conversation_id for each in await session.scalars(select(Message))} == {TALK}

    await session.delete(await session.get_one(User, ADA))
    with pytest.raises(IntegrityError, match="violates foreign key constraint"):
        await session.flush()
