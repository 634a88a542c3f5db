from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column, relationship

from service.domain import ParticipantRole, ParticipantStatus
from service.models.base import Base, Timestamped, one_of

if TYPE_CHECKING:
    from service.models.conversation import Conversation
    from service.models.message import Message
    from service.models.user import User


class Participant(Base, Timestamped):
    """One user's standing in one conversation, whatever became of it.

    Its key is the pair: there is nothing else to name it by. What the user may read is
    `visible_from_sequence` to `visible_to_sequence`: no upper end while joined, 0 before ever.
    """

    __tablename__ = "participants"

    conversation_id: Mapped[UUID] = mapped_column(
        ForeignKey("conversations.id", ondelete="CASCADE"), primary_key=True
    )
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id"), primary_key=True)
    status: Mapped[str]
    role: Mapped[str]
    invited_by_user_id: Mapped[UUID | None] = mapped_column(ForeignKey("users.id"))
    initial_message_id: Mapped[UUID | None] = mapped_column()
    hide_history: Mapped[bool] = mapped_column(server_default=text("false"))
    joined_at: Mapped[datetime | None]
    left_at: Mapped[datetime | None]
    status_at: Mapped[datetime]
    status_actor_id: Mapped[UUID | None] = mapped_column(ForeignKey("users.id"))
    status_reason: Mapped[str] = mapped_column(server_default="")
    visible_from_sequence: Mapped[int] = mapped_column(BigInteger, server_default=text("1"))
    visible_to_sequence: Mapped[int | None] = mapped_column(BigInteger)
    last_read_sequence: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    revision: Mapped[int] = mapped_column(server_default=text("1"))

    conversation: Mapped["Conversation"] = relationship(
        back_populates="participants", foreign_keys=[conversation_id], lazy="raise"
    )
    user: Mapped["User"] = relationship(
        back_populates="participations", foreign_keys=[user_id], lazy="raise"
    )
    invited_by: Mapped["User | None"] = relationship(
        back_populates="invitations_made", foreign_keys=[invited_by_user_id], lazy="raise"
    )
    # These two share their first column with `conversation`, which alone writes it.
    initial_message: Mapped["Message | None"] = relationship(
        back_populates="invitations",
        foreign_keys=[conversation_id, initial_message_id],
        lazy="raise",
        viewonly=True,
    )
    sent_messages: Mapped[list["Message"]] = relationship(
        back_populates="sender",
        foreign_keys="[Message.conversation_id, Message.sender_id]",
        order_by="Message.sequence",
        lazy="raise",
        viewonly=True,
    )

    __table_args__ = (
        UniqueConstraint("user_id", "conversation_id", name="uq_participants_user_conversation"),
        ForeignKeyConstraint(
            ["conversation_id", "initial_message_id"],
            ["messages.conversation_id", "messages.id"],
            name="fk_participants_initial_message",
            # participants and messages point at each other: this edge is added last.
            use_alter=True,
        ),
        Index(
            "ix_participants_initial_message",
            "conversation_id",
            "initial_message_id",
            postgresql_where=text("initial_message_id IS NOT NULL"),
        ),
        Index(
            "ix_participants_invited_by_user_id",
            "invited_by_user_id",
            postgresql_where=text("invited_by_user_id IS NOT NULL"),
        ),
        Index(
            "ix_participants_status_actor_id",
            "status_actor_id",
            postgresql_where=text("status_actor_id IS NOT NULL"),
        ),
        one_of("status", ParticipantStatus),
        one_of("role", ParticipantRole),
        CheckConstraint("(status = 'JOINED') = (visible_to_sequence IS NULL)", name="window_open"),
        CheckConstraint("status <> 'JOINED' OR joined_at IS NOT NULL", name="joined_at"),
        CheckConstraint("status NOT IN ('LEFT', 'REMOVED') OR left_at IS NOT NULL", name="left_at"),
        CheckConstraint(
            "visible_from_sequence >= 1 AND visible_to_sequence >= 0 AND last_read_sequence >= 0",
            name="cursors",
        ),
        {"postgresql_with": {"fillfactor": "80"}},
    )
