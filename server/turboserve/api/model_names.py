"""Names by which requests choose what answers: the served model, or one of its adapters.

An adapter is asked for by its name, by MODEL:NAME, or by another name of the same folder in either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from turboserve.errors import ModelNotFoundError
from turboserve.settings import named_adapter

AdapterNames = Mapping[str, str]
"""Each name of an adapter, and the one that it was given first."""

NO_ADAPTERS: AdapterNames = MappingProxyType({})


def adapter_names(specs: Iterable[str]) -> AdapterNames:
    """Of the setting `adapters`; names of one folder are names of one adapter."""
    first: dict[Path, str] = {}
    named = map(named_adapter, specs)
    return {one.name: first.setdefault(one.path.expanduser().resolve(), one.name) for one in named}


def adapter_named(name: str | None, model_id: str | None, adapters: AdapterNames = NO_ADAPTERS) -> str:
    """The adapter that a request's `model` stands for; "": the model alone, as where there is no name.

    model_id: the only model that a request may name; None: any name will do. Raises ModelNotFoundError.
    """
    if not name or name == model_id:
        return ""
    if name in adapters:
        return adapters[name]
    model, _, last = name.rpartition(":")
    if last in adapters and model_id in (None, model):
        return adapters[last]
    if model_id is None:
        return ""
    also = f" or one of {', '.join(adapted(model_id, one) for one in dict.fromkeys(adapters.values()))}"
    raise ModelNotFoundError(
        f"The model {name[:100]!r} is not served here; use {model_id!r}{also if adapters else ''}.", param="model"
    )


def adapted(model_id: str, adapter: str) -> str:
    """The name that lists and replies have for a model with an adapter, or alone."""
    return f"{model_id}:{adapter}" if adapter else model_id
