"""`auto` decides by trial, the Metal emulator standing in for the device: kernels that work, fail, err, or are slow."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.metal.emulator import metal_kernel
from tests.turboquant_kv import small_models

from turboquant_kv.backends.base import LayerShape, Means
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.launch import DecodeKernels
from turboquant_kv.backends.gpu.page_kernels import PageKernels
from turboquant_kv.backends.mlx_ops.backend import MlxBackend
from turboquant_kv.cache import backend_choice
from turboquant_kv.cache.backend_choice import Candidates, cases_of, choose
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.cache.trial import Case, Plan, try_fused
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import Rotary

SMALL = KVFormat(4, 3, page_tokens=16, sink_tokens=8)
CASE = Case(LayerShape(1, 64, 64, mx.float16), SMALL, 2)
PLAN = Plan(lengths=(64, 128), num_layers=1, num_steps=1, num_rounds=1)

Factory = Callable[..., Any]


def emulated(pages: Factory = metal_kernel, decode: Factory = metal_kernel) -> GpuBackend:
    return GpuBackend("metal", DecodeKernels("metal", decode), PageKernels("metal", pages))


def replacing(old: str, new: str) -> Factory:
    """A factory of kernels whose text has a mistake."""

    def factory(**text: Any) -> Any:
        assert old in text["header"] + text["source"]
        return metal_kernel(**{**text, **{key: text[key].replace(old, new) for key in ("header", "source")}})

    return factory


def broken_on_the_device(**text: Any) -> Any:
    """Like MLX on Metal: the text is compiled by the first call."""

    def call(**arguments: Any) -> Any:
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: use of undeclared 'tq'")

    return call


class Clock:
    """Advances by itself a little, and by `seconds` for every launch of the kernels that are made with `watched`."""

    def __init__(self, seconds: float) -> None:
        self.now_s, self._seconds = 0.0, seconds

    def __call__(self) -> float:
        self.now_s += 1e-4
        return self.now_s

    def watched(self, **text: Any) -> Any:
        kernel = metal_kernel(**text)

        def call(**arguments: Any) -> Any:
            self.now_s += self._seconds
            return kernel(**arguments)

        return call


def tried(backend: GpuBackend, clock: Clock | None = None, case: Case = CASE) -> Any:
    return try_fused([case], lambda: backend, MlxBackend(), plan=PLAN, clock=clock or Clock(0.0))


def test_kernels_that_are_right_and_no_slower_are_measured_and_taken() -> None:
    clock = Clock(-2e-5)  # each launch takes 20 us less than the same on MLX operations
    verdict = tried(emulated(decode=clock.watched), clock)
    assert (verdict.outcome, verdict.taken, verdict.is_fallback) == ("faster", "gpu-metal", False)
    assert 0 < verdict.error < 2e-2
    assert [t.num_tokens for t in verdict.timings] == [64, 128]
    assert all(0 < t.fused_s < t.ops_s == pytest.approx(1e-4) for t in verdict.timings)
    assert verdict.line.startswith("gpu-metal, tried and faster than MLX operations: results within ")
    assert "us against 100 at 64 tokens" in verdict.line


@pytest.mark.parametrize("bias", [1.0, 300.0])
def test_means_that_turn_are_judged_like_any_others(bias: float, rng: np.random.Generator) -> None:
    """Short and long ones, beside which a key's own part is small."""
    rotary = Rotary(10000.0 ** (-np.arange(32) / 32), 1, 32, 1.0)
    k, v = (rng.standard_normal((1, 64)).astype(np.float32) for _ in "kv")
    clock = Clock(-2e-5)
    case = Case(CASE.shape, SMALL, 2, Means(k * np.float32(bias), v, rotary))
    assert tried(emulated(decode=clock.watched), clock, case).outcome == "faster"


def test_balanced_keys_are_judged_as_the_kernels_see_them(rng: np.random.Generator) -> None:
    """Means are of keys multiplied already: long ones would else be off by far. Forgotten factors are wrong."""
    rotary = Rotary(10000.0 ** (-np.arange(32) / 32), 1, 32, 1.0)
    k, v = (rng.standard_normal((1, 64)).astype(np.float32) for _ in "kv")
    factors = np.exp(rng.uniform(-3, 3, (1, 64))).astype(np.float32)
    clock, case = Clock(-2e-5), Case(CASE.shape, SMALL, 2, Means(k * np.float32(300), v, rotary, factors))
    assert tried(emulated(decode=clock.watched), clock, case).outcome == "faster"

    def forgetful(**text: Any) -> Any:
        return metal_kernel(**{**text, "header": re.sub(r"\bBALANCED = (1|true)", "BALANCED = 0", text["header"])})

    assert tried(emulated(decode=forgetful), case=case).outcome == "wrong"


@pytest.mark.parametrize("factory", [broken_on_the_device, replacing("exp2", "exp2_of_nobody")])
def test_kernels_that_do_not_compile_give_way(factory: Factory) -> None:
    verdict = tried(emulated(decode=factory))
    assert (verdict.outcome, verdict.taken) == ("failed", "mlx-ops")
    assert "do not run" in verdict.line and verdict.line.startswith("mlx-ops instead of gpu-metal: ")
    assert "\n" not in verdict.line


def test_a_device_without_these_kernels_is_a_verdict() -> None:
    def none_here() -> GpuBackend:
        raise ImportError("no Metal")

    verdict = try_fused([CASE], none_here, MlxBackend(), name="gpu-metal", plan=PLAN)
    assert (verdict.fused, verdict.taken, verdict.outcome) == ("gpu-metal", "mlx-ops", "failed")


def off_by_a_tenth(**text: Any) -> Any:
    """Kernels whose first output is ten percent too large."""
    kernel = metal_kernel(**text)

    def call(**arguments: Any) -> Any:
        first, *others = kernel(**arguments)
        return [first * 1.1 if first.dtype in (mx.float16, mx.float32) else first ^ 1, *others]

    return call


@pytest.mark.parametrize("kernels", [{"decode": off_by_a_tenth}, {"pages": off_by_a_tenth}])
def test_kernels_with_wrong_results_give_way(kernels: dict[str, Factory]) -> None:
    """Wrong attention, and pages with wrong codes."""
    verdict = tried(emulated(**kernels))
    assert (verdict.outcome, verdict.taken) == ("wrong", "mlx-ops")
    assert "off by" in verdict.line


def test_kernels_that_are_slower_give_way() -> None:
    clock = Clock(1e-3)
    verdict = tried(emulated(decode=clock.watched), clock)
    assert (verdict.outcome, verdict.taken) == ("slower", "mlx-ops")
    assert all(t.fused_s > t.ops_s for t in verdict.timings)
    assert "slower here (results within" in verdict.line


# --- choosing


class Trials:
    """Candidates whose trials are counted."""

    def __init__(self, decode: Factory) -> None:
        self.count, self._decode = 0, decode

    def __call__(self) -> Candidates:
        return Candidates("gpu-metal", self._new, MlxBackend())

    def _new(self) -> GpuBackend:
        self.count += 1
        return emulated(decode=self._decode)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_choice, "_known", {})


def forget() -> None:
    """What a new process does not know."""
    backend_choice._known.clear()


def test_a_verdict_is_remembered_and_a_fallback_told_at_every_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trials = Trials(broken_on_the_device)
    for _ in range(3):
        forget()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            chosen = choose("auto", [CASE], tmp_path, candidates=trials, plan=PLAN)
        assert chosen.backend.name == "mlx-ops"
        assert "Unable to build metal library" in caplog.text
    assert trials.count == 1
    choose("auto", [CASE], tmp_path, candidates=trials, plan=PLAN)  # the same process asks no file
    (file,) = (tmp_path / "kv-kernels").iterdir()
    file.write_text("{}")
    forget()
    choose("auto", [CASE], tmp_path, candidates=trials, plan=PLAN)
    assert trials.count == 2


def test_other_layers_kernels_and_versions_are_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(broken_on_the_device)
    choose("auto", [CASE], tmp_path, candidates=trials, plan=PLAN)
    choose("auto", [Case(CASE.shape, SMALL, 4)], tmp_path, candidates=trials, plan=PLAN)
    assert trials.count == 2
    monkeypatch.setattr(backend_choice, "kernel_sources", lambda: "changed")
    choose("auto", [CASE], tmp_path, candidates=trials, plan=PLAN)
    assert trials.count == 3


def test_a_trial_that_ended_the_process_twice_is_not_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = Trials(broken_on_the_device)

    def aborts(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt  # as sudden as a driver's abort

    with monkeypatch.context() as patched:
        patched.setattr(backend_choice, "try_fused", aborts)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                choose("auto", [CASE], tmp_path, candidates=trials, plan=PLAN)
    with caplog.at_level(logging.WARNING):
        assert choose("auto", [CASE], tmp_path, candidates=trials, plan=PLAN).backend.name == "mlx-ops"
    (file,) = (tmp_path / "kv-kernels").iterdir()
    assert "ended the whole process" in caplog.text and str(file) in caplog.text
    assert trials.count == 0 and json.loads(file.read_text())["unfinished"] == 2
    file.unlink()
    forget()
    choose("auto", [CASE], tmp_path, candidates=trials, plan=PLAN)
    assert trials.count == 1


def test_a_backend_that_was_asked_for_is_not_tried(tmp_path: Path) -> None:
    trials = Trials(broken_on_the_device)
    chosen = choose("mlx-ops", [CASE], tmp_path, candidates=trials, plan=PLAN)
    assert (chosen.backend.name, chosen.verdict, trials.count) == ("mlx-ops", None, 0)


def test_a_model_of_several_geometries_is_tried_in_each() -> None:
    """Layers of one kind are one case; of means that turn, the shortest is judged as well."""
    rotary = Rotary(10000.0 ** (-np.arange(32) / 32), 1, 32, 1.0)
    wide = LayerShape(2, 128, 128, mx.float16)
    means = [Means(np.full((1, 64), x, np.float32), np.zeros((1, 64), np.float32), rotary) for x in (2.0, 9.0, 4.0)]
    cases = cases_of([CASE.shape] * 3 + [wide], [SMALL] * 4, [*means, None], [4, 4, 4, 0], [False] * 4)
    assert [(c.shape, c.num_q_heads, c.num_layers) for c in cases] == [
        (CASE.shape, 4, 3),
        (CASE.shape, 4, 0),
        (wide, 2, 1),
    ]
    assert [c.means for c in cases] == [means[1], means[0], None]


def test_layers_that_cap_scores_are_tried_with_a_cap() -> None:
    """Beside layers that do not, whose kernels are others; a cap that does nothing is wrong."""
    cases = cases_of([CASE.shape] * 3, [SMALL] * 3, [None] * 3, [2] * 3, [True, False, True])
    assert [(c.is_capped, c.num_layers) for c in cases] == [(True, 2), (False, 1)]
    clock = Clock(-2e-5)
    for case in cases:
        assert tried(emulated(decode=clock.watched), clock, case).outcome == "faster"
    uncapped = replacing("return cap - 2.0f * cap", "return score - 0.0f * cap")
    assert tried(emulated(decode=uncapped), case=cases[0]).outcome == "wrong"


@pytest.mark.parametrize(("seconds", "name"), [(-1e-6, "gpu-metal"), (1.0, "mlx-ops")])
def test_a_runtime_serves_with_what_its_trial_took(
    seconds: float, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac, from the model to its logits, and with the model's own number of query heads."""
    seen = []

    def judged(cases: Any, new_fused: Any, ops: Any, **options: Any) -> Any:
        seen.extend(cases)
        clock = Clock(seconds)
        return try_fused(cases, lambda: emulated(decode=clock.watched), ops, plan=PLAN, clock=clock)

    monkeypatch.setattr(backend_choice, "device_candidates", lambda: Candidates("gpu-metal", emulated, MlxBackend()))
    monkeypatch.setattr(backend_choice, "try_fused", judged)
    model = small_models.dense(num_layers=2)
    runtime = KVRuntime(model, SMALL, cache_dir=tmp_path)
    assert runtime.backend_name == name and runtime.verdict is not None and runtime.verdict.taken == name
    assert [(c.num_q_heads, c.shape.num_kv_heads, c.num_layers) for c in seen] == [(4, 2, 2)]
    tokens = mx.array([list(range(1, 60))])
    want = model(tokens, cache=KVRuntime(model, SMALL, backend="mlx-ops").make_cache())
    got = model(tokens, cache=runtime.make_cache())
    assert np.linalg.norm(np.array(got - want)) < 1e-3 * np.linalg.norm(np.array(want))
