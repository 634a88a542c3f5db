"""Reading the change feed.

A conversation is read by version: whoever writes version n + 1 waited for n to be committed. What
is wider is read in the order of transaction ids, and only below the horizon, the oldest transaction
that still runs: nothing can be committed there any more. Both orders agree within a conversation.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from uuid import UUID

from service.repositories.base import Repository, Row, columns_of
from service.repositories.messages import MESSAGE
from service.repositories.visibility import readable
from service.rules.feed import BEGINNING, Head, Place

PRESENT_ERA = "(SELECT max(era) FROM eras)"
FACT = f"{PRESENT_ERA} AS present_era, e.xid::text AS xid, {columns_of('events', 'e', but='xid')}"
ORDER = "e.era, e.xid, e.conversation_id, e.version"

# As one range of ix_events_feed: beyond a place, below the horizon.
BEYOND = f"""
({ORDER}) > ($1, $2::text::xid8, $3, $4)
AND (e.era, e.xid) < ({PRESENT_ERA}, pg_snapshot_xmin(pg_current_snapshot()))
"""

OF_CONVERSATIONS = f"""
SELECT k.position, {FACT}
FROM unnest($1::uuid[], $2::bigint[]) WITH ORDINALITY AS k(conversation_id, after_version, position)
CROSS JOIN LATERAL (
  SELECT * FROM events e
  WHERE e.conversation_id = k.conversation_id AND e.version > k.after_version
  ORDER BY e.version LIMIT $3
) AS e
ORDER BY k.position, e.version
"""

OF_EVERYTHING = f"SELECT {FACT} FROM events e WHERE {BEYOND} ORDER BY {ORDER} LIMIT $5"

# Of a stretch of the log, what concerns each of some users: changes of its own participant, and
# what happened where it was joined, by the last such change until then. The last event of the
# stretch comes in any case: it tells how far the stretch goes.
OF_USERS = f"""
WITH scanned AS MATERIALIZED (
  SELECT e.*, row_number() OVER (ORDER BY {ORDER}) AS position
  FROM events e WHERE {BEYOND} ORDER BY {ORDER} LIMIT $6
)
SELECT e.position, r.user_id AS reader_id, {FACT}
FROM scanned e
LEFT JOIN LATERAL (
  SELECT p.user_id FROM participants p
  WHERE p.conversation_id = e.conversation_id AND p.user_id = ANY($5::uuid[])
    AND ((e.type = 'PARTICIPANT_CHANGED' AND e.user_id = p.user_id)
         OR (SELECT own.status FROM events own
             WHERE own.type = 'PARTICIPANT_CHANGED' AND own.user_id = p.user_id
               AND own.conversation_id = e.conversation_id AND own.version <= e.version
             ORDER BY own.version DESC LIMIT 1) = 'JOINED')
) AS r ON true
WHERE r.user_id IS NOT NULL OR e.position = (SELECT count(*) FROM scanned)
ORDER BY e.position
"""

# Who may have something to read: nobody whom it does not name has.
STIRRED = f"""
WITH scanned AS MATERIALIZED (SELECT * FROM events e WHERE {BEYOND} ORDER BY {ORDER} LIMIT $6)
SELECT e.era, e.xid::text AS xid, e.conversation_id, e.version,
       ARRAY(SELECT DISTINCT p.user_id FROM participants p
             WHERE p.user_id = ANY($5::uuid[])
               AND p.conversation_id IN (SELECT s.conversation_id FROM scanned s)) AS user_ids
FROM scanned e ORDER BY {", ".join(f"{column} DESC" for column in ORDER.split(", "))} LIMIT 1
"""

NOW = f"""
SELECT {PRESENT_ERA} AS present_era,
       pg_snapshot_xmax(pg_current_snapshot())::text AS end_xid, e.*
FROM (VALUES (1)) AS one LEFT JOIN LATERAL (
  SELECT e.era, e.xid::text AS xid, e.conversation_id, e.version
  FROM events e WHERE {{where}} ORDER BY {{order}} LIMIT 1
) AS e ON true
"""
NOW_OF_CONVERSATION = NOW.format(where="e.conversation_id = $1", order="e.version DESC")
NOW_OF_EVERYTHING = NOW.format(
    where=BEYOND, order=", ".join(f"{column} DESC" for column in ORDER.split(", "))
)

# The version with which somebody went for good, until now.
LEFT = """
SELECT k.conversation_id, k.user_id, max(e.version) AS version
FROM unnest($1::uuid[], $2::uuid[]) AS k(conversation_id, user_id)
JOIN events e ON e.user_id = k.user_id AND e.conversation_id = k.conversation_id
WHERE e.type = 'PARTICIPANT_CHANGED' AND e.previous_status = 'JOINED' AND e.status <> 'JOINED'
GROUP BY k.conversation_id, k.user_id
"""

# Contents only up to so many bytes, and that of the first always: a thousand messages may hold a
# quarter of a gigabyte, and none of it should leave the database for nothing.
MESSAGES = f"""
WITH sized AS (
  SELECT k.position, m.conversation_id, m.sequence,
         sum(octet_length(m.content) + pg_column_size(m.metadata)) OVER (ORDER BY k.position)
           - octet_length(m.content) - pg_column_size(m.metadata) AS size_before
  FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[], $5::uuid[])
    WITH ORDINALITY AS k(conversation_id, sequence, first_sequence, final_sequence,
                         shown_message_id, position)
  JOIN messages m ON m.conversation_id = k.conversation_id AND m.sequence = k.sequence
  WHERE {readable("m", "k")}
)
SELECT s.position, {MESSAGE}
FROM sized s
LEFT JOIN messages m ON s.size_before <= $6
  AND m.conversation_id = s.conversation_id AND m.sequence = s.sequence
"""

PARTICIPANTS = f"""
SELECT {columns_of("participants", "p")}, u.username
FROM unnest($1::uuid[], $2::uuid[]) AS k(conversation_id, user_id)
JOIN participants p ON p.conversation_id = k.conversation_id AND p.user_id = k.user_id
JOIN users u ON u.id = p.user_id
"""

# How many events one statement looks through for those that concern a user: some 30 ms.
MAX_SCANNED = 5_000

# (conversation's id, user's id)
Person = tuple[UUID, UUID]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some of the log: its events, where it ends, and whether that is as far as can be read.

    `is_cut`: it may end amid what one call made.
    """

    facts: Sequence[Row]
    end: Place
    is_last: bool
    is_cut: bool = False


class Feed(Repository):
    async def era(self) -> int:
        """The present one."""
        ((era,),) = await self._connection.fetch(f"SELECT {PRESENT_ERA}")
        return int(era)

    async def now(self, conversation_id: UUID | None) -> Head:
        """How far the log goes, of one conversation or (None) below the horizon."""
        if conversation_id:
            (row,) = await self._connection.fetch(NOW_OF_CONVERSATION, conversation_id)
        else:
            (row,) = await self._connection.fetch(NOW_OF_EVERYTHING, *_columns(BEGINNING))
        newest = BEGINNING if row["version"] is None else Place.of(row)
        return Head(row["present_era"], newest, int(row["end_xid"]))

    async def of_conversations(
        self, versions: Sequence[tuple[UUID, int]], *, limit: int
    ) -> list[list[Row]]:
        """At most `limit` events of each conversation after each version, in the same order."""
        rows = await self._connection.fetch(
            OF_CONVERSATIONS,
            [conversation_id for conversation_id, _ in versions],
            [version for _, version in versions],
            limit,
        )
        found: list[list[Row]] = [[] for _ in versions]
        for row in rows:
            found[row["position"] - 1].append(row)
        return found

    async def of_everything(self, place: Place, *, limit: int) -> list[Row]:
        return await self._connection.fetch(OF_EVERYTHING, *_columns(place), limit)

    async def of_users(
        self, place: Place, user_ids: Sequence[UUID], *, scanned: int
    ) -> dict[UUID, Stretch]:
        """What concerns each of the users, of so many events after a place."""
        rows = await self._connection.fetch(OF_USERS, *_columns(place), user_ids, scanned)
        end = Place.of(rows[-1]) if rows else place
        is_last = not rows or rows[-1]["position"] < scanned
        found: dict[UUID | None, list[Row]] = {}
        for row in rows:
            found.setdefault(row["reader_id"], []).append(row)
        stretches = {}
        for user_id in user_ids:
            facts = found.get(user_id, [])
            is_cut = not is_last and bool(facts) and Place.of(facts[-1]) == end
            stretches[user_id] = Stretch(facts, end, is_last, is_cut)
        return stretches

    async def stirred(
        self, place: Place, user_ids: Collection[UUID]
    ) -> tuple[Place, set[UUID]] | None:
        """How far the log goes on after a place, and whom of the users that may concern; None where
        it does not go on.
        """
        rows = await self._connection.fetch(STIRRED, *_columns(place), list(user_ids), MAX_SCANNED)
        return (Place.of(rows[0]), set(rows[0]["user_ids"])) if rows else None

    async def departures(self, people: Sequence[Person]) -> dict[Person, int]:
        """The version with which each of them last went, of those who ever did."""
        rows = await self._connection.fetch(
            LEFT, [conversation_id for conversation_id, _ in people], [user for _, user in people]
        )
        return {(row["conversation_id"], row["user_id"]): row["version"] for row in rows}

    async def messages(
        self, keys: Sequence[tuple[Row, int]], *, byte_limit: int
    ) -> list[Row | None]:
        """The message behind each (view, sequence), in the same order; None where the view does not
        show it. One whose content lies beyond the limit has no id, nor anything else.
        """
        rows = await self._connection.fetch(
            MESSAGES,
            [view["id"] for view, _ in keys],
            [sequence for _, sequence in keys],
            [view["first_sequence"] for view, _ in keys],
            [view["final_sequence"] for view, _ in keys],
            [view["shown_message_id"] for view, _ in keys],
            byte_limit,
        )
        found: list[Row | None] = [None] * len(keys)
        for row in rows:
            found[row["position"] - 1] = row
        return found

    async def participants(self, people: Sequence[Person]) -> dict[Person, Row]:
        rows = await self._connection.fetch(
            PARTICIPANTS,
            [conversation_id for conversation_id, _ in people],
            [user_id for _, user_id in people],
        )
        return {(row["conversation_id"], row["user_id"]): row for row in rows}


def _columns(place: Place) -> tuple[int, str, UUID, int]:
    return place.era, str(place.xid), place.conversation_id, place.version
