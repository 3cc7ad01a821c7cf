"""What pip gets to see: metadata, extras, package data, and caps that match what is installed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from turboserve import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
LINUX = {"platform_system": "Linux", "platform_machine": "x86_64", "sys_platform": "linux", "extra": ""}
MACOS = {"platform_system": "Darwin", "platform_machine": "arm64", "sys_platform": "darwin", "extra": ""}


def test_version_is_stated_once() -> None:
    """In the package; the build reads it there."""
    assert PROJECT["project"]["dynamic"] == ["version"]
    source = PROJECT["tool"]["scikit-build"]["metadata"]["version"]["input"]
    assert f'__version__ = "{__version__}"' in (ROOT / source).read_text()
    texts = [
        ROOT / name for name in ("Dockerfile", "docker-compose.yml", "pyproject.toml", "CMakeLists.txt", "Makefile")
    ]
    assert not [
        file.name for file in texts if re.search(rf"(turboserve|version)\W+{re.escape(__version__)}", file.read_text())
    ]


def test_wheels_are_built_for_every_python_that_is_supported() -> None:
    oldest = int(PROJECT["project"]["requires-python"].removeprefix(">=3."))
    built = [int(text.removeprefix("cp3").removesuffix("-*")) for text in PROJECT["tool"]["cibuildwheel"]["build"]]
    assert built == list(range(oldest, built[-1] + 1))
    assert sys.version_info[1] in built


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_every_runtime_dependency_is_capped_and_the_tested_one_fits(requirement: Requirement) -> None:
    assert any(spec.operator == "<" for spec in requirement.specifier), "no upper bound"
    if requirement.marker is None or requirement.marker.evaluate():
        assert requirement.specifier.contains(metadata.version(requirement.name))


@pytest.mark.parametrize(("extra", "backend"), [("cpu", "cpu"), ("cuda12", "cuda12"), ("cuda13", "cuda13")])
def test_backends_are_extras_on_linux_and_nothing_on_macos(extra: str, backend: str) -> None:
    (text,) = PROJECT["project"]["optional-dependencies"][extra]
    requirement = Requirement(text)
    assert (requirement.name, requirement.extras) == ("mlx", {backend})
    assert requirement.marker is not None
    assert requirement.marker.evaluate(LINUX)
    assert not requirement.marker.evaluate(MACOS)


def test_backends_exclude_each_other() -> None:
    (conflict,) = PROJECT["tool"]["uv"]["conflicts"]
    assert {entry["extra"] for entry in conflict} == {"cpu", "cuda12", "cuda13"}


def test_what_is_imported_is_declared_and_nothing_more() -> None:
    imported = set()
    for file in [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "server").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.partition(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"turboserve", "turboquant_kv", "pydantic_core"}
    declared = {requirement.name.replace("-", "_") for requirement in REQUIREMENTS}
    # transformers is capped because mlx-lm needs it; scipy_openblas32 is found, never imported.
    # OpenTelemetry is optional: an extra.
    assert foreign | {"transformers", "scipy_openblas32"} == declared | {"opentelemetry"}


def test_openblas_is_for_linux_only() -> None:
    (openblas,) = [r for r in REQUIREMENTS if r.name == "scipy-openblas32"]
    assert openblas.marker is not None
    assert openblas.marker.evaluate(LINUX)
    assert not openblas.marker.evaluate(MACOS)


def test_package_data_is_where_the_code_looks() -> None:
    server, library = resources.files("turboserve"), resources.files("turboquant_kv")
    assert server.joinpath("py.typed").is_file()
    assert library.joinpath("py.typed").is_file()
    assert library.joinpath("data/calibration.txt").is_file()
    assert server.joinpath("dashboard/index.html").is_file() and server.joinpath("dashboard/vendor/uplot.js").is_file()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert server.joinpath("models/tiny/model", name).is_file()


def test_nothing_in_the_packages_is_ignored_by_git_but_compiled_code() -> None:
    """scikit-build-core leaves out what .gitignore names, so a careless pattern would empty the wheel."""
    patterns = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line and not line.startswith("#")]
    assert "models/" not in patterns
    assert "data/" not in patterns
