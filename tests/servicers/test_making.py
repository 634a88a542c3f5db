"""Users and conversations made by many calls at a time: one transaction, an answer each."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc
import pytest

from parley.v1 import conversation_pb2, message_pb2, participant_pb2
from parley.v1 import user_pb2 as pb
from service import wire

from ..make import (
    USER,
    Client,
    Conversation,
    Failure,
    User,
    facts,
    failure,
    miscounted,
    row_count,
)

NewParticipant = participant_pb2.NewParticipant


@asynccontextmanager
async def gathering(database: asyncpg.Connection, table: str) -> AsyncIterator[None]:
    """Nobody's row comes into the table until the end of this: whoever comes, gathers."""
    async with database.transaction():
        await database.execute(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")
        yield
        await asyncio.sleep(0.2)


def create(parley: Client, **user: Any) -> Any:
    return parley.users.CreateUser(pb.CreateUserRequest(user=User(**user)))


def begin(parley: Client, creator: User, *members: User | str, **request: Any) -> Any:
    """A CreateConversation, to be awaited."""
    names = [member if isinstance(member, str) else member.id for member in members]
    return parley.conversations.CreateConversation(
        conversation_pb2.CreateConversationRequest(
            conversation=Conversation(creator_id=creator.id, **request.pop("values", {})),
            participants=[NewParticipant(user_id=name) for name in names],
            **request,
        )
    )


async def ends(calls: Iterable[Any]) -> list[Any]:
    """What came of each: its answer, or its failure."""

    async def end(call: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError:
            return await failure(call)

    return await asyncio.gather(*map(end, calls))


# Users


async def test_of_users_made_together_each_call_gets_its_own(
    parley: Client, database: asyncpg.Connection
) -> None:
    async with gathering(database, "users"):
        first = asyncio.ensure_future(create(parley, username="first"))
        await asyncio.sleep(0.1)
        others = asyncio.ensure_future(
            ends(create(parley, username=f"user-{n:02}", full_name=f"No. {n}") for n in range(40))
        )
    users = [answer.user for answer in await others]

    assert [(user.username, user.full_name) for user in users] == [
        (f"user-{n:02}", f"No. {n}") for n in range(40)
    ]
    # One statement's time: they were one batch.
    assert len({user.create_time.ToNanoseconds() for user in users}) == 1
    assert [await parley.who(user) for user in users[::13]] == users[::13]
    assert (await first).user.id not in {user.id for user in users}


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        ({"username": "ada"}, {"username": "ada"}, "USERNAME_TAKEN"),
        ({"username": "a", "email": "ADA@x.org"}, {"username": "b", "email": "ada@X.org"}, "EMAIL"),
        ({"username": "a", "external_id": "7"}, {"username": "b", "external_id": "7"}, "EXTERNAL"),
    ],
)
async def test_of_twins_in_one_batch_one_is_made_and_the_other_is_told(
    parley: Client,
    database: asyncpg.Connection,
    one: dict[str, Any],
    other: dict[str, Any],
    reason: str,
) -> None:
    async with gathering(database, "users"):
        head = asyncio.ensure_future(create(parley, username="head"))
        await asyncio.sleep(0.1)
        calls = asyncio.ensure_future(
            ends(create(parley, **each) for each in (one, {"username": "between"}, other))
        )
    answers = await calls
    await head

    made = [answer.user for answer in answers if not isinstance(answer, Failure)]
    (refused,) = [answer for answer in answers if isinstance(answer, Failure)]
    assert refused.code == "ALREADY_EXISTS"
    assert refused.reason.startswith(reason)
    (twin,) = [user for user in made if user.username != "between"]
    name = "ada" if reason == "USERNAME_TAKEN" else twin.id
    assert refused.resource == ("parley.v1.User", name)
    assert await row_count(database) == 3


async def test_a_user_that_the_database_refuses_fails_alone(
    parley: Client, database: asyncpg.Connection
) -> None:
    names = [f"user-{n}" for n in range(20)] + ["poison"]
    await database.execute(
        "ALTER TABLE users ADD CONSTRAINT poison CHECK (username <> 'poison') NOT VALID"
    )
    try:
        answers = await ends(create(parley, username=name) for name in names)
    finally:
        await database.execute("ALTER TABLE users DROP CONSTRAINT poison")

    assert [answer.user.username for answer in answers[:-1]] == names[:-1]
    assert answers[-1].code == "INTERNAL"
    assert await row_count(database) == 20


# Conversations


async def test_conversations_made_together_are_what_they_are_alone(
    parley: Client, database: asyncpg.Connection
) -> None:
    """A call with a request_id has a transaction of its own; all else is the same for both."""
    ada, bob, eve = [await parley.user(name) for name in ("ada", "bob", "eve")]
    hello = message_pb2.NewMessage(sender_id="bob", role=USER, content="hello")
    wanted: list[dict[str, Any]] = [
        {"values": {"title": "plain"}},
        {"members": ["bob", eve]},
        {"members": [ada, "bob"], "initial_message": hello},
        {
            "members": ["bob"],
            "initial_message": hello,
            "invitations": [NewParticipant(user_id="eve")],
        },
        {"invitations": [NewParticipant(user_id=bob.id, reason="tea", hide_history=True)]},
    ]

    def calls(*, alone: bool) -> list[Any]:
        return [
            begin(
                parley,
                ada,
                *each.get("members", ()),
                **{name: value for name, value in each.items() if name != "members"},
                **({"request_id": f"alone-{n}"} if alone else {}),
            )
            for n, each in enumerate(wanted)
        ]

    async with gathering(database, "conversations"):
        head = asyncio.ensure_future(begin(parley, ada))
        await asyncio.sleep(0.1)
        running = asyncio.ensure_future(ends(calls(alone=False)))
    together, alone = await running, [await call for call in calls(alone=True)]
    await head

    assert len({each.conversation.create_time.ToNanoseconds() for each in together}) == 1
    for one, other in zip(together, alone, strict=True):
        assert await facts(database, one.conversation) == await facts(database, other.conversation)
        assert await people(database, one) == await people(database, other)
        assert one.conversation == await parley.seen(one.conversation)
        assert without_what_differs(one) == without_what_differs(other)
    assert not await miscounted(database)


async def people(database: asyncpg.Connection, made: Any) -> list[asyncpg.Record]:
    return await database.fetch(
        "SELECT user_id, status, role, invited_by_user_id, initial_message_id IS NULL,"
        " hide_history,"
        " status_actor_id, status_reason, visible_from_sequence, visible_to_sequence,"
        " last_read_sequence, revision, joined_at IS NULL, left_at IS NULL"
        " FROM participants WHERE conversation_id = $1::text::uuid ORDER BY user_id",
        made.conversation.id,
    )


def without_what_differs(made: Any) -> Any:
    answer = conversation_pb2.CreateConversationResponse()
    answer.CopyFrom(made)
    wire.unmade(answer.conversation).ClearField("slug")
    if answer.HasField("initial_message"):
        wire.unmade(answer.initial_message).ClearField("conversation_id")
    return answer


async def test_of_conversations_made_together_each_is_refused_for_its_own_reason(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    idle = await parley.user("idle", is_active=False)
    await parley.conversation(ada, slug="tea-at-four", external_id="old")
    wrong = message_pb2.NewMessage(sender_id="idle", role=USER, content="hello")
    values = [{"external_id": "7"}, {"external_id": "7"}, {"slug": "tea-at-four"}, {"title": "tea"}]

    async with gathering(database, "conversations"):
        head = asyncio.ensure_future(begin(parley, ada))
        await asyncio.sleep(0.1)
        running = asyncio.ensure_future(
            ends(
                [
                    *(begin(parley, ada, values=each) for each in values),
                    begin(parley, ada, "nobody"),
                    begin(parley, ada, bob, "bob"),
                    begin(parley, ada, idle),
                    begin(parley, ada, idle, values={"external_id": "old"}),
                    begin(parley, ada, initial_message=wrong),
                ]
            )
        )
    first, second, *others = await running
    await head

    (twin,) = [each for each in (first, second) if not isinstance(each, Failure)]
    (refused,) = [each for each in (first, second) if isinstance(each, Failure)]
    assert refused.reason == "EXTERNAL_ID_TAKEN"
    assert refused.resource == ("parley.v1.Conversation", twin.conversation.id)
    assert [each.reason if isinstance(each, Failure) else "" for each in others] == [
        "SLUG_TAKEN",
        "",
        "USER_NOT_FOUND",
        "DUPLICATE",
        "USER_INACTIVE",
        # Whoever repeats an import is told that it is there, whatever became of its people.
        "EXTERNAL_ID_TAKEN",
        "NOT_A_PARTICIPANT",
    ]
    assert await database.fetchval("SELECT count(*) FROM conversations") == 4
    assert not await miscounted(database)


async def test_who_is_renamed_or_purged_meanwhile_is_in_a_conversation_or_is_nobody(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob, eve = [await parley.user(name) for name in ("ada", "bob", "eve")]

    async def rename() -> None:
        for n in range(8):
            await parley.update_user(bob, username=f"bob-{n}" if n % 2 == 0 else "bob")

    async def purge() -> None:
        await asyncio.sleep(0.05)
        await parley.delete_user(eve)
        while not (await parley.purge_user(eve)).done:
            pass

    answers, *_ = await asyncio.gather(
        ends(
            [begin(parley, ada, "bob") for _ in range(60)]
            + [begin(parley, ada, eve) for _ in range(60)]
        ),
        rename(),
        purge(),
    )

    refused = {answer.reason for answer in answers if isinstance(answer, Failure)}
    assert refused <= {"USER_NOT_FOUND", "USER_INACTIVE"}
    left = await database.fetchval(
        "SELECT count(*) FROM participants WHERE user_id = $1::text::uuid"
        " AND status IN ('INVITED', 'JOINED')",
        eve.id,
    )
    assert left == 0
    assert not await miscounted(database)
