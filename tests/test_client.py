"""The Python client, against a real server: what it adds to the stubs, synchronous and not."""

import asyncio
import json
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

import parley_client
from parley.v1 import conversation_pb2, event_pb2, message_pb2, user_pb2
from parley_client import ParleyError, aio, errors
from parley_client.calls import CHANNEL, Resumption
from service.server import Server

from .make import USER, Client, Conversation

ROOT = Path(__file__).parent.parent


@pytest_asyncio.fixture
async def client(server: Server, parley: Client) -> AsyncIterator[aio.Client]:
    """The asynchronous client, as the system. (`parley` empties the database.)"""
    async with aio.connect(server.address, token=parley.token, plaintext=True) as client:
        yield client


@pytest.fixture
def threaded(server: Server, parley: Client) -> Iterator[parley_client.Client]:
    """The synchronous one: to be used in a thread, since the server runs in this one."""
    with parley_client.connect(server.address, token=parley.token, plaintext=True) as client:
        yield client


class Wire:
    """A connection to the server that can be cut."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream.rsplit(":", 1)
        self._ends: set[asyncio.StreamWriter] = set()
        self.address = ""
        self.cuts = 0
        self.swallows_answers = False

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, asks = await asyncio.open_connection(*self._upstream)
        self._ends |= {writer, asks}
        await asyncio.gather(self._pass_on(reader, asks), self._pass_on(answers, writer, True))

    async def _pass_on(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, answers: bool = False
    ) -> None:
        with suppress(OSError):
            while chunk := await source.read(1 << 16):
                if not (answers and self.swallows_answers):
                    target.write(chunk)
        target.transport.abort()

    def cut(self) -> None:
        """Break all connections off. New ones work."""
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()
        self.swallows_answers = False
        self.cuts += 1


@pytest_asyncio.fixture
async def wire(server: Server) -> AsyncIterator[Wire]:
    wire = Wire(server.address)
    async with await asyncio.start_server(wire.accept, "127.0.0.1", 0) as listening:
        wire.address = "{}:{}".format(*listening.sockets[0].getsockname())
        yield wire
        wire.cut()


def new_user(username: str, **values: Any) -> user_pb2.CreateUserRequest:
    return user_pb2.CreateUserRequest(user=user_pb2.User(username=username, **values))


def send(talk: Conversation, content: str = "hi", **values: Any) -> message_pb2.SendMessageRequest:
    return message_pb2.SendMessageRequest(
        conversation_id=talk.id, role=USER, content=content, **values
    )


def listing(talk: Conversation, **values: Any) -> message_pb2.ListMessagesRequest:
    return message_pb2.ListMessagesRequest(
        conversation_id=talk.id, order_by="sequence", page_size=2, **values
    )


def test_the_policy_it_carries_is_the_published_one() -> None:
    published = (ROOT / "clients" / "service-config.json").read_text()

    assert CHANNEL["grpc.service_config"] == published
    (method,) = json.loads(published)["methodConfig"]
    # Never ABORTED, which asks for another decision, nor what may have failed for good.
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "CANCELLED"]


def test_it_has_the_version_of_the_server_whose_stubs_it_carries() -> None:
    server, client = (
        tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        for folder in (ROOT, ROOT / "clients" / "python")
    )

    assert client["version"] == server["version"]


async def test_a_call_is_made_for_its_actor_and_each_is_another(
    client: aio.Client, parley: Client
) -> None:
    await client.users.CreateUser(new_user("zoë"))
    zoe = client.acting_as("zoë")
    new = conversation_pb2.CreateConversationRequest(conversation=Conversation(title="Mine"))
    made = await zoe.conversations.CreateConversation(new)
    request = send(made.conversation, "as myself")

    first = await zoe.messages.SendMessage(request)
    second = await zoe.messages.SendMessage(request)

    assert first.message.sender_id == made.conversation.creator_id
    # The same request, sent twice on purpose: two messages. Its own request_id stayed empty.
    assert [first.message.sequence, second.message.sequence] == [1, 2]
    assert request.request_id == ""


async def test_a_request_id_of_ones_own_is_kept(client: aio.Client, parley: Client) -> None:
    ada = await parley.user()
    talk = await parley.conversation(ada)
    request = send(talk, sender_id=ada.id, request_id="mine")

    first = await client.messages.SendMessage(request)
    again = client.messages.SendMessage(request)

    assert (await again).message.id == first.message.id
    assert ("x-parley-replayed", "true") in tuple(await again.trailing_metadata())


async def test_an_error_tells_what_to_do(client: aio.Client, parley: Client) -> None:
    await parley.user("ada", email="ada@example.org")

    with pytest.raises(errors.AlreadyExists) as taken:
        await client.users.CreateUser(new_user("ada"))
    with pytest.raises(errors.InvalidArgument) as wrong:
        await client.users.CreateUser(new_user("a b", email="nonsense"))
    with pytest.raises(grpc.RpcError) as denied:
        await client.acting_as("ada").users.ListUsers(user_pb2.ListUsersRequest())

    assert taken.value.reason == "USERNAME_TAKEN"
    assert taken.value.metadata["name"] == "ada"
    assert str(taken.value) == "USERNAME_TAKEN: The username 'ada' is taken."
    assert taken.value.violations == ()
    assert taken.value.retry_after is None
    assert {each.field for each in wrong.value.violations} == {"user.username", "user.email"}
    assert all(each.reason and each.description for each in wrong.value.violations)
    assert isinstance(denied.value, errors.PermissionDenied)
    assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_who_is_not_known_is_told_so(server: Server, parley: Client) -> None:
    async with aio.connect(server.address, token="parley_no_body", plaintext=True) as stranger:
        with pytest.raises(errors.Unauthenticated) as refused:
            await stranger.users.GetUser(user_pb2.GetUserRequest(user_id="ada"))

    assert refused.value.reason == "INVALID_CREDENTIALS"
    assert "no_body" not in repr(vars(stranger))


async def test_a_call_has_a_deadline_without_being_told(wire: Wire, parley: Client) -> None:
    """Unless it names one of its own; a watch has none."""
    ada = await parley.user()
    talk = await parley.conversation(ada)
    request = user_pb2.GetUserRequest(user_id=ada.id)
    watched = event_pb2.WatchRequest(conversation_id=talk.id)
    async with aio.connect(
        wire.address, token=parley.token, plaintext=True, timeout=0.2
    ) as hurried:
        await hurried.users.GetUser(request, timeout=20)
        wire.swallows_answers = True
        with pytest.raises(errors.DeadlineExceeded):
            await hurried.users.GetUser(request)
        wire.cut()

        await hurried.users.GetUser(request, timeout=20)
        async with aclosing(hurried.watch(watched)) as watch:
            await anext(watch)
            await asyncio.sleep(0.4)
            await parley.message(talk, ada)
            told = await anext(watch)

    assert [event.type for event in told.events] == [event_pb2.Event.TYPE_MESSAGE_CREATED]
    assert wire.cuts == 1


async def test_pages_lead_through_a_list(client: aio.Client, parley: Client) -> None:
    ada = await parley.user()
    talk = await parley.conversation(ada)
    for _ in range(5):
        await parley.message(talk, ada)
    request = listing(talk)

    found = [page async for page in aio.pages(client.messages.ListMessages, request)]

    assert [[each.sequence for each in page.messages] for page in found] == [[1, 2], [3, 4], [5]]
    assert request == listing(talk)


@pytest.mark.parametrize("count", [1, 10], ids=["small", "2.5 MB"])
async def test_a_send_whose_answer_is_lost_is_repeated_and_stored_once(
    wire: Wire, parley: Client, count: int
) -> None:
    ada = await parley.user()
    talk = await parley.conversation(ada)
    size = 250_000 if count > 1 else 2
    new = message_pb2.NewMessage(sender_id=ada.id, role=USER, content="x" * size)
    async with aio.connect(wire.address, token=parley.token, plaintext=True) as client:
        await client.users.GetUser(user_pb2.GetUserRequest(user_id=ada.id))
        wire.swallows_answers = True

        sending = client.messages.BatchSendMessages(
            message_pb2.BatchSendMessagesRequest(conversation_id=talk.id, messages=[new] * count)
        )
        answer = asyncio.ensure_future(sending)
        async with asyncio.timeout(10):
            while not await parley.all_messages(talk):
                await asyncio.sleep(0.01)
        wire.cut()

        assert len((await answer).sent_messages) == count
        assert ("x-parley-replayed", "true") in tuple(await sending.trailing_metadata())
    assert len(await parley.all_messages(talk)) == count


async def test_a_watch_goes_on_where_it_was_cut(wire: Wire, parley: Client) -> None:
    ada = await parley.user()
    talk = await parley.conversation(ada)
    request = event_pb2.WatchRequest(conversation_id=talk.id, oldest=True)
    seen: list[int] = []
    cursors: dict[int, str] = {}

    async with (
        aio.connect(wire.address, token=parley.token, plaintext=True) as client,
        aclosing(client.watch(request)) as watch,
    ):
        async for response in watch:
            seen += [event.version for event in response.events]
            cursors[seen[-1]] = response.cursor
            if len(seen) > 10:
                break
            if response.events:
                await parley.message(talk, ada)
                wire.cut()
                await parley.message(talk, ada)

    assert wire.cuts >= 3
    assert seen == list(range(1, len(seen) + 1))
    # From a cursor that was kept, anybody goes on.
    version, cursor = next(iter(cursors.items()))
    request = event_pb2.WatchRequest(conversation_id=talk.id, resume_cursor=cursor)
    async with (
        aio.connect(wire.address, token=parley.token, plaintext=True) as client,
        aclosing(client.watch(request)) as watch,
    ):
        assert (await anext(watch)).events[0].version == version + 1


@pytest.mark.parametrize(
    ("error", "before", "after"),
    [
        (errors.Unavailable(reason="SHUTTING_DOWN"), True, True),
        (errors.Unavailable("nobody is there"), True, True),
        (errors.ResourceExhausted(reason="WATCH_TOO_SLOW"), True, True),
        # The first of too many is told so; one that was cut off may still be counted.
        (errors.ResourceExhausted(reason="RATE_LIMITED"), False, True),
        (errors.OutOfRange(reason="CURSOR_EXPIRED"), False, False),
        (errors.PermissionDenied(reason="ACCESS_LOST"), False, False),
        (errors.Cancelled("the channel was closed"), False, False),
    ],
    ids=lambda value: str(value),
)
def test_a_watch_goes_on_after_what_passes(error: ParleyError, before: bool, after: bool) -> None:
    watch = Resumption(event_pb2.WatchRequest(everything=True))

    assert watch.helps_against(error) is before
    watch.received(event_pb2.WatchResponse(cursor="here"))
    assert watch.helps_against(error) is after
    assert watch.request.resume_cursor == "here"


def test_the_pauses_of_a_watch_grow_to_a_limit_and_begin_anew() -> None:
    watch = Resumption(event_pb2.WatchRequest(everything=True))

    pauses = [watch.pause() for _ in range(2_000)]
    told = watch.pause(errors.Unavailable(retry_after=60.0))
    watch.received(event_pb2.WatchResponse(cursor="here"))
    first = watch.pause()

    assert 0.1 <= pauses[0] <= 0.15
    assert max(pauses) <= 7.5
    assert min(pauses[10:]) >= 5.0
    assert 60.0 <= told <= 90.0
    assert first <= 0.15


async def test_a_watch_that_cannot_go_on_says_why(client: aio.Client, parley: Client) -> None:
    request = event_pb2.WatchRequest(conversation_id="nowhere")

    with pytest.raises(errors.NotFound) as ended:
        await anext(client.watch(request))

    assert ended.value.reason == "CONVERSATION_NOT_FOUND"


# The same by the synchronous client, which waits in a thread of its own.


async def test_the_synchronous_client_does_the_same(
    threaded: parley_client.Client, parley: Client
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)

    def work() -> None:
        mine = threaded.acting_as("ada")
        sent = [mine.messages.SendMessage(send(talk)).message.sequence for _ in range(4)]
        later = mine.messages.SendMessage.future(send(talk))
        sent.append(later.result().message.sequence)
        _, call = mine.messages.SendMessage.with_call(send(talk, request_id="one"))
        assert call.trailing_metadata() == ()
        _, call = mine.messages.SendMessage.with_call(send(talk, request_id="one"))
        assert ("x-parley-replayed", "true") in call.trailing_metadata()
        assert sent == [1, 2, 3, 4, 5]

        request = listing(talk)
        pages = parley_client.pages(mine.messages.ListMessages, request)
        assert [len(page.messages) for page in pages] == [2, 2, 2]
        assert request == listing(talk)

        with pytest.raises(errors.AlreadyExists) as taken:
            threaded.users.CreateUser(new_user("ada"))
        assert taken.value.reason == "USERNAME_TAKEN"
        failing = mine.users.ListUsers.future(user_pb2.ListUsersRequest())
        with pytest.raises(errors.PermissionDenied):
            failing.result()

    await asyncio.to_thread(work)


async def test_the_synchronous_watch_goes_on_where_it_was_cut(wire: Wire, parley: Client) -> None:
    ada = await parley.user()
    talk = await parley.conversation(ada)
    loop = asyncio.get_running_loop()
    seen: list[int] = []

    async def happens() -> None:
        await parley.message(talk, ada)
        wire.cut()
        await parley.message(talk, ada)

    def work() -> None:
        request = event_pb2.WatchRequest(conversation_id=talk.id, oldest=True)
        with parley_client.connect(wire.address, token=parley.token, plaintext=True) as client:
            for response in client.watch(request):
                seen.extend(event.version for event in response.events)
                if len(seen) > 8:
                    break
                if response.events:
                    asyncio.run_coroutine_threadsafe(happens(), loop).result(10)
            with pytest.raises(errors.NotFound):
                next(client.watch(event_pb2.WatchRequest(conversation_id="nowhere")))
            wire.swallows_answers = True
            with pytest.raises(errors.DeadlineExceeded):
                client.users.GetUser(user_pb2.GetUserRequest(user_id=ada.id), timeout=0.2)

    await asyncio.to_thread(work)

    assert wire.cuts >= 3
    assert seen == list(range(1, len(seen) + 1))


async def test_a_token_is_not_sent_in_the_clear_by_an_oversight(
    server: Server, parley: Client
) -> None:
    async with aio.connect(server.address, token=parley.token) as client:
        with pytest.raises(errors.Unavailable) as failed:
            await client.users.GetUser(user_pb2.GetUserRequest(user_id="ada"))

    assert failed.value.reason == ""
