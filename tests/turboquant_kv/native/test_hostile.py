"""What the native border refuses: wrong arrays raise ValueError before any work, and none is read past its end."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv.histories import encode_pages

from turboquant_kv.backends.base import LayerShape, PageWrites, RowSpan, SequenceView
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
    encode_pages(storage, np.arange(PAGES), 0, rows(PAGES * 16), rows(PAGES * 16))
    return storage


class Figures(NamedTuple):
    """What the kernels are told of one sequence (native_store.h)."""

    q_start: int = END - 1
    num_queries: int = 1
    pages_at: int = 0
    num_pages: int = 2
    sink_first: int = 8
    sink_rows: int = 4
    window_start: int = 36
    window_first: int = 20
    window_rows: int = 5


HELD = 64  # rows of all conversations: the good call's sink and window lie among them
FAR = 2**62


def good_call() -> dict[str, Any]:
    return {
        "q": np.zeros((1, 4, 1, DIM), np.float32),
        "out": np.zeros((1, 4, 1, DIM), np.float32),
        "figures": np.array([Figures()]),
        "pages": np.array([0, 1]),
        "exact": [rows(HELD)] * 4,
        "sinks": None,
        "span": 0,
    }


def call(storage: Any, **changes: Any) -> None:
    """The good call with other arguments; those that are fields of Figures change its one sequence."""
    told: dict[str, int] = {name: changes.pop(name) for name in Figures._fields if name in changes}
    if told:
        changes["figures"] = np.array([Figures(**told)])
    a = good_call() | changes
    storage.store.attend(a["q"], a["out"], a["figures"], a["pages"], a["exact"], 0.1, a["sinks"], a["span"])


def test_the_good_call_is_good(storage: Any) -> None:
    goods: list[dict[str, Any]] = [
        {},
        {"pages": np.array([2, 1, 0]), "num_pages": 3, "sinks": np.zeros(4, np.float32), "span": 9},
        {"pages": np.array([2, 1, 0]), "pages_at": 1},
        {"sink_first": HELD - 4, "window_first": HELD - 5},
        {"exact": (rows(12), rows(12), rows(25), rows(25))},
        {"q_start": 2, "sink_rows": 3, "window_rows": 0, "window_first": FAR, "window_start": FAR, "num_pages": 0},
    ]
    for changes in goods:
        out = np.full((1, 4, 1, DIM), np.nan, np.float32)
        call(storage, out=out, **changes)
        assert np.isfinite(out).all(), "every output is written"


def test_sequences_of_a_batch_find_their_own_pages_and_rows(storage: Any, rng: np.random.Generator) -> None:
    """Whatever lies between them, even NaN."""
    encode_pages(storage, np.arange(PAGES), 0, *rng.standard_normal((2, HEADS, PAGES * 16, DIM)).astype(np.float32))
    own = rng.standard_normal((4, HEADS, 9, DIM)).astype(np.float32)  # of each, four sink and five window rows
    q = rng.standard_normal((2, 4, 1, DIM)).astype(np.float32)
    exact = np.full((2, HEADS, HELD, DIM), np.nan, np.float32)
    places = ((8, 20), (50, 12))
    for b, (sink, window) in enumerate(places):
        exact[:, :, sink : sink + 4] = own[2 * b : 2 * b + 2, :, :4]
        exact[:, :, window : window + 5] = own[2 * b : 2 * b + 2, :, 4:]
    told = [
        Figures(pages_at=at, sink_first=sink, window_first=window)
        for at, (sink, window) in zip((1, 3), places, strict=True)
    ]
    pages = np.array([2, 0, 1, 2, 1])
    both, alone = np.empty((2, 4, 1, DIM), np.float32), np.empty((2, 4, 1, DIM), np.float32)
    call(storage, q=q, out=both, figures=np.array(told), pages=pages, exact=[*exact, *exact])
    for b in range(2):
        mine = own[2 * b : 2 * b + 2]
        call(
            storage,
            q=q[b : b + 1],
            out=alone[b : b + 1],
            pages=pages[1 + 2 * b : 3 + 2 * b],
            exact=[*mine[:, :, :4], *mine[:, :, 4:]],
            sink_first=0,
            window_first=0,
        )
    assert np.isfinite(both).all()
    np.testing.assert_array_equal(both, alone)


HOSTILE: dict[str, dict[str, Any]] = {
    "page below zero": {"pages": np.array([0, -1])},
    "page beyond the pool": {"pages": np.array([0, PAGES])},
    "page of another world": {"pages": np.array([0, FAR])},
    "too few pages": {"pages": np.array([0])},
    "fewer pages than the queries see": {"num_pages": 1},
    "pages that begin before the first": {"pages_at": -1},
    "pages that end behind the last": {"pages_at": 1},
    "pages that begin far behind": {"pages_at": FAR},
    "fewer than no pages": {"num_pages": -1},
    "fewer than no pages behind the last": {"pages_at": 5, "num_pages": -3},
    "more pages than there can be": {"num_pages": 2**63 - 1},
    "page ids of 32 bits": {"pages": np.array([0, 1], np.int32)},
    "page ids as floats": {"pages": np.array([0.0, 1.0])},
    "page ids in two axes": {"pages": np.array([[0, 1]])},
    "page ids with gaps": {"pages": np.arange(4)[::2]},
    "page ids that are none": {"pages": [0, 1]},
    "figures of 32 bits": {"figures": np.array([Figures()], np.int32)},
    "figures as floats": {"figures": np.array([Figures()], np.float64)},
    "figures in one axis": {"figures": np.array(Figures())},
    "too few figures": {"figures": np.array([Figures()[:8]])},
    "too many figures": {"figures": np.array([[*Figures(), 0]])},
    "figures with gaps": {"figures": np.repeat([Figures()], 2, axis=1)[:, ::2]},
    "figures that are none": {"figures": [list(Figures())]},
    "figures of no sequence": {"figures": np.empty((0, 9), np.int64)},
    "figures of another batch": {"figures": np.array([Figures()] * 2)},
    "negative position": {"q_start": -1},
    "position far ahead": {"q_start": 2**50},
    "more queries than rows": {"num_queries": 2},
    "negative queries": {"num_queries": -1},
    "sink too short": {"sink_rows": 3},
    "sink too long": {"sink_rows": 5},
    "no sink": {"sink_rows": 0},
    "fewer sink rows than none": {"sink_rows": -4},
    "sink before the first row": {"sink_first": -1},
    "sink behind the last row": {"sink_first": HELD - 3},
    "sink far behind": {"sink_first": FAR},
    "sink sides differ": {"exact": (rows(HELD), rows(11), rows(HELD), rows(HELD))},
    "window too short": {"window_rows": 4},
    "window too long": {"window_rows": 6},
    "window begins late": {"window_start": 37, "window_rows": 4},
    "window inside the sink": {"window_start": 0, "window_rows": END, "window_first": 0},
    "window far ahead": {"window_start": 2**63 - 1},
    "no window": {"window_rows": 0},
    "fewer window rows than none": {"window_rows": -5},
    "more window rows than there can be": {"window_rows": 2**63 - 1},
    "window before the first row": {"window_first": -1},
    "window behind the last row": {"window_first": HELD - 4},
    "window far behind": {"window_first": FAR},
    "window sides differ": {"exact": (rows(HELD), rows(HELD), rows(HELD), rows(24))},
    "no exact rows": {"exact": [rows(0)] * 4},
    "three exact arrays": {"exact": [rows(HELD)] * 3},
    "five exact arrays": {"exact": [rows(HELD)] * 5},
    "exact rows in four axes": {"exact": [rows(HELD)[None]] * 4},
    "exact arrays that are none": {"exact": [rows(HELD)] * 3 + [None]},
    "rows of another dim": {"exact": [rows(HELD, 80), rows(HELD)] * 2},
    "values of another dim": {"exact": [rows(HELD)] * 3 + [rows(HELD, 80)]},
    "rows of other heads": {"exact": [rows(HELD)] * 2 + [rows(HELD, DIM, 1)] * 2},
    "rows of doubles": {"exact": [rows(HELD).astype(np.float64)] * 4},
    "sink of mixed types": {"exact": [rows(HELD), rows(HELD).astype(np.float16), rows(HELD), rows(HELD)]},
    "window of mixed types": {"exact": [rows(HELD), rows(HELD), rows(HELD).astype(np.float16), rows(HELD)]},
    "rows of gaps": {"exact": [rows(HELD)] * 2 + [rows(HELD, 2 * DIM)[..., ::2], rows(HELD)]},
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


@pytest.mark.parametrize(("ids", "num_rows"), [([0, 3], 32), ([0, 0], 32), ([-1], 16), ([0], 15), ([0, 1], 16)])
def test_hostile_encoding_is_refused(storage: Any, ids: list[int], num_rows: int) -> None:
    with pytest.raises(ValueError):
        encode_pages(storage, ids, 0, rows(num_rows), rows(num_rows))


HOSTILE_PLACES: dict[str, dict[str, Any]] = {
    "start before the first row": {"starts": np.array([-1, 16])},
    "start too late": {"starts": np.array([0, 17])},
    "start of another world": {"starts": np.array([0, FAR])},
    "start that overflows": {"starts": np.array([0, 2**63 - 1])},
    "keys too short": {"k": rows(31)},
    "values too short": {"v": rows(31)},
    "too few starts": {"starts": np.array([0])},
    "too many starts": {"starts": np.array([0, 16, 0])},
    "starts of 32 bits": {"starts": np.array([0, 16], np.int32)},
    "starts with gaps": {"starts": np.arange(0, 64, 8)[::2][:2]},
    "starts that are none": {"starts": [0, 16]},
    "too few numbers": {"numbers": np.array([0])},
    "numbers as floats": {"numbers": np.array([0.0, 1.0])},
    "numbers in two axes": {"numbers": np.array([[0, 1]])},
    "a number below zero": {"numbers": np.array([0, -1])},
    "a number far ahead": {"numbers": np.array([2**50, 0])},
}


@pytest.mark.parametrize("name", HOSTILE_PLACES)
def test_hostile_places_of_pages_are_refused(storage: Any, name: str) -> None:
    good = {"numbers": np.array([1, 0]), "starts": np.array([16, 0]), "k": rows(32), "v": rows(32)}
    for a, refused in ((good, False), (good | HOSTILE_PLACES[name], True)):
        pages = PageWrites(np.array([2, 0]), a["numbers"], a["starts"])
        with pytest.raises(ValueError) if refused else nullcontext():
            storage.encode(pages, a["k"], a["v"])


@pytest.mark.parametrize("first_page", [-1, 2**50])
def test_hostile_places_in_a_conversation_are_refused(storage: Any, first_page: int) -> None:
    with pytest.raises(ValueError, match="first_page"):
        encode_pages(storage, [0], first_page, rows(16), rows(16))
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
    return SequenceView(start, num, np.arange(3), RowSpan(0, 0, 4), None)


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
        "s.encode(ids, ids, 16 * ids, x, x)\n"
        "pid = os.fork()\n"
        "s.encode(ids, ids, 16 * ids, x, x)\n"
        "if pid == 0: os._exit(0)\n"
        "raise SystemExit(os.waitpid(pid, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60, check=False)
    assert done.returncode == 0
