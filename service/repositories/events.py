from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import delete

from service.domain import EventType
from service.repositories.base import Repository, tables

events = tables["events"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One event, before it has a version: what happened, to whom, by whom. No content."""

    type: EventType
    actor_id: UUID | None
    sequence: int | None = None
    revision: int | None = None
    user_id: UUID | None = None
    previous_status: str | None = None
    status: str | None = None
    previous_role: str | None = None
    role: str | None = None
    reason: str = ""


RECORD = """
INSERT INTO events (conversation_id, version, era, type, actor_id, sequence, revision, user_id,
                    previous_status, status, previous_role, role, reason)
SELECT $1, $2 + k.position, (SELECT max(era) FROM eras), k.type, k.actor_id, k.sequence,
       k.revision, k.user_id, k.previous_status, k.status, k.previous_role, k.role, k.reason
FROM unnest($3::text[], $4::uuid[], $5::bigint[], $6::int[], $7::uuid[], $8::text[], $9::text[],
            $10::text[], $11::text[], $12::text[]) WITH ORDINALITY
  AS k(type, actor_id, sequence, revision, user_id, previous_status, status, previous_role, role,
       reason, position)
"""

# Rows that were restored bear the number of the transaction that restored them, not of the one that
# is told in them (an event is never updated); elsewhere the database has another identifier, too.
BEGIN_ERA = """
INSERT INTO eras (era, system_identifier)
SELECT e.era + 1, s.system_identifier::text
FROM pg_control_system() AS s
CROSS JOIN (SELECT * FROM eras ORDER BY era DESC LIMIT 1) AS e
LEFT JOIN LATERAL (SELECT v.xid, v.xmin FROM events v WHERE v.era = e.era
                   ORDER BY v.era DESC, v.xid DESC, v.conversation_id DESC, v.version DESC
                   LIMIT 1) AS newest ON true
WHERE e.system_identifier <> s.system_identifier::text OR newest.xmin <> newest.xid::xid
ON CONFLICT DO NOTHING
RETURNING era
"""

# Whoever writes an event meanwhile waits, and then writes it in the new era.
ALONE = "LOCK TABLE events IN SHARE ROW EXCLUSIVE MODE"
BEGIN_ANOTHER_ERA = """
INSERT INTO eras (era, system_identifier)
SELECT (SELECT max(era) + 1 FROM eras), system_identifier::text FROM pg_control_system()
RETURNING era
"""


class Events(Repository):
    async def record(
        self, *, conversation_id: UUID, after_version: int, facts: Sequence[Fact]
    ) -> None:
        """Append the facts as versions `after_version + 1`, … of the conversation."""
        await self._connection.fetch(
            RECORD,
            conversation_id,
            after_version,
            [fact.type for fact in facts],
            [fact.actor_id for fact in facts],
            [fact.sequence for fact in facts],
            [fact.revision for fact in facts],
            [fact.user_id for fact in facts],
            [fact.previous_status for fact in facts],
            [fact.status for fact in facts],
            [fact.previous_role for fact in facts],
            [fact.role for fact in facts],
            [fact.reason for fact in facts],
        )

    async def forget(self, conversation_id: UUID) -> None:
        """Remove every event of the conversation."""
        await self._connection.execute(
            delete(events).where(events.c.conversation_id == conversation_id)
        )

    async def begin_era(self) -> int | None:
        """Start a new era if this is another database than the one that wrote the last events: the
        new one's number; else None.
        """
        rows = await self._connection.fetch(BEGIN_ERA)
        return rows[0]["era"] if rows else None

    async def begin_another_era(self) -> int:
        """Start a new era in any case: its number."""
        await self._connection.fetch(ALONE)
        ((era,),) = await self._connection.fetch(BEGIN_ANOTHER_ERA)
        return int(era)
