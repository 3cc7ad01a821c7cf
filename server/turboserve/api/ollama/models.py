"""The shapes of Ollama's replies. Lines of a stream are built as plain dicts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from turboserve.api.kv_reply_models import Reply

DoneReason = Literal["stop", "length", "load"]
Nanoseconds = Annotated[int, Field(description="Nanoseconds.")]


class OllamaError(Reply):
    """Every error, whatever its status."""

    error: str


class WantedFunction(Reply):
    """Which function the caller shall call, and with what."""

    index: int
    name: str
    arguments: dict[str, Any]


class WantedCall(Reply):
    """A call that the model wants made."""

    id: str
    function: WantedFunction


class OllamaMessage(Reply):
    """A piece of the answer, or all of it."""

    model_config = ConfigDict(json_schema_extra={"required": ["role", "content"]})

    role: Literal["assistant"] = "assistant"
    content: str
    thinking: str | None = None
    tool_calls: list[WantedCall] | None = None


class Ending(Reply):
    """What the last line has beside the others; a reply in one piece is a last line."""

    model_config = ConfigDict(json_schema_extra={"required": ["model", "created_at", "done"]})

    model: str
    created_at: str
    done: bool
    done_reason: DoneReason | None = None
    total_duration: Nanoseconds | None = None
    load_duration: Nanoseconds | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: Nanoseconds | None = None
    eval_count: int | None = None
    eval_duration: Nanoseconds | None = None


class OllamaChat(Ending):
    """A line of `/api/chat`."""

    model_config = ConfigDict(json_schema_extra={"required": ["model", "created_at", "message", "done"]})

    message: OllamaMessage


class OllamaGeneration(Ending):
    """A line of `/api/generate`."""

    model_config = ConfigDict(json_schema_extra={"required": ["model", "created_at", "response", "done"]})

    response: str
    thinking: str | None = None


class ModelDetails(Reply):
    """What kind of model it is; empty where we do not know in Ollama's terms."""

    parent_model: str = ""
    format: Literal["mlx"] = "mlx"
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""
    quantization_level: str


class Tag(Reply):
    """A served model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails


class Tags(Reply):
    """The served model, alone and with each adapter."""

    models: list[Tag]


class LoadedTag(Reply):
    """A model in memory; it stays."""

    name: str
    model: str
    size: int
    digest: str
    details: ModelDetails
    expires_at: str
    size_vram: int
    context_length: int


class LoadedTags(Reply):
    """The model in memory, alone and with each adapter."""

    models: list[LoadedTag]


class Shown(Reply):
    """A model as clients look it up before they use it."""

    modelfile: str
    parameters: str
    template: str
    license: str
    details: ModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(Reply):
    """The version of Ollama whose API this is."""

    version: str
