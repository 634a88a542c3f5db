"""changes of messages

Counts how often a conversation's messages were edited, deleted or brought back, so that whoever
knows them can tell whether they are still so. Only adds; a constant default takes no look at the
rows.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        ALTER TABLE conversations
          ADD COLUMN IF NOT EXISTS message_changes bigint DEFAULT 0 NOT NULL
    """)


def downgrade() -> None:
    op.drop_column("conversations", "message_changes")
