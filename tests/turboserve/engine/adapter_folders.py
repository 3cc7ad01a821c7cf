"""Folders with random LoRA adapters as mlx-lm's own training writes them, and models that mlx-lm puts them into."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

Make = Callable[[], Any]
STRENGTH = 0.1  # of both matrices' numbers: answers differ from the model's own at once


def write_adapter(
    folder: Path,
    make_model: Make,
    rng: np.random.Generator,
    *,
    rank: int = 8,
    num_layers: int = 99,
    scale: float = 2.0,
    keys: Sequence[str] | None = None,
    dtype: mx.Dtype = mx.float32,
) -> Path:
    """A folder in mlx-lm's format. keys: of the layers it changes; None: all that mlx-lm would."""
    model = make_model()
    model.freeze()
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0} | ({"keys": list(keys)} if keys else {})
    linear_to_lora_layers(model, num_layers, parameters)
    shapes: Any = tree_flatten(model.trainable_parameters())
    tensors = {
        name: mx.array(STRENGTH * rng.standard_normal(array.shape).astype(np.float32)).astype(dtype)
        for name, array in shapes
    }
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def mlx_lm_with(folder: Path, make_model: Make) -> Any:
    """The same model with one adapter, as `mlx_lm.load(adapter_path=...)` has it."""
    model = load_adapters(make_model(), str(folder))
    model.eval()
    return model
