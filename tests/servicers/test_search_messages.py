"""SearchMessages: what is found, by whom, in which order, and what is never found."""

from typing import Any

from parley.v1 import message_pb2 as pb

from ..make import Client, Conversation


async def found(
    client: Client, query: str, talk: Conversation | None = None, **values: Any
) -> list[str]:
    request = pb.SearchMessagesRequest(query=query, **values)
    if talk:
        request.conversation_id = talk.id
    response = await client.messages.SearchMessages(request)
    return [each.message.content for each in response.results]


async def test_smoke(parley: Client) -> None:
    ada = await parley.user("ada")
    bob = await parley.user("bob")
    talk = await parley.conversation(ada, first="Hello World")
    await parley.message(talk, ada, "Tiếng Việt đẹp")
    assert await found(parley, "hello") == ["Hello World"]
    assert await found(parley, "hello", talk) == ["Hello World"]
    assert await found(parley.acting_as(ada), "hello") == ["Hello World"]
    assert await found(parley.acting_as(bob), "hello") == []
    assert await found(parley.acting_as(ada), "dep viet", talk) == ["Tiếng Việt đẹp"]
    r = await parley.messages.UpdateMessage(
        pb.UpdateMessageRequest(
            conversation_id=talk.id, sequence=1, message=pb.Message(content="Bye")
        )
    )
    assert await found(parley.acting_as(ada), "hello") == []
    assert await found(parley.acting_as(ada), "bye") == ["Bye"]
    r = await parley.messages.ListMessageRevisions(
        pb.ListMessageRevisionsRequest(conversation_id=talk.id, sequence=1)
    )
    print(r)
    assert len(r.revisions) == 2
