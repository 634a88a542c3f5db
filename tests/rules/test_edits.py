"""An edit: what is new, and what becomes of the tokens."""

from typing import Any
from uuid import UUID

import pytest

from service.errors import ParleyError
from service.rules.edits import edit, require_editable

MESSAGE: dict[str, Any] = {
    "id": UUID(int=1),
    "revision": 1,
    "mark_count": 0,
    "deleted_at": None,
    "content": "tea",
    "metadata": '{"a": 1}',
    "tokens_used": None,
    "input_tokens": None,
    "output_tokens": None,
    "model": "",
}


def changes(message: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    return dict(edit({**MESSAGE, **message}, wanted, etag="", by_actor=True))


def test_only_what_is_new_changes() -> None:
    assert changes({}, content="tea", metadata='{"a":1.0}', model="") == {}
    assert changes({}, content="coffee", metadata='{"a":1.0}') == {"content": "coffee"}


@pytest.mark.parametrize(
    ("before", "wanted", "expected"),
    [
        # (tokens_used, input_tokens, output_tokens) before, what is wanted, tokens_used after.
        ((None, None, None), {"input_tokens": 3}, 3),
        ((None, None, None), {"tokens_used": 0}, 0),
        # A sum stays one.
        ((5, 2, 3), {"output_tokens": 4}, 6),
        ((5, 2, 3), {"output_tokens": None}, 2),
        ((5, 2, 3), {"content": "x"}, 5),
        # What was said to be something else stays what was said.
        ((9, 2, 3), {"output_tokens": 4}, 9),
        ((9, None, None), {"input_tokens": 4}, 9),
        # To take it away is to leave it to the sum.
        ((9, 2, 3), {"tokens_used": None}, 5),
        ((9, None, None), {"tokens_used": None}, None),
        ((5, 2, 3), {"tokens_used": 7, "output_tokens": 4}, 7),
    ],
)
def test_tokens_used_is_what_is_given_or_else_the_sum(
    before: tuple[int | None, ...], wanted: dict[str, Any], expected: int | None
) -> None:
    names = ("tokens_used", "input_tokens", "output_tokens")
    message = dict(zip(names, before, strict=True))
    after = {**message, **changes(message, **wanted)}
    assert after["tokens_used"] == expected


def reason(call: Any) -> str:
    with pytest.raises(ParleyError) as refused:
        call()
    return refused.value.reason


def test_what_cannot_be_is_refused() -> None:
    big = {"input_tokens": 2**31 - 1}
    assert reason(lambda: changes(big, output_tokens=1)) == "OUT_OF_BOUNDS"
    assert reason(lambda: changes({}, content="", metadata="{}")) == "REQUIRED"
    assert edit(MESSAGE, {"content": "", "metadata": "{}"}, etag="", by_actor=False)
    assert reason(lambda: edit(MESSAGE, {}, etag="2-00000001", by_actor=True)) == "ETAG_MISMATCH"
    assert reason(lambda: require_editable(None, name=1)) == "MESSAGE_NOT_FOUND"
    assert reason(lambda: require_editable({**MESSAGE, "deleted_at": 1}, name=1)) == (
        "MESSAGE_DELETED"
    )
