"""Comparing greedy answers that were computed in two ways, where chance may bring two tokens to a tie."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from tests.turboserve.engine.fakes import tokens_of

from turboserve.engine.loaded_model import EngineParts

# In standard deviations of the logits. The lead of the best token over the next is about exponential with mean 0.3.
# Other batch mates: float32 sums in another order, measured below 6e-4, mostly 1e-6.
BATCH_TIE = 2e-3
# Compressed caches computed by prefill instead of decoding: integers for float32 in attention, measured below 2e-2.
RECOMPUTED_TIE = 6e-2


def assert_same_answer(
    parts: EngineParts, content: str, got: Sequence[int], want: Sequence[int], tie: float = BATCH_TIE
) -> None:
    """Equal tokens; or equal up to one between which and the other's the model has no preference above `tie`.

    The preference is computed as a server does: the prompt in one pass, then token by token. From there on the two
    continue different texts. A cache that holds something wrong has no such excuse but by chance, with a probability of
    about 3 * `tie`.
    """
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a != b:
            *prompt, last = tokens_of("u" + content)  # CharTokenizer's template
            cache, model = parts.runtime.make_cache(), parts.loaded.model
            model(mx.array([prompt]), cache=cache)
            for token in (last, *want[:i]):
                logits = np.array(model(mx.array([[token]]), cache=cache)[0, -1])
            assert abs(logits[a] - logits[b]) < tie * logits.std(), f"token {i}: {list(got)} instead of {list(want)}"
            return
