"""A batch of decoding conversations on a GPU backend whose kernels are not compiled.

Each launch gives sums of what it was given, by MLX operations: it can be traced, and an array of another step would
show in its result.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from turboquant_kv.backends.base import LayerShape, Means
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.device import HOPPER
from turboquant_kv.backends.gpu.flash import FlashKernels
from turboquant_kv.backends.gpu.launch import DecodeKernels
from turboquant_kv.backends.gpu.page_kernels import PageKernels
from turboquant_kv.cache import seam
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, LayerSource, TurboQuantKVCache
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.sequence import PagedSequence
from turboquant_kv.codec.format import KVFormat

LAYERS = 3
FMT = KVFormat.parse("4t/3t")
SHAPE = LayerShape(2, 64, 64, mx.float32)


def summing(*, input_names: Any, output_names: Any, **options: Any) -> Any:
    """A kernel whose outputs are a hash of its inputs, but for the fence, which counts the launches before."""

    def launch(*, inputs: Any, output_shapes: Any, output_dtypes: Any, **arguments: Any) -> list[mx.array]:
        given = dict(zip(input_names, inputs, strict=True))
        total = mx.zeros((1,))
        for place, (name, x) in enumerate(given.items()):
            if name != "fence":
                total = mx.sin(total + (place + 1) * x.astype(mx.float32).reshape(-1)[:512].sum())
        made = [mx.broadcast_to(total.astype(d), s) for s, d in zip(output_shapes, output_dtypes, strict=True)]
        if "fence" in given:
            made[output_names.index("fence_out")] = given["fence"] + 1
        return made

    return launch


KERNELS = DecodeKernels("cuda", summing, device=HOPPER)  # one for all pools, as a device has


def summing_backend() -> GpuBackend:
    return GpuBackend("cuda", KERNELS, PageKernels("cuda", summing), FlashKernels("cuda", summing))


class Rows:
    """Decoding conversations of a small model over kernels that only sum."""

    def __init__(self, model: Any, num_rows: int, prompt_len: int = 40, means: Means | None = None) -> None:
        seam.install()
        self.model = model
        self.pool = PagePool(summing_backend(), [SHAPE] * LAYERS, FMT, [means] * LAYERS)
        sources = [LayerSource.of_pool(self.pool, layer) for layer in range(LAYERS)]
        conversations = [PagedSequence(self.pool, range(LAYERS)) for _ in range(num_rows)]
        self.batch: list[BatchTurboQuantKVCache] = [
            TurboQuantKVCache.merge([TurboQuantKVCache(source, c.of_layer(source.layer)) for c in conversations])
            for source in sources
        ]
        mx.eval(model(mx.zeros((num_rows, prompt_len), mx.int32), cache=self.batch))
