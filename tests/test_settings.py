"""Settings: read from the environment and from flags, refused where they cannot be right."""

from pathlib import Path

import pytest

from service.doorbell import Doorbell
from service.driver import driver_url
from service.settings import ConfigurationError, load, require_private


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from around the tests."""
    for name in ("ADDRESS", "DATABASE_URL", "DATA_DIR", "POOL_SIZE"):
        monkeypatch.delenv(f"PARLEY_{name}", raising=False)


def test_without_any_setting_only_this_machine_is_served() -> None:
    settings = load()

    assert settings.address == "127.0.0.1:50051"
    assert settings.token_file == Path(".parley/token")
    require_private(settings)


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARLEY_POOL_SIZE", "7")

    assert load().pool_size == 7
    assert load(pool_size=8).pool_size == 8
    assert load(pool_size=None).pool_size == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POOL_SIZE", "abc"),
        ("POOL_SIZE", "1"),
        ("POOL_SIZE", "1000"),
        ("DRAIN_SECONDS", "-1"),
        ("DRAIN_SECONDS", "nan"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
        ("PLAINTEXT_BEHIND_MESH", "perhaps"),
        ("ADDRESS", ""),
        ("ADDRESS", "localhost"),
        ("ADDRESS", ":50051"),
        ("ADDRESS", "localhost:http"),
        ("ADDRESS", "localhost:-1"),
        ("ADDRESS", "localhost:65536"),
        ("ADDRESS", "localhost:99999"),
        ("ADDRESS", "localhost:٥٠"),
        ("ADDRESS", "localhost:" + "9" * 5000),
        ("ADDRESS", "unix:/tmp/parley"),
    ],
)
def test_what_cannot_be_right_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"PARLEY_{name}", value)

    with pytest.raises(ConfigurationError, match=rf"^PARLEY_{name}: ") as refused:
        load()

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "[::1]"])
def test_a_loopback_address_needs_no_tls(host: str) -> None:
    require_private(load(address=f"{host}:0"))


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.1", "127.example.com", "parley"])
def test_any_other_address_must_be_wanted(host: str) -> None:
    with pytest.raises(ConfigurationError, match="--plaintext-behind-mesh"):
        require_private(load(address=f"{host}:0"))

    require_private(load(address=f"{host}:0", plaintext_behind_mesh=True))


def test_the_database_url_with_its_password_is_in_no_repr() -> None:
    assert "hunter2" not in repr(load(database_url="postgresql://parley:hunter2@db/parley"))


@pytest.mark.parametrize(
    ("url", "spelled"),
    [
        ("postgresql://db/parley", "postgresql+asyncpg://db/parley"),
        ("postgres://a:b%40c@db:5433/parley", "postgresql+asyncpg://a:b%40c@db:5433/parley"),
        ("postgresql+asyncpg://db/parley", "postgresql+asyncpg://db/parley"),
        ("postgresql://db/parley?sslmode=require", "postgresql+asyncpg://db/parley?ssl=require"),
        ("postgresql://a@/b?host=/run/pg", "postgresql+asyncpg://a@/b?host=%2Frun%2Fpg"),
    ],
)
def test_a_database_url_as_others_spell_it_is_understood(url: str, spelled: str) -> None:
    assert driver_url(url) == spelled


def test_an_address_to_listen_at_is_looked_at_before_the_start_too() -> None:
    with pytest.raises(ConfigurationError, match=r"^PARLEY_LISTEN_URL: ") as refused:
        Doorbell("mysql://parley:hunter2@db/parley")

    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "db.internal",
        "mysql://parley:hunter2@db/parley",
        "postgresql+psycopg://parley:hunter2@db/parley",
        "postgresql://parley:hunter2@db:port/parley",
        "postgresql://parley:hunter2@db/parley?nonsense=1",
    ],
)
def test_any_other_database_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^PARLEY_DATABASE_URL: ") as refused:
        driver_url(url)

    assert "hunter2" not in str(refused.value)
