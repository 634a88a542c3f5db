"""The invitations that await a user's answer: what it is shown for it, and what it is not."""

import asyncio
from typing import Any

import asyncpg

from parley.v1 import participant_pb2 as pb

from ..make import AGENT, OBSERVER, Client, Conversation, User, failure
from .test_participants import INVITED


async def list_(client: Client, **values: Any) -> pb.ListInvitationsResponse:
    request = pb.ListInvitationsRequest(**values)
    return await client.participants.ListInvitations(request)  # type: ignore[no-any-return]


async def titles(client: Client, **values: Any) -> list[str]:
    return [each.conversation_title for each in (await list_(client, **values)).invitations]


async def invited(parley: Client, count: int, **values: Any) -> tuple[User, list[Conversation]]:
    """Bob, whom ada has invited to so many conversations, one after the other."""
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talks = [
        await parley.conversation(ada, title=f"talk {n}", first="hello", **values)
        for n in range(count)
    ]
    for talk in talks:
        await parley.acting_as(ada).invite(talk, bob, initial_message_sequence=1)
    return bob, talks


async def test_an_invitation_shows_what_its_user_needs_to_answer(parley: Client) -> None:
    ada = await parley.user("ada", email="ada@example.org", full_name="Ada L.", kind=AGENT)
    bob = await parley.user("bob")
    talk = await parley.conversation(ada, first="hello", title="Tea", metadata={"a": 1})
    own = await parley.acting_as(ada).invite(
        talk, bob, role=OBSERVER, initial_message_sequence=1, reason="old friend"
    )

    for client, values in ((parley.acting_as(bob), {}), (parley, {"user_id": "bob"})):
        (invitation,) = (await list_(client, **values)).invitations
        assert invitation == pb.Invitation(
            participant=own,
            conversation_title="Tea",
            inviter=User(id=ada.id, username="ada", full_name="Ada L.", kind=AGENT),
            initial_message=(await parley.all_messages(talk))[0],
        )


async def test_a_bare_invitation_has_no_message_and_a_deleted_one_a_tombstone(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob, cy = [await parley.user(name) for name in ("ada", "bob", "cy")]
    talk = await parley.conversation(ada, first="hello")
    await parley.acting_as(ada).invite(talk, bob)
    await parley.acting_as(ada).invite(talk, cy, initial_message_sequence=1)
    await database.execute("UPDATE messages SET deleted_at = now()")
    (bare,) = (await list_(parley.acting_as(bob))).invitations
    (marked,) = (await list_(parley.acting_as(cy))).invitations
    assert not bare.HasField("initial_message")
    assert (marked.initial_message.sequence, marked.initial_message.content) == (1, "")
    assert marked.initial_message.HasField("delete_time")


async def test_only_what_awaits_an_answer_is_listed_newest_first(
    parley: Client, database: asyncpg.Connection
) -> None:
    bob, talks = await invited(parley, 7)
    own, owner = parley.acting_as(bob), parley.acting_as("ada")
    await own.accept(talks[1], bob)
    await own.decline(talks[2], bob)
    await owner.revoke(talks[3], bob)
    await database.execute(
        "UPDATE conversations SET deleted_at = now() WHERE title = 'talk 4';"
        "UPDATE conversations SET is_active = false WHERE title = 'talk 5'"
    )
    assert await titles(own) == ["talk 6", "talk 5", "talk 0"]
    # Invited anew, it is new.
    await owner.invite(talks[2], bob)
    assert await titles(own) == ["talk 2", "talk 6", "talk 5", "talk 0"]
    # Another role is no other invitation.
    await owner.appoint(talks[0], bob, OBSERVER)
    assert await titles(own) == ["talk 2", "talk 6", "talk 5", "talk 0"]


async def test_an_actor_sees_its_own_and_the_system_anybodys(parley: Client) -> None:
    bob, _ = await invited(parley, 1)
    for name in ("bob", bob.id):
        assert await titles(parley.acting_as(bob), user_id=name) == ["talk 0"]
        assert await titles(parley, user_id=name) == ["talk 0"]
    for name in ("bob", bob.id, "nobody"):
        refused = await failure(list_(parley.acting_as("ada"), user_id=name))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert await titles(parley.acting_as("ada")) == []
    assert (await failure(list_(parley))).violations == {"user_id": "REQUIRED"}
    missing = await failure(list_(parley, user_id="nobody"))
    assert (missing.code, missing.reason) == ("FAILED_PRECONDITION", "USER_NOT_FOUND")
    assert (missing.known["field"], missing.known["name"]) == ("user_id", "nobody")


# Pages


async def test_pages_show_each_that_was_there_once_while_more_come(parley: Client) -> None:
    bob, talks = await invited(parley, 5)
    ada = await parley.user("ada-2")
    own = parley.acting_as(bob)
    seen: list[str] = []
    token = ""
    while True:
        page = await list_(own, page_size=2, page_token=token)
        seen += [each.conversation_title for each in page.invitations]
        await parley.conversation(ada, title="later", invited=[bob])
        token = page.next_page_token
        if not token:
            break
    assert seen == [talk.title for talk in reversed(talks)]


async def test_a_page_token_is_for_its_own_list_alone(parley: Client) -> None:
    bob, _ = await invited(parley, 2)
    token = (await list_(parley.acting_as(bob), page_size=1)).next_page_token
    assert await titles(parley.acting_as(bob), page_size=9, page_token=token) == ["talk 0"]
    for call in (
        list_(parley.acting_as("ada"), page_token=token),
        list_(parley, user_id="bob", page_token=token),
        list_(parley, user_id="ada", page_token=token),
    ):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "PAGE_TOKEN_MISMATCH")
    refused = await failure(list_(parley.acting_as(bob), page_token="x"))
    assert refused.reason == "INVALID_PAGE_TOKEN"
    assert (await failure(list_(parley.acting_as(bob), page_size=-1))).violations == {
        "page_size": "INVALID_PAGE_SIZE"
    }


async def test_a_page_of_long_messages_is_cut_at_a_mebibyte(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talks = await asyncio.gather(
        *(parley.conversation(ada, first="x" * 250_000, title=f"talk {n}") for n in range(6))
    )
    for talk in talks:
        await parley.acting_as(ada).invite(talk, bob, initial_message_sequence=1)
    own = parley.acting_as(bob)

    first = await list_(own)
    assert first.ByteSize() < 1 << 20
    assert len(first.invitations) == 4
    rest = await list_(own, page_token=first.next_page_token)
    assert [each.conversation_title for each in (*first.invitations, *rest.invitations)] == [
        talk.title for talk in reversed(talks)
    ]
    assert rest.next_page_token == ""
    assert {each.participant.status for each in rest.invitations} == {INVITED}


async def test_a_page_that_was_cut_in_the_database_is_not_the_last(
    parley: Client, database: asyncpg.Connection
) -> None:
    """Lists of nothing are larger there than on the wire."""
    ada, bob = await parley.user("ada"), await parley.user("bob")
    await database.execute(
        """
        WITH made AS (
          INSERT INTO conversations (slug, creator_id, last_sequence)
          SELECT 'talk-' || n, $1, 1 FROM generate_series(1, 950) AS n RETURNING id
        ),
        said AS (
          INSERT INTO messages (conversation_id, sequence, role, content, metadata)
          SELECT id, 1, 'SYSTEM', '',
                 jsonb_build_object('k', array_fill('[]'::jsonb, ARRAY[170])) FROM made
          RETURNING conversation_id, id
        )
        INSERT INTO participants (conversation_id, user_id, status, role, status_at,
                                  visible_to_sequence, initial_message_id)
        SELECT conversation_id, $2, 'INVITED', 'MEMBER', now(), 0, id FROM said
        """,
        ada.id,
        bob.id,
    )
    own = parley.acting_as(bob)

    first = await list_(own, page_size=1_000)
    rest = await list_(own, page_size=1_000, page_token=first.next_page_token)

    assert first.ByteSize() <= 1 << 20
    found = {each.participant.conversation_id for each in (*first.invitations, *rest.invitations)}
    assert 0 < len(first.invitations) < 950
    assert len(found) == 950
