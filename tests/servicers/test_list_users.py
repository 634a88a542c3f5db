"""ListUsers: its filters, its pages, and the index that each filter walks."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg

from parley.v1 import conversation_pb2
from parley.v1 import user_pb2 as pb
from service.repositories.users import Users

from ..make import NOBODY, Client, failure


def struct(**values: Any) -> Struct:
    made = Struct()
    made.update(values)
    return made


def list_(client: Client, **filters: Any) -> Any:
    return client.users.ListUsers(pb.ListUsersRequest(**filters))


async def names(client: Client, **filters: Any) -> list[str]:
    return [user.username for user in (await list_(client, **filters)).users]


async def test_users_are_listed_whole_and_newest_first(parley: Client) -> None:
    ada = await parley.user("ada", email="ada@example.org", metadata=struct(a=1), external_id="7")
    bob = await parley.user("bob")
    assert list((await list_(parley)).users) == [bob, ada]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"username_prefix": "ada"}, ["ada%", "ada"]),
        ({"username_prefix": "A"}, ["Ada"]),
        # What is a wildcard elsewhere is a letter here.
        ({"username_prefix": "ada%"}, ["ada%"]),
        ({"username_prefix": "%"}, []),
        ({"username_prefix": "_"}, ["_\\"]),
        ({"username_prefix": "_\\"}, ["_\\"]),
        ({"username_prefix": "\\"}, []),
        ({"username_prefix": "/"}, []),
        ({"username_prefix": "🚀"}, ["🚀"]),
        ({"email": "ADA@example.ORG"}, ["ada"]),
        ({"email": "žofie@example.org"}, ["Ada"]),
        ({"email": "nobody@example.org"}, []),
        ({"external_id": "x/7"}, ["ada"]),
        ({"external_id": "x"}, []),
        ({"full_name_contains": "LOVE"}, ["ada"]),
        ({"full_name_contains": "É"}, ["Ada"]),
        ({"full_name_contains": "%"}, ["ada%"]),
        ({"full_name_contains": "_"}, []),
        ({"is_active": True}, ["🚀", "_\\", "Ada", "ada"]),
        ({"is_active": False}, ["ada%"]),
        ({"metadata_contains": struct(team="red")}, ["Ada", "ada"]),
        ({"metadata_contains": struct(tags=[{"a": 1}])}, ["Ada"]),
        ({"metadata_contains": struct(team="red"), "username_prefix": "a"}, ["ada"]),
        ({"is_active": False, "full_name_contains": "love"}, []),
        ({"metadata_contains": struct(**{"'; DROP": "TABLE"})}, []),
    ],
    ids=str,
)
async def test_a_filter_finds_what_it_says_and_nothing_else(
    parley: Client, filters: dict[str, Any], expected: list[str]
) -> None:
    await parley.user(
        "ada",
        email="ada@example.org",
        full_name="Ada Lovelace",
        external_id="x/7",
        metadata=struct(team="red"),
    )
    await parley.user(
        "Ada",
        email="Žofie@example.org",
        full_name="René",
        metadata=struct(team="red", tags=[{"a": 1, "b": 2}, 3]),
    )
    await parley.user("ada%", full_name="100 %", is_active=False, metadata=struct(team="blue"))
    await parley.user("_\\")
    await parley.user("🚀")
    assert await names(parley, **filters) == expected


async def test_times_are_half_open(parley: Client) -> None:
    start = (await parley.user("one")).create_time
    end = (await parley.user("two")).create_time
    later = Timestamp()
    later.FromDatetime(end.ToDatetime() + timedelta(microseconds=1))

    assert await names(parley, created_after=start) == ["two", "one"]
    assert await names(parley, created_before=end) == ["one"]
    assert await names(parley, created_after=end, created_before=later) == ["two"]


async def test_deleted_users_are_listed_on_request_and_purged_ones_never(parley: Client) -> None:
    for name in ("ada", "bob", "eve"):
        await parley.user(name)
    for name in ("ada", "eve"):
        await parley.delete_user(name)
    await parley.purge_user("eve")

    assert await names(parley) == ["bob"]
    shown = (await list_(parley, show_deleted=True)).users
    assert [(user.username, user.HasField("delete_time")) for user in shown] == [
        ("bob", False),
        ("ada", True),
    ]


@pytest.mark.parametrize(
    ("filters", "field", "reason"),
    [
        ({"page_size": -1}, "page_size", "INVALID_PAGE_SIZE"),
        ({"page_token": "x"}, "page_token", "INVALID_PAGE_TOKEN"),
        ({"username_prefix": "x" * 65}, "username_prefix", "FIELD_TOO_LONG"),
        ({"username_prefix": "\0"}, "username_prefix", "INVALID_CHARACTER"),
        ({"email": "nowhere"}, "email", "INVALID_EMAIL"),
        ({"external_id": "x" * 257}, "external_id", "FIELD_TOO_LONG"),
        ({"full_name_contains": "x" * 257}, "full_name_contains", "FIELD_TOO_LONG"),
        ({"full_name_contains": "a\nb"}, "full_name_contains", "INVALID_CHARACTER"),
        ({"created_after": Timestamp(nanos=-1)}, "created_after", "INVALID_TIME"),
        ({"created_before": Timestamp(seconds=1 << 60)}, "created_before", "INVALID_TIME"),
        ({"metadata_contains": struct(a=float("nan"))}, "metadata_contains.a", "INVALID_METADATA"),
        (
            {"created_after": Timestamp(seconds=2), "created_before": Timestamp(seconds=1)},
            "created_before",
            "INVALID_TIME_RANGE",
        ),
    ],
)
async def test_a_bad_filter_is_named_with_its_rule(
    parley: Client, filters: dict[str, Any], field: str, reason: str
) -> None:
    refused = await failure(list_(parley, **filters))
    assert (refused.code, refused.violations) == ("INVALID_ARGUMENT", {field: reason})


@pytest.mark.parametrize(("size", "expected"), [(0, 50), (1, 1), (1000, 1000), (2**31 - 1, 1000)])
async def test_a_page_has_50_users_unless_asked_and_1000_at_the_most(
    parley: Client, database: asyncpg.Connection, size: int, expected: int
) -> None:
    await fill(database, 1_001)
    assert len((await list_(parley, page_size=size)).users) == expected


async def test_pages_show_what_was_there_once_each_while_more_come(
    parley: Client, database: asyncpg.Connection
) -> None:
    there = [(await parley.user()).id for _ in range(9)]
    # Half of them at the same moment: their ids decide.
    await database.execute(
        "UPDATE users SET created_at = (SELECT min(created_at) FROM users)"
        " WHERE id = ANY($1::uuid[])",
        there[:5],
    )
    seen: list[str] = []
    token = ""
    while True:
        page = await list_(parley, page_size=2, page_token=token)
        seen += [user.id for user in page.users]
        await parley.user()
        if not (token := page.next_page_token):
            break
        assert len(page.users) == 2
    assert seen == there[:4:-1] + sorted(there[:5], reverse=True)


async def test_a_page_ends_at_a_megabyte_and_the_next_one_goes_on(
    parley: Client, database: asyncpg.Connection
) -> None:
    await fill(database, 100, "jsonb_build_object('a', repeat('x', 16000))")
    one = await list_(parley, page_size=1_000)
    two = await list_(parley, page_size=1_000, page_token=one.next_page_token)
    assert 900_000 < one.ByteSize() <= 1 << 20
    assert len({user.id for user in (*one.users, *two.users)}) == 100
    assert two.next_page_token == ""


async def test_a_page_token_is_for_its_own_list_alone(parley: Client) -> None:
    for name in ("ada", "bob"):
        await parley.user(name)
    token = (await list_(parley, page_size=1, is_active=True)).next_page_token

    async def reason(call: Any) -> str:
        refused = await failure(call)
        assert refused.code == "INVALID_ARGUMENT"
        assert list(refused.violations) == ["page_token"]
        return refused.reason

    # Another page size is the same list.
    assert await names(parley, page_size=7, is_active=True, page_token=token) == ["ada"]
    for call in (
        list_(parley, page_token=token),
        list_(parley, is_active=False, page_token=token),
        list_(parley, is_active=True, show_deleted=True, page_token=token),
        list_(parley, is_active=True, username_prefix="a", page_token=token),
        parley.conversations.ListConversations(
            conversation_pb2.ListConversationsRequest(is_active=True, page_token=token)
        ),
    ):
        assert await reason(call) == "PAGE_TOKEN_MISMATCH"
    # Cut, longer, each of its characters another one.
    other_letters = [
        token[:n] + ("A" if token[n] != "A" else "B") + token[n + 1 :] for n in range(len(token))
    ]
    for forged in (token[:-1], token[1:], token + "A", token + "=", "A" * 64, *other_letters):
        call = list_(parley, is_active=True, page_token=forged)
        assert await reason(call) in ("INVALID_PAGE_TOKEN", "PAGE_TOKEN_MISMATCH")


# On a large table


async def fill(database: asyncpg.Connection, count: int, metadata: str = "'{}'::jsonb") -> None:
    """Users of every kind, a second apart; of every hundred one is not active."""
    await database.execute(
        "INSERT INTO users (username, email, full_name, external_id, is_active, metadata,"
        " created_at) SELECT md5(n::text), n || '@example.org', 'User ' || n, 'x' || n,"
        f" n % 100 > 0, {metadata}, timestamptz '2026-01-01' + n * interval '1 s'"
        " FROM generate_series(1, $1) AS n",
        count,
    )


@pytest_asyncio.fixture(scope="module")
async def crowd(database: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """Thirty thousand users, of whom the planner knows."""
    transaction = database.transaction()
    await transaction.start()
    await fill(
        database,
        30_000,
        "CASE WHEN n % 1000 = 0 THEN jsonb_build_object('team', n) ELSE '{}' END",
    )
    await database.execute("ANALYZE users")
    yield database
    await transaction.rollback()


class Asked:
    """A connection that answers nothing, and remembers what it was asked."""

    async def rows(self, statement: Any) -> Sequence[Any]:
        dialect: Any = PGDialect_asyncpg
        compiled = statement.compile(dialect=dialect(), compile_kwargs={"render_postcompile": True})
        self.sql = str(compiled)
        self.arguments = [compiled.params[name] for name in compiled.positiontup]
        return ()


START = datetime(2026, 1, 1, tzinfo=UTC)
WALK = "Index Scan Backward using ix_users_created_at_id"


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        ({}, WALK),
        ({"show_deleted": True}, WALK),
        ({"is_active": True}, WALK),
        ({"is_active": False}, "Index Scan Backward using ix_users_inactive"),
        ({"created_after": START + timedelta(hours=8)}, WALK),
        ({"created_before": START + timedelta(hours=1)}, WALK),
        ({"after": (START + timedelta(hours=4), UUID(NOBODY))}, WALK),
        # A name has no index of its own: as good as any is the first page that has enough of them.
        ({"full_name_contains": "User 2"}, WALK),
        ({"username_prefix": "abcd"}, "uq_users_username"),
        ({"email": "77@EXAMPLE.org"}, "uq_users_email"),
        ({"external_id": "x77"}, "uq_users_external_id"),
        ({"metadata_contains": '{"team": 7000}'}, "ix_users_metadata"),
    ],
    ids=str,
)
async def test_every_filter_walks_an_index(
    crowd: asyncpg.Connection, filters: dict[str, Any], index: str
) -> None:
    asked = Asked()
    page: dict[str, Any] = {"show_deleted": False, "after": None, "limit": 51}
    await Users(asked).list(**{**page, **filters})  # type: ignore[arg-type]

    plan = "\n".join(row[0] for row in await crowd.fetch(f"EXPLAIN {asked.sql}", *asked.arguments))

    assert index in plan
    assert "Seq Scan" not in plan
    # In the order of the index; what finds few may sort them.
    assert ("Sort" in plan) == (
        index
        in ("uq_users_username", "ix_users_metadata", "uq_users_email", "uq_users_external_id")
    )
