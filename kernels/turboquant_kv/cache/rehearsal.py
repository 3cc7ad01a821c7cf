"""Which CUDA kernels a model's layers will want, found without launching any: so that they can be compiled ahead.

A model's means are measured after its weights are there, and some kernels depend on them: whether they are long,
whether keys are balanced. Here all that they can be is assumed, and a trial (trial.py) is played with kernels that only
tell what they are.

Owns what is assumed and the list. Compiling is backends/gpu/nvrtc.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.base import LayerShape, Means
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.device import Device, this_device
from turboquant_kv.backends.gpu.flash import FlashKernels
from turboquant_kv.backends.gpu.launch import DecodeKernels
from turboquant_kv.backends.gpu.module_files import keeping
from turboquant_kv.backends.gpu.nvrtc import Module
from turboquant_kv.backends.gpu.page_kernels import PageKernels
from turboquant_kv.backends.numpy_ops.backend import NumpyBackend
from turboquant_kv.cache.calibration import Calibration
from turboquant_kv.cache.probe import ModelLayers
from turboquant_kv.cache.rope_probe import learn_rotary
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.cache.trial import Case, rehearse
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import Rotary

LENGTHS = (1.0, 1000.0)  # of means: short ones and long ones have kernels of their own


def assumed_calibrations(model: Any, layers: ModelLayers) -> list[Calibration]:
    """What a model's measured means may be like, the likeliest first."""
    shapes = {i: shape for i in range(len(layers.shapes)) if (shape := _shape_of(layers, i)) is not None}
    rotaries = learn_rotary(model, {i: shape.k_dim for i, shape in shapes.items()}, layers.numbers or None)
    if not rotaries:
        return [_assumed(shapes, {}, LENGTHS[0], is_balanced=False)]
    return [
        _assumed(shapes, rotaries, length, is_balanced=balanced) for length, balanced in product(LENGTHS, (True, False))
    ]


def _shape_of(layers: ModelLayers, place: int) -> LayerShape | None:
    window = layers.windows[place] if layers.windows else None
    return layers.shapes[place] if window is None else window.shape


def _assumed(
    shapes: dict[int, LayerShape], rotaries: dict[int, Rotary], length: float, *, is_balanced: bool
) -> Calibration:
    means = {}
    for i, shape in shapes.items():
        heads, k_dim, v_dim = shape.num_kv_heads, shape.k_dim, shape.v_dim
        k = np.full((heads, k_dim), length / np.sqrt(k_dim), np.float32)
        factors = np.ones((heads, k_dim), np.float32) if is_balanced and i in rotaries else None
        means[i] = Means(k, np.zeros((heads, v_dim), np.float32), rotaries.get(i), factors)
    return Calibration(means, "assumed")


def assumed_cases(model: Any, fmt: KVFormat, layers: ModelLayers) -> list[Case]:
    """Kinds of layers that a trial may be about. Raises what KVRuntime raises."""
    cases: list[Case] = []
    for calibration in assumed_calibrations(model, layers) if fmt.centred else [None]:
        runtime = KVRuntime(model, fmt, calibration=calibration, backend=NumpyBackend.name, layers=layers)
        cases += runtime.cases
    return cases


def modules_for(cases: Sequence[Case], device: Device | None = None, row_counts: Sequence[int] = ()) -> list[Module]:
    """The CUDA modules of these layers' kernels, each once: a trial's, then those of steps of so many tokens.

    device: None: this machine's.
    """
    found: dict[str, Module] = {}
    factory = keeping(_telling, lambda module: found.setdefault(module.name, module))
    device = device or this_device()
    backend = GpuBackend(
        "cuda",
        DecodeKernels("cuda", factory, device=device),
        PageKernels("cuda", factory),
        FlashKernels("cuda", factory, device),
    )
    for counts in ((), row_counts):
        for case in cases:
            rehearse(case, backend, counts)
    return list(found.values())


def _telling(**text: Any) -> Any:
    """A kernel that computes nothing."""

    def launch(*, output_shapes: Sequence[tuple[int, ...]], output_dtypes: Sequence[mx.Dtype], **_: Any) -> Any:
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    return launch
