"""A model's config.json, read and checked before anything heavy is loaded.

Owns the question whether its values can mean a model at all: types, signs, sizes. Some values that cannot would end the
process in native code, others the engine thread with a traceback. What the weights say is weight_files.py's business,
and whether mlx-lm makes a model of it mlx_lm_loading.py's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from turboserve.errors import StartupError

GENERATION_CONFIG = "generation_config.json"
MOST_BYTES = 64 << 20  # of a JSON file that describes a model; weights are not among them
MOST_DEPTH = 64  # of objects and lists in each other; real ones have about five
LARGEST_NUMBER = 1 << 62

# Names that architectures have for the same size, and how large it can be.
SIZES: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "hidden_dim", "n_embd", "d_model"), 1 << 20),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 1 << 12),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 1 << 16),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "head_dim"), 1 << 16),
    **dict.fromkeys(("intermediate_size", "n_inner"), 1 << 24),
    "vocab_size": 1 << 26,
}
NUMBERS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rope_theta")
OBJECTS = ("quantization", "quantization_config", "rope_scaling", "text_config")
# Zero says that there are none: of attention in recurrent models, of a dense part beside experts.
HEADS = ("num_attention_heads", "num_heads", "num_key_value_heads", "num_kv_heads")
DENSE = ("intermediate_size", "n_inner")
RECURRENT = ("mamba", "rwkv")
QUANTISATION: Mapping[str, int] = {"group_size": 1 << 16, "bits": 8}

_MODEL_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model. Raises StartupError when it cannot be used or asks to run code."""
    path = folder / "config.json"
    config = read_json_object(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise StartupError(f"{path} names no model_type: this is not a language model's folder.")
    if not _MODEL_TYPE.fullmatch(model_type):
        raise StartupError(f"{path} names a model_type that cannot be one: this is not a language model's folder.")
    if "model_file" in config:
        raise StartupError(
            f"The model in {folder} brings its own Python code (model_file), which is never run: "
            "choose a model of a type that mlx-lm supports itself."
        )
    for problem in _problems(config, model_type):
        raise StartupError(f"{path}: {problem}. Correct it, or fetch the model again.")
    if wrong_end := _eos_problem(read_generation_config(folder)):
        raise StartupError(f"{folder / GENERATION_CONFIG}: {wrong_end}. Correct it, or fetch the model again.")
    return config


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a model; empty where there is none. Raises StartupError when it cannot be read."""
    path = folder / GENERATION_CONFIG
    return read_json_object(path) if path.exists() else {}


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises StartupError for a file that holds no JSON object of the usual size and depth."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise StartupError(f"{path} is too large to describe a model: fetch the model again.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise StartupError(f"{path} is nested too deeply: fetch the model again.") from None
    except OSError as exc:
        raise StartupError(f"{path} cannot be read ({exc.strerror}): fetch the model again.") from exc
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno}, column {exc.colno}"
        raise StartupError(f"{path} cannot be read (no JSON at {where}): fetch the model again.") from exc
    except UnicodeDecodeError as exc:
        raise StartupError(f"{path} cannot be read (not UTF-8): fetch the model again.") from exc
    except ValueError as exc:  # a number of thousands of digits
        raise StartupError(f"{path} cannot be read (a number is too long): fetch the model again.") from exc
    if not isinstance(found, dict):
        raise StartupError(f"{path} holds no JSON object: fetch the model again.")
    if _depth_passes(found, MOST_DEPTH):
        raise StartupError(f"{path} is nested too deeply: fetch the model again.")
    return found


def _depth_passes(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        below = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in below if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def text_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration, and the one of a multimodal model's text part."""
    yield config
    text = config.get("text_config")
    if isinstance(text, dict):
        yield text


def _problems(config: Mapping[str, Any], model_type: str) -> Iterator[str]:
    """What is wrong with it, in words; the first is enough."""
    for name in OBJECTS:
        if not isinstance(config.get(name, {}), dict | None):
            yield f"{name} is no JSON object"
    is_recurrent = any(word in model_type.lower() for word in RECURRENT)
    for part in text_parts(config):
        for name, most in SIZES.items():
            may_be_none = name in DENSE or (name in HEADS and is_recurrent) or isinstance(part.get(name), list)
            least = 0 if may_be_none else 1
            for value in _each(part.get(name)):
                if problem := _size_problem(value, least, most):
                    yield f"{name} is {problem}"
        for name in NUMBERS:
            for value in _each(part.get(name)):
                if problem := _number_problem(value):
                    yield f"{name} is {problem}"
        limit = part.get("max_position_embeddings")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit > LARGEST_NUMBER):
            yield f"max_position_embeddings is {_shown(limit)}, not a whole number"
        if problem := _eos_problem(part):
            yield problem
    yield from _quantisation_problems(config.get("quantization") or {})


def _each(value: Any) -> list[Any]:
    """Some architectures have one number for each layer."""
    return value if isinstance(value, list) and value else [value]


def _size_problem(value: Any, least: int, most: int) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        return f"{_shown(value)}, not a whole number"
    if not least <= value <= most:
        return f"{_shown(value)}; it must be between {least} and {most:,}"
    return None


def _number_problem(value: Any) -> str | None:
    if value is None or isinstance(value, dict):  # transformers' way to write infinity
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{_shown(value)}, not a number"
    return None if math.isfinite(value) and abs(value) < LARGEST_NUMBER else f"{_shown(value)}, not a usable number"


def _eos_problem(config: Mapping[str, Any]) -> str | None:
    for value in _each(config.get("eos_token_id")):
        if value is None or value == []:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= LARGEST_NUMBER:
            return f"eos_token_id is {_shown(value)}, not a token's number"
    return None


def _quantisation_problems(quantisation: Mapping[str, Any]) -> Iterator[str]:
    """MLX's own; other packages' are as many as their methods."""
    for name, most in QUANTISATION.items():
        value = quantisation.get(name)
        if quantisation and value is None:
            yield f"quantization names no {name}"
        elif problem := _size_problem(value, 1, most):
            yield f"{name} of quantization is {problem}"


def _shown(value: Any) -> str:
    """A value as the file has it, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
