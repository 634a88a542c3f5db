"""UpdateMessage and ListMessageRevisions: who edits what, what is kept, what is counted."""

import asyncio
from typing import Any

import asyncpg
import pytest

from parley.v1 import message_pb2 as pb

from ..make import (
    AGENT,
    ASSISTANT,
    NOBODY,
    Client,
    Conversation,
    Message,
    User,
    facts,
    failure,
    is_replay,
    miscounted,
    row_count,
)
from .test_delete_message import DENIED, NOT_FOUND, crowd, get
from .test_update_conversation import outcome, struct

OUTSIDE = "PERMISSION_DENIED NOT_A_PARTICIPANT"
HIDDEN = "NOT_FOUND CONVERSATION_NOT_FOUND"
MIB = 1 << 20


async def edited(client: Client, talk: Conversation, **values: Any) -> Message:
    return (await client.edit(talk, **values)).message  # type: ignore[no-any-return]


async def said(client: Client, talk: Conversation, **values: Any) -> list[str]:
    """What the message has said, newest first."""
    values.setdefault("sequence", 1)
    return [each.content for each in (await client.revisions(talk, **values)).revisions]


async def talk_of_one(parley: Client, **values: Any) -> tuple[Conversation, User, Message]:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    return talk, ada, await parley.message(talk, ada, **values)


async def test_an_edit_is_stored_with_its_event_and_what_it_replaced(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, sent = await talk_of_one(parley, content="tea", metadata=struct(a=1), tokens_used=7)
    actor = parley.acting_as(ada)
    before = await actor.seen(talk)

    now = await edited(
        actor, talk, sequence=1, content="coffee", metadata=struct(b=2), tokens_used=9, model="m"
    )

    assert now == await get(actor, sent)
    assert (now.content, dict(now.metadata), now.tokens_used) == ("coffee", {"b": 2}, 9)
    assert (now.id, now.sequence, now.revision, now.model) == (sent.id, 1, 2, "m")
    assert now.etag != sent.etag
    assert now.create_time == sent.create_time
    assert now.update_time.ToNanoseconds() > sent.update_time.ToNanoseconds()
    after = await actor.seen(talk)
    assert (after.version, after.last_sequence) == (before.version + 1, 1)
    assert (after.total_tokens_used, after.etag) == (9, before.etag)
    assert after.last_activity_time == before.last_activity_time
    assert (await facts(database, talk))[-1] == {
        "version": after.version,
        "type": "MESSAGE_UPDATED",
        "actor_id": ada.id,
        "sequence": 1,
        "revision": 2,
    }
    new, old = (await actor.revisions(talk, message_id=sent.id)).revisions
    assert (new.revision, new.content, dict(new.metadata), new.tokens_used) == (
        2, "coffee", {"b": 2}, 9,
    )  # fmt: skip
    assert (old.revision, old.content, dict(old.metadata), old.tokens_used) == (
        1, "tea", {"a": 1}, 7,
    )  # fmt: skip
    assert (new.editor_id, old.editor_id) == (ada.id, ada.id)
    assert (new.create_time, old.create_time) == (now.update_time, sent.create_time)
    assert not await miscounted(database)


async def test_the_tokens_of_a_conversation_stay_exact(parley: Client) -> None:
    talk, ada, _ = await talk_of_one(parley, input_tokens=2, output_tokens=3)
    await parley.message(talk, ada, tokens_used=10)

    async def total() -> int:
        return (await parley.seen(talk)).total_tokens_used

    edits: list[tuple[dict[str, Any], int]] = [
        ({"output_tokens": 4}, 16),
        ({"tokens_used": 100}, 110),
        ({"mask": ["tokens_used"], "content": "left to the sum"}, 16),
        ({"mask": ["*"], "content": "nothing known"}, 10),
        ({"tokens_used": 0}, 10),
        ({"content": "other words"}, 10),
    ]
    for values, expected in edits:
        await parley.edit(talk, sequence=1, **values)
        assert await total() == expected
    assert (await parley.edit(talk, sequence=1, tokens_used=5)).message.tokens_used == 5
    # What is deleted stays paid for.
    await parley.delete_message(talk, sequence=1)
    assert await total() == 15


@pytest.mark.parametrize(
    ("who", "own", "others"),
    [
        ("owner", "OK", DENIED),
        ("moderator", "OK", DENIED),
        ("member", "OK", DENIED),
        ("observer", DENIED, DENIED),
        ("left", OUTSIDE, OUTSIDE),
        ("invited", "", OUTSIDE),
        ("stranger", "", HIDDEN),
    ],
)
async def test_one_edits_ones_own_and_nobody_anothers(
    parley: Client, database: asyncpg.Connection, who: str, own: str, others: str
) -> None:
    talk, users = await crowd(parley)
    await parley.message(talk, users["author"], "the author's")
    if own:
        # The observer and the one who left spoke while they could.
        role = "UPDATE participants SET role = $1 WHERE user_id = $2::text::uuid"
        if who == "observer":
            await database.execute(role, "MEMBER", users[who].id)
        await parley.message(talk, users[who], "one's own")
        if who == "observer":
            await database.execute(role, "OBSERVER", users[who].id)
    await parley.leave(talk, users["left"])
    client = parley.acting_as(users[who])

    assert await outcome(client.edit(talk, sequence=1, content="x")) == others
    if own:
        assert await outcome(client.edit(talk, sequence=2, content="x")) == own
    assert await said(parley, talk) == ["the author's"]


async def test_the_system_edits_anybodys_and_says_so(parley: Client) -> None:
    bot = await parley.user("bot", kind=AGENT)
    talk = await parley.conversation(bot)
    await parley.message(talk, bot, "first", role=ASSISTANT)

    await parley.edit(talk, sequence=1, content="second")
    await parley.acting_as(bot).edit(talk, sequence=1, content="third")

    revisions = (await parley.revisions(talk, sequence=1)).revisions
    assert [(each.content, each.editor_id) for each in revisions] == [
        ("third", bot.id),
        ("second", ""),
        ("first", bot.id),
    ]


async def test_what_is_not_there_is_not_found(parley: Client) -> None:
    talk, users = await crowd(parley)
    other = await parley.conversation(users["owner"], first="elsewhere")
    elsewhere = (await parley.all_messages(other))[0]
    owner = parley.acting_as(users["owner"])
    for key in ({"sequence": 1}, {"message_id": NOBODY}, {"message_id": elsewhere.id}):
        assert await outcome(owner.edit(talk, content="x", **key)) == NOT_FOUND
        assert await outcome(owner.revisions(talk, **key)) == NOT_FOUND
    assert await outcome(owner.edit(NOBODY, sequence=1, content="x")) == HIDDEN


async def test_a_deleted_message_takes_no_edit_and_shows_no_revision(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, _ = await talk_of_one(parley, content="a secret")
    actor = parley.acting_as(ada)
    await actor.edit(talk, sequence=1, content="another secret")
    await actor.delete_message(talk, sequence=1)
    before = await facts(database, talk)

    refused = await failure(actor.edit(talk, sequence=1, content="x"))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "MESSAGE_DELETED")
    assert refused.precondition == "MESSAGE_DELETED"
    # Readable nowhere: for the system neither.
    for client in (actor, parley):
        assert await said(client, talk) == []
    assert await facts(database, talk) == before

    await actor.undelete_message(talk, sequence=1)
    assert await said(actor, talk) == ["another secret", "a secret"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"is_active": False}, "CONVERSATION_ARCHIVED"), (None, "CONVERSATION_DELETED")],
    ids=["archived", "deleted"],
)
async def test_a_conversation_that_takes_no_writes_takes_no_edit(
    parley: Client, change: dict[str, Any] | None, reason: str
) -> None:
    talk, ada, _ = await talk_of_one(parley)
    if change:
        await parley.update(talk, **change, mask=["is_active"])
    else:
        await parley.delete(talk)
    for client in (parley, parley.acting_as(ada)):
        refused = await failure(client.edit(talk, sequence=1, content="x"))
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", reason)
    listed = await outcome(parley.revisions(talk, sequence=1))
    assert listed == ("OK" if change else "FAILED_PRECONDITION CONVERSATION_DELETED")


@pytest.mark.parametrize(
    ("values", "violations"),
    [
        ({"mask": ["contents"], "content": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        ({"mask": ["sequence"], "content": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        ({"mask": ["role"], "content": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        ({"mask": [".."], "content": "x"}, {"update_mask": "INVALID_UPDATE_MASK"}),
        ({"mask": ["content"]}, {"message": "REQUIRED"}),
        ({"content": "é" * 131_072 + "!"}, {"message.content": "FIELD_TOO_LONG"}),
        ({"content": "a\0b"}, {"message.content": "INVALID_CHARACTER"}),
        ({"metadata": struct(**{"": 1})}, {"message.metadata": "INVALID_METADATA"}),
        ({"metadata": struct(a=float("nan"))}, {"message.metadata.a": "INVALID_METADATA"}),
        ({"tokens_used": -1}, {"message.tokens_used": "OUT_OF_BOUNDS"}),
        ({"input_tokens": -1}, {"message.input_tokens": "OUT_OF_BOUNDS"}),
        (
            {"input_tokens": 2**31 - 1, "output_tokens": 1},
            {"message.output_tokens": "OUT_OF_BOUNDS"},
        ),
        ({"model": "x" * 129}, {"message.model": "FIELD_TOO_LONG"}),
        ({"content": "x", "etag": "nonsense"}, {"etag": "INVALID_ETAG"}),
        ({"content": "x", "request_id": "x" * 65}, {"request_id": "INVALID_REQUEST_ID"}),
        ({"content": "x", "request_id": "é"}, {"request_id": "INVALID_REQUEST_ID"}),
        ({"patch": {"": 1}}, {"metadata_patch": "INVALID_METADATA"}),
        ({"patch": {"a": "x" * 17_000}}, {"metadata_patch": "INVALID_METADATA"}),
        ({"content": "x", "sequence": 0}, {"sequence": "OUT_OF_BOUNDS"}),
        ({"content": "x", "message_id": "../x"}, {"message_id": "INVALID_REFERENCE"}),
        ({"content": "x", "sequence": None}, {"message_id": "REQUIRED"}),
    ],
)
async def test_a_bad_field_is_named_with_its_rule(
    parley: Client, values: dict[str, Any], violations: dict[str, str]
) -> None:
    talk, _, _ = await talk_of_one(parley)
    key = {} if "message_id" in values else {"sequence": 1}
    refused = await failure(parley.edit(talk, **{**key, **values}))
    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)


async def test_the_longest_content_is_taken(parley: Client) -> None:
    talk, _, _ = await talk_of_one(parley)
    content = "é" * 131_072
    assert (await edited(parley, talk, sequence=1, content=content)).content == content


async def test_content_may_be_empty_only_with_metadata_or_from_the_system(parley: Client) -> None:
    talk, ada, _ = await talk_of_one(parley)
    actor = parley.acting_as(ada)
    refused = await failure(actor.edit(talk, sequence=1, mask=["content"], metadata=struct(a=1)))
    assert refused.violations == {"message.content": "REQUIRED"}
    now = await edited(actor, talk, sequence=1, mask=["*"], metadata=struct(a=1))
    assert (now.content, dict(now.metadata)) == ("", {"a": 1})
    assert (await edited(parley, talk, sequence=1, mask=["*"], role=ASSISTANT)).content == ""


async def test_a_mask_takes_what_it_names_and_a_patch_comes_after(parley: Client) -> None:
    talk, _, sent = await talk_of_one(parley, metadata=struct(a=1, b={"c": 2}), model="m")

    # Neither what is not named nor what only the server says.
    now = await edited(
        parley, talk, sequence=1, mask=["content", "content"], content="x", model="n"
    )
    assert (now.content, now.model, now.metadata) == ("x", "m", sent.metadata)
    now = await edited(parley, talk, sequence=1, content="y", role=ASSISTANT, revision=9)
    assert (now.content, now.role, now.revision, now.model) == ("y", sent.role, 3, "m")

    now = await edited(parley, talk, sequence=1, patch={"a": None, "b": {"d": 3}})
    assert now.metadata == struct(b={"c": 2, "d": 3})
    now = await edited(parley, talk, sequence=1, mask=["*"], content="z", patch={"e": 4})
    assert (now.content, now.model, dict(now.metadata)) == ("z", "", {"e": 4})


async def test_an_edit_that_changes_nothing_leaves_no_trace(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, sent = await talk_of_one(parley, content="tea", metadata=struct(a=1))
    before = await row_count(database)
    for values in (
        {"content": "tea"},
        {"metadata": struct(a=1.0)},
        {"patch": {"a": 1}},
        {"mask": ["model"], "content": "x"},
        {},
    ):
        assert await edited(parley.acting_as(ada), talk, sequence=1, **values) == sent
    assert await row_count(database) == before
    assert await said(parley, talk) == ["tea"]


async def test_a_stale_etag_stops_an_edit(parley: Client) -> None:
    talk, ada, sent = await talk_of_one(parley)
    actor = parley.acting_as(ada)
    now = await edited(actor, talk, sequence=1, content="one", etag=sent.etag)

    stale = await failure(actor.edit(talk, sequence=1, content="two", etag=sent.etag))
    assert (stale.code, stale.reason) == ("ABORTED", "ETAG_MISMATCH")
    # The message's own counts where the request's is empty, and only there.
    inside = pb.UpdateMessageRequest(conversation_id=talk.id, sequence=1)
    inside.message.CopyFrom(Message(content="two", etag=sent.etag))
    refused = await failure(actor.messages.UpdateMessage(inside))
    assert (refused.code, refused.reason) == ("ABORTED", "ETAG_MISMATCH")
    inside.etag = now.etag
    assert (await actor.messages.UpdateMessage(inside)).message.revision == 3


async def test_of_many_edits_with_one_etag_one_wins(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, sent = await talk_of_one(parley)
    actor = parley.acting_as(ada)
    calls = [actor.edit(talk, sequence=1, content=str(n), etag=sent.etag) for n in range(8)]
    outcomes = await asyncio.gather(*map(outcome, calls))
    assert sorted(outcomes) == ["ABORTED ETAG_MISMATCH"] * 7 + ["OK"]
    assert len(await said(actor, talk)) == 2
    assert not await miscounted(database)


async def test_a_repeated_edit_is_one(parley: Client, database: asyncpg.Connection) -> None:
    talk, users = await crowd(parley)
    await parley.message(talk, users["author"], "tea")
    author = parley.acting_as(users["author"])
    edit = {"sequence": 1, "content": "coffee", "request_id": "once"}
    first = await edited(author, talk, **edit)
    await author.edit(talk, sequence=1, content="water")

    again = author.edit(talk, **edit)
    assert (await again).message.content == "water"
    assert (await again).message.id == first.id
    assert await is_replay(again)
    assert await said(author, talk) == ["water", "coffee", "tea"]
    other = await failure(author.edit(talk, **{**edit, "content": "milk"}))
    assert (other.code, other.reason) == ("FAILED_PRECONDITION", "REQUEST_ID_REUSED")
    # One's own it stays, wherever one is now.
    await author.leave(talk, users["author"])
    assert (await edited(author, talk, **edit)).content == "water"
    assert not await miscounted(database)


async def test_a_dry_run_checks_everything_and_changes_nothing(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, ada, sent = await talk_of_one(parley, tokens_used=3)
    actor = parley.acting_as(ada)
    before = await row_count(database)

    would = await edited(
        actor, talk, sequence=1, content="x", tokens_used=5, validate_only=True, request_id="r"
    )

    assert (would.content, would.tokens_used, would.revision) == ("x", 5, 2)
    assert (would.id, would.sequence, would.etag) == ("", 0, "")
    assert not would.HasField("create_time")
    assert not would.HasField("update_time")
    assert await get(actor, sent) == sent
    assert await row_count(database) == before
    assert (await actor.seen(talk)).total_tokens_used == 3
    stale = actor.edit(talk, sequence=1, content="x", etag="9-00000000", validate_only=True)
    assert await outcome(stale) == "ABORTED ETAG_MISMATCH"


# Revisions


async def test_revisions_are_read_by_whoever_reads_the_message(parley: Client) -> None:
    talk, users = await crowd(parley)
    await parley.message(talk, users["author"], "tea")
    await parley.edit(talk, sequence=1, content="coffee")
    await parley.leave(talk, users["left"])
    await parley.message(talk, users["author"], "after")

    for who in ("owner", "moderator", "member", "observer", "left"):
        assert await said(parley.acting_as(users[who]), talk) == ["coffee", "tea"]
    gone = parley.acting_as(users["left"])
    assert await outcome(gone.revisions(talk, sequence=2)) == NOT_FOUND
    invited = parley.acting_as(users["invited"])
    assert await outcome(invited.revisions(talk, sequence=1)) == NOT_FOUND
    stranger = parley.acting_as(users["stranger"])
    assert await outcome(stranger.revisions(talk, sequence=1)) == HIDDEN


async def test_revisions_come_in_pages(parley: Client) -> None:
    talk, _, sent = await talk_of_one(parley, content="1")
    for n in range(2, 6):
        await parley.edit(talk, sequence=1, content=str(n))
    first = await parley.revisions(talk, sequence=1, page_size=2)
    # What comes meanwhile moves nothing.
    await parley.edit(talk, sequence=1, content="6")
    token = first.next_page_token
    second = await parley.revisions(talk, sequence=1, page_size=2, page_token=token)
    third = await parley.revisions(talk, sequence=1, page_token=second.next_page_token)

    pages = [[each.content for each in page.revisions] for page in (first, second, third)]
    assert pages == [["5", "4"], ["3", "2"], ["1"]]
    assert third.next_page_token == ""
    for values, reason in [
        ({"page_size": -1}, "INVALID_PAGE_SIZE"),
        ({"page_token": token[:-1]}, "INVALID_PAGE_TOKEN"),
        ({"page_token": "nonsense"}, "INVALID_PAGE_TOKEN"),
        ({"page_token": token, "message_id": sent.id}, "PAGE_TOKEN_MISMATCH"),
    ]:
        values = values if "message_id" in values else {"sequence": 1, **values}
        assert (await failure(parley.revisions(talk, **values))).reason == reason
    ada = parley.acting_as("ada")
    refused = await failure(ada.revisions(talk, sequence=1, page_token=token))
    assert refused.reason == "PAGE_TOKEN_MISMATCH"


async def test_a_page_of_long_revisions_is_cut(parley: Client) -> None:
    talk, _, _ = await talk_of_one(parley)
    contents = [str(n) * 250_000 for n in range(1, 7)]
    for content in contents:
        await parley.edit(talk, sequence=1, content=content)
    found: list[str] = []
    token, pages = "", 0
    while pages == 0 or token:
        page = await parley.revisions(talk, sequence=1, page_token=token)
        assert page.ByteSize() < MIB + 1_000
        found += [each.content for each in page.revisions]
        token, pages = page.next_page_token, pages + 1
    assert found == [*reversed(contents), "hello"]
    assert pages > 1


async def test_what_a_purged_conversation_said_before_is_gone_too(
    parley: Client, database: asyncpg.Connection
) -> None:
    talk, _, _ = await talk_of_one(parley)
    await parley.edit(talk, sequence=1, content="x")
    assert await database.fetchval("SELECT count(*) FROM message_revisions") == 1
    await parley.delete(talk)
    await parley.purge(talk)
    assert await database.fetchval("SELECT count(*) FROM message_revisions") == 0
