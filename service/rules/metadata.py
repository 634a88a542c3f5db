"""Metadata as JSON: what a merge patch makes of it, and whether it says the same."""

import json
from collections.abc import Mapping
from typing import Any


def merged(target: Any, patch: Mapping[str, Any]) -> dict[str, Any]:
    """RFC 7396: the target with the patch's keys put in, at every depth; null takes one out."""
    result = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            result[key] = merged(result.get(key), value)
        else:
            result[key] = value
    return result


def is_same(one: str, other: str) -> bool:
    """Whether two texts are one value: the database spells and orders it in its own way."""
    # Every number is a double, however it is written.
    return bool(json.loads(one, parse_int=float) == json.loads(other, parse_int=float))
