"""The `turboserve` command: parses flags, hands over to one function per verb, turns errors into one line.

Nothing here imports MLX or the engine; `serve` does so after the BLAS is in place. Exit statuses are in docs/cli.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer import Argument, Option

from turboserve.cli import bench, config, doctor, sessions, settings_view, stats
from turboserve.cli.client import ServerClient, server_url
from turboserve.cli.config import UsageError
from turboserve.cli.options import (
    ApiKey,
    CacheDir,
    ConfigFile,
    Interrupted,
    Model,
    Text,
    Url,
    brief,
    commands_app,
    example,
)
from turboserve.cli.serve_flags import USUAL, serve_command
from turboserve.errors import StartupError

FAILED, USAGE, INTERRUPTED = 1, 2, 130

app = commands_app(epilog=example("turboserve serve mlx-community/Qwen3-4B-4bit", "turboserve chat"))


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


app.command(
    "serve",
    cls=brief(USUAL),
    epilog=example("turboserve serve mlx-community/Qwen3-4B-4bit --kv-format compact --kv-budget 8GiB"),
)(serve_command)


@app.command(
    "chat",
    epilog=example(
        "turboserve chat --session trip",
        "cat notes.txt | turboserve chat 'summarise'",
    ),
)
def chat_command(
    words: Annotated[
        list[str] | None, Argument(help="One question; none: a prompt, where /help helps.", metavar="TEXT")
    ] = None,
    session: Annotated[Text, Option(help="Continue this chat, or begin it; it is kept.", metavar="NAME")] = None,
    system: Annotated[Text, Option(help="What the model is told first.", metavar="TEXT")] = None,
    model: Annotated[str, Option(help="Model to ask [the first of /v1/models].", metavar="NAME")] = "",
    kv_format: Annotated[Text, Option("--format", help="KV format [the server's].", metavar="F")] = None,
    temperature: Annotated[float | None, Option(help="0 to 2 [the model's].", metavar="T")] = None,
    max_tokens: Annotated[int | None, Option(min=1, help="Of an answer [the server's].", metavar="N")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    config_file: ConfigFile = None,
) -> None:
    """Talk to a running server; what is piped in is added to TEXT. Ctrl-C stops an answer."""
    from turboserve.cli import chat_start

    settings = config.resolve({"api_key": api_key}, config_file)
    text = " ".join(words) if words else None
    wanted = chat_start.Wanted(text, session, system, model, kv_format, temperature, max_tokens)
    raise typer.Exit(chat_start.run(server_url(url, settings), settings, wanted))


@app.command("ps", epilog=example("turboserve ps --once"))
def ps_command(
    once: Annotated[bool, Option("--once", help="Show it once; so does a pipe.")] = False,
    as_json: Annotated[bool, Option("--json", help="All statistics, once, as JSON.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    config_file: ConfigFile = None,
) -> None:
    """Show what a running server works on and holds, every second until Ctrl-C."""
    from turboserve.cli import ps

    settings = config.resolve({"api_key": api_key}, config_file)
    with ServerClient(server_url(url, settings), settings.api_key) as client:
        ps.run(client, once=once, as_json=as_json)


@app.command("stats", epilog=example("turboserve stats --url http://127.0.0.1:8000"))
def stats_command(url: Url = None, api_key: ApiKey = None, config_file: ConfigFile = None) -> None:
    """Show in words what a running server's conversations cost, compressed and uncompressed."""
    settings = config.resolve({"api_key": api_key}, config_file)
    with ServerClient(server_url(url, settings), settings.api_key) as client:
        for line in stats.lines(client.stats()):
            typer.echo(line)


app.add_typer(sessions.app, name="sessions")


@app.command("ls", epilog=example("turboserve ls"))
def ls_command(as_json: Annotated[bool, Option("--json", help="As JSON.")] = False) -> None:
    """List the models in the hub's cache on this machine (HF_HOME), and what keeps some from being served."""
    from turboserve.cli import hub

    hub.show(as_json)


Names = Annotated[list[str], Argument(help="Models of the hub, as OWNER/NAME.", metavar="MODEL")]


@app.command("pull", epilog=example("turboserve pull mlx-community/Qwen3-4B-4bit"))
def pull_command(models: Names) -> None:
    """Download models into the hub's cache, or what of them is new; HF_TOKEN for private ones."""
    from turboserve.cli import hub

    hub.pull(models)


@app.command("rm", epilog=example("turboserve rm mlx-community/Qwen3-4B-4bit"))
def rm_command(models: Names) -> None:
    """Delete models from the hub's cache."""
    from turboserve.cli import hub

    hub.remove(models)


@app.command("doctor", epilog=example("turboserve doctor"))
def doctor_command(
    config_file: ConfigFile = None,
    cache_dir: CacheDir = None,
    store: Annotated[
        Path | None, Option("--store", help="Verify this session store instead, every file of it.", metavar="DIR")
    ] = None,
) -> None:
    """Check this machine; exit status 1 when the server could not run, or a session store is damaged."""
    if store is not None:
        raise typer.Exit(doctor.report(doctor.verify_store(store)))
    settings = config.resolve({"cache_dir": cache_dir}, config_file)
    raise typer.Exit(doctor.report(doctor.run_checks(settings)))


@app.command(
    "plan",
    epilog=example(
        "turboserve plan --users 50 --context 8K",
        "turboserve plan --model ./model --users 500 --context 32K --measured one.json --measured eight.json",
    ),
)
def plan_command(
    users: Annotated[int, Option(min=1, help="People with a conversation each.", metavar="N")],
    context: Annotated[str, Option(help="Tokens that a conversation holds, such as 8K.", metavar="N")],
    model: Annotated[Text, Option(help="Folder or hub name; none: the embedded model.", metavar="MODEL")] = None,
    measured: Annotated[
        list[Path] | None,
        Option(help="What `bench serve --json` wrote here; repeatable, of two loads or more.", metavar="FILE"),
    ] = None,
    formats: Annotated[str, Option(help="KV formats, comma-separated.", metavar="F,...")] = "f16,balanced,compact,tiny",
    memory: Annotated[Text, Option(help="Of one machine, for weights and caches [this one's].", metavar="SIZE")] = None,
    question: Annotated[str, Option(help="New tokens of a question.", metavar="N")] = "200",
    answer: Annotated[str, Option(help="Tokens of an answer.", metavar="N")] = "300",
    think: Annotated[float, Option(help="Seconds from an answer's end to the next question.", metavar="S")] = 60.0,
    min_rate: Annotated[float, Option(help="Tokens a second that a user must get.", metavar="R")] = 8.0,
    max_ttft: Annotated[float, Option(help="Seconds that a first token may take.", metavar="S")] = 3.0,
    json_file: Annotated[Path | None, Option("--json", help="Write all figures here.", metavar="FILE")] = None,
    cache_dir: CacheDir = None,
    config_file: ConfigFile = None,
) -> None:
    """Plan machines, memory, first tokens and speed for so many USERS of MODEL; without --measured, try it here."""
    from turboserve.cli import plan

    settings = config.resolve({"model": model, "cache_dir": cache_dir}, config_file)
    wanted = plan.Wanted.parse(users, context, formats, memory, question, answer, think, min_rate, max_ttft)
    plan.run(settings, wanted, measured or [], json_file)


@app.command("eval", epilog=example("turboserve eval ./model --formats balanced,compact --rivals --plot quality.svg"))
def eval_command(
    model: Model = None,
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
    needles: Annotated[int, Option(help="Facts to plant in each text and ask for.")] = 0,
    greedy: Annotated[int, Option(help="Greedy answers to compare.")] = 0,
    mode: Annotated[str, Option(help="prefill, decode (token by token), or batch (texts as rows).")] = "prefill",
    json_file: Annotated[Path | None, Option("--json", help="Write all figures here.", metavar="FILE")] = None,
    plot_file: Annotated[Path | None, Option("--plot", help="Draw them here, as SVG.", metavar="FILE")] = None,
    dequantize: Annotated[
        Text, Option(help="Expand quantised weights to float32 on a CPU: auto, always, never.")
    ] = None,
    cache_dir: CacheDir = None,
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


app.add_typer(settings_view.app, name="config")
app.add_typer(bench.app, name="bench")


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"turboserve: {' '.join(message.split())}\n")
    raise SystemExit(status)


def main(argv: list[str] | None = None) -> Any:
    """Entry point. Exit status: 2 for a setting that cannot be used, 1 for what cannot be done, 130 after Ctrl-C."""
    try:
        try:
            return app(args=argv, prog_name="turboserve")
        finally:
            sys.stdout.flush()
    except UsageError as exc:
        _fail(str(exc), USAGE)
    except StartupError as exc:
        _fail(str(exc), FAILED)
    except (Interrupted, KeyboardInterrupt):
        _fail("interrupted by Ctrl-C; nothing is left half done, run it again when you like", INTERRUPTED)
    except RuntimeError as exc:
        from turboserve.engine.failures import known_cause

        if (cause := known_cause(exc)) is None:
            raise
        _fail(cause, FAILED)
    except OSError as exc:
        if exc.errno not in _FULL and not isinstance(exc, BrokenPipeError):
            raise
        _leave_stdout()
        if isinstance(exc, BrokenPipeError):
            raise SystemExit(FAILED) from None  # whoever read it has left, and needs no word
        _fail(f"no room is left to write to ({exc.strerror}): free some on the disk", FAILED)


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _leave_stdout() -> None:
    """Keep Python from writing at its end what cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
