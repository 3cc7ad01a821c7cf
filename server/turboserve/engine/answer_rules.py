"""What a request's answer must look like: which constraint that is, and the rule made of it for one model.

Runs on the threads of rule_jobs.py, never on the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from turboserve.engine.grammar.compiler import Compiler
from turboserve.engine.grammar.vocabulary import Vocabulary
from turboserve.engine.loaded_model import LoadedModel
from turboserve.engine.token_rules import TokenRule
from turboserve.engine.tools.constraint import tool_constraint
from turboserve.engine.tools.markup import Markup, markup_of
from turboserve.errors import TurboServeError
from turboserve.messages import Constraint, Request


def needs_rule(request: Request) -> bool:
    """Whether `RuleMaker.rule_of` has anything to do; quick, for the thread that submits."""
    return request.constraint is not None or request.tools is not None


def constraint_of(request: Request, markup: Markup) -> Constraint | None:
    """What the answer to this request must look like. Raises InvalidRequestError."""
    if request.tools is None:
        return request.constraint
    return tool_constraint(request.tools, markup, request.constraint)


class RuleMaker:
    """Rules for one loaded model's answers. Thread-safe."""

    def __init__(self, loaded: LoadedModel, vocab_len: int) -> None:
        self._loaded, self._vocab_len = loaded, vocab_len
        self._markup = markup_of(loaded.tokenizer)
        self._compiler: Future[Compiler] = Future()

    def prepare(self) -> None:
        """Read the model's tokenizer, once, before the first rule is asked for.

        With 150,000 tokens this holds Python's lock for one or two seconds: for start-up, when no stream runs.
        """
        loaded = self._loaded
        try:
            self._compiler.set_result(Compiler(Vocabulary(loaded.tokenizer, self._vocab_len, loaded.eos_ids)))
        except Exception as exc:  # such as a tokenizer that cannot be read: others' requests are answered all the same
            self._compiler.set_exception(exc)

    def rule_of(self, request: Request, timeout_s: float, began: Callable[[], None]) -> TokenRule | None:
        """The answer's rule, if it needs one. Its time begins when `began` is called.

        Raises InvalidRequestError for what cannot be enforced.
        """
        constraint = constraint_of(request, self._markup)
        return None if constraint is None else self._ready_compiler(constraint).compile(constraint, timeout_s, began)

    def close(self) -> None:
        """End the processes that grammars are tried in."""
        if self._compiler.done() and self._compiler.exception() is None:
            self._compiler.result().close()

    def _ready_compiler(self, constraint: Constraint) -> Compiler:
        error = self._compiler.exception()
        if isinstance(error, TurboServeError):
            raise type(error)(error.message, param=constraint.param)
        return self._compiler.result()
