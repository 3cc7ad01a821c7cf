"""Real file systems that are full or read-only, mounted in a namespace of the test's own (Linux)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENTER = 'mount -t tmpfs -o size=300k tmpfs {folder} && exec {python} -c "$CODE" {folder}'


def in_a_mount(folder: Path, code: str) -> str:
    """What a program prints that has `folder` as a file system of 300 kB, which goes with it."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    shell = ENTER.format(folder=folder, python=sys.executable)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "CODE": code}
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", shell], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FULL = """
import sys
from pathlib import Path
from tests.turboserve.cache.disk.conversations import assert_holds, conversation, open_store

folder, now = Path(sys.argv[1]), 1000.0
store = open_store(folder / "store", steady_clock=lambda: now)
store.put("a", *conversation(1, 9))
assert store.flush(20)
(folder / "ballast").write_bytes(bytes(200_000))
for number in range(5):
    store.put("b", *conversation(2, 40))
    assert store.flush(20)
    now += 61
print(store.status().reason, store.counts.write_failures)
assert_holds(store, "a", conversation(1, 9))
assert store.get("b") is None
assert len(list((folder / "store" / "pieces").iterdir())) == 2, "what was begun is gone"
(folder / "ballast").unlink()
assert store.put("b", *conversation(2, 9)) and store.flush(20)
assert_holds(store, "b", conversation(2, 9))
assert store.status().is_writable and store.counts.integrity_failures == 0
store.check_integrity()
store.close()
"""


def test_a_file_system_that_is_full_keeps_what_is_there(tmp_path: Path) -> None:
    assert in_a_mount(tmp_path, FULL) == "the disk is full 5\n"


READ_ONLY = """
import subprocess, sys
from pathlib import Path
from tests.turboserve.cache.disk.conversations import assert_holds, conversation, open_store

folder = Path(sys.argv[1])
store = open_store(folder / "store")
store.put("a", *conversation(1, 9))
store.close()
subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
store = open_store(folder / "store")
print(store.status().reason, store.status().is_writable)
assert_holds(store, "a", conversation(1, 9))
store.delete("a")
assert not store.put("b", *conversation(2, 9)) and store.get("a") is None
store.close()
(store := open_store(folder / "other")).close()
print(store.status().reason)
subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
(store := open_store(folder / "store")).close()
print([entry.key for entry in store.entries()])
"""


def test_a_read_only_file_system_is_read_and_nothing_else(tmp_path: Path) -> None:
    lines = in_a_mount(tmp_path, READ_ONLY).splitlines()
    assert lines == ["the folder is read-only False", "Read-only file system", "['a']"]
