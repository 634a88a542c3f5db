"""Merge patches: the examples of RFC 7396 whose target and patch are objects, and some more."""

from typing import Any

import pytest

from service.rules.metadata import is_same, merged


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        # What is no object is replaced by one; what is in a list is not looked into.
        ({"a": 1}, {"a": {"b": 2}}, {"a": {"b": 2}}),
        ({"a": 1}, {"a": [None]}, {"a": [None]}),
        ({"a": 1}, {}, {"a": 1}),
        ({"a": 1}, {"b": None}, {"a": 1}),
    ],
)
def test_a_patch_says_what_to_change(
    target: dict[str, Any], patch: dict[str, Any], result: dict[str, Any]
) -> None:
    before = repr(target)
    assert merged(target, patch) == result
    assert repr(target) == before


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"a": 1, "b": [1.0]}', '{"b":[1],"a":1}', True),
        ('{"a": 1' + "0" * 308 + "}", '{"a":1e+308}', True),
        ('{"a": 1}', '{"a": "1"}', False),
        ('{"a": null}', "{}", False),
    ],
)
def test_metadata_is_the_same_however_it_is_spelled(one: str, other: str, same: bool) -> None:
    assert is_same(one, other) is same
