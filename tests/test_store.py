"""The door to the database: what comes through it when the database fails, and never a lie."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import grpc
import psutil
import pytest
import pytest_asyncio
import structlog
from sqlalchemy import text

from parley.v1 import conversation_pb2
from parley.v1 import message_pb2 as pb
from service import driver, indoubt, schema, store
from service.embedded import EmbeddedPostgres
from service.errors import Aborted, InvalidArgument, ParleyError, Unavailable
from service.ids import lock_of
from service.server import Server
from service.settings import load
from service.store import Snapshot, Store

from .make import USER, Client, Conversation, User, failure, failure_of
from .process import children, health, kill
from .proxy import Fault, Proxy, proxy

Answer = TypeVar("Answer")


@pytest.fixture(autouse=True)
def lines() -> Iterator[list[MutableMapping[str, Any]]]:
    """What is logged meanwhile."""
    with structlog.testing.capture_logs() as captured:
        yield captured


def plain(url: str) -> str:
    return url.replace("postgresql+asyncpg", "postgresql")


@pytest_asyncio.fixture
async def doors(postgres: EmbeddedPostgres) -> AsyncIterator[Store]:
    """A store of two connections."""
    opened = Store(postgres.url, pool_size=2)
    yield opened
    await opened.close()


@asynccontextmanager
async def serving(
    url: str, data_dir: Path, **settings: Any
) -> AsyncIterator[tuple[Server, Client]]:
    """A server over that database, and the system's client of it."""
    server = Server(load(address="127.0.0.1:0", data_dir=data_dir, **settings), url)
    server.bind()
    await server.start()
    try:
        await asyncio.wait_for(server.readiness.ready.wait(), 10)
        async with grpc.aio.insecure_channel(server.address) as channel:
            assert server.token
            yield server, Client(channel, server.token)
    finally:
        await server.stop()


# What PostgreSQL says, and what the caller is told.


@pytest.mark.parametrize(
    ("state", "status", "reason"),
    [
        ("40001", "ABORTED", "CONFLICT"),
        ("40P01", "ABORTED", "CONFLICT"),
        ("55P03", "ABORTED", "LOCK_TIMEOUT"),
        ("57014", "UNAVAILABLE", "OVERLOADED"),
        ("25006", "UNAVAILABLE", "DATABASE_READ_ONLY"),
        ("53100", "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        ("53300", "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        ("57P01", "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        ("57P03", "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        ("08006", "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        ("28P01", "UNAVAILABLE", "DATABASE_UNAVAILABLE"),
        ("22021", "INVALID_ARGUMENT", "INVALID_VALUE"),
        ("54000", "INVALID_ARGUMENT", "INVALID_VALUE"),
        ("XX001", "DATA_LOSS", "DATA_LOSS"),
    ],
)
@pytest.mark.parametrize("way", ["driver", "sqlalchemy"])
async def test_each_sqlstate_has_its_error(
    doors: Store, state: str, status: str, reason: str, way: str
) -> None:
    statement = f"DO $$ BEGIN RAISE EXCEPTION 'boom' USING ERRCODE = '{state}'; END $$"

    async def fail() -> None:
        async with doors.transaction() as transaction:
            if way == "driver":
                await transaction.connection.fetch(statement)
            else:
                await transaction.connection.execute(text(statement))

    with pytest.raises(ParleyError) as raised:
        await fail()

    assert (raised.value.status, raised.value.reason) == (status, reason)


async def test_what_is_our_own_fault_is_not_made_somebody_elses(doors: Store) -> None:
    with pytest.raises(asyncpg.UndefinedColumnError):
        async with doors.snapshot() as snapshot:
            await snapshot.connection.fetch("SELECT nonsense")


async def test_a_value_the_driver_refuses_is_the_callers_and_costs_no_connection(
    doors: Store,
) -> None:
    async with doors.snapshot() as snapshot:
        before = await _backend(snapshot)

    with pytest.raises(InvalidArgument):
        async with doors.snapshot() as snapshot:
            await snapshot.connection.fetch("SELECT $1::int", "not a number")

    async with doors.snapshot() as snapshot:
        assert await _backend(snapshot) == before


async def test_a_snapshot_cannot_write(doors: Store) -> None:
    with pytest.raises(Unavailable, match="DATABASE_READ_ONLY"):
        async with doors.snapshot() as snapshot:
            await snapshot.connection.fetch("DELETE FROM users")


async def test_a_dry_run_leaves_nothing_and_a_clean_connection(doors: Store) -> None:
    async with doors.transaction() as transaction:
        await transaction.connection.fetch("CREATE TABLE ghost ()")
        transaction.dry_run = True

    async with doors.snapshot() as snapshot:
        (row,) = await snapshot.connection.fetch("SELECT to_regclass('ghost') AS found")
    assert row["found"] is None


async def test_a_statement_that_takes_too_long_ends_and_its_connection_lives(doors: Store) -> None:
    async with doors.snapshot() as snapshot:
        before = await _backend(snapshot)

    async def sleep() -> None:
        async with doors.transaction() as transaction:
            await transaction.connection.fetch("SET LOCAL statement_timeout = 30")
            await transaction.connection.fetch("SELECT pg_sleep(5)")

    with pytest.raises(Unavailable, match="OVERLOADED"):
        await sleep()

    async with doors.snapshot() as snapshot:
        assert await _backend(snapshot) == before


async def test_of_two_that_wait_for_each_other_one_is_told_of_a_conflict(doors: Store) -> None:
    both_hold = asyncio.Barrier(2)

    async def cross(first: int, second: int) -> str:
        try:
            async with doors.transaction(lock=first) as transaction:
                await both_hold.wait()
                await transaction.connection.fetch(f"SELECT pg_advisory_xact_lock({second})")
        except Aborted as error:
            return error.reason
        return "done"

    assert sorted(await asyncio.gather(cross(1, 2), cross(2, 1))) == ["CONFLICT", "done"]


async def test_a_lock_that_does_not_come_is_told_in_time(
    doors: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(driver.READ_ONLY_SESSION, "lock_timeout", "100")
    async with doors.transaction(lock=1):
        with pytest.raises(Aborted, match="LOCK_TIMEOUT"):
            async with doors.transaction(lock=1):
                pass


async def test_a_full_pool_is_told_soon(doors: Store) -> None:
    async with doors.snapshot(), doors.snapshot():
        started = time.monotonic()
        with pytest.raises(Unavailable, match="OVERLOADED"):
            async with doors.snapshot():
                pass

    assert time.monotonic() - started < 1


async def test_a_call_that_finds_the_pool_full_may_be_repeated(
    postgres: EmbeddedPostgres, parley: Client, tmp_path: Path
) -> None:
    async with serving(postgres.url, tmp_path, pool_size=2) as (server, client):
        async with server.store.snapshot(), server.store.snapshot():
            refused = await failure(client.user("ada"))
            assert await health(client.channel) == "SERVING"

        assert (refused.code, refused.reason) == ("UNAVAILABLE", "OVERLOADED")
        assert refused.retry_seconds
        assert refused.trailers["grpc-retry-pushback-ms"]
        await client.user("ada")


async def test_searches_leave_connections_to_others(
    postgres: EmbeddedPostgres, parley: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = await parley.user("ada")
    talk = await parley.conversation(ada, first="hello")

    async with serving(postgres.url, tmp_path, pool_size=2) as (server, client):

        async def search() -> str:
            request = pb.SearchMessagesRequest(conversation_id=talk.id, query="hello")
            (result,) = (await client.messages.SearchMessages(request)).results
            return str(result.message.content)

        async with server.store.long_snapshot():
            searches = asyncio.gather(*(search() for _ in range(16)))
            # Longer than anybody waits for a connection.
            await asyncio.sleep(2 * store.POOL_WAIT_SECONDS)
            assert [each.content for each in await client.all_messages(talk)] == ["hello"]
            monkeypatch.setattr(store, "QUEUE_SECONDS", 0.05)
            refused = await failure(search())
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "OVERLOADED")
        assert await searches == ["hello"] * 16


async def test_a_statement_prepared_before_the_schema_changed_is_a_conflict_to_repeat(
    doors: Store,
) -> None:
    async def reshape() -> None:
        async with doors.transaction() as transaction:
            await transaction.connection.fetch("CREATE TEMP TABLE shape (size int)")
            await transaction.connection.fetch("SELECT * FROM shape")
            await transaction.connection.fetch("ALTER TABLE shape ALTER size TYPE text")
            await transaction.connection.fetch("SELECT * FROM shape")

    with pytest.raises(Aborted, match="CONFLICT"):
        await reshape()


# Connections that are gone


async def test_after_its_connections_were_ended_the_next_call_succeeds(
    doors: Store, database: asyncpg.Connection
) -> None:
    async with doors.snapshot() as one, doors.snapshot() as other:
        pids = [await _backend(one), await _backend(other)]

    ended = [await database.fetchval("SELECT pg_terminate_backend($1, 1000)", pid) for pid in pids]
    await asyncio.sleep(0.2)  # until their ends have come through

    async with doors.snapshot() as snapshot:
        assert await _backend(snapshot) not in pids
    assert ended == [True, True]


async def test_statements_keep_their_connection_until_it_ends(doors: Store) -> None:
    async def backend() -> int:
        async with doors.statements() as statements:
            return await _backend(statements)

    first = await backend()
    assert await backend() == first

    async with doors.snapshot() as snapshot:
        await snapshot.connection.fetch("SELECT pg_terminate_backend($1, 1000)", first)
    await asyncio.sleep(0.05)
    second = await backend()
    assert second != first
    # Nor is the pool's only place lost by what was refused, or left in the middle.
    with pytest.raises(asyncpg.UndefinedColumnError):
        async with doors.statements() as statements:
            await statements.connection.fetch("SELECT nonsense")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1), doors.statements() as statements:
            await statements.connection.fetch("SELECT pg_sleep(10)")
    third = await backend()
    assert third != second
    assert await backend() == third


async def test_a_connection_ended_in_a_transaction_means_that_nothing_was_written(
    doors: Store, database: asyncpg.Connection
) -> None:
    async def be_ended() -> None:
        async with doors.transaction() as transaction:
            await transaction.connection.fetch("CREATE TABLE ghost ()")
            pid = await _backend(transaction)
            assert await database.fetchval("SELECT pg_terminate_backend($1, 1000)", pid)

    with pytest.raises(Unavailable, match="DATABASE_UNAVAILABLE"):
        await be_ended()

    assert await database.fetchval("SELECT to_regclass('ghost')") is None


@pytest.mark.parametrize("kind", ["driver", "sqlalchemy"])
async def test_a_connection_that_ends_under_a_statement_is_told_as_such(
    doors: Store, database: asyncpg.Connection, kind: str
) -> None:
    """Found with PostgreSQL killed under load: SQLAlchemy throws it away by itself, and what was
    thrown away again was an INTERNAL error.
    """

    async def be_ended() -> None:
        async with doors.transaction() as transaction:
            pid = await _backend(transaction)
            assert await database.fetchval("SELECT pg_terminate_backend($1, 1000)", pid)
            if kind == "driver":
                await transaction.connection.fetch("SELECT 1")
            else:
                await transaction.connection.rows(text("SELECT 1"))

    with pytest.raises(Unavailable, match="DATABASE_UNAVAILABLE"):
        await be_ended()

    async with doors.transaction() as transaction:
        assert await transaction.connection.fetch("SELECT 1")


async def test_a_pool_of_connections_to_nobody_is_refused_at_once(tmp_path: Path) -> None:
    nobody = Store(f"postgresql://parley@/parley?host={tmp_path}")

    with pytest.raises(Unavailable, match="DATABASE_UNAVAILABLE"):
        async with nobody.snapshot():
            pass
    with pytest.raises(Unavailable):
        await nobody.ping()

    await nobody.close()


# A COMMIT whose answer is lost


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second, instead of five, until a database that says nothing is given up."""
    monkeypatch.setattr(driver, "COMMAND_SECONDS", 0.5)


@dataclass
class Scene:
    """A conversation, and a client whose server reaches PostgreSQL through a proxy."""

    proxy: Proxy
    client: Client
    ada: User
    talk: Conversation

    def send(self, content: str, request_id: str = "") -> Awaitable[pb.SendMessageResponse]:
        return self.client.messages.SendMessage(  # type: ignore[no-any-return]
            pb.SendMessageRequest(
                conversation_id=self.talk.id,
                sender_id=self.ada.id,
                role=USER,
                content=content,
                request_id=request_id,
            )
        )

    def rename(
        self, title: str, request_id: str = ""
    ) -> Awaitable[conversation_pb2.UpdateConversationResponse]:
        """Unlike a send several statements, with a COMMIT at their end."""
        return self.client.conversations.UpdateConversation(  # type: ignore[no-any-return]
            conversation_pb2.UpdateConversationRequest(
                conversation_id=self.talk.id,
                conversation=Conversation(title=title),
                request_id=request_id,
            )
        )

    async def title(self) -> str:
        return (await self.client.seen(self.talk)).title

    async def contents(self) -> list[str]:
        messages = await self.client.all_messages(self.talk)
        assert [message.sequence for message in messages] == list(range(1, len(messages) + 1))
        return [message.content for message in messages]


@asynccontextmanager
async def scene(url: str, folder: Path) -> AsyncIterator[Scene]:
    with pytest.MonkeyPatch.context() as patch:
        # What looks after the database commits too, and would meet the fault instead of the call.
        patch.setattr(Server, "_prune", _rest)
        patch.setattr(Server, "_index", _rest)
        async with _scene(url, folder) as made:
            yield made


async def _rest(_: Server) -> None:
    await asyncio.Event().wait()


@asynccontextmanager
async def _scene(url: str, folder: Path) -> AsyncIterator[Scene]:
    async with (
        proxy(folder, plain(url)) as between,
        serving(between.url, folder / "data") as (_, client),
    ):
        ada = await client.user()
        yield Scene(between, client, ada, await client.conversation(ada))


@pytest_asyncio.fixture
async def broken(
    postgres: EmbeddedPostgres, parley: Client, impatient: None, tmp_path: Path
) -> AsyncIterator[Scene]:
    async with scene(postgres.url, tmp_path) as made:
        yield made


@pytest.mark.parametrize("fault", [Fault.CUT_AFTER, Fault.SWALLOWED_AFTER])
@pytest.mark.parametrize("request_id", ["", "r-1"])
async def test_a_commit_that_took_effect_is_answered_though_its_answer_was_lost(
    broken: Scene, fault: Fault, request_id: str
) -> None:
    broken.proxy.faults = [fault]

    sent = (await broken.send("once", request_id)).message

    assert broken.proxy.fired == 1
    assert sent.sequence == 1
    if request_id:
        assert (await broken.send("once", request_id)).message.id == sent.id
    assert await broken.contents() == ["once"]


@pytest.mark.parametrize("fault", [Fault.CUT_AFTER, Fault.CUT_BEFORE])
async def test_a_lost_send_waits_only_for_who_may_be_at_it_and_keeps_no_ping_waiting(
    broken: Scene, postgres: EmbeddedPostgres, fault: Fault
) -> None:
    """Somebody has the conversation's lock: another session, as the statement's own may be behind a
    pooler. What was stored is told at once; that nothing was, only when nobody can be at it.
    """
    holder = await asyncpg.connect(plain(postgres.url))
    lock = lock_of(UUID(broken.talk.id))

    async def hold() -> None:
        await holder.execute("SELECT pg_advisory_lock($1)", lock)

    broken.proxy.faults, broken.proxy.meanwhile = [fault], hold
    sending = asyncio.create_task(outcome_of(broken.send("once")))
    done, _ = await asyncio.wait([sending], timeout=3)
    assert bool(done) == (fault is Fault.CUT_AFTER)
    # For two and a half seconds: two pings in a row that find no connection would end this.
    assert await broken.title() == ""

    await holder.close()
    assert await sending == ("OK" if done else "DATABASE_UNAVAILABLE")
    assert len(await broken.contents()) == (1 if done else 0)


async def outcome_of(sending: Awaitable[object]) -> str:
    try:
        await sending
    except grpc.aio.AioRpcError as error:
        return failure_of(error).reason
    return "OK"


@pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.SWALLOWED_BEFORE])
@pytest.mark.parametrize("request_id", ["", "r-1"])
async def test_a_commit_that_never_arrived_certainly_had_no_effect(
    broken: Scene, fault: Fault, request_id: str
) -> None:
    broken.proxy.faults = [fault]
    started = time.monotonic()

    refused = await failure(broken.send("again", request_id))

    assert broken.proxy.fired == 1
    assert time.monotonic() - started < 4, "it waited until PostgreSQL gave up by itself"
    assert (refused.code, refused.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
    assert refused.retry_seconds
    assert refused.trailers["grpc-retry-pushback-ms"] == "500"
    assert await broken.contents() == []
    # Nothing of it is left to wait for: no lock, no number.
    assert (await broken.send("again", request_id)).message.sequence == 1
    assert await broken.contents() == ["again"]


async def test_what_became_of_a_commit_is_asked_until_the_database_can_be_reached(
    broken: Scene,
) -> None:
    async def away() -> None:
        await broken.proxy.close()
        asyncio.get_running_loop().call_later(
            0.6, lambda: asyncio.ensure_future(broken.proxy.open())
        )

    broken.proxy.faults, broken.proxy.meanwhile = [Fault.CUT_AFTER], away

    assert (await broken.send("once")).message.sequence == 1
    assert broken.proxy.fired == 1


async def test_a_commit_that_nobody_can_tell_about_is_unknown_until_its_request_id_is_asked(
    broken: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indoubt, "RESOLVE_SECONDS", 0.3)
    broken.proxy.faults, broken.proxy.meanwhile = [Fault.CUT_AFTER], broken.proxy.close

    unknown = await failure(broken.send("once", "r-1"))

    assert broken.proxy.fired == 1
    assert (unknown.code, unknown.reason) == ("UNKNOWN", "COMMIT_OUTCOME_UNKNOWN")
    await broken.proxy.open()
    sent = await until(lambda: broken.send("once", "r-1"))
    assert sent.message.sequence == 1
    assert await broken.contents() == ["once"]


# A database that crashes, or becomes another one


@dataclass
class Victim:
    """A PostgreSQL that may be killed."""

    embedded: EmbeddedPostgres
    folder: Path

    @property
    def url(self) -> str:
        return plain(self.embedded.url)

    @property
    def superuser_url(self) -> str:
        return self.url.replace("parley@/parley", "postgres@/postgres")

    def postmaster(self) -> psutil.Process:
        pid_file = self.folder / "postgres" / "data" / "postmaster.pid"
        return psutil.Process(int(pid_file.read_text().splitlines()[0]))

    def kill(self) -> None:
        """The postmaster and all its children, at once."""
        postmaster = self.postmaster()
        kill([postmaster, *postmaster.children(recursive=True)])

    def write_nothing_behind(self) -> None:
        """Let nobody but a COMMIT bring to the disk what was done."""
        for process in children(self.postmaster().pid, "walwriter|checkpointer|background writer"):
            process.suspend()

    async def connection(self) -> asyncpg.Connection:
        """A connection, once there can be one."""
        return await until(lambda: asyncpg.connect(self.url))

    async def execute(self, statement: str) -> None:
        superuser = await asyncpg.connect(self.superuser_url)
        await superuser.execute(statement)
        await superuser.close()

    async def crash(self) -> None:
        self.kill()
        await (await self.connection()).close()

    async def crash_and_give_its_numbers_out_anew(self) -> None:
        """A crash that forgets the transaction at work, and another one under its number."""
        connection = await self.connection()
        xid = await connection.fetchval(
            "SELECT max(backend_xid::text::bigint)::text FROM pg_stat_activity"
        )
        await connection.close()
        self.kill()
        connection = await self.connection()
        while int(await connection.fetchval("SELECT pg_current_xact_id()::text")) < int(xid):
            pass
        status = await connection.fetchval("SELECT pg_xact_status($1::text::xid8)", xid)
        assert status == "committed", "the number was not given out anew: the test tests nothing"
        await connection.close()

    async def migrated_to(self, revision: str) -> None:
        connection = await self.connection()
        await connection.execute(f"UPDATE alembic_version SET version_num = '{revision}'")
        await connection.close()

    async def become_standby(self) -> None:
        (self.folder / "postgres" / "data" / "standby.signal").touch()
        await self.crash()

    async def promote(self) -> None:
        await self.execute("SELECT pg_promote()")

    async def fail_over(self) -> None:
        await self.become_standby()
        await self.promote()


@pytest_asyncio.fixture(scope="module")
async def victims(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Victim]:
    folder = tmp_path_factory.mktemp("victim")
    embedded = EmbeddedPostgres(folder)
    with pytest.MonkeyPatch.context() as patch:
        # One that dies again and again is started again at once all the same.
        patch.setattr("service.embedded.SETTLED", 0.0)
        await embedded.start()
        await schema.migrate(embedded.url)
        yield Victim(embedded, folder)
        await embedded.stop()


@pytest_asyncio.fixture
async def victim(victims: Victim) -> AsyncIterator[Victim]:
    """That PostgreSQL, up again after each test whatever became of it."""
    yield victims
    connection = await victims.connection()
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        await victims.promote()
    await connection.close()


async def test_after_a_crash_another_transactions_number_is_not_taken_for_ones_own(
    victim: Victim, tmp_path: Path
) -> None:
    async with scene(victim.url, tmp_path) as here:
        here.proxy.meanwhile = victim.crash_and_give_its_numbers_out_anew
        here.proxy.faults = [Fault.CUT_BEFORE]
        victim.write_nothing_behind()
        unknown = await failure(here.rename("without"))

        assert await until(here.title) == ""
        here.proxy.faults = [Fault.CUT_BEFORE]
        victim.write_nothing_behind()
        renamed = await here.rename("with", "r-1")

        assert here.proxy.fired == 2
        assert (unknown.code, unknown.reason) == ("UNKNOWN", "COMMIT_OUTCOME_UNKNOWN")
        assert await until(here.title) == "with"
        assert (await here.rename("with", "r-1")).conversation.etag == renamed.conversation.etag


async def test_a_transaction_that_a_crash_forgot_certainly_had_no_effect(
    victim: Victim, tmp_path: Path
) -> None:
    async with scene(victim.url, tmp_path) as here:
        here.proxy.faults, here.proxy.meanwhile = [Fault.CUT_BEFORE], victim.crash

        refused = await failure(here.send("never"))

        assert here.proxy.fired == 1
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
        assert await until(here.contents) == []


@pytest.mark.parametrize("how", [Victim.crash, Victim.fail_over])
async def test_a_commit_before_a_crash_or_a_failover_is_known_by_its_request_id(
    victim: Victim, tmp_path: Path, how: Callable[[Victim], Awaitable[None]]
) -> None:
    async with scene(victim.url, tmp_path) as here:
        here.proxy.meanwhile = lambda: how(victim)
        here.proxy.faults = [Fault.CUT_AFTER]
        renamed = await here.rename("with", "r-1")

        await until(here.title)
        here.proxy.faults = [Fault.CUT_AFTER]
        unknown = await failure(here.rename("without"))

        assert here.proxy.fired == 2
        assert renamed.conversation.title == "with"
        assert (unknown.code, unknown.reason) == ("UNKNOWN", "COMMIT_OUTCOME_UNKNOWN")
        # It was done once, and is not done again.
        assert (await until(lambda: here.rename("with", "r-1"))).conversation.title == "without"


@pytest.mark.parametrize("how", [Victim.crash, Victim.fail_over])
async def test_a_send_before_a_crash_or_a_failover_is_known_by_its_message(
    victim: Victim, tmp_path: Path, how: Callable[[Victim], Awaitable[None]]
) -> None:
    async with scene(victim.url, tmp_path) as here:
        here.proxy.faults, here.proxy.meanwhile = [Fault.CUT_AFTER], lambda: how(victim)

        sent = await here.send("once")

        assert here.proxy.fired == 1
        assert await until(here.contents) == ["once"]
        (stored,) = await here.client.all_messages(here.talk)
        assert stored == sent.message


async def test_of_several_sends_whose_answer_was_lost_each_is_told_its_own(
    broken: Scene,
) -> None:
    """Those that are remembered, one that is new, and a repetition: all in one statement."""
    talks = [await broken.client.conversation(broken.ada) for _ in range(4)]
    for talk in talks[:3]:
        await broken.client.message(talk, broken.ada, "before")
    broken.proxy.faults = [Fault.CUT_AFTER]

    answers = await asyncio.gather(
        *(broken.client.message(talk, broken.ada, f"in {n}") for n, talk in enumerate(talks)),
        broken.send("twice", "r-1"),
        broken.send("twice", "r-1"),
    )

    assert broken.proxy.fired == 1
    assert answers[4] == answers[5]
    for talk, sent in zip(talks, answers, strict=False):
        assert (await broken.client.all_messages(talk))[-1] == sent
    assert await broken.contents() == ["twice"]


async def test_a_standby_is_read_and_not_written_until_it_is_promoted(
    victim: Victim, tmp_path: Path
) -> None:
    async with serving(victim.url, tmp_path) as (_, client):
        ada = await client.user()
        talk = await client.conversation(ada)
        await victim.become_standby()

        unaware = Store(victim.url)
        with pytest.raises(Unavailable, match="DATABASE_READ_ONLY"):
            async with unaware.transaction():
                pass
        await unaware.close()
        await until(lambda: says(client, "NOT_SERVING"))
        assert (await until(lambda: client.seen(talk))).id == talk.id
        refused = await failure(client.message(talk, ada))
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "DATABASE_READ_ONLY")
        assert refused.retry_seconds

        await victim.promote()
        await until(lambda: says(client, "SERVING"))
        assert (await client.message(talk, ada)).sequence == 1


async def test_a_database_that_is_read_only_by_default_is_not_written(
    victim: Victim, tmp_path: Path
) -> None:
    async with serving(victim.url, tmp_path) as (_, client):
        await victim.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        await victim.execute("SELECT pg_reload_conf()")
        try:
            await until(lambda: says(client, "NOT_SERVING"))
            refused = await failure(client.user())
            assert (refused.code, refused.reason) == ("UNAVAILABLE", "DATABASE_READ_ONLY")
        finally:
            superuser = await asyncpg.connect(
                victim.superuser_url, server_settings={"default_transaction_read_only": "off"}
            )
            await superuser.execute("ALTER SYSTEM RESET default_transaction_read_only")
            await superuser.execute("SELECT pg_reload_conf()")
            await superuser.close()
        await until(lambda: says(client, "SERVING"))
        await client.user()


async def test_an_older_schema_is_not_served_and_the_log_says_what_to_do(
    victim: Victim, tmp_path: Path, lines: list[MutableMapping[str, Any]]
) -> None:
    needed = schema.needed_revision()
    async with serving(victim.url, tmp_path) as (_, client):
        await victim.migrated_to("0000")
        await until(lambda: says(client, "NOT_SERVING"))
        await victim.migrated_to("9999")
        await until(lambda: says(client, "SERVING"))
        await victim.migrated_to(needed)

    (line,) = [line for line in lines if line["event"] == "not_serving"]
    assert "run `parley migrate`" in line["reason"]


async def until(call: Callable[[], Awaitable[Answer]], seconds: float = 3) -> Answer:
    """The answer to a call, repeated until it gives one: no later than a database may need."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            return await call()
        except (OSError, AssertionError, asyncpg.PostgresError, grpc.aio.AioRpcError):
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(0.02)


async def says(client: Client, status: str) -> None:
    assert await health(client.channel) == status


async def _backend(snapshot: Snapshot) -> int:
    (row,) = await snapshot.connection.fetch("SELECT pg_backend_pid() AS pid")
    pid: int = row["pid"]
    return pid
