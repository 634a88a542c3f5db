"""The schema: SQLAlchemy 2 declarative models, one file a resource."""

from service.models.base import Base
from service.models.conversation import Conversation
from service.models.event import Era, Event
from service.models.message import Message, MessageRevision
from service.models.participant import Participant
from service.models.password import PasswordFailure
from service.models.request import Request
from service.models.token import SigningKey, Token
from service.models.user import User

__all__ = [
    "Base",
    "Conversation",
    "Era",
    "Event",
    "Message",
    "MessageRevision",
    "Participant",
    "PasswordFailure",
    "Request",
    "SigningKey",
    "Token",
    "User",
]
