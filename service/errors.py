"""Every error a caller can meet: one class per gRPC status, one stable reason per cause.

`REASONS` is the whole catalogue. A reason never changes once released; its text is what the caller
reads, so it names the field, the rule and the remedy. What was known at the raise fills the braces
and travels as `ErrorInfo.metadata` too.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

DOMAIN = "parley.v1"

REASONS: dict[str, str] = {
    # What the request alone decides.
    "MALFORMED_REQUEST": "The request is not a valid {message}: check the encoding and the types.",
    "REQUIRED": "{field} is required.",
    "INVALID_VALUE": "{field} is not valid: {rule}.",
    "INVALID_CHARACTER": "{field} holds a character that is not allowed: {rule}.",
    "NOT_NORMALIZED": "{field} must be in Unicode NFC.",
    "INVALID_ENUM_VALUE": "{field} has no value {value}: use a named value of the enum.",
    "FIELD_TOO_LONG": "{field} is longer than {limit} {unit}.",
    "FIELD_TOO_SHORT": "{field} is shorter than {limit} {unit}.",
    "TOO_MANY_ITEMS": "{field} has more than {limit} items.",
    "OUT_OF_BOUNDS": "{field} must lie between {min} and {max}.",
    "INVALID_REFERENCE": "{field} must be {rule}.",
    "INVALID_SLUG": (
        "{field} must be 3 to 63 characters of a-z, 0-9 and '-', "
        "start and end alphanumeric, and not look like a UUID."
    ),
    "INVALID_EMAIL": "{field} is not an e-mail address of at most 254 characters.",
    "INVALID_METADATA": "{field} is not acceptable metadata: {rule}.",
    "INVALID_TIME": "{field} is not a valid time: {rule}.",
    "INVALID_TIME_RANGE": "{field} must be later than {other}.",
    "INVALID_REQUEST_ID": "{field} must be 1 to 64 printable ASCII characters; a UUID is advised.",
    "INVALID_ETAG": "{field} was not issued by this service: take it from the resource.",
    "INVALID_ORDER_BY": "{field} must be one of: {allowed}.",
    "INVALID_UPDATE_MASK": "{field} has a path '{path}': it may have {allowed}, or '*' for all.",
    "INVALID_PAGE_SIZE": "{field} must not be negative.",
    "INVALID_PAGE_TOKEN": "{field} was not issued by this service: start again without it.",
    "PAGE_TOKEN_MISMATCH": (
        "{field} belongs to another request: repeat the method, filters, order, parent and actor "
        "that it was issued for."
    ),
    "INVALID_CURSOR": (
        "{field} is not a cursor of this scope and actor: use one that was received for them."
    ),
    "DUPLICATE": "{field} names the same user as {other}.",
    # Who is calling.
    "MISSING_CREDENTIALS": "Credentials are missing: send 'authorization: Bearer <token>'.",
    "INVALID_CREDENTIALS": "The credentials are not valid.",
    "SCOPE_REQUIRED": "The caller needs the scope '{scope}' for this call.",
    "ACT_AS_DENIED": "The caller may not name an actor: it needs the scope 'act-as'.",
    "ACTOR_NOT_ALLOWED": "This call cannot be made for the actor given: {rule}.",
    "INVALID_ACTOR": "x-parley-actor must be one user's id or username.",
    # What does not exist, or may not be seen.
    "USER_NOT_FOUND": "There is no user '{name}'.",
    "CONVERSATION_NOT_FOUND": "There is no conversation '{name}'.",
    "MESSAGE_NOT_FOUND": "There is no message '{name}' in this conversation.",
    "PARTICIPANT_NOT_FOUND": "'{name}' is not a participant of this conversation.",
    "REPLY_TO_NOT_FOUND": "{field} names no message of this conversation.",
    "PARENT_NOT_FOUND": "{field} names no message of this conversation.",
    "INITIAL_MESSAGE_NOT_FOUND": "{field} names no message of this conversation.",
    # What exists already.
    "USERNAME_TAKEN": "The username '{name}' is taken.",
    "EMAIL_TAKEN": "That e-mail address is taken.",
    "SLUG_TAKEN": "The slug '{name}' is taken.",
    "NOT_DELETED": "'{name}' is not deleted: delete it first.",
    "EXTERNAL_ID_TAKEN": "The external_id '{external_id}' is taken by '{name}'.",
    # What may not be done, or not now.
    "PERMISSION_DENIED": "The actor may not do that here: {rule}.",
    "NOT_A_PARTICIPANT": "{field} does not name a joined participant of this conversation.",
    "ACCESS_LOST": "The actor has left the conversation, or was removed: that was all it may see.",
    "ROLE_NOT_ALLOWED": "{field} is not allowed: {rule}.",
    "USER_INACTIVE": "{field} names a user that is deactivated or deleted.",
    "USER_DELETED": "The user is deleted: undelete it first.",
    "CONVERSATION_DELETED": "The conversation is deleted: undelete it first.",
    "CONVERSATION_ARCHIVED": "The conversation is archived (is_active is false): reactivate it.",
    "MESSAGE_DELETED": "Message '{name}' is deleted: undelete it first.",
    "DIRECT_CONVERSATION": "That is not possible in a direct conversation of two.",
    "TOO_MANY_PARTICIPANTS": "The conversation would have more than {limit} participants.",
    "LAST_OWNER": (
        "Whoever is joined needs an owner: make somebody else OWNER first; "
        "who leaves may name a successor_user_id."
    ),
    "INVALID_STATE_TRANSITION": (
        "That is not possible for a participant who is {current_status}; "
        "it is for one who is: {allowed}."
    ),
    "REQUEST_ID_REUSED": "request_id was used for another request: choose a new one.",
    "ETAG_MISMATCH": "The resource has changed: read it again and repeat with its etag.",
    "SEQUENCE_MISMATCH": "expected_last_sequence is stale: the last sequence is {last_sequence}.",
    "READ_PAST_END": "{field} is beyond the last message, number {last_sequence}.",
    "CURSOR_EXPIRED": (
        "{field} is from before the database was restored, or from its future: start again without."
    ),
    "WATCH_TOO_SLOW": "Nothing was read for {seconds} seconds: go on from the last cursor.",
    "NOT_IMPLEMENTED": "{method} is part of the contract, but not served by this version yet.",
    # What is too much.
    "RATE_LIMITED": "Too many {subject}: repeat the call later.",
    "TOO_MANY_PASSWORDS": "Too many {subject} at once: repeat the call.",
    # What went wrong here.
    "CONFLICT": "The call met another one: repeat it.",
    "LOCK_TIMEOUT": "The conversation is busy: repeat the call.",
    "OVERLOADED": "The service is overloaded: repeat the call later.",
    "SHUTTING_DOWN": "This server is shutting down: repeat the call.",
    "DATABASE_UNAVAILABLE": "The database cannot be reached: repeat the call.",
    "DATABASE_READ_ONLY": "The database does not accept writes: repeat the call.",
    "COMMIT_OUTCOME_UNKNOWN": (
        "Whether the call took effect is not known: repeat it under the same request_id, "
        "or read before you repeat it."
    ),
    "DEADLINE_EXCEEDED": "The deadline passed: repeat the call with a longer one.",
    "DATA_LOSS": "Stored data cannot be read: tell the operator, with id {correlation_id}.",
    "INTERNAL": "Something went wrong: tell the operator, with id {correlation_id}.",
}


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that breaks one rule."""

    field: str
    reason: str
    description: str


class ParleyError(Exception):
    """What a caller is told. `status` is the name of a gRPC status code.

    `field` is the request field concerned, `resource` the (type, name) of the record concerned,
    `retry_after` the seconds after which repeating the very same call makes sense.
    """

    status: ClassVar[str]

    def __init__(
        self,
        reason: str,
        *,
        resource: tuple[str, str] | None = None,
        retry_after: float | None = None,
        **known: object,
    ) -> None:
        self.reason = reason
        self.known = {key: str(value) for key, value in known.items()}
        self.resource = resource
        self.retry_after = retry_after
        self.message = REASONS[reason].format_map(self.known)
        super().__init__(f"{reason}: {self.message}")

    @property
    def field(self) -> str:
        return self.known.get("field", "")


class InvalidArgument(ParleyError):
    """The request is wrong whatever is stored. Carries every violation found."""

    status = "INVALID_ARGUMENT"

    def __init__(self, reason: str, *, field: str = "", **known: Any) -> None:
        super().__init__(reason, resource=None, retry_after=None, field=field, **known)
        self.violations = [Violation(self.field, reason, self.message)]

    @classmethod
    def of(cls, errors: list[Self]) -> Self:
        """All of them as one: the first gives the reason, each its violation."""
        first = errors[0]
        if len(errors) > 1:
            first.violations = [error.violations[0] for error in errors]
            first.known["violations"] = str(len(errors))
            first.message += f" ({len(errors) - 1} more; see the details.)"
        return first


class NotFound(ParleyError):
    """The record named as the call's target is missing, or hidden: the same bytes for both."""

    status = "NOT_FOUND"

    def __init__(self, kind: str, name: object) -> None:
        super().__init__(f"{kind.upper()}_NOT_FOUND", resource=(kind, str(name)), name=name)


class AlreadyExists(ParleyError):
    """A unique name is taken."""

    status = "ALREADY_EXISTS"

    def __init__(self, reason: str, kind: str, name: object, **known: Any) -> None:
        super().__init__(reason, resource=(kind, str(name)), name=name, **known)


class FailedPrecondition(ParleyError):
    """The request is fine, but not in the present state; repeating it changes nothing."""

    status = "FAILED_PRECONDITION"


class OutOfRange(ParleyError):
    """Beyond what is there, though it may come to be: what does not exist in a list or a log."""

    status = "OUT_OF_RANGE"


class PermissionDenied(ParleyError):
    """What is seen may not be done by this caller or actor."""

    status = "PERMISSION_DENIED"


class Unauthenticated(ParleyError):
    """Nobody we know. Tells a stranger nothing."""

    status = "UNAUTHENTICATED"


class Aborted(ParleyError):
    """Lost a race: read again, decide again, call again. Never retried blindly."""

    status = "ABORTED"


class ResourceExhausted(ParleyError):
    """The caller used up what it was given."""

    status = "RESOURCE_EXHAUSTED"


class Unavailable(ParleyError):
    """Certainly had no effect; the very same call may be repeated after `retry_after` seconds."""

    status = "UNAVAILABLE"

    def __init__(self, reason: str, *, retry_after: float = 0.5, **known: Any) -> None:
        super().__init__(reason, retry_after=retry_after, **known)


class DeadlineExceeded(ParleyError):
    """Time ran out; a write may still take effect."""

    status = "DEADLINE_EXCEEDED"


class Unimplemented(ParleyError):
    """In the contract, not in this version."""

    status = "UNIMPLEMENTED"


class Unknown(ParleyError):
    """The effect of the call could not be established."""

    status = "UNKNOWN"


class DataLoss(ParleyError):
    """Stored data is damaged."""

    status = "DATA_LOSS"


class Internal(ParleyError):
    """A defect of ours. The log has the rest, under the correlation id."""

    status = "INTERNAL"
