from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from uuid import UUID

from parley.v1 import event_pb2 as pb
from parley.v1 import event_pb2_grpc
from service import wire
from service.errors import NotFound, PermissionDenied
from service.fields import Fields
from service.following import Ask, Follower
from service.identity import Call
from service.lookups import Lookups, require_reader
from service.paging import FeedCursors
from service.rules.feed import BEGINNING, Head, Place, Subject, require_present
from service.watching import Watching


@dataclass(frozen=True, slots=True)
class Scope:
    """What a request wants to read, as named: a conversation, a user, or (neither) everything."""

    name: str
    conversation: UUID | str | None = None
    user: UUID | str | None = None


class EventServicer(event_pb2_grpc.EventServiceServicer):
    """What happened, in order."""

    def __init__(
        self,
        lookups: Lookups,
        follower: Follower,
        watching: Watching,
        cursors: FeedCursors,
    ) -> None:
        self._lookups = lookups
        self._follower = follower
        self._watching = watching
        self._cursors = cursors

    async def ListEvents(self, request: pb.ListEventsRequest, call: Call) -> pb.ListEventsResponse:
        with Fields() as fields:
            scope = _scope(fields, request, call)
            limit = fields.page_size(request.page_size)

        subject, head = await self._find(scope, call)
        place = self._place(request.resume_cursor, subject, head, call) or BEGINNING
        page = await self._follower.read(Ask(subject, place, call.actor_id, limit, head.era))

        return pb.ListEventsResponse(
            events=page.events,
            cursor=self._sealer(subject, head, call)(page.place),
            caught_up=page.caught_up,
            incomplete=page.incomplete,
        )

    async def Watch(  # type: ignore[override]  # as good as a WatchResponse once it is on the wire
        self, request: pb.WatchRequest, call: Call
    ) -> AsyncIterator[wire.Spliced]:
        with Fields() as fields:
            scope = _scope(fields, request, call)
            if request.WhichOneof("start") == "oldest" and not request.oldest:
                fields.reject("INVALID_VALUE", "oldest", rule="it must be true, or not be given")

        subject, head = await self._find(scope, call)
        start = BEGINNING if request.oldest else head.newest
        place = self._place(request.resume_cursor, subject, head, call) or start
        is_new = place == head.newest
        seal = self._sealer(subject, head, call)
        told = self._watching.follow(subject, place, call.actor_id, head.era, is_new=is_new)
        async with aclosing(told) as pages:
            async for page, caught_up in pages:
                rest = pb.WatchResponse(cursor=seal(page.place), caught_up=caught_up)
                yield wire.Spliced(page.encoded, rest)

    async def _find(self, scope: Scope, call: Call) -> tuple[Subject, Head]:
        """What is asked for, if the caller may read it at all, and how far the log goes there."""
        if scope.conversation is not None:
            subject = Subject(conversation_id=await self._conversation_id(scope, call))
        elif scope.user is not None:
            subject = Subject(user_id=await self._user_id(scope, call))
        elif call.actor is None:
            subject = Subject()
        else:
            raise PermissionDenied("PERMISSION_DENIED", rule="everything is for the system")
        head = await self._follower.head(subject.conversation_id)
        # Of what was purged, the system can read that it was.
        if subject.conversation_id and head.newest == BEGINNING:
            raise NotFound("conversation", scope.name)
        return subject, head

    async def _conversation_id(self, scope: Scope, call: Call) -> UUID:
        assert scope.conversation is not None
        if call.actor is None:
            return await self._lookups.conversation_id(scope.name, scope.conversation)
        view = await self._lookups.view(scope.name, scope.conversation, call)
        require_reader(view)
        id: UUID = view["id"]
        return id

    async def _user_id(self, scope: Scope, call: Call) -> UUID:
        assert scope.user is not None
        user = await self._lookups.user(scope.user)
        if user is None:
            raise NotFound("user", scope.name)
        id: UUID = user["id"]
        if call.actor_id not in (None, id):
            raise PermissionDenied("PERMISSION_DENIED", rule="an actor reads its own events only")
        return id

    def _place(self, cursor: str, subject: Subject, head: Head, call: Call) -> Place | None:
        """The place that the cursor stands for; None where there is no cursor."""
        if not cursor:
            return None
        place, era = self._cursors.open(cursor, subject=subject, actor_id=call.actor_id)
        require_present(place, era=era, head=head, subject=subject)
        return place

    def _sealer(self, subject: Subject, head: Head, call: Call) -> Callable[[Place], str]:
        return self._cursors.sealer(era=head.era, subject=subject, actor_id=call.actor_id)


def _scope(fields: Fields, request: pb.ListEventsRequest | pb.WatchRequest, call: Call) -> Scope:
    named = request.WhichOneof("scope")
    if named == "conversation_id":
        conversation = fields.conversation("conversation_id", request.conversation_id)
        return Scope(request.conversation_id, conversation=conversation)
    if named == "user_id":
        user = fields.user("user_id", request.user_id, required=call.actor is None)
        return Scope(request.user_id, user=user or call.actor_id)
    if named is None:
        fields.reject("REQUIRED", "scope")
    elif not request.everything:
        fields.reject("INVALID_VALUE", "everything", rule="it must be true, or another scope given")
    return Scope("")
