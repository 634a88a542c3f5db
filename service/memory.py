"""What is remembered of conversations: their states when they were last written to, for whoever
checks that only messages have changed them since.
"""

from collections.abc import Hashable, Iterable, Mapping
from uuid import UUID

from service.repositories.messages import Written
from service.rules.messages import Append, State, person_id

# A conversation takes some 2 KiB, and half of one for each person who spoke.
MAX_CONVERSATIONS = 4_096
MAX_PEOPLE = 64
# It is relied on while it is nearly always right: each time that it is not costs a statement.
# Processes that change who is in the same conversations look up what each is about to change.
RELIABLE, WEIGHT = 0.8, 1 / 32


class Memory:
    """The states of the conversations last written to."""

    def __init__(self) -> None:
        # The one that was written to last is last.
        self._states: dict[UUID, State] = {}
        # The share of them that were still right of late.
        self._reliability = 1.0
        self._session: Hashable = None
        # Of the database, in which all of them were so.
        self.history: str | None = None

    def bind(self, session: Hashable) -> None:
        """Forget what was learned in another session: that may have ended because the database
        gave way to one that has gone back in time, where a version says something else.
        """
        if session != self._session:
            self._session = session
            self._states.clear()

    def recall(self, items: Iterable[Append]) -> dict[UUID, State]:
        """The states of those conversations that are known well enough for all their items. They
        are forgotten until whoever decides by them, and so changes them, says what came of it.
        """
        if self._reliability < RELIABLE:
            return {}
        wanted: dict[UUID, bool] = {}
        for item in items:
            state = self._states.get(item.conversation_id)
            suffices = state is not None and _suffices(state, item)
            wanted[item.conversation_id] = wanted.get(item.conversation_id, True) and suffices
        return {id: self._states.pop(id) for id, suffices in wanted.items() if suffices}

    def keep(
        self,
        recalled: Mapping[UUID, State],
        loaded: Mapping[UUID, State],
        written: Written,
    ) -> None:
        """Remember the states that were decided by, unless they turned out to be wrong; those of
        another history of the database than the one that was written in are forgotten.
        """
        if written.history != self.history:
            self.history = written.history
            self._states.clear()
        for id in recalled.keys() - written.taken:
            self._learn(id in written.stored)
        for id, state in loaded.items():
            if before := self._states.pop(id, None):
                self._learn(_unchanged(state, before))
        for id, state in (*recalled.items(), *loaded.items()):
            if stored := written.stored.get(id):
                state.move(stored.moved_by)
            if (stored or id in written.taken) and len(state.people) <= MAX_PEOPLE:
                state.requests.clear()
                state.messages.clear()
                state.external_ids.clear()
                self._states[id] = state
        while len(self._states) > MAX_CONVERSATIONS:
            del self._states[next(iter(self._states))]

    def _learn(self, was_right: bool) -> None:
        self._reliability += WEIGHT * (was_right - self._reliability)


def _suffices(state: State, item: Append) -> bool:
    """Whether nothing needs to be looked up to decide about the item."""
    return not item.dry_run and all(
        draft.reply_to is None
        and draft.parent is None
        and draft.external_id is None
        and (person_id(item, draft) in state.people or not (item.actor or draft.sender))
        for draft in item.drafts
    )


def _unchanged(loaded: State, before: State) -> bool:
    """Whether nothing had changed when it was looked up; then who was known still is."""
    if loaded.other_changes != before.other_changes:
        return False
    loaded.people.update({id: who for id, who in before.people.items() if id not in loaded.people})
    return True
