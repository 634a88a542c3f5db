"""The log: one JSON object a line, readable on a terminal, and never what our users said."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
import pytest_asyncio
from sqlalchemy import text

from parley.v1 import (
    conversation_pb2,
    participant_pb2,
    user_pb2,
    user_pb2_grpc,
)
from service.embedded import EmbeddedPostgres
from service.logs import tell_exception
from service.repositories.base import Connection
from service.store import Store

from .make import Client, Conversation, User
from .process import ROOT, Service, environment

# Planted wherever somebody says something, and then looked for.
CANARY = "c4n4ry-in-the-c04l-mine"


@pytest_asyncio.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"), log_level="debug")
    await service.start()
    yield service
    await service.stop()


async def test_nothing_that_anybody_said_is_in_the_log(service: Service) -> None:
    async with service.channel() as channel:
        system = Client(channel, service.token)
        ada = await system.user("ada", full_name=CANARY, email=f"{CANARY}@example.org")
        ada.metadata.update({"said": CANARY})
        talk = await system.conversation(ada, title=CANARY, first=CANARY)
        ends = [
            system.message(talk, ada, CANARY, metadata={"said": CANARY}, request_id="r-1"),
            # Refused, each in its own way.
            system.message(talk, ada, CANARY, request_id="r-1"),
            system.message(talk, ada, f"{CANARY}\0"),
            system.message(talk, ada, CANARY, external_id=CANARY * 50),
            system.message(Conversation(id="nowhere"), ada, CANARY),
            system.message(talk, User(id="nobody"), CANARY),
            system.user(f"{CANARY}\x1b[2J", full_name=CANARY),
            system.acting_as(CANARY).message(talk, ada, CANARY),
            system.acting_as(CANARY.encode()).message(talk, ada, CANARY),
            Client(channel, f"parley_{CANARY}").user(),
            Client(channel, f"parley_abc_{CANARY}").user(),
            _with_credentials(channel, f"Basic {CANARY}"),
            system.users.SetPassword(user_pb2.SetPasswordRequest(user_id="ada", password=CANARY)),
            system.users.VerifyPassword(
                user_pb2.VerifyPasswordRequest(user_id="ada", password=CANARY)
            ),
            system.verify(CANARY, user_id="ada"),
            system.verify(f"{CANARY}\0", user_id="ada"),
            system.set_password("nobody", CANARY),
            # People type their password where their name belongs.
            system.verify("secret", user_id=CANARY),
            system.verify("secret", email=f"{CANARY}@example.org"),
            system.participants.RemoveParticipant(
                participant_pb2.RemoveParticipantRequest(
                    conversation_id=talk.id, user_id=ada.id, reason=CANARY
                )
            ),
            system.conversations.ListConversations(
                conversation_pb2.ListConversationsRequest(page_token=CANARY, title_contains=CANARY)
            ),
            _raw(system, b"\xff" + CANARY.encode()),
        ]
        await asyncio.gather(*ends, return_exceptions=True)
        # A line is written once its answer is on the way.
        while len(service.events("call")) < len(ends) + 2:
            await asyncio.sleep(0.01)

    codes = {line["code"] for line in service.events("call")}
    assert {"OK", "INVALID_ARGUMENT", "UNAUTHENTICATED", "NOT_FOUND"} <= codes
    assert not codes & {"UNKNOWN", "INTERNAL"}
    log_of_postgres = (service.folder / "data" / "postgres" / "log").read_text()
    for written in (service.log, service.output, log_of_postgres):
        assert CANARY not in written
    assert service.token.split("_", 2)[2] not in service.log + log_of_postgres


async def test_a_call_is_one_json_object(service: Service) -> None:
    async with service.channel() as channel:
        await Client(channel, service.token).user()

    (line, *_) = [
        line
        for line in service.events("call")
        if line["method"] == "parley.v1.UserService/CreateUser"
    ]
    assert line["code"] == "OK"
    assert line["caller"] == "development"
    assert line["ms"] > 0
    assert line["time"].endswith("Z")
    assert all(json.loads(each) for each in service.log.splitlines())


# What a database says of a failure quotes what was to be stored. Each of these does.


async def _check(connection: Connection) -> None:
    await connection.fetch("CREATE TEMP TABLE t (x text CONSTRAINT short CHECK (x = ''))")
    await connection.fetch("INSERT INTO t VALUES ($1)", CANARY)


async def _unique(connection: Connection) -> None:
    await connection.fetch("CREATE TEMP TABLE t (x text CONSTRAINT once UNIQUE)")
    await connection.fetch("INSERT INTO t VALUES ($1), ($1)", CANARY)


async def _syntax(connection: Connection) -> None:
    await connection.fetch("SELECT $1::text::int", CANARY)


async def _json(connection: Connection) -> None:
    await connection.fetch("SELECT $1::text::jsonb", CANARY)


async def _argument(connection: Connection) -> None:
    await connection.fetch("SELECT $1::int", CANARY)


async def _by_sqlalchemy(connection: Connection) -> None:
    await connection.fetch("CREATE TEMP TABLE t (x text CONSTRAINT short CHECK (x = ''))")
    await connection.execute(text("INSERT INTO t VALUES (:said)").bindparams(said=CANARY))


@pytest.mark.parametrize(
    ("fail", "told"),
    [
        (_check, "short"),
        (_unique, "once"),
        (_syntax, "22P02"),
        (_json, "22P02"),
        (_argument, "DataError"),
        (_by_sqlalchemy, "short"),
    ],
)
async def test_a_failure_of_the_database_is_told_without_what_it_quotes(
    postgres: EmbeddedPostgres, fail: Callable[[Connection], Awaitable[None]], told: str
) -> None:
    store = Store(postgres.url, pool_size=2)
    caught: BaseException = AssertionError("it did not fail")
    try:
        async with store.transaction() as transaction:
            await fail(transaction.connection)
    except Exception as error:
        caught = error
    await store.close()

    said = tell_exception(None, "", {"exc_info": caught})["exception"]

    assert CANARY in repr(caught) + repr(caught.__cause__) + str(vars(caught)) or told == "22P02"
    assert CANARY not in said
    assert told in said
    assert f"in {fail.__name__}" in said, "no traceback"


# A terminal


WRITE = """
import sys
from service import logs
from service.settings import load
import structlog
logs.configure(load())
try:
    raise RuntimeError("what \\x1b[31m happened")
except RuntimeError:
    structlog.get_logger().error("evil", text="\\x1b[2J\\r\\nserving \\x9b", exc_info=True)
"""


def test_on_a_terminal_nothing_said_is_obeyed() -> None:
    ours, theirs = os.openpty()
    subprocess.run([sys.executable, "-c", WRITE], cwd=ROOT, env=environment(), stderr=theirs)
    os.close(theirs)
    with os.fdopen(ours, "rb") as terminal:
        written = terminal.read1().decode()

    assert not written.startswith("{")
    first, *rest = written.splitlines()
    assert "evil" in first
    assert "serving" in first
    assert "\x1b[2J" not in written
    assert "\x9b" not in written
    assert r"RuntimeError: what \x1b[31m happened" in "\n".join(rest)


def test_elsewhere_it_is_one_json_object() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITE],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    (line,) = done.stderr.splitlines()
    assert json.loads(line)["text"] == "\x1b[2J\r\nserving \x9b"
    assert "\x1b" not in line


async def _with_credentials(channel: grpc.aio.Channel, credentials: str) -> None:
    await user_pb2_grpc.UserServiceStub(channel).GetUser(
        user_pb2.GetUserRequest(user_id="ada"), metadata=(("authorization", credentials),)
    )


async def _raw(client: Client, raw: bytes) -> None:
    call: Any = client.channel.unary_unary("/parley.v1.MessageService/SendMessage")
    await call(raw, metadata=client.metadata)
