"""Constraints that are hard to compile are refused or compiled, in bounded time, and hold up nobody."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from itertools import combinations, islice

import numpy as np
import pytest
from tests.turboserve.engine.hard_grammars import hard_constraints
from tests.turboserve.engine.test_grammar import VOCAB, compiler, nothing

from turboserve.engine.grammar.check import Checker, Checkers, CheckUnavailableError, TooMuchWorkError
from turboserve.engine.grammar.compiler import LIMITS
from turboserve.errors import InvalidRequestError
from turboserve.messages import Constraint

HARD = hard_constraints()
TIMEOUT_S = 0.8
WAIT_S = 60.0  # generous: only a hang reaches it
SETUP = {"vocab_len": 300, "control_tokens": {"<a>": 299}, "end_tokens": [298], "limits": LIMITS}


@pytest.mark.parametrize("name", HARD)
def test_hard_constraints_are_refused_or_compiled(name: str) -> None:
    mask = np.zeros(VOCAB // 32, np.uint32)
    try:
        rule = compiler().compile(HARD[name], TIMEOUT_S, nothing)
    except InvalidRequestError as error:
        assert "cannot be enforced" in error.message and error.param == "response_format"
    else:
        assert rule.fill(mask)
    assert compiler().compile(Constraint("choice", '["fine"]'), WAIT_S, nothing).fill(mask)


def test_other_threads_go_on_while_a_grammar_compiles() -> None:
    """Neither trying nor compiling holds Python's lock, for as long as it takes.

    What holds it does so each time; what other programs hold up, for a while only.
    """
    schema = HARD["unions in unions, 2^10 objects"].text
    assert '"integer"' in schema
    kinds = (
        json.dumps(kinds) for num in (1, 2) for kinds in combinations(("integer", "number", "null", "boolean"), num)
    )
    # With types of its own each, or it would come out of the cache.
    texts = (schema.replace('"integer"', one) for one in kinds)
    assert any(_others_go_on_while_compiling(list(islice(texts, 3))) for _ in range(3))


def _others_go_on_while_compiling(schemas: list[str]) -> bool:
    gaps: list[float] = []
    is_over = threading.Event()

    def work() -> None:
        last_s = time.perf_counter()
        while not is_over.is_set():
            time.sleep(0.0005)
            now_s = time.perf_counter()
            gaps.append(now_s - last_s)
            last_s = now_s

    other = threading.Thread(target=work)
    began_s = time.perf_counter()
    other.start()
    try:
        for text in schemas:
            compiler().compile(Constraint("json_schema", text), WAIT_S, nothing)
    finally:
        took_s = time.perf_counter() - began_s
        is_over.set()
        other.join()
    assert took_s > 0.1, "too easy to say anything"
    return max(gaps) < 0.5 * took_s and sum(gap for gap in gaps if gap > 0.05) < 0.5 * took_s


def test_a_process_that_hangs_or_crashes_is_replaced() -> None:
    checker = Checker(SETUP)
    try:
        assert checker.trouble_with('start: "a"', WAIT_S) == ""
        assert "unknown name" in checker.trouble_with("start: x", WAIT_S)
        first = checker._process
        assert first is not None
        first.send_signal(signal.SIGSTOP)  # it hangs, whatever the machine does beside it
        os.waitpid(first.pid, os.WUNTRACED)  # once it has stopped
        with pytest.raises(TooMuchWorkError):
            checker.trouble_with('start: "b"', 0.1)
        assert first.poll() is not None
        assert checker.trouble_with("start: <a>", WAIT_S) == ""
        second = checker._process
        assert second is not None and second is not first
        second.kill()
        second.wait()
        assert checker.trouble_with("start: <[299]>", WAIT_S) == ""
        with pytest.raises(TooMuchWorkError):  # it overflows the native code's stack
            checker.trouble_with(HARD["rules that call each other"].text, WAIT_S)
    finally:
        checker.close()
    assert checker._process is None


def test_closed_checkers_end_their_processes_and_refuse() -> None:
    class Small:
        len, control_tokens, end_tokens = 300, {"<a>": 299}, (298,)

    checkers = Checkers(Small(), LIMITS, 1)  # type: ignore[arg-type]
    assert checkers.trouble_with('start: "a"', WAIT_S) == ""
    process = checkers._free.queue[0]._process
    assert process is not None
    checkers.close()
    assert process.poll() is not None
    with pytest.raises(CheckUnavailableError):
        checkers.trouble_with('start: "a"', WAIT_S)
