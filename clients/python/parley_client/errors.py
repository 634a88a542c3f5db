"""Every way in which a call can fail: one class for each gRPC status.

try:
    parley.users.CreateUser(request)
except AlreadyExists as error:
    if error.reason != "USERNAME_TAKEN":
        raise
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
from google.rpc import error_details_pb2, status_pb2

DETAILS = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class Violation:
    """One field of the request that breaks one rule."""

    field: str
    reason: str
    description: str


class ParleyError(grpc.RpcError):
    """A call that failed.

    reason: what to branch on, such as "USERNAME_TAKEN"; it never changes. Empty where it was not
        Parley that answered: nobody was there, or the deadline passed on the way.
    message: what is wrong and what to do, for people.
    metadata: what Parley knew of it, such as {"name": "ada"} or {"last_sequence": "7"}.
    violations: of an InvalidArgument, every field that is wrong.
    retry_after: the seconds after which the very same call may succeed, where Parley said so.
    """

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str = "",
        *,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(": ".join(part for part in (reason or self.status.name, message) if part))
        self.message = message
        self.reason = reason
        self.metadata = metadata or {}
        self.violations = violations
        self.retry_after = retry_after

    # As grpc's own errors tell it, for whoever expects one of those.

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str:
        return self.message


class InvalidArgument(ParleyError):
    """The request is wrong, whatever is stored: see `violations`."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(ParleyError):
    """The token is missing, or not (any longer) valid."""

    status = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ParleyError):
    """The token lacks a scope, or the actor may not do this."""

    status = grpc.StatusCode.PERMISSION_DENIED


class NotFound(ParleyError):
    """What the call is about does not exist, or not for the actor."""

    status = grpc.StatusCode.NOT_FOUND


class AlreadyExists(ParleyError):
    """A unique name is taken."""

    status = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(ParleyError):
    """The request is fine, but not in the present state."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class OutOfRange(ParleyError):
    """Beyond what is there."""

    status = grpc.StatusCode.OUT_OF_RANGE


class Aborted(ParleyError):
    """Somebody else was faster: read again, decide again, call again."""

    status = grpc.StatusCode.ABORTED


class ResourceExhausted(ParleyError):
    """Too much, or too often."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(ParleyError):
    """Still no server after all attempts: call again later, under the same request_id."""

    status = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(ParleyError):
    """Time ran out. It may have taken effect: call again, under the same request_id."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ParleyError):
    """The call was cancelled, or its channel closed. It may have taken effect."""

    status = grpc.StatusCode.CANCELLED


class Unknown(ParleyError):
    """Whether it took effect is not known: call again, under the same request_id."""

    status = grpc.StatusCode.UNKNOWN


class Unimplemented(ParleyError):
    """In the contract, but not served by this version."""

    status = grpc.StatusCode.UNIMPLEMENTED


class Internal(ParleyError):
    """A fault of the server, whose log knows more under metadata["correlation_id"]."""

    status = grpc.StatusCode.INTERNAL


class DataLoss(ParleyError):
    """Stored data cannot be read."""

    status = grpc.StatusCode.DATA_LOSS


BY_STATUS = {kind.status: kind for kind in ParleyError.__subclasses__()}


def error_of(error: Any) -> ParleyError:
    """What grpc raised, as ours."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS:
            status = status_pb2.Status.FromString(value)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for kind in (info, bad, retry):
            detail.Unpack(kind)
    return BY_STATUS.get(error.code(), Unknown)(
        error.details() or "",
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=tuple(
            Violation(each.field, each.reason, each.description) for each in bad.field_violations
        ),
        retry_after=(
            retry.retry_delay.ToTimedelta().total_seconds()
            if retry.HasField("retry_delay")
            else None
        ),
    )
