"""The house rules that a reader relies on, held over the syntax trees of `service/`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVICE = Path(__file__).parent.parent / "service"

# Who may import whom: what stands on a floor below, or in one's own room. Lowest floor first.
FLOORS = [
    {"domain", "ids", "reasons", "settings"},
    {"errors"},
    {"admin", "identity", "logs", "metrics", "passwords"},
    {"rules"},
    {
        "batcher",
        "certificates",
        "embedded",
        "fields",
        "limits",
        "models",
        "paging",
        "schema",
        "symbols",
    },
    {"importer", "masks", "repositories"},
    {"driver"},
    {"indoubt"},
    {"store"},
    {"coalescer", "doorbell", "memory"},
    {"lookups", "making", "readiness", "reading", "sending", "verifying", "wire"},
    {"following", "opening", "pages"},
    {"watching"},
    {"access", "servicers"},
    {"eras", "interceptors", "tokens", "watcher"},
    {"server"},
    {"workers"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# Who may use what, and why nobody else.
KNOWS = {
    "sqlalchemy": (
        {"driver", "indoubt", "models", "repositories", "schema", "store"},
        "every SQL statement stands in repositories, so that a reader finds who may see what",
    ),
    "asyncpg": (
        {"driver", "embedded", "ids", "indoubt", "schema", "store"},
        "the driver's errors stop at the store, so that nobody else need know them",
    ),
    "grpc": (
        {"certificates", "importer", "interceptors", "readiness", "server", "watcher"},
        "a servicer takes a request and a Call, so that what surrounds a call is written once",
    ),
    "google": (
        {"access", "fields", "importer", "interceptors", "masks", "paging", "symbols", "wire"},
        "rules and repositories speak the domain's words; wire is where they meet protobuf",
    ),
    "parley": (
        {"access", "importer", "server", "servicers", "watcher", "wire"},
        "rules and repositories speak the domain's words; wire is where they meet protobuf",
    ),
    "argon2": (
        {"passwords"},
        "a hash takes a core and 19 MiB: all are made in its threads, never on the event loop",
    ),
    # Not a library: what ends a call.
    "abort": (
        {"interceptors"},
        "raise an error of errors.py, so that every refusal has a reason and its details",
    ),
}
SAME = {"grpc_health": "grpc", "grpc_reflection": "grpc", "abort_with_status": "abort"}


def complaints(room: str, source: str) -> Iterator[str]:
    """What is wrong with a module of a room: each with its line, the rule and why it is one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            wrong = [_misplaced(room, name) for name in _names(node)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            wrong = [_misplaced(room, node.func.attr)]
        else:
            continue
        yield from (f"{node.lineno}: {each}" for each in wrong if each)


def _names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The full names that are imported: `from service import wire` says its room last."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names]


def _misplaced(room: str, name: str) -> str:
    top, _, rest = name.partition(".")
    other = rest.partition(".")[0] or room
    rooms, reason = KNOWS.get(SAME.get(top, top), ({room}, ""))
    if not top:
        return f"write {name} in full, so that a search finds who imports what."
    if top == "service" and other != room and FLOOR[other] >= FLOOR[room]:
        return (
            f"{room} may not import {other}: imports point down, so that what stands below can be "
            "read, tested and changed without what stands above."
        )
    return "" if room in rooms else f"{room} may not use {top}: {reason}."


def test_every_module_keeps_to_its_floor_its_libraries_and_its_words() -> None:
    broken = []
    for path in sorted(SERVICE.rglob("*.py")):
        name = path.relative_to(SERVICE)
        room = name.parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in FLOOR, f"service/{room} stands on no floor: give it one in FLOORS."
        broken += [f"service/{name}:{each}" for each in complaints(room, path.read_text())]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("rules", "from service.store import Store"),
        ("rules", "from service import wire"),
        ("rules", "import service.fields"),
        ("models", "from service.repositories.base import Row"),
        ("repositories", "from service.servicers import users"),
        ("store", "if True:\n    from service.lookups import Lookups"),
        ("paging", "from service.fields import Fields"),
        ("servicers", "from service.server import Server"),
        ("servicers", "from sqlalchemy import select"),
        ("servicers", "import grpc"),
        ("servicers", "async def get(context):\n    await context.abort(1)"),
        ("wire", "context.abort_with_status(status)"),
        ("lookups", "import asyncpg"),
        ("repositories", "from parley.v1 import user_pb2"),
        ("rules", "import google.protobuf.message"),
        ("rules", "from .rights import Right"),
    ],
)
def test_a_breach_is_noticed(room: str, source: str) -> None:
    assert len(list(complaints(room, source))) == 1


def test_the_house_as_it_is_meant_is_not_complained_of() -> None:
    source = (
        "from service.store import Store\nfrom service.servicers import users\nimport parley.v1"
    )
    assert not list(complaints("servicers", source))
