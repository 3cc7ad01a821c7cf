"""Answers that must follow a rule, between others that need not: obeyed, told of every token once, failing alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboserve.engine.fakes import VOCAB, Sink, add, make_loop, make_parts, passes_of, request, text_of

from turboquant_kv.codec.format import KVFormat
from turboserve.engine.row_masks import _as_addends
from turboserve.engine.sampling import BatchSampler, row_sampling
from turboserve.engine.step_loop import StepLoop
from turboserve.engine.token_rules import Mask
from turboserve.errors import EngineFailureError
from turboserve.messages import Request, SamplingParams

FORMATS = [None, KVFormat(k_bits=4, v_bits=3, page_tokens=16, sink_tokens=16, centred=False)]
DIGITS = range(48, 58)


@pytest.fixture(params=FORMATS, ids=lambda fmt: "f16" if fmt is None else fmt.name)
def fmt(request: pytest.FixtureRequest) -> KVFormat | None:
    value: KVFormat | None = request.param
    return value


@pytest.fixture(params=["off", "on"], ids=["at once", "overlap"])
def overlap(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Alternating:
    """Digits of one parity, then of the other, so that a mask depends on the token before; free at every third place.

    Complete after `length` tokens; `raises` names the method that fails at the token `raises_at`.
    """

    def __init__(self, length: int = 10**9, *, raises: str = "", raises_at: int = 0) -> None:
        self.length, self.raises, self.raises_at = length, raises, raises_at
        self.accepted: list[int] = []

    def _meet(self, method: str) -> None:
        if method == self.raises and len(self.accepted) >= self.raises_at:
            raise ValueError("injected")

    @property
    def is_complete(self) -> bool:
        self._meet("is_complete")
        return len(self.accepted) >= self.length

    def allowed(self, before: list[int]) -> Collection[int] | None:
        if len(before) % 3 == 2:
            return None
        return [token for token in DIGITS if not before or token % 2 != before[-1] % 2]

    def fill(self, mask: Mask) -> bool:
        self._meet("fill")
        tokens = self.allowed(self.accepted)
        if tokens is None:
            mask[:] = 0x5A5A5A5A  # means nothing
            return False
        mask[:] = 0
        for token in tokens:
            mask[token // 32] |= np.uint32(1 << token % 32)
        return True

    def accept(self, token: int) -> None:
        self._meet("accept")
        self.accepted.append(token)

    def assert_obeyed(self, answer: list[int]) -> None:
        for i, token in enumerate(answer):
            allowed = self.allowed(answer[:i])
            assert allowed is None or token in allowed, f"{answer} at {i}"


def some_requests(rng: np.random.Generator, num: int = 6, max_tokens: int = 25) -> list[Request]:
    params = [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=1.0, seed=2, top_p=0.9, frequency_penalty=0.7),
        SamplingParams(temperature=0.8, seed=3, top_k=12, repetition_penalty=1.2),
    ]
    contents = [text_of([int(t) for t in rng.integers(0, VOCAB, rng.integers(1, 40))]) for _ in range(num)]
    return [
        request(f"r{i}", content, max_tokens=max_tokens, tenant=str(i), sampling=params[i % 3])
        for i, content in enumerate(contents)
    ]


def in_turn(loop: StepLoop, requests: list[Request], rules: list[Any]) -> list[Sink]:
    """One more request every third step, so that rows with and without rules join a running batch."""
    sinks = []
    for one, rule in zip(requests, rules, strict=True):
        sinks += add(loop, one, rules=[rule])
        for _ in range(3):
            loop.step()
    finish(loop)
    return sinks


def finish(loop: StepLoop) -> None:
    while loop.has_work:
        loop.step()
    assert not loop._parts.memory.leases
    loop.check_integrity()


@pytest.mark.parametrize("ruled", [{0}, {1, 4}, {5}, set(range(6))])
def test_rules_are_obeyed_alone_and_in_any_batch_and_change_nobody_elses_answer(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None, overlap: str, ruled: set[int]
) -> None:
    requests = some_requests(rng)

    def rules() -> list[Alternating | None]:
        return [Alternating() if i in ruled else None for i in range(len(requests))]

    together = rules()
    sinks = in_turn(make_loop(make_parts(model, fmt=fmt), overlap=overlap), requests, together)
    differing = 0
    for i, (one, rule) in enumerate(zip(requests, rules(), strict=True)):
        loop = make_loop(make_parts(model, fmt=fmt), overlap="off")
        (alone,) = add(loop, one, rules=[rule])
        finish(loop)
        assert len(sinks[i].tokens) == 25 and sinks[i].finished.reason == "length"
        differing += sinks[i].tokens != alone.tokens
        shared = together[i]
        if shared is not None:
            shared.assert_obeyed(sinks[i].tokens)
            assert shared.accepted == sinks[i].tokens
    assert differing <= 1  # other batch mates are another order of summing, which may decide one draw in hundreds


def test_nothing_is_in_flight_while_a_rule_is_there_and_everything_is_again_afterwards(
    model: Any, rng: np.random.Generator
) -> None:
    loop = make_loop(make_parts(model), overlap="on")
    free, ruled = some_requests(rng, 2, max_tokens=40)
    (talking,) = add(loop, free)
    while len(talking.tokens) < 5:
        loop.step()
    assert loop.runner.num_in_flight(loop.requests.running[0]) == 1
    (sink,) = add(loop, ruled, rules=[rule := Alternating(8)])
    while not sink.ended.is_set():
        num_before = len(talking.tokens)
        loop.step()
        assert len(talking.tokens) > num_before, "landing first costs nobody a token"
        if loop.runner.num_rows == 2:
            assert loop.runner._flight is None
    assert rule.accepted == sink.tokens and len(sink.tokens) == 8
    loop.step()
    assert loop.runner.num_in_flight(loop.requests.running[0]) == 1
    finish(loop)
    assert len(talking.tokens) == 40


@pytest.mark.parametrize("method", ["fill", "accept", "is_complete"])
@pytest.mark.parametrize("at", [0, 6])
def test_a_rule_that_raises_fails_its_row_alone(
    model: Any, rng: np.random.Generator, overlap: str, method: str, at: int
) -> None:
    requests = some_requests(rng, 4)

    def answers(victims_rule: Alternating) -> list[Sink]:
        loop = make_loop(make_parts(model), overlap=overlap)
        sinks = add(loop, *requests, rules=[None, Alternating(), victims_rule, None])
        finish(loop)
        return sinks

    expected, got = answers(Alternating()), answers(Alternating(raises=method, raises_at=at))
    assert isinstance(got[2].error, EngineFailureError)
    assert got[2].tokens == expected[2].tokens[: len(got[2].tokens)] and at - 1 <= len(got[2].tokens) <= at + 1
    for i in (0, 1, 3):
        assert got[i].tokens == expected[i].tokens and got[i].finished.reason == "length"


def test_a_rule_that_allows_nothing_fails_its_row_alone(model: Any, rng: np.random.Generator, overlap: str) -> None:
    class Nothing(Alternating):
        def allowed(self, before: list[int]) -> Collection[int]:
            return [] if len(before) == 3 else DIGITS

    loop = make_loop(make_parts(model), overlap=overlap)
    sinks = add(loop, *some_requests(rng, 3), rules=[None, Nothing(), Alternating()])
    finish(loop)
    assert isinstance(sinks[1].error, EngineFailureError) and len(sinks[1].tokens) == 3
    assert len(sinks[0].tokens) == len(sinks[2].tokens) == 25


@pytest.mark.parametrize("way", ["preempt", "device", "forward", "sampling"])
def test_rules_of_rows_that_go_back_are_told_of_no_token_twice(
    model: Any, rng: np.random.Generator, overlap: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempted; recovered from a failed device; tried alone after a failed step; drawn alone after a failed draw."""
    requests = some_requests(rng, 3, max_tokens=30)

    def loop_and_sinks() -> tuple[StepLoop, list[Sink], list[Alternating | None]]:
        rules = [Alternating(), None, Alternating()]
        loop = make_loop(make_parts(model), overlap=overlap)
        return loop, add(loop, *requests, rules=rules), rules

    loop, expected, _ = loop_and_sinks()
    finish(loop)
    loop, sinks, rules = loop_and_sinks()
    while len(sinks[2].tokens) < 7:
        loop.step()
    failures = iter([True])
    if way == "preempt":
        loop.requests.preempt(next(g for g in loop.requests.running if g.request_id == "r2"))
        next(failures)
    else:
        owner, name = {
            "device": (mx, "async_eval"),
            "forward": (passes_of(loop), "model"),
            "sampling": (loop.runner, "_sample"),
        }[way]
        fail_once(monkeypatch, owner, name, failures)
    finish(loop)
    assert next(failures, None) is None
    for sink, want, rule in zip(sinks, expected, rules, strict=True):
        assert sink.tokens == want.tokens and len(sink.tokens) == 30
        if rule is not None:
            assert rule.accepted == sink.tokens


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, failures: Any) -> None:
    original = getattr(owner, name)

    def failing(*args: Any, **options: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("injected")
        return original(*args, **options)

    monkeypatch.setattr(owner, name, failing)


END, OTHER_END = 200, 77


@pytest.mark.parametrize(
    ("fields", "ends", "last", "stopped_by"),
    [
        ({}, {END}, END, None),
        ({"stop_token_ids": (OTHER_END,)}, set(), OTHER_END, OTHER_END),
        ({"ignore_eos": True}, {END}, END, None),  # else it could not end at all
        ({"min_tokens": 9}, {END}, END, None),  # nor here
        ({}, set(), None, None),
    ],
)
def test_a_complete_answer_ends_whatever_the_model_would_like(
    model: Any,
    rng: np.random.Generator,
    overlap: str,
    fields: dict[str, Any],
    ends: set[int],
    last: int | None,
    stopped_by: int | None,
) -> None:
    one, other = some_requests(rng, 2)
    loop = make_loop(make_parts(model, eos_ids=frozenset(ends)), overlap=overlap)
    rule = Alternating(5)
    sink, _ = add(loop, replace(one, **fields), replace(other, ignore_eos=True), rules=[rule, None])
    (generation, _) = loop.requests.waiting
    finish(loop)
    assert sink.finished.reason == "stop" and sink.finished.stopped_by == stopped_by
    assert sink.tokens == rule.accepted and len(rule.accepted) == 5
    assert generation.answer == rule.accepted + ([] if last is None else [last])
    assert sink.finished.usage.completion_tokens == len(generation.answer)


def test_a_rule_with_nothing_but_its_end_left_ends_before_min_tokens_and_else_goes_on(
    model: Any, rng: np.random.Generator, overlap: str
) -> None:
    class Ending(Alternating):
        """An end, or a digit too for the first places; after these the end alone, without being complete."""

        def __init__(self, num_digits: int) -> None:
            super().__init__()
            self.num_digits = num_digits

        def allowed(self, before: list[int]) -> Collection[int]:
            return [END, 48] if len(before) < self.num_digits else [END]

    bias = SamplingParams(temperature=0.0, logit_bias=((END, 50.0),))
    requests = [
        replace(one, sampling=bias, min_tokens=n)
        for one, n in zip(some_requests(rng, 3, max_tokens=30), (0, 6, 20), strict=True)
    ]
    loop = make_loop(make_parts(model, eos_ids=frozenset({END})), overlap=overlap)
    sinks = add(loop, *requests, rules=[Ending(10), Ending(10), Ending(10)])
    finish(loop)
    assert [len(s.tokens) for s in sinks] == [0, 6, 10]


@pytest.mark.parametrize("vocab_len", [VOCAB, 33, 8, 1])
def test_both_forms_of_a_mask_allow_the_same(rng: np.random.Generator, vocab_len: int) -> None:
    bits = rng.integers(0, 2**32, size=(3, -(-vocab_len // 32)), dtype=np.uint64).astype(np.uint32)
    addends = _as_addends(bits, vocab_len)
    assert addends.shape == (3, vocab_len) and addends.dtype == np.float32
    for row, words in zip(addends.tolist(), bits.tolist(), strict=True):
        assert row == [0.0 if words[t // 32] >> t % 32 & 1 else -np.inf for t in range(vocab_len)]
    logits = mx.array(rng.normal(size=(4, vocab_len)).astype(np.float32))
    tokens = []
    for mask in (bits, addends):
        sampler = BatchSampler()
        for seed in range(4):
            sampler.join(row_sampling(SamplingParams(seed=seed), vocab_len), [], [])
        draws = sampler.sample(logits, mask=mx.array(mask), masked=[0, 2, 3])
        tokens.append((np.array(draws.tokens).tolist(), np.array(draws.is_broken).tolist()))
    is_empty = [not np.isfinite(row).any() for row in addends]
    assert tokens[0][1] == tokens[1][1] == [is_empty[0], False, is_empty[1], is_empty[2]]
    for a, b, broken in zip(tokens[0][0], tokens[1][0], tokens[0][1], strict=True):
        assert a == b or broken
