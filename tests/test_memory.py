"""What a server remembers of conversations, and when it relies on it."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from service import memory
from service.domain import MessageRole
from service.identity import Actor
from service.memory import Memory
from service.repositories.messages import Stored, Written
from service.rules.messages import Append, Draft, State

HISTORY = "1/00000001"
TALK, ADA, BOB = UUID(int=1), UUID(int=11), UUID(int=12)


def item(talk: UUID = TALK, by: UUID = ADA, *, dry_run: bool = False, **values: Any) -> Append:
    draft = Draft(role=MessageRole.USER, content="hello", sender_id=by, **values)
    return Append(
        conversation=str(talk),
        conversation_id=talk,
        actor=Actor(by),
        drafts=(draft,),
        dry_run=dry_run,
    )


def looked_up(*people: UUID, other_changes: int = 2, last_sequence: int = 5) -> State:
    rows = {id: {"user_revision": 1} for id in people}
    return State({}, last_sequence, version=last_sequence + other_changes, people=dict(rows))


def written(*talks: UUID, moved_by: int = 0, history: str = HISTORY) -> Written:
    now = datetime.now(UTC)
    return Written({talk: Stored(now, moved_by) for talk in talks}, history=history)


def wrote(store: Memory, state: State, talk: UUID = TALK) -> None:
    """Looked up, decided by, and written."""
    state.move(1)
    store.keep({}, {talk: state}, written(talk))


def test_what_was_written_is_known_until_somebody_decides_by_it() -> None:
    known = Memory()
    assert known.recall([item()]) == {}
    wrote(known, looked_up(ADA))

    recalled = known.recall([item(), item()])

    assert recalled[TALK].last_sequence == 6
    assert known.recall([item()]) == {}, "two would have decided by the same state"
    known.keep(recalled, {}, written(TALK))
    assert known.recall([item()]) == recalled


def test_what_was_looked_up_and_not_written_is_not_known() -> None:
    known = Memory()
    known.keep({}, {TALK: looked_up(ADA)}, written())
    assert known.recall([item()]) == {}


def test_what_could_not_be_written_because_it_was_taken_is_known_still() -> None:
    known = Memory()
    for _ in range(20):
        known.keep({}, {TALK: looked_up(ADA)}, Written({}, frozenset({TALK}), HISTORY))
        assert known.recall([item()])


def test_the_messages_that_came_from_elsewhere_are_counted() -> None:
    known = Memory()
    wrote(known, looked_up(ADA))
    recalled = known.recall([item()])
    known.keep(recalled, {}, written(TALK, moved_by=4))
    state = known.recall([item()])[TALK]
    assert (state.last_sequence, state.version) == (10, 12)


@pytest.mark.parametrize(
    "unusual",
    [
        item(by=BOB),
        item(dry_run=True),
        item(reply_to=1),
        item(parent=UUID(int=5)),
        item(external_id="x"),
    ],
)
def test_what_has_to_be_looked_up_is_looked_up_for_its_whole_conversation(unusual: Append) -> None:
    known = Memory()
    wrote(known, looked_up(ADA))
    assert known.recall([item(), unusual]) == {}
    assert known.recall([item()])


def test_who_was_known_stays_known_when_somebody_else_is_looked_up_unless_all_has_changed() -> None:
    known = Memory()
    wrote(known, looked_up(ADA))
    wrote(known, looked_up(BOB, last_sequence=8))
    assert known.recall([item(by=ADA), item(by=BOB)])[TALK].people.keys() == {ADA, BOB}

    wrote(known, looked_up(ADA, last_sequence=9))
    wrote(known, looked_up(BOB, last_sequence=10, other_changes=3))
    assert known.recall([item(by=ADA)]) == {}


def test_nothing_is_known_in_another_session_or_another_history() -> None:
    known = Memory()
    known.bind("one")
    wrote(known, looked_up(ADA))
    known.bind("one")
    assert known.recall([item()])
    wrote(known, looked_up(ADA))
    known.bind("other")
    assert not known.recall([item()])

    wrote(known, looked_up(ADA))
    other = looked_up(BOB)
    known.keep({}, {UUID(int=2): other}, written(UUID(int=2), history="2/00000001"))
    assert not known.recall([item()])
    assert known.recall([item(UUID(int=2), by=BOB)])


def test_only_so_many_conversations_and_people_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_CONVERSATIONS", 2)
    known = Memory()
    for n in (1, 2, 3):
        wrote(known, looked_up(ADA), UUID(int=n))
    assert not known.recall([item(UUID(int=1))])
    assert len(known.recall([item(UUID(int=2)), item(UUID(int=3))])) == 2

    crowd = [UUID(int=1000 + n) for n in range(memory.MAX_PEOPLE + 1)]
    wrote(known, looked_up(*crowd))
    assert not known.recall([item(by=crowd[0])])


def test_what_is_wrong_again_and_again_is_not_relied_on_until_it_would_have_been_right() -> None:
    known = Memory()
    tries = 0
    while True:
        wrote(known, looked_up(ADA))
        if not (recalled := known.recall([item()])):
            break
        tries += 1
        known.keep(recalled, {}, written())
    assert 3 <= tries <= 10

    wrote(known, looked_up(ADA))
    for last_sequence in range(6, 25):
        wrote(known, looked_up(ADA, last_sequence=last_sequence))
    assert known.recall([item()])
