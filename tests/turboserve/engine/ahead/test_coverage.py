"""What a start compiles, the processes compile too: seen on a CPU, where MLX's fused operations leave libraries."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "kv_format": "4/4",
    "dequantize": "never",  # fused operations are MLX's then, as on a GPU
    "keep_graphs": "on",
    "projections": "on",
    "max_running": 8,
}
SERVER = """
import json, sys
from pathlib import Path
from turboquant_kv import blas
blas.interpose()
from turboserve.engine.engine import TurboEngine
from turboserve.engine.loading import build_parts
from turboserve.settings import Settings
own = {"model": sys.argv[1], "cache_dir": Path(sys.argv[2]), "kv_budget": "64MiB"}
engine = TurboEngine(Settings(**own, **json.loads(sys.argv[3])), build_parts, model_id="m")
engine.start()
engine.wait_until_ready()
engine.stop()
"""
PROCESSES = """
import json, sys
from pathlib import Path
from turboserve.engine.ahead.compilers import Compilers
from turboserve.engine.ahead.shares import UNITS, Job
job = Job((), json.loads(sys.argv[3]), sys.argv[1], 8192, "", (), "", None, 1, 0.0)
Compilers.start(job, [UNITS], Path(sys.argv[2]), 300.0).wait(lambda line: None)
"""


def compiled_by(script: str, folder: Path, own: Path) -> set[str]:
    """Fused operations by name: what they do, and to which types."""
    own.mkdir()
    subprocess.run(
        [sys.executable, "-c", script, str(folder), str(own / "cache"), json.dumps(SETTINGS)],
        env={**os.environ, "TMPDIR": str(own)},
        check=True,
    )
    return {re.sub(r"_(contiguous|strided(_\d+)?)$", "", path.stem) for path in own.rglob("*.so")}


def test_all_fused_operations_of_a_start_are_compiled_by_the_processes(folder: Path, tmp_path: Path) -> None:
    server = compiled_by(SERVER, folder, tmp_path / "server")
    assert server, "nothing was compiled: the test sees nothing"
    assert server <= compiled_by(PROCESSES, folder, tmp_path / "processes")
