from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from service.models.base import EMPTY_OBJECT, HAS_METADATA, BaseModel, Name

if TYPE_CHECKING:
    from service.models.message import Message
    from service.models.participant import Participant
    from service.models.user import User


class Conversation(BaseModel):
    """A numbered sequence of messages and the people and agents that it is between.

    The counters are kept in the transaction that changes them, under the conversation's lock.
    """

    __tablename__ = "conversations"

    title: Mapped[str] = mapped_column(server_default="")
    slug: Mapped[str] = mapped_column(Name)
    creator_id: Mapped[UUID] = mapped_column(ForeignKey("users.id"))
    is_active: Mapped[bool] = mapped_column(server_default=text("true"))
    members_may_invite: Mapped[bool] = mapped_column(server_default=text("true"))
    is_direct: Mapped[bool] = mapped_column(server_default=text("false"))
    # Whose direct conversation it is, in the order of their ids: a pair has no first and second.
    direct_first_user_id: Mapped[UUID | None] = mapped_column(ForeignKey("users.id"))
    direct_second_user_id: Mapped[UUID | None] = mapped_column(ForeignKey("users.id"))
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", server_default=EMPTY_OBJECT)
    external_id: Mapped[str | None] = mapped_column(Name)
    revision: Mapped[int] = mapped_column(server_default=text("1"))

    last_sequence: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    version: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    participant_count: Mapped[int] = mapped_column(server_default=text("0"))
    total_tokens_used: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    # How often one of its messages was edited, deleted or brought back.
    message_changes: Mapped[int] = mapped_column(
        BigInteger, server_default=text("0"), info={"never_read": True}
    )
    # The greatest sent_at (else created_at) of the messages, and the newest created_at: the floor
    # below which the next message's must not fall.
    last_activity_at: Mapped[datetime | None]
    last_message_at: Mapped[datetime | None]

    creator: Mapped["User"] = relationship(
        back_populates="created_conversations", foreign_keys=[creator_id], lazy="raise"
    )
    participants: Mapped[list["Participant"]] = relationship(
        back_populates="conversation",
        foreign_keys="Participant.conversation_id",
        cascade="all, delete-orphan",
        passive_deletes=True,
        lazy="raise",
    )
    messages: Mapped[list["Message"]] = relationship(
        back_populates="conversation",
        foreign_keys="Message.conversation_id",
        cascade="all, delete-orphan",
        passive_deletes=True,
        order_by="Message.sequence",
        lazy="raise",
    )

    __table_args__ = (
        UniqueConstraint("slug", name="uq_conversations_slug"),
        UniqueConstraint("external_id", name="uq_conversations_external_id"),
        # In the order of the list, of all conversations and of those that one user created.
        Index("ix_conversations_created_at_id", "created_at", "id"),
        Index("ix_conversations_creator", "creator_id", "created_at", "id"),
        # One for each pair, whoever races.
        Index(
            "uq_conversations_direct",
            "direct_first_user_id",
            "direct_second_user_id",
            unique=True,
            postgresql_where=text("direct_first_user_id IS NOT NULL"),
        ),
        Index(
            "ix_conversations_direct_second_user_id",
            "direct_second_user_id",
            postgresql_where=text("direct_second_user_id IS NOT NULL"),
        ),
        Index(
            "ix_conversations_metadata",
            "metadata",
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},
            postgresql_where=text(HAS_METADATA),
        ),
        # Every send checks it: with the length as a repetition of 1 to 61 it took 26 µs, not 2.
        CheckConstraint(
            "char_length(slug) BETWEEN 3 AND 63 AND slug ~ '^[a-z0-9][a-z0-9-]*[a-z0-9]$'",
            name="slug_form",
        ),
        CheckConstraint("jsonb_typeof(metadata) = 'object'", name="metadata_object"),
        CheckConstraint(
            "num_nulls(direct_first_user_id, direct_second_user_id)"
            " = CASE WHEN is_direct THEN 0 ELSE 2 END",
            name="direct_pair",
        ),
        CheckConstraint("direct_first_user_id < direct_second_user_id", name="direct_order"),
        CheckConstraint(
            "last_sequence >= 0 AND version >= 0 AND participant_count >= 0"
            " AND total_tokens_used >= 0",
            name="counters",
        ),
        # Every send updates the counters: leave room on the page for the new version of the row.
        {"postgresql_with": {"fillfactor": "80"}},
    )
