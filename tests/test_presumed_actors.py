"""RPCs that look themselves whether their actor may act: none answers one who may not."""

import asyncpg
import pytest
from google.protobuf.message import Message as ProtoMessage

from parley.v1 import conversation_pb2, message_pb2, participant_pb2
from service.servicers.conversations import ConversationServicer
from service.servicers.events import EventServicer
from service.servicers.messages import MessageServicer
from service.servicers.participants import ParticipantServicer
from service.servicers.users import UserServicer

from .make import USER, Client, Stub, User, failure

SERVICERS = (
    ConversationServicer, EventServicer, MessageServicer, ParticipantServicer, UserServicer,
)  # fmt: skip
PRESUMING = {
    name
    for servicer in SERVICERS
    for name, behavior in vars(servicer).items()
    if getattr(behavior, "checks_actor", False)
}


def requests(talk: str) -> dict[str, tuple[str, ProtoMessage]]:
    """A call of each that succeeds for who is in the conversation."""
    new = message_pb2.NewMessage(role=USER, content="hello")
    return {
        "GetConversation": (
            "conversations",
            conversation_pb2.GetConversationRequest(conversation_id=talk),
        ),
        # An inbox with something in it, and one in which nothing is found.
        "ListUserConversations": (
            "conversations",
            conversation_pb2.ListUserConversationsRequest(
                title_contains=talk if talk in ("no-such-talk", "?") else ""
            ),
        ),
        "GetParticipant": (
            "participants",
            participant_pb2.GetParticipantRequest(conversation_id=talk),
        ),
        "ListParticipants": (
            "participants",
            participant_pb2.ListParticipantsRequest(conversation_id=talk),
        ),
        "GetMessage": (
            "messages",
            message_pb2.GetMessageRequest(conversation_id=talk, sequence=1),
        ),
        "BatchGetMessages": (
            "messages",
            message_pb2.BatchGetMessagesRequest(conversation_id=talk, sequences=[1]),
        ),
        "ListMessages": ("messages", message_pb2.ListMessagesRequest(conversation_id=talk)),
        "ListMessageRevisions": (
            "messages",
            message_pb2.ListMessageRevisionsRequest(conversation_id=talk, sequence=1),
        ),
        "SendMessage": (
            "messages",
            message_pb2.SendMessageRequest(
                conversation_id=talk, role=USER, content="hello", request_id="again"
            ),
        ),
        "BatchSendMessages": (
            "messages",
            message_pb2.BatchSendMessagesRequest(conversation_id=talk, messages=[new]),
        ),
    }


def test_each_of_them_is_tried() -> None:
    assert set(requests("talk")) == PRESUMING


@pytest.mark.parametrize("name", sorted(PRESUMING))
@pytest.mark.parametrize("how", ["deactivated", "deleted"])
async def test_who_may_not_act_is_told_so_whatever_it_asks(
    parley: Client, database: asyncpg.Connection, name: str, how: str
) -> None:
    ada = await parley.user()
    talk = await parley.conversation(ada, first="hello")
    service, request = requests(talk.id)[name]
    stub: Stub = getattr(parley.acting_as(ada), service)
    await getattr(stub, name)(request)

    mark = "is_active = false" if how == "deactivated" else "deleted_at = now()"
    await database.execute(f"UPDATE users SET {mark} WHERE id = $1", ada.id)

    stored = len(await parley.all_messages(talk))
    hidden = requests("no-such-talk")[name][1]
    malformed = requests("?")[name][1]
    for asked in (request, hidden, malformed):
        refused = await failure(getattr(stub, name)(asked))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "ACTOR_NOT_ALLOWED")
    assert len(await parley.all_messages(talk)) == stored


@pytest.mark.parametrize("name", sorted(PRESUMING))
async def test_nobody_is_told_that_there_is_no_such_actor_and_nothing_else(
    parley: Client, name: str
) -> None:
    talk = await parley.conversation(await parley.user(), first="hello")
    service, request = requests(talk.id)[name]
    nobody = User(id="019a0000-0000-7000-8000-000000000000")

    refused = await failure(getattr(getattr(parley.acting_as(nobody), service), name)(request))

    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "USER_NOT_FOUND")
    assert refused.known["field"] == "x-parley-actor"
