"""The `turboserve` command: parses flags, hands over to one function per verb, turns errors into one line.

Nothing here imports MLX or the engine; `serve` does so after the BLAS is in place.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer import Argument, Option

from turboserve.cli import config, doctor, stats
from turboserve.cli.config import UsageError
from turboserve.errors import StartupError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

# Values arrive as text and are judged by Settings alone, so that a flag, a variable and a file get the same answer.
Text = str | None
Switch = bool | None
ConfigFile = Annotated[
    Path | None, Option("--config", help="TOML file with any of these settings, or a folder of such.", metavar="FILE")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from turboserve.installed import version_line  # late: looks around among what is installed

        typer.echo(version_line())
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        Option(
            "--version",
            help="Print the version and the backends.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """An OpenAI-compatible server for MLX models over compressed KV caches.

    Every setting can also come from TURBOSERVE_<NAME> in the environment or from --config FILE;
    a flag wins over the environment, the environment over the file.
    """


@app.command("serve")
def serve_command(
    model: Annotated[Text, Argument(help="Folder or hub name; none: the embedded demonstration model.")] = None,
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
    kv_store_bytes: Annotated[Text, Option(help="Size of that folder [4GiB].")] = None,
    kv_store_write_rate: Annotated[Text, Option(help="Bytes per second written to it [64MiB].")] = None,
    prefill_chunk_tokens: Annotated[
        Text, Option(help="Prompt tokens per step; 0: 2048 on a GPU, 256 on a CPU [0].")
    ] = None,
    max_inter_token_ms: Annotated[
        Text, Option(help="Milliseconds that running streams wait for a step's prompt tokens; 0: any time [500].")
    ] = None,
    overlap: Annotated[
        Text, Option(help="Enqueue a step before the last one's tokens are read: auto, on or off [auto].")
    ] = None,
    projections: Annotated[
        Text, Option(help="Join linear layers of one input, multiply small steps by rows: auto, on or off [auto].")
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
    max_held_bytes: Annotated[Text, Option(help="Memory for all bodies under way before 503 [512MiB].")] = None,
    max_connections: Annotated[Text, Option(help="Connections at once; 0: what open files allow [0].")] = None,
    strict_parameters: Annotated[Switch, Option(help="Refuse parameters that would be ignored.")] = None,
    template_kwargs: Annotated[
        list[str] | None,
        Option("--template-kwarg", help="Name that requests may give chat templates; repeatable; replaces the usual."),
    ] = None,
    request_timeout_s: Annotated[Text, Option(help="Seconds for headers and body to arrive [30].")] = None,
    keepalive_interval_s: Annotated[Text, Option(help="Seconds between signs of life on a quiet stream [10].")] = None,
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
) -> None:
    """Serve MODEL over HTTP."""
    flags = {key: value for key, value in locals().items() if key != "config_file"}
    settings = config.resolve(flags, config_file)
    if settings.models:
        from turboserve.fleet.serve import run as run_fleet  # a process for each model; this one needs no MLX

        return run_fleet(settings)
    from turboserve.cli.serve import run  # late: brings in the HTTP stack, and MLX by and by

    run(settings)


@app.command("stats")
def stats_command(
    url: Annotated[str, Option(help="Where the server answers.")] = "http://127.0.0.1:8000",
    config_file: ConfigFile = None,
    api_key: Annotated[Text, Option(help="The server's key; better set TURBOSERVE_API_KEY.")] = None,
) -> None:
    """Show what a running server's conversations cost, compressed and uncompressed."""
    settings = config.resolve({"api_key": api_key}, config_file)
    for line in stats.lines(stats.fetch(url, settings.api_key)):
        typer.echo(line)


@app.command("doctor")
def doctor_command(
    config_file: ConfigFile = None,
    cache_dir: Annotated[Text, Option(help="Folder to check [~/.cache/turboserve].")] = None,
    store: Annotated[
        Path | None, Option("--store", help="Verify this session store instead, every file of it.", metavar="DIR")
    ] = None,
) -> None:
    """Check this machine; exit status 1 when the server could not run, or a session store is damaged."""
    if store is not None:
        raise typer.Exit(doctor.report([doctor.check_store(store)]))
    settings = config.resolve({"cache_dir": cache_dir}, config_file)
    raise typer.Exit(doctor.report(doctor.run_checks(settings)))


@app.command("eval")
def eval_command(
    model: Annotated[Text, Argument(help="Folder or hub name; none: the embedded demonstration model.")] = None,
    config_file: ConfigFile = None,
    formats: Annotated[str, Option(help="KV formats, comma-separated.")] = "balanced,compact,tiny,4/4",
    rivals: Annotated[bool, Option("--rivals", help="Also what other programs store.")] = False,
    texts: Annotated[
        list[Path] | None, Option("--text", help="A text file; repeatable. None: held-out built-in texts.")
    ] = None,
    tokens: Annotated[int, Option(help="Tokens of each text.")] = 512,
    offsets: Annotated[
        str, Option(help="Positions at which the texts begin, comma-separated, such as 0,8K,32K.")
    ] = "0",
    needles: Annotated[int, Option(help="Facts to plant and ask for.")] = 0,
    greedy: Annotated[int, Option(help="Greedy answers to compare.")] = 0,
    mode: Annotated[str, Option(help="prefill, decode (token by token), or batch (texts as rows).")] = "prefill",
    json_file: Annotated[Path | None, Option("--json", help="Write all figures here.", metavar="FILE")] = None,
    plot_file: Annotated[Path | None, Option("--plot", help="Draw them here, as SVG.", metavar="FILE")] = None,
    dequantize: Annotated[
        Text, Option(help="Expand quantised weights to float32 on a CPU: auto, always, never.")
    ] = None,
    cache_dir: Annotated[Text, Option(help="Where calibrations are kept [~/.cache/turboserve].")] = None,
) -> None:
    """Compare KV formats with MODEL uncompressed: divergence, perplexity, flips, memory."""
    from turboserve.cli import eval as evaluating

    settings = config.resolve({"model": model, "dequantize": dequantize, "cache_dir": cache_dir}, config_file)
    evaluating.run(
        settings,
        evaluating.Wanted(
            formats=evaluating.parse_formats(formats),
            rivals=rivals,
            texts=tuple(texts or ()),
            tokens=tokens,
            offsets=evaluating.parse_offsets(offsets),
            needles=needles,
            greedy=greedy,
            mode=mode,
            json_file=json_file,
            plot_file=plot_file,
        ),
    )


bench_app = typer.Typer(no_args_is_help=True, help="Measure parts of the service on this machine.")
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench_root() -> None:
    """Measure parts of the service on this machine."""


@bench_app.command("kernels")
def bench_kernels_command(
    heads: Annotated[str, Option(help="Query heads / KV heads of the layer.")] = "40/8",
    dim: Annotated[int, Option(help="Head dimension.")] = 128,
    lengths: Annotated[str, Option(help="Context lengths, comma-separated.")] = "1K,4K,16K,64K",
    formats: Annotated[str, Option(help="KV formats, comma-separated.")] = "4/4,4/3,3/3",
) -> None:
    """Time attention over compressed caches beside MLX's uncompressed attention: about a minute."""
    from turboserve.cli import bench_kernels

    num_q_heads, num_kv_heads = bench_kernels.parse_heads(heads)
    bench = bench_kernels.KernelBench(
        num_q_heads, num_kv_heads, dim, bench_kernels.parse_lengths(lengths.split(",")), tuple(formats.split(","))
    )
    raise typer.Exit(bench_kernels.run(bench))


@bench_app.command("serve")
def bench_serve_command(
    url: Annotated[str, Argument(help="The server's API.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, Option(help="Model to ask for [the first of /v1/models].")] = "",
    api_key: Annotated[Text, Option(help="The server's key; better set TURBOSERVE_API_KEY.")] = None,
    streams: Annotated[int, Option(min=1, help="Clients that each wait for their answer and ask again.")] = 8,
    rate: Annotated[float | None, Option(help="Instead of streams: requests a second, arriving at random.")] = None,
    requests: Annotated[int | None, Option(min=1, help="Requests of a round [4 a stream].")] = None,
    duration: Annotated[float | None, Option(help="Seconds after which a round begins no more requests.")] = None,
    prompt_tokens: Annotated[str, Option(help="Tokens of a prompt, or a range such as 1000-16000.")] = "300",
    answer_tokens: Annotated[str, Option(help="Most tokens of an answer, or a range.")] = "128",
    shared_prefix: Annotated[int, Option(min=0, help="Tokens that all prompts begin with.")] = 0,
    temperature: Annotated[float, Option(help="Sampling temperature.")] = 1.0,
    top_p: Annotated[float | None, Option(help="Sampling top_p [not sent].")] = None,
    ignore_eos: Annotated[
        str, Option(help="Keep answers from ending early: ids of end tokens (a logit_bias), or the model's folder.")
    ] = "",
    seed: Annotated[int | None, Option(help="Of prompts, lengths and arrivals [a new one].")] = None,
    warmup: Annotated[
        int | None, Option(min=0, help="Requests before anything is measured [as many as streams].")
    ] = None,
    timeout: Annotated[float, Option(help="Seconds for one answer.")] = 900.0,
    json_file: Annotated[Path | None, Option("--json", help="Write everything there.", metavar="FILE")] = None,
    plot_file: Annotated[Path | None, Option("--plot", help="Draw it there.", metavar="FILE.svg")] = None,
    against: Annotated[str, Option(help="A second server, asked in turn with the first.", metavar="URL")] = "",
    against_model: Annotated[str, Option(help="Its model [the first of its /v1/models].")] = "",
    against_api_key: Annotated[str, Option(help="Its key.")] = "",
    rounds: Annotated[int | None, Option(min=1, help="Rounds for each server [1; 3 with --against].")] = None,
    config_file: ConfigFile = None,
) -> None:
    """Load a running server (any with OpenAI's API) and show what its users see; exit status 1 when requests failed."""
    from turboserve.bench_client.asking import Target
    from turboserve.cli import bench_serve

    options = bench_serve.Options(
        prompt_tokens, answer_tokens, shared_prefix, temperature, top_p, ignore_eos, seed,
        streams, rate, requests, duration, warmup, rounds, timeout,
    )  # fmt: skip
    key = config.resolve({"api_key": api_key}, config_file).api_key
    targets = [Target(bench_serve.api_url("URL", url), model, key)]
    if against:
        targets.append(Target(bench_serve.api_url("--against", against), against_model, against_api_key))
    raise typer.Exit(bench_serve.run(options.plan(len(targets)), targets, json_file, plot_file))


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"turboserve: {' '.join(message.split())}\n")
    raise SystemExit(status)


def main(argv: list[str] | None = None) -> Any:
    """Entry point. Exit status: 2 for a setting that cannot be used, 1 when the server cannot start."""
    try:
        return app(args=argv, prog_name="turboserve")
    except UsageError as exc:
        _fail(str(exc), 2)
    except StartupError as exc:
        _fail(str(exc), 1)
