"""What a model's process takes: estimated from its files before it has ever run, measured once it does.

Reads sizes only; what follows from them is `budget.py`'s.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from turboserve import models
from turboserve.weight_sizes import adapters_bytes, model_bytes

MiB = 1 << 20

# Python, MLX, tokenizer and the activations of one prefill chunk of a small model; measuring corrects it.
PROCESS_BYTES = 512 * MiB
EMBEDDED_DIR = Path(models.__file__).parent / "tiny" / "model"


def weights_bytes(model: str, adapters: Sequence[str] = ()) -> int:
    """Bytes of the model's weights and its adapters' on disk; 0 where nothing is here yet, as before a download."""
    folder = _local_folder(model)
    return (model_bytes(folder) if folder else 0) + adapters_bytes(adapters)


def _local_folder(model: str) -> Path | None:
    if not model:
        return EMBEDDED_DIR
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else _downloaded(model)


def _downloaded(name: str) -> Path | None:
    from huggingface_hub import snapshot_download  # late: costs a third of a second that local models need not pay

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # whatever its reason: not here, and the model's own process will say why
        return None


def resident_bytes(pid: int) -> int:
    """Memory that a process holds now; 0 when it is gone or the platform does not tell."""
    try:
        if sys.platform == "linux":
            fields = Path(f"/proc/{pid}/status").read_text().splitlines()
            return next((int(line.split()[1]) * 1024 for line in fields if line.startswith("VmRSS:")), 0)
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, timeout=5)
        return int(shown.stdout) * 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0
