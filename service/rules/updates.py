"""What an update asks for that is not so already."""

from collections.abc import Mapping
from typing import Any

from service.rules.metadata import is_same

Row = Mapping[str, Any]


def news(row: Row, wanted: Row) -> dict[str, Any]:
    """Those of the wanted values that the row does not hold."""
    return {name: value for name, value in wanted.items() if not _holds(row, name, value)}


def _holds(row: Row, name: str, value: Any) -> bool:
    if name == "metadata":
        return is_same(row[name], value)
    return bool(row[name] == value)
