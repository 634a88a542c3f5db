"""purged users and failed passwords

Only adds, and lets a user be without a name: the version before purges nobody. Building the indexes
and checking the rows that are there holds nobody up, but cannot be done in one transaction; so each
statement can be repeated, should the migration be interrupted between two of them.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

PURGED = """
CASE WHEN purged_at IS NULL THEN username IS NOT NULL
     ELSE num_nonnulls(username, email, password_hash, external_id) = 0 END
"""

INDEXES = {
    "ix_users_created_at_id": "ix_users_created_at_id ON users (created_at, id)",
    "ix_users_inactive": "ix_users_inactive ON users (created_at, id) WHERE NOT is_active",
}


def upgrade() -> None:
    op.execute("""
        ALTER TABLE users
          ALTER COLUMN username DROP NOT NULL,
          ADD COLUMN IF NOT EXISTS purged_at timestamptz
    """)
    op.execute("ALTER TABLE users DROP CONSTRAINT IF EXISTS ck_users_purged")
    op.execute(f"ALTER TABLE users ADD CONSTRAINT ck_users_purged CHECK ({PURGED}) NOT VALID")
    op.execute("""
        CREATE TABLE IF NOT EXISTS password_failures (
          id uuid DEFAULT uuidv7() NOT NULL CONSTRAINT pk_password_failures PRIMARY KEY,
          key bytea NOT NULL
            CONSTRAINT ck_password_failures_key_length CHECK (octet_length(key) = 32),
          failed_at timestamptz DEFAULT clock_timestamp() NOT NULL
        )
    """)
    for name, columns in (("key_failed_at", "key, failed_at"), ("failed_at", "failed_at")):
        op.execute(
            f"CREATE INDEX IF NOT EXISTS ix_password_failures_{name}"
            f" ON password_failures ({columns})"
        )
    with op.get_context().autocommit_block():
        op.execute("ALTER TABLE users VALIDATE CONSTRAINT ck_users_purged")
        for name, index in INDEXES.items():
            # One whose building was interrupted is there, and of no use.
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {index}")


def downgrade() -> None:
    op.drop_table("password_failures")
    op.drop_index("ix_users_created_at_id", "users")
    op.drop_index("ix_users_inactive", "users")
    op.drop_constraint("ck_users_purged", "users")
    op.drop_column("users", "purged_at")
    # No other user may have a name in the form of an id.
    op.execute("UPDATE users SET username = id::text WHERE username IS NULL")
    op.alter_column("users", "username", nullable=False)
