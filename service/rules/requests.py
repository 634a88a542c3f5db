"""request_id: the same one, with the same payload, is the same request."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class RequestId:
    """Digest of caller, actor, RPC and request_id; and of the payload that came with it."""

    key: bytes
    payload_hash: bytes

    @property
    def lock(self) -> int:
        """Advisory lock of a request that names no conversation."""
        return int.from_bytes(self.key[:8], signed=True)


def require_same(request: RequestId, recorded: Mapping[str, Any]) -> None:
    """Raise if the id was used for another payload."""
    if recorded["payload_hash"] != request.payload_hash:
        raise FailedPrecondition("REQUEST_ID_REUSED")
