"""What happens around every call: credentials, decoding, deadlines, errors, one line in the log."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, MutableMapping
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from parley.v1 import message_pb2, message_pb2_grpc
from service.access import Gatekeeper
from service.errors import Aborted, InvalidArgument
from service.identity import Call
from service.interceptors import Interceptors
from service.lookups import Lookups
from service.server import Server

from .make import USER, Client, Conversation, Failure, User, failure
from .process import SERVING, health

SEND = "/parley.v1.MessageService/SendMessage"
REFLECTIONS = ["grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection"]

Lines = list[MutableMapping[str, Any]]


@pytest.fixture(autouse=True)
def lines() -> Iterator[Lines]:
    """What is logged meanwhile."""
    with structlog.testing.capture_logs() as captured:
        yield captured


async def told_of(method: str, lines: Lines, *, count: int) -> Lines:
    """The lines of a method's calls, which are written after they are answered."""
    async with asyncio.timeout(5):
        while len(told := [line for line in lines if line.get("method") == method]) < count:
            await asyncio.sleep(0.01)
    return told


class Odd:
    """A servicer that does with a message what its content says."""

    def __init__(self) -> None:
        self.tries = 0
        self.finished = asyncio.Event()

    async def SendMessage(
        self, request: message_pb2.SendMessageRequest, _: Call
    ) -> message_pb2.SendMessageResponse:
        self.tries += 1
        match request.content.split():
            case ["fail", secret]:
                raise RuntimeError(f"the password is {secret}")
            case ["conflict", times] if self.tries <= int(times):
                raise Aborted("CONFLICT", retry_after=0.05)
            case ["sleep", seconds, *then]:
                await asyncio.sleep(float(seconds))
                self.finished.set()
                if then:
                    raise RuntimeError(then[0])
            case ["violate", many]:
                name = "é" * 400
                errors = [InvalidArgument("REQUIRED", field=name) for _ in range(int(many))]
                raise InvalidArgument.of(errors)
        return message_pb2.SendMessageResponse(message=message_pb2.Message(sequence=self.tries))


class OddServer:
    """A server whose calls without a deadline get a fifth of a second."""

    def __init__(self, client: Client, interceptors: Interceptors) -> None:
        self.servicer = Odd()
        self.interceptors = interceptors
        self._server = grpc.aio.server()
        descriptor = message_pb2.DESCRIPTOR.services_by_name["MessageService"]
        handlers = interceptors.service(descriptor, self.servicer)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(descriptor.full_name, handlers),)
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._metadata = client.metadata

    async def start(self) -> None:
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")
        self._stub = message_pb2_grpc.MessageServiceStub(self._channel)

    async def stop(self) -> None:
        await self._channel.close()
        await self._server.stop(None)

    def send(self, content: str, **options: Any) -> Awaitable[Any]:
        request = message_pb2.SendMessageRequest(content=content)
        call: Awaitable[Any] = self._stub.SendMessage(request, metadata=self._metadata, **options)
        return call


@pytest_asyncio.fixture
async def odd(server: Server, parley: Client) -> AsyncIterator[OddServer]:
    gatekeeper = Gatekeeper(server.store, Lookups(server.store))
    interceptors = Interceptors(gatekeeper, server.store, default_deadline=0.2)
    made = OddServer(parley, interceptors)
    await made.start()
    yield made
    await made.stop()


@pytest_asyncio.fixture
async def ada(parley: Client) -> User:
    return await parley.user("ada")


@pytest_asyncio.fixture
async def talk(parley: Client, ada: User) -> Conversation:
    return await parley.conversation(ada)


# What a caller may know of an error


async def test_the_text_of_an_exception_stays_in_the_log(odd: OddServer, lines: Lines) -> None:
    failed = await failure(odd.send("fail hunter2"))

    assert (failed.code, failed.reason) == ("INTERNAL", "INTERNAL")
    assert "hunter2" not in repr(failed)
    (line,) = [line for line in lines if line["event"] == "defect"]
    assert failed.known == {"correlation_id": line["correlation_id"]}
    assert failed.known["correlation_id"] in failed.message
    assert "hunter2" in str(line["exc_info"])


async def test_ten_thousand_violations_fit_into_the_trailers(odd: OddServer) -> None:
    failed = await failure(odd.send("violate 10000", timeout=10))

    assert (failed.code, failed.reason) == ("INVALID_ARGUMENT", "REQUIRED")
    assert failed.known["violations"] == "10000"
    assert failed.violations
    details = failed.trailers["grpc-status-details-bin"]
    assert len(details) <= 4096
    # As they travel: base64, and three bytes for each that is not ASCII.
    assert len(details) * 4 / 3 + len(failed.message.encode()) * 3 < 8192


async def test_a_conflict_is_tried_again_before_anybody_hears_of_it(odd: OddServer) -> None:
    answer = await odd.send("conflict 2")

    assert answer.message.sequence == 3


async def test_a_conflict_that_does_not_end_is_told_after_three_times(odd: OddServer) -> None:
    failed = await failure(odd.send("conflict 99"))

    assert (failed.code, failed.reason) == ("ABORTED", "CONFLICT")
    assert failed.retry_seconds == 0.05
    assert failed.trailers["grpc-retry-pushback-ms"] == "50"
    assert odd.servicer.tries == 3


# What cannot be read


def nested(depth: int) -> bytes:
    """A SendMessageRequest whose metadata holds lists in lists."""
    value = b""
    for _ in range(depth):
        value = _field(6, _field(1, value))  # Value.list_value, ListValue.values
    entry = _field(1, b"key") + _field(2, value)
    number = message_pb2.SendMessageRequest.DESCRIPTOR.fields_by_name["metadata"].number
    return _field(number, _field(1, entry))  # Struct.fields


def _field(number: int, content: bytes) -> bytes:
    size, varint = len(content), b""
    while size > 0x7F:
        varint += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([size]) + content


@pytest.mark.parametrize(
    "raw",
    [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe", nested(200)],
    ids=["garbage", "cut off", "not UTF-8", "too deep"],
)
async def test_what_is_no_message_is_the_callers_mistake(parley: Client, raw: bytes) -> None:
    call: Any = parley.channel.unary_unary(SEND)

    refused = await failure(call(raw, metadata=parley.metadata))

    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "MALFORMED_REQUEST")
    assert "SendMessageRequest" in refused.message


async def test_who_is_unknown_is_not_told_whether_its_message_can_be_read(parley: Client) -> None:
    call: Any = parley.channel.unary_unary(SEND)

    refused = await failure(call(b"\xff"))

    assert (refused.code, refused.reason) == ("UNAUTHENTICATED", "MISSING_CREDENTIALS")


# Deadlines and clients that go away


async def test_a_call_without_a_deadline_gets_the_servers(odd: OddServer) -> None:
    started = time.monotonic()

    late = await failure(odd.send("sleep 0.5"))

    assert (late.code, late.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
    assert 0.15 < time.monotonic() - started < 0.45
    await asyncio.wait_for(odd.servicer.finished.wait(), 1)


async def test_a_client_that_brings_its_deadline_keeps_it(odd: OddServer) -> None:
    assert await odd.send("sleep 0.4", timeout=5)


async def test_a_defect_in_a_call_that_nobody_awaits_is_in_the_log(
    odd: OddServer, lines: Lines
) -> None:
    await failure(odd.send("sleep 0.3 oops"))
    await asyncio.wait_for(odd.servicer.finished.wait(), 1)
    await odd.interceptors.drained(1)

    (line,) = [line for line in lines if line["event"] == "defect"]
    assert "oops" in str(line["exc_info"])


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_write_goes_on_when_its_client_has_gone(
    parley: Client,
    ada: User,
    talk: Conversation,
    database: asyncpg.Connection,
    lines: Lines,
    how: str,
) -> None:
    held = database.transaction()
    await held.start()
    await database.execute("SELECT FROM conversations WHERE id = $1 FOR UPDATE", talk.id)
    call = asyncio.ensure_future(
        _sending(parley, ada, talk, "late", timeout=0.2 if how == "deadline" else 5)
    )
    await asyncio.sleep(0.1)
    started = time.monotonic()
    if how == "cancel":
        call.cancel()
        await asyncio.wait([call])
    else:
        assert (await failure(call)).code == "DEADLINE_EXCEEDED"
    assert time.monotonic() - started < 0.3
    # The server's line comes while the write still waits for the row.
    await told_of(SEND[1:], lines, count=1)
    await held.rollback()

    while not (messages := await parley.all_messages(talk)):
        await asyncio.sleep(0.02)
    assert [message.content for message in messages] == ["late"]
    (line,) = [line for line in lines if line.get("method") == SEND[1:]]
    assert line["code"] == ("CANCELLED" if how == "cancel" else "DEADLINE_EXCEEDED")


async def test_two_hundred_cancelled_calls_cost_no_connection_and_disturb_nobody(
    server: Server, parley: Client, ada: User, talk: Conversation, database: asyncpg.Connection
) -> None:
    await asyncio.gather(*(parley.message(talk, ada, f"before {n}") for n in range(50)))
    before = await _backends(database)
    held = database.transaction()
    await held.start()
    await database.execute("SELECT FROM conversations WHERE id = $1 FOR UPDATE", talk.id)

    # On a connection of its own.
    apart = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(server.address, options=apart) as channel:
        other = Client(channel, parley.token)
        calls = [
            asyncio.ensure_future(_sending(other, ada, talk, f"cancelled {n}")) for n in range(200)
        ]
        # Some of them are at work: they wait for the row.
        while not await database.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.01)
        patient = asyncio.ensure_future(parley.message(talk, ada, "kept"))
        await asyncio.sleep(0.1)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
    await held.rollback()

    assert all(call.cancelled() for call in calls)
    assert (await patient).content == "kept"
    assert before <= await _backends(database)
    contents = [message.content for message in await parley.all_messages(talk)]
    assert len(contents) == len(set(contents))
    assert any(content.startswith("cancelled") for content in contents), "none was at work"


async def test_more_calls_at_a_time_than_a_connection_carries_wait_for_their_turn(
    channel: grpc.aio.Channel,
) -> None:
    assert set(await asyncio.gather(*(health(channel) for _ in range(1500)))) == {SERVING}


# A server that goes away


async def test_a_server_that_drains_refuses_what_is_new_and_ends_what_it_began(
    odd: OddServer,
) -> None:
    running = asyncio.ensure_future(odd.send("sleep 0.1", timeout=5))
    await asyncio.sleep(0.05)

    odd.interceptors.drain()

    refused = await failure(odd.send("hello"))
    assert (refused.code, refused.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
    assert refused.retry_seconds
    assert refused.trailers["grpc-retry-pushback-ms"]
    assert await running


# Streams, health, reflection


async def test_a_stream_of_the_contract_that_is_not_served_says_so(
    parley: Client, lines: Lines
) -> None:
    name = "parley.v1.TransferService/ExportConversations"
    export: Any = parley.channel.unary_stream(f"/{name}")

    refused = await failure(export(b"", metadata=parley.metadata).read())
    unknown = await failure(export(b"", metadata=Client(parley.channel, "x").metadata).read())

    assert (refused.code, refused.reason) == ("UNIMPLEMENTED", "NOT_IMPLEMENTED")
    assert refused.known == {"method": name.replace("/", ".")}
    assert unknown.code == "UNAUTHENTICATED"
    told = await told_of(name, lines, count=2)
    assert [line["code"] for line in told] == ["UNIMPLEMENTED", "UNAUTHENTICATED"]


async def test_health_is_told_without_credentials(
    channel: grpc.aio.Channel, server: Server
) -> None:
    assert await health(channel) == SERVING
    assert await health(channel, "parley.v1.MessageService") == SERVING
    assert await health(channel, "liveness") == SERVING
    assert await health(channel, "nonsense") == "NOT_FOUND"


async def test_health_can_be_watched_without_credentials(channel: grpc.aio.Channel) -> None:
    async def first(name: str) -> int:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=name)
        )
        status: int = (await watch.read()).status
        watch.cancel()
        return status

    assert await first("") == health_pb2.HealthCheckResponse.SERVING
    assert await first("nonsense") == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def reflected(parley: Client, question: Any, service: str, **options: Any) -> Any:
    """The first answer of reflection to a question."""
    converse = parley.channel.stream_stream(
        f"/{service}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = converse(**options)
    await call.write(question)
    answer = await call.read()
    call.cancel()
    return answer


@pytest.mark.parametrize("service", REFLECTIONS)
async def test_reflection_lists_the_services_to_who_has_credentials(
    parley: Client, service: str
) -> None:
    question = reflection_pb2.ServerReflectionRequest(list_services="")

    listed = await reflected(parley, question, service, metadata=parley.metadata)
    refused: Failure = await failure(reflected(parley, question, service))

    names = {each.name for each in listed.list_services_response.service}
    assert {"parley.v1.MessageService", "grpc.health.v1.Health"} <= names
    assert (refused.code, refused.reason) == ("UNAUTHENTICATED", "MISSING_CREDENTIALS")


@pytest.mark.parametrize(
    ("symbol", "found"),
    [
        ("parley.v1.UserService", True),
        ("parley.v1.UserService.GetUser", True),
        ("parley.v1.User.Kind", True),
        ("parley.v1.UserService.GetNobody", False),
        ("parley.v1.NoService.GetUser", False),
        ("nothing", False),
    ],
)
async def test_reflection_finds_services_methods_and_types_by_name(
    parley: Client, symbol: str, found: bool
) -> None:
    question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)

    answer = await reflected(parley, question, REFLECTIONS[1], metadata=parley.metadata)

    files = answer.file_descriptor_response.file_descriptor_proto
    assert any(b"parley/v1/user.proto" in file for file in files) == found
    assert (answer.error_response.error_code == 5) != found


# The log


async def test_a_call_is_one_line_that_says_who_did_what_and_how_it_went(
    parley: Client, ada: User, talk: Conversation, lines: Lines
) -> None:
    await _sending(parley.acting_as(ada), ada, talk, "hello")
    await failure(_sending(parley.acting_as(ada), ada, Conversation(id="nonsense!"), "hello"))

    done, refused = await told_of(SEND[1:], lines, count=2)
    assert float(done.pop("ms")) > 0
    assert (
        done.items()
        >= {
            "event": "call",
            "method": "parley.v1.MessageService/SendMessage",
            "code": "OK",
            "caller": "development",
            "actor": ada.id,
        }.items()
    )
    assert refused["code"] == "INVALID_ARGUMENT"
    assert refused["reason"]
    assert refused["actor"] == ada.id


def _sending(
    client: Client, sender: User, talk: Conversation, content: str, **options: Any
) -> Awaitable[message_pb2.SendMessageResponse]:
    request = message_pb2.SendMessageRequest(
        conversation_id=talk.id, sender_id=sender.id, role=USER, content=content
    )
    return client.messages.SendMessage(request, **options)  # type: ignore[no-any-return]


async def _backends(database: asyncpg.Connection) -> set[int]:
    """The sessions of the service at the database."""
    rows = await database.fetch(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'parley'"
    )
    return {row["pid"] for row in rows}
