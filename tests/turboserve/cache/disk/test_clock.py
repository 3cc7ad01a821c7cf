"""A wall clock that jumps: the store is tried again all the same, and who was used last is known all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.turboserve.cache.disk.conversations import close_clean, conversation, file_bytes, open_store
from tests.turboserve.cache.fakes import FakeDisk, FakeFamily, converse, span

from turboserve.cache.memory import Memory, MemoryLimits

DAY_S = 86_400.0


class JumpingClock:
    """Stands still until it is set."""

    def __init__(self, now_s: float = 1.7e9) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("jump_s", [-DAY_S, 365 * DAY_S, -1.7e9])
def test_the_least_recently_used_go_first_whatever_the_clock_says(tmp_path: Path, jump_s: float) -> None:
    one = open_store(tmp_path / "probe")
    one.put("0", *conversation(0))
    close_clean(one)
    limit = int(3.5 * file_bytes(tmp_path / "probe"))
    clock = JumpingClock()
    store = open_store(tmp_path / "store", limit_bytes=limit, clock=clock)
    for number in range(3):
        store.put(str(number), *conversation(number))
        assert store.flush(20)
        clock.now_s += jump_s if number == 1 else 1.0
    assert store.get("0") is not None  # now 1 is the one that was not used for longest
    store.put("3", *conversation(3))
    assert store.flush(20)
    assert [entry.key for entry in store.entries()] == ["0", "2", "3"]
    close_clean(store)
    clock.now_s += 1.0 - jump_s
    again = open_store(tmp_path / "store", limit_bytes=limit, clock=clock)
    again.put("4", *conversation(4))
    assert again.flush(20)
    assert sorted(entry.key for entry in again.entries()) == ["0", "3", "4"], "files remember the order too"
    close_clean(again)


def test_a_disk_that_failed_is_tried_again_after_a_minute_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall, steady = JumpingClock(), JumpingClock(5.0)
    store = open_store(tmp_path, clock=wall, steady_clock=steady)
    with monkeypatch.context() as patch:
        patch.setattr("turboserve.cache.disk.files.os.fsync", _full)
        store.put("a", *conversation(1))
        assert store.flush(20)
    assert store.status().reason == "the quota is used up"
    wall.now_s += 365 * DAY_S
    assert not store.put("a", *conversation(1)), "no minute has passed"
    wall.now_s -= 730 * DAY_S
    steady.now_s += 61.0
    assert store.put("a", *conversation(1)) and store.flush(20)
    assert store.status().is_writable and store.status().reason == ""
    close_clean(store)


def _full(handle: int) -> None:
    raise OSError(122, "Disk quota exceeded")


def memory_at(disk: FakeDisk, offset_s: JumpingClock, **limits: float) -> Memory:
    return Memory(FakeFamily(), 1_000_000, MemoryLimits(**limits), disk, wall_offset=offset_s)  # type: ignore[arg-type]


def test_sessions_stay_when_the_clock_was_wrong_at_the_start_and_right_later() -> None:
    """A computer without a battery begins in 1970 and learns the time a moment later."""
    disk, offset = FakeDisk(), JumpingClock(0.0)
    memory = memory_at(disk, offset, session_ttl_s=DAY_S)
    offset.now_s = 1.7e9
    converse(memory, span(0, 60), 10.0, session_id="s")
    again = memory_at(disk, JumpingClock(1.7e9), session_ttl_s=DAY_S)
    again.expire(1000.0)
    assert [c.conversation_id for c in again.idle] == ["s"]


def test_sessions_that_were_last_used_tomorrow_expire_all_the_same() -> None:
    disk = FakeDisk()
    converse(memory_at(disk, JumpingClock(1.7e9 + 3650 * DAY_S)), span(0, 60), 10.0, session_id="s")
    again = memory_at(disk, JumpingClock(1.7e9), session_ttl_s=DAY_S)
    again.expire(1000.0)
    assert [c.session.last_used_s for c in again.idle] == [1000.0]
    again.expire(1000.0 + DAY_S + 1.0)
    assert not list(again.idle) and not disk.files
