"""Messages: numbered without gaps, exactly once, read page by page."""

from parley.v1 import message_pb2 as pb

from ..make import USER, Client


async def test_messages_are_numbered_from_one(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    sent = [await parley.message(talk, ada, f"line {n}") for n in range(3)]

    assert [message.sequence for message in sent] == [1, 2, 3]
    assert [message.content for message in await parley.all_messages(talk)] == [
        "line 0",
        "line 1",
        "line 2",
    ]


async def test_a_repeated_request_id_gives_the_first_answer(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    request = pb.SendMessageRequest(
        conversation_id=talk.slug, sender_id="ada", role=USER, content="once", request_id="r-1"
    )

    first = await parley.messages.SendMessage(request)
    call = parley.messages.SendMessage(request)

    assert await call == first
    assert dict(await call.trailing_metadata())["x-parley-replayed"] == "true"
    assert len(await parley.all_messages(talk)) == 1
