"""float32 products of mlx on a Linux CPU, with OpenBLAS interposed and with the wheel's own BLAS.

    python bench/blas.py [--json FILE]

Each side runs in a process of its own, because the choice is made before MLX is imported. Shapes: a square
product, the embedded model's prefill chunk and decode step, a decode step's output layer. One run, best of some
repetitions; ratios matter, the milliseconds belong to the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

# (rows, inner, columns, repetitions); the first is the one whose target the design names (22 times measured once).
SHAPES = ((2048, 2048, 256, 3), (256, 512, 1024, 10), (8, 512, 1024, 30), (1, 512, 1024, 100), (1, 512, 8192, 50))
TARGET_RATIO = 5.0  # for the square product; below it the shim is not at work or the machine is busy

CHILD = """
import json, sys, time
from turboquant_kv import blas
status = blas.interpose()
import mlx.core as mx
mx.set_default_device(mx.cpu)
best = []
for m, k, n, repetitions in json.loads(sys.argv[1]):
    a, b = mx.random.normal((m, k)), mx.random.normal((n, k))
    mx.eval(a, b)
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        mx.eval(a @ b.T)
        seconds.append(time.perf_counter() - start)
    best.append(1e3 * min(seconds))
print(json.dumps({"text": status.describe(), "active": status.active, "ms": best}))
"""


def measure(switch: str) -> dict[str, object]:
    """Best milliseconds per shape in a fresh process with TURBOSERVE_BLAS=`switch`."""
    output = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(SHAPES)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TURBOSERVE_BLAS": switch},
    ).stdout
    answer: dict[str, object] = json.loads(output)
    return answer


def rows(own: list[float], fast: list[float]) -> list[dict[str, object]]:
    """One row per shape: value with OpenBLAS, baseline without, and how many times faster."""
    table: list[dict[str, object]] = []
    for index, ((m, k, n, _), before, after) in enumerate(zip(SHAPES, own, fast, strict=True)):
        target = TARGET_RATIO if index == 0 else None
        ratio = before / after
        table.append(
            {
                "name": f"sgemm {m}x{k} @ {k}x{n}",
                "value": round(after, 4),
                "unit": "ms",
                "baseline": round(before, 4),
                "ratio": round(ratio, 2),
                "target": target,
                "met": None if target is None else ratio >= target,
            }
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    options = parser.parse_args()
    own, fast = measure("off"), measure("auto")
    if not fast["active"]:
        sys.stderr.write(f"nothing to compare: BLAS is {fast['text']}\n")
        return 1
    assert isinstance(own["ms"], list) and isinstance(fast["ms"], list)
    table = rows(own["ms"], fast["ms"])
    sys.stdout.write(f"{fast['text']}\n\n{'product':<32}{'own ms':>10}{'OpenBLAS':>10}{'times':>8}\n")
    for row in table:
        sys.stdout.write(f"{row['name']:<32}{row['baseline']:>10.3f}{row['value']:>10.3f}{row['ratio']:>8.1f}\n")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
