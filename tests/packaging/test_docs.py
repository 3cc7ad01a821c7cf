"""The documentation names only what exists: files, make targets, settings, routes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from turboserve import errors
from turboserve.api.routes import ROUTES
from turboserve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_and_variables_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make ([^#`\n]+)|`make ([^`]+)`", page.read_text(), flags=re.MULTILINE):
        for word in (command[0] or command[1]).split():
            name = word.partition("=")[0]
            pattern = rf"^{name} \?=" if "=" in word else rf"^{name}:"
            assert re.search(pattern, makefile, flags=re.MULTILINE), word


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_environment_variables_are_settings(page: Path) -> None:
    known = set(Settings.model_fields) | {"config", "blas"}
    for name in re.findall(r"TURBOSERVE_([A-Z][A-Z_]*[A-Z])", page.read_text()):
        assert name.lower() in known, name


@pytest.mark.parametrize("page", [p for p in PAGES if p.name == "architecture.md"], ids=lambda p: p.name)
def test_modules_that_are_named_exist(page: Path) -> None:
    folders = [ROOT, ROOT / "server" / "turboserve", ROOT / "kernels", ROOT / "kernels" / "turboquant_kv"]
    for name in re.findall(r"`([a-z_/]+\.py)`", page.read_text()):
        assert any((folder / name).is_file() for folder in folders), name


def test_the_api_page_names_every_route_and_no_other() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    table = text[: text.index("## Chat completions")]
    named = set(re.findall(r"`((?:GET|POST|DELETE) /[^`]*)`", table))
    assert named - {"GET /"} == {re.sub(r"\{\w+\}", "{id}", route) for route in ROUTES}


def test_the_api_page_names_every_error_code() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    table = text[text.index("## Errors") : text.index("## Access")]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.code for kind in kinds if issubclass(kind, errors.TurboServeError)}
    unseen = {None, errors.RequestCancelledError.code}  # its client has left
    assert codes - unseen <= set(re.findall(r"`(\w+)`", table))


def test_the_api_page_names_the_reasons_of_refusals() -> None:
    """Those that are counted by name; the others are error codes."""
    lines = (ROOT / "docs" / "api.md").read_text().splitlines()
    (row,) = [line for line in lines if "turboserve_request_refused_total" in line]
    sources = [file.read_text() for file in (ROOT / "server" / "turboserve").rglob("*.py")]
    counted = {reason for text in sources for reason in re.findall(r'request_refused\("(\w+)"\)', text)}
    assert counted and set(re.findall(r"`([a-z_]+)`", row)) == counted
