from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Select, select, tuple_
from sqlalchemy.sql import ColumnElement

from service.repositories.base import Repository, Row, columns_of, looked_up, tables
from service.repositories.visibility import SEES
from service.rules.participants import Change

participants = tables["participants"]
users = tables["users"]

PARTICIPANT = columns_of("participants", "p")
# Absent rows leave everything of `p` NULL: `status` tells.
OWN = ", ".join(f"p.{column.name}" for column in participants.columns if column.name != "user_id")

# The row lock is a foreign key's own: whoever is live now is not purged before we commit.
PEOPLE = f"""
SELECT u.id AS user_id, u.username, u.kind, u.is_active AND u.deleted_at IS NULL AS usable,
       {OWN}, COALESCE({SEES}, false) AS sees
FROM unnest($2::uuid[]) AS k(user_id)
JOIN users u ON u.id = k.user_id AND u.id = ANY($2::uuid[])
{looked_up("participants", "p", "p.conversation_id = $1 AND p.user_id = k.user_id")}
FOR KEY SHARE OF u
"""

PRESENT = f"""
SELECT {PARTICIPANT}, u.username, u.kind, u.is_active AND u.deleted_at IS NULL AS usable
FROM participants p JOIN users u ON u.id = p.user_id
WHERE p.conversation_id = $1 AND p.status IN ('INVITED', 'JOINED')
ORDER BY p.joined_at, p.user_id
"""

CROWD = """
SELECT count(*) FILTER (WHERE status IN ('INVITED', 'JOINED')) AS occupied,
       count(*) FILTER (WHERE status = 'JOINED') AS joined,
       count(*) FILTER (WHERE status = 'JOINED' AND role = 'OWNER') AS owners
FROM participants WHERE conversation_id = $1
"""

# Rows, counters and events, of any number of conversations whose locks are held. A change of role
# alone keeps what tells of the status. The row that is offered must pass the table's checks even
# where it is not the one that is stored.
WRITE = f"""
WITH now AS MATERIALIZED (SELECT clock_timestamp() AS at),
k AS MATERIALIZED (
  SELECT k.*, now.at
  FROM now, unnest($1::uuid[], $2::int[], $3::int[], $4::uuid[], $5::text[], $6::text[], $7::text[],
                   $8::text[], $9::uuid[], $10::uuid[], $11::bool[], $12::uuid[], $13::text[],
                   $14::bigint[], $15::bigint[])
    AS k(conversation_id, number, joining, user_id, previous_status, status, previous_role, role,
         invited_by_user_id, initial_message_id, hide_history, actor_id, reason,
         visible_from_sequence, visible_to_sequence)
),
stored AS (
  INSERT INTO participants AS p
    (conversation_id, user_id, status, role, invited_by_user_id, initial_message_id, hide_history,
     joined_at, left_at, status_at, status_actor_id, status_reason, visible_from_sequence,
     visible_to_sequence, created_at, updated_at)
  SELECT conversation_id, user_id, status, role, invited_by_user_id, initial_message_id,
         hide_history, CASE WHEN status = 'JOINED' THEN at END,
         CASE WHEN status IN ('LEFT', 'REMOVED') THEN at END, at, actor_id, reason,
         visible_from_sequence, visible_to_sequence, at, at
  FROM k
  ON CONFLICT (conversation_id, user_id) DO UPDATE SET
    status = excluded.status, role = excluded.role,
    invited_by_user_id = excluded.invited_by_user_id,
    initial_message_id = excluded.initial_message_id, hide_history = excluded.hide_history,
    joined_at = CASE WHEN p.status = excluded.status THEN p.joined_at
                     ELSE COALESCE(excluded.joined_at, p.joined_at) END,
    left_at = CASE WHEN p.status = excluded.status THEN p.left_at
                   ELSE COALESCE(excluded.left_at, p.left_at) END,
    status_at = CASE WHEN p.status = excluded.status THEN p.status_at ELSE excluded.status_at END,
    status_actor_id = CASE WHEN p.status = excluded.status THEN p.status_actor_id
                           ELSE excluded.status_actor_id END,
    status_reason = CASE WHEN p.status = excluded.status THEN p.status_reason
                         ELSE excluded.status_reason END,
    visible_from_sequence = excluded.visible_from_sequence,
    visible_to_sequence = excluded.visible_to_sequence,
    revision = p.revision + 1,
    updated_at = excluded.updated_at
),
counted AS (
  UPDATE conversations c
  SET (version, participant_count) =
    (SELECT c.version + count(*), c.participant_count + sum(k.joining)
     FROM k WHERE k.conversation_id = c.id)
  WHERE c.id = ANY($1::uuid[])
)
INSERT INTO events (conversation_id, version, era, type, actor_id, user_id, previous_status, status,
                    previous_role, role, reason)
SELECT k.conversation_id, c.version + k.number, (SELECT max(era) FROM eras), 'PARTICIPANT_CHANGED',
       k.actor_id, k.user_id, k.previous_status, k.status, k.previous_role, k.role, k.reason
FROM k
{looked_up("conversations", "c", "c.id = k.conversation_id")}
"""


@dataclass(frozen=True, slots=True)
class Crowd:
    """How many are in a conversation: joined or invited; joined; joined as owners."""

    occupied: int
    joined: int
    owners: int


class Participants(Repository):
    async def people(self, conversation_id: UUID, user_ids: Sequence[UUID]) -> dict[UUID, Row]:
        """Each user with its participant's row, if any, and whether that row lets it see."""
        rows = await self._connection.fetch(PEOPLE, conversation_id, user_ids)
        return {row["user_id"]: row for row in rows}

    async def present(self, conversation_id: UUID) -> Sequence[Row]:
        """Everybody who is joined or invited: as many as a conversation may have."""
        return await self._connection.fetch(PRESENT, conversation_id)

    async def crowd(self, conversation_id: UUID) -> Crowd:
        (row,) = await self._connection.fetch(CROWD, conversation_id)
        return Crowd(**row)

    async def change(self, changes: Mapping[UUID, Sequence[Change]]) -> None:
        """Store each conversation's changes, their events and what they do to its counters."""
        rows = [
            (id, number, change)
            for id, several in changes.items()
            for number, change in enumerate(several, start=1)
        ]
        if not rows:
            return
        await self._connection.fetch(
            WRITE,
            [id for id, _, _ in rows],
            [number for _, number, _ in rows],
            [change.joins - change.leaves for _, _, change in rows],
            [change.user_id for _, _, change in rows],
            [change.previous_status for _, _, change in rows],
            [change.status for _, _, change in rows],
            [change.previous_role for _, _, change in rows],
            [change.role for _, _, change in rows],
            [change.invited_by_user_id for _, _, change in rows],
            [change.initial_message_id for _, _, change in rows],
            [change.hide_history for _, _, change in rows],
            [change.actor_id for _, _, change in rows],
            [change.reason for _, _, change in rows],
            [change.visible_from_sequence for _, _, change in rows],
            [change.visible_to_sequence for _, _, change in rows],
        )

    async def owns_any(self, user_id: UUID) -> bool:
        """Whether the user is a joined owner anywhere."""
        row = await self._connection.row(
            select(participants.c.user_id)
            .where(
                participants.c.user_id == user_id,
                participants.c.status == "JOINED",
                participants.c.role == "OWNER",
            )
            .limit(1)
        )
        return row is not None

    async def find(
        self, conversation_id: UUID, user_id: UUID | None, *, only_user_id: UUID | None = None
    ) -> Row | None:
        """One participant; with `only_user_id`, none but that one."""
        if user_id is None or only_user_id not in (None, user_id):
            return None
        return await self._connection.row(
            _select().where(
                participants.c.conversation_id == conversation_id,
                participants.c.user_id == user_id,
            )
        )

    async def list(
        self,
        conversation_id: UUID,
        *,
        only_user_id: UUID | None,
        statuses: Sequence[str],
        roles: Sequence[str],
        after: tuple[Any, UUID] | None,
        limit: int,
    ) -> Sequence[Row]:
        """Oldest row first. `after` is the (created_at, user_id) of the last one seen."""
        key = (participants.c.created_at, participants.c.user_id)
        where: list[ColumnElement[bool]] = [
            participants.c.conversation_id == conversation_id,
            participants.c.status.in_(statuses),
        ]
        if only_user_id is not None:
            where.append(participants.c.user_id == only_user_id)
        if roles:
            where.append(participants.c.role.in_(roles))
        if after is not None:
            where.append(tuple_(*key) > tuple_(*after))
        return await self._connection.rows(_select().where(*where).order_by(*key).limit(limit))


def _select() -> Select[Any]:
    return select(participants, users.c.username).join(users, users.c.id == participants.c.user_id)
