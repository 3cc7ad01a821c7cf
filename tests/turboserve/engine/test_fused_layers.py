"""Decoder layers with fewer launches compute what mlx-lm's do; those that do not, or are slower, stay as they were."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from mlx_lm.models import gemma2, llama, qwen2, qwen3
from tests.cuda.emulator import cuda_kernel
from tests.metal.emulator import metal_kernel
from tests.turboquant_kv import small_models
from tests.turboquant_kv.summing_kernels import LAYERS, Rows
from tests.turboserve.engine.test_projections import make_model

from turboquant_kv.backends.gpu.norm_kernel import NormKernels
from turboquant_kv.cache import seam
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat
from turboserve.engine import fused_layers, graph_choice
from turboserve.engine.fused_layers import MOST_ROWS, fuse, prepare_fused_layers, switch_of
from turboserve.engine.graph_choice import try_graphs
from turboserve.engine.projections import arrange_projections

nn: Any = mlx.nn  # whose stubs say too little
FACTORIES: dict[str, Any] = {"cuda": cuda_kernel, "metal": metal_kernel}
pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="emulators run on a CPU")


@pytest.fixture(autouse=True)
def with_seam() -> None:
    seam.install()


@pytest.fixture(params=["cuda", "metal"])
def kernels(request: pytest.FixtureRequest) -> NormKernels:
    return NormKernels(request.param, FACTORIES[request.param])


class ByOperations(NormKernels):
    """The kernels' twin, without emulating each launch."""

    def __init__(self) -> None:
        self.num_launches = 0

    def add(self, x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
        self.num_launches += 1
        return x + y, mx.fast.rms_norm(x + y, weight, eps)


def model_of(kind: str, *, joined: bool = True, dtype: mx.Dtype = mx.float16) -> Any:
    fields = {**vars(make_model().args), "hidden_size": 128, "model_type": kind, "head_dim": 32}
    module: Any = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}[kind]
    model = module.Model(module.ModelArgs.from_dict({**fields, "tie_word_embeddings": True}))
    model.set_dtype(dtype)
    if joined:
        arrange_projections(model, join=True, most_rows=lambda _: 0, reason="")
    mx.eval(model.parameters())
    return model


def answers(model: Any, fmt: str | None, rng: np.random.Generator, num_steps: int = 3) -> list[np.ndarray[Any, Any]]:
    """Logits of steps of two conversations of different lengths, by a runtime's caches, and of a lone prompt."""
    runtime = KVRuntime(model, None if fmt is None else KVFormat.parse(fmt))
    singles = []
    for length in (9, 140):
        caches = runtime.make_cache()
        model(mx.array([rng.integers(0, 70, length).tolist()]), cache=caches)
        runtime.evaluate(caches)
        singles.append(caches)
    batch = runtime.merge_rows(singles)
    tokens = rng.integers(0, 70, (num_steps, 2, 1))
    found = [np.array(model(mx.array(step), cache=batch).astype(mx.float32)) for step in tokens]
    found.append(np.array(model(mx.array([[1, 2, 3]])).astype(mx.float32)))
    return found


def switched_on(model: Any) -> AbstractContextManager[None]:
    switch = switch_of(model)
    assert switch is not None
    return switch.turned_on()


@pytest.mark.parametrize("fmt", [None, "4/4"])
@pytest.mark.parametrize(("kind", "joined"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", True)])
def test_steps_are_mlx_lms(kind: str, joined: bool, fmt: str | None, kernels: NormKernels) -> None:
    model = model_of(kind, joined=joined)
    seed = int(np.random.default_rng().integers(1 << 30))
    expected = answers(model, fmt, np.random.default_rng(seed))
    chosen = fuse(model, kernels)
    for got, wanted in zip(answers(model, fmt, np.random.default_rng(seed)), expected, strict=True):
        assert np.array_equal(got, wanted), "nothing changes where no graph is traced"
    assert chosen.num_fused == 2, chosen
    assert chosen.num_rotated == (2 if joined and kind != "qwen3" else 0)
    with switched_on(model):
        fused = answers(model, fmt, np.random.default_rng(seed))
    for got, wanted in zip(fused, expected, strict=True):
        assert np.abs(got - wanted).max() < 2e-2 * np.std(wanted)


def test_quantised_layers_are_fused_as_well() -> None:
    model = make_model()
    nn.quantize(model, group_size=32, bits=4)
    arrange_projections(model, join=True, most_rows=lambda _: 0, reason="")
    chosen = fuse(model, ByOperations())
    assert (chosen.num_fused, chosen.num_rotated) == (2, 2)


def test_each_norm_but_the_first_comes_with_an_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = model_of("llama"), ByOperations()
    fuse(model, twin)
    norms: list[Any] = []
    plain = mx.fast.rms_norm
    twin.num_launches = 0

    def seen(*arguments: Any) -> mx.array:
        norms.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(mx.fast, "rms_norm", seen)
    with switched_on(model):
        model(mx.array([[1], [2]]))
    assert twin.num_launches == 2 * 2
    assert len(norms) == 1 + 2 * 2, "the first layer's own, and those of the twin"


def test_long_passes_are_left_to_mlx_lm() -> None:
    model, twin = model_of("llama"), ByOperations()
    fuse(model, twin)
    twin.num_launches = 0
    with switched_on(model):
        model(mx.zeros((1, MOST_ROWS + 1), mx.uint32))
        assert twin.num_launches == 0
        model(mx.zeros((1, MOST_ROWS), mx.uint32))
        assert twin.num_launches == 4


@pytest.mark.parametrize("is_better", [True, False])
def test_a_graph_of_fewer_launches_is_kept_where_it_is_faster(
    is_better: bool, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Both kinds are traced and compared; the model by itself runs as mlx-lm has it."""
    model: Any = small_models.dense(int(rng.integers(1 << 30)), LAYERS)
    arrange_projections(model, join=True, most_rows=lambda _: 0, reason="")
    twin, rows = ByOperations(), Rows(model, 2)
    assert fuse(model, twin).num_fused == LAYERS
    twin.num_launches = 0
    monkeypatch.setattr(graph_choice, "MARGIN", 1e9 if is_better else 0.0)
    choice = try_graphs(model, rows.batch, 2, "on")  # a graph is kept, however long it takes
    assert twin.num_launches == 2 * LAYERS, "traced once"
    assert choice.graphs is not None and choice.graphs.num_run > 0
    assert ("layers of fewer launches a step of 2 rows" in choice.reason) == is_better
    model(mx.array([[1], [2]]))
    assert twin.num_launches == 2 * LAYERS


def test_graphs_of_fewer_launches_that_fail_leave_those_that_work(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """In the midst of a trial, whose steps before that are taken back."""
    model: Any = small_models.dense(int(rng.integers(1 << 30)), LAYERS)
    breaking, rows = Breaking(), Rows(model, 2)
    assert fuse(model, breaking).num_fused == LAYERS
    before = rows.batch[0].lengths
    breaking.is_broken = True
    with caplog.at_level(logging.WARNING):
        choice = try_graphs(model, rows.batch, 2, "on")
    assert choice.graphs is not None and "with fewer launches it failed: a driver" in choice.reason
    assert "cannot be used" in caplog.text
    assert all(cache.lengths == before for cache in rows.batch)
    rows.pool.check_integrity()
    assert choice.graphs.forward(mx.zeros((2, 1), mx.uint32), rows.batch).shape[:2] == (2, 1)


def test_a_model_that_fails_while_it_is_traced_is_left_switched_off() -> None:
    model = model_of("llama")
    fuse(model, ByOperations())
    with pytest.raises(ValueError, match="traced"), switched_on(model):
        raise ValueError("traced")
    switch = switch_of(model)
    assert switch is not None and not switch.is_on


def test_a_result_is_handed_over_once_and_to_its_rows_alone() -> None:
    handed = fused_layers.Handed()
    rows, others, normed = mx.ones(8), mx.ones(8), mx.zeros(8)
    handed.put(rows, normed)
    assert handed.take(others) is None
    assert handed.take(rows) is normed
    assert handed.take(rows) is None


class Breaking(ByOperations):
    """Right when it is looked at, and then not."""

    is_broken = False

    def add(self, x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
        if self.is_broken:
            raise RuntimeError("a driver")
        return super().add(x, y, weight, eps)


class Wrong(ByOperations):
    def add(self, x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
        total, normed = super().add(x, y, weight, eps)
        return total, normed * 1.1


class Failing(ByOperations):
    def add(self, x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
        raise RuntimeError("nvrtc: no\n such type")


@pytest.mark.parametrize(
    ("broken", "reason"), [(Wrong(), "differs from mlx-lm's own"), (Failing(), "a kernel failed: nvrtc: no such type")]
)
def test_what_is_wrong_is_undone_and_told(broken: NormKernels, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama")
    before = [type(module) for _, module in model.named_modules()]
    assert switch_of(model) is None
    with caplog.at_level(logging.WARNING):
        chosen = fuse(model, broken)
    assert chosen.num_fused == 0 and reason in chosen.reason and reason in caplog.text
    assert [type(module) for _, module in model.named_modules()] == before
    assert switch_of(model) is None


def test_other_structures_stay() -> None:
    fields = {**vars(make_model().args), "model_type": "gemma2", "head_dim": 16}
    model: Any = gemma2.Model(gemma2.ModelArgs.from_dict(fields))
    assert fuse(model, ByOperations()).reason == "another structure"
    odd: Any = llama.Model(llama.ModelArgs.from_dict({**vars(make_model().args), "hidden_size": 60}))
    assert fuse(odd, ByOperations()).reason == "another structure"


def test_nothing_is_tried_where_it_is_not_wanted() -> None:
    assert "as set" in str(prepare_fused_layers(make_model(), "off"))
    assert "a CPU's step" in str(prepare_fused_layers(make_model(), "auto"))
