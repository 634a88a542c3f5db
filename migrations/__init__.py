"""The schema's history, by Alembic."""

# "parley" in ASCII: the advisory lock that one migrator holds, so that replicas started together
# migrate once.
LOCK = 0x7061726C6579
# A migration that waits for a table's lock makes everybody queue behind it: give up early.
LOCK_TIMEOUT = "5s"
