"""Who may see what, written once: every read path joins `c` (conversations) with `p` (the actor's
own row in participants) and asks here.

A user sees a conversation while invited or joined, and for ever after having joined. In it, it
reads the window that its row holds: to the newest message while joined, to the last one before it
left otherwise, and nothing while it has never joined, except the message that its invitation
points at.
"""

# Whether the actor's row shows it the conversation at all.
SEES = "(p.status IN ('INVITED', 'JOINED') OR p.joined_at IS NOT NULL)"

# Whether the actor (`a`) may act at all.
MAY_ACT = "(a.is_active AND a.deleted_at IS NULL)"

# The last message that the actor's row lets it read, if there is one.
END = "least(p.visible_to_sequence, c.last_sequence)"
# The window, as concrete numbers of the same moment as the row: a message that came after cannot
# slip in, whatever is read next and however late.
FIRST = "CASE WHEN k.actor_id IS NULL THEN 1 ELSE p.visible_from_sequence END"
LAST = f"CASE WHEN k.actor_id IS NULL THEN c.last_sequence ELSE {END} END"
# The one message shown by a pending invitation.
SHOWN = "CASE WHEN p.status = 'INVITED' THEN p.initial_message_id END"

# What a participant (`p`) has not read of what it may: messages from here on to the end of its
# window, which are not its own and not deleted.
UNREAD_FROM = "greatest(p.last_read_sequence + 1, p.visible_from_sequence)"
IS_UNREAD = (
    f"m.conversation_id = p.conversation_id AND m.sequence BETWEEN {UNREAD_FROM} AND {END}"
    " AND m.sender_id IS DISTINCT FROM p.user_id AND m.deleted_at IS NULL"
)
# How many they are, counted to 1,000. Sequences have no gaps, so that all there are is a
# subtraction, and only the exceptions are looked up: who comes back to a thousand rooms must not
# wait for a million messages to be read.
UNREAD = f"""
least(1000, greatest(0, {END} - {UNREAD_FROM} + 1)
  - (SELECT count(*) FROM messages m
     WHERE m.conversation_id = p.conversation_id AND m.sequence BETWEEN {UNREAD_FROM} AND {END}
       AND m.deleted_at IS NOT NULL)
  - (SELECT count(*) FROM messages m
     WHERE m.conversation_id = p.conversation_id AND m.sequence BETWEEN {UNREAD_FROM} AND {END}
       AND m.sender_id = p.user_id AND m.deleted_at IS NULL))
"""

# Two that are the same have nothing but new messages between them. Counters mean something in one
# table only (no two databases and no two tables have the same file), and in one life of it: a
# database that has gone back in time was restored, was started anew, or has recovered from a crash,
# at which its statistics begin anew.
MESSAGE_STATE = """
(c.message_changes || '/'
 || (SELECT pg_relation_filepath('conversations') || '/' || max(era) || '/'
            || pg_postmaster_start_time() || '/'
            || pg_stat_get_checkpointer_stat_reset_time() FROM eras))
"""


def readable(message: str, window: str) -> str:
    """SQL: the message lies in the window, or is the one that the invitation shows."""
    return (
        f"({message}.sequence BETWEEN {window}.first_sequence AND {window}.final_sequence"
        f" OR {message}.id = {window}.shown_message_id)"
    )
