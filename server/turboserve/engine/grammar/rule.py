"""One answer's rule: llguidance's matcher, seen as `engine.token_rules.TokenRule`."""

from __future__ import annotations

import logging
import time

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from turboserve.engine.grammar.source import reason_of
from turboserve.engine.grammar.vocabulary import Vocabulary
from turboserve.errors import InvalidRequestError
from turboserve.messages import Constraint

log = logging.getLogger(__name__)

# llguidance bounds the work on one token. A rule that comes close to that again and again would slow down all streams;
# the time is this thread's own, which a busy machine does not lengthen.
SLOW_S = 0.04
MAX_SLOW_TOKENS = 8


class GrammarRule:
    """Which tokens may come next in one answer. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, constraint: Constraint) -> None:
        self._matcher, self._constraint = matcher, constraint
        self._spent_s, self._num_slow = 0.0, 0  # since the last token; tokens that took long
        # llguidance writes a bit for each of the tokenizer's tokens, which may be more than the model's logits.
        self._wider = np.zeros(vocabulary.num_words, np.uint32) if vocabulary.len > vocabulary.vocab_len else None
        num_last = vocabulary.vocab_len % 32 or 32
        self._last_word = np.uint32((1 << num_last) - 1)

    @property
    def is_complete(self) -> bool:
        """Whether only a token that ends the answer may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def fill(self, mask: npt.NDArray[np.uint32]) -> bool:
        """Write which tokens may come next: (ceil(V / 32),) uint32, bit i of word w for token 32 w + i.

        Raises InvalidRequestError when no token may, or when to find out is too much work.
        """
        assert mask.dtype == np.uint32 and mask.flags.c_contiguous, "llguidance writes to its address"
        target = mask if self._wider is None else self._wider
        began_s = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
        self._spent_s += time.thread_time() - began_s
        if self._wider is not None:
            mask[:] = self._wider[: len(mask)]
            mask[-1] &= self._last_word
        if self._matcher.is_error():
            raise self._failure()
        if not mask.any():
            raise InvalidRequestError(
                "The constraint allows the answer no further token: it asks for what nothing can be.",
                param=self._constraint.param,
            )
        return True

    def accept(self, token: int) -> None:
        """This token was drawn. Raises InvalidRequestError where it is not allowed, or takes too much work again."""
        began_s = time.thread_time()
        is_allowed = self._matcher.consume_token(token)
        self._spent_s += time.thread_time() - began_s
        if not is_allowed:
            raise self._failure()
        self._num_slow += self._spent_s > SLOW_S
        self._spent_s = 0.0
        if self._num_slow > MAX_SLOW_TOKENS:
            raise self._failed_because("it takes too much work for each token")

    def _failure(self) -> InvalidRequestError:
        complaint = self._matcher.get_error()  # may quote the answer: not for the log
        log.info("a constraint of kind %s failed within its answer", self._constraint.kind)
        return self._failed_because(reason_of(complaint))

    def _failed_because(self, reason: str) -> InvalidRequestError:
        message = f"The constraint could not be enforced any further: {reason}. Simplify it."
        return InvalidRequestError(message, param=self._constraint.param)
