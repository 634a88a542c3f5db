"""Every error a caller can meet: one class per gRPC status; reasons.py has the stable reasons."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from service.reasons import REASONS

DOMAIN = "parley.v1"


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
        self.message = REASONS[reason].says.format_map(self.known)
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
    """A unique name is taken, or what is to be brought back is there."""

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
    """Certainly had no effect; the very same call may be repeated after what RetryInfo says."""

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
