"""LoRA adapters of a served model: read from their folders, put into its layers, found by their names.

Two formats are read: mlx-lm's (adapters.safetensors, adapter_config.json) and PEFT's (adapter_model.safetensors). Every
way to fail is one StartupError line that names the adapter and the cure.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_unflatten

from turboserve.engine.adapter_layers import EMBEDDINGS, RowAdapters, adapted_layer
from turboserve.errors import ModelNotFoundError, StartupError
from turboserve.settings import named_adapter
from turboserve.weight_sizes import MLX_ADAPTER, PEFT_ADAPTER, adapter_file

nn: Any = mlx.nn  # whose stubs say too little

QUANTISED: Any = (nn.QuantizedLinear, nn.QuantizedEmbedding)
CONFIG_FILE = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
# Of PEFT's configuration: what changes the arithmetic beyond rank and scale.
PEFT_UNSUPPORTED = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "use_dora",
    "fan_in_fan_out",
    "trainable_token_indices",
)

Matrices = Mapping[str, tuple[mx.array, mx.array]]
"""By the layer's path in the model: A (in, r) and B (r, out)."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One loaded adapter. `fingerprint`: of its files; caches with the same one, and no others, are its own."""

    name: str
    index: int
    fingerprint: str
    rank: int  # the largest of any layer
    num_matrices: int  # of the model, that it changes


@dataclass(frozen=True, slots=True)
class Adapters:
    """All adapters of a loaded model, by all their names. Without any, nothing is ever applied."""

    by_name: Mapping[str, Adapter] = field(default_factory=dict)
    rows: RowAdapters | None = None

    def __iter__(self) -> Iterator[Adapter]:
        """Each once, whatever the number of its names."""
        return iter({adapter.index: adapter for adapter in self.by_name.values()}.values())

    def get(self, name: str) -> Adapter | None:
        """The one of that name; None for "". Raises ModelNotFoundError."""
        if not name:
            return None
        if name not in self.by_name:
            raise ModelNotFoundError(f"There is no adapter {name[:100]!r} here.", param="model")
        return self.by_name[name]

    def applied(self, adapters: Sequence[Adapter | None]) -> AbstractContextManager[None]:
        """While this is entered, a forward pass applies them, one for each row of the batch."""
        if self.rows is None:
            return nullcontext()
        return self.rows.applied([None if adapter is None else adapter.index for adapter in adapters])


NO_ADAPTERS = Adapters()


class Read(NamedTuple):
    """An adapter as its files have it."""

    scale: float
    matrices: Matrices
    fingerprint: str


def install(model: Any, specs: Sequence[str], activation_dtype: str) -> Adapters:
    """Put all adapters (`NAME=PATH` or `PATH`) into the model's layers, and try them. Raises StartupError.

    Names of one folder are names of one adapter. Matrices get the type in which they are multiplied.
    """
    if not specs:
        return NO_ADAPTERS
    by_name: dict[str, Adapter] = {}
    by_folder: dict[Path, Adapter] = {}
    read: list[Read] = []
    for name, named in map(named_adapter, specs):
        folder = named.expanduser().resolve()
        if folder not in by_folder:
            one = _read(name, folder, model)
            ranks = [a.shape[1] for a, _ in one.matrices.values()]
            by_folder[folder] = Adapter(name, len(read), one.fingerprint, max(ranks), len(ranks))
            read.append(one)
        by_name[name] = by_folder[folder]
    rows = RowAdapters([one.scale for one in read])
    dtype: mx.Dtype = getattr(mx, activation_dtype)
    layers = dict(model.named_modules())
    adapted = []
    for path in dict.fromkeys(path for one in read for path in one.matrices):
        parts = {i: _cast(one.matrices[path], dtype) for i, one in enumerate(read) if path in one.matrices}
        adapted.append((path, adapted_layer(layers[path], parts, rows, len(read))))
    model.update_modules(tree_unflatten(adapted))
    adapters = Adapters(by_name, rows)
    _try_out(model, adapters)
    return adapters


def described(adapters: Adapters) -> str:
    """For the terminal and the statistics: `law (rank 8, 56 matrices), code (rank 16, 8 matrices)`."""
    return ", ".join(f"{one.name} (rank {one.rank}, {one.num_matrices} matrices)" for one in adapters)


def _cast(matrices: tuple[mx.array, mx.array], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """What mlx would make of them in every product with activations of this type, made once."""
    a, b = matrices
    inner = mx.result_type(a, mx.array(0, dtype))
    return a.astype(inner), b.astype(mx.result_type(b, mx.array(0, inner)))


def _try_out(model: Any, adapters: Adapters) -> None:
    """Two rows, one of them with an adapter, for each: a model that mixes rows or reads weights itself fails here."""
    for adapter in adapters:
        try:
            with adapters.applied([adapter, None]):
                mx.eval(model(mx.array([[0, 0], [0, 0]])))
        except Exception as exc:
            raise _refusal(adapter.name, f"this model's layers cannot be adapted ({_one_line(exc)})") from exc


# --- files


def _read(name: str, folder: Path, model: Any) -> Read:
    """Raises StartupError."""
    if not folder.is_dir():
        raise _refusal(name, f"there is no folder {folder}")
    config = _config(name, folder)
    file = adapter_file(folder)
    if file is None:
        raise _refusal(name, f"{folder} holds neither {MLX_ADAPTER} nor {PEFT_ADAPTER}")
    try:
        tensors: Any = mx.load(str(file))
        mx.eval(tensors)
    except (OSError, RuntimeError, ValueError) as exc:
        raise _refusal(name, f"{file} cannot be read ({_one_line(exc)}): fetch it again") from exc
    is_peft = file.name == PEFT_ADAPTER or "peft_type" in config
    scale = _peft_scale(name, config) if is_peft else _mlx_scale(name, config)
    paths = dict(model.named_modules())
    matrices = _matrices(name, _peft_names(name, tensors, paths) if is_peft else tensors, paths)
    digest = hashlib.sha256()
    for part in (folder / CONFIG_FILE, file):
        with part.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return Read(scale, matrices, digest.hexdigest()[:32])


def _config(name: str, folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise _refusal(name, f"{folder} holds no {CONFIG_FILE}") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise _refusal(name, f"{path} cannot be read ({_one_line(exc)}): fetch it again") from exc
    if not isinstance(config, dict):
        raise _refusal(name, f"{path} is no JSON object: fetch it again")
    return config


def _mlx_scale(name: str, config: dict[str, Any]) -> float:
    """Of mlx-lm's configuration. Raises StartupError for what is no LoRA."""
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise _refusal(name, "it is a full fine-tune, not an adapter: fuse it with `mlx_lm.fuse` and serve the result")
    if kind != "lora":
        raise _refusal(name, f"its fine_tune_type is {kind!r}, and only lora is supported: fuse it with `mlx_lm.fuse`")
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    return _finite(name, "lora_parameters.scale", scale)


def _peft_scale(name: str, config: dict[str, Any]) -> float:
    """Of PEFT's configuration. Raises StartupError for what is no plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _refusal(name, f"its peft_type is {kind!r}, and only LORA is supported")
    for key in PEFT_UNSUPPORTED:
        if config.get(key):
            raise _refusal(name, f"it sets {key}, which is not supported: merge it into the model instead")
    if config.get("bias", "none") != "none":
        raise _refusal(name, "it changes biases, which is not supported: merge it into the model instead")
    rank, alpha = _finite(name, "r", config.get("r")), _finite(name, "lora_alpha", config.get("lora_alpha"))
    if rank <= 0:
        raise _refusal(name, f"{CONFIG_FILE} has r = {rank:g}: fetch it again")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _finite(name: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refusal(name, f"{CONFIG_FILE} has no number {key}: is it an adapter of mlx-lm or PEFT?")
    return float(value)


def _peft_names(name: str, tensors: Mapping[str, mx.array], layers: Mapping[str, Any]) -> dict[str, mx.array]:
    """PEFT's tensors under mlx-lm's names, and turned as mlx-lm has them."""
    found: dict[str, mx.array] = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.removeprefix(PEFT_PREFIX).replace(".default.", ".").rpartition(".lora_")
        names = {"A.weight": "lora_a", "B.weight": "lora_b"}
        if leaf not in names or tensor.ndim != 2:
            raise _refusal(name, f"its tensor {key[:100]!r} is none of a LoRA of linear layers")
        if path not in layers:  # where mlx-lm wraps the language model of a multimodal one
            path = f"language_model.{path}"
        found[f"{path}.{names[leaf]}"] = tensor.T
    return found


def _matrices(
    name: str, tensors: Mapping[str, mx.array], layers: Mapping[str, Any]
) -> dict[str, tuple[mx.array, mx.array]]:
    """The two matrices of each layer, checked against the model's. Raises StartupError."""
    pairs: dict[str, dict[str, mx.array]] = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        if leaf == "m":
            raise _refusal(name, "it is a DoRA, and only LoRA is supported: fuse it with `mlx_lm.fuse`")
        if leaf not in ("lora_a", "lora_b"):
            raise _refusal(name, f"its tensor {key[:100]!r} is none of a LoRA")
        if path not in layers:
            raise _refusal(name, f"this model has no layer {path[:100]!r}: is it an adapter of another model?")
        pairs.setdefault(path, {})[leaf] = tensor
    if not pairs:
        raise _refusal(name, "its file holds no tensors: fetch it again")
    return {path: _checked(name, path, pair, layers[path]) for path, pair in pairs.items()}


def _checked(name: str, path: str, pair: Mapping[str, mx.array], layer: Any) -> tuple[mx.array, mx.array]:
    if len(pair) < 2:
        raise _refusal(name, f"it has one matrix of two for {path}: fetch it again")
    a, b = pair["lora_a"], pair["lora_b"]
    num_in, num_out = _sizes(name, path, layer)
    if a.ndim != 2 or b.ndim != 2 or not a.shape[1] or (a.shape[0], *b.shape) != (num_in, a.shape[1], num_out):
        raise _refusal(
            name,
            f"{path} takes matrices of {num_in} × r and r × {num_out}, and these are of {_size(a)} and {_size(b)}: "
            "is it an adapter of another model?",
        )
    if not all(mx.issubdtype(matrix.dtype, mx.floating) for matrix in (a, b)):
        raise _refusal(name, f"its numbers for {path} are no floating-point numbers: fetch it again")
    if not (mx.isfinite(a).all() & mx.isfinite(b).all()).item():
        raise _refusal(name, f"its numbers for {path} are not finite: its training diverged")
    return a, b


def _sizes(name: str, path: str, layer: Any) -> tuple[int, int]:
    """Input and output length of a layer. Raises StartupError for one that cannot be adapted row by row."""
    is_known: bool = isinstance(layer, (nn.Linear, *QUANTISED, *EMBEDDINGS))
    if not is_known:
        kind = type(layer).__name__
        what = "experts of a mixture" if "Switch" in kind else f"{kind} layers"
        raise _refusal(name, f"it changes {path}, and adapters of {what} are not supported: fuse it with `mlx_lm.fuse`")
    first, second = layer.weight.shape
    is_packed, is_table = isinstance(layer, QUANTISED), isinstance(layer, EMBEDDINGS)
    if is_packed:
        second = second * 32 // layer.bits
    return (first, second) if is_table else (second, first)


def _size(matrix: mx.array) -> str:
    return " × ".join(map(str, matrix.shape))


def _refusal(name: str, reason: str) -> StartupError:
    return StartupError(f"The adapter {name} cannot be used: {reason}.")


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:200].rstrip(".") or type(exc).__name__
