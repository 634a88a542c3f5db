from datetime import datetime

from sqlalchemy import CheckConstraint, LargeBinary, Text, func
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from service.models.base import Base, Name


class Token(Base):
    """A calling service's credential. The secret itself is never stored, only its SHA-256."""

    __tablename__ = "tokens"

    key_id: Mapped[str] = mapped_column(Name, primary_key=True)
    secret_hash: Mapped[bytes] = mapped_column(LargeBinary)
    service: Mapped[str]
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]

    __table_args__ = (CheckConstraint("octet_length(secret_hash) = 32", name="secret_hash_length"),)


class SigningKey(Base):
    """Key with which page tokens and cursors are signed; shared by every replica."""

    __tablename__ = "signing_keys"

    name: Mapped[str] = mapped_column(Name, primary_key=True)
    key: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
