"""Passwords: set, verified, and nothing learnt from a failure."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import pytest
import pytest_asyncio

from parley.v1 import user_pb2 as pb
from service import tokens
from service.embedded import EmbeddedPostgres
from service.identity import Scope
from service.passwords import MAX_PENDING, THREADS
from service.repositories.passwords import WAIT
from service.server import Server

from ..make import NOBODY, Client, User, failure, failure_of, insist

REFUSED = pb.VerifyPasswordResponse()


async def hash_of(database: asyncpg.Connection, user: User) -> str:
    found = await database.fetchval("SELECT password_hash FROM users WHERE id = $1", UUID(user.id))
    return str(found)


async def fail(client: Client, times: int, **login: str) -> None:
    for _ in range(times):
        assert await client.verify("wrong", **login) == REFUSED


# Set


@pytest.mark.parametrize("password", ["secret", " ", "é" * 512, "🚀\n\t\x01", "e\u0301"])
async def test_a_password_is_verified_by_id_username_and_email(
    parley: Client, password: str
) -> None:
    ada = await parley.user("ada", email="Ada@example.org")
    await parley.set_password("ada", password)
    for login in ({"user_id": ada.id}, {"user_id": "ada"}, {"email": "ADA@example.org"}):
        answer = await parley.verify(password, **login)
        assert answer == pb.VerifyPasswordResponse(verified=True, user=ada)


async def test_of_a_password_only_a_slow_salted_hash_is_kept(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada, bob = await parley.user("ada"), await parley.user("bob")
    for user in (ada, bob):
        await parley.set_password(user, "correct horse")

    hashes = [await hash_of(database, user) for user in (ada, bob)]

    assert hashes[0] != hashes[1]
    assert all(each.startswith("$argon2id$v=19$m=19456,t=2,p=1$") for each in hashes)
    tables = await database.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
    )
    for (table,) in tables:
        rows = await database.fetch(f"SELECT t::text FROM {table} AS t")
        assert "horse" not in str(rows)
    assert await database.fetchval("SELECT count(*) FROM requests") == 0


async def test_the_last_password_counts(parley: Client) -> None:
    ada = await parley.user("ada")
    await parley.set_password(ada, "one")
    await parley.set_password(ada, "two")
    assert not (await parley.verify("one", user_id="ada")).verified
    assert (await parley.verify("two", user_id="ada")).verified


async def test_a_password_changes_nothing_that_is_seen_so_it_can_be_set_again(
    parley: Client,
) -> None:
    ada = await parley.user("ada")
    for _ in range(2):
        await parley.set_password(ada, "secret", etag=ada.etag)
    assert await parley.who(ada) == ada

    await parley.update_user(ada, full_name="Ada")
    refused = await failure(parley.set_password(ada, "other", etag=ada.etag))
    assert (refused.code, refused.reason) == ("ABORTED", "ETAG_MISMATCH")
    refused = await failure(parley.set_password(ada, "other", etag="x"))
    assert refused.violations == {"etag": "INVALID_ETAG"}
    assert (await parley.verify("secret", user_id="ada")).verified


async def test_an_actor_sets_its_own_password_only(parley: Client) -> None:
    ada, eve = await parley.user("ada"), await parley.user("eve")
    await parley.acting_as(ada).set_password("ada", "secret")

    refused = await failure(parley.acting_as(eve).set_password(ada, "mine"))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    missing = await failure(parley.set_password(NOBODY, "secret"))
    assert (missing.code, missing.reason) == ("NOT_FOUND", "USER_NOT_FOUND")
    assert (await parley.verify("secret", user_id="ada")).verified


@pytest.mark.parametrize(
    ("password", "reason"),
    [
        ("", "REQUIRED"),
        ("x" * 1025, "FIELD_TOO_LONG"),
        ("é" * 513, "FIELD_TOO_LONG"),
        ("a\0b", "INVALID_CHARACTER"),
    ],
)
async def test_a_bad_password_is_refused_before_it_is_hashed(
    parley: Client, work: list[str], password: str, reason: str
) -> None:
    await parley.user("ada")
    for call in (parley.set_password("ada", password), parley.verify(password, user_id="ada")):
        refused = await failure(call)
        assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", {"password": reason})
        assert password not in refused.message or not password
    assert work == []


@pytest.mark.parametrize(
    ("login", "violations"),
    [
        ({}, {"user_id": "REQUIRED"}),
        ({"user_id": ""}, {"user_id": "REQUIRED"}),
        ({"email": ""}, {"user_id": "REQUIRED"}),
        ({"user_id": "two words"}, {"user_id": "INVALID_REFERENCE"}),
        ({"email": "nowhere"}, {"email": "INVALID_EMAIL"}),
    ],
    ids=str,
)
async def test_a_login_names_somebody_in_one_way(
    parley: Client, login: dict[str, str], violations: dict[str, str]
) -> None:
    refused = await failure(parley.verify("secret", **login))
    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", violations)


# One answer


@pytest.fixture
def work(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hashes that are checked, each without its salt and sum; checked they are all the same."""
    done: list[str] = []
    matches = server.hasher._matches

    def note(password_hash: str, password: str) -> bool:
        done.append(password_hash.rsplit("$", 2)[0])
        return matches(password_hash, password)

    monkeypatch.setattr(server.hasher, "_matches", note)
    return done


LOGINS = {
    "nobody of that name": {"user_id": "nobody"},
    "nobody of that id": {"user_id": NOBODY},
    "nobody of that email": {"email": "nobody@example.org"},
    "wrong password": {"user_id": "eve"},
    "wrong password, by email": {"email": "eve@example.org"},
    "no password": {"user_id": "bare"},
    "inactive": {"user_id": "idle"},
    "deleted": {"user_id": "dead"},
}


@pytest_asyncio.fixture
async def people(parley: Client) -> AsyncIterator[None]:
    """Somebody for each login; the password is `secret`, but Eve's is another."""
    for name in ("eve", "bare", "idle", "dead"):
        await parley.user(name, email=f"{name}@example.org")
    await parley.set_password("eve", "another")
    for name in ("idle", "dead"):
        await parley.set_password(name, "secret")
    await parley.update_user("idle", is_active=False)
    await parley.delete_user("dead")
    yield


@pytest.mark.parametrize("login", LOGINS.values(), ids=LOGINS)
async def test_every_failure_is_the_same_answer_for_the_same_work(
    parley: Client, people: None, work: list[str], server: Server, login: dict[str, str]
) -> None:
    """Not by the clock alone, which a busy machine bends: by what is done, and at least so long."""
    call = parley.verify("secret", **login)
    assert await call == REFUSED
    assert (await call).SerializeToString() == b""
    assert [key for key, _ in tuple(await call.trailing_metadata())] == []
    assert work == ["$argon2id$v=19$m=19456,t=2,p=1"]

    # The quickest of three: what else the machine does can only make them longer.
    hashes, refusals = [], []
    for _ in range(3):
        started = time.perf_counter()
        await server.hasher.verify(None, "secret")
        hashes.append(time.perf_counter() - started)
        started = time.perf_counter()
        assert await parley.verify("secret", **login) == REFUSED
        refusals.append(time.perf_counter() - started)
    assert min(refusals) > min(hashes) / 2


async def test_who_comes_back_is_let_in_again(parley: Client, people: None) -> None:
    await parley.update_user("idle", is_active=True)
    await parley.undelete_user("dead")
    for name in ("idle", "dead"):
        assert (await parley.verify("secret", user_id=name)).verified


# Not too often


async def test_after_five_failures_in_a_minute_a_user_is_not_even_asked(
    parley: Client, database: asyncpg.Connection, work: list[str]
) -> None:
    ada = await parley.user("ada", email="ada@example.org")
    bob = await parley.user("bob")
    for user in (ada, bob):
        await parley.set_password(user, "secret")
    # What succeeds does not count.
    for _ in range(7):
        assert (await parley.verify("secret", user_id="ada")).verified
    # By whatever name.
    await fail(parley, 2, user_id="ada")
    await fail(parley, 2, email="ada@example.org")
    await fail(parley, 1, user_id=ada.id)
    del work[:]

    for login in ({"user_id": "ada"}, {"user_id": ada.id}, {"email": "ADA@example.org"}):
        refused = await failure(parley.verify("secret", **login))
        assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")
        assert refused.retry_seconds
        assert 50 < refused.retry_seconds <= 60
        assert refused.quota == "failed passwords of one user in a minute"
    assert work == []
    assert (await parley.verify("secret", user_id="bob")).verified

    # The first of the five is a minute old: one more, and it is full again.
    await database.execute(
        "UPDATE password_failures SET failed_at = failed_at - interval '1 minute'"
        " WHERE id IN (SELECT id FROM password_failures ORDER BY failed_at LIMIT 2)"
    )
    await fail(parley, 1, user_id="ada")
    assert (await failure(parley.verify("secret", user_id="ada"))).reason == "RATE_LIMITED"
    await database.execute("UPDATE password_failures SET failed_at = now() - interval '1 minute'")
    assert (await parley.verify("secret", user_id="ada")).verified


@pytest.mark.parametrize(
    ("login", "same"),
    [
        ({"user_id": "nobody"}, {"user_id": "nobody"}),
        ({"user_id": NOBODY}, {"user_id": NOBODY.upper()}),
        ({"email": "nobody@example.org"}, {"email": "NoBody@example.org"}),
    ],
    ids=str,
)
async def test_who_does_not_exist_is_refused_like_anybody(
    parley: Client, login: dict[str, str], same: dict[str, str]
) -> None:
    await parley.user("ada")
    await fail(parley, 5, user_id="ada")
    await fail(parley, 5, **login)

    one, other = [await failure(parley.verify("x", **who)) for who in ({"user_id": "ada"}, same)]

    assert (one.code, one.message, one.known) == (other.code, other.message, other.known)
    assert one.reason == other.reason == "RATE_LIMITED"
    assert not (await parley.verify("x", user_id="somebody-else")).verified


async def test_of_16_who_guess_at_once_five_are_asked(
    parley: Client, database: asyncpg.Connection
) -> None:
    ada = await parley.user("ada")
    await parley.set_password(ada, "secret")

    async def guess(number: int) -> str:
        try:
            await insist(lambda: parley.verify(f"guess {number}", user_id="ada"))
        except grpc.aio.AioRpcError as error:
            return failure_of(error).reason
        return "asked"

    outcomes = await asyncio.gather(*map(guess, range(16)))

    assert sorted(outcomes) == ["RATE_LIMITED"] * 11 + ["asked"] * 5
    # A user's and its caller's: nothing that tells who it was.
    keys = await database.fetch("SELECT key, count(*) FROM password_failures GROUP BY key")
    assert [row["count"] for row in keys] == [5, 5]


async def test_a_caller_has_a_limit_too_which_is_no_other_callers(
    parley: Client, postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.verifying.MAX_FAILURES_OF_CALLER", 4)
    scopes = [Scope.VERIFY_PASSWORD]
    token = await tokens.create(postgres.url, service="shop", scopes=scopes, expires_in=None)
    shop = Client(parley.channel, token)
    await parley.user("ada")
    await parley.set_password("ada", "secret")
    for name in ("a", "b", "c", "ada"):
        await fail(shop, 1, user_id=name)

    refused = await failure(shop.verify("secret", user_id="ada"))

    assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")
    assert refused.quota == "failed passwords of one caller in a minute"
    assert (await parley.verify("secret", user_id="ada")).verified


async def test_old_failures_are_forgotten(
    parley: Client, server: Server, database: asyncpg.Connection
) -> None:
    await fail(parley, 2, user_id="nobody")
    await database.execute(
        "UPDATE password_failures SET failed_at = failed_at - interval '1 minute'"
        " WHERE id IN (SELECT id FROM password_failures ORDER BY id LIMIT 2)"
    )
    async with server.store.transaction() as transaction:
        await transaction.passwords.prune()
    assert await database.fetchval("SELECT count(*) FROM password_failures") == 2


async def test_failures_are_counted_by_an_index(
    parley: Client, database: asyncpg.Connection
) -> None:
    async with database.transaction():
        await database.execute(
            "INSERT INTO password_failures (key)"
            " SELECT sha256((n % 5000)::text::bytea) FROM generate_series(1, 50000) AS n"
        )
        await database.execute("ANALYZE password_failures")
        rows = await database.fetch(f"EXPLAIN {WAIT}", [b"k" * 32, b"c" * 32], [5, 300])
    plan = "\n".join(row[0] for row in rows)
    assert "ix_password_failures_key_failed_at" in plan
    assert "Seq Scan" not in plan


# Where nobody else waits


@pytest_asyncio.fixture
async def gate(server: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[threading.Event]:
    """While it is shut, hashing takes for ever."""
    gate = threading.Event()
    matches = server.hasher._matches

    def wait(password_hash: str, password: str) -> bool:
        gate.wait(30)
        return matches(password_hash, password)

    monkeypatch.setattr(server.hasher, "_matches", wait)
    yield gate
    gate.set()


async def pending(server: Server, count: int) -> None:
    async with asyncio.timeout(10):
        while server.hasher._pending < count:
            await asyncio.sleep(0.005)


async def test_while_passwords_are_hashed_nobody_else_waits(
    parley: Client, server: Server, gate: threading.Event
) -> None:
    """However long a hash takes: the event loop and the database's connections are free."""
    ada = await parley.user("ada")
    talk = await parley.conversation(ada)
    await parley.set_password(ada, "secret")
    calls = [
        asyncio.ensure_future(insist(partial(parley.verify, "x", user_id=f"nobody-{n}")))
        for n in range(MAX_PENDING - 1)
    ]
    calls.append(asyncio.ensure_future(parley.verify("secret", user_id="ada")))
    await pending(server, MAX_PENDING)

    assert await parley.who(ada) == ada
    await asyncio.gather(*(insist(lambda: parley.message(talk, ada)) for _ in range(50)))
    assert (await parley.seen(talk)).last_sequence == 50
    assert not any(call.done() for call in calls)

    gate.set()
    answers = await asyncio.gather(*calls)
    assert [answer.verified for answer in answers] == [False] * (MAX_PENDING - 1) + [True]


async def test_more_passwords_than_the_queue_holds_are_refused_at_once(
    parley: Client, server: Server, gate: threading.Event
) -> None:
    ada = await parley.user("ada")
    waiting = [
        asyncio.ensure_future(insist(partial(parley.verify, "x", user_id=f"nobody-{n}")))
        for n in range(MAX_PENDING)
    ]
    await pending(server, MAX_PENDING)

    for call in (parley.verify("secret", user_id="ada"), parley.set_password(ada, "secret")):
        refused = await failure(call)
        assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_PASSWORDS")
        assert refused.retry_seconds == 0.5
        assert refused.trailers["grpc-retry-pushback-ms"] == "500"
    # Whoever is refused for another reason is not told about the queue.
    assert (await failure(parley.set_password(NOBODY, "secret"))).code == "NOT_FOUND"

    gate.set()
    assert await asyncio.gather(*waiting) == [REFUSED] * MAX_PENDING
    # Nothing was held against whoever was not asked.
    await parley.set_password(ada, "secret")
    assert (await parley.verify("secret", user_id="ada")).verified


async def test_a_client_that_goes_leaves_no_place_taken(
    parley: Client, server: Server, gate: threading.Event
) -> None:
    calls = [parley.verify("x", user_id=f"nobody-{n}") for n in range(3)]
    await pending(server, 3)
    for call in calls:
        call.cancel()
    gate.set()
    async with asyncio.timeout(10):
        while server.hasher._pending:
            await asyncio.sleep(0.005)


async def test_hashing_has_two_threads_of_its_own(parley: Client, server: Server) -> None:
    at_work, most = 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        assert threading.current_thread().name.startswith("password")
        time.sleep(0.01)
        with lock:
            at_work -= 1

    run: Callable[[Callable[[], None]], Awaitable[Any]] = server.hasher._run
    await asyncio.gather(*(run(work) for _ in range(8)))
    assert most == THREADS
