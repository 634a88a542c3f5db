"""The protos as a reader wants them: services, RPCs and types, each with its comment.

Everything is read from the descriptors that protoc makes of protos/, comments included.
"""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from google.api import field_behavior_pb2
from google.protobuf import descriptor_pb2 as pb

from parley.v1 import access_pb2
from scripts.protos import PROTOS, build_image
from service import errors
from service.reasons import REASONS

# In the order in which a newcomer needs them.
FILES = (
    "user",
    "conversation",
    "participant",
    "message",
    "event",
    "live_message",
    "transfer",
    "usage",
    "access",
)

STATUSES = {kind.status for kind in errors.ParleyError.__subclasses__()}

Cause = tuple[str, str]
"""A gRPC status and a reason, as one error has them."""


@dataclass(frozen=True)
class Field:
    """A field of a message."""

    name: str
    type: str
    """A scalar's name, or that of a message or enum within its package."""
    traits: list[str]
    comment: str
    oneof: str


@dataclass(frozen=True)
class Type:
    """A message or an enum."""

    name: str
    comment: str
    fields: list[Field]
    oneofs: dict[str, str]
    """The comment of each group of fields of which one may be set."""
    values: list[tuple[str, int, str]]
    """Name, number and comment; of an enum alone."""


@dataclass(frozen=True)
class Rpc:
    name: str
    service: str
    comment: str
    request: str
    response: str
    access: access_pb2.Access
    streams: tuple[bool, bool]
    """Whether requests and whether responses come as a stream."""

    @property
    def path(self) -> str:
        return f"{self.service}/{self.name}"


@dataclass(frozen=True)
class Service:
    name: str
    comment: str
    rpcs: list[Rpc]


@dataclass(frozen=True)
class File:
    name: str
    comment: str
    services: list[Service]
    types: dict[str, Type]


@cache
def files() -> dict[str, File]:
    """Every file of the contract by its name, without the ending."""
    with tempfile.TemporaryDirectory() as temporary:
        image = build_image(PROTOS, Path(temporary) / "image").read_bytes()
    described = {Path(file.name).stem: file for file in pb.FileDescriptorSet.FromString(image).file}
    return {name: _file(name, described[name]) for name in FILES}


def services() -> list[Service]:
    return [service for file in files().values() for service in file.services]


def rpcs() -> list[Rpc]:
    return [rpc for service in services() for rpc in service.rpcs]


def common_causes() -> set[Cause]:
    """What any RPC may raise: the last list of access.proto."""
    return set(causes(files()["access"].comment.partition("ERRORS")[2]))


def causes_of(rpc: Rpc) -> set[Cause]:
    """What the comment of an RPC says that it raises, beside what any RPC may."""
    raises = rpc.comment.partition("Raises")[2]
    found = set(causes(raises))
    for other in rpcs():
        if raises.startswith(f" what {other.name} raises"):
            found |= causes_of(other)
    return found


def causes(text: str) -> Iterator[Cause]:
    """The errors that a text names: each reason with the status before it, a status that has no
    reason after it with the one of the same name, where there is one.
    """
    status, bare = "", False
    for word in re.findall(r"\b[A-Z][A-Z_]+[A-Z]\b", text):
        if word in REASONS and status in REASONS[word].statuses and (bare or word != status):
            yield status, word
            bare = False
        elif word in STATUSES:
            if bare and status in REASONS:
                yield status, status
            status, bare = word, True
    if bare and status in REASONS:
        yield status, status


def _file(name: str, file: pb.FileDescriptorProto) -> File:
    locations = file.source_code_info.location
    comments = {tuple(each.path): _text(each.leading_comments) for each in locations}
    header = next(each for each in locations if tuple(each.path) == (12,))
    found = [
        Service(service.name, comments[(6, at)], [
            Rpc(
                method.name,
                service.name,
                comments[(6, at, 2, number)],
                _short(method.input_type),
                _short(method.output_type),
                method.options.Extensions[access_pb2.access],
                (method.client_streaming, method.server_streaming),
            )
            for number, method in enumerate(service.method)
        ])
        for at, service in enumerate(file.service)
    ]  # fmt: skip
    types: dict[str, Type] = {}
    for at, message in enumerate(file.message_type):
        _collect(types, message, message.name, comments, (4, at))
    return File(name, _text(header.leading_detached_comments[0]), found, types)


def _collect(
    types: dict[str, Type],
    message: pb.DescriptorProto,
    name: str,
    comments: dict[tuple[int, ...], str],
    path: tuple[int, ...],
) -> None:
    """Add a message and the enums within it."""
    oneofs = {
        oneof.name: comments[(*path, 8, at)]
        for at, oneof in enumerate(message.oneof_decl)
        if not oneof.name.startswith("_")
    }
    fields = [
        _field(field, comments[(*path, 2, at)], message) for at, field in enumerate(message.field)
    ]
    types[name] = Type(name, comments[path], fields, oneofs, [])
    for at, enum in enumerate(message.enum_type):
        values = [
            (value.name, value.number, comments[(*path, 4, at, 2, number)])
            for number, value in enumerate(enum.value)
        ]
        full = f"{name}.{enum.name}"
        types[full] = Type(full, comments[(*path, 4, at)], [], {}, values)


def _field(field: pb.FieldDescriptorProto, comment: str, message: pb.DescriptorProto) -> Field:
    behaviors = field.options.Extensions[field_behavior_pb2.field_behavior]
    traits = {
        "required": field_behavior_pb2.REQUIRED in behaviors,
        "output only": field_behavior_pb2.OUTPUT_ONLY in behaviors,
        "set once": field_behavior_pb2.IMMUTABLE in behaviors,
        "may be absent": field.proto3_optional,
        "never logged": field.options.debug_redact,
    }
    kind = pb.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = _short(field.type_name) if field.type_name else kind
    repeated = "repeated " if field.label == field.LABEL_REPEATED else ""
    grouped = field.HasField("oneof_index") and not field.proto3_optional
    return Field(
        field.name,
        repeated + name,
        [trait for trait, holds in traits.items() if holds],
        comment,
        message.oneof_decl[field.oneof_index].name if grouped else "",
    )


def _short(name: str) -> str:
    """`.parley.v1.Message.Role` is Message.Role, `.google.protobuf.Struct` is Struct."""
    return name.removeprefix(".parley.v1.").removeprefix(".google.protobuf.")


def _text(comment: str) -> str:
    return "\n".join(line.removeprefix(" ").rstrip() for line in comment.splitlines())
