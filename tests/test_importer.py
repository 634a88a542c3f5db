"""`parley import`: real conversations, in order, once."""

import asyncio
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from parley.v1 import conversation_pb2, message_pb2, user_pb2
from service import importer
from service.importer import Report, SourceMessage, chunks, import_files
from service.server import Server

from .make import AGENT, ASSISTANT, HUMAN, SYSTEM, TOOL, USER, Client, Conversation

EXAMPLES = Path(__file__).parent.parent / "examples" / "conversations.jsonl"
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM, "tool": TOOL}


async def run(server: Server, *paths: Path) -> Report:
    assert server.token
    return await import_files(paths, address=server.address, token=server.token)


async def found(parley: Client, external_id: str) -> Conversation:
    request = conversation_pb2.ListConversationsRequest(external_id=external_id)
    (conversation,) = (await parley.conversations.ListConversations(request)).conversations
    return conversation  # type: ignore[no-any-return]


def lines_of(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def written(folder: Path, *conversations: dict[str, Any]) -> Path:
    path = folder / "some.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in conversations))
    return path


def talk(*contents: str, source_id: str = "1") -> dict[str, Any]:
    return {
        "source": "test",
        "source_id": source_id,
        "participants": [{"username": "ada"}, {"username": "Ada"}],
        "messages": [{"sender": "ada", "role": "user", "content": text} for text in contents],
    }


async def test_what_is_imported_is_what_the_file_says(server: Server, parley: Client) -> None:
    report = await run(server, EXAMPLES)

    assert (report.conversations, report.messages, report.users) == (4, 23, 13)
    for source in lines_of(EXAMPLES):
        conversation = await found(parley, f"{source['source']}/{source['source_id']}")
        await require_equal(parley, conversation, source)


async def require_equal(parley: Client, conversation: Conversation, source: dict[str, Any]) -> None:
    """Order, senders, roles, times, links, contents and metadata are the file's."""
    messages = await parley.all_messages(conversation)
    names = [each["username"] for each in source["participants"]]
    batch = user_pb2.BatchGetUsersRequest(user_ids=names)
    users = {user.id: user.username for user in (await parley.users.BatchGetUsers(batch)).users}
    assert conversation.title == source["title"]
    assert [message.sequence for message in messages] == list(range(1, len(messages) + 1))
    assert len(messages) == len(source["messages"])
    by_id = {message.id: message.sequence for message in messages}
    for message, expected in zip(messages, source["messages"], strict=True):
        assert message.content == expected["content"]
        assert users[message.sender_id] == expected["sender"]
        assert message.role == ROLES[expected["role"]]
        reply = by_id.get(message.reply_to_message_id)
        assert (reply - 1 if reply else None) == expected["reply_to"]
        sent = message.sent_time.ToJsonString() if message.HasField("sent_time") else None
        assert sent == expected["sent_at"]
        assert MessageToDict(message.metadata) == expected["metadata"]


async def test_a_second_run_changes_nothing(server: Server, parley: Client) -> None:
    await run(server, EXAMPLES)
    before = await parley.conversations.ListConversations(
        conversation_pb2.ListConversationsRequest()
    )

    report = await run(server, EXAMPLES)

    assert (report.conversations, report.messages, report.users) == (0, 0, 0)
    assert (report.known_conversations, report.known_messages) == (4, 23)
    after = await parley.conversations.ListConversations(
        conversation_pb2.ListConversationsRequest()
    )
    assert after == before


async def test_a_run_that_was_cut_off_is_continued(
    server: Server, parley: Client, tmp_path: Path
) -> None:
    lines = [f"line {n}" for n in range(1200)]
    await run(server, written(tmp_path, talk(*lines[:700])))

    report = await run(server, written(tmp_path, talk(*lines)))

    assert (report.messages, report.known_messages) == (500, 700)
    stored = await parley.all_messages(await found(parley, "test/1"))
    assert [message.content for message in stored] == lines


async def test_a_conversation_that_others_wrote_to_is_refused_and_the_next_one_is_not(
    server: Server, parley: Client, tmp_path: Path
) -> None:
    await run(server, written(tmp_path, talk("one")))
    conversation = await found(parley, "test/1")
    ada = (await parley.users.GetUser(user_pb2.GetUserRequest(user_id="ada"))).user
    await parley.message(conversation, ada, "from elsewhere")

    report = await run(
        server, written(tmp_path, talk("one", "two", "three"), talk("other", source_id="2"))
    )

    assert [failure.split(":")[1] for failure in report.failures] == ["1"]
    assert len(await parley.all_messages(conversation)) == 2
    assert len(await parley.all_messages(await found(parley, "test/2"))) == 1


async def test_lines_that_share_source_and_id_are_told_apart(
    server: Server, parley: Client, tmp_path: Path
) -> None:
    await run(server, written(tmp_path, talk("first"), talk("second")))

    first, second = await found(parley, "test/1"), await found(parley, "test/1#2")
    assert [m.content for m in await parley.all_messages(first)] == ["first"]
    assert [m.content for m in await parley.all_messages(second)] == ["second"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("not json", "Invalid JSON"),
        ('{"source": "s"}', "source_id"),
        ('{"source": "s", "source_id": "1", "participants": [], "messages": []}', "participants"),
        (json.dumps(talk("x") | {"participants": [{"username": "eve"}]}), "'ada' speaks"),
        (json.dumps(talk("nul \0 byte")), "messages[0].content"),
    ],
)
async def test_a_line_that_cannot_be_imported_is_named_with_its_reason(
    server: Server, parley: Client, tmp_path: Path, line: str, why: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{line}\n{json.dumps(talk('good', source_id='2'))}\n")

    report = await run(server, path)

    (failure,) = report.failures
    assert failure.startswith("bad.jsonl:1: ")
    assert why in failure
    assert report.conversations >= 1


async def test_users_are_agents_if_they_only_ever_answer(server: Server, parley: Client) -> None:
    await run(server, EXAMPLES)

    kinds = {}
    for name in ("help-bot", "tracker", "planner", "tomasz", "Jonas", "jonas"):
        user = (await parley.users.GetUser(user_pb2.GetUserRequest(user_id=name))).user
        kinds[name] = user.kind

    assert kinds == {
        "help-bot": AGENT,
        "tracker": AGENT,
        "planner": AGENT,
        "tomasz": HUMAN,
        "Jonas": HUMAN,
        "jonas": HUMAN,
    }


async def test_a_batch_that_overtakes_another_waits_for_its_turn(
    server: Server, parley: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importer, "MAX_CHUNK_MESSAGES", 2)
    lines = [f"line {n}" for n in range(15)]
    call = importer.Importer._call
    late = iter([0.2, 0.1, 0.0, 0.1])

    async def overtaken(self: importer.Importer, method: Any, request: Any) -> Any:
        if isinstance(request, message_pb2.BatchSendMessagesRequest):
            await asyncio.sleep(next(late, 0))
        return await call(self, method, request)

    monkeypatch.setattr(importer.Importer, "_call", overtaken)
    report = await run(server, written(tmp_path, talk(*lines)))

    assert (report.messages, report.failures) == (15, [])
    stored = await parley.all_messages(await found(parley, "test/1"))
    assert [message.content for message in stored] == lines


async def test_what_follows_a_message_that_is_refused_is_not_stored(
    server: Server, parley: Client, tmp_path: Path
) -> None:
    lines = [f"line {n}" for n in range(1600)]
    lines[700] = "nul \0 byte"

    report = await run(server, written(tmp_path, talk(*lines)))

    (failure,) = report.failures
    assert "messages[200].content" in failure
    assert report.messages == 500
    stored = await parley.all_messages(await found(parley, "test/1"))
    assert [message.content for message in stored] == lines[:500]


async def test_a_name_that_cannot_be_fails_its_own_conversations_alone(
    server: Server, parley: Client, tmp_path: Path
) -> None:
    bad = talk("one")
    bad["participants"].append({"username": "a b"})

    report = await run(server, written(tmp_path, bad, talk("two", source_id="2")))

    (failure,) = report.failures
    assert failure.startswith("some.jsonl:1: ")
    assert (report.users, report.conversations, report.messages) == (2, 1, 1)
    assert len(await parley.all_messages(await found(parley, "test/2"))) == 1


def test_batches_are_cut_by_number_and_by_size() -> None:
    def of(size: int) -> SourceMessage:
        return SourceMessage(sender="a", role="user", content="x" * size)

    small = [of(10)] * 1001
    large = [of(importer.MAX_CHUNK_BYTES // 2)] * 3

    assert [len(chunk) for chunk in chunks(small, 0)] == [500, 500, 1]
    assert [chunk.start for chunk in chunks(small, 600)] == [600]
    assert [len(chunk) for chunk in chunks(large, 0)] == [1, 1, 1]


@pytest.mark.slow
async def test_real_conversations_survive_import(
    server: Server, parley: Client, shared_data: Path
) -> None:
    """595 conversations as people and models really had them, read back page by page."""
    path = shared_data / "small.jsonl.gz"

    report = await run(server, path)

    assert report.failures == []
    assert (report.conversations, report.messages, report.users) == (595, 15_694, 1_750)
    seen: Counter[str] = Counter()
    for place, source in enumerate(lines_of(path)):
        name = f"{source['source']}/{source['source_id']}"
        seen[name] += 1
        # The longest few and one in ten of the others: the rest would only take time.
        if len(source["messages"]) > 400 or place % 10 == 0:
            external_id = name if seen[name] == 1 else f"{name}#{seen[name]}"
            await require_equal(parley, await found(parley, external_id), source)
