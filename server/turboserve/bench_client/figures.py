"""From outcomes to figures: percentiles, rates, counts of what failed; medians over rounds and ratios of servers. Pure.

Times and rates are of requests that succeeded; those that failed are counted, by kind, and take part in nothing else.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from turboserve.bench_client.asking import Outcome
from turboserve.bench_client.kv_watch import KVSample

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure's key in the JSON, its name in the table, and what a shown unit is worth."""

    key: str
    label: str
    unit: str
    scale: float = 1.0


METRICS = (
    *(Metric(f"ttft_p{p}_s", f"time to first token, p{p}", "ms", 1e3) for p in PERCENTILES),
    *(Metric(f"itl_p{p}_s", f"inter-token latency, p{p}", "ms", 1e3) for p in PERCENTILES),
    Metric("stream_tokens_per_s", "tokens/s of one stream, median", "1/s"),
    Metric("steady_tokens_per_s", "tokens/s of all, while all streams run", "1/s"),
    Metric("tokens_per_s", "tokens/s of all, over everything", "1/s"),
    Metric("requests_per_s", "requests/s", "1/s"),
    Metric("kv_peak_bytes", "KV memory, peak", "MiB", 1 / (1 << 20)),
    Metric("kv_peak_bytes_per_token", "KV bytes per token at that time", "B"),
    Metric("kv_peak_ratio", "uncompressed (model's dtype) over KV memory", "x"),
)


@dataclass(frozen=True, slots=True)
class Counts:
    """Sums over requests. `errors` is by kind; `examples` has one message of each kind."""

    requests: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)
    ended_early: int = 0  # with fewer tokens than asked for
    empty: int = 0  # succeeded without any text; they have no TTFT
    without_usage: int = 0
    answer_tokens: int = 0
    chunks: int = 0
    asked_prompt_tokens: int = 0  # where the server counted, and what it counted
    prompt_tokens: int = 0
    cached_tokens: int = 0
    shortest_prompt: int | None = None
    longest_prompt: int | None = None

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear between neighbours, as NumPy's default; None of nothing."""
    return float(np.percentile(values, percent)) if values else None


def gaps(outcome: Outcome) -> list[float]:
    """Seconds between the pieces of text of one answer."""
    return [b - a for a, b in itertools.pairwise(outcome.chunk_s)]


def stream_rate(outcome: Outcome) -> float | None:
    """Tokens a second after the first; None for answers of fewer than two pieces."""
    if len(outcome.chunk_s) < 2 or outcome.num_tokens < 2 or outcome.chunk_s[-1] <= outcome.chunk_s[0]:
        return None
    return (outcome.num_tokens - 1) / (outcome.chunk_s[-1] - outcome.chunk_s[0])


def steady_window(outcomes: Iterable[Outcome]) -> tuple[float, float] | None:
    """From when the last stream began to when the first one had no more to do; None when that is no time at all."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for outcome in outcomes:
        first[outcome.stream] = min(first.get(outcome.stream, outcome.sent_s), outcome.sent_s)
        last[outcome.stream] = max(last.get(outcome.stream, 0.0), outcome.ended_s)
    if not first or max(first.values()) >= min(last.values()):
        return None
    return max(first.values()), min(last.values())


def tokens_between(outcomes: Iterable[Outcome], start_s: float, end_s: float) -> float:
    """Tokens that arrived in a time; an answer's tokens are shared evenly among its pieces of text."""
    total = 0.0
    for outcome in outcomes:
        if outcome.chunk_s:
            inside = sum(start_s <= at <= end_s for at in outcome.chunk_s)
            total += inside * outcome.num_tokens / len(outcome.chunk_s)
    return total


def figures(outcomes: Sequence[Outcome], has_streams: bool, kv_peak: KVSample | None) -> dict[str, float]:
    """By the keys of METRICS; what cannot be said is left out. `has_streams`: clients took turns, at no fixed rate."""
    good = [outcome for outcome in outcomes if not outcome.error]
    ttfts = [outcome.chunk_s[0] - outcome.sent_s for outcome in good if outcome.chunk_s]
    itls = [gap for outcome in good for gap in gaps(outcome)]
    found: dict[str, float | None] = {}
    for percent in PERCENTILES:
        found[f"ttft_p{percent}_s"] = percentile(ttfts, percent)
        found[f"itl_p{percent}_s"] = percentile(itls, percent)
    found["stream_tokens_per_s"] = percentile([rate for o in good if (rate := stream_rate(o)) is not None], 50)
    if has_streams and good and (window := steady_window(outcomes)):
        found["steady_tokens_per_s"] = tokens_between(good, *window) / (window[1] - window[0])
    if good:
        lasted_s = max(outcome.ended_s for outcome in outcomes) - min(outcome.sent_s for outcome in outcomes)
        found["tokens_per_s"] = sum(outcome.num_tokens for outcome in good) / lasted_s
        found["requests_per_s"] = len(good) / lasted_s
    if kv_peak is not None and kv_peak.num_bytes:
        found["kv_peak_bytes"] = kv_peak.num_bytes
        found["kv_peak_bytes_per_token"] = kv_peak.num_bytes / kv_peak.num_tokens if kv_peak.num_tokens else None
        found["kv_peak_ratio"] = kv_peak.raw_bytes / kv_peak.num_bytes
    return {key: float(value) for key, value in found.items() if value is not None}


def count(outcomes: Sequence[Outcome]) -> Counts:
    """Sums over all of them, and over those that succeeded for what is said of answers."""
    failed = [outcome for outcome in outcomes if outcome.error]
    good = [outcome for outcome in outcomes if not outcome.error]
    counted = [(o.asked_prompt_tokens, o.prompt_tokens) for o in good if o.prompt_tokens is not None]
    prompts = [tokens for _, tokens in counted]
    return Counts(
        requests=len(outcomes),
        errors=dict(Counter(outcome.error for outcome in failed).most_common()),
        examples={outcome.error: outcome.detail for outcome in reversed(failed)},
        ended_early=sum(outcome.num_tokens < outcome.asked_answer_tokens for outcome in good),
        empty=sum(not outcome.chunk_s for outcome in good),
        without_usage=sum(outcome.completion_tokens is None for outcome in good),
        answer_tokens=sum(outcome.num_tokens for outcome in good),
        chunks=sum(len(outcome.chunk_s) for outcome in good),
        asked_prompt_tokens=sum(asked for asked, _ in counted),
        prompt_tokens=sum(prompts),
        cached_tokens=sum(outcome.cached_tokens or 0 for outcome in good),
        shortest_prompt=min(prompts, default=None),
        longest_prompt=max(prompts, default=None),
    )


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure, over the rounds that have it."""
    keys = [metric.key for metric in METRICS if any(metric.key in one for one in rounds)]
    return {key: statistics.median(one[key] for one in rounds if key in one) for key in keys}


def ratios(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """First over second, of every figure that both have."""
    return {key: value / second[key] for key, value in first.items() if second.get(key)}
