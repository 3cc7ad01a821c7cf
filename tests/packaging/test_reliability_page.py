"""docs/reliability.md names tests that exist, and every case has one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text("utf-8")


def test_every_case_names_a_test_that_exists() -> None:
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^ *(?:async )?def (test_\w+)", file.read_text("utf-8"), flags=re.MULTILINE)
    }
    cases = dict(re.findall(r"^\| (\d+) \|(.*)\|$", PAGE, flags=re.MULTILINE))
    assert list(map(int, cases)) == list(range(1, 41))
    for number, line in cases.items():
        named = re.findall(r"`(test_\w+)`", line)
        assert named, number
        assert set(named) <= defined, (number, set(named) - defined)


def test_every_command_exists() -> None:
    modules = re.findall(r"python -m (tests[\w.]+)", PAGE)
    assert modules
    for module in modules:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
