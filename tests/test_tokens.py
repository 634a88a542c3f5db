"""Callers' credentials, as an operator makes and ends them."""

import asyncio
from datetime import timedelta

import asyncpg
import pytest
from click.testing import CliRunner

from parley.v1 import user_pb2
from service import access, tokens
from service.cli import main
from service.embedded import EmbeddedPostgres

from .make import Client, failure

GET = user_pb2.GetUserRequest(user_id="ada")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seconds of remembering, in a tenth of one."""
    monkeypatch.setattr(access, "TOKEN_CACHE_SECONDS", 0.1)


async def made(postgres: EmbeddedPostgres, *scopes: str, days: float | None = None) -> str:
    return await tokens.create(
        postgres.url,
        service="shop",
        scopes=scopes,
        expires_in=timedelta(days=days) if days is not None else None,
    )


async def test_a_token_does_what_its_scopes_say(parley: Client, postgres: EmbeddedPostgres) -> None:
    await parley.user("ada")
    shop = Client(parley.channel, await made(postgres, "read", "act-as"), "ada")

    assert (await shop.users.GetUser(GET)).user.username == "ada"
    update = user_pb2.UpdateUserRequest(user_id="ada")
    assert (await failure(shop.users.UpdateUser(update))).reason == "SCOPE_REQUIRED"


async def test_only_the_hash_of_a_token_is_stored(
    postgres: EmbeddedPostgres, database: asyncpg.Connection
) -> None:
    token = await made(postgres, "read")
    key_id, secret = access.split_token(token)

    stored = await database.fetchval("SELECT t::text FROM tokens t WHERE key_id = $1", key_id)

    assert secret not in stored
    assert access.hash_of(secret).hex() in stored


async def test_two_tokens_of_one_service_work_until_one_is_revoked(
    parley: Client, postgres: EmbeddedPostgres, quick: None
) -> None:
    await parley.user("ada")
    old, new = [await made(postgres, "read", "act-as") for _ in range(2)]
    old_shop, new_shop = (Client(parley.channel, token, "ada") for token in (old, new))
    await asyncio.gather(old_shop.users.GetUser(GET), new_shop.users.GetUser(GET))

    assert await tokens.revoke(postgres.url, access.split_token(old)[0])
    await asyncio.sleep(0.15)

    refused = await failure(old_shop.users.GetUser(GET))
    assert (refused.code, refused.reason) == ("UNAUTHENTICATED", "INVALID_CREDENTIALS")
    await new_shop.users.GetUser(GET)


async def test_an_expired_token_is_refused_like_any_other_wrong_one(
    parley: Client, postgres: EmbeddedPostgres
) -> None:
    late = Client(parley.channel, await made(postgres, "read", days=-1), "ada")
    wrong = Client(parley.channel, "parley_aaaa_bbbb", "ada")

    assert await failure(late.users.GetUser(GET)) == await failure(wrong.users.GetUser(GET))


def command(postgres: EmbeddedPostgres, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["token", *words, "--database-url", postgres.url])
    return result.exit_code, result.output


async def test_the_command_line_makes_lists_and_ends_tokens(postgres: EmbeddedPostgres) -> None:
    def run(*words: str) -> tuple[int, str]:
        return command(postgres, *words)

    code, token = await asyncio.to_thread(run, "create", "--service", "billing", "--scope", "read")
    key_id, secret = access.split_token(token.strip())
    _, listing = await asyncio.to_thread(run, "list")
    ended = await asyncio.to_thread(run, "revoke", token.strip())
    unknown, _ = await asyncio.to_thread(run, "revoke", "feedbeef")

    assert code == 0
    assert secret
    (line,) = (line for line in listing.splitlines() if key_id in line)
    assert "billing" in line
    assert secret not in listing
    assert ended == (0, f"Revoked {key_id}.\n")
    assert unknown == 2
