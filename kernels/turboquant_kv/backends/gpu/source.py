"""The GPU kernels' source text: one body in a small vocabulary, and each vendor's prelude for it.

Owns which pieces of src/ make which kernel, and how constants get into the text. Leaves shapes and launches to
plan.py and launch.py. Constants are written into the text instead of being template values: MLX handles those
anew at every call, which costs more than the launch. It also copies and frees the text at every call (40 KB: 9 us), so
CUDA's text includes the files of src/ by path; Metal's compiler sees no files, its text is whole. Kernels are told
apart by name, so names carry a digest of everything.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Dialect = Literal["metal", "cuda"]
Variant = Literal["portable", "mma", "simd"]
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


_FOLDER = resources.files("turboquant_kv").joinpath("src")
_INCLUDED = re.compile(r'^#include "(?:.*/)?(\w+)\.h"$', re.MULTILINE)


@cache
def piece(name: str) -> str:
    """One file of src/ with what it includes, without comment lines and indentation: texts are copied at every call."""
    text = _FOLDER.joinpath(f"{name}.h").read_text(encoding="utf-8")
    lines = (line for line in map(str.strip, text.splitlines()) if line and not line.startswith("//"))
    return expanded("".join(f"{line}\n" for line in lines))


def expanded(text: str, without: tuple[str, ...] = ()) -> str:
    """A text with the files of src/ that it includes put in, but for those named."""
    return _INCLUDED.sub(lambda found: "" if found[1] in without else piece(found[1]).rstrip("\n"), text)


def included(dialect: Dialect, name: str) -> str:
    """A file of src/ as part of a kernel's text: by its path where the compiler reads files, else as it is."""
    path = _FOLDER.joinpath(f"{name}.h")
    if dialect == "cuda" and isinstance(path, Path) and not set('"\\\n') & set(str(path)):
        return f'#include "{path}"\n'
    return piece(name)


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
    bounds: tuple[int, int] | None = (
        None  # threads of a block, blocks per processor: registers are shared out so (CUDA)
    )
    contiguous: bool = False  # False: strided inputs are read where they lie, a copy would be one more launch

    @property
    def name(self) -> str:
        digest = hashlib.sha256(expanded(f"{self.header}\0{self.source}").encode()).hexdigest()[:16]
        return f"turboquant_{self.role}_{digest}"

    def build(self, factory: KernelFactory) -> Kernel:
        """Nothing is compiled before the first launch."""
        options = {"shared_memory": self.shared_bytes} if self.shared_bytes else {}
        # MLX hands strides over to a body that names them; it does not look into included files.
        whole = expanded(self.source)
        strided = [x for x in (f"{name}_strides" for name in self.inputs) if x in whole and x not in self.source]
        header, source = self.header, f"// {' '.join(strided)}\n{self.source}" if strided else self.source
        if self.bounds:
            # MLX writes the signature; its function's name is a macro up to there.
            function = f"custom_kernel_{self.name}"
            header += f"#define {function} __launch_bounds__({self.bounds[0]}, {self.bounds[1]}) {function}\n"
            source = f"#undef {function}\n{source}"
        return factory(
            name=self.name,
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=source,
            header=header,
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


def lookup_text(name: str, values: npt.NDArray[Any]) -> str:
    """A function that gives one of a table's values, from the instructions themselves: no memory is waited for."""
    numbers = [f"{np.float32(v):.9e}f" for v in values]
    choice = "".join(f"i == {i} ? {x} : " for i, x in enumerate(numbers[:-1]))
    return f"TQ_FN float {name}(uint i) {{ return {choice}{numbers[-1]}; }}\n"


def header(dialect: Dialect, variant: Variant, tables: str) -> str:
    """What stands before the kernel."""
    names = [f"prelude_{dialect}", *(["instructions_cuda"] if dialect == "cuda" else []), "common"]
    names += [f"{variant}_helpers"] if variant != "portable" else []
    return "".join(included(dialect, name) for name in names) + tables


def exact_inputs(num_sets: int) -> tuple[str, ...]:
    """Names of a batch's exact rows: one set for all sequences, or one for each."""
    if num_sets == 1:
        return EXACT_INPUTS
    return tuple(f"{name}_{i}" for i in range(num_sets) for name in EXACT_INPUTS)


def portable_body(dialect: Dialect) -> str:
    """Attention of a block's query rows over exact rows or a run of compressed tokens, to unnormalised parts."""
    names = (f"opening_{dialect}", "plan", "decode_tables", "decode_shared", "decode_queries", "decode_setup")
    first = "".join(included(dialect, name) for name in names)
    exact, codes = included(dialect, "decode_exact"), included(dialect, "decode_codes")
    last = included(dialect, "decode_merge") + included(dialect, "decode_part")
    return f"{first}if (block_x == 0) {{\n{exact}}} else {{\n{codes}}}\n{last}"


def simd_body() -> str:
    """The same with Metal's 8x8 matrices."""
    return included("metal", "decode_simd")


def mma_body(switches: Mapping[str, int], sets: Sequence[str], sink: str) -> str:
    """The same on tensor cores, and where it is fused the merge of all parts by a row group's last block.

    switches: the TQ_ macros of src/decode_mma.h. sets: names of exact rows, whose strides the text must mention for MLX
    to hand them over. sink: what gives the attention sink of a query head `i`.
    """
    macros = "".join(f"#define TQ_{name} {value}\n" for name, value in switches.items())
    names = " ".join(f"{name}_strides" for name in sets)
    return f"// {names}\n{macros}#define TQ_SINK_OF(i) {sink}\n{included('cuda', 'decode_mma')}"


def combine_body(dialect: Dialect, *, by_lanes: bool) -> str:
    """All parts of a query row to its output."""
    return included(dialect, f"opening_{dialect}") + included(dialect, "combine_lanes" if by_lanes else "combine")
