"""A NaN in a query, key or value comes out as NaN for everybody who sees it and for nobody else: never as a number."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv.histories import History, as_float64, random_queries
from tests.turboquant_kv.native.test_levels import LEVELS, attended

from turboquant_kv.backends.native import backend as native
from turboquant_kv.codec.format import KVFormat

NUM_TOKENS, SINK, PAGE, DIM = 150, 8, 16, 64
KV_HEADS, GROUP = 2, 3
# A token in the sink, in a page behind codes, and in the queries' own page; all queries see all three.
PLACES = {"sink": 3, "codes": 77, "window": 137}

every_format = pytest.mark.parametrize("bits", [(4, 4), (3, 2), (8, 8), ("3t", "2t"), ("4t", "3t")])
every_path = pytest.mark.parametrize("num_rows", [1, 5, 12])  # 12: float tiles


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_SWITCH, request.param)


def queries(rng: np.random.Generator, num_rows: int) -> Any:
    return np.array(random_queries(rng, KV_HEADS * GROUP, num_rows, DIM, mx.float32))


@every_format
@every_path
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("side", ["k", "v"])
def test_a_bad_key_or_value(
    side: str, place: str, num_rows: int, bits: tuple[int | str, int | str], rng: np.random.Generator
) -> None:
    fmt = KVFormat(*bits, page_tokens=PAGE, sink_tokens=SINK)
    history = History.random(rng, KV_HEADS, NUM_TOKENS, DIM)
    means = history.means(rng)
    channel = int(rng.integers(DIM))
    (history.k if side == "k" else history.v)[1, PLACES[place], channel] = np.nan
    q = queries(rng, num_rows)
    want = np.zeros(q.shape, bool)
    # An exact value harms its own channel; a code stands for its whole vector, and a score for the whole answer.
    channels = channel if side == "v" and place != "codes" else slice(None)
    want[:, GROUP:, :, channels] = True
    got = as_float64(attended(history, fmt, mx.array(q), 0.125, means))
    np.testing.assert_array_equal(np.isnan(got), want)


@every_format
@every_path
@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("centred", [True, False])
def test_a_bad_query(
    centred: bool, cap: float, num_rows: int, bits: tuple[int | str, int | str], rng: np.random.Generator
) -> None:
    fmt = KVFormat(*bits, page_tokens=PAGE, sink_tokens=SINK, centred=centred)
    history = History.random(rng, KV_HEADS, NUM_TOKENS, DIM)
    q = queries(rng, num_rows)
    q[0, 4, num_rows - 1, int(rng.integers(DIM))] = np.nan
    want = np.zeros(q.shape, bool)
    want[0, 4, num_rows - 1] = True
    got = as_float64(attended(history, fmt, mx.array(q), 0.125, history.means(rng), cap=cap))
    np.testing.assert_array_equal(np.isnan(got), want)
