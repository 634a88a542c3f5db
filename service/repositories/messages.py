import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Self
from uuid import UUID

import orjson
from sqlalchemy import cast, func, insert, update
from sqlalchemy.dialects.postgresql import TSVECTOR

from service.domain import EventType
from service.ids import lock_of
from service.models.base import HAS_METADATA
from service.repositories.base import (
    BY_SLUG,
    Evidence,
    Repository,
    Row,
    columns_of,
    looked_up,
    tables,
    with_named_arguments,
)
from service.repositories.events import Events, Fact
from service.repositories.visibility import (
    FIRST,
    IS_UNREAD,
    LAST,
    MAY_ACT,
    MESSAGE_STATE,
    SEES,
    SHOWN,
    readable,
)
from service.rules import search
from service.rules.edits import editor_of
from service.rules.messages import Accepted, Append, Numbered, Reference, State, person_id

messages = tables["messages"]
revisions = tables["message_revisions"]
conversations = tables["conversations"]

MESSAGE = columns_of("messages", "m")

# Step 2 of the write protocol: all that the decisions need, one row a draft. Each part is a look-up
# by a unique key. IS NOT NULL: to a plan made while tables were small, half of such a key was as
# good, and to look for no message it read the whole conversation.
LOAD = f"""
SELECT k.position, c.id AS conversation_id, c.last_sequence, c.version, c.is_active, c.deleted_at,
       u.id AS user_id, u.revision AS user_revision, u.kind,
       u.is_active AND u.deleted_at IS NULL AS usable,
       p.status, p.role, p.visible_from_sequence AS first_sequence, COALESCE({SEES}, false) AS sees,
       r.payload_hash, r.sequence AS request_sequence, r.message_count,
       (SELECT e.id FROM messages e
        WHERE e.conversation_id = c.id AND e.external_id = k.external_id) AS external_id_holder,
       (SELECT ROW(m.id, m.sequence) FROM messages m WHERE m.conversation_id = c.id
        AND m.sequence = k.reply_to_sequence) AS reply_by_sequence,
       (SELECT ROW(m.id, m.sequence) FROM messages m WHERE m.conversation_id = c.id
        AND m.id = k.reply_to_id AND k.reply_to_id IS NOT NULL) AS reply_by_id,
       (SELECT ROW(m.id, m.sequence) FROM messages m WHERE m.conversation_id = c.id
        AND m.sequence = k.parent_sequence) AS parent_by_sequence,
       (SELECT ROW(m.id, m.sequence) FROM messages m WHERE m.conversation_id = c.id
        AND m.id = k.parent_id AND k.parent_id IS NOT NULL) AS parent_by_id
FROM unnest($1::uuid[], $2::uuid[], $3::bytea[], $4::text[], $5::bigint[], $6::uuid[],
            $7::bigint[], $8::uuid[]) WITH ORDINALITY
  AS k(conversation_id, user_id, request_key, external_id, reply_to_sequence, reply_to_id,
       parent_sequence, parent_id, position)
LEFT JOIN conversations c ON c.id = k.conversation_id
LEFT JOIN users u ON u.id = k.user_id
{looked_up("participants", "p", "p.conversation_id = c.id AND p.user_id = k.user_id")}
{looked_up("requests", "r", "r.conversation_id = c.id AND r.key = k.request_key")}
"""

# In which life of the database a version means something.
HISTORY = """
SELECT (SELECT max(era) FROM eras) AS era,
       left(pg_walfile_name(pg_current_wal_lsn()), 8) AS timeline
"""

# What WRITE is told of each message, and of each conversation, by type.
DRAFT = {
    "conversation_id": "uuid",
    "id": "uuid",
    # How many messages of the same conversation come after it.
    "following": "int",
    "actor_id": "uuid",
    "sender_id": "uuid",
    "user_revision": "int",
    "role": "text",
    "content": "text",
    "metadata": "text",
    "tokens_used": "int",
    "input_tokens": "int",
    "output_tokens": "int",
    "model": "text",
    "reply_to_message_id": "uuid",
    "parent_message_id": "uuid",
    "sent_at": "timestamptz",
    "external_id": "text",
    "search": "text",
    # Of the request, with its first message.
    "key": "bytea",
    "payload_hash": "bytea",
    "message_count": "int",
}
GROWTH = {
    "id": "uuid",
    "lock": "bigint",
    "other_changes": "bigint",
    "expected_last_sequence": "bigint",
    "message_count": "int",
    "tokens_used": "bigint",
    "sent_at": "timestamptz",
    "is_sent_now": "boolean",
}


def _record(types: Mapping[str, str]) -> str:
    return f"k({', '.join(f'{name} {type}' for name, type in types.items())})"


# Step 4: everything in one statement, for those conversations whose lock is free and that only
# messages have changed since they were decided about; their senders have not changed either, and
# their requests are new. Messages add as much to the version as to the last sequence, so the
# difference between the two tells of all other changes. The messages get their numbers here, from
# where the conversation ends now; where somebody relies on a number, it has to end where it did.
# None of this means anything but in one history of the database: nothing is stored by what is
# remembered of another one. The locks come first (an array of a subquery is made before anything
# else): the number of the transaction, which the first write takes, has to follow the order of
# versions.
#
# A conversation that another transaction changed after this statement's snapshot is looked at again
# by UPDATE: its version is another one then than the snapshot's. What is stored elsewhere comes out
# of that UPDATE.
#
# What is updated is found by ANY, and its values by subqueries that the planner cannot turn into a
# join: joined, tables that were small when it planned were read whole later, and those of 64
# messages compared with each other.
#
# Messages and conversations come as JSON: an array for each column cost the driver more than the
# parsing costs PostgreSQL, most of all where there is one message.
WRITE = f"""
WITH history AS MATERIALIZED ({HISTORY}),
draft AS MATERIALIZED (
  SELECT * FROM json_to_recordset($1::text::json) AS {_record(DRAFT)}
),
held AS MATERIALIZED (
  SELECT k.*, c.version, pg_try_advisory_xact_lock(k.lock) AS is_free,
         c.version - c.last_sequence = k.other_changes
           AND c.last_sequence = COALESCE(k.expected_last_sequence, c.last_sequence) AS is_known
  FROM json_to_recordset($2::text::json) AS {_record(GROWTH)}
  {looked_up("conversations", "c", "c.id = k.id")}
),
changed AS MATERIALIZED (
  SELECT d.conversation_id AS id FROM draft d
  {looked_up("users", "u", "u.id = COALESCE(d.actor_id, d.sender_id)")}
  WHERE d.user_revision <> u.revision OR NOT u.is_active OR u.deleted_at IS NOT NULL
  UNION ALL
  SELECT d.conversation_id FROM draft d
  {looked_up("requests", "r", "r.conversation_id = d.conversation_id AND r.key = d.key")}
  WHERE d.key IS NOT NULL AND r.conversation_id IS NOT NULL
),
moved AS (
  UPDATE conversations c
  SET (last_sequence, version, total_tokens_used, last_message_at, last_activity_at) =
    (SELECT c.last_sequence + h.message_count, c.version + h.message_count,
            c.total_tokens_used + h.tokens_used, h.at,
            greatest(c.last_activity_at, h.sent_at, CASE WHEN h.is_sent_now THEN h.at END)
     FROM (SELECT *, greatest(clock_timestamp(), c.last_message_at) AS at
           FROM held WHERE id = c.id OFFSET 0) AS h)
  WHERE c.id = ANY(ARRAY(SELECT id FROM held WHERE is_free AND is_known
                         AND id NOT IN (SELECT id FROM changed)))
    AND c.version = (SELECT h.version FROM held h WHERE h.id = c.id)
    AND ($3::text IS NULL OR $3 = (SELECT era || '/' || timeline FROM history))
  RETURNING c.id, c.last_sequence, c.version, c.last_message_at AS at
),
kept AS MATERIALIZED (
  SELECT *, (ARRAY(SELECT last_sequence FROM moved))[n] - following AS sequence,
         (ARRAY(SELECT version FROM moved))[n] - following AS version,
         (ARRAY(SELECT at FROM moved))[n] AS at
  FROM (SELECT *, array_position(ARRAY(SELECT id FROM moved), conversation_id) AS n
        FROM draft OFFSET 0) AS d
  WHERE n IS NOT NULL
),
stored AS (
  INSERT INTO messages (conversation_id, id, sequence, sender_id, role, content, metadata,
                        tokens_used, input_tokens, output_tokens, model, reply_to_message_id,
                        parent_message_id, sent_at, external_id, created_at, updated_at, search)
  SELECT conversation_id, id, sequence, sender_id, role, content, metadata::jsonb, tokens_used,
         input_tokens, output_tokens, model, reply_to_message_id, parent_message_id, sent_at,
         external_id, at, at, search::tsvector
  FROM kept
),
spoke AS MATERIALIZED (
  SELECT conversation_id, sender_id, max(sequence) AS sequence FROM kept
  WHERE sender_id IS NOT NULL GROUP BY conversation_id, sender_id
),
read AS (
  UPDATE participants p
  SET last_read_sequence = (SELECT s.sequence FROM spoke s
                            WHERE s.conversation_id = p.conversation_id AND s.sender_id = p.user_id)
  WHERE p.conversation_id = ANY(ARRAY(SELECT conversation_id FROM spoke))
    AND p.user_id = ANY(ARRAY(SELECT sender_id FROM spoke))
    AND p.last_read_sequence < (SELECT s.sequence FROM spoke s
                                WHERE s.conversation_id = p.conversation_id
                                  AND s.sender_id = p.user_id)
),
told AS (
  INSERT INTO events (conversation_id, version, era, type, committed_at, actor_id, sequence,
                      revision, user_id)
  SELECT conversation_id, version, (SELECT era FROM history), 'MESSAGE_CREATED', at, actor_id,
         sequence, 1, sender_id
  FROM kept
),
recorded AS (
  INSERT INTO requests (conversation_id, key, payload_hash, sequence, message_count)
  SELECT conversation_id, key, payload_hash, sequence, message_count FROM kept
  WHERE key IS NOT NULL
)
SELECT conversation_id, last_sequence, at, era, timeline,
       pg_current_xact_id_if_assigned()::text AS xid
FROM history
LEFT JOIN (SELECT id AS conversation_id, last_sequence, at FROM moved
           UNION ALL SELECT id, NULL, NULL FROM held WHERE NOT is_free) AS done ON true
"""

# The same for one message alone, which needs no sets: a fifth less for PostgreSQL to do.
WRITE_ONE, ALONE = with_named_arguments(
    f"""
WITH history AS MATERIALIZED ({HISTORY}),
held AS MATERIALIZED (SELECT pg_try_advisory_xact_lock(@lock) AS is_free),
moved AS (
  UPDATE conversations c
  SET (last_sequence, version, total_tokens_used, last_message_at, last_activity_at) =
    (SELECT c.last_sequence + 1, c.version + 1,
            c.total_tokens_used + COALESCE(@tokens_used, 0), now.at,
            greatest(c.last_activity_at, COALESCE(@sent_at, now.at))
     FROM (SELECT greatest(clock_timestamp(), c.last_message_at) AS at OFFSET 0) AS now)
  WHERE (SELECT is_free FROM held)
    AND c.id = @conversation_id
    AND c.version - c.last_sequence = @other_changes
    AND c.last_sequence = COALESCE(@expected_last_sequence, c.last_sequence)
    AND c.version = (SELECT s.version FROM conversations s WHERE s.id = @conversation_id)
    AND NOT EXISTS (SELECT FROM users u
                    WHERE u.id = COALESCE(@actor_id, @sender_id)
                      AND (u.revision <> @user_revision OR NOT u.is_active
                           OR u.deleted_at IS NOT NULL))
    AND NOT EXISTS (SELECT FROM requests r
                    WHERE r.conversation_id = @conversation_id AND r.key = @key)
    AND (@history IS NULL OR @history = (SELECT era || '/' || timeline FROM history))
  RETURNING c.last_sequence AS sequence, c.version, c.last_message_at AS at
),
stored AS (
  INSERT INTO messages (conversation_id, id, sequence, sender_id, role, content, metadata,
                        tokens_used, input_tokens, output_tokens, model, reply_to_message_id,
                        parent_message_id, sent_at, external_id, created_at, updated_at, search)
  SELECT @conversation_id, @id, sequence, @sender_id, @role, @content, @metadata::jsonb,
         @tokens_used, @input_tokens, @output_tokens, @model, @reply_to_message_id,
         @parent_message_id, @sent_at, @external_id, at, at, @search::tsvector
  FROM moved
),
read AS (
  UPDATE participants p SET last_read_sequence = (SELECT sequence FROM moved)
  WHERE p.conversation_id = @conversation_id AND p.user_id = @sender_id
    AND p.last_read_sequence < (SELECT sequence FROM moved)
),
told AS (
  INSERT INTO events (conversation_id, version, era, type, committed_at, actor_id, sequence,
                      revision, user_id)
  SELECT @conversation_id, version, (SELECT era FROM history), 'MESSAGE_CREATED', at, @actor_id,
         sequence, 1, @sender_id
  FROM moved
),
recorded AS (
  INSERT INTO requests (conversation_id, key, payload_hash, sequence, message_count)
  SELECT @conversation_id, @key, @payload_hash, sequence, 1 FROM moved
  WHERE @key IS NOT NULL
)
SELECT CASE WHEN moved.at IS NOT NULL OR NOT is_free THEN @conversation_id END AS conversation_id,
       sequence AS last_sequence, at, era, timeline, pg_current_xact_id_if_assigned()::text AS xid
FROM history CROSS JOIN held LEFT JOIN moved ON true
""",
    {"history": "text", **GROWTH, **DRAFT},
)
# From so many messages on they are a set.
SET_FROM = 2

# What WRITE would have answered, of those conversations where it took effect, by the last message
# of each.
WRITTEN = f"""
SELECT m.conversation_id, m.sequence AS last_sequence, m.created_at AS at, history.*, NULL AS xid
FROM unnest($1::uuid[], $2::uuid[]) AS k(conversation_id, id)
CROSS JOIN ({HISTORY}) AS history
{looked_up("messages", "m", "m.conversation_id = k.conversation_id AND m.id = k.id")}
WHERE m.id IS NOT NULL
"""

# What each asker may read of one message. No row where the conversation is missing or hidden, or
# the asker may not act; no message where that is missing or hidden.
FIND = f"""
SELECT k.position, c.deleted_at AS conversation_deleted_at, {MESSAGE}
FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::uuid[], $5::bigint[])
  WITH ORDINALITY AS k(conversation_id, slug, actor_id, id, sequence, position)
{looked_up("conversations", "c", f"c.id = COALESCE(k.conversation_id, {BY_SLUG})")}
{looked_up("participants", "p", "p.conversation_id = c.id AND p.user_id = k.actor_id")}
LEFT JOIN users a ON a.id = k.actor_id
LEFT JOIN LATERAL (
  SELECT * FROM messages m
  WHERE m.conversation_id = c.id
    AND m.sequence = COALESCE(k.sequence, (SELECT i.sequence FROM messages i
                                           WHERE i.conversation_id = c.id AND i.id = k.id
                                             AND k.id IS NOT NULL))
  OFFSET 0
) AS m ON m.sequence BETWEEN {FIRST} AND {LAST} OR m.id = {SHOWN}
WHERE c.id IS NOT NULL AND (k.actor_id IS NULL OR {SEES} AND {MAY_ACT})
"""

# Newest first: what the message says now, then what it said before.
REVISIONS = """
WITH said AS (
  SELECT revision, content, metadata, tokens_used,
         CASE WHEN revision = 1 THEN sender_id ELSE edited_by_user_id END AS editor_id,
         updated_at AS created_at
  FROM messages WHERE conversation_id = $1 AND id = $2 AND deleted_at IS NULL
  UNION ALL
  SELECT r.revision, r.content, r.metadata, r.tokens_used, r.editor_id, r.created_at
  FROM message_revisions r JOIN messages m ON m.conversation_id = r.conversation_id
    AND m.id = r.message_id AND m.deleted_at IS NULL
  WHERE r.conversation_id = $1 AND r.message_id = $2
),
page AS (
  SELECT *, octet_length(content) + pg_column_size(metadata) AS size
  FROM said WHERE $3::int IS NULL OR revision < $3 ORDER BY revision DESC LIMIT $4
),
sized AS (
  SELECT *, sum(size) OVER (ORDER BY revision DESC) - size AS before, count(*) OVER () AS found
  FROM page
)
SELECT revision, content, metadata, tokens_used, editor_id, created_at, found
FROM sized WHERE before <= $5 ORDER BY revision DESC
"""

# All that are there are told; of how many the contents are read, their size decides. OFFSET 0: each
# is looked up by its key. Planned for all calls at once, the conversation was read instead, and
# searched again for each of its messages.
FIND_MANY = f"""
WITH k AS (
  SELECT $4::bigint AS first_sequence, $5::bigint AS final_sequence, $6::uuid AS shown_message_id
),
named AS MATERIALIZED (
  SELECT i.id FROM messages i WHERE i.conversation_id = $1 AND i.id = ANY($2::uuid[])
  UNION
  SELECT s.id FROM messages s WHERE s.conversation_id = $1 AND s.sequence = ANY($3::bigint[])
),
found AS (
  SELECT m.id, m.sequence, sum(m.size) OVER (ORDER BY m.sequence) - m.size AS size_before
  FROM named
  CROSS JOIN k
  CROSS JOIN LATERAL (
    SELECT m.id, m.sequence, octet_length(m.content) + pg_column_size(m.metadata) AS size
    FROM messages m WHERE m.conversation_id = $1 AND m.id = named.id OFFSET 0
  ) AS m
  WHERE {readable("m", "k")}
)
SELECT f.id AS found_id, f.sequence AS found_sequence, {MESSAGE}
FROM found f
LEFT JOIN messages m ON m.conversation_id = $1 AND m.id = f.id AND f.size_before <= $7
ORDER BY f.sequence
"""

# Walks over what is the user's own or deleted, and stops at the first that is not.
FIRST_UNREAD = f"""
SELECT (SELECT m.sequence FROM messages m WHERE {IS_UNREAD} ORDER BY m.sequence LIMIT 1) AS sequence
FROM participants p
JOIN conversations c ON c.id = p.conversation_id
WHERE p.conversation_id = $1 AND p.user_id = $2
"""

# A page of each of many stretches. Put together as text: for SQLAlchemy to build it took ten times
# as long as to run it.
PAGES = f"""
SELECT position, found, message_state, {MESSAGE} FROM (
  SELECT k.position, c.message_state, page.*, count(*) OVER (PARTITION BY k.position) AS found,
         sum(size) OVER (PARTITION BY k.position ORDER BY sequence {{order}}) - size AS before
  FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::int[]) WITH ORDINALITY
    AS k(conversation_id, first_sequence, final_sequence, count, position)
  CROSS JOIN LATERAL (
    SELECT {MESSAGE_STATE} AS message_state FROM conversations c WHERE c.id = {{id}} OFFSET 0
  ) AS c
  CROSS JOIN LATERAL (
    SELECT m.*, octet_length(m.content) + pg_column_size(m.metadata) AS size
    FROM messages m
    WHERE m.conversation_id = {{id}} AND m.sequence BETWEEN {{first}} AND {{final}}{{where}}
    ORDER BY m.sequence {{order}} LIMIT {{limit}}
  ) AS page
) AS m
WHERE before <= $5 ORDER BY position, sequence {{order}}
"""

# One message to find: its conversation's id or slug, its id or sequence, and in between who asks
# (None: the system).
Key = tuple[UUID | str, UUID | None, Reference]

# The bounds of a page; those of a single one as the planner sees them.
OF_EACH = {
    "id": "k.conversation_id",
    "first": "k.first_sequence",
    "final": "k.final_sequence",
    "limit": "k.count",
}
OF_ONE = {
    "id": "($1::uuid[])[1]",
    "first": "($2::bigint[])[1]",
    "final": "($3::bigint[])[1]",
    "limit": "($4::int[])[1]",
}
# How many arguments PAGES has without filters.
PAGE_ARGUMENTS = 5


@dataclass(frozen=True, slots=True)
class Stored:
    """The messages just appended to a conversation: when they were made, and how far their numbers
    have moved, because others were quicker, from those that were decided on.
    """

    at: datetime
    moved_by: int


@dataclass(frozen=True, slots=True)
class Written:
    """What took effect, by conversation, and in which history of the database: its era and its
    timeline. Of the others, those whose locks were taken.
    """

    stored: Mapping[UUID, Stored]
    taken: frozenset[UUID] = frozenset()
    history: str = ""


@dataclass(frozen=True, slots=True)
class Stretch:
    """The messages of a conversation from one sequence to another, so many at the most."""

    conversation_id: UUID
    first: int
    final: int
    limit: int

    @classmethod
    def beyond(cls, view: Row, after: int | None, *, descending: bool, limit: int) -> Self:
        """What the view's asker may read, before or after one of them."""
        first, final = view["first_sequence"], view["final_sequence"]
        if after is not None:
            first, final = (
                (first, min(final, after - 1)) if descending else (max(first, after + 1), final)
            )
        return cls(view["id"], first, final, limit)


# Messages, and whether there are more.
Page = tuple[Sequence[Row], bool]


@dataclass(frozen=True, slots=True)
class Found:
    """Which messages of those asked for are there; of them by sequence, as many as fit."""

    ids: frozenset[UUID]
    sequences: frozenset[int]
    rows: Sequence[Row]


class Messages(Repository):
    async def load(self, items: list[Append]) -> dict[UUID, State]:
        """What decides about the items, by their conversations."""
        drafts = [(item, draft) for item in items for draft in item.drafts]
        rows = await self._connection.fetch(
            LOAD,
            [item.conversation_id for item, _ in drafts],
            [person_id(item, draft) for item, draft in drafts],
            [item.request.key if item.request else None for item, _ in drafts],
            [draft.external_id for _, draft in drafts],
            [_sequence(draft.reply_to) for _, draft in drafts],
            [_id(draft.reply_to) for _, draft in drafts],
            [_sequence(draft.parent) for _, draft in drafts],
            [_id(draft.parent) for _, draft in drafts],
        )
        states: dict[UUID, State] = {}
        for row in rows:
            item, draft = drafts[row["position"] - 1]
            exists = row["conversation_id"] is not None
            state = states.setdefault(
                item.conversation_id,
                State(row if exists else None, row["last_sequence"] or 0, row["version"] or 0),
            )
            if row["user_id"]:
                state.people[row["user_id"]] = row
            if row["payload_hash"] and item.request:
                state.requests[item.request.key] = {
                    "payload_hash": row["payload_hash"],
                    "sequence": row["request_sequence"],
                    "message_count": row["message_count"],
                }
            if row["external_id_holder"] and draft.external_id is not None:
                state.external_ids[draft.external_id] = row["external_id_holder"]
            if draft.reply_to is not None:
                _note(state, draft.reply_to, row["reply_by_id"] or row["reply_by_sequence"])
            if draft.parent is not None:
                _note(state, draft.parent, row["parent_by_id"] or row["parent_by_sequence"])
        return states

    async def history(self) -> str:
        """In which life of the database a version means something: its era and its timeline."""
        (row,) = await self._connection.fetch(HISTORY)
        return _history(row)

    async def write(
        self, accepted: list[tuple[Append, Accepted]], *, history: str | None = None
    ) -> Written:
        """Store what was accepted, of the conversations that are free and that only messages have
        changed since it was; each of them is all or nothing. Nothing where the database has another
        `history`.
        """
        groups: dict[UUID, list[Numbered]] = {}
        exact: set[UUID] = set()
        for item, each in accepted:
            groups.setdefault(item.conversation_id, []).extend(each.messages)
            if item.relies_on_numbers:
                exact.add(item.conversation_id)
        if not groups:
            return Written({})
        locks = [lock_of(conversation_id) for conversation_id in groups]
        lasts = [group[-1] for group in groups.values()]
        drafts = await _drafts(accepted, groups)
        growths = [_growth(id, group, id in exact) for id, group in groups.items()]
        evidence = Evidence(locks, WRITTEN, (list(groups), [last.id for last in lasts]))
        write = partial(self._connection.write, evidence=evidence)
        if len(drafts) < SET_FROM:
            values = {"history": history, **growths[0], **drafts[0]}
            rows = await write(WRITE_ONE, *map(values.get, ALONE))
        else:
            rows = await write(WRITE, _json(drafts), _json(growths), history)
        told = {row["conversation_id"]: row for row in rows if row["conversation_id"]}
        stored = {
            last.conversation_id: Stored(row["at"], row["last_sequence"] - last.sequence)
            for last in lasts
            if (row := told.get(last.conversation_id)) and row["at"]
        }
        return Written(stored, frozenset(told.keys() - stored.keys()), _history(rows[0]))

    async def find(self, keys: Sequence[Key]) -> list[Row | None]:
        """The message behind each key that its asker may read, in the same order."""
        return [row if row and row["id"] else None for row in await self.look_for(keys)]

    async def look_for(self, keys: Sequence[Key]) -> list[Row | None]:
        """The same, with `conversation_deleted_at`; all else is None where there is no message, and
        the row is None where there is no conversation.
        """
        found: list[Row | None] = [None] * len(keys)
        rows = await self._connection.fetch(
            FIND,
            [named if isinstance(named, UUID) else None for named, _, _ in keys],
            [named if isinstance(named, str) else None for named, _, _ in keys],
            [actor_id for _, actor_id, _ in keys],
            [_id(key) for _, _, key in keys],
            [_sequence(key) for _, _, key in keys],
        )
        for row in rows:
            found[row["position"] - 1] = row
        return found

    async def find_many(
        self, view: Row, *, ids: Sequence[UUID], sequences: Sequence[int], byte_limit: int
    ) -> Found:
        """Of these messages, those that the view's asker may read; each once.

        Stops after the one whose content passes `byte_limit`.
        """
        rows = await self._connection.fetch(
            FIND_MANY,
            view["id"],
            ids,
            sequences,
            view["first_sequence"],
            view["final_sequence"],
            view["shown_message_id"],
            byte_limit,
        )
        return Found(
            frozenset(row["found_id"] for row in rows),
            frozenset(row["found_sequence"] for row in rows),
            [row for row in rows if row["id"]],
        )

    async def first_unread(self, view: Row) -> int | None:
        """The sequence of the first message that the view's asker has not read."""
        rows = await self._connection.fetch(FIRST_UNREAD, view["id"], view["actor_id"])
        sequence = rows[0]["sequence"] if rows else None
        # What came after the view was made is not in it.
        return sequence if sequence and sequence <= view["final_sequence"] else None

    async def edit(
        self, message: Row, changes: Row, *, after_version: int, actor_id: UUID | None
    ) -> None:
        """Store new values; what they replace is kept. The difference in tokens is counted."""
        await self._connection.execute(
            insert(revisions).values(
                conversation_id=message["conversation_id"],
                message_id=message["id"],
                revision=message["revision"],
                content=message["content"],
                metadata=message["metadata"],
                tokens_used=message["tokens_used"],
                editor_id=editor_of(message),
                created_at=message["updated_at"],
            )
        )
        values = {
            **changes,
            "revision": message["revision"] + 1,
            "edited_by_user_id": actor_id,
            "updated_at": func.clock_timestamp(),
        }
        if "content" in changes:
            words = search.vector(changes["content"], message["conversation_id"])
            values["search"] = cast(words, TSVECTOR)
        edited = {**message, **values}
        await self._change(
            edited,
            values,
            EventType.MESSAGE_UPDATED,
            after_version=after_version,
            actor_id=actor_id,
            more_tokens=(edited["tokens_used"] or 0) - (message["tokens_used"] or 0),
        )

    async def revisions(
        self, message: Row, *, after: int | None, limit: int, byte_limit: int
    ) -> tuple[Sequence[Row], bool]:
        """At most `limit` revisions of the message, newest first, beyond `after`, and whether there
        are more; of a deleted message none. Stops before a page whose content passes `byte_limit`.
        """
        rows = await self._connection.fetch(
            REVISIONS, message["conversation_id"], message["id"], after, limit + 1, byte_limit
        )
        more = len(rows) > limit or (len(rows) > 0 and len(rows) < rows[0]["found"])
        return rows[:limit], more

    async def delete(self, message: Row, *, after_version: int, actor_id: UUID | None) -> None:
        """Make it a tombstone; what it said stays beneath, and so does what it cost."""
        mark = {"deleted_at": func.clock_timestamp(), "deleted_by_user_id": actor_id}
        await self._mark(message, mark, EventType.MESSAGE_DELETED, after_version, actor_id)

    async def undelete(self, message: Row, *, after_version: int, actor_id: UUID | None) -> None:
        mark = {"deleted_at": None, "deleted_by_user_id": None}
        await self._mark(message, mark, EventType.MESSAGE_UNDELETED, after_version, actor_id)

    async def _mark(
        self,
        message: Row,
        mark: dict[str, Any],
        type: EventType,
        after_version: int,
        actor_id: UUID | None,
    ) -> None:
        values = {**mark, "mark_count": messages.c.mark_count + 1}
        await self._change(message, values, type, after_version=after_version, actor_id=actor_id)

    async def _change(
        self,
        message: Row,
        values: Mapping[str, Any],
        type: EventType,
        *,
        after_version: int,
        actor_id: UUID | None,
        more_tokens: int = 0,
    ) -> None:
        conversation_id = message["conversation_id"]
        await self._connection.execute(
            update(messages)
            .where(messages.c.conversation_id == conversation_id, messages.c.id == message["id"])
            .values(**values)
        )
        await self._connection.execute(
            update(conversations)
            .where(conversations.c.id == conversation_id)
            .values(
                version=after_version + 1,
                message_changes=conversations.c.message_changes + 1,
                total_tokens_used=conversations.c.total_tokens_used + more_tokens,
            )
        )
        told = Fact(
            type=type,
            actor_id=actor_id,
            sequence=message["sequence"],
            revision=message["revision"],
        )
        await Events(self._connection).record(
            conversation_id=conversation_id, after_version=after_version, facts=[told]
        )

    async def pages(
        self,
        stretches: Sequence[Stretch],
        *arguments: object,
        descending: bool,
        byte_limit: int,
        where: str = "",
        replan: bool = False,
    ) -> list[Page]:
        """The messages of each stretch, and whether there are more than its limit.

        A page stops before its content passes `byte_limit`: a thousand messages may hold a quarter
        of a gigabyte, and none of it should leave the database for nothing.
        """
        order = "DESC" if descending else "ASC"
        bounds = OF_ONE if len(stretches) == 1 else OF_EACH
        rows = await self._connection.fetch(
            PAGES.format(where=where, order=order, **bounds),
            [stretch.conversation_id for stretch in stretches],
            [stretch.first for stretch in stretches],
            [stretch.final for stretch in stretches],
            [stretch.limit + 1 for stretch in stretches],
            byte_limit,
            *arguments,
            replan=replan,
        )
        found: list[list[Row]] = [[] for _ in stretches]
        for row in rows:
            found[row["position"] - 1].append(row)
        return [
            (
                page[: stretch.limit],
                len(page) > 0 and page[0]["found"] > min(len(page), stretch.limit),
            )
            for stretch, page in zip(stretches, found, strict=True)
        ]

    async def list(
        self,
        stretch: Stretch,
        *,
        descending: bool,
        byte_limit: int,
        sender_id: UUID | None = None,
        external_id: str | None = None,
        roles: Sequence[str] = (),
        statuses: Sequence[str] = (),
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        metadata_contains: str = "{}",
    ) -> Page:
        """The messages of the stretch that pass the filters."""
        arguments: list[object] = []

        def given(value: object) -> str:
            arguments.append(value)
            return f"${PAGE_ARGUMENTS + len(arguments)}"

        where = []
        if sender_id:
            where.append(f"m.sender_id = {given(sender_id)}")
        if external_id:
            where.append(f"m.external_id = {given(external_id)}")
        if roles:
            where.append(f"m.role = ANY({given(roles)}::text[])")
        if statuses:
            where.append(f"m.status = ANY({given(statuses)}::text[])")
        if created_after:
            where.append(f"m.created_at >= {given(created_after)}")
        if created_before:
            where.append(f"m.created_at < {given(created_before)}")
        if metadata_contains != "{}":
            # What is deleted is not shown, so it must not be found by its contents either.
            where.append(
                f"{HAS_METADATA} AND m.metadata @> {given(metadata_contains)}::text::jsonb"
                " AND m.deleted_at IS NULL"
            )
        (page,) = await self.pages(
            [stretch],
            *arguments,
            descending=descending,
            byte_limit=byte_limit,
            where="".join(f" AND {each}" for each in where),
            replan=metadata_contains != "{}",
        )
        return page


async def _drafts(
    accepted: list[tuple[Append, Accepted]], groups: Mapping[UUID, list[Numbered]]
) -> list[dict[str, object]]:
    """The messages to be stored, the first one of a request with that."""
    rows = [message for _, each in accepted for message in each.messages]
    words = iter(await _words(rows))
    drafts = []
    for item, each in accepted:
        request = item.request
        last_sequence = groups[item.conversation_id][-1].sequence
        for message in each.messages:
            draft = _draft(message, next(words), following=last_sequence - message.sequence)
            if request:
                draft["key"], draft["payload_hash"] = request.key, request.payload_hash
                draft["message_count"] = len(each.messages)
                request = None
            drafts.append(draft)
    return drafts


def _draft(message: Numbered, words: str, *, following: int) -> dict[str, object]:
    draft = message.draft
    return {
        "conversation_id": message.conversation_id,
        "id": message.id,
        "following": following,
        "actor_id": message.actor_id,
        "sender_id": draft.sender_id,
        "user_revision": message.user_revision,
        "role": draft.role,
        "content": draft.content,
        "metadata": draft.metadata,
        "tokens_used": draft.tokens_used,
        "input_tokens": draft.input_tokens,
        "output_tokens": draft.output_tokens,
        "model": draft.model,
        "reply_to_message_id": message.reply_to_message_id,
        "parent_message_id": message.parent_message_id,
        "sent_at": draft.sent_at,
        "external_id": draft.external_id,
        "search": words,
    }


def _growth(conversation_id: UUID, group: list[Numbered], exact: bool) -> dict[str, object]:
    """What the messages of one conversation do to it. `exact`: with just the numbers that they were
    given.
    """
    first = group[0]
    sent = [message.draft.sent_at for message in group]
    return {
        "id": conversation_id,
        "lock": lock_of(conversation_id),
        "other_changes": first.version - first.sequence,
        "expected_last_sequence": first.sequence - 1 if exact else None,
        "message_count": len(group),
        "tokens_used": sum(message.draft.tokens_used or 0 for message in group),
        "sent_at": max(filter(None, sent), default=None),
        "is_sent_now": None in sent,
    }


def _history(row: Row) -> str:
    return f"{row['era']}/{row['timeline']}"


def _json(rows: list[dict[str, object]]) -> str:
    return orjson.dumps(rows, default=_text).decode()


def _text(value: object) -> str:
    """As PostgreSQL reads it: a UUID of the driver's, or bytes."""
    return f"\\x{value.hex()}" if isinstance(value, bytes) else str(value)


async def _words(rows: list[Numbered]) -> list[str]:
    """The entry of each message in the search index."""

    def make() -> list[str]:
        return [search.vector(row.draft.content, row.conversation_id) for row in rows]

    if sum(len(row.draft.content) for row in rows) < search.LONG_TEXT:
        return make()
    return await asyncio.to_thread(make)


def _sequence(reference: Reference | None) -> int | None:
    return reference if isinstance(reference, int) else None


def _id(reference: Reference | None) -> UUID | None:
    return reference if isinstance(reference, UUID) else None


def _note(state: State, reference: Reference, found: Any) -> None:
    if found is not None:
        state.messages[reference] = (found[0], found[1])
