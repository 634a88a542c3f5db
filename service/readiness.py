"""Readiness: whether this server can do its work, found out by a ping in the background.

`grpc.health.v1` tells it under "" and under each service's name; "liveness" says only that the
process turns, whatever the database does. A probe never costs a query.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health

from service.errors import ParleyError
from service.schema import needed_revision
from service.store import Store

log = structlog.get_logger()

PING_INTERVAL_SECONDS = 0.5
LIVENESS = "liveness"

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Readiness:
    """Keeps the health service true. `prepare` runs once, when the database first answers."""

    def __init__(
        self,
        store: Store,
        services: Sequence[str],
        prepare: Callable[[], Awaitable[None]],
    ) -> None:
        self.servicer = health.HealthServicer()
        self.ready = asyncio.Event()
        self._store = store
        self._services = ["", *services]
        self._prepare = prepare
        self._prepared = False
        self._reason: str | None = "starting"

    async def watch(self) -> None:
        """Ping for ever."""
        await self.servicer.set(LIVENESS, SERVING)
        while True:
            await self._tell(await self._reason_not_to_serve())
            await asyncio.sleep(PING_INTERVAL_SECONDS)

    async def drain(self) -> None:
        """Say NOT_SERVING from now on, whatever the database says."""
        await self.servicer.enter_graceful_shutdown()

    async def _reason_not_to_serve(self) -> str | None:
        try:
            condition = await self._store.ping()
            self._store.reachable = True
            if condition.revision is None or condition.revision != needed_revision():
                return (
                    f"the schema is at revision {condition.revision}, this version needs "
                    f"{needed_revision()}: run `parley migrate`"
                )
            if not condition.writable:
                return "the database is a standby"
            if not self._prepared:
                await self._prepare()
                self._prepared = True
        except ParleyError as error:
            self._store.reachable = False
            return error.message
        return None

    async def _tell(self, reason: str | None) -> None:
        status = SERVING if reason is None else NOT_SERVING
        if reason != self._reason:
            log.info("serving") if reason is None else log.warning("not_serving", reason=reason)
            self._reason = reason
        for service in self._services:
            await self.servicer.set(service, status)
        if reason is None:
            self.ready.set()
