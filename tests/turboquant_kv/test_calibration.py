"""Calibrated means: what they are, and that no damaged file is ever used."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tests.turboquant_kv import odd_models, small_models

from turboquant_kv.cache import calibration, key_guard
from turboquant_kv.cache.calibration import (
    CHECKED_TOKENS,
    Calibration,
    CalibrationFileError,
    calibrate,
    calibration_for,
)

nn: Any = mlx.nn  # whose stubs say too little
WEIGHTS = "0123abcd"


class ByteTokenizer:
    """Bytes as token ids, folded into the small models' vocabulary."""

    calls = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.calls += 1
        return [b % small_models.VOCAB for b in text.encode()]


def tokens(rng: np.random.Generator, n: int) -> list[int]:
    return [int(t) for t in rng.integers(0, small_models.VOCAB, n)]


def turn(means: Any) -> str:
    return "" if means.rotary is None else str(means.rotary.fingerprint())


def same(a: Calibration, b: Calibration) -> bool:
    return a.layers.keys() == b.layers.keys() and all(
        np.array_equal(a.layers[i].k, b.layers[i].k)
        and np.array_equal(a.layers[i].v, b.layers[i].v)
        and turn(a.layers[i]) == turn(b.layers[i])
        for i in a.layers
    )


def test_means_are_those_of_the_cache_after_the_first_tokens(rng: np.random.Generator) -> None:
    model, text = small_models.dense(), tokens(rng, 300)
    measured = calibrate(model, text)
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([text]), cache=caches))
    for i, cache in enumerate(caches):
        k, v = (np.array(x) for x in cache.keys_and_values())
        back = np.stack([turned_back(model, i, k[:, :, p : p + 1], p) for p in range(k.shape[2])], axis=2)
        first = calibration.SKIPPED_TOKENS
        np.testing.assert_allclose(measured.layers[i].k, back[0, :, first:].mean(axis=1), atol=1e-4)
        np.testing.assert_allclose(measured.layers[i].v, v[0, :, first:].mean(axis=1), atol=1e-4)


def turned_back(model: Any, layer: int, keys: Any, position: int) -> Any:
    """Keys (1, H, 1, D) before their turn, by the model's own module: its matrix at that position is orthogonal."""
    rope, dim = model.layers[layer].self_attn.rope, keys.shape[-1]
    matrix = np.array(rope(mx.eye(dim)[None, :, None], offset=position)).reshape(dim, dim)
    return (keys @ matrix.T)[:, :, 0]


def test_a_layer_that_does_not_use_its_rope_keeps_a_constant_mean(rng: np.random.Generator) -> None:
    model, text = small_models.dense(), tokens(rng, 300)
    attention = model.layers[1].self_attn
    attention.rope_of_old, attention.unused = attention.rope, nn.RoPE(attention.rope.dims)
    attention.rope = lambda x, offset=0: x
    measured = calibrate(model, text)
    assert measured.layers[0].rotary is not None
    assert measured.layers[1].rotary is None


class FarRope(nn.Module):  # type: ignore[misc]
    """Turns as another one does, and from position 4096 on adds what calibration has to see there; not understood."""

    def __init__(self, rope: Any, added: Any) -> None:
        super().__init__()
        self.whole, self.added = rope, added

    def __call__(self, x: Any, offset: int = 0) -> Any:
        turned = self.whole(x, offset=offset)
        return turned + self.added if offset >= 4096 else turned


def test_keys_are_looked_at_far_away_though_their_turn_is_not_understood(rng: np.random.Generator) -> None:
    model, text = small_models.dense(), tokens(rng, 300)
    for layer, length in zip(model.layers, (0.0, 3000.0), strict=True):
        direction = rng.standard_normal(layer.self_attn.rope.dims)
        layer.self_attn.q_proj.weight *= 3  # random models attend evenly: errors of keys would not show
        added = mx.array((length * direction / np.linalg.norm(direction)).astype(np.float32))
        layer.self_attn.rope = FarRope(layer.self_attn.rope, added)
    measured = calibrate(model, text)
    assert measured.origin.endswith("in 0 of 2 layers; keys measured from position 0, 8192 and 32768 on")
    assert measured.divergences[1]["4"] > 10 * measured.divergences[0]["4"]


@pytest.mark.parametrize("is_turned", [True, False])
def test_far_positions_cost_a_few_tokens_each(is_turned: bool, rng: np.random.Generator) -> None:
    """Where keys turn as they should, and where they do not turn at all; what is computed is what is read there."""
    model, text = small_models.dense(), tokens(rng, 300)
    if not is_turned:
        model.layers[1].self_attn.rope_of_old = model.layers[1].self_attn.rope  # it has one and leaves it
        model.layers[1].self_attn.rope = lambda x, offset=0: x
    counted = CountingModel(model)
    measured = calibrate(counted, text)
    assert counted.num_tokens == 300 + key_guard.NUM_TOKENS + 2 * CHECKED_TOKENS
    recorded = [key_guard.record(model, text, [0, 1], offset) for offset in key_guard.OFFSETS]
    expected = key_guard.measure(recorded, measured.layers)
    for i, by_codec in measured.divergences.items():
        assert by_codec == pytest.approx(expected[i], rel=0.05, abs=1e-6)


class CountingModel:
    """A model that counts the tokens it reads."""

    def __init__(self, model: Any) -> None:
        self.model, self.num_tokens = model, 0

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        self.num_tokens += x.size
        read: mx.array = self.model(x, cache=cache)
        return read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def test_queries_that_grow_with_their_position_are_those_of_the_model(rng: np.random.Generator) -> None:
    """Their keys turn as they should, so that keys alone say nothing of it."""
    model = odd_models.tempered()
    tokens, measured = rng.integers(0, 200, 300).tolist(), list[Any]()
    measure = key_guard.measure

    def noting(recorded: Any, means: Any) -> Any:
        measured.extend(recorded)
        return measure(recorded, means)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_guard, "measure", noting)
        found = calibration.calibrate(model, tokens)
    assert all(means.rotary is not None for means in found.layers.values())
    for offset, given in zip(key_guard.OFFSETS, measured, strict=True):
        wanted = key_guard.record(model, tokens, list(found.layers), offset)
        assert given.keys() == wanted.keys()
        for layer, one in wanted.items():
            assert np.linalg.norm(given[layer].queries - one.queries) < 0.01 * np.linalg.norm(one.queries), offset


def test_positions_where_keys_are_no_numbers_are_left_out_and_told(rng: np.random.Generator) -> None:
    model, text = small_models.dense(), tokens(rng, 300)
    attention = model.layers[1].self_attn
    plain, attention.rope = calibrate(model, text), FarRope(attention.rope, mx.array(np.nan))
    measured = calibrate(model, text)
    where = "keys measured from position 0 on, not from 8192 and 32768, where they are no numbers"
    assert measured.origin.endswith(where)
    assert set(measured.divergences) == {0, 1}
    assert all(np.isfinite(list(by_codec.values())).all() for by_codec in measured.divergences.values())
    assert plain.origin.endswith("in 2 of 2 layers; keys measured from position 0, 8192 and 32768 on")


def test_learned_positions_are_measured_where_they_are(rng: np.random.Generator) -> None:
    measured = calibrate(odd_models.absolute(), tokens(rng, 300))
    assert measured.origin.endswith("0 of 2 layers; keys measured from position 0 on, for no layer has a rope module")
    assert set(measured.divergences) == {0, 1}


def test_only_attention_layers_are_measured(rng: np.random.Generator) -> None:
    assert set(calibrate(small_models.sliding(), tokens(rng, 80)).layers) == {0, 1, 2}
    assert set(calibrate(small_models.recurrent(), tokens(rng, 80)).layers) == {1}


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 64 tokens"):
        calibrate(small_models.dense(), [1] * 64)


def test_it_is_measured_once_per_model(tmp_path: Path) -> None:
    model, tokenizer = small_models.dense(), ByteTokenizer()
    first = calibration_for(model, tokenizer, tmp_path, WEIGHTS)
    second = calibration_for(model, tokenizer, tmp_path, WEIGHTS)
    assert tokenizer.calls == 1
    assert same(first, second)
    calibration_for(model, tokenizer, tmp_path, "other weights")
    assert tokenizer.calls == 2


def _flip(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize("damage", [_flip, lambda d: d[:-9], lambda d: b"", lambda d: b"\xff" * len(d)])
def test_damaged_files_are_measured_again(damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = small_models.dense(), ByteTokenizer()
    first = calibration_for(model, tokenizer, tmp_path, WEIGHTS)
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CalibrationFileError):
        calibration.load(path, WEIGHTS)
    assert same(calibration_for(model, tokenizer, tmp_path, WEIGHTS), first)
    assert tokenizer.calls == 2
    assert "measured again" in caplog.text
    calibration_for(model, tokenizer, tmp_path, WEIGHTS)
    assert tokenizer.calls == 2, "the damaged file was replaced"


def test_a_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    calibration_for(small_models.dense(), ByteTokenizer(), tmp_path, WEIGHTS)
    with pytest.raises(CalibrationFileError, match="other weights"):
        calibration.load(next(tmp_path.rglob("*.safetensors")), "ffff")


def test_a_folder_that_cannot_be_written_only_costs_the_next_measurement(tmp_path: Path) -> None:
    (tmp_path / "calibration").write_text("a file where the folder should be")
    measured = calibration_for(small_models.dense(), ByteTokenizer(), tmp_path, WEIGHTS)
    assert "not stored" in measured.origin


def test_a_full_disk_only_costs_the_next_measurement(tmp_path: Path) -> None:
    """MLX writes the file itself, and says so in its own way; files of this process may have no bytes meanwhile."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
    try:
        measured = calibration_for(small_models.dense(), ByteTokenizer(), tmp_path, WEIGHTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert "not stored" in measured.origin and not list(tmp_path.rglob("*.safetensors"))
    assert set(measured.layers) == {0, 1}
