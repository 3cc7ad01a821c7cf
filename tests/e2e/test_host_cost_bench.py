"""bench/host_cost.py measures a real server: every figure is there, and is what its thread spent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_figure_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    flags = ["--streams", "2", "--answer-tokens", "40", "--rounds", "1", "--against", str(ROOT), "--json", str(out)]
    path = os.pathsep.join(str(ROOT / part) for part in ("kernels", "server", "."))
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "host_cost.py"), *flags],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [row["name"].removeprefix("2 streams: ") for row in rows] == [
        "event loop, per token",
        "event loop, per chunk",
        "delivery, per token",
        "scheduling, per step",
        "all tokens/s",
    ]
    assert all(row["value"] > 0 and row["baseline"] > 0 for row in rows)
    per_token, per_chunk = (row["value"] for row in rows[:2])
    assert per_chunk >= per_token * 0.999, "no token comes in several chunks"
