"""The stress run: an unlimited engine's answers, then the same conversations in a tight budget, killed half-way.

    python -m tests.stress.run                              what the test suite runs
    python -m tests.stress.run --ranks 2                    the tight budget in two processes, each with half the heads
    python -m tests.stress.run --conversations 512 --turns 4 --clients 32 --held 12 --kills 3

Owns the processes and the judgement. The budget holds `--held` conversations of average size; every answer must be
the unlimited engine's, but for places where the model has no preference; memory must be within the budget at every
step, and all books agree (see `child.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.stress.child import Answer, Answers, Job, read_answers
from tests.turboserve.distributed.processes import free_ports

ROOT = Path(__file__).resolve().parents[2]
CHILD_TIMEOUT_S = 1800.0
FOLLOWER_END_S = 30.0  # for a rank to see that rank 0 is gone; a loaded machine takes its time
MiB = 1 << 20
# Codes made from sums in another order may differ in a step, which was seen to move a token's lead by less than 0.02
# standard deviations of the logits. A wrong cache gets this excuse by chance in one answer of six or fewer.
TIE = 6e-2
MAX_TIES_SHARE = 0.05  # of all answers


@dataclass(frozen=True)
class Load:
    """How much is asked for."""

    num_conversations: int = 64
    num_turns: int = 2
    num_forks: int = 8
    num_clients: int = 16
    num_held: int = 12  # conversations of average size that the budget has room for
    num_kills: int = 1
    seed: int = 0
    num_ranks: int = 1  # that share the model in the tight budget; the unlimited engine has all of it


@dataclass
class Outcome:
    """Figures of a run that passed."""

    budget_bytes: int = 0
    reports: list[dict[str, Any]] = field(default_factory=list)
    num_answers: int = 0
    num_ties: int = 0  # of them, answers that parted from the unlimited engine's without a preference of the model
    unlimited_s: float = 0.0
    tight_s: float = 0.0

    @property
    def last(self) -> dict[str, Any]:
        return self.reports[-1]


class StressError(AssertionError):
    """A child's own complaint, or answers that differ."""


def stress(load: Load, folder: Path, cache_dir: Path) -> Outcome:
    """Run and judge. Raises StressError with what went wrong."""
    outcome = Outcome()
    started = time.monotonic()
    expected, average_bytes = unlimited(load, folder, cache_dir)
    outcome.unlimited_s = time.monotonic() - started
    outcome.budget_bytes = int(average_bytes * load.num_held)
    answers = folder / "tight.jsonl"
    job = make_job(
        load,
        answers,
        cache_dir,
        kv_budget=str(outcome.budget_bytes),
        kv_store_dir=str(folder / "store"),
        kv_store_write_rate="1GiB",
    )
    job = replace(job, history=str(folder / "unlimited.jsonl"))  # one answer that parts must not change the next
    if load.num_ranks > 1:
        outcome.budget_bytes //= load.num_ranks  # of a rank, which has that part of the heads
        own = {"kv_budget": str(outcome.budget_bytes), "distributed": True}
        job = replace(job, settings={**job.settings, **own}, num_ranks=load.num_ranks)
    started = time.monotonic()
    for kill in range(load.num_kills):
        run_until_killed(job, folder, answers, len(expected) * (kill + 1) // (load.num_kills + 1))
    outcome.reports.append(run_to_end(job, folder))
    outcome.tight_s = time.monotonic() - started
    outcome.num_ties = compare(expected, read_answers(answers))
    outcome.num_answers = len(expected)
    return outcome


def unlimited(load: Load, folder: Path, cache_dir: Path) -> tuple[Answers, float]:
    """All answers with ample memory, and the average KV bytes of a conversation in the end."""
    answers = folder / "unlimited.jsonl"
    report = run_to_end(make_job(load, answers, cache_dir, kv_budget="16GiB"), folder)
    stats = report["stats"]
    num_held = stats["num_conversations"]["memory"]
    kv = stats["kv"]
    total = kv["compressed"] + kv["exact"] + kv["uncompressed"]
    if num_held < load.num_conversations:
        raise StressError(f"without a limit only {num_held} of {load.num_conversations} conversations were kept")
    return read_answers(answers), total / num_held


def make_job(load: Load, answers: Path, cache_dir: Path, **settings: str) -> Job:
    return Job(
        answers=str(answers),
        settings={
            "kv_format": "4/3",
            "cache_dir": str(cache_dir),
            "prefill_chunk_tokens": 128,
            "max_running": 8,
            "max_queued": 10_000,
            **settings,
        },
        num_conversations=load.num_conversations,
        num_turns=load.num_turns,
        num_forks=load.num_forks,
        seed=load.seed,
        num_clients=load.num_clients,
        order_seed=secrets.randbelow(1 << 30),
    )


@contextmanager
def start(job: Job, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The engine's process; those of other ranks have ended as well when this is over. Raises StressError."""
    file, ring = folder / "job.json", folder / "ring.json"
    file.write_text(json.dumps(asdict(job)), "utf-8")
    ring.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(job.num_ranks)]))
    paths = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    env = {**os.environ, "PYTHONPATH": paths}

    def one(rank: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.stress.child", str(file)],
            cwd=ROOT,
            env=env if job.num_ranks == 1 else {**env, "MLX_HOSTFILE": str(ring), "MLX_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if rank else subprocess.PIPE,
            text=True,
        )

    with ExitStack() as stack:
        others = [stack.enter_context(one(rank)) for rank in range(1, job.num_ranks)]
        with one(0) as process:
            yield process
        for other in others:
            try:
                other.wait(timeout=FOLLOWER_END_S)
            except subprocess.TimeoutExpired:
                other.kill()
                raise StressError("a rank stayed when rank 0 was gone") from None


def run_to_end(job: Job, folder: Path) -> dict[str, Any]:
    """The child's report. Raises StressError with its complaints."""
    with start(job, folder) as process:
        try:
            _, complaints = process.communicate(timeout=CHILD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise StressError("the engine hung") from None
    if process.returncode != 0:
        raise StressError(complaints[-6000:])
    report: dict[str, Any] = json.loads(Path(job.answers).with_suffix(".report.json").read_text("utf-8"))
    return report


def run_until_killed(job: Job, folder: Path, answers: Path, num_answers: int) -> None:
    """Kill without warning once that many answers were given."""
    with start(job, folder) as process:
        while process.poll() is None and count_lines(answers) < num_answers:
            time.sleep(0.01)
        if process.poll() is not None:
            assert process.stderr is not None
            raise StressError(f"ended before it could be killed: {process.stderr.read()[-6000:]}")
        process.kill()
        process.communicate()


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare(expected: Answers, found: Answers) -> int:
    """How many answers part at a tie. Raises StressError unless all others are equal."""
    if expected.keys() != found.keys():
        raise StressError(f"not answered: {sorted(expected.keys() - found.keys())}")
    parted = [key for key in sorted(expected) if expected[key].text != found[key].text]
    wrong = [key for key in parted if not parts_at_a_tie(expected[key], found[key])]
    if wrong:
        shown = "\n".join(f"{key}: {expected[key]} became {found[key]}" for key in wrong[:5])
        raise StressError(f"{len(wrong)} of {len(expected)} answers differ:\n{shown}")
    if len(parted) > max(1, MAX_TIES_SHARE * len(expected)):
        raise StressError(f"{len(parted)} of {len(expected)} answers differ at ties: too many to be chance")
    return len(parted)


def parts_at_a_tie(expected: Answer, found: Answer) -> bool:
    """Whether the first token that differs was as good as another."""
    pairs = zip(expected.tokens, found.tokens, expected.leads, strict=False)
    lead = next((lead for a, b, lead in pairs if a != b), None)
    return lead is not None and lead <= TIE


def summary(outcome: Outcome) -> str:
    stats, watch = outcome.last["stats"], outcome.last["watch"]
    counts = {kind: reasons for kind, reasons in stats["events"].items() if isinstance(reasons, dict)}
    events = ", ".join(f"{kind} {sum(reasons.values())}" for kind, reasons in counts.items())
    found, queried = stats["events"]["prefix_hit_tokens"], stats["events"]["prefix_query_tokens"]
    return (
        f"{outcome.num_answers - outcome.num_ties} answers equal, {outcome.num_ties} part at ties; "
        f"unlimited {outcome.unlimited_s:.1f} s, tight {outcome.tight_s:.1f} s\n"
        f"budget {outcome.budget_bytes / MiB:.1f} MiB, at most {watch['most_committed'] / MiB:.1f} committed, "
        f"{watch['most_allocated'] / MiB:.1f} allocated, in {watch['num_steps']} steps after the last restart\n"
        f"{events}; prompt tokens found {found} of {queried}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=Load.num_conversations)
    parser.add_argument("--turns", type=int, default=Load.num_turns)
    parser.add_argument("--forks", type=int, default=Load.num_forks)
    parser.add_argument("--clients", type=int, default=Load.num_clients)
    parser.add_argument("--held", type=int, default=Load.num_held)
    parser.add_argument("--kills", type=int, default=Load.num_kills)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--ranks", type=int, default=Load.num_ranks, help="processes that share the model")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/turboserve").expanduser())
    args = parser.parse_args()
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    print(f"seed {seed}")
    load = Load(args.conversations, args.turns, args.forks, args.clients, args.held, args.kills, seed, args.ranks)
    with tempfile.TemporaryDirectory() as folder:
        print(summary(stress(load, Path(folder), args.cache_dir)))


if __name__ == "__main__":
    main()
