"""One folder, several servers: what one stores the other finds, and nobody breaks what another relies on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.turboserve.cache.disk.conversations import MiB, assert_holds, conversation, file_bytes, open_store
from tests.turboserve.cache.disk.kill_worker import RowsFamily, history
from tests.turboserve.cache.fakes import converse, finish, lease_for, memory_for

from turboserve.cache.disk import SharedDiskStore, StoreLockedError, layout, shared
from turboserve.cache.disk.check import check_store
from turboserve.cache.disk.entry_locks import EntryLockedError, EntryLocks
from turboserve.cache.disk.folder import Folder
from turboserve.errors import SessionExistsError, SessionImportError, SessionNotFoundError, StartupError
from turboserve.messages import (
    CheckImport,
    DeleteSession,
    ExportedSession,
    ExportSession,
    ForkSession,
    GetSession,
    ImportSession,
    UpdateSession,
)


@contextmanager
def stores(path: Path, num: int = 2, **changes: Any) -> Iterator[list[SharedDiskStore]]:
    options: dict[str, Any] = {"limit_bytes": 64 * MiB, "write_rate": 1e12, "fingerprint": "model", **changes}
    with ExitStack() as stack:
        opened = [SharedDiskStore(path, **options) for _ in range(num)]
        for store in opened:
            stack.callback(store.close)
        yield opened


def turn(number: int, num_requests: int, num_pages: int = 10) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
    meta, header, arrays = conversation(number, num_pages)
    return {**meta, "num_requests": num_requests, "version": f"{number}-{num_requests}"}, header, arrays


def put(store: SharedDiskStore, name: str, what: tuple[Any, Any, Any]) -> str:
    key = store.key_for("caller", name)
    assert key is not None and store.put(key, *what) and store.flush(20)
    return key


def collected(store: SharedDiskStore, so_far: list[Any]) -> list[Any]:
    so_far.extend(store.changes())
    return so_far


def until(holds: Callable[[], object], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LOOK_S", 0.05)


def check_clean(path: Path, num_entries: int) -> None:
    """Nothing in the folder is damaged or nobody's."""
    report = check_store(path)
    assert (report.damaged, report.num_entries, report.num_leftovers) == ([], num_entries, 0)


def test_what_one_stores_the_other_finds_at_once_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LOOK_S", 1e6)
    with stores(tmp_path) as (a, b):
        key = put(a, "chat", turn(1, 1))
        assert b.get(key) is None
        found = b.refresh(key)
        assert found is not None and found.meta["version"] == "1-1"
        assert_holds(b, key, turn(1, 1))
        assert b.refresh(key) is None, "nothing has happened since"
        put(a, "chat", turn(1, 2, 14))
        found = b.refresh(key)
        assert found is not None and found.meta["version"] == "1-2"
        assert_holds(b, key, turn(1, 2, 14))
        assert a.key_for("caller", "chat") != a.key_for("other", "chat")


def test_everything_is_found_by_looking(tmp_path: Path) -> None:
    with stores(tmp_path) as (a, b):
        keys = {put(a, f"chat {i}", turn(i, 1)) for i in range(5)}
        seen: list[Any] = []
        until(lambda: {one.key for one in collected(b, seen)} == keys)
        assert b.status().num_bytes == a.status().num_bytes == file_bytes(tmp_path)
        a.delete(min(keys))
        gone: list[Any] = []
        until(lambda: min(keys) in collected(b, gone))
        until(lambda: b.status().num_bytes == file_bytes(tmp_path))
    check_clean(tmp_path, 4)


def test_an_earlier_turn_never_replaces_a_later_one(tmp_path: Path) -> None:
    with stores(tmp_path) as (a, b):
        key = put(a, "chat", turn(1, 3))
        put(b, "chat", turn(1, 2))
        assert b.counts.refused == 1
        for store in (a, b):
            until(lambda store=store: store.entry(key))  # type: ignore[misc]
            assert_holds(store, key, turn(1, 3))
        put(b, "chat", turn(2, 3))  # of as many turns, as after a split: the last one counts
        until(lambda: a.entry(key).meta["version"] == "2-3")  # type: ignore[union-attr]
        assert_holds(a, key, turn(2, 3))
    check_clean(tmp_path, 1)


def test_both_count_all_files_and_whoever_writes_makes_room(tmp_path: Path) -> None:
    limit = 1 * MiB
    with stores(tmp_path, limit_bytes=limit) as (a, b):
        for i in range(30):
            writer, other = (a, b) if i % 2 else (b, a)
            put(writer, f"chat {i}", turn(i, 1, 20))
            until(lambda other=other: other.status().num_bytes == file_bytes(tmp_path))  # type: ignore[misc]
            assert file_bytes(tmp_path) <= limit
        assert a.counts.dropped and b.counts.dropped
        newest = a.key_for("caller", "chat 29")
        assert newest is not None
        assert_holds(a, newest, turn(29, 1, 20))
        until(lambda: len(list(a.entries())) == len(list(b.entries())))
        num_left = len(list(a.entries()))
    check_clean(tmp_path, num_left)


def test_stores_that_do_everything_at_once_leave_a_whole_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    """Three servers write, read and delete the same few sessions; what is read is one of the written turns."""
    seeds = rng.integers(0, 2**31, 3)
    failures: list[BaseException] = []

    def work(store: SharedDiskStore, seed: int) -> None:
        mine = np.random.default_rng(seed)
        try:
            for _ in range(60):
                number, num_requests = int(mine.integers(4)), int(mine.integers(1, 9))
                key = store.key_for("caller", f"{number}")
                assert key is not None
                match int(mine.integers(5)):
                    case 0 | 1:
                        store.put(key, *turn(number, num_requests, 4 + num_requests))
                        if mine.random() < 0.5:
                            store.flush(20)
                    case 2:
                        store.refresh(key)
                        store.delete(key)
                    case _:
                        store.refresh(key)
                        got = store.get(key)
                        if got is not None:
                            expected = turn(number, got[0]["num_requests"], 4 + got[0]["num_requests"])
                            assert got[0] == expected[0]
                            assert all(np.array_equal(x, y) for x, y in zip(got[2], expected[2], strict=True))
        except BaseException as exc:
            failures.append(exc)

    with stores(tmp_path, 3) as opened:
        threads = [threading.Thread(target=work, args=pair) for pair in zip(opened, seeds.tolist(), strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not failures, failures
        for store in opened:
            assert store.flush(20)
            assert store.counts.write_failures == 0
    report = check_store(tmp_path)
    assert report.damaged == [] and report.num_leftovers == 0
    with stores(tmp_path, 1) as (again,):
        again.check_integrity()
        assert again.status().num_bytes == file_bytes(tmp_path)


HOLDER = """
import sys, time
from pathlib import Path
from turboserve.cache.disk.entry_locks import EntryLocks
from turboserve.cache.disk.folder import Folder
locks = EntryLocks(Folder.open(Path(sys.argv[1])))
with locks.hold(sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(path: Path, key: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds an entry's lock until it is killed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), key], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LOCK_WAIT_S", 0.1)
    with stores(tmp_path, 1) as (store,):
        key = store.key_for("caller", "chat")
        assert key is not None
        with holder(tmp_path, key) as process:
            put(store, "chat", turn(1, 1))
            assert store.entry(key) is None, "somebody else is at it"
            put(store, "other", turn(2, 1))
            assert store.entry(store.key_for("caller", "other") or "") is not None, "locks are of entries"
            process.send_signal(signal.SIGKILL)
            process.wait()
            put(store, "chat", turn(1, 1))
            assert_holds(store, key, turn(1, 1))


def test_locks_wait_for_each_other_only_as_long_as_is_said(tmp_path: Path) -> None:
    folder = Folder.open(tmp_path)
    first, second = EntryLocks(folder), EntryLocks(folder)
    with first.hold("a"):
        with pytest.raises(EntryLockedError), second.hold("a", 0.05):
            pass
        with second.hold("b"):
            pass
    with second.hold("a"):
        pass
    for locks in (first, second):
        locks.close()
    folder.close()


def test_a_file_system_without_locks_is_refused_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.fcntl", none)
    monkeypatch.setattr("fcntl.lockf", none)
    with pytest.raises(StartupError, match=r"No locks available.*kv_store_shared"), stores(tmp_path):
        pass


def test_a_folder_is_shared_by_all_or_by_nobody(tmp_path: Path) -> None:
    with stores(tmp_path, 1), pytest.raises(StoreLockedError):
        open_store(tmp_path)
    alone = open_store(tmp_path)
    with pytest.raises(StoreLockedError), stores(tmp_path, 1):
        pass
    alone.close()


def test_a_folder_that_cannot_be_opened_is_off_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a store knew nothing of its own state, and the first request ended the engine."""

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(layout, "open_store_folder", fail)
    with stores(tmp_path, 1) as (store,):
        assert not store.status().is_writable and "Input/output error" in store.status().reason
        (memory,) = memories([store])
        converse(memory, history(0, 1), session_id="chat")
        assert memory.answer(ForkSession("", "chat", "new"), 1e6).tokens == len(history(0, 1))


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    """A young piece that nobody names may be of an entry that another server is about to write."""
    with stores(tmp_path, 1) as (store,):
        put(store, "chat", turn(1, 1))
    young, old = (tmp_path / "pieces" / f"{c * 40}.safetensors" for c in "ab")
    for file in (young, old):
        file.write_bytes(b"x")
    os.utime(old, (1, 1))
    with stores(tmp_path, 1) as (store,):
        until(lambda: not old.exists())
        assert young.exists() and store.counts.integrity_failures == 0


def test_a_damaged_entry_is_dropped_and_what_replaced_it_is_not(tmp_path: Path) -> None:
    with stores(tmp_path) as (a, b):
        key = put(a, "chat", turn(1, 1))
        until(lambda: b.entry(key))
        for piece in (tmp_path / "pieces").iterdir():
            piece.write_bytes(piece.read_bytes()[:-1])
        assert b.get(key) is None and b.counts.integrity_failures == 1
        until(lambda: not list((tmp_path / "entries").iterdir()))
        put(a, "chat", turn(1, 2))
        until(lambda: b.entry(key))
        assert_holds(b, key, turn(1, 2))


# --- the memory over it


def memories(opened: list[SharedDiskStore]) -> list[Any]:
    return [memory_for(RowsFamily(), 100_000_000, store) for store in opened]  # type: ignore[arg-type]


def test_another_server_continues_and_the_first_one_learns_of_it(tmp_path: Path) -> None:
    with stores(tmp_path) as opened:
        a, b = memories(opened)
        converse(a, history(0, 1), session_id="chat")
        assert opened[0].flush(20)
        info = b.answer(GetSession("", "chat"), 2.0)
        assert info.tier == "disk" and info.tokens == len(history(0, 1))
        converse(b, history(0, 2), session_id="chat", now_s=2.0)
        assert b.events().restores["request"] == 1
        assert opened[1].flush(20)
        converse(a, history(0, 3), session_id="chat", now_s=3.0)
        assert a.events().restores["request"] == 1, "its own copy was older"
        assert opened[0].flush(20)
        for memory in (a, b):
            memory.check_integrity()


def test_a_turn_survives_that_its_earlier_one_gave_way_to_others(tmp_path: Path) -> None:
    """The file of the turn before is dropped by another server while a request runs: the new one must not go along."""
    with stores(tmp_path) as opened:
        a, b = memories(opened)
        converse(a, history(0, 1), session_id="chat")
        assert opened[0].flush(20)
        key = opened[1].key_for("", "chat")
        assert key is not None and opened[1].refresh(key) is not None
        lease = lease_for(a, history(0, 2), len(history(0, 2)) + 1, 2.0, session_id="chat")
        opened[1].delete(key)
        assert opened[1].flush(20)
        until(lambda: key in opened[0]._news)
        finish(a, lease, history(0, 2), 3.0)
        assert opened[0].flush(20)
        for memory in (a, b):
            assert memory.answer(GetSession("", "chat"), 1e6).tokens == len(history(0, 2))


def test_pins_and_deletions_of_one_count_for_the_other(tmp_path: Path) -> None:
    with stores(tmp_path) as opened:
        a, b = memories(opened)
        converse(a, history(0, 1), session_id="chat")
        assert opened[0].flush(20)
        b.answer(UpdateSession("", "chat", is_pinned=True), 2.0)
        assert opened[1].flush(20)
        until(lambda: a.answer(GetSession("", "chat"), time.monotonic() + 1e6).is_pinned)
        b.answer(DeleteSession("", "chat"), 3.0)
        assert opened[1].flush(20)

        def is_gone() -> bool:
            try:
                a.answer(GetSession("", "chat"), time.monotonic() + 2e6)
            except SessionNotFoundError:
                return True
            return False

        until(is_gone)
        a.write_all()
        assert opened[0].flush(20)
        assert not list((tmp_path / "entries").iterdir()), "what was deleted does not come back"


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_session_under_a_deleted_name_is_a_new_one(
    is_asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who learns of both at once, by looking or by being asked, drops the old one and not the new one's file."""
    monkeypatch.setattr(shared, "LOOK_S", 1e6)
    with stores(tmp_path) as opened:
        a, b = memories(opened)
        converse(a, history(0, 2), session_id="chat")
        assert opened[0].flush(20)
        assert b.answer(GetSession("", "chat"), 1.0).tokens > 0
        a.answer(DeleteSession("", "chat"), 2.0)
        assert opened[0].flush(20)
        opened[1]._look()
        converse(a, history(1, 1), session_id="chat")
        assert opened[0].flush(20)
        tokens = a.answer(GetSession("", "chat"), 3.0).tokens
        if not is_asked:
            opened[1]._look()
            b.expire(4.0)
        for now_s in (1.0 if is_asked else 5.0, 1e6, 2e6):  # at the same time nothing else is looked at
            assert b.answer(GetSession("", "chat"), now_s).tokens == tokens
            b.expire(now_s)
            assert opened[1].flush(20)
            assert len(list((tmp_path / "entries").iterdir())) == 1
        assert a.answer(GetSession("", "chat"), 3e6).tokens == tokens


SLOWLY = 4_000.0  # bytes a second: a session is being written for as long as a test lasts


def imported(memory: Any, file: ExportedSession, name: str, now_s: float = 2.0) -> Any:
    found = file.read()
    assert found is not None
    return memory.answer(ImportSession("", name, file.fields, *found, file.tokens), now_s)


def exported(memory: Any) -> ExportedSession:
    """A conversation of this memory, as a file for another."""
    converse(memory, history(0, 1), session_id="theirs")
    file: ExportedSession = memory.answer(ExportSession("", "theirs"), 1.0)
    return file


@pytest.mark.parametrize("how", ["import", "fork"])
def test_of_two_servers_that_take_one_new_name_at_once_one_is_refused(tmp_path: Path, how: str) -> None:
    """Each kept one of its own, until a next turn made one of them vanish."""
    with stores(tmp_path / "own", 1) as own, stores(tmp_path / "shared", 2, write_rate=SLOWLY) as opened:
        file = exported(memories(own)[0])
        a, b = memories(opened)
        for number, memory in enumerate((a, b)):
            converse(memory, history(1 + number, 1), session_id=f"from-{number}")

        def take(memory: Any, number: int) -> Any:
            if how == "fork":
                return memory.answer(ForkSession("", f"from-{number}", "new"), 3.0)
            return imported(memory, file, "new", 3.0)

        held = take(a, 0)
        with pytest.raises(SessionExistsError) as refused:
            take(b, 1)
        assert refused.value.param == "id" and "another server" in refused.value.message.lower()
        if how == "import":
            with pytest.raises(SessionExistsError):  # before its contents are sent
                b.answer(CheckImport("", "new", file.fields), 3.0)
        assert all(one.conversation_id != "new" for one in b.idle.of("")), "nothing of it stays"
        opened[0].close()  # writes what waits, no longer slowly
        with pytest.raises(SessionExistsError):
            take(b, 1)
        assert b.answer(GetSession("", "new"), 4.0).tokens == held.tokens
        b.check_integrity()


def test_a_name_is_free_again_when_nothing_came_of_it(tmp_path: Path) -> None:
    with stores(tmp_path / "own", 1) as own, stores(tmp_path / "shared", 2, write_rate=SLOWLY) as opened:
        file = exported(memories(own)[0])
        a, b = memories(opened)
        header, (ids, rows) = file.read() or ({}, [None, None])
        with pytest.raises(SessionImportError):
            a.answer(ImportSession("", "broken", file.fields, header, [ids, rows + 1], file.tokens), 2.0)
        assert is_free(b, file, "broken")
        converse(a, history(2, 1), session_id="first")  # what is being written while the next ones wait
        imported(a, file, "deleted")
        a.answer(DeleteSession("", "deleted"), 3.0)
        until(lambda: is_free(b, file, "deleted"))
        imported(a, file, "waits")
        time.sleep(5 * shared.LOOK_S)
        assert not is_free(b, file, "waits"), "only what has come to nothing is given back"


def is_free(memory: Any, file: ExportedSession, name: str) -> bool:
    """Whether an import under this name would be let begin."""
    try:
        memory.answer(CheckImport("", name, file.fields), 3.0)
    except SessionExistsError:
        return False
    return True


def test_a_claim_outlives_what_is_done_under_it_and_ends_with_its_process(tmp_path: Path) -> None:
    folder = Folder.open(tmp_path)
    first, second = EntryLocks(folder), EntryLocks(folder)
    assert first.claim("a") and first.claim("a") and not second.claim("a") and second.claim("b")
    with first.hold("a"):
        pass
    assert not second.claim("a"), "a write or a deletion in between does not end it"
    with first.hold("a"):
        first.disclaim("a")
        assert not second.claim("a"), "nor does its own end end a write"
    assert second.claim("a")
    second.disclaim("a")
    with holder(tmp_path, "a") as process:
        assert not first.claim("a")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert first.claim("a")
    for locks in (first, second):
        locks.close()
    folder.close()
