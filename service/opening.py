"""How conversations are made: the conversation, who joins it, its first message, who is invited to
it; in that order, for many conversations at a time.
"""

from collections.abc import Sequence
from uuid import UUID

from service.coalescer import Busy
from service.errors import Aborted, ParleyError
from service.making import found
from service.repositories.base import Row
from service.rules.conversations import NewConversation, Opening, cast
from service.rules.messages import Append
from service.rules.participants import Move, require_room
from service.sending import append
from service.store import Transaction

# What a CreateConversation answers: the conversation as its caller sees it, and its first message.
Opened = tuple[Row, Row | None]


async def open_all(
    transaction: Transaction, several: list[NewConversation]
) -> Sequence[UUID | ParleyError]:
    """One id or error a conversation. Raises what is refused once conversations are made."""
    users = await transaction.users.hold(list(set().union(*(new.references for new in several))))
    openings = [_cast(new, users) for new in several]
    ready = [opening for opening in openings if isinstance(opening, Opening)]
    made = iter(await transaction.conversations.create([opening.columns for opening in ready]))
    outcomes = [next(made) if isinstance(opening, Opening) else opening for opening in openings]
    opened = {
        outcome: opening
        for outcome, opening in zip(outcomes, openings, strict=True)
        if isinstance(outcome, UUID) and isinstance(opening, Opening)
    }
    joining = {id: opening.changes(Move.ADD) for id, opening in opened.items()}
    await transaction.participants.change(joining)
    first = await _append_first(transaction, opened)
    inviting = {
        id: opening.changes(Move.INVITE, initial_message_id=first.get(id))
        for id, opening in opened.items()
    }
    for id in opened:
        require_room(0, joining[id] + inviting[id])
    await transaction.participants.change(inviting)
    return outcomes


async def show_all(
    transaction: Transaction, made: list[tuple[NewConversation, UUID]]
) -> Sequence[Opened]:
    """What each caller sees of its conversation; raises where that is nothing any more."""
    views = await transaction.conversations.views([(id, new.actor_id) for new, id in made])
    # An actor's first message is its own, and stays whole for it wherever it is now.
    firsts = [(id, None, 1) for new, id in made if new.message]
    messages = iter(await transaction.messages.find(firsts) if firsts else ())
    return [
        (found(view, "conversation", id), next(messages) if new.message else None)
        for (new, id), view in zip(made, views, strict=True)
    ]


def weight_of(new: NewConversation) -> int:
    """How many rows it is; a long message weighs as much as many."""
    return 1 + len(new.entrants) + (len(new.message[0].content) // 1024 if new.message else 0)


def _cast(new: NewConversation, users: dict[UUID | str, Row]) -> Opening | ParleyError:
    try:
        return cast(new, users)
    except ParleyError as error:
        return error


async def _append_first(transaction: Transaction, opened: dict[UUID, Opening]) -> dict[UUID, UUID]:
    """The ids of the first messages, of conversations that have one, appended like any other."""
    items = [
        Append(
            conversation=str(id),
            conversation_id=id,
            actor=opening.new.actor,
            drafts=(opening.first,),
        )
        for id, opening in opened.items()
        if opening.first
    ]
    if not items:
        return {}
    ids = {}
    for item, sent in zip(items, await append(transaction, items), strict=True):
        if isinstance(sent, ParleyError):
            raise sent
        if isinstance(sent, Busy):
            # The conversation is nobody else's yet, but its sender has changed meanwhile.
            raise Aborted("CONFLICT", retry_after=0.05)
        # Nor was anything sent to it before.
        assert isinstance(sent, list)
        ((message, _),) = sent
        ids[item.conversation_id] = message.id
    return ids
