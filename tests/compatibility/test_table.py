"""The committed table against what a sample of model types becomes now, and whether faults would be seen."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from tests.compatibility.configs import config_of, model_types
from tests.compatibility.outcome import CRASHED, SAME, Answer, WatchedModel, differ, far_from
from tests.compatibility.table import TABLE, Worker, row, rows_in, try_all

# One of each kind of cache and each kind of line, but those that crash or are not tried.
SAMPLE = (
    "afm7",
    "deepseek_v3",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "gpt_bigcode",
    "lfm2",
    "llama",
    "mamba",
    "olmo",
)


def test_every_model_type_has_a_line_and_a_configuration() -> None:
    """A new mlx-lm may bring a new type: name what its configuration needs in configs.py, and make the table again."""
    types = model_types()
    assert sorted(rows_in(TABLE.read_text("utf-8"))) == types
    for name in types:
        if name != "prism_hadamard_qwen35":
            config_of(name)


def test_the_table_is_true_for_a_sample(seed: int) -> None:
    committed = rows_in(TABLE.read_text("utf-8"))
    found = {outcome.model_type: row(outcome) for outcome in try_all(SAMPLE, seed)}
    assert found == {name: committed[name] for name in SAMPLE}


def test_other_answers_would_be_noticed() -> None:
    want = Answer([5, 6, 7], [-1.0, -2.0, -3.0], [0.5, SAME / 2, 0.5])
    assert differ(want, want) == ""
    assert differ(Answer([5, 9, 1], want.logprobs, want.leads), want) == "", "a tie, and another text behind it"
    for other in (
        Answer([4, 6, 7], want.logprobs, want.leads),
        Answer([5, 6], want.logprobs[:2], want.leads[:2]),
        Answer(want.tokens, [-1.0, -2.0, -3.0 - 2 * SAME], want.leads),
        Answer(want.tokens, [-1.0, float("nan"), -3.0], want.leads),
    ):
        assert differ(other, want)


def test_compressed_answers_are_held_to_the_likelihood_of_their_own_tokens(rng: np.random.Generator) -> None:
    """A wrong cache finds its own favourites as likely as mlx-lm finds others."""
    spread = float(rng.uniform(0.1, 3))
    best = np.full(5, -5.0)
    unlikely = best - spread * rng.uniform(2, 4, 5)
    noise = 0.3 * spread * rng.uniform(-1, 1, 5)
    tokens, leads = [1, 2, 3, 4, 5], [0.0] * 5
    assert far_from(Answer(tokens, list(best + noise), leads), best, unlikely) == ""
    assert far_from(Answer(tokens, list(best + noise), leads), unlikely, unlikely[::-1])
    assert far_from(Answer(tokens, [float("nan"), *best[1:]], leads), best, unlikely)


def test_an_end_is_told_as_it_was() -> None:
    """Not as the kill that makes sure of it: a process closes its pipes a while before it ends."""

    class Ending(Worker):
        def _start(self) -> subprocess.Popen[str]:
            program = "import os, sys, time; sys.stdin.readline(); os.close(1); time.sleep(0.3); os._exit(3)"
            pipe = subprocess.PIPE
            return subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True)

    outcome = Ending(0).outcome("llama")
    assert (outcome.kv, outcome.why) == (CRASHED, "the process ends by status 3")


def test_batches_that_fail_are_counted() -> None:
    def fails_together(tokens: mx.array) -> mx.array:
        if len(tokens) > 1:
            raise ValueError("one row at a time")
        return tokens

    model = WatchedModel(fails_together)
    model(mx.array([[1]]))
    model(mx.array([[1, 2], [3, 4]][:1]))
    with pytest.raises(ValueError, match="one row"):
        model(mx.array([[1], [2]]))
    assert (model.num_batched, model.num_failed) == (1, 1)
