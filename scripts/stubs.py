"""Stubs of the protos for clients in Go, TypeScript, Java and Rust, by each language's generator.

    python -m scripts.stubs              of those whose toolchain is here, into stubs/
    python -m scripts.stubs go rust      of these; fail where a toolchain is missing

The generators are those that the examples' project files name. With the stubs comes the contract in
one file, stubs/parley.binpb: a descriptor set that holds also what the protos import, for whoever
has no protoc. Python's stubs are made by `make protos`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.protos import PROTOS, ROOT, build_image, protoc, sources

EXAMPLES, STUBS = ROOT / "examples", ROOT / "stubs"
CONTRACT = STUBS / "parley.binpb"
TOOLS = {"go": "go", "typescript": "npm", "java": "mvn", "rust": "cargo"}
TS_PROTO = (
    "env=node",
    "importSuffix=.js",
    "outputServices=nice-grpc",
    "outputServices=generic-definitions",
    "outputJsonMethods=false",
    "useExactTypes=false",
    "esModuleInterop=true",
    # An int64 is not a number there, an enum's value reads as in the proto, a oneof is one of.
    "forceLong=bigint",
    "stringEnums=true",
    "oneof=unions-value",
)


class Failed(Exception):
    """A command ended badly."""


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("languages", nargs="*", metavar="LANGUAGE", help=", ".join(TOOLS))
    asked = arguments.parse_args().languages
    languages = asked or list(TOOLS)
    if unknown := set(languages) - set(TOOLS):
        arguments.error(f"{', '.join(unknown)}: there are {', '.join(TOOLS)}")

    missing = [language for language in languages if not shutil.which(TOOLS[language])]
    for language in missing:
        print(f"{language}: MISSING, there is no {TOOLS[language]} here")
    try:
        for language in languages:
            if language not in missing:
                print(f"{language}: {generate(language).relative_to(ROOT)}", flush=True)
    except Failed as failed:
        sys.exit(str(failed))
    if missing and asked:
        sys.exit(1)


def generate(language: str) -> Path:
    """Make a language's stubs anew; the folder that holds them."""
    describe()
    into = STUBS / language
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    if language == "go":
        generate_go(into)
    elif language == "typescript":
        generate_typescript(into)
    elif language == "java":
        generate_java(into)
    else:
        generate_rust(into)
    return into


def describe() -> None:
    """Write the descriptor set, if it changed: what builds from it looks at its time."""
    STUBS.mkdir(exist_ok=True)
    fresh = build_image(PROTOS, STUBS / "fresh.binpb")
    if CONTRACT.exists() and CONTRACT.read_bytes() == fresh.read_bytes():
        fresh.unlink()
    else:
        fresh.replace(CONTRACT)


def generate_go(into: Path) -> None:
    options = []
    for plugin in ("go", "go-grpc"):
        name = f"protoc-gen-{plugin}"
        options += [
            f"--plugin={name}={run('go', 'go', 'tool', '-n', name).strip()}",
            f"--{plugin}_out={into}",
            f"--{plugin}_opt=paths=source_relative",
        ]
    protoc(PROTOS, sources(PROTOS), *options)


def generate_typescript(into: Path) -> None:
    run("typescript", "npm", "install", "--silent", "--no-audit", "--no-fund")
    plugin = EXAMPLES / "typescript" / "node_modules" / ".bin" / "protoc-gen-ts_proto"
    options = (f"--ts_proto_out={into}", f"--ts_proto_opt={','.join(TS_PROTO)}")
    protoc(PROTOS, sources(PROTOS), f"--plugin={plugin}", *options)


def generate_java(into: Path) -> None:
    run("java", "mvn", "--quiet", "--batch-mode", "generate-sources")
    made = EXAMPLES / "java" / "target" / "generated-sources" / "protobuf"
    shutil.copytree(made, into, dirs_exist_ok=True)


def generate_rust(into: Path) -> None:
    """Rust's are made by a build script, into a folder that only cargo knows."""
    told = run("rust", "cargo", "build", "--quiet", "--message-format=json").splitlines()
    folders = [Path(line["out_dir"]) for line in map(json.loads, told) if "out_dir" in line]
    [made] = [file for folder in folders for file in folder.glob("parley.v1.rs")]
    shutil.copy(made, into)


def run(language: str, *command: str) -> str:
    """Run a command where the language's example is; what it printed."""
    folder = EXAMPLES / language
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failed(f"{done.stdout}{language}: `{' '.join(command)}` failed.")
    return done.stdout


if __name__ == "__main__":
    main()
