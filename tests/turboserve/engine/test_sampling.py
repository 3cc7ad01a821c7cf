"""Sampling in batches against a plain NumPy account of what each parameter means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from turboserve.engine.sampling import BatchSampler, row_sampling
from turboserve.engine.weighted_draw import (
    TIE_OCTAVES,
    _exp2,
    likeliest,
    random_numbers,
    top_p_threshold,
    whole_weights,
    within_top_p,
)
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
    """Tokens that may be drawn after temperature, min-p, top-k and top-p, ties by id."""
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


def twin_tied(logits: np.ndarray, params: SamplingParams) -> set[int]:
    """twin_allowed, and what top-p alone counts as tied with its last token."""
    allowed = twin_allowed(logits, params)
    if params.top_k or params.top_p == 1.0:
        return allowed
    scaled = logits.astype(np.float64) / params.temperature
    last = min(scaled[t] for t in allowed) - 1.01 * np.log(2) * TIE_OCTAVES
    floor = scaled.max() + np.log(params.min_p) if params.min_p else -np.inf
    return {int(t) for t in np.flatnonzero((scaled >= last) & (scaled >= floor))}


def sampler_of(*params: SamplingParams, prompt: Sequence[int] = (), answer: Sequence[int] = ()) -> BatchSampler:
    sampler = BatchSampler()
    for one in params:
        sampler.join(row_sampling(one, VOCAB), prompt, answer)
    return sampler


def draw_tokens(sampler: BatchSampler, logits: np.ndarray) -> list[int]:
    """One step for logits (B, V)."""
    tokens = np.array(sampler.sample(mx.array(logits)).tokens)
    assert tokens.dtype == np.uint32 and tokens.shape == (len(logits),)
    return [int(t) for t in tokens]


def many(params: SamplingParams, num_rows: int) -> list[SamplingParams]:
    """The same with unequal seeds."""
    return [replace(params, seed=seed) for seed in range(num_rows)]


@pytest.fixture
def logits(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(scale=2.0, size=VOCAB).astype(np.float32)


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.2, seed=1),
    SamplingParams(temperature=1.0, top_k=5, seed=2),
    SamplingParams(temperature=0.7, top_p=0.6, seed=3),
    SamplingParams(temperature=1.3, min_p=0.1, seed=4),
    SamplingParams(temperature=0.9, top_k=12, top_p=0.8, min_p=0.01, seed=5),
    SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.5, seed=6),
    SamplingParams(temperature=0.0, frequency_penalty=0.9, logit_bias=((3, 2.5),)),
    SamplingParams(temperature=2.0, logit_bias=((7, 5.0), (8, -3.0)), seed=7),
    SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.3, seed=8),
]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=0.7, top_p=0.6),
        SamplingParams(temperature=1.3, min_p=0.2),
        SamplingParams(temperature=1.3, min_p=0.05, top_p=0.7),
        SamplingParams(temperature=0.9, top_k=12, top_p=0.8, min_p=0.01),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=1.0, top_p=0.0),
        SamplingParams(temperature=1.0, top_k=10_000, top_p=0.5),
    ],
)
def test_draws_are_from_all_that_the_parameters_allow_and_nothing_else(
    params: SamplingParams, logits: np.ndarray
) -> None:
    logits = logits / 4  # so flat that every allowed token comes
    num_rows = 4000
    drawn = set(draw_tokens(sampler_of(*many(params, num_rows)), np.tile(logits, (num_rows, 1))))
    assert twin_allowed(logits, params) <= drawn <= twin_tied(logits, params)


@pytest.mark.parametrize("params", [SamplingParams(top_k=3), SamplingParams(top_p=0.6, temperature=2.0)])
def test_ties_at_a_cut(params: SamplingParams, rng: np.random.Generator) -> None:
    """Top-k keeps the lowest ids of equal tokens, top-p all of them."""
    logits = np.full(VOCAB, -50.0, np.float32)
    tied = np.sort(rng.choice(VOCAB, 5, replace=False))
    logits[tied] = 1.5
    drawn = set(draw_tokens(sampler_of(*many(params, 300)), np.tile(logits, (300, 1))))
    assert drawn == set(tied[:3].tolist() if params.top_k else tied.tolist())


@pytest.mark.parametrize("params", [SamplingParams(temperature=1.5), SamplingParams(temperature=1.5, top_k=VOCAB)])
def test_draws_follow_the_softmax(params: SamplingParams, logits: np.ndarray) -> None:
    num_rows, num_steps = 100, 60
    sampler = sampler_of(*many(params, num_rows))
    batch = np.tile(logits, (num_rows, 1))
    counts = np.bincount(np.concatenate([draw_tokens(sampler, batch) for _ in range(num_steps)]), minlength=VOCAB)
    probs = np.exp(logits / 1.5 - (logits / 1.5).max())
    probs /= probs.sum()
    # Six standard deviations of a binomial count: a right sampler fails about once in 10^7 runs.
    tolerance = 6 * np.sqrt(counts.sum() * probs * (1 - probs)) + 1
    assert (np.abs(counts - counts.sum() * probs) < tolerance).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.999])
def test_top_p_threshold_is_that_of_sorted_probabilities(top_p: float, rng: np.random.Generator) -> None:
    logits = rng.normal(scale=3.0, size=(5, 3001))
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights = whole_weights(mx.array(probs.astype(np.float32)))
    kept = np.array(weights >= top_p_threshold(weights, mx.full((5, 1), top_p)))
    probs /= probs.sum(axis=1, keepdims=True)
    for row, has in zip(probs, kept, strict=True):
        ranked = np.sort(row)[::-1]
        # The sum that is enough is rounded to float32, and weights to 2^-30 of the row or less.
        early, late = ranked[np.searchsorted(np.cumsum(ranked), [top_p * (1 - 1e-6), top_p * (1 + 1e-6)])]
        assert has[row > early * (1 + 1e-5) + 2e-9].all()
        assert not has[row < late * 2 ** (-1.01 * TIE_OCTAVES) - 2e-9].any()
        assert row[has].sum() > top_p * (1 - 1e-5)


@pytest.mark.parametrize("vocab_len, k", [(50, 1), (50, 50), (999, 7), (20_011, 20), (20_011, 64), (20_011, 200)])
def test_the_likeliest_are_those_of_a_stable_sort(vocab_len: int, k: int, rng: np.random.Generator) -> None:
    values = rng.integers(-40, 40, (3, vocab_len)).astype(np.float32) / 4  # many ties
    values[values == 0.0] *= rng.choice([-1.0, 1.0])  # either zero
    values[1] = -np.inf
    values[1, :5] = 2.0
    ids, top = likeliest(mx.array(values), k)
    expected = np.argsort(-values, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(np.array(ids)[[0, 2]], expected[[0, 2]])
    np.testing.assert_array_equal(np.array(ids)[1, :5], expected[1, :5])
    np.testing.assert_array_equal(np.array(top), np.take_along_axis(values, expected, axis=-1))


def test_exp2_is_exact_to_a_few_last_places(rng: np.random.Generator) -> None:
    x = np.concatenate([-rng.uniform(0, 126, 5000), [0.0, -0.5, -1.0, -125.5, -126.0]]).astype(np.float32)
    np.testing.assert_allclose(np.array(_exp2(mx.array(x))), np.exp2(x.astype(np.float64)), rtol=3e-7)
    assert float(_exp2(mx.array([-np.inf]))[0]) < 1e-37


def test_each_row_draws_the_same_alone_as_in_any_batch(rng: np.random.Generator) -> None:
    num_steps = 12
    steps = rng.normal(scale=2.0, size=(num_steps, len(MIXED), VOCAB)).astype(np.float32)
    prompt = rng.integers(0, VOCAB, 10).tolist()
    alone = []
    for i, params in enumerate(MIXED):
        one = sampler_of(params, prompt=prompt)
        alone.append([draw_tokens(one, step[i : i + 1])[0] for step in steps])
    for order in (list(range(len(MIXED))), rng.permutation(len(MIXED)).tolist()):
        together = sampler_of(*(MIXED[i] for i in order), prompt=prompt)
        got = np.array([draw_tokens(together, step[order]) for step in steps]).T.tolist()
        assert got == [alone[i] for i in order]


def test_rows_that_leave_and_come_back_draw_as_if_they_had_stayed(rng: np.random.Generator) -> None:
    """As after preemption: the place in the answer and the penalties come from the tokens."""
    steps = rng.normal(scale=2.0, size=(9, len(MIXED), VOCAB)).astype(np.float32)
    prompt = rng.integers(0, VOCAB, 10).tolist()
    undisturbed, sampler = sampler_of(*MIXED, prompt=prompt), sampler_of(*MIXED, prompt=prompt)
    answers: list[list[int]] = [[] for _ in MIXED]
    order = list(range(len(MIXED)))
    for step in steps:
        expected = draw_tokens(undisturbed, step)
        assert draw_tokens(sampler, step[order]) == [expected[i] for i in order]
        for answer, token in zip(answers, expected, strict=True):
            answer.append(token)
        stay = sorted(rng.choice(len(order), 6, replace=False).tolist())
        back = [i for at, i in enumerate(order) if at not in stay]
        sampler.keep(stay)
        order = [order[at] for at in stay] + back
        for i in back:
            sampler.join(row_sampling(MIXED[i], VOCAB), prompt, answers[i])
    sampler.keep([])
    assert sampler.num_rows == 0


def test_steps_can_be_built_before_any_token_is_known(rng: np.random.Generator) -> None:
    """Penalties count tokens that nobody has read yet."""
    step = rng.normal(scale=2.0, size=(len(MIXED), VOCAB)).astype(np.float32)
    lazy, read = sampler_of(*MIXED), sampler_of(*MIXED)
    pending = [lazy.sample(mx.array(step)).tokens for _ in range(6)]
    expected = [draw_tokens(read, step) for _ in range(6)]
    assert [np.array(tokens).tolist() for tokens in pending] == expected


def test_greedy_takes_the_largest_after_bias_and_penalties(logits: np.ndarray, rng: np.random.Generator) -> None:
    params = SamplingParams(
        temperature=0.0,
        presence_penalty=0.7,
        frequency_penalty=0.9,
        repetition_penalty=1.4,
        logit_bias=((3, 2.5), (7, -100.0)),
    )
    prompt = [*(int(t) for t in rng.integers(0, VOCAB, 10)), VOCAB + 3]  # tokens beyond the logits are left alone
    row, answer = sampler_of(params, prompt=prompt), list[int]()
    for _ in range(12):
        expected = int(np.argmax(twin_adjust(logits, params, prompt[:-1], answer)))
        assert draw_tokens(row, logits[None]) == [expected]
        answer.append(expected)
    assert len(set(answer)) > 1  # the penalties moved it on


@pytest.mark.parametrize("vocab_len", [VOCAB, 64, 33])
def test_a_mask_leaves_only_what_its_bits_allow(vocab_len: int, rng: np.random.Generator) -> None:
    num_rows = 200
    allowed = rng.random((2, vocab_len)) < 0.2
    allowed[0, vocab_len - 1] = True
    allowed[1] = True
    logits = rng.normal(scale=0.1, size=vocab_len).astype(np.float32)
    sampler = BatchSampler()
    for params in many(SamplingParams(), num_rows):
        sampler.join(row_sampling(params, vocab_len), [], [])
    bits = np.zeros((2, -(-vocab_len // 32) * 32), np.uint8)
    bits[:, :vocab_len] = allowed
    words = np.packbits(bits, axis=-1, bitorder="little").view(np.uint32)
    mask = np.repeat(words, num_rows // 2, axis=0)
    tokens = np.array(sampler.sample(mx.array(np.tile(logits, (num_rows, 1))), mask=mx.array(mask)).tokens)
    assert allowed[0][tokens[:100]].all()
    assert len(set(tokens[100:].tolist()) - set(np.flatnonzero(allowed[0]).tolist())) > 5


def test_sampling_leaves_the_logits_of_others_alone(logits: np.ndarray) -> None:
    batch = mx.array(np.stack([logits, logits]))
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias=((1, 3.0),))
    mx.eval(*sampler_of(params, params, prompt=range(VOCAB)).sample(batch).arrays())
    assert np.array_equal(np.array(batch), np.stack([logits, logits]))


def test_same_seed_same_tokens_other_seed_others(logits: np.ndarray) -> None:
    def run(seed: int | None) -> list[int]:
        row = sampler_of(SamplingParams(temperature=2.0, seed=seed))
        return [draw_tokens(row, logits[None])[0] for _ in range(20)]

    assert run(11) == run(11)
    assert run(11) != run(12)
    assert run(-5) == run(-5)
    assert run(None) != run(None)  # 20 draws at temperature 2 coincide with odds below 10^-9


def test_random_numbers_are_even_over_places_and_over_seeds() -> None:
    count = np.arange(20_000, dtype=np.uint64)
    seven, start = np.full_like(count, 7), np.zeros_like(count)
    for numbers in (random_numbers(seven, count), random_numbers(count, start)):
        uniform = numbers / 2.0**32
        assert abs(uniform.mean() - 0.5) < 6 * np.sqrt(1 / 12 / len(count))
        assert abs(np.corrcoef(uniform[1:], uniform[:-1])[0, 1]) < 6 / np.sqrt(len(count))
        counts = np.bincount((uniform * 100).astype(int), minlength=100)
        assert (np.abs(counts - 200) < 6 * np.sqrt(200)).all()


def test_only_rows_that_are_not_finite_are_broken(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(len(MIXED), VOCAB)).astype(np.float32)
    expected = draw_tokens(sampler_of(*MIXED), logits)
    logits[::3] = np.nan
    logits[1, 4] = np.inf
    logits[2, 5] = np.nan
    logits[4, expected[4] - 1] = -np.inf  # a token that is impossible harms nobody
    draws = sampler_of(*MIXED).sample(mx.array(logits))
    is_broken = np.array(draws.is_broken).tolist()
    assert is_broken == [i in (0, 1, 2, 3, 6, 9) for i in range(len(MIXED))]
    tokens = np.array(draws.tokens).tolist()
    assert all(0 <= token < VOCAB for token in tokens)
    assert [tokens[i] for i in (5, 7, 8)] == [expected[i] for i in (5, 7, 8)]


def test_a_row_with_nothing_allowed_is_broken(rng: np.random.Generator) -> None:
    mask = np.zeros((2, 2), np.uint32)
    mask[1, 1] = 4
    logits = mx.array(rng.normal(size=(2, VOCAB)).astype(np.float32))
    draws = sampler_of(SamplingParams(), SamplingParams(temperature=0.0)).sample(logits, mask=mx.array(mask))
    assert np.array(draws.is_broken).tolist() == [True, False] and int(draws.tokens[1]) == 34


@pytest.mark.parametrize("num_top", [(4, 4, 4), (None, 4, None), (0, None, 7), (VOCAB + 5, 0, 1), (0, 0, 0)])
def test_logprobs_are_the_models_own_and_of_rows_that_ask_for_them(
    num_top: tuple[int | None, ...], rng: np.random.Generator
) -> None:
    params = [MIXED[i % len(MIXED)] for i in range(3)]
    logits = rng.normal(scale=2.0, size=(3, VOCAB)).astype(np.float32)
    sampler, plain = BatchSampler(), BatchSampler()
    for i, (one, n) in enumerate(zip(params, num_top, strict=True)):
        sampler.join(row_sampling(replace(one, seed=i), VOCAB, num_top=n), [], [])
        plain.join(row_sampling(replace(one, seed=i), VOCAB), [], [])
    draws = sampler.sample(mx.array(logits))
    without = plain.sample(mx.array(logits))
    assert without.logprobs is None and np.array(without.tokens).tolist() == np.array(draws.tokens).tolist()
    got = draws.logprobs
    asking = [i for i, n in enumerate(num_top) if n is not None]
    assert got is not None and list(got.places) == asking and list(got.num_top) == [num_top[i] for i in asking]
    x = logits.astype(np.float64)[asking]
    expected = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    drawn = np.take_along_axis(expected, np.array(draws.tokens)[asking, None].astype(int), axis=-1)[:, 0]
    np.testing.assert_allclose(np.array(got.drawn), drawn, atol=1e-5)
    most = min(VOCAB, max(got.num_top))
    order = np.argsort(-x, axis=-1)[:, :most]
    np.testing.assert_array_equal(np.array(got.top_ids), order)
    np.testing.assert_allclose(np.array(got.top), np.take_along_axis(expected, order, axis=-1), atol=1e-5)


def test_barred_tokens_are_not_drawn_before_their_place(rng: np.random.Generator) -> None:
    """Each row from its own place, also when rows join in the middle of their answers and others leave."""
    barred, favourite = (3, 17), 17
    logits = rng.normal(size=(1, VOCAB)).astype(np.float32)
    logits[0, favourite] += 30
    sampler, until = BatchSampler(), (0, 2, 4)
    for n in until:
        greedy = SamplingParams(temperature=0.0)
        sampler.join(row_sampling(greedy, VOCAB, barred=barred, barred_until=n), [], [])
    sampler.join(row_sampling(SamplingParams(seed=1), VOCAB, barred=barred, barred_until=4), [], [5, 5, 5])
    rows = [(n, 0) for n in until] + [(4, 3)]
    for step in range(6):
        if step == 3:
            sampler.keep([3, 2])
            rows = [rows[3], rows[2]]
        drawn = np.array(sampler.sample(mx.array(np.repeat(logits, len(rows), axis=0))).tokens).tolist()
        assert [token == favourite for token in drawn] == [start + step >= n for n, start in rows]
        assert 3 not in drawn


@pytest.mark.parametrize("masked", [[0], [1, 3], [0, 1, 2, 3]])
def test_a_mask_of_some_rows_leaves_the_others_alone(masked: list[int], rng: np.random.Generator) -> None:
    logits = rng.normal(size=(4, VOCAB)).astype(np.float32)
    params = [SamplingParams(temperature=t, seed=i) for i, t in enumerate((1.0, 0.0, 0.7, 2.0))]
    sampler, plain, alone = sampler_of(*params), sampler_of(*params), [sampler_of(one) for one in params]
    for _ in range(20):
        mask = rng.integers(0, 2**32, size=(len(masked), 2), dtype=np.uint64).astype(np.uint32)
        got = np.array(sampler.sample(mx.array(logits), mask=mx.array(mask), masked=masked).tokens).tolist()
        free = np.array(plain.sample(mx.array(logits)).tokens).tolist()
        for i, row in enumerate(alone):
            mine = mx.array(mask[masked.index(i)][None]) if i in masked else None
            assert got[i] == int(row.sample(mx.array(logits[i : i + 1]), mask=mine).tokens[0])
            if i in masked:
                assert mask[masked.index(i), got[i] // 32] >> (got[i] % 32) & 1
            else:
                assert got[i] == free[i]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_logits_of_16_bits_are_drawn_as_float32(dtype: mx.Dtype, rng: np.random.Generator) -> None:
    logits = mx.array(rng.normal(size=(len(MIXED), VOCAB)).astype(np.float32)).astype(dtype)
    expected = draw_tokens(sampler_of(*MIXED), np.array(logits.astype(mx.float32)))
    assert np.array(sampler_of(*MIXED).sample(logits).tokens).tolist() == expected


@pytest.mark.parametrize("token", [VOCAB, -1, 10**9])
def test_bias_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        row_sampling(SamplingParams(logit_bias=((token, 1.0),)), VOCAB)
    assert caught.value.param == "logit_bias" and str(token) in caught.value.message


def test_the_compiled_search_of_top_p_is_that_of_the_operations(rng: np.random.Generator) -> None:
    """As a GPU runs it; one compiled function serves any number of rows."""
    for num_rows in (1, 5, 2):
        weights = mx.array(rng.integers(0, 1 << 20, (num_rows, 301), np.uint32))
        top_p = mx.array(rng.uniform(0, 1, (num_rows, 1)).astype(np.float32))
        tried, expected = (np.array(within_top_p(compiled)(weights, top_p)) for compiled in (True, False))
        assert tried.shape == (num_rows, 301) and tried.dtype == np.uint32
        assert 0 < np.count_nonzero(expected) < expected.size
        np.testing.assert_array_equal(tried, expected)
