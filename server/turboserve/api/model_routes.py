"""The served models, as OpenAI lists them, with what clients ask of local servers: context length and KV format."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field

from turboserve.api.context import ApiContext, Context
from turboserve.api.kv_reply_models import KVFormatName, Reply, UnixSeconds
from turboserve.api.openapi import failures
from turboserve.errors import ModelNotFoundError

ContextTokens = Annotated[int, Field(description="Most tokens of prompt and answer together; 0: not loaded yet.")]


class ModelObject(Reply):
    """A served model. vLLM and OpenRouter each have a name of their own for the context length."""

    id: str
    object: Literal["model"] = "model"
    root: Annotated[str, Field(description="Of an adapter, its own name; else the model's id.")]
    parent: Annotated[str | None, Field(description="Of an adapter, the model that it belongs to.")]
    created: UnixSeconds
    owned_by: Literal["turboserve"] = "turboserve"
    max_model_len: ContextTokens
    context_length: ContextTokens
    kv_format: KVFormatName


class ModelList(Reply):
    """The served model, alone and with each of its adapters."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


models_router = APIRouter(redirect_slashes=False)


@models_router.get("/v1/models", responses=failures())
async def models(context: Context) -> ModelList:
    """The served model, alone and with each of its adapters."""
    return ModelList(data=[_served_model(context, adapter) for adapter, _ in context.names.listed()])


# `:path`, because hub names contain a slash.
@models_router.get("/v1/models/{model_id:path}", responses=failures(ModelNotFoundError))
async def model(model_id: str, context: Context) -> ModelObject:
    """The served model, or one of its adapters, by its name."""
    return _served_model(context, context.names.adapter_of(model_id))


def _served_model(context: ApiContext, adapter: str) -> ModelObject:
    stats = context.engine.stats()
    return ModelObject(
        id=context.names.name_of(adapter),
        root=adapter or context.engine.model_id,
        parent=context.engine.model_id if adapter else None,
        created=context.engine.created,
        max_model_len=stats.max_context_tokens,
        context_length=stats.max_context_tokens,
        kv_format=stats.kv_format,
    )
