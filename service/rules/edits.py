"""What becomes of a message that somebody wants to edit."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from service.errors import FailedPrecondition, InvalidArgument, NotFound
from service.rules.etags import current_etag, require_etag
from service.rules.metadata import is_same

Row = Mapping[str, Any]

MAX_TOKENS = 2**31 - 1


def require_editable(message: Row | None, *, name: object) -> Row:
    """The message, if it is there and not deleted."""
    if message is None:
        raise NotFound("message", name)
    if message["deleted_at"] is not None:
        raise FailedPrecondition("MESSAGE_DELETED", name=name)
    return message


def edit(message: Row, wanted: Row, *, etag: str, by_actor: bool) -> Row:
    """What of the wanted values is new; raises where the message takes no such edit.

    Tokens that were the sum of input and output, or not known, become the sum of what these are
    now, unless they are wanted to be something else.
    """
    edited = {**message, **wanted}
    if wanted.get("tokens_used") is None and (
        "tokens_used" in wanted or message["tokens_used"] in (None, sum_of(message))
    ):
        edited["tokens_used"] = sum_of(edited)
    if (edited["tokens_used"] or 0) > MAX_TOKENS:
        field = "message.output_tokens"
        raise InvalidArgument("OUT_OF_BOUNDS", field=field, min=0, max=MAX_TOKENS)
    if by_actor and not edited["content"] and edited["metadata"] == "{}":
        raise InvalidArgument("REQUIRED", field="message.content")
    require_etag(etag, current_etag(message))
    return {name: edited[name] for name in edited if not _holds(message, name, edited[name])}


def sum_of(message: Row) -> int | None:
    """The tokens read and written, if anything is known of either."""
    known = [message[name] for name in ("input_tokens", "output_tokens")]
    return None if known == [None, None] else sum(count or 0 for count in known)


def editor_of(message: Row) -> UUID | None:
    """Who wrote what the message says now."""
    id: UUID | None = message["sender_id" if message["revision"] == 1 else "edited_by_user_id"]
    return id


def _holds(message: Row, name: str, value: Any) -> bool:
    if name == "metadata":
        return is_same(message[name], value)
    return bool(message[name] == value)
