"""the first schema"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


class Xid8(sa.types.UserDefinedType[str]):
    def get_col_spec(self, **_: object) -> str:
        return "xid8"


def upgrade() -> None:
    op.create_table(
        "eras",
        sa.Column("era", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("system_identifier", sa.Text(), nullable=False),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("era", name=op.f("pk_eras")),
    )
    op.create_table(
        "events",
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("era", sa.Integer(), nullable=False),
        sa.Column(
            "xid",
            Xid8(),
            server_default=sa.text("pg_current_xact_id()"),
            nullable=False,
        ),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column(
            "committed_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("actor_id", sa.Uuid(), nullable=True),
        sa.Column("sequence", sa.BigInteger(), nullable=True),
        sa.Column("revision", sa.Integer(), nullable=True),
        sa.Column("user_id", sa.Uuid(), nullable=True),
        sa.Column("previous_status", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=True),
        sa.Column("previous_role", sa.Text(), nullable=True),
        sa.Column("role", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.CheckConstraint(
            "type IN ('CONVERSATION_CREATED', 'CONVERSATION_UPDATED', 'CONVERSATION_DELETED',"
            " 'CONVERSATION_UNDELETED', 'CONVERSATION_PURGED', 'PARTICIPANT_CHANGED',"
            " 'READ_CURSOR_MOVED', 'MESSAGE_CREATED', 'MESSAGE_UPDATED', 'MESSAGE_DELETED',"
            " 'MESSAGE_UNDELETED', 'LIVE_MESSAGE_STARTED', 'LIVE_MESSAGE_FINISHED')",
            name=op.f("ck_events_type"),
        ),
        sa.CheckConstraint("version >= 1", name=op.f("ck_events_version_positive")),
        sa.PrimaryKeyConstraint("conversation_id", "version", name=op.f("pk_events")),
    )
    op.create_index(
        "ix_events_feed",
        "events",
        ["era", "xid", "conversation_id", "version"],
        unique=False,
    )
    op.create_index(
        "ix_events_user",
        "events",
        ["user_id", "conversation_id", "version"],
        unique=False,
        postgresql_where=sa.text("user_id IS NOT NULL"),
    )
    op.create_table(
        "signing_keys",
        sa.Column("name", sa.Text(collation="C"), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_signing_keys")),
    )
    op.create_table(
        "tokens",
        sa.Column("key_id", sa.Text(collation="C"), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("service", sa.Text(), nullable=False),
        sa.Column("scopes", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "octet_length(secret_hash) = 32", name=op.f("ck_tokens_secret_hash_length")
        ),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_tokens")),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.Uuid(), server_default=sa.text("uuidv7()"), nullable=False),
        sa.Column("username", sa.Text(collation="C"), nullable=False),
        sa.Column("email", sa.Text(), nullable=True),
        sa.Column("full_name", sa.Text(), server_default="", nullable=False),
        sa.Column("kind", sa.Text(), server_default="HUMAN", nullable=False),
        sa.Column("is_active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("is_verified", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=True),
        sa.Column(
            "metadata",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
        ),
        sa.Column("external_id", sa.Text(collation="C"), nullable=True),
        sa.Column("revision", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "jsonb_typeof(metadata) = 'object'", name=op.f("ck_users_metadata_object")
        ),
        sa.CheckConstraint("kind IN ('HUMAN', 'AGENT')", name=op.f("ck_users_kind")),
        sa.CheckConstraint(
            "char_length(username) BETWEEN 1 AND 64",
            name=op.f("ck_users_username_length"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("external_id", name="uq_users_external_id"),
        sa.UniqueConstraint("username", name="uq_users_username"),
    )
    op.create_index(
        "ix_users_metadata",
        "users",
        ["metadata"],
        unique=False,
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
        postgresql_where=sa.text("metadata <> '{}'::jsonb"),
    )
    op.create_index(
        "uq_users_email",
        "users",
        [sa.literal_column('lower(email COLLATE "pg_c_utf8")')],
        unique=True,
    )
    op.create_table(
        "conversations",
        sa.Column("id", sa.Uuid(), server_default=sa.text("uuidv7()"), nullable=False),
        sa.Column("title", sa.Text(), server_default="", nullable=False),
        sa.Column("slug", sa.Text(collation="C"), nullable=False),
        sa.Column("creator_id", sa.Uuid(), nullable=False),
        sa.Column("is_active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column(
            "members_may_invite",
            sa.Boolean(),
            server_default=sa.text("true"),
            nullable=False,
        ),
        sa.Column("is_direct", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "metadata",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
        ),
        sa.Column("external_id", sa.Text(collation="C"), nullable=True),
        sa.Column("revision", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column(
            "last_sequence",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column("version", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "participant_count",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column(
            "total_tokens_used",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column("last_activity_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_message_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "jsonb_typeof(metadata) = 'object'",
            name=op.f("ck_conversations_metadata_object"),
        ),
        sa.CheckConstraint(
            "slug ~ '^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$'",
            name=op.f("ck_conversations_slug_form"),
        ),
        sa.CheckConstraint(
            "last_sequence >= 0 AND version >= 0 AND participant_count >= 0"
            " AND total_tokens_used >= 0",
            name=op.f("ck_conversations_counters"),
        ),
        sa.ForeignKeyConstraint(
            ["creator_id"], ["users.id"], name=op.f("fk_conversations_creator_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conversations")),
        sa.UniqueConstraint("external_id", name="uq_conversations_external_id"),
        sa.UniqueConstraint("slug", name="uq_conversations_slug"),
        postgresql_with={"fillfactor": "80"},
    )
    op.create_index(
        "ix_conversations_created_at_id",
        "conversations",
        ["created_at", "id"],
        unique=False,
    )
    op.create_index(
        "ix_conversations_creator",
        "conversations",
        ["creator_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        "ix_conversations_metadata",
        "conversations",
        ["metadata"],
        unique=False,
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
        postgresql_where=sa.text("metadata <> '{}'::jsonb"),
    )
    op.create_table(
        "participants",
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("invited_by_user_id", sa.Uuid(), nullable=True),
        sa.Column("initial_message_id", sa.Uuid(), nullable=True),
        sa.Column(
            "hide_history",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
        ),
        sa.Column("joined_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("left_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("status_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("status_actor_id", sa.Uuid(), nullable=True),
        sa.Column("status_reason", sa.Text(), server_default="", nullable=False),
        sa.Column(
            "visible_from_sequence",
            sa.BigInteger(),
            server_default=sa.text("1"),
            nullable=False,
        ),
        sa.Column("visible_to_sequence", sa.BigInteger(), nullable=True),
        sa.Column(
            "last_read_sequence",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column("revision", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "(status = 'JOINED') = (visible_to_sequence IS NULL)",
            name=op.f("ck_participants_window_open"),
        ),
        sa.CheckConstraint(
            "role IN ('OWNER', 'MODERATOR', 'MEMBER', 'OBSERVER')",
            name=op.f("ck_participants_role"),
        ),
        sa.CheckConstraint(
            "status <> 'JOINED' OR joined_at IS NOT NULL",
            name=op.f("ck_participants_joined_at"),
        ),
        sa.CheckConstraint(
            "status NOT IN ('LEFT', 'REMOVED') OR left_at IS NOT NULL",
            name=op.f("ck_participants_left_at"),
        ),
        sa.CheckConstraint(
            "status IN ('INVITED', 'JOINED', 'DECLINED', 'REVOKED', 'LEFT', 'REMOVED')",
            name=op.f("ck_participants_status"),
        ),
        sa.CheckConstraint(
            "visible_from_sequence >= 1 AND visible_to_sequence >= 0 AND last_read_sequence >= 0",
            name=op.f("ck_participants_cursors"),
        ),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name=op.f("fk_participants_conversation_id"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["invited_by_user_id"],
            ["users.id"],
            name=op.f("fk_participants_invited_by_user_id"),
        ),
        sa.ForeignKeyConstraint(
            ["status_actor_id"],
            ["users.id"],
            name=op.f("fk_participants_status_actor_id"),
        ),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_participants_user_id")),
        sa.PrimaryKeyConstraint("conversation_id", "user_id", name=op.f("pk_participants")),
        sa.UniqueConstraint("user_id", "conversation_id", name="uq_participants_user_conversation"),
        postgresql_with={"fillfactor": "80"},
    )
    op.create_index(
        "ix_participants_initial_message",
        "participants",
        ["conversation_id", "initial_message_id"],
        unique=False,
        postgresql_where=sa.text("initial_message_id IS NOT NULL"),
    )
    op.create_index(
        "ix_participants_invited_by_user_id",
        "participants",
        ["invited_by_user_id"],
        unique=False,
        postgresql_where=sa.text("invited_by_user_id IS NOT NULL"),
    )
    op.create_index(
        "ix_participants_status_actor_id",
        "participants",
        ["status_actor_id"],
        unique=False,
        postgresql_where=sa.text("status_actor_id IS NOT NULL"),
    )
    op.create_table(
        "requests",
        sa.Column("conversation_id", sa.Uuid(), nullable=True),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("payload_hash", sa.LargeBinary(), nullable=False),
        sa.Column("subject_id", sa.Uuid(), nullable=True),
        sa.Column("sequence", sa.BigInteger(), nullable=True),
        sa.Column("message_count", sa.Integer(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "octet_length(key) = 16 AND octet_length(payload_hash) = 32",
            name=op.f("ck_requests_digests"),
        ),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name=op.f("fk_requests_conversation_id"),
            ondelete="CASCADE",
        ),
    )
    op.create_index(
        "ix_requests_created_at",
        "requests",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("conversation_id IS NULL"),
    )
    op.create_index(
        "uq_requests_conversation_key",
        "requests",
        ["conversation_id", "key"],
        unique=True,
        postgresql_nulls_not_distinct=True,
    )
    op.execute("ALTER TABLE requests REPLICA IDENTITY FULL")
    op.create_table(
        "messages",
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), server_default=sa.text("uuidv7()"), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("sender_id", sa.Uuid(), nullable=True),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default="COMPLETE", nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column(
            "metadata",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
        ),
        sa.Column("tokens_used", sa.Integer(), nullable=True),
        sa.Column("input_tokens", sa.Integer(), nullable=True),
        sa.Column("output_tokens", sa.Integer(), nullable=True),
        sa.Column("model", sa.Text(), server_default="", nullable=False),
        sa.Column("reply_to_message_id", sa.Uuid(), nullable=True),
        sa.Column("parent_message_id", sa.Uuid(), nullable=True),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("external_id", sa.Text(collation="C"), nullable=True),
        sa.Column("revision", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "jsonb_typeof(metadata) = 'object'",
            name=op.f("ck_messages_metadata_object"),
        ),
        sa.CheckConstraint(
            "role <> 'USER' OR sender_id IS NOT NULL",
            name=op.f("ck_messages_user_has_sender"),
        ),
        sa.CheckConstraint(
            "id <> reply_to_message_id AND id <> parent_message_id",
            name=op.f("ck_messages_not_about_itself"),
        ),
        sa.CheckConstraint(
            "role IN ('USER', 'ASSISTANT', 'SYSTEM', 'TOOL')",
            name=op.f("ck_messages_role"),
        ),
        sa.CheckConstraint(
            "status IN ('COMPLETE', 'INCOMPLETE', 'FAILED')",
            name=op.f("ck_messages_status"),
        ),
        sa.CheckConstraint(
            "octet_length(content) <= 262144", name=op.f("ck_messages_content_length")
        ),
        sa.CheckConstraint("sequence >= 1", name=op.f("ck_messages_sequence_positive")),
        sa.CheckConstraint(
            "tokens_used >= 0 AND input_tokens >= 0 AND output_tokens >= 0",
            name=op.f("ck_messages_tokens"),
        ),
        sa.ForeignKeyConstraint(
            ["conversation_id", "parent_message_id"],
            ["messages.conversation_id", "messages.id"],
            name="fk_messages_parent",
        ),
        sa.ForeignKeyConstraint(
            ["conversation_id", "reply_to_message_id"],
            ["messages.conversation_id", "messages.id"],
            name="fk_messages_reply_to",
        ),
        sa.ForeignKeyConstraint(
            ["conversation_id", "sender_id"],
            ["participants.conversation_id", "participants.user_id"],
            name="fk_messages_sender",
        ),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name=op.f("fk_messages_conversation_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("conversation_id", "id", name=op.f("pk_messages")),
        sa.UniqueConstraint(
            "conversation_id", "sequence", name="uq_messages_conversation_sequence"
        ),
    )
    op.create_index(
        "ix_messages_metadata",
        "messages",
        ["metadata"],
        unique=False,
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
        postgresql_where=sa.text("metadata <> '{}'::jsonb"),
    )
    op.create_index(
        "ix_messages_parent",
        "messages",
        ["conversation_id", "parent_message_id"],
        unique=False,
        postgresql_where=sa.text("parent_message_id IS NOT NULL"),
    )
    op.create_index(
        "ix_messages_reply_to",
        "messages",
        ["conversation_id", "reply_to_message_id"],
        unique=False,
        postgresql_where=sa.text("reply_to_message_id IS NOT NULL"),
    )
    op.create_index(
        "ix_messages_sender",
        "messages",
        ["conversation_id", "sender_id", "sequence"],
        unique=False,
        postgresql_where=sa.text("sender_id IS NOT NULL"),
    )
    op.create_index(
        "uq_messages_external_id",
        "messages",
        ["conversation_id", "external_id"],
        unique=True,
        postgresql_where=sa.text("external_id IS NOT NULL"),
    )
    # participants and messages point at each other: this edge is added when both are there.
    op.create_foreign_key(
        "fk_participants_initial_message",
        "participants",
        "messages",
        ["conversation_id", "initial_message_id"],
        ["conversation_id", "id"],
    )
    op.execute(
        "INSERT INTO eras (era, system_identifier)"
        " SELECT 1, system_identifier::text FROM pg_control_system()"
    )


def downgrade() -> None:
    op.drop_constraint("fk_participants_initial_message", "participants")
    for table in (
        "messages",
        "requests",
        "participants",
        "conversations",
        "users",
        "tokens",
        "signing_keys",
        "events",
        "eras",
    ):
        op.drop_table(table)
