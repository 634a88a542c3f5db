"""The pages that are made say all there is, and nothing that is no more."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FileDescriptor

from scripts import contract, docs, markdown
from service import errors
from service.reasons import REASONS

from .access_matrix import MODULES

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])

STATUS_OF = {kind.__name__: kind.status for kind in errors.ParleyError.__subclasses__()}


def test_the_reference_is_what_the_protos_give() -> None:
    assert docs.API.read_text() == docs.api(), "run `make docs`"


def test_the_errors_are_what_the_code_gives() -> None:
    assert docs.ERRORS.read_text() == docs.catalogue(), "run `make docs`"


# What the reference holds


def section(page: str, heading: str) -> str:
    """What stands below a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", page, re.M | re.S)
    assert found, f"no heading {heading}"
    return found.group(1)


def messages(file: FileDescriptor) -> Iterator[Descriptor]:
    yield from file.message_types_by_name.values()


@pytest.mark.parametrize(
    "file", [module.DESCRIPTOR for module in MODULES], ids=lambda file: file.name
)
def test_the_reference_has_every_rpc_field_and_value(file: FileDescriptor) -> None:
    page = docs.API.read_text()

    for service in file.services_by_name.values():
        for method in service.methods:
            assert "Scope `" in section(page, method.name)
    for message in messages(file):
        points = section(page, message.name)
        for field in message.fields:
            assert re.search(rf"^ *- `{field.name}` .*: \S", points, re.M), field.full_name
        for oneof in message.oneofs:
            assert f"one of `{oneof.name}`" in points or oneof.name.startswith("_")
        for enum in message.enum_types:
            values = section(page, f"{message.name}.{enum.name}")
            assert all(f"`{value.name}` = {value.number}: " in values for value in enum.values)


def test_the_reference_tells_who_may_call_and_what_streams() -> None:
    page = docs.API.read_text()

    assert "Scope `admin`, as the system only (`system`)" in section(page, "PurgeUser")
    assert "Scope `verify-password`, with or without an actor" in section(page, "VerifyPassword")
    assert "Responses stream out." in section(page, "Watch")
    assert "stream" not in section(page, "ListEvents")


def test_the_reference_tells_what_a_field_takes() -> None:
    points = section(docs.API.read_text(), "Message")

    assert "- `sequence` int64, *output only*: " in points
    assert "- `tokens_used` int32, *may be absent*: " in points
    request = section(docs.API.read_text(), "BatchSendMessagesRequest")
    assert "- `messages` repeated [NewMessage], *required*: " in request


# What the errors hold


def test_each_reason_has_a_section_and_each_section_a_reason() -> None:
    page = docs.ERRORS.read_text()

    assert re.findall(r"^## ([A-Z_]+)$", page, re.M) == list(REASONS)
    for name, reason in REASONS.items():
        text = section(page, name)
        assert text.strip().startswith(reason.status)
        assert "**What to do.** " in text
        assert "**Raised by** " in text


def raised() -> Iterator[contract.Cause]:
    """Each status and reason that stand together where the service raises or rejects."""
    for path in sorted((ROOT / "service").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                reason = str(node.args[0].value)
                if name == "NotFound":
                    yield "NOT_FOUND", f"{reason.upper()}_NOT_FOUND"
                elif name == "reject":
                    yield "INVALID_ARGUMENT", reason
                elif name in STATUS_OF:
                    yield STATUS_OF[name], reason


def named() -> set[contract.Cause]:
    """Each status and reason that the protos name together."""
    found = contract.common_causes().union(*map(contract.causes_of, contract.rpcs()))
    return found.union(*(contract.causes(service.comment) for service in contract.services()))


def test_the_catalogue_has_what_the_code_raises_with_its_status() -> None:
    found = set(raised())

    assert len(found) > 60
    for status, reason in found:
        assert status in REASONS[reason].statuses, (status, reason)


def test_the_catalogue_has_nothing_that_the_code_never_says() -> None:
    code = [each for each in (ROOT / "service").rglob("*.py") if each.name != "reasons.py"]
    text = "".join(path.read_text() for path in code)

    for name in REASONS:
        kind = name.removesuffix("_NOT_FOUND").lower()
        assert f'"{name}"' in text or f'NotFound("{kind}"' in text, name


def test_the_protos_name_each_reason_but_those_of_single_fields() -> None:
    declared = {(status, name) for name, each in REASONS.items() for status in each.statuses}

    missing = {cause for cause in declared - named() if cause[0] != "INVALID_ARGUMENT"}

    assert not missing


def test_each_reason_that_the_protos_name_exists() -> None:
    assert named() <= {(s, name) for name, each in REASONS.items() for s in each.statuses}
    # What leads each point of a "Raises": nothing but statuses, reasons and details.
    for rpc in contract.rpcs():
        raises = rpc.comment.partition("Raises:")[2]
        for bullet, point in markdown.blocks(raises):
            head = re.findall(r"\b[A-Z][A-Z_]+[A-Z]\b", point.partition(":")[0])
            assert not bullet or head, (rpc.path, point)
            assert all(word in REASONS or word in contract.STATUSES for word in head), point


def test_who_raises_what_follows_from_the_lists() -> None:
    page = docs.ERRORS.read_text()

    assert "[SendMessage], [BatchSendMessages], [StreamMessage]" in section(
        page, "SEQUENCE_MISMATCH"
    )
    assert "**Raised by** [Watch]." in section(page, "WATCH_TOO_SLOW")
    assert "any RPC" in section(page, "SHUTTING_DOWN")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NOT_FOUND USER_NOT_FOUND: none", {("NOT_FOUND", "USER_NOT_FOUND")}),
        (
            "PERMISSION_DENIED PERMISSION_DENIED: no; ACT_AS_DENIED: no",
            {("PERMISSION_DENIED", "PERMISSION_DENIED"), ("PERMISSION_DENIED", "ACT_AS_DENIED")},
        ),
        ("DEADLINE_EXCEEDED: late", {("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")}),
        ("ABORTED: another OBSERVER, USER_NOT_FOUND", set()),
    ],
)
def test_a_list_of_errors_is_read_as_people_read_it(text: str, found: set[contract.Cause]) -> None:
    assert set(contract.causes(text)) == found


# How they read


def test_made_pages_fit_a_terminal() -> None:
    for page in (docs.API, docs.ERRORS):
        lines = [line for line in page.read_text().splitlines() if not line.startswith("[")]
        assert max(map(len, lines)) <= markdown.WIDTH


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_in_a_page_leads_somewhere(page: Path) -> None:
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    inline, defined = r"\]\(((?!http)[^)\s]+)\)", r"^\[[^]]+\]: ((?!http)\S+)$"

    for target in re.findall(f"{inline}|{defined}", text, re.M):
        path, _, fragment = "".join(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert fragment in map(markdown.anchor, headings), target


def test_what_is_a_link_in_a_made_page_is_defined() -> None:
    for page in (docs.API, docs.ERRORS):
        text = re.sub(r"`[^`\n]*`", "", page.read_text())
        definition = re.compile(r"(?m)^\[([^]]+)\]: \S+$")
        used = set(re.findall(r"\[([\w.]+)\](?!\()", definition.sub("", text)))
        assert used == set(definition.findall(text))


def test_no_two_headings_of_a_made_page_are_one() -> None:
    for page in (docs.API, docs.ERRORS):
        found = [markdown.anchor(each) for each in re.findall(r"(?m)^#+ (.*)$", page.read_text())]
        assert len(set(found)) == len(found)


def test_a_comment_becomes_paragraphs_and_points() -> None:
    comment = "One\nline.\n\nRaises:\n- A: first,\n  and on.\n- B.\nAfter it."

    assert (
        markdown.prose(comment, str)
        == "One line.\n\nRaises:\n\n- A: first, and on.\n- B.\n\nAfter it."
    )


def test_a_status_is_a_link_only_as_a_reason() -> None:
    link = markdown.Links({"DENIED_SO": "#d", "GetUser": "#g", "User": "#u"}, {"DENIED_SO"})

    text = link("DENIED_SO DENIED_SO: GetUser, `GetUser`, a User")

    assert text == "DENIED_SO [DENIED_SO]: [GetUser], `GetUser`, a User"
    assert link.definitions() == "[DENIED_SO]: #d\n[GetUser]: #g"


def test_a_line_that_would_become_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="Word it otherwise"):
        markdown.wrapped("x" * 99 + " - and on")
