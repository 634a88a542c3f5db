"""membership in the log

The index for a user's events took in every message that the user sent. Only changes of participants
are looked up by it, so that is all it holds from now on. The version before reads neither.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

MEMBERSHIP = """
CREATE INDEX CONCURRENTLY ix_events_membership ON events (user_id, conversation_id, version)
WHERE type = 'PARTICIPANT_CHANGED'
"""
USER = """
CREATE INDEX CONCURRENTLY ix_events_user ON events (user_id, conversation_id, version)
WHERE user_id IS NOT NULL
"""


def upgrade() -> None:
    with op.get_context().autocommit_block():
        # One whose building was interrupted is there, and of no use.
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_events_membership")
        op.execute(MEMBERSHIP)
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_events_user")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_events_user")
        op.execute(USER)
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_events_membership")
