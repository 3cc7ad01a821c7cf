"""The GPU kernels' source text: one body in a small vocabulary, and each vendor's prelude for it.

Owns which pieces of src/ make which kernel, and the kernel objects. Leaves shapes and launches to gpu_launch.py.
MLX builds the function's signature from the names used in the body, so each vendor's opening names its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import mlx.core as mx

Dialect = Literal["metal", "cuda"]
Variant = Literal["portable", "mma"]
KernelFactory = Callable[..., Callable[..., list[mx.array]]]
"""mx.fast.metal_kernel, mx.fast.cuda_kernel, or something that takes the same arguments."""

DECODE_INPUTS = (
    *("queries", "params", "meta", "page_table", "k_codes", "k_scales", "v_codes", "v_scales"),
    *("sink_k", "sink_v", "window_k", "window_v", "k_rotation", "k_mean", "k_book", "v_book"),
)
DECODE_OUTPUTS = ("totals", "stats")
COMBINE_INPUTS = ("totals", "stats", "meta", "sinks", "v_rotation", "v_mean")
COMBINE_OUTPUTS = ("out",)


@cache
def piece(name: str) -> str:
    """One file of src/, without whole-line comments: MLX copies a kernel's text at every call."""
    text = resources.files("turboquant_kv").joinpath("src", f"{name}.h").read_text(encoding="utf-8")
    return "".join(f"{line}\n" for line in text.splitlines() if not line.lstrip().startswith("//"))


def header(dialect: Dialect, variant: Variant) -> str:
    helpers = piece("mma_helpers") if variant == "mma" else ""
    return piece(f"prelude_{dialect}") + piece("common") + helpers


def decode_body(dialect: Dialect, variant: Variant) -> str:
    """Attention of a block's query rows over exact rows or a run of compressed tokens, to unnormalised parts."""
    exact = piece("decode_exact") + piece("decode_merge")
    if variant == "mma":
        shared, compressed = piece("mma_shared"), piece("mma_codes")
    else:
        shared, compressed = piece("decode_shared"), piece("decode_codes") + piece("decode_merge")
    walk = f"if (block_x == 0) {{\n{exact}}} else {{\n{compressed}}}\n"
    return piece(f"opening_{dialect}") + shared + piece("decode_setup") + walk


def combine_body(dialect: Dialect) -> str:
    """All parts of a query row to its output."""
    return piece(f"opening_{dialect}") + piece("combine")


@dataclass(frozen=True, slots=True)
class DecodeKernels:
    """The two launches of a decode step, as callables of MLX's custom-kernel interface."""

    dialect: Dialect
    variant: Variant
    decode: Callable[..., Any]
    combine: Callable[..., Any]

    @classmethod
    def build(cls, dialect: Dialect, variant: Variant, factory: KernelFactory) -> DecodeKernels:
        """Nothing is compiled before the first launch of each shape."""
        decode = factory(
            name=f"turboquant_decode_{variant}",
            input_names=list(DECODE_INPUTS),
            output_names=list(DECODE_OUTPUTS),
            source=decode_body(dialect, variant),
            header=header(dialect, variant),
            ensure_row_contiguous=False,  # queries and exact rows are strided views: a copy would be one more launch
        )
        combine = factory(
            name="turboquant_combine",
            input_names=list(COMBINE_INPUTS),
            output_names=list(COMBINE_OUTPUTS),
            source=combine_body(dialect),
            header=header(dialect, "portable"),
            ensure_row_contiguous=True,
        )
        return cls(dialect, variant, decode, combine)


@cache
def device_kernels(dialect: Dialect, variant: Variant) -> DecodeKernels:
    """The kernels of this machine's GPU, made once."""
    factory: Any = mx.fast.metal_kernel if dialect == "metal" else mx.fast.cuda_kernel
    return DecodeKernels.build(dialect, variant, factory)
