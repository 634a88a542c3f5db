"""Every setting, its default and its meaning, once.

Each is an environment variable `PARLEY_<NAME>` and a flag of `parley serve` of the same name. The
flag wins.
"""

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """What `parley serve` needs to know."""

    model_config = SettingsConfigDict(env_prefix="PARLEY_", extra="ignore")

    address: str = Field("127.0.0.1:50051", description="Where to listen: HOST:PORT.")
    database_url: str = Field(
        "",
        description="PostgreSQL 18 to use: postgresql://… . Empty: an embedded one.",
        repr=False,
    )
    listen_url: str = Field(
        "",
        description="The same database past any pooler, to hear of what other processes commit.",
        repr=False,
    )
    data_dir: Path = Field(
        Path(".parley"), description="Holds the embedded PostgreSQL and the development token."
    )
    tls_chain: Path | None = Field(
        None, description="Certificate chain to serve TLS with, as PEM; read again when it changes."
    )
    tls_key: Path | None = Field(None, description="The chain's private key, as PEM.")
    tls_client_ca: Path | None = Field(
        None, description="Only clients with a certificate from this authority may connect."
    )
    plaintext_behind_mesh: bool = Field(
        False,
        description="Listen beyond this machine without TLS, because something in front has it.",
    )
    workers: int = Field(
        1, ge=1, le=64, description="Processes that serve, on the one port and database."
    )
    admin_address: str = Field(
        "", description="Where /healthz, /readyz and /metrics are served by HTTP. Empty: nowhere."
    )
    pool_size: int = Field(10, ge=2, le=200, description="Database connections of this process.")
    max_calls: int = Field(
        1_000, ge=1, le=100_000, description="Calls at work at once; more are told OVERLOADED."
    )
    calls_per_second: float = Field(
        0.0, ge=0, description="What one caller may ask of this process; 0: as much as it likes."
    )
    drain_seconds: float = Field(
        20.0, ge=0, le=300, description="How long calls may go on after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines to write."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="How: auto is console on a terminal, else one JSON object a line."
    )

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> str:
        return self.address.rpartition(":")[2]

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can call. Of names, only one is known to stay here."""
        try:
            return ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def token_file(self) -> Path:
        return self.data_dir / "token"


class ConfigurationError(Exception):
    """A setting that cannot be right; the text is one line for the operator."""


def load(**flags: Any) -> Settings:
    """The settings of the environment, with the flags that were given over them."""
    try:
        given = {name: value for name, value in flags.items() if value is not None}
        settings = Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        raise ConfigurationError(f"PARLEY_{name}: {first['msg']}") from None
    port = settings.port
    if not settings.host or not re.fullmatch("[0-9]{1,5}", port) or int(port) >= 1 << 16:
        raise ConfigurationError(f"PARLEY_ADDRESS: '{settings.address}' is not HOST:PORT.")
    return settings


def require_private(settings: Settings) -> None:
    """Raise where strangers could listen to what is said."""
    if (settings.tls_chain is None) != (settings.tls_key is None):
        missing = "KEY" if settings.tls_chain else "CHAIN"
        raise ConfigurationError(f"PARLEY_TLS_{missing}: set both TLS_CHAIN and TLS_KEY, or none.")
    if settings.tls_client_ca and not settings.tls_chain:
        raise ConfigurationError("PARLEY_TLS_CLIENT_CA: it needs PARLEY_TLS_CHAIN and _KEY.")
    if not settings.is_loopback and not settings.tls_chain and not settings.plaintext_behind_mesh:
        raise ConfigurationError(
            f"PARLEY_ADDRESS: {settings.address} can be reached from other machines: set "
            "PARLEY_TLS_CHAIN and PARLEY_TLS_KEY, or listen on 127.0.0.1, or say "
            "--plaintext-behind-mesh."
        )
