"""Pages that quote the program say what it says: error texts, sizes; the site has all of them, links reach sections."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from turboserve import errors
from turboserve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
SITE: dict[str, Any] = yaml.safe_load((ROOT / "config" / "mkdocs.yml").read_text())


def texts_of_the_code() -> str:
    """All string literals of the server, those of one expression joined, with a NUL where something is filled in."""
    found = []
    for file in (ROOT / "server" / "turboserve").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_troubles_are_in_the_programs_own_words() -> None:
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    said = texts_of_the_code()
    codes = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")}
    rows = re.findall(r"^\| (.*?) \|", page, flags=re.M)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 25
    for text in quoted:
        assert text in said or text in codes, text


def test_sizes_are_those_that_the_formats_have() -> None:
    sizing = runpy.run_path(str(ROOT / "bench" / "sizing.py"))
    page = (DOCS / "sizing.md").read_text("utf-8")
    assert sizing["filled"](page) == page, "python bench/sizing.py --write"
    assert (DOCS / "kv-memory.svg").read_text("utf-8") == sizing["drawing"](), "python bench/sizing.py --write"


def test_the_readmes_chart_is_of_what_was_measured() -> None:
    chart = runpy.run_path(str(ROOT / "bench" / "size_and_quality.py"))
    page = (DOCS / "quality.md").read_text("utf-8")
    measured = {name: chart["points"](page, beginning) for name, beginning, _ in chart["MODELS"]}
    assert [len(points) for points in measured.values()] == [4, 4]
    assert measured["Qwen2.5-Coder-0.5B"][-1].kl > 1, "others' 4 bits break it"
    drawn = (DOCS / "size-and-quality.svg").read_text("utf-8")
    assert drawn == chart["drawing"](page), "python bench/size_and_quality.py --write"


def test_the_readme_is_two_screens() -> None:
    """It says what this is, how to begin, what was measured and what is missing; all else is a page of docs/."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 100 and max(map(len, text.splitlines())) <= 130
    assert "![" in text and "docs/images/dashboard.png" in text and "docs/size-and-quality.svg" in text
    assert [line for line in text.splitlines() if line.startswith("## ")][-2:] == ["## Limits", "## More"]


def test_pages_say_how_long_an_answer_may_be() -> None:
    """Where somebody asks for the first time, and where parameters are listed."""
    number = Settings().default_max_tokens
    for page in ("README.md", "docs/quickstart.md"):
        assert re.search(rf"Without\s`max_tokens`[^.]*\b{number:,}\stokens", (ROOT / page).read_text("utf-8")), page
    assert f"`default_max_tokens` ({number:,}" in (DOCS / "api.md").read_text("utf-8")
    assert f"`default_max_tokens` ({number:,}" in (DOCS / "routes.md").read_text("utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_pages_that_begin_with_make_serve_say_where_the_command_is(page: str) -> None:
    before, found, _ = (ROOT / page).read_text("utf-8").partition("```sh\nturboserve serve mlx-community")
    assert found and "`.venv/bin/turboserve`" in before and "`source .venv/bin/activate`" in before


def test_the_plan_on_paper_is_what_the_arithmetic_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))  # as Python does for a script
    scale = runpy.run_path(str(ROOT / "bench" / "scale.py"))
    page = (DOCS / "scale.md").read_text("utf-8")
    assert scale["filled"](page) == page, "python bench/scale.py --write"
    assert f"{scale['FIXED_S'] * 1e3:.1f} ms a step" in page
    assert f"{1 / scale['KV_S_PER_BYTE'] / 1e12:.1f} TB/s" in page


def test_the_drawing_of_rotation_is_what_the_codec_does() -> None:
    """Up to a pixel: sums of floats differ in their last bits from machine to machine."""
    drawn, kept = (runpy.run_path(str(ROOT / "bench" / "explain.py"))["drawing"](), (DOCS / "rotation.svg").read_text())
    numbers = [np.array([float(text) for text in re.findall(r"\d+(?:\.\d+)?", image)]) for image in (drawn, kept)]
    assert len(numbers[0]) == len(numbers[1]) > 500
    assert np.abs(numbers[0] - numbers[1]).max() < 1


def test_the_site_has_every_page() -> None:
    def leaves(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for child in entry.values() if isinstance(entry, dict) else entry:
                yield from leaves(child)

    named = list(leaves(SITE["nav"]))
    assert sorted(named) == sorted(page.name for page in DOCS.glob("*.md"))
    assert SITE["strict"] is True


def anchor(heading: str) -> str:
    """As both GitHub and the site make it of a heading."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_reach_sections_that_exist(page: Path) -> None:
    for target, section in re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", page.read_text("utf-8")):
        text = (page.parent / target if target else page).read_text("utf-8")
        assert section in {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.M)}, (target, section)
