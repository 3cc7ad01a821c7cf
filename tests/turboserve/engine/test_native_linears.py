"""Models whose linear layers the CPU kernels multiply answer as MLX's own float32 arithmetic does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.llama import Model, ModelArgs
from tests.turboserve.engine.adapter_folders import write_adapter

from turboquant_kv.backends.native.backend import is_available
from turboserve.engine import loading, native_linears, weights
from turboserve.engine.loading import load
from turboserve.engine.model_folder import EMBEDDED_DIR
from turboserve.engine.native_linears import NativeEmbedding, NativeLinear, install_native_linears, native_bytes
from turboserve.errors import StartupError
from turboserve.machine_memory import MemoryInfo
from turboserve.settings import Settings

pytestmark = pytest.mark.skipif(not is_available(), reason="the native kernels are not built")
ANY: Any = nn  # its stubs leave quantize out


def llama(rng: np.random.Generator, tie: bool = True, bias: bool = False) -> Model:
    mx.random.seed(int(rng.integers(1 << 30)))
    args = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 192, "num_attention_heads": 4}
    more = {"rms_norm_eps": 1e-5, "vocab_size": 300, "num_key_value_heads": 2, "tie_word_embeddings": tie}
    model = Model(ModelArgs.from_dict({"model_type": "llama", **args, **more, "attention_bias": bias}))
    for name, module in model.named_modules():
        if name.endswith("_proj") and "bias" in module:
            module.bias = mx.random.normal(module.bias.shape)
    return model


def stored(model: Model, kind: str) -> Model:
    if kind.startswith("f"):
        model.set_dtype(mx.float16)
    elif kind.startswith("b"):
        model.set_dtype(mx.bfloat16)
    else:
        model.set_dtype(mx.float16)
        mode = "mxfp4" if kind == "mxfp4" else "affine"
        ANY.quantize(model, group_size=32, bits=4 if mode == "mxfp4" else int(kind), mode=mode)
    return model


def logits_of(model: Any, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.array(model(mx.array(tokens)).astype(mx.float32))


@pytest.mark.parametrize("kind", ["2", "3", "4", "5", "6", "8", "mxfp4", "f16", "bf16"])
def test_logits_are_those_of_the_expanded_model(kind: str, rng: np.random.Generator) -> None:
    tie, bias = bool(rng.integers(2)), bool(rng.integers(2))
    model = stored(llama(rng, tie, bias), kind)
    num_bytes = weights.parameter_bytes(model)
    widened = sum(4 * module.bias.size for name, module in model.named_modules() if "bias" in module)
    wanted = copy.deepcopy(model)
    wanted = weights.expand(wanted)
    installed = install_native_linears(model)
    assert installed is not None and sum(installed.kinds.values()) == 2 * 7 + (1 if tie else 2)
    model = weights.expand(model)
    assert weights.activation_dtype(model) == "float32"
    norms = 2 * 5 * 128  # of two bytes more each; the kernels hold biases as float32, beside the model's own
    assert native_bytes(model) + weights.parameter_bytes(model) == num_bytes + norms + widened
    tokens = rng.integers(0, 300, (3, 9))
    want, got = logits_of(wanted, tokens), logits_of(model, tokens)
    assert got.dtype == np.float32 and np.linalg.norm(got - want) <= 2e-3 * np.linalg.norm(want)


def test_layers_of_other_kinds_stay_with_mlx(rng: np.random.Generator) -> None:
    """Float32, widths that are no multiple of 64, quantisations without biases."""
    model = llama(rng)
    assert install_native_linears(model) is None  # float32
    model = stored(llama(rng), "4")
    layer = model.model.layers[0].mlp
    layer.up_proj = ANY.Linear(128, 192, bias=False)
    layer.gate_proj = ANY.QuantizedLinear.from_linear(ANY.Linear(128, 192, bias=False), 32, 8, mode="mxfp8")
    layer.down_proj.weight = layer.down_proj.weight[:, :12]  # 96 inputs, which nobody computes with before it is mended
    assert native_linears.native_candidates(layer) == []


def test_a_model_that_looks_into_its_layers_keeps_them(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stored(llama(rng), "4")
    monkeypatch.setattr(Model, "__call__", lambda self, tokens, cache=None: self.model.embed_tokens.weight[tokens])
    before = [type(module) for _, module in model.named_modules()]
    assert install_native_linears(model) is None
    assert [type(module) for _, module in model.named_modules()] == before


def test_a_kind_whose_product_differs_is_left_to_mlx(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a format that a later MLX packs in another way."""
    model = stored(llama(rng), "4")
    head = ANY.QuantizedLinear.from_linear(ANY.Linear(128, 192, bias=False), 64, 8)
    model.model.layers[0].mlp.up_proj = head
    real: Any = mx.dequantize

    def another(*parts: Any) -> mx.array:
        wrong: mx.array = real(*parts) * (1.5 if parts[-1] == 8 else 1)
        return wrong

    monkeypatch.setattr(mx, "dequantize", another)
    installed = install_native_linears(model)
    assert installed is not None and set(installed.kinds) == {"4-bit"}
    assert model.model.layers[0].mlp.up_proj is head and "8-bit" in caplog.text


def test_replaced_layers_are_of_our_classes(rng: np.random.Generator) -> None:
    model = stored(llama(rng), "8")
    installed = install_native_linears(model)
    assert isinstance(model.model.embed_tokens, NativeEmbedding)
    assert isinstance(model.model.layers[1].self_attn.q_proj, NativeLinear)
    assert str(installed).startswith("multiplied as stored: 15 of 8-bit (cpu-native/")


def test_adapters_lie_above_layers_as_stored(tmp_path: Path, rng: np.random.Generator) -> None:
    """Through loading; compared with mlx-lm's own adapter over the expanded model."""
    if mx.default_device() != mx.cpu:
        pytest.skip("a GPU multiplies by itself")

    def make() -> Any:
        return mlx_lm.load(str(EMBEDDED_DIR))[0]

    folder = write_adapter(tmp_path / "a", make, rng)
    loaded = load(Settings(adapters=(f"a={folder}",)), lambda line: None, MemoryInfo(1 << 40, 1 << 40))
    assert "multiplied as stored" in loaded.details["weights"]
    tokens = rng.integers(0, 8000, (2, 4))
    reference = weights.expand(mlx_lm.load(str(EMBEDDED_DIR), adapter_path=str(folder))[0])
    with loaded.adapters.applied([loaded.adapters.get("a"), loaded.adapters.get("a")]):
        got = logits_of(loaded.model, tokens)
    want = logits_of(reference, tokens)
    assert np.linalg.norm(got - want) <= 3e-3 * np.linalg.norm(want)
    assert np.linalg.norm(logits_of(loaded.model, tokens) - want) > 0.1 * np.linalg.norm(want)


def test_an_instruction_set_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_ISA", "abacus")
    with pytest.raises(StartupError, match=r"'abacus' is not available; this CPU and build have .*portable"):
        load(Settings(), lambda line: None, MemoryInfo(1 << 40, 1 << 40))


def test_a_model_that_neither_works_with_them_nor_fits_expanded_stays_as_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "install_native_linears", lambda model: None)
    little = MemoryInfo(1 << 40, 30 << 20)  # the embedded model takes 23 MiB, and 88 expanded
    loaded = load(Settings(), lambda line: None, little)
    assert loaded.details["weights"] == "as stored" and loaded.weights_bytes < 30 << 20
