"""What is configured: each model's names, limits, its process's settings and what that is expected to take.

Made once at start from `Settings.models`; nothing here runs or changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from turboserve.api.model_names import AdapterNames, adapted, adapter_names
from turboserve.errors import InvalidRequestError, ModelNotFoundError
from turboserve.fleet.footprint import PROCESS_BYTES, weights_bytes
from turboserve.machine_memory import MIN_BUDGET_BYTES, MemoryInfo, resolve_budget
from turboserve.settings import ModelEntry, Settings

ENV_PREFIX = "TURBOSERVE_"
MIN_KV_SHARE = 0.10  # of all models' memory, for a model whose weights alone take more than an equal share
# Of a model's table, what is the router's business; the rest are settings of the model's process.
ROUTERS_OWN = frozenset({"aliases", "pinned", "memory", "idle_unload_s"})


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One configured model."""

    name: str
    aliases: tuple[str, ...]
    adapters: AdapterNames
    is_pinned: bool
    idle_unload_s: float  # 0: never
    settings: Settings  # of its process
    weights_bytes: int
    kv_bytes: int
    fixed_bytes: int  # what the operator says that the process takes; 0: it is estimated and measured

    @property
    def estimate_bytes(self) -> int:
        """What the process is expected to take before it has been measured."""
        return self.fixed_bytes or self.weights_bytes + self.kv_bytes + PROCESS_BYTES


class Catalogue:
    """All configured models, by all their names."""

    def __init__(self, plans: Sequence[ModelPlan], *, any_name: bool = False) -> None:
        """`any_name`: whatever other name a request gives, the first model answers."""
        self._plans = {plan.name: plan for plan in plans}
        known = Counter(adapter for plan in plans for adapter in plan.adapters)
        # An adapter's name alone says which model is meant unless several models have one of that name.
        self._by_name = {name: plan for plan in plans for name in plan.adapters if known[name] == 1}
        self._by_name |= {name: plan for plan in plans for name in (plan.name, *plan.aliases, *_with_adapters(plan))}
        self._any_name = any_name

    def __iter__(self) -> Iterator[ModelPlan]:
        return iter(self._plans.values())

    def find(self, name: object) -> ModelPlan:
        """The model of this name. Raises ModelNotFoundError, or InvalidRequestError where no name was given."""
        if isinstance(name, str) and name in self._by_name:
            return self._by_name[name]
        if self._any_name or (not name and len(self._plans) == 1):
            return next(iter(self._plans.values()))
        served = ", ".join(self._plans)
        if not (isinstance(name, str) and name):
            raise InvalidRequestError(f"model: name one of {served}.", param="model")
        raise ModelNotFoundError(f"The model {name[:100]!r} is not served here; use one of {served}.", param="model")


def _with_adapters(plan: ModelPlan) -> Iterator[str]:
    return (adapted(name, adapter) for name in (plan.name, *plan.aliases) for adapter in plan.adapters)


def make_catalogue(settings: Settings, memory: MemoryInfo) -> tuple[Catalogue, int]:
    """The models of `settings`, and the bytes that their processes may take together. Raises StartupError."""
    budget_bytes = resolve_budget(settings.models_memory, memory, weights_bytes=0)
    plans = [_plan(name, entry, settings, memory, budget_bytes) for name, entry in settings.models.items()]
    return Catalogue(plans, any_name=settings.any_model_name), budget_bytes


def _plan(name: str, entry: ModelEntry, base: Settings, memory: MemoryInfo, budget_bytes: int) -> ModelPlan:
    num_weight_bytes = weights_bytes(entry.model, entry.adapters)
    draft_model = base.draft_model if entry.draft_model is None else entry.draft_model
    num_weight_bytes += weights_bytes(draft_model) if draft_model else 0
    kv_text = entry.kv_budget or base.kv_budget
    if kv_text.strip().lower() == "auto":  # a process by itself would take all that is free
        kv_bytes = _kv_share(num_weight_bytes, budget_bytes, len(base.models))
    else:
        kv_bytes = resolve_budget(kv_text, memory, num_weight_bytes)
    return ModelPlan(
        name=name,
        aliases=entry.aliases,
        adapters=adapter_names(entry.adapters),
        is_pinned=entry.pinned,
        idle_unload_s=base.idle_unload_s if entry.idle_unload_s is None else entry.idle_unload_s,
        settings=_process_settings(name, entry, base, kv_bytes),
        weights_bytes=num_weight_bytes,
        kv_bytes=kv_bytes,
        fixed_bytes=entry.memory,
    )


def _kv_share(num_weight_bytes: int, budget_bytes: int, num_models: int) -> int:
    """An equal share of all models' memory, less the model's own weights: then all of them fit together."""
    share = budget_bytes // num_models - num_weight_bytes - PROCESS_BYTES
    return max(share, int(budget_bytes * MIN_KV_SHARE), MIN_BUDGET_BYTES)


def _process_settings(name: str, entry: ModelEntry, base: Settings, kv_bytes: int) -> Settings:
    own = {key: value for key, value in entry.model_dump(exclude=set(ROUTERS_OWN)).items() if value is not None}
    store = base.kv_store_dir and base.kv_store_dir / _folder_name(name)
    return base.model_copy(
        update={
            **own,
            "served_model_name": name,
            "any_model_name": True,  # aliases are the router's
            "kv_budget": str(kv_bytes),
            "kv_store_dir": store,
            "host": "127.0.0.1",
            "port": 0,
            "api_key": "",
            "api_keys": (),
            "allow_anonymous": False,
            "allowed_hosts": (),
            "cors_allowed_origins": (),
            "models": {},
        }
    )


def _folder_name(name: str) -> str:
    """The model's folder in the session store; names that differ get folders that differ."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def environment(settings: Settings) -> dict[str, str]:
    """The variables that give another process exactly these settings."""
    return {ENV_PREFIX + key.upper(): _as_text(value) for key, value in settings.model_dump(mode="json").items()}


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
