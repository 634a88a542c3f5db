"""Marking as deleted, taking the mark away, removing for good: one story for all that can be."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

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


def deleter_or_sender(message: Row) -> UUID | None:
    """Whose a message is while it is deleted: its author's no more, if somebody else did it."""
    id: UUID | None = message["deleted_by_user_id" if message["deleted_at"] else "sender_id"]
    return id


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
