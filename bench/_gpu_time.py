"""What a call on the GPU takes: the kernels alone, as CUDA's profiler sees them, and a chain of calls by the clock.

The profiler is PyTorch's (CUPTI), where PyTorch is installed; it sees every kernel of the process, MLX's too. By the
clock a call also costs the host: building the graph in Python, handing it over. Owns measuring only.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

Step = Callable[[mx.array], mx.array]


def has_profiler() -> bool:
    return mx.cuda.is_available() and importlib.util.find_spec("torch") is not None


def kernels_of(run: Callable[[], None]) -> dict[str, list[float]]:
    """Microseconds of every kernel and copy that runs on the GPU meanwhile, by name. Needs `has_profiler()`."""
    torch: Any = importlib.import_module("torch")
    profiler: Any = importlib.import_module("torch.profiler")
    mx.synchronize()
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
        run()
        mx.synchronize()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            times.setdefault(event["name"], []).append(event["dur"])
    return times


def kernel_us(step: Step, query: mx.array, num_calls: int = 40) -> float:
    """Microseconds that a call's kernels run, medians summed; calls follow each other. Needs `has_profiler()`."""
    for _ in range(3):  # compile, and let the clocks rise
        _chain(step, query, num_calls)
    times = kernels_of(lambda: _chain(step, query, num_calls))
    return sum(statistics.median(found) * round(len(found) / num_calls) for found in times.values())


def call_us(step: Step, query: mx.array, num_calls: int = 400, num_rounds: int = 5) -> float:
    """Microseconds by the clock of one call in a chain, median of rounds. Work is handed over every 16 calls, so that
    the GPU has some while the host builds more, as in a model's decode loop."""
    times = []
    for _ in range(num_rounds + 1):
        mx.synchronize()
        start = time.perf_counter()
        x = query
        for i in range(num_calls):
            x = step(x)
            if i % 16 == 15:
                mx.async_eval(x)  # type: ignore[no-untyped-call]
        mx.eval(x)
        mx.synchronize()
        times.append((time.perf_counter() - start) / num_calls * 1e6)
    return statistics.median(times[1:])


def _chain(step: Step, query: mx.array, num_calls: int) -> None:
    x = query
    for _ in range(num_calls):
        x = step(x)
    mx.eval(x)
    mx.synchronize()
