"""Etags: opaque to clients; the revision, and enough of the id that it fits no other resource."""

import re
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from service.errors import Aborted

FORM = re.compile(r"[0-9]{1,10}-[0-9a-f]{8}")


def etag_of(id: UUID | str, revision: int) -> str:
    return f"{revision}-{str(id)[-8:]}"


def current_etag(row: Mapping[str, Any]) -> str:
    """Of a resource with an id; deleting a message changes its etag, but not its revision."""
    return etag_of(row["id"], row["revision"] + row.get("mark_count", 0))


def require_etag(given: str, current: str | None) -> None:
    """Raise if an etag was given and is not the current one."""
    if given and given != current:
        raise Aborted("ETAG_MISMATCH")
