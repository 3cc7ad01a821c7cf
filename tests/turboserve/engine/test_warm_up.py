"""Before a server is ready its model has done what requests will ask of it, and nothing of that is left."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
import pytest
from tests.turboserve.engine.fakes import MAX_CONTEXT, VOCAB, make_parts

from turboquant_kv.codec.format import KVFormat
from turboserve.engine.runner import Runner
from turboserve.engine.sampling import Draws
from turboserve.engine.speculation import Speculation
from turboserve.engine.speculation_lookup import LookupDrafter
from turboserve.engine.warm_up import DRAWS, Plan, warm_up
from turboserve.messages import SamplingParams

PLAN = Plan(chunks=(100, 37), row_counts=(2, 4, 5), num_tokens=2)


class Watched:
    """A model that remembers what it was fed: (rows, tokens) of each step."""

    def __init__(self, model: Any, fails_at: int | None = None) -> None:
        self._model, self._fails_at = model, fails_at
        self.fed: list[tuple[int, int]] = []

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        self.fed.append((tokens.shape[0], tokens.shape[1]))
        if len(self.fed) == self._fails_at:
            raise RuntimeError("out of memory")
        out: mx.array = self._model(tokens, cache=cache)
        return out


@pytest.mark.parametrize("with_guesses", [False, True])
@pytest.mark.parametrize("fmt", [None, KVFormat.parse("4t/3t")])
def test_everything_that_requests_bring_is_done_once(
    model: Any, fmt: KVFormat | None, with_guesses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, watched = make_parts(model, fmt=fmt), Watched(model)
    runner = Runner(watched, parts.runtime)
    runner.speculation = Speculation(LookupDrafter(), 7) if with_guesses else None
    masks, ask = [], runner._sample

    def noted(logits: mx.array, masks_of_step: Any = None) -> Draws:
        draws = ask(logits, masks_of_step)
        masks.append((masks_of_step is not None, draws.logprobs is not None))
        return draws

    monkeypatch.setattr(runner, "_sample", noted)
    plan = replace(PLAN, with_guesses=True)  # where none are made, none are tried
    seconds, graphs = warm_up(runner, parts, VOCAB, plan)
    assert str(graphs) == "built anew in every step (as set)"
    assert (True, True) in masks and (False, False) in masks
    decoded = [(1, 1)] * (2 * len(DRAWS) + 1) + [(rows, 1) for rows in PLAN.row_counts for _ in range(2)]
    guessed = [(PLAN.row_counts[-1], n) for n in range(2, 9)] if with_guesses else []
    assert watched.fed == [(1, 100), (1, 37), *decoded, *guessed]
    assert seconds > 0 and runner.num_rows == 0
    family = parts.memory.family
    assert (family.allocated_bytes(), family.totals().total, family.slack_bytes()) == (0, 0, 0)
    parts.memory.check_integrity([])
    held = parts.memory.holdings(0.0)
    assert not held.conversations and held.kv.total == 0


def test_graphs_are_tried_wherever_the_rows_stand_in_their_pages(model: Any) -> None:
    """With 64 rows the last ones stood eight tokens before a page's end, and no server of so many kept its graphs."""
    for last_chunk in range(1, 97, 5):
        parts = make_parts(model, fmt=KVFormat.parse("4t/3t"))
        plan = replace(PLAN, chunks=(100, last_chunk))
        _, graphs = warm_up(Runner(Watched(model), parts.runtime), parts, VOCAB, plan, "on")
        assert graphs.reason == "this model's steps cannot be described by arrays alone", last_chunk
        assert parts.memory.family.allocated_bytes() == 0


@pytest.mark.parametrize("fails_at", [1, 2, 4, 13])
def test_a_failure_is_told_and_leaves_nothing(model: Any, fails_at: int, caplog: pytest.LogCaptureFixture) -> None:
    parts = make_parts(model, fmt=KVFormat.parse("4t/3t"))
    runner = Runner(Watched(model, fails_at), parts.runtime)
    with caplog.at_level(logging.WARNING):
        warm_up(runner, parts, VOCAB, PLAN)
    assert "out of memory" in caplog.text
    assert runner.num_rows == 0 and parts.memory.family.allocated_bytes() == 0


def test_a_gpu_is_given_the_chunks_and_rows_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = Plan.for_device(128, 12, MAX_CONTEXT)
    assert sum(on_cpu.chunks) < 30 and on_cpu.row_counts == (2,)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert Plan.for_device(128, 12, 1 << 15) == Plan((128, 128, 37), (2, 4, 8, 12), 2, with_guesses=True)
    assert Plan.for_device(128, 12, 200).chunks == (128, 37)  # no longer than the model's context
    assert Plan.for_device(128, 1, 1 << 15).row_counts == ()


def test_each_field_of_sampling_is_among_the_ways_of_drawing() -> None:
    """On a GPU the first request with another one would wait for its operations to be compiled."""
    usual = SamplingParams()
    for field in fields(SamplingParams):
        if field.name != "seed":
            assert any(getattr(draw, field.name) != getattr(usual, field.name) for draw in DRAWS), field.name
