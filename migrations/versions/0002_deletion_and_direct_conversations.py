"""deletion and direct conversations

Only adds: the version before neither reads nor writes any of it. Building the indexes and checking
the rows that are there holds nobody up, but cannot be done in one transaction; so each statement
can be repeated, should the migration be interrupted between two of them.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

DIRECT_PAIR = """
num_nulls(direct_first_user_id, direct_second_user_id) = CASE WHEN is_direct THEN 0 ELSE 2 END
"""
DIRECT_ORDER = "direct_first_user_id < direct_second_user_id"

INDEXES = {
    "uq_conversations_direct": (
        "UNIQUE INDEX CONCURRENTLY uq_conversations_direct ON conversations"
        " (direct_first_user_id, direct_second_user_id) WHERE direct_first_user_id IS NOT NULL"
    ),
    "ix_conversations_direct_second_user_id": (
        "INDEX CONCURRENTLY ix_conversations_direct_second_user_id ON conversations"
        " (direct_second_user_id) WHERE direct_second_user_id IS NOT NULL"
    ),
    "ix_messages_deleted_by_user_id": (
        "INDEX CONCURRENTLY ix_messages_deleted_by_user_id ON messages"
        " (deleted_by_user_id) WHERE deleted_by_user_id IS NOT NULL"
    ),
}


def upgrade() -> None:
    # A column that begins as NULL takes its foreign key without a look at the rows.
    op.execute("""
        ALTER TABLE conversations
          ADD COLUMN IF NOT EXISTS direct_first_user_id uuid
            CONSTRAINT fk_conversations_direct_first_user_id REFERENCES users (id),
          ADD COLUMN IF NOT EXISTS direct_second_user_id uuid
            CONSTRAINT fk_conversations_direct_second_user_id REFERENCES users (id)
    """)
    for name, rule in (("direct_pair", DIRECT_PAIR), ("direct_order", DIRECT_ORDER)):
        op.execute(f"ALTER TABLE conversations DROP CONSTRAINT IF EXISTS ck_conversations_{name}")
        op.execute(
            f"ALTER TABLE conversations ADD CONSTRAINT ck_conversations_{name}"
            f" CHECK ({rule}) NOT VALID"
        )
    op.execute("""
        ALTER TABLE messages
          ADD COLUMN IF NOT EXISTS deleted_by_user_id uuid
            CONSTRAINT fk_messages_deleted_by_user_id REFERENCES users (id),
          ADD COLUMN IF NOT EXISTS mark_count integer DEFAULT 0 NOT NULL
    """)
    op.execute("""
        ALTER TABLE requests
          ADD COLUMN IF NOT EXISTS participant_count integer,
          ADD COLUMN IF NOT EXISTS created boolean
    """)
    with op.get_context().autocommit_block():
        for name in ("direct_pair", "direct_order"):
            op.execute(f"ALTER TABLE conversations VALIDATE CONSTRAINT ck_conversations_{name}")
        for name, index in INDEXES.items():
            # One whose building was interrupted is there, and of no use.
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE {index}")


def downgrade() -> None:
    op.drop_constraint("ck_conversations_direct_pair", "conversations")
    op.drop_constraint("ck_conversations_direct_order", "conversations")
    op.drop_column("conversations", "direct_first_user_id")
    op.drop_column("conversations", "direct_second_user_id")
    op.drop_column("messages", "deleted_by_user_id")
    op.drop_column("messages", "mark_count")
    op.drop_column("requests", "participant_count")
    op.drop_column("requests", "created")
