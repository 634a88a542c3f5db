"""Structured logs: one JSON object a line, or columns for a person at a terminal."""

import asyncio
import atexit
import logging
import sys
import traceback
from collections.abc import Iterator, MutableMapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, BinaryIO

import orjson
import structlog

from service.settings import Settings

# A terminal obeys these. JSON escapes them by itself.
CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (9, 10)
}


def configure(settings: Settings, *, worker: int | None = None) -> None:
    """Write to standard error, from the configured level on; a worker says which one it is."""
    console = settings.log_format == "console" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    # A line a call is written: in one step, as bytes.
    processors: list[structlog.typing.Processor] = [partial(_as_json, worker)]
    lines = _Lines(sys.stderr.buffer)
    factory: Any = lambda *_: lines  # noqa: E731 - the other one is a class
    if console:
        factory = structlog.PrintLoggerFactory(sys.stderr)
        plain = structlog.dev.plain_traceback
        processors = [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            tell_exception,
            *([partial(_sign, worker)] if worker else []),
            _escape,
            structlog.dev.ConsoleRenderer(exception_formatter=plain),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    # What libraries have to say goes the same way, if it is worth a warning.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Forward()])


def text_of(error: BaseException) -> str:
    """What an exception says, without what a database quotes in it.

    Details, hints and parameters follow on further lines, and what is said of a bad value quotes it
    at once: our users' words, which belong into no log.
    """
    if not _is_database(error):
        return str(error)
    cause = getattr(error, "orig", None) or error
    state = getattr(cause, "sqlstate", None) or ""
    if state.startswith("22") or isinstance(cause, ValueError | TypeError):
        return f"a bad value {state}".rstrip()
    return str(error).partition("\n")[0]


def reason_of(error: Exception) -> str:
    """The same of what caused it, and what that is."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {text_of(cause)}"


def _is_database(error: BaseException) -> bool:
    return type(error).__module__.startswith(("asyncpg", "sqlalchemy"))


def tell_exception(_: object, __: str, event: MutableMapping[str, Any]) -> Any:
    """The exception of a log line and its causes, down to the database."""
    error = event.pop("exc_info", None)
    if error:
        found = error if isinstance(error, BaseException) else sys.exc_info()[1]
        event["exception"] = "\ncaused by ".join(_story(found))
    return event


def _story(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
        yield f"{type(error).__qualname__}: {text_of(error)}\n{frames}"
        if _is_database(error):
            return
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _as_json(worker: int | None, _: object, level: str, event: MutableMapping[str, Any]) -> bytes:
    structlog.processors.add_log_level(None, level, event)
    tell_exception(None, level, event)
    event["time"] = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    if worker:
        event["worker"] = worker
    return orjson.dumps(event)


def _sign(worker: int, _: object, __: str, event: MutableMapping[str, Any]) -> Any:
    event["worker"] = worker
    return event


def _escape(_: object, __: str, event: MutableMapping[str, Any]) -> Any:
    for key, value in event.items():
        if isinstance(value, str):
            value = value.translate(CONTROLS)
            event[key] = value if key == "exception" else value.replace("\n", "\\n")
    return event


class _Lines:
    """Writes together what comes in one turn of the event loop: a call leaves a line, and a line
    alone takes a system call.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: list[bytes] = []
        atexit.register(self._write)

    def msg(self, line: bytes) -> None:
        self._lines.append(line)
        if len(self._lines) > 1:
            return
        try:
            asyncio.get_running_loop().call_soon(self._write)
        except RuntimeError:  # There is no loop, or not in this thread.
            self._write()

    debug = info = warning = error = critical = exception = log = msg

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._file.write(b"\n".join(lines) + b"\n")
            self._file.flush()


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # The first line: what asyncio appends is the repr of whatever failed.
        text = record.getMessage().partition("\n")[0]
        error = record.exc_info[1] if record.exc_info else None
        structlog.get_logger().warning("library", logger=record.name, text=text, exc_info=error)
