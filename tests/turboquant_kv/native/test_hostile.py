"""What the native border refuses: wrong arrays raise ValueError before any work, and none is read past its end."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant_kv.backends.base import ExactRows, LayerShape, SequenceView
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.backends.native import backend as native
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError

FMT = KVFormat(4, 4, page_tokens=16, sink_tokens=4)
HEADS, DIM, PAGES = 2, 64, 3
END = 4 + 2 * 16 + 5  # two pages behind the query, five rows in its own


def rows(num_rows: int, dim: int = DIM, heads: int = HEADS) -> Any:
    return np.zeros((heads, num_rows, dim), np.float32)


@pytest.fixture
def storage() -> Any:
    storage = choose_backend("cpu-native").new_store(LayerShape(HEADS, DIM, DIM, mx.float32), FMT, None)
    storage.grow(PAGES)
    storage.encode(np.arange(PAGES), 0, rows(PAGES * 16), rows(PAGES * 16))
    return storage


def good_call() -> dict[str, Any]:
    return {
        "q": np.zeros((1, 4, 1, DIM), np.float32),
        "out": np.zeros((1, 4, 1, DIM), np.float32),
        "start": END - 1,
        "num": 1,
        "pages": np.array([0, 1]),
        "sink": (rows(4), rows(4)),
        "window": (36, rows(5), rows(5)),
        "sinks": None,
        "span": 0,
    }


def call(storage: Any, **changes: Any) -> None:
    a = good_call() | changes
    row = (a["start"], a["num"], a["pages"], *a["sink"], *a["window"])
    storage.store.attend(a["q"], a["out"], [row] * a["q"].shape[0], 0.1, a["sinks"], a["span"])


def test_the_good_call_is_good(storage: Any) -> None:
    for changes in ({}, {"pages": np.array([2, 1, 0]), "sinks": np.zeros(4, np.float32), "span": 9}):
        out = np.full((1, 4, 1, DIM), np.nan, np.float32)
        call(storage, out=out, **changes)
        assert np.isfinite(out).all(), "every output is written"


HOSTILE: dict[str, dict[str, Any]] = {
    "page below zero": {"pages": np.array([0, -1])},
    "page beyond the pool": {"pages": np.array([0, PAGES])},
    "page of another world": {"pages": np.array([0, 2**62])},
    "too few pages": {"pages": np.array([0])},
    "page ids of 32 bits": {"pages": np.array([0, 1], np.int32)},
    "page ids as floats": {"pages": np.array([0.0, 1.0])},
    "page ids in two axes": {"pages": np.array([[0, 1]])},
    "page ids with gaps": {"pages": np.arange(4)[::2]},
    "page ids that are none": {"pages": [0, 1]},
    "negative position": {"start": -1},
    "position far ahead": {"start": 2**50},
    "more queries than rows": {"num": 2},
    "negative queries": {"num": -1},
    "sink too short": {"sink": (rows(3), rows(3))},
    "sink too long": {"sink": (rows(5), rows(5))},
    "no sink": {"sink": (None, None)},
    "sink sides differ": {"sink": (rows(4), rows(3))},
    "window too short": {"window": (36, rows(4), rows(4))},
    "window begins late": {"window": (37, rows(4), rows(4))},
    "window inside the sink": {"window": (0, rows(END), rows(END))},
    "no window": {"window": (0, None, None)},
    "window of another dim": {"window": (36, rows(5, 80), rows(5))},
    "window of other heads": {"window": (36, rows(5, DIM, 1), rows(5, DIM, 1))},
    "window of doubles": {"window": (36, rows(5).astype(np.float64), rows(5).astype(np.float64))},
    "window of mixed types": {"window": (36, rows(5).astype(np.float16), rows(5))},
    "window of gaps": {"window": (36, rows(5, 2 * DIM)[..., ::2], rows(5))},
    "queries of another dim": {"q": np.zeros((1, 4, 1, 80), np.float32)},
    "queries of no group": {"q": np.zeros((1, 3, 1, DIM), np.float32), "out": np.zeros((1, 3, 1, DIM), np.float32)},
    "output too small": {"out": np.zeros((1, 4, 1, 32), np.float32)},
    "output of doubles": {"out": np.zeros((1, 4, 1, DIM), np.float64)},
    "output of gaps": {"out": np.zeros((1, 4, 1, 2 * DIM), np.float32)[..., ::2]},
    "output for another batch": {"out": np.zeros((2, 4, 1, DIM), np.float32)},
    "sinks of another length": {"sinks": np.zeros(3, np.float32)},
    "negative window": {"span": -5},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_attention_is_refused(storage: Any, name: str) -> None:
    with pytest.raises(ValueError):
        call(storage, **HOSTILE[name])


def test_read_only_output_is_refused(storage: Any) -> None:
    out = np.zeros((1, 4, 1, DIM), np.float32)
    out.setflags(write=False)
    with pytest.raises(ValueError, match="writable"):
        call(storage, out=out)


@pytest.mark.parametrize(
    ("ids", "num_rows"), [([0, 3], 32), ([0, 0], 32), ([-1], 16), ([0], 15), ([0], 17), ([0, 1], 16)]
)
def test_hostile_encoding_is_refused(storage: Any, ids: list[int], num_rows: int) -> None:
    with pytest.raises(ValueError):
        storage.encode(np.array(ids), 0, rows(num_rows), rows(num_rows))


@pytest.mark.parametrize("first_page", [-1, 2**50])
def test_hostile_places_in_a_conversation_are_refused(storage: Any, first_page: int) -> None:
    with pytest.raises(ValueError, match="first_page"):
        storage.encode(np.array([0]), first_page, rows(16), rows(16))
    with pytest.raises(ValueError, match="first_page"):
        storage.decode(np.array([0]), first_page)


def new_keys(dim: int = 64, bits: int = 3, num_levels: int = 16, edges: Any = None) -> Any:
    """A bare store whose keys alone are set, to a trellis unless edges are told."""
    store = native.load_kernels()[0].Store(2, 16, 4, "plain", "auto")  # type: ignore[union-attr]
    book = np.linspace(-2, 2, num_levels, dtype=np.float32)
    store.set_side(True, dim, bits, np.ones(dim, np.float32), np.ones(1, np.float32), None, book, edges)
    return store


def test_hostile_trellises_are_refused() -> None:
    new_keys()
    new_keys(bits=4, num_levels=32)
    wrongs: list[dict[str, Any]] = [{"bits": 5, "num_levels": 64}, {"bits": 8, "num_levels": 512}]
    for wrong in (*wrongs, {"bits": 4}, {"num_levels": 8}, {"num_levels": 32}, {"dim": 32}):
        with pytest.raises(ValueError):
            new_keys(**wrong)
    with pytest.raises(ValueError):
        new_keys(edges=np.linspace(-2, 2, 15, dtype=np.float32))  # a trellis's levels with a scalar codec's thresholds


GOOD_ROTARY: dict[str, Any] = {"mean": np.ones(128), "frequencies": np.ones(32), "stride": 1, "gap": 32}
HOSTILE_ROTARIES: dict[str, dict[str, Any]] = {
    "mean too short": {"mean": np.ones(127)},
    "mean in single precision": {"mean": np.ones(128, np.float32)},
    "mean in two axes": {"mean": np.ones((2, 64))},
    "mean with a NaN": {"mean": np.full(128, np.nan)},
    "no pairs": {"frequencies": np.ones(0)},
    "pairs beyond the head": {"frequencies": np.ones(33)},
    "more pairs than any head has": {"frequencies": np.ones(1000)},
    "an infinite frequency": {"frequencies": np.full(32, np.inf)},
    "frequencies with gaps": {"frequencies": np.ones(64)[::2]},
    "pairs that overlap": {"gap": 31},
    "partners beyond the head": {"gap": 33},
    "no gap": {"gap": 0},
    "no stride": {"stride": 0},
    "negative stride": {"stride": -1},
    "gap that overflows": {"gap": 2**31 - 1},
    "stride that overflows": {"stride": 2**31 - 1},
}


@pytest.mark.parametrize("name", HOSTILE_ROTARIES)
def test_hostile_rotations_of_keys_are_refused(name: str) -> None:
    store = new_keys()
    with pytest.raises(ValueError):
        store.set_rotary(**GOOD_ROTARY | HOSTILE_ROTARIES[name])
    store.set_rotary(**GOOD_ROTARY)


def test_rotations_come_after_keys_and_before_pages() -> None:
    store = native.load_kernels()[0].Store(2, 16, 4, "plain", "auto")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="keys are not set"):
        store.set_rotary(**GOOD_ROTARY)
    storage: Any = choose_backend("cpu-native").new_store(LayerShape(HEADS, DIM, DIM, mx.float32), FMT, None)
    storage.grow(1)
    with pytest.raises(ValueError, match="once there are pages"):
        storage.store.set_rotary(**GOOD_ROTARY)


def test_pages_of_another_format_are_refused(storage: Any) -> None:
    other = choose_backend("cpu-native").new_store(LayerShape(HEADS, DIM, 80, mx.float32), FMT, None)
    other.grow(1)
    with pytest.raises(ValueError):
        storage.write(np.array([0]), other.read(np.array([0])))
    with pytest.raises(ValueError):
        storage.read(np.array([PAGES]))


def test_unknown_levels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_SWITCH, "mmx")
    with pytest.raises(UnsupportedFormatError, match="portable"):
        choose_backend("cpu-native")


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert native.num_threads() == 3
    monkeypatch.setenv(native.THREADS_SWITCH, "5")
    assert native.num_threads() == 5
    monkeypatch.setenv(native.THREADS_SWITCH, "many")
    assert native.num_threads() == 3


def view(start: int, num: int) -> SequenceView:
    return SequenceView(start, num, np.arange(3), ExactRows(0, rows(4), rows(4)), None)


def test_only_true_windows_are_taken_for_windows() -> None:
    keys, positions = np.arange(40), np.arange(37, 40)[:, None]
    causal = keys <= positions
    window = causal & (keys > positions - 7)
    views = [view(37, 3)]
    assert native.sliding_window(mx.array(window), views) == 7
    assert native.sliding_window(mx.array(window[None, None]), views) == 7
    assert native.sliding_window(mx.array(causal), views) == 0
    holed = window.copy()
    holed[1, 35] = False
    assert native.sliding_window(mx.array(holed), views) is None
    assert native.sliding_window(mx.array(np.roll(window, 1, axis=1)), views) is None
    assert native.sliding_window(mx.array(np.where(window, 0.0, -1e9).astype(np.float32)), views) is None
    assert native.sliding_window(mx.array(np.stack([window, causal])[None]), views) is None, "a mask per head"


def test_a_forked_child_has_threads_of_its_own() -> None:
    program = (
        "import os, numpy as np\n"
        "from turboquant_kv.native import _kernels as k\n"
        "k.set_num_threads(2)\n"
        "s = k.Store(4, 16, 0, 'plain', 'auto')\n"
        "one = np.ones(64, np.float32); base = np.ones(1, np.float32)\n"
        "book = np.linspace(-2, 2, 16, dtype=np.float32)\n"
        "for key in (True, False): s.set_side(key, 64, 4, one, base, None, book, book[:-1])\n"
        "s.grow(8); x = np.ones((4, 128, 64), np.float32); ids = np.arange(8)\n"
        "s.encode(ids, 0, x, x)\n"
        "pid = os.fork()\n"
        "s.encode(ids, 0, x, x)\n"
        "if pid == 0: os._exit(0)\n"
        "raise SystemExit(os.waitpid(pid, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60, check=False)
    assert done.returncode == 0
