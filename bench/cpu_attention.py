"""Attention over compressed pages on the CPU, beside every uncompressed rival, in one run.

    python bench/cpu_attention.py [--quick] [--isa avx2] [--torch-python PATH] [--json FILE]

Rivals: mx.fast.scaled_dot_product_attention in three dtypes, PyTorch's in bfloat16 and float32 (query group passed as
rows, its fastest way; a process of its own, `--torch-python` names an interpreter that has it), and a plain read of the
cache in float16, which no uncompressed kernel can beat. Medians of interleaved rounds; the milliseconds belong to the
machine, the ratios are the claim. Whole steps are bench/end_to_end.py's.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _rows import Row, add_json_option, print_rows, write_rows

from turboquant_kv import blas

blas.interpose()  # before mlx is imported

import mlx.core as mx

from turboquant_kv.backends.base import (
    AttentionCall,
    ExactBuffers,
    LayerShape,
    Means,
    PageIds,
    PageWrites,
    RowSpan,
    SequenceView,
    StepRows,
)
from turboquant_kv.backends.native import backend as native
from turboquant_kv.backends.numpy_ops.backend import as_rows
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import Rotary

MLX_LIMIT = 32768  # tokens times batch; beyond, MLX takes seconds a call and no rival is near
RIVAL_LIMIT = 8 * 131072
KV_HEADS, GROUP, DIM = 8, 4, 128
TARGETS = {1024: 2.0, 8192: 8.0, 32768: 8.0, 131072: 8.0}  # times faster than the best uncompressed rival
AVX2_TARGET = 3.0
PREFILL_MEMORY_SHARE = 0.1  # of what MLX's scores take; ours needs the output and a block of scores a thread
READ_TARGET = 2.5  # times faster than reading the float16 cache once, from 32K up

TORCH_CHILD = """
import json, statistics, sys, time
import torch
torch.set_num_threads(int(sys.argv[2]))
answers = []
for batch, tokens, kv_heads, group, dim in json.loads(sys.argv[1]):
    best = {}
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        q = torch.randn(batch, kv_heads, group, dim).to(dtype)
        k, v = (torch.randn(batch, kv_heads, tokens, dim).to(dtype) for _ in range(2))
        seconds = []
        with torch.inference_mode():
            for _ in range(9):
                start = time.perf_counter()
                torch.nn.functional.scaled_dot_product_attention(q, k, v)
                seconds.append(time.perf_counter() - start)
        best[name] = 1e3 * statistics.median(seconds[1:])
    answers.append(best)
print(json.dumps(answers))
"""


class Shape(NamedTuple):
    batch: int
    tokens: int
    kv_heads: int = KV_HEADS
    group: int = GROUP
    dim: int = DIM

    @property
    def name(self) -> str:
        return f"B={self.batch} N={self.tokens} {self.kv_heads * self.group}/{self.kv_heads} heads D={self.dim}"


def milliseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median of each call; rounds are interleaved, so a busy moment hits all.

    Each timed call follows one of its own kind, as PyTorch's do in their process: what fits the last-level cache is
    there for everyone, and nobody pays for what another evicted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            for _ in range(2):
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def ours(
    shape: Shape,
    fmt: KVFormat,
    backend: native.NativeBackend,
    *,
    scattered: bool = False,
    means: Means | None = None,
) -> Callable[[], Any]:
    """One decode step's attention in one layer: a table of pages, exact ends, all rows in one call.

    Pages have their ids in order, as prefill gives them out, or are scattered over the pool, as after long service.
    """
    rng = np.random.default_rng(0)
    storage = backend.new_store(LayerShape(shape.kv_heads, shape.dim, shape.dim, mx.bfloat16), fmt, means)
    pages = fmt.num_pages(shape.tokens)
    storage.grow(pages * shape.batch)
    order = rng.permutation(pages * shape.batch) if scattered else np.arange(pages * shape.batch)
    step = 32
    rows = rng.standard_normal((shape.kv_heads, step * fmt.page_tokens, shape.dim), np.float32)
    for at in range(0, len(order), step):
        ids = order[at : at + step]
        part = rows[:, : len(ids) * fmt.page_tokens]
        storage.encode(PageWrites.following(ids, int(ids[0]), fmt.page_tokens), part, part)
    tail = shape.tokens - fmt.sink_tokens - pages * fmt.page_tokens

    def view(ids: PageIds, first: int) -> SequenceView:
        ends = RowSpan(0, first, fmt.sink_tokens), RowSpan(shape.tokens - tail, first + fmt.sink_tokens, tail)
        return SequenceView(shape.tokens - 1, 1, ids, *ends)

    exact_tokens = fmt.sink_tokens + tail  # of each row, behind each other
    held = as_rows(mx.random.normal((shape.kv_heads, shape.batch * exact_tokens, shape.dim)).astype(mx.bfloat16))
    exact = ExactBuffers(held, held, held, held)
    views = [view(ids, i * exact_tokens) for i, ids in enumerate(np.split(order, shape.batch))]
    q = mx.random.normal((shape.batch, shape.kv_heads * shape.group, 1, shape.dim)).astype(mx.bfloat16)
    mx.eval(q)
    scale = shape.dim**-0.5
    call = AttentionCall(q, backend.prepare_step(StepRows(views)), exact, scale)
    return lambda: mx.eval(storage.attend(call))


def mlx_rival(shape: Shape, dtype: mx.Dtype) -> Callable[[], Any]:
    q = mx.random.normal((shape.batch, shape.kv_heads * shape.group, 1, shape.dim)).astype(dtype)
    k, v = (mx.random.normal((shape.batch, shape.kv_heads, shape.tokens, shape.dim)).astype(dtype) for _ in range(2))
    mx.eval(q, k, v)
    return lambda: mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.dim**-0.5))


def read_rival(shape: Shape) -> Callable[[], Any]:
    """A sum over as many bytes as the float16 cache has; NumPy's is vectorised and, on all cores, bound by memory."""
    num_bytes = shape.batch * shape.tokens * shape.kv_heads * shape.dim * 2 * 2
    data = np.ones(num_bytes // 8, np.int64)
    from concurrent.futures import ThreadPoolExecutor  # NumPy releases the GIL while it sums

    pool = ThreadPoolExecutor(native.num_threads())
    parts = np.array_split(data, native.num_threads())
    return lambda: list(pool.map(np.sum, parts))


def torch_rival(python: str, shapes: list[Shape]) -> list[dict[str, float]] | None:
    """Medians per shape, or None where that interpreter has no torch."""
    command = [python, "-c", TORCH_CHILD, json.dumps([list(s) for s in shapes]), str(native.num_threads())]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        print(f"PyTorch is missing from this run ({answer.stderr.strip().splitlines()[-1]}); see --torch-python")
        return None
    result: list[dict[str, float]] = json.loads(answer.stdout)
    return result


def decode_rows(shapes: list[Shape], backend: native.NativeBackend, torch_python: str, rounds: int) -> list[Row]:
    with_rivals = [s for s in shapes if s.batch * s.tokens <= RIVAL_LIMIT]
    torch_ms = torch_rival(torch_python, with_rivals)
    rows: list[Row] = []
    for shape in shapes:
        calls = {f"{f} bits": ours(shape, KVFormat.parse(f), backend) for f in ("4/4", "4/3")}
        calls["4/4 bits, scattered pages"] = ours(shape, KVFormat(4, 4), backend, scattered=True)
        calls["read f16"] = read_rival(shape)
        times = milliseconds(calls, rounds)
        rivals: dict[str, float] = {}
        if shape.batch * shape.tokens <= MLX_LIMIT:
            dtypes = {"MLX f32": mx.float32, "MLX bf16": mx.bfloat16, "MLX f16": mx.float16}
            rivals |= milliseconds({name: mlx_rival(shape, dtype) for name, dtype in dtypes.items()}, 3)
        if torch_ms is not None and shape in with_rivals:
            rivals |= {f"PyTorch {name}": ms for name, ms in torch_ms[with_rivals.index(shape)].items()}
        of_shape = _rows_of(shape, times, rivals, backend)
        print_rows(of_shape)
        sys.stdout.flush()
        rows += of_shape
    return rows


def _rows_of(
    shape: Shape, times: dict[str, float], rivals: dict[str, float], backend: native.NativeBackend
) -> list[Row]:
    read = times.pop("read f16")
    rows = [Row.plain(f"{shape.name}: {name}", ms, "ms") for name, ms in rivals.items()]
    rows.append(Row.plain(f"{shape.name}: read f16", read, "ms"))
    target = AVX2_TARGET if backend.isa == "avx2" else TARGETS.get(shape.tokens)
    for name, ms in times.items():
        if rivals:
            best = min(rivals, key=lambda rival: rivals[rival])
            rows.append(Row.at_least_ratio(f"{shape.name}: {name} against {best}", ms, "ms", rivals[best], target))
        goal = READ_TARGET if shape.tokens >= 32768 and backend.isa != "avx2" else None
        rows.append(Row.at_least_ratio(f"{shape.name}: {name} against reading f16", ms, "ms", read, goal))
    return rows


def cliff_rows(backend: native.NativeBackend, rounds: int) -> list[Row]:
    """Other head dims and groups with as many stored codes as the headline shape has at 8K tokens.

    Cost is bound by bytes where few query heads share a code, by multiplications where many do: the smaller of time per
    code and time per multiplication is compared with the headline's.
    """
    fmt = KVFormat(4, 4)
    shapes = [Shape(1, 8192), Shape(1, 16384, dim=64), Shape(1, 10944, dim=96), Shape(1, 4096, dim=256)]
    shapes += [Shape(1, 8192, group=g) for g in (1, 7, 8)]
    times = milliseconds({s.name: ours(s, fmt, backend) for s in shapes}, rounds)
    base = times[shapes[0].name]
    rows = []
    for s in shapes[1:]:
        codes = s.tokens * s.dim / (8192 * 128)
        per_unit = min(times[s.name] / codes, times[s.name] / codes * GROUP / s.group)
        rows.append(Row.at_most(f"{s.name}: per element against D=128, G=4", per_unit, "ms", 1.5 * base, base))
    print_rows(rows)
    return rows


def format_rows(backend: native.NativeBackend, rounds: int) -> list[Row]:
    """Trellis formats beside scalar ones of the same bits, and key means that turn beside constant ones."""
    rows = []
    for shape in (Shape(1, 16384), Shape(1, 4096, kv_heads=3, group=3, dim=64)):
        mean = np.random.default_rng(0).standard_normal((shape.kv_heads, shape.dim)).astype(np.float32)
        turning = Rotary(10000.0 ** (-np.arange(shape.dim // 2) / (shape.dim // 2)), 1, shape.dim // 2)
        calls = {name: ours(shape, KVFormat.parse(name), backend) for name in ("4/3", "4t/3t", "3/2", "3t/2t")}
        calls["constant"] = ours(shape, KVFormat(), backend, means=Means(mean, mean))
        calls["turning"] = ours(shape, KVFormat(), backend, means=Means(mean, mean, turning))
        times = milliseconds(calls, 3 * rounds)
        for trellis, scalar in (("4t/3t", "4/3"), ("3t/2t", "3/2")):
            speed = times[scalar] / times[trellis]
            rows.append(Row.at_least(f"{shape.name}: speed of {trellis} over {scalar}", speed, "", 0.85))
        limit = 1.10 * times["constant"]
        rows.append(
            Row.at_most(f"{shape.name}: 4/4 with means that turn", times["turning"], "ms", limit, times["constant"])
        )
    print_rows(rows)
    return rows


def peak_growth_mib(call: Callable[[], Any]) -> float:
    """By how much the process grows while `call` runs, at its highest; Linux only, 0 elsewhere."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0.0

    def kib(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    mx.clear_cache()
    reset.write_text("5")  # the high-water mark begins anew
    before = kib("VmRSS")
    call()
    return (kib("VmHWM") - before) / 1024


def prefill_rows(backend: native.NativeBackend, rounds: int, history: int = 16384, chunk: int = 2048) -> list[Row]:
    """A causal chunk over a history, two KV heads; MLX multiplies through the interposed BLAS."""
    heads, fmt = 2, KVFormat(4, 4)
    num_q, total = heads * GROUP, history + chunk
    storage = backend.new_store(LayerShape(heads, DIM, DIM, mx.float32), fmt, None)
    pages = np.arange(fmt.num_pages(total))
    storage.grow(len(pages))
    x = np.random.default_rng(0).standard_normal((heads, len(pages) * fmt.page_tokens, DIM), np.float32)
    writes = PageWrites.following(pages, 0, fmt.page_tokens)
    encode_ms = milliseconds({"encode": lambda: storage.encode(writes, x, x)}, 3)["encode"]
    start = fmt.page_start((history - fmt.sink_tokens) // fmt.page_tokens)
    rest = as_rows(mx.random.normal((heads, total - start, DIM)))
    sink = as_rows(mx.random.normal((heads, fmt.sink_tokens, DIM)))
    view = SequenceView(history, chunk, pages, RowSpan(0, 0, fmt.sink_tokens), RowSpan(start, 0, total - start))
    exact, step = ExactBuffers(sink, sink, rest, rest), StepRows([view], chunk)
    q = mx.random.normal((1, num_q, chunk, DIM))
    k, v = (mx.random.normal((1, heads, total, DIM)) for _ in range(2))
    mx.eval(q, k, v)
    scale = DIM**-0.5
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: mx.eval(storage.attend(AttentionCall(q, backend.prepare_step(step), exact, scale))),
        "MLX f32": lambda: mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")),
    }
    times = milliseconds(calls, rounds)
    peaks = {name: peak_growth_mib(call) for name, call in calls.items()}
    rows = [
        Row.at_least_ratio(
            f"prefill {chunk} over {history}: 4/4 against MLX f32", times["ours"], "ms", times["MLX f32"], 1.0
        ),
        Row.plain(f"prefill {chunk} over {history}: MLX f32 memory above its inputs", peaks["MLX f32"], "MiB"),
        Row.at_most(
            f"prefill {chunk} over {history}: memory above the inputs, 4/4",
            peaks["ours"],
            "MiB",
            PREFILL_MEMORY_SHARE * peaks["MLX f32"],
            peaks["MLX f32"],
        ),
        Row.plain(f"encode {len(pages) * fmt.page_tokens} tokens, {heads} heads", encode_ms, "ms"),
    ]
    print_rows(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1K and 8K tokens, batch 1 only")
    parser.add_argument("--isa", default="", help="force an instruction-set level, such as avx2")
    parser.add_argument("--formats-only", action="store_true", help="trellis formats and means that turn, no rivals")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--rounds", type=int, default=15)
    add_json_option(parser)
    options = parser.parse_args()
    if options.isa:
        os.environ[native.ISA_SWITCH] = options.isa
    mx.set_default_device(mx.cpu)
    backend = native.NativeBackend()
    print(f"{backend.name}, {native.num_threads()} threads; BLAS: {blas.status().describe()}")
    if options.formats_only:
        write_rows(options.json, format_rows(backend, options.rounds))
        return
    lengths, batches = ((1024, 8192), (1,)) if options.quick else ((1024, 8192, 32768, 131072), (1, 8))
    shapes = [Shape(b, n) for b in batches for n in lengths if b * n <= RIVAL_LIMIT]
    rows = decode_rows(shapes, backend, options.torch_python, options.rounds)
    rows += cliff_rows(backend, options.rounds)
    rows += format_rows(backend, options.rounds)
    rows += prefill_rows(backend, 3)
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
