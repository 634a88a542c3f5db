"""Update masks (AIP-134): which fields of a resource an update takes.

What may be updated is said once, in the contract: whatever is neither OUTPUT_ONLY nor IMMUTABLE.
"""

from functools import cache

from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message as ProtoMessage

from service.fields import Fields

FIXED = {field_behavior_pb2.OUTPUT_ONLY, field_behavior_pb2.IMMUTABLE}
# A path is told back in the error, but not a book of it.
MAX_TOLD = 64


def paths(fields: Fields, request: ProtoMessage, resource: str) -> set[str]:
    """The names of the fields to take from the request's field `resource`, by its `update_mask`.

    Without a mask, those that may be updated and are populated; with `*`, all that may be. Notes a
    violation in `fields` for every path that is no such field, and answers the others.
    """
    given: ProtoMessage = getattr(request, resource)
    mutable = updatable(given)
    mask: list[str] = list(getattr(request, "update_mask").paths)  # noqa: B009 - any request's
    if not mask:
        return mutable & {field.name for field, _ in given.ListFields()}
    for path in sorted(set(mask) - mutable - {"*"}):
        allowed = ", ".join(sorted(mutable))
        fields.reject("INVALID_UPDATE_MASK", "update_mask", path=path[:MAX_TOLD], allowed=allowed)
    return mutable if "*" in mask else mutable & set(mask)


def updatable(resource: ProtoMessage) -> set[str]:
    """The names of a resource's fields that clients may change."""
    return set(_updatable(resource.DESCRIPTOR))


@cache
def _updatable(resource: Descriptor) -> list[str]:
    return [
        field.name
        for field in resource.fields
        if not FIXED & set(field.GetOptions().Extensions[field_behavior_pb2.field_behavior])
    ]
