"""Searching what was said.

A page is looked for in two places. First among the newest messages: a common word soon fills a
page there, and its many other places need not be found to be sorted. If that is not enough, the
index knows all places of words that are rarer than that. Either way what is found is shown only
through the one predicate that every read goes through.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from service.repositories.base import Repository, Row, columns_of
from service.repositories.visibility import FIRST, LAST, SEES, SHOWN, readable
from service.rules.search import vector

# How many of the newest messages are looked at before the index is asked.
NEWEST = 2_000
# Who is in more conversations than that is looked for everywhere at once.
MAX_CONVERSATIONS = 1_000

# What stands for a conversation in the index: see `key_of` in rules/search.py.
KEY = "'#' || right(s.conversation_id::text, 12)"

# Newest first, over all conversations. In one of them that is the order of sequences.
ORDER = "m.created_at DESC, m.conversation_id DESC, m.sequence DESC"

# What is needed of a candidate to tell whether it is shown.
CANDIDATE = "m.conversation_id, m.id, m.sequence, m.created_at, m.sender_id, m.role"

# $1 the actor, $2 the one conversation, $3 the query; $4 to $6 the place of the last one seen;
# $7 to $10 the filters; $11 how many, and $12 how many bytes, at the most. How many candidates
# there are PostgreSQL cannot know beforehand: LIMIT 1 keeps it from reading all conversations, or
# all messages, where it expects many.
FOUND = f"""
windows AS MATERIALIZED (
  SELECT m.conversation_id, w.*
  FROM (SELECT DISTINCT conversation_id FROM candidate) AS m
  CROSS JOIN LATERAL (
    SELECT {FIRST} AS first_sequence, {LAST} AS final_sequence, {SHOWN} AS shown_message_id
    FROM (SELECT $1::uuid AS actor_id) AS k
    JOIN conversations c ON c.id = m.conversation_id
    LEFT JOIN participants p ON p.conversation_id = c.id AND p.user_id = k.actor_id
    WHERE c.deleted_at IS NULL AND (k.actor_id IS NULL OR {SEES})
    LIMIT 1) AS w
),
found AS MATERIALIZED (
  SELECT m.conversation_id, m.id
  FROM candidate m JOIN windows w ON w.conversation_id = m.conversation_id
  WHERE ($2::uuid IS NULL OR m.conversation_id = $2)
    AND ($4::timestamptz IS NULL
         OR (m.created_at, m.conversation_id, m.sequence) < ($4, $5::uuid, $6::bigint))
    AND ($7::uuid IS NULL OR m.sender_id = $7)
    AND (cardinality($8::text[]) = 0 OR m.role = ANY ($8))
    AND ($9::timestamptz IS NULL OR m.created_at >= $9)
    AND ($10::timestamptz IS NULL OR m.created_at < $10)
    AND {readable("m", "w")}
  ORDER BY {ORDER}
  LIMIT $11
),
page AS (
  SELECT m.* FROM found f CROSS JOIN LATERAL (
    SELECT {columns_of("messages", "m")},
           octet_length(m.content) + pg_column_size(m.metadata) AS size
    FROM messages m
    WHERE m.conversation_id = f.conversation_id AND m.id = f.id
    LIMIT 1) AS m
),
sized AS (
  SELECT *, sum(size) OVER (ORDER BY {ORDER}) - size AS before, count(*) OVER () AS found
  FROM page m
)
"""

# What the newest messages hold; $13 where they begin.
AMONG = f"""
candidate AS (SELECT * FROM newest WHERE matches), {FOUND}
SELECT m.*, looked_at
FROM (SELECT count(*) AS looked_at FROM newest) AS n
LEFT JOIN (SELECT * FROM sized WHERE before <= $12) AS m ON true
ORDER BY {ORDER}
"""
MATCHES = "m.deleted_at IS NULL AND m.search @@ $3::tsquery AS matches"

NEWEST_IN_ONE = f"""
WITH newest AS MATERIALIZED (
  SELECT {CANDIDATE}, {MATCHES} FROM messages m
  WHERE m.conversation_id = $2 AND m.sequence < COALESCE($6::bigint, $13)
  ORDER BY m.sequence DESC LIMIT {NEWEST}
), {AMONG}"""

NEWEST_OF_ALL = f"""
WITH newest AS MATERIALIZED (
  SELECT {CANDIDATE}, {MATCHES} FROM messages m
  WHERE (m.created_at, m.conversation_id, m.sequence)
    < (least($4::timestamptz, $10::timestamptz, 'infinity'),
       COALESCE($5::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff'),
       COALESCE($6::bigint, $13))
  ORDER BY {ORDER} LIMIT {NEWEST}
), {AMONG}"""

# All that the index knows of, conversation by conversation: $13 which. Behind OFFSET 0 nothing but
# the index can find them. (One look for all conversations at once asks of every place that any of
# them has whether it is one of a thousand: of 900 conversations it took 900 ms, and this 80.)
IN_EACH = f"""
WITH candidate AS MATERIALIZED (
  SELECT m.* FROM unnest($13::uuid[]) AS s(conversation_id)
  JOIN LATERAL (
    SELECT {CANDIDATE} FROM messages m
    WHERE m.search @@ ($3::tsquery && quote_literal({KEY})::tsquery) AND m.deleted_at IS NULL
    OFFSET 0) AS m ON m.conversation_id = s.conversation_id
), {FOUND}
SELECT * FROM sized m WHERE before <= $12 ORDER BY {ORDER}
"""
EVERYWHERE = f"""
WITH candidate AS MATERIALIZED (
  SELECT {CANDIDATE} FROM messages m WHERE m.search @@ $3::tsquery AND m.deleted_at IS NULL
), {FOUND}
SELECT * FROM sized m WHERE before <= $12 ORDER BY {ORDER}
"""

OWN = f"SELECT p.conversation_id FROM participants p WHERE p.user_id = $1 AND {SEES} LIMIT $2"

UNINDEXED = """
SELECT conversation_id, id, content FROM messages WHERE search IS NULL
ORDER BY conversation_id, id LIMIT $1 FOR NO KEY UPDATE SKIP LOCKED
"""
INDEX = """
UPDATE messages m SET search = k.search::tsvector
FROM unnest($1::uuid[], $2::uuid[], $3::text[]) AS k(conversation_id, id, search)
WHERE m.conversation_id = k.conversation_id AND m.id = k.id
"""

# A message's place: (created_at, conversation_id, sequence).
Place = tuple[datetime, UUID, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is searched for, and among what."""

    # As PostgreSQL reads a tsquery.
    query: str
    actor_id: UUID | None
    # One conversation as the actor sees it; None: all that it sees.
    view: Row | None
    sender_id: UUID | None = None
    roles: Sequence[str] = ()
    created_after: datetime | None = None
    created_before: datetime | None = None


class Search(Repository):
    async def find(
        self, wanted: Wanted, *, after: Place | None, limit: int, byte_limit: int
    ) -> tuple[Sequence[Row], bool]:
        """At most `limit` messages, newest first, from beyond `after` on, and whether there are
        more. Stops before a page whose content passes `byte_limit`.
        """
        if not wanted.query:
            return [], False
        arguments = [
            wanted.actor_id,
            wanted.view["id"] if wanted.view else None,
            wanted.query,
            *(after or (None, None, None)),
            wanted.sender_id,
            wanted.roles,
            wanted.created_after,
            wanted.created_before,
            limit + 1,
            byte_limit,
        ]
        newest = NEWEST_IN_ONE if wanted.view else NEWEST_OF_ALL
        rows = await self._connection.fetch(newest, *arguments, _beyond(wanted.view))
        looked_at = rows[0]["looked_at"]
        rows = [row for row in rows if row["id"]]
        if looked_at == NEWEST and not (rows and rows[0]["found"] > limit):
            ids = await self._conversations(wanted)
            if ids is None:
                rows = await self._connection.fetch(EVERYWHERE, *arguments)
            else:
                rows = await self._connection.fetch(IN_EACH, *arguments, ids)
        more = bool(rows) and (len(rows) > limit or len(rows) < rows[0]["found"])
        return rows[:limit], more

    async def _conversations(self, wanted: Wanted) -> list[UUID] | None:
        """Where to look; None where that is not worth telling."""
        if wanted.view:
            return [wanted.view["id"]]
        if wanted.actor_id is None:
            return None
        rows = await self._connection.fetch(OWN, wanted.actor_id, MAX_CONVERSATIONS + 1)
        return [row["conversation_id"] for row in rows] if len(rows) <= MAX_CONVERSATIONS else None

    async def index(self, limit: int) -> int:
        """Index messages that were stored without their words, `limit` at most; returns how many.

        Waits for nobody: one that is being changed is indexed by that, or comes next time.
        """
        rows = await self._connection.fetch(UNINDEXED, limit)
        if not rows:
            return 0
        await self._connection.fetch(
            INDEX,
            [row["conversation_id"] for row in rows],
            [row["id"] for row in rows],
            [vector(row["content"], row["conversation_id"]) for row in rows],
        )
        return len(rows)


def _beyond(view: Row | None) -> int:
    """The sequence before which the newest messages begin; what an invitation shows may be any."""
    if view is None or view["shown_message_id"]:
        return 2**63 - 1
    sequence: int = view["final_sequence"]
    return sequence + 1
