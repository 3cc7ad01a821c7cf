"""Logging: one line per record, as text or JSON, with the request's id, and nothing a caller can forge.

Owns the formatters and the request-id variable. Who logs what is each module's business; API keys and
answers are never passed to a logger, prompts only where the setting `log_prompts` says so.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error", "critical")

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request being handled in this context; empty outside of requests."""

trace_id: ContextVar[str] = ContextVar("trace_id", default="")
"""Of the request being handled, in hexadecimal; empty outside of requests and without traces."""

# They report every connection, file or step at INFO; uvicorn's steps are logged by turboserve.api already.
_CHATTY = ("httpx", "httpcore", "huggingface_hub", "filelock", "urllib3", "asyncio", "uvicorn.error")


def escape_controls(text: str) -> str:
    r"""`text` with every non-printable character (newlines, ESC, bidi marks, …) as \xNN or \uNNNN, on one line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class TextFormatter(logging.Formatter):
    """`12:00:00 INFO turboserve.engine: text [request-id]`; a traceback follows, each line indented and escaped."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        rid = request_id.get()
        line = f"{clock} {record.levelname} {record.name}: {escape_controls(record.getMessage())}"
        if rid:
            line += f" [{escape_controls(rid)}]"
        # Indented, so that no line of an exception's text can pass for a record of its own.
        return line + "".join(f"\n    {escape_controls(part)}" for part in _traceback(self, record).splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (Unix seconds), level, logger, message, request_id, trace_id, exception.

    A record's own `fields` (`logger.info(text, extra={"fields": {...}})`) follow under their names.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if rid := request_id.get():
            entry["request_id"] = rid
        if tid := trace_id.get():
            entry["trace_id"] = tid
        entry |= getattr(record, "fields", {})
        if traceback := _traceback(self, record):
            entry["exception"] = traceback
        # Pure ASCII, so that neither C1 controls nor lone surrogates reach a terminal; only DEL is left over.
        return json.dumps(entry).replace("\x7f", "\\u007f")


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info and record.exc_info[0] is not None:
        return formatter.formatException(record.exc_info)
    return ""


def configure(level: str = "info", json_lines: bool = False, stream: TextIO | None = None) -> None:
    """Send all records of this process to `stream` (default stderr). May be called again; replaces what it set."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if json_lines else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # through our handler, not through their own
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
