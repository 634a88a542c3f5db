"""Whatever is sent: no answer is our own failure, and all that was accepted can be read.

`SEED` in the environment repeats a run, but for ids and times; `FUZZ_CALLS` makes it longer.
"""

import os
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from google.protobuf import text_format

from parley.v1 import conversation_pb2, message_pb2, participant_pb2, user_pb2
from scripts import contract
from service.repositories.users import Users

from .fuzz import WORDS, Fuzzer
from .make import Client, Conversation, Message, User, miscounted
from .test_access import METHODS

# The same choices each time, unless asked for others: what fails can be repeated.
SEED = os.environ.get("SEED", "1")
CALLS = int(os.environ.get("FUZZ_CALLS", "4000"))


@pytest.mark.slow
@pytest.mark.timeout(120 + CALLS // 20)
async def test_no_request_makes_the_service_fail_and_what_it_accepts_can_be_read(
    parley: Client, database: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    fuzzer = Fuzzer(parley, METHODS, SEED)

    await fuzzer.run(CALLS)

    with capsys.disabled():
        print(f"\nSEED={SEED} FUZZ_CALLS={CALLS}\n{fuzzer.table()}")
    assert not fuzzer.defects, "\n".join(map(str, fuzzer.defects))
    assert undocumented(fuzzer) == set()
    # Else they were all refused at the door, and nothing was tried.
    assert fuzzer.accepted > CALLS / 10
    assert await miscounted(database) == []
    people = await users(parley)
    for user in people:
        await read_user(parley, user)
    rooms = await conversations(parley)
    for room in rooms:
        await read_conversation(parley, room)
    found = 0
    for word in WORDS:
        request = message_pb2.SearchMessagesRequest(query=word, page_size=200)
        found += len(await pages(parley.messages.SearchMessages, request, "results"))
    assert found
    with capsys.disabled():
        print(f"read: {len(people)} users, {len(rooms)} conversations; {found} messages found")


async def test_an_internal_error_is_noticed_with_its_request(
    parley: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("seeded")

    monkeypatch.setattr(Users, "list", broken)
    methods = [method for method in METHODS if method.name in ("ListUsers", "GetUser")]
    fuzzer = Fuzzer(parley, methods, "1")

    await fuzzer.run(12)

    assert {(defect.method.name, defect.code) for defect in fuzzer.defects} == {
        ("ListUsers", "INTERNAL")
    }
    assert fuzzer.counts["parley.v1.UserService.ListUsers", "INTERNAL"] == len(fuzzer.defects)
    told = str(defect := fuzzer.defects[0]).partition("\n")[2]
    request = user_pb2.ListUsersRequest.FromString(defect.asked.raw)
    assert text_format.Parse(told, user_pb2.ListUsersRequest()) == request


def undocumented(fuzzer: Fuzzer) -> set[tuple[str, str, str]]:
    """What RPCs were refused with and the protos do not say of them; any field may break a rule."""
    said = {
        (rpc.name, *cause)
        for service in contract.services()
        for rpc in service.rpcs
        for cause in {
            *contract.common_causes(),
            *contract.causes(service.comment),
            *contract.causes_of(rpc),
        }
    }
    met = {refusal for refusal in fuzzer.refusals if refusal[2]}
    return {refusal for refusal in met - said if refusal[1] != "INVALID_ARGUMENT"}


# What was accepted


async def pages(call: Callable[[Any], Any], request: Any, name: str) -> list[Any]:
    """All items of a list, page by page."""
    found: list[Any] = []
    while True:
        page = await call(request)
        found += getattr(page, name)
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def users(parley: Client) -> list[User]:
    request = user_pb2.ListUsersRequest(show_deleted=True, page_size=7)
    found = await pages(parley.users.ListUsers, request, "users")
    assert len({user.id for user in found}) == len(found)
    return found


async def read_user(parley: Client, user: User) -> None:
    """Get it by either name, its inbox and its invitations."""
    assert await parley.who(user.id) == await parley.who(user.username) == user
    await pages(
        parley.conversations.ListUserConversations,
        conversation_pb2.ListUserConversationsRequest(user_id=user.id, page_size=3),
        "user_conversations",
    )
    await pages(
        parley.participants.ListInvitations,
        participant_pb2.ListInvitationsRequest(user_id=user.id, page_size=3),
        "invitations",
    )


async def conversations(parley: Client) -> list[Conversation]:
    """All of them, and those that were deleted brought back."""
    request = conversation_pb2.ListConversationsRequest(show_deleted=True, page_size=7)
    found = await pages(parley.conversations.ListConversations, request, "conversations")
    assert len({room.id for room in found}) == len(found)
    for room in found:
        if room.HasField("delete_time"):
            await parley.undelete(room)
    return [await parley.seen(room) for room in found]


async def read_conversation(parley: Client, room: Conversation) -> None:
    """Its participants; its messages in both orders, each with its revisions."""
    await pages(
        parley.participants.ListParticipants,
        participant_pb2.ListParticipantsRequest(conversation_id=room.id, page_size=3),
        "participants",
    )
    oldest, newest = await messages(parley, room, "sequence"), await messages(parley, room, "")
    assert oldest == newest[::-1]
    assert [message.sequence for message in oldest] == list(range(1, room.last_sequence + 1))
    for message in oldest:
        if message.revision > 1 and not message.HasField("delete_time"):
            await pages(
                parley.messages.ListMessageRevisions,
                message_pb2.ListMessageRevisionsRequest(
                    conversation_id=room.id, message_id=message.id, page_size=2
                ),
                "revisions",
            )


async def messages(parley: Client, room: Conversation, order: str) -> list[Message]:
    request = message_pb2.ListMessagesRequest(conversation_id=room.id, order_by=order, page_size=5)
    return await pages(parley.messages.ListMessages, request, "messages")
