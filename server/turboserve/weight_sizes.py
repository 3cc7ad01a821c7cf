"""What weights take on disk, of a model and of its adapters, for whoever plans memory before they are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from turboserve.settings import named_adapter

MODEL_FILES = "model*.safetensors"
MLX_ADAPTER, PEFT_ADAPTER = "adapters.safetensors", "adapter_model.safetensors"


def model_bytes(folder: Path) -> int:
    """Bytes of a model's weight files; 0 where there are none."""
    return sum(path.stat().st_size for path in folder.glob(MODEL_FILES))


def adapter_file(folder: Path) -> Path | None:
    """The file that an adapter is read from, mlx-lm's before PEFT's; None: there is neither."""
    return next((folder / name for name in (MLX_ADAPTER, PEFT_ADAPTER) if (folder / name).is_file()), None)


def adapters_bytes(specs: Iterable[str]) -> int:
    """Bytes of adapters' weights, those of a folder with several names once; 0 for what is not there."""
    folders = {named_adapter(spec).path.expanduser().resolve() for spec in specs}
    return sum(file.stat().st_size for folder in folders if (file := adapter_file(folder)))
