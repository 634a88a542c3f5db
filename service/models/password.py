from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, Index, LargeBinary, func
from sqlalchemy.orm import Mapped, mapped_column

from service.models.base import Base


class PasswordFailure(Base):
    """Somebody gave a wrong password; of interest for a minute.

    `key` is a keyed digest of the user, of the login that is nobody's, or of the caller: people
    type their password where their name belongs, so what they typed is not kept.
    """

    __tablename__ = "password_failures"

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=func.uuidv7())
    key: Mapped[bytes] = mapped_column(LargeBinary)
    failed_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())

    __table_args__ = (
        Index("ix_password_failures_key_failed_at", "key", "failed_at"),
        Index("ix_password_failures_failed_at", "failed_at"),
        CheckConstraint("octet_length(key) = 32", name="key_length"),
    )
