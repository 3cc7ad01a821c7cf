"""`turboserve bench kernels`: attention over compressed caches on this machine, beside MLX's uncompressed attention.

One layer, one conversation, random content: what a decode step's attention costs as the context grows. Owns the
measuring and the table; imports MLX only when called.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turboquant_kv import KVFormat, UnsupportedFormatError
from turboquant_kv.codec.format import check_head_dim
from turboserve.cli.backend import load_backend
from turboserve.cli.progress import Bars
from turboserve.errors import StartupError

NUM_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class KernelBench:
    """What to measure: heads as in the model, tokens per context, formats, and calls that follow each other."""

    num_q_heads: int = 40
    num_kv_heads: int = 8
    dim: int = 128
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    formats: tuple[str, ...] = ("4/4", "4/3", "3/3")
    num_calls: int = 20

    def check(self) -> None:
        """Raises StartupError for heads that do not share out, unknown formats and contexts without pages."""
        if self.num_kv_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise StartupError(f"{self.num_q_heads} query heads do not share {self.num_kv_heads} KV heads evenly.")
        if not self.lengths or min(self.lengths) < 256:
            raise StartupError("Contexts shorter than 256 tokens hold no compressed page worth measuring.")
        try:
            for name in self.formats:
                KVFormat.parse(name)
            check_head_dim(self.dim)
        except UnsupportedFormatError as exc:
            raise StartupError(str(exc)) from exc


def run(bench: KernelBench) -> int:
    """Measure and print one table row per context length; returns the exit status."""
    bench.check()
    blas = load_backend()
    from turboquant_kv.backends.choice import choose_backend  # late: brings in MLX, which must find its BLAS

    backend = choose_backend(_backend_name())
    dtype = _dtype()
    plain_name = str(dtype).rpartition(".")[2]
    print(f"backend {backend.name}, {bench.num_q_heads}/{bench.num_kv_heads} heads, {bench.dim} dims; us per call")
    print(f"x: times as fast as MLX's own attention in {plain_name}, BLAS: {blas.describe()}")
    print(f"{'tokens':>8} {plain_name:>9}" + "".join(f"{name:>16}" for name in bench.formats), flush=True)
    bars = Bars()
    for num_tokens in bench.lengths:
        with bars.step(f"measuring {num_tokens:,} tokens"):
            plain = plain_us(bench, num_tokens, dtype)
            figures = [compressed_us(backend, bench, KVFormat.parse(name), num_tokens, dtype) for name in bench.formats]
        print(f"{num_tokens:8} {plain:9.1f}" + "".join(f"{x:9.1f} {plain / x:5.2f}x" for x in figures), flush=True)
    return 0


def _backend_name() -> str:
    """The fused kernels where there is a GPU, whatever `auto` would take."""
    import mlx.core as mx

    return "gpu" if mx.metal.is_available() or mx.cuda.is_available() else "auto"


def _dtype() -> Any:
    """What MLX's own attention is fastest in: float16 on a GPU.

    A CPU multiplies halves without a BLAS, more than ten times as slow as float32, which it serves models in.
    """
    import mlx.core as mx

    return mx.float16 if mx.metal.is_available() or mx.cuda.is_available() else mx.float32


def call_us(step: Callable[[Any], Any], query: Any, num_calls: int) -> float:
    """Median microseconds of a call in a chain, so that no two run at the same time; the first round warms up."""
    import mlx.core as mx

    times = []
    for _ in range(NUM_ROUNDS + 1):
        start = time.perf_counter()
        x = query
        for _ in range(num_calls):
            x = step(x)
        mx.eval(x)
        times.append((time.perf_counter() - start) / num_calls * 1e6)
    return statistics.median(times[1:])


def plain_us(bench: KernelBench, num_tokens: int, dtype: Any) -> float:
    """MLX's own attention over keys and values of this type."""
    import mlx.core as mx

    query = mx.random.normal((1, bench.num_q_heads, 1, bench.dim)).astype(dtype)
    k, v = (mx.random.normal((1, bench.num_kv_heads, num_tokens, bench.dim)).astype(dtype) for _ in "kv")
    mx.eval(query, k, v)
    return call_us(lambda x: mx.fast.scaled_dot_product_attention(x, k, v, scale=0.1), query, bench.num_calls)


def compressed_us(backend: Any, bench: KernelBench, fmt: KVFormat, num_tokens: int, dtype: Any) -> float:
    """The backend's attention over as many tokens: exact ends and pages of random codes in random order.

    dtype: of queries and exact ends.
    """
    import mlx.core as mx

    from turboquant_kv.backends.base import AttentionCall, ExactBuffers, LayerShape, RowSpan, SequenceView, StepRows

    shape = LayerShape(bench.num_kv_heads, bench.dim, bench.dim, dtype)
    storage = backend.new_store(shape, fmt, None)
    num_pages = max(1, (num_tokens - fmt.sink_tokens) // fmt.page_tokens - 1)
    rng = np.random.default_rng(num_tokens)
    storage.grow(num_pages)
    storage.write(np.arange(num_pages), random_pages(shape, fmt, num_pages, rng))
    start, num_own = fmt.page_start(num_pages), fmt.page_tokens // 2
    sink, window = RowSpan(0, 0, fmt.sink_tokens), RowSpan(start, fmt.sink_tokens, num_own)
    order = rng.permutation(num_pages).astype(np.int64)
    rows = StepRows([SequenceView(start + num_own - 1, 1, order, sink, window)])
    k, v = _exact_rows(backend, shape, fmt.sink_tokens + num_own)
    exact = ExactBuffers(k, v, k, v)
    query = mx.random.normal((1, bench.num_q_heads, 1, bench.dim)).astype(dtype)

    def step(x: Any) -> Any:
        backend.wait_for([x])
        return storage.attend(AttentionCall(x, backend.prepare_step(rows), exact, 0.1))

    return call_us(step, query, bench.num_calls)


def _exact_rows(backend: Any, shape: Any, num_rows: int) -> tuple[Any, Any]:
    """Random exact keys and values, in the backend's arrays."""
    import mlx.core as mx

    k, v = (
        mx.random.normal((1, shape.num_kv_heads, num_rows, d)).astype(shape.dtype) for d in (shape.k_dim, shape.v_dim)
    )
    mx.eval(k, v)
    return backend.from_mlx(k)[0], backend.from_mlx(v)[0]


def random_pages(shape: Any, fmt: KVFormat, num_pages: int, rng: np.random.Generator) -> Any:
    """Pages of random codes, scales of about a tenth."""
    from turboquant_kv.backends.base import CanonicalPages

    lead = (num_pages, shape.num_kv_heads, fmt.page_tokens)

    def codes(num_bytes: int) -> Any:
        return rng.integers(0, 256, (*lead, num_bytes), dtype=np.uint8)

    def scales() -> Any:
        return rng.uniform(0.05, 0.15, lead).astype(np.float16)

    k_codes, v_codes = codes(fmt.keys.code_bytes(shape.k_dim)), codes(fmt.values.code_bytes(shape.v_dim))
    return CanonicalPages(k_codes, scales(), v_codes, scales())


def parse_heads(text: str) -> tuple[int, int]:
    """`40/8` to (40, 8). Raises StartupError."""
    parts = text.split("/")
    if len(parts) != 2 or not all(p.isdecimal() for p in parts):
        raise StartupError(f"heads {text!r}: expected QUERY_HEADS/KV_HEADS such as 40/8.")
    return int(parts[0]), int(parts[1])


def parse_lengths(texts: Sequence[str]) -> tuple[int, ...]:
    """Token counts such as `4096` or `16K`. Raises StartupError."""
    found = []
    for text in texts:
        digits, unit = (text[:-1], 1024) if text[-1:] in ("K", "k") else (text, 1)
        if not digits.isdecimal():
            raise StartupError(f"length {text!r}: expected tokens such as 4096 or 16K.")
        found.append(int(digits) * unit)
    return tuple(found)
