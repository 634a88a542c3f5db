"""What all tables share: names for every constraint, UUIDv7 keys, aware times.

Models hold structure and no rules. A `CHECK` stands only for what the record itself must never
hold, whoever writes it.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, DateTime, MetaData, Text, Uuid, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# A name that a person typed is compared byte by byte, in every locale, for ever: an upgrade of the
# operating system's collations must never break a unique index.
Name = Text(collation="C")

EMPTY_OBJECT = text("'{}'::jsonb")
# A column that only PostgreSQL looks into: reading a row leaves it out.
NEVER_READ = {"never_read": True}
# Said in every query that filters by metadata, so that the partial GIN index applies to it.
HAS_METADATA = "metadata <> '{}'::jsonb"


def one_of(column: str, values: type[StrEnum], *, name: str | None = None) -> CheckConstraint:
    """CHECK that a text column holds a value of the enum."""
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=name or column)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map = {
        str: Text(),
        UUID: Uuid(),
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(),
    }


class Timestamped:
    """When the row was made and last changed by a client (counters and cursors do not count)."""

    created_at: Mapped[datetime] = mapped_column(
        server_default=func.clock_timestamp(), sort_order=10
    )
    updated_at: Mapped[datetime] = mapped_column(
        server_default=func.clock_timestamp(), sort_order=11
    )


class SoftDeleted:
    """Deleted rows stay, marked, until they are purged."""

    deleted_at: Mapped[datetime | None] = mapped_column(sort_order=12)


class BaseModel(Base, Timestamped, SoftDeleted):
    """A resource with an identity of its own: UUIDv7 key made by the database."""

    __abstract__ = True

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=func.uuidv7(), sort_order=-1)
