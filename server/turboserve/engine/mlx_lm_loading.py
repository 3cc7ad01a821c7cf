"""mlx-lm's model and tokenizer for a folder. Whatever it raises becomes one StartupError line without Python's words.

The tokenizer comes first: it is light, and a folder without one would otherwise load all weights and answer nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turboserve.engine.weight_files import Shapes
from turboserve.errors import StartupError

log = logging.getLogger(__name__)

SAMPLE = "Hello, world"  # that any tokenizer has tokens for

GROUP_SIZES = (16, 32, 64, 128)  # that MLX quantises by
QUANTISED_BITS = (2, 3, 4, 5, 6, 8)

_MISSING_ARGUMENTS = re.compile(r"missing \d+ required positional arguments?: (.+)")
_OTHER_PARAMETERS = re.compile(r"(Received|Missing) (\d+) parameters")
_OTHER_SHAPE = re.compile(r"Expected shape (\([\d, ]*\)) but received shape (\([\d, ]*\)) for parameter (\S+)")


class _UnknownTypeError(Exception):
    """mlx-lm has no model of this type."""


def load_with_mlx_lm(folder: Path, model_type: str, shapes: Shapes) -> tuple[Any, Any]:
    """(model with lazy weights, TokenizerWrapper) of a folder whose config.json and weight files have been checked.

    shapes: of the weights. Raises StartupError.
    """
    get_classes = _supported_classes(shapes)
    _check_type(folder, model_type, get_classes)
    tokenizer = _load_tokenizer(folder)
    from mlx_lm.utils import load_model

    model, _ = _told(
        lambda: load_model(folder, lazy=True, trust_remote_code=False, get_model_classes=get_classes),
        f"The model in {folder} cannot be loaded",
    )
    return model, tokenizer


def _check_type(folder: Path, model_type: str, get_classes: Callable[[dict[str, Any]], Any]) -> None:
    from mlx_lm.utils import load_config

    try:
        _told(lambda: get_classes(load_config(folder)), f"The model in {folder} cannot be loaded")
    except _UnknownTypeError as exc:
        raise StartupError(
            f"Models of type {model_type} are not supported by the installed mlx-lm: "
            "choose another model, or upgrade turboserve."
        ) from exc


def _supported_classes(shapes: Shapes) -> Callable[[dict[str, Any]], Any]:
    """mlx-lm's choice of classes by configuration, with a look at the weights once the model is built."""
    from mlx_lm.utils import _get_classes

    def choose(config: dict[str, Any]) -> tuple[Callable[[Any], Any], Any]:
        try:
            model_class, args_class = _get_classes(config)
        except (ValueError, AttributeError) as exc:  # also a module of mlx-lm that is no model
            raise _UnknownTypeError from exc

        def build(args: Any) -> Any:
            model = model_class(args)
            _check_packed(model, shapes)
            return model

        return build, args_class

    return choose


def _check_packed(model: Any, shapes: Shapes) -> None:
    """That quantised weights fit the model: MLX divides by what it finds, by zero where they do not.

    Raises StartupError. Names that mlx-lm translates later are not looked at.
    """
    for path, module in model.named_modules():
        scales, packed = shapes.get(f"{path}.scales"), shapes.get(f"{path}.weight")
        weight = module.get("weight") if hasattr(module, "get") else None
        if not scales or not packed or weight is None:
            continue
        num_inputs = weight.shape[-1]
        group_size, rest = divmod(num_inputs, max(1, scales[-1]))
        bits, more_rest = divmod(packed[-1] * 32, max(1, num_inputs))
        if rest or more_rest or group_size not in GROUP_SIZES or bits not in QUANTISED_BITS:
            raise StartupError(
                f"config.json and the weights do not belong together: {path} would have {num_inputs:,} inputs, while "
                f"its weights have {packed[-1] * 32:,} bits in {scales[-1]:,} groups an output. Fetch the model again."
            )


def _load_tokenizer(folder: Path) -> Any:
    """Raises StartupError, also for one that knows no text."""
    from mlx_lm.utils import load_config, load_tokenizer

    def load() -> Any:
        eos_ids = load_config(folder).get("eos_token_id")
        tokenizer = load_tokenizer(folder, {"trust_remote_code": False}, eos_token_ids=eos_ids)
        if not isinstance(getattr(tokenizer, "chat_template", None), str | dict | list | None):
            raise TypeError("chat_template")
        return tokenizer, len(tokenizer.encode(SAMPLE, add_special_tokens=False))

    tokenizer, num_tokens = _told(load, f"The tokenizer in {folder} cannot be loaded")
    if not num_tokens:
        raise StartupError(f"The tokenizer in {folder} knows no text: fetch the model again, with all its files.")
    return tokenizer


def _told(attempt: Callable[[], Any], what: str) -> Any:
    """What it returns. Raises StartupError for whatever is raised, SystemExit included, and _UnknownTypeError."""
    try:
        return attempt()
    except (StartupError, _UnknownTypeError):
        raise
    except SystemExit as exc:
        raise StartupError(f"{what}: mlx-lm needs a Python package for it that is not installed.") from exc
    except Exception as exc:
        log.debug("%s", what, exc_info=True)
        raise StartupError(f"{what}: {in_plain_words(exc)}") from exc


def in_plain_words(exc: Exception) -> str:
    """Why a model or tokenizer cannot be loaded, and the cure."""
    text = " ".join(str(exc).split())
    cure = "fetch the model again."
    if found := _MISSING_ARGUMENTS.search(text):
        return f"config.json lacks {found[1].replace(chr(39), '')}: {cure}"
    if found := _OTHER_PARAMETERS.match(text):
        what = "weights that the model has no place for" if found[1] == "Received" else "weights are missing"
        return f"config.json and the weights do not belong together ({found[2]} {what}); {cure}"
    if found := _OTHER_SHAPE.search(text):
        name, here, there = found[3].rstrip("."), found[1], found[2]
        return f"config.json and the weights do not belong together ({name} is {there} instead of {here}); {cure}"
    if isinstance(exc, ModuleNotFoundError):
        return f"it asks for {str(exc.name).rpartition('.')[2]}, which mlx-lm does not have: {cure}"
    if isinstance(exc, OSError) and exc.strerror:
        return f"{exc.strerror}; {cure}"
    if isinstance(exc, RecursionError):
        return f"a file is nested too deeply; {cure}"
    if isinstance(exc, UnicodeDecodeError):
        return f"a file is not UTF-8; {cure}"
    if isinstance(exc, ValueError) and re.match(r"[Uu]nsupported [A-Za-z -]+", text) and len(text) < 100:
        return f"{text}."  # mlx-lm's own words
    return f"a value in its files is missing or wrong ({type(exc).__name__}); {cure}"
