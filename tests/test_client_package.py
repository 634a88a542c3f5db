"""The Python client as it is installed: by pip, into an empty environment, with either protobuf."""

import asyncio
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.server import Server

from .make import Client

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "clients" / "python"

# Both environments are made by pip, which asks its index.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

USER_SCRIPT = """
import asyncio

import parley_client
from parley.v1 import event_pb2, message_pb2, user_pb2
from parley_client import aio, errors


def shown(parley: parley_client.Client, request: message_pb2.ListMessagesRequest) -> list[str]:
    found: list[str] = []
    for page in parley_client.pages(parley.messages.ListMessages, request):
        found += [message.content for message in page.messages]
    for response in parley.watch(event_pb2.WatchRequest(everything=True)):
        found += [event.message.content for event in response.events]
    try:
        user: user_pb2.User = parley.users.GetUser(user_pb2.GetUserRequest(user_id="ada")).user
    except errors.NotFound as error:
        return [error.reason, *(each.field for each in error.violations)]
    return [*found, user.username]


async def shown_later(parley: aio.Client, request: message_pb2.ListMessagesRequest) -> list[str]:
    found: list[str] = []
    async for page in aio.pages(parley.messages.ListMessages, request):
        found += [message.content for message in page.messages]
    async for response in parley.watch(event_pb2.WatchRequest(everything=True)):
        found += [event.message.content for event in response.events]
    call = parley.users.GetUser(user_pb2.GetUserRequest(user_id="ada"), timeout=1.0)
    return [*found, (await call).user.username]
"""
# Types that are really there find these.
MISTAKES = """

def mistaken(parley: parley_client.Client) -> None:
    parley.users.GetUser(message_pb2.GetMessageRequest())
    parley.messages.SendMesage(message_pb2.SendMessageRequest())
    number: int = parley.users.GetUser(user_pb2.GetUserRequest()).user.username


async def mistaken_later(parley: aio.Client) -> None:
    (await parley.users.GetUser(user_pb2.GetUserRequest())).users
    parley.users.GetUser(user_pb2.GetUserRequest()).user
"""


@dataclass
class Environment:
    """A virtual environment with nothing in it but what was asked for."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def make(self, *requirements: str | Path) -> None:
        run(sys.executable, "-m", "venv", self.folder)
        run(self.python, "-m", "pip", "install", "--quiet", *requirements)

    def versions(self) -> dict[str, str]:
        listed = run(self.python, "-m", "pip", "list", "--format", "json")
        return {each["name"]: each["version"] for each in json.loads(listed)}


def run(*command: str | Path, cwd: Path = ROOT, typed: str = "") -> str:
    """What a command prints; it must succeed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as `make client` does it."""
    folder = tmp_path_factory.mktemp("dist")
    run(Path(sys.executable).parent / "uv", "build", "--quiet", "--out-dir", folder, PACKAGE)
    assert list(folder.glob("*.tar.gz"))
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.parametrize("protobuf", ["6", "7"])
async def test_installed_into_nothing_it_does_what_its_readme_says(
    protobuf: str, wheel: Path, server: Server, parley: Client, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv")
    # The one from its folder, the other from its wheel.
    source = PACKAGE if protobuf == "6" else wheel
    await asyncio.to_thread(environment.make, source, f"protobuf=={protobuf}.*")
    (tmp_path / ".parley").mkdir()
    (tmp_path / ".parley" / "token").write_text(parley.token)
    readme = (PACKAGE / "README.md").read_text().replace("127.0.0.1:50051", server.address)
    first, *others = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)

    # The first as it is pasted; the others after it, with every warning an error.
    prompt = (environment.python, "-q", "-i")
    pasted = await asyncio.to_thread(run, *prompt, cwd=tmp_path, typed=first)
    setup = first[: first.index("user = ")] + 'user = user_pb2.User(username="ada")\n'
    setup += 'ada = parley.acting_as("ada")\n' + first[first.index("note = ") :]
    script = (environment.python, "-W", "error", "-c", "\n".join([setup, *others]))
    printed = await asyncio.to_thread(run, *script, cwd=tmp_path)

    versions = environment.versions()
    print(f"protobuf {versions['protobuf']}, grpcio {versions['grpcio']}")
    assert versions["protobuf"].startswith(f"{protobuf}.")
    assert "parley" not in versions
    assert "Traceback" not in pasted
    assert re.search(r"^((>>>|\.\.\.) )*1$", pasted, re.M), pasted
    assert printed.splitlines() == [
        "2",
        "USERNAME_TAKEN ada",
        "[('user.username', 'INVALID_CHARACTER'), ('user.email', 'INVALID_EMAIL')]",
        "True",
        "1 Buy biscuits.",
        "2 Buy biscuits.",
        "3 Buy biscuits.",
        "1 TYPE_CONVERSATION_CREATED",
        "2 TYPE_PARTICIPANT_CHANGED",
        *(f"{version} TYPE_MESSAGE_CREATED" for version in (3, 4, 5)),
        "Buy biscuits.",
        "3",
    ]


def test_a_strict_type_checker_knows_it(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.make(f"{wheel}[types]", "protobuf==7.*")
    script, mistaken = tmp_path / "script.py", tmp_path / "mistaken.py"
    script.write_text(USER_SCRIPT)
    mistaken.write_text(USER_SCRIPT + MISTAKES)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", environment.python)

    def checked(file: Path) -> str:
        command = (*mypy, "--cache-dir", tmp_path / "cache", file)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout

    assert checked(script) == "Success: no issues found in 1 source file\n"
    found = re.findall(r"error: .*\[([a-z-]+)\]$", checked(mistaken), re.M)
    assert found == ["arg-type", "attr-defined", "assignment", "attr-defined", "attr-defined"]
