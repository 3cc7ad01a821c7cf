"""`turboserve plan`: from counted bytes and measured speeds to machines for so many users, by format.

Owns options, files and lines. The arithmetic is `turboserve.sizing`'s, bytes are counted by the library's formats.
"""

from __future__ import annotations

import json
import re
import reprlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from turboserve.cli.config import UsageError
from turboserve.errors import StartupError
from turboserve.machine_memory import MemoryInfo, resolve_budget
from turboserve.settings import Settings
from turboserve.sizing.load import Habits, Need, machines_for
from turboserve.sizing.load import Wanted as Least
from turboserve.sizing.speeds import Point, Speeds, fit, relative_error
from turboserve.units import try_parse_bytes

GB = 10**9
TRIAL = ((1, 256), (4, 256), (4, 1024))  # streams and tokens of prompts, where nothing was measured before
TRIAL_ANSWER = 64
START_S = 600.0
MAX_COUNT = 1 << 31  # of requests, streams or tokens in one report
MIN_S, MAX_S = 1e-9, 1e6  # of what is measured


@dataclass(frozen=True, slots=True)
class Wanted:
    """As asked for on the command line."""

    users: int
    context: int
    formats: tuple[str, ...]
    memory_bytes: int | None
    question: int
    answer: int
    think_s: float
    min_rate: float
    max_ttft_s: float

    @classmethod
    def parse(
        cls,
        users: int,
        context: str,
        formats: str,
        memory: str | None,
        question: str,
        answer: str,
        think_s: float,
        min_rate: float,
        max_ttft_s: float,
    ) -> Self:
        """Raises UsageError."""
        memory_bytes = None if memory is None else try_parse_bytes(memory)
        if memory is not None and not memory_bytes:
            raise UsageError(f"--memory {memory}: expected an amount such as 64GB")
        for name, value, least in (
            ("--think", think_s, 0.0),
            ("--min-rate", min_rate, 1e-6),
            ("--max-ttft", max_ttft_s, 1e-6),
        ):
            if not least <= value < 1e9:
                raise UsageError(f"{name} {value:g}: expected a number {'of 0 or more' if not least else 'above 0'}")
        return cls(
            users,
            _tokens("--context", context),
            _formats(formats),
            memory_bytes,
            _tokens("--question", question),
            _tokens("--answer", answer),
            think_s,
            min_rate,
            max_ttft_s,
        )


def _tokens(option: str, text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})([kK]?)", text.strip())
    if match is None or not int(match[1]):
        raise UsageError(f"{option} {text}: expected tokens such as 4096 or 16K")
    return int(match[1]) * (1024 if match[2] else 1)


def _formats(text: str) -> tuple[str, ...]:
    from turboquant_kv.codec.format_name import FORMAT_NAMES, UnsupportedFormatError, parse_format_name

    try:
        found = tuple(dict.fromkeys(parse_format_name(name) for name in text.split(",")))
    except UnsupportedFormatError:
        raise UsageError(f"--formats {text}: expected {FORMAT_NAMES}, comma-separated") from None
    return found


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model takes memory; `number_bytes` for each number that is not compressed."""

    name: str
    weights_bytes: int
    layers: Any  # engine.forecast.Geometry
    number_bytes: int

    def kv_bytes(self, kv_format: str, num_tokens: float) -> int:
        """One conversation's cache. Raises UsageError for a format that this model cannot have."""
        from turboquant_kv.codec.format import KVFormat
        from turboquant_kv.codec.format_name import PLAIN_FORMAT, UnsupportedFormatError

        fmt = None if kv_format == PLAIN_FORMAT else KVFormat.parse(kv_format)
        try:
            return int(self.layers.conversation_bytes(fmt, self.number_bytes, max(1, round(num_tokens))))
        except UnsupportedFormatError as exc:
            raise UsageError(f"--formats {kv_format}: {exc}") from exc


def model_of(settings: Settings) -> Model:
    """Raises StartupError for a model whose configuration does not say what its caches hold."""
    from turboserve.engine.forecast import expanded_bytes, geometry
    from turboserve.engine.model_config import read_config
    from turboserve.engine.model_folder import model_id_for, resolve_folder
    from turboserve.engine.weight_files import read_shapes
    from turboserve.engine.weights import config_value
    from turboserve.weight_sizes import model_bytes

    folder = resolve_folder(settings.model)
    config = read_config(folder)
    layers = geometry(config)
    if layers is None:
        raise StartupError(
            f"{folder}: its config.json does not say what its caches hold (latent attention or recurrent layers): "
            "there is no plan for such models."
        )
    import mlx.core as mx

    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    is_float32 = on_cpu or str(config_value(config, "torch_dtype")) == "float32"
    # On a CPU weights are multiplied as stored where there are kernels, else expanded: the larger is what must fit.
    weights = model_bytes(folder)
    if on_cpu and settings.dequantize == "always":
        weights = expanded_bytes(config, read_shapes(folder))
    return Model(model_id_for(settings.model), weights, layers, 4 if is_float32 else 2)


# --- what was measured


def points_of(report: Mapping[str, Any], model: Model) -> list[Point]:
    """Of what `bench serve --json` wrote, one for each server. Raises ValueError, KeyError, TypeError for others."""
    found = []
    for number, server in enumerate(report["servers"]):
        where = f"servers[{number}]"
        counts, medians = server["counts"], server["medians"]
        requests = _count(counts, "requests", f"{where}.counts")
        failed = _count(counts, "failed", f"{where}.counts", 0, requests + 1)
        if failed == requests or not counts["prompt_tokens"] or "itl_p50_s" not in medians:
            raise ValueError("no request succeeded, or the server does not count tokens")
        if report["plan"]["pace"].get("rate"):
            raise ValueError("it was measured at a rate; measure by --streams")
        succeeded = requests - failed
        streams = _count(report["plan"]["pace"], "streams", "plan.pace")
        prompt_tokens = _count(counts, "prompt_tokens", f"{where}.counts")
        answer_tokens = _count(counts, "answer_tokens", f"{where}.counts")
        cached_tokens = _count(counts, "cached_tokens", f"{where}.counts", 0, prompt_tokens)
        step_s, ttft_s = (_seconds(medians, key, f"{where}.medians") for key in ("itl_p50_s", "ttft_p50_s"))
        context = (prompt_tokens + answer_tokens / 2) / succeeded
        kv = next((one["kv_peak"] for one in server["rounds"] if one["kv_peak"]), None)
        kv_bytes = _measured_bytes(model, kv["kv_format"] if kv else "f16", context, where)
        new = (prompt_tokens - cached_tokens) / succeeded
        # Alone a prompt waits for nobody; beside others it waits for about half of them.
        prefill_s = (ttft_s - step_s) / ((streams + 1) / 2)
        found.append(Point(streams, context, step_s, kv_bytes, new / prefill_s if prefill_s > 0 else None))
    if not found:
        raise ValueError("no server was measured")
    return found


def _count(table: Mapping[str, Any], key: str, where: str, least: int = 1, end: int = MAX_COUNT) -> int:
    """A whole number from `least` to below `end`. Raises ValueError for anything else, naming it."""
    value = table[key]
    if type(value) is not int or not least <= value < end:
        raise ValueError(f"{where}.{key} is {reprlib.repr(value)}: expected a whole number from {least} to {end - 1}")
    return value


def _seconds(table: Mapping[str, Any], key: str, where: str) -> float:
    """Raises ValueError, naming it, for what no run takes between two tokens or before the first."""
    value = table[key]
    if type(value) not in (int, float) or not MIN_S <= value <= MAX_S:  # NaN is in no range
        raise ValueError(f"{where}.{key} is {reprlib.repr(value)}: expected seconds from {MIN_S:g} to {MAX_S:g}")
    return float(value)


def _measured_bytes(model: Model, kv_format: object, context: float, where: str) -> int:
    """Of one stream's cache. Raises ValueError for a format that there is not, or not for this model."""
    from turboquant_kv.codec.format_name import UnsupportedFormatError, parse_format_name

    try:
        return model.kv_bytes(parse_format_name(str(kv_format)), context)
    except (UnsupportedFormatError, UsageError):
        raise ValueError(f"{where}'s kv_format is {reprlib.repr(kv_format)}, which this model cannot have") from None


def read_points(files: Sequence[Path], model: Model) -> list[Point]:
    """Raises StartupError for a file that holds no measurement."""
    points = []
    for file in files:
        try:
            points += points_of(json.loads(file.read_text("utf-8")), model)
        except OSError as exc:
            raise StartupError(f"{file} cannot be read: {exc.strerror or exc}") from exc
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            why = f"{type(exc).__name__} {exc}" if isinstance(exc, KeyError | TypeError | AttributeError) else str(exc)
            raise StartupError(f"{file} is no report of `turboserve bench serve --json` ({why})") from exc
    return points


def try_here(settings: Settings, model: Model) -> list[Point]:
    """Serve the model on this machine for a minute or so and load it. Raises StartupError."""
    from turboserve.bench_client import report
    from turboserve.bench_client.asking import Target
    from turboserve.bench_client.session import measure
    from turboserve.cli.bench_serve import Options

    points = []
    with _served(settings) as url:
        for streams, prompt in TRIAL:
            options = Options(str(prompt), str(TRIAL_ANSWER), temperature=0.0, streams=streams, requests=2 * streams)
            plan = options.plan(1)
            measured = measure(plan, [Target(f"{url}/v1", "")])
            try:
                points += points_of(report.as_json(plan, measured), model)
            except ValueError as exc:
                raise StartupError(f"the trial measured nothing: {exc}") from exc
    return points


@contextmanager
def _served(settings: Settings) -> Iterator[str]:
    """A server of this model in a process of its own, gone afterwards."""
    command = [sys.executable, "-m", "turboserve", "serve", "--host", "127.0.0.1", "--port", "0", "--speculate", "off"]
    command += ["--cache-dir", str(settings.cache_dir), *(["--", settings.model] if settings.model else [])]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            url = next((m[1] for line in process.stdout if (m := re.search(r"Ready: \S+ at (http://\S+)", line))), None)
            if url is None:
                process.wait(START_S)
                log.seek(0)
                last = (log.read().strip().splitlines() or ["it ended without a word"])[-1]
                raise StartupError(f"the model could not be tried here: {last.removeprefix('turboserve: ')}")
            yield url
        finally:
            process.terminate()
            process.wait(60)
            if process.stdout is not None:
                process.stdout.close()


# --- the plan


@dataclass(frozen=True, slots=True)
class Planned:
    """For one format."""

    kv_format: str
    conversation_bytes: int
    budget_bytes: int
    need: Need


def plan_for(model: Model, wanted: Wanted, speeds: Speeds, memory: MemoryInfo, settings: Settings) -> list[Planned]:
    """One for each format. Raises StartupError when the weights leave no room for caches."""
    budget = resolve_budget(settings.kv_budget, memory, model.weights_bytes)
    found = []
    for name in wanted.formats:
        held = model.kv_bytes(name, wanted.context)
        habits = Habits(wanted.question, wanted.answer, wanted.think_s, held)
        least = Least(wanted.min_rate, wanted.max_ttft_s, settings.max_running)
        found.append(Planned(name, held, budget, machines_for(wanted.users, budget, speeds, habits, least)))
    return found


def lines(
    model: Model, wanted: Wanted, points: Sequence[Point], speeds: Speeds, planned: Sequence[Planned]
) -> Iterator[str]:
    """For the terminal."""
    yield (
        f"{model.name}: {wanted.users:,} users, each with {wanted.context:,} tokens; questions of {wanted.question:,}, "
        f"answers of {wanted.answer:,}, {wanted.think_s:g} s to think"
    )
    worst = max((abs(relative_error(speeds, point)) for point in points), default=0.0)
    yield (
        f"a step: {speeds.fixed_s * 1e3:.2f} ms + {speeds.row_s * 1e3:.2f} ms a stream"
        + (f" + its cache at {1 / speeds.kv_s_per_byte / GB:.1f} GB/s" if speeds.kv_s_per_byte else "")
        + f"; prompts at {speeds.prefill_tokens_per_s:,.0f} tokens/s ({len(points)} runs, {worst:.0%} off at worst)"
    )
    yield f"weights {model.weights_bytes / GB:.2f} GB, caches {planned[0].budget_bytes / GB:.2f} GB a machine"
    yield ""
    heads = ("format", "a user", "all", "by memory", "by speed", "machines", "for", "streams", "TTFT", "tokens/s")
    rows = [heads, *(_row(one, wanted) for one in planned)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    for row in rows:
        yield "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
    if any(one.need.machines == 0 for one in planned):
        yield ""
        yield "-: not with any number of such machines; what one user alone would see is shown"


def _row(one: Planned, wanted: Wanted) -> tuple[str, ...]:
    need, seen = one.need, one.need.seen
    return (
        one.kv_format,
        f"{one.conversation_bytes / 1e6:,.1f} MB",
        f"{one.conversation_bytes * wanted.users / GB:,.1f} GB",
        f"{need.users_by_memory:,}",
        f"{need.users_by_speed:,}",
        f"{need.machines:,}" if need.machines else "-",
        need.by,
        f"{seen.streams:.1f}",
        f"{seen.ttft_s:.2f} s",
        f"{seen.tokens_per_s:.1f}",
    )


def run(settings: Settings, wanted: Wanted, files: Sequence[Path], json_file: Path | None) -> None:
    """Measure or read, plan, print. Raises UsageError, StartupError."""
    from turboserve.machine_memory import detect_memory

    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise UsageError(f"{json_file}: its folder does not exist")
    model = model_of(settings)
    points = read_points(files, model) if files else try_here(settings, model)
    try:
        speeds = fit(points)
    except ValueError as exc:
        raise StartupError(f"speeds cannot be told from what was measured: {exc}") from exc
    memory = MemoryInfo(wanted.memory_bytes, wanted.memory_bytes) if wanted.memory_bytes else detect_memory()
    planned = plan_for(model, wanted, speeds, memory, settings)
    print("\n".join(lines(model, wanted, points, speeds, planned)), flush=True)
    if json_file is not None:
        said = {
            "model": model.name,
            "wanted": asdict(wanted),
            "speeds": asdict(speeds),
            "points": [{**asdict(point), "error": relative_error(speeds, point)} for point in points],
            "formats": [asdict(one) for one in planned],
        }
        try:
            json_file.write_text(json.dumps(said, indent=1) + "\n")
        except OSError as exc:
            raise StartupError(f"{json_file} cannot be written: {exc.strerror or exc}") from exc
