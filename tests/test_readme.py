"""The README's own commands, pasted as they stand, against a server started as it says."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.settings import Settings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BIN = Path(sys.executable).parent
# For those who have no grpcurl: the same call by buf, which the tools of .venv contain.
BUF_CALL = (
    "call() { .venv/bin/buf curl --protocol grpc --http2-prior-knowledge"
    ' -H "authorization: Bearer $(cat .parley/token)"'
    ' --reflect-header "authorization: Bearer $(cat .parley/token)"'
    ' "${@:3}" -d "$2" "http://127.0.0.1:50051/parley.v1.$1"; }'
)


@dataclass
class Clone:
    """A folder as a newcomer has it, and the server started in it."""

    folder: Path
    address: str
    greeting: str

    def paste(self, commands: str) -> str:
        """Everything that the commands print; they must succeed."""
        environment = {**os.environ, "PARLEY_ADDRESS": self.address}
        environment["PATH"] = f"{BIN}:{environment['PATH']}"
        for name in ("PARLEY_DATA_DIR", "PARLEY_TOKEN", "PARLEY_DATABASE_URL"):
            environment.pop(name, None)
        done = subprocess.run(
            ["bash", "-euc", commands.replace("127.0.0.1:50051", self.address)],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def consume(self, until: str) -> list[str]:
        """What the README's consumer prints, up to a line with this in it."""
        (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
        code = code.replace("127.0.0.1:50051", self.address).replace("release-1-0", "consumed")
        consumer = subprocess.Popen(
            [sys.executable, "-u", "-c", code],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT / "protos")},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert consumer.stdout
        lines: list[str] = []
        while not lines or until not in lines[-1]:
            lines.append(consumer.stdout.readline())
            assert lines[-1], lines
        # The cursor is written after the last line.
        time.sleep(0.5)
        consumer.kill()
        consumer.communicate()
        return lines


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    folder = tmp_path_factory.mktemp("clone")
    (folder / ".venv").symlink_to(BIN.parent)
    (folder / "examples").symlink_to(ROOT / "examples")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (folder / "log").open("w") as log:
        serving = subprocess.Popen(
            [".venv/bin/parley", "serve", "--address", address],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if "PARLEY_" not in name},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert serving.stdout is not None
    greeting = ""
    while not greeting.endswith("CreateConversation\n"):
        line = serving.stdout.readline()
        assert line, (folder / "log").read_text()
        greeting += line
    yield Clone(folder, address, greeting)
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(30) == 0
    serving.stdout.close()


def blocks() -> list[str]:
    """The README's shell blocks, but for the one that starts the server."""
    found = re.findall(r"^```sh\n(.*?)^```$", README.read_text(), re.M | re.S)
    assert found[0] == "make run\n"
    return found[1:]


def adapted(block: str) -> str:
    """The block as it stands where there is grpcurl; by buf elsewhere."""
    if shutil.which("grpcurl", path=f"{BIN}:{os.environ['PATH']}"):
        return block
    return re.sub(r"^call\(\) .*$", lambda _: BUF_CALL, block, flags=re.M)


def test_the_readme_works_as_pasted(clone: Clone) -> None:
    session = [adapted(block) for block in blocks()]
    if not shutil.which("grpcurl", path=f"{BIN}:{os.environ['PATH']}"):
        session = [block for block in session if not block.startswith("grpcurl ")]

    printed = clone.paste("".join(session))

    for expected in (
        '"Shall we?"',
        '"After lunch."',
        '"hungry"',
        "USER_NOT_FOUND",
        "Imported 4 conversations, 23 messages",
        "Saturday on the ridge",
    ):
        assert expected in printed
    again = clone.paste(".venv/bin/parley import examples/conversations.jsonl")
    assert again.startswith("Imported 0 conversations, 0 messages and 0 users")
    count = blocks()[0].splitlines()[0]
    listing = '\ncall ConversationService/GetConversation \'{"conversation_id": "release-1-0"}\''
    assert re.search(r'"last_?[sS]equence": "2"', clone.paste(adapted(count + "\n") + listing))


def test_the_consumer_in_the_readme_goes_on_where_it_was(clone: Clone) -> None:
    call = adapted(blocks()[0]).splitlines()[0]
    mary = '{"user": {"username": "mary"}}'
    talk = '{"conversation": {"creator_id": "mary", "slug": "consumed"}}'
    news = '{"conversation_id": "consumed", "role": "ROLE_USER", "content": "What next?"}'
    clone.paste(
        f"{call}\ncall UserService/CreateUser '{mary}'\n"
        f"call ConversationService/CreateConversation '{talk}'"
    )

    first = clone.consume(until="PARTICIPANT_CHANGED")
    send = f"call MessageService/SendMessage '{news}' -H 'x-parley-actor: mary'"
    clone.paste(f"{call}\n{send}")
    second = clone.consume(until="What next?")

    assert [line.split()[0] for line in first + second] == ["1", "2", "3"]
    assert len(second) == 1


@pytest.mark.skipif(
    not shutil.which("grpcurl", path=f"{BIN}:{os.environ['PATH']}"), reason="no grpcurl here"
)
def test_what_the_start_prints_works_as_pasted_and_twice_is_once(clone: Clone) -> None:
    commands = clone.greeting[clone.greeting.index("grpcurl ") :]

    first = clone.paste(commands)

    assert "Who brings the biscuits?" in first
    assert clone.paste(commands) == first


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()

    for name in Settings.model_fields:
        assert f"`PARLEY_{name.upper()}`" in text
