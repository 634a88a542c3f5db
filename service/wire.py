"""The border: one function a resource in each direction. Ids are UUID inside and str outside, times
are `…_at` inside and `…_time` outside, metadata is JSON text inside and a Struct outside.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar
from uuid import UUID

from google.protobuf.message import Message as ProtoMessage
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from parley.v1 import conversation_pb2, event_pb2, message_pb2, participant_pb2, user_pb2
from service.domain import (
    EventType,
    MessageRole,
    MessageStatus,
    ParticipantRole,
    ParticipantStatus,
    UserKind,
)
from service.fields import EPOCH, Fields
from service.identity import Actor
from service.repositories.base import Row
from service.repositories.inbox import Line
from service.repositories.invitations import Invitation
from service.rules.etags import etag_of
from service.rules.feed import PARTICIPANT_EVENTS
from service.rules.messages import Draft, Numbered
from service.rules.metadata import merged
from service.rules.search import Query, snippet


def _numbers(kind: type[StrEnum]) -> dict[str, Any]:
    """Each value's protobuf number: the position in its enum, from 1."""
    return {value: number for number, value in enumerate(kind, start=1)}


USER_KIND = _numbers(UserKind)
MESSAGE_ROLE = _numbers(MessageRole)
MESSAGE_STATUS = _numbers(MessageStatus)
PARTICIPANT_ROLE = _numbers(ParticipantRole)
PARTICIPANT_STATUS = _numbers(ParticipantStatus)
# WITHHELD comes first, and is no type that a row could have.
EVENT_TYPE: dict[str, Any] = {type: n for n, type in enumerate(EventType, start=2)}

Event = event_pb2.Event


# Out


def user(row: Row, actor: Actor | None) -> user_pb2.User:
    """The whole user for the system and for itself; for anybody else, whom it sees."""
    seen = other_user(row)
    if actor and actor.id != row["id"]:
        return seen
    seen.email = row["email"] or ""
    seen.is_active = row["is_active"]
    seen.is_verified = row["is_verified"]
    _metadata(seen, row)
    seen.external_id = row["external_id"] or ""
    seen.etag = etag_of(row["id"], row["revision"])
    _times(seen, row)
    return seen


def other_user(row: Row) -> user_pb2.User:
    """What anybody sees of a user."""
    return user_pb2.User(
        id=str(row["id"]),
        username=row["username"],
        full_name=row["full_name"],
        kind=USER_KIND[row["kind"]],
    )


def conversation(
    row: Row, seen: conversation_pb2.Conversation | None = None
) -> conversation_pb2.Conversation:
    """What the asker sees of a conversation, by its standing there (`status`, `joined_at`)."""
    seen = conversation_pb2.Conversation() if seen is None else seen
    seen.id = str(row["id"])
    seen.title = row["title"]
    if row["deleted_at"]:
        _time(seen.delete_time, row["deleted_at"])
    if row["actor_id"] is not None and row["status"] != ParticipantStatus.JOINED:
        if row["status"] == ParticipantStatus.INVITED:
            seen.creator_id = str(row["creator_id"])
        if row["joined_at"]:
            seen.slug = row["slug"]
            seen.last_sequence = row["final_sequence"]
        return seen
    seen.slug = row["slug"]
    seen.creator_id = str(row["creator_id"])
    seen.is_active = row["is_active"]
    seen.members_may_invite = row["members_may_invite"]
    seen.is_direct = row["is_direct"]
    _metadata(seen, row)
    seen.external_id = row["external_id"] or ""
    seen.last_sequence = row["last_sequence"]
    seen.version = row["version"]
    seen.participant_count = row["participant_count"]
    seen.total_tokens_used = row["total_tokens_used"]
    _time(seen.last_activity_time, row["last_activity_at"] or row["created_at"])
    seen.etag = etag_of(row["id"], row["revision"])
    _times(seen, row)
    return seen


def participant(
    row: Row, seen: participant_pb2.Participant | None = None
) -> participant_pb2.Participant:
    seen = participant_pb2.Participant() if seen is None else seen
    seen.conversation_id = str(row["conversation_id"])
    seen.user_id = str(row["user_id"])
    seen.username = row["username"] or ""
    seen.status = PARTICIPANT_STATUS[row["status"]]
    seen.role = PARTICIPANT_ROLE[row["role"]]
    for name in ("invited_by_user_id", "initial_message_id", "status_actor_id"):
        if row[name]:
            setattr(seen, name, str(row[name]))
    if row["status_reason"]:
        seen.status_reason = row["status_reason"]
    seen.visible_from_sequence = row["visible_from_sequence"]
    if row["visible_to_sequence"] is not None:
        seen.visible_to_sequence = row["visible_to_sequence"]
    seen.last_read_sequence = row["last_read_sequence"]
    # The pair is the key; the etag is bound to the user's half of it.
    seen.etag = etag_of(row["user_id"], row["revision"])
    for time, at in (("join_time", "joined_at"), ("leave_time", "left_at")):
        if row[at]:
            _time(getattr(seen, time), row[at])
    _time(seen.status_time, row["status_at"])
    _time(seen.create_time, row["created_at"])
    _time(seen.update_time, row["updated_at"])
    return seen


def invitation(invited: Invitation) -> participant_pb2.Invitation:
    return participant_pb2.Invitation(
        participant=participant(invited.participant),
        conversation_title=invited.conversation_title,
        inviter=other_user(invited.inviter) if invited.inviter else None,
        initial_message=message(invited.message) if invited.message else None,
    )


def user_conversation(line: Line) -> conversation_pb2.UserConversation:
    """Filled in place: what is made elsewhere is copied into what it becomes a part of."""
    seen = conversation_pb2.UserConversation(unread_count=line.unread_count)
    conversation(line.conversation, seen.conversation)
    participant(line.participant, seen.participant)
    if line.last_message:
        message(line.last_message, seen.last_message)
    return seen


# What most messages lack: to name it to protobuf costs as much as to set it.
RARE = ("tokens_used", "input_tokens", "output_tokens", "model", "external_id")
RARE_IDS = ("reply_to_message_id", "parent_message_id")


def message(row: Row, seen: message_pb2.Message | None = None) -> message_pb2.Message:
    """A stored message; of a deleted one, that it was there."""
    id, is_there, revision = str(row["id"]), row["deleted_at"] is None, row["revision"]
    seen = message_pb2.Message() if seen is None else seen
    seen.id = id
    seen.conversation_id = str(row["conversation_id"])
    seen.sequence = row["sequence"]
    if row["sender_id"]:
        seen.sender_id = str(row["sender_id"])
    seen.role = MESSAGE_ROLE[row["role"]]
    seen.status = MESSAGE_STATUS[row["status"]]
    if is_there:
        seen.content = row["content"]
    seen.revision = revision
    seen.etag = etag_of(id, revision + row["mark_count"])
    for name in RARE:
        if row[name] is not None and row[name] != "":
            setattr(seen, name, row[name])
    for name in RARE_IDS:
        if row[name]:
            setattr(seen, name, str(row[name]))
    if row["sent_at"]:
        _time(seen.sent_time, row["sent_at"])
    if is_there:
        _metadata(seen, row)
    _times(seen, row)
    return seen


def revision(row: Row) -> message_pb2.MessageRevision:
    """What a message said, or says, between one edit and the next."""
    seen = message_pb2.MessageRevision(
        revision=row["revision"],
        content=row["content"],
        tokens_used=row["tokens_used"],
        editor_id=_id(row["editor_id"]),
    )
    _metadata(seen, row)
    _time(seen.create_time, row["created_at"])
    return seen


def search_result(row: Row, query: Query) -> message_pb2.SearchResult:
    """A message, and where it matches."""
    parts = snippet(row["content"], query)
    return message_pb2.SearchResult(
        message=message(row),
        snippet=[message_pb2.SnippetPart(text=text, is_match=hit) for text, hit in parts],
    )


def appended(numbered: Numbered, created_at: datetime | None) -> message_pb2.Message:
    """A message just appended, without reading it back; the would-be one of a dry run has no
    time, and neither id nor sequence.
    """
    draft = numbered.draft
    seen = message_pb2.Message(
        conversation_id=str(numbered.conversation_id),
        sender_id=_id(draft.sender_id),
        role=MESSAGE_ROLE[draft.role],
        status=MESSAGE_STATUS[MessageStatus.COMPLETE],
        content=draft.content,
        tokens_used=draft.tokens_used,
        input_tokens=draft.input_tokens,
        output_tokens=draft.output_tokens,
        model=draft.model,
        reply_to_message_id=_id(numbered.reply_to_message_id),
        parent_message_id=_id(numbered.parent_message_id),
        external_id=draft.external_id or "",
        revision=1,
    )
    if draft.metadata != "{}":
        _fill(seen.metadata, json.loads(draft.metadata))
    if draft.sent_at:
        _time(seen.sent_time, draft.sent_at)
    if created_at:
        seen.id = str(numbered.id)
        seen.sequence = numbered.sequence
        seen.etag = etag_of(numbered.id, 1)
        _time(seen.create_time, created_at)
        _time(seen.update_time, created_at)
    return seen


def sent_message(message: message_pb2.Message) -> message_pb2.SentMessage:
    """A message without its content: the answer to a batch must not outgrow a response."""
    return message_pb2.SentMessage(
        id=message.id,
        sequence=message.sequence,
        etag=message.etag,
        create_time=message.create_time if message.HasField("create_time") else None,
    )


def event(
    fact: Row,
    *,
    view: Row | None = None,
    person: Row | None = None,
    said: Row | None = None,
) -> Event:
    """What happened, and what it is about as it is now, where that is given."""
    seen = Event(
        conversation_id=str(fact["conversation_id"]),
        version=fact["version"],
        type=EVENT_TYPE[fact["type"]],
        actor_id=_id(fact["actor_id"]),
        sequence=fact["sequence"] or 0,
        revision=fact["revision"] or 0,
        previous_status=PARTICIPANT_STATUS.get(fact["previous_status"], 0),
        status=PARTICIPANT_STATUS.get(fact["status"], 0),
        previous_role=PARTICIPANT_ROLE.get(fact["previous_role"], 0),
        role=PARTICIPANT_ROLE.get(fact["role"], 0),
        reason=fact["reason"],
        conversation=conversation(view) if view else None,
        participant=participant(person) if person else None,
        message=message(said) if said else None,
    )
    _time(seen.commit_time, fact["committed_at"])
    if fact["type"] in PARTICIPANT_EVENTS:
        seen.user_id = _id(fact["user_id"])
    return seen


def watched(events: Sequence[Event], *, incomplete: bool) -> bytes:
    """The part of a watch's response that does not depend on who watches."""
    response = event_pb2.WatchResponse(events=events, incomplete=incomplete)
    return response.SerializeToString()  # type: ignore[no-any-return,unused-ignore]


def item(resource: ProtoMessage) -> bytes:
    """The resource as one of the list that is a response's field 1: they need only be put together,
    where the response would copy each of them and then encode it.
    """
    encoded = resource.SerializeToString()
    length, left = bytearray(), len(encoded)
    while left > 127:
        length.append(left & 127 | 128)
        left >>= 7
    length.append(left)
    return b"\x0a" + length + encoded


class Spliced:
    """A response of which one part lies encoded already: fields may come in any order."""

    def __init__(self, encoded: bytes, rest: ProtoMessage) -> None:
        self._encoded = encoded
        self._rest = rest

    def SerializeToString(self) -> bytes:  # noqa: N802 - as that of any message
        return self._encoded + self._rest.SerializeToString()


def withheld(fact: Row, through_version: int) -> Event:
    """Some versions that the reader may not see."""
    return Event(
        conversation_id=str(fact["conversation_id"]),
        version=fact["version"],
        through_version=through_version,
        type=Event.TYPE_WITHHELD,
    )


ResourceT = TypeVar(
    "ResourceT",
    user_pb2.User,
    conversation_pb2.Conversation,
    participant_pb2.Participant,
    message_pb2.Message,
)

# What only making a resource gives.
MADE = (
    "id", "sequence", "etag", "create_time", "update_time", "last_activity_time", "status_time",
    "join_time", "leave_time",
)  # fmt: skip


def unmade(resource: ResourceT) -> ResourceT:
    """The resource that a dry run would have made: without id, sequence, etag and times."""
    for name in MADE:
        if name in resource.DESCRIPTOR.fields_by_name:
            resource.ClearField(name)  # type: ignore[arg-type]
    return resource


def _id(id: UUID | None) -> str:
    return str(id) if id else ""


def _time(to: Timestamp, at: datetime) -> None:
    elapsed = at - EPOCH
    to.seconds = elapsed.days * 86_400 + elapsed.seconds
    to.nanos = elapsed.microseconds * 1_000


def _times(to: Any, row: Row) -> None:
    _time(to.create_time, row["created_at"])
    if row["updated_at"] == row["created_at"]:
        to.update_time.CopyFrom(to.create_time)
    else:
        _time(to.update_time, row["updated_at"])
    if row["deleted_at"]:
        _time(to.delete_time, row["deleted_at"])


def _metadata(to: Any, row: Row) -> None:
    if row["metadata"] != "{}":
        _fill(to.metadata, json.loads(row["metadata"]))


def _fill(to: Struct, plain: dict[str, Any]) -> None:
    for key, item in plain.items():
        _fill_value(to.fields[key], item)


def _fill_value(to: Value, item: Any) -> None:
    if item is None:
        to.null_value = 0  # type: ignore[assignment]
    elif isinstance(item, bool):
        to.bool_value = item
    elif isinstance(item, str):
        to.string_value = item
    elif isinstance(item, int | float):
        to.number_value = item
    elif isinstance(item, dict):
        to.struct_value.SetInParent()
        _fill(to.struct_value, item)
    else:
        to.list_value.SetInParent()
        _fill_list(to.list_value, item)


def _fill_list(to: ListValue, items: list[Any]) -> None:
    for item in items:
        _fill_value(to.values.add(), item)


# In


def patched(fields: Fields, metadata: str, patch: str) -> str:
    """Stored metadata after a request's metadata_patch; within the limits, as any metadata is."""
    if patch == "{}":
        return metadata
    result = Struct()
    _fill(result, merged(json.loads(metadata), json.loads(patch)))
    return fields.metadata("metadata_patch", result)


def draft(
    fields: Fields,
    request: message_pb2.SendMessageRequest | message_pb2.NewMessage,
    *,
    actor: Actor | None,
    at: str = "",
) -> tuple[Draft, UUID | str | None]:
    """A message to append, and its sender as named: an id or a username to look up."""
    sender = fields.user(f"{at}sender_id", request.sender_id, required=False)
    if actor and not request.sender_id:
        sender = actor.id
    role = fields.enum(f"{at}role", request.role, MessageRole)
    if role is MessageRole.USER and request.role and not request.sender_id and not actor:
        fields.reject("REQUIRED", f"{at}sender_id")
    content = fields.content(f"{at}content", request.content)
    metadata = fields.metadata(f"{at}metadata", request.metadata)
    if actor and not content and metadata == "{}":
        fields.reject("REQUIRED", f"{at}content")
    used, given, made = (
        fields.count(f"{at}{name}", request, name)
        for name in ("tokens_used", "input_tokens", "output_tokens")
    )
    if used is None and (given is not None or made is not None):
        used = (given or 0) + (made or 0)
        if used > 2**31 - 1:
            fields.reject("OUT_OF_BOUNDS", f"{at}output_tokens", min=0, max=2**31 - 1)
    return (
        Draft(
            field=at,
            sender=request.sender_id,
            sender_id=sender if isinstance(sender, UUID) else None,
            role=role,
            content=content,
            metadata=metadata,
            tokens_used=used,
            input_tokens=given,
            output_tokens=made,
            model=fields.line(f"{at}model", request.model, limit=128),
            reply_to=fields.optional_message_key(request, "reply_to", at),
            parent=fields.optional_message_key(request, "parent", at),
            sent_at=fields.sent_time(f"{at}sent_time", request),
            external_id=fields.external_id(f"{at}external_id", request.external_id),
        ),
        sender,
    )
