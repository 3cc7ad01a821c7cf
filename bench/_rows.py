"""Result rows that every bench script writes: one figure each, with what it is compared to and whether it suffices.

With `--json FILE` a script writes a list of objects {name, value, unit, baseline, ratio, target, met}. `ratio` is
value / baseline; `target` is a sentence such as "at most 0.028"; `met` is null where there is no target.
Owns the rows and their printing; what is measured is each script's own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure. Made by the constructors below, which fill in ratio, target and met."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    target: str | None = None
    met: bool | None = None

    @classmethod
    def plain(cls, name: str, value: float, unit: str, baseline: float | None = None) -> Row:
        """A figure without a target."""
        return cls(name, float(value), unit, baseline, _ratio(value, baseline))

    @classmethod
    def at_most(cls, name: str, value: float, unit: str, target: float | None, baseline: float | None = None) -> Row:
        """Met when value <= target; a target of None is no target."""
        text, met = (None, None) if target is None else (f"at most {target:.6g}", bool(value <= target))
        return cls(name, float(value), unit, baseline, _ratio(value, baseline), text, met)

    @classmethod
    def at_least(cls, name: str, value: float, unit: str, target: float | None, baseline: float | None = None) -> Row:
        """Met when value >= target; a target of None is no target."""
        text, met = (None, None) if target is None else (f"at least {target:.6g}", bool(value >= target))
        return cls(name, float(value), unit, baseline, _ratio(value, baseline), text, met)

    @classmethod
    def at_least_ratio(cls, name: str, value: float, unit: str, baseline: float, target: float | None) -> Row:
        """Met when the value is at least `target` times smaller than the baseline; None is no target."""
        text, met = None, None
        if target is not None:
            text, met = f"at most 1/{target:g} of the baseline", bool(value * target <= baseline)
        return cls(name, float(value), unit, baseline, _ratio(value, baseline), text, met)

    @classmethod
    def near(cls, name: str, value: float, unit: str, target: float, relative: float) -> Row:
        """Met when value is within `relative` of the target, which is also the baseline."""
        text, met = f"{target:.6g} ±{relative:.3g} of it", bool(abs(value - target) <= relative * abs(target))
        return cls(name, float(value), unit, target, _ratio(value, target), text, met)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--json FILE`; its value, a Path or None, goes to `write_rows`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, as a list of objects")


def write_rows(path: Path | None, rows: Sequence[Row]) -> None:
    """Write the rows as JSON; nothing if path is None. Raises ValueError for a figure that is not finite."""
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n")


def print_rows(rows: Sequence[Row]) -> None:
    """A table of the rows, one line each."""
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:8.4f} x"
        met = {True: "met", False: "MISSED", None: ""}[row.met]
        print(f"{row.name:{width}s} {row.value:12.6g} {row.unit:6s} {ratio:10s} {row.target or '':28s} {met}".rstrip())


def _ratio(value: float, baseline: float | None) -> float | None:
    return float(value) / baseline if baseline else None
