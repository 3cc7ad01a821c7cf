"""The GPU kernels' source text: real functions in a small vocabulary (src/), and each vendor's prelude for it.

A kernel's header is the prelude, the constants of its shape and one file of src/ with what that includes; its body
calls one function. Owns how those are put together and handed to MLX. Leaves what a kernel is made from to
decode_text.py, page_kernels.py and flash.py.

Constants are written into the text instead of being template values: MLX handles those anew at every call, which costs
more than the launch. It also copies and frees the text at every call (40 KB: 9 us), so CUDA's text includes the files
of src/ by path; Metal's compiler sees no files, its text is whole. Kernels are told apart by name, so names carry a
digest of everything.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.gpu.module_files import stored_kernels
from turboquant_kv.codec.codebook import centroids
from turboquant_kv.codec.trellis_reference import levels

Dialect = Literal["metal", "cuda"]
Kernel = Callable[..., Any]
KernelFactory = Callable[..., Kernel]
"""mx.fast.metal_kernel, mx.fast.cuda_kernel, or something that takes the same arguments."""

_TYPE_NAMES: dict[Dialect, dict[mx.Dtype, str]] = {
    "metal": {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t", mx.uint8: "uchar", mx.uint32: "uint"},
    "cuda": {
        mx.float32: "float",
        mx.float16: "__half",
        mx.bfloat16: "__nv_bfloat16",
        mx.uint8: "uchar",
        mx.uint32: "uint",
    },
}
# TqPlace of src/common.h. On Metal these are parameters, which MLX adds for a body that names them.
PLACE: dict[Dialect, str] = {
    "cuda": "TQ_PLACE",
    "metal": "{thread_position_in_threadgroup.x, thread_index_in_simdgroup, simdgroup_index_in_threadgroup, "
    "threadgroup_position_in_grid.x, threadgroup_position_in_grid.y, threadgroup_position_in_grid.z, "
    "threadgroups_per_grid.x}",
}
_FOLDER = resources.files("turboquant_kv").joinpath("src")
_INCLUDED = re.compile(r'^#include "(?:.*/)?(\w+)\.h"$', re.MULTILINE)


@cache
def piece(name: str) -> str:
    """One file of src/ without comment lines and indentation: texts are copied at every call."""
    text = _FOLDER.joinpath(f"{name}.h").read_text(encoding="utf-8")
    lines = (line for line in map(str.strip, text.splitlines()) if line and not line.startswith(("//", "#pragma once")))
    return "".join(f"{line}\n" for line in lines)


def expanded(text: str, without: tuple[str, ...] = ()) -> str:
    """A text with the files of src/ that it includes put in, each once, but for those named."""
    seen = set(without)

    def put(found: re.Match[str]) -> str:
        if found[1] in seen:
            return ""
        seen.add(found[1])
        return _INCLUDED.sub(put, piece(found[1])).rstrip("\n")

    return _INCLUDED.sub(put, text)


def included(dialect: Dialect, name: str) -> str:
    """A line that includes a file of src/: by its path where the compiler reads files, else for `expanded`."""
    path = _FOLDER.joinpath(f"{name}.h")
    reads_files = dialect == "cuda" and isinstance(path, Path) and not set('"\\\n') & set(str(path))
    return f'#include "{path}"\n' if reads_files else f'#include "{name}.h"\n'


def mlx_factory(dialect: Dialect) -> KernelFactory:
    """MLX's own; CUDA's kernels are kept compiled, which MLX does not do."""
    factory: Any = mx.fast.metal_kernel if dialect == "metal" else stored_kernels(mx.fast.cuda_kernel)
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
    bounds: tuple[int, int] | None = None  # threads of a block, blocks per processor: for its registers (CUDA)
    contiguous: bool = False  # False: strided inputs are read where they lie, a copy would be one more launch

    @property
    def name(self) -> str:
        digest = hashlib.sha256(expanded(f"{self.header}\0{self.source}").encode()).hexdigest()[:16]
        return f"turboquant_{self.role}_{digest}"

    def build(self, factory: KernelFactory) -> Kernel:
        """Nothing is compiled before the first launch."""
        options = {"shared_memory": self.shared_bytes} if self.shared_bytes else {}
        header, source = self.header, self.source
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
    """Definitions of a kernel's constants and types, as few letters as may be: texts are copied at every call."""
    types = [(name, value) for name, value in constants.items() if isinstance(value, mx.Dtype)]
    numbers = [f"{name} = {int(value)}" for name, value in constants.items() if not isinstance(value, mx.Dtype)]
    named = "".join(f"typedef {_TYPE_NAMES[dialect][value]} {name};\n" for name, value in types)
    return (f"TQ_CONSTANT int {', '.join(numbers)};\n" if numbers else "") + named


def codec_table(bits: int, trellis: bool) -> npt.NDArray[np.float32]:
    """What a codec's levels stand for: 2**bits centroids, or a trellis' twice as many."""
    return levels(bits) if trellis else centroids(bits)


def table_text(name: str, values: npt.NDArray[Any]) -> str:
    """A constant float table at program scope."""
    numbers = ", ".join(f"{np.float32(v):.9e}f" for v in values)
    return f"TQ_TABLE float {name}[{len(values)}] = {{{numbers}}};\n"


def lookup_text(name: str, values: npt.NDArray[Any]) -> str:
    """A function that gives one of a table's values, from the instructions themselves: no memory is waited for."""
    numbers = [f"{np.float32(v):.9e}f" for v in values]
    choice = "".join(f"i == {i} ? {x} : " for i, x in enumerate(numbers[:-1]))
    return f"TQ_FN float {name}(uint i) {{ return {choice}{numbers[-1]}; }}\n"


def header_text(dialect: Dialect, constants: Constants, tables: str, file: str) -> str:
    """What stands before a kernel: the vocabulary, its constants and tables, and a file of src/ with its function."""
    names = [f"prelude_{dialect}", *(["instructions_cuda"] if dialect == "cuda" else [])]
    vocabulary = "".join(included(dialect, name) for name in names)
    text = vocabulary + constants_text(dialect, constants) + tables + included(dialect, file)
    return expanded(text) if dialect == "metal" else text


def strided(name: str, num_strides: int) -> str:
    """An input and its strides, in elements, as the members of a struct. MLX hands over what a body names."""
    return ", ".join([name, *(f"{name}_strides[{i}]" for i in range(num_strides))])
