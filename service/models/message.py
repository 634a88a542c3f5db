from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import TSVECTOR
from sqlalchemy.orm import Mapped, mapped_column, relationship

from service.domain import MessageRole, MessageStatus
from service.models.base import (
    EMPTY_OBJECT,
    HAS_METADATA,
    NEVER_READ,
    Base,
    Name,
    SoftDeleted,
    Timestamped,
    one_of,
)

if TYPE_CHECKING:
    from service.models.conversation import Conversation
    from service.models.participant import Participant


class Message(Base, Timestamped, SoftDeleted):
    """What was said: number `sequence` of its conversation, in commit order, for ever.

    Keys lead with the conversation, so that one conversation's rows stay together, and so that the
    database itself holds that a reply, a branch and a sender belong to the same conversation.
    """

    __tablename__ = "messages"

    conversation_id: Mapped[UUID] = mapped_column(
        ForeignKey("conversations.id", ondelete="CASCADE"), primary_key=True
    )
    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=func.uuidv7())
    sequence: Mapped[int] = mapped_column(BigInteger)
    sender_id: Mapped[UUID | None] = mapped_column()
    role: Mapped[str]
    status: Mapped[str] = mapped_column(server_default=MessageStatus.COMPLETE)
    content: Mapped[str]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", server_default=EMPTY_OBJECT)
    tokens_used: Mapped[int | None]
    input_tokens: Mapped[int | None]
    output_tokens: Mapped[int | None]
    model: Mapped[str] = mapped_column(server_default="")
    reply_to_message_id: Mapped[UUID | None] = mapped_column()
    parent_message_id: Mapped[UUID | None] = mapped_column()
    sent_at: Mapped[datetime | None]
    external_id: Mapped[str | None] = mapped_column(Name)
    revision: Mapped[int] = mapped_column(server_default=text("1"))
    # Who deleted it (nobody: the system), and how often it was deleted or undeleted: that changes
    # its etag, but not what it says, which `revision` counts.
    deleted_by_user_id: Mapped[UUID | None] = mapped_column(ForeignKey("users.id"))
    mark_count: Mapped[int] = mapped_column(server_default=text("0"))
    # Who wrote what it says now, if that is not what was sent (nobody: the system).
    edited_by_user_id: Mapped[UUID | None] = mapped_column(ForeignKey("users.id"))
    # The words of its content, as service/rules/search.py knows them. NULL: a version that knew of
    # no search stored it; the server indexes it in passing.
    search: Mapped[str | None] = mapped_column(TSVECTOR, info=NEVER_READ)

    conversation: Mapped["Conversation"] = relationship(
        back_populates="messages", foreign_keys=[conversation_id], lazy="raise"
    )
    # All of these share their first column with `conversation`, which alone writes it.
    sender: Mapped["Participant | None"] = relationship(
        back_populates="sent_messages",
        foreign_keys=[conversation_id, sender_id],
        lazy="raise",
        viewonly=True,
    )
    reply_to: Mapped["Message | None"] = relationship(
        back_populates="replies",
        foreign_keys=[conversation_id, reply_to_message_id],
        remote_side=[conversation_id, id],
        lazy="raise",
        viewonly=True,
    )
    replies: Mapped[list["Message"]] = relationship(
        back_populates="reply_to",
        foreign_keys=[conversation_id, reply_to_message_id],
        order_by=sequence,
        lazy="raise",
        viewonly=True,
    )
    parent: Mapped["Message | None"] = relationship(
        back_populates="branches",
        foreign_keys=[conversation_id, parent_message_id],
        remote_side=[conversation_id, id],
        lazy="raise",
        viewonly=True,
    )
    branches: Mapped[list["Message"]] = relationship(
        back_populates="parent",
        foreign_keys=[conversation_id, parent_message_id],
        order_by=sequence,
        lazy="raise",
        viewonly=True,
    )
    invitations: Mapped[list["Participant"]] = relationship(
        back_populates="initial_message",
        foreign_keys="[Participant.conversation_id, Participant.initial_message_id]",
        lazy="raise",
        viewonly=True,
    )

    revisions: Mapped[list["MessageRevision"]] = relationship(
        back_populates="message",
        foreign_keys="[MessageRevision.conversation_id, MessageRevision.message_id]",
        cascade="all, delete-orphan",
        passive_deletes=True,
        order_by="MessageRevision.revision",
        lazy="raise",
    )

    __table_args__ = (
        UniqueConstraint("conversation_id", "sequence", name="uq_messages_conversation_sequence"),
        # A sender is, or was, a participant: the pair's foreign key says so. It also keeps the
        # key-share locks of concurrent sends inside one conversation, and its index serves
        # "what did this user say here".
        ForeignKeyConstraint(
            ["conversation_id", "sender_id"],
            ["participants.conversation_id", "participants.user_id"],
            name="fk_messages_sender",
        ),
        Index(
            "ix_messages_sender",
            "conversation_id",
            "sender_id",
            "sequence",
            postgresql_where=text("sender_id IS NOT NULL"),
        ),
        ForeignKeyConstraint(
            ["conversation_id", "reply_to_message_id"],
            ["messages.conversation_id", "messages.id"],
            name="fk_messages_reply_to",
        ),
        Index(
            "ix_messages_reply_to",
            "conversation_id",
            "reply_to_message_id",
            postgresql_where=text("reply_to_message_id IS NOT NULL"),
        ),
        ForeignKeyConstraint(
            ["conversation_id", "parent_message_id"],
            ["messages.conversation_id", "messages.id"],
            name="fk_messages_parent",
        ),
        Index(
            "ix_messages_parent",
            "conversation_id",
            "parent_message_id",
            postgresql_where=text("parent_message_id IS NOT NULL"),
        ),
        # Deleted messages are few, and count as no unread ones.
        Index(
            "ix_messages_deleted",
            "conversation_id",
            "sequence",
            postgresql_where=text("deleted_at IS NOT NULL"),
        ),
        Index(
            "ix_messages_deleted_by_user_id",
            "deleted_by_user_id",
            postgresql_where=text("deleted_by_user_id IS NOT NULL"),
        ),
        Index(
            "ix_messages_edited_by_user_id",
            "edited_by_user_id",
            postgresql_where=text("edited_by_user_id IS NOT NULL"),
        ),
        # A send leaves its words in a list that is worked into the index many at a time: that takes
        # a third of the processor and of the log of doing it at once. The list is kept short, since
        # every search reads it and the send that finds it full has to work it in.
        Index(
            "ix_messages_search",
            "search",
            postgresql_using="gin",
            postgresql_where=text("deleted_at IS NULL"),
            postgresql_with={"gin_pending_list_limit": "128"},
        ),
        # The newest of all conversations, for words so common that they soon turn up.
        Index("ix_messages_created_at", "created_at", "conversation_id", "sequence"),
        Index(
            "ix_messages_unindexed",
            "conversation_id",
            "id",
            postgresql_where=text("search IS NULL"),
        ),
        Index(
            "uq_messages_external_id",
            "conversation_id",
            "external_id",
            unique=True,
            postgresql_where=text("external_id IS NOT NULL"),
        ),
        Index(
            "ix_messages_metadata",
            "metadata",
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},
            postgresql_where=text(HAS_METADATA),
        ),
        one_of("role", MessageRole),
        one_of("status", MessageStatus),
        CheckConstraint("sequence >= 1", name="sequence_positive"),
        CheckConstraint("octet_length(content) <= 262144", name="content_length"),
        CheckConstraint("role <> 'USER' OR sender_id IS NOT NULL", name="user_has_sender"),
        CheckConstraint(
            "id <> reply_to_message_id AND id <> parent_message_id", name="not_about_itself"
        ),
        CheckConstraint("jsonb_typeof(metadata) = 'object'", name="metadata_object"),
        CheckConstraint(
            "tokens_used >= 0 AND input_tokens >= 0 AND output_tokens >= 0", name="tokens"
        ),
    )


class MessageRevision(Base):
    """What a message said before it was edited: revision 1 is as it was sent.

    What it says now stands in the message alone.
    """

    __tablename__ = "message_revisions"

    conversation_id: Mapped[UUID] = mapped_column(primary_key=True)
    message_id: Mapped[UUID] = mapped_column(primary_key=True)
    revision: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content: Mapped[str]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", server_default=EMPTY_OBJECT)
    tokens_used: Mapped[int | None]
    # Who wrote it; nobody: the system.
    editor_id: Mapped[UUID | None] = mapped_column(ForeignKey("users.id"))
    created_at: Mapped[datetime]

    message: Mapped["Message"] = relationship(
        back_populates="revisions", foreign_keys=[conversation_id, message_id], lazy="raise"
    )

    __table_args__ = (
        ForeignKeyConstraint(
            ["conversation_id", "message_id"],
            ["messages.conversation_id", "messages.id"],
            name="fk_message_revisions_message",
            ondelete="CASCADE",
        ),
        Index(
            "ix_message_revisions_editor_id",
            "editor_id",
            postgresql_where=text("editor_id IS NOT NULL"),
        ),
        CheckConstraint("revision >= 1", name="revision_positive"),
        CheckConstraint("octet_length(content) <= 262144", name="content_length"),
        CheckConstraint("jsonb_typeof(metadata) = 'object'", name="metadata_object"),
        CheckConstraint("tokens_used >= 0", name="tokens"),
    )
