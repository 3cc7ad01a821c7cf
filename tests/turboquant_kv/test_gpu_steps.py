"""What a GPU backend does in a layer's step does not grow with the number of conversations: launches and host's work.

Kernels are not compiled: each launch is counted, and its outputs are zeros.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant_kv.backends.base import LayerShape, Means
from turboquant_kv.backends.gpu import prefill_plan, step_plan
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.device import HOPPER
from turboquant_kv.backends.gpu.flash import FlashKernels
from turboquant_kv.backends.gpu.launch import DecodeKernels
from turboquant_kv.backends.gpu.page_kernels import PageKernels
from turboquant_kv.cache.key_balance import KeyBalance
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, LayerSource, TurboQuantKVCache
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.protocol import LayerInput
from turboquant_kv.cache.sequence import PagedSequence
from turboquant_kv.codec.format import KVFormat

FMT = KVFormat.parse("4t/3t")
SHAPE = LayerShape(2, 64, 64, mx.float16)
LAYERS = 4


class Launches:
    """A kernel factory that counts what is launched, by name, and lets nothing be compiled."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fences: list[tuple[mx.array, mx.array]] = []  # what each launch was given, and what it left

    def __call__(self, *, name: str, input_names: Any, output_names: Any, **options: Any) -> Any:
        def launch(*, inputs: Any, output_shapes: Any, output_dtypes: Any, **arguments: Any) -> list[mx.array]:
            self.names.append(name)
            made = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
            if "fence" in input_names:  # flash attention reads what others made
                self.fences.append((inputs[input_names.index("fence")], made[output_names.index("fence_out")]))
            return made

        return launch


def step(batches: list[BatchTurboQuantKVCache], num_rows: int, num_new: int = 1) -> list[int]:
    """One step of all layers; Python calls of each."""
    calls = []
    for batch in batches:
        keys, values = (mx.zeros((num_rows, 2, num_new, 64), mx.float16) for _ in "kv")
        queries = mx.zeros((num_rows, 6, num_new, 64), mx.float16)
        count = 0

        def counted(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(counted)
        try:
            _ = batch.offset
            batch.update_and_fetch(keys, values)
            batch.attend(queries, scale=0.1, mask=None if num_new == 1 else "causal", sinks=None)
        finally:
            sys.setprofile(None)
        calls.append(count)
    return calls


def made(
    num_rows: int, launches: Launches, num_layers: int = LAYERS, means: Means | None = None
) -> list[BatchTurboQuantKVCache]:
    """Layers of a batch of conversations of 40 tokens, which is a sink and eight rows of a tail. No array will grow."""
    backend = GpuBackend(
        "cuda",
        DecodeKernels("cuda", launches, device=HOPPER),
        PageKernels("cuda", launches),
        FlashKernels("cuda", launches),
    )
    pool = PagePool(backend, [SHAPE] * num_layers, FMT, [means] * num_layers)
    pool.reserve(20 * num_rows)
    pool.exact._grow(20 * num_rows * FMT.page_tokens)
    sources = [LayerSource.of_pool(pool, layer) for layer in range(num_layers)]
    conversations = [PagedSequence(pool, range(num_layers)) for _ in range(num_rows)]
    batches = [
        TurboQuantKVCache.merge([TurboQuantKVCache(source, c.of_layer(source.layer)) for c in conversations])
        for source in sources
    ]
    for conversation in conversations:
        for layer in range(num_layers):
            conversation.release(layer)
    step(batches, num_rows, 40)
    return batches


def counts(num_rows: int, num_steps: int) -> tuple[list[int], list[int]]:
    """Launches, and Python calls of the middle layers, of each of so many steps after the prompts."""
    launches = Launches()
    batches = made(num_rows, launches)
    launched, called = [], []
    for _ in range(num_steps):
        before = len(launches.names)
        calls = step(batches, num_rows)
        launched.append(len(launches.names) - before)
        called.append(sum(calls[1:-1]))
    return launched, called


@pytest.mark.parametrize("num_rows", [8, 64])
def test_launches_and_calls_do_not_grow_with_rows(num_rows: int) -> None:
    """Over a whole page: steps that only add a row, steps that give regions more rows, and one that closes all pages.

    One launch a layer where a step only adds rows. The first layer decides for all, the last one ends the step.
    What the others do is the same.
    """
    num_steps = FMT.page_tokens + 2
    alone, alone_calls = counts(1, num_steps)
    together, together_calls = counts(num_rows, num_steps)
    assert np.median(alone) == np.median(together) == LAYERS
    assert max(together) <= max(alone) + 2 * LAYERS  # rows of some may have to move: keys and values
    closing = FMT.page_tokens - 8
    assert alone[closing] == together[closing] == 3 * LAYERS, "pages of all rows are encoded in one launch a side"
    assert np.median(together_calls) == np.median(alone_calls)
    assert together_calls[closing] == alone_calls[closing] > np.median(alone_calls)


def prefill_launches(lengths: list[int], *, begun: int = 0) -> list[str]:
    """What a layer launches for a pass over so many tokens of each prompt, right-padded, after `begun` of them."""
    launches = Launches()
    (batch,) = made(len(lengths), launches, num_layers=1)
    if begun:
        step([batch], len(lengths), begun)
    batch.prepare(lengths=lengths, right_padding=[max(lengths) - n for n in lengths])
    launches.names.clear()
    step([batch], len(lengths), max(lengths))
    return [name.removeprefix("turboquant_").partition("_")[0] for name in launches.names]


@pytest.mark.parametrize("begun", [0, 500])
def test_launches_of_a_prefill_pass_do_not_grow_with_its_prompts(begun: int) -> None:
    """Keys' histories, values' histories and attention are a launch each, whatever the prompts' lengths."""
    alone = prefill_launches([240], begun=begun)
    several = prefill_launches([240, 17], begun=begun)
    many = prefill_launches([240, 17, 0, 300, 96, 1, 240, 200, 33], begun=begun)
    assert many == several
    assert many[-3:] == alone[-3:] == ["history", "history", "prefill"]
    assert len(many) <= len(alone) + 4, "what of the windows is new and what was held, a launch a side each"


def test_histories_of_one_pass_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that together are longer take launches of their own, as few as neighbours allow."""
    monkeypatch.setattr(prefill_plan, "MAX_COLUMNS", 2000)
    # a history has a sink, and the pass's own tokens twice: exact and, but for the last page's, decoded
    attention = prefill_launches([240, 17, 0, 300, 900, 40, 0, 240, 200, 33])
    assert attention.count("history") == 3 * 2, "240 .. 300, then 900 .. 0, then 240 .. 33"
    assert attention.count("prefill") == 3


def test_tiles_count_for_the_bound_as_they_are_filled(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No group has more places than the bound, whatever fills its tiles, unless it is one sequence."""
    monkeypatch.setattr(prefill_plan, "MAX_COLUMNS", 1000)
    words = np.zeros((40, 8), np.int64)
    words[:, 1] = rng.integers(0, 2, 40)  # queries
    words[:, 2], words[:, 4], words[:, 7] = rng.integers(0, 4, 40), 32, rng.integers(1, 300, 40)
    groups = prefill_plan.prefill_groups(words, 96, 2, 8, tile=128)
    sequences = [one for group in groups for one in group.sequences]
    assert len(sequences) == 40 and len(groups) > 1
    for group in groups:
        assert group.num_places <= 1000
        ends = np.cumsum([one.num_places for one in group.sequences])
        assert [group.rows_of(one).stop for one in group.sequences] == (2 * ends).tolist()
        assert group.num_rows == 2 * ends[-1] and group.most_places == max(one.num_places for one in group.sequences)
    for one in sequences:
        assert one.num_places % 128 == 0 and 0 <= one.num_places - one.num_columns < 128


@pytest.mark.parametrize("num_rows", [1, 3])
def test_decode_steps_balance_keys_within_their_launch(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other steps multiply before it: prompts, and steps of several tokens."""
    multiplied: list[int] = []
    multiply = KeyBalance.to_store

    def seen(self: KeyBalance, step: LayerInput) -> LayerInput:
        multiplied.append(step.keys.shape[2])
        return multiply(self, step)

    monkeypatch.setattr(KeyBalance, "to_store", seen)
    nothing, factors = np.zeros((2, 64), np.float32), np.full((2, 64), 2, np.float32)
    batches = made(num_rows, Launches(), num_layers=1, means=Means(nothing, nothing, None, factors))
    for num_new in (1, 240, 1, 5, *[1] * 90):
        step(batches, num_rows, num_new)
    assert multiplied == [40, 240, 5]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_each_launch_on_a_layers_arrays_is_given_the_fence_of_the_one_before(num_rows: int) -> None:
    """Else a device may run them side by side: MLX knows nothing of what they write."""
    launches = Launches()
    batches = made(num_rows, launches, num_layers=1)
    launches.fences.clear()
    for num_new in (1, FMT.page_tokens, 1, 5, 200, 1):  # decode, prefill within a page and over several
        step(batches, num_rows, num_new)
    assert len(launches.fences) > 20
    for (_, left), (given, _) in itertools.pairwise(launches.fences):
        assert given is left


def test_arrays_grow_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that waits for each layer and side of a growing pool stands still for most of a long prompt's steps."""
    launches = Launches()
    (batch,) = made(1, launches, num_layers=1)
    pool = batch.source.pool
    assert pool is not None
    step([batch], 1, 200)
    (store,) = pool.stores
    held, rows = store.num_pages, store.num_rows
    monkeypatch.setattr(mx, "eval", lambda *arrays: pytest.fail("waited"))
    launches.names.clear()
    pool._grow(2 * held)
    pool.exact._grow(2 * rows)
    assert (store.num_pages, store.num_rows) == (2 * held, 2 * rows)
    assert len(launches.names) == 4 + 2, "codes and scales of keys and values, and exact rows of both"
    for (_, left), (given, _) in itertools.pairwise(launches.fences[-7:]):
        assert given is left


@pytest.mark.parametrize(("num_new", "is_long"), [(step_plan.TOKENS_HANDED_OVER, True), (200, False)])
def test_layers_of_a_long_pass_are_handed_over_as_they_are_built(
    num_new: int, is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each begins with keys and values, while few others are under way: what is waited for is a layer's fence."""
    launches, num_layers = Launches(), 6
    batches = made(1, launches, num_layers=num_layers)
    begun: list[mx.array] = []
    waited: list[mx.array] = []
    begin: Any = mx.async_eval
    wait = mx.eval

    def seen_begin(*arrays: Any) -> None:
        begun.extend(arrays)
        begin(*arrays)

    def seen_wait(*arrays: Any) -> None:
        waited.extend(arrays)
        wait(*arrays)

    monkeypatch.setattr(mx, "async_eval", seen_begin)
    monkeypatch.setattr(mx, "eval", seen_wait)
    left = []
    for batch in batches:
        first = len(launches.fences)
        step([batch], 1, num_new)
        left.append([fence for _, fence in launches.fences[first:]])
    if not is_long:
        assert not begun and not waited
        return
    assert [array.shape for array in begun] == num_layers * 2 * [(1, 2, num_new, 64)]
    assert len(waited) == num_layers - step_plan.LAYERS_UNDER_WAY
    for fence, own in zip(waited, left, strict=False):
        assert any(fence is one for one in own), "of the layers in order"


def test_operations_that_read_a_layers_arrays_wait_for_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order that only MLX's graph knows of is none on a device."""
    launches = Launches()
    batches = made(1, launches, num_layers=1)
    step(batches, 1, 200)
    store = batches[0].sequences[0].shared.pool.stores[0]  # type: ignore[union-attr]
    waited: list[mx.array] = []
    wait = mx.eval

    def seen(*arrays: Any) -> None:
        waited.extend(arrays)
        wait(*arrays)

    monkeypatch.setattr(mx, "eval", seen)
    pages = np.array([0])
    for read in (lambda: store.read(pages), lambda: store.get_rows(0, 4), lambda: store.decode(pages, 0)):
        waited.clear()
        read()
        assert any(array is launches.fences[-1][1] for array in waited)
