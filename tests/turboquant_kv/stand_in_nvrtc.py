"""The run-time compiler's calls on machines without CUDA: nvrtc.c, whose code says what it was asked to compile."""

from __future__ import annotations

import subprocess
from pathlib import Path

from turboquant_kv.backends.gpu.nvrtc import Nvrtc


def stand_in(folder: Path) -> Nvrtc:
    """Built in this folder."""
    library = folder / "libnvrtc.so"
    source = Path(__file__).with_name("nvrtc.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(library), str(source)], check=True)
    return Nvrtc((9, 0), library, [Path("/include"), Path("/more")])
