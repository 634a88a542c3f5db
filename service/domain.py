"""The domain's words: the closed sets of values that rows, rules and wire agree on.

Each value is spelled as its protobuf enum spells it, without the prefix: `ParticipantRole.OWNER`
is `ROLE_OWNER` on the wire and `'OWNER'` in a row that somebody reads with psql.
"""

from enum import StrEnum


class UserKind(StrEnum):
    HUMAN = "HUMAN"
    AGENT = "AGENT"


class MessageRole(StrEnum):
    USER = "USER"
    ASSISTANT = "ASSISTANT"
    SYSTEM = "SYSTEM"
    TOOL = "TOOL"


class MessageStatus(StrEnum):
    COMPLETE = "COMPLETE"
    INCOMPLETE = "INCOMPLETE"
    FAILED = "FAILED"


class ParticipantStatus(StrEnum):
    INVITED = "INVITED"
    JOINED = "JOINED"
    DECLINED = "DECLINED"
    REVOKED = "REVOKED"
    LEFT = "LEFT"
    REMOVED = "REMOVED"


class ParticipantRole(StrEnum):
    OWNER = "OWNER"
    MODERATOR = "MODERATOR"
    MEMBER = "MEMBER"
    OBSERVER = "OBSERVER"


class EventType(StrEnum):
    CONVERSATION_CREATED = "CONVERSATION_CREATED"
    CONVERSATION_UPDATED = "CONVERSATION_UPDATED"
    CONVERSATION_DELETED = "CONVERSATION_DELETED"
    CONVERSATION_UNDELETED = "CONVERSATION_UNDELETED"
    CONVERSATION_PURGED = "CONVERSATION_PURGED"
    PARTICIPANT_CHANGED = "PARTICIPANT_CHANGED"
    READ_CURSOR_MOVED = "READ_CURSOR_MOVED"
    MESSAGE_CREATED = "MESSAGE_CREATED"
    MESSAGE_UPDATED = "MESSAGE_UPDATED"
    MESSAGE_DELETED = "MESSAGE_DELETED"
    MESSAGE_UNDELETED = "MESSAGE_UNDELETED"
    LIVE_MESSAGE_STARTED = "LIVE_MESSAGE_STARTED"
    LIVE_MESSAGE_FINISHED = "LIVE_MESSAGE_FINISHED"
