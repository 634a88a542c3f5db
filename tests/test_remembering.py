"""What one server remembers of conversations, and another one changes."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import chain, repeat
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from service import eras, memory
from service.domain import MessageRole
from service.embedded import EmbeddedPostgres
from service.identity import Call, Caller, Scope
from service.repositories import messages as messages_
from service.repositories.messages import Messages
from service.rules.messages import Append, Draft, Replayed, State
from service.rules.requests import RequestId
from service.sending import Sender
from service.store import Store

from .make import (
    AGENT,
    ASSISTANT,
    HUMAN,
    MEMBER,
    OBSERVER,
    Client,
    Conversation,
    Message,
    User,
    facts,
    failure,
    require_sums,
    until,
)

CALL = Call("test", Caller("test", frozenset(Scope)), None)


def append_of(talk: Conversation, sender: User) -> Append:
    """What a system would have this sender say."""
    draft = Draft(
        role=MessageRole.USER, content="hello", sender=sender.id, sender_id=UUID(sender.id)
    )
    return Append(conversation=talk.id, conversation_id=UUID(talk.id), actor=None, drafts=(draft,))


@pytest.fixture(autouse=True, params=[1, 2], ids=["as a set", "alone"])
def statement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which statement stores a message that comes alone."""
    monkeypatch.setattr(messages_, "SET_FROM", request.param)


@pytest.fixture
def reliant(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered is relied on, however often it was wrong of late."""
    monkeypatch.setattr(memory, "RELIABLE", 0.0)


async def nothing(_: Client, __: Conversation, ___: User) -> None:
    pass


async def send(there: Client, talk: Conversation, _: User) -> None:
    await there.message(talk, await there.who(talk.creator_id), "from there")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nothing, ""),
        (send, ""),
        (lambda there, talk, ada: there.mark_read(talk, ada, sequence=1), ""),
        (lambda there, talk, _: there.update(talk, title="other"), ""),
        (lambda there, _, ada: there.update_user(ada, full_name="Ada Lovelace"), ""),
        (lambda there, talk, ada: there.remove(talk, ada), "NOT_A_PARTICIPANT"),
        (lambda there, talk, ada: there.appoint(talk, ada, OBSERVER), "PERMISSION_DENIED"),
        (lambda there, talk, _: there.update(talk, is_active=False), "CONVERSATION_ARCHIVED"),
        (lambda there, talk, _: there.delete(talk), "CONVERSATION_DELETED"),
        (lambda there, _, ada: there.update_user(ada, is_active=False), "ACTOR_NOT_ALLOWED"),
        (lambda there, _, ada: there.delete_user(ada), "ACTOR_NOT_ALLOWED"),
        (lambda there, _, ada: there.update_user(ada, kind=HUMAN), "ROLE_NOT_ALLOWED"),
    ],
)
@pytest.mark.usefixtures("reliant")
async def test_what_is_remembered_of_a_conversation_is_not_believed_once_it_has_changed(
    parley: Client,
    elsewhere: Client,
    change: Callable[[Client, Conversation, User], Awaitable[Any]],
    reason: str,
) -> None:
    olivia, ada = await parley.user(), await parley.user(kind=AGENT)
    talk = await parley.conversation(olivia, ada)
    as_ada = parley.acting_as(ada)
    for n in range(3):
        await as_ada.send(talk, str(n), role=ASSISTANT)
    before = (await parley.seen(talk)).last_sequence

    await change(elsewhere, talk, ada)

    if reason:
        assert (await failure(as_ada.send(talk, "after", role=ASSISTANT))).reason == reason
    else:
        sent = await as_ada.send(talk, "after", role=ASSISTANT)
        assert sent.sequence == before + 1 + (change is send)
        assert [message.sequence for message in await parley.all_messages(talk)] == list(
            range(1, sent.sequence + 1)
        )


@pytest.mark.usefixtures("reliant")
async def test_messages_that_come_from_elsewhere_need_no_look_up(
    parley: Client, elsewhere: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, bob = await parley.user(), await parley.user()
    talk = await parley.conversation(ada, bob)
    for client, sender in ((parley, ada), (elsewhere, bob)):
        await client.message(talk, sender)
    load_states, loads = Messages.load, []

    async def load_and_count(messages: Messages, items: list[Append]) -> dict[UUID, State]:
        loads.extend(items)
        return await load_states(messages, items)

    monkeypatch.setattr(Messages, "load", load_and_count)
    sent = [
        await client.message(talk, sender)
        for _ in range(5)
        for client, sender in ((parley, ada), (elsewhere, bob), (elsewhere, bob))
    ]

    assert not loads
    assert [message.sequence for message in sent] == list(range(3, 18))
    await parley.update(talk, title="other")
    assert (await elsewhere.message(talk, bob)).sequence == 18
    assert len(loads) == 1


@pytest.mark.usefixtures("reliant")
async def test_who_relies_on_a_number_gets_that_or_nothing(
    parley: Client, elsewhere: Client
) -> None:
    ada = await parley.user()
    talk = await parley.conversation(ada)
    await parley.message(talk, ada)
    await elsewhere.message(talk, ada)

    refused = await failure(parley.message(talk, ada, expected_last_sequence=1))
    assert (refused.reason, refused.known["last_sequence"]) == ("SEQUENCE_MISMATCH", "2")
    await elsewhere.message(talk, ada)
    assert (await parley.message(talk, ada, expected_last_sequence=3)).sequence == 4


async def test_what_is_taken_between_look_up_and_write_is_taken(
    parley: Client, elsewhere: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = await parley.user()
    talk = await parley.conversation(ada)
    load_states = Messages.load
    holders: list[Message] = []
    first = chain([True], repeat(False))

    async def load_and_take(messages: Messages, items: list[Append]) -> dict[UUID, State]:
        states = await load_states(messages, items)
        if next(first):
            holders.append(await elsewhere.message(talk, ada, external_id="x"))
        return states

    monkeypatch.setattr(Messages, "load", load_and_take)
    refused = await failure(parley.message(talk, ada, external_id="x"))

    assert refused.reason == "EXTERNAL_ID_TAKEN"
    assert await parley.all_messages(talk) == holders


@pytest.mark.usefixtures("reliant")
async def test_twins_are_told_the_number_that_their_message_got(
    parley: Client, elsewhere: Client, postgres: EmbeddedPostgres
) -> None:
    """One batch, decided by what is remembered, which messages from elsewhere have moved on."""
    ada = await parley.user()
    talk = await parley.conversation(ada)
    item = append_of(talk, ada)
    twin = replace(item, request=RequestId(b"k" * 16, b"h" * 32))
    store = Store(postgres.url)
    try:
        sender = Sender(store)
        await sender.append(item, CALL)
        for _ in range(3):
            await elsewhere.message(talk, ada)
        first, second, other = await asyncio.gather(
            *(sender.append(each, CALL) for each in (twin, twin, item))
        )
    finally:
        await store.close()

    assert isinstance(first, list)
    assert isinstance(other, list)
    assert [message.sequence for message, _ in (*first, *other)] == [5, 6]
    assert second == Replayed(5, 1, is_stored=False)


@pytest.mark.usefixtures("reliant")
async def test_who_was_refused_by_what_is_remembered_is_looked_up_after_all(
    parley: Client, elsewhere: Client
) -> None:
    """One who was let in elsewhere, and one who may speak again."""
    ada, bob = await parley.user(), await parley.user()
    talk = await parley.conversation(ada, bob)
    as_bob = parley.acting_as(bob)
    await as_bob.send(talk)
    await parley.appoint(talk, bob, OBSERVER)
    assert (await failure(as_bob.send(talk))).reason == "PERMISSION_DENIED"
    await parley.message(talk, ada)

    await elsewhere.appoint(talk, bob, MEMBER)

    assert (await as_bob.send(talk)).sequence == 3


@pytest.mark.usefixtures("reliant")
async def test_a_request_that_was_made_elsewhere_is_not_made_again_by_who_remembers(
    parley: Client, elsewhere: Client
) -> None:
    ada = await parley.user()
    talk = await parley.conversation(ada)
    await parley.message(talk, ada, "before")
    first = await parley.message(talk, ada, "once", request_id="r-1")
    await parley.message(talk, ada, "after")

    here, there = await asyncio.gather(
        parley.message(talk, ada, "once", request_id="r-1"),
        elsewhere.message(talk, ada, "once", request_id="r-1"),
    )

    assert here == there == first
    assert len(await parley.all_messages(talk)) == 3


async def test_a_sender_who_changes_while_a_conversation_is_made_is_no_defect(
    parley: Client, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = await parley.user()
    load_states, changes = Messages.load, iter([1])

    async def load_and_change(messages: Messages, items: list[Append]) -> dict[UUID, State]:
        states = await load_states(messages, items)
        for _ in changes:
            await database.execute(
                "UPDATE users SET full_name = 'Ada', revision = revision + 1 WHERE id = $1",
                UUID(ada.id),
            )
        return states

    monkeypatch.setattr(Messages, "load", load_and_change)
    talk = await parley.conversation(ada, first="hello")

    assert not list(changes)
    (message,) = await parley.all_messages(talk)
    assert (message.sequence, message.content) == (1, "hello")


# The last message, and the change of title before it.
REWIND = """
WITH talk AS (SELECT id, last_sequence, version FROM conversations WHERE id = $1),
event AS (DELETE FROM events e USING talk t
          WHERE e.conversation_id = t.id AND e.version >= t.version - 1),
person AS (UPDATE participants p SET last_read_sequence = t.last_sequence - 1 FROM talk t
           WHERE p.conversation_id = t.id AND p.last_read_sequence = t.last_sequence),
message AS (DELETE FROM messages m USING talk t
            WHERE m.conversation_id = t.id AND m.sequence = t.last_sequence)
UPDATE conversations c SET last_sequence = t.last_sequence - 1, version = t.version - 2
FROM talk t WHERE c.id = t.id
"""
END_SESSIONS = """
SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity
WHERE application_name = 'parley' AND pid <> pg_backend_pid()
"""


@pytest.mark.parametrize("sign", ["sessions end", "new era"])
@pytest.mark.usefixtures("reliant")
async def test_what_is_remembered_is_forgotten_when_the_database_goes_back_in_time(
    parley: Client,
    elsewhere: Client,
    database: asyncpg.Connection,
    postgres: EmbeddedPostgres,
    sign: str,
) -> None:
    """A standby takes over that lacks the last changes, or a copy is put in the place of the
    database. Then comes another change, and there are again as many as are remembered.
    """
    ada, bob = await parley.user(), await parley.user()
    talk, other = await parley.conversation(ada, bob), await parley.conversation(bob)
    as_bob = parley.acting_as(bob)
    for each in (talk, other):
        for n in range(2):
            await as_bob.send(each, str(n))
        await parley.update(each, title="lost")
        await as_bob.send(each, "lost")

    for each in (talk, other):
        await database.execute(REWIND, UUID(each.id))
    if sign == "new era":
        await eras.begin(postgres.url)
    else:
        await database.fetch(END_SESSIONS)
        await asyncio.sleep(0.1)
    await elsewhere.remove(talk, bob)
    await elsewhere.update(other, title="other")

    assert (await as_bob.send(other)).sequence == 3
    assert (await failure(as_bob.send(talk))).reason == "NOT_A_PARTICIPANT"
    for each, count in ((talk, 2), (other, 3)):
        sequences = [message.sequence for message in await parley.all_messages(each)]
        assert sequences == list(range(1, count + 1))


async def test_the_first_batch_of_a_process_knows_too_when_the_database_went_back_in_time(
    parley: Client, postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives way to another one between the look-up and the write; behind a pooler, the session
    goes on.
    """
    ada = await parley.user()
    talk = await parley.conversation(ada)
    load_states = Messages.load
    loads: list[dict[UUID, State]] = []

    async def load_and_begin(messages: Messages, items: list[Append]) -> dict[UUID, State]:
        states = await load_states(messages, items)
        if not loads:
            await eras.begin(postgres.url)
        loads.append(states)
        return states

    monkeypatch.setattr(Messages, "load", load_and_begin)
    store = Store(postgres.url)
    try:
        sent = await Sender(store).append(append_of(talk, ada), CALL)
    finally:
        await store.close()

    assert len(loads) == 2
    assert isinstance(sent, list)
    assert [message.sequence for message, _ in sent] == [1]
    assert [message.content for message in await parley.all_messages(talk)] == ["hello"]


ARCHIVED = """
WITH c AS (UPDATE conversations SET version = version + 1, is_active = false
           WHERE id = $1 RETURNING *)
INSERT INTO events (conversation_id, version, era, type)
SELECT id, version, (SELECT max(era) FROM eras), 'CONVERSATION_UPDATED' FROM c
"""
SAID = """
WITH c AS (UPDATE conversations SET version = version + 1, last_sequence = last_sequence + 1
           WHERE id = $1 RETURNING *),
m AS (INSERT INTO messages (conversation_id, id, sequence, role, content)
      SELECT id, uuidv7(), last_sequence, 'SYSTEM', 'between' FROM c),
r AS (INSERT INTO requests (conversation_id, key, payload_hash, sequence, message_count)
      SELECT id, $2, $3, last_sequence, 1 FROM c)
INSERT INTO events (conversation_id, version, era, type, sequence, revision)
SELECT id, version, (SELECT max(era) FROM eras), 'MESSAGE_CREATED', last_sequence, 1 FROM c
"""


FORGOTTEN = "DELETE FROM requests WHERE conversation_id = $1 RETURNING key, payload_hash"
WAITING = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock')"


@pytest.mark.parametrize(
    ("change", "request_id", "said"),
    [
        (ARCHIVED, "r-2", ["hello"]),
        (SAID, "r-2", ["hello", "between", "hello"]),
        (SAID, "r-1", ["hello", "between"]),
    ],
    ids=["archived", "said", "said by the same request"],
)
@pytest.mark.usefixtures("reliant")
async def test_a_send_that_met_an_unfinished_change_is_decided_anew(
    parley: Client,
    database: asyncpg.Connection,
    postgres: EmbeddedPostgres,
    change: str,
    request_id: str,
    said: list[str],
) -> None:
    """The change takes no lock: the send finds the row taken, and after the wait another version.
    That is how it looks, too, when somebody commits between the send's snapshot and its lock.
    """
    ada = await parley.user()
    talk = await parley.conversation(ada)
    await parley.message(talk, ada, request_id="r-1")
    (request,) = await database.fetch(FORGOTTEN, UUID(talk.id))
    foreign = await asyncpg.connect(postgres.url.replace("postgresql+asyncpg", "postgresql"))
    async with foreign.transaction():
        await foreign.execute(change, UUID(talk.id), *(request if change == SAID else ()))
        sending = asyncio.create_task(parley.message(talk, ada, request_id=request_id))

        async def is_waiting() -> bool:
            return bool(await database.fetchval(WAITING))

        await until(is_waiting)
    await foreign.close()

    if change == ARCHIVED:
        assert (await failure(sending)).reason == "CONVERSATION_ARCHIVED"
    else:
        sent = await sending
        assert (sent.sequence, sent.content) == (len(said), said[-1])
    assert [message.content for message in await parley.all_messages(talk)] == said
    # The number of its transaction would have been smaller than that of what it waited for.
    events = await facts(database, talk)
    assert [event["version"] for event in events] == list(range(1, len(events) + 1))


@pytest.mark.usefixtures("reliant")
async def test_sends_to_one_conversation_on_two_servers_at_once_leave_no_hole(
    parley: Client, elsewhere: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user()
    talk = await parley.conversation(ada)

    sent = await asyncio.gather(
        *(client.message(talk, ada) for _ in range(100) for client in (parley, elsewhere))
    )

    assert sorted(message.sequence for message in sent) == list(range(1, 201))
    await require_sums(parley, database, talk)
    rows = await database.fetch(
        "SELECT version FROM events WHERE conversation_id = $1 ORDER BY era, xid, version",
        UUID(talk.id),
    )
    versions = [row["version"] for row in rows]
    assert versions == sorted(versions), "the order of transactions is not that of versions"
