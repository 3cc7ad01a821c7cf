"""What is learnt of a model's rotation, against the module itself at positions that were not tried."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from turboquant_kv.cache.rope_probe import learn_rotary, rotary_of

nn: Any = mlx.nn  # whose stubs say too little

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "mscale": 0.707}
LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 32,
    "long_factor": list(np.linspace(1, 40, 32)),
}


@pytest.mark.parametrize(
    ("rope", "dim"),
    [
        (nn.RoPE(64), 64),
        (nn.RoPE(128, traditional=True, base=1e6), 128),
        (nn.RoPE(32), 80),  # partial
        (nn.RoPE(32, traditional=True), 80),
        (nn.RoPE(64, scale=0.25), 64),  # linear
        (initialize_rope(128, 5e5, False, LLAMA3, 131072), 128),
        (initialize_rope(128, 1e6, False, YARN, 131072), 128),
        (initialize_rope(64, 1e4, False, LONG, 131072), 64),
        (initialize_rope(64, 1e4, False, {"rope_type": "proportional", "partial_rotary_factor": 0.5}), 64),
    ],
)
def test_keys_are_turned_as_the_module_turns_them(rope: Any, dim: int, rng: np.random.Generator) -> None:
    rotary = rotary_of(rope, dim)
    assert rotary is not None
    x = rng.standard_normal((1, 2, 1, dim)).astype(np.float32)
    for position in (5, int(rng.integers(10, 5000)), int(rng.integers(20000, 32768))):
        want = np.array(rope(mx.array(x), offset=position), np.float64)
        got = rotary.turned(x, np.full((1, 2, 1), position))
        assert np.abs(got - want).max() < 2e-2 * rotary.amplitude
        np.testing.assert_allclose(rotary.turned_back(got, np.full((1, 2, 1), position)), x, atol=1e-6)


@pytest.mark.parametrize(
    "rope",
    [
        initialize_rope(64, 1e4, False, {"rope_type": "dynamic", "factor": 4.0}, 2048),  # its base grows with length
        nn.Identity(),
        nn.Linear(64, 64),
    ],
)
def test_what_is_no_turn_by_position_is_not_learnt(rope: Any) -> None:
    assert rotary_of(rope, 64) is None


def test_layers_with_equal_modules_share_one_rotation() -> None:
    class Layer(nn.Module):  # type: ignore[misc]
        def __init__(self, base: float) -> None:
            super().__init__()
            self.rope = nn.RoPE(64, base=base)

    class Model(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Layer(1e4), Layer(1e4), Layer(1e6), nn.Linear(2, 2)]

    found = learn_rotary(Model(), {0: 64, 1: 64, 2: 64, 3: 64, 4: 64})
    assert sorted(found) == [0, 1, 2]
    assert found[0] is found[1]
    assert found[0] is not found[2]
