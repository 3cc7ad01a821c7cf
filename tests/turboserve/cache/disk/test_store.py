"""What the store promises while nothing is broken: contents, sharing, limits, lock, lifetimes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.turboserve.cache.disk.conversations import (
    MiB,
    assert_holds,
    close_clean,
    conversation,
    file_bytes,
    open_store,
)

from turboserve.cache.disk import DiskStore, StoreLockedError
from turboserve.cache.disk.files import RateLimit
from turboserve.cache.interfaces import SessionDisk


def test_a_conversation_is_there_at_once_and_after_a_restart(tmp_path: Path) -> None:
    store: SessionDisk = open_store(tmp_path)
    wanted = conversation(1)
    assert store.put("a", *wanted)
    assert_holds(store, "a", wanted)  # type: ignore[arg-type]
    store.close()
    again = open_store(tmp_path)
    (entry,) = again.entries()
    assert (entry.key, entry.meta) == ("a", wanted[0])
    assert entry.num_bytes == again.entry_bytes("a") == again.status().num_bytes == file_bytes(tmp_path)
    assert_holds(again, "a", wanted)
    assert (again.get("b"), again.entry_bytes("b")) == (None, None)
    close_clean(again)


def test_any_safetensors_reader_can_read_the_files(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    store = open_store(tmp_path)
    wanted = conversation(1)
    store.put("a", *wanted)
    store.close()
    pieces = [load_file(p) for p in (tmp_path / "pieces").iterdir()]
    assert len(pieces) == 2
    assert {p["0"].shape for p in pieces} == {(4, 2, 64, 32)}
    assert any(np.array_equal(p["0"], wanted[2][0][:4]) for p in pieces)


def test_equal_beginnings_are_stored_once_and_growth_writes_what_is_new(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    short, long, branch = conversation(1, 9), conversation(1, 17), conversation(1, 17, branch=1)
    written = []
    for key, wanted in (("short", short), ("long", long), ("branch", branch)):
        before = store.counts.written_bytes
        store.put(key, *wanted)
        assert store.flush(20)
        written.append(store.counts.written_bytes - before)
    piece = max(p.stat().st_size for p in (tmp_path / "pieces").iterdir())
    assert len(list((tmp_path / "pieces").iterdir())) == 2 + 2 + 2
    assert written[1] < 2 * piece + written[0] - 2 * piece + 4096, "the first two pieces were already there"
    store.delete("short")
    store.delete("long")
    assert store.flush(20)
    assert len(list((tmp_path / "pieces").iterdir())) == 4
    assert_holds(store, "branch", branch)
    store.delete("branch")
    assert store.flush(20)
    assert file_bytes(tmp_path) == store.status().num_bytes == 0
    close_clean(store)


def test_callers_share_no_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    meta, header, arrays = conversation(1, 8)
    for salt in ("one", "other"):
        store.put(salt, meta | {"salt": salt}, header, arrays)
    assert store.flush(20)
    assert len(list((tmp_path / "pieces").iterdir())) == 4
    close_clean(store)


def test_repeated_pieces_of_one_conversation_come_back(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    zeros = np.zeros((9, 100), np.uint8)
    header = {"arrays": [{"dtype": "uint8", "shape": [9, 100], "cut": [0, 2]}]}
    store.put("a", {}, header, [zeros])
    assert store.flush(20)
    assert len(list((tmp_path / "pieces").iterdir())) == 1
    assert_holds(store, "a", ({}, header, [zeros]))
    close_clean(store)


def test_the_size_limit_drops_the_least_recently_used(tmp_path: Path) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    one = open_store(tmp_path / "probe")
    one.put("0", *conversation(0))
    assert one.flush(20)
    entry_bytes = one.status().num_bytes
    one.close()

    limit = int(3.5 * entry_bytes)
    store = open_store(tmp_path / "store", limit_bytes=limit, clock=clock)
    for number in range(3):
        store.put(str(number), *conversation(number))
        assert store.flush(20)
    assert store.get("0") is not None
    for number in (3, 4):
        store.put(str(number), *conversation(number))
        assert store.flush(20)
        assert file_bytes(store.path) <= limit
    assert [e.key for e in store.entries()] == ["0", "3", "4"]
    assert store.entry_bytes("1") is None
    assert store.counts.dropped == 2
    assert not store.put("huge", *conversation(9, 48)), "more than the whole limit"
    close_clean(store)
    again = open_store(tmp_path / "store", limit_bytes=limit)
    assert sorted(e.key for e in again.entries()) == ["0", "3", "4"]
    close_clean(again)


def test_pinned_conversations_make_room_last(tmp_path: Path) -> None:
    one = open_store(tmp_path / "probe")
    one.put("0", *conversation(0))
    close_clean(one)
    store = open_store(tmp_path / "store", limit_bytes=int(3.5 * file_bytes(tmp_path / "probe")))
    for number in range(6):
        meta, header, arrays = conversation(number)
        store.put(str(number), meta | {"is_pinned": number in (0, 2)}, header, arrays)
        assert store.flush(20)
    assert [e.key for e in store.entries()] == ["0", "2", "5"]
    for number in (6, 7):
        meta, header, arrays = conversation(number)
        store.put(str(number), meta | {"is_pinned": True}, header, arrays)
        assert store.flush(20)
    assert [e.key for e in store.entries()] == ["2", "6", "7"], "of nothing but pinned ones the oldest"
    close_clean(store)


def test_what_is_queued_is_bounded_and_can_be_taken_back(tmp_path: Path) -> None:
    num_bytes = sum(a.nbytes for a in conversation(0)[2])
    store = open_store(tmp_path, write_rate=100_000, max_pending_bytes=int(2.5 * num_bytes))
    accepted = [store.put(str(number), *conversation(number)) for number in range(5)]
    assert accepted == [True, True, False, False, False]
    assert store.pending_bytes <= int(2.5 * num_bytes)
    assert store.counts.refused == 3
    store.delete("1")
    assert (store.get("1"), store.entry_bytes("1")) == (None, None)
    store.delete("0")  # maybe half written by now
    store.close()  # does not wait for the rate any more
    assert file_bytes(tmp_path) == 0
    assert not store.put("5", *conversation(5))


def test_the_last_put_of_a_key_wins(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for number in range(20):
        assert store.put("a", *conversation(number))
    assert_holds(store, "a", conversation(19))
    assert store.flush(20)
    assert_holds(store, "a", conversation(19))
    close_clean(store)


def test_a_key_that_is_deleted_stays_away_whatever_was_being_written(tmp_path: Path) -> None:
    store = open_store(tmp_path, write_rate=300_000)  # about a fifth of a second for each
    store.put("a", *conversation(1))
    while not store.counts.written_bytes:
        time.sleep(0.001)
    store.put("a", *conversation(2))
    store.delete("a")
    assert store.get("a") is None
    assert store.flush(20)
    assert store.get("a") is None
    assert file_bytes(tmp_path) == 0
    close_clean(store)


def test_a_second_process_gets_a_clear_error(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(StoreLockedError, match=r"in use by process \d+: stop that server or choose another folder"):
        open_store(tmp_path)
    store.close()
    open_store(tmp_path).close()


def test_entries_of_another_model_are_not_offered_and_go_first(tmp_path: Path) -> None:
    store = open_store(tmp_path, fingerprint="other model")
    store.put("theirs", *conversation(0))
    store.close()
    entry_bytes = file_bytes(tmp_path)
    store = open_store(tmp_path, limit_bytes=int(2.5 * entry_bytes))
    assert store.entries() == []
    assert (store.get("theirs"), store.entry_bytes("theirs")) == (None, None)
    assert store.status().num_entries == 0
    assert store.status().num_bytes == entry_bytes
    for number in (1, 2):
        store.put(str(number), *conversation(number))
    assert store.flush(20)
    assert [e.key for e in store.entries()] == ["1", "2"]
    assert store.counts.integrity_failures == 0
    close_clean(store)


def test_the_write_rate_is_kept_on_average() -> None:
    now, waited = 100.0, []

    def wait(seconds: float) -> None:
        nonlocal now
        waited.append(seconds)
        now += seconds

    limit = RateLimit(10.0, wait, lambda: now)
    limit.spend(20)
    assert waited == [2.0]
    now += 50
    limit.spend(5)
    limit.spend(5)
    assert waited == [2.0, 0.5, 0.5], "idle time is not saved up"


def test_readers_and_the_writer_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Every answer is whole or None, while entries come, go and make room for each other."""
    store = open_store(tmp_path, limit_bytes=MiB)
    wanted = {str(n): conversation(n) for n in range(12)}
    wrong: list[str] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for key in rng.choice(list(wanted), 150):
            got = store.get(key)
            if got is not None and not all(np.array_equal(a, b) for a, b in zip(got[2], wanted[key][2], strict=True)):
                wrong.append(key)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(3):
        for key, parts in wanted.items():
            store.put(key, *parts)
            if key in "369":
                store.delete(key)
    for reader in readers:
        reader.join()
    assert wrong == []
    assert store.counts.integrity_failures == store.counts.write_failures == 0
    close_clean(store)


class StoreMachine(RuleBasedStateMachine):
    """Against a dict: whatever was put and not deleted is there, through restarts."""

    keys = st.sampled_from("abcd")

    @initialize()
    def start(self) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store: DiskStore = open_store(Path(self.folder.name))
        self.model: dict[str, Any] = {}

    @rule(key=keys, number=st.integers(0, 2), num_pages=st.sampled_from([0, 3, 4, 9, 12]), branch=st.integers(0, 1))
    def put(self, key: str, number: int, num_pages: int, branch: int) -> None:
        self.model[key] = conversation(number, num_pages, branch)
        assert self.store.put(key, *self.model[key])

    @rule(key=keys)
    def delete(self, key: str) -> None:
        self.store.delete(key)
        self.model.pop(key, None)

    @rule()
    def flush(self) -> None:
        assert self.store.flush(20)
        assert self.store.status().num_bytes == file_bytes(self.store.path)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = open_store(self.store.path)
        assert sorted(e.key for e in self.store.entries()) == sorted(self.model)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        for key in "abcd" if hasattr(self, "store") else "":
            if key in self.model:
                assert_holds(self.store, key, self.model[key])
            else:
                assert self.store.get(key) is None
        if hasattr(self, "store"):
            self.store.check_integrity()
            assert self.store.counts.integrity_failures == 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            close_clean(self.store)
            self.folder.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
