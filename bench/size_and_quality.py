"""The README's chart: how much smaller formats make the cache, and what that costs, on two real models.

    python bench/size_and_quality.py --write    # draw docs/size-and-quality.svg

The figures are those of docs/quality.md, which `bench/quality_real.py` measured; a test holds the drawing to the page.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, DRAWING = DOCS / "quality.md", DOCS / "size-and-quality.svg"
MODELS = (("SmolLM2-135M", "SmolLM2 (", "#00796b"), ("Qwen2.5-Coder-0.5B", "Qwen2.5-Coder (", "#ef6c00"))
OTHERS = "r44"  # 4 bits as other implementations store them
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 60, 130, 34, 44
RATIOS, KLS = (3.0, 8.0), (0.001, 3.0)


class Point(NamedTuple):
    """A format on a model: times smaller than float16 with heads of 64 dimensions, mean KL divergence in nats."""

    name: str
    ratio: float
    kl: float


def points(page: str, beginning: str) -> list[Point]:
    """The table behind the paragraph that begins so; ratios are in the first table alone."""
    ratios = {
        name: float(ratio) for name, ratio in re.findall(r"^\| `?(\w+)`?[^|]* \| ([\d.]+) / [\d.]+ \|", page, re.M)
    }
    table = page[page.index(f"\n{beginning}") :].partition("\n\n|")[2].partition("\n\n")[0]
    kls = re.findall(r"^\| `?(\w+)`?[^|]*\|(?: [\d.]+ / [\d.]+ \|)? \**([\d.]+)\** \(", table, re.M)
    return [Point(name, ratios[name], float(kl)) for name, kl in kls]


def place(point: Point) -> tuple[float, float]:
    across = (point.ratio - RATIOS[0]) / (RATIOS[1] - RATIOS[0])
    up = math.log(point.kl / KLS[0]) / math.log(KLS[1] / KLS[0])
    return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def frame() -> list[str]:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="16">KL divergence from the uncompressed model, in nats: lower is better</text>',
    ]
    for kl in (0.001, 0.01, 0.1, 1.0):
        y = place(Point("", RATIOS[0], kl))[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{kl:g}</text>')
    for ratio in range(int(RATIOS[0]), int(RATIOS[1]) + 1):
        x = place(Point("", ratio, KLS[0]))[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{ratio}x</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">'
        "cache smaller than float16, 16K tokens: further right is better</text>"
    )
    return parts


def drawing(page: str) -> str:
    """The chart of these tables, as SVG."""
    parts = frame()
    for model, beginning, colour in MODELS:
        *ours, other = points(page, beginning)
        places = [place(point) for point in ours]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{line}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
        x, y = places[-1]
        parts.append(f'<text x="{x + 10:.1f}" y="{y + 4:.1f}" fill="{colour}">{model}</text>')
        if model == MODELS[0][0]:
            parts += [
                f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle">{point.name}</text>'
                for point, (x, y) in zip(ours, places, strict=True)
            ]
        x, y = place(other)
        cross = f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"
        parts.append(f'<path d="{cross}" stroke="{colour}" stroke-width="2.5" fill="none"/>')
        parts.append(f'<text x="{x + 12:.1f}" y="{y + 4:.1f}" fill="{colour}">4 bits as others store them</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the README's chart.")
    parser.add_argument("--write", action="store_true", help="into docs/ instead of to stdout")
    image = drawing(PAGE.read_text("utf-8"))
    if parser.parse_args().write:
        DRAWING.write_text(image, "utf-8")
    else:
        sys.stdout.write(image)


if __name__ == "__main__":
    main()
