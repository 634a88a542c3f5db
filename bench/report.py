"""What was measured, as a table: each row beside the limit that it is held against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from bench.measure import Run

# Runs by the name of what was measured, in the order of the rounds.
Results = Mapping[str, Sequence[Run]]

HEADINGS = (
    "work", "ours", "limit", "ratio", "server CPU µs", "limit's", "PostgreSQL's", "floor", "goal",
    "",
)  # fmt: skip
CHECKED = "What was acknowledged was counted after each run: it is stored, once, without gaps."
LEFT_OUT = ("With 10 million stored messages: `make bench-scale`, docs/scale.md.",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; `value` is what floor and goal are for."""

    work: str
    ours: str
    limit: str = ""
    value: float
    is_ratio: bool = True
    cpu: tuple[float, float, float] | None = None
    floor: float | None
    # Neither floor nor goal: for comparison.
    goal: float | None
    more_is_better: bool = True

    @property
    def is_short(self) -> bool:
        return self.floor is not None and not self._holds(self.floor)

    def cells(self) -> list[str]:
        sign = "≥" if self.more_is_better else "≤"
        unit = "" if self.is_ratio else " " + self.ours.split()[-1]
        bounds = [
            "–" if bound is None else f"{sign} {bound:g}{unit}" for bound in (self.floor, self.goal)
        ]
        return [
            self.work,
            self.ours,
            self.limit,
            f"{self.value:.2f}" if self.is_ratio else "",
            *(f"{micros:.0f}" if micros else "" for micros in self.cpu or (0, 0, 0)),
            *bounds,
            self._verdict(),
        ]

    def _verdict(self) -> str:
        if self.is_short:
            return "SHORT"
        if self.goal is None:
            return ""
        if self._holds(self.goal):
            return "ok, goal"
        return "short of goal" if self.floor is None else "ok"

    def _holds(self, bound: float) -> bool:
        return self.value >= bound if self.more_is_better else self.value <= bound


def rows(
    results: Results,
    memory: tuple[float, float],
    steady: Sequence[float],
    starts: Sequence[float],
) -> list[Row]:
    """The table of budgets. `memory`: MiB at rest and at most; `steady`: MiB in the course of mixed
    calls; `starts`: seconds.
    """

    def rates(work: str, ours: str, limit: str, *, floor: float | None, goal: float | None) -> Row:
        return Row(
            work=work,
            ours=f"{middle(results[ours], 'rate'):,.0f}/s",
            limit=f"{middle(results[limit], 'rate'):,.0f}/s",
            value=paired(results[ours], results[limit]),
            cpu=(
                middle(results[ours], "server_micros"),
                middle(results[limit], "server_micros"),
                middle(results[ours], "postgres_micros"),
            ),
            floor=floor,
            goal=goal,
        )

    alone, empty, transaction = (
        p50(results[name]) for name in ("alone", "alone empty", "transaction")
    )
    conversation = p50(results["conversation alone"])

    def against_conversation(work: str, name: str, *, floor: float | None, goal: float) -> Row:
        return Row(
            work=f"{work}, against GetConversation, one at a time",
            ours=f"{p50(results[name]):.2f} ms",
            limit=f"{conversation:.2f} ms",
            value=slower(results[name], results["conversation alone"]),
            cpu=(
                middle(results[name], "server_micros"),
                middle(results["conversation alone"], "server_micros"),
                middle(results[name], "postgres_micros"),
            ),
            floor=floor,
            goal=goal,
            more_is_better=False,
        )

    first, last = p50(results["first page"]), p50(results["last page"])
    at_rest, at_most = memory
    start = median(starts)
    return [
        rates("SendMessage, 64 in flight, 200 conversations", "send", "send empty",
              floor=0.40, goal=0.60),
        rates("the same into one conversation", "send to one", "send empty",
              floor=0.35, goal=0.50),
        rates("the same against the obvious service", "send", "send obvious", floor=4, goal=8),
        Row(
            work="SendMessage, one at a time, against the empty server + SQL",
            ours=f"{alone:.2f} ms",
            limit=f"{empty:.2f} + {transaction:.2f} ms",
            value=slower(results["alone"], results["alone empty"], results["transaction"]),
            cpu=(
                middle(results["alone"], "server_micros"),
                middle(results["alone empty"], "server_micros"),
                middle(results["alone"], "postgres_micros"),
            ),
            floor=2.0,
            goal=1.5,
            more_is_better=False,
        ),
        rates("GetMessage, 64 in flight", "get", "get empty", floor=0.50, goal=0.70),
        rates("GetConversation, 64 in flight", "conversation", "conversation empty",
              floor=0.50, goal=0.70),
        rates("ListMessages, pages of 50, 64 in flight", "list", "list empty",
              floor=0.50, goal=0.70),
        rates("the same with a filter, which reads all of them from the database",
              "list from the database", "list empty", floor=None, goal=None),
        against_conversation("inbox of 25 among 1,000 conversations", "inbox", floor=8, goal=5),
        against_conversation("50 messages around one", "around", floor=None, goal=3),
        against_conversation("search in a conversation", "search", floor=None, goal=5),
        against_conversation("search in 1,000 conversations", "search all", floor=None, goal=40),
        rates("Watch: events to 500 watchers, each to all before the next", "fan-out",
              "fan-out empty", floor=0.35, goal=0.50),
        *late(results["half load"]),
        rates("two workers against one, GetMessage", "two workers get", "get", floor=1.2, goal=1.5),
        rates("two workers against one, ListMessages", "two workers list", "list",
              floor=1.2, goal=1.5),
        rates("two workers against one, of ten calls 3 sends, 4 lists, 3 gets",
              "two workers mixed", "mixed", floor=None, goal=None),
        rates("two workers against one, SendMessage", "two workers send", "send",
              floor=1.2, goal=1.5),
        rates("the same, where one is not bound to a core of its own either",
              "two workers send", "one worker send", floor=None, goal=None),
        rates("the same, where each runs four tenths of the time and leaves some to others",
              "two workers in part", "one worker in part", floor=None, goal=None),
        rates("two empty servers against one, for comparison", "two empty", "send empty",
              floor=None, goal=None),
        Row(
            work="page 1,000 of a conversation against page 1, from the database",
            ours=f"{last:.2f} ms",
            limit=f"{first:.2f} ms",
            value=slower(results["last page"], results["first page"]),
            floor=1.3,
            goal=1.1,
            more_is_better=False,
        ),
        rates("import against COPY, messages", "import", "copy", floor=0.20, goal=0.30),
        bound("memory at rest", at_rest, "MiB", floor=150, goal=120),
        bound("memory under load, at most", at_most, "MiB", floor=None, goal=200),
        *([flat(steady)] if steady else []),
        bound("`make run` to the first answer, again", start, "s", floor=3, goal=2),
    ]  # fmt: skip


def late(runs: Sequence[Run]) -> list[Row]:
    """How long after its commit an event is with who watches."""
    cpu = (middle(runs, "server_micros"), 0.0, middle(runs, "postgres_micros"))
    bounds: dict[str, tuple[float | None, float]] = {"p50": (None, 5), "p99": (50, 30)}
    return [
        replace(
            bound(
                f"commit to delivered, 200 watched conversations, half load, {percentile}",
                median(run.millis[percentile] for run in runs),
                "ms",
                floor=floor,
                goal=goal,
            ),
            cpu=cpu,
        )
        for percentile, (floor, goal) in bounds.items()
    ]


def text(rows: Sequence[Row], results: Results) -> str:
    """For a terminal: the table, and in words what is short, what failed, what is not in it."""
    failed = [
        f"Calls of '{name}' failed: {run.errors}"
        for name, runs in results.items()
        for run in runs
        if run.errors
    ]
    return "\n".join([table_of(rows), "", verdict(rows), *failed, CHECKED, *LEFT_OUT])


def table_of(rows: Sequence[Row]) -> str:
    return table([HEADINGS, *(row.cells() for row in rows)])


def verdict(rows: Sequence[Row]) -> str:
    short = [row.work for row in rows if row.is_short]
    return f"Short of its floor: {'; '.join(short)}." if short else "Every floor is held."


def flat(steady: Sequence[float]) -> Row:
    """The last minute of five against the second: the first one fills pools and caches."""
    fifth = len(steady) // 5
    before, after = median(steady[fifth : 2 * fifth]), median(steady[-fifth:])
    return Row(
        work="memory in the 5th minute of mixed calls against the 2nd",
        ours=f"{after:.0f} MiB",
        limit=f"{before:.0f} MiB",
        value=after / before,
        floor=1.1,
        goal=1.02,
        more_is_better=False,
    )


def bound(work: str, value: float, unit: str, *, floor: float | None, goal: float) -> Row:
    shown = f"{value:.1f}" if value < 10 else f"{value:.0f}"
    return Row(
        work=work,
        ours=f"{shown} {unit}",
        value=value,
        is_ratio=False,
        floor=floor,
        goal=goal,
        more_is_better=False,
    )


def middle(runs: Sequence[Run], name: str) -> float:
    return float(median(getattr(run, name) for run in runs))


def p50(runs: Sequence[Run]) -> float:
    return median(run.millis["p50"] for run in runs)


def paired(ours: Sequence[Run], limit: Sequence[Run]) -> float:
    """The median of the rounds' ratios: two runs of one round had the same neighbours."""
    return median(a.rate / b.rate for a, b in zip(ours, limit, strict=True))


def slower(ours: Sequence[Run], *limits: Sequence[Run]) -> float:
    """The same for how long a call takes, against what the limits take together."""
    ratios: list[float] = [
        run.millis["p50"] / sum(limit.millis["p50"] for limit in beside)
        for run, *beside in zip(ours, *limits, strict=True)
    ]
    return median(ratios)


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand below each other; the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if n == 0 else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    return "\n".join([line(lines[0]), f"| {' | '.join(rule)} |", *map(line, lines[1:])])
