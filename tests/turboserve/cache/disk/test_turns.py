"""A session's next turn on disk: it writes what is new, over the earlier turn, and only once that is durable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.turboserve.cache.disk.conversations import MiB, close_clean, file_bytes
from tests.turboserve.cache.disk.kill_worker import PIECE_TOKENS, ROW_BYTES, history, open_memory
from tests.turboserve.cache.disk.test_faults import python
from tests.turboserve.cache.fakes import converse, lease_for

from turboserve.cache.disk import DiskStore
from turboserve.messages import UpdateSession


def talk(memory: object, turn: int, now_s: float = 0.0) -> None:
    converse(memory, history(0, turn), now_s or float(turn), "caller", session_id="0")  # type: ignore[arg-type]


def test_the_next_turn_writes_its_new_pieces_only(tmp_path: Path) -> None:
    memory, store = open_memory(tmp_path, write_rate=1e12)
    talk(memory, 20)
    assert store.flush(20)
    first = store.counts.written_bytes
    talk(memory, 21)
    assert store.flush(20)
    more = store.counts.written_bytes - first
    new_rows = (len(history(0, 21)) - len(history(0, 20)) + PIECE_TOKENS) * (ROW_BYTES + 4)  # and the unfinished piece
    assert more < new_rows + 2 * 4096 < first / 5
    memory.answer(UpdateSession("caller", "0", is_pinned=True), 30.0)
    assert store.flush(20)
    assert store.counts.written_bytes - first - more < PIECE_TOKENS * (ROW_BYTES + 4) + 4096, "a pin writes no piece"
    assert [len(list((tmp_path / name).iterdir())) for name in ("entries", "pieces")] == [1, len(history(0, 21)) // 64]
    close_clean(store)


def test_the_earlier_turn_stays_until_the_next_one_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a file is about to change, the folder as it is then holds one of both turns, whole."""
    memory, store = open_memory(tmp_path / "store", write_rate=1e12)
    talk(memory, 20)
    assert store.flush(20)
    seen: set[int] = set()

    def look(self: DiskStore, num_bytes: int) -> None:
        (entry,) = self.entries()
        there = {path.stem for path in (tmp_path / "store" / "pieces").iterdir()}
        assert len(list((tmp_path / "store" / "entries").glob("*.safetensors"))) == 1
        assert len(there) >= len(history(0, 20)) // PIECE_TOKENS
        seen.add(entry.num_bytes)

    monkeypatch.setattr(DiskStore, "_after_write", look)
    talk(memory, 30)
    assert store.flush(20)
    assert len(seen) == 1 and store.counts.write_failures == 0
    close_clean(store)


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.turboserve.cache.disk.kill_worker import found_turns, history, open_memory
from tests.turboserve.cache.fakes import converse, lease_for
from turboserve.messages import UpdateSession

memory, store = open_memory(Path(sys.argv[1]), write_rate=1e12)
converse(memory, history(0, 5), 1.0, "caller", session_id="0")
memory.answer(UpdateSession("caller", "0", is_pinned=True), 1.0)
assert store.flush(20)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))  # the system refuses every longer file from now on
converse(memory, history(0, 9), 2.0, "caller", session_id="0")
assert store.flush(20) and store.counts.write_failures == 1
assert found_turns(memory, 1) == [9], "it is in memory"
memory.drop_idle()
lease = lease_for(memory, [*history(0, 9), 7], 900, 3.0, "caller", session_id="0")
print(len(lease.caches[0].tokens), found_turns(memory, 1), flush=True)
memory.check_integrity([lease.caches])
store.close()
"""


def test_a_turn_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    """In memory it is there as it is now; once that is given up, and after a restart, as it was."""
    output, errors = python(FULL_DISK, str(tmp_path)).communicate(timeout=60)
    assert output == f"{len(history(0, 5))} [5]\n", errors
    memory, store = open_memory(tmp_path)
    lease = lease_for(memory, [*history(0, 9), 7], 900, 3.0, "caller", session_id="0")
    assert lease.cached_len == len(history(0, 5))
    memory.drop(lease, lease.caches)
    close_clean(store)


def test_a_store_too_small_for_both_turns_keeps_the_earlier_one(tmp_path: Path) -> None:
    memory, store = open_memory(tmp_path, write_rate=1e12)
    store._limit_bytes = MiB // 4
    talk(memory, 10)
    assert store.flush(20)
    other = {"salt": "other", "is_pinned": True}
    header = {"arrays": [{"dtype": "uint8", "shape": [100]}]}
    assert store.put("a" * 40, other, header, [np.zeros(100, np.uint8)]) and store.flush(20)
    written = store.counts.written
    talk(memory, 21)  # less than the limit alone
    assert store.flush(20)
    assert (store.counts.written, store.counts.dropped, store.counts.refused) == (written, 0, 1)
    assert store.get("a" * 40) is not None, "nobody makes room for what cannot be written all the same"
    assert file_bytes(tmp_path) <= MiB // 4
    close_clean(store)
    again, store = open_memory(tmp_path)
    assert [len(c.tokens) for c in again.idle] == [len(history(0, 10))]
    close_clean(store)
