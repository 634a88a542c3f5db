"""How a conversation begins, and what may become of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Self
from uuid import UUID

from service.domain import ParticipantRole
from service.errors import InvalidArgument, PermissionDenied
from service.identity import Actor
from service.rules.messages import Draft
from service.rules.participants import Change, Move, enter, newcomer
from service.rules.requests import RequestId
from service.rules.rights import Person, require_usable, require_writable, user_not_found
from service.rules.updates import news

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """Somebody who joins or is invited while a conversation is made; `field` is what names it."""

    field: str
    named: str
    reference: UUID | str | None
    move: Move
    role: ParticipantRole
    reason: str = ""
    hide_history: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NewConversation:
    """Everything that a CreateConversation asks for."""

    columns: dict[str, Any]
    # The creator first.
    entrants: list[Entrant]
    # The message, and its sender as named.
    message: tuple[Draft, UUID | str | None] | None
    actor: Actor | None
    request: RequestId | None
    dry_run: bool

    @property
    def actor_id(self) -> UUID | None:
        return self.actor.id if self.actor else None

    @property
    def references(self) -> set[UUID | str]:
        """Everybody whom it names, by whatever it names them."""
        named = {entrant.reference for entrant in self.entrants}
        if self.message:
            named.add(self.message[1])
        return {reference for reference in named if reference is not None}


@dataclass(frozen=True, slots=True)
class Opening:
    """A conversation that is being made, and who all those are that it names."""

    new: NewConversation
    # The creator first, and nobody twice.
    people: tuple[tuple[Entrant, Person], ...]
    first: Draft | None

    @property
    def creator_id(self) -> UUID:
        id: UUID = self.people[0][1]["user_id"]
        return id

    @property
    def columns(self) -> dict[str, Any]:
        new = self.new
        return new.columns | {"creator_id": self.creator_id, "actor_id": new.actor_id}

    def changes(self, move: Move, *, initial_message_id: UUID | None = None) -> list[Change]:
        """Who joins, or is invited with the first message; raises if one of them must not be."""
        for entrant, person in self.people:
            require_usable(person, field=entrant.field)
        made = (
            enter(
                move,
                person,
                last_sequence=1 if initial_message_id else 0,
                role=entrant.role,
                invited_by=self.creator_id if person["user_id"] != self.creator_id else None,
                actor_id=self.new.actor_id,
                initial_message_id=initial_message_id,
                reason=entrant.reason,
                hide_history=entrant.hide_history,
            )
            for entrant, person in self.people
            if entrant.move is move
        )
        return [change for change in made if change]


def cast(new: NewConversation, users: Mapping[UUID | str, Row]) -> Opening:
    """Who is who: the creator first and once; nobody else may be named twice."""
    creator, *_ = new.entrants
    identified: dict[UUID, tuple[Entrant, Person]] = {}
    doubles: list[InvalidArgument] = []
    for entrant in new.entrants:
        user = users.get(entrant.reference) if entrant.reference else None
        if user is None:
            raise user_not_found(entrant.field, entrant.named)
        if entrant is creator and new.actor and user["id"] != new.actor.id:
            rule = f"{entrant.field} may name nobody but the actor itself"
            raise PermissionDenied("PERMISSION_DENIED", rule=rule)
        other, _ = identified.setdefault(user["id"], (entrant, newcomer(user)))
        if other not in (entrant, creator):
            doubles.append(InvalidArgument("DUPLICATE", field=entrant.field, other=other.field))
    if doubles:
        raise InvalidArgument.of(doubles)
    return Opening(new, tuple(identified.values()), _first(new, users))


def _first(new: NewConversation, users: Mapping[UUID | str, Row]) -> Draft | None:
    """The first message, whose sender may have been named by its username."""
    if new.message is None:
        return None
    draft, sender = new.message
    if isinstance(sender, str) and sender in users:
        return replace(draft, sender_id=users[sender]["id"])
    return draft


def update(conversation: Row, wanted: Row) -> dict[str, Any]:
    """What of the wanted values is new; raises where the conversation takes no such change.

    An archived one takes only what makes it active again. What is so already, it takes too.
    """
    changes = news(conversation, wanted)
    active = not changes or conversation["is_active"] or changes.get("is_active")
    require_writable({**conversation, "is_active": active})
    return changes


@dataclass(frozen=True, slots=True)
class Pair:
    """The two users of a direct conversation, whoever of them asked."""

    first: UUID
    second: UUID

    @classmethod
    def of(cls, one: UUID, other: UUID) -> Self:
        return cls(*sorted((one, other)))

    @property
    def lock(self) -> int:
        """The advisory lock of the conversation that they have or do not have yet."""
        digest = sha256(self.first.bytes + self.second.bytes).digest()
        return int.from_bytes(digest[:8], signed=True)
