"""`turboserve serve`'s flags: one for every setting, which `settings.py` explains and judges."""

from __future__ import annotations

from typing import Annotated, get_type_hints

from typer import Option

from turboserve.cli import config
from turboserve.cli.options import ConfigFile, HelpAll, Model, Switch, Text

NO_SETTINGS = ("config_file", "help_all")
USUAL = (
    *("model", "config_file", "host", "port", "api_key", "allow_anonymous", "served_model_name", "adapters"),
    *(
        "max_context_tokens",
        "distributed",
        "kv_format",
        "kv_budget",
        "kv_store_dir",
        "speculate",
        "draft_model",
        "max_running",
    ),
    *("max_queued", "cache_dir", "log_level", "log_json"),
)


def serve_command(
    model: Model = None,
    config_file: ConfigFile = None,
    host: Annotated[Text, Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[Text, Option(help="Port; 0 picks a free one [8000].")] = None,
    api_key: Annotated[Text, Option(help="Key that clients must send; better set TURBOSERVE_API_KEY.")] = None,
    api_keys: Annotated[
        list[str] | None, Option("--further-api-key", help="Key of a further caller; repeatable; better in a file.")
    ] = None,
    allow_anonymous: Annotated[Switch, Option(help="Listen beyond this machine without a key.")] = None,
    allowed_hosts: Annotated[
        list[str] | None, Option("--allowed-host", help="Further Host header; repeatable.")
    ] = None,
    cors_allowed_origins: Annotated[
        list[str] | None, Option("--cors-allowed-origin", help="Web page that may call the API; repeatable; *: any.")
    ] = None,
    any_model_name: Annotated[Switch, Option(help="Answer whatever model a request names.")] = None,
    distributed: Annotated[
        Switch, Option(help="Serve a part of the model as one of the ranks that mlx.launch starts.")
    ] = None,
    served_model_name: Annotated[Text, Option(help="Name under which clients ask for the model.")] = None,
    adapters: Annotated[
        list[str] | None,
        Option("--adapter", help="LoRA adapter that requests choose as MODEL:NAME; repeatable.", metavar="[NAME=]PATH"),
    ] = None,
    max_context_tokens: Annotated[
        Text, Option("--max-model-len", "--max-context-tokens", help="Longest prompt plus answer [model's own].")
    ] = None,
    kv_format: Annotated[
        Text, Option(help="balanced, compact, tiny, KEY/VALUE codecs such as 4/4, f16, or auto [balanced].")
    ] = None,
    kv_auto_limit: Annotated[Text, Option(help="Mean KL in nats that --kv-format auto may cost [0.01].")] = None,
    kv_budget: Annotated[Text, Option(help="Bytes (2GiB), share of memory (30%) or auto [auto].")] = None,
    allow_requantise: Annotated[
        Switch, Option(help="Under pressure, compress idle conversations further before dropping them.")
    ] = None,
    session_ttl_s: Annotated[
        Text, Option(help="Seconds until an unused session is forgotten; 0: never [86400].")
    ] = None,
    max_sessions_per_caller: Annotated[Text, Option(help="Explicit sessions of one key; 0: no limit [1000].")] = None,
    max_session_bytes_per_caller: Annotated[
        Text, Option(help="KV bytes of one key's sessions; 0: no limit [0].")
    ] = None,
    max_responses_per_caller: Annotated[
        Text, Option(help="Responses of /v1/responses stored for one key; 0: none [1000].")
    ] = None,
    max_response_bytes_per_caller: Annotated[Text, Option(help="Their bytes in memory [64MiB].")] = None,
    response_ttl_s: Annotated[Text, Option(help="Seconds until they are forgotten; 0: never [86400].")] = None,
    kv_store_dir: Annotated[Text, Option(help="Folder in which conversations survive a restart [off].")] = None,
    kv_store_shared: Annotated[Switch, Option(help="Other servers of the same model use that folder too.")] = None,
    kv_store_bytes: Annotated[Text, Option(help="Size of that folder [4GiB].")] = None,
    kv_store_write_rate: Annotated[Text, Option(help="Bytes per second written to it [64MiB].")] = None,
    prefill_chunk_tokens: Annotated[
        Text,
        Option(help="Prompt tokens per step; 0: 2048 on a GPU (8192 with 48 GiB of its own), 256 on a CPU [0]."),
    ] = None,
    max_inter_token_ms: Annotated[
        Text, Option(help="Milliseconds that running streams wait for a step's prompt tokens; 0: any time [500].")
    ] = None,
    overlap: Annotated[
        Text, Option(help="Enqueue a step before the last one's tokens are read: auto, on or off [auto].")
    ] = None,
    projections: Annotated[
        Text, Option(help="Layers arranged for decode steps, on a CPU computed by its kernels: auto, on or off [auto].")
    ] = None,
    keep_graphs: Annotated[
        Text, Option(help="Run a decode step's graph again, not build it anew: auto, on or off [auto].")
    ] = None,
    compile_processes: Annotated[
        Text, Option(help="Processes, at most, that compile a GPU's kernels while weights are read; 0: none [8].")
    ] = None,
    speculate: Annotated[
        Text, Option(help="Guess tokens ahead: draft (by --draft-model), lookup (in prompt and answer), off or auto.")
    ] = None,
    draft_model: Annotated[Text, Option(help="Folder or hub name of a smaller model with the same vocabulary.")] = None,
    num_draft_tokens: Annotated[Text, Option(help="Tokens guessed for a request in a step, at most 7 [7].")] = None,
    default_max_tokens: Annotated[
        Text, Option(help="Tokens of an answer where none are asked; 0: up to the context [4096].")
    ] = None,
    sampling_defaults: Annotated[
        Text, Option(help="Sampling where a request says nothing: model (generation_config.json) or openai [model].")
    ] = None,
    max_running: Annotated[Text, Option(help="Requests decoded together [32].")] = None,
    max_queued: Annotated[Text, Option(help="Requests waiting before 503 [256].")] = None,
    grammar_timeout_s: Annotated[Text, Option(help="Seconds a constraint may take to compile [0.7].")] = None,
    prompt_timeout_s: Annotated[Text, Option(help="Seconds that making a prompt may take [10].")] = None,
    stuck_step_s: Annotated[Text, Option(help="Seconds of one step after which /ready says 503 [120].")] = None,
    max_body_bytes: Annotated[Text, Option(help="Largest request body [8388608].")] = None,
    max_import_bytes: Annotated[Text, Option(help="Largest exported session that is taken in [4GiB].")] = None,
    max_held_bytes: Annotated[Text, Option(help="Memory for all bodies under way before 503 [512MiB].")] = None,
    max_connections: Annotated[Text, Option(help="Connections at once; 0: what open files allow [0].")] = None,
    strict_parameters: Annotated[Switch, Option(help="Refuse parameters that would be ignored.")] = None,
    template_kwargs: Annotated[
        list[str] | None,
        Option("--template-kwarg", help="Name that requests may give chat templates; repeatable; replaces the usual."),
    ] = None,
    request_timeout_s: Annotated[Text, Option(help="Seconds for headers and body to arrive [30].")] = None,
    keepalive_interval_s: Annotated[Text, Option(help="Seconds between signs of life on a quiet stream [10].")] = None,
    stream_interval_ms: Annotated[
        Text, Option(help="Milliseconds between a stream's pieces while over 8 run; 0: every token [20].")
    ] = None,
    send_timeout_s: Annotated[Text, Option(help="Seconds until a stalled reader is cut off [30].")] = None,
    shutdown_grace_s: Annotated[Text, Option(help="Seconds to finish requests on SIGTERM [10].")] = None,
    models_memory: Annotated[
        Text, Option(help="What all models' processes may take: bytes (24GiB) or share of memory [80%].")
    ] = None,
    idle_unload_s: Annotated[
        Text, Option(help="Seconds until an unused one of several models is unloaded [0].")
    ] = None,
    model_start_timeout_s: Annotated[Text, Option(help="Seconds that loading a model may take [600].")] = None,
    model_wait_timeout_s: Annotated[Text, Option(help="Seconds that a request waits for its model [300].")] = None,
    dequantize: Annotated[
        Text, Option(help="Expand quantised weights to float32 on a CPU: auto, always, never.")
    ] = None,
    cache_dir: Annotated[Text, Option(help="Where calibrations are kept [~/.cache/turboserve].")] = None,
    log_level: Annotated[Text, Option(help="debug, info, warning, error or critical [info].")] = None,
    log_json: Annotated[Switch, Option(help="Log JSON lines.")] = None,
    log_prompts: Annotated[Switch, Option(help="Log what the model reads of each request, as text.")] = None,
    help_all: HelpAll = False,
) -> None:
    """Serve MODEL over HTTP. These are the usual options; --help-all shows every one."""
    flags = {key: value for key, value in locals().items() if key not in NO_SETTINGS}
    settings = config.resolve(flags, config_file)
    if settings.distributed:
        from turboserve.cli.distributed import run as run_rank

        return run_rank(settings)
    if settings.models:
        from turboserve.fleet.serve import run as run_fleet  # a process for each model; this one needs no MLX

        return run_fleet(settings)
    from turboserve.cli.serve import run  # late: brings in the HTTP stack, and MLX by and by

    run(settings)


def help_of(key: str) -> str:
    """What a setting means, as its flag's help has it."""
    option = get_type_hints(serve_command, include_extras=True)[key].__metadata__[0]
    return str(option.help)
