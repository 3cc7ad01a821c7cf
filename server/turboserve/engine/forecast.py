"""What will fit, told before anything heavy is loaded: read off a model's configuration and the sizes of its files.

Close for models whose layers all attend to everything, an upper bound of bytes where some see a window. What computes
otherwise (latent attention, recurrent states) has no forecast of tokens; memory_plan.py has figures once it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from turboquant_kv.codec.format import KVFormat, stored_dim
from turboquant_kv.codec.format_name import PLAIN_FORMAT, PRESETS, UnsupportedFormatError
from turboserve.engine.model_config import RECURRENT
from turboserve.engine.weight_files import Shapes
from turboserve.engine.weights import config_value
from turboserve.errors import StartupError
from turboserve.machine_memory import MemoryInfo, resolve_budget
from turboserve.settings import AUTO_FORMAT

MIN_TOKENS = 256  # of one conversation; with less not even a short question has room for its answer
ROOMY = 4  # conversations of full length; where fewer fit, a smaller format is suggested
_HALF = 2  # bytes of a number in float16 and bfloat16


@dataclass(frozen=True, slots=True)
class Geometry:
    """Of the attention layers, as the configuration has it."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def token_bytes(self, fmt: KVFormat | None, number_bytes: int) -> int:
        """Bytes of one more token of a long conversation. `fmt`: None for uncompressed."""
        if fmt is None:
            return 2 * self.num_layers * self.num_kv_heads * self.head_dim * number_bytes
        dim = stored_dim(self.head_dim)
        fmt.check_dims(dim, dim)
        return self.num_layers * fmt.token_bytes(self.num_kv_heads, dim, dim)

    def conversation_bytes(self, fmt: KVFormat | None, number_bytes: int, num_tokens: int) -> int:
        """Bytes of one conversation: full pages, and exact rows at its ends. Raises UnsupportedFormatError."""
        raw_bytes = self.token_bytes(None, number_bytes)
        if fmt is None:
            return num_tokens * raw_bytes
        dim = stored_dim(self.head_dim)
        fmt.check_dims(dim, dim)
        pages = self.num_layers * fmt.num_pages(num_tokens) * fmt.page_bytes(self.num_kv_heads, dim, dim)
        return pages + min(fmt.exact_rows(num_tokens), num_tokens) * raw_bytes

    def tokens(self, fmt: KVFormat | None, number_bytes: int, budget_bytes: int) -> int:
        """Tokens of one conversation that a budget holds. Raises UnsupportedFormatError."""
        exact = 0 if fmt is None else fmt.sink_tokens + fmt.page_tokens
        raw_bytes, own_bytes = self.token_bytes(None, number_bytes), self.token_bytes(fmt, number_bytes)
        if budget_bytes <= exact * raw_bytes:
            return budget_bytes // raw_bytes
        return exact + (budget_bytes - exact * raw_bytes) // own_bytes


def geometry(config: Mapping[str, Any]) -> Geometry | None:
    """None where the configuration does not say it in the usual words."""

    def value(*names: str) -> int | None:
        found = next((v for name in names if (v := config_value(dict(config), name)) is not None), None)
        return found if isinstance(found, int) and found > 0 else None

    is_recurrent = any(word in str(config.get("model_type")).lower() for word in RECURRENT)
    differs_by_layer = isinstance(config_value(dict(config), "num_key_value_heads"), list)
    if is_recurrent or differs_by_layer or config_value(dict(config), "kv_lora_rank") is not None:
        return None
    layers, heads = value("num_hidden_layers", "n_layer", "num_layers"), value("num_attention_heads", "n_head")
    kv_heads, hidden = value("num_key_value_heads") or heads, value("hidden_size", "n_embd")
    dim = value("head_dim") or (hidden // heads if hidden and heads else None)
    kinds = config_value(dict(config), "layer_types")
    if isinstance(kinds, list) and layers:  # layers of linear attention keep no keys
        layers = min(layers, sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds))
    return Geometry(layers, kv_heads, dim) if layers and kv_heads and dim else None


def expanded_bytes(config: Mapping[str, Any], shapes: Shapes) -> int:
    """Bytes of the weights as float32, from their files' headers."""
    bits = (config.get("quantization") or {}).get("bits")
    total = 0
    for name, shape in shapes.items():
        stem, _, kind = name.rpartition(".")
        is_packed = bool(bits) and f"{stem}.scales" in shapes
        if is_packed and kind in ("scales", "biases"):
            continue
        total += math.prod(shape) * (32 // int(bits or 32) if is_packed and kind == "weight" else 1) * 4
    return total


@dataclass(frozen=True, slots=True)
class Forecast:
    """weights_bytes: in memory, `number_bytes` for each number of caches. budget: as `kv_budget` asks for it."""

    weights_bytes: int
    number_bytes: int
    budget_bytes: int
    memory: MemoryInfo
    layers: Geometry | None
    kv_format: str
    max_context: int

    def check(self) -> None:
        """Raises StartupError when not even a short conversation would fit."""
        tokens = self._tokens(self.kv_format)
        if tokens is not None and tokens < MIN_TOKENS:
            raise StartupError(too_small(self.budget_bytes, tokens, self._needed_bytes(), self.kv_format))

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        total, available = (round(n / (1 << 20)) for n in (self.memory.total_bytes, self.memory.available_bytes))
        dtype = "float32" if self.number_bytes > _HALF else "16-bit caches"
        yield (
            f"will fit     weights of about {self.weights_bytes >> 20:,} MiB ({dtype}), KV caches of "
            f"{self.budget_bytes >> 20:,} MiB; {available:,} of {total:,} MiB are free"
        )
        if (over := self.weights_bytes + self.budget_bytes - self.memory.available_bytes) > 0:
            yield f"             that is {-(-over >> 20):,} MiB more than is free: lower --kv-budget, or free memory"
        tokens = self._tokens(self.kv_format)
        if tokens is None:
            return
        rest = [name for name in (PLAIN_FORMAT, *PRESETS.values()) if name != self.kv_format]
        others = ", ".join(f"{n:,} as {name}" for name in rest if (n := self._tokens(name)) is not None)
        yield f"             about {tokens:,} tokens as {self.kv_format}; {others}"
        if (better := self._smaller_preset(tokens)) and tokens < ROOMY * self.max_context:
            preset, ratio = better
            numbers = f", {self.number_bytes} bytes a number" if self.kv_format == PLAIN_FORMAT else ""
            yield f"             --kv-format {preset} holds {ratio:.1f}x the tokens of {self.kv_format}{numbers}"

    def _tokens(self, name: str) -> int | None:
        if self.layers is None:
            return None
        try:
            fmt = None if name == PLAIN_FORMAT else KVFormat.parse(name)
            return self.layers.tokens(fmt, self.number_bytes, self.budget_bytes)
        except UnsupportedFormatError:
            return None

    def _needed_bytes(self) -> int:
        """For MIN_TOKENS, of which most stay exact in any format."""
        assert self.layers is not None
        return MIN_TOKENS * self.layers.token_bytes(None, self.number_bytes)

    def _smaller_preset(self, tokens: int) -> tuple[str, float] | None:
        """The next one that holds noticeably more."""
        for preset, name in PRESETS.items():
            more = self._tokens(name)
            if more is not None and more > 1.1 * tokens:
                return preset, more / tokens
        return None


def too_small(budget_bytes: int, tokens: int, needed_bytes: int, kv_format: str) -> str:
    """Why a budget is refused, with the figures."""
    least = f"{-(-needed_bytes // (1 << 20))}MiB"
    # "2", of which gigabytes were thought, is so many bytes.
    given = f"{budget_bytes / (1 << 20):,.1f} MiB" if budget_bytes >= 1 << 20 else f"{budget_bytes:,} bytes"
    return (
        f"A KV budget of {given} holds {tokens} tokens of this model as {kv_format}, "
        f"and {MIN_TOKENS} are the least that a chat needs: set --kv-budget to {least} or more."
    )


def forecast(
    config: Mapping[str, Any],
    weights_bytes: int,
    computes_float32: bool,
    memory: MemoryInfo,
    kv_budget: str,
    kv_format: str,
    max_context: int,
) -> Forecast:
    """weights_bytes: as they will be held. computes_float32: whatever they are stored as.

    Raises StartupError, with the figures, when the weights leave nothing for caches.
    """
    is_float32 = computes_float32 or str(config_value(dict(config), "torch_dtype")) == "float32"
    name = PRESETS["balanced"] if kv_format == AUTO_FORMAT else kv_format
    return Forecast(
        weights_bytes=weights_bytes,
        number_bytes=4 if is_float32 else _HALF,
        budget_bytes=resolve_budget(kv_budget, memory, weights_bytes),
        memory=memory,
        layers=geometry(config),
        kv_format=name,
        max_context=max_context,
    )
