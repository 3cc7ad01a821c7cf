"""Makes docs/compatibility.md: what becomes of every model type of the installed mlx-lm.

    python -m tests.compatibility.table                 try all types and write the table
    python -m tests.compatibility.table llama gemma2    try these alone and put their lines into the table

Types are tried in processes of their own, two at a time, so that one that ends its process or hangs costs only its
own line. Weights are random, and new for every run unless --seed is given.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from turboquant_kv import blas

if __name__ == "__main__":
    blas.interpose()  # before mlx is imported

from tests.compatibility.configs import model_types
from tests.compatibility.outcome import COMPRESSED, CRASHED, EXACT, MIXED, NOT_HAD, REFUSED, WRONG, Outcome, try_out

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "compatibility.md"
TIMEOUT_S = 120.0  # of one type; only a hang reaches it
NUM_WORKERS = 2
DIVIDER = "| --- | --- | --- | --- | --- |"
INTRODUCTION = """# Model types

What becomes of every model type of mlx-lm {version}: each is built with a few layers of random weights, loaded as
`turboserve serve` loads it, and answers three requests of different lengths, alone and together. Made by
`python -m tests.compatibility.table`; `tests/compatibility/test_table.py` compares a sample of its lines.

- **KV cache**: *compressed* in all layers or *mixed* (so many of so many layers, the others as mlx-lm keeps them) in
  the default format; *exact only*: the default format is refused or finds nothing to compress, `--kv-format f16`
  serves; *refused*: neither does.
- **rows**: whether requests that decode *together* in one batch get the answers they get alone, or decode *row by row*.
  *WRONG* is a fault. First in the default format, then uncompressed (`f16`).
- Real models of a type may have other head sizes than the 64 dimensions here, and layers of other kinds.
- Uncompressed answers are compared with mlx-lm's own; compressed ones must be far closer to these than to what mlx-lm
  says of another prompt. The table is of Linux on a CPU: what needs Metal is not tried.

"""


class Worker:
    """A process that tries one type after another."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._process: subprocess.Popen[str] | None = None

    def outcome(self, model_type: str) -> Outcome:
        found = self._ask(model_type, "")
        if isinstance(found, Outcome):
            return found
        again = self._ask(model_type, found)
        return again if isinstance(again, Outcome) else Outcome(model_type, CRASHED, why=again)

    def _ask(self, model_type: str, died: str) -> Outcome | str:
        """The outcome, or what the process died of."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([model_type, died]) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            is_there = selector.select(TIMEOUT_S)
        line = process.stdout.readline() if is_there else ""
        if line:
            return Outcome(**json.loads(line))
        end = f"the process ends by {_signal_of(process)}" if is_there else f"no answer in {TIMEOUT_S:.0f} s"
        self.close()
        return end

    def _start(self) -> subprocess.Popen[str]:
        paths = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
        return subprocess.Popen(
            [sys.executable, "-m", "tests.compatibility.table", "--work", "--seed", str(self._seed)],
            cwd=ROOT,
            # One thread each: there are as many processes as a small machine has cores.
            env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("COMPATIBILITY_LOG") else subprocess.DEVNULL,
            text=True,
        )

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


def _signal_of(process: subprocess.Popen[str]) -> str:
    process.wait()
    return signal.Signals(-process.returncode).name if process.returncode < 0 else f"status {process.returncode}"


def work(seed: int) -> None:
    """The worker's side: types on standard input, outcomes as lines of JSON on what was standard output."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # model files print
    logging.basicConfig(level=logging.WARNING)
    for line in sys.stdin:
        model_type, died = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            outcome = try_out(model_type, Path(folder) / "MODEL", seed, died)
        print(json.dumps(asdict(outcome)), file=out, flush=True)


def try_all(types: Sequence[str], seed: int, num_workers: int = NUM_WORKERS) -> list[Outcome]:
    """Outcomes in the order of `types`."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in types:
        todo.put(name)
    found: dict[str, Outcome] = {}

    def run() -> None:
        worker = Worker(seed)
        try:
            while True:
                name = todo.get_nowait()
                began_s = time.monotonic()
                found[name] = worker.outcome(name)
                print(f"{time.monotonic() - began_s:5.1f} s  {row(found[name])}", file=sys.stderr, flush=True)
        except queue.Empty:
            pass
        finally:
            worker.close()

    threads = [threading.Thread(target=run) for _ in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[name] for name in types]


def row(outcome: Outcome) -> str:
    """Its line of the table, without figures that change from run to run."""
    kv = f"{outcome.kv}, {outcome.layers}" if outcome.kv == MIXED else outcome.kv
    rows, exact = (text.split(":")[0] for text in (outcome.rows, outcome.exact_rows))
    if outcome.kv in (EXACT, REFUSED):  # there is no other format
        rows = ""
    why = outcome.why.replace("|", "\\|")
    return f"| `{outcome.model_type}` | {kv} | {rows} | {exact} | {why} |".replace("|  |", "| |").replace("|  |", "| |")


def table_of(rows: Sequence[str]) -> str:
    """The whole page of these lines, in their order."""
    counts = Counter(line.split("|")[2].split(",")[0].strip() for line in rows)
    order = (COMPRESSED, MIXED, EXACT, REFUSED, CRASHED, NOT_HAD)
    counted = ", ".join(f"{counts[kv]} {kv}" for kv in order if counts[kv])
    num_wrong = sum(f"| {WRONG} |" in line for line in rows)
    head = f"{len(rows)} types: {counted}; {num_wrong} with wrong answers.\n"
    lines = [head, "| type | KV cache | rows | rows in f16 | why |", DIVIDER, *rows]
    return INTRODUCTION.format(version=metadata.version("mlx-lm")) + "\n".join(lines) + "\n"


def rows_in(text: str) -> dict[str, str]:
    """The lines of a table by type."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--workers", type=int, default=NUM_WORKERS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    if args.work:
        work(seed)
        return
    print(f"seed {seed}", file=sys.stderr)
    outcomes = try_all(args.types or model_types(), seed, args.workers)
    for outcome in outcomes:
        for text in {outcome.rows, outcome.exact_rows}:
            if text.startswith(WRONG):
                print(f"{outcome.model_type}: {text}")
    rows = rows_in(TABLE.read_text("utf-8")) if args.types and TABLE.exists() else {}
    rows |= {outcome.model_type: row(outcome) for outcome in outcomes}
    TABLE.write_text(table_of([rows[name] for name in model_types() if name in rows]), "utf-8")


if __name__ == "__main__":
    main()
