"""The kernels draw what MLX's operations draw, at every level, for all parameters and whatever the logits are."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant_kv.backends.native.backend import load_kernels
from turboserve.engine import native_draw
from turboserve.engine.native_draw import NativeDraw
from turboserve.engine.sampling import BatchSampler, row_sampling
from turboserve.messages import SamplingParams

kernels, _ = load_kernels()
on_cpu = bool(mx.default_device() == mx.Device(mx.cpu))
pytestmark = pytest.mark.skipif(kernels is None or not on_cpu, reason="no native kernels, or a GPU draws")
LEVELS: list[str] = [] if kernels is None else kernels.isa_levels()


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    level: str = request.param
    monkeypatch.setattr(native_draw, "isa_choice", lambda: level)
    return level


def some_params(rng: np.random.Generator) -> SamplingParams:
    def one_of(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    return SamplingParams(
        temperature=one_of(0.0, 1e-7, 0.3, 1.0, 1.0, 2.0),
        top_p=one_of(1.0, 1.0, 0.9, 0.5, 0.01),
        top_k=one_of(0, 0, 1, 7, 20, 64, 256, 1000),
        min_p=one_of(0.0, 0.0, 0.05, 1.0),
        seed=int(rng.integers(1 << 40)),
        repetition_penalty=one_of(1.0, 1.0, 1.3),
    )


def some_logits(rng: np.random.Generator, num_rows: int, vocab_len: int) -> Any:
    """Of many spreads, some in steps, so that many are equal, some with tokens that cannot be."""
    x = rng.standard_normal((num_rows, vocab_len)) * rng.choice([0.01, 1, 5, 50], (num_rows, 1))
    steps = rng.random(num_rows) < 0.3
    x[steps] = np.round(x[steps])
    x[rng.random(x.shape) < 0.05 * (rng.random((num_rows, 1)) < 0.3)] = -np.inf
    return x.astype(np.float32)


def drawn(rows: list[SamplingParams], steps: list[Any], answer: list[int]) -> list[tuple[Any, Any]]:
    sampler = BatchSampler()
    for params in rows:
        sampler.join(row_sampling(params, steps[0].shape[1]), answer, answer[:2])
    found = []
    for logits in steps:
        draws = sampler.sample(mx.array(logits))
        if isinstance(draws.tokens, np.ndarray):
            assert not draws.arrays(), "what is drawn already waits for nobody"
        found.append((np.array(draws.tokens), np.array(draws.is_broken)))
    return found


@pytest.mark.usefixtures("isa")
def test_draws_are_those_of_mlx(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    for vocab_len in (1, 3, 16, 37, 300, 4099):
        rows = [some_params(rng) for _ in range(24)]
        steps = [some_logits(rng, len(rows), vocab_len) for _ in range(4)]
        answer = rng.integers(0, vocab_len, 5).tolist()
        got = drawn(rows, steps, answer)
        with monkeypatch.context() as patch:
            patch.setattr(NativeDraw, "of", lambda *args: None)
            wanted = drawn(rows, steps, answer)
        for (tokens, broken), (their_tokens, theirs_broken) in zip(got, wanted, strict=True):
            assert np.array_equal(broken, theirs_broken)
            assert np.array_equal(tokens[~broken], their_tokens[~broken]), (vocab_len, rows)


@pytest.mark.usefixtures("isa")
def test_what_is_no_number_spoils_its_row_only(rng: np.random.Generator) -> None:
    for vocab_len in (1, 15, 100):
        rows = [some_params(rng) for _ in range(4)]
        clean = some_logits(rng, 4, vocab_len)
        clean[:, 0] = 0
        (tokens, broken), *_ = drawn(rows, [clean], [0])
        assert not broken.any()
        for bad in (np.nan, np.inf):
            spoilt = clean.copy()
            spoilt[2, int(rng.integers(vocab_len))] = bad
            (found, flags), *_ = drawn(rows, [spoilt], [0])
            assert flags.tolist() == [False, False, True, False]
            assert np.array_equal(np.delete(found, 2), np.delete(tokens, 2))
        spoilt = clean.copy()
        spoilt[1] = -np.inf
        assert drawn(rows, [spoilt], [0])[0][1].tolist() == [False, True, False, False]


def test_a_mask_hides_no_nan(rng: np.random.Generator) -> None:
    """A model that has gone wrong is told of, even where a rule forbids the very token."""
    logits = rng.standard_normal((1, 64)).astype(np.float32)
    logits[0, 3] = np.nan
    sampler = BatchSampler()
    sampler.join(row_sampling(SamplingParams(temperature=1.0), 64), [], [])
    mask = np.zeros((1, 64), np.float32)
    mask[0, 3] = -np.inf
    allowed = mx.array(np.array([[~np.uint32(8), ~np.uint32(0)]], np.uint32))
    for given in (mx.array(mask), allowed):
        assert bool(sampler.sample(mx.array(logits), mask=given).is_broken[0])


@pytest.mark.usefixtures("isa")
def test_ranked_draws_are_those_of_mlx_in_any_order(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rising, falling and equal logits, zeros of either sign, and as many ranked as there are tokens."""
    vocab_len = 3000
    rising = np.sort(rng.standard_normal(vocab_len)).astype(np.float32)
    zeros = np.where(rng.random(vocab_len) < 0.5, np.float32(0), -np.float32(0))
    mixed = np.where(rng.random(vocab_len) < 0.3, np.float32(-1), zeros)
    few = np.where(rising > 2, 1, -np.inf)
    logits = [rising, rising[::-1], np.ones(vocab_len), zeros, mixed, np.round(rising * 4), few]
    steps, top_p = [np.array(logits, np.float32)] * 4, (1.0, 0.9, 0.5, 1.0, 0.99, 0.7, 1.0)
    for top_k in (1, 63, 64, 255, 256, 257, vocab_len - 1, vocab_len, 1_000_000):
        rows = [SamplingParams(temperature=1.0, top_k=top_k, top_p=p, seed=7) for p in top_p]
        got = drawn(rows, steps, [])
        with monkeypatch.context() as patch:
            patch.setattr(NativeDraw, "of", lambda *args: None)
            wanted = drawn(rows, steps, [])
        for (tokens, broken), (their_tokens, theirs_broken) in zip(got, wanted, strict=True):
            assert not broken.any() and not theirs_broken.any() and np.array_equal(tokens, their_tokens), top_k


@pytest.mark.usefixtures("isa")
def test_ranking_the_worst_order_takes_no_square_of_top_k(rng: np.random.Generator) -> None:
    """Rising logits, each among the likeliest so far: inserted one by one they took 200 times as long as others."""
    usual = rng.standard_normal((1, 60_000)).astype(np.float32)
    draw = NativeDraw.of([SamplingParams(temperature=1.0, top_k=256)], usual.shape[1], 1e-6)
    assert draw is not None
    seconds = []
    for logits in (mx.array(usual), mx.array(np.sort(usual))):
        times = []
        for _ in range(9):
            began_s = time.perf_counter()
            draw.draw(logits, np.array([1 << 31], np.uint32))
            times.append(time.perf_counter() - began_s)
        seconds.append(min(times))
    assert seconds[1] < 60 * seconds[0]  # measured: 13
