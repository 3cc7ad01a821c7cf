"""Calls a compiled kernel as MLX would: checks the call, lays out buffers, runs the grid, returns outputs and a Report.

Owns `run_metal` and its drop-in form `metal_kernel`. Leaves out text and compiling (`signature`, `build`).
"""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from tests.metal.emulator.build import Options, library_path, load, operations, source_place
from tests.metal.emulator.counting import Operations
from tests.metal.emulator.errors import MetalError, MetalExecutionError, MetalLimitError
from tests.metal.emulator.native import Buffer, Launch, Result
from tests.metal.emulator.report import MAX_REGISTERS, MAX_THREADS, Report
from tests.metal.emulator.signature import METAL_TYPES, InputType, KernelText, TemplateValue
from tests.metal.emulator.spaces import check_types

# Inputs that kernels write in place (TQ_WRITABLE), in the array's own memory; whatever else one writes to is a fault.
IN_PLACE = frozenset({"codes", "scales", "target", "rows_k", "rows_v"})
_STACK_BYTES = 128 * 1024
# Registers a thread needs beside its arrays: positions, pointers, loop state. A guess, like the whole estimate.
_BASE_REGISTERS = 24
_last: list[Report] = []


class Given(NamedTuple):
    """An input as memory: bytes (with every stride inside), and the type, shape and strides that MLX would pass."""

    type: InputType
    data: np.ndarray
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def run_metal(
    *,
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    inputs: Sequence[Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[Any],
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    template: Sequence[tuple[str, Any]] = (),
    init_value: float | None = None,
    watched: bool = True,
    count_ops: bool = False,
    reverse: bool = False,
    seconds: int = 60,
) -> tuple[list[np.ndarray], Report]:
    """Runs one launch and returns (outputs, report); parameters up to `init_value` are those of MLX.

    watched: check every memory access (about 5 times slower than without). count_ops: fill the Report's arithmetic
    counts. reverse: run each simdgroup's lanes from the last to the first; results must not change. seconds: processor
    time after which the launch counts as never ending.

    Raises MetalCompileError, MetalLimitError, MetalExecutionError (see the package's docstring), ValueError for a call
    that MLX itself would refuse.
    """
    given = [_given(value, ensure_row_contiguous) for value in inputs]
    dtypes = tuple(dtype_name(dtype) for dtype in output_dtypes)
    _check_counts({"inputs": inputs}, len(input_names))
    _check_counts({"output_shapes": output_shapes, "output_dtypes": output_dtypes}, len(output_names))
    types = tuple(g.type for g in given)
    values = tuple((key, _template_value(value)) for key, value in template)
    names = tuple(input_names), tuple(output_names)
    kernel = KernelText(name, *names, source, header, atomic_outputs, types, dtypes, values)
    _check_threads(name, grid, threadgroup)
    check_types(kernel)

    def prepare() -> tuple[list[np.ndarray], Launch]:
        outputs = [_new_output(shape, dtype, init_value) for shape, dtype in zip(output_shapes, dtypes, strict=True)]
        launch = Launch.of(_buffers(kernel, given, outputs, init_value is not None), grid, threadgroup, _STACK_BYTES)
        launch.seconds, launch.reverse = seconds, reverse
        return outputs, launch

    counted = _count(kernel, prepare()[1]) if count_ops else None
    outputs, launch = prepare()
    options = Options(watched)
    result = Result()
    if load(kernel, options).emu_run(ctypes.byref(launch), ctypes.byref(result)):
        raise _failure(kernel, options, result)
    report = _report(name, grid, threadgroup, result, counted)
    _last[:] = [report]
    return [_as_values(array, dtype) for array, dtype in zip(outputs, dtypes, strict=True)], report


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: object | None = None,
) -> Callable[..., list[mx.array]]:
    """Stands in for `mx.fast.metal_kernel`: the returned function takes and gives `mx.array`s, evaluated at once."""

    def call(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
    ) -> list[mx.array]:
        outputs, _ = run_metal(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=source,
            header=header,
            inputs=inputs,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
            template=template or (),
            init_value=init_value,
        )
        dtypes = [getattr(mx, _mlx_name(dtype)) for dtype in output_dtypes]
        return [mx.array(out).astype(dtype) for out, dtype in zip(outputs, dtypes, strict=True)]

    return call


def last_report() -> Report:
    """The Report of the latest successful launch in this process."""
    return _last[0]


def dtype_name(dtype: Any) -> str:
    """ "float16" for mx.float16, np.float16, np.dtype("float16") and "float16"; raises ValueError for others."""
    text = dtype if isinstance(dtype, str) else str(dtype).removeprefix("mlx.core.")
    if text not in METAL_TYPES:
        text = np.dtype(dtype).name
    if text not in METAL_TYPES:
        raise ValueError(f"Metal kernels take no arrays of {dtype}")
    return text


def _mlx_name(dtype: Any) -> str:
    return dtype_name(dtype).replace("bool", "bool_")


def _template_value(value: Any) -> TemplateValue:
    return value if isinstance(value, (bool, int)) else dtype_name(value)


def _given(value: Any, ensure_row_contiguous: bool) -> Given:
    if isinstance(value, (bool, int, float)):
        value = mx.array(value)
    if isinstance(value, mx.array):
        name = dtype_name(value.dtype)
        array = np.asarray(value.view(mx.uint16) if name == "bfloat16" else value)
    else:
        array = np.asarray(value)
        name = dtype_name(array.dtype)
    if ensure_row_contiguous:
        array = np.ascontiguousarray(array).reshape(array.shape)
    strides = tuple(stride // array.itemsize for stride in array.strides)
    if array.size and not array.flags.c_contiguous:
        span = 1 + sum((extent - 1) * stride for extent, stride in zip(array.shape, strides, strict=True))
        data = np.lib.stride_tricks.as_strided(array, (span,), (array.itemsize,)).copy()
    else:
        data = np.ascontiguousarray(array).reshape(-1)
    return Given(InputType.of(name, array.ndim, array.size), data, array.shape, strides)


def _check_counts(given: dict[str, Sequence[Any]], wanted: int) -> None:
    for what, found in given.items():
        if len(found) != wanted:
            raise ValueError(f"[metal_kernel] Expected `{what}` to have size {wanted} but got size {len(found)}.")


def _check_threads(name: str, grid: Sequence[int], threadgroup: Sequence[int]) -> None:
    if min(*grid, *threadgroup) < 1:
        raise ValueError(f"{name}: every extent of grid {grid} and threadgroup {threadgroup} must be positive")
    if int(np.prod(threadgroup)) > MAX_THREADS:
        raise MetalLimitError(name, f"{int(np.prod(threadgroup))} threads per threadgroup; the limit is {MAX_THREADS}")


def _new_output(shape: Sequence[int], dtype: str, init_value: float | None) -> np.ndarray:
    if init_value is None:
        return np.empty(tuple(shape), np.uint16 if dtype == "bfloat16" else dtype)
    made = mx.full(tuple(shape), init_value).astype(getattr(mx, _mlx_name(dtype)))
    return np.array(made.view(mx.uint16) if dtype == "bfloat16" else made)


def _as_values(array: np.ndarray, dtype: str) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array


def _buffers(kernel: KernelText, given: Sequence[Given], outputs: Sequence[np.ndarray], filled: bool) -> list[Buffer]:
    """In the order of the signature's parameters."""
    made = []
    written = {one.data.ctypes.data for name, one in zip(kernel.input_names, given, strict=True) if name in IN_PLACE}
    for index, (name, one) in enumerate(zip(kernel.input_names, given, strict=True)):
        if one.data.ctypes.data in written:  # the array's own memory: it may also be given as another input
            made.append(Buffer.writing(name, one.data, True))
        else:
            made.append(Buffer.reading(name, one.data, one.type.is_constant))
        values: dict[str, np.ndarray] = {
            "shape": np.array(one.shape, np.int32),
            "strides": np.array(one.strides, np.int64),
            "ndim": np.array([len(one.shape)], np.int32),
        }
        made += [Buffer.reading(f"{name}_{key}", values[key], True) for key, _ in kernel.shape_parameters(index)]
    made += [Buffer.writing(name, out, filled) for name, out in zip(kernel.output_names, outputs, strict=True)]
    return made


def _failure(kernel: KernelText, options: Options, result: Result) -> MetalError:
    kind, message = result.kind.decode(), result.message.decode(errors="replace")
    place = source_place(library_path(kernel, options), result.code_offset)
    message += f" [{place}]" if place else ""
    return MetalLimitError(kernel.name, message) if kind == "limit" else MetalExecutionError(kernel.name, kind, message)


def _count(kernel: KernelText, launch: Launch) -> Operations:
    """Runs a build that counts; its outputs are dropped."""
    options = Options(watched=False, count_ops=True)
    loaded, result = load(kernel, options), Result()
    if loaded.emu_run(ctypes.byref(launch), ctypes.byref(result)):
        raise _failure(kernel, options, result)
    return operations(library_path(kernel, options), loaded)


def _report(
    name: str, grid: Sequence[int], threadgroup: Sequence[int], result: Result, counted: Operations | None
) -> Report:
    counts = result.counts
    per_group = [min(g, t) for g, t in zip(grid, threadgroup, strict=True)]
    num_groups = [-(-g // t) for g, t in zip(grid, threadgroup, strict=True)]
    registers = _BASE_REGISTERS + -(-counts.local_bytes // 4)
    warnings = []
    if registers > MAX_REGISTERS:
        warnings.append(f"about {registers} registers per thread; a GPU has {MAX_REGISTERS} and would spill")
    for axis, (extent, group) in enumerate(itertools.zip_longest(grid, threadgroup)):
        if extent % group and axis == 0:
            warnings.append(f"threadgroups at the grid's edge have {extent % group} of {group} threads")
    return Report(
        kernel=name,
        num_threads=int(np.prod(grid)),
        num_threadgroups=int(np.prod(num_groups)),
        threads_per_threadgroup=int(np.prod(per_group)),
        threadgroup_bytes=counts.threadgroup_bytes,
        registers_estimate=registers,
        device_read_bytes=counts.read_bytes[0],
        device_write_bytes=counts.write_bytes[0],
        device_read_bytes_unique=counts.unique_read_bytes,
        device_reads=counts.reads[0],
        device_writes=counts.writes[0],
        constant_read_bytes=counts.read_bytes[2],
        threadgroup_read_bytes=counts.read_bytes[1],
        threadgroup_write_bytes=counts.write_bytes[1],
        threadgroup_reads=counts.reads[1],
        threadgroup_writes=counts.writes[1],
        atomics=counts.atomics,
        simd_ops=counts.simd_ops,
        matrix_ops=counts.matrix_ops,
        barriers=counts.barriers,
        operations=counted,
        warnings=tuple(warnings),
    )
