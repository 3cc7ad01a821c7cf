"""What constraints on answers cost: reading a tokenizer, compiling, and each token beside a decode step.

    python bench/structured.py [MODEL ...] [--schemas 300] [--json FILE]

For the embedded model and each MODEL folder: random schemas of all kinds are compiled, and answers drawn at random
under their masks. Decode steps are of that model, uncompressed, with 1 and 8 rows. Hard constraints are timed by the
embedded model's engine, from submitting one to its refusal or first token, while a stream goes on beside it.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from _rows import Row, add_json_option, print_rows, write_rows

from turboquant_kv import blas

blas.interpose()  # before mlx is imported

from tests.turboserve.engine.hard_grammars import hard_constraints
from tests.turboserve.engine.schemas import FIXED, random_schemas

from turboserve.engine.engine import TurboEngine
from turboserve.engine.generation import Generation
from turboserve.engine.grammar.compiler import Compiler
from turboserve.engine.grammar.rule import GrammarRule
from turboserve.engine.grammar.vocabulary import Vocabulary
from turboserve.engine.loading import build_parts
from turboserve.engine.protocol import NullTelemetry
from turboserve.engine.step_loop import StepLoop
from turboserve.errors import InvalidRequestError
from turboserve.messages import Constraint, Event, Failed, Finished, Request, SamplingParams
from turboserve.settings import Settings

SHARE_TARGET = 0.05  # of a decode step, for the rule of one row
REFUSAL_TARGET_S = 1.0
MAX_TOKENS = 60
STEPS = 40
TIMEOUT_S = 10.0


class Sink:
    """Remembers when events came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.last: Event | None = None
        self.began, self.ended = threading.Event(), threading.Event()

    def put(self, event: Event) -> None:
        self.times_s.append(time.perf_counter())
        self.last = event
        self.began.set()
        if isinstance(event, (Finished, Failed)):
            self.ended.set()


def token_times(rule: GrammarRule, vocabulary: Vocabulary, closing: Any, rng: np.random.Generator) -> list[float]:
    """Seconds of fill and accept for each token of an answer drawn at random."""
    mask = np.zeros(-(-vocabulary.vocab_len // 32), np.uint32)
    times: list[float] = []
    while len(times) < MAX_TOKENS and not rule.is_complete:
        began_s = time.perf_counter()
        rule.fill(mask)
        filled_s = time.perf_counter() - began_s
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        ending = allowed[closing[allowed]]
        token = int(rng.choice(ending if len(ending) and rng.random() < 0.7 else allowed))
        if token in vocabulary.end_tokens:
            break
        began_s = time.perf_counter()
        rule.accept(token)
        times.append(filled_s + time.perf_counter() - began_s)
    return times


def step_s(settings: Settings, batch: int) -> tuple[float, StepLoop]:
    """Median seconds of a decode step of that many rows."""
    loop = StepLoop(build_parts(settings, lambda line: None), settings, NullTelemetry(), time.monotonic)
    for i in range(batch):
        messages = ({"role": "user", "content": f"Tell me story number {i}."},)
        sampling = SamplingParams(seed=i)
        request = Request(f"r{i}", messages, sampling=sampling, max_tokens=STEPS + 60, ignore_eos=True)
        loop.add(Generation(request, Sink(), time.monotonic()))
    while loop.num_waiting or loop.runner.num_rows < batch:
        loop.step()
    times = []
    for _ in range(STEPS):
        began_s = time.perf_counter()
        loop.step()
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[4:]), loop


def model_rows(name: str, settings: Settings, schemas: list[dict[str, Any]]) -> list[Row]:
    steps = {batch: step_s(settings, batch) for batch in (1, 8)}
    loop = steps[1][1]
    loaded = loop._parts.loaded
    began_s = time.perf_counter()
    vocabulary = Vocabulary(loaded.tokenizer, loop.vocab_len, loaded.eos_ids)
    rows = [Row.plain(f"{name}: reading the tokenizer, {loop.vocab_len:,} tokens", time.perf_counter() - began_s, "s")]
    texts = loaded.tokenizer.convert_ids_to_tokens(list(range(min(loop.vocab_len, vocabulary.len))))
    closing = np.array([i in loaded.eos_ids or (t or "").startswith(('"', "}", "]", "@")) for i, t in enumerate(texts)])
    compiler, rng = Compiler(vocabulary), np.random.default_rng(0)
    compile_s, mask_s, num_refused = [], [], 0
    compiler.compile(
        Constraint("json_object"), TIMEOUT_S, lambda: None
    )  # starts the process that grammars are tried in
    for schema in schemas:
        began_s = time.perf_counter()
        try:
            rule = compiler.compile(Constraint("json_schema", json.dumps(schema)), TIMEOUT_S, lambda: None)
        except InvalidRequestError:
            num_refused += 1
            continue
        compile_s.append(time.perf_counter() - began_s)
        mask_s += token_times(rule, vocabulary, closing, rng)
    compiler.close()
    for label, percent in (("median", 50), ("90 %", 90), ("99 %", 99), ("slowest", 100)):
        figure = 1e3 * float(np.percentile(compile_s, percent))
        rows.append(Row.plain(f"{name}: compiling, {label} of {len(schemas)} schemas", figure, "ms"))
    rows.append(Row.plain(f"{name}: schemas refused", num_refused, ""))
    mean_ms = 1e3 * statistics.mean(mask_s)
    for batch, (seconds, _) in steps.items():
        label = f"{name}: rules of {batch} row{'s' * (batch > 1)}, mean, beside a decode step"
        rows.append(Row.at_most(label, batch * mean_ms, "ms", SHARE_TARGET * 1e3 * seconds, baseline=1e3 * seconds))
    rows.append(Row.plain(f"{name}: a token's rule, 99 % of {len(mask_s):,}", 1e3 * np.percentile(mask_s, 99), "ms"))
    rows.append(Row.plain(f"{name}: a token's rule, slowest", 1e3 * max(mask_s), "ms"))
    return rows


def hard_rows(settings: Settings) -> list[Row]:
    """Seconds to the end or first token of each hard constraint, and the longest silence of a stream meanwhile."""
    engine = TurboEngine(settings, build_parts, model_id="embedded")
    engine.start()
    engine.wait_until_ready()
    messages = ({"role": "user", "content": "Write."},)

    def submit(request_id: str, constraint: Constraint | None, max_tokens: int) -> Sink:
        sink = Sink()
        is_free = constraint is None  # goes on after the model's own end, and every token has text
        request = Request(
            request_id,
            messages,
            constraint=constraint,
            max_tokens=max_tokens,
            ignore_eos=is_free,
            skip_special_tokens=not is_free,
        )
        engine.submit(request, sink)
        return sink

    assert submit("first", Constraint("choice", '["a"]'), 4).ended.wait(60)
    rows, gaps = [], []
    for name, constraint in hard_constraints().items():
        free = submit(f"beside {name}", None, 4000)
        assert free.began.wait(60)
        began_s = time.perf_counter()
        sink = submit(name, constraint, 4)
        assert sink.began.wait(60)
        took_s = sink.times_s[0] - began_s
        assert sink.ended.wait(60)
        engine.cancel(f"beside {name}")
        assert free.ended.wait(60)
        gaps.append(max((later - earlier for earlier, later in pairwise(free.times_s)), default=0.0))
        outcome = "refused" if isinstance(sink.last, Failed) and len(sink.times_s) == 1 else "answered"
        rows.append(Row.at_most(f"hard: {name} ({outcome})", took_s, "s", REFUSAL_TARGET_S))
    engine.stop()
    return [*rows, Row.at_most("hard: longest silence of a stream beside them", max(gaps), "s", REFUSAL_TARGET_S)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--schemas", type=int, default=300)
    add_json_option(parser)
    args = parser.parse_args()
    schemas = [*FIXED, *random_schemas(0, max(0, args.schemas - len(FIXED)))]
    rows = []
    for model in ("", *map(str, args.models)):
        name = Path(model).name or "embedded"
        rows += model_rows(name, Settings(model=model, kv_format="f16", kv_budget="1GiB"), schemas)
        print(f"{name} done", flush=True)
    rows += hard_rows(Settings(kv_format="f16", kv_budget="1GiB"))
    print_rows(rows)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
