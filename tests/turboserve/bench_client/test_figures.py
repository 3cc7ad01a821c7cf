"""Figures of outcomes whose times are known."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboserve.bench_client.asking import Outcome
from turboserve.bench_client.figures import (
    count,
    figures,
    medians,
    percentile,
    ratios,
    steady_window,
    stream_rate,
    tokens_between,
)
from turboserve.bench_client.kv_watch import KVSample

FLOATS = st.floats(0, 1e6)


def outcome(stream: int, sent_s: float, chunk_s: list[float], tokens: int | None = None, error: str = "") -> Outcome:
    ended_s = chunk_s[-1] if chunk_s else sent_s + 1
    return Outcome(0, stream, sent_s, 10, 4, ended_s, chunk_s, 11, 3, tokens, "stop", error, "why")


def test_the_figures_of_two_streams() -> None:
    """Stream 0 answers at 1, 2 and 3 s and again at 5 and 6; stream 1, sent at 0.5, at 2.5 and 4.5."""
    outcomes = [
        outcome(0, 0.0, [1.0, 2.0, 3.0]),
        outcome(1, 0.5, [2.5, 4.5]),
        outcome(0, 3.0, [5.0, 6.0]),
    ]
    found = figures(outcomes, True, KVSample(1000, 4000, 50, "4/4"))
    assert found["ttft_p50_s"] == 2.0 and found["ttft_p95_s"] == pytest.approx(2.0)
    assert found["itl_p50_s"] == 1.0 and found["itl_p99_s"] == pytest.approx(np.percentile([1, 1, 2, 1], 99))
    assert found["stream_tokens_per_s"] == 1.0, "of rates 1, 1/2 and 1"
    assert found["steady_tokens_per_s"] == 5 / 4, "1, 2, 3, 2.5 and 4.5 are from 0.5 to 4.5 s"
    assert found["tokens_per_s"] == 7 / 6 and found["requests_per_s"] == 3 / 6
    assert (found["kv_peak_bytes"], found["kv_peak_bytes_per_token"], found["kv_peak_ratio"]) == (1000, 20, 4)


def test_failures_are_counted_and_take_no_part() -> None:
    good = [outcome(0, 0.0, [1.0, 2.0])]
    failed = [outcome(1, 0.0, [0.1, 0.2, 0.3], error="HTTP 503"), outcome(1, 0.3, [0.4, 2.0], error="timeout")]
    assert figures(good, True, None) == figures(good + failed, True, None)
    counts = count(good + failed)
    assert (counts.requests, counts.failed, dict(counts.errors)) == (3, 2, {"HTTP 503": 1, "timeout": 1})
    assert (counts.answer_tokens, counts.ended_early, counts.prompt_tokens, counts.cached_tokens) == (2, 1, 11, 3)


def test_time_spent_on_failures_counts() -> None:
    """A server that fails slowly is slow: what it did not deliver in that time is not hidden."""
    good, late = outcome(0, 0.0, [1.0, 2.0]), outcome(1, 0.0, [], error="timeout")
    late.ended_s = 10.0
    assert figures([good, late], True, None)["tokens_per_s"] == pytest.approx(0.2)


def test_nothing_has_no_figures() -> None:
    assert figures([], True, None) == {} and count([]).requests == 0
    assert figures([outcome(0, 0.0, [], error="timeout")], True, None) == {}
    assert percentile([], 50) is None


def test_usage_wins_over_pieces() -> None:
    """Six tokens in three pieces: the rate is of tokens, and each piece brings two."""
    one = outcome(0, 0.0, [1.0, 2.0, 3.0], tokens=6)
    assert stream_rate(one) == 5 / 2
    assert tokens_between([one], 1.5, 3.0) == 4.0
    assert stream_rate(outcome(0, 0.0, [1.0])) is None and stream_rate(outcome(0, 0.0, [1.0, 1.0])) is None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), FLOATS, st.lists(FLOATS, max_size=5), st.integers(0, 50)), max_size=8))
def test_the_steady_window_lies_within_every_stream(rows: list[tuple[int, float, list[float], int]]) -> None:
    outcomes = [outcome(s, at, sorted(at + x for x in chunks), tokens) for s, at, chunks, tokens in rows]
    if window := steady_window(outcomes):
        assert window[0] < window[1]
        for stream in {o.stream for o in outcomes}:
            own = [o for o in outcomes if o.stream == stream]
            assert min(o.sent_s for o in own) <= window[0] and max(o.ended_s for o in own) >= window[1]
    everything = sum(o.num_tokens for o in outcomes if o.chunk_s)
    assert tokens_between(outcomes, 0.0, float("inf")) == pytest.approx(everything)
    assert tokens_between(outcomes, *(window or (0.0, 1.0))) <= everything + 1e-6


@settings(deadline=None, max_examples=50)
@given(st.lists(FLOATS, min_size=1, max_size=50))
def test_percentiles_are_ordered_and_within(values: list[float]) -> None:
    found = [percentile(values, p) for p in (0, 50, 95, 99, 100)]
    ordered = [value for value in found if value is not None]
    assert len(ordered) == 5
    assert ordered[0] == min(values) and ordered[-1] == max(values)
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(ordered))
    assert ordered[1] == pytest.approx(statistics.median(values))


def test_medians_and_ratios_leave_out_what_is_missing() -> None:
    rounds = [{"ttft_p50_s": 1.0, "tokens_per_s": 4.0}, {"ttft_p50_s": 3.0}, {"ttft_p50_s": 2.0, "tokens_per_s": 8.0}]
    assert medians(rounds) == {"ttft_p50_s": 2.0, "tokens_per_s": 6.0}
    assert ratios({"a": 3.0, "b": 1.0, "c": 2.0}, {"a": 1.5, "b": 0.0}) == {"a": 2.0}
