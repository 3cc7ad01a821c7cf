"""`turboserve doctor --store`: verifies every byte, changes none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.turboserve.cache.disk.conversations import conversation, open_store

from turboserve.cache.disk.check import check_store
from turboserve.cli.main import main


def filled(path: Path) -> Path:
    for fingerprint, numbers in (("one", (0, 1)), ("other", (2,))):
        store = open_store(path, fingerprint=fingerprint)
        for number in numbers:
            store.put(str(number), *conversation(number))
            store.put(f"{number}+", *conversation(number, 13, branch=1))
        store.close()
    return path


def doctor(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--store", str(path)])
    return int(ended.value.code or 0), capsys.readouterr().out


def contents(path: Path) -> dict[Path, Any]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.rglob("*") if p.is_file()}


def test_a_whole_store_is_ok(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(filled(tmp_path))
    report = check_store(tmp_path)
    assert (report.num_entries, report.num_pieces, dict(report.fingerprints)) == (6, 9, {"one": 4, "other": 2})
    assert report.total_bytes == sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors"))
    assert (report.damaged, report.num_leftovers, report.is_in_use) == ([], 0, False)
    status, output = doctor(tmp_path, capsys)
    assert status == 0
    assert "6 conversations of 2 models" in output
    assert contents(tmp_path) == before


def test_every_flipped_byte_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: Any) -> None:
    files = sorted(filled(tmp_path).rglob("*.safetensors"))
    for path in files[::2]:
        good = path.read_bytes()
        place = int(rng.integers(len(good)))
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert 1 <= len(check_store(tmp_path).damaged) <= 2
        path.write_bytes(good)
    path.write_bytes(good[:-1])
    status, output = doctor(tmp_path, capsys)
    assert status == 1
    assert "damaged, which the server will drop" in output


def test_a_store_in_use_and_leftovers_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(filled(tmp_path), fingerprint="one")
    assert doctor(tmp_path, capsys)[0] == 0
    assert check_store(tmp_path).is_in_use
    store.close()
    (tmp_path / "pieces" / f"{'0' * 40}.safetensors.tmp").write_bytes(b"half")
    status, output = doctor(tmp_path, capsys)
    assert status == 0
    assert "1 unfinished files" in output


def test_a_folder_that_is_no_store_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = doctor(tmp_path / "absent", capsys)
    assert status == 1
    assert "is no session store" in output
    assert not (tmp_path / "absent").exists()
