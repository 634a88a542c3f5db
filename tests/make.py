"""Arrange in one line: a client of the service, and the things that tests talk about."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import UUID, uuid4

import asyncpg
import grpc
from google.rpc import error_details_pb2, status_pb2

from parley.v1 import (
    conversation_pb2,
    conversation_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
    message_pb2,
    message_pb2_grpc,
    participant_pb2,
    participant_pb2_grpc,
    user_pb2,
    user_pb2_grpc,
)

User = user_pb2.User
Conversation = conversation_pb2.Conversation
Participant = participant_pb2.Participant
Message = message_pb2.Message
Event = event_pb2.Event

HUMAN, AGENT = User.KIND_HUMAN, User.KIND_AGENT
OWNER, MODERATOR = Participant.ROLE_OWNER, Participant.ROLE_MODERATOR
MEMBER, OBSERVER = Participant.ROLE_MEMBER, Participant.ROLE_OBSERVER
USER, ASSISTANT = Message.ROLE_USER, Message.ROLE_ASSISTANT
SYSTEM, TOOL = Message.ROLE_SYSTEM, Message.ROLE_TOOL

# The id of nothing. (One made anew would give its test another name in each worker.)
NOBODY = "019a0000-0000-7000-8000-000000000000"


class Stub:
    """A generated stub whose calls carry the client's credentials and actor."""

    def __init__(self, stub: Any, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        self._stub = stub
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stub, name)

        def call(request: Any, **options: Any) -> Any:
            options.setdefault("metadata", self._metadata)
            options.setdefault("timeout", 20)
            return method(request, **options)

        return call


class Client:
    """What a service of somebody else's is to Parley: a channel, a token, perhaps an actor."""

    def __init__(
        self, channel: grpc.aio.Channel, token: str, actor: str | bytes | None = None
    ) -> None:
        self.channel = channel
        self.token = token
        metadata: list[tuple[str, str | bytes]] = [("authorization", f"Bearer {token}")]
        if isinstance(actor, bytes):
            metadata.append(("x-parley-actor-bin", actor))
        elif actor:
            metadata.append(("x-parley-actor", actor))
        self.metadata = tuple(metadata)
        self.users = Stub(user_pb2_grpc.UserServiceStub(channel), self.metadata)
        self.conversations = Stub(
            conversation_pb2_grpc.ConversationServiceStub(channel), self.metadata
        )
        self.participants = Stub(
            participant_pb2_grpc.ParticipantServiceStub(channel), self.metadata
        )
        self.messages = Stub(message_pb2_grpc.MessageServiceStub(channel), self.metadata)
        self.events = Stub(event_pb2_grpc.EventServiceStub(channel), self.metadata)

    def acting_as(self, user: User | str | bytes) -> Self:
        """The same client for an end user."""
        return type(self)(self.channel, self.token, user.id if isinstance(user, User) else user)

    # Arrange

    async def user(self, username: str = "", **values: Any) -> User:
        """A user; a made-up username where none is given."""
        user = User(username=username or f"user-{uuid4().hex[:12]}", **values)
        response = await self.users.CreateUser(user_pb2.CreateUserRequest(user=user))
        return response.user  # type: ignore[no-any-return]

    async def conversation(
        self,
        creator: User,
        *members: User,
        invited: Sequence[User] = (),
        first: str = "",
        **values: Any,
    ) -> Conversation:
        """A conversation of the creator with members, invitees, and a first message by it."""
        request = conversation_pb2.CreateConversationRequest(
            conversation=Conversation(creator_id=creator.id, **values),
            participants=[participant_pb2.NewParticipant(user_id=user.id) for user in members],
            invitations=[participant_pb2.NewParticipant(user_id=user.id) for user in invited],
        )
        if first:
            request.initial_message.CopyFrom(
                message_pb2.NewMessage(sender_id=creator.id, role=USER, content=first)
            )
        response = await self.conversations.CreateConversation(request)
        return response.conversation  # type: ignore[no-any-return]

    async def message(
        self, conversation: Conversation, sender: User, content: str = "hello", **values: Any
    ) -> Message:
        """A message sent by the system in the sender's name."""
        values.setdefault("role", USER)
        request = message_pb2.SendMessageRequest(
            conversation_id=conversation.id, sender_id=sender.id, content=content, **values
        )
        return (await self.messages.SendMessage(request)).message  # type: ignore[no-any-return]

    async def send(
        self, conversation: Conversation, content: str = "hello", **values: Any
    ) -> Message:
        """A message sent by whoever this client acts for."""
        values.setdefault("role", USER)
        request = message_pb2.SendMessageRequest(
            conversation_id=conversation.id, content=content, **values
        )
        return (await self.messages.SendMessage(request)).message  # type: ignore[no-any-return]

    async def all_messages(self, conversation: Conversation, **filters: Any) -> list[Message]:
        """Every message of the conversation, oldest first, page by page."""
        found: list[Message] = []
        token = ""
        while True:
            page = await self.messages.ListMessages(
                message_pb2.ListMessagesRequest(
                    conversation_id=conversation.id,
                    order_by="sequence",
                    page_size=1000,
                    page_token=token,
                    **filters,
                )
            )
            found += page.messages
            token = page.next_page_token
            if not token:
                return found

    async def invite(self, conversation: Conversation, user: User, **values: Any) -> Participant:
        """An invitation: by the actor or, from the system, by whom `invited_by_user_id` names."""
        request = participant_pb2.InviteParticipantRequest(
            conversation_id=conversation.id, user_id=user.id, **values
        )
        response = await self.participants.InviteParticipant(request)
        return response.participant  # type: ignore[no-any-return]

    async def accept(self, conversation: Conversation, user: User, **values: Any) -> Participant:
        request = participant_pb2.AcceptInvitationRequest(
            conversation_id=conversation.id, user_id=user.id, **values
        )
        response = await self.participants.AcceptInvitation(request)
        return response.participant  # type: ignore[no-any-return]

    async def decline(self, conversation: Conversation, user: User, **values: Any) -> Participant:
        request = participant_pb2.DeclineInvitationRequest(
            conversation_id=conversation.id, user_id=user.id, **values
        )
        response = await self.participants.DeclineInvitation(request)
        return response.participant  # type: ignore[no-any-return]

    async def leave(self, conversation: Conversation, user: User, **values: Any) -> Participant:
        request = participant_pb2.LeaveConversationRequest(
            conversation_id=conversation.id, user_id=user.id, **values
        )
        response = await self.participants.LeaveConversation(request)
        return response.participant  # type: ignore[no-any-return]

    async def add(self, conversation: Conversation, user: User, **values: Any) -> Participant:
        """At once: by the actor or, from the system, by whom `invited_by_user_id` names."""
        request = participant_pb2.AddParticipantRequest(
            conversation_id=conversation.id, user_id=user.id, **values
        )
        response = await self.participants.AddParticipant(request)
        return response.participant  # type: ignore[no-any-return]

    async def revoke(self, conversation: Conversation, user: User, **values: Any) -> Participant:
        request = participant_pb2.RevokeInvitationRequest(
            conversation_id=conversation.id, user_id=user.id, **values
        )
        response = await self.participants.RevokeInvitation(request)
        return response.participant  # type: ignore[no-any-return]

    async def remove(self, conversation: Conversation, user: User, **values: Any) -> Participant:
        request = participant_pb2.RemoveParticipantRequest(
            conversation_id=conversation.id, user_id=user.id, **values
        )
        response = await self.participants.RemoveParticipant(request)
        return response.participant  # type: ignore[no-any-return]

    async def appoint(
        self,
        conversation: Conversation,
        user: User,
        role: "Participant.Role.ValueType",
        **values: Any,
    ) -> Participant:
        """The user in another role."""
        request = participant_pb2.UpdateParticipantRequest(
            conversation_id=conversation.id,
            user_id=user.id,
            participant=Participant(role=role),
            **values,
        )
        response = await self.participants.UpdateParticipant(request)
        return response.participant  # type: ignore[no-any-return]

    async def mark_read(
        self, conversation: Conversation, user: User, sequence: int, **values: Any
    ) -> participant_pb2.MarkReadResponse:
        """How far the user has read, up to a sequence at least."""
        request = participant_pb2.MarkReadRequest(
            conversation_id=conversation.id, user_id=user.id, sequence=sequence, **values
        )
        return await self.participants.MarkRead(request)  # type: ignore[no-any-return]

    async def participant(self, conversation: Conversation, user: User) -> Participant:
        request = participant_pb2.GetParticipantRequest(
            conversation_id=conversation.id, user_id=user.id
        )
        response = await self.participants.GetParticipant(request)
        return response.participant  # type: ignore[no-any-return]

    async def direct(self, one: User, other: User) -> Conversation:
        """The direct conversation of the two."""
        request = conversation_pb2.GetOrCreateDirectConversationRequest(
            user_id=one.id, other_user_id=other.id
        )
        response = await self.conversations.GetOrCreateDirectConversation(request)
        return response.conversation  # type: ignore[no-any-return]

    def update(self, conversation: Conversation | str, **values: Any) -> Any:
        """An UpdateConversation, to be awaited; `mask` and `patch` for short."""
        mask, patch = values.pop("mask", None), values.pop("patch", None)
        options = {
            name: values.pop(name)
            for name in ("etag", "request_id", "validate_only")
            if name in values
        }
        request = conversation_pb2.UpdateConversationRequest(
            conversation_id=_name(conversation), **options
        )
        if values:
            request.conversation.CopyFrom(Conversation(**values))
        if mask is not None:
            request.update_mask.paths[:] = mask
        if patch is not None:
            request.metadata_patch.update(patch)
        return self.conversations.UpdateConversation(request)

    def delete(self, conversation: Conversation | str, **values: Any) -> Any:
        return self.conversations.DeleteConversation(
            conversation_pb2.DeleteConversationRequest(
                conversation_id=_name(conversation), **values
            )
        )

    def undelete(self, conversation: Conversation | str, **values: Any) -> Any:
        return self.conversations.UndeleteConversation(
            conversation_pb2.UndeleteConversationRequest(
                conversation_id=_name(conversation), **values
            )
        )

    def purge(self, conversation: Conversation | str, **values: Any) -> Any:
        return self.conversations.PurgeConversation(
            conversation_pb2.PurgeConversationRequest(conversation_id=_name(conversation), **values)
        )

    def edit(self, conversation: Conversation | str, **values: Any) -> Any:
        """An UpdateMessage, to be awaited; `mask` and `patch` for short."""
        mask, patch = values.pop("mask", None), values.pop("patch", None)
        options = {
            name: values.pop(name)
            for name in ("message_id", "sequence", "etag", "request_id", "validate_only")
            if name in values
        }
        request = message_pb2.UpdateMessageRequest(conversation_id=_name(conversation), **options)
        if values:
            request.message.CopyFrom(Message(**values))
        if mask is not None:
            request.update_mask.paths[:] = mask
        if patch is not None:
            request.metadata_patch.update(patch)
        return self.messages.UpdateMessage(request)

    def revisions(self, conversation: Conversation | str, **values: Any) -> Any:
        return self.messages.ListMessageRevisions(
            message_pb2.ListMessageRevisionsRequest(conversation_id=_name(conversation), **values)
        )

    def search(self, query: str, conversation: Conversation | str = "", **values: Any) -> Any:
        return self.messages.SearchMessages(
            message_pb2.SearchMessagesRequest(
                query=query, conversation_id=_name(conversation), **values
            )
        )

    def delete_message(self, conversation: Conversation | str, **values: Any) -> Any:
        return self.messages.DeleteMessage(
            message_pb2.DeleteMessageRequest(conversation_id=_name(conversation), **values)
        )

    def undelete_message(self, conversation: Conversation | str, **values: Any) -> Any:
        return self.messages.UndeleteMessage(
            message_pb2.UndeleteMessageRequest(conversation_id=_name(conversation), **values)
        )

    def list_events(self, **scope: Any) -> Any:
        """A page of events, to be awaited."""
        return self.events.ListEvents(event_pb2.ListEventsRequest(**scope))

    async def log(self, **scope: Any) -> list[Event]:
        """Every event of a scope, oldest first, page by page."""
        found: list[Event] = []
        scope.setdefault("page_size", 1000)
        while True:
            page = await self.list_events(**scope)
            found += page.events
            if page.caught_up:
                return found
            scope["resume_cursor"] = page.cursor

    def watch(self, **asked: Any) -> Any:
        """A stream of events, which ends when the test has seen enough."""
        return self.events.Watch(event_pb2.WatchRequest(**asked), timeout=60)

    def update_user(self, user: User | str, **values: Any) -> Any:
        """An UpdateUser, to be awaited; `mask` and `patch` for short."""
        mask, patch = values.pop("mask", None), values.pop("patch", None)
        options = {
            name: values.pop(name)
            for name in ("etag", "request_id", "validate_only")
            if name in values
        }
        request = user_pb2.UpdateUserRequest(user_id=_user_name(user), **options)
        if values:
            request.user.CopyFrom(User(**values))
        if mask is not None:
            request.update_mask.paths[:] = mask
        if patch is not None:
            request.metadata_patch.update(patch)
        return self.users.UpdateUser(request)

    def delete_user(self, user: User | str, **values: Any) -> Any:
        return self.users.DeleteUser(user_pb2.DeleteUserRequest(user_id=_user_name(user), **values))

    def undelete_user(self, user: User | str, **values: Any) -> Any:
        return self.users.UndeleteUser(
            user_pb2.UndeleteUserRequest(user_id=_user_name(user), **values)
        )

    def purge_user(self, user: User | str, **values: Any) -> Any:
        return self.users.PurgeUser(user_pb2.PurgeUserRequest(user_id=_user_name(user), **values))

    def set_password(self, user: User | str, password: str, **values: Any) -> Any:
        return self.users.SetPassword(
            user_pb2.SetPasswordRequest(user_id=_user_name(user), password=password, **values)
        )

    def verify(self, password: str, **login: str) -> Any:
        """A VerifyPassword by `user_id` or `email`."""
        return self.users.VerifyPassword(user_pb2.VerifyPasswordRequest(password=password, **login))

    async def who(self, user: User | str) -> User:
        """The user as this client sees it now."""
        response = await self.users.GetUser(user_pb2.GetUserRequest(user_id=_user_name(user)))
        return response.user  # type: ignore[no-any-return]

    async def seen(self, conversation: Conversation) -> Conversation:
        """The conversation as this client sees it now."""
        request = conversation_pb2.GetConversationRequest(conversation_id=conversation.id)
        response = await self.conversations.GetConversation(request)
        return response.conversation  # type: ignore[no-any-return]


def _name(conversation: Conversation | str) -> str:
    return conversation if isinstance(conversation, str) else conversation.id


def _user_name(user: User | str) -> str:
    return user if isinstance(user, str) else user.id


def told(event: Event, people: dict[str, str]) -> str:
    """The facts of an event in one line; `people` are names by id."""
    words = [Event.Type.Name(event.type).removeprefix("TYPE_")]
    if event.sequence:
        words.append(f"#{event.sequence}")
    if event.revision:
        words.append(f"r{event.revision}")
    if event.user_id:
        words.append(people[event.user_id])
    if event.status:
        before = _standing(event.previous_status, event.previous_role)
        words += [before, ">", _standing(event.status, event.role)]
    if event.reason:
        words.append(f"({event.reason})")
    if event.actor_id:
        words.append(f"by {people[event.actor_id]}")
    return " ".join(words)


def _standing(status: "Participant.Status.ValueType", role: "Participant.Role.ValueType") -> str:
    if not status:
        return "nobody"
    names = Participant.Status.Name(status), Participant.Role.Name(role)
    return " ".join(name.partition("_")[2] for name in names)


async def is_replay(call: Any) -> bool:
    """Whether the answer was first given to an earlier call; awaits it."""
    await call
    return ("x-parley-replayed", "true") in tuple(await call.trailing_metadata())


async def insist(call: Callable[[], Awaitable[Any]]) -> Any:
    """The call's answer, though the service may first be too busy for it a hundred times."""
    for _ in range(100):
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.05)
    return await call()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return once it is so; TimeoutError after ten seconds."""
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.005)


async def row_count(database: asyncpg.Connection) -> int:
    """How many rows there are in all the tables that a call could leave something in."""
    tables = (
        "users",
        "conversations",
        "participants",
        "messages",
        "message_revisions",
        "events",
        "requests",
    )
    counts = " + ".join(f"(SELECT count(*) FROM {table})" for table in tables)
    return await database.fetchval(f"SELECT {counts}")  # type: ignore[no-any-return]


async def facts(database: asyncpg.Connection, conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation's events, oldest first: of each, all that it says, ids as text."""
    rows = await database.fetch(
        "SELECT version, type, actor_id::text, sequence, revision, user_id::text,"
        " previous_status, status, previous_role, role, reason"
        " FROM events WHERE conversation_id = $1 ORDER BY version",
        UUID(conversation.id),
    )
    return [{name: value for name, value in row.items() if value} for row in rows]


async def require_sums(parley: Client, database: asyncpg.Connection, talk: Conversation) -> None:
    """The counters are what counting gives, and the versions have no hole."""
    row = await database.fetchrow(
        "SELECT count(*), sum(tokens_used), max(COALESCE(sent_at, created_at)) FROM messages"
        " WHERE conversation_id = $1",
        talk.id,
    )
    events = await database.fetch(
        "SELECT version, type, sequence FROM events WHERE conversation_id = $1 ORDER BY version",
        talk.id,
    )
    seen = await parley.seen(talk)
    assert row is not None
    assert (seen.last_sequence, seen.total_tokens_used) == (row[0], row[1] or 0)
    assert seen.last_activity_time.ToMicroseconds() == int(row[2].timestamp() * 1_000_000)
    assert [event["version"] for event in events] == list(range(1, seen.version + 1))
    told = [event["sequence"] for event in events if event["type"] == "MESSAGE_CREATED"]
    assert told == list(range(1, seen.last_sequence + 1))


async def miscounted(database: asyncpg.Connection) -> list[asyncpg.Record]:
    """Conversations whose counters are not what their rows say, or whose events have a hole."""
    return await database.fetch("""
        SELECT * FROM (
          SELECT c.id, c.version, c.participant_count, c.last_sequence,
            (SELECT count(*) FROM events e WHERE e.conversation_id = c.id) AS event_count,
            (SELECT max(e.version) FROM events e WHERE e.conversation_id = c.id) AS last_version,
            (SELECT count(*) FROM participants p
             WHERE p.conversation_id = c.id AND p.status = 'JOINED') AS joined,
            (SELECT count(*) FROM messages m WHERE m.conversation_id = c.id) AS message_count
          FROM conversations c) AS counted
        WHERE version <> event_count OR version <> last_version OR participant_count <> joined
           OR last_sequence <> message_count
        """)


@dataclass(frozen=True)
class Failure:
    """What a caller can see of an error."""

    code: str
    message: str
    reason: str = ""
    known: dict[str, str] = field(default_factory=dict)
    # Field by field: its reason.
    violations: dict[str, str] = field(default_factory=dict)
    resource: tuple[str, str] | None = None
    precondition: str = ""
    quota: str = ""
    retry_seconds: float | None = None
    trailers: dict[str, str | bytes] = field(default_factory=dict)


async def in_spite_of_the_client(call: Callable[[], Awaitable[Any]]) -> Any:
    """A call with a stream, again where gRPC's client fell over its own feet: it does not see how a
    stream ended to which it was still writing.
    """
    for _ in range(4):
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.details() != "Internal error from Core":
                raise
    return await call()


async def failure(call: Awaitable[Any]) -> Failure:
    """The error of a call that must fail."""
    try:
        response = await call
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    raise AssertionError(f"the call succeeded: {response}")


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    trailers = dict(tuple(error.trailing_metadata() or ()))
    values: dict[str, Any] = {}
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            assert info.domain == "parley.v1"
            values.update(reason=info.reason, known=dict(info.metadata))
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest.FromString(detail.value)
            values["violations"] = {each.field: each.reason for each in bad.field_violations}
        elif detail.Is(error_details_pb2.ResourceInfo.DESCRIPTOR):
            resource = error_details_pb2.ResourceInfo.FromString(detail.value)
            values["resource"] = (resource.resource_type, resource.resource_name)
        elif detail.Is(error_details_pb2.PreconditionFailure.DESCRIPTOR):
            broken = error_details_pb2.PreconditionFailure.FromString(detail.value)
            values["precondition"] = broken.violations[0].type
        elif detail.Is(error_details_pb2.QuotaFailure.DESCRIPTOR):
            quota = error_details_pb2.QuotaFailure.FromString(detail.value)
            values["quota"] = quota.violations[0].subject
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value)
            values["retry_seconds"] = retry.retry_delay.ToMilliseconds() / 1000
    return Failure(error.code().name, error.details() or "", trailers=trailers, **values)
