from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from service.repositories.base import Repository, Row, columns_of, part
from service.repositories.visibility import SHOWN

# Sums up what the messages hold, so that no page leaves the database that is too big to send.
LIST = f"""
SELECT * FROM (
  SELECT *, sum(size) OVER (ORDER BY status_at DESC, conversation_id DESC) - size AS size_before
  FROM (
    SELECT {columns_of("participants", "p")}, u.username, c.title AS conversation_title,
           {columns_of("users", "i", prefix="inviter_")},
           {columns_of("messages", "m", prefix="message_")},
           COALESCE(octet_length(m.content) + pg_column_size(m.metadata), 0) AS size
    FROM participants p
    JOIN users u ON u.id = p.user_id
    JOIN conversations c ON c.id = p.conversation_id AND c.deleted_at IS NULL
    LEFT JOIN users i ON i.id = p.invited_by_user_id
    LEFT JOIN messages m ON m.conversation_id = p.conversation_id AND m.id = {SHOWN}
    WHERE p.user_id = $1 AND p.status = 'INVITED'
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
    ) -> Sequence[Invitation]:
        """The user's pending invitations to conversations that are not deleted, newest first.

        `after` is the (status_at, conversation_id) of the last one seen. Stops after the one whose
        message passes `byte_limit`.
        """
        at, conversation_id = after or (None, None)
        rows = await self._connection.fetch(LIST, user_id, at, conversation_id, limit, byte_limit)
        return [
            Invitation(row, row["conversation_title"], part(row, "inviter_"), part(row, "message_"))
            for row in rows
        ]
