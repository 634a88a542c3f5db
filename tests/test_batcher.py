"""The batcher: what comes together goes together, and each caller gets an outcome of its own."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from service.batcher import LONELY, PATIENCE, Batcher
from service.errors import Aborted, DeadlineExceeded, ParleyError, Unavailable, Unknown


class Work:
    """What a batcher runs: remembers its batches, and waits in each until it is let go."""

    def __init__(self, **outcomes: Exception) -> None:
        self.batches: list[list[str]] = []
        self.outcomes = outcomes
        self.raises: dict[str, Exception] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, items: list[str]) -> Sequence[str | Exception]:
        self.batches.append(items)
        await self.gate.wait()
        for item in items:
            if item in self.raises:
                raise self.raises[item]
        return [self.outcomes.get(item, item.upper()) for item in items]


def submitting(batcher: Batcher[str, str], *items: str, **options: Any) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(batcher.submit(item, **options)) for item in items]


async def settled(tasks: Sequence[asyncio.Task[str]]) -> list[str | BaseException]:
    return await asyncio.gather(*tasks, return_exceptions=True)


async def turns(count: int = 2 * PATIENCE) -> None:
    """Let everything run that can."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_call_that_comes_alone_goes_at_once() -> None:
    work = Work()

    assert await Batcher(work).submit("a") == "A"
    assert work.batches == [["a"]]


async def test_what_comes_while_a_batch_runs_goes_together_in_order_after_it() -> None:
    work = Work()
    batcher = Batcher(work)
    work.gate.clear()

    first = submitting(batcher, "a")
    await turns()
    rest = submitting(batcher, "b", "c", "d")
    await turns()
    assert work.batches == [["a"]]
    work.gate.set()

    assert await settled([*first, *rest]) == ["A", "B", "C", "D"]
    assert work.batches == [["a"], ["b", "c", "d"]]


async def test_those_who_are_on_their_way_are_waited_for_and_nobody_else() -> None:
    work = Work()
    batcher = Batcher(work)
    tasks = []

    for item in "abc":
        tasks += submitting(batcher, item)
        await turns(PATIENCE // 2)
    assert work.batches == []
    await turns()
    tasks += submitting(batcher, "d")

    assert await settled(tasks) == list("ABCD")
    assert work.batches == [["a", "b", "c"], ["d"]]


async def test_where_nobody_came_for_a_while_nobody_is_waited_for_until_somebody_comes() -> None:
    work = Work()
    batcher = Batcher(work)
    for _ in range(LONELY):
        await batcher.submit("a")
    work.batches.clear()
    work.gate.clear()

    tasks = submitting(batcher, "b")
    await turns(2)
    assert work.batches == [["b"]]
    tasks += submitting(batcher, "c", "d")
    work.gate.set()
    await settled(tasks)
    tasks += submitting(batcher, "e")
    await turns(2)
    tasks += submitting(batcher, "f")

    assert await settled(tasks) == list("BCDEF")
    assert work.batches == [["b"], ["c", "d"], ["e", "f"]]


@pytest.mark.parametrize(
    ("end", "outcome"),
    [("settled", str), ("raised", ValueError), ("cancelled", asyncio.CancelledError)],
)
async def test_however_it_ends_for_who_was_alone_whoever_came_meanwhile_is_next(
    end: str, outcome: type[object]
) -> None:
    work = Work()
    batcher = Batcher(work)
    for _ in range(LONELY):
        await batcher.submit("a")
    work.batches.clear()
    work.gate.clear()
    (alone,) = submitting(batcher, "b")
    await turns(2)
    others = submitting(batcher, "c", "d")
    await turns()

    if end == "raised":
        work.raises["b"] = ValueError()
    if end == "cancelled":
        alone.cancel()
    work.gate.set()

    assert isinstance((await settled([alone]))[0], outcome)
    assert await settled(others) == ["C", "D"]
    assert work.batches == [["b"], ["c", "d"]]


async def test_a_batch_holds_no_more_items_than_it_may() -> None:
    work = Work()

    assert await settled(submitting(Batcher(work, max_items=2), *"abcde")) == list("ABCDE")
    assert work.batches == [["a", "b"], ["c", "d"], ["e"]]


async def test_a_batch_begins_when_enough_wait_and_leaves_half_of_many_to_the_next() -> None:
    work = Work()
    batcher = Batcher(work, enough=2, max_items=4)

    assert await settled(submitting(batcher, *"abcdefghijkl")) == list("ABCDEFGHIJKL")

    assert list(map(len, work.batches)) == [4, 4, 2, 2]


async def test_a_batch_ends_before_it_weighs_more_than_it_may() -> None:
    work = Work()
    batcher = Batcher(work, weigh=len, max_weight=4)

    await settled(submitting(batcher, "aa", "bb", "c", "dddddd", "e"))

    assert work.batches == [["aa", "bb"], ["c"], ["dddddd"], ["e"]]


async def test_a_batch_holds_only_what_is_alike_and_the_others_keep_their_order() -> None:
    work = Work()
    batcher = Batcher(work, alike=str.lower)

    outcomes = await settled(submitting(batcher, "a", "b", "A", "c", "B", "a"))

    assert outcomes == list("ABACBA")
    assert work.batches == [["a", "A", "a"], ["b", "B"], ["c"]]


async def test_an_outcome_that_is_an_error_is_raised_to_its_own_caller_alone() -> None:
    error = ValueError("b")
    work = Work(b=error)

    assert await settled(submitting(Batcher(work), "a", "b", "c")) == ["A", error, "C"]
    assert work.batches == [["a", "b", "c"]]


async def test_of_a_batch_that_fails_only_the_poisoned_item_fails() -> None:
    work = Work()
    work.raises["b"] = ValueError("poison")

    assert await settled(submitting(Batcher(work), "a", "b", "c")) == ["A", work.raises["b"], "C"]
    assert work.batches == [["a", "b", "c"], ["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    "error",
    [
        Aborted("LOCK_TIMEOUT"),
        DeadlineExceeded("DEADLINE_EXCEEDED"),
        Unavailable("DATABASE_UNAVAILABLE"),
        Unknown("COMMIT_OUTCOME_UNKNOWN"),
    ],
    ids=lambda error: error.reason,
)
async def test_what_befalls_a_whole_batch_is_not_tried_again_item_by_item(
    error: ParleyError,
) -> None:
    """Waiting 2 s for a lock 64 times over, or repeating a COMMIT that may have happened."""
    work = Work()
    work.raises["a"] = error

    assert await settled(submitting(Batcher(work), "a", "b", "c")) == [error] * 3
    assert work.batches == [["a", "b", "c"]]


async def test_after_a_batch_that_failed_the_next_one_runs() -> None:
    work = Work()
    work.raises["a"] = Unavailable("DATABASE_UNAVAILABLE")
    batcher = Batcher(work, max_items=1)

    outcomes = await settled(submitting(batcher, "a", "b"))

    assert outcomes == [work.raises["a"], "B"]
    assert await batcher.submit("c") == "C"


async def test_an_item_that_nobody_wants_any_more_is_dropped_when_its_batch_forms() -> None:
    work = Work()
    batcher = Batcher(work)
    work.gate.clear()
    wanted = True
    running = submitting(batcher, "a", is_wanted=lambda: wanted)
    await turns()
    waiting = submitting(batcher, "b", is_wanted=lambda: wanted) + submitting(batcher, "c")
    await turns()

    wanted = False
    work.gate.set()

    # What runs already is done; what only waited is not.
    assert await settled(running) == ["A"]
    dropped, kept = await settled(waiting)
    assert isinstance(dropped, asyncio.CancelledError)
    assert kept == "C"
    assert work.batches == [["a"], ["c"]]


async def test_what_is_dropped_weighs_nothing() -> None:
    work = Work()
    batcher = Batcher(work, weigh=len, max_weight=4)

    dropped = submitting(batcher, "aaaa", is_wanted=lambda: False)
    kept = submitting(batcher, "bb", "cc")

    assert await settled(kept) == ["BB", "CC"]
    assert work.batches == [["bb", "cc"]]
    assert dropped[0].cancelled()


async def test_a_caller_that_is_cancelled_disturbs_no_other() -> None:
    work = Work()
    batcher = Batcher(work)
    work.gate.clear()
    tasks = submitting(batcher, "a", "b", "c")
    await turns()
    late = submitting(batcher, "d", "e")
    await turns()

    tasks[1].cancel()
    late[0].cancel()
    await turns()
    work.gate.set()

    first, cancelled, third = await settled(tasks)
    assert (first, third) == ("A", "C")
    assert isinstance(cancelled, asyncio.CancelledError)
    assert (await settled(late))[1] == "E"
    assert work.batches == [["a", "b", "c"], ["e"]]


async def test_as_many_batches_run_at_once_as_may() -> None:
    work = Work()
    batcher = Batcher(work, max_items=1, concurrency=2)
    work.gate.clear()

    tasks = submitting(batcher, "a", "b", "c")
    await turns()
    assert work.batches == [["a"], ["b"]]
    work.gate.set()

    assert await settled(tasks) == ["A", "B", "C"]


async def test_when_all_is_done_nothing_is_left_over() -> None:
    work = Work()
    batcher = Batcher(work, concurrency=2)
    await settled(submitting(batcher, *"abc"))
    await turns()

    assert not batcher._batches
    assert not batcher._waiting
    assert batcher._free == 2
