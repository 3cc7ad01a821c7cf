"""Workflows name scripts, make targets and files that exist, and pin what they use; the formula starts the server."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMULA = ROOT / "config" / "homebrew" / "turboserve.rb"
MAKEFILE = (ROOT / "Makefile").read_text()


def jobs(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text())["jobs"]
    return found


def steps(file: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(file).values():
        yield from job["steps"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.name)
def test_what_workflows_run_exists(file: Path) -> None:
    for step in steps(file):
        command = step.get("run", "")
        for target in re.findall(r"\bmake (\w+)", command):
            assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE), target
        for script in re.findall(r"^\.\S+", command, flags=re.MULTILINE):
            assert (ROOT / script).stat().st_mode & 0o111, script


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.name)
def test_workflows_are_bounded_and_may_only_read(file: Path) -> None:
    assert yaml.safe_load(file.read_text())["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 90 for job in jobs(file).values())
    assert all(re.fullmatch(r"[\w./-]+@v\d[\w.]*", step["uses"]) for step in steps(file) if "uses" in step)


def test_the_macs_job_keeps_what_the_report_is_written_to() -> None:
    mac = jobs(ROOT / ".github/workflows/ci.yml")["macos"]
    assert mac["runs-on"].startswith("macos-")
    (folder,) = re.findall(r"\.ci/metal \$\(VENV\) (\S+)", MAKEFILE)
    assert any(step.get("run") == "make metal" for step in mac["steps"])
    assert [step["with"]["path"] for step in mac["steps"] if "upload-artifact" in step.get("uses", "")] == [folder]
    assert any(f"{folder}/report.md" in step.get("run", "") for step in mac["steps"])


def test_wheels_come_from_a_machine_of_each_kind() -> None:
    kinds = jobs(ROOT / ".github/workflows/wheels.yml")["wheels"]["strategy"]["matrix"]["os"]
    arm_linux = {name for name in kinds if name.startswith("ubuntu-") and name.endswith("-arm")}
    intel_linux = {name for name in kinds if name.startswith("ubuntu-")} - arm_linux
    mac = {name for name in kinds if name.startswith("macos-")}
    assert [len(kind) for kind in (arm_linux, intel_linux, mac)] == [1, 1, 1]


def test_the_formula_is_ruby_and_starts_the_server() -> None:
    text = FORMULA.read_text()
    assert '"serve", "--config"' in text
    for file in re.findall(r'install "([^"]+)"', text):
        assert (ROOT / file).is_file(), file
    ruby = shutil.which("ruby")
    if ruby is None:
        pytest.skip("ruby is not installed, so the formula's syntax was not judged")
    done = subprocess.run([ruby, "-c", str(FORMULA)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
