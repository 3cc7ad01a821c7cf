"""`turboserve eval`: what KV formats cost in quality and save in memory on one model, as a table, JSON and a drawing.

Owns options, texts and how results are shown; the measuring is `turboquant_kv.evaluation`. Imports MLX only when a
run begins, so that mistakes in options are answered at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboquant_kv.codec.format_name import FORMAT_NAMES, PLAIN_FORMAT, UnsupportedFormatError, parse_format_name
from turboserve.cli.backend import load_backend
from turboserve.cli.config import UsageError
from turboserve.cli.progress import Bars
from turboserve.errors import StartupError
from turboserve.settings import Settings

if TYPE_CHECKING:
    from turboquant_kv.evaluation import Estimate, Evaluation, Plan, Result

# Held-out documents with which the built-in texts begin: code, and three kinds of technical prose.
EVALUATION_CHUNK_TOKENS = 256  # unless set; figures of two machines must not differ by it
_FIRST_DOCUMENTS = (("python code", 7), ("sqlite questions", 36), ("llvm manual", 12), ("postgresql manual", 20))


@dataclass(frozen=True, slots=True)
class Wanted:
    """The command's options, spelled as the command spells them."""

    formats: tuple[str, ...]
    rivals: bool = False
    texts: tuple[Path, ...] = ()
    tokens: int = 512
    offsets: tuple[int, ...] = (0,)
    needles: int = 0
    greedy: int = 0
    mode: str = "prefill"
    json_file: Path | None = None
    plot_file: Path | None = None


def run(settings: Settings, wanted: Wanted) -> None:
    """Evaluate, print the table, write the files. Raises UsageError for options, StartupError for the model."""
    texts = read_texts(wanted.texts)
    for option, file in (("--json", wanted.json_file), ("--plot", wanted.plot_file)):
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"{option} {file}: there is no folder {file.parent}")
    load_backend()
    plan = _plan(settings, wanted)
    evaluation = _evaluate(settings, wanted, plan, texts)
    print("\n".join(table(evaluation)))
    _write("--json", wanted.json_file, json.dumps(evaluation.to_dict(), indent=1) + "\n")
    if wanted.plot_file is not None:
        from turboquant_kv.evaluation import svg

        _write("--plot", wanted.plot_file, svg(evaluation))


def parse_formats(text: str) -> tuple[str, ...]:
    """`4/4,4/3` as names in their one spelling. Raises UsageError."""
    names = []
    for part in text.split(","):
        try:
            name = parse_format_name(part)
        except UnsupportedFormatError as exc:
            raise UsageError(f"--formats {part!r}: expected {FORMAT_NAMES.partition(', or')[0]}") from exc
        if name == PLAIN_FORMAT:
            raise UsageError(f"--formats {part!r}: {PLAIN_FORMAT} is what all others are compared with, leave it out")
        names.append(name)
    return tuple(dict.fromkeys(names))


def parse_offsets(text: str) -> tuple[int, ...]:
    """`0,8192` or `0,8K` as positions. Raises UsageError."""
    found = []
    for part in text.split(","):
        digits, unit = (part[:-1], 1024) if part[-1:] in ("K", "k") else (part, 1)
        if not digits.isdecimal():
            raise UsageError(f"--offsets {part!r}: expected positions such as 0,8192 or 0,8K")
        found.append(int(digits) * unit)
    return tuple(found)


def read_texts(files: Sequence[Path]) -> dict[str, str]:
    """Texts by a name to show: the files', or the built-in ones. Raises UsageError for what is no text file."""
    if not files:
        return built_in_texts()
    texts: dict[str, str] = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as exc:
            raise UsageError(f"--text {file}: {exc.strerror or exc}") from exc
        except UnicodeDecodeError as exc:
            raise UsageError(f"--text {file}: expected text in UTF-8") from exc
        texts[file.name if file.name not in texts else str(file)] = text
    return texts


def built_in_texts() -> dict[str, str]:
    """Documents that neither the embedded model nor the calibration of means has seen, dealt out to four texts.

    Each is longer than 30,000 characters.
    """
    from turboserve.models.tiny.prompts import load_texts

    documents = [item.text for item in load_texts()]
    first = [index for _, index in _FIRST_DOCUMENTS]
    rest = [text for index, text in enumerate(documents) if index not in first]
    return {
        name: "\n\n".join([documents[index], *rest[i :: len(first)]])
        for i, (name, index) in enumerate(_FIRST_DOCUMENTS)
    }


def _plan(settings: Settings, wanted: Wanted) -> Plan:
    from turboquant_kv.evaluation import Plan

    plan = Plan(
        num_tokens=wanted.tokens,
        chunk_tokens=settings.prefill_chunk_tokens or EVALUATION_CHUNK_TOKENS,
        offsets=wanted.offsets,
        mode=wanted.mode,  # type: ignore[arg-type]  # judged by check
        num_needles=wanted.needles,
        num_greedy=wanted.greedy,
    )
    try:
        plan.check()
    except ValueError as exc:
        raise UsageError(f"--{exc}") from exc
    return plan


def _evaluate(settings: Settings, wanted: Wanted, plan: Plan, texts: dict[str, str]) -> Evaluation:
    """Load the model and its means as the server does, and measure."""
    from dataclasses import replace

    from turboquant_kv.cache.calibration import calibration_for
    from turboquant_kv.cache.runtime import UnsupportedModelError
    from turboquant_kv.evaluation import evaluate, standard_rivals
    from turboserve.engine.kept_quality import keep_quality
    from turboserve.engine.loading import load
    from turboserve.machine_memory import detect_memory

    bars = Bars(sys.stderr)  # stdout has the table alone
    loaded = load(settings, bars, detect_memory())
    bars("key and value means: measured at the first start, then read from the cache folder")
    try:
        with bars.step("measuring key and value means"):
            calibration = calibration_for(
                loaded.model, loaded.tokenizer, settings.cache_dir.expanduser(), loaded.weights_fingerprint
            )
        with bars.report("evaluating") as progress:
            evaluation = evaluate(
                loaded.model,
                loaded.tokenizer,
                wanted.formats,
                texts,
                plan,
                rivals=standard_rivals() if wanted.rivals else (),
                calibration=calibration,
                progress=progress,
            )
    except (UnsupportedModelError, UnsupportedFormatError, ValueError) as exc:
        raise StartupError(str(exc)) from exc
    keep_quality(settings.cache_dir.expanduser(), loaded.weights_fingerprint, evaluation)
    return replace(evaluation, model=loaded.model_id)


def _write(option: str, file: Path | None, text: str) -> None:
    if file is None:
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise StartupError(f"{option} {file}: {exc.strerror or exc}") from exc


# --- the table


def table(evaluation: Evaluation) -> list[str]:
    """Lines in Markdown: what was measured, a row per format and rival, offsets, notes."""
    plan, lengths = evaluation.plan, evaluation.byte_lengths
    base = evaluation.base_perplexity[plan.offsets[0]]
    used = ", ".join(f"{name} ({n})" for name, n in evaluation.text_tokens.items())
    header = ["format", "KL mean", "median", "p99", "top-1 flips", "perplexity", "ratio"]
    header += [f"B/token @{short(n)}" for n in lengths] + [f"x f16 @{short(n)}" for n in lengths]
    if plan.num_needles:
        header.append("needle loss, nats")
    if plan.num_greedy:
        header.append(f"agreed of {plan.answer_tokens}")
    rows = [header, *(_row(result, evaluation) for result in evaluation.results)]
    lines = [
        f"{evaluation.model}, {plan.mode}, exact tokens in {evaluation.dtype}; texts (tokens): {used}",
        f"uncompressed perplexity {base:.3f}; KL in nats; +- is the 95% t interval over texts",
        "",
        *_aligned(rows),
    ]
    if len(plan.offsets) > 1:
        lines += ["", "Mean KL where the texts begin at a position:", "", *_aligned(_offset_rows(evaluation))]
    told = [f"{r.name}: {r.description}" for r in evaluation.results if r.description != r.name]
    return [*lines, "", *told, *evaluation.notes] if told or evaluation.notes else lines


def _row(result: Result, evaluation: Evaluation) -> list[str]:
    plan, lengths = evaluation.plan, evaluation.byte_lengths
    figures = result.figures(plan.offsets[0])
    cells = [
        result.name,
        shown(figures.kl_mean, ".5f"),
        shown(figures.kl_median, ".5f"),
        shown(figures.kl_p99, ".4f"),
        shown(figures.flips, ".2%"),
        f"{figures.perplexity.mean:.3f}",
        shown(figures.perplexity_ratio, ".4f"),
        *(f"{result.token_bytes(n):,.0f}" for n in lengths),
        *(f"{result.ratio(n):.2f}" for n in lengths),
    ]
    from turboquant_kv.evaluation import Estimate

    if result.needles is not None:
        cells.append(shown(Estimate.of(result.needles.losses), ".3f"))
    if result.greedy is not None:
        cells.append(shown(Estimate.of(result.greedy.agreed), ".1f"))
    return cells


def _offset_rows(evaluation: Evaluation) -> list[list[str]]:
    offsets = evaluation.plan.offsets
    rows = [["format", *(f"{offset:,}" for offset in offsets)]]
    for result in evaluation.results:
        rows.append([result.name, *(shown(result.figures(offset).kl_mean, ".5f") for offset in offsets)])
    return rows


def shown(estimate: Estimate, spec: str) -> str:
    """`0.0047 +- 0.0012`; `0.0047 -` where there is no interval."""
    half = estimate.half_width
    return f"{estimate.mean:{spec}} {'-' if half is None else f'+-{half:{spec}}'}"


def short(num_tokens: int) -> str:
    """16,384 as 16K."""
    return f"{num_tokens // 1024}K" if num_tokens % 1024 == 0 else f"{num_tokens}"


def _aligned(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Markdown with columns of one width: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join(f"{'-' * (w + 1)}{'-' if i == 0 else ':'}" for i, w in enumerate(widths)) + "|"
    return [line(rows[0]), rule, *map(line, rows[1:])]
