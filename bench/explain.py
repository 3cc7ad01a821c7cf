"""Draws docs/rotation.svg: what rotation does to a key with outlying coordinates, and where 4-bit centroids then lie.

    python bench/explain.py           # the drawing, on standard output
    python bench/explain.py --write   # into docs/

Made-up keys (a few coordinates ten times as large, as models have them, and always the same ones), the library's own
rotation and centroids.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turboquant_kv.codec.codebook import centroids, thresholds
from turboquant_kv.codec.rotation import rotate

Floats = NDArray[Any]  # float64

DRAWING = Path(__file__).resolve().parents[1] / "docs" / "rotation.svg"
DIM, NUM_KEYS, BITS, EDGE = 128, 4096, 4, 4.0
WIDTH, HEIGHT, LEFT, TOP, PLOT_HEIGHT = 640, 210, 24, 36, 130


def keys(rng: np.random.Generator) -> Floats:
    """(NUM_KEYS, DIM): normal, but for four coordinates."""
    scales = np.ones(DIM)
    scales[rng.choice(DIM, 4, replace=False)] = 10.0
    return rng.normal(size=(NUM_KEYS, DIM)) * scales


def unit(vectors: Floats) -> Floats:
    """Each divided by the root of its mean square, as the codec does."""
    scaled: Floats = vectors / np.sqrt(np.mean(vectors**2, axis=1, keepdims=True))
    return scaled


def histogram(values: Floats, left: float, title: str) -> list[str]:
    counts, _ = np.histogram(values, bins=64, range=(-EDGE, EDGE), density=True)
    width = WIDTH / 2 - 2 * LEFT
    bar = width / len(counts)
    parts = [f'<text x="{left:.0f}" y="16">{title}</text>']
    for at, height in enumerate(np.minimum(counts / 0.9, 1.0) * PLOT_HEIGHT):
        box = f'x="{left + at * bar:.1f}" y="{TOP + PLOT_HEIGHT - height:.1f}" width="{bar:.1f}" height="{height:.1f}"'
        parts.append(f'<rect {box} fill="#00796b"/>')
    for value in centroids(BITS):
        x = left + (value + EDGE) / (2 * EDGE) * width
        ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + PLOT_HEIGHT}" y2="{TOP + PLOT_HEIGHT + 12}"'
        parts.append(f'<line {ends} stroke="#ef6c00"/>')
    return parts


def drawing() -> str:
    raw = keys(np.random.default_rng(2504))
    rotated = rotate(raw, 0, "k")
    error = [float(np.mean((unit(x) - nearest(unit(x))) ** 2)) for x in (raw, rotated)]
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    note = "Orange: the 16 centroids. Mean squared error"
    return "\n".join(
        [
            head,
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            *histogram(unit(raw).ravel(), LEFT, "Coordinates of keys as they are"),
            *histogram(unit(rotated).ravel(), WIDTH / 2 + LEFT, "the same keys, rotated"),
            f'<text x="{LEFT}" y="{HEIGHT - 8}">{note} {error[0]:.3f}</text>',
            f'<text x="{WIDTH // 2 + LEFT}" y="{HEIGHT - 8}">{error[1]:.4f}</text>',
            "</svg>",
            "",
        ]
    )


def nearest(values: Floats) -> Floats:
    return centroids(BITS).astype(np.float64)[np.searchsorted(thresholds(BITS), values)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what rotation does.")
    parser.add_argument("--write", action="store_true", help="into docs/")
    if parser.parse_args().write:
        DRAWING.write_text(drawing(), "utf-8")
    else:
        sys.stdout.write(drawing())


if __name__ == "__main__":
    main()
