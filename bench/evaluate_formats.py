"""Tasks, perplexity and memory of the embedded model under each KV format, in one table.

    python bench/evaluate_formats.py --json formats.json
    python bench/evaluate_formats.py --quick            # a small, spread subset without the longest prompts

Every format gets the same held-out prompts and texts (float32 weights, greedy answers). A format's accuracy counts as
within the noise of f16 when the exact McNemar test on these pairs gives p > 0.05: of the prompts that only one of the
two answers rightly, is the split compatible with a fair coin? f16 is mlx-lm's own cache in the model's dtype.

Answers are kept in a folder as they come, so a run can be stopped, goes on where it was, and may be split by --formats
or --kinds. The table shows all that every format has been given.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _rows import Row, add_json_option, write_rows

from turboquant_kv import blas

blas.interpose()  # before mlx is imported

from turboquant_kv.cache.runtime import KVRuntime
from turboserve.models.tiny.comparison import SIGNIFICANCE, compare
from turboserve.models.tiny.evaluate import (
    UNCOMPRESSED,
    Answer,
    ask,
    counts,
    load,
    parse_format,
    perplexity,
    runtime_for,
    text_losses,
)
from turboserve.models.tiny.prompts import Prompt, Text, load_prompts, load_texts, select, spread

FORMATS = (UNCOMPRESSED, "8/4", "4/4", "4/3", "3/3", "2/2")
PROMISED = ("8/4", "4/4")  # formats whose accuracy has to stay within the noise
BUDGET_TOKENS = 8192  # context at which bytes are given
LONG_KINDS = ("needle-4096", "needle-8192")
QUICK_LIMIT, QUICK_TEXTS = 3, 6


@dataclass(slots=True)
class Results:
    """All that is known of one format."""

    bytes_at_8k: int = 0
    half_bytes_at_8k: int = 0  # of an uncompressed float16 cache
    losses: dict[str, tuple[str, list[float]]] = field(default_factory=dict)  # text number: (source, nats per token)
    answers: dict[str, Answer] = field(default_factory=dict)  # by prompt_id

    def right(self) -> dict[str, bool]:
        return {prompt_id: answer.right for prompt_id, answer in self.answers.items()}


def stored(path: Path) -> Results:
    """What an earlier run left; nothing if there was none."""
    results = Results()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        item = json.loads(line)
        if "answer" in item:
            answer = Answer(**item["answer"])
            results.answers[answer.prompt_id] = answer
        elif "losses" in item:
            results.losses[item["text"]] = (item["source"], item["losses"])
        else:
            results.bytes_at_8k, results.half_bytes_at_8k = item["bytes_at_8k"], item["half_bytes_at_8k"]
    return results


def path_of(folder: Path, name: str) -> Path:
    return folder / f"evaluation-{name.replace('/', '-')}.jsonl"


def run(name: str, prompts: list[Prompt], texts: dict[str, Text], folder: Path) -> None:
    """Ask what is not yet answered in this format, appending each answer to its file."""
    path = path_of(folder, name)
    done = stored(path)
    missing = [prompt for prompt in prompts if prompt.prompt_id not in done.answers]
    missing_texts = {number: text for number, text in texts.items() if number not in done.losses}
    if not missing and not missing_texts and done.bytes_at_8k:
        return
    model, tokenizer = load()
    runtime = runtime_for(model, tokenizer, parse_format(name))
    with path.open("a", encoding="utf-8") as file:

        def keep(item: dict[str, Any]) -> None:
            file.write(json.dumps(item) + "\n")
            file.flush()

        keep({"bytes_at_8k": runtime.bytes_for(BUDGET_TOKENS), "half_bytes_at_8k": half_bytes(runtime)})
        losses = text_losses(model, tokenizer, runtime, missing_texts.values())
        for number, (source, values) in zip(missing_texts, losses, strict=True):
            keep({"text": number, "source": source, "losses": [round(value, 5) for value in values]})
        for prompt in missing:
            keep({"answer": asdict(ask(model, tokenizer, runtime, prompt))})


def half_bytes(runtime: KVRuntime) -> int:
    """Bytes of an uncompressed float16 cache of BUDGET_TOKENS tokens."""
    per_token = sum(2 * shape.raw_token_bytes // shape.dtype.size for shape in runtime.shapes if shape is not None)
    return BUDGET_TOKENS * per_token


def common(results: dict[str, Results]) -> dict[str, Results]:
    """Only the texts and prompts that every format has been given, so that columns can be compared."""
    texts = set.intersection(*(set(result.losses) for result in results.values()))
    prompts = set.intersection(*(set(result.answers) for result in results.values()))
    return {
        name: Results(
            result.bytes_at_8k,
            result.half_bytes_at_8k,
            {number: losses for number, losses in result.losses.items() if number in texts},
            {prompt_id: answer for prompt_id, answer in result.answers.items() if prompt_id in prompts},
        )
        for name, result in results.items()
    }


def table_lines(results: dict[str, Results]) -> list[str]:
    """The Markdown table: one column per format."""
    reference = results.get(UNCOMPRESSED)
    by_kind = {name: counts(result.answers.values()) for name, result in results.items()}
    columns = defaultdict[str, list[str]](list)
    kinds = list(dict.fromkeys(kind for figures in by_kind.values() for kind in figures))
    for name, result in results.items():
        columns["perplexity"].append(f"{perplexity(result.losses.values())['all']:.2f}" if result.losses else "")
        for kind in kinds:
            columns[kind].append(by_kind[name].get(kind, ""))
        right = sum(answer.right for answer in result.answers.values())
        columns["all tasks"].append(f"{right}/{len(result.answers)}")
        against = None if reference is None or name == UNCOMPRESSED else compare(reference.right(), result.right())
        columns["lost / gained against f16"].append(f"{against.lost} / {against.gained}" if against else "")
        columns["McNemar p"].append(f"{against.p_value:.3f}" if against else "")
        half = result.half_bytes_at_8k
        shown_bytes = half if name == UNCOMPRESSED else result.bytes_at_8k  # what a float16 model would store
        columns["KV bytes at 8K tokens"].append(f"{shown_bytes:,}")
        columns["float16 bytes / these"].append(f"{half / shown_bytes:.2f}")
    header = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    return header + [f"| {label} | {' | '.join(cells)} |" for label, cells in columns.items()]


def rows_of(results: dict[str, Results]) -> list[Row]:
    """Share of right answers of every format; a promised one's target is not to be significantly below f16."""
    rows = []
    reference = results.get(UNCOMPRESSED)
    for name, result in results.items():
        share = sum(answer.right for answer in result.answers.values()) / max(1, len(result.answers))
        rows.append(Row.plain(f"right answers {name}", share, "share"))
        if result.losses:
            rows.append(Row.plain(f"perplexity {name}", perplexity(result.losses.values())["all"], ""))
        if reference is not None and name != UNCOMPRESSED:
            p_value = compare(reference.right(), result.right()).p_value
            target = SIGNIFICANCE if name in PROMISED else None
            rows.append(Row.at_least(f"McNemar p {name} against f16", p_value, "", target))
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--kinds", default="", help="only kinds that begin with one of these, separated by commas")
    parser.add_argument("--limit", type=int, help="at most so many prompts of a kind, spread evenly")
    parser.add_argument("--long-limit", type=int, help=f"the same for {' and '.join(LONG_KINDS)}")
    parser.add_argument("--texts", type=int, help="at most so many held-out texts, spread evenly")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_LIMIT} prompts of a kind, no long ones")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where answers are kept")
    parser.add_argument("--fresh", action="store_true", help="forget the kept answers of these formats")
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    limit = QUICK_LIMIT if args.quick else args.limit
    long_limit = 0 if args.quick else (args.long_limit if args.long_limit is not None else limit)
    prompts = select(load_prompts(), tuple(args.kinds.split(",")), limit)
    if long_limit != limit:
        prompts = [prompt for prompt in prompts if prompt.kind not in LONG_KINDS]
        prompts += select(load_prompts(), LONG_KINDS, long_limit) if long_limit else []
    texts = dict(
        spread(
            [(str(number), text) for number, text in enumerate(load_texts())], QUICK_TEXTS if args.quick else args.texts
        )
    )
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Results] = {}
    for name in args.formats.split(","):
        if args.fresh:
            path_of(args.out, name).unlink(missing_ok=True)
        run(name, prompts, texts, args.out)
        results[name] = stored(path_of(args.out, name))
        print(f"{name}: {counts(results[name].answers.values())}", flush=True)
    results = common(results)
    print("\n".join(table_lines(results)))
    write_rows(args.json, rows_of(results))


if __name__ == "__main__":
    main()
