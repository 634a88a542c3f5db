"""How far somebody has read: the whole decision, without a database. Cursors only move forward.

Items are decided in their order of arrival, each on what the ones before it left.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from service.domain import ParticipantStatus as Status
from service.errors import FailedPrecondition, NotFound, OutOfRange, ParleyError, PermissionDenied
from service.rules.requests import RequestId, require_same
from service.rules.rights import Person, Right, require_live, require_right


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One request to move a cursor up to a message, by its id or sequence."""

    # The conversation as named, and as found.
    conversation: str
    conversation_id: UUID
    actor_id: UUID | None
    # Who has read, as named, and the user behind that name, if there is one; else the actor.
    user: str
    user_id: UUID | None
    key: UUID | int
    request: RequestId | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """The user's cursor moves to `sequence`, as the conversation's event `version`."""

    user_id: UUID
    sequence: int
    version: int


@dataclass(frozen=True, slots=True)
class Unmoved:
    """The user's cursor is there already, or further on."""

    user_id: UUID


@dataclass(frozen=True, slots=True)
class Replayed:
    """An earlier request under the same id saw to the user's cursor."""

    user_id: UUID


Outcome = Moved | Unmoved | Replayed | ParleyError


@dataclass(slots=True)
class State:
    """What is known of one conversation, under its lock. A move takes it on."""

    # None where there is no such conversation.
    conversation: Mapping[str, Any] | None
    version: int
    # By user id: the user and, if there is one, its participant's row.
    people: dict[UUID, Person] = field(default_factory=dict)
    # By user id: how far it has read.
    cursors: dict[UUID, int] = field(default_factory=dict)
    requests: dict[bytes, Mapping[str, Any]] = field(default_factory=dict)
    # The sequence of each message that an item's asker may read, by asker and id.
    messages: dict[tuple[UUID | None, UUID], int] = field(default_factory=dict)


def decide(items: list[Reading], states: Mapping[UUID, State]) -> list[Outcome]:
    """One outcome an item, in order."""
    outcomes: list[Outcome] = []
    for item in items:
        try:
            outcomes.append(_decide(item, states[item.conversation_id]))
        except ParleyError as error:
            outcomes.append(error)
    return outcomes


def _decide(item: Reading, state: State) -> Moved | Unmoved | Replayed:
    if item.request and (recorded := state.requests.get(item.request.key)):
        require_same(item.request, recorded)
        return Replayed(recorded["subject_id"])
    if state.conversation is None:
        raise NotFound("conversation", item.conversation)
    user_id: UUID = _require_reader(item, state)["user_id"]
    require_live(state.conversation)
    sequence = _sequence(item, state, state.conversation["last_sequence"])
    if item.request:
        state.requests[item.request.key] = {
            "payload_hash": item.request.payload_hash,
            "subject_id": user_id,
        }
    if sequence <= state.cursors[user_id]:
        return Unmoved(user_id)
    state.cursors[user_id] = sequence
    state.version += 1
    return Moved(user_id, sequence, state.version)


def _require_reader(item: Reading, state: State) -> Person:
    """Whose cursor it is: the actor, who is joined; or whom the system names, who is too."""
    if item.actor_id:
        person = state.people.get(item.actor_id)
        own = require_right(Right.MARK_READ, person, conversation=item.conversation)
        if item.user_id != item.actor_id:
            rule = "only the participant itself may say how far it has read"
            raise PermissionDenied("PERMISSION_DENIED", rule=rule)
        return own
    named = state.people.get(item.user_id) if item.user_id else None
    if named is None or named["status"] is None:
        raise NotFound("participant", item.user)
    if named["status"] != Status.JOINED:
        raise FailedPrecondition("NOT_A_PARTICIPANT", field="user_id")
    return named


def _sequence(item: Reading, state: State, last_sequence: int) -> int:
    """The sequence of the message read; 0 is before the first."""
    if isinstance(item.key, UUID):
        sequence = state.messages.get((item.actor_id, item.key))
        if sequence is None:
            raise NotFound("message", item.key)
        return sequence
    if item.key > last_sequence:
        raise OutOfRange("READ_PAST_END", field="sequence", last_sequence=last_sequence)
    return item.key
