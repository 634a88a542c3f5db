"""Readiness: whether this server can do its work, found out by a ping in the background.

`grpc.health.v1` tells it under "" and under each service's name; "liveness" says only that the
process turns, whatever the database does. A probe never costs a query.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.logs import reason_of
from service.metrics import HORIZON_AGE
from service.rules.feed import Horizon
from service.schema import fits, needed_revision
from service.store import Condition, Store

log = structlog.get_logger()

PING_INTERVAL_SECONDS = 0.5
# So many pings in a row must fail: one may meet a restart, or a moment of too much work.
FAILED_PINGS = 2
LIVENESS = "liveness"

# Generated without types.
Response: Any = health_pb2.HealthCheckResponse
SERVING, NOT_SERVING = Response.SERVING, Response.NOT_SERVING


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """What it was told last, to whoever asks. Its watches end when the server drains.

    (Those of grpcio-health-checking do not, and a server that stops waits for them.)
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._draining = False

    def tell(self, statuses: dict[str, int]) -> None:
        if statuses.items() <= self._statuses.items():
            return
        self._statuses |= statuses
        self._wake()

    def drain(self) -> None:
        """Say NOT_SERVING to everybody, and good-bye to those who watch."""
        self._draining = True
        self._statuses |= {name: NOT_SERVING for name in self._statuses if name != LIVENESS}
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        status = self._statuses.get(request.service)
        if status is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
        return Response(status=status)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, Response.SERVICE_UNKNOWN)
            if status != told:
                await context.write(Response(status=status))
                told = status
            elif self._draining:
                context.set_code(grpc.StatusCode.UNAVAILABLE)
                return
            else:
                await changed.wait()


class Readiness:
    """Keeps the health service true. `prepare` runs once, when the database first answers, and
    again when another one answers in its place; `on_change` whenever health begins or ceases.
    """

    def __init__(
        self,
        store: Store,
        services: Sequence[str],
        prepare: Callable[[], Awaitable[None]],
        on_change: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.servicer = Health()
        self.ready = asyncio.Event()
        self._store = store
        self._services = ["", *services]
        self._prepare = prepare
        self._on_change = on_change
        self._prepared = False
        self._failed_pings = 0
        self._reason: str | None = "starting"
        self._draining = False
        self._horizon = Horizon()
        # Until the first ping, nobody knows.
        self._store.reachable = False
        self._tell(self._reason)
        self.servicer.tell({LIVENESS: SERVING})

    @property
    def is_ready(self) -> bool:
        return self._reason is None and not self._draining

    async def watch(self) -> None:
        """Ping for ever."""
        while True:
            await self._look()
            await asyncio.sleep(PING_INTERVAL_SECONDS)

    def drain(self) -> None:
        """Say NOT_SERVING from now on, whatever the database says."""
        self._draining = True
        self.servicer.drain()
        self._on_change(False)

    async def _look(self) -> None:
        try:
            condition = await self._store.ping()
        except Exception as error:  # whatever it is: nobody else looks
            self._failed_pings += 1
            if self._failed_pings >= FAILED_PINGS:
                self._store.reachable = False
                self._tell(f"the database cannot be reached: {reason_of(error)}")
            return
        self._failed_pings = 0
        self._store.writable = condition.writable
        age = self._horizon.age(condition.oldest_xid, condition.end_xid, at=time.monotonic())
        HORIZON_AGE.set(age)
        self._tell(await self._reason_not_to_serve(condition))

    async def _reason_not_to_serve(self, condition: Condition) -> str | None:
        """None where there is none. Calls may use the database from here on, as far as they can."""
        unfit = _unfitness(condition)
        try:
            if not unfit and condition.cluster != self._store.cluster:
                await self._enter(condition.cluster)
            self._store.reachable = True
            if not unfit and not self._prepared:
                await self._prepare()
                self._prepared = True
        except Exception as error:  # as above
            return f"the database cannot be prepared: {reason_of(error)}"
        return unfit

    async def _enter(self, cluster: str) -> None:
        """Where the database was restored, begin its era, before any call can write to it."""
        if era := await self._store.begin_era():
            log.warning("era_begun", era=era)
        self._store.cluster = cluster
        self._prepared = False

    def _tell(self, reason: str | None) -> None:
        if self._draining:
            return
        if reason != self._reason:
            log.info("serving") if reason is None else log.warning("not_serving", reason=reason)
            self._reason = reason
            self._on_change(self.is_ready)
        status = SERVING if reason is None else NOT_SERVING
        self.servicer.tell(dict.fromkeys(self._services, status))
        if reason is None:
            self.ready.set()


def _unfitness(condition: Condition) -> str | None:
    if not fits(condition.revision):
        return (
            f"the schema is at revision {condition.revision}, this version needs "
            f"{needed_revision()}: run `parley migrate`"
        )
    if not condition.writable:
        return "the database takes no writes: it is a standby, or read-only by default"
    return None
