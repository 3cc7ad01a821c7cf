"""Sampling against a plain NumPy account of what each parameter means."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from turboserve.engine.sampling import RowSampler
from turboserve.errors import InvalidRequestError
from turboserve.messages import SamplingParams

VOCAB = 50


def twin_adjust(logits: np.ndarray, params: SamplingParams, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Bias and penalties, one token at a time."""
    out = logits.astype(np.float64).copy()
    for token, value in params.logit_bias:
        out[token] += value
    for token in set(prompt) | set(answer):
        factor = params.repetition_penalty if out[token] < 0 else 1 / params.repetition_penalty
        out[token] *= factor
    for token in set(answer):
        out[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
    return out


def twin_allowed(logits: np.ndarray, params: SamplingParams) -> set[int]:
    """Tokens that may be drawn after temperature, top-k, top-p and min-p."""
    scaled = logits.astype(np.float64) / params.temperature
    probs = np.exp(scaled - scaled.max())
    allowed = {int(t) for t in np.flatnonzero(probs >= params.min_p)} if params.min_p else set(range(len(logits)))
    order = [int(t) for t in np.argsort(-scaled, kind="stable") if int(t) in allowed]
    order = order[: params.top_k] if params.top_k else order
    mass, kept = 0.0, set[int]()
    total = sum(probs[t] for t in order)
    for token in order:
        if mass < params.top_p or not kept:
            kept.add(token)
        mass += probs[token] / total
    return kept


def sampler(params: SamplingParams, prompt: list[int] | None = None) -> RowSampler:
    return RowSampler(params, prompt or [], VOCAB)


def draw_token(row: RowSampler, logits: np.ndarray) -> int:
    return int(np.array(row.sample(mx.array(logits))))


@pytest.fixture
def logits(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(scale=2.0, size=VOCAB).astype(np.float32)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=0.7, top_p=0.6),
        SamplingParams(temperature=1.3, min_p=0.2),
        SamplingParams(temperature=0.9, top_k=12, top_p=0.8, min_p=0.01),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=1.0, top_k=10_000),
    ],
)
def test_draws_stay_inside_what_the_parameters_allow(params: SamplingParams, logits: np.ndarray) -> None:
    row = sampler(params)
    drawn = {draw_token(row, logits) for _ in range(200)}
    allowed = twin_allowed(logits, params)
    assert drawn <= allowed
    assert len(drawn) >= min(2, len(allowed))


def test_temperature_draws_follow_the_softmax(logits: np.ndarray) -> None:
    row = sampler(SamplingParams(temperature=1.5, seed=3))
    num_draws = 3000
    counts = np.bincount([draw_token(row, logits) for _ in range(num_draws)], minlength=VOCAB)
    probs = np.exp(logits / 1.5 - (logits / 1.5).max())
    probs /= probs.sum()
    # Six standard deviations of a binomial count: a right sampler fails about once in 10^7 runs.
    tolerance = 6 * np.sqrt(num_draws * probs * (1 - probs)) + 1
    assert (np.abs(counts - num_draws * probs) < tolerance).all()


def test_greedy_takes_the_largest_after_bias_and_penalties(logits: np.ndarray, rng: np.random.Generator) -> None:
    params = SamplingParams(
        temperature=0.0,
        presence_penalty=0.7,
        frequency_penalty=0.9,
        repetition_penalty=1.4,
        logit_bias=((3, 2.5), (7, -100.0)),
    )
    prompt = [int(t) for t in rng.integers(0, VOCAB, 10)]
    row, answer = sampler(params, prompt), list[int]()
    for _ in range(12):
        expected = int(np.argmax(twin_adjust(logits, params, prompt, answer)))
        token = draw_token(row, logits)
        assert token == expected
        row.accept(token)
        answer.append(token)
    assert len(set(answer)) > 1  # the penalties moved it on


def test_sampling_leaves_the_logits_of_others_alone(logits: np.ndarray) -> None:
    batch = mx.array(np.stack([logits, logits]))
    row = sampler(SamplingParams(temperature=0.0, repetition_penalty=2.0), list(range(VOCAB)))
    mx.eval(row.sample(batch[0]))
    assert np.array_equal(np.array(batch[1]), logits) and np.array_equal(np.array(batch[0]), logits)


def test_same_seed_same_tokens_other_seed_others(logits: np.ndarray) -> None:
    def run(seed: int | None) -> list[int]:
        row = sampler(SamplingParams(temperature=2.0, seed=seed))
        return [draw_token(row, logits) for _ in range(20)]

    assert run(11) == run(11)
    assert run(11) != run(12)
    assert run(-5) == run(-5)
    assert run(None) != run(None)  # 20 draws at temperature 2 coincide with odds below 10^-9


def test_plain_greedy_is_recognised() -> None:
    assert sampler(SamplingParams(temperature=0.0, top_k=5, top_p=0.5)).is_plain_greedy
    for other in (
        SamplingParams(),
        SamplingParams(temperature=0.0, presence_penalty=0.1),
        SamplingParams(temperature=0.0, logit_bias=((1, 1.0),)),
    ):
        assert not sampler(other).is_plain_greedy


@pytest.mark.parametrize("token", [VOCAB, -1, 10**9])
def test_bias_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sampler(SamplingParams(logit_bias=((token, 1.0),)))
    assert caught.value.param == "logit_bias" and str(token) in caught.value.message
