"""A stand-in for mx.fast.cuda_kernel on machines without CUDA: the very text, compiled by g++ and run by shim.h.

Only the instructions that need inline assembly are replaced. It shows what a kernel computes, that its threads meet,
and that nothing is read before it was written or past an input's end; not how fast it is.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tests.metal.emulator.build import SHIM as METAL_SHIM
from tests.metal.emulator.build import cache_folder

from turboquant_kv.backends.gpu.source import expanded

SHIM = Path(__file__).with_name("shim.h")
RUNTIME = Path(__file__).with_name("runtime.cpp")
SWITCH = METAL_SHIM / "switch.h"  # both emulators' threads are fibres
CTYPES = {
    **{mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"},
    **{mx.int32: "int32_t", mx.uint8: "uint8_t", mx.uint32: "uint32_t"},
}
INCLUDE = re.compile(r"^#include.*$", re.MULTILINE)
# Without -fno-gnu-unique kernels share the first one's shared memory of the same name, whatever its size.
COMPILER = ("g++", "-std=c++20", "-Og", "-fno-strict-aliasing", "-fno-gnu-unique", "-w", "-fPIC")
# Inputs that kernels write in place (TQ_WRITABLE); whatever else one writes to is a fault.
IN_PLACE = frozenset({"codes", "scales", "target", "rows_k", "rows_v"})
ARENA = re.compile(r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];")


class LaunchError(RuntimeError):
    """The emulated launch did something that is undefined on a GPU."""


class GuardedBuffer:
    """Bytes that end right before a page that nobody may touch."""

    def __init__(self, num_bytes: int) -> None:
        page = mmap.PAGESIZE
        room = -(-num_bytes // page) * page
        self._map = mmap.mmap(-1, room + page)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self._base + room), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self.address = self._base + (room - num_bytes) // 16 * 16
        self.num_bytes = num_bytes

    def write(self, data: bytes) -> None:
        ctypes.memmove(self.address, data, len(data))

    def read(self) -> bytes:
        return ctypes.string_at(self.address, self.num_bytes)


def raw_bytes(x: mx.array) -> bytes:
    x = mx.contiguous(x)
    return bytes(np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x).tobytes())


def array_from(data: bytes, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    if dtype == mx.bfloat16:
        return mx.array(np.frombuffer(data, np.uint16).reshape(shape)).view(mx.bfloat16)
    kind = {
        mx.float32: np.float32,
        mx.float16: np.float16,
        mx.int32: np.int32,
        mx.uint32: np.uint32,
        mx.uint8: np.uint8,
    }[dtype]
    return mx.array(np.frombuffer(data, kind).reshape(shape))


def cuda_kernel(
    name: str,
    input_names: list[str],
    output_names: list[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    shared_memory: int = 0,
) -> Callable[..., list[mx.array]]:
    """As mx.fast.cuda_kernel. Strided inputs are handed over contiguous, with the strides that they then have."""

    def call(
        *,
        inputs: list[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        text = kernel_text(name, input_names, output_names, source, header, inputs, output_dtypes)
        run = compiled(text)
        guarded = []
        arguments: list[Any] = []
        for input_name, x in zip(input_names, inputs, strict=True):
            data = raw_bytes(x)
            guarded.append(GuardedBuffer(len(data)))
            guarded[-1].write(data)
            arguments.append(ctypes.c_void_p(guarded[-1].address))
            if f"{input_name}_strides" in source:
                strides = np.cumprod([1, *reversed(x.shape[1:])])[::-1].astype(np.int64)
                arguments.append((ctypes.c_int64 * 8)(*strides.tolist()))
        outputs = [GuardedBuffer(int(np.prod(s)) * d.size) for s, d in zip(output_shapes, output_dtypes, strict=True)]
        for out in outputs:
            out.write(b"\xff" * out.num_bytes)  # NaN in every float type
            arguments.append(ctypes.c_void_p(out.address))
        blocks = [-(-g // t) for g, t in zip(grid, threadgroup, strict=True)]
        failure = run(*map(ctypes.c_uint, blocks), ctypes.c_uint(threadgroup[0]), *arguments)
        if failure is not None:
            raise LaunchError(f"{name}: {failure.decode()}")
        for input_name, x, buffer in zip(input_names, inputs, guarded, strict=True):
            _write_back(name, input_name, x, buffer)
        made = zip(outputs, output_shapes, output_dtypes, strict=True)
        return [array_from(out.read(), shape, dtype) for out, shape, dtype in made]

    return call


def _write_back(kernel: str, name: str, x: mx.array, buffer: GuardedBuffer) -> None:
    """What a kernel has written to an input goes to the array's own memory, if it may write there."""
    data = buffer.read()
    if data == raw_bytes(x):
        return
    view = np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)
    if name not in IN_PLACE or not view.flags.c_contiguous:
        raise LaunchError(f"{kernel} has written to its input {name}")
    ctypes.memmove(view.ctypes.data, data, len(data))


def kernel_text(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str,
    inputs: Sequence[mx.array],
    output_dtypes: Sequence[mx.Dtype],
) -> str:
    """A C++ program text with the kernel and an entry point for ctypes."""
    declared, passed = [], []
    for input_name, x in zip(input_names, inputs, strict=True):
        declared.append(f"const {CTYPES[x.dtype]}* {input_name}")
        passed.append((declared[-1], input_name))
        if f"{input_name}_strides" in source:
            declared.append(f"const Strides& {input_name}_strides")
            passed.append((f"const Strides* {input_name}_strides", f"*{input_name}_strides"))
    for output_name, dtype in zip(output_names, output_dtypes, strict=True):
        declared.append(f"{CTYPES[dtype]}* {output_name}")
        passed.append((declared[-1], output_name))
    header = INCLUDE.sub("", expanded(header, without=("instructions_cuda", "instructions_hopper")))
    header = ARENA.sub(r"\1* \2 = reinterpret_cast<\1*>(cuda_arena);", header)
    return (
        f'#include "{SHIM.name}"\n{header}void {name}({", ".join(declared)}) {{\n{source}\n}}\n'
        f'extern "C" const char* launch(unsigned x, unsigned y, unsigned z, unsigned threads, '
        f"{', '.join(p for p, _ in passed)}) {{\n"
        f"return run_grid({{x, y, z}}, threads, [&] {{ {name}({', '.join(a for _, a in passed)}); }});\n}}\n"
    )


def compiled(text: str) -> Any:
    """The program's entry point; libraries are kept by content, as the Metal emulator's are."""
    library = cache_folder() / f"cuda-{_key(text)}.so"
    if not library.exists():
        program = library.with_suffix(f".{os.getpid()}.cpp")
        program.write_text(text)
        _compile(library, "-shared", program, _runtime())
        program.unlink()
    entry = ctypes.CDLL(str(library)).launch
    entry.restype = ctypes.c_char_p
    return entry


@functools.cache
def _runtime() -> Path:
    made = cache_folder() / f"cuda-{_key('')}.o"
    if not made.exists():
        _compile(made, "-c", RUNTIME)
    return made


def _compile(target: Path, *arguments: str | Path) -> None:
    # Written under another name and renamed, so that two test processes cannot meet half a file.
    made = target.with_suffix(f".{os.getpid()}{target.suffix}")
    command: list[str | Path] = [*COMPILER, "-I", SHIM.parent, "-I", SWITCH.parent, "-o", made, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"g++ refused the kernel:\n{done.stderr[:4000]}")
    made.rename(target)


def _key(text: str) -> str:
    return hashlib.sha256("\0".join([*COMPILER, _common_text(), text]).encode()).hexdigest()[:24]


@functools.cache
def _common_text() -> str:
    return SHIM.read_text() + RUNTIME.read_text() + SWITCH.read_text()
