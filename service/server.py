"""The wiring, on one screen; and how the server starts and drains."""

import asyncio
import gc
import os
import secrets
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection

from parley.v1 import (
    conversation_pb2,
    event_pb2,
    live_message_pb2,
    message_pb2,
    participant_pb2,
    transfer_pb2,
    usage_pb2,
    user_pb2,
)
from service import schema
from service.access import Gatekeeper, hash_of, new_token, split_token
from service.certificates import CertificateError, Certificates
from service.doorbell import Doorbell
from service.embedded import EmbeddedPostgres
from service.errors import Unavailable
from service.following import Follower
from service.identity import Scope
from service.interceptors import Handlers, Interceptors
from service.limits import CallRate
from service.logs import text_of
from service.lookups import Lookups
from service.paging import FeedCursors, PageTokens
from service.passwords import Hasher
from service.readiness import Readiness
from service.reading import Reader
from service.sending import Sender
from service.servicers.conversations import ConversationServicer
from service.servicers.events import EventServicer
from service.servicers.messages import MessageServicer
from service.servicers.participants import ParticipantServicer
from service.servicers.users import UserServicer
from service.settings import ConfigurationError, Settings, require_private
from service.store import Store
from service.symbols import Symbols
from service.verifying import Verifier
from service.watching import Watching

log = structlog.get_logger()

MAX_REQUEST_BYTES = 4 << 20
PRUNE_INTERVAL_SECONDS = 3600.0
# How long a stream that has ended may wait for its client to take notice, when the server stops.
STALLED_SECONDS = 2.0
# How long after a signal one more is still the same.
SAME_SIGNAL_SECONDS = 1.0
# Messages that an older version stored are made searchable, a few at a time.
INDEX_INTERVAL_SECONDS = 60.0
INDEX_MESSAGES, INDEX_PAUSE_SECONDS = 100, 0.05
# After how long a task that has not ended is told so again.
CANCEL_AGAIN_SECONDS = 0.5
# For writes that outlived their calls, when the server stops.
AFTERMATH_SECONDS = 5.0
# Objects more than before. A call makes a few hundred, and a thousand may be at work.
COLLECT_AFTER = 10_000
# How often, while a server that stops waits for its last calls.
COLLECT_SECONDS = 0.25
# Reflection's two versions differ in their names only; clients ask for either.
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    # With its overload protection, grpc counts a stream for longer than its client does and refuses
    # the next: of 400 calls at a time on one channel with a limit of 100, four in five failed.
    # Without, clients wait for their turn; a million resets in six seconds did no harm.
    ("grpc.max_concurrent_streams", 1_000),
    ("grpc.http.overload_protection", 0),
    ("grpc.max_connection_idle_ms", 10 * 60 * 1000),
    ("grpc.max_connection_age_ms", 30 * 60 * 1000),
    ("grpc.max_connection_age_grace_ms", 60 * 1000),
    ("grpc.server_handshake_timeout_ms", 10 * 1000),
    ("grpc.max_allowed_incoming_connections", 1_000),
    ("grpc.keepalive_time_ms", 60 * 1000),
    ("grpc.keepalive_timeout_ms", 20 * 1000),
    # Clients may ping this often; the default of five minutes kills those that keep alive.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10 * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class Server:
    """One process of Parley: a gRPC server over one database."""

    def __init__(
        self,
        settings: Settings,
        database_url: str,
        *,
        shares_port: bool = False,
        on_change: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """`shares_port`: as one of several workers. `on_change` is told whether it serves."""
        self._settings = settings
        self._shares_port = shares_port
        self.store = Store(database_url, pool_size=settings.pool_size)
        self.page_tokens = PageTokens()
        self.hasher = Hasher()
        self.verifier = Verifier(self.store, self.hasher)
        # Where to hear of what other processes commit; a pooler would swallow it.
        self.doorbell = Doorbell(settings.listen_url or database_url)
        self.store.on_commit = self.doorbell.ring
        follower = Follower(self.store)
        self.watching = Watching(self.store, follower, self.doorbell)
        # Known once bound and, where this machine alone can call, once the database has answered.
        self.address = settings.address
        self.token: str | None = None
        # Not shared unless asked for: a second server on the port must fail, not take half of it.
        self._server = grpc.aio.server(options=[*OPTIONS, ("grpc.so_reuseport", int(shares_port))])
        self._tasks: list[asyncio.Task[None]] = []
        self._build(follower, on_change)

    def _build(self, follower: Follower, on_change: Callable[[bool], None]) -> None:
        store, page_tokens = self.store, self.page_tokens
        lookups = Lookups(store)
        sender = Sender(store)
        self.interceptors = Interceptors(
            Gatekeeper(store, lookups),
            store,
            rate=CallRate(self._settings.calls_per_second),
            max_calls=self._settings.max_calls,
        )

        services = [
            (
                user_pb2,
                "UserService",
                UserServicer(store, lookups, page_tokens, self.hasher, self.verifier),
            ),
            (
                conversation_pb2,
                "ConversationService",
                ConversationServicer(store, lookups, page_tokens),
            ),
            (
                participant_pb2,
                "ParticipantService",
                ParticipantServicer(store, lookups, Reader(store), page_tokens),
            ),
            (message_pb2, "MessageService", MessageServicer(store, lookups, sender, page_tokens)),
            (
                event_pb2,
                "EventService",
                EventServicer(lookups, follower, self.watching, FeedCursors(page_tokens)),
            ),
            (live_message_pb2, "LiveMessageService", None),
            (transfer_pb2, "TransferService", None),
            (usage_pb2, "UsageService", None),
        ]
        names = []
        for module, name, servicer in services:
            descriptor = module.DESCRIPTOR.services_by_name[name]
            handlers = self.interceptors.service(descriptor, servicer)
            self._add(descriptor.full_name, handlers)
            names.append(descriptor.full_name)

        self.readiness = Readiness(store, names, self._prepare, on_change)
        health_pb2_grpc.add_HealthServicer_to_server(self.readiness.servicer, self._server)
        reflected = reflection.ReflectionServicer(
            [*names, "grpc.health.v1.Health", REFLECTION_V1], pool=Symbols()
        )
        handler = grpc.stream_stream_rpc_method_handler(
            reflected.ServerReflectionInfo,
            reflection_pb2.ServerReflectionRequest.FromString,
            reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        for name in ("grpc.reflection.v1alpha.ServerReflection", REFLECTION_V1):
            handlers = {"ServerReflectionInfo": handler}
            self._add(name, self.interceptors.authenticated(name, handlers))

    def _add(self, service: str, handlers: Handlers) -> None:
        generic = grpc.method_handlers_generic_handler(service, handlers)
        self._server.add_generic_rpc_handlers((generic,))

    def bind(self) -> None:
        """Take the address, before anything else is begun."""
        settings = self._settings
        require_private(settings)
        try:
            if not self._shares_port:
                # grpc does not say why it cannot listen, or says it to the terminal.
                require_free(settings.host, settings.port)
            if settings.tls_chain and settings.tls_key:
                certificates = Certificates(
                    settings.tls_chain, settings.tls_key, settings.tls_client_ca
                )
                port = self._server.add_secure_port(settings.address, certificates.credentials())
            else:
                port = self._server.add_insecure_port(settings.address)
        except CertificateError as error:
            raise ConfigurationError(f"PARLEY_TLS_CHAIN, PARLEY_TLS_KEY: {error}.") from None
        except (OSError, RuntimeError) as error:
            why = (isinstance(error, OSError) and error.strerror) or "it is taken"
            raise ConfigurationError(
                f"PARLEY_ADDRESS: cannot listen on {settings.address}: {why}."
            ) from None
        self.address = f"{settings.host}:{port}"

    async def start(self, embedded: EmbeddedPostgres | None = None) -> None:
        """Serve; the database may come later. Returns once the embedded one, if any, is there."""
        # A credential that lies in a file is for development: only where nobody else can call.
        if self._settings.is_loopback:
            self.token = development_token(self._settings.token_file)
        await self._server.start()
        _spare_the_collector()
        if embedded:
            await embedded.start()
            if not schema.fits(await self._revision()):
                await schema.migrate(embedded.url)
        self._tasks = [
            asyncio.create_task(self.readiness.watch()),
            asyncio.create_task(self._prune()),
            asyncio.create_task(self._index()),
            asyncio.create_task(self.doorbell.run()),
            asyncio.create_task(self.watching.run()),
        ]

    async def stop(self) -> None:
        """Drain: refuse what is new, let what runs end, write what was begun."""
        if self._tasks:
            log.info("draining")
        self.readiness.drain()
        self.interceptors.drain()
        await self.interceptors.quiet()
        stopping = asyncio.create_task(self._server.stop(self._settings.drain_seconds))
        await asyncio.wait({stopping}, timeout=STALLED_SECONDS)
        stops = {stopping}
        if not self.interceptors.is_busy:
            # Who is left has been told that its stream has ended, and does not read it.
            stops.add(asyncio.create_task(self._server.stop(None)))
        await _with_the_collector(stops)
        await self.interceptors.drained(AFTERMATH_SECONDS)
        await end(self._tasks)
        self.hasher.close()
        await self.store.close()

    async def _revision(self) -> str | None:
        while True:
            with suppress(Unavailable):
                return (await self.store.ping()).revision

    async def _prepare(self) -> None:
        """What the database must hold before the first call: keys, a first token."""
        async with self.store.transaction() as transaction:
            key = await transaction.tokens.signing_key("page-tokens", secrets.token_bytes(32))
            self.page_tokens.use(key)
            key = await transaction.tokens.signing_key("passwords", secrets.token_bytes(32))
            self.verifier.use(key)
            if self.token:
                key_id, secret = split_token(self.token)
                await transaction.tokens.register(
                    key_id=key_id,
                    secret_hash=hash_of(secret),
                    service="development",
                    scopes=list(Scope),
                )

    async def _prune(self) -> None:
        await self.readiness.ready.wait()
        while True:
            try:
                async with self.store.transaction() as transaction:
                    pruned = await transaction.requests.prune()
                    await transaction.passwords.prune()
                if pruned:
                    log.info("requests_pruned", count=pruned)
            except Exception as error:
                log.warning("prune_failed", error=text_of(error))
            await asyncio.sleep(PRUNE_INTERVAL_SECONDS)

    async def _index(self) -> None:
        await self.readiness.ready.wait()
        while True:
            indexed = 0
            try:
                async with self.store.transaction() as transaction:
                    indexed = await transaction.search.index(INDEX_MESSAGES)
            except Exception as error:
                log.warning("index_failed", error=text_of(error))
            await asyncio.sleep(INDEX_PAUSE_SECONDS if indexed else INDEX_INTERVAL_SECONDS)


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks that go on for ever, and wait until they have ended.

    A cancel that meets a query may come out as an error of the database, which such a task lives
    through: it is told again. (Told once, a server that stopped soon after its start might hang.)
    """
    running = set(tasks)
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=CANCEL_AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)


async def _with_the_collector(stops: set[asyncio.Task[None]]) -> None:
    """Wait for gRPC to stop: it waits for every call, and a call may be held by a ring of objects,
    as that of an error, its traceback and the frames in it, which nothing else would open now.
    """
    gc.unfreeze()
    waiting = stops
    while waiting:
        gc.collect()
        _, waiting = await asyncio.wait(waiting, timeout=COLLECT_SECONDS)
    await asyncio.gather(*stops)


def _spare_the_collector() -> None:
    """What is there now stays; and of what calls leave, next to nothing is cyclic: to look through
    it after every 700 objects took a tenth of a call.
    """
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])


def require_free(host: str, port: str | int) -> None:
    """Raise OSError where nobody can listen alone."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        probe.listen()


def development_token(file: Path) -> str:
    """The token in the file; a new one, readable by nobody else, where there is none."""
    try:
        if file.exists() and (token := file.read_text().strip()):
            return token
        file.parent.mkdir(parents=True, exist_ok=True)
        token = new_token()
        # Whole or not at all, whatever happens meanwhile.
        draft = file.with_name(f"token.{os.getpid()}")
        draft.touch(mode=0o600)
        draft.write_text(f"{token}\n")
        draft.rename(file)
    except OSError as error:
        raise ConfigurationError(
            f"PARLEY_DATA_DIR: cannot keep a token in {file}: {error.strerror}."
        ) from None
    return token


async def until_signal() -> None:
    """Wait for SIGTERM or Ctrl-C; one more, a second later, ends the process at once. Before that
    it is the same one: `make`, or whoever signals a whole group, may send it twice.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    first = loop.time()

    def on_signal() -> None:
        nonlocal first
        if not stop.is_set():
            first = loop.time()
            stop.set()
        elif loop.time() - first >= SAME_SIGNAL_SECONDS:
            os._exit(1)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await stop.wait()
