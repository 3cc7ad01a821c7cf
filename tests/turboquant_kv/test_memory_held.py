"""What caches of MLX arrays say they hold is what they keep in memory."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
from tests.turboquant_kv.histories import new_cache

from turboquant_kv.format import KVFormat


def test_exact_rows_do_not_keep_their_prompt_in_memory(rng: np.random.Generator) -> None:
    """Sink and tail fill their buffers to the last row: a mere view would hold on to whole chunks."""
    cache = new_cache(KVFormat(4, 4, sink_tokens=32), "mlx-ops")
    k, v = (mx.array(rng.standard_normal((1, 4, 2048 + 64, 64)).astype(np.float32)) for _ in "kv")
    mx.eval(k, v)
    cache.update_and_fetch(k, v)
    mx.eval(cache.attend(mx.zeros((1, 4, k.shape[2], 64)), scale=1.0, mask="causal", sinks=None))
    assert cache.sequence is not None
    pool = cache.sequence.pool
    pool.backend.evaluate(cache.sequence.pending_arrays())
    prompt_bytes = k.nbytes + v.nbytes
    before = mx.get_active_memory()
    del k, v
    gc.collect()
    assert before - mx.get_active_memory() >= prompt_bytes
