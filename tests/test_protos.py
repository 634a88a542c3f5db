"""A client that was generated from a release goes on working: what would break it is refused."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What a client notices: each change of user.proto, and how buf calls it.
BREAKING = [
    ("string username = 2 [", "string username = 99 [", 'field "2" with name "username"'),
    ("string email = 3;", "string mail = 3;", 'name from "email" to "mail"'),
    ("string full_name = 4;", "bytes full_name = 4;", 'type from "string" to "bytes"'),
    ("  rpc GetUser(", "  rpc FindUser(", 'RPC "GetUser"'),
    ("KIND_AGENT = 2", "KIND_AGENT = 3", 'enum value "2"'),
    ('java_package = "com.parley.v1"', 'java_package = "org.parley.v1"', '"java_package"'),
]


@dataclass
class Clone:
    """A git repository with our protos and the script in it."""

    folder: Path

    def git(self, *arguments: str) -> None:
        who = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")
        subprocess.run(["git", *who, *arguments], cwd=self.folder, check=True, capture_output=True)

    def release(self, tag: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--allow-empty", "--message", tag)
        self.git("tag", tag)

    def change(self, old: str, new: str) -> None:
        """Change what user.proto says."""
        path = self.folder / "protos" / "parley" / "v1" / "user.proto"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def check(self) -> subprocess.CompletedProcess[str]:
        """Hold the protos against the last release, as `make lint` does."""
        return subprocess.run(
            [sys.executable, "scripts/protos.py", "--released"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    clone = Clone(tmp_path / "origin")
    for name in ("protos", "scripts"):
        shutil.copytree(
            ROOT / name, clone.folder / name, ignore=shutil.ignore_patterns("*.py?", "__pycache__")
        )
    shutil.copy(ROOT / "buf.yaml", clone.folder)
    clone.git("init", "--quiet", "--initial-branch", "main")
    clone.git("add", "--all")
    clone.git("commit", "--message", "Start")
    return clone


def test_without_a_release_it_says_so(clone: Clone) -> None:
    clone.git("tag", "v1-plans")

    done = clone.check()

    assert done.returncode == 0
    assert "No release is known here" in done.stdout


def test_what_adds_to_a_release_passes(clone: Clone) -> None:
    clone.release("v0.1.0")
    clone.change("string email = 3;", "string email = 3;\n  string nickname = 99;")

    done = clone.check()

    assert (done.returncode, done.stderr) == (0, "")
    assert "The clients of v0.1.0 would go on working" in done.stdout


def test_what_breaks_a_client_is_refused_all_at_once(clone: Clone) -> None:
    clone.release("v0.1.0")
    for old, new, _ in BREAKING:
        clone.change(old, new)

    done = clone.check()

    assert done.returncode == 1
    assert [named for _, _, named in BREAKING if named not in done.stdout] == []
    assert "Clients of v0.1.0 would break" in done.stderr


def test_the_last_release_counts_not_one_before_it_nor_one_elsewhere(clone: Clone) -> None:
    clone.release("v0.9.0")
    clone.change("string email = 3;", "string mail = 3;")
    clone.release("v0.10.0")
    clone.git("checkout", "--quiet", "-b", "other")
    clone.change("string mail = 3;", "string address = 3;")
    clone.release("v0.11.0")
    clone.git("checkout", "--quiet", "main")

    done = clone.check()

    assert "The clients of v0.10.0 would go on working" in done.stdout


def test_a_clone_that_was_not_given_the_tags_is_not_taken_for_one_before_the_first_release(
    clone: Clone, tmp_path: Path
) -> None:
    clone.release("v0.1.0")
    clone.git("commit", "--allow-empty", "--message", "Later")
    shallow = Clone(tmp_path / "shallow")
    clone.git("clone", "--quiet", "--depth", "1", f"file://{clone.folder}", str(shallow.folder))

    done = shallow.check()

    assert done.returncode == 1
    assert "This clone has no v0.1.0" in done.stderr
