"""`parley`: serve, migrate, import, watch, token, db."""

import asyncio
import os
import shlex
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.table import Table

from service import eras, logs, metrics, schema, tokens
from service.access import split_token
from service.admin import Admin
from service.embedded import EmbeddedPostgres, EmbeddedPostgresError
from service.errors import ParleyError
from service.identity import Scope
from service.importer import ImportFailedError, Report, import_files
from service.server import Server, development_token, until_signal
from service.settings import ConfigurationError, Settings, load, require_private
from service.watcher import WatchFailedError, watch_lines, watch_request
from service.workers import NOT_SERVING, SERVING, Workers, end_with_standard_input

FAILED = 2


def setting_flags(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One flag for each setting, described as the setting is."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for name in reversed(names or tuple(Settings.model_fields)):
            field = Settings.model_fields[name]
            flag = "--" + name.replace("_", "-")
            is_flag = field.annotation is bool
            command = click.option(
                flag,
                name,
                default=None,
                is_flag=is_flag,
                flag_value=True if is_flag else None,
                help=f"{field.description} [PARLEY_{name.upper()}]",
            )(command)
        return command

    return decorate


@click.group()
@click.version_option(package_name="parley")
def main() -> None:
    """Parley: the system of record for conversations."""


@main.command()
@setting_flags()
@click.option("--worker", type=int, hidden=True, help="As this one of several, for workers.py.")
def serve(worker: int | None, **flags: Any) -> None:
    """Serve the API until SIGTERM."""
    with failures():
        settings = load(**flags)
        require_private(settings)
        logs.configure(settings, worker=worker)
        if worker:
            uvloop.run(_work(settings))
        elif settings.workers > 1:
            uvloop.run(_supervise(settings))
        else:
            uvloop.run(_serve(settings))


@contextmanager
def failures() -> Iterator[None]:
    """Say what an operator must know in one line, and end with code 2."""
    try:
        yield
    except (
        ConfigurationError,
        EmbeddedPostgresError,
        ImportFailedError,
        WatchFailedError,
        schema.MigrationFailed,
    ) as error:
        why = str(error)
    except ParleyError as error:
        why = error.message
    else:
        return
    click.echo(f"parley: {why}", err=True)
    sys.exit(FAILED)


async def _serve(settings: Settings) -> None:
    """Everything in this one process."""
    embedded = None if settings.database_url else EmbeddedPostgres(settings.data_dir)
    server = Server(settings, embedded.url if embedded else settings.database_url)
    server.bind()

    async def run() -> None:
        await server.start(embedded)
        await server.readiness.ready.wait()
        _greet(settings, server.address, server.token)
        await asyncio.Event().wait()

    with _admin(settings, lambda: server.readiness.is_ready):
        await _until_told(run(), [server.stop, *([embedded.stop] if embedded else [])])


async def _supervise(settings: Settings) -> None:
    """Workers, and here what they share."""
    embedded = None if settings.database_url else EmbeddedPostgres(settings.data_dir)
    workers = Workers(settings, embedded.url if embedded else settings.database_url)

    async def greet(token: str | None) -> None:
        await workers.ready()
        _greet(settings, workers.address, token)

    async def run() -> None:
        token = development_token(settings.token_file) if settings.is_loopback else None
        if embedded:
            await embedded.start()
            await schema.migrate(embedded.url)
        await asyncio.gather(workers.run(), greet(token))

    with _admin(settings, lambda: workers.are_ready, str(workers.metrics_folder)):
        await _until_told(run(), [workers.stop, *([embedded.stop] if embedded else [])])


async def _work(settings: Settings) -> None:
    """One of several workers: it tells the supervisor how it is, and ends with it."""

    def tell(is_serving: bool) -> None:
        # Unbuffered: a supervisor that was killed reads no more, which is no error of ours.
        with suppress(BrokenPipeError):
            os.write(sys.stdout.fileno(), f"{SERVING if is_serving else NOT_SERVING}\n".encode())

    server = Server(settings, settings.database_url, shares_port=True, on_change=tell)
    server.bind()
    end_with_standard_input()

    async def run() -> None:
        await server.start()
        await asyncio.Event().wait()

    await _until_told(run(), [server.stop])


async def _until_told(
    run: Coroutine[Any, Any, None], stops: Sequence[Callable[[], Awaitable[None]]]
) -> None:
    """Run until a signal or an error; then stop everything, one after the other."""
    stopping = asyncio.create_task(until_signal())
    running = asyncio.create_task(run)
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for stop in stops:
            await stop()


@contextmanager
def _admin(
    settings: Settings, is_ready: Callable[[], bool], metrics_folder: str | None = None
) -> Iterator[None]:
    if not settings.admin_address:
        yield
        return
    admin = Admin(
        settings.admin_address, is_ready=is_ready, registry=metrics.registry(metrics_folder)
    )
    try:
        yield
    finally:
        admin.stop()


def _greet(settings: Settings, address: str, token: str | None) -> None:
    """Print the first calls. Pasting them twice changes nothing."""
    click.echo(f"Parley serves on {address}.")
    if token:
        chain = settings.tls_chain
        how = "-plaintext" if chain is None else f"-cacert {shlex.quote(str(chain))}"
        click.echo(GREETING.format(how=how, token=token, address=address))


GREETING = """
Make a user, a conversation and its first message (twice is once: they carry request ids):

grpcurl {how} -H 'authorization: Bearer {token}' \\
  -d '{{"user": {{"username": "ada"}}, "requestId": "first-user"}}' \\
  {address} parley.v1.UserService/CreateUser && \\
grpcurl {how} -H 'authorization: Bearer {token}' -H 'x-parley-actor: ada' \\
  -d '{{"conversation": {{"title": "Tea at four", "slug": "tea-at-four"}},
       "initialMessage": {{"role": "ROLE_USER", "content": "Who brings the biscuits?"}},
       "requestId": "first-talk"}}' \\
  {address} parley.v1.ConversationService/CreateConversation
"""


@main.command()
@setting_flags("database_url")
@click.option("--revision", default="head", help="Where to: head, or a revision of migrations/.")
def migrate(revision: str, **flags: Any) -> None:
    """Bring the database at PARLEY_DATABASE_URL to the schema of this version."""
    with failures():
        settings = load(**flags)
        logs.configure(settings)
        if not settings.database_url:
            raise ConfigurationError(
                "PARLEY_DATABASE_URL: set it to the database to migrate; the embedded one migrates "
                "itself when it is served."
            )
        asyncio.run(schema.migrate(settings.database_url, revision))
        reached = schema.needed_revision() if revision == "head" else revision
        click.echo(f"The schema is at revision {reached}.")


def client_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Where a client of the server finds it, and who it is there."""
    token = click.option(
        "--token",
        default=None,
        help="A caller's token; else the one in the data folder. [PARLEY_TOKEN]",
        envvar="PARLEY_TOKEN",
    )
    ca = click.option(
        "--ca",
        default=None,
        help="Call by TLS, trusting this authority's certificate (PEM). [PARLEY_CA]",
        envvar="PARLEY_CA",
        type=click.Path(path_type=Path, dir_okay=False),
    )
    return setting_flags("address", "data_dir")(token(ca(command)))


@main.command(name="import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@client_flags
def import_(files: tuple[Path, ...], token: str | None, ca: Path | None, **flags: Any) -> None:
    """Import conversations from FILES (.jsonl, .jsonl.gz) into the server that is running."""
    with failures():
        settings = load(**flags)
        started = time.monotonic()
        importing = import_files(
            files, address=settings.address, token=token or _token(settings), ca=ca
        )
        report = asyncio.run(importing)
        click.echo(_summary(report, time.monotonic() - started))
    for failure in report.failures:
        click.echo(f"parley: {failure}", err=True)
    sys.exit(1 if report.failures else 0)


@main.command()
@client_flags
@click.option("--conversation", help="What happens in this one: id or slug.")
@click.option("--user", help="What happens to this one, and where it is joined: id or username.")
@click.option("--actor", help="See as this user does; else as the system.")
@click.option("--oldest", is_flag=True, help="Begin with the oldest event; else with what comes.")
def watch(
    token: str | None,
    ca: Path | None,
    conversation: str | None,
    user: str | None,
    actor: str | None,
    oldest: bool,
    **flags: Any,
) -> None:
    """Print what happens, a line an event, until Ctrl-C; everything unless told otherwise."""
    with failures():
        if conversation and user:
            raise ConfigurationError("--conversation, --user: give one of them, or none")
        settings = load(**flags)
        request = watch_request(conversation=conversation, user=user, oldest=oldest)
        lines = watch_lines(
            request, address=settings.address, token=token or _token(settings), actor=actor, ca=ca
        )
        asyncio.run(_print(lines))


async def _print(lines: AsyncIterator[str]) -> None:
    async for line in lines:
        click.echo(line)


def _token(settings: Settings) -> str:
    try:
        return settings.token_file.read_text().strip()
    except FileNotFoundError:
        raise ConfigurationError(
            f"PARLEY_TOKEN: set it; there is no {settings.token_file}, because no server has "
            "started there."
        ) from None


def _summary(report: Report, seconds: float) -> str:
    known = f"{report.known_conversations:,} conversations with {report.known_messages:,} messages"
    return (
        f"Imported {report.conversations:,} conversations, {report.messages:,} messages and "
        f"{report.users:,} users in {seconds:.1f} s; {known} were there already."
    )


@main.group()
def token() -> None:
    """Callers' credentials: create, list, revoke."""


def database_flags(command: Callable[..., None]) -> Callable[..., None]:
    return setting_flags("database_url", "data_dir")(command)


@token.command()
@click.option("--service", required=True, help="Who will call: a name for logs and lists.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="What it may do; can be given several times.",
)
@click.option("--days", type=click.IntRange(1, 3650), help="How long it is good; else for ever.")
@database_flags
def create(service: str, scopes: tuple[str, ...], days: int | None, **flags: Any) -> None:
    """Make a token and print it: once, since only its hash is kept."""
    with failures():
        expires_in = timedelta(days=days) if days else None
        made = tokens.create(
            _database(flags), service=service, scopes=scopes, expires_in=expires_in
        )
        click.echo(asyncio.run(made))


@token.command(name="list")
@database_flags
def list_(**flags: Any) -> None:
    """Show every token: its key id, never its secret."""
    with failures():
        rows = asyncio.run(tokens.every(_database(flags)))
        table = Table(box=None)
        for column in ("key id", "service", "made", "expires", "revoked", "scopes"):
            table.add_column(column, no_wrap=True)
        for row in rows:
            times = (row["created_at"], row["expires_at"], row["revoked_at"])
            shown = (f"{time:%Y-%m-%d %H:%M}" if time else "-" for time in times)
            table.add_row(row["key_id"], row["service"], *shown, " ".join(row["scopes"]))
        console = Console()
        console.width = max(console.width, 150)
        console.print(table)


@token.command()
@click.argument("key_id")
@database_flags
def revoke(key_id: str, **flags: Any) -> None:
    """End a token, by its key id or whole; it is refused everywhere within five seconds."""
    with failures():
        key_id = split_token(key_id)[0] or key_id
        if not asyncio.run(tokens.revoke(_database(flags), key_id)):
            raise ConfigurationError(f"there is no token with the key id '{key_id}'")
        click.echo(f"Revoked {key_id}.")


@main.group()
def db() -> None:
    """What only an operator can know of the database: begin a new era."""


@db.command(name="new-era")
@database_flags
def new_era(**flags: Any) -> None:
    """Expire every cursor of the change feed: after going back in time, where Parley cannot tell.

    A restored dump it recognises by itself. Readers are told CURSOR_EXPIRED and start anew.
    """
    with failures():
        era = asyncio.run(eras.begin(_database(flags)))
        click.echo(f"Era {era} has begun: cursors that were given out before it are expired.")


def _database(flags: dict[str, Any]) -> str:
    """The database to work on: the one given, else the embedded one of a server that runs."""
    settings = load(**flags)
    logs.configure(settings)
    return settings.database_url or EmbeddedPostgres(settings.data_dir).url
