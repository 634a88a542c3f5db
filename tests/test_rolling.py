"""Two replicas, restarted one after the other under load: who calls by the published policy does
not notice.

`PARLEY_RESTARTS` says how often. The choices are the same each run; `SEED=…` for others.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from parley.v1 import conversation_pb2, event_pb2, message_pb2
from parley_client import ParleyError, aio
from service.embedded import EmbeddedPostgres

from .make import USER, Client, Conversation, User
from .process import ROOT, Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESTARTS = int(os.environ.get("PARLEY_RESTARTS", "20"))
SEED = int(os.environ.get("SEED", "1"))
PUBLISHED = json.loads((ROOT / "clients" / "service-config.json").read_text())
CALLS_A_SECOND = 200
CONVERSATIONS = 8
# A replica takes part again when it has answered so many calls.
TAKES_PART = 20


@pytest_asyncio.fixture
async def replicas(
    postgres: EmbeddedPostgres, parley: Client, tmp_path: Path
) -> AsyncIterator[list[Service]]:
    """Two on one database. (`parley` empties it.)"""
    both = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        both.append(Service(tmp_path / name, database_url=postgres.url))
        await both[-1].start()
    yield both
    for each in both:
        await each.stop()


@dataclass
class Load:
    """So many calls a second, each begun at its time whatever became of those before."""

    parley: aio.Client
    talks: list[Conversation]
    sender: User
    choose: random.Random = field(default_factory=lambda: random.Random(SEED))
    calls: Counter[str] = field(default_factory=Counter)
    # Of each content that was acknowledged: its conversation and sequence.
    acknowledged: dict[str, tuple[str, int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    stopping: bool = False

    async def run(self) -> None:
        begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not self.stopping:
                due = begun + self.calls.total() / CALLS_A_SECOND
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                call = self.choose.choice([self.send, self.send, self.get, self.list])
                self.calls[call.__name__] += 1
                group.create_task(self.timed(call, self.choose.choice(self.talks)))

    async def timed(
        self, call: Callable[[Conversation], Awaitable[None]], talk: Conversation
    ) -> None:
        started = time.monotonic()
        try:
            await call(talk)
        except ParleyError as error:
            self.failures.append(f"{call.__name__} {error.status.name} {error}")
        self.slowest = max(self.slowest, time.monotonic() - started)

    async def send(self, talk: Conversation) -> None:
        content = f"number {self.calls['send']}"
        response = await self.parley.messages.SendMessage(
            message_pb2.SendMessageRequest(
                conversation_id=talk.id, sender_id=self.sender.id, role=USER, content=content
            )
        )
        self.acknowledged[content] = (talk.id, response.message.sequence)

    async def get(self, talk: Conversation) -> None:
        await self.parley.conversations.GetConversation(
            conversation_pb2.GetConversationRequest(conversation_id=talk.id)
        )

    async def list(self, talk: Conversation) -> None:
        await self.parley.messages.ListMessages(
            message_pb2.ListMessagesRequest(conversation_id=talk.id, page_size=5)
        )


@dataclass
class Watcher:
    """All that happens, as one long watch tells it."""

    parley: aio.Client
    versions: dict[str, list[int]] = field(default_factory=dict)

    async def run(self) -> None:
        request = event_pb2.WatchRequest(everything=True, oldest=True)
        async for response in self.parley.watch(request):
            for event in response.events:
                self.versions.setdefault(event.conversation_id, []).append(event.version)


@pytest.mark.parametrize(
    ("policy", "restarts"),
    [
        pytest.param(PUBLISHED, RESTARTS, id="published"),
        # As for a client whose gRPC knows no health checks.
        pytest.param(
            {name: part for name, part in PUBLISHED.items() if name != "healthCheckConfig"},
            max(RESTARTS // 4, 1),
            id="unaware",
        ),
    ],
)
async def test_rolling_restarts_lose_no_call_and_no_message(
    replicas: list[Service], parley: Client, policy: dict[str, Any], restarts: int
) -> None:
    ada = await parley.user()
    talks = [await parley.conversation(ada) for _ in range(CONVERSATIONS)]
    target = "ipv4:" + ",".join(each.address for each in replicas)

    options = {"grpc.service_config": json.dumps(policy)}
    async with aio.connect(
        target, token=replicas[0].token, plaintext=True, options=options
    ) as client:
        load, watcher = Load(client, talks, ada), Watcher(client)
        watching = asyncio.create_task(watcher.run())
        running = asyncio.create_task(load.run())
        try:
            for replica in replicas:
                await _takes_part(replica)
            for count in range(restarts):
                await _restart(replicas[count % 2])
        finally:
            load.stopping = True
            await running
        for talk in talks:
            read = conversation_pb2.GetConversationRequest(conversation_id=talk.id)
            last = (await client.conversations.GetConversation(read)).conversation.version
            async with asyncio.timeout(30):
                while len(watcher.versions[talk.id]) < last:
                    await asyncio.sleep(0.1)
            assert watcher.versions[talk.id] == list(range(1, last + 1))
        watching.cancel()

    refused = Counter(
        str(line["method"]).partition("/")[2]
        for replica in replicas
        for line in replica.events("call")
        if line["code"] == "UNAVAILABLE" and not str(line["method"]).endswith("Watch")
    )
    print(
        f"{load.calls.total()} calls {dict(load.calls)}, {restarts} restarts, seed {SEED}: "
        f"{len(load.failures)} failed, {refused.total()} refused and repeated elsewhere, "
        f"the slowest took {load.slowest:.2f} s"
    )
    assert load.failures == []
    stored = [
        (message.content, (talk.id, message.sequence))
        for talk in talks
        for message in await parley.all_messages(talk)
    ]
    assert sorted(stored) == sorted(load.acknowledged.items())
    assert load.calls.total() > restarts * CALLS_A_SECOND / 2
    for replica in replicas:
        assert replica.events("defect") == []


async def _restart(replica: Service) -> None:
    """Returns once it takes its part again."""
    replica.process.send_signal(signal.SIGTERM)
    assert await replica.ended() == 0
    known = len(replica.log)
    await replica.start()
    await _takes_part(replica, known)


async def _takes_part(replica: Service, known: int = 0) -> None:
    """Wait until it has answered calls, after so many characters of its log."""
    async with asyncio.timeout(30):
        while replica.log.count('"code":"OK"', known) < TAKES_PART:
            await asyncio.sleep(0.1)
