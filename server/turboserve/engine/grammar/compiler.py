"""Compiles constraints for one loaded model, and remembers what came of it. Thread-safe."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from turboserve.engine.grammar.check import Began, Checkers, TooMuchWorkError
from turboserve.engine.grammar.rule import GrammarRule
from turboserve.engine.grammar.source import grammar_text, reason_of, refusal
from turboserve.engine.grammar.vocabulary import Vocabulary
from turboserve.messages import Constraint

# What one mask may take is bounded by work, not by time: llguidance cannot be interrupted. These come to some 10 ms
# with 150,000 tokens; ordinary schemas need a hundredth of it.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 5_000,  # an object of 1,000 optional properties has 4,000
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 200_000,  # a choice among 20,000 words needs more than half of it
    "step_max_items": 30_000,
    "max_lexer_states": 50_000,  # of about 2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # they would hold pieces of the grammar and of the answer
}

MAX_CACHED = 64
NUM_CHECKERS = 2

TOO_MUCH_WORK = "compiling it is too much work"


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A matcher at the beginning of its grammar, to be copied, or why there is none."""

    matcher: LLMatcher | None
    reason: str = ""


class Compiler:
    """Rules for one model's answers."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._checkers = Checkers(vocabulary, LIMITS, NUM_CHECKERS)
        self._limits = LLParserLimits(**LIMITS)
        self._lock = threading.Lock()
        self._cached: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()  # the latest used last

    def compile(self, constraint: Constraint, timeout_s: float, began: Began) -> GrammarRule:
        """A rule for one answer. Takes milliseconds, and seldom the whole time, which begins when `began` is called.

        Raises InvalidRequestError, with the constraint's `param`, for what cannot be enforced, and
        CheckUnavailableError where no process to try it in can be had.
        """
        key = (constraint.kind, constraint.text)
        with self._lock:
            compiled = self._cached.get(key)
        if compiled is None:
            compiled = self._compiled(constraint, timeout_s, began)
        with self._lock:
            self._cached[key] = compiled
            self._cached.move_to_end(key)
            if len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)
            matcher = compiled.matcher.deep_copy() if compiled.matcher is not None else None
        if matcher is None:
            raise refusal(constraint, compiled.reason)
        return GrammarRule(matcher, self._vocabulary, constraint)

    def close(self) -> None:
        """End the processes that grammars are tried in."""
        self._checkers.close()

    def _compiled(self, constraint: Constraint, timeout_s: float, began: Began) -> _Compiled:
        grammar = grammar_text(constraint)
        try:
            complaint = self._checkers.trouble_with(grammar, timeout_s, began)
        except TooMuchWorkError:  # not remembered: the machine may have been busy
            raise refusal(constraint, TOO_MUCH_WORK) from None
        if complaint:
            return _Compiled(None, reason_of(complaint))
        matcher = LLMatcher(self._vocabulary.tokens, grammar, log_level=0, limits=self._limits)
        warnings = [] if matcher.is_error() else matcher.get_grammar_warnings()
        if not matcher.is_error() and not any(matcher.compute_bitmask()):
            return _Compiled(None, "nothing can be an answer to it")
        if matcher.is_error() or warnings:
            return _Compiled(None, reason_of(matcher.get_error() or "\n".join(warnings)))
        return _Compiled(matcher)
