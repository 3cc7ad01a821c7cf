"""What caches of MLX arrays say they hold is what they keep in memory."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
from tests.turboquant_kv.histories import new_cache

from turboquant_kv.codec.format import KVFormat


def test_exact_rows_do_not_keep_their_prompt_in_memory(rng: np.random.Generator) -> None:
    """Sink and tail are copied into the layer's rows: a mere view would hold on to whole chunks."""
    cache = new_cache(KVFormat(4, 4, sink_tokens=32), "mlx-ops")
    gc.collect()
    before = mx.get_active_memory()
    for _ in range(2):
        k, v = (mx.array(rng.standard_normal((1, 4, 1024, 64)).astype(np.float32)) for _ in "kv")
        cache.update_and_fetch(k, v)
        mx.eval(cache.attend(mx.zeros((1, 4, 1024, 64)), scale=1.0, mask="causal", sinks=None))
        assert cache.sequence is not None
        cache.evaluate()
    assert cache.sequence is not None
    pool = cache.sequence.pool
    pool.stores[0].read(cache.sequence.page_ids)  # computes what encoding has left to do
    chunk_bytes = k.nbytes
    del k, v
    gc.collect()
    tables_bytes = 256 << 10  # rotations, codebooks, look-up tables
    assert tables_bytes < chunk_bytes
    assert mx.get_active_memory() - before < pool.allocated_bytes + tables_bytes
