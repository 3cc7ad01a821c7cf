"""A model's weights in memory: expanding them for CPUs, counting and fingerprinting them.

Quantised, float16 and bfloat16 products are many times slower than float32 on a CPU, so there
weights are expanded to float32 when that fits. Scales are widened before they are applied, so
expanding loses nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import xxhash
from mlx.utils import tree_flatten

Module = Any  # mlx.nn.Module, whose stubs say too little

# Expanded weights may take this share of what is available; the rest is for caches and activations.
EXPANDED_SHARE = 0.6

_READ_BYTES = 1 << 22


def parameter_bytes(model: Module) -> int:
    """Bytes of all parameters as they are held now, quantised or not."""
    return sum(int(p.nbytes) for _, p in _flat(model.parameters()))


def parameters(model: Module) -> list[mx.array]:
    """All parameters of a model."""
    return [array for _, array in _flat(model.parameters())]


def expanded_bytes(model: Module, without: Sequence[Module] = ()) -> int:
    """Bytes of the weights as float32, `without` those of some modules, estimated without expanding them."""
    total, left_out = 0, {id(module) for module in without}
    for _, module in model.named_modules():
        if id(module) in left_out:
            continue
        arrays = {name: value for name, value in module.items() if isinstance(value, mx.array)}  # its own only
        packed = getattr(module, "bits", None)
        for name, array in arrays.items():
            if packed and name == "weight":
                total += array.nbytes * 8 // packed * 4
            elif not packed or name not in ("scales", "biases"):
                total += array.size * 4
    return total


def should_expand(choice: str, *, on_cpu: bool, needed_bytes: int, available_bytes: int) -> bool:
    """Whether to hold weights as float32. `choice`: auto, always or never (settings.dequantize)."""
    if choice == "always":
        return True
    return choice == "auto" and on_cpu and needed_bytes <= EXPANDED_SHARE * available_bytes


def expand(model: Module) -> Module:
    """The model with dense float32 weights; lazy, nothing is evaluated here."""
    from mlx_lm.utils import dequantize_model

    model.set_dtype(mx.float32)  # scales and biases first, so that the products below are exact
    expanded: Module = dequantize_model(model)
    return expanded


def activation_dtype(model: Module) -> str:
    """The dtype that most of the model's floating-point arrays have: that of activations and caches."""
    counts: Counter[str] = Counter()
    for _, array in _flat(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            counts[str(array.dtype).removeprefix("mlx.core.")] += 1
    return counts.most_common(1)[0][0]


def fingerprint(folder: Path, *parts: str) -> str:
    """Hash of a model's configuration and weight files, with `parts` that change what they become.

    Files go in with name and length, so that shards cannot trade places.
    """
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("model*.safetensors")]):
        digest.update(f"{path.name}:{path.stat().st_size}:{_content_hash(path)};".encode())
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of the files that turn text into tokens."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("tokenizer*"), *folder.glob("*.jinja"), *folder.glob("*.tiktoken")]):
        if path.is_file():
            digest.update(f"{path.name}:{_content_hash(path)};".encode())
    return digest.hexdigest()[:32]


def _content_hash(path: Path) -> str:
    content = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            content.update(block)
    return str(content.hexdigest())


def _flat(tree: Any) -> list[tuple[str, Any]]:
    """(dotted name, array) of every parameter."""
    flat: Any = tree_flatten(tree)
    return list(flat)


def config_value(config: dict[str, Any], key: str) -> Any:
    """A configuration value, also from the text part of a multimodal model."""
    value = config.get(key)
    return value if value is not None else (config.get("text_config") or {}).get(key)
