"""Shared by the tests of compiling ahead: a small model in a folder, as mlx-lm reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2

from turboserve.engine.model_folder import EMBEDDED_DIR

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 8192,  # of the tokenizer
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 8185,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with five layers and the embedded model's tokenizer."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    model = qwen2.Model(qwen2.ModelArgs.from_dict(CONFIG))
    flat: Any = tree_flatten(model.parameters())
    mx.save_safetensors(str(path / "model.safetensors"), dict(flat), {"format": "mlx"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_DIR / name, path / name)
    return path
