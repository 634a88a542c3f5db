from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import CheckConstraint, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from service.domain import UserKind
from service.models.base import EMPTY_OBJECT, HAS_METADATA, BaseModel, Name, one_of

if TYPE_CHECKING:
    from service.models.conversation import Conversation
    from service.models.participant import Participant


class User(BaseModel):
    """Somebody, or something, that takes part in conversations.

    Of one that was purged only the row is left, without a name: its messages still point at it.
    """

    __tablename__ = "users"

    username: Mapped[str | None] = mapped_column(Name)
    email: Mapped[str | None]
    full_name: Mapped[str] = mapped_column(server_default="")
    kind: Mapped[str] = mapped_column(server_default=UserKind.HUMAN)
    is_active: Mapped[bool] = mapped_column(server_default=text("true"))
    is_verified: Mapped[bool] = mapped_column(server_default=text("false"))
    password_hash: Mapped[str | None]
    # `metadata` is the declarative base's own word.
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", server_default=EMPTY_OBJECT)
    external_id: Mapped[str | None] = mapped_column(Name)
    # Counts client-made changes; the etag is made from it.
    revision: Mapped[int] = mapped_column(server_default=text("1"))
    purged_at: Mapped[datetime | None] = mapped_column(sort_order=13)

    # Nothing goes with a user: the database refuses while anything points at it.
    created_conversations: Mapped[list["Conversation"]] = relationship(
        back_populates="creator",
        foreign_keys="Conversation.creator_id",
        passive_deletes="all",
        lazy="raise",
    )
    participations: Mapped[list["Participant"]] = relationship(
        back_populates="user",
        foreign_keys="Participant.user_id",
        passive_deletes="all",
        lazy="raise",
    )
    invitations_made: Mapped[list["Participant"]] = relationship(
        back_populates="invited_by",
        foreign_keys="Participant.invited_by_user_id",
        passive_deletes="all",
        lazy="raise",
    )

    __table_args__ = (
        UniqueConstraint("username", name="uq_users_username"),
        # Case-insensitive by the builtin Unicode rules, the same on every machine.
        Index("uq_users_email", text('lower(email COLLATE "pg_c_utf8")'), unique=True),
        UniqueConstraint("external_id", name="uq_users_external_id"),
        Index(
            "ix_users_metadata",
            "metadata",
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},
            postgresql_where=text(HAS_METADATA),
        ),
        # In the order of the list, of all users and of the few that are not active.
        Index("ix_users_created_at_id", "created_at", "id"),
        Index("ix_users_inactive", "created_at", "id", postgresql_where=text("NOT is_active")),
        one_of("kind", UserKind),
        CheckConstraint("char_length(username) BETWEEN 1 AND 64", name="username_length"),
        CheckConstraint("jsonb_typeof(metadata) = 'object'", name="metadata_object"),
        CheckConstraint(
            "CASE WHEN purged_at IS NULL THEN username IS NOT NULL"
            " ELSE num_nonnulls(username, email, password_hash, external_id) = 0 END",
            name="purged",
        ),
    )
