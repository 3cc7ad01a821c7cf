"""The command as users meet it: exit statuses, one-line errors, nothing heavy imported too early."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from turboquant_kv.backends.native import backend as native
from turboserve import __version__
from turboserve.cli import main as main_module
from turboserve.errors import StartupError

ROOT = Path(__file__).resolve().parents[3]


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, started from the repository root like a developer would."""
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "server")])
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TURBOSERVE_")}
    return subprocess.run(
        [sys.executable, "-m", "turboserve", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**clean, "PYTHONPATH": paths} | env,
    )


def test_version() -> None:
    result = run("--version")
    assert result.returncode == 0
    # The backends are those of this very process: MLX runs here, and so do the kernels where they are built.
    kernels, _ = native.load_kernels()
    isa = kernels.isa_levels()[0] if kernels else "not built"
    line = rf"turboserve {__version__} \(mlx {metadata.version('mlx')}: (metal|cuda1[23]|cpu); CPU kernels: {isa}\)"
    assert re.fullmatch(line, result.stdout.strip())


@pytest.mark.parametrize(
    ("args", "env", "line"),
    [
        (("serve", "--port", "70000"), {}, "--port '70000': expected a number less than or equal to 65535"),
        (("serve",), {"TURBOSERVE_KV_FORMAT": "9/9"}, "TURBOSERVE_KV_FORMAT='9/9': expected balanced, compact, tiny"),
        (("doctor", "--config", "absent.toml"), {}, "--config absent.toml: No such file or directory"),
    ],
)
def test_bad_setting_is_one_line_and_status_2(args: tuple[str, ...], env: dict[str, str], line: str) -> None:
    result = run(*args, **env)
    assert result.returncode == 2
    assert result.stderr.startswith(f"turboserve: {line}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["serve", "--prot", "1"], ("--prot", "--port", "`turboserve serve --help`")),
        (["cht"], ("'cht'", "chat")),
        (["--versoin"], ("--versoin", "--version")),
        (["sessions", "forkk"], ("forkk", "fork", "`turboserve sessions --help`")),
        (["sessions", "fork"], ("NAME",)),
        (["bench", "serve", "--streams", "0"], ("--streams", "`turboserve bench serve --help`")),
        (["chat", "--max-tokens", "many"], ("--max-tokens", "integer")),
    ],
)
def test_what_is_not_understood_is_one_line_and_status_2(
    args: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main_module.main(args)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert said.err.startswith("turboserve: ") and said.err.count("\n") == 1
    assert all(word in said.err for word in words), said.err


@pytest.mark.parametrize("args", [[], ["sessions"], ["bench"], ["config"]])
def test_a_group_alone_shows_its_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main_module.main(args)
    said = capsys.readouterr()
    assert "Commands:" in said.out + said.err and "Example:" in said.out + said.err


def test_startup_error_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(settings: object) -> None:
        raise StartupError("the model is\ngone: fetch it")

    monkeypatch.setattr("turboserve.cli.serve.run", refuse)
    with pytest.raises(SystemExit) as stopped:
        main_module.main(["serve"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "turboserve: the model is gone: fetch it\n"


def test_exposed_without_key_is_refused_before_anything_is_loaded() -> None:
    result = run("serve", "--host", "0.0.0.0", "--port", "0")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "--api-key" in result.stderr


@pytest.mark.parametrize("model", ["./model", "/no/such/folder", "no-such-folder", "./no/such/folder"])
def test_missing_model_is_one_line(model: str) -> None:
    result = run("serve", model, "--port", "0")
    assert result.returncode == 1
    assert result.stderr.startswith(f"turboserve: There is no folder {model}")
    assert result.stderr.count("\n") == 1


def test_busy_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", "--port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert "is in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_command_line_imports_neither_mlx_nor_the_engine() -> None:
    names = ("mlx", "mlx_lm", "transformers", "turboserve.engine.engine")
    code = f"import sys, turboserve.cli.main; print([m for m in {names} if m in sys.modules])"
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "server")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert result.stdout.strip() == "[]"
