from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from service.repositories.base import Repository, Row, columns_of, part
from service.repositories.visibility import SHOWN

# Sums up what the messages hold, so that no page leaves the database that is too big to send.
LIST = f"""
SELECT * FROM (
  SELECT *, sum(size) OVER (ORDER BY status_at DESC, conversation_id DESC) - size AS size_before,
         count(*) OVER () AS found
  FROM (
    SELECT {columns_of("participants", "p")}, u.username, c.title AS conversation_title,
           {columns_of("users", "i", prefix="inviter_")},
           {columns_of("messages", "m", prefix="message_")},
           COALESCE(octet_length(m.content) + pg_column_size(m.metadata), 0) AS size
    FROM participants p
    -- OFFSET 0: looked up one by one, whatever the planner believes of the tables.
    CROSS JOIN LATERAL (SELECT s.username FROM users s WHERE s.id = p.user_id OFFSET 0) AS u
    CROSS JOIN LATERAL (
      SELECT s.title, s.deleted_at FROM conversations s WHERE s.id = p.conversation_id OFFSET 0
    ) AS c
    LEFT JOIN LATERAL (
      SELECT * FROM users s WHERE s.id = p.invited_by_user_id OFFSET 0
    ) AS i ON true
    LEFT JOIN LATERAL (
      SELECT * FROM messages s
      WHERE s.conversation_id = p.conversation_id AND s.id = {SHOWN} OFFSET 0
    ) AS m ON true
    WHERE p.user_id = $1 AND p.status = 'INVITED' AND c.deleted_at IS NULL
      AND ($2::timestamptz IS NULL OR (p.status_at, p.conversation_id) < ($2, $3::uuid))
    ORDER BY p.status_at DESC, p.conversation_id DESC
    LIMIT $4
  ) AS page
) AS sized
WHERE size_before <= $5
ORDER BY status_at DESC, conversation_id DESC
"""


@dataclass(frozen=True, slots=True)
class Invitation:
    """A pending invitation, with all that its user is shown of the conversation."""

    participant: Row
    conversation_title: str
    inviter: Row | None
    message: Row | None


class Invitations(Repository):
    async def list(
        self, user_id: UUID, *, after: tuple[datetime, UUID] | None, limit: int, byte_limit: int
    ) -> tuple[Sequence[Invitation], bool]:
        """The user's pending invitations to conversations that are not deleted, newest first: at
        most `limit`, and whether there are more.

        `after` is the (status_at, conversation_id) of the last one seen. Stops after the one whose
        message passes `byte_limit`.
        """
        at, conversation_id = after or (None, None)
        rows = await self._connection.fetch(
            LIST, user_id, at, conversation_id, limit + 1, byte_limit
        )
        more = len(rows) > limit or (len(rows) > 0 and len(rows) < rows[0]["found"])
        found = [
            Invitation(
                row,
                row["conversation_title"],
                part(row, "inviter_", "users"),
                part(row, "message_", "messages"),
            )
            for row in rows[:limit]
        ]
        return found, more
