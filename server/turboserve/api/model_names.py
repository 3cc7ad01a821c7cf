"""Names by which requests choose what answers: the served model, or one of its adapters.

An adapter is asked for by its name, by MODEL:NAME, or by another name of the same folder in either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from turboserve.errors import ModelNotFoundError, StartupError
from turboserve.settings import named_adapter

AdapterNames = Mapping[str, str]
"""Each name of an adapter, and the one that it was given first."""


def adapter_names(specs: Iterable[str]) -> AdapterNames:
    """Of the setting `adapters`; names of one folder are names of one adapter."""
    first: dict[Path, str] = {}
    named = map(named_adapter, specs)
    return {one.name: first.setdefault(one.path.expanduser().resolve(), one.name) for one in named}


@dataclass(frozen=True, slots=True)
class ServedNames:
    """The served model's name and its adapters'. With `takes_any_name` every other name means the model as well.

    Raises StartupError for an adapter with the model's own name, which could mean either.
    """

    model_id: str
    adapters: AdapterNames = field(default_factory=dict)
    takes_any_name: bool = False

    def __post_init__(self) -> None:
        if self.model_id in self.adapters:
            raise StartupError(
                f"{self.model_id!r} names the model and an adapter: name the adapter otherwise, as --adapter NAME=PATH."
            )

    def adapter_of(self, name: str | None) -> str:
        """The adapter that a request's `model` stands for; "": the model alone, as where there is no name.

        Raises ModelNotFoundError.
        """
        if not name or name == self.model_id:
            return ""
        if name in self.adapters:
            return self.adapters[name]
        model, _, last = name.rpartition(":")
        if last in self.adapters and (self.takes_any_name or model == self.model_id):
            return self.adapters[last]
        if self.takes_any_name:
            return ""
        also = f" or one of {', '.join(name for adapter, name in self.listed() if adapter)}" if self.adapters else ""
        raise ModelNotFoundError(
            f"The model {name[:100]!r} is not served here; use {self.model_id!r}{also}.", param="model"
        )

    def listed(self) -> list[tuple[str, str]]:
        """What lists show, as (adapter, name): the model alone, then with each adapter, once."""
        return [(adapter, self.name_of(adapter)) for adapter in ("", *dict.fromkeys(self.adapters.values()))]

    def name_of(self, adapter: str) -> str:
        """What lists and replies call the model with this adapter, or without any."""
        return adapted(self.model_id, adapter)


def adapted(model_id: str, adapter: str) -> str:
    """The name of a model with an adapter, or alone."""
    return f"{model_id}:{adapter}" if adapter else model_id
