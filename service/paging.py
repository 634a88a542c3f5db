"""Page sizes, page tokens, and cursors of the change feed.

A token is a position, signed together with everything it may be used for: method, filters, order,
parent and actor. It is opaque, cannot be forged or moved, and never grants access: what it leads
to is authorised like any first page.
"""

import base64
import hmac
import json
from collections.abc import Callable, Iterable
from datetime import datetime
from hashlib import sha256
from typing import Any, TypeVar
from uuid import UUID

from google.protobuf.message import Message as ProtoMessage

from service.errors import InvalidArgument, Unavailable
from service.identity import Call
from service.rules.feed import Place, Subject

# Every answer stays below this, far from the 4 MiB at which clients refuse one.
MAX_RESPONSE_BYTES = 1 << 20

SIGNATURE_BYTES = 16
BINDING_BYTES = 8

Position = list[str | int]
# Made once: json.dumps makes an encoder for each call that wants it dense.
_compact = json.JSONEncoder(separators=(",", ":")).encode
PartT = TypeVar("PartT")


class PageTokens:
    """Seals positions into tokens and opens them again.

    All replicas sign with one key, kept in the database: there is none until it answers.
    """

    def __init__(self) -> None:
        self._key: bytes | None = None

    def use(self, key: bytes) -> None:
        self._key = key

    def seal(self, position: Position, binding: bytes) -> str:
        body = binding + _compact(position).encode()
        return _spell(self._sign(body) + body)

    def open(self, token: str, binding: bytes) -> Position | None:
        """The position, or None for an empty token. Raises for a forged or misplaced one."""
        if not token:
            return None
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except ValueError:
            raw = b""
        signature, body = raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES:]
        # Base64 has several spellings for some bytes; one of them was issued.
        if not hmac.compare_digest(signature, self._sign(body)) or token != _spell(raw):
            raise InvalidArgument("INVALID_PAGE_TOKEN", field="page_token")
        if not hmac.compare_digest(body[:BINDING_BYTES], binding):
            raise InvalidArgument("PAGE_TOKEN_MISMATCH", field="page_token")
        position: Position = json.loads(body[BINDING_BYTES:])
        return position

    def _sign(self, body: bytes) -> bytes:
        if self._key is None:
            raise Unavailable("DATABASE_UNAVAILABLE")
        return hmac.digest(self._key, body, "sha256")[:SIGNATURE_BYTES]


class FeedCursors:
    """Places in the change feed as opaque strings, bound to what is read and to the actor."""

    def __init__(self, tokens: PageTokens) -> None:
        self._tokens = tokens

    def sealer(
        self, *, era: int, subject: Subject, actor_id: UUID | None
    ) -> Callable[[Place], str]:
        """What makes cursors of places for one reader. `era`: in which life of the database."""
        binding = _feed_binding(subject, actor_id)

        def seal(place: Place) -> str:
            id = place.conversation_id.hex
            return self._tokens.seal([era, place.era, place.xid, id, place.version], binding)

        return seal

    def open(self, cursor: str, *, subject: Subject, actor_id: UUID | None) -> tuple[Place, int]:
        """The place, and the era in which it was given out."""
        try:
            position = self._tokens.open(cursor, _feed_binding(subject, actor_id))
        except InvalidArgument:
            raise InvalidArgument("INVALID_CURSOR", field="resume_cursor") from None
        assert position
        era, place_era, xid, conversation_id, version = position
        id = UUID(str(conversation_id))
        return Place(int(place_era), int(xid), id, int(version)), int(era)


def _feed_binding(subject: Subject, actor_id: UUID | None) -> bytes:
    scope = ["events", str(subject.conversation_id), str(subject.user_id), str(actor_id)]
    return sha256(json.dumps(scope).encode()).digest()[:BINDING_BYTES]


def _spell(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def binding(
    call: Call, request: ProtoMessage, parent: UUID | None = None, *, free: Iterable[str] = ()
) -> bytes:
    """What a token of this request is bound to; page size and the token itself are free, and so
    are the fields named.

    `parent` is the resolved one, so that a page asked for by slug goes on by id.
    """
    filters = type(request)()
    filters.CopyFrom(request)
    filters.DiscardUnknownFields()  # type: ignore[attr-defined,unused-ignore]
    for name in ("page_size", "page_token", *(["conversation_id"] if parent else []), *free):
        filters.ClearField(name)
    scope = json.dumps([call.method, str(call.actor_id), str(parent)]).encode()
    return sha256(scope + filters.SerializeToString(deterministic=True)).digest()[:BINDING_BYTES]


def place(at: datetime, id: UUID) -> Position:
    """A position in a list that is ordered by time, then id."""
    return [at.isoformat(), str(id)]


def time_and_id(position: Position | None) -> tuple[datetime, UUID] | None:
    """What `place` was made from."""
    if position is None:
        return None
    return datetime.fromisoformat(str(position[0])), UUID(str(position[1]))


def _encoded_size(message: ProtoMessage) -> int:
    return message.ByteSize() + 8


def cut(
    parts: Iterable[PartT],
    *,
    limit: int = MAX_RESPONSE_BYTES,
    size: Callable[[Any], int] = _encoded_size,
) -> list[PartT]:
    """As many of the parts as fit into one response, or into `limit` bytes; at least one. They are
    messages, unless their `size` says otherwise.
    """
    kept: list[PartT] = []
    total = 0
    for part in parts:
        total += size(part)
        if kept and total > limit:
            break
        kept.append(part)
    return kept
