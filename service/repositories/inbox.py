from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self
from uuid import UUID

from service.repositories.base import Repository, Row, columns_of, part
from service.repositories.visibility import END, LAST, SEES, SHOWN, UNREAD

# When a line was last active. Of a conversation that the user is not in now, what happens there is
# not told, not even by its place: it stands where its invitation, leave or removal put it.
#
# On later pages ($2 is when the first one was read, $3 the snapshot that it saw) a conversation
# stands where it stood then, though it has new messages: otherwise it would jump over the pages to
# come, and be missed. Its events tell which messages the first page saw; a clock does not, since
# what is older may commit later. The latest of them is looked for among the last hundred: only
# older messages brought in out of order, more than that and after the latest, would hide it.
ACTIVE = """
CASE WHEN p.status <> 'JOINED' THEN p.status_at
     WHEN c.last_message_at > $2::timestamptz - interval '1 minute'
       THEN COALESCE(seen.active_at, c.created_at)
     ELSE COALESCE(c.last_activity_at, c.created_at) END
"""
SEEN = """
SELECT max(COALESCE(m.sent_at, m.created_at)) AS active_at
FROM (
  SELECT m.sent_at, m.created_at FROM messages m
  WHERE m.conversation_id = c.id AND m.sequence <= (
    SELECT e.sequence FROM events e
    WHERE e.conversation_id = c.id AND e.type = 'MESSAGE_CREATED'
      AND pg_visible_in_snapshot(e.xid, $3::text::pg_snapshot)
    ORDER BY e.version DESC LIMIT 1
  )
  -- Longer than any transaction lasts: one that is older is in the snapshot.
  AND c.last_message_at > $2::timestamptz - interval '1 minute'
  ORDER BY m.sequence DESC LIMIT 100
) AS m
"""

# Two passes: the first puts the user's conversations in order, the second reads what a page of them
# shows. It sums up what they hold, so that no page leaves the database that is too big to send.
LIST = f"""
WITH line AS MATERIALIZED (
  SELECT * FROM (
    SELECT p.conversation_id, p.user_id, {ACTIVE} AS active_at
    FROM participants p
    -- OFFSET 0: looked up one by one, rather than all conversations there are read once.
    CROSS JOIN LATERAL (
      SELECT {columns_of("conversations", "s")} FROM conversations s
      WHERE s.id = p.conversation_id OFFSET 0
    ) AS c
    CROSS JOIN LATERAL ({SEEN}) AS seen
    WHERE p.user_id = $1 AND p.status = ANY($6::text[]) AND {SEES} AND c.deleted_at IS NULL
      -- Whoever is not in it is not shown these, and must not find out by a filter.
      AND ($7::bool IS NULL OR (p.status = 'JOINED' AND c.is_active = $7))
      AND ($8::text = '{{}}' OR (p.status = 'JOINED' AND c.metadata @> $8::jsonb))
      AND ($9::text = '' OR strpos(lower(c.title), lower($9)) > 0)
      AND (NOT $10::bool OR {UNREAD} > 0)
  ) AS ordered
  WHERE $4::timestamptz IS NULL OR (active_at, conversation_id) < ($4, $5::uuid)
  ORDER BY active_at DESC, conversation_id DESC
  LIMIT $11
)
SELECT * FROM (
  SELECT *, sum(size) OVER (ORDER BY active_at DESC, conversation_id DESC) - size AS size_before,
         count(*) OVER () AS found
  FROM (
    SELECT l.active_at, now() AS read_at, pg_current_snapshot()::text AS snapshot,
           {columns_of("participants", "p")}, u.username,
           {columns_of("conversations", "c", prefix="c_")},
           k.actor_id AS c_actor_id, p.status AS c_status, p.joined_at AS c_joined_at,
           {LAST} AS c_final_sequence,
           {columns_of("messages", "m", prefix="m_")},
           {UNREAD} AS unread_count,
           pg_column_size(c.metadata)
             + COALESCE(octet_length(m.content) + pg_column_size(m.metadata), 0) AS size
    FROM line l
    CROSS JOIN LATERAL (SELECT l.user_id AS actor_id) AS k
    JOIN participants p ON p.conversation_id = l.conversation_id AND p.user_id = l.user_id
    JOIN conversations c ON c.id = l.conversation_id
    JOIN users u ON u.id = l.user_id
    LEFT JOIN messages m ON m.conversation_id = l.conversation_id AND m.sequence = greatest(
      CASE WHEN {END} >= p.visible_from_sequence THEN {END} END,
      (SELECT s.sequence FROM messages s WHERE s.conversation_id = c.id AND s.id = {SHOWN})
    )
  ) AS page
) AS sized
WHERE size_before <= $12
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
    conversation = part(row, "c_")
    assert conversation is not None
    return Line(
        conversation=conversation,
        participant=row,
        last_message=part(row, "m_"),
        unread_count=row["unread_count"],
        place=Place(
            after.read_at if after else row["read_at"],
            after.snapshot if after else row["snapshot"],
            row["active_at"],
            row["conversation_id"],
        ),
    )
