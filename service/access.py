"""Who may call what: read from the protos, deny by default.

Each RPC declares in its proto the scope that its caller needs and whether it is made for an actor.
A method that declares nothing stops the server at its start.
"""

import hmac
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

from google.protobuf.descriptor import MethodDescriptor

from parley.v1 import access_pb2
from service.errors import (
    InvalidArgument,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from service.identity import Call, Caller, Scope
from service.lookups import Lookups
from service.repositories.base import Row
from service.store import Store

# How long a revoked token may still work, and for how long calls need not ask the database.
TOKEN_CACHE_SECONDS = 5.0
MAX_CACHED_TOKENS = 10_000

SCOPES = {
    access_pb2.Access.SCOPE_READ: Scope.READ,
    access_pb2.Access.SCOPE_WRITE: Scope.WRITE,
    access_pb2.Access.SCOPE_ADMIN: Scope.ADMIN,
    access_pb2.Access.SCOPE_VERIFY_PASSWORD: Scope.VERIFY_PASSWORD,
}

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Access:
    """What a method asks of its caller."""

    scope: Scope
    rule: int


def access_of(method: MethodDescriptor) -> Access:
    """The access option of a method; raises for one without."""
    option = method.GetOptions().Extensions[access_pb2.access]
    if option.scope not in SCOPES or option.actor == access_pb2.Access.ACTOR_UNSPECIFIED:
        raise RuntimeError(f"{method.full_name} declares no access: add the option to its proto.")
    return Access(SCOPES[option.scope], option.actor)


class Gatekeeper:
    """Turns a call's metadata into a `Call`, or refuses it."""

    def __init__(self, store: Store, lookups: Lookups) -> None:
        self._store = store
        self._lookups = lookups
        self._tokens: dict[str, tuple[float, Row | None]] = {}
        # By the hash of what they sent: until when that is known to be good, and whose it is.
        self._callers: dict[bytes, tuple[float, Caller]] = {}

    async def authenticate(self, metadata: Metadata) -> Caller:
        """The service behind the bearer token."""
        values = [value for key, value in metadata if key == "authorization"]
        if not values:
            raise Unauthenticated("MISSING_CREDENTIALS")
        if len(values) > 1:
            raise Unauthenticated("INVALID_CREDENTIALS")
        sent = hash_of(str(values[0]))
        good_until, known = self._callers.get(sent, (0.0, None))
        if known and time.monotonic() < good_until:
            return known
        scheme, _, token = str(values[0]).partition(" ")
        key_id, secret = split_token(token)
        if scheme.lower() != "bearer" or not key_id:
            raise Unauthenticated("INVALID_CREDENTIALS")
        asked_at, row = await self._token(key_id)
        if row is None or not hmac.compare_digest(row["secret_hash"], hash_of(secret)):
            raise Unauthenticated("INVALID_CREDENTIALS")
        left = TOKEN_CACHE_SECONDS
        if row["expires_at"]:
            left = (row["expires_at"] - datetime.now(UTC)).total_seconds()
        if left <= 0 or row["revoked_at"]:
            raise Unauthenticated("INVALID_CREDENTIALS")
        caller = Caller(row["service"], frozenset(row["scopes"]))
        if len(self._callers) >= MAX_CACHED_TOKENS:
            self._callers.clear()
        good_until = min(asked_at + TOKEN_CACHE_SECONDS, time.monotonic() + left)
        self._callers[sent] = (good_until, caller)
        return caller

    async def admit(
        self,
        method: str,
        access: Access,
        caller: Caller,
        metadata: Metadata,
        *,
        presume: bool = False,
    ) -> Call:
        """The call as far as the caller and its actor decide; with `presume`, the actor may still
        be one that may not act.
        """
        if access.scope not in caller.scopes:
            raise PermissionDenied("SCOPE_REQUIRED", scope=access.scope)
        named = _actor_named(metadata)
        if access.rule == access_pb2.Access.ACTOR_NONE:
            return Call(method, caller, None)
        if named is None:
            if Scope.SYSTEM not in caller.scopes:
                raise PermissionDenied("SCOPE_REQUIRED", scope=Scope.SYSTEM)
            return Call(method, caller, None)
        if access.rule == access_pb2.Access.ACTOR_REFUSED:
            raise PermissionDenied("ACTOR_NOT_ALLOWED", rule="it is the system's alone")
        if Scope.ACT_AS not in caller.scopes:
            raise PermissionDenied("ACT_AS_DENIED")
        actor = await self._lookups.actor(named, presume=presume)
        return Call(method, caller, actor, presumed=named if presume else "")

    async def require_actor(self, call: Call) -> None:
        """Raise if the actor was presumed and may not act."""
        if call.presumed:
            await self._lookups.actor(call.presumed)

    async def _token(self, key_id: str) -> tuple[float, Row | None]:
        """When it was asked for, and the token's row: five seconds old at most, older only while
        the database is away.
        """
        now = time.monotonic()
        known = self._tokens.get(key_id)
        if known and now - known[0] < TOKEN_CACHE_SECONDS:
            return known
        try:
            async with self._store.snapshot() as snapshot:
                row = await snapshot.tokens.find(key_id)
        except Unavailable:
            if known:
                return known
            raise
        if len(self._tokens) >= MAX_CACHED_TOKENS:
            self._tokens.clear()
        self._tokens[key_id] = (now, row)
        return now, row


def new_token() -> str:
    """A key id and 256 random bits, which nobody else has ever seen."""
    return f"parley_{secrets.token_hex(8)}_{secrets.token_urlsafe(32)}"


def split_token(token: str) -> tuple[str, str]:
    """Key id and secret of `parley_<key id>_<secret>`; empty strings for anything else."""
    prefix, _, rest = token.partition("_")
    key_id, _, secret = rest.partition("_")
    if prefix != "parley" or not key_id.isascii() or not key_id.isalnum() or len(key_id) > 32:
        return "", ""
    return key_id, secret


def hash_of(secret: str) -> bytes:
    """What is stored of a token's secret. It is 256 random bits: nothing slower is needed."""
    return sha256(secret.encode()).digest()


def _actor_named(metadata: Metadata) -> str | None:
    """The actor in `x-parley-actor`, or in `x-parley-actor-bin` where its name is not ASCII."""
    named = [value for key, value in metadata if key in ("x-parley-actor", "x-parley-actor-bin")]
    if not named:
        return None
    if len(named) > 1:
        raise InvalidArgument("INVALID_ACTOR", field="x-parley-actor")
    (value,) = named
    try:
        return value if isinstance(value, str) else value.decode()
    except UnicodeDecodeError:
        raise InvalidArgument("INVALID_ACTOR", field="x-parley-actor") from None
