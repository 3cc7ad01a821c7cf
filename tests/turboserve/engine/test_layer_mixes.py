"""Models whose layers keep different kinds of cache, through the whole step loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboserve.engine.fakes import GREEDY, VOCAB, add, make_loop, make_parts, request, run, text_of
from tests.turboserve.engine.ties import BATCH_TIE, RECOMPUTED_TIE, assert_same_answer

from turboquant_kv.codec.format import KVFormat

FORMATS = [None, KVFormat(4, 4, page_tokens=16, sink_tokens=8)]
FINE = KVFormat(8, 8, page_tokens=16, sink_tokens=8)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", ["sliding", "recurrent", "with_sinks"])
def test_mixed_layers_batch_like_alone_and_are_shown(kind: str, fmt: Any, rng: np.random.Generator) -> None:
    parts = make_parts(small_models.EVERY_KIND[kind](), fmt=fmt)
    prompts = [text_of([int(t) for t in rng.integers(0, VOCAB, n)]) for n in (5, 40, 90)]
    requests = [
        request(str(i), text, max_tokens=n, sampling=GREEDY)
        for i, (text, n) in enumerate(zip(prompts, (12, 4, 20), strict=True))
    ]
    loop = make_loop(parts)
    together = [sink.tokens for sink in run(loop, *requests)]
    stats = loop.snapshot()
    if fmt is not None:
        assert stats.layers_compressed >= 1
    is_compressed_throughout = fmt is not None and kind != "recurrent"
    assert (stats.layers_uncompressed == 0) == is_compressed_throughout
    assert (stats.kv.uncompressed == 0) == is_compressed_throughout
    assert stats.kv.total == sum(c.kv.uncompressed for c in stats.conversations) + parts.runtime.allocated_bytes()
    alone = [run(make_loop(parts), one)[0].tokens for one in requests]
    # Rounding in a batch may decide a code, which shows where a window holds 24 tokens: by 2.4e-2 in 240 steps.
    tie = RECOMPUTED_TIE if kind in ("sliding", "with_sinks") and fmt is not None else BATCH_TIE
    for text, a, b in zip(prompts, together, alone, strict=True):
        assert_same_answer(parts, text, a, b, tie)
    assert [len(t) for t in together] == [12, 4, 20]
    parts.memory.check_integrity()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("num_rows", [2, 3])
def test_capped_scores_batch_like_alone(num_rows: int, fmt: Any, rng: np.random.Generator) -> None:
    """Two rows are as many as KV heads, where mlx-lm's own batch of Gemma 2 mixes rows up; three raise there."""
    parts = make_parts(small_models.capped(int(rng.integers(99))), fmt=fmt)
    prompts = [text_of([int(t) for t in rng.integers(0, VOCAB, n)]) for n in (5, 40, 90)[:num_rows]]
    requests = [request(str(i), text, max_tokens=20, sampling=GREEDY) for i, text in enumerate(prompts)]
    loop = make_loop(parts)
    together = [sink.tokens for sink in run(loop, *requests)]
    assert loop.snapshot().layers_uncompressed == (2 if fmt is None else 0)
    alone = [run(make_loop(parts), one)[0].tokens for one in requests]
    for text, a, b in zip(prompts, together, alone, strict=True):
        assert_same_answer(parts, text, a, b)
    parts.memory.check_integrity()


@pytest.mark.parametrize("kind", ["sliding", "recurrent"])
def test_a_conversation_over_mixed_layers_is_found_again(kind: str, rng: np.random.Generator) -> None:
    """At its end; a window that has forgotten nothing yet lets it branch as well, recurrent state never does."""
    # Of four bits, what prefill computes exactly and decoding over codes differs by more than a tie in 24 tokens.
    parts = make_parts(small_models.EVERY_KIND[kind](), fmt=FINE)
    loop = make_loop(parts)
    opening = text_of([int(t) for t in rng.integers(0, VOCAB, 60)])
    first = run(loop, request("1", opening, max_tokens=6))[0]
    follow_up = opening + first.text + text_of([int(t) for t in rng.integers(0, VOCAB, 20)])
    second = run(loop, request("2", follow_up, max_tokens=6))[0]
    assert second.finished.usage.cached_tokens > 60
    cold = make_parts(small_models.EVERY_KIND[kind](), fmt=FINE)
    fresh = run(make_loop(cold), request("3", follow_up, max_tokens=6))[0]
    assert_same_answer(parts, follow_up, second.tokens, fresh.tokens, RECOMPUTED_TIE)
    other_way = opening + text_of([1, 2, 3])
    branch = run(loop, request("4", other_way, max_tokens=2))[0]
    assert branch.finished.usage.cached_tokens == (56 if kind == "sliding" else 0)
    again = run(make_loop(cold), request("5", other_way, max_tokens=2))[0]
    assert_same_answer(parts, other_way, branch.tokens, again.tokens, RECOMPUTED_TIE)
    loop.check_integrity()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", ["sliding", "recurrent", "with_sinks"])
def test_reservations_cover_rings_and_states(kind: str, fmt: Any, rng: np.random.Generator) -> None:
    parts = make_parts(small_models.EVERY_KIND[kind](), fmt=fmt)
    loop = make_loop(parts)
    one_chunk = loop.scratch_bytes  # a ring keeps a chunk of a prompt until the step after it
    for i, length in enumerate((1, 30, 90, 130)):
        text = text_of([int(t) for t in rng.integers(0, VOCAB, length)])
        add(loop, request(str(i), text, max_tokens=40, tenant=str(i), sampling=GREEDY))
    while loop.has_work:
        loop.step()
        for generation in loop.requests.running:
            assert generation.lease is not None
            assert loop.runner.measure(generation).total <= generation.lease.reserved_bytes + one_chunk
        loop.check_integrity()
