"""EngineStats, put together from what the model, its runtime and the memory say of themselves. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping

from turboquant_kv.cache.trial import Verdict
from turboserve.engine.loaded_model import EngineParts
from turboserve.messages import EngineStats, KernelTrial


def take_snapshot(
    parts: EngineParts,
    *,
    num_running: int,
    num_waiting: int,
    scratch_bytes: int,
    now_s: float,
    more_details: Mapping[str, str],
    rows_apart: bool = False,
) -> EngineStats:
    """A consistent copy, taken between two steps. scratch_bytes: the most that a step may hold beside the budget."""
    runtime, loaded, memory = parts.runtime, parts.loaded, parts.memory
    held = memory.holdings(now_s)
    return EngineStats(
        model_id=loaded.model_id,
        kv_format=memory.family.default,
        kv_backend=runtime.backend_name,
        model_dtype=loaded.dtype,
        choices=loaded.choices,
        kv=held.kv,
        kv_budget_bytes=memory.budget_bytes,
        kv_token_bytes=runtime.token_bytes,
        kv_token_raw_bytes=runtime.token_raw_bytes,
        max_context_tokens=loaded.max_context,
        num_running=num_running,
        num_waiting=num_waiting,
        conversations=held.conversations,
        layers_compressed=runtime.layers_compressed,
        layers_uncompressed=runtime.layers_uncompressed,
        details={**_details(parts), **more_details},
        num_conversations=held.num_conversations,
        kv_disk=held.kv_disk,
        kv_committed_bytes=memory.committed_bytes,
        kv_scratch_bytes=scratch_bytes,
        events=memory.events(),
        admission=memory.admission(),
        disk=memory.disk_status(),
        kernel_trial=_kernel_trial(runtime.verdict),
        rows_apart=rows_apart,
        quality=parts.quality,
    )


def _kernel_trial(verdict: Verdict | None) -> KernelTrial | None:
    if verdict is None:
        return None
    step_s = {(verdict.fused, t.num_tokens): t.fused_s for t in verdict.timings}
    step_s |= {(verdict.ops, t.num_tokens): t.ops_s for t in verdict.timings}
    return KernelTrial(verdict.fused, verdict.taken, verdict.outcome, step_s)


def _details(parts: EngineParts) -> dict[str, str]:
    events = parts.memory.events()
    return {
        **parts.loaded.details,
        **parts.details,
        "kv_allocated_bytes": str(parts.memory.family.allocated_bytes()),
        "prefix_lookups": str(events.prefix_lookups),
        "prefix_hits": str(events.prefix_hits),
    }
