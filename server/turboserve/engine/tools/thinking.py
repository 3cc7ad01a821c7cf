"""A token rule around a model's reasoning: it ends in time, and another rule begins behind it.

        before ---- think_start ----> thinking ---- think_end, or the budget is used up ----> after
          +-------------------------- any other token --------------------------------------> after

Reasoning is free text, whatever the answer must look like; the answer's own rule is asked and told of what follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import numpy as np

from turboserve.engine.token_rules import Mask, TokenRule
from turboserve.engine.tools.markup import Markup

# Of an answer that nothing else rules, as many tokens, such as line breaks, may stand before its reasoning.
_MAX_BEFORE = 2


class _Stage(Enum):
    BEFORE = "before"
    THINKING = "thinking"
    AFTER = "after"


class ThinkingRule:
    """Implements token_rules.TokenRule for one answer."""

    def __init__(
        self, markup: Markup, *, is_thinking: bool, budget: int | None = None, inner: TokenRule | None = None
    ) -> None:
        """is_thinking: the prompt ends inside reasoning. budget: most tokens of it, its markers left out."""
        assert markup.think_start_ids and markup.think_end_ids
        self._start, self._end = markup.think_start_ids, markup.think_end_ids
        self._budget, self._inner = budget, inner
        # A marker of ordinary tokens might be the beginning of what the answer's own rule wants.
        can_begin = inner is None or len(self._start) == 1 or self._start[0] in markup.special_ids
        self._stage = _Stage.THINKING if is_thinking else _Stage.BEFORE if can_begin else _Stage.AFTER
        self._num_before = 0
        self._num_thought = 0
        self._recent: tuple[int, ...] = ()  # the newest tokens of this stage, as many as its marker has
        self._num_forced = 0  # of the end marker's tokens, once the budget is used up

    @property
    def is_complete(self) -> bool:
        """The answer's own rule says so, once it has begun."""
        return self._stage is _Stage.AFTER and self._inner is not None and self._inner.is_complete

    @property
    def _is_used_up(self) -> bool:
        return self._budget is not None and self._num_thought >= self._budget

    def fill(self, mask: Mask) -> bool:
        """As token_rules.TokenRule says."""
        if self._stage is _Stage.THINKING:
            if not self._is_used_up:
                return False
            mask[:] = 0
            _allow(mask, self._end[self._num_forced])
            return True
        if self._inner is None:
            return False
        if self._stage is _Stage.BEFORE and self._recent:  # within the marker: nothing else continues it
            mask[:] = 0
            _allow(mask, self._start[len(self._recent)])
            return True
        is_restricted = self._inner.fill(mask)
        if is_restricted and self._stage is _Stage.BEFORE:
            _allow(mask, self._start[0])
        return is_restricted

    def accept(self, token: int) -> None:
        """As token_rules.TokenRule says."""
        if self._stage is _Stage.AFTER:
            self._tell(token)
        elif self._stage is _Stage.THINKING:
            self._think(token)
        else:
            self._begin(token)

    def _begin(self, token: int) -> None:
        recent = (*self._recent, token)
        if recent == self._start[: len(recent)]:
            self._recent = recent
            if len(recent) == len(self._start):
                self._stage, self._recent = _Stage.THINKING, ()
            return
        self._num_before += 1
        is_soon = self._inner is None and self._num_before <= _MAX_BEFORE
        self._stage, self._recent = _Stage.BEFORE if is_soon else _Stage.AFTER, ()
        for each in recent:
            self._tell(each)

    def _think(self, token: int) -> None:
        if self._is_used_up:
            self._num_forced += 1
            if self._num_forced == len(self._end):
                self._stage = _Stage.AFTER
            return
        self._num_thought += 1
        self._recent = (*self._recent, token)[-len(self._end) :]
        if self._recent == self._end:
            self._stage = _Stage.AFTER

    def _tell(self, token: int) -> None:
        if self._inner is not None:
            self._inner.accept(token)


def _allow(mask: Mask, token: int) -> None:
    mask[token // 32] |= np.uint32(1 << (token % 32))


class LastCallRule:
    """Implements token_rules.TokenRule: the answer ends behind the last call that is wanted."""

    def __init__(self, is_over: Callable[[], bool], inner: TokenRule | None) -> None:
        """is_over: whether that call is whole."""
        self._is_over, self._inner = is_over, inner

    @property
    def is_complete(self) -> bool:
        """As token_rules.TokenRule says."""
        return self._is_over() or (self._inner is not None and self._inner.is_complete)

    def fill(self, mask: Mask) -> bool:
        """As token_rules.TokenRule says."""
        return self._inner.fill(mask) if self._inner is not None else False

    def accept(self, token: int) -> None:
        """As token_rules.TokenRule says."""
        if self._inner is not None:
            self._inner.accept(token)
