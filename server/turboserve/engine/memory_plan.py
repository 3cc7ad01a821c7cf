"""The memory plan printed at start: weights, KV budget, and how many tokens that holds."""

from __future__ import annotations

from turboserve.cache.sizes import largest_fitting, peak_bytes
from turboserve.engine.loaded_model import LoadedModel, ServingRuntime

MiB = 1 << 20
_MOST_TOKENS = 1 << 32  # beyond any budget


def memory_plan(loaded: LoadedModel, runtime: ServingRuntime, budget_bytes: int) -> list[str]:
    """What weights and KV budget take and how many tokens that holds, as lines for the terminal.

    Figures come from the runtime's own byte counts.
    """
    raw_tokens = int(budget_bytes / runtime.token_raw_bytes) if runtime.token_raw_bytes else 0
    lines = [
        f"weights      {_mib(loaded.weights_bytes)} (computed with in {loaded.dtype})",
        f"KV budget    {_mib(budget_bytes)}",
    ]
    if runtime.fmt is None:
        return [*lines, f"holds        {raw_tokens:,} tokens uncompressed in {loaded.dtype}"]
    tokens = largest_fitting(lambda n: peak_bytes(runtime, n), budget_bytes, _MOST_TOKENS)
    lines.append(
        f"holds        {tokens:,} tokens compressed as {runtime.description} ({runtime.token_bytes:,.0f} bytes each), "
        f"{raw_tokens:,} uncompressed in {loaded.dtype} ({runtime.token_raw_bytes:,.0f})"
    )
    if runtime.layers_uncompressed:
        layers = f"{runtime.layers_compressed} compressed, {runtime.layers_uncompressed} kept as mlx-lm has them"
        lines.append(f"layers       {layers}")
    return lines


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MiB:,.0f} MiB"
