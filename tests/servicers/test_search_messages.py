"""SearchMessages: what is found, by whom, in which order, and what is never found."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parley.v1 import message_pb2 as pb
from service.embedded import EmbeddedPostgres
from service.rules.search import fold, terms
from service.server import Server
from service.settings import load

from ..make import AGENT, ASSISTANT, NOBODY, USER, Client, Conversation, User, failure
from .test_delete_message import crowd
from .test_update_conversation import outcome

MIB = 1 << 20


async def found(client: Client, query: str, talk: Conversation | str = "", **values: Any) -> Any:
    """What was said, newest first."""
    response = await client.search(query, talk, **values)
    return [each.message.content for each in response.results]


async def say(parley: Client, talk: Conversation, *contents: str) -> None:
    """By the conversation's creator, in one go."""
    drafts = [
        pb.NewMessage(sender_id=talk.creator_id, role=USER, content=each) for each in contents
    ]
    await parley.messages.BatchSendMessages(
        pb.BatchSendMessagesRequest(conversation_id=talk.id, messages=drafts)
    )


# What is found


@pytest.mark.parametrize(
    ("content", "queries", "in_vain"),
    [
        ("Hello, World!", ["hello", "WORLD hello", '"hello world"', "hello,"], ['"world hello"']),
        ("Write to ada@example.org", ["ada", "example", "ada@example.org"], ["ada@example.com"]),
        ("Tiếng Việt đẹp lắm", ["Tiếng Việt", "tieng viet", "DEP", "Đẹp"], ["tiên"]),
        ("dep lam", ["đẹp lắm"], ["đẹp nhất"]),
        ("我们明天去北京大学", ["明天", "北京", "北京大学", "京", "学"], ["北学", "上海"]),
        ("これは日本語のテストです", ["日本語", "テスト", "語"], ["本日"]),
        ("ｶﾞｷﾞ", ["ガギ"], ["カキ"]),
        ("한국어를 배워요", ["한국어", "국어를", "배워"], ["어한"]),
        ("ฉันกินข้าวแล้ว", ["กินข้าว", "ข้าว"], ["ขาว"]),
        ("مُحَمَّد يقرأ الكتاب", ["محمد", "يَقْرَأ", "الكتاب"], ["كتاب"]),
        ("Straße und ﬁne ＦＵＬＬ", ["strasse", "STRASSE", "fine", "full"], ["stras"]),
        ("Привет, Ёлка", ["привет", "елка"], ["приве"]),
        ("iPhone手机很好", ["iphone手机", "手机", "iphone"], ["phone"]),
        ("party 🎉🎉!", ["🎉", "party 🎉", "🎉🎉"], ["🎂"]),
        ("it's a trap; DROP TABLE messages", ["it's", "drop table", "'; drop"], ["traps"]),
        ("to be or not to be", ["or", "be or", '"to be or not"', "the or be"], ["nought"]),
        ("run it with --force", ["--force", "force"], ["-force"]),
    ],
)
async def test_a_message_is_found_by_its_words(
    parley: Client, content: str, queries: list[str], in_vain: list[str]
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="something else entirely")
    await parley.message(talk, ada, content)
    actor = parley.acting_as(ada)
    for query in queries:
        assert await found(actor, query, talk) == [content], query
        assert await found(actor, query) == [content], query
    for query in in_vain:
        assert await found(actor, query, talk) == [], query


async def test_words_are_combined(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    await say(parley, talk, "tea with milk", "tea with sugar", "coffee with milk", "water")
    for query, expected in {
        "tea": ["tea with sugar", "tea with milk"],
        "milk tea": ["tea with milk"],
        "milk or sugar": ["coffee with milk", "tea with sugar", "tea with milk"],
        "tea OR water": ["water", "tea with sugar", "tea with milk"],
        "with -milk": ["tea with sugar"],
        'with -"tea with"': ["coffee with milk"],
        '"with milk"': ["coffee with milk", "tea with milk"],
        '"milk with"': [],
        # One that only excludes finds nothing.
        "-milk": [],
        "-milk or water": ["water"],
    }.items():
        assert await found(parley, query, talk) == expected, query


async def test_a_result_is_the_message_and_where_it_matches(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    await parley.message(talk, ada, "<b>Tea</b> & nothing else", tokens_used=3)
    (result,) = (await parley.search("tea", talk)).results
    assert result.message == (await parley.all_messages(talk))[0]
    # As it was written: what is shown where escapes it.
    assert [(part.text, part.is_match) for part in result.snippet] == [
        ("<b>", False),
        ("Tea", True),
        ("</b> & nothing else", False),
    ]


async def test_of_a_very_long_message_the_beginning_is_found(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    distinct = " ".join(f"{n:x}{n * 7919 % 100_003:x}" for n in range(30_000))[:250_000]
    for content in (distinct, "x" * 200_000, "é\u0301" * 60_000, "\r\u2028\u202e", "日本" * 40_000):
        sent = await parley.message(talk, ada, content)
        assert sent.content == content
    assert len(await found(parley, distinct.split()[1_000], talk)) == 1
    assert await found(parley, distinct.split()[-2], talk) == []
    assert len(await found(parley, "x" * 64, talk)) == 1
    assert len(await found(parley, "日本日", talk)) == 1


# Any text is a query


@pytest.mark.parametrize(
    "query",
    ["foo & | !", "(((", "'", "a:*", "\\", "%", "_", "-", '"', '""', "!!!", "🏴\u200d☠️",
     "a <-> b", "a:A", "$1", "--", "/*", "or", "-or", '-"', "\ud7ff", "ﷺ", "\u0301", "x" * 512],
)  # fmt: skip
async def test_any_text_is_a_query(parley: Client, query: str) -> None:
    talk = await parley.conversation(await parley.user("ada"), first="hello")
    for where in (talk, ""):
        assert await found(parley, query, where) == []


@pytest.mark.parametrize(
    ("values", "violations"),
    [
        ({"query": ""}, {"query": "REQUIRED"}),
        ({"query": " \t\n\u2028"}, {"query": "REQUIRED"}),
        ({"query": "x" * 513}, {"query": "FIELD_TOO_LONG"}),
        ({"query": "x or " * 33}, {"query": "TOO_MANY_ITEMS"}),
        ({"query": "a-" * 33}, {"query": "TOO_MANY_ITEMS"}),
        ({"query": "a\0b"}, {"query": "INVALID_CHARACTER"}),
        ({"query": "x", "page_size": -1}, {"page_size": "INVALID_PAGE_SIZE"}),
        ({"query": "x", "page_token": "nonsense"}, {"page_token": "INVALID_PAGE_TOKEN"}),
        ({"query": "x", "conversation_id": "A B"}, {"conversation_id": "INVALID_REFERENCE"}),
        ({"query": "x", "sender_id": "a b"}, {"sender_id": "INVALID_REFERENCE"}),
        ({"query": "x", "roles": [9]}, {"roles[0]": "INVALID_ENUM_VALUE"}),
    ],
)
async def test_a_bad_field_is_named_with_its_rule(
    parley: Client, values: dict[str, Any], violations: dict[str, str]
) -> None:
    refused = await failure(parley.messages.SearchMessages(pb.SearchMessagesRequest(**values)))
    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)


async def test_the_longest_queries_are_answered(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first=" ".join(f"w{n}" for n in range(32)))
    assert len(await found(parley, " ".join(f"w{n}" for n in range(32)))) == 1
    await parley.message(talk, ada, "日本語" * 170)
    assert len(await found(parley, "日本語" * 170)) == 1


async def test_times_in_the_wrong_order_are_refused(parley: Client) -> None:
    request = pb.SearchMessagesRequest(query="x")
    request.created_after.FromDatetime(datetime(2026, 1, 2, tzinfo=UTC))
    request.created_before.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC))
    refused = await failure(parley.messages.SearchMessages(request))
    assert refused.violations == {"created_before": "INVALID_TIME_RANGE"}


async def test_filters_must_all_hold(parley: Client) -> None:
    ada, bot = await parley.user("ada"), await parley.user("bot", kind=AGENT)
    talk = await parley.conversation(ada, bot, first="tea?")
    await parley.message(talk, bot, "tea!", role=ASSISTANT)
    sent = await parley.message(talk, ada, "more tea")
    everything = ["more tea", "tea!", "tea?"]
    assert await found(parley, "tea", talk) == everything
    assert await found(parley, "tea", talk, sender_id="bot") == ["tea!"]
    assert await found(parley, "tea", sender_id=ada.id) == ["more tea", "tea?"]
    assert await found(parley, "tea", roles=[ASSISTANT]) == ["tea!"]
    assert await found(parley, "tea", roles=[ASSISTANT, USER]) == everything
    assert await found(parley, "tea", sender_id="bot", roles=[USER]) == []
    assert await found(parley, "tea", talk, created_after=sent.create_time) == ["more tea"]
    assert await found(parley, "tea", created_before=sent.create_time) == ["tea!", "tea?"]
    assert await outcome(parley.search("tea", sender_id="nobody")) == (
        "FAILED_PRECONDITION USER_NOT_FOUND"
    )


# By whom


async def test_who_may_search_a_conversation(parley: Client) -> None:
    talk, users = await crowd(parley)
    await say(parley, talk, "tea")
    await parley.leave(talk, users["left"])
    await say(parley, talk, "more tea")
    both = ["more tea", "tea"]
    expected = {"owner": both, "moderator": both, "member": both, "observer": both, "left": ["tea"]}
    for who, what in expected.items():
        client = parley.acting_as(users[who])
        assert await found(client, "tea", talk) == what
        assert await found(client, "tea", talk.slug) == what
        assert await found(client, "tea") == what
    for who in ("invited", "stranger"):
        assert await found(parley.acting_as(users[who]), "tea") == []
    invited = parley.acting_as(users["invited"]).search("tea", talk)
    assert await outcome(invited) == "PERMISSION_DENIED NOT_A_PARTICIPANT"
    stranger = await failure(parley.acting_as(users["stranger"]).search("tea", talk))
    missing = await failure(parley.acting_as(users["stranger"]).search("tea", NOBODY))
    assert stranger.code == missing.code == "NOT_FOUND"
    assert stranger.message.replace(talk.id, NOBODY) == missing.message


async def test_windows_open_and_close(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    client = parley.acting_as(bob)

    async def sees(*expected: str) -> None:
        assert await found(client, "tea") == list(expected)
        if expected:
            assert await found(client, "tea", talk) == list(expected)

    await say(parley, talk, "tea 1")
    await sees()
    await parley.add(talk, bob, hide_history=True, invited_by_user_id=ada.id)
    await sees()
    await say(parley, talk, "tea 2")
    await sees("tea 2")
    await parley.remove(talk, bob)
    await say(parley, talk, "tea 3")
    await sees("tea 2")
    # To be invited again opens nothing but the message that comes with it.
    third = (await parley.all_messages(talk))[2]
    await parley.invite(
        talk, bob, initial_message_id=third.id, invited_by_user_id=ada.id, hide_history=True
    )
    await sees("tea 3", "tea 2")
    await parley.accept(talk, bob)
    await say(parley, talk, "tea 4")
    await sees("tea 4")


async def test_somebody_invited_finds_the_message_that_came_with_it_and_no_other(
    parley: Client,
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada)
    await say(parley, talk, "tea 1", "tea 2")
    await parley.invite(talk, bob, initial_message_sequence=2, invited_by_user_id=ada.id)
    client = parley.acting_as(bob)
    assert await found(client, "tea") == ["tea 2"]
    await parley.decline(talk, bob)
    assert await found(client, "tea") == []


# What changes


async def test_what_is_found_follows_what_is_said(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="tea")
    actor = parley.acting_as(ada)

    async def counts() -> tuple[int, int]:
        words = [
            await found(actor, word, where) for word in ("tea", "coffee") for where in ("", talk)
        ]
        assert words[0] == words[1]
        assert words[2] == words[3]
        return len(words[0]), len(words[2])

    assert await counts() == (1, 0)
    await actor.edit(talk, sequence=1, content="coffee")
    assert await counts() == (0, 1)
    await actor.edit(talk, sequence=1, model="m")
    assert await counts() == (0, 1)
    await actor.edit(talk, sequence=1, content="tea", validate_only=True)
    assert await counts() == (0, 1)
    await actor.delete_message(talk, sequence=1)
    assert await counts() == (0, 0)
    await actor.undelete_message(talk, sequence=1)
    assert await counts() == (0, 1)


async def test_a_deleted_conversation_is_not_searched_until_it_is_back(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="tea")
    await parley.update(talk, mask=["is_active"], is_active=False)
    assert await found(parley, "tea", talk) == ["tea"]
    await parley.delete(talk)
    for client in (parley, parley.acting_as(ada)):
        assert await found(client, "tea") == []
        refused = await outcome(client.search("tea", talk))
        assert refused == "FAILED_PRECONDITION CONVERSATION_DELETED"
    await parley.undelete(talk)
    assert await found(parley.acting_as(ada), "tea") == ["tea"]
    await parley.delete(talk)
    await parley.purge(talk)
    assert await found(parley, "tea") == []


async def test_the_first_message_of_a_conversation_is_found(parley: Client) -> None:
    ada = await parley.user("ada")
    await parley.conversation(ada, first="tea")
    assert await found(parley.acting_as(ada), "tea") == ["tea"]


async def test_what_an_older_version_stored_is_indexed_in_passing(
    parley: Client, server: Server, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="tea")
    await say(parley, talk, "more tea", "coffee")
    await parley.delete_message(talk, sequence=2)
    await database.execute("UPDATE messages SET search = NULL")
    assert await found(parley, "tea") == []

    async with server.store.transaction() as transaction:
        assert await transaction.search.index(2) == 2
    async with server.store.transaction() as transaction:
        assert await transaction.search.index(2) == 1
        assert await transaction.search.index(2) == 0

    assert await found(parley, "tea or coffee", talk) == ["coffee", "tea"]
    await parley.undelete_message(talk, sequence=2)
    assert await found(parley, "tea or coffee") == ["coffee", "more tea", "tea"]


async def test_a_server_indexes_what_it_finds_when_it_starts(
    parley: Client, postgres: EmbeddedPostgres, database: asyncpg.Connection, tmp_path: Path
) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    for _ in range(2):
        await say(parley, talk, *["tea"] * 60)
    await database.execute("UPDATE messages SET search = NULL")

    later = Server(load(address="127.0.0.1:0", data_dir=tmp_path), postgres.url)
    later.bind()
    await later.start()
    async with asyncio.timeout(10):
        while await database.fetchval("SELECT count(*) FROM messages WHERE search IS NULL"):
            await asyncio.sleep(0.02)
    await later.stop()

    assert len(await found(parley, "tea", page_size=1000)) == 120


async def test_indexing_in_passing_waits_for_nobody(
    parley: Client, server: Server, database: asyncpg.Connection
) -> None:
    talk = await parley.conversation(await parley.user("ada"))
    await say(parley, talk, "tea", "coffee")
    await database.execute("UPDATE messages SET search = NULL")
    held = database.transaction()
    await held.start()
    await database.execute("SELECT FROM messages WHERE sequence = 1 FOR UPDATE")
    async with asyncio.timeout(1), server.store.transaction() as transaction:
        assert await transaction.search.index(10) == 1
    await held.rollback()


# Pages


async def test_pages_are_complete_and_in_order_whatever_comes_meanwhile(parley: Client) -> None:
    ada = await parley.user("ada")
    talks = [await parley.conversation(ada) for _ in range(3)]
    for n in range(4):
        for talk in talks:
            await say(parley, talk, *(f"tea {n}.{m}" for m in range(3)), "water")
    actor = parley.acting_as(ada)
    for where, count in ((talks[1], 12), ("", 38)):
        every = (await actor.search("tea", where, page_size=1000)).results
        assert len(every) == count
        times = [each.message.create_time.ToNanoseconds() for each in every]
        assert times == sorted(times, reverse=True)
        places = [
            each.message.sequence for each in every if each.message.conversation_id == talks[1].id
        ]
        assert places == sorted(places, reverse=True)
        paged: list[str] = []
        token = ""
        while True:
            page = await actor.search("tea", where, page_size=5, page_token=token)
            paged += [each.message.id for each in page.results]
            token = page.next_page_token
            if not token:
                break
            assert len(page.results) == 5
            await say(parley, talks[1], "tea, meanwhile")
        assert paged == [each.message.id for each in every]


async def test_a_page_token_belongs_to_its_query_and_actor(parley: Client) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    await say(parley, talk, "tea 1", "tea 2", "tea 3")
    actor = parley.acting_as(ada)
    token = (await actor.search("tea", talk, page_size=1)).next_page_token
    assert await found(actor, "tea", talk.slug, page_token=token) == ["tea 2", "tea 1"]
    others: list[tuple[Client, str, dict[str, Any]]] = [
        (parley.acting_as(bob), "tea", {"conversation_id": talk.id}),
        (parley, "tea", {"conversation_id": talk.id}),
        (actor, "tea ", {"conversation_id": talk.id}),
        (actor, "tea", {}),
        (actor, "tea", {"conversation_id": talk.id, "roles": [USER]}),
    ]
    for client, query, values in others:
        request = pb.SearchMessagesRequest(query=query, page_token=token, **values)
        refused = await failure(client.messages.SearchMessages(request))
        assert refused.reason == "PAGE_TOKEN_MISMATCH"
    # And it grants nothing to whoever has gone.
    bobs = parley.acting_as(bob)
    token = (await bobs.search("tea", page_size=1)).next_page_token
    await parley.remove(talk, bob)
    await say(parley, talk, "tea 4")
    assert await found(bobs, "tea", page_token=token) == ["tea 2", "tea 1"]


async def test_a_page_of_long_messages_is_cut(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    for n in range(6):
        await parley.message(talk, ada, f"tea {n} " + "x" * 250_000)
    numbers: list[str] = []
    token, pages = "", 0
    while pages == 0 or token:
        page = await parley.search("tea", talk, page_token=token)
        assert page.ByteSize() < MIB + 1_000
        numbers += [each.message.content[4] for each in page.results]
        token, pages = page.next_page_token, pages + 1
    assert numbers == list("543210")
    assert pages > 1


async def test_a_rare_word_is_found_behind_the_newest_messages(
    parley: Client, database: asyncpg.Connection
) -> None:
    """Where the newest do not fill a page, the index is asked: in one conversation, in all of an
    actor's, everywhere. Windows hold there too."""
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talk = await parley.conversation(ada, bob)
    other = await parley.conversation(ada)
    await say(parley, talk, "needle 1")
    await say(parley, other, "needle 2", "needle 3")
    await parley.leave(talk, bob)
    await say(parley, talk, "needle 4")
    for _ in range(5):
        await say(parley, talk, *(f"hay {n}" for n in range(500)))
    actor = parley.acting_as(ada)
    assert await found(actor, "needle", talk) == ["needle 4", "needle 1"]
    everything = [f"needle {n}" for n in (4, 3, 2, 1)]
    assert await found(actor, "needle") == everything
    assert await found(parley, "needle") == everything
    assert await found(parley.acting_as(bob), "needle") == ["needle 1"]
    assert await found(parley.acting_as(await parley.user("eve")), "needle") == []
    first = await actor.search("needle", page_size=3)
    assert await found(actor, "needle", page_size=3, page_token=first.next_page_token) == [
        "needle 1"
    ]
    assert len((await actor.search("hay", page_size=1000)).results) == 1000
    await parley.delete_message(talk, sequence=1)
    assert await found(actor, "needle", talk) == ["needle 4"]
    await parley.delete(talk)
    assert await found(actor, "needle") == ["needle 3", "needle 2"]


async def test_pages_of_a_rare_word_are_complete(parley: Client) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    for n in range(2):
        await say(parley, talk, f"needle {n}", f"needle {n}!")
        for _ in range(4):
            await say(parley, talk, *["hay"] * 500)
    for client, where in ((parley.acting_as(ada), talk), (parley.acting_as(ada), ""), (parley, "")):
        paged: list[str] = []
        token = ""
        while len(paged) < 9:
            page = await client.search("needle", where, page_size=1, page_token=token)
            paged += [each.message.content for each in page.results]
            token = page.next_page_token
            if not token:
                break
        assert paged == ["needle 1!", "needle 1", "needle 0!", "needle 0"]


async def test_who_is_in_a_great_many_conversations_finds_only_there(
    parley: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.repositories.search.MAX_CONVERSATIONS", 1)
    ada, bob = await parley.user("ada"), await parley.user("bob")
    talks = [await parley.conversation(ada, bob), await parley.conversation(ada, bob)]
    strange = await parley.conversation(ada)
    await say(parley, talks[0], "tea 1")
    await say(parley, strange, "tea 2")
    await say(parley, talks[1], "tea 3")
    for _ in range(4):
        await say(parley, strange, *["water"] * 500)
    assert await found(parley.acting_as(bob), "tea") == ["tea 3", "tea 1"]


# Whatever is written

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
mixed = texts | st.text(st.sampled_from("aéđİ日本がｶﾞ한กิ้مُ🎉'\"-\\:*&|!()<> \u200bﷺ"), max_size=60)
anything = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@anything
@given(query=mixed)
async def test_any_text_at_all_may_be_searched_for(parley: Client, query: str) -> None:
    assert await outcome(parley.search(f"a{query}")) in (
        "OK",
        "INVALID_ARGUMENT TOO_MANY_ITEMS",
    )


@anything
@given(content=mixed)
async def test_what_was_sent_is_found_by_each_of_its_words_and_by_none_but_its_readers(
    parley: Client, content: str
) -> None:
    ada, bob, eve = [await parley.user() for _ in range(3)]
    talk = await parley.conversation(ada, bob)
    await parley.leave(talk, bob)
    sent = await parley.message(talk, ada, f"{content}!")
    actor = parley.acting_as(ada)
    words = list(dict.fromkeys(fold(content).split()))[:6]
    for word in words:
        assert terms(fold(word))
        assert await found(actor, f'"{word}"', talk) == [sent.content]
        assert await found(actor, f'"{word}"') == [sent.content]
        for stranger in (bob, eve):
            assert await found(parley.acting_as(stranger), f'"{word}"') == []
    await actor.delete_message(talk, sequence=1)
    for word in words:
        assert await found(actor, f'"{word}"', talk) == []
    await actor.undelete_message(talk, sequence=1)
    for word in words:
        assert await found(actor, f'"{word}"', talk) == [sent.content]


async def test_users_may_search_at_once(parley: Client) -> None:
    users: list[User] = [await parley.user() for _ in range(8)]
    talks = [await parley.conversation(user, first=f"tea of {n}") for n, user in enumerate(users)]
    clients = [parley.acting_as(user) for user in users]
    answers = await asyncio.gather(
        *(found(client, "tea") for client in clients for _ in range(5)),
        *(found(client, "tea", talk) for client, talk in zip(clients, talks, strict=True)),
    )
    for number, answer in enumerate(answers[:40]):
        assert answer == [f"tea of {number // 5}"]
    assert answers[40:] == [[f"tea of {n}"] for n in range(8)]
