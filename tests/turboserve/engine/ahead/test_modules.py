"""Compiled modules are counted and passed on whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from turboserve.engine.ahead.modules import Publisher, modules_in


def compiled(folder: Path, name: str, code: bytes = b"code") -> Path:
    path = folder / f"{name}.ptx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".txt").write_text("kernel\tmangled\n")
    path.with_suffix(".cu").write_text("source")
    path.write_bytes(code)
    return path.relative_to(folder)


def test_what_is_new_reaches_all_folders_once_with_its_names_and_source(tmp_path: Path) -> None:
    own, server, sibling = (tmp_path / name for name in ("own", "server", "sibling"))
    for folder in (own, server, sibling):
        folder.mkdir()
    compiled(own, "kept")  # from an earlier start
    publisher = Publisher(own, [server, sibling])
    assert publisher.publish() == 0
    new = {compiled(own, "gather"), compiled(own, f"{'long' * 60}/rest")}  # MLX makes folders of long names
    assert publisher.publish() == 2
    for folder in (server, sibling):
        assert modules_in(folder) == new
        assert (folder / "gather.txt").read_text() == "kernel\tmangled\n"
        assert (folder / "gather.cu").read_text() == "source"
        assert not [path for path in folder.rglob("*") if path.name.startswith(".part-")]
    assert publisher.publish() == 0


def test_a_module_that_is_there_is_left_alone(tmp_path: Path) -> None:
    own, server = tmp_path / "own", tmp_path / "server"
    own.mkdir()
    compiled(server, "gather", b"the server's")
    publisher = Publisher(own, [server])
    compiled(own, "gather")
    publisher.publish()
    assert (server / "gather.ptx").read_bytes() == b"the server's"


def test_a_process_that_is_gone_costs_the_others_nothing(tmp_path: Path) -> None:
    own, server, gone, last = (tmp_path / name for name in ("own", "server", "gone", "last"))
    for folder in (own, server, last):
        folder.mkdir()
    gone.write_text("no folder any more")
    publisher = Publisher(own, [server, gone, last])
    new = {compiled(own, "gather")}
    publisher.publish()
    assert modules_in(server) == modules_in(last) == new


def test_a_server_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    own, server = tmp_path / "own", tmp_path / "server"
    own.mkdir()
    publisher = Publisher(own, [server])
    compiled(own, "gather")
    server.write_text("a file in its place")
    with pytest.raises(OSError):
        publisher.publish()
    server.unlink()
    shutil.rmtree(own)
    assert modules_in(own) == set()
