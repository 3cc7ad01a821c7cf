"""Model folders with random weights of a known model's shape, for measuring where real weights cannot be had.

    PYTHONPATH=. python bench/_random_folders.py smollm2 FOLDER --tokenizer A_FOLDER_WITH_A_TOKENIZER

Speed does not depend on what weights say. Tokenizer files are copied, so answers are text, of no meaning.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn import quantize  # type: ignore[attr-defined]
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

GROUP = 64
# Contexts are longer than the models' own: prompts of 16K tokens are measured on both.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "vocab_size": 49152,
        "max_position_embeddings": 1 << 15,
        "tie_word_embeddings": True,
    },
    "qwen32b": {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "intermediate_size": 27648,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": 152064,
        "max_position_embeddings": 1 << 17,
        "tie_word_embeddings": False,
        "quantization": {"group_size": GROUP, "bits": 4},
    },
}
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "added_tokens*",
)


def random_model(config: dict[str, Any]) -> Any:
    """A model of this configuration, float16, or 4-bit with bfloat16 where it says so.

    Weights have the usual size, and nothing larger than the result is ever in memory.
    """
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    quantization = config.get("quantization")
    if quantization:
        quantize(model, **quantization)
    dtype = mx.bfloat16 if quantization else mx.float16
    flat: Any = tree_flatten(model.parameters())
    model.update(tree_unflatten([(name, _drawn(name, old, dtype)) for name, old in flat]))
    mx.eval(model.parameters())
    return model


def _drawn(name: str, old: mx.array, dtype: mx.Dtype) -> mx.array:
    if old.dtype == mx.uint32:
        octets = mx.random.randint(0, 256, (*old.shape[:-1], 4 * old.shape[-1]), mx.uint8)
        words: mx.array = octets.view(mx.uint32)
        return words
    if name.endswith(("scales", "biases")):
        step = 1 / (4.6 * (old.shape[-1] * GROUP) ** 0.5)  # uniform codes of 4 bits have a deviation of 4.6
        return mx.full(old.shape, step if name.endswith("scales") else -7.5 * step, dtype)
    if old.ndim < 2:
        return mx.ones(old.shape, dtype) if "norm" in name else mx.zeros(old.shape, dtype)
    drawn: mx.array = (mx.random.normal(old.shape) / old.shape[-1] ** 0.5).astype(dtype)
    return drawn


def make_folder(shape: str, folder: Path, tokenizer: Path, **changes: Any) -> None:
    """Write a model that mlx-lm loads. `changes` are to the configuration; end tokens are the tokenizer's folder's."""
    config = {**SHAPES[shape], **changes}
    known = json.loads((tokenizer / "config.json").read_text())
    config |= {key: known[key] for key in ("bos_token_id", "eos_token_id") if key in known}
    folder.mkdir(parents=True, exist_ok=True)
    weights: Any = dict(tree_flatten(random_model(config).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for pattern in TOKENIZER_FILES:
        for file in tokenizer.glob(pattern):
            shutil.copy(file, folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    args = parser.parse_args()
    make_folder(args.shape, args.folder, args.tokenizer)


if __name__ == "__main__":
    main()
