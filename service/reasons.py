"""Every reason that a caller can be given, with what it reads and what the handbook says of it.

A reason never changes once released. `says` is sent with the error: it names the field, the rule
and the remedy, and its braces are filled with what was known at the raise, which travels as
`ErrorInfo.metadata` too. `means` and `remedy` are for docs/errors.md, which `make docs` writes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """One cause of an error. `status` names the gRPC status that it comes with, or both of them."""

    status: str
    says: str
    means: str
    remedy: str

    @property
    def statuses(self) -> list[str]:
        return self.status.split(" or ")


REASONS = {
    # What the request alone decides.
    "MALFORMED_REQUEST": Reason(
        "INVALID_ARGUMENT",
        "The request is not a valid {message}: check the encoding and the types.",
        "The bytes cannot be read as the request: another message was sent, or text in it is not "
        "UTF-8, or a Struct is nested too deep.",
        "Use stubs generated from the protos of this service; it is a defect of the client.",
    ),
    "REQUIRED": Reason(
        "INVALID_ARGUMENT",
        "{field} is required.",
        "A field without which the call has no meaning is empty. Where an actor would fill it in, "
        "there is none.",
        "Set the field. Of a oneof, set one of its fields.",
    ),
    "INVALID_VALUE": Reason(
        "INVALID_ARGUMENT",
        "{field} is not valid: {rule}.",
        "The field's value breaks a rule of this field, which the message tells.",
        "Change the value as the rule says.",
    ),
    "INVALID_CHARACTER": Reason(
        "INVALID_ARGUMENT",
        "{field} holds a character that is not allowed: {rule}.",
        "Text holds NUL, a control character, a blank, or one that cannot be seen, where it may "
        "not.",
        "Take the character out, or tell the user that it is not allowed.",
    ),
    "NOT_NORMALIZED": Reason(
        "INVALID_ARGUMENT",
        "{field} must be in Unicode NFC.",
        "The same name can be written in several ways in Unicode; names are kept in the composed "
        "form (NFC), so that two of them never look alike.",
        "Normalise the text to NFC before sending; every language's library can.",
    ),
    "INVALID_ENUM_VALUE": Reason(
        "INVALID_ARGUMENT",
        "{field} has no value {value}: use a named value of the enum.",
        "The enum has no value of this number. The unspecified one, where it does not do, is "
        "REQUIRED.",
        "Use a named value. A newer client with an older server: update the server first.",
    ),
    "FIELD_TOO_LONG": Reason(
        "INVALID_ARGUMENT",
        "{field} is longer than {limit} {unit}.",
        "The text is beyond the field's limit, counted in the unit given: characters are Unicode "
        "code points, bytes those of UTF-8.",
        "Shorten it, or split it. The limit is in the metadata, so a form can be told.",
    ),
    "TOO_MANY_ITEMS": Reason(
        "INVALID_ARGUMENT",
        "{field} has more than {limit} items.",
        "A list, or the keys of an object, are more than one call takes.",
        "Send them in several calls.",
    ),
    "OUT_OF_BOUNDS": Reason(
        "INVALID_ARGUMENT",
        "{field} must lie between {min} and {max}.",
        "The number lies outside of what the field can mean.",
        "Send a number within the bounds, which are in the metadata.",
    ),
    "INVALID_REFERENCE": Reason(
        "INVALID_ARGUMENT",
        "{field} must be {rule}.",
        "The text can be no name of such a record, so it was not even looked up: an id is a UUID "
        "of 36 characters, a slug and a username have their own forms.",
        "Send the id as a response gave it, or the slug or username where the field takes one.",
    ),
    "INVALID_SLUG": Reason(
        "INVALID_ARGUMENT",
        "{field} must be 3 to 63 characters of a-z, 0-9 and '-', "
        "start and end alphanumeric, and not look like a UUID.",
        "The slug could not stand in a link, or could be taken for an id.",
        "Choose another one, or leave it empty on create: one is then made from the title.",
    ),
    "INVALID_EMAIL": Reason(
        "INVALID_ARGUMENT",
        "{field} is not an e-mail address of at most 254 characters.",
        "The text does not have the form of an e-mail address.",
        "Send `name@domain.tld`, without a display name or brackets.",
    ),
    "INVALID_METADATA": Reason(
        "INVALID_ARGUMENT",
        "{field} is not acceptable metadata: {rule}.",
        "Metadata is a JSON object of at most 16 KiB, 64 keys and 16 levels, without NaN, "
        "infinity, NUL or empty keys. With `metadata_patch`, what would come of it counts.",
        "Keep large things elsewhere and a reference to them here; put exact integers into "
        "strings.",
    ),
    "INVALID_TIME": Reason(
        "INVALID_ARGUMENT",
        "{field} is not a valid time: {rule}.",
        "The timestamp is outside of what can be stored, or further ahead than the field allows.",
        "Send a time of the years 1 to 9999 with 0 to 999,999,999 nanoseconds. For a `sent_time` "
        "ahead, set the client's clock.",
    ),
    "INVALID_TIME_RANGE": Reason(
        "INVALID_ARGUMENT",
        "{field} must be later than {other}.",
        "The end of the range is not after its beginning, so nothing could ever be found.",
        "Swap the two, or leave one out. The beginning is inclusive, the end exclusive.",
    ),
    "INVALID_REQUEST_ID": Reason(
        "INVALID_ARGUMENT",
        "{field} must be 1 to 64 printable ASCII characters; a UUID is advised.",
        "The request_id is too long, or has characters outside of printable ASCII.",
        "Make a UUID for each thing to be done, and send the same one with each repetition of it.",
    ),
    "INVALID_ETAG": Reason(
        "INVALID_ARGUMENT",
        "{field} was not issued by this service: take it from the resource.",
        "The text is no etag at all. A stale one would be ETAG_MISMATCH.",
        "Send the etag exactly as a response gave it, or none.",
    ),
    "INVALID_ORDER_BY": Reason(
        "INVALID_ARGUMENT",
        "{field} must be one of: {allowed}.",
        "The list cannot be ordered in that way.",
        "Send one of the orders in the message, or none.",
    ),
    "INVALID_UPDATE_MASK": Reason(
        "INVALID_ARGUMENT",
        "{field} has a path '{path}': it may have {allowed}, or '*' for all.",
        "The mask names a field that does not exist, or that cannot be changed.",
        "Name top-level fields among those allowed, or leave the mask out: then all populated "
        "fields are taken.",
    ),
    "INVALID_PAGE_SIZE": Reason(
        "INVALID_ARGUMENT",
        "{field} must not be negative.",
        "A page cannot have fewer than no items.",
        "Send 0 for 50 items, or how many you want; more than 1,000 counts as 1,000.",
    ),
    "INVALID_PAGE_TOKEN": Reason(
        "INVALID_ARGUMENT",
        "{field} was not issued by this service: start again without it.",
        "The token was cut, changed, or made by another installation.",
        "Send it exactly as the page before gave it, or start again with an empty one.",
    ),
    "PAGE_TOKEN_MISMATCH": Reason(
        "INVALID_ARGUMENT",
        "{field} belongs to another request: repeat the method, filters, order, parent and actor "
        "that it was issued for.",
        "The token is ours, but the request around it is not the one it was issued for.",
        "Change nothing but page_token and page_size from page to page; for other filters start "
        "again without a token.",
    ),
    "INVALID_CURSOR": Reason(
        "INVALID_ARGUMENT",
        "{field} is not a cursor of this scope and actor: use one that was received for them.",
        "The cursor was cut or changed, or belongs to another conversation, user or actor.",
        "Keep one cursor for each scope that you follow. Without a good one, start from the oldest "
        "event.",
    ),
    "DUPLICATE": Reason(
        "INVALID_ARGUMENT",
        "{field} names the same user as {other}.",
        "Two fields name one user, perhaps one by id and the other by username.",
        "Name each user once.",
    ),
    # Who is calling.
    "MISSING_CREDENTIALS": Reason(
        "UNAUTHENTICATED",
        "Credentials are missing: send 'authorization: Bearer <token>'.",
        "The call carries no token. Health is the one service that needs none; reflection does.",
        "Send the metadata on every call. In development the token is in `.parley/token`.",
    ),
    "INVALID_CREDENTIALS": Reason(
        "UNAUTHENTICATED",
        "The credentials are not valid.",
        "The token is not ours, or was revoked, or has expired; which, a stranger is not told.",
        "Make a new one with `parley token create`, and see `parley token list`.",
    ),
    "SCOPE_REQUIRED": Reason(
        "PERMISSION_DENIED",
        "The caller needs the scope '{scope}' for this call.",
        "The token is good, but was not made for such calls. Without an actor a call also needs "
        "`system`.",
        "Name an actor if that is what is missing, or make a token with the scope; see "
        "[access.md](access.md).",
    ),
    "ACT_AS_DENIED": Reason(
        "PERMISSION_DENIED",
        "The caller may not name an actor: it needs the scope 'act-as'.",
        "`x-parley-actor` was sent by a service that may not speak for users.",
        "Make a token with `act-as`, or call without an actor.",
    ),
    "ACTOR_NOT_ALLOWED": Reason(
        "PERMISSION_DENIED",
        "This call cannot be made for the actor given: {rule}.",
        "The RPC is the system's alone, or the actor is inactive or deleted.",
        "Leave `x-parley-actor` out, or reactivate the user.",
    ),
    "INVALID_ACTOR": Reason(
        "INVALID_ARGUMENT",
        "x-parley-actor must be one user's id or username.",
        "The actor's metadata was sent twice, or is not in the form of an id or username.",
        "Send it once. Names outside of ASCII go into `x-parley-actor-bin`, as UTF-8.",
    ),
    # What does not exist, or may not be seen.
    "USER_NOT_FOUND": Reason(
        "NOT_FOUND or FAILED_PRECONDITION",
        "There is no user '{name}'.",
        "NOT_FOUND: the user that the call is about does not exist, or was purged. "
        "FAILED_PRECONDITION: another one named in the request does not, be it the actor.",
        "Look for a misspelt name: usernames are unique as written, so case counts. Make the user "
        "first.",
    ),
    "CONVERSATION_NOT_FOUND": Reason(
        "NOT_FOUND",
        "There is no conversation '{name}'.",
        "There is none of this id or slug, or the actor may not see it: the answer is the same.",
        "Ask as the system, without an actor: if it is there, the actor is not in it. A slug may "
        "have changed; the id never does.",
    ),
    "MESSAGE_NOT_FOUND": Reason(
        "NOT_FOUND",
        "There is no message '{name}' in this conversation.",
        "It is not there, or lies outside of what the actor may read, or is deleted already.",
        "Compare with `last_sequence` of the conversation, and with `visible_from_sequence` and "
        "`visible_to_sequence` of the actor's participant.",
    ),
    "PARTICIPANT_NOT_FOUND": Reason(
        "NOT_FOUND",
        "'{name}' is not a participant of this conversation.",
        "The user was never invited or added, or the actor may see its own participant only.",
        "See ListParticipants for who is in it. Invite or add the user.",
    ),
    "REPLY_TO_NOT_FOUND": Reason(
        "FAILED_PRECONDITION",
        "{field} names no message of this conversation.",
        "The message that is quoted is not in this conversation, or the sender may not see it.",
        "Quote a message of the same conversation. To quote one of the same batch, set "
        "expected_last_sequence.",
    ),
    "PARENT_NOT_FOUND": Reason(
        "FAILED_PRECONDITION",
        "{field} names no message of this conversation.",
        "The message to go on from is not in this conversation, or the sender may not see it.",
        "Name a message of the same conversation. To name one of the same batch, set "
        "expected_last_sequence.",
    ),
    "INITIAL_MESSAGE_NOT_FOUND": Reason(
        "FAILED_PRECONDITION",
        "{field} names no message of this conversation.",
        "The message to go with the invitation is not in this conversation, or the inviter may "
        "not read it.",
        "Send the message first, then invite with its sequence.",
    ),
    # What exists already.
    "USERNAME_TAKEN": Reason(
        "ALREADY_EXISTS",
        "The username '{name}' is taken.",
        "Another user has the username, be it a deleted one: it is free after PurgeUser.",
        "Use the user that is there, or choose another name.",
    ),
    "EMAIL_TAKEN": Reason(
        "ALREADY_EXISTS",
        "That e-mail address is taken.",
        "Another user has the address, whatever its case, be it a deleted one.",
        "Find that user with ListUsers, or leave the address out.",
    ),
    "SLUG_TAKEN": Reason(
        "ALREADY_EXISTS",
        "The slug '{name}' is taken.",
        "Another conversation has the slug, be it a deleted one: it is free after "
        "PurgeConversation.",
        "Use the conversation that is there, choose another slug, or leave it empty.",
    ),
    "NOT_DELETED": Reason(
        "ALREADY_EXISTS or FAILED_PRECONDITION",
        "'{name}' is not deleted: delete it first.",
        "ALREADY_EXISTS: there is nothing to undelete. FAILED_PRECONDITION: only what is deleted "
        "can be purged.",
        "After an undelete: nothing, it is there. Before a purge: delete it.",
    ),
    "EXTERNAL_ID_TAKEN": Reason(
        "ALREADY_EXISTS",
        "The external_id '{external_id}' is taken by '{name}'.",
        "A record with this id of the other system is here already, be it a deleted one.",
        "In an import: take the one that is there, which ResourceInfo names, and go on.",
    ),
    # What may not be done, or not now.
    "PERMISSION_DENIED": Reason(
        "PERMISSION_DENIED",
        "The actor may not do that here: {rule}.",
        "The actor sees the record, but its role does not allow this, or it is another's.",
        "Let somebody who may do it; [access.md](access.md) says who. Do not repeat the call.",
    ),
    "NOT_A_PARTICIPANT": Reason(
        "PERMISSION_DENIED or FAILED_PRECONDITION",
        "{field} does not name a joined participant of this conversation.",
        "PERMISSION_DENIED: the actor has been invited, or was in it, but is not joined now. "
        "FAILED_PRECONDITION: so it is with another user named in the request.",
        "Accept the invitation, or be invited again.",
    ),
    "ACCESS_LOST": Reason(
        "PERMISSION_DENIED",
        "The actor has left the conversation, or was removed: that was all it may see.",
        "A watch has sent everything up to the event by which the actor's access ended.",
        "Stop watching this conversation; what was sent is complete. A watch of the actor's user "
        "tells when it is invited again.",
    ),
    "ROLE_NOT_ALLOWED": Reason(
        "PERMISSION_DENIED",
        "{field} is not allowed: {rule}.",
        "Of a message: this sender may not send this role; SYSTEM is the system's, ASSISTANT and "
        "TOOL need an agent. Of a participant: the actor may not give this role.",
        "Send as an agent or as the system, or let an OWNER give the role.",
    ),
    "USER_INACTIVE": Reason(
        "FAILED_PRECONDITION",
        "{field} names a user that is deactivated or deleted.",
        "Such a user may not send, nor be invited or added; it stays in its conversations.",
        "Reactivate or undelete the user, or name another one.",
    ),
    "USER_DELETED": Reason(
        "FAILED_PRECONDITION",
        "The user is deleted: undelete it first.",
        "A deleted user is found, but cannot be changed.",
        "Call UndeleteUser first.",
    ),
    "CONVERSATION_DELETED": Reason(
        "FAILED_PRECONDITION",
        "The conversation is deleted: undelete it first.",
        "It is still there, but what is in it can neither be read nor changed. GetConversation "
        "shows when it was deleted.",
        "An OWNER or the system can call UndeleteConversation. Declining, revoking and leaving "
        "work all the same.",
    ),
    "CONVERSATION_ARCHIVED": Reason(
        "FAILED_PRECONDITION",
        "The conversation is archived (is_active is false): reactivate it.",
        "An archived conversation can be read, declined and left, but not written to.",
        "An OWNER, a MODERATOR or the system sets is_active to true with UpdateConversation.",
    ),
    "MESSAGE_DELETED": Reason(
        "FAILED_PRECONDITION",
        "Message '{name}' is deleted: undelete it first.",
        "A tombstone has no content that could be edited.",
        "Call UndeleteMessage first.",
    ),
    "DIRECT_CONVERSATION": Reason(
        "FAILED_PRECONDITION",
        "That is not possible in a direct conversation of two.",
        "The direct conversation of two users stays one of these two.",
        "Make a conversation with CreateConversation for three or more.",
    ),
    "TOO_MANY_PARTICIPANTS": Reason(
        "FAILED_PRECONDITION",
        "The conversation would have more than {limit} participants.",
        "Who is joined and who is invited are counted together.",
        "Remove somebody or revoke invitations first.",
    ),
    "LAST_OWNER": Reason(
        "FAILED_PRECONDITION",
        "Whoever is joined needs an owner: make somebody else OWNER first; "
        "who leaves may name a successor_user_id.",
        "The last OWNER would leave, be removed or be demoted, and others would stay.",
        "Name a successor_user_id in LeaveConversation, or make another one OWNER with "
        "UpdateParticipant.",
    ),
    "INVALID_STATE_TRANSITION": Reason(
        "FAILED_PRECONDITION",
        "That is not possible for a participant who is {current_status}; "
        "it is for one who is: {allowed}.",
        "The participant is not in a status from which this call leads on. Often somebody else "
        "was faster: an invitation was revoked before it was accepted.",
        "Read the participant again, and do what fits the status that it has now. "
        "[Participant.Status](api.md#participantstatus) says what leads where.",
    ),
    "REQUEST_ID_REUSED": Reason(
        "FAILED_PRECONDITION",
        "request_id was used for another request: choose a new one.",
        "The same caller and actor have sent another request under this id. The first one counts; "
        "this one had no effect.",
        "Make a new id for each new thing to be done. Where this comes up in a repetition, the "
        "client has changed the request between the two: a defect.",
    ),
    "ETAG_MISMATCH": Reason(
        "ABORTED",
        "The resource has changed: read it again and repeat with its etag.",
        "Somebody changed the record after you had read it. Your call had no effect.",
        "Read it again, decide anew, and call with the new etag. Never repeat the same call by "
        "itself.",
    ),
    "SEQUENCE_MISMATCH": Reason(
        "ABORTED",
        "expected_last_sequence is stale: the last sequence is {last_sequence}.",
        "Something was said between your reading and your sending. Nothing was stored.",
        "Read what is new, decide whether your message still fits, and send it with the "
        "last_sequence that is in the metadata.",
    ),
    "READ_PAST_END": Reason(
        "OUT_OF_RANGE",
        "{field} is beyond the last message, number {last_sequence}.",
        "Nobody can have read what was not said.",
        "Send the sequence of a message that you were given.",
    ),
    "CURSOR_EXPIRED": Reason(
        "OUT_OF_RANGE",
        "{field} is from before the database was restored, or from its future: start again "
        "without.",
        "The events that the cursor counts on are no longer those in the database.",
        "Start from the oldest event, or read everything anew and watch from now on.",
    ),
    "WATCH_TOO_SLOW": Reason(
        "RESOURCE_EXHAUSTED",
        "Nothing was read for {seconds} seconds: go on from the last cursor.",
        "The client took no response off the stream for so long that the server gave it up.",
        "Watch again from the last cursor: nothing is lost. Read the stream in a task of its own, "
        "and do slow work elsewhere.",
    ),
    "NOT_IMPLEMENTED": Reason(
        "UNIMPLEMENTED",
        "{method} is part of the contract, but not served by this version yet.",
        "The protos are ahead of the server.",
        "Update the server, or do without. [grpcurl.md](grpcurl.md#not-served-yet) lists them.",
    ),
    # What is too much.
    "RATE_LIMITED": Reason(
        "RESOURCE_EXHAUSTED",
        "Too many {subject}: repeat the call later.",
        "One caller, actor, user or server has reached a limit, which `subject` names: calls a "
        "second, watches at once, failed passwords in a minute.",
        "Wait as long as RetryInfo says, where it comes with it; end watches that nobody reads. "
        "The operator can raise `PARLEY_CALLS_PER_SECOND`.",
    ),
    "TOO_MANY_PASSWORDS": Reason(
        "RESOURCE_EXHAUSTED",
        "Too many {subject} at once: repeat the call.",
        "Hashing a password costs a core 16 ms and 19 MiB, so few are made at a time.",
        "Repeat after what RetryInfo says. If it goes on, somebody is guessing passwords.",
    ),
    # What went wrong here.
    "CONFLICT": Reason(
        "ABORTED",
        "The call met another one: repeat it.",
        "The database refused one of two transactions that met, after the server had tried again "
        "itself. There was no effect.",
        "Repeat the very same call after what RetryInfo says.",
    ),
    "LOCK_TIMEOUT": Reason(
        "ABORTED",
        "The conversation is busy: repeat the call.",
        "Somebody else held what the call needs for longer than it may wait. There was no effect.",
        "Repeat the very same call after what RetryInfo says. If it goes on, look for a long "
        "transaction in the database.",
    ),
    "OVERLOADED": Reason(
        "UNAVAILABLE",
        "The service is overloaded: repeat the call later.",
        "More calls are at work than the server takes, no database connection came free, or a "
        "statement ran into its limit. There was no effect.",
        "Repeat with growing pauses, as the [retry policy](../clients/service-config.json) does. "
        "The operator: `PARLEY_MAX_CALLS`, `PARLEY_POOL_SIZE`, more replicas.",
    ),
    "SHUTTING_DOWN": Reason(
        "UNAVAILABLE",
        "This server is shutting down: repeat the call.",
        "The server drains before it ends, as in every rolling restart. There was no effect.",
        "Repeat: another replica, or the next start, will answer. A watch goes on from its cursor.",
    ),
    "DATABASE_UNAVAILABLE": Reason(
        "UNAVAILABLE",
        "The database cannot be reached: repeat the call.",
        "The server lives, but has no database just now. There was no effect.",
        "Repeat with growing pauses; nothing needs a restart. The operator: see "
        "[operations.md](operations.md).",
    ),
    "DATABASE_READ_ONLY": Reason(
        "UNAVAILABLE",
        "The database does not accept writes: repeat the call.",
        "The server is connected to a standby, as during a failover. There was no effect.",
        "Repeat with growing pauses. If it goes on, `PARLEY_DATABASE_URL` leads to the wrong one.",
    ),
    "COMMIT_OUTCOME_UNKNOWN": Reason(
        "UNKNOWN",
        "Whether the call took effect is not known: repeat it under the same request_id, "
        "or read before you repeat it.",
        "The database went away in the moment of the commit, and could not be asked afterwards.",
        "With a request_id: repeat, there will be one effect. Without: read first, then decide.",
    ),
    "DEADLINE_EXCEEDED": Reason(
        "DEADLINE_EXCEEDED",
        "The deadline passed: repeat the call with a longer one.",
        "The client's deadline, or the server's 10 seconds where it had none, ran out. A write may "
        "still take effect.",
        "Repeat under the same request_id. gRPC's clients often say this themselves, and then "
        "without a reason.",
    ),
    "DATA_LOSS": Reason(
        "DATA_LOSS",
        "Stored data cannot be read: tell the operator, with id {correlation_id}.",
        "PostgreSQL reports damage of what it stores.",
        "Do not repeat. The operator finds the correlation_id in the log, and restores a backup.",
    ),
    "INTERNAL": Reason(
        "INTERNAL",
        "Something went wrong: tell the operator, with id {correlation_id}.",
        "A defect of the server. What happened is in its log, and nowhere else.",
        "Do not repeat. The operator finds the correlation_id in the log, with the stack.",
    ),
}
