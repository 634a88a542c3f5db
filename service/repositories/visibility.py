"""Who may see what, written once: every read path joins `c` (conversations) with `p` (the actor's
own row in participants) and asks here.

A user sees a conversation while invited or joined, and for ever after having joined. In it, it
reads the window that its row holds: to the newest message while joined, to the last one before it
left otherwise, and nothing while it has never joined, except the message that its invitation
points at.
"""

# Whether the actor's row shows it the conversation at all.
SEES = "(p.status IN ('INVITED', 'JOINED') OR p.joined_at IS NOT NULL)"

# The window, as concrete numbers of the same moment as the row: a message that came after cannot
# slip in, whatever is read next and however late.
FIRST = "CASE WHEN k.actor_id IS NULL THEN 1 ELSE p.visible_from_sequence END"
LAST = (
    "CASE WHEN k.actor_id IS NULL THEN c.last_sequence"
    " ELSE least(p.visible_to_sequence, c.last_sequence) END"
)
# The one message shown by a pending invitation.
SHOWN = "CASE WHEN p.status = 'INVITED' THEN p.initial_message_id END"

# How many messages a participant (`p`) has not read of those it may, counted to 1,000: they come
# after its cursor, are not its own and not deleted.
UNREAD = """
(SELECT count(*) FROM (
   SELECT FROM messages m
   WHERE m.conversation_id = p.conversation_id
     AND m.sequence >= greatest(p.last_read_sequence + 1, p.visible_from_sequence)
     AND (p.visible_to_sequence IS NULL OR m.sequence <= p.visible_to_sequence)
     AND m.sender_id IS DISTINCT FROM p.user_id AND m.deleted_at IS NULL
   LIMIT 1000) AS unread)
"""


def readable(message: str, window: str) -> str:
    """SQL: the message lies in the window, or is the one that the invitation shows."""
    return (
        f"({message}.sequence BETWEEN {window}.first_sequence AND {window}.final_sequence"
        f" OR {message}.id = {window}.shown_message_id)"
    )
