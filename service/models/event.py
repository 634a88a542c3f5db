from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.types import UserDefinedType

from service.domain import EventType
from service.models.base import Base, one_of


class Xid8(UserDefinedType[str]):
    """PostgreSQL's 64-bit transaction id, which never wraps around."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "xid8"


class Event(Base):
    """What happened to a conversation: contentless facts, version 1, 2, 3 … without a hole.

    No foreign keys: an event outlives what it tells of. A conversation's watchers read by
    `version`; wider scopes read by `(era, xid, conversation_id, version)`, because the
    conversation's lock is taken before the transaction id is.
    """

    __tablename__ = "events"

    conversation_id: Mapped[UUID] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    era: Mapped[int]
    xid: Mapped[str] = mapped_column(Xid8, server_default=func.pg_current_xact_id())
    type: Mapped[str]
    committed_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    actor_id: Mapped[UUID | None]
    sequence: Mapped[int | None] = mapped_column(BigInteger)
    revision: Mapped[int | None]
    user_id: Mapped[UUID | None]
    previous_status: Mapped[str | None]
    status: Mapped[str | None]
    previous_role: Mapped[str | None]
    role: Mapped[str | None]
    reason: Mapped[str] = mapped_column(server_default="")

    __table_args__ = (
        Index("ix_events_feed", "era", "xid", "conversation_id", "version"),
        # Who was what, and when: what the log itself says of membership.
        Index(
            "ix_events_membership",
            "user_id",
            "conversation_id",
            "version",
            postgresql_where=text("type = 'PARTICIPANT_CHANGED'"),
        ),
        one_of("type", EventType),
        CheckConstraint("version >= 1", name="version_positive"),
    )


class Era(Base):
    """One life of the database: transaction ids of different eras do not compare."""

    __tablename__ = "eras"

    era: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    system_identifier: Mapped[str]
    started_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
