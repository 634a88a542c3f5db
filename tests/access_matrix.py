"""Who may call what: the expected answer of every RPC to every kind of caller and actor.

`python -m tests.access_matrix` writes it to docs/access.md. The tests find every RPC by reflection,
so that a new one without a row here fails the build.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import MethodDescriptor

from parley.v1 import (
    access_pb2,
    conversation_pb2,
    event_pb2,
    live_message_pb2,
    message_pb2,
    participant_pb2,
    transfer_pb2,
    usage_pb2,
    user_pb2,
)

PAGE = Path(__file__).parent.parent / "docs" / "access.md"

MODULES = (
    user_pb2,
    conversation_pb2,
    participant_pb2,
    message_pb2,
    event_pb2,
    live_message_pb2,
    transfer_pb2,
    usage_pb2,
)

# What the token and the call's metadata decide, whatever the RPC is about.
DOORS = ("no token", "bad token", "no scope", "no act-as", "no system", "inactive")
# What the actor is in the conversation that the RPC is about; `system` is no actor at all.
ACTORS = (
    "stranger",
    "invited",
    "left",
    "removed",
    "observer",
    "member",
    "moderator",
    "owner",
    "system",
)

CODES = {
    "ok": "OK",
    "NF": "NOT_FOUND",
    "PD": "PERMISSION_DENIED",
    "FP": "FAILED_PRECONDITION",
    "UA": "UNAUTHENTICATED",
    "UI": "UNIMPLEMENTED",
}

# One word an actor, in the order of ACTORS. Where the proto refuses actors, the system's alone.
MATRIX = {
    "UserService/CreateUser": "ok",
    "UserService/GetUser": "ok ok ok ok ok ok ok ok ok",
    "UserService/BatchGetUsers": "ok ok ok ok ok ok ok ok ok",
    "UserService/ListUsers": "ok",
    "UserService/UpdateUser": "PD PD PD PD PD PD PD ok ok",
    "UserService/DeleteUser": "ok",
    "UserService/UndeleteUser": "ok",
    "UserService/PurgeUser": "ok",
    "UserService/SetPassword": "PD PD PD PD PD PD PD ok ok",
    "UserService/VerifyPassword": "ok ok ok ok ok ok ok ok ok",
    "ConversationService/CreateConversation": "ok ok ok ok ok ok ok ok ok",
    "ConversationService/GetOrCreateDirectConversation": "ok ok ok ok ok ok ok ok ok",
    "ConversationService/GetConversation": "NF ok ok ok ok ok ok ok ok",
    "ConversationService/ListConversations": "ok ok ok ok ok ok ok ok ok",
    "ConversationService/ListUserConversations": "ok ok ok ok ok ok ok ok ok",
    "ConversationService/UpdateConversation": "NF PD PD PD PD PD ok ok ok",
    "ConversationService/DeleteConversation": "NF PD PD PD PD PD PD ok ok",
    "ConversationService/UndeleteConversation": "NF PD PD PD PD PD PD ok ok",
    "ConversationService/PurgeConversation": "ok",
    "ParticipantService/InviteParticipant": "NF PD PD PD PD ok ok ok ok",
    "ParticipantService/AddParticipant": "NF PD PD PD PD PD ok ok ok",
    "ParticipantService/GetParticipant": "NF NF NF NF ok ok ok ok ok",
    "ParticipantService/ListParticipants": "NF ok ok ok ok ok ok ok ok",
    "ParticipantService/ListInvitations": "ok ok ok ok ok ok ok ok ok",
    "ParticipantService/AcceptInvitation": "NF ok FP FP ok ok ok ok ok",
    "ParticipantService/DeclineInvitation": "NF ok FP FP FP FP FP FP ok",
    "ParticipantService/RevokeInvitation": "NF PD PD PD PD PD ok ok ok",
    "ParticipantService/LeaveConversation": "NF ok ok FP ok ok ok ok ok",
    "ParticipantService/RemoveParticipant": "NF PD PD PD PD PD ok ok ok",
    "ParticipantService/UpdateParticipant": "NF PD PD PD PD PD ok ok ok",
    "ParticipantService/MarkRead": "NF PD PD PD ok ok ok ok ok",
    "MessageService/SendMessage": "NF PD PD PD PD ok ok ok ok",
    "MessageService/BatchSendMessages": "NF PD PD PD PD ok ok ok ok",
    "MessageService/GetMessage": "NF NF ok ok ok ok ok ok ok",
    "MessageService/BatchGetMessages": "NF ok ok ok ok ok ok ok ok",
    "MessageService/ListMessages": "NF PD ok ok ok ok ok ok ok",
    "MessageService/SearchMessages": "NF PD ok ok ok ok ok ok ok",
    "MessageService/UpdateMessage": "NF PD PD PD PD PD PD PD ok",
    "MessageService/ListMessageRevisions": "NF NF ok ok ok ok ok ok ok",
    "MessageService/DeleteMessage": "NF PD PD PD PD PD ok ok ok",
    "MessageService/UndeleteMessage": "NF PD PD PD PD PD ok ok ok",
    "EventService/Watch": "NF PD PD PD ok ok ok ok ok",
    "EventService/ListEvents": "NF PD ok ok ok ok ok ok ok",
    "LiveMessageService/StreamMessage": "UI UI UI UI UI UI UI UI UI",
    "LiveMessageService/GetLiveMessage": "UI UI UI UI UI UI UI UI UI",
    "LiveMessageService/ListLiveMessages": "UI UI UI UI UI UI UI UI UI",
    "LiveMessageService/CancelLiveMessage": "UI UI UI UI UI UI UI UI UI",
    "TransferService/ImportConversations": "UI",
    "TransferService/ExportConversations": "UI UI UI UI UI UI UI UI UI",
    "UsageService/QueryUsage": "UI UI UI UI UI UI UI UI UI",
}


@dataclass(frozen=True)
class World:
    """A conversation with one of each kind in it; its first message is the owner's."""

    conversation_id: str
    # By what they are there; `fresh` has nothing to do with it.
    people: dict[str, user_pb2.User]

    def id(self, who: str) -> str:
        """The user's id; empty for the system, which names whom it means."""
        return self.people[who].id


@dataclass(frozen=True)
class Rpc:
    """A method of the contract, as reflection shows it."""

    descriptor: MethodDescriptor

    @property
    def name(self) -> str:
        return f"{self.descriptor.containing_service.name}/{self.descriptor.name}"

    @property
    def access(self) -> access_pb2.Access:
        return self.descriptor.GetOptions().Extensions[access_pb2.access]

    @property
    def refuses_actors(self) -> bool:
        return self.access.actor == access_pb2.Access.ACTOR_REFUSED

    @property
    def ignores_actors(self) -> bool:
        return self.access.actor == access_pb2.Access.ACTOR_NONE

    @property
    def reads(self) -> bool:
        return self.access.scope == access_pb2.Access.SCOPE_READ

    def expected(self, column: str) -> str:
        """The status of a call in this column."""
        row = MATRIX[self.name].split()
        if column in ("no token", "bad token"):
            return CODES["UA"]
        if column == "no scope":
            return CODES["PD"]
        if column in ("no act-as", "no system", "inactive"):
            return CODES[row[-1]] if self.ignores_actors else CODES["PD"]
        if self.refuses_actors and column != "system":
            return CODES["PD"]
        return CODES[row[-1] if self.refuses_actors else row[ACTORS.index(column)]]


def rpcs() -> Iterator[Rpc]:
    for module in MODULES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield Rpc(method)


def page() -> str:
    """The matrix as people read it."""
    columns = (*DOORS, *ACTORS)
    short = {code: word for word, code in CODES.items()}
    lines = [
        "# Who may call what",
        "",
        "Made by `make matrix` from the table that the tests hold the service to, call by call.",
        "The first six columns are about the caller: no or a bad token; a token without the scope",
        "of the RPC, without `act-as` while naming an actor, without `system` while naming none;",
        "an actor who is deactivated. The others are what the actor is in the conversation;",
        "`system` is a call without an actor.",
        "",
        ", ".join(f"**{word}** {code}" for word, code in CODES.items()) + " (not served yet).",
        "",
        "| RPC | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for rpc in rpcs():
        cells = " | ".join(short[rpc.expected(column)] for column in columns)
        lines.append(f"| {rpc.name} | {cells} |")
    return "\n".join(lines) + "\n"


Build = Callable[[World, str], Any]


def _self(who: str, world: World) -> str:
    """Whom a call about oneself names: nobody for an actor; for the system, the invitee."""
    return world.id("invited") if who == "system" else ""


def _by(who: str, world: World) -> str:
    """Who does it, where the system has to say."""
    return world.id("owner") if who == "system" else ""


def _participant(name: str, subject: str, **values: Any) -> Build:
    kind = getattr(participant_pb2, name)
    return lambda world, _: kind(
        conversation_id=world.conversation_id, user_id=world.id(subject), **values
    )


def _entering(name: str) -> Build:
    kind = getattr(participant_pb2, name)
    return lambda world, who: kind(
        conversation_id=world.conversation_id,
        user_id=world.id("fresh"),
        invited_by_user_id=_by(who, world),
    )


def _own(name: str) -> Build:
    kind = getattr(participant_pb2, name)
    return lambda world, who: kind(conversation_id=world.conversation_id, user_id=_self(who, world))


def _user(name: str) -> Build:
    kind = getattr(user_pb2, name)
    return lambda world, _: kind(user_id=world.id("fresh"))


def _conversation(name: str, **values: Any) -> Build:
    kind = getattr(conversation_pb2, name)
    return lambda world, _: kind(conversation_id=world.conversation_id, **values)


def _message(name: str, **values: Any) -> Build:
    kind = getattr(message_pb2, name)
    return lambda world, _: kind(conversation_id=world.conversation_id, **values)


# A request that the right actor may make, for each RPC that needs more than an empty one.
REQUESTS: dict[str, Build] = {
    "UserService/CreateUser": lambda _, __: user_pb2.CreateUserRequest(
        user=user_pb2.User(username="newcomer"), validate_only=True
    ),
    "UserService/GetUser": lambda world, _: user_pb2.GetUserRequest(user_id=world.id("owner")),
    "UserService/BatchGetUsers": lambda world, _: user_pb2.BatchGetUsersRequest(
        user_ids=[world.id("owner")]
    ),
    "UserService/UpdateUser": lambda world, _: user_pb2.UpdateUserRequest(
        user_id=world.id("owner"), user=user_pb2.User(full_name="New")
    ),
    "UserService/DeleteUser": _user("DeleteUserRequest"),
    "UserService/UndeleteUser": _user("UndeleteUserRequest"),
    "UserService/PurgeUser": _user("PurgeUserRequest"),
    "UserService/SetPassword": lambda world, _: user_pb2.SetPasswordRequest(
        user_id=world.id("owner"), password="secret"
    ),
    # A wrong password is no error, unless there are too many for one login.
    "UserService/VerifyPassword": lambda _, who: user_pb2.VerifyPasswordRequest(
        user_id=f"nobody-{who}", password="secret"
    ),
    "ConversationService/CreateConversation": lambda world, who: (
        conversation_pb2.CreateConversationRequest(
            conversation=conversation_pb2.Conversation(creator_id=_by(who, world))
        )
    ),
    "ConversationService/GetOrCreateDirectConversation": lambda world, who: (
        conversation_pb2.GetOrCreateDirectConversationRequest(
            user_id=_by(who, world), other_user_id=world.id("fresh")
        )
    ),
    "ConversationService/GetConversation": _conversation("GetConversationRequest"),
    "ConversationService/ListUserConversations": lambda world, who: (
        conversation_pb2.ListUserConversationsRequest(user_id=_self(who, world))
    ),
    "ConversationService/UpdateConversation": _conversation(
        "UpdateConversationRequest", conversation=conversation_pb2.Conversation(title="New")
    ),
    "ConversationService/DeleteConversation": _conversation("DeleteConversationRequest"),
    "ConversationService/UndeleteConversation": _conversation("UndeleteConversationRequest"),
    "ConversationService/PurgeConversation": _conversation("PurgeConversationRequest"),
    "ParticipantService/InviteParticipant": _entering("InviteParticipantRequest"),
    "ParticipantService/AddParticipant": _entering("AddParticipantRequest"),
    "ParticipantService/GetParticipant": _participant("GetParticipantRequest", "owner"),
    "ParticipantService/ListParticipants": lambda world, _: participant_pb2.ListParticipantsRequest(
        conversation_id=world.conversation_id
    ),
    "ParticipantService/ListInvitations": lambda world, who: participant_pb2.ListInvitationsRequest(
        user_id=_self(who, world)
    ),
    "ParticipantService/AcceptInvitation": _own("AcceptInvitationRequest"),
    "ParticipantService/DeclineInvitation": _own("DeclineInvitationRequest"),
    "ParticipantService/LeaveConversation": _own("LeaveConversationRequest"),
    "ParticipantService/RevokeInvitation": _participant("RevokeInvitationRequest", "pending"),
    "ParticipantService/RemoveParticipant": _participant("RemoveParticipantRequest", "other"),
    "ParticipantService/UpdateParticipant": _participant(
        "UpdateParticipantRequest",
        "other",
        participant=participant_pb2.Participant(role=participant_pb2.Participant.ROLE_OBSERVER),
    ),
    "ParticipantService/MarkRead": lambda world, who: participant_pb2.MarkReadRequest(
        conversation_id=world.conversation_id, user_id=_by(who, world), sequence=1
    ),
    "MessageService/SendMessage": lambda world, who: message_pb2.SendMessageRequest(
        conversation_id=world.conversation_id,
        sender_id=_by(who, world),
        role=message_pb2.Message.ROLE_USER,
        content="hello",
    ),
    "MessageService/BatchSendMessages": lambda world, who: message_pb2.BatchSendMessagesRequest(
        conversation_id=world.conversation_id,
        messages=[
            message_pb2.NewMessage(
                sender_id=_by(who, world), role=message_pb2.Message.ROLE_USER, content="hello"
            )
        ],
    ),
    "MessageService/GetMessage": _message("GetMessageRequest", sequence=1),
    "MessageService/BatchGetMessages": _message("BatchGetMessagesRequest", sequences=[1]),
    "MessageService/ListMessages": _message("ListMessagesRequest"),
    "MessageService/SearchMessages": _message("SearchMessagesRequest", query="first"),
    # Somebody else's, for every actor: who sent it is another in each case.
    "MessageService/UpdateMessage": _message(
        "UpdateMessageRequest", sequence=1, message=message_pb2.Message(content="edited")
    ),
    "MessageService/ListMessageRevisions": _message("ListMessageRevisionsRequest", sequence=1),
    "MessageService/DeleteMessage": _message("DeleteMessageRequest", sequence=1),
    "MessageService/UndeleteMessage": _message("UndeleteMessageRequest", sequence=1),
    "EventService/Watch": lambda world, _: event_pb2.WatchRequest(
        conversation_id=world.conversation_id
    ),
    "EventService/ListEvents": lambda world, _: event_pb2.ListEventsRequest(
        conversation_id=world.conversation_id
    ),
}

if __name__ == "__main__":
    PAGE.write_text(page())
