"""Coverage-guided fuzzing of one target for so many seconds (targets.py says which there are).

    python -m tests.fuzz.run body --seconds 600

Needs an environment with the server and tests/fuzz/requirements.txt. A failing input is written to the current folder
by libFuzzer, as `crash-...`; `python -m tests.fuzz.run body --input FILE` repeats it without a fuzzer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

INSTRUMENTED = (
    "turboserve.api",
    "turboserve.cache.disk",
    "turboserve.cache.persistence",
    "turboserve.cache.transfers",
    "turboserve.engine.text",
    "turboquant_kv.cache.serialise",
    "turboquant_kv.cache.layer_contents",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("body", "store", "entry", "transfer", "text"))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--input", type=Path)
    args = parser.parse_args()
    if args.input is not None:
        from tests.fuzz.targets import TARGETS

        TARGETS[args.target](args.input.read_bytes())
        return
    import atheris

    # Only our own code is instrumented: what it stands on has fuzzers of its own.
    with atheris.instrument_imports(include=[*INSTRUMENTED]):
        from tests.fuzz.targets import TARGETS, seeds
    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(seeds()[args.target]):
            (Path(corpus) / f"seed-{i}").write_bytes(seed)
        options = [f"-max_total_time={args.seconds}", "-max_len=4096", "-timeout=10", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], corpus, *options], TARGETS[args.target])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
