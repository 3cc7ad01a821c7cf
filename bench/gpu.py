"""Everything about the GPU in one call: kernels built, checked and timed, a profile, whole models end to end.

    python bench/gpu.py [--json FILE] [--only STAGE ...] [--tokens FILE]

Runs the other gpu_* scripts and the tests for real devices, one stage after the other; checks, eight streams among
them, share the machine. Prints all figures as one table at the end. --tokens: the CPU's greedy tokens, which
`bench/gpu_model.py tokens FILE` makes where a CPU is fast; without it they are made here. A stage that fails is
reported, and the others still run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from _rows import Row, add_json_option, print_rows, write_rows

BENCH = Path(__file__).parent
NUM_CHECKERS = 6
NCU_METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "%",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed": "%",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "%",
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active": "%",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "%",
}
Runs = list[tuple[str, list[str]]]


class Stages:
    """Runs commands beside each other and gathers the rows that they write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rows: list[Row] = []

    def run(self, name: str, commands: Sequence[list[str]], timeout_s: float) -> None:
        """Python commands of the bench folder, all at once; each writes its rows with --json."""
        start = time.perf_counter()
        files = [self._folder / f"{name}-{i}.json" for i in range(len(commands))]
        running = [
            subprocess.Popen([sys.executable, str(BENCH / script), *rest, "--json", str(file)])
            for (script, *rest), file in zip(commands, files, strict=True)
        ]
        failed = 0
        for process in running:
            try:
                failed += process.wait(max(1.0, timeout_s - (time.perf_counter() - start))) != 0
            except subprocess.TimeoutExpired:
                process.kill()
                failed += 1
        for file in filter(Path.exists, files):
            self.rows += [Row(**row) for row in json.loads(file.read_text())]
        self._finish(name, failed, start)

    def tests(self, timeout_s: float) -> None:
        """The tests of emulated kernels, run by the device."""
        start = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", "tests/turboquant_kv/gpu"]
        try:
            failed = subprocess.run(command, cwd=BENCH.parent, timeout=timeout_s, check=False).returncode
        except subprocess.TimeoutExpired:
            failed = 1
        self._finish("tests", failed, start)

    def profile(self, timeout_s: float) -> None:
        """Nsight Compute's figures of the decode kernel, where it is installed; clocks and caches left alone."""
        start, failed = time.perf_counter(), 0
        if shutil.which("ncu") is None:
            print("== profile: ncu is not installed, nothing was profiled", flush=True)
            return
        for num_tokens in (1024, 16384, 131072):
            for fmt in ("4/4", "3/3"):
                command = ["ncu", "--clock-control", "none", "--cache-control", "none", "--csv", "--launch-skip", "5"]
                command += ["--kernel-name", "regex:turboquant_decode", "--launch-count", "1"]
                command += ["--metrics", ",".join(NCU_METRICS), sys.executable, str(BENCH / "gpu_attention.py")]
                command += ["--only", "one", "--tokens", str(num_tokens), "--format", fmt]
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
                except subprocess.TimeoutExpired:
                    failed += 1
                    continue
                failed += done.returncode != 0
                for line in done.stdout.splitlines():
                    fields = [field.strip('"') for field in line.split('","')]
                    if len(fields) > 3 and fields[-3] in NCU_METRICS:
                        value = float(fields[-1].replace(",", ""))
                        value *= 1e-3 if fields[-2] in ("ns", "nsecond") else 1.0
                        name = f"profile {num_tokens // 1024}K {fmt} {fields[-3].split('.')[0]}"
                        self.rows.append(Row.plain(name, value, NCU_METRICS[fields[-3]]))
        self._finish("profile", failed, start)

    def _finish(self, name: str, failed: int, start: float) -> None:
        self.rows.append(Row.at_most(f"stage {name} failures", failed, "", 0))
        print(f"== {name}: {time.perf_counter() - start:.0f} s, {failed} failed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--tokens", type=Path, default=Path(tempfile.gettempdir()) / "turboserve-cpu-tokens.json")
    attention, model = "gpu_attention.py", "gpu_model.py"
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(Path(folder))
        available: dict[str, Callable[[], None]] = {
            "checks": lambda: stages.run(
                "checks",
                [
                    [model, "streams", "--tokens", str(args.tokens)],
                    *(
                        [attention, "--only", "checks", "--part", f"{i + 1}/{NUM_CHECKERS}"]
                        for i in range(NUM_CHECKERS)
                    ),
                ],
                200,
            ),
            "speeds": lambda: stages.run("speeds", [[attention, "--only", "speeds", "prefill", "shapes"]], 150),
            "trellis": lambda: stages.run("trellis", [[attention, "--only", "trellis"]], 150),
            "turning": lambda: stages.run("turning", [[attention, "--only", "turning"]], 120),
            "shape32b": lambda: stages.run("shape32b", [[model, "shape32b"]], 240),
            "model": lambda: stages.run("model", [[attention, "--only", "model"]], 120),
            "profile": lambda: stages.profile(60),
            "tests": lambda: stages.tests(300),
        }
        parser.add_argument("--only", nargs="*", default=list(available), choices=list(available))
        args = parser.parse_args()
        if "checks" in args.only and not args.tokens.exists():
            subprocess.run([sys.executable, str(BENCH / model), "tokens", str(args.tokens)], check=True)
        for name in args.only:
            available[name]()
            write_rows(args.json, stages.rows)  # what a time limit cuts off later is not lost
    print_rows(stages.rows)
    missed = [row.name for row in stages.rows if row.met is False]
    print(f"{len(stages.rows)} figures, missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
