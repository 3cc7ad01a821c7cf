"""Ten mistakes that people make, each answered by one line with its cause and its cure, and without a traceback.

Two more of them, a busy port and an address for everybody without a key, are in test_main.py.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.turboserve.cli.hub_server import hub_of
from tests.turboserve.cli.test_main import ROOT, run

from turboserve.cli.main import main
from turboserve.machine_memory import detect_memory

PATHS = [str(ROOT / "kernels"), str(ROOT / "server")]


def only_line(stderr: str, *words: str) -> None:
    """What the command said at last is one line with these words, and nothing looks like a traceback."""
    own = [line for line in stderr.splitlines() if line.startswith("turboserve: ")]
    assert len(own) == 1 and "Traceback" not in stderr, stderr
    assert all(word in own[0] for word in words), own[0]


def status_of(*args: str) -> int:
    """The exit status of a command that is carried out here."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    return int(ended.value.code or 0)


def test_a_hub_model_that_is_spelled_wrongly(tmp_path: Path, rng: np.random.Generator) -> None:
    name = f"owner/model-{rng.integers(1 << 40):x}"
    with hub_of({}) as url:
        result = run("serve", name, "--port", "0", HF_ENDPOINT=url, HF_HOME=str(tmp_path))
    assert result.returncode == 1
    only_line(result.stderr, name, "check the spelling")


@pytest.mark.parametrize("command", ["serve --port 0", "eval", "bench kernels", "bench memory"])
def test_a_missing_backend(command: str, tmp_path: Path) -> None:
    package = tmp_path / "mlx"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    result = run(*command.split(), PYTHONPATH=os.pathsep.join([str(tmp_path), *PATHS]))
    assert result.returncode == 1
    only_line(result.stderr, "MLX has no backend installed", "pip install 'turboserve[")


def test_a_budget_in_which_nothing_fits(tmp_path: Path) -> None:
    result = run("serve", "--port", "0", "--kv-budget", "1MiB", "--cache-dir", str(tmp_path))
    assert result.returncode == 1
    only_line(result.stderr, "holds 64 tokens", "set --kv-budget to 4MiB or more")
    assert "loading" not in result.stdout, "it is known before anything is loaded"


def test_a_model_that_cannot_fit(tmp_path: Path) -> None:
    """Weights larger than memory: files with holes, which take no room on the disk."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (ROOT / "server/turboserve/models/tiny/model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    num_bytes = 2 * detect_memory().total_bytes
    with (folder / "model-00002.safetensors").open("wb") as weights:
        header = b'{"x":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (num_bytes, num_bytes)
        weights.write(len(header).to_bytes(8, "little") + header)
        weights.truncate(8 + len(header) + num_bytes)
    result = run("serve", str(folder), "--port", "0", "--cache-dir", str(tmp_path))
    assert result.returncode == 1
    only_line(
        result.stderr, "The weights take", f"{num_bytes >> 20}"[:3], "MiB of memory are available", "choose a smaller"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"port = [", ("not valid TOML",)),
        (b"\xff\xfe", ("not valid TOML",)),
        (None, ("holds no *.toml",)),
        (b'kv_fromat = "4/3"', ("kv_fromat", "unknown key", "did you mean kv_format?")),
    ],
)
def test_a_settings_file_that_cannot_be_used(
    content: bytes | None, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.toml"
    if content is not None:
        file.write_bytes(content)
    assert status_of("serve", "--config", str(tmp_path if content is None else file)) == 2
    only_line(capsys.readouterr().err, str(tmp_path), *words)


def test_a_variable_that_is_no_setting_is_named_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TURBOSERVE_KV_FROMAT", "4/3")
    monkeypatch.setenv("TURBOSERVE_SERVICE_HOST", "10.0.0.1")
    assert status_of("config", "show", "--changed") == 0
    only_line(capsys.readouterr().err, "TURBOSERVE_KV_FROMAT", "did you mean TURBOSERVE_KV_FORMAT?")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("command", [["config", "show"], ["--help"]])
def test_a_full_disk(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "turboserve", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)},
        )
    assert result.returncode == 1
    only_line(result.stderr, "No space left on device", "free some")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MLX compiles with g++ on Linux alone")
@pytest.mark.parametrize(
    ("command", "said", "words"),
    [
        ("serve --port 0", "error closing x.s: No space left on device", ("no space is left there", "TMPDIR")),
        ("bench memory --lengths 512", "internal compiler error", ("cannot compile", "turboserve doctor")),
    ],
)
def test_a_disk_that_is_full_where_mlx_compiles(
    command: str, said: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    """It keeps what it compiled in the folder for temporary files, so that this one is new."""
    compiler = tmp_path / "g++"
    # MLX asks first whether there is one at all.
    compiler.write_text(f"#!/bin/sh\ncase $* in *-shared*) echo '{said}'; exit 1 ;; esac\n")
    compiler.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = run(*command.split(), "--cache-dir", str(tmp_path / "cache"), TMPDIR=str(tmp_path), PATH=path)
    assert result.returncode == 1
    only_line(result.stderr, str(tmp_path), *words)


def test_a_reader_who_leaves_early_hears_no_complaint() -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "turboserve", "config", "show"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)},
    )
    assert command.stdout is not None
    command.stdout.close()
    _, stderr = command.communicate(timeout=60)
    assert b"Traceback" not in stderr and b"Exception" not in stderr


def test_an_old_python() -> None:
    code = "import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_module('turboserve', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)},
    )
    assert result.returncode == 1
    only_line(result.stderr, "Python 3.11 or newer is needed", "3.9.18", "-m venv")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_the_model_is_loaded(sent: signal.Signals, tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "turboserve", "serve", "--port", "0", "--cache-dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)},
    )
    assert server.stdout is not None
    while "loading" not in (line := server.stdout.readline()):
        assert line, server.communicate()
    server.stdout.readline()  # the next step's: by now the HTTP server has taken the signals
    server.send_signal(sent)
    _, stderr = server.communicate(timeout=60)
    assert server.returncode == 128 + sent
    only_line(stderr, "interrupted by", "while the model was loaded", "start it again")


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for command in (["chat", "Hello"], ["ps", "--once"], ["sessions", "list"], ["stats"]):
        assert status_of(*command, "--url", "http://127.0.0.1:9") == 1
        only_line(capsys.readouterr().err, "no turboserve answers at http://127.0.0.1:9", "turboserve serve")
