"""Shapes of the replies that a router gives by itself; those of one model's process are in `turboserve.api`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from turboserve.api.kv_reply_models import KVStatistics, Reply, SessionList
from turboserve.api.model_routes import ModelObject

ModelStatus = Literal["loaded", "loading", "unloaded", "failed"]
NeedBytes = Annotated[int, Field(description="What its process takes: estimated from its files, then measured.")]


class FleetModelObject(ModelObject):
    """One of several models, loaded or not."""

    status: ModelStatus
    aliases: Annotated[list[str], Field(description="Further names that requests may give.")]
    pinned: bool
    memory_bytes: NeedBytes
    error: Annotated[str | None, Field(description="Why it failed.")]


class FleetModelList(Reply):
    """All configured models."""

    object: Literal["list"] = "list"
    data: list[FleetModelObject]


class FleetReadiness(Reply):
    """Requests are taken; the models they name are loaded when they are asked for."""

    status: Literal["ready"] = "ready"
    models: dict[str, ModelStatus]


class ModelStatistics(Reply):
    """KV memory of one model; null while it is not loaded."""

    model: str
    status: ModelStatus
    statistics: KVStatistics | None


class FleetStatistics(Reply):
    """KV memory of all models, each in a process of its own."""

    object: Literal["kv.stats.list"] = "kv.stats.list"
    memory_bytes: Annotated[int, Field(description="What all processes take.")]
    memory_budget_bytes: int
    data: list[ModelStatistics]


class FleetSessionList(SessionList):
    """Sessions of all loaded models, or of the one that the query names."""
