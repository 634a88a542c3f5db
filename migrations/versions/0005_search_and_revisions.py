"""search and revisions

Only adds: the version before neither reads nor writes any of it. What it stores meanwhile has no
words yet; the server that follows indexes that in passing, as it does everything stored before.
The indexes are built without holding anybody up, which cannot be done in one transaction; so each
statement can be repeated, should the migration be interrupted between two of them.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_messages_edited_by_user_id": ("(edited_by_user_id) WHERE edited_by_user_id IS NOT NULL"),
    "ix_messages_search": (
        "USING gin (search) WITH (gin_pending_list_limit = 128) WHERE deleted_at IS NULL"
    ),
    "ix_messages_created_at": "(created_at, conversation_id, sequence)",
    "ix_messages_unindexed": "(conversation_id, id) WHERE search IS NULL",
}


def upgrade() -> None:
    # Columns that begin as NULL need no look at the rows, and neither does the foreign key.
    op.execute("""
        ALTER TABLE messages
          ADD COLUMN IF NOT EXISTS edited_by_user_id uuid
            CONSTRAINT fk_messages_edited_by_user_id REFERENCES users (id),
          ADD COLUMN IF NOT EXISTS search tsvector
    """)
    op.execute("""
        CREATE TABLE IF NOT EXISTS message_revisions (
          conversation_id uuid NOT NULL,
          message_id uuid NOT NULL,
          revision integer NOT NULL,
          content text NOT NULL,
          metadata jsonb DEFAULT '{}'::jsonb NOT NULL,
          tokens_used integer,
          editor_id uuid CONSTRAINT fk_message_revisions_editor_id REFERENCES users (id),
          created_at timestamp with time zone NOT NULL,
          CONSTRAINT pk_message_revisions PRIMARY KEY (conversation_id, message_id, revision),
          CONSTRAINT fk_message_revisions_message FOREIGN KEY (conversation_id, message_id)
            REFERENCES messages (conversation_id, id) ON DELETE CASCADE,
          CONSTRAINT ck_message_revisions_revision_positive CHECK (revision >= 1),
          CONSTRAINT ck_message_revisions_content_length CHECK (octet_length(content) <= 262144),
          CONSTRAINT ck_message_revisions_metadata_object
            CHECK (jsonb_typeof(metadata) = 'object'),
          CONSTRAINT ck_message_revisions_tokens CHECK (tokens_used >= 0)
        )
    """)
    op.execute("""
        CREATE INDEX IF NOT EXISTS ix_message_revisions_editor_id ON message_revisions (editor_id)
          WHERE editor_id IS NOT NULL
    """)
    with op.get_context().autocommit_block():
        for name, index in INDEXES.items():
            # One whose building was interrupted is there, and of no use.
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON messages {index}")


def downgrade() -> None:
    op.drop_table("message_revisions")
    op.drop_index("ix_messages_created_at", "messages")
    op.drop_column("messages", "edited_by_user_id")
    op.drop_column("messages", "search")
