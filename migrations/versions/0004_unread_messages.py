"""unread messages

One small index: deleted messages, which are subtracted from the unread ones. Building it holds
nobody up; it can be repeated, should it be interrupted.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.get_context().autocommit_block():
        # One whose building was interrupted is there, and of no use.
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_messages_deleted")
        op.execute(
            "CREATE INDEX CONCURRENTLY ix_messages_deleted ON messages"
            " (conversation_id, sequence) WHERE deleted_at IS NOT NULL"
        )


def downgrade() -> None:
    op.drop_index("ix_messages_deleted", "messages")
