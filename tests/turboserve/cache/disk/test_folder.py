"""Whose folder it is: private, without links, and with nobody else's files touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.turboserve.cache.disk.conversations import assert_holds, close_clean, conversation, open_store

from turboserve.cache.disk import DiskStore
from turboserve.cache.disk.check import check_store, is_store
from turboserve.errors import StartupError

OURS = "0123456789" * 4 + ".safetensors"  # has the form of the store's own names


@pytest.fixture(autouse=True)
def _anything_goes() -> Iterator[None]:
    """A careless umask: nothing may depend on it."""
    before = os.umask(0)
    yield
    os.umask(before)


def filled(path: Path) -> Path:
    store = open_store(path)
    for number in range(2):
        store.put(str(number), *conversation(number, 9))
    close_clean(store)
    return path


def as_older_servers_left_it(path: Path) -> Path:
    (filled(path) / "turboserve-store").unlink(missing_ok=True)
    return path


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    """Every name below with its mode and content; links are not followed."""
    everything = [path, *path.rglob("*")]
    contents = {p: p.read_bytes() if p.is_file() and not p.is_symlink() else b"" for p in everything}
    return {str(p): (p.lstat().st_mode, contents[p]) for p in everything}


def precious(path: Path) -> Path:
    """Somebody's folder, with files that the store might take for its own."""
    path.mkdir(parents=True)
    for name in ("thesis.tex", "half.safetensors.tmp", "weights.safetensors", OURS, OURS + ".tmp"):
        (path / name).write_text("years of work")
        (path / name).chmod(0o644)
    return path


@pytest.mark.parametrize("name", ["entries", "pieces"])
@pytest.mark.parametrize("has_marker", [True, False])
def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path: Path, name: str, has_marker: bool) -> None:
    path = (filled if has_marker else as_older_servers_left_it)(tmp_path / "store")
    shutil.rmtree(path / name)
    (path / name).symlink_to(precious(tmp_path / "mine"))
    before = tree(tmp_path)
    with pytest.raises(StartupError, match=f"{name} is a link or a file") as caught:
        open_store(path)
    assert "\n" not in str(caught.value)
    assert not is_store(path)
    assert tree(tmp_path) == before


def test_a_folder_that_is_exchanged_for_a_link_leads_nowhere(tmp_path: Path) -> None:
    """What was opened stays what is used."""
    store = open_store(filled(tmp_path / "store"))
    mine = precious(tmp_path / "mine")
    (tmp_path / "link").symlink_to(mine)
    before = tree(mine)
    for name in ("entries", "pieces"):
        (store.path / name).rename(tmp_path / name)
        (store.path / name).symlink_to(mine)
    store.put("new", *conversation(5, 9))
    store.delete("0")
    assert store.flush(20)
    assert_holds(store, "new", conversation(5, 9))
    assert_holds(store, "1", conversation(1, 9))
    store.close()
    assert tree(mine) == before
    assert len(list((tmp_path / "entries").iterdir())) == 2


def test_links_and_pipes_among_the_files_are_not_followed(tmp_path: Path) -> None:
    path, mine = filled(tmp_path / "store"), precious(tmp_path / "mine")
    for name in ("entries", "pieces"):
        (path / name / OURS).symlink_to(mine / OURS)
        (path / name / (OURS + ".tmp")).symlink_to(mine / OURS)
        os.mkfifo(path / name / ("f" * 40 + ".safetensors"))
    victim = next(p for p in (path / "entries").iterdir() if p.is_file() and not p.is_symlink())
    content = victim.read_bytes()
    victim.unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    victim.symlink_to(tmp_path / "elsewhere")  # a whole entry, behind a link
    before = tree(mine)
    assert check_store(path).num_entries == 1
    store = open_store(path)
    assert len(store.entries()) == 1 and store.counts.integrity_failures == 0
    assert store.flush(20)
    store.close()
    assert tree(mine) == before and (tmp_path / "elsewhere").read_bytes() == content
    assert victim.is_symlink() and (path / "pieces" / OURS).is_symlink()


@pytest.mark.parametrize("make_link", [os.symlink, os.link])
def test_a_lock_that_is_a_link_costs_no_file(tmp_path: Path, make_link: object) -> None:
    path, mine = filled(tmp_path / "store"), tmp_path / "mine.txt"
    mine.write_text("years of work")
    (path / "store.lock").unlink()
    make_link(mine, path / "store.lock")  # type: ignore[operator]
    store = open_store(path)
    assert not store.status().is_writable and store.status().reason
    store.close()
    assert mine.read_text() == "years of work"


def test_everything_is_for_its_owner_only_also_what_was_there(tmp_path: Path) -> None:
    path = filled(tmp_path / "store")
    for one in (path, *path.rglob("*")):
        one.chmod(0o755 if one.is_dir() else 0o644)
    (path / "notes.txt").write_text("mine")
    (path / "notes.txt").chmod(0o644)
    store = open_store(path)
    store.put("new", *conversation(7, 9))
    close_clean(store)
    modes = {p.relative_to(path).as_posix(): p.stat().st_mode & 0o777 for p in (path, *path.rglob("*"))}
    assert modes.pop("notes.txt") == 0o644, "it is not the store's"
    folders = {name: modes.pop(name) for name in (".", "entries", "pieces")}
    assert set(folders.values()) == {0o700} and set(modes.values()) == {0o600}


def test_a_store_of_an_older_server_is_taken_over(tmp_path: Path) -> None:
    store = open_store(as_older_servers_left_it(tmp_path / "store"))
    assert sorted(entry.key for entry in store.entries()) == ["0", "1"]
    close_clean(store)
    assert (tmp_path / "store" / "turboserve-store").read_text().startswith("A session store of turboserve")


@pytest.mark.parametrize("place", [".", "entries", "pieces", "store.lock"])
def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path: Path, place: str) -> None:
    path = tmp_path / "store"
    if place == "store.lock":
        path.mkdir()
        (path / place).write_text("a lock of another program")
    else:
        precious(path / place)
    before = tree(tmp_path)
    with pytest.raises(StartupError, match="is no session store, and there is something in it") as caught:
        open_store(path)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_a_volume_that_a_system_prepared_is_as_good_as_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir(mode=0o755)
    store = open_store(tmp_path)
    store.put("a", *conversation(1))
    close_clean(store)
    assert (tmp_path / "lost+found").stat().st_mode & 0o777 == 0o755


def test_the_operators_own_link_to_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    store: DiskStore = open_store(tmp_path / "store")
    store.put("a", *conversation(1))
    close_clean(store)
    assert len(list((tmp_path / "disk" / "entries").iterdir())) == 1
