from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    and_,
    delete,
    exists,
    func,
    literal,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased
from sqlalchemy.sql import ColumnElement

from service.domain import EventType
from service.errors import AlreadyExists
from service.models import Participant
from service.models.base import HAS_METADATA
from service.repositories.base import BY_SLUG, Repository, Row, columns_of, looked_up, tables
from service.repositories.events import Events, Fact
from service.repositories.visibility import (
    FIRST,
    LAST,
    MAY_ACT,
    MESSAGE_STATE,
    SEES,
    SHOWN,
)
from service.rules.conversations import Pair

conversations = tables["conversations"].alias("c")
participants = tables["participants"].alias("p")

CONVERSATION = columns_of("conversations", "c")

# Everything a read needs before it reads: the conversation, what the asker is in it, and its
# window. No row where the conversation is missing or hidden, or the asker may not act.
VIEWS = f"""
SELECT k.position, {CONVERSATION}, k.actor_id, p.status, p.role, p.joined_at,
       COALESCE({SEES}, false) AS sees,
       {FIRST} AS first_sequence, {LAST} AS final_sequence, {SHOWN} AS shown_message_id,
       {MESSAGE_STATE} AS message_state
FROM unnest($1::uuid[], $2::text[], $3::uuid[])
  WITH ORDINALITY AS k(id, slug, actor_id, position)
{looked_up("conversations", "c", f"c.id = COALESCE(k.id, {BY_SLUG})")}
{looked_up("participants", "p", "p.conversation_id = c.id AND p.user_id = k.actor_id")}
LEFT JOIN users a ON a.id = k.actor_id
WHERE c.id IS NOT NULL AND (k.actor_id IS NULL OR {SEES} AND {MAY_ACT})
"""

# As version 1. In the order of their names: two that are made elsewhere at the same time, the other
# way round, would wait for each other.
CREATE = """
WITH k AS MATERIALIZED (
  SELECT uuidv7() AS id, statement_timestamp() AS now, k.*
  FROM unnest($1::text[], $2::text[], $3::uuid[], $4::bool[], $5::bool[], $6::text[], $7::text[],
              $8::uuid[], $9::uuid[], $10::uuid[]) WITH ORDINALITY
    AS k(title, slug, creator_id, is_active, members_may_invite, metadata, external_id,
         direct_first_user_id, direct_second_user_id, actor_id, position)
),
made AS (
  INSERT INTO conversations (id, title, slug, creator_id, is_active, members_may_invite, metadata,
                             external_id, is_direct, direct_first_user_id, direct_second_user_id,
                             version, created_at, updated_at)
  SELECT id, title, slug, creator_id, is_active, members_may_invite, metadata::jsonb, external_id,
         direct_first_user_id IS NOT NULL, direct_first_user_id, direct_second_user_id, 1, now, now
  FROM k ORDER BY external_id, slug, position
  ON CONFLICT DO NOTHING
  RETURNING id
),
told AS (
  INSERT INTO events (conversation_id, version, era, type, actor_id)
  SELECT k.id, 1, (SELECT max(era) FROM eras), 'CONVERSATION_CREATED', k.actor_id
  FROM k WHERE k.id IN (SELECT id FROM made)
)
SELECT k.position, k.id FROM k WHERE k.id IN (SELECT id FROM made)
"""

# Who has the slug or the id of each. NULL = NULL is not true: what was not given is not taken.
TAKEN = """
SELECT k.position, c.id, c.slug
FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS k(slug, external_id, position)
CROSS JOIN LATERAL (
  SELECT c.id, c.slug FROM conversations c
  WHERE c.slug = k.slug OR c.external_id = k.external_id
  ORDER BY c.slug = k.slug DESC LIMIT 1
) AS c
"""

RESOLVE = "SELECT slug, id FROM conversations WHERE slug = ANY($1::text[])"

COUNT = """
SELECT (SELECT count(*) FROM messages WHERE conversation_id = $1) AS message_count,
       (SELECT count(*) FROM participants WHERE conversation_id = $1) AS participant_count
"""

# Those that a user is in, and those that it created.
TIED = """
(SELECT conversation_id AS id FROM participants
 WHERE user_id = $1 AND status IN ('INVITED', 'JOINED') ORDER BY conversation_id LIMIT $2)
UNION
(SELECT id FROM conversations WHERE creator_id = $1 ORDER BY created_at, id LIMIT $2)
ORDER BY id LIMIT $2
"""

# (conversation's id or slug, actor's id or None)
Key = tuple[UUID | str, UUID | None]


@dataclass(frozen=True, slots=True)
class Purged:
    """What was removed together with a conversation."""

    message_count: int = 0
    participant_count: int = 0


class Conversations(Repository):
    async def views(self, keys: Sequence[Key]) -> list[Row | None]:
        """What each asker may see of each conversation, in the same order."""
        found: list[Row | None] = [None] * len(keys)
        rows = await self._connection.fetch(
            VIEWS,
            [reference if isinstance(reference, UUID) else None for reference, _ in keys],
            [reference if isinstance(reference, str) else None for reference, _ in keys],
            [actor_id for _, actor_id in keys],
        )
        for row in rows:
            found[row["position"] - 1] = row
        return found

    async def resolve(self, slugs: Sequence[str]) -> list[UUID | None]:
        """The id behind each slug, in the same order."""
        rows = await self._connection.fetch(RESOLVE, slugs)
        ids = {row["slug"]: row["id"] for row in rows}
        return [ids.get(slug) for slug in slugs]

    async def find(self, conversation_id: UUID) -> Row | None:
        return await self._connection.row(
            select(conversations).where(conversations.c.id == conversation_id)
        )

    async def tied_to(self, user_id: UUID, *, limit: int) -> Sequence[UUID]:
        """Some of the conversations that the user is in, invited to, or the creator of."""
        return [row["id"] for row in await self._connection.fetch(TIED, user_id, limit)]

    async def create(self, wanted: Sequence[Row]) -> Sequence[UUID | AlreadyExists]:
        """Insert each, or say who has its slug or external id: another one of these, perhaps."""
        rows = await self._connection.fetch(
            CREATE,
            [each["title"] for each in wanted],
            [each["slug"] for each in wanted],
            [each["creator_id"] for each in wanted],
            [each["is_active"] for each in wanted],
            [each["members_may_invite"] for each in wanted],
            [each["metadata"] for each in wanted],
            [each["external_id"] for each in wanted],
            [each.get("direct_first_user_id") for each in wanted],
            [each.get("direct_second_user_id") for each in wanted],
            [each["actor_id"] for each in wanted],
        )
        made = {row["position"] - 1: row["id"] for row in rows}
        losers = [n for n in range(len(wanted)) if n not in made]
        if losers:
            taken = await self._taken([wanted[n] for n in losers])
            made.update(zip(losers, taken, strict=True))
        return [made[n] for n in range(len(wanted))]

    async def find_direct(self, pair: Pair) -> Row | None:
        """The direct conversation of the two."""
        return await self._connection.row(
            select(conversations).where(
                conversations.c.direct_first_user_id == pair.first,
                conversations.c.direct_second_user_id == pair.second,
            )
        )

    async def update(
        self, conversation: Row, changes: Mapping[str, Any], *, actor_id: UUID | None
    ) -> None:
        """Store new values and their event, or raise AlreadyExists if the slug is taken."""
        changes = {**changes, "updated_at": func.clock_timestamp()}
        try:
            await self._change(conversation, EventType.CONVERSATION_UPDATED, changes, actor_id)
        except IntegrityError as error:
            # Nothing else that may change is unique.
            raise _slug_taken(changes["slug"]) from error

    async def delete(self, conversation: Row, *, actor_id: UUID | None) -> None:
        """Mark it as deleted; nothing beneath it is touched."""
        mark = {"deleted_at": func.clock_timestamp()}
        await self._change(conversation, EventType.CONVERSATION_DELETED, mark, actor_id)

    async def undelete(self, conversation: Row, *, actor_id: UUID | None) -> None:
        mark = {"deleted_at": None}
        await self._change(conversation, EventType.CONVERSATION_UNDELETED, mark, actor_id)

    async def _change(
        self,
        conversation: Row,
        type: EventType,
        columns: Mapping[str, Any],
        actor_id: UUID | None,
    ) -> None:
        revision = conversation["revision"] + 1
        await self._connection.execute(
            update(tables["conversations"])
            .where(tables["conversations"].c.id == conversation["id"])
            .values(**columns, revision=revision, version=conversation["version"] + 1)
        )
        await Events(self._connection).record(
            conversation_id=conversation["id"],
            after_version=conversation["version"],
            facts=[Fact(type=type, actor_id=actor_id, revision=revision)],
        )

    async def purge(self, conversation: Row) -> Purged:
        """Remove it and all that hangs on it; of its events, one that says so is left."""
        id = conversation["id"]
        (counts,) = await self._connection.fetch(COUNT, id)
        await self._connection.execute(
            delete(tables["conversations"]).where(tables["conversations"].c.id == id)
        )
        await Events(self._connection).forget(id)
        await Events(self._connection).record(
            conversation_id=id,
            after_version=conversation["version"],
            facts=[Fact(type=EventType.CONVERSATION_PURGED, actor_id=None)],
        )
        return Purged(**counts)

    async def _taken(self, wanted: Sequence[Row]) -> Sequence[AlreadyExists]:
        rows = await self._connection.fetch(
            TAKEN, [each["slug"] for each in wanted], [each["external_id"] for each in wanted]
        )
        holders = {row["position"] - 1: row for row in rows}
        return [_taken(each, holders.get(n)) for n, each in enumerate(wanted)]

    async def list(
        self,
        *,
        actor_id: UUID | None,
        show_deleted: bool,
        title_contains: str = "",
        is_active: bool | None = None,
        external_id: str | None = None,
        creator_id: UUID | None = None,
        participant_id: UUID | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        metadata_contains: str = "{}",
        after: tuple[datetime, UUID] | None,
        limit: int,
    ) -> Sequence[Row]:
        """Newest first; an actor's are those it is joined in, whole, so that no filter tells it
        more than it may see. `after` is the (created_at, id) of the last one seen.
        """
        c, p = conversations.c, participants.c
        where: list[ColumnElement[bool]] = []
        if title_contains:
            where.append(c.title.icontains(title_contains, autoescape=True))
        if is_active is not None:
            where.append(c.is_active.is_(is_active))
        if external_id:
            where.append(c.external_id == external_id)
        if creator_id:
            where.append(c.creator_id == creator_id)
        if participant_id:
            member = aliased(Participant)
            where.append(
                exists().where(
                    member.conversation_id == c.id,
                    member.user_id == participant_id,
                    member.status == "JOINED",
                )
            )
        if created_after:
            where.append(c.created_at >= created_after)
        if created_before:
            where.append(c.created_at < created_before)
        if metadata_contains != "{}":
            where.append(
                and_(
                    text(f"c.{HAS_METADATA}"),
                    c.metadata.contains(literal(metadata_contains, JSONB)),
                )
            )
        if after:
            where.append(tuple_(c.created_at, c.id) < tuple_(*after))
        statement = select(conversations, literal(None).label("actor_id")).where(*where)
        if actor_id is not None:
            statement = statement.join(participants, p.conversation_id == c.id).where(
                p.user_id == actor_id, p.status == "JOINED"
            )
        if not show_deleted:
            statement = statement.where(c.deleted_at.is_(None))
        elif actor_id is not None:
            statement = statement.where(or_(c.deleted_at.is_(None), p.role == "OWNER"))
        place = (c.created_at.desc(), c.id.desc())
        if actor_id is not None or participant_id:
            # OFFSET 0: one user's conversations are read and put in order. Otherwise all there are
            # may be walked through, newest first, for those of somebody who has only old ones.
            own = statement.offset(0).subquery("own")
            statement, place = select(own), (own.c.created_at.desc(), own.c.id.desc())
        return await self._connection.rows(
            statement.order_by(*place).limit(limit), replan=metadata_contains != "{}"
        )


def _taken(wanted: Row, holder: Row | None) -> AlreadyExists:
    """What of the wanted the holder has. Whoever had it may be gone by now."""
    if holder is None or holder["slug"] == wanted["slug"]:
        return _slug_taken(wanted["slug"])
    return AlreadyExists(
        "EXTERNAL_ID_TAKEN",
        "conversation",
        holder["id"],
        field="conversation.external_id",
        external_id=wanted["external_id"],
    )


def _slug_taken(slug: str) -> AlreadyExists:
    return AlreadyExists("SLUG_TAKEN", "conversation", slug, field="conversation.slug")
