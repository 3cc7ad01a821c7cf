"""What the kernel that draws tokens refuses, and that it keeps to its arrays; what it draws, the server's tests say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from turboquant_kv.backends.native.backend import load_kernels

kernels, _ = load_kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="the native kernels are not built")
LEVELS: list[str] = [] if kernels is None else kernels.isa_levels()


@pytest.mark.parametrize("isa", LEVELS)
def test_tokens_are_among_the_possible_ones(isa: str, rng: np.random.Generator) -> None:
    """Also without any search steps up and down, of which only top-p's own threshold is then left."""
    assert kernels is not None
    for vocab_len in (1, 2, 15, 16, 17, 64, 1000):
        num_rows = 12
        logits = rng.standard_normal((num_rows, vocab_len)).astype(np.float32)
        possible = rng.random(logits.shape) < 0.5
        possible[:, 0] = True
        logits[~possible] = -np.inf
        tokens, is_broken = np.full(num_rows, 1 << 31, np.uint32), np.ones(num_rows, np.bool_)
        kernels.draw(
            logits,
            rng.integers(0, 1 << 32, num_rows).astype(np.uint32),
            rng.choice([0.0, 1.44, 1e7], num_rows).astype(np.float32),
            rng.choice([-np.inf, -3, 0], num_rows).astype(np.float32),
            rng.choice([1.0, 0.5, 0.0], num_rows).astype(np.float32),
            rng.choice([0, 1, vocab_len], num_rows).astype(np.int32),
            np.ones(15, np.float32),
            tokens,
            is_broken,
            isa,
        )
        assert not is_broken.any() and (tokens < vocab_len).all()
        assert possible[np.arange(num_rows), tokens].all()


def test_what_the_kernels_do_not_take_is_refused() -> None:
    assert kernels is not None
    good: dict[str, Any] = {
        "logits": np.zeros((2, 5), np.float32),
        "numbers": np.zeros(2, np.uint32),
        "octaves": np.ones(2, np.float32),
        "log2_min_p": np.full(2, -np.inf, np.float32),
        "top_p": np.ones(2, np.float32),
        "top_k": np.zeros(2, np.int32),
        "steps": np.ones(15, np.float32),
        "tokens": np.zeros(2, np.uint32),
        "is_broken": np.zeros(2, np.bool_),
        "isa": "",
    }
    kernels.draw(**good)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"logits": np.zeros((2, 5), np.float16)}, "type"),
        ({"logits": np.zeros((2, 0), np.float32)}, "out of range"),
        ({"logits": np.zeros((2, 10), np.float32)[:, ::2]}, "contiguous"),
        ({"numbers": np.zeros(3, np.uint32)}, "along axis 0"),
        ({"octaves": np.array([1, np.nan], np.float32)}, "octaves"),
        ({"octaves": np.array([1, np.inf], np.float32)}, "octaves"),
        ({"log2_min_p": np.array([0, 1], np.float32)}, "log2_min_p"),
        ({"top_p": np.array([1, 1.5], np.float32)}, "top_p"),
        ({"top_p": np.array([1, np.nan], np.float32)}, "top_p"),
        ({"top_k": np.array([6, 0], np.int32)}, "top_k"),
        ({"top_k": np.array([-1, 0], np.int32)}, "top_k"),
        ({"steps": np.ones(14, np.float32)}, "along axis 0"),
        ({"tokens": np.zeros(1, np.uint32)}, "along axis 0"),
        ({"is_broken": np.zeros(2, np.uint8)}, "type"),
        ({"isa": "none such"}, "none such"),
    ]
    for change, said in bad:
        with pytest.raises(ValueError, match=said):
            kernels.draw(**{**good, **change})
