"""Server settings: command-line flag > TURBOSERVE_* environment > TOML file > default.

Parsed once at start-up; every complaint names the key, the value and what was expected.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from turboquant_kv.codec.format_name import FORMAT_NAMES, PRESETS, UnsupportedFormatError, parse_format_name
from turboserve.units import try_parse_bytes

MiB = 1 << 20
GiB = 1 << 30

MIN_CHUNK_TOKENS = 16

# What models' own chat templates ask about reasoning. None of it is text that a template would write into the prompt.
DEFAULT_TEMPLATE_KWARGS = (
    "enable_thinking",
    "thinking",
    "thinking_budget",
    "reasoning_effort",
    "preserve_thinking",
    "clear_thinking",
)


def _byte_count(value: object) -> object:
    if not isinstance(value, str):
        return value
    num_bytes = try_parse_bytes(value)
    if num_bytes is None:
        raise ValueError('a number of bytes such as "512MiB" or "2GB"')
    return num_bytes


AUTO_FORMAT = "auto"  # measured when the model is loaded


def _kv_format(value: str) -> str:
    if value.strip().lower() == AUTO_FORMAT:
        return AUTO_FORMAT
    try:
        return parse_format_name(value)
    except UnsupportedFormatError as exc:
        raise ValueError(f"{FORMAT_NAMES}, or auto") from exc


def _chunk_tokens(value: int) -> int:
    if 0 < value < MIN_CHUNK_TOKENS:
        raise ValueError(f"0 for what suits the device, or at least {MIN_CHUNK_TOKENS}")
    return value


def _origin(value: str) -> str:
    """The spelling that browsers send: lower case, no path."""
    origin = value.strip().lower().removesuffix("/")
    if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
        raise ValueError('origins such as "https://chat.example" or "http://localhost:3000", or "*"')
    return origin


Origin = Annotated[str, AfterValidator(_origin)]

# TOML knows no null and a variable cannot be absent and present: empty text means "none".
OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]
ByteCount = Annotated[int, BeforeValidator(_byte_count)]
KVFormat = Annotated[str, AfterValidator(_kv_format)]
ChunkTokens = Annotated[int, Field(ge=0, le=16384), AfterValidator(_chunk_tokens)]
NumRunning = Annotated[int, Field(ge=1, le=1024)]
NumQueued = Annotated[int, Field(ge=0, le=100_000)]
NotNegative = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Overlap = Literal["auto", "on", "off"]
Projections = Literal["auto", "on", "off"]
KeepGraphs = Literal["auto", "on", "off"]
Speculate = Literal["auto", "off", "lookup", "draft"]
NumDraftTokens = Annotated[int, Field(ge=1, le=7)]
SamplingDefaults = Literal["model", "openai"]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$")]

ADAPTER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # a colon would end a model's name before it


class NamedAdapter(NamedTuple):
    """An adapter's folder, and a name under which requests ask for it."""

    name: str
    path: Path


def named_adapter(spec: str) -> NamedAdapter:
    """From `NAME=PATH`, or from `PATH`, whose folder's own name counts. Raises ValueError."""
    name, separator, path = spec.partition("=")
    if not separator or "/" in name:  # the path itself has the sign
        name, path = Path(spec).name, spec
    if not (path.strip() and re.fullmatch(ADAPTER_NAME, name)):
        raise ValueError("NAME=PATH, the name of letters, digits and ._- only")
    return NamedAdapter(name, Path(path))


def _adapters(specs: tuple[str, ...]) -> tuple[str, ...]:
    names = [named_adapter(spec).name for spec in specs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"a name for each folder, and {twice} names two")
    return specs


AdapterSpecs = Annotated[tuple[str, ...], AfterValidator(_adapters)]


class ModelEntry(BaseModel):
    """One of several models: a table `[models.NAME]` of the settings' file. None: as set for the whole server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = ""  # folder or hub name; empty: the embedded demonstration model
    aliases: tuple[ModelName, ...] = ()  # further names under which clients ask for it
    adapters: AdapterSpecs = ()  # of this model: NAME=PATH
    pinned: bool = False  # loaded at start, and never unloaded
    memory: Annotated[ByteCount, Field(ge=0)] = 0  # what its process takes in all; 0: estimated, then measured
    idle_unload_s: Seconds | None = None
    kv_format: KVFormat | None = None
    kv_budget: str | None = None
    allow_requantise: bool | None = None
    session_ttl_s: Seconds | None = None
    max_context_tokens: NotNegative | None = None
    default_max_tokens: NotNegative | None = None
    sampling_defaults: SamplingDefaults | None = None
    template_kwargs: tuple[str, ...] | None = None
    prefill_chunk_tokens: ChunkTokens | None = None
    overlap: Overlap | None = None
    projections: Projections | None = None
    keep_graphs: KeepGraphs | None = None
    speculate: Speculate | None = None
    draft_model: str | None = None
    num_draft_tokens: NumDraftTokens | None = None
    max_running: NumRunning | None = None
    max_queued: NumQueued | None = None
    dequantize: str | None = None


class Settings(BaseSettings):
    """All that an operator can set. `config/default.toml` lists the same keys with their defaults."""

    model_config = SettingsConfigDict(env_prefix="TURBOSERVE_", extra="forbid", frozen=True)

    model: str = ""  # folder or hub name; empty: the embedded demonstration model
    served_model_name: str = ""  # empty: derived from `model`
    # LoRA adapters that requests choose as MODEL:NAME, each NAME=PATH, or PATH named like its folder
    adapters: AdapterSpecs = ()
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: str = ""  # empty: no key is asked for (loopback only, unless allow_anonymous)
    api_keys: tuple[
        Annotated[str, Field(min_length=1)], ...
    ] = ()  # further keys; each is a caller of its own, whose conversations no other reaches
    allow_anonymous: bool = False  # serve without a key on a non-loopback address
    allowed_hosts: tuple[str, ...] = ()  # further Host headers to accept; loopback names always are
    # web pages that may call the API, such as "http://localhost:3000"; "*": any. The key is asked for all the same
    cors_allowed_origins: tuple[Origin, ...] = ()
    # one rank of several that mlx.launch starts, each with a part of the model; rank 0 answers requests
    distributed: bool = False
    any_model_name: bool = False  # whatever model a request names, the served one answers

    # balanced, compact, tiny, KEY_CODEC/VALUE_CODEC, f16 for mlx-lm's uncompressed cache, or auto: the smallest that
    # costs at most kv_auto_limit on this model
    kv_format: KVFormat = PRESETS["balanced"]
    kv_auto_limit: Annotated[float, Field(gt=0)] = 0.01  # mean KL in nats that kv_format = "auto" may cost
    kv_budget: str = "auto"  # bytes ("512MiB", "2GB"), percent of memory ("30%") or auto
    allow_requantise: bool = False  # under pressure, take idle conversations one format down before dropping them
    session_ttl_s: Seconds = 86_400.0  # unused sessions are forgotten after this; 0: never
    max_sessions_per_caller: Annotated[int, Field(ge=0)] = 1000  # explicit sessions of one key; 0: no limit
    max_session_bytes_per_caller: Annotated[ByteCount, Field(ge=0)] = 0  # KV bytes of one key's sessions; 0: no limit
    max_responses_per_caller: Annotated[int, Field(ge=0)] = 1000  # stored by /v1/responses for one key; 0: none
    max_response_bytes_per_caller: Annotated[ByteCount, Field(ge=0)] = 64 * MiB  # their size in memory
    response_ttl_s: Annotated[float, Field(ge=0)] = 86_400.0  # they are forgotten after this; 0: never
    kv_store_dir: OptionalPath = None  # folder in which conversations survive a restart; none: off
    kv_store_shared: bool = False  # other servers of the same model use that folder too, on this host or on a volume
    kv_store_bytes: Annotated[ByteCount, Field(ge=MiB)] = 4 * GiB  # the store's size; the least recently used give way
    kv_store_write_rate: Annotated[ByteCount, Field(ge=MiB)] = 64 * MiB  # bytes per second written in the background
    max_context_tokens: NotNegative = 0  # 0: the model's own limit
    # prompt tokens per step, of one prompt or several; 0: 2048 on a GPU (8192 with 48 GiB of its own), 256 on a CPU
    prefill_chunk_tokens: ChunkTokens = 0
    max_inter_token_ms: Annotated[float, Field(ge=0)] = 500.0  # a step's prompt tokens take running streams so long
    overlap: Overlap = "auto"  # enqueue a step before the last one's tokens are read
    projections: Projections = "auto"  # how layers are arranged for decode steps and prompts (loading.py)
    keep_graphs: KeepGraphs = "auto"  # run a decode step's graph again instead of building it anew; tried on a GPU
    # processes, at most, that compile a GPU's kernels while weights are read, where that was not done before; 0: none
    compile_processes: Annotated[int, Field(ge=0, le=64)] = 8
    # guess tokens ahead and check them in one pass: draft (by draft_model), lookup (in prompt and answer), off, or auto
    speculate: Speculate = "auto"  # draft where there is a draft_model
    draft_model: str = ""  # folder or hub name of a smaller model with the same vocabulary
    num_draft_tokens: NumDraftTokens = 7  # guessed of a row in a step, at most
    default_max_tokens: NotNegative = 4096  # of an answer, where none is asked; 0: up to the context
    sampling_defaults: SamplingDefaults = "model"  # where a request says nothing: generation_config.json's
    max_running: NumRunning = 32
    max_queued: NumQueued = 256
    grammar_timeout_s: Annotated[float, Field(gt=0)] = 0.7  # a constraint that takes longer to compile is refused
    max_held_bytes: Annotated[ByteCount, Field(ge=64 * MiB)] = 512 * MiB  # of memory for all bodies under way; then 503
    prompt_timeout_s: Annotated[float, Field(gt=0)] = 10.0  # rendering and tokenising a prompt; beyond it is refused
    stuck_step_s: Annotated[float, Field(gt=0)] = 120.0  # a step that takes longer makes /ready say so
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 * MiB
    max_import_bytes: Annotated[ByteCount, Field(ge=MiB)] = 4 * GiB  # of a session that another server exported
    max_connections: NotNegative = 0  # at once; an idle one gives way to a new one; 0: what open files allow
    strict_parameters: bool = False  # refuse what requests say that would be ignored, and 1.0 for an integer
    template_kwargs: tuple[str, ...] = DEFAULT_TEMPLATE_KWARGS  # names of chat_template_kwargs that requests may give
    request_timeout_s: Annotated[float, Field(gt=0)] = 30.0  # headers and body must have arrived by then
    keepalive_interval_s: Annotated[float, Field(gt=0)] = 10.0  # silence on a stream before a comment line is sent
    # while more than eight answers are under way, a stream's tokens come together at most so often, beyond 32 answers
    # as much less often as there are more; 0: each by itself
    stream_interval_ms: Annotated[float, Field(ge=0, le=1000)] = 20.0
    send_timeout_s: Annotated[float, Field(gt=0)] = 30.0  # a stream whose reader stalls this long is cancelled
    shutdown_grace_s: Annotated[float, Field(ge=0)] = 10.0

    models_memory: str = "80%"  # what the processes of all models may take: bytes, or percent of memory
    idle_unload_s: Seconds = 0.0  # of several models, one that nobody asked for so long is unloaded; 0: never
    model_start_timeout_s: Annotated[float, Field(gt=0)] = (
        600.0  # a model that loads longer, downloads too, is given up
    )
    model_wait_timeout_s: Annotated[float, Field(gt=0)] = 300.0  # a request waits so long for its model to be loaded

    dequantize: str = "auto"  # auto: on a CPU, by the weights as stored; always: expand to float32; never: MLX
    cache_dir: Path = Path("~/.cache/turboserve")
    log_level: str = "info"
    log_json: bool = False
    log_prompts: bool = False  # log what the model reads of each request, as text; answers are never logged

    models: dict[ModelName, ModelEntry] = {}  # several models, each in a process of its own; none: `model` alone

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, deep_merge=True)
