"""`parley watch`: a line an event, by the names of those concerned."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from service.server import Server
from service.watcher import WatchFailedError, watch_lines, watch_request

from .make import Client


async def lines(server: Server, count: int, **options: Any) -> list[str]:
    """The first lines, without their times and the conversation's id."""
    actor = options.pop("actor", None)
    request = watch_request(**{"conversation": None, "user": None, "oldest": True, **options})
    assert server.token
    found = []
    watching = watch_lines(request, address=server.address, token=server.token, actor=actor)
    async with asyncio.timeout(5), aclosing(watching):
        async for line in watching:
            found.append(" ".join(line[19:].split()[1:]))
            if len(found) == count:
                break
    return found


async def test_it_tells_who_did_what(parley: Client, server: Server) -> None:
    ada, bob = await parley.user("ada"), await parley.user("Bob|")
    talk = await parley.conversation(ada, bob, first="Tea?\n\x1b[2JNow?", title="Tea", slug="tea")
    await parley.acting_as(ada).remove(talk, bob, reason="rude")

    assert await lines(server, 5, conversation="tea") == [
        "1 conversation created Tea",
        "2 participant changed ada is joined as owner",
        "3 participant changed Bob| is joined as member",
        "4 message created #1 ada: Tea? [2JNow?",
        "5 participant changed Bob| is removed as member by ada (rude)",
    ]
    assert len(await lines(server, 5)) == 5
    assert (await lines(server, 1, user="ada"))[0].startswith("2 participant changed ada")


async def test_it_sees_as_its_actor_does(parley: Client, server: Server) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bøb")
    talk = await parley.conversation(ada, first="one")
    await parley.message(talk, ada, "two")
    await parley.add(talk, bob, invited_by_user_id=ada.id, hide_history=True)

    assert await lines(server, 4, conversation=talk.id, actor="bøb") == [
        "1 conversation created",
        "2 participant changed ada is joined as owner",
        "3-4 withheld",
        "5 participant changed bøb is joined as member",
    ]


async def test_it_says_why_it_cannot(parley: Client, server: Server) -> None:
    with pytest.raises(WatchFailedError, match="There is no conversation 'nowhere'"):
        await lines(server, 1, conversation="nowhere")
