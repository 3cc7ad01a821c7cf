"""What is shown, and where: lines apart from bars, answers without control characters, tables of statistics."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from tests.turboserve.cli.test_stats import BUSY

from turboserve.api.kv_replies import kv_statistics
from turboserve.cli import ps, sessions
from turboserve.cli.chat import Screen
from turboserve.cli.client import Piece, server_url
from turboserve.cli.figures import amount, duration, session_line, session_lines, uncompressed_in
from turboserve.cli.progress import Bars
from turboserve.settings import Settings


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_for_terminals_and_lines_for_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    for stderr in (io.StringIO(), Tty()):
        lines = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("TERM", "xterm")
        bars = Bars(lines)
        with bars.step("reading weights", 100) as advance, bars.report("evaluating") as tell:
            advance(40)
            bars("a line")
            tell("text 1 of 2")
            bars.log_stream().write("one [log] line\n")
        bars("another")
        before, found, after = stderr.getvalue().partition("one [log] line\n")
        assert (found and before.endswith(("\x1b[2K", "\n"))) or not before, "on a line of its own"
        if stderr.isatty():
            assert "reading weights" in stderr.getvalue() and stderr.getvalue().endswith("\x1b[?25h\r"), (
                "cursor is back"
            )
            assert lines.getvalue() == "a line\nanother\n"
        else:
            assert "\x1b" not in before + after and "weights" not in before + after
            assert lines.getvalue() == "a line\ntext 1 of 2\nanother\n"


def test_lines_that_nobody_can_read_end_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    Bars(Gone())("Ready")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_an_answer_is_text_and_moves_no_cursor(is_terminal: bool) -> None:
    stream, remarks = (Tty() if is_terminal else io.StringIO()), io.StringIO()
    screen = Screen(stream, remarks)
    for piece in (Piece(reasoning="let me\nthink"), Piece(text="\n\nyes\x1b[2J\x07"), Piece(text="\u202eno")):
        screen.piece(piece)
    screen.end("x")
    if is_terminal:
        assert stream.getvalue() == "\x1b[2mlet me\nthink\x1b[0m\n\nyes\ufffd[2J\ufffd\ufffdno\n"
    else:
        assert stream.getvalue() == "\n\nyes\x1b[2J\x07\u202eno\n", "a pipe gets the answer as it is, without reasoning"
    assert remarks.getvalue() == ""


def test_ps_shows_models_and_their_largest_conversations() -> None:
    one = kv_statistics(BUSY).model_dump()
    loading = {"model": "n", "status": "loading", "statistics": None}
    listed = {"object": "kv.stats.list", "data": [{"model": "m", "status": "loaded", "statistics": one}, loading]}
    for stats in (one, listed):
        console = Console(file=io.StringIO(), width=150)
        console.print(ps.view("http://here", stats))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        for words in (
            "1 running, 2 waiting",
            "50% of 8.0 MiB",
            "4.00x",
            "25%",
            "abc",
            "disk, pinned",
            "and 1,202 more",
            "RATIO: times smaller than uncompressed in float32",
        ):
            assert words in shown, (words, shown)
    assert "loading" in shown


def test_ratios_say_what_they_are_beside() -> None:
    assert uncompressed_in(["float32"]) == "uncompressed in float32"
    assert (
        uncompressed_in(["float32", "bfloat16", "float32"]) == "uncompressed in bfloat16 or float32, the model's dtype"
    )
    assert uncompressed_in([]) == "uncompressed in the model's dtype"
    session = {
        **{"id": "trip", "pinned": False, "tier": "memory", "kv_format": "4/3", "tokens": 9, "ttl_s": None},
        **{"kv_bytes": {"total": 1 << 20}, "raw_equivalent_bytes": 4 << 20, "ratio": 4.0, "disk_bytes": 0},
        **{"requests": 1, "hits": 0, "explicit": True, "last_used_at": 0},
    }
    assert session_line(session) == "trip  9 tokens, 1.0 MiB, 4.00x smaller than uncompressed, memory"
    assert "KV memory      1.0 MiB, uncompressed in the model's dtype 4.0 MiB: 4.00x" in session_lines(session)
    *_, note = sessions.table([session], set(), 0.0)
    assert note == "RATIO: times smaller than uncompressed in the model's dtype"
    assert len(sessions.table([], set(), 0.0)) == 1


def test_ps_cuts_nothing_off_in_eighty_columns() -> None:
    """Of one model under a name of usual length."""
    one = kv_statistics(BUSY).model_dump() | {"model": "turboserve-tiny", "num_conversations": {"memory": 1204}}
    console = Console(file=io.StringIO(), width=80)
    console.print(ps.view("http://127.0.0.1:8000", one))
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_where_a_server_answers() -> None:
    settings = Settings(port=9000, host="0.0.0.0")
    assert server_url(None, settings) == "http://127.0.0.1:9000"
    assert server_url(None, Settings(host="::", port=0)) == "http://[::1]:8000"
    assert server_url(None, Settings(host="box.local")) == "http://box.local:8000"
    assert server_url("https://far.example/base/v1/", settings) == "https://far.example/base"
    assert server_url("far.example:80", settings) == "http://far.example:80"


def test_figures_are_short() -> None:
    assert [amount(n) for n in (0, 1023, 1 << 10, 3 << 19, 5 << 30, 1 << 41)] == [
        *("0 B", "1,023 B", "1.0 KiB", "1.5 MiB", "5.0 GiB", "2.0 TiB")
    ]
    assert [duration(s) for s in (-1, 59, 60, 7200, 200_000)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]
