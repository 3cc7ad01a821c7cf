"""Log lines: one record one line, JSON that parses, and nothing a caller can forge."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from turboserve import logs

HOSTILE = "name\nERROR forged: line\r\x1b[2J\x9b31m\u2028\u202egnp.exe\x00\x7f\ud800 ünïcode"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Captures what `configure` sends there; the root logger is put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text_stays_on_one_line(stream: io.StringIO) -> None:
    logs.configure("info", stream=stream)
    logging.getLogger("turboserve.test").info("got %s", HOSTILE)
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    assert r"\x1b" in text and r"\n" in text and "ünïcode" in text


def test_traceback_lines_cannot_pass_for_records(stream: io.StringIO) -> None:
    logs.configure("info", stream=stream)
    try:
        raise ValueError("bad\n12:00:00 INFO turboserve: forged\x1b[0m")
    except ValueError:
        logging.getLogger("turboserve.test").exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("ERROR turboserve.test: failed")
    assert any("forged" in line for line in rest)
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


def test_json_lines_parse_and_stay_ascii(stream: io.StringIO) -> None:
    logs.configure("debug", json_lines=True, stream=stream)
    token = logs.request_id.set("req-1\n\x1b")
    try:
        logging.getLogger("turboserve.test").warning("got %s", HOSTILE)
        raise RuntimeError(HOSTILE)
    except RuntimeError:
        logging.getLogger("turboserve.test").exception("failed")
    finally:
        logs.request_id.reset(token)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert all(line.isascii() and line.isprintable() for line in lines)
    first, second = map(json.loads, lines)
    assert first["message"] == f"got {HOSTILE}"
    assert (first["level"], first["logger"], first["request_id"]) == ("warning", "turboserve.test", "req-1\n\x1b")
    assert "RuntimeError" in second["exception"]


def test_request_id_appears_only_inside_a_request(stream: io.StringIO) -> None:
    logs.configure("info", stream=stream)
    logger = logging.getLogger("turboserve.test")
    token = logs.request_id.set("req-7")
    logger.info("inside")
    logs.request_id.reset(token)
    logger.info("outside")
    inside, outside = stream.getvalue().splitlines()
    assert inside.endswith("inside [req-7]")
    assert outside.endswith("outside")


def test_level_and_repeated_configuration(stream: io.StringIO) -> None:
    logs.configure("debug", stream=stream)
    logs.configure("warning", stream=stream)
    logging.getLogger("turboserve.test").info("hidden")
    logging.getLogger("turboserve.test").warning("shown")
    assert len(stream.getvalue().splitlines()) == 1
    assert not logging.getLogger("uvicorn.access").handlers


def test_fields_and_the_trace_are_keys_of_their_own(stream: io.StringIO) -> None:
    logs.configure("info", json_lines=True, stream=stream)
    token = logs.trace_id.set("0af7")
    logging.getLogger("turboserve.test").info("GET /health", extra={"fields": {"status": 200, "ms": 0.4}})
    logs.trace_id.reset(token)
    entry = json.loads(stream.getvalue())
    assert (entry["status"], entry["ms"], entry["trace_id"], entry["message"]) == (200, 0.4, "0af7", "GET /health")
