"""Broken files, broken disks, killed processes: nothing raises, nothing wrong is ever returned."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.turboserve.cache.disk.conversations import assert_holds, close_clean, conversation, file_bytes, open_store

from turboserve.cache.disk.folder import File

WRITER = """
import sys
from pathlib import Path
from tests.turboserve.cache.disk.conversations import conversation, open_store

store = open_store(Path(sys.argv[1]), limit_bytes=1 << 20)
print("open", flush=True)
number = int(sys.argv[2])
while True:
    store.put(f"k{number % 20}", *conversation(number, 9 + number % 8))
    if number % 7 == 0:
        store.delete(f"k{(number + 10) % 20}")
    number += 1
    store.flush(10)
"""


def python(code: str, *args: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_a_killed_writer_leaves_whole_entries_only(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    num_found = 0
    for attempt in range(8):
        writer = python(WRITER, str(tmp_path), str(attempt * 1000))
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        time.sleep(moments.uniform(0.0, 0.15))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        store = open_store(tmp_path, limit_bytes=1 << 20)
        assert store.counts.integrity_failures == 0
        for entry in store.entries():
            number = entry.meta["number"]
            assert_holds(store, entry.key, conversation(number, 9 + number % 8))
            num_found += 1
        close_clean(store)
        assert not list(tmp_path.rglob("*.tmp"))
    assert num_found > 0


def test_an_entry_goes_before_its_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed between the two leaves pieces that nobody names, not an entry without pieces."""
    store = open_store(tmp_path)
    store.put("k", *conversation(1, 9))
    assert store.flush(20)
    gone: list[str] = []
    delete = File.delete

    def noted(file: File) -> None:
        gone.append(file.folder.path.name)
        delete(file)

    monkeypatch.setattr(File, "delete", noted)
    store.delete("k")
    assert store.flush(20)
    assert gone == ["entries", *["pieces"] * (len(gone) - 1)]
    assert len(gone) > 1
    close_clean(store)


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.turboserve.cache.disk.conversations import assert_holds, conversation, open_store

now = 1000.0
store = open_store(Path(sys.argv[1]), steady_clock=lambda: now)
assert store.put("before", *conversation(1)) and store.flush(20)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # the system refuses every longer file from now on
for key in ("a", "b"):
    store.put(key, *conversation(2, 20))
assert store.flush(20)
status = store.status()
assert not status.is_writable and status.reason == "the disk is full", status
assert not store.put("c", *conversation(3))
assert store.get("a") is store.entry_bytes("a") is None
assert_holds(store, "before", conversation(1))
assert store.counts.write_failures >= 1
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert not store.put("c", *conversation(3)), "not before it had some time"
now += 61
assert store.put("c", *conversation(3)) and store.flush(20)
assert store.status().is_writable and store.status().reason == ""
assert_holds(store, "c", conversation(3))
store.check_integrity()
store.close()
assert not list(Path(sys.argv[1]).rglob("*.tmp"))
print("served on")
"""


def test_a_full_disk_switches_writing_off_and_is_tried_again(tmp_path: Path) -> None:
    output, errors = python(FULL_DISK, str(tmp_path)).communicate(timeout=60)
    assert output == "served on\n", errors
    again = open_store(tmp_path)
    assert sorted(e.key for e in again.entries()) == ["before", "c"]
    close_clean(again)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine")
    store = open_store(path)
    for number in range(3):
        store.put(str(number), *conversation(number, 9))
        store.put(f"{number}+", *conversation(number, 13, branch=1))
    close_clean(store)
    return path


def damage(path: Path, how: str, data: st.DataObject) -> bool:
    """Whether the file is another one now."""
    before = path.read_bytes()
    content = bytearray(before)
    place = data.draw(st.integers(0, len(content) - 1))
    if how == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del content[place:]
    elif how == "grow":
        content += b"\0" * 8
    elif how == "zero":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif how == "remove":
        path.unlink()
        return True
    else:  # another file's content under this name
        others = sorted(p for p in path.parent.iterdir() if p != path)
        content = bytearray(data.draw(st.sampled_from(others)).read_bytes())
    path.write_bytes(content)
    return content != before


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_dropped_and_counted(pristine: Path, tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    shutil.copytree(pristine, tmp_path / "store")
    victims = sorted((tmp_path / "store").rglob("*.safetensors"))
    victim = data.draw(st.sampled_from(victims))
    is_early = data.draw(st.booleans())
    how = data.draw(st.sampled_from(["flip", "flip", "cut", "grow", "zero", "remove", "swap"]))
    if is_early:
        is_damaged = damage(victim, how, data)
    store = open_store(tmp_path / "store")  # which may delete the file at any moment
    if not is_early:
        is_damaged = damage(victim, how, data)
    lost = 0
    for number in range(3):
        for key, num_pages, branch in ((str(number), 9, 0), (f"{number}+", 13, 1)):
            if store.get(key) is None:
                lost += 1
            else:
                assert_holds(store, key, conversation(number, num_pages, branch))
    assert (lost > 0) == is_damaged
    is_unnoticed = is_early and how == "remove" and victim.parent.name == "entries"  # nothing tells that it was there
    assert (store.counts.integrity_failures > 0) == (is_damaged and not is_unnoticed)
    assert lost <= 2, "only those that need the file"
    assert store.put("new", *conversation(7))
    assert store.flush(20)
    assert_holds(store, "new", conversation(7))
    close_clean(store)
    again = open_store(tmp_path / "store")
    assert again.counts.integrity_failures == 0, "what was damaged is gone"
    assert len(again.entries()) == 7 - lost
    close_clean(again)


def test_strange_files_in_the_folder_do_no_harm(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    foreign = ["notes.txt", "mine.safetensors", "mine.safetensors.tmp", "mine.tmp"]
    for name in foreign:
        (tmp_path / "entries" / name).write_text("mine")
        (tmp_path / "pieces" / name).write_text("mine")
    (tmp_path / "entries" / f"{'a' * 40}.safetensors").write_bytes(b"")
    (tmp_path / "entries" / f"{'b' * 40}.safetensors").write_bytes(b"\xff" * 4096)
    (tmp_path / "entries" / f"{'c' * 40}.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    (tmp_path / "entries" / f"{'d' * 40}.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "pieces" / f"{'e' * 40}.safetensors").write_bytes(b"orphan")
    store = open_store(tmp_path)
    assert len(store.entries()) == 6
    assert store.counts.integrity_failures == store.status().num_damaged == 3
    assert store.flush(20)
    store.close()
    left = [path for letter in "abcde" for path in tmp_path.rglob(f"{letter * 40}*")]
    assert left == [], "what is the store's own went"
    for name in foreign:
        assert (tmp_path / "entries" / name).read_text() == (tmp_path / "pieces" / name).read_text() == "mine"


def test_a_folder_that_cannot_be_is_off_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = open_store(tmp_path / "file" / "store")
    status = store.status()
    assert (status.is_writable, status.num_entries) == (False, 0)
    assert "ot a directory" in status.reason
    assert not store.put("a", *conversation(1))
    assert store.get("a") is None
    assert store.entries() == []
    store.delete("a")
    store.close()


def test_a_read_only_folder_is_still_read(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def read_only(path: Any, flags: int, *rest: int, **options: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(30, "Read-only file system")
        return really_open(path, flags, *rest, **options)

    before = file_bytes(pristine)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        store = open_store(pristine)
    assert store.status().reason == "the folder is read-only"
    assert not store.status().is_writable
    assert not store.put("new", *conversation(8))
    assert_holds(store, "1", conversation(1, 9))
    store.close()
    assert file_bytes(pristine) == before


def test_what_cannot_be_written_at_all_costs_that_entry_only(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    meta, header, arrays = conversation(1)
    assert store.put("bad", meta | {"not JSON": object()}, header, arrays)
    assert store.put("good", meta, header, arrays)
    assert store.flush(20)
    assert store.entry_bytes("bad") is None
    assert store.counts.write_failures == 1
    assert_holds(store, "good", (meta, header, arrays))
    close_clean(store)


def test_keys_never_become_paths(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    nasty = ["../../etc/passwd", "/abs", "a\0b", "é" * 300, "", "con"]
    for number, key in enumerate(nasty):
        assert store.put(key, *conversation(number, 3))
    assert store.flush(20)
    for number, key in enumerate(nasty):
        assert_holds(store, key, conversation(number, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    close_clean(store)


def test_a_store_survives_being_closed_in_the_middle(tmp_path: Path) -> None:
    store = open_store(tmp_path, write_rate=50_000)
    for number in range(6):
        store.put(str(number), *conversation(number, 40))
    store.close(timeout_s=0.0)
    again = open_store(tmp_path)
    assert again.counts.integrity_failures == 0
    for entry in again.entries():
        assert_holds(again, entry.key, conversation(int(entry.key), 40))
    close_clean(again)
    assert np.all([p.suffix == ".safetensors" for p in (tmp_path / "entries").iterdir()])
