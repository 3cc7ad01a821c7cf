"""Token rules around reasoning: in time, and before what the answer must look like."""

from __future__ import annotations

import numpy as np
import pytest

from turboserve.engine.token_rules import Mask, TokenRule
from turboserve.engine.tools.markup import Markup
from turboserve.engine.tools.thinking import LastCallRule, ThinkingRule

VOCAB = 100
START, END, END_2 = 90, 91, 92


def markup(start: tuple[int, ...] = (START,), end: tuple[int, ...] = (END,)) -> Markup:
    return Markup(think_start="<think>", think_end="</think>", think_start_ids=start, think_end_ids=end)


class Sequence:
    """Allows these tokens, one after the other."""

    def __init__(self, *tokens: int) -> None:
        self.left = list(tokens)

    @property
    def is_complete(self) -> bool:
        return not self.left

    def fill(self, mask: Mask) -> bool:
        mask[:] = 0
        mask[self.left[0] // 32] = 1 << (self.left[0] % 32)
        return True

    def accept(self, token: int) -> None:
        assert token == self.left.pop(0)


def allowed(rule: TokenRule) -> list[int] | None:
    """Tokens that may come next; None: all."""
    mask = np.full(-(-VOCAB // 32), 0xDEADBEEF, np.uint32)
    if not rule.fill(mask):
        assert (mask == 0xDEADBEEF).all()
        return None
    return [int(i) for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))]


@pytest.mark.parametrize("end", [(END,), (END, END_2)])
@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("is_thinking", [False, True])
def test_reasoning_ends_when_its_budget_is_used_up(budget: int, is_thinking: bool, end: tuple[int, ...]) -> None:
    rule = ThinkingRule(markup(end=end), is_thinking=is_thinking, budget=budget)
    if not is_thinking:
        assert allowed(rule) is None
        rule.accept(START)
    for token in range(budget):
        assert allowed(rule) is None
        rule.accept(token)
    for token in end:
        assert allowed(rule) == [token]
        rule.accept(token)
    assert allowed(rule) is None and not rule.is_complete


def test_reasoning_that_ends_earlier_is_left_alone() -> None:
    rule = ThinkingRule(markup(end=(END, END_2)), is_thinking=True, budget=4)
    for token in (1, END, END_2, *range(20)):
        assert allowed(rule) is None
        rule.accept(token)


def test_an_answer_without_reasoning_is_not_counted() -> None:
    rule = ThinkingRule(markup(), is_thinking=False, budget=1)
    for token in range(20):
        rule.accept(token)
        assert allowed(rule) is None
    late = ThinkingRule(markup(), is_thinking=False, budget=1)
    for token in (10, START, 1):  # behind a line break
        late.accept(token)
    assert allowed(late) == [END]


def test_the_answers_own_rule_begins_behind_reasoning() -> None:
    inner = Sequence(5, 6)
    rule = ThinkingRule(markup(), is_thinking=True, budget=2, inner=inner)
    rule.accept(50)
    assert allowed(rule) is None
    rule.accept(END)
    for token in (5, 6):
        assert allowed(rule) == [token] and not rule.is_complete
        rule.accept(token)
    assert rule.is_complete


def test_the_answers_own_rule_leaves_room_for_reasoning() -> None:
    rule = ThinkingRule(markup(), is_thinking=False, inner=Sequence(5, 6))
    assert allowed(rule) == [5, START]
    rule.accept(START)
    for token in (1, 2, 3):
        assert allowed(rule) is None
        rule.accept(token)
    rule.accept(END)
    assert allowed(rule) == [5]


def test_an_answer_may_go_without_reasoning_at_all() -> None:
    rule = ThinkingRule(markup(), is_thinking=False, inner=Sequence(5, 6))
    rule.accept(5)
    assert allowed(rule) == [6]


def test_a_start_marker_of_several_tokens_is_completed() -> None:
    special = Markup(think_start_ids=(START, 7), think_end_ids=(END,), special_ids=frozenset({START}))
    rule = ThinkingRule(special, is_thinking=False, inner=Sequence(5))
    assert allowed(rule) == [5, START]
    rule.accept(START)
    assert allowed(rule) == [7]
    rule.accept(7)
    assert allowed(rule) is None
    ordinary = ThinkingRule(markup(start=(START, 7)), is_thinking=False, inner=Sequence(5))
    assert allowed(ordinary) == [5], "its first token might be the answer's own"


def test_one_call_ends_the_answer() -> None:
    over = [False]
    rule = LastCallRule(lambda: over[0], None)
    rule.accept(1)
    assert allowed(rule) is None and not rule.is_complete
    over[0] = True
    assert rule.is_complete
    inner = Sequence(5)
    both = LastCallRule(lambda: False, inner)
    assert allowed(both) == [5]
    both.accept(5)
    assert both.is_complete
