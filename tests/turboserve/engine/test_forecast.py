"""What is told before a model is loaded: tokens, formats, what is suggested, and what is refused with which figures."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from turboquant_kv.codec.format import SUPPORTED_HEAD_DIMS, KVFormat
from turboserve.engine.forecast import MIN_TOKENS, Geometry, expanded_bytes, forecast, geometry, too_small
from turboserve.engine.model_folder import EMBEDDED_DIR
from turboserve.engine.weight_files import read_shapes
from turboserve.errors import StartupError
from turboserve.machine_memory import MemoryInfo

GIB = 1 << 30


def random_config(rng: np.random.Generator) -> dict[str, int | str]:
    heads = int(rng.choice([2, 4, 8]))
    return {
        "model_type": "llama",
        "num_hidden_layers": int(rng.integers(1, 60)),
        "num_attention_heads": heads * int(rng.integers(1, 6)),
        "num_key_value_heads": heads,
        "head_dim": int(rng.choice([d for d in SUPPORTED_HEAD_DIMS if d >= 64])),
        "hidden_size": 4096,
    }


def test_tokens_are_those_that_a_conversation_of_that_length_takes(rng: np.random.Generator) -> None:
    """But for what a page that is exact still takes in place of compressed tokens."""
    found = geometry(random_config(rng))
    assert found is not None
    budget_bytes = int(rng.integers(1 << 28, 1 << 34))
    for fmt in (KVFormat.parse("4t/3t"), KVFormat.parse("4/4"), KVFormat.parse("2t/2t")):

        def taken(num_tokens: int, fmt: KVFormat = fmt) -> int:
            pages = fmt.num_pages(num_tokens) * fmt.page_bytes(found.num_kv_heads, found.head_dim, found.head_dim)
            raw = 2 * 2 * found.num_kv_heads * found.head_dim  # float16
            return found.num_layers * (pages + fmt.exact_rows(num_tokens) * raw)

        tokens = found.tokens(fmt, 2, budget_bytes)
        slack = fmt.page_tokens * (2 + found.token_bytes(None, 2) // found.token_bytes(fmt, 2))
        assert taken(tokens - slack) <= budget_bytes < taken(tokens + slack)
    assert found.tokens(None, 2, budget_bytes) == budget_bytes // found.token_bytes(None, 2)


def test_what_fits_is_told_with_a_smaller_format_where_it_would_help(rng: np.random.Generator) -> None:
    config = {**random_config(rng), "head_dim": 128}
    memory = MemoryInfo(total_bytes=64 * GIB, available_bytes=60 * GIB)
    budget_bytes = 4000 * (layers := geometry(config)).token_bytes(None, 2)  # type: ignore[union-attr]
    assert layers is not None
    told = forecast(config, 3 * GIB, False, memory, str(budget_bytes), "f16", max_context=32768)
    told.check()
    text = "\n".join(told.lines())
    assert "3,072 MiB" in text and "about 4,000 tokens as f16" in text
    ratio = re.search(r"--kv-format balanced holds (\d+\.\d)x the tokens of f16, 2 bytes a number", text)
    own = layers.tokens(KVFormat.parse("4t/3t"), 2, budget_bytes)
    assert ratio and float(ratio[1]) == pytest.approx(own / 4000, abs=0.06)
    roomy = forecast(config, 3 * GIB, False, memory, str(budget_bytes), "f16", max_context=999)
    assert "--kv-format" not in "\n".join(roomy.lines())
    smallest = forecast(config, 3 * GIB, False, memory, str(budget_bytes), "2t/2t", max_context=1 << 20)
    assert "--kv-format" not in "\n".join(smallest.lines()), "there is no smaller one"


def test_what_cannot_fit_is_refused_with_the_figures(rng: np.random.Generator) -> None:
    config = random_config(rng)
    layers = geometry(config)
    assert layers is not None
    memory = MemoryInfo(total_bytes=8 * GIB, available_bytes=7 * GIB)
    few = int(rng.integers(0, 64))
    little = forecast(config, GIB, False, memory, str(1 + few * layers.token_bytes(None, 2)), "4/4", 4096)
    with pytest.raises(StartupError, match=rf"holds {few} tokens .* {MIN_TOKENS} .*--kv-budget to \d+MiB"):
        little.check()
    greedy = forecast(config, GIB, False, memory, "7GiB", "4/4", 4096)
    assert "1,024 MiB more than is free: lower --kv-budget" in "\n".join(greedy.lines())
    with pytest.raises(StartupError, match=r"7,168 MiB available, of which weights take 6,656 MiB and 819 MiB stay"):
        forecast(config, 13 * GIB // 2, False, memory, "auto", "4/4", 4096)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Geometry(12, 2, 64)),
        ({"num_key_value_heads": None}, Geometry(12, 8, 64)),
        ({"head_dim": None}, Geometry(12, 2, 96)),
        ({"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 4}, Geometry(4, 2, 64)),
        ({"layer_types": ["sliding_attention"] * 12}, Geometry(12, 2, 64)),
        ({"kv_lora_rank": 512}, None),
        ({"model_type": "falcon_mamba"}, None),
        ({"num_hidden_layers": None}, None),
        ({"num_key_value_heads": [2, 4, 8]}, None),
    ],
)
def test_geometry_is_read_or_left_open(changes: dict[str, object], expected: Geometry | None) -> None:
    base = {"model_type": "qwen2", "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = {**base, "head_dim": 64, "hidden_size": 768, **changes}
    assert geometry(config) == expected
    nested = {"model_type": config["model_type"], "text_config": {k: v for k, v in config.items() if k != "model_type"}}
    assert geometry(nested) == expected, "also in the text part of a multimodal model"
    told = forecast(config, GIB, False, MemoryInfo(9 * GIB, 8 * GIB), "1GiB", "4/4", 4096)
    told.check()
    assert ("tokens as" in "\n".join(told.lines())) == (expected is not None)


def test_weights_in_float32_are_told_by_their_headers() -> None:
    """The embedded model's are stored in 8 bits with scales and biases; see test_loading for what they become."""
    config = json.loads((EMBEDDED_DIR / "config.json").read_text())
    shapes = read_shapes(EMBEDDED_DIR)
    layers, hidden, inner, vocab = 8, config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    projections = hidden * (2 * hidden + 2 * hidden // 2) + 3 * hidden * inner
    assert expanded_bytes(config, shapes) == pytest.approx(4 * (layers * projections + vocab * hidden), rel=0.01)


def test_a_budget_without_a_unit_is_named_as_it_was_understood() -> None:
    assert "A KV budget of 2 bytes holds 0 tokens" in too_small(2, 0, 4 << 20, "4/3")
    assert "A KV budget of 1.5 MiB holds 9 tokens" in too_small(3 << 19, 9, 4 << 20, "4/3")
