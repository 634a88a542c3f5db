from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self
from uuid import UUID

from service.repositories.base import Repository, Row, columns_of, part
from service.repositories.visibility import END, LAST, MAY_ACT, SEES, SHOWN, UNREAD

# The activity of what the first page saw of a conversation. Its events tell what that was; a clock
# does not, since what is older may commit later. The latest is looked for among the last hundred
# messages: only older ones brought in out of order, more than that and after it, would hide it.
SEEN = """
SELECT max(COALESCE(m.sent_at, m.created_at))
FROM (
  SELECT m.sent_at, m.created_at FROM messages m
  WHERE m.conversation_id = c.id AND m.sequence <= (
    SELECT e.sequence FROM events e
    WHERE e.conversation_id = c.id AND e.type = 'MESSAGE_CREATED'
      AND pg_visible_in_snapshot(e.xid, k.snapshot::pg_snapshot)
    ORDER BY e.version DESC LIMIT 1
  )
  ORDER BY m.sequence DESC LIMIT 100
) AS m
"""

# When a conversation that the user is in was last active.
#
# On later pages it stands where the first one saw it, though it has new messages: otherwise it
# would jump over the pages to come, and be missed. A minute is longer than any transaction lasts:
# one that is older than that is certain to have been seen.
ACTIVE = f"""
CASE WHEN c.last_message_at > k.read_at - interval '1 minute' THEN COALESCE(({SEEN}), c.created_at)
     ELSE COALESCE(c.last_activity_at, c.created_at) END
"""

# The user's own rows. OFFSET 0: looked up, whatever the planner believes of the tables.
OWN = "SELECT * FROM participants s WHERE s.user_id = k.actor_id OFFSET 0"

# Where the asker stands in the conversation, beside its own columns.
STANDING = ("actor_id", "status", "joined_at", "final_sequence")

# Two passes: the first puts the user's conversations in order, the second reads what a page of them
# shows. It sums up what they hold, so that no page leaves the database that is too big to send.
#
# MATERIALIZED: what is asked for is hidden from the planner. One plan serves for all, and it is not
# made anew for each call, which took longer than most inboxes do.
#
# What the user is in is found by ANY, in one pass through the index: a thousand look-ups took three
# times as long.
LIST = f"""
WITH k AS MATERIALIZED (
  SELECT $1::uuid AS actor_id, $2::timestamptz AS read_at, $3::text AS snapshot,
         $4::timestamptz AS active_at, $5::uuid AS conversation_id, $6::text[] AS statuses,
         $7::bool AS is_active, NULLIF($8::text::jsonb, '{{}}') AS metadata,
         NULLIF(lower($9::text), '') AS title, $10::bool AS unread_only,
         $11::bigint AS row_limit, $12::bigint AS byte_limit
),
line AS MATERIALIZED (
  SELECT l.* FROM k CROSS JOIN LATERAL (
    SELECT c.id AS conversation_id, {ACTIVE} AS active_at
    FROM conversations c
    WHERE c.id = ANY(ARRAY(SELECT p.conversation_id FROM k CROSS JOIN LATERAL ({OWN}) AS p
                           WHERE p.status = 'JOINED' AND 'JOINED' = ANY(k.statuses)
                             AND NOT k.unread_only))
      AND c.deleted_at IS NULL
      AND (k.is_active IS NULL OR c.is_active = k.is_active)
      AND (k.metadata IS NULL OR c.metadata @> k.metadata)
      AND (k.title IS NULL OR strpos(lower(c.title), k.title) > 0)
    UNION ALL
    -- The others need the user's own row as well. What happens where the user is not in now is not
    -- told, not even by its place: it stands where its invitation, leave or removal put it. Nor may
    -- a filter tell.
    SELECT p.conversation_id, CASE WHEN p.status = 'JOINED' THEN {ACTIVE} ELSE p.status_at END
    FROM ({OWN}) AS p
    CROSS JOIN LATERAL (SELECT * FROM conversations s WHERE s.id = p.conversation_id OFFSET 0) AS c
    WHERE (k.unread_only OR k.statuses <> '{{JOINED}}')
      AND (k.unread_only OR p.status <> 'JOINED')
      AND p.status = ANY(k.statuses) AND {SEES} AND c.deleted_at IS NULL
      AND (k.is_active IS NULL OR (p.status = 'JOINED' AND c.is_active = k.is_active))
      AND (k.metadata IS NULL OR (p.status = 'JOINED' AND c.metadata @> k.metadata))
      AND (k.title IS NULL OR strpos(lower(c.title), k.title) > 0)
      AND (NOT k.unread_only OR {UNREAD} > 0)
  ) AS l
  WHERE k.active_at IS NULL OR (l.active_at, l.conversation_id) < (k.active_at, k.conversation_id)
  ORDER BY l.active_at DESC, l.conversation_id DESC
  LIMIT (SELECT row_limit FROM k)
)
SELECT * FROM (
  SELECT *, sum(size) OVER (ORDER BY active_at DESC, conversation_id DESC) - size AS size_before,
         count(*) OVER () AS found
  FROM (
    SELECT l.active_at, now() AS read_at, pg_current_snapshot()::text AS snapshot,
           {columns_of("participants", "p")}, a.username, {MAY_ACT} AS may_act,
           {columns_of("conversations", "c", prefix="c_")},
           k.actor_id AS c_actor_id, p.status AS c_status, p.joined_at AS c_joined_at,
           {LAST} AS c_final_sequence,
           {columns_of("messages", "m", prefix="m_")},
           {UNREAD} AS unread_count,
           pg_column_size(c.metadata)
             + COALESCE(octet_length(m.content) + pg_column_size(m.metadata), 0) AS size
    FROM k
    CROSS JOIN line l
    CROSS JOIN LATERAL (
      SELECT * FROM participants s
      WHERE s.conversation_id = l.conversation_id AND s.user_id = k.actor_id OFFSET 0
    ) AS p
    CROSS JOIN LATERAL (
      SELECT * FROM conversations s
      WHERE s.id = l.conversation_id OFFSET 0
    ) AS c
    CROSS JOIN LATERAL (SELECT * FROM users s WHERE s.id = k.actor_id OFFSET 0) AS a
    LEFT JOIN LATERAL (
      SELECT * FROM messages s
      WHERE s.conversation_id = c.id AND s.sequence = greatest(
        CASE WHEN {END} >= p.visible_from_sequence THEN {END} END,
        (SELECT i.sequence FROM messages i WHERE i.conversation_id = c.id AND i.id = {SHOWN})
      ) OFFSET 0
    ) AS m ON true
  ) AS page
) AS sized
WHERE size_before <= (SELECT byte_limit FROM k)
ORDER BY active_at DESC, conversation_id DESC
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page ended, and what the first page saw: all later ones show that order."""

    read_at: datetime
    snapshot: str
    active_at: datetime
    conversation_id: UUID

    @classmethod
    def of(cls, position: Sequence[str | int]) -> Self:
        read_at, snapshot, active_at, conversation_id = map(str, position)
        return cls(
            datetime.fromisoformat(read_at),
            snapshot,
            datetime.fromisoformat(active_at),
            UUID(conversation_id),
        )

    def position(self) -> list[str | int]:
        """What `of` makes a place from."""
        return [
            self.read_at.isoformat(),
            self.snapshot,
            self.active_at.isoformat(),
            str(self.conversation_id),
        ]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an inbox."""

    conversation: Row
    participant: Row
    last_message: Row | None
    unread_count: int
    place: Place
    # Whether the user whose inbox it is may act.
    may_act: bool


class Inbox(Repository):
    async def list(
        self,
        user_id: UUID,
        *,
        statuses: Sequence[str],
        is_active: bool | None = None,
        metadata_contains: str = "{}",
        title_contains: str = "",
        unread_only: bool = False,
        after: Place | None,
        limit: int,
        byte_limit: int,
    ) -> tuple[Sequence[Line], bool]:
        """The user's conversations that are not deleted, as it sees them, the latest active first:
        at most `limit`, and whether there are more. Stops after the one that passes `byte_limit`.
        """
        rows = await self._connection.fetch(
            LIST,
            user_id,
            after.read_at if after else None,
            after.snapshot if after else None,
            after.active_at if after else None,
            after.conversation_id if after else None,
            statuses,
            is_active,
            metadata_contains,
            title_contains,
            unread_only,
            limit + 1,
            byte_limit,
        )
        more = len(rows) > limit or (len(rows) > 0 and len(rows) < rows[0]["found"])
        return [_line(row, after) for row in rows[:limit]], more


def _line(row: Row, after: Place | None) -> Line:
    conversation = part(row, "c_", "conversations", *STANDING)
    assert conversation is not None
    return Line(
        conversation=conversation,
        participant=row,
        last_message=part(row, "m_", "messages"),
        unread_count=row["unread_count"],
        place=Place(
            after.read_at if after else row["read_at"],
            after.snapshot if after else row["snapshot"],
            row["active_at"],
            row["conversation_id"],
        ),
        may_act=row["may_act"],
    )
