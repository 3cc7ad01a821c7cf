"""Runs custom Metal kernels on the CPU: the very text that `mx.fast.metal_kernel` would be given, under watch.

Owns the package's public names; the parts are `signature` (the function that MLX generates around a body), `rewrite`
(Metal to C++), `spaces` (clang's judgement of types), `build` (g++ and its cache), `counting` (arithmetic), `launch`
(buffers, grid, results) and `shim/` (Metal's library in C++, the fibres and the memory checks). Leaves out speed: it
proves what a kernel computes, not how fast a GPU does.

Two ways in:

    outputs, report = run_metal(                     # numpy in and out
        name="scale", input_names=["x"], output_names=["y"],
        source="uint i = thread_position_in_grid.x; y[i] = x[i] * T(2);", header="",
        inputs=[x], template=[("T", mx.float16)], grid=(n, 1, 1), threadgroup=(32, 1, 1),
        output_shapes=[(n,)], output_dtypes=[mx.float16])

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)    # code under test runs unchanged, mx.array in and out
    ... mx.fast.metal_kernel(name=..., ...)(inputs=..., grid=..., ...)
    last_report()                                                 # of the latest launch

`inputs` may be numpy arrays, `mx.array`s (bfloat16 included) or Python scalars; dtypes may be `mx.Dtype`s, numpy dtypes
or names ("bfloat16"). `run_metal` gives bfloat16 outputs as float32 arrays holding the same values.

What a launch reports as an exception (all are `MetalError`; the message says kernel, threadgroup, thread and line):

    MetalCompileError       what does not compile, and what g++ would take but Metal would not (`rewrite`, `spaces`)
    MetalLimitError         over 32768 bytes of threadgroup memory or over 1024 threads per threadgroup
    MetalExecutionError     `.kind` is one of
        "barrier-divergence"  "simd-divergence"  "deadlock"  "timeout"  "stack-overflow"
        "out-of-bounds-read"  "out-of-bounds-write"  "index-out-of-bounds"  "write-to-constant"
        "uninitialised-read" (threadgroup memory; outputs without init_value)  "race" (no barrier in between; also
        between threadgroups on outputs)  "inactive-lane"  "bad-shift"  "division-by-zero"  "misaligned"
"""

from tests.metal.emulator.errors import MetalCompileError, MetalError, MetalExecutionError, MetalLimitError
from tests.metal.emulator.launch import last_report, metal_kernel, run_metal
from tests.metal.emulator.report import Report

__all__ = [
    "MetalCompileError",
    "MetalError",
    "MetalExecutionError",
    "MetalLimitError",
    "Report",
    "last_report",
    "metal_kernel",
    "run_metal",
]
