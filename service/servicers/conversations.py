import re
import secrets
import unicodedata
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from parley.v1 import conversation_pb2 as pb
from parley.v1 import conversation_pb2_grpc, participant_pb2
from service import masks, paging, wire
from service.domain import ParticipantRole, ParticipantStatus
from service.errors import (
    InvalidArgument,
    NotFound,
    ParleyError,
    PermissionDenied,
)
from service.fields import Fields
from service.identity import Call, checks_actor
from service.ids import lock_of
from service.lookups import Lookups
from service.making import Maker
from service.opening import open_all, show_all, weight_of
from service.paging import PageTokens
from service.repositories.base import Row
from service.repositories.conversations import Purged
from service.repositories.inbox import Place
from service.rules import conversations, deletion
from service.rules.conversations import Entrant, NewConversation, Pair
from service.rules.etags import current_etag, require_etag
from service.rules.participants import MAX_PARTICIPANTS, Move, enter
from service.rules.requests import RequestId
from service.rules.rights import (
    Right,
    require_live,
    require_right,
    require_usable,
    require_writable,
    user_not_found,
)
from service.store import Store, Transaction

# What nobody says of a direct conversation.
PLAIN: dict[str, Any] = {
    "title": "",
    "is_active": True,
    "members_may_invite": True,
    "metadata": "{}",
    "external_id": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What every call that changes or removes a conversation asks for."""

    # The conversation as named, and as what.
    conversation: str
    reference: UUID | str
    etag: str
    # Remembered outside the conversation: one that was renamed or purged is no longer found by the
    # name that the call has for it, and a call that is repeated must be.
    request: RequestId | None
    dry_run: bool = False


# What a call does to a conversation that is locked, as the caller sees it; None where it is missing
# or hidden. Returns its id, or None where there was nothing to do.
Deed = Callable[[Transaction, Row | None], Awaitable[UUID | None]]

# A user whom a request names: the field, the name, and what the name may be.
NamedUser = tuple[str, str, UUID | str | None]


class ConversationServicer(conversation_pb2_grpc.ConversationServiceServicer):
    """Conversations: made, found, listed, changed, removed."""

    def __init__(self, store: Store, lookups: Lookups, page_tokens: PageTokens) -> None:
        self._store = store
        self._lookups = lookups
        self._page_tokens = page_tokens
        self._maker = Maker(store, open_all, show_all, name="create conversations", weigh=weight_of)

    async def CreateConversation(
        self, request: pb.CreateConversationRequest, call: Call
    ) -> pb.CreateConversationResponse:
        with Fields() as fields:
            new = _new_conversation(fields, request, call)

        view, message = await self._maker.make(new, call)

        response = pb.CreateConversationResponse(conversation=wire.conversation(view))
        if message:
            response.initial_message.CopyFrom(wire.message(message))
        return _unmade(response, request) if request.validate_only else response

    @checks_actor
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
        async with self._store.long_snapshot() as snapshot:
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

    @checks_actor
    async def ListUserConversations(
        self, request: pb.ListUserConversationsRequest, call: Call
    ) -> pb.ListUserConversationsResponse:
        with Fields() as fields:
            user = fields.user("user_id", request.user_id, required=not call.actor)
            limit = fields.page_size(request.page_size)
            statuses = fields.enums("statuses", request.statuses, ParticipantStatus)
            title = fields.line("title_contains", request.title_contains, limit=256)
            metadata = fields.metadata("metadata_contains", request.metadata_contains)
        binding = paging.binding(call, request)
        position = self._page_tokens.open(request.page_token, binding)

        user_id = await self._lookups.own_id(user, call, of="conversations")
        if user_id is None:
            raise NotFound("user", request.user_id)
        async with self._store.snapshot() as snapshot:
            lines, more = await snapshot.inbox.list(
                user_id,
                statuses=statuses or [ParticipantStatus.JOINED],
                is_active=request.is_active if request.HasField("is_active") else None,
                metadata_contains=metadata,
                title_contains=title,
                unread_only=request.unread_only,
                after=Place.of(position) if position else None,
                limit=limit,
                byte_limit=paging.MAX_RESPONSE_BYTES,
            )
        # An empty inbox may be nobody's.
        if call.presumed and not (lines and lines[0].may_act):
            await self._lookups.actor(call.presumed)

        shown = paging.cut(map(wire.user_conversation, lines))
        response = pb.ListUserConversationsResponse(user_conversations=shown)
        if more or len(shown) < len(lines):
            place = lines[len(shown) - 1].place
            response.next_page_token = self._page_tokens.seal(place.position(), binding)
        return response

    async def GetOrCreateDirectConversation(
        self, request: pb.GetOrCreateDirectConversationRequest, call: Call
    ) -> pb.GetOrCreateDirectConversationResponse:
        with Fields() as fields:
            user = fields.user("user_id", request.user_id, required=not call.actor)
            other = fields.user("other_user_id", request.other_user_id)
            request_id = fields.request_id(call, request)
            lock = request_id.lock if request_id else None

        async with self._store.transaction(lock=lock) as transaction:
            if done := await transaction.requests.find(request_id):
                call.mark_replayed()
                conversation_id, created = done["subject_id"], done["created"]
            else:
                named = [
                    ("user_id", request.user_id, user or call.actor_id),
                    ("other_user_id", request.other_user_id, other),
                ]
                conversation_id, created = await _meet(transaction, named, call)
                await transaction.requests.record(
                    request_id, subject_id=conversation_id, created=created
                )
            (view,) = await transaction.conversations.views([(conversation_id, call.actor_id)])
        if view is None:
            raise NotFound("conversation", conversation_id)

        return pb.GetOrCreateDirectConversationResponse(
            conversation=wire.conversation(view), created=created
        )

    async def UpdateConversation(
        self, request: pb.UpdateConversationRequest, call: Call
    ) -> pb.UpdateConversationResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call, etag=_given_etag(request))
            if request.update_mask.paths and not request.HasField("conversation"):
                fields.reject("REQUIRED", "conversation")
            taken = masks.paths(fields, request, "conversation")
            values = _values(fields, request.conversation, taken)
            patch = fields.metadata("metadata_patch", request.metadata_patch)

        async def update(transaction: Transaction, view: Row | None) -> UUID:
            view = _require(Right.UPDATE, view, asked, call)
            with Fields() as fields:
                metadata = wire.patched(fields, {**view, **values}["metadata"], patch)
            changes = conversations.update(view, {**values, "metadata": metadata})
            require_etag(asked.etag, current_etag(view))
            if changes:
                await transaction.conversations.update(view, changes, actor_id=call.actor_id)
            return _id(view)

        view = await self._change(asked, call, update)
        assert view is not None

        conversation = wire.conversation(view)
        return pb.UpdateConversationResponse(
            conversation=wire.unmade(conversation) if request.validate_only else conversation
        )

    async def DeleteConversation(
        self, request: pb.DeleteConversationRequest, call: Call
    ) -> pb.DeleteConversationResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)

        async def delete(transaction: Transaction, view: Row | None) -> UUID | None:
            if view is not None:
                _require(Right.DELETE, view, asked, call)
            if not deletion.delete(
                view,
                kind="conversation",
                name=asked.conversation,
                etag=asked.etag,
                allow_missing=request.allow_missing,
            ):
                return None
            assert view is not None
            await transaction.conversations.delete(view, actor_id=call.actor_id)
            return _id(view)

        view = await self._change(asked, call, delete)

        conversation = wire.conversation(view) if view else None
        return pb.DeleteConversationResponse(conversation=conversation)

    async def UndeleteConversation(
        self, request: pb.UndeleteConversationRequest, call: Call
    ) -> pb.UndeleteConversationResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)

        async def undelete(transaction: Transaction, view: Row | None) -> UUID:
            view = _require(Right.DELETE, view, asked, call)
            deletion.undelete(view, kind="conversation", name=asked.conversation, etag=asked.etag)
            await transaction.conversations.undelete(view, actor_id=call.actor_id)
            return _id(view)

        view = await self._change(asked, call, undelete)
        assert view is not None

        return pb.UndeleteConversationResponse(conversation=wire.conversation(view))

    async def PurgeConversation(
        self, request: pb.PurgeConversationRequest, call: Call
    ) -> pb.PurgeConversationResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)

        async with self._store.transaction(lock=_lock_of(asked)) as transaction:
            if done := await transaction.requests.find(asked.request):
                call.mark_replayed()
                purged = Purged(done["message_count"], done["participant_count"])
            else:
                view = await _locked(transaction, asked, call)
                purged = Purged()
                if deletion.purge(
                    view,
                    kind="conversation",
                    name=asked.conversation,
                    etag=asked.etag,
                    allow_missing=request.allow_missing,
                ):
                    assert view is not None
                    purged = await transaction.conversations.purge(view)
                await transaction.requests.record(
                    asked.request,
                    subject_id=_id(view) if view else None,
                    message_count=purged.message_count,
                    participant_count=purged.participant_count,
                )

        return pb.PurgeConversationResponse(
            message_count=purged.message_count, participant_count=purged.participant_count
        )

    async def _change(self, asked: Asked, call: Call, do: Deed) -> Row | None:
        """Do it under the conversation's lock; the conversation then, if anything was done."""
        async with self._store.transaction(lock=_lock_of(asked)) as transaction:
            transaction.dry_run = asked.dry_run
            if done := await transaction.requests.find(asked.request):
                call.mark_replayed()
                conversation_id = done["subject_id"]
            else:
                conversation_id = await do(transaction, await _locked(transaction, asked, call))
                await transaction.requests.record(asked.request, subject_id=conversation_id)
            if conversation_id is None:
                return None
            (view,) = await transaction.conversations.views([(conversation_id, call.actor_id)])
        if view is None:
            raise NotFound("conversation", asked.conversation)
        return view

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
    given = masks.updatable(conversation) - (set() if conversation.slug else {"slug"})
    return NewConversation(
        columns={
            "slug": slug_from(conversation.title),
            **_values(fields, conversation, given),
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
        actor=call.actor,
        request=fields.request_id(call, request),
        dry_run=request.validate_only,
    )


def _values(fields: Fields, conversation: pb.Conversation, names: set[str]) -> dict[str, Any]:
    """Those of the values that clients may change which are asked for."""
    read: dict[str, Callable[[], Any]] = {
        "title": lambda: fields.line("conversation.title", conversation.title, limit=256),
        "slug": lambda: fields.slug("conversation.slug", conversation.slug),
        "is_active": lambda: conversation.is_active or not conversation.HasField("is_active"),
        "members_may_invite": lambda: (
            conversation.members_may_invite or not conversation.HasField("members_may_invite")
        ),
        "metadata": lambda: fields.metadata("conversation.metadata", conversation.metadata),
    }
    return {name: value() for name, value in read.items() if name in names}


def _asked(
    fields: Fields,
    request: pb.UpdateConversationRequest
    | pb.DeleteConversationRequest
    | pb.UndeleteConversationRequest
    | pb.PurgeConversationRequest,
    call: Call,
    etag: tuple[str, str] | None = None,
) -> Asked:
    reference = fields.conversation("conversation_id", request.conversation_id)
    return Asked(
        conversation=request.conversation_id,
        reference=reference,
        etag=fields.etag(*(etag or ("etag", request.etag))),
        request=fields.request_id(call, request, named=reference),
        dry_run=isinstance(request, pb.UpdateConversationRequest) and request.validate_only,
    )


def _given_etag(request: pb.UpdateConversationRequest) -> tuple[str, str]:
    """The request's own etag, or the one inside the resource, and the field that holds it."""
    if request.etag:
        return "etag", request.etag
    return "conversation.etag", request.conversation.etag


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


async def _meet(transaction: Transaction, named: list[NamedUser], call: Call) -> tuple[UUID, bool]:
    """The one conversation of two users, with both in it; and whether it was made just now."""
    user_ids = await _both(transaction, named, call)
    pair = Pair.of(*user_ids)
    await transaction.lock(pair.lock)
    conversation = await transaction.conversations.find_direct(pair)
    if conversation:
        await transaction.lock(lock_of(conversation["id"]))
        # It may have been purged while we waited.
        conversation = await transaction.conversations.find_direct(pair)
    created = conversation is None
    if conversation is None:
        conversation = await _make_direct(transaction, pair, user_ids[0], call)
    require_live(conversation)
    people = await transaction.participants.people(conversation["id"], user_ids)
    for (field, _, _), user_id in zip(named, user_ids, strict=True):
        require_usable(people[user_id], field=field)
    entering = [
        enter(
            Move.ADD,
            people[user_id],
            last_sequence=conversation["last_sequence"],
            role=ParticipantRole.OWNER,
            invited_by=user_ids[0] if user_id != user_ids[0] else None,
            actor_id=call.actor_id,
        )
        for user_id in user_ids
    ]
    changes = [change for change in entering if change]
    if changes:
        require_writable(conversation)
    await transaction.participants.change({conversation["id"]: changes})
    return _id(conversation), created


async def _make_direct(transaction: Transaction, pair: Pair, creator_id: UUID, call: Call) -> Row:
    columns = {
        **PLAIN,
        "slug": slug_from(""),
        "creator_id": creator_id,
        "actor_id": call.actor_id,
        "direct_first_user_id": pair.first,
        "direct_second_user_id": pair.second,
    }
    (made,) = await transaction.conversations.create([columns])
    if isinstance(made, ParleyError):
        raise made
    conversation = await transaction.conversations.find(made)
    assert conversation
    return conversation


async def _both(transaction: Transaction, named: list[NamedUser], call: Call) -> list[UUID]:
    """The ids of two different users, the first of whom is the actor, where there is one."""
    references = [reference for _, _, reference in named if reference is not None]
    user, other = await transaction.users.find(references)
    if call.actor and (user is None or user["id"] != call.actor.id):
        rule = "user_id may name nobody but the actor itself"
        raise PermissionDenied("PERMISSION_DENIED", rule=rule)
    for (field, name, _), row in zip(named, (user, other), strict=True):
        if row is None:
            raise user_not_found(field, name)
    assert user is not None
    assert other is not None
    if user["id"] == other["id"]:
        raise InvalidArgument("DUPLICATE", field="other_user_id", other="user_id")
    return [user["id"], other["id"]]


def _lock_of(asked: Asked) -> int | None:
    """What a transaction locks first, of the two that it locks: the scope of its request_id."""
    return asked.request.lock if asked.request else None


async def _locked(transaction: Transaction, asked: Asked, call: Call) -> Row | None:
    """The conversation under its lock, as the caller sees it; None where missing or hidden."""
    id: UUID | None
    if isinstance(asked.reference, UUID):
        id = asked.reference
    else:
        (id,) = await transaction.conversations.resolve([asked.reference])
    if id is None:
        return None
    await transaction.lock(lock_of(id))
    (view,) = await transaction.conversations.views([(id, call.actor_id)])
    return view


def _require(right: Right, view: Row | None, asked: Asked, call: Call) -> Row:
    """The conversation, if the caller may do that to it: the system may do all."""
    if view is not None and call.actor is None:
        return view
    return require_right(right, view, conversation=asked.conversation)


def _id(conversation: Row) -> UUID:
    id: UUID = conversation["id"]
    return id


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
