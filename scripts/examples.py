"""The examples, built and run against one fresh server: each tells the story of examples/README.md,
although every call is UNAVAILABLE at first, so that the published retry policy has work to do.

    python -m scripts.examples           those whose toolchain is here; says aloud which is not
    PARLEY_EXAMPLES="go rust" …          the same, but fail if one of these cannot run

With CI=true, all must run.
"""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from difflib import unified_diff
from pathlib import Path

from scripts import stubs
from scripts.protos import PROTOS, ROOT
from tests.gateway import refusing_once
from tests.process import Service

EXAMPLES = ROOT / "examples"
TOOLS = {"python": "python3"} | stubs.TOOLS
RUN = {
    "python": (".venv/bin/python", "main.py"),
    "go": ("./story",),
    "typescript": ("node", "dist/main.js"),
    "java": ("mvn", "--quiet", "--batch-mode", "exec:java"),
    "rust": ("target/debug/parley-example",),
}
SECONDS = 120  # for a story, on a machine that is busy


async def main() -> None:
    told: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        server = Service(Path(folder))
        await server.start()
        try:
            async with refusing_once(server.address) as address:
                settings = {"PARLEY_ADDRESS": address, "PARLEY_TOKEN": server.token}
                for language in filter(present, TOOLS):
                    told[language] = await asyncio.to_thread(tell, language, settings)
        finally:
            await server.stop()

    missing = [language for language in TOOLS if language not in told]
    failed = [language for language, right in told.items() if not right]
    for language in missing:
        print(f"{language}: MISSING, there is no {TOOLS[language]} here: NOT BUILT, NOT RUN")
    print(f"{len(told) - len(failed)} of {len(TOOLS)} examples told the story")
    failed += [language for language in required(os.environ) if language not in told]
    if failed:
        sys.exit(f"Not as examples/README.md has it: {', '.join(failed)}")


def present(language: str) -> bool:
    return shutil.which(TOOLS[language]) is not None


def required(environment: Mapping[str, str]) -> Sequence[str]:
    """The languages without which this fails."""
    if environment.get("CI") == "true":
        return list(TOOLS)
    return re.findall(r"\w+", environment.get("PARLEY_EXAMPLES", ""))


def tell(language: str, settings: Mapping[str, str]) -> bool:
    """Build the example and run it; whether it told the story."""
    try:
        started = time.monotonic()
        build(language)
        built = time.monotonic()
        story = run(language, settings)
        ended = time.monotonic()
    except (stubs.Failed, subprocess.SubprocessError) as failed:
        print(f"{language}: FAILED: {failed}\n", flush=True)
        return False

    print(f"{language}: built in {built - started:.1f} s, ran in {ended - built:.1f} s")
    print(story, flush=True)
    differences = compare(expected(), story)
    for line in differences:
        print(line, flush=True)
    return not differences


def run(language: str, settings: Mapping[str, str]) -> str:
    """What the example prints."""
    done = subprocess.run(
        RUN[language],
        cwd=EXAMPLES / language,
        env={**os.environ, **settings, "PYTHONPATH": str(PROTOS)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    # Some releases of Maven end their colours even where they began none.
    return done.stdout.replace("\x1b[0m", "")


def build(language: str) -> None:
    if language == "python":
        if not (EXAMPLES / "python" / ".venv" / "bin" / "pip").exists():
            stubs.run("python", sys.executable, "-m", "venv", ".venv")
        pip = (".venv/bin/pip", "install", "--quiet", "--disable-pip-version-check")
        stubs.run("python", *pip, "--requirement", "requirements.txt")
    elif language == "go":
        give(language, "gen")
        stubs.run("go", "go", "build", "-o", "story", ".")
    elif language == "typescript":
        give(language, "src/gen")
        stubs.run("typescript", "npm", "run", "--silent", "build")
    elif language == "java":
        stubs.run("java", "mvn", "--quiet", "--batch-mode", "compile")
    else:
        stubs.describe()
        stubs.run("rust", "cargo", "build", "--quiet")


def give(language: str, folder: str) -> None:
    """Put the stubs where the example looks for them."""
    into = EXAMPLES / language / folder
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(stubs.generate(language), into)


def expected() -> str:
    """The story as examples/README.md has it."""
    found = re.search(r"```text\n(.+?)```", (EXAMPLES / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def compare(expected: str, told: str) -> list[str]:
    """The lines in which a story differs from the one expected, whatever the names of its run."""
    lines = (masked(expected).splitlines(), masked(told).splitlines())
    return list(unified_diff(*lines, "expected", "told", lineterm=""))


def masked(story: str) -> str:
    return re.sub(r"\b(ada|ben|lunch)-[0-9a-f]{8}\b", r"\1-RUN", story)


if __name__ == "__main__":
    asyncio.run(main())
