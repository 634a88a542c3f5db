"""docs/grpcurl.md has a line for every RPC, and each prints what the page shows."""

import re
import shutil
from pathlib import Path

import pytest

from scripts import contract
from scripts.cookbook import DEFINITIONS, PAGE, PATH, STEP, Masks, fresh, played

from .access_matrix import MATRIX

# The same call by buf, for those who have no grpcurl; sed writes names and colons as grpcurl does.
BUF_CALL = (
    "call() { buf curl --protocol grpc --http2-prior-knowledge"
    ' -H "authorization: Bearer $(cat .parley/token)"'
    ' --reflect-header "authorization: Bearer $(cat .parley/token)"'
    ' "${@:3}" -d "$2" "http://127.0.0.1:50051/parley.v1.$1" 2>&1'
    r""" | sed -E ':a; s/("[a-z_]+)([A-Z])([A-Za-z]*": )/\1_\L\2\E\3/; ta; s/": +/": /'; }"""
)
# What only grpcurl can do.
GRPCURL_ALONE = re.compile(r"^grpcurl | -max-time | -v ")


def lines() -> list[str]:
    return [step["line"] for step in STEP.finditer(PAGE.read_text())]


def test_every_block_is_one_line_with_what_it_prints() -> None:
    page = PAGE.read_text()

    assert len(lines()) == page.count("```sh\n") - len(DEFINITIONS.findall(page))
    assert all(step["shown"] for step in STEP.finditer(page))


def test_every_rpc_has_a_line_with_its_whole_answer_or_is_named_as_not_served() -> None:
    outer = [re.sub(r"\$\(.*?\)'", "", line) for line in lines()]
    shown = {line.split()[1] for line in outer if re.fullmatch(r"call [^|]*", line)}
    unserved = set(re.findall(r"^- `parley\.v1\.(\w+/\w+)`$", PAGE.read_text(), re.M))

    assert unserved == {name for name, answers in MATRIX.items() if answers.startswith("UI")}
    assert {rpc.path for rpc in contract.rpcs()} == shown | unserved


def test_health_and_reflection_have_their_lines() -> None:
    for each in ("Health/Check", "Health/Watch", ":50051 list", ":50051 describe"):
        assert any(each in line for line in lines())


def test_what_is_never_the_same_twice_is_written_in_one_way() -> None:
    masks = Masks()
    ada, bob = "01a20391-d4a2-7cf8-8b3d-08e356040c03", "01a20391-d4bb-7829-940e-4608de53d5ee"

    assert masks(f'"id": "{bob}"') == '"id": "00000000-0000-7000-8000-000000000001"'
    assert masks(f'["{ada}", "{bob}"]').endswith('0002", "00000000-0000-7000-8000-000000000001"]')
    assert masks('"at": "2026-11-22T14:03:38.530780Z"') == '"at": "2026-01-01T12:00:00Z"'
    assert masks('"etag": "1-56040c03"') == '"etag": "…"'
    assert masks('"slug": "conversation-7d5ce39103d2"') == '"slug": "…"'
    assert masks('"slug": "release-1-0"') == '"slug": "release-1-0"'
    assert masks("  Message: Deadline Exceeded") == "  Message: context deadline exceeded"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not shutil.which("grpcurl", path=PATH), reason="no grpcurl here")
def test_each_line_prints_what_the_page_shows(tmp_path: Path) -> None:
    page = PAGE.read_text()

    with fresh(tmp_path) as server:
        assert played(page, server.paste) == page, "run `make docs`"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_call_answers_the_same_without_grpcurl(tmp_path: Path) -> None:
    (definitions,) = DEFINITIONS.findall(PAGE.read_text())
    by_buf = re.sub(r"^call\(\) .*", lambda _: BUF_CALL, definitions)
    masks = Masks()

    with fresh(tmp_path) as server:
        for step in STEP.finditer(PAGE.read_text()):
            if GRPCURL_ALONE.search(step["line"]):
                continue
            printed = masks(server.paste(step["line"], by_buf))
            # Errors it prints in a form of its own, with the details encoded.
            refused = re.search(r"^  Message: (.*)$", step["shown"], re.M)
            if refused:
                assert f'"message": "{refused[1]}"' in printed
            else:
                assert printed == step["shown"], step["line"]
