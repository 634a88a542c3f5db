from datetime import datetime
from uuid import UUID

from sqlalchemy import (
    DDL,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    LargeBinary,
    event,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from service.models.base import Base


class Request(Base):
    """A mutation that was done under a request_id, written in the transaction of its effect.

    `key` is a digest of caller, actor, RPC and request_id; the conversation, where the request
    names one, completes the scope. Rows live as long as their conversation; those without one are
    pruned after a week. What may end a conversation, or the name it was called by, keeps its rows
    outside, with that name in the digest.
    """

    __tablename__ = "requests"

    conversation_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("conversations.id", ondelete="CASCADE")
    )
    key: Mapped[bytes] = mapped_column(LargeBinary)
    payload_hash: Mapped[bytes] = mapped_column(LargeBinary)
    # What the request made: a user, a conversation, a participant's user, or `message_count`
    # messages from `sequence` on.
    subject_id: Mapped[UUID | None]
    sequence: Mapped[int | None] = mapped_column(BigInteger)
    message_count: Mapped[int | None]
    # What else it answered: how many participants were purged, whether anything was created.
    participant_count: Mapped[int | None]
    created: Mapped[bool | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())

    # The database's key is the unique index below, whose conversation may be absent.
    __mapper_args__ = {"primary_key": [conversation_id, key]}
    __table_args__ = (
        Index(
            "uq_requests_conversation_key",
            "conversation_id",
            "key",
            unique=True,
            postgresql_nulls_not_distinct=True,
        ),
        Index(
            "ix_requests_created_at",
            "created_at",
            postgresql_where=text("conversation_id IS NULL"),
        ),
        CheckConstraint(
            "octet_length(key) = 16 AND octet_length(payload_hash) = 32", name="digests"
        ),
    )


# Without a primary key a row must be named whole, or the first logical replica of the database
# (an upgrade without downtime is one) makes every deletion here fail.
identity = DDL("ALTER TABLE requests REPLICA IDENTITY FULL")  # type: ignore[no-untyped-call]
event.listen(Request.__table__, "after_create", identity)
