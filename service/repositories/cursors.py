from collections.abc import Sequence
from uuid import UUID

from service.repositories.base import Repository, Row, columns_of, looked_up
from service.repositories.visibility import FIRST, LAST, SEES, SHOWN, UNREAD, readable
from service.rules.cursors import Moved, Outcome, Reading, State, Unmoved, decide

# All that the decisions need, one row an item. Each part is a look-up by a unique key.
LOAD = f"""
SELECT k.position, c.id AS conversation_id, c.last_sequence, c.version, c.deleted_at,
       u.id AS user_id, u.username, p.status, p.role, p.last_read_sequence,
       COALESCE({SEES}, false) AS sees, r.payload_hash, r.subject_id,
       (SELECT m.sequence FROM messages m
        WHERE m.conversation_id = c.id AND m.id = k.message_id
          AND k.message_id IS NOT NULL AND {readable("m", "w")})
         AS message_sequence
FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::bytea[], $5::uuid[]) WITH ORDINALITY
  AS k(conversation_id, actor_id, user_id, request_key, message_id, position)
LEFT JOIN conversations c ON c.id = k.conversation_id
LEFT JOIN users u ON u.id = k.user_id
{looked_up("participants", "p", "p.conversation_id = c.id AND p.user_id = k.user_id")}
{looked_up("requests", "r", "r.conversation_id = c.id AND r.key = k.request_key")}
CROSS JOIN LATERAL (SELECT {FIRST} AS first_sequence, {LAST} AS final_sequence,
                           {SHOWN} AS shown_message_id) AS w
"""

# What is read is no change of the participant: its revision stays, and so does its etag. As to ANY
# and the subqueries, see the messages.
WRITE = """
WITH move AS MATERIALIZED (
  SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::bigint[], $5::bigint[])
    AS k(conversation_id, user_id, actor_id, sequence, version)
),
moved AS (
  UPDATE participants p
  SET last_read_sequence = (SELECT max(m.sequence) FROM move m
                            WHERE m.conversation_id = p.conversation_id AND m.user_id = p.user_id)
  WHERE p.conversation_id = ANY($1::uuid[]) AND p.user_id = ANY($2::uuid[])
    AND (SELECT count(*) FROM move m
         WHERE m.conversation_id = p.conversation_id AND m.user_id = p.user_id) > 0
),
counted AS (
  UPDATE conversations c
  SET version = (SELECT max(m.version) FROM move m WHERE m.conversation_id = c.id)
  WHERE c.id = ANY($1::uuid[])
),
told AS (
  INSERT INTO events (conversation_id, version, era, type, actor_id, sequence, user_id)
  SELECT conversation_id, version, (SELECT max(era) FROM eras), 'READ_CURSOR_MOVED', actor_id,
         sequence, user_id
  FROM move
)
INSERT INTO requests (conversation_id, key, payload_hash, subject_id)
SELECT * FROM unnest($6::uuid[], $7::bytea[], $8::bytea[], $9::uuid[])
"""

FIND = f"""
SELECT {columns_of("participants", "p")}, u.username, {UNREAD} AS unread_count
FROM (SELECT DISTINCT * FROM unnest($1::uuid[], $2::uuid[]) AS k(conversation_id, user_id)) AS k
JOIN participants p ON p.conversation_id = k.conversation_id AND p.user_id = k.user_id
  AND p.conversation_id = ANY($1::uuid[]) AND p.user_id = ANY($2::uuid[])
JOIN conversations c ON c.id = p.conversation_id AND c.id = ANY($1::uuid[])
JOIN users u ON u.id = p.user_id AND u.id = ANY($2::uuid[])
"""

# (conversation's id, user's id)
Key = tuple[UUID, UUID]


class Cursors(Repository):
    """How far the participants have read."""

    async def move(self, items: list[Reading]) -> list[Outcome]:
        """Move cursors in any number of conversations whose locks are held: one outcome an item."""
        outcomes = decide(items, await self._load(items))
        await self._write(items, outcomes)
        return outcomes

    async def find(self, keys: Sequence[Key]) -> dict[Key, Row]:
        """The participant of each (conversation, user), and how many messages it has not read."""
        rows = await self._connection.fetch(
            FIND,
            [conversation_id for conversation_id, _ in keys],
            [user_id for _, user_id in keys],
        )
        return {(row["conversation_id"], row["user_id"]): row for row in rows}

    async def _load(self, items: list[Reading]) -> dict[UUID, State]:
        rows = await self._connection.fetch(
            LOAD,
            [item.conversation_id for item in items],
            [item.actor_id for item in items],
            [item.actor_id or item.user_id for item in items],
            [item.request.key if item.request else None for item in items],
            [item.key if isinstance(item.key, UUID) else None for item in items],
        )
        states: dict[UUID, State] = {}
        for row in rows:
            item = items[row["position"] - 1]
            exists = row["conversation_id"] is not None
            state = states.setdefault(
                item.conversation_id, State(row if exists else None, row["version"] or 0)
            )
            if row["user_id"]:
                state.people[row["user_id"]] = row
                state.cursors[row["user_id"]] = row["last_read_sequence"] or 0
            if row["payload_hash"] and item.request:
                state.requests[item.request.key] = row
            if row["message_sequence"] and isinstance(item.key, UUID):
                state.messages[item.actor_id, item.key] = row["message_sequence"]
        return states

    async def _write(self, items: list[Reading], outcomes: list[Outcome]) -> None:
        moves = [
            (item, outcome)
            for item, outcome in zip(items, outcomes, strict=True)
            if isinstance(outcome, Moved)
        ]
        requests = [
            (item.conversation_id, item.request, outcome.user_id)
            for item, outcome in zip(items, outcomes, strict=True)
            if item.request and isinstance(outcome, Moved | Unmoved)
        ]
        if not moves and not requests:
            return
        await self._connection.fetch(
            WRITE,
            [item.conversation_id for item, _ in moves],
            [move.user_id for _, move in moves],
            [item.actor_id for item, _ in moves],
            [move.sequence for _, move in moves],
            [move.version for _, move in moves],
            [conversation_id for conversation_id, _, _ in requests],
            [request.key for _, request, _ in requests],
            [request.payload_hash for _, request, _ in requests],
            [user_id for _, _, user_id in requests],
        )
