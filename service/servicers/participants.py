from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from uuid import UUID

from parley.v1 import participant_pb2 as pb
from parley.v1 import participant_pb2_grpc
from service import masks, paging, wire
from service.domain import ParticipantRole, ParticipantStatus
from service.errors import FailedPrecondition, NotFound, PermissionDenied
from service.fields import Fields
from service.identity import Call, checks_actor
from service.ids import lock_of
from service.lookups import Lookups
from service.paging import PageTokens
from service.reading import Reader
from service.repositories.base import Row
from service.rules.cursors import Reading
from service.rules.etags import etag_of, require_etag
from service.rules.participants import (
    Change,
    Move,
    appoint,
    dismiss,
    enter,
    leave,
    move,
    require_may_add,
    require_may_appoint,
    require_may_dismiss,
    require_may_invite,
    require_owner_remains,
    require_room,
)
from service.rules.requests import RequestId
from service.rules.rights import (
    Person,
    Right,
    require_right,
    require_usable,
    require_writable,
    user_not_found,
)
from service.store import Store, Transaction

INITIAL = "initial_message"
PRESENT = [ParticipantStatus.INVITED, ParticipantStatus.JOINED]

# A user as a request names it, and what the name may be: an id, a username, nothing.
Named = tuple[str, UUID | str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What every call that moves a participant asks for."""

    conversation: str
    conversation_reference: UUID | str
    subject: Named
    # Somebody else whom the call names: an inviter, a successor.
    other: Named = ("", None)
    etag: str = ""
    request: RequestId | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """As what, why and with what somebody is brought in."""

    role: ParticipantRole
    reason: str
    hide_history: bool
    message_key: UUID | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A conversation under its lock, and those in it whom a call concerns, as far as they exist."""

    asked: Asked
    call: Call
    conversation: Row
    subject: Person | None
    other: Person | None
    own: Person | None

    @property
    def last_sequence(self) -> int:
        return int(self.conversation["last_sequence"])

    def require_subject(self) -> Person:
        """The user that the call is about."""
        if self.subject is None:
            raise user_not_found("user_id", self.asked.subject[0])
        return self.subject

    def require_self(self) -> Person:
        """The subject, who must be the actor, where there is one.

        Whoever has any row here may ask about it, even one that no longer sees the conversation: an
        invitation that was declined answers as one.
        """
        if self.call.actor:
            if self.own is None or self.own["status"] is None:
                raise NotFound("conversation", self.asked.conversation)
            if self.subject is None or self.subject["user_id"] != self.call.actor.id:
                if not self.own["sees"]:
                    raise NotFound("conversation", self.asked.conversation)
                rule = "only the participant itself may do that"
                raise PermissionDenied("PERMISSION_DENIED", rule=rule)
        return self.require_subject()

    def require_participant(self) -> Person:
        """The subject, who is or was somebody here."""
        if self.subject is None or self.subject["status"] is None:
            raise NotFound("participant", self.asked.subject[0])
        return self.subject

    def require_right(self, right: Right) -> Person | None:
        """The actor, who must have the right; None where the system calls, which has them all."""
        if self.call.actor is None:
            return None
        return require_right(right, self.own, conversation=self.asked.conversation)

    def require_many(self) -> None:
        """Raise unless the conversation takes changes, and is not one of two for ever."""
        require_writable(self.conversation)
        if self.conversation["is_direct"]:
            raise FailedPrecondition("DIRECT_CONVERSATION")

    def require_etag(self) -> None:
        """Raise unless the subject stands as the request's etag says; the last of all checks."""
        person = self.subject
        current = None
        if person and person["status"]:
            current = etag_of(person["user_id"], person["revision"])
        require_etag(self.asked.etag, current)


Decision = Callable[[Transaction, Scene], Awaitable[list[Change]]]


class ParticipantServicer(participant_pb2_grpc.ParticipantServiceServicer):
    """Who is in a conversation, as what, and how it came to be."""

    def __init__(
        self, store: Store, lookups: Lookups, reader: Reader, page_tokens: PageTokens
    ) -> None:
        self._store = store
        self._lookups = lookups
        self._reader = reader
        self._page_tokens = page_tokens

    async def InviteParticipant(
        self, request: pb.InviteParticipantRequest, call: Call
    ) -> pb.InviteParticipantResponse:
        with Fields() as fields:
            asked, terms = _entry(fields, request, call)
            terms = replace(terms, message_key=fields.optional_message_key(request, INITIAL))

        row = await self._change(asked, call, partial(_bring_in, Move.INVITE, terms))

        return pb.InviteParticipantResponse(participant=_answer(row, asked))

    async def AddParticipant(
        self, request: pb.AddParticipantRequest, call: Call
    ) -> pb.AddParticipantResponse:
        with Fields() as fields:
            asked, terms = _entry(fields, request, call)

        row = await self._change(asked, call, partial(_bring_in, Move.ADD, terms))

        return pb.AddParticipantResponse(participant=_answer(row, asked))

    async def AcceptInvitation(
        self, request: pb.AcceptInvitationRequest, call: Call
    ) -> pb.AcceptInvitationResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)

        async def accept(_: Transaction, scene: Scene) -> list[Change]:
            person = scene.require_self()
            require_writable(scene.conversation)
            require_usable(person, field="user_id")
            return _moved(Move.ACCEPT, person, scene)

        row = await self._change(asked, call, accept)

        return pb.AcceptInvitationResponse(participant=wire.participant(row))

    async def DeclineInvitation(
        self, request: pb.DeclineInvitationRequest, call: Call
    ) -> pb.DeclineInvitationResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)
            reason = fields.line("reason", request.reason, limit=500)

        async def decline(_: Transaction, scene: Scene) -> list[Change]:
            return _moved(Move.DECLINE, scene.require_self(), scene, reason)

        row = await self._change(asked, call, decline)

        return pb.DeclineInvitationResponse(participant=wire.participant(row))

    async def RevokeInvitation(
        self, request: pb.RevokeInvitationRequest, call: Call
    ) -> pb.RevokeInvitationResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call, names_itself=False)
            reason = fields.line("reason", request.reason, limit=500)

        row = await self._change(asked, call, partial(_dismiss, Move.REVOKE, reason))

        return pb.RevokeInvitationResponse(participant=wire.participant(row))

    async def RemoveParticipant(
        self, request: pb.RemoveParticipantRequest, call: Call
    ) -> pb.RemoveParticipantResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call, names_itself=False)
            reason = fields.line("reason", request.reason, limit=500)

        row = await self._change(asked, call, partial(_dismiss, Move.REMOVE, reason))

        return pb.RemoveParticipantResponse(participant=wire.participant(row))

    async def UpdateParticipant(
        self, request: pb.UpdateParticipantRequest, call: Call
    ) -> pb.UpdateParticipantResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call, names_itself=False)
            if not request.etag:
                etag = fields.etag("participant.etag", request.participant.etag)
                asked = replace(asked, etag=etag)
            # Whatever the mask takes, it takes the role.
            masks.paths(fields, request, "participant")
            role = fields.enum("participant.role", request.participant.role, ParticipantRole)

        row = await self._change(asked, call, partial(_appoint, role))

        return pb.UpdateParticipantResponse(participant=_answer(row, asked))

    async def LeaveConversation(
        self, request: pb.LeaveConversationRequest, call: Call
    ) -> pb.LeaveConversationResponse:
        with Fields() as fields:
            named = request.successor_user_id
            successor = fields.user("successor_user_id", named, required=False)
            asked = _asked(fields, request, call, other=(named, successor))
            reason = fields.line("reason", request.reason, limit=500)

        async def depart(transaction: Transaction, scene: Scene) -> list[Change]:
            person = scene.require_self()
            if successor is not None and scene.other is None:
                raise user_not_found("successor_user_id", named)
            crowd = await transaction.participants.crowd(scene.conversation["id"])
            return leave(
                person,
                scene.other,
                owners=crowd.owners,
                joined=crowd.joined,
                last_sequence=scene.last_sequence,
                actor_id=call.actor_id,
                reason=reason,
            )

        row = await self._change(asked, call, depart)

        return pb.LeaveConversationResponse(participant=wire.participant(row))

    @checks_actor
    async def GetParticipant(
        self, request: pb.GetParticipantRequest, call: Call
    ) -> pb.GetParticipantResponse:
        with Fields() as fields:
            reference = fields.conversation("conversation_id", request.conversation_id)
            user = fields.user("user_id", request.user_id, required=not call.actor)

        view = await self._lookups.live_view(request.conversation_id, reference, call)
        user_id = await self._lookups.user_id(user) or call.actor_id
        async with self._store.snapshot() as snapshot:
            row = await snapshot.participants.find(
                view["id"], user_id, only_user_id=_only_own(view)
            )

        if row is None:
            raise NotFound("participant", request.user_id or call.actor_id)
        return pb.GetParticipantResponse(participant=wire.participant(row))

    @checks_actor
    async def ListParticipants(
        self, request: pb.ListParticipantsRequest, call: Call
    ) -> pb.ListParticipantsResponse:
        with Fields() as fields:
            reference = fields.conversation("conversation_id", request.conversation_id)
            limit = fields.page_size(request.page_size)
            statuses = fields.enums("statuses", request.statuses, ParticipantStatus) or PRESENT
            roles = fields.enums("roles", request.roles, ParticipantRole)

        view = await self._lookups.live_view(request.conversation_id, reference, call)
        binding = paging.binding(call, request, view["id"])
        position = self._page_tokens.open(request.page_token, binding)
        async with self._store.snapshot() as snapshot:
            rows = await snapshot.participants.list(
                view["id"],
                only_user_id=_only_own(view),
                statuses=statuses,
                roles=roles,
                after=paging.time_and_id(position),
                limit=limit + 1,
            )

        participants = paging.cut(map(wire.participant, rows[:limit]))
        response = pb.ListParticipantsResponse(participants=participants)
        if len(participants) < len(rows):
            last = rows[len(participants) - 1]
            response.next_page_token = self._page_tokens.seal(
                paging.place(last["created_at"], last["user_id"]), binding
            )
        return response

    async def ListInvitations(
        self, request: pb.ListInvitationsRequest, call: Call
    ) -> pb.ListInvitationsResponse:
        with Fields() as fields:
            user = fields.user("user_id", request.user_id, required=not call.actor)
            limit = fields.page_size(request.page_size)

        user_id = await self._lookups.own_id(user, call, of="invitations")
        if user_id is None:
            raise user_not_found("user_id", request.user_id)
        binding = paging.binding(call, request)
        position = self._page_tokens.open(request.page_token, binding)
        async with self._store.snapshot() as snapshot:
            found, more = await snapshot.invitations.list(
                user_id,
                after=paging.time_and_id(position),
                limit=limit,
                byte_limit=paging.MAX_RESPONSE_BYTES,
            )

        invitations = paging.cut(map(wire.invitation, found))
        response = pb.ListInvitationsResponse(invitations=invitations)
        if more or len(invitations) < len(found):
            last = found[len(invitations) - 1].participant
            response.next_page_token = self._page_tokens.seal(
                paging.place(last["status_at"], last["conversation_id"]), binding
            )
        return response

    async def MarkRead(self, request: pb.MarkReadRequest, call: Call) -> pb.MarkReadResponse:
        with Fields() as fields:
            reference = fields.conversation("conversation_id", request.conversation_id)
            user = fields.user("user_id", request.user_id, required=not call.actor)
            # 0 is before the first message: a conversation that is empty is read to its end.
            key = fields.message_key(request, lowest=0)
            request_id = fields.request_id(call, request)

        item = Reading(
            conversation=request.conversation_id,
            conversation_id=await self._lookups.conversation_id(request.conversation_id, reference),
            actor_id=call.actor_id,
            user=request.user_id,
            user_id=await self._lookups.user_id(user) or call.actor_id,
            key=key,
            request=request_id,
        )
        read = await self._reader.mark(item, call)

        if read.replayed:
            call.mark_replayed()
        return pb.MarkReadResponse(
            participant=wire.participant(read.participant),
            unread_count=read.participant["unread_count"],
        )

    async def _change(self, asked: Asked, call: Call, decide: Decision) -> Row:
        """Decide under the conversation's lock, store what was decided, return the participant."""
        conversation_id = await self._lookups.conversation_id(
            asked.conversation, asked.conversation_reference
        )
        subject_id = await self._lookups.user_id(asked.subject[1])
        other_id = await self._lookups.user_id(asked.other[1])

        async with self._store.transaction(lock=lock_of(conversation_id)) as transaction:
            transaction.dry_run = asked.dry_run
            if done := await transaction.requests.find(asked.request, conversation_id):
                call.mark_replayed()
                return await self._replay(transaction, asked, call, done)
            conversation = await transaction.conversations.find(conversation_id)
            if conversation is None:
                raise NotFound("conversation", asked.conversation)
            ids = [id for id in (subject_id, other_id, call.actor_id) if id]
            people = await transaction.participants.people(conversation_id, ids)
            scene = Scene(
                asked=asked,
                call=call,
                conversation=conversation,
                subject=people.get(subject_id) if subject_id else None,
                other=people.get(other_id) if other_id else None,
                own=people.get(call.actor_id) if call.actor_id else None,
            )
            changes = await decide(transaction, scene)
            scene.require_etag()
            await transaction.participants.change({conversation_id: changes})
            if subject_id:
                await transaction.requests.record(
                    asked.request, conversation_id=conversation_id, subject_id=subject_id
                )
            row = await transaction.participants.find(conversation_id, subject_id)
        assert row is not None
        return row

    async def _replay(self, transaction: Transaction, asked: Asked, call: Call, done: Row) -> Row:
        """The participant as it stands, if the actor still sees it; its own row it always does."""
        conversation_id, subject_id = done["conversation_id"], done["subject_id"]
        only = call.actor_id
        if subject_id != call.actor_id:
            (view,) = await transaction.conversations.views([(conversation_id, call.actor_id)])
            if view is None:
                raise NotFound("conversation", asked.conversation)
            only = _only_own(view)
        row = await transaction.participants.find(conversation_id, subject_id, only_user_id=only)
        if row is None:
            raise NotFound("participant", asked.subject[0])
        return row


Entry = pb.InviteParticipantRequest | pb.AddParticipantRequest
Concerning = (
    pb.AcceptInvitationRequest
    | pb.DeclineInvitationRequest
    | pb.LeaveConversationRequest
    | pb.RevokeInvitationRequest
    | pb.RemoveParticipantRequest
    | pb.UpdateParticipantRequest
)


def _entry(fields: Fields, request: Entry, call: Call) -> tuple[Asked, Terms]:
    """A call that brings somebody in, and the terms on which it does."""
    named = request.invited_by_user_id
    inviter = fields.user("invited_by_user_id", named, required=not call.actor)
    asked = _asked(fields, request, call, names_itself=False)
    terms = Terms(
        role=fields.enum("role", request.role, ParticipantRole, ParticipantRole.MEMBER),
        reason=fields.line("reason", request.reason, limit=500),
        hide_history=request.hide_history,
    )
    return replace(asked, other=(named, inviter or call.actor_id)), terms


def _asked(
    fields: Fields,
    request: Entry | Concerning,
    call: Call,
    *,
    names_itself: bool = True,
    other: Named = ("", None),
) -> Asked:
    """A call about a participant; `names_itself`: who names nobody means the actor."""
    reference = fields.conversation("conversation_id", request.conversation_id)
    required = not (names_itself and call.actor)
    user = fields.user("user_id", request.user_id, required=required)
    return Asked(
        conversation=request.conversation_id,
        conversation_reference=reference,
        subject=(request.user_id, user or call.actor_id),
        other=other,
        etag=fields.etag("etag", request.etag),
        request=fields.request_id(call, request),
        dry_run=getattr(request, "validate_only", False),
    )


def _answer(row: Row, asked: Asked) -> pb.Participant:
    """The participant; of a dry run, without what only a change gives."""
    participant = wire.participant(row)
    return wire.unmade(participant) if asked.dry_run else participant


def _moved(call: Move, person: Person, scene: Scene, reason: str = "") -> list[Change]:
    change = move(
        call,
        person,
        last_sequence=scene.last_sequence,
        actor_id=scene.call.actor_id,
        reason=reason,
    )
    return [change] if change else []


async def _bring_in(
    call: Move, terms: Terms, transaction: Transaction, scene: Scene
) -> list[Change]:
    """Invite or Add, by somebody who may."""
    inviter = _require_inviter(call, scene)
    person = scene.require_subject()
    if scene.call.actor and call is Move.ADD:
        require_may_add(inviter, person, terms.role)
    elif scene.call.actor:
        may = scene.conversation["members_may_invite"]
        require_may_invite(inviter, person, terms.role, members_may_invite=may)
    scene.require_many()
    require_usable(person, field="user_id")
    change = enter(
        call,
        person,
        last_sequence=scene.last_sequence,
        role=terms.role,
        invited_by=inviter["user_id"],
        actor_id=scene.call.actor_id,
        initial_message_id=await _initial_message(transaction, scene, terms.message_key),
        reason=terms.reason,
        hide_history=terms.hide_history,
    )
    if change is None:
        return []
    crowd = await transaction.participants.crowd(scene.conversation["id"])
    require_room(crowd.occupied, [change])
    return [change]


async def _dismiss(call: Move, reason: str, transaction: Transaction, scene: Scene) -> list[Change]:
    """Revoke or Remove, by somebody who may. An invitation can be taken back whatever became of
    the conversation: one that nobody wants any more must not outlive it.
    """
    own = scene.require_right(Right.DISMISS)
    person = scene.require_participant()
    if own:
        require_may_dismiss(call, own, person)
    if call is Move.REMOVE:
        scene.require_many()
    crowd = await transaction.participants.crowd(scene.conversation["id"])
    change = dismiss(
        call,
        person,
        owners=crowd.owners,
        joined=crowd.joined,
        last_sequence=scene.last_sequence,
        actor_id=scene.call.actor_id,
        reason=reason,
    )
    return [change] if change else []


async def _appoint(role: ParticipantRole, transaction: Transaction, scene: Scene) -> list[Change]:
    own = scene.require_right(Right.APPOINT)
    person = scene.require_participant()
    if own:
        require_may_appoint(own, person, role)
    require_writable(scene.conversation)
    change = appoint(person, role, actor_id=scene.call.actor_id)
    if change is None:
        return []
    crowd = await transaction.participants.crowd(scene.conversation["id"])
    require_owner_remains(change, owners=crowd.owners, joined=crowd.joined)
    return [change]


def _require_inviter(call: Move, scene: Scene) -> Person:
    """Who brings in: the actor, who must have the right; or whom the system names, joined."""
    field = "invited_by_user_id"
    own = scene.require_right(Right.ADD if call is Move.ADD else Right.INVITE)
    if own:
        if scene.other is None or scene.other["user_id"] != own["user_id"]:
            rule = f"{field} may name nobody but the actor itself"
            raise PermissionDenied("PERMISSION_DENIED", rule=rule)
        return own
    if scene.other is None:
        raise user_not_found(field, scene.asked.other[0])
    if scene.other["status"] != ParticipantStatus.JOINED:
        raise FailedPrecondition("NOT_A_PARTICIPANT", field=field)
    return scene.other


async def _initial_message(
    transaction: Transaction, scene: Scene, key: UUID | int | None
) -> UUID | None:
    """The id of the message that comes with an invitation: one that the inviter may read."""
    if key is None:
        return None
    wanted = (scene.conversation["id"], scene.call.actor_id, key)
    (row,) = await transaction.messages.find([wanted])
    if row is None:
        part = "sequence" if isinstance(key, int) else "id"
        raise FailedPrecondition("INITIAL_MESSAGE_NOT_FOUND", field=f"initial_message_{part}")
    id: UUID = row["id"]
    return id


def _only_own(view: Row) -> UUID | None:
    """Whoever is not joined sees nobody's row but its own."""
    if view["actor_id"] is None or view["status"] == ParticipantStatus.JOINED:
        return None
    own: UUID = view["actor_id"]
    return own
