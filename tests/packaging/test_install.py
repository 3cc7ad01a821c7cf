"""What `make serve` and `make test` ask an installer for, told by one that writes down what it is asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = "TURBOQUANT_LEVELS="

UV = """#!/bin/sh
# Makes an environment whose Python has pip, and writes down what is installed.
case $1 in
    venv)
        for venv; do :; done
        mkdir -p "$venv/bin"
        printf '#!/bin/sh\\n[ "$2" != pip ] || { echo "$PIP_SAYS"; exit "${STATUS:-0}"; }\\n' > "$venv/bin/python"
        chmod +x "$venv/bin/python"
        ;;
    *) printf '%s\\n' "$@" "$SKBUILD_CMAKE_DEFINE" > "$WRITTEN"; echo "$UV_SAYS"; exit "${STATUS:-0}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile and the script, an installer of our own, and no source."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "uv").write_text(UV)
    (tools / "uv").chmod(0o755)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "server").mkdir()
    return tmp_path


def asked(checkout: Path, *arguments: str) -> tuple[str, list[str]]:
    """What was said, and what the installer was asked for."""
    written = checkout / "written"
    written.unlink(missing_ok=True)
    tools = f"{checkout / 'tools'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", ".ci/install", *arguments],
        cwd=checkout,
        env={**os.environ, "PATH": tools, "WRITTEN": str(written)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr, written.read_text().splitlines() if written.exists() else []


@pytest.mark.parametrize(("extras", "wanted"), [(("cpu",), "native"), (("cpu", "dev"), "all")])
def test_who_serves_gets_kernels_for_this_machine_and_who_tests_gets_all(
    extras: tuple[str, ...], wanted: str, checkout: Path
) -> None:
    said, words = asked(checkout, ".venv", *extras)
    assert LEVELS + wanted in words and f".[{','.join(extras)}]" in words
    assert f"CPU kernels: {wanted}" in said and said.count("\n") == 2, "what it creates and installs"


UV_SAYS = """Resolved 40 packages in 2ms
   Building turboserve @ file:///x
      Built turboserve @ file:///x
Prepared 40 packages in 30s
Installed 40 packages in 2s"""
PIP_SAYS = """Obtaining file:///x
  Installing build dependencies: started
Collecting mlx
  Downloading mlx.whl (3 MB)
Collecting httpx
  Building editable for turboserve (pyproject.toml): started
  Building editable for turboserve (pyproject.toml): finished with status 'done'
Installing collected packages: mlx, turboserve"""


def test_each_step_is_named_once(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ["Creating", "Installing turboserve[cpu]", "Downloading", "Building", "Installing packages"]
    monkeypatch.setenv("UV_SAYS", UV_SAYS)
    said, _ = asked(checkout, ".venv", "cpu")
    assert [line.startswith(step) for line, step in zip(said.splitlines(), steps, strict=True)] == [True] * 5


def test_a_failure_shows_all_that_pip_said(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("UV_SAYS", "uv gives up"), ("PIP_SAYS", f"{PIP_SAYS}\nNo space left"), ("STATUS", "1")):
        monkeypatch.setenv(name, value)
    said, _ = asked(checkout, ".venv", "cpu")
    assert f"{PIP_SAYS}\nNo space left\ninstall: installing failed, for the reason above\n" in said
    assert said.count("Downloading packages") == 1 and "uv gives up" not in said


def test_levels_can_be_asked_for(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEVELS", "all")
    assert LEVELS + "all" in asked(checkout, ".venv", "cpu")[1]
    monkeypatch.setenv("LEVELS", "avx9")
    said, words = asked(checkout, ".venv", "cpu")
    assert "LEVELS=avx9: expected native or all" in said and not words
    monkeypatch.setenv("LEVELS", "native")
    assert LEVELS + "all" in asked(checkout, ".venv", "cpu", "dev")[1], "tests see every level"


def test_make_hands_its_variable_on() -> None:
    rule = re.search(r"^\$\(BASE_STAMP\):.*\n\t(.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert rule is not None and "LEVELS=$(LEVELS) .ci/install" in rule[1]


def test_wheels_and_images_have_every_level() -> None:
    assert "TURBOQUANT_LEVELS all CACHE" in (ROOT / "CMakeLists.txt").read_text()
    for name in ("pyproject.toml", "Dockerfile", ".github/workflows/wheels.yml", "config/homebrew/turboserve.rb"):
        assert "TURBOQUANT_LEVELS" not in (ROOT / name).read_text(), name
