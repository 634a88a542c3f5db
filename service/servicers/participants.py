from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from uuid import UUID

from parley.v1 import participant_pb2 as pb
from parley.v1 import participant_pb2_grpc
from service import paging, wire
from service.coalescer import lock_of
from service.domain import ParticipantRole, ParticipantStatus
from service.errors import FailedPrecondition, NotFound, PermissionDenied
from service.fields import Fields
from service.identity import Call
from service.lookups import Lookups
from service.paging import PageTokens
from service.repositories.base import Row
from service.repositories.messages import WHOLE
from service.rules.etags import etag_of, require_etag
from service.rules.participants import (
    Change,
    Move,
    enter,
    leave,
    move,
    require_may_invite,
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

    def __init__(self, store: Store, lookups: Lookups, page_tokens: PageTokens) -> None:
        self._store = store
        self._lookups = lookups
        self._page_tokens = page_tokens

    async def InviteParticipant(
        self, request: pb.InviteParticipantRequest, call: Call
    ) -> pb.InviteParticipantResponse:
        with Fields() as fields:
            reference = fields.conversation("conversation_id", request.conversation_id)
            user = fields.user("user_id", request.user_id)
            inviter = fields.user(
                "invited_by_user_id", request.invited_by_user_id, required=not call.actor
            )
            role = fields.enum("role", request.role, ParticipantRole, ParticipantRole.MEMBER)
            message_key = fields.optional_message_key(request, "initial_message")
            reason = fields.line("reason", request.reason, limit=500)
            asked = Asked(
                conversation=request.conversation_id,
                conversation_reference=reference,
                subject=(request.user_id, user),
                other=(request.invited_by_user_id, inviter or call.actor_id),
                etag=fields.etag("etag", request.etag),
                request=fields.request_id(call, request),
                dry_run=request.validate_only,
            )

        async def invite(transaction: Transaction, scene: Scene) -> list[Change]:
            inviter = _require_inviter(scene)
            person = scene.require_subject()
            if call.actor:
                may = scene.conversation["members_may_invite"]
                require_may_invite(inviter, person, role, members_may_invite=may)
            require_writable(scene.conversation)
            if scene.conversation["is_direct"]:
                raise FailedPrecondition("DIRECT_CONVERSATION")
            require_usable(person, field="user_id")
            change = enter(
                Move.INVITE,
                person,
                last_sequence=scene.last_sequence,
                role=role,
                invited_by=inviter["user_id"],
                actor_id=call.actor_id,
                initial_message_id=await _initial_message(transaction, scene, message_key),
                reason=reason,
                hide_history=request.hide_history,
            )
            if change is None:
                return []
            crowd = await transaction.participants.crowd(scene.conversation["id"])
            require_room(crowd.occupied, [change])
            return [change]

        row = await self._change(asked, call, invite)

        participant = wire.participant(row)
        if request.validate_only:
            wire.unmade(participant)
        return pb.InviteParticipantResponse(participant=participant)

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
            await transaction.participants.change(
                conversation_id, after_version=conversation["version"], changes=changes
            )
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


def _asked(
    fields: Fields,
    request: pb.AcceptInvitationRequest | pb.DeclineInvitationRequest | pb.LeaveConversationRequest,
    call: Call,
    other: Named = ("", None),
) -> Asked:
    """A call about a participant that makes it itself: the actor, unless it names somebody."""
    reference = fields.conversation("conversation_id", request.conversation_id)
    user = fields.user("user_id", request.user_id, required=not call.actor)
    return Asked(
        conversation=request.conversation_id,
        conversation_reference=reference,
        subject=(request.user_id, user or call.actor_id),
        other=other,
        etag=fields.etag("etag", request.etag),
        request=fields.request_id(call, request),
    )


def _moved(call: Move, person: Person, scene: Scene, reason: str = "") -> list[Change]:
    change = move(
        call,
        person,
        last_sequence=scene.last_sequence,
        actor_id=scene.call.actor_id,
        reason=reason,
    )
    return [change] if change else []


def _require_inviter(scene: Scene) -> Person:
    """Who invites: the actor, who must have the right; or whom the system names, who is joined."""
    field = "invited_by_user_id"
    if scene.call.actor:
        own = require_right(Right.INVITE, scene.own, conversation=scene.asked.conversation)
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
    view: Row | None = {**WHOLE, "id": scene.conversation["id"]}
    if scene.call.actor:
        (view,) = await transaction.conversations.views(
            [(scene.conversation["id"], scene.call.actor.id)]
        )
    (row,) = await transaction.messages.find([(view, key)]) if view else [None]
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
