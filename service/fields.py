"""Reading a request's fields: every rule that the request alone decides.

A `Fields` gathers all violations and raises them together when its block ends, so that a caller
mends a request once. Limits count Unicode code points ("characters") or UTF-8 bytes, as they say.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from hashlib import sha256
from json.encoder import encode_basestring
from types import TracebackType
from typing import Self, TypeVar
from uuid import UUID

import orjson
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from service import ids
from service.errors import InvalidArgument
from service.identity import Call
from service.rules import etags, search
from service.rules.requests import RequestId

MAX_CONTENT_BYTES = 256 * 1024
MAX_PASSWORD_BYTES = 1_024
MAX_METADATA_BYTES = 16 * 1024
MAX_METADATA_DEPTH = 16
MAX_METADATA_KEYS = 64
MAX_METADATA_KEY_LENGTH = 128
MAX_PAGE_SIZE = 1_000
DEFAULT_PAGE_SIZE = 50
MAX_QUERY_LENGTH = 512
MAX_QUERY_TERMS = 32
MAX_AHEAD = timedelta(minutes=5)

UUID_FORM = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
EMAIL = re.compile(r"[^\s@\"(),:;<>\[\]\\]+@[^\s@\"(),:;<>\[\]\\.]+(\.[^\s@\"(),:;<>\[\]\\.]+)+")
REQUEST_ID = re.compile(r"[\x20-\x7e]{1,64}")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST_SECOND = int((datetime(1, 1, 1, tzinfo=UTC) - EPOCH).total_seconds())
FINAL_SECOND = int((datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC) - EPOCH).total_seconds())

# asyncpg stores these as infinities, which it then cannot read.
INFINITIES = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))

# Letters and symbols by category, yet they show nothing.
INVISIBLE_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
# They reorder the text around them: what a person reads is not what is stored.
BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

EnumT = TypeVar("EnumT", bound=StrEnum)


class Fields:
    """The fields of one request. Use as a context manager: leaving it raises what was found."""

    def __init__(self) -> None:
        self._errors: list[InvalidArgument] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None and self._errors:
            raise InvalidArgument.of(self._errors)

    def reject(self, reason: str, field: str, **known: object) -> None:
        """Note a violation and go on."""
        self._errors.append(InvalidArgument(reason, field=field, **known))

    # Names

    def user(self, field: str, value: str, *, required: bool = True) -> UUID | str | None:
        """A user's id or username."""
        if not value:
            if required:
                self.reject("REQUIRED", field)
            return None
        if UUID_FORM.fullmatch(value):
            return self._id(field, value)
        if len(value) > 64 or any(map(_hidden, value)):
            self.reject("INVALID_REFERENCE", field, rule="a user's id (a UUID) or username")
            return None
        return value

    def conversation(self, field: str, value: str) -> UUID | str:
        """A conversation's id or slug."""
        if not value:
            self.reject("REQUIRED", field)
        elif UUID_FORM.fullmatch(value):
            return self._id(field, value)
        elif not SLUG.fullmatch(value):
            self.reject("INVALID_REFERENCE", field, rule="a conversation's id (a UUID) or slug")
        return value

    def id(self, field: str, value: str) -> UUID:
        """An id, and nothing else."""
        if UUID_FORM.fullmatch(value):
            return self._id(field, value)
        self.reject("INVALID_REFERENCE", field, rule="an id: a UUID of 36 characters")
        return UUID(int=0)

    def _id(self, field: str, value: str) -> UUID:
        id: UUID = ids.UUID(value)
        if id.int == 0:
            self.reject("INVALID_REFERENCE", field, rule="an id; this one is all zeros")
        return id

    def message_key(
        self, request: ProtoMessage, oneof: str = "key", prefix: str = "", *, lowest: int = 1
    ) -> UUID | int:
        """The message that a oneof of `…message_id` and `…sequence` names; required."""
        key = self.optional_message_key(request, oneof, prefix, lowest=lowest)
        if key is None:
            self.reject("REQUIRED", f"{prefix}message_id")
            return 0
        return key

    def optional_message_key(
        self, request: ProtoMessage, oneof: str, prefix: str = "", *, lowest: int = 1
    ) -> UUID | int | None:
        name = request.WhichOneof(oneof)
        if name is None:
            return None
        value = getattr(request, name)
        if isinstance(value, str):
            return self.id(f"{prefix}{name}", value)
        if value < lowest:
            self.reject("OUT_OF_BOUNDS", f"{prefix}{name}", min=lowest, max=2**63 - 1)
        return int(value)

    def username(self, field: str, value: str) -> str:
        """A new username: as people write them, but visible, normalised and no UUID."""
        if not value:
            self.reject("REQUIRED", field)
        elif len(value) > 64:
            self.reject("FIELD_TOO_LONG", field, limit=64, unit="characters")
        elif any(map(_hidden, value)) or unicodedata.category(value[0]).startswith("M"):
            # A mark that begins a name shows on what stands before it, or nowhere.
            self.reject(
                "INVALID_CHARACTER", field, rule="no control, blank or invisible characters"
            )
        elif not unicodedata.is_normalized("NFC", value):
            self.reject("NOT_NORMALIZED", field)
        elif UUID_FORM.fullmatch(value):
            self.reject("INVALID_VALUE", field, rule="it must not look like a UUID")
        return value

    def slug(self, field: str, value: str) -> str:
        if not SLUG.fullmatch(value) or UUID_FORM.fullmatch(value):
            self.reject("INVALID_SLUG", field)
        return value

    def email(self, field: str, value: str) -> str | None:
        if not value:
            return None
        if len(value) > 254 or not EMAIL.fullmatch(value) or any(map(_hidden, value)):
            self.reject("INVALID_EMAIL", field)
        return value

    def password(self, field: str, value: str) -> str:
        """A password, byte for byte: 1 to 1,024 bytes of anything but NUL."""
        if not value:
            self.reject("REQUIRED", field)
        elif len(value.encode()) > MAX_PASSWORD_BYTES:
            self.reject("FIELD_TOO_LONG", field, limit=MAX_PASSWORD_BYTES, unit="bytes")
        elif "\0" in value:
            self.reject("INVALID_CHARACTER", field, rule="no NUL (U+0000)")
        return value

    def etag(self, field: str, value: str) -> str:
        if value and not etags.FORM.fullmatch(value):
            self.reject("INVALID_ETAG", field)
        return value

    def external_id(self, field: str, value: str) -> str | None:
        """The id in another system: at most 256 bytes on one line."""
        if not value:
            return None
        if len(value.encode()) > 256:
            self.reject("FIELD_TOO_LONG", field, limit=256, unit="bytes")
        self._one_line(field, value)
        return value

    # Text

    def line(self, field: str, value: str, *, limit: int) -> str:
        """One line of text, kept as given. `limit` in characters."""
        if len(value) > limit:
            self.reject("FIELD_TOO_LONG", field, limit=limit, unit="characters")
        self._one_line(field, value)
        return value

    def _one_line(self, field: str, value: str) -> None:
        if value.isprintable() and value.isascii():
            return
        if any(
            character in BIDI_CONTROLS or unicodedata.category(character) in ("Cc", "Zl", "Zp")
            for character in value
        ):
            self.reject(
                "INVALID_CHARACTER",
                field,
                rule="no control characters, line breaks or bidirectional overrides",
            )

    def content(self, field: str, value: str) -> str:
        """A message's text, byte for byte; anything but NUL, which PostgreSQL cannot hold."""
        # Four bytes a character at the most: short texts need no encoding to be measured.
        if len(value) * 4 > MAX_CONTENT_BYTES and len(value.encode()) > MAX_CONTENT_BYTES:
            self.reject("FIELD_TOO_LONG", field, limit=MAX_CONTENT_BYTES, unit="bytes")
        if "\0" in value:
            self.reject("INVALID_CHARACTER", field, rule="no NUL (U+0000)")
        return value

    def query(self, field: str, value: str) -> search.Query:
        """What to search for: any text within the limits means something."""
        if not value.strip():
            self.reject("REQUIRED", field)
        if len(value) > MAX_QUERY_LENGTH:
            self.reject("FIELD_TOO_LONG", field, limit=MAX_QUERY_LENGTH, unit="characters")
            return search.parse("")
        if "\0" in value:
            self.reject("INVALID_CHARACTER", field, rule="no NUL (U+0000)")
        query = search.parse(value)
        if query.size > MAX_QUERY_TERMS:
            self.reject("TOO_MANY_ITEMS", field, limit=MAX_QUERY_TERMS)
        return query

    # Values

    def enum(
        self, field: str, number: int, kind: type[EnumT], default: EnumT | None = None
    ) -> EnumT:
        """A value of a protobuf enum. Unspecified is the default, or an error without one."""
        if number == 0 and default is not None:
            return default
        if number == 0:
            self.reject("REQUIRED", field)
        else:
            members = list(kind)
            if 1 <= number <= len(members):
                return members[number - 1]
            self.reject("INVALID_ENUM_VALUE", field, value=number)
        return next(iter(kind))

    def enums(self, field: str, numbers: Iterable[int], kind: type[EnumT]) -> list[EnumT]:
        """The values of a repeated enum."""
        return [self.enum(f"{field}[{n}]", number, kind) for n, number in enumerate(numbers)]

    def count(self, field: str, message: ProtoMessage, name: str) -> int | None:
        """An optional number that is not negative; absent is not 0."""
        if not message.HasField(name):
            return None
        value = int(getattr(message, name))
        if value < 0:
            self.reject("OUT_OF_BOUNDS", field, min=0, max=2**31 - 1)
        return value

    def within(self, field: str, value: int, *, low: int, high: int) -> int:
        """A number from `low` to `high`."""
        if not low <= value <= high:
            self.reject("OUT_OF_BOUNDS", field, min=low, max=high)
        return value

    def sequences(self, field: str, values: Iterable[int]) -> list[int]:
        """The numbers of messages, each once."""
        for n, value in enumerate(values):
            self.within(f"{field}[{n}]", value, low=1, high=2**63 - 1)
        return list(dict.fromkeys(values))

    def time(self, field: str, message: ProtoMessage, name: str) -> datetime | None:
        """A Timestamp between the years 1 and 9999, to the microsecond; None where absent."""
        if not message.HasField(name):
            return None
        value: Timestamp = getattr(message, name)
        if not FIRST_SECOND <= value.seconds <= FINAL_SECOND:
            self.reject("INVALID_TIME", field, rule="it lies outside the years 1 to 9999")
            return None
        if not 0 <= value.nanos < 1_000_000_000:
            self.reject("INVALID_TIME", field, rule="nanos must lie between 0 and 999999999")
            return None
        time = EPOCH + timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)
        if time in INFINITIES:
            self.reject("INVALID_TIME", field, rule="it is the first or last of all moments")
            return None
        return time

    def sent_time(self, field: str, message: ProtoMessage) -> datetime | None:
        """When a message was said, elsewhere: not in the future, give or take five minutes."""
        time = self.time(field, message, "sent_time")
        if time and time > datetime.now(UTC) + MAX_AHEAD:
            self.reject("INVALID_TIME", field, rule="it is more than 5 minutes ahead")
        return time

    def span(
        self, message: ProtoMessage, *, after: str, before: str
    ) -> tuple[datetime | None, datetime | None]:
        """A half-open span of time: from `after`, inclusive, to `before`, exclusive."""
        start, end = self.time(after, message, after), self.time(before, message, before)
        if start and end and start >= end:
            self.reject("INVALID_TIME_RANGE", before, other=after)
        return start, end

    def page_size(self, value: int) -> int:
        if value < 0:
            self.reject("INVALID_PAGE_SIZE", "page_size")
        return min(value, MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE

    def request_id(
        self, call: Call, request: ProtoMessage, *, named: UUID | str | None = None
    ) -> RequestId | None:
        """The digests of a request_id and its payload; None without one, and in a dry run.

        `named` is the conversation, for a request that is remembered outside it.
        """
        value: str = getattr(request, "request_id")  # noqa: B009 - each request has its own type
        if not value:
            return None
        if not REQUEST_ID.fullmatch(value):
            self.reject("INVALID_REQUEST_ID", "request_id")
        if getattr(request, "validate_only", False):
            return None
        scope = [call.caller.service, str(call.actor_id), call.method, value]
        if named is not None:
            scope.append(str(named))
        digest = sha256(orjson.dumps(scope)).digest()
        return RequestId(digest[:16], payload_hash(request))

    def metadata(self, field: str, value: Struct) -> str:
        """A Struct as JSON text. An unset Value counts as null; numbers are doubles."""
        if not value.fields:
            return "{}"
        try:
            if len(value.fields) > MAX_METADATA_KEYS:
                raise _Unacceptable("", f"more than {MAX_METADATA_KEYS} keys")
            size, plain = _struct(value, path="", depth=1)
            if size > MAX_METADATA_BYTES:
                raise _Unacceptable("", f"larger than {MAX_METADATA_BYTES} bytes of JSON")
        except _Unacceptable as error:
            self.reject("INVALID_METADATA", f"{field}{error.path}", rule=error.rule)
            return "{}"
        return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def payload_hash(request: ProtoMessage) -> bytes:
    """SHA-256 of what was asked for: without unknown fields, request_id and validate_only."""
    payload = type(request)()
    payload.CopyFrom(request)
    payload.DiscardUnknownFields()  # type: ignore[attr-defined,unused-ignore]
    payload.ClearField("request_id")
    if "validate_only" in payload.DESCRIPTOR.fields_by_name:
        payload.ClearField("validate_only")
    return sha256(payload.SerializeToString(deterministic=True)).digest()


def _hidden(character: str) -> bool:
    """Whether a character shows nothing, or stands for what has no character."""
    return character in INVISIBLE_LETTERS or unicodedata.category(character) in (
        "Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs",
    )  # fmt: skip


class _Unacceptable(Exception):
    def __init__(self, path: str, rule: str) -> None:
        self.path = path
        self.rule = rule


Json = dict[str, "Json"] | list["Json"] | str | float | int | bool | None


def _struct(value: Struct, path: str, depth: int) -> tuple[int, dict[str, Json]]:
    """The object, and its size: the bytes that PostgreSQL will print it as.

    `1e308` is five bytes of JSON here and 309 digits there; a page of such rows would be the size
    of a film.
    """
    if depth > MAX_METADATA_DEPTH:
        raise _Unacceptable(path, f"nested deeper than {MAX_METADATA_DEPTH}")
    sizes, plain = [], dict[str, Json]()
    for key, item in value.fields.items():
        where = f"{path}.{key[:40]}"
        if not key:
            raise _Unacceptable(path, "a key is empty")
        if len(key) > MAX_METADATA_KEY_LENGTH:
            raise _Unacceptable(where, f"a key is longer than {MAX_METADATA_KEY_LENGTH} characters")
        item_size, plain[_text(key, path)] = _value(item, where, depth)
        sizes.append(_length(key) + len(": ") + item_size)
    return _enclosed(sizes), plain


def _value(value: Value, path: str, depth: int) -> tuple[int, Json]:
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        return _length(value.string_value), _text(value.string_value, path)
    if kind == "number_value":
        return _number(value.number_value, path)
    if kind == "bool_value":
        return len(str(value.bool_value)), value.bool_value
    if kind == "struct_value":
        return _struct(value.struct_value, path, depth + 1)
    if kind == "list_value":
        if depth + 1 > MAX_METADATA_DEPTH:
            raise _Unacceptable(path, f"nested deeper than {MAX_METADATA_DEPTH}")
        items = [_value(item, path, depth + 1) for item in value.list_value.values]
        return _enclosed([size for size, _ in items]), [item for _, item in items]
    return len("null"), None


def _enclosed(sizes: list[int]) -> int:
    """The size of what stands in brackets, with ", " between."""
    return sum(sizes) + 2 * max(len(sizes), 1)


def _length(text: str) -> int:
    return len(encode_basestring(text).encode())


def _number(value: float, path: str) -> tuple[int, float | int]:
    if not math.isfinite(value):
        raise _Unacceptable(path, "a number is not finite")
    if value.is_integer() and abs(value) < 2**53:
        return len(str(int(value))), int(value)
    return len(format(Decimal(repr(value)), "f")), value


def _text(value: str, path: str) -> str:
    if "\0" in value:
        raise _Unacceptable(path.replace("\0", ""), "no NUL (U+0000)")
    return value
