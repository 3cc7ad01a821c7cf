"""The GPU kernels' source text: one body in a small vocabulary, and each vendor's prelude for it.

Owns which pieces of src/ make which kernel, and how constants get into the text. Leaves shapes and launches to
gpu_plan.py and gpu_launch.py. Constants are written into the text instead of being template values: MLX handles those
anew at every call, which costs more than the launch. Kernels are told apart by name, so names carry a digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Dialect = Literal["metal", "cuda"]
Variant = Literal["portable", "mma"]
Kernel = Callable[..., Any]
KernelFactory = Callable[..., Kernel]
"""mx.fast.metal_kernel, mx.fast.cuda_kernel, or something that takes the same arguments."""

DECODE_INPUTS = ("queries", "plan", "page_table", "k_codes", "k_scales", "v_codes", "v_scales", "k_constants")
FUSED_INPUTS = (*DECODE_INPUTS, "v_constants", "counters")
EXACT_INPUTS = ("sink_k", "sink_v", "window_k", "window_v")
COMBINE_INPUTS = ("parts", "plan", "sinks", "v_constants")
ENCODE_INPUTS = ("rows", "figures", "constants")
HISTORY_INPUTS = ("codes", "scales", "page_ids", "sink", "window", "figures", "constants")

_TYPE_NAMES: dict[Dialect, dict[mx.Dtype, str]] = {
    "metal": {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"},
    "cuda": {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"},
}


@cache
def piece(name: str) -> str:
    """One file of src/ without comment lines and indentation: MLX copies a kernel's text at every call."""
    text = resources.files("turboquant_kv").joinpath("src", f"{name}.h").read_text(encoding="utf-8")
    return "".join(f"{line}\n" for line in map(str.strip, text.splitlines()) if line and not line.startswith("//"))


def mlx_factory(dialect: Dialect) -> KernelFactory:
    """MLX's own."""
    factory: Any = mx.fast.metal_kernel if dialect == "metal" else mx.fast.cuda_kernel
    made: KernelFactory = factory
    return made


@dataclass(frozen=True, slots=True)
class KernelText:
    """All that makes a kernel: what MLX is given, dynamic shared memory (CUDA) included."""

    role: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str
    shared_bytes: int = 0
    contiguous: bool = False  # False: strided inputs are read where they lie, a copy would be one more launch

    @property
    def name(self) -> str:
        digest = hashlib.sha256(f"{self.header}\0{self.source}".encode()).hexdigest()[:16]
        return f"turboquant_{self.role}_{digest}"

    def build(self, factory: KernelFactory) -> Kernel:
        """Nothing is compiled before the first launch."""
        options = {"shared_memory": self.shared_bytes} if self.shared_bytes else {}
        return factory(
            name=self.name,
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=self.source,
            header=self.header,
            ensure_row_contiguous=self.contiguous,
            **options,
        )


Constants = Mapping[str, int | bool | mx.Dtype]


def constants_text(dialect: Dialect, constants: Constants) -> str:
    """Definitions of a body's constants and types."""
    lines = []
    for name, value in constants.items():
        if isinstance(value, mx.Dtype):
            lines.append(f"typedef {_TYPE_NAMES[dialect][value]} {name};\n")
        else:
            lines.append(f"const {'bool' if isinstance(value, bool) else 'int'} {name} = {int(value)};\n")
    return "".join(lines)


def table_text(name: str, values: npt.NDArray[Any]) -> str:
    """A constant float table at program scope."""
    numbers = ", ".join(f"{np.float32(v):.9e}f" for v in values)
    return f"TQ_TABLE float {name}[{len(values)}] = {{{numbers}}};\n"


def header(dialect: Dialect, variant: Variant, tables: str) -> str:
    instructions = piece("instructions_cuda") if dialect == "cuda" else ""
    helpers = piece("mma_helpers") if variant == "mma" else ""
    return piece(f"prelude_{dialect}") + instructions + piece("common") + helpers + tables


def exact_inputs(num_sets: int) -> tuple[str, ...]:
    """Names of a batch's exact rows: one set for all sequences, or one for each."""
    if num_sets == 1:
        return EXACT_INPUTS
    return tuple(f"{name}_{i}" for i in range(num_sets) for name in EXACT_INPUTS)


def exact_choice(num_sets: int) -> str:
    """CUDA text that gives a sequence its own arrays under the common names."""
    lines = []
    for name in EXACT_INPUTS if num_sets > 1 else ():

        def chosen(suffix: str, name: str = name) -> str:
            first = "".join(f"sequence == {i} ? {name}_{i}{suffix} : " for i in range(num_sets - 1))
            return f"{first}{name}_{num_sets - 1}{suffix}"

        lines.append(f"const Exact* {name} = {chosen('')};\n")
        lines.append(
            f"const ulong {name}_stride[2] = {{ulong({chosen('_strides[0]')}), ulong({chosen('_strides[1]')})}};\n"
        )
    return "".join(lines)


def decode_body(dialect: Dialect, variant: Variant, *, exact_mma: bool, fused: bool, num_sets: int = 1) -> str:
    """Attention of a block's query rows over exact rows or a run of compressed tokens, to unnormalised parts.

    exact_mma: exact rows on tensor cores too. num_sets: of exact rows, as in `exact_inputs`. fused: the last block of
    a row group merges its parts to the output.
    """
    opening = piece(f"opening_{dialect}") + piece("plan")
    if variant == "portable":
        merge = piece("decode_merge")
        return (
            f"{opening}{piece('decode_shared')}{piece('decode_setup')}"
            f"if (block_x == 0) {{\n{piece('decode_exact')}}} else {{\n{piece('decode_codes')}}}\n{merge}"
        )
    raised = piece("mma_raise")
    codes = piece("mma_codes").replace("MMA_QUERIES\n", piece("mma_queries")).replace("MMA_RAISE_PEAKS\n", raised)
    exact = piece("mma_exact").replace("MMA_RAISE_PEAKS\n", raised) if exact_mma else piece("mma_exact_plain")
    merge = piece("mma_merge") + (piece("mma_finish") if fused else "")
    if num_sets > 1:
        for name in EXACT_INPUTS:
            exact = exact.replace(f"{name}_strides", f"{name}_stride")
        exact = exact_choice(num_sets) + exact
    return f"{opening}{piece('mma_shared')}if (block_x == 0) {{\n{exact}}} else {{\n{codes}}}\n{merge}"


def combine_body(dialect: Dialect, *, by_lanes: bool) -> str:
    """All parts of a query row to its output."""
    return piece(f"opening_{dialect}") + piece("combine_lanes" if by_lanes else "combine")
