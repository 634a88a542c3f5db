"""Structured logs: one JSON object a line, or columns for a person at a terminal."""

import logging
import sys

import structlog

from service.settings import Settings


def configure(settings: Settings) -> None:
    """Write to standard error, from the configured level on."""
    console = settings.log_format == "console" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # What libraries have to say goes the same way, if it is worth a warning.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Forward()])


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().warning("library", logger=record.name, text=record.getMessage())
