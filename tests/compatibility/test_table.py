"""The committed table against what a sample of model types becomes now, and whether faults would be seen."""

from __future__ import annotations

import mlx.core as mx
import pytest
from tests.compatibility.configs import config_of, model_types
from tests.compatibility.outcome import SAME, Answer, WatchedModel, differ
from tests.compatibility.table import TABLE, row, rows_in, try_all

# One of each kind of cache and each kind of line.
SAMPLE = (
    "afm7",
    "deepseek_v3",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "gpt_bigcode",
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
