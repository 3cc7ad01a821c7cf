"""`turboserve bench`: its commands' options; measuring is done in bench_kernels, bench_memory and bench_serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from turboserve.cli import config
from turboserve.cli.options import (
    ApiKey,
    CacheDir,
    ConfigFile,
    HelpAll,
    Model,
    Text,
    brief,
    commands_app,
    example,
)

app = commands_app(help="Measure parts of the service on this machine.", epilog=example("turboserve bench kernels"))


@app.command("kernels", epilog=example("turboserve bench kernels --heads 32/8 --lengths 4K,32K --formats 4t/3t,3t/2t"))
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


@app.command("memory", epilog=example("turboserve bench memory ./model --formats balanced,tiny --lengths 4K,16K"))
def bench_memory_command(
    model: Model = None,
    formats: Annotated[str, Option(help="KV formats, comma-separated.", metavar="F,...")] = "f16,balanced,compact,tiny",
    lengths: Annotated[str, Option(help="Tokens of the conversation, comma-separated.", metavar="N,...")] = "1K,4K",
    json_file: Annotated[Path | None, Option("--json", help="Write all figures here.", metavar="FILE")] = None,
    dequantize: Annotated[Text, Option(help="Expand quantised weights on a CPU: auto, always, never.")] = None,
    cache_dir: CacheDir = None,
    config_file: ConfigFile = None,
) -> None:
    """Measure what a conversation's cache takes in each KV format while MODEL reads a text."""
    from turboserve.cli import bench_memory

    settings = config.resolve({"model": model, "dequantize": dequantize, "cache_dir": cache_dir}, config_file)
    names, tokens = bench_memory.parse_wanted(formats, lengths)
    bench_memory.run(settings, names, tokens, json_file)


@app.command(
    "serve",
    cls=brief(
        (
            *("url", "model", "api_key", "streams", "rate", "requests", "duration", "prompt_tokens", "answer_tokens"),
            *("shared_prefix", "json_file", "plot_file", "against"),
        )
    ),
    epilog=example(
        "turboserve bench serve --streams 16 --prompt-tokens 1000-4000",
        "turboserve bench serve http://127.0.0.1:8000/v1 --against http://127.0.0.1:8080/v1 --plot both.svg",
    ),
)
def bench_serve_command(
    url: Annotated[str, Argument(help="The server's API.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, Option(help="Model to ask for [the first of /v1/models].")] = "",
    api_key: ApiKey = None,
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
    help_all: HelpAll = False,
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
