"""Prompts, lengths and arrivals: what the options promise, for any seed."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboserve.bench_client.mix import WORDS, Mix, Pace, Span, TokenScale, arrivals, words

SEEDS = st.integers(0, 2**31)
SCALES = st.builds(TokenScale, st.floats(0.5, 3.0), st.floats(0, 40))


def num_tokens(text: str, scale: TokenScale) -> float:
    return scale.overhead + scale.per_word * len(text.split())


def num_shared(texts: list[list[str]]) -> int:
    """Words that all of them begin with."""
    columns = zip(*texts, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


@settings(deadline=None, max_examples=50)
@given(SEEDS, SCALES, st.integers(100, 2000), st.integers(0, 2000))
def test_prompts_have_the_wanted_length(seed: int, scale: TokenScale, low: int, more: int) -> None:
    mix = Mix(Span(low, low + more), Span(1, 9), seed=seed)
    for index in range(3):
        asked = mix.ask(0, index, scale)
        assert low <= asked.prompt_tokens <= low + more and 1 <= asked.answer_tokens <= 9
        assert abs(num_tokens(asked.text, scale) - asked.prompt_tokens) <= scale.per_word / 2 + 1e-6


@settings(deadline=None, max_examples=50)
@given(SEEDS, SCALES, st.integers(1, 400))
def test_prompts_share_the_prefix_and_nothing_more(seed: int, scale: TokenScale, prefix: int) -> None:
    mix = Mix(Span(500, 900), shared_prefix=prefix, seed=seed)
    places = itertools.product((-1, 0, 1), range(4), (0, 1))
    texts = [mix.ask(number, index, scale, server).text.split() for number, index, server in places]
    shared = num_shared(texts)
    assert abs(shared * scale.per_word - prefix) <= scale.per_word * 1.5
    for one, other in itertools.combinations(texts, 2):
        assert num_shared([one, other]) <= shared + 5


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_the_same_seed_asks_the_same(seed: int) -> None:
    mix, scale = Mix(Span(20, 90), Span(1, 50), seed=seed), TokenScale(1.3, 9)
    assert mix.ask(2, 5, scale) == mix.ask(2, 5, scale)
    assert mix.ask(2, 5, scale).text != Mix(Span(20, 90), Span(1, 50), seed=seed + 1).ask(2, 5, scale).text
    ours, theirs = mix.ask(2, 5, scale, 0), mix.ask(2, 5, scale, 1)
    assert (ours.prompt_tokens, ours.answer_tokens) == (theirs.prompt_tokens, theirs.answer_tokens)
    assert ours.text != theirs.text


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=False), st.integers(0, 1000))
def test_words_come_back_only_after_all_others(rng: object, num_words: int) -> None:
    counts = Counter(words(rng, num_words))  # type: ignore[arg-type]
    assert sum(counts.values()) == num_words
    whole = num_words // len(WORDS)
    assert all(whole <= counts[word] <= whole + 1 for word in WORDS)


def test_ragged_lengths_are_spread_over_the_range() -> None:
    mix = Mix(Span(1000, 16000), seed=5)
    lengths = [mix.ask(0, index, TokenScale(100.0)).prompt_tokens for index in range(400)]
    assert min(lengths) < 1500 and max(lengths) > 15500
    assert statistics.mean(lengths) == pytest.approx(8500, rel=0.1)


def test_arrivals_are_a_poisson_process(seed: int) -> None:
    """Gaps of an exponential distribution: the mean is its deviation. Bounds are five deviations of the estimate."""
    times = list(itertools.islice(arrivals(4.0, seed, 0), 4000))
    between = [b - a for a, b in itertools.pairwise([0.0, *times])]
    assert min(between) >= 0
    assert statistics.mean(between) == pytest.approx(0.25, rel=0.08)
    assert statistics.stdev(between) == pytest.approx(0.25, rel=0.16)
    assert times[:9] != list(itertools.islice(arrivals(4.0, seed, 1), 9)), "each round has its own"


@pytest.mark.parametrize(
    ("text", "span"),
    [("300", Span(300, 300)), ("1000-16000", Span(1000, 16000)), ("1K-16k", Span(1024, 16384)), (" 7 ", Span(7, 7))],
)
def test_spans_are_read(text: str, span: Span) -> None:
    assert Span.parse(text) == span


@pytest.mark.parametrize("text", ["", "0", "-5", "9-3", "1-2-3", "1.5", "many", "٣", "0-5"])
def test_other_spans_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Span.parse(text)


def test_a_round_ends_by_number_or_time() -> None:
    assert [Pace(num_requests=2).has_more(i, 1e9) for i in (1, 2)] == [True, False]
    assert [Pace(duration_s=3).has_more(10**9, t) for t in (2.9, 3.0)] == [True, False]
    assert [Pace(num_requests=2, duration_s=3).has_more(i, t) for i, t in ((1, 2), (2, 2), (1, 4))] == [
        True,
        False,
        False,
    ]


def test_the_body_has_what_was_asked_for() -> None:
    mix = Mix(Span(9, 9), Span(4, 4), temperature=0.5, top_p=0.9, end_tokens=(2, 7))
    body = mix.body(mix.ask(0, 0, TokenScale()), "m")
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (4, 0.5, 0.9)
    assert body["logit_bias"] == {"2": -100, "7": -100} and body["stream_options"] == {"include_usage": True}
    plain = Mix().body(Mix().ask(0, 0, TokenScale()), "m")
    assert "logit_bias" not in plain and "top_p" not in plain


def test_a_prefix_must_leave_something() -> None:
    Mix(Span(50, 90), shared_prefix=49).check()
    with pytest.raises(ValueError, match="longer prompts"):
        Mix(Span(50, 90), shared_prefix=50).check()
