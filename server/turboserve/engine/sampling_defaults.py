"""How a model's own makers sample from it: what its generation_config.json says, for requests that say nothing.

`"do_sample": false` makes the default greedy, as in the library that the file is written for. Only where it is written
out: it is the library's default as well, but a file that names a temperature and no `do_sample` means its temperature.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from turboserve.messages import SamplingParams

log = logging.getLogger(__name__)

FILE = "generation_config.json"

# What a request may say, and so what may stand in for it.
IS_VALID: Mapping[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0 <= value <= 2,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: value >= -1 and value == int(value),
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: 0.01 <= value <= 10,
}


def read_sampling_defaults(folder: Path) -> SamplingParams:
    """Of the model in this folder; OpenAI's where it says nothing. A value that no request could have is left out."""
    try:
        config = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return SamplingParams()
    except (OSError, ValueError) as exc:
        log.warning("%s is not used, for it cannot be read: %s", FILE, exc)
        return SamplingParams()
    if not isinstance(config, dict):
        log.warning("%s is not used, for it is no JSON object", FILE)
        return SamplingParams()
    return _defaults(config)


def _defaults(config: Mapping[str, Any]) -> SamplingParams:
    given: dict[str, Any] = {}
    for name, is_valid in IS_VALID.items():
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_valid(value):
            log.warning("%s: %s = %r is not used", FILE, name, value)
            continue
        given[name] = max(int(value), 0) if name == "top_k" else float(value)
    defaults = SamplingParams(**given)
    if config.get("do_sample") is False:
        return SamplingParams(temperature=0.0, repetition_penalty=defaults.repetition_penalty)
    return defaults


def described(defaults: SamplingParams) -> str:
    """For people: `temperature 0.7, top_p 0.8`; what is as OpenAI has it is left out."""
    usual = asdict(SamplingParams())
    said = [
        f"{name} {value:g}" for name, value in asdict(defaults).items() if name in IS_VALID and value != usual[name]
    ]
    return ", ".join(said) or "temperature 1"


def chosen_defaults(choice: str, folder: Path) -> SamplingParams:
    """`choice`: the setting `sampling_defaults`."""
    return read_sampling_defaults(folder) if choice == "model" else SamplingParams()
