"""The protos: compiled to Python, linted, and held against a release.

    python scripts/protos.py                 write the Python beside each .proto
    python scripts/protos.py --check         lint and format; fail if the committed Python differs
    python scripts/protos.py --against REF   fail if the clients of a commit would break
    python scripts/protos.py --released      the same, of the last release: the last tag vX.Y.Z

Nothing is fetched: the Google protos come from the installed googleapis-common-protos, and buf,
which knows no include path, is given the image that protoc built.
"""

import argparse
import io
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GOOGLEAPIS = Path(sysconfig.get_path("purelib"))
SCRIPTS = Path(sysconfig.get_path("scripts"))
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one = arguments.add_mutually_exclusive_group()
    one.add_argument("--check", action="store_true")
    one.add_argument("--against", metavar="REF")
    one.add_argument("--released", action="store_true")
    options = arguments.parse_args()

    if options.check:
        lint()
        require_generated()
    elif options.against:
        require_compatible(options.against)
    elif options.released:
        require_compatible_with_release()
    else:
        for old in generated(PROTOS).values():
            old.unlink()
        generate(PROTOS)


def generate(into: Path) -> None:
    """Compile every proto; service stubs only for those that have a service."""
    protos = sources(PROTOS)
    services = [proto for proto in protos if "\nservice " in proto.read_text()]

    protoc(PROTOS, protos, f"--python_out={into}", f"--mypy_out=quiet:{into}")
    stubs = (f"--grpc_python_out={into}", f"--mypy_grpc_out=quiet:{into}")
    protoc(PROTOS, services, *stubs)
    for stub in into.rglob("*_pb2_grpc.pyi"):
        stub.write_text(adapt(stub.read_text()))


def adapt(stub: str) -> str:
    """Let a servicer's method say what its second parameter is (ours take a Call, not grpc's
    context), and let it leave out what it does not serve.
    """
    freed, methods = re.subn(r"(?m)^( +context: ).+,$", r"\1_typing.Any,", stub)
    if not methods:
        sys.exit("mypy-protobuf writes its stubs differently now: see adapt().")
    return re.sub(r"(?m)^ +@_abc_1\.abstractmethod\n", "", freed)


def lint() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        image = build_image(PROTOS, Path(temporary) / "protos.binpb")
        buf("lint", image, "--path", "parley", otherwise="The protos break a rule in buf.yaml.")
    unformatted = "The protos are not formatted: run `buf format -w protos`."
    buf("format", PROTOS, "--diff", "--exit-code", otherwise=unformatted)


def require_generated() -> None:
    """Fail if the committed Python is not what the protos give."""
    with tempfile.TemporaryDirectory() as temporary:
        generate(Path(temporary))
        fresh, committed = contents(Path(temporary)), contents(PROTOS)
    stale = sorted(name for name in fresh | committed if fresh.get(name) != committed.get(name))
    if stale:
        sys.exit("Not what the protos give: run `make protos`.\n  " + "\n  ".join(stale))


def require_compatible_with_release() -> None:
    """Fail if the last release's clients would break, or if it exists and is not at hand."""
    release = last_release("tag", "--list", "--merged", "HEAD")
    if release:
        require_compatible(release)
        print(f"The clients of {release} would go on working.")
    elif elsewhere := last_release("ls-remote", "--tags", "--refs", "origin"):
        sys.exit(
            f"This clone has no {elsewhere}: git fetch --tags, and --unshallow if it is shallow."
        )
    else:
        print("No release is known here (a tag vX.Y.Z): nothing to hold the protos against.")


def last_release(*listing: str) -> str:
    """The highest version among the tags that git lists; empty where there is none to see."""
    listed = subprocess.run(
        ["git", *listing],
        cwd=ROOT,
        env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    tags = re.findall(r"(?m)\bv\d+\.\d+\.\d+$", listed.stdout)
    return max(tags, key=lambda tag: [int(part) for part in tag[1:].split(".")], default="")


def require_compatible(ref: str) -> None:
    """Fail if somebody who generated a client from an earlier commit would notice."""
    archive = ["git", "archive", ref, "protos"]
    packed = subprocess.run(archive, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tempfile.TemporaryDirectory() as temporary:
        before = Path(temporary)
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(before, filter="data")
        old = build_image(before / "protos", before / "old.binpb")
        new = build_image(PROTOS, before / "new.binpb")
        broken = f"Clients of {ref} would break: add and deprecate, but do not change."
        buf("breaking", new, "--against", old, "--path", "parley", otherwise=broken)


def build_image(protos: Path, image: Path) -> Path:
    options = ("--include_imports", "--include_source_info", f"--descriptor_set_out={image}")
    protoc(protos, sources(protos), *options)
    return image


def sources(protos: Path) -> list[Path]:
    return sorted(protos.rglob("*.proto"))


def generated(folder: Path) -> dict[str, Path]:
    files = (file for pattern in GENERATED for file in folder.rglob(pattern))
    return {str(file.relative_to(folder)): file for file in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: file.read_bytes() for name, file in generated(folder).items()}


def protoc(root: Path, protos: list[Path], *options: str) -> None:
    plugins = [f"--plugin={SCRIPTS / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{root}", f"-I{GOOGLEAPIS}", *plugins]
    if subprocess.call([*command, *options, *protos], cwd=ROOT):
        sys.exit("The protos do not compile.")


def buf(*arguments: str | Path, otherwise: str) -> None:
    if subprocess.call([SCRIPTS / "buf", *arguments], cwd=ROOT):
        sys.exit(otherwise)


if __name__ == "__main__":
    main()
