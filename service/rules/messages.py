"""What becomes of messages that want to be appended: the whole decision, without a database.

Items are decided in their order of arrival. Only those that pass get numbers, so numbers have no
gaps; a second item under a request_id that an earlier one of the same batch used shares its
outcome. An item is all or nothing, however many messages it has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Self
from uuid import UUID

from service.domain import MessageRole, UserKind
from service.domain import ParticipantStatus as Status
from service.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    ParleyError,
    PermissionDenied,
)
from service.identity import Actor
from service.rules.requests import RequestId, require_same
from service.rules.rights import (
    Person,
    Right,
    require_may_act,
    require_right,
    require_usable,
    require_writable,
)

# How a request points at an earlier message: by id or by sequence.
Reference = UUID | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One message as it was asked for. `field` is where the request holds it: "messages[3]."."""

    field: str = ""
    # The sender as named, and the user behind that name, if there is one.
    sender: str = ""
    sender_id: UUID | None = None
    role: MessageRole
    content: str
    metadata: str = "{}"
    tokens_used: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    model: str = ""
    reply_to: Reference | None = None
    parent: Reference | None = None
    sent_at: datetime | None = None
    external_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """One request to append to one conversation."""

    # The conversation as named, and as found.
    conversation: str
    conversation_id: UUID
    actor: Actor | None
    drafts: tuple[Draft, ...]
    expected_last_sequence: int | None = None
    request: RequestId | None = None
    dry_run: bool = False

    @property
    def relies_on_numbers(self) -> bool:
        """Whether a message that comes in between is more than another number for these: somebody
        counted on theirs, or it may have taken an external_id.
        """
        return self.expected_last_sequence is not None or any(
            draft.external_id is not None for draft in self.drafts
        )


@dataclass(frozen=True, slots=True)
class Numbered:
    """A draft with its place in the conversation, ready to be stored. Its numbers are those that it
    gets if nobody is quicker.
    """

    draft: Draft
    conversation_id: UUID
    id: UUID
    sequence: int
    version: int
    actor_id: UUID | None
    # Of the user that the decision was about, if there is one.
    user_revision: int | None
    reply_to_message_id: UUID | None
    parent_message_id: UUID | None

    def moved(self, by: int) -> Self:
        """The same, so many places on."""
        if not by:
            return self
        return replace(self, sequence=self.sequence + by, version=self.version + by)


@dataclass(frozen=True, slots=True)
class Accepted:
    messages: tuple[Numbered, ...]


@dataclass(frozen=True, slots=True)
class Replayed:
    """An earlier request under the same id appended `count` messages from `sequence` on. If it is
    one of the same batch, that number is still to be confirmed.
    """

    sequence: int
    count: int
    is_stored: bool = True

    def moved(self, by: int) -> Self:
        return self if self.is_stored else replace(self, sequence=self.sequence + by)


Outcome = Accepted | Replayed | ParleyError


@dataclass(slots=True)
class State:
    """What is known of one conversation, under its lock. Accepting an item moves it on."""

    # None where there is no such conversation.
    conversation: Mapping[str, Any] | None
    last_sequence: int
    version: int
    # By user id: the user and, if there is one, its participant's row.
    people: dict[UUID, Person] = field(default_factory=dict)
    requests: dict[bytes, Mapping[str, Any]] = field(default_factory=dict)
    # (id, sequence) of each message that a draft points at, under the reference it used.
    messages: dict[Reference, tuple[UUID, int]] = field(default_factory=dict)
    external_ids: dict[str, UUID] = field(default_factory=dict)

    @property
    def other_changes(self) -> int:
        """How often anything but a new message has changed it: a message adds one to both."""
        return self.version - self.last_sequence

    def move(self, by: int) -> None:
        """So many messages were appended."""
        self.last_sequence += by
        self.version += by


def person_id(item: Append, draft: Draft) -> UUID | None:
    """The user whom the decision about a draft is about."""
    return item.actor.id if item.actor else draft.sender_id


def decide(
    items: list[Append], states: Mapping[UUID, State], new_ids: Iterator[UUID]
) -> list[Outcome]:
    """One outcome an item, in order. `new_ids` yields the ids of accepted messages."""
    outcomes: list[Outcome] = []
    for item in items:
        try:
            outcomes.append(_decide(item, states[item.conversation_id], new_ids))
        except ParleyError as error:
            outcomes.append(error)
    return outcomes


def _decide(item: Append, state: State, new_ids: Iterator[UUID]) -> Accepted | Replayed:
    if item.actor:
        require_may_act(state.people.get(item.actor.id))
    if item.request and (recorded := state.requests.get(item.request.key)):
        require_same(item.request, recorded)
        return Replayed(
            recorded["sequence"], recorded["message_count"], recorded.get("is_stored", True)
        )
    if state.conversation is None:
        raise NotFound("conversation", item.conversation)
    if item.actor:
        person = state.people.get(item.actor.id)
        require_right(Right.SEND, person, conversation=item.conversation)
    for draft in item.drafts:
        _require_sender(draft, item.actor, state)
    require_writable(state.conversation)
    expected = item.expected_last_sequence
    if expected is not None and expected != state.last_sequence:
        raise Aborted("SEQUENCE_MISMATCH", last_sequence=state.last_sequence)
    messages = _number(item, state, new_ids)
    if not item.dry_run:
        _accept(item, messages, state)
    return Accepted(messages)


def _require_sender(draft: Draft, actor: Actor | None, state: State) -> None:
    """A sender is joined and active, and its role is one that it may speak in."""
    name = f"{draft.field}sender_id"
    if actor:
        if draft.sender and draft.sender_id != actor.id:
            raise PermissionDenied(
                "PERMISSION_DENIED", rule=f"{name} may name nobody but the actor itself"
            )
        if draft.role is MessageRole.SYSTEM or (
            draft.role is not MessageRole.USER and state.people[actor.id]["kind"] != UserKind.AGENT
        ):
            raise PermissionDenied(
                "ROLE_NOT_ALLOWED",
                field=f"{draft.field}role",
                rule="ASSISTANT and TOOL need an actor of kind AGENT, SYSTEM needs the system",
            )
        return
    if not draft.sender:
        return
    person = state.people.get(draft.sender_id) if draft.sender_id else None
    if person is None:
        raise FailedPrecondition(
            "USER_NOT_FOUND", resource=("user", draft.sender), field=name, name=draft.sender
        )
    if person["status"] != Status.JOINED:
        raise FailedPrecondition("NOT_A_PARTICIPANT", field=name)
    require_usable(person, field=name)


def _number(item: Append, state: State, new_ids: Iterator[UUID]) -> tuple[Numbered, ...]:
    """The drafts with their ids, numbers and references. Changes nothing yet."""
    # Earlier messages of the same batch have a known number only if its start is known.
    siblings: dict[Reference, tuple[UUID, int]] = {}
    taken: dict[str, UUID] = {}
    messages: list[Numbered] = []
    for offset, draft in enumerate(item.drafts, start=1):
        id = next(new_ids)
        sequence = state.last_sequence + offset
        if draft.external_id is not None:
            holder = state.external_ids.get(draft.external_id) or taken.get(draft.external_id)
            if holder:
                raise AlreadyExists(
                    "EXTERNAL_ID_TAKEN",
                    "message",
                    holder,
                    field=f"{draft.field}external_id",
                    external_id=draft.external_id,
                )
            taken[draft.external_id] = id
        person = _person(item, draft, state)
        messages.append(
            Numbered(
                draft=draft,
                conversation_id=item.conversation_id,
                id=id,
                sequence=sequence,
                version=state.version + offset,
                actor_id=item.actor.id if item.actor else None,
                user_revision=person["user_revision"] if person else None,
                reply_to_message_id=_resolve(
                    draft.reply_to, item, state, siblings, "REPLY_TO_NOT_FOUND", draft.field
                ),
                parent_message_id=_resolve(
                    draft.parent, item, state, siblings, "PARENT_NOT_FOUND", draft.field
                ),
            )
        )
        if item.expected_last_sequence is not None:
            siblings[sequence] = (id, sequence)
    return tuple(messages)


def _person(item: Append, draft: Draft, state: State) -> Person | None:
    id = person_id(item, draft)
    return state.people.get(id) if id else None


def _resolve(
    reference: Reference | None,
    item: Append,
    state: State,
    siblings: Mapping[Reference, tuple[UUID, int]],
    reason: str,
    field: str,
) -> UUID | None:
    """The id of the message referred to; the same refusal whether it is missing or not visible."""
    if reference is None:
        return None
    if reference in siblings:
        return siblings[reference][0]
    found = state.messages.get(reference)
    if found and item.actor:
        person = state.people[item.actor.id]
        found = found if person["first_sequence"] <= found[1] else None
    if found is None:
        kind = "reply_to" if reason == "REPLY_TO_NOT_FOUND" else "parent"
        part = "sequence" if isinstance(reference, int) else "message_id"
        raise FailedPrecondition(reason, field=f"{field}{kind}_{part}")
    return found[0]


def _accept(item: Append, messages: tuple[Numbered, ...], state: State) -> None:
    state.move(len(messages))
    for message in messages:
        state.messages[message.sequence] = (message.id, message.sequence)
        if message.draft.external_id is not None:
            state.external_ids[message.draft.external_id] = message.id
    if item.request:
        state.requests[item.request.key] = {
            "payload_hash": item.request.payload_hash,
            "sequence": messages[0].sequence,
            "message_count": len(messages),
            "is_stored": False,
        }
