"""`turboserve sessions export` and `import` with files that are none: links, FIFOs, folders, devices."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path

import pytest

from turboserve.cli.conversations import Conversation, Conversations
from turboserve.cli.main import main

SAID = [{"role": "user", "content": "My name is Paula."}, {"role": "assistant", "content": "Hello, Paula."}]


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Conversations:
    """One chat, `trip`, in a cache folder of the test's own."""
    monkeypatch.setenv("TURBOSERVE_CACHE_DIR", str(tmp_path / "cache"))
    chats = Conversations(tmp_path / "cache")
    chats.save(Conversation("trip", True, "", "4/3", SAID))
    return chats


def run(*args: str, status: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sessions", *args])
    assert (ended.value.code or 0) == status


def test_an_export_through_a_link_replaces_its_target(tmp_path: Path) -> None:
    target, link = tmp_path / "kept" / "target", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    for _ in range(2):  # where nothing is yet, and over what is there
        run("export", "trip", str(link), "--texts")
        assert link.is_symlink() and "Paula" in target.read_text() and target.stat().st_mode & 0o777 == 0o600
        assert [file.name for file in target.parent.iterdir()] == ["target"]
        target.write_text("older")


def test_an_export_is_written_into_a_fifo(tmp_path: Path) -> None:
    fifo, got = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()), daemon=True)
    reader.start()
    run("export", "trip", str(fifo), "--texts")
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    reader.join(10)
    assert got and "Paula" in got[0]


def test_an_export_over_a_folder_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    for place in (folder, link):
        run("export", "trip", str(place), "--texts", status=1)
        error = capsys.readouterr().err
        assert f"{place} is a folder: name a file in it" in error and len(error.splitlines()) == 1
    assert not list(folder.iterdir())


def test_texts_are_imported_from_a_fifo(
    kept: Conversations, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(tmp_path / "fifo", kept.path("trip").read_bytes())
    run("import", str(tmp_path / "fifo"), "--as", "again")
    assert capsys.readouterr().out == "again\n"
    again = kept.try_load("again")
    assert again is not None and again.messages == SAID


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"no session at all", bytes(1 << 20), b"{" * 20, b"{" + b" " * (65 << 20)],
    ids=["nothing", "a byte", "text", "zeros", "no JSON", "more than any chat"],
)
def test_a_pipe_of_anything_else_is_refused_in_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(tmp_path / "fifo", content)
    run("import", str(tmp_path / "fifo"), "--as", "again", status=1)
    error = capsys.readouterr().err
    assert str(tmp_path / "fifo") in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_session(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("import", device, status=1)
    error = capsys.readouterr().err
    assert device in error and len(error.splitlines()) == 1


def feed(fifo: Path, content: bytes) -> None:
    """Made, and written once by another thread to whoever reads it first."""

    def write() -> None:
        with contextlib.suppress(BrokenPipeError):
            fifo.write_bytes(content)

    os.mkfifo(fifo)
    threading.Thread(target=write, daemon=True).start()
