"""Marking as deleted, taking the mark away, removing for good: one story for all that can be."""

from collections.abc import Mapping
from typing import Any

from service.errors import AlreadyExists, FailedPrecondition, NotFound
from service.rules.etags import current_etag, require_etag

Row = Mapping[str, Any]


def delete(row: Row | None, *, kind: str, name: object, etag: str, allow_missing: bool) -> bool:
    """Whether there is anything to mark: not where it is marked already, if that is allowed."""
    if row is None or row["deleted_at"] is not None:
        if allow_missing:
            return False
        raise NotFound(kind, name)
    require_etag(etag, current_etag(row))
    return True


def undelete(row: Row | None, *, kind: str, name: object, etag: str) -> None:
    """Raise unless there is a mark to take away."""
    if row is None:
        raise NotFound(kind, name)
    if row["deleted_at"] is None:
        raise AlreadyExists("NOT_DELETED", kind, name)
    require_etag(etag, current_etag(row))


def purge(row: Row | None, *, kind: str, name: object, etag: str, allow_missing: bool) -> bool:
    """Whether there is anything to remove; only what is marked may be."""
    if row is None:
        if allow_missing:
            return False
        raise NotFound(kind, name)
    if row["deleted_at"] is None:
        raise FailedPrecondition("NOT_DELETED", name=name)
    require_etag(etag, current_etag(row))
    return True
