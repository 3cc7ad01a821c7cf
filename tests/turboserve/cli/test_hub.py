"""`turboserve pull`, `ls` and `rm` against a hub on this machine, by the hub's own library."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
from tests.turboserve.cli.hub_server import COMMIT, hub_of
from tests.turboserve.cli.test_main import ROOT, run

from turboserve.engine.model_folder import EMBEDDED_DIR, resolve_folder


def test_a_model_is_fetched_listed_and_deleted(tmp_path: Path, rng: np.random.Generator) -> None:
    name = f"owner-{rng.integers(1 << 30):x}/tiny"
    files = {file.name: file.read_bytes() for file in EMBEDDED_DIR.iterdir() if file.is_file()}
    half = {"config.json": b"{}", "code.py": b"raise SystemExit"}
    with hub_of({name: files, "other/half": half}) as url:
        env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        assert run("ls", **env).stdout == ""
        pulled = run("pull", name, "other/half", **env)
        assert pulled.returncode == 0 and pulled.stderr == "", "no bars where nobody watches"
    whole, other = pulled.stdout.splitlines()
    folder = Path(whole.removeprefix(f"{name}: "))
    assert folder.name == COMMIT and resolve_folder(str(folder)) == folder
    assert all((folder / n).read_bytes() == content for n, content in files.items() if n.endswith(".json"))
    assert other.endswith("(no MLX weights: it cannot be served)")
    assert not (Path(other.split()[1]) / "code.py").exists(), "code is never fetched"

    listed = json.loads(run("ls", "--json", **env).stdout)
    assert {row["name"]: row["problem"] for row in listed} == {name: "", "other/half": "no MLX weights"}
    assert next(row["bytes"] for row in listed if row["name"] == name) > max(map(len, files.values()))
    wrong = run("rm", "other/half", name[:-1], **env)
    assert wrong.returncode == 1 and f"did you mean {name}?" in wrong.stderr
    assert run("rm", name, **env).returncode == 0
    assert not folder.exists()
    assert [row["name"] for row in json.loads(run("ls", "--json", **env).stdout)] == ["other/half"]


def test_a_terminal_sees_how_far_a_download_is(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    with hub_of({"owner/some": {"config.json": b" " * 3_000_000}}) as url:
        command = subprocess.Popen(
            [sys.executable, "-m", "turboserve", "pull", "owner/some"],
            stdout=slave,
            stderr=slave,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "server")])}
            | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "TERM": "xterm"},
        )
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += os.read(master, 65536)
            except OSError:  # its last holder has ended
                break
        assert command.wait(60) == 0
    os.close(master)
    assert b"downloading" in shown and b"Traceback" not in shown and b"Fetching" not in shown
    assert shown.rfind(b"\x1b[?25h") > max(shown.rfind(b"\x1b[?25l"), shown.rfind(b"downloading")), "the cursor is back"
