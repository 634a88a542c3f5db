"""What is known of a conversation's messages is not read again, and never shown as it was."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from parley.v1 import message_pb2 as pb
from service import eras, schema, wire
from service.embedded import EmbeddedPostgres
from service.lookups import Lookups
from service.pages import MAX_MESSAGE_BYTES, KnownMessages
from service.repositories.messages import Page

from .make import OBSERVER, Client, Conversation, User, insist
from .test_migrations import connect
from .test_restore import serving

ONE, TWO, THREE = (UUID(int=number) for number in (1, 2, 3))


def test_what_is_known_is_added_to() -> None:
    known = KnownMessages()

    known.keep(ONE, "1", {3: b"three"})
    known.keep(ONE, "1", {4: b"four"})

    assert known.of(ONE, "1") == {3: b"three", 4: b"four"}
    assert known.of(TWO, "1") == {}


def test_what_was_read_in_one_state_is_not_shown_in_another() -> None:
    """Whoever looked before a change may have read after it, and the other way round."""
    known = KnownMessages()
    known.keep(ONE, "2", {3: b"III"})
    assert known.of(ONE, "1") == {}
    # Whoever is late, and still asks for the old state, takes nothing from those who are not.
    assert known.of(ONE, "2") == {3: b"III"}

    known.keep(ONE, "1", {4: b"four"})
    assert known.of(ONE, "1") == {4: b"four"}
    assert known.of(ONE, "2") == {}


def test_the_conversation_that_was_longest_not_read_makes_room() -> None:
    known = KnownMessages(max_bytes=7_000)
    for id in (ONE, TWO):
        known.keep(id, "1", {1: b"x" * 1_800})
    known.of(ONE, "1")
    known.keep(THREE, "1", {1: b"x" * 1_800})

    assert [len(known.of(id, "1")) for id in (ONE, TWO, THREE)] == [1, 0, 1]


def test_room_is_given_back_where_a_state_is_over() -> None:
    known = KnownMessages(max_bytes=7_000)
    known.keep(TWO, "1", {1: b"x" * 1_800})
    for number in range(50):
        known.keep(ONE, str(number), {1: b"x" * 1_800})

    assert known.of(TWO, "1")
    assert known.of(ONE, "49")


def test_small_conversations_take_room_too() -> None:
    known = KnownMessages(max_bytes=100_000)
    for number in range(1_000):
        known.keep(UUID(int=number), "1", {1: b"x"})

    assert sum(bool(known.of(UUID(int=number), "1")) for number in range(1_000)) < 100


@pytest.mark.parametrize("more", [0, 1])
def test_a_large_message_is_not_kept(more: int) -> None:
    known = KnownMessages()
    known.keep(ONE, "1", {1: b"x" * (MAX_MESSAGE_BYTES + more)})

    assert len(known.of(ONE, "1")) == 1 - more


@pytest.mark.parametrize("size", [0, 90, 10_000, 20_000])
def test_items_of_all_sizes_are_a_list(size: int) -> None:
    items = [wire.item(pb.Message(content=size * letter)) for letter in "ab"]

    shown = pb.ListMessagesResponse.FromString(b"".join(items)).messages

    assert [message.content for message in shown] == [size * "a", size * "b"]


def pages_read() -> float:
    """How many pages this process has read so far."""
    labels = {"batch": "find pages"}
    return REGISTRY.get_sample_value("parley_batch_items_sum", labels) or 0.0


async def shown(parley: Client, talk: Conversation, **values: Any) -> list[str]:
    """What the newest messages say, oldest first, and whether each was edited or deleted."""
    request = pb.ListMessagesRequest(conversation_id=talk.id, **values)
    page = await parley.messages.ListMessages(request)
    return [
        message.content + (message.revision - 1) * "'" + message.HasField("delete_time") * "†"
        for message in page.messages[::-1]
    ]


@pytest_asyncio.fixture
async def ada(parley: Client) -> User:
    return await parley.user("ada")


@pytest_asyncio.fixture
async def talk(parley: Client, ada: User) -> Conversation:
    talk = await parley.conversation(ada)
    for content in "abc":
        await parley.message(talk, ada, content)
    return talk


async def test_a_page_is_read_once(parley: Client, talk: Conversation, ada: User) -> None:
    before = pages_read()
    assert await shown(parley, talk) == ["a", "b", "c"]
    assert await shown(parley, talk) == ["a", "b", "c"]
    assert await shown(parley.acting_as(ada), talk, page_size=2) == ["b", "c"]
    assert await shown(parley, talk, around_sequence=2, before_count=1) == ["a", "b"]
    assert pages_read() == before + 1

    await parley.message(talk, ada, "d")
    assert await shown(parley, talk) == ["a", "b", "c", "d"]
    assert await shown(parley, talk) == ["a", "b", "c", "d"]
    assert pages_read() == before + 2

    # Neither of these changes a message.
    await parley.mark_read(talk, ada, sequence=3)
    await parley.update(talk, title="other")
    assert await shown(parley, talk) == ["a", "b", "c", "d"]
    assert pages_read() == before + 2


@pytest.mark.parametrize("page_size", [1, 2, 3])
async def test_pages_that_are_known_in_part_are_completed(
    parley: Client, talk: Conversation, page_size: int
) -> None:
    await shown(parley, talk, around_sequence=2, before_count=0, after_count=0)
    first = await parley.messages.ListMessages(
        pb.ListMessagesRequest(conversation_id=talk.id, page_size=page_size)
    )

    assert [message.content for message in first.messages] == ["c", "b", "a"][:page_size]
    assert bool(first.next_page_token) == (page_size < 3)
    assert [message.content for message in await parley.all_messages(talk)] == ["a", "b", "c"]


async def test_each_change_is_shown(parley: Client, talk: Conversation) -> None:
    bob = await parley.user("bob")
    steps: list[tuple[Callable[[], Awaitable[Any]], list[str]]] = [
        (lambda: parley.edit(talk, sequence=1, content="A"), ["A'", "b", "c"]),
        (lambda: parley.delete_message(talk, sequence=1), ["'†", "b", "c"]),
        (lambda: parley.add(talk, bob, invited_by_user_id=talk.creator_id), ["'†", "b", "c"]),
        (lambda: parley.undelete_message(talk, sequence=1), ["A'", "b", "c"]),
        (lambda: parley.message(talk, bob, "d"), ["A'", "b", "c", "d"]),
        (lambda: parley.edit(talk, sequence=4, content="D"), ["A'", "b", "c", "D'"]),
    ]
    await shown(parley, talk)
    for change, expected in steps:
        await change()
        assert await shown(parley, talk) == expected
        assert await shown(parley, talk) == expected


async def test_a_page_is_of_one_moment(
    parley: Client, talk: Conversation, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the conversation and the reading of what was not known, something that
    was known is changed first, and then something that is read.
    """
    await shown(parley, talk)
    await parley.message(talk, ada, "d")
    read = Lookups.page

    async def read_late(*arguments: Any, **options: Any) -> Page:
        monkeypatch.undo()
        await parley.edit(talk, sequence=1, content="A")
        await parley.edit(talk, sequence=4, content="D")
        return await read(*arguments, **options)

    monkeypatch.setattr(Lookups, "page", read_late)
    assert await shown(parley, talk) == ["A'", "b", "c", "D'"]


async def test_nobody_is_shown_more_than_its_window(
    parley: Client, talk: Conversation, ada: User
) -> None:
    """Though all of it is known, and who it is for is not part of what is known."""
    bob = await parley.user("bob")
    await parley.add(talk, bob, role=OBSERVER, hide_history=True, invited_by_user_id=ada.id)
    as_bob = parley.acting_as(bob)
    await parley.message(talk, ada, "d")
    assert await shown(parley, talk) == ["a", "b", "c", "d"]

    window = (await parley.participant(talk, bob)).visible_from_sequence
    assert await shown(as_bob, talk) == ["a", "b", "c", "d"][window - 1 :]

    await parley.remove(talk, bob)
    await parley.message(talk, ada, "e")
    assert await shown(parley, talk) == ["a", "b", "c", "d", "e"]
    assert await shown(as_bob, talk) == ["a", "b", "c", "d"][window - 1 :]


async def test_where_somebody_else_tore_a_gap_all_that_is_left_is_shown(
    parley: Client, talk: Conversation, database: asyncpg.Connection
) -> None:
    await database.execute(
        "DELETE FROM messages WHERE conversation_id = $1 AND sequence = 2", talk.id
    )

    assert await shown(parley, talk) == ["a", "c"]
    assert [message.content for message in await parley.all_messages(talk)] == ["a", "c"]
    assert await shown(parley, talk, page_size=1) == ["c"]


# In a life of the database in which it was as often changed.
EDITED_ELSEWHERE = "UPDATE messages SET content = 'other' WHERE conversation_id = $1"


async def test_what_was_known_in_another_era_is_read_again(
    parley: Client, talk: Conversation, database: asyncpg.Connection, postgres: EmbeddedPostgres
) -> None:
    """It went back to before an edit, and another one was made since."""
    await shown(parley, talk)

    await database.execute(EDITED_ELSEWHERE, talk.id)
    await eras.begin(postgres.url)

    assert await shown(parley, talk) == ["other"] * 3


async def test_what_was_known_of_tables_that_were_replaced_is_read_again(
    parley: Client, talk: Conversation, database: asyncpg.Connection
) -> None:
    """Restored beside the old ones, and put in their place: the same server, the same counters."""
    await shown(parley, talk)

    await database.execute(EDITED_ELSEWHERE, talk.id)
    async with database.transaction():
        await database.execute("ALTER TABLE conversations RENAME TO before")
        await database.execute("CREATE TABLE conversations (LIKE before INCLUDING ALL)")
        await database.execute("INSERT INTO conversations SELECT * FROM before")
    try:
        assert await insist(lambda: shown(parley, talk)) == ["other"] * 3
    finally:
        async with database.transaction():
            await database.execute("DROP TABLE conversations")
            await database.execute("ALTER TABLE before RENAME TO conversations")


@pytest_asyncio.fixture
async def own_postgres(tmp_path: Path) -> AsyncIterator[EmbeddedPostgres]:
    embedded = EmbeddedPostgres(tmp_path)
    await embedded.start()
    await schema.migrate(embedded.url)
    yield embedded
    await embedded.stop()


@pytest.mark.slow
async def test_what_was_known_before_the_database_was_started_anew_is_read_again(
    own_postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """As whoever puts older files in its place must: the same era, and the same timeline."""
    async with serving(own_postgres.url, tmp_path / "data") as parley:
        ada = await parley.user("ada")
        talk = await parley.conversation(ada, first="a")
        assert await shown(parley, talk) == ["a"]

        await own_postgres.stop()
        await own_postgres.start()
        database = await connect(own_postgres.url)
        await database.execute(EDITED_ELSEWHERE, talk.id)
        await database.close()

        assert await insist(lambda: shown(parley, talk)) == ["other"]


@pytest.mark.slow
async def test_what_was_known_of_another_copy_of_the_database_is_read_again(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """Put in its place, under its name: the same server, the same era, the same tables."""
    superuser = await connect(postgres.url.replace("parley@/parley?", "postgres@/postgres?"))
    await superuser.execute("CREATE DATABASE served OWNER parley")
    url = postgres.url.replace("/parley?", "/served?")
    await schema.migrate(url)
    async with serving(url, tmp_path) as parley:
        talk = await parley.conversation(await parley.user("ada"), first="a")
        assert await shown(parley, talk) == ["a"]

        await superuser.execute("ALTER DATABASE served ALLOW_CONNECTIONS false")
        await superuser.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = 'served'"
        )
        await superuser.execute("CREATE DATABASE copied TEMPLATE served OWNER parley")
        database = await connect(postgres.url.replace("/parley?", "/copied?"))
        await database.execute(EDITED_ELSEWHERE, talk.id)
        await database.close()
        await superuser.execute("DROP DATABASE served")
        await superuser.execute("ALTER DATABASE copied RENAME TO served")

        assert await insist(lambda: shown(parley, talk)) == ["other"]
    await superuser.execute("DROP DATABASE served WITH (FORCE)")
    await superuser.close()
