"""docs/grpcurl.md, played: every line of it against a fresh server, and what each printed.

    python -m scripts.cookbook    write below each line what it prints

The first block of the page defines what the others use; each of the others is one line to paste.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.protos import ROOT, SCRIPTS

PAGE = ROOT / "docs" / "grpcurl.md"
ADDRESS = "127.0.0.1:50051"
PATH = f"{SCRIPTS}:{os.environ['PATH']}"

DEFINITIONS = re.compile(r"^```sh\n(call\(\) .*?)^```$", re.M | re.S)
# A line to paste, and what it printed when the page was last played.
STEP = re.compile(
    r"^```sh\n(?P<line>(?!call\(\))[^\n]*)\n```\n(?:\n```(?:json|text)\n(?P<shown>.*?)^```\n)?",
    re.M | re.S,
)

UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
TIME = re.compile(r'"\d{4}-\d\d-\d\dT[\d:.]+Z"')
OPAQUE = re.compile(r'("(?:etag|cursor|next_page_token|previous_page_token)": )"[^"]+"')
MADE_SLUG = re.compile(r'("slug": )"[a-z-]+-[0-9a-f]{12}"')


def main() -> None:
    if not shutil.which("grpcurl", path=PATH):
        sys.exit("There is no grpcurl here, so docs/grpcurl.md stays as it is.")
    with tempfile.TemporaryDirectory() as temporary, fresh(Path(temporary)) as server:
        PAGE.write_text(played(PAGE.read_text(), server.paste))


def played(page: str, paste: Callable[[str], str]) -> str:
    """The page with what its lines print now; `paste` runs a line and answers what it prints."""
    masks = Masks()

    def show(step: re.Match[str]) -> str:
        printed = masks(paste(step["line"])).rstrip("\n")
        kind = "json" if printed.startswith("{") else "text"
        return f"```sh\n{step['line']}\n```\n\n```{kind}\n{printed}\n```\n"

    return STEP.sub(show, page)


class Masks:
    """Writes what is never the same twice in one way: the rule at the head of the page."""

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}

    def __call__(self, printed: str) -> str:
        printed = UUID.sub(lambda found: self._counted(found.group()), printed)
        printed = TIME.sub('"2026-01-01T12:00:00Z"', printed)
        # Whose clock is the first to say so: the server's, or grpcurl's.
        printed = printed.replace(
            "Message: Deadline Exceeded", "Message: context deadline exceeded"
        )
        return MADE_SLUG.sub(r'\1"…"', OPAQUE.sub(r'\1"…"', printed))

    def _counted(self, id: str) -> str:
        number = len(self._ids) + 1
        return self._ids.setdefault(id, f"00000000-0000-7000-8000-{number:012}")


@dataclass(frozen=True)
class Fresh:
    """A server with nothing in it, started in a folder of its own."""

    folder: Path
    address: str

    def paste(self, line: str, definitions: str = "") -> str:
        """What the line prints, and its errors, as on a terminal of somebody in that folder."""
        if not definitions:
            (definitions,) = DEFINITIONS.findall(PAGE.read_text())
        done = subprocess.run(
            ["bash", "-c", (definitions + line).replace(ADDRESS, self.address)],
            cwd=self.folder,
            env={**os.environ, "PATH": PATH},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout


@contextmanager
def fresh(folder: Path) -> Iterator[Fresh]:
    """`parley serve` in that folder, as long as the block lasts."""
    environment = {name: value for name, value in os.environ.items() if "PARLEY_" not in name}
    with (folder / "log").open("w") as log:
        serving = subprocess.Popen(
            [sys.executable, "-m", "service", "serve", "--address", "127.0.0.1:0"],
            cwd=folder,
            env={**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert serving.stdout is not None
    try:
        said = serving.stdout.readline()
        found = re.search(r"serves on (\S+:\d+)\.", said)
        if not found:
            sys.exit(f"The server did not start: {said}{(folder / 'log').read_text()}")
        yield Fresh(folder, found.group(1))
    finally:
        serving.terminate()
        serving.communicate(timeout=30)


if __name__ == "__main__":
    main()
