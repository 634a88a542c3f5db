import re
import secrets
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from parley.v1 import conversation_pb2 as pb
from parley.v1 import conversation_pb2_grpc, participant_pb2
from service import paging, wire
from service.domain import ParticipantRole
from service.errors import (
    FailedPrecondition,
    NotFound,
    ParleyError,
    PermissionDenied,
)
from service.fields import Fields
from service.identity import Call
from service.lookups import Lookups
from service.paging import PageTokens
from service.repositories.base import Row
from service.repositories.messages import WHOLE
from service.rules.messages import Accepted, Append, Draft
from service.rules.participants import MAX_PARTICIPANTS, Change, Move, enter, require_room
from service.rules.rights import user_not_found
from service.store import Store, Transaction

# Everybody whom a request names, by whatever it names them.
Users = dict[UUID | str, Row]


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


class ConversationServicer(conversation_pb2_grpc.ConversationServiceServicer):
    """Conversations: made, found, listed."""

    def __init__(self, store: Store, lookups: Lookups, page_tokens: PageTokens) -> None:
        self._store = store
        self._lookups = lookups
        self._page_tokens = page_tokens

    async def CreateConversation(
        self, request: pb.CreateConversationRequest, call: Call
    ) -> pb.CreateConversationResponse:
        with Fields() as fields:
            new = _new_conversation(fields, request, call)
            request_id = fields.request_id(call, request)
            lock = request_id.lock if request_id else None
        users = await self._find_users(new)

        async with self._store.transaction(lock=lock) as transaction:
            transaction.dry_run = request.validate_only
            if done := await transaction.requests.find(request_id):
                conversation_id = done["subject_id"]
                call.mark_replayed()
            else:
                conversation_id = await _make(transaction, new, users, call)
                await transaction.requests.record(request_id, subject_id=conversation_id)
            (view,) = await transaction.conversations.views([(conversation_id, call.actor_id)])
            # An actor's first message is its own, and stays whole for it wherever it is now.
            first = ({**WHOLE, "id": conversation_id}, 1)
            (message,) = await transaction.messages.find([first]) if new.message else [None]
        if view is None:
            raise NotFound("conversation", conversation_id)

        response = pb.CreateConversationResponse(conversation=wire.conversation(view))
        if message:
            response.initial_message.CopyFrom(wire.message(message))
        return _unmade(response, request) if request.validate_only else response

    async def GetConversation(
        self, request: pb.GetConversationRequest, call: Call
    ) -> pb.GetConversationResponse:
        with Fields() as fields:
            reference = fields.conversation("conversation_id", request.conversation_id)

        view = await self._lookups.view(request.conversation_id, reference, call)

        return pb.GetConversationResponse(conversation=wire.conversation(view))

    async def ListConversations(
        self, request: pb.ListConversationsRequest, call: Call
    ) -> pb.ListConversationsResponse:
        with Fields() as fields:
            limit = fields.page_size(request.page_size)
            external_id = fields.external_id("external_id", request.external_id)
            title = fields.line("title_contains", request.title_contains, limit=256)
            creator = fields.user("creator_id", request.creator_id, required=False)
            participant = fields.user("participant_id", request.participant_id, required=False)
            created_after, created_before = fields.span(
                request, after="created_after", before="created_before"
            )
            metadata = fields.metadata("metadata_contains", request.metadata_contains)
        binding = paging.binding(call, request)
        position = self._page_tokens.open(request.page_token, binding)

        creator_id = await self._require_user("creator_id", request.creator_id, creator)
        participant_id = await self._require_user(
            "participant_id", request.participant_id, participant
        )
        async with self._store.snapshot() as snapshot:
            if (
                request.show_deleted
                and call.actor
                and not await snapshot.participants.owns_any(call.actor.id)
            ):
                raise PermissionDenied("PERMISSION_DENIED", rule="show_deleted is for owners")
            rows = await snapshot.conversations.list(
                actor_id=call.actor_id,
                show_deleted=request.show_deleted,
                title_contains=title,
                is_active=request.is_active if request.HasField("is_active") else None,
                external_id=external_id,
                creator_id=creator_id,
                participant_id=participant_id,
                created_after=created_after,
                created_before=created_before,
                metadata_contains=metadata,
                after=paging.time_and_id(position),
                limit=limit + 1,
            )

        conversations = paging.cut(map(wire.conversation, rows[:limit]))
        response = pb.ListConversationsResponse(conversations=conversations)
        if len(conversations) < len(rows):
            last = rows[len(conversations) - 1]
            response.next_page_token = self._page_tokens.seal(
                paging.place(last["created_at"], last["id"]), binding
            )
        return response

    async def _require_user(
        self, field: str, named: str, reference: UUID | str | None
    ) -> UUID | None:
        """The id of the user to filter by, if there is one to filter by."""
        if reference is None:
            return None
        row = await self._lookups.user(reference)
        if row is None:
            raise user_not_found(field, named)
        id: UUID = row["id"]
        return id

    async def _find_users(self, new: NewConversation) -> Users:
        """Everybody whom the request names, by whatever it names them."""
        named = {entrant.reference for entrant in new.entrants}
        if new.message:
            named.add(new.message[1])
        references = [reference for reference in named if reference is not None]
        rows = await self._lookups.users(references)
        return {
            reference: row
            for reference, row in zip(references, rows, strict=True)
            if row is not None
        }


# Parse


def _new_conversation(
    fields: Fields, request: pb.CreateConversationRequest, call: Call
) -> NewConversation:
    conversation = request.conversation
    if not request.HasField("conversation"):
        fields.reject("REQUIRED", "conversation")
    if len(request.participants) + len(request.invitations) > MAX_PARTICIPANTS:
        field = "participants" if request.participants else "invitations"
        fields.reject("TOO_MANY_ITEMS", field, limit=MAX_PARTICIPANTS)
    title = fields.line("conversation.title", conversation.title, limit=256)
    return NewConversation(
        columns={
            "title": title,
            "slug": fields.slug("conversation.slug", conversation.slug)
            if conversation.slug
            else slug_from(title),
            "is_active": conversation.is_active if conversation.HasField("is_active") else True,
            "members_may_invite": conversation.members_may_invite
            if conversation.HasField("members_may_invite")
            else True,
            "metadata": fields.metadata("conversation.metadata", conversation.metadata),
            "external_id": fields.external_id("conversation.external_id", conversation.external_id),
        },
        entrants=[
            _creator(fields, conversation, call),
            *_entrants(fields, "participants", request.participants, Move.ADD),
            *_entrants(fields, "invitations", request.invitations, Move.INVITE),
        ],
        message=wire.draft(fields, request.initial_message, actor=call.actor, at="initial_message.")
        if request.HasField("initial_message")
        else None,
    )


def _creator(fields: Fields, conversation: pb.Conversation, call: Call) -> Entrant:
    """The creator as named; the actor where nobody is."""
    field = "conversation.creator_id"
    reference = fields.user(field, conversation.creator_id, required=not call.actor)
    return Entrant(
        field=field,
        named=conversation.creator_id,
        reference=reference or call.actor_id,
        move=Move.ADD,
        role=ParticipantRole.OWNER,
    )


def _entrants(
    fields: Fields, name: str, people: Iterable[participant_pb2.NewParticipant], move: Move
) -> list[Entrant]:
    return [
        Entrant(
            field=f"{name}[{n}].user_id",
            named=person.user_id,
            reference=fields.user(f"{name}[{n}].user_id", person.user_id),
            move=move,
            role=fields.enum(
                f"{name}[{n}].role", person.role, ParticipantRole, ParticipantRole.MEMBER
            ),
            reason=fields.line(f"{name}[{n}].reason", person.reason, limit=500),
            hide_history=person.hide_history,
        )
        for n, person in enumerate(people)
    ]


def slug_from(title: str) -> str:
    """A readable slug: the title's letters and digits, and a short random tail."""
    ascii_title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_title).strip("-")[:48].strip("-")
    return f"{words or 'conversation'}-{secrets.token_hex(6)}"


# Transact


async def _make(transaction: Transaction, new: NewConversation, users: Users, call: Call) -> UUID:
    """The conversation, who joins it, its first message, who is invited to it; in that order."""
    entrants = _identify(new, users, call)
    creator_id = entrants[0][1]
    conversation = await transaction.conversations.create(
        actor_id=call.actor_id, creator_id=creator_id, **new.columns
    )
    id: UUID = conversation["id"]
    people = await transaction.participants.people(id, [user_id for _, user_id in entrants])

    def changes(move: Move, message_id: UUID | None = None) -> list[Change]:
        made = (
            enter(
                move,
                people[user_id],
                last_sequence=1 if message_id else 0,
                role=entrant.role,
                invited_by=creator_id if user_id != creator_id else None,
                actor_id=call.actor_id,
                initial_message_id=message_id,
                reason=entrant.reason,
                hide_history=entrant.hide_history,
            )
            for entrant, user_id in entrants
            if entrant.move is move
        )
        return [change for change in made if change]

    joining = changes(Move.ADD)
    await transaction.participants.change(id, after_version=1, changes=joining)
    message_id = await _append_first(transaction, id, new, users, call)
    inviting = changes(Move.INVITE, message_id)
    require_room(0, joining + inviting)
    await transaction.participants.change(
        id, after_version=1 + len(joining) + (message_id is not None), changes=inviting
    )
    return id


def _identify(new: NewConversation, users: Users, call: Call) -> list[tuple[Entrant, UUID]]:
    """Each entrant's user, the creator first and once; nobody else may be named twice."""
    creator, *_ = new.entrants
    identified: dict[UUID, Entrant] = {}
    with Fields() as fields:
        for entrant in new.entrants:
            user = users.get(entrant.reference) if entrant.reference else None
            if user is None:
                raise user_not_found(entrant.field, entrant.named)
            if entrant is creator and call.actor and user["id"] != call.actor.id:
                rule = f"{entrant.field} may name nobody but the actor itself"
                raise PermissionDenied("PERMISSION_DENIED", rule=rule)
            if user["deleted_at"] or not user["is_active"]:
                raise FailedPrecondition("USER_INACTIVE", field=entrant.field)
            other = identified.setdefault(user["id"], entrant)
            if other not in (entrant, creator):
                fields.reject("DUPLICATE", entrant.field, other=other.field)
    return [(entrant, user_id) for user_id, entrant in identified.items()]


async def _append_first(
    transaction: Transaction, id: UUID, new: NewConversation, users: Users, call: Call
) -> UUID | None:
    """The id of the initial message, if there is one, appended like any other."""
    if new.message is None:
        return None
    draft, sender = new.message
    if isinstance(sender, str) and sender in users:
        draft = replace(draft, sender_id=users[sender]["id"])
    item = Append(conversation=str(id), conversation_id=id, actor=call.actor, drafts=(draft,))
    (outcome,), _ = await transaction.messages.append([item])
    if isinstance(outcome, ParleyError):
        raise outcome
    assert isinstance(outcome, Accepted)
    return outcome.messages[0].id


# Answer


def _unmade(
    response: pb.CreateConversationResponse, request: pb.CreateConversationRequest
) -> pb.CreateConversationResponse:
    """What a dry run would have made: without ids, sequence, times and a slug made up for it."""
    wire.unmade(response.conversation)
    if not request.conversation.slug:
        response.conversation.ClearField("slug")
    if response.HasField("initial_message"):
        wire.unmade(response.initial_message)
        response.initial_message.ClearField("conversation_id")
    return response
