"""How long from starting the server to its first answer, on an installed checkout.

    python bench/startup.py --json startup.json

A real server process with the embedded model answers one short request; once with an empty cache folder, which adds
the calibration, and then with a filled one. Medians over --runs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

from _rows import Row, add_json_option, print_rows, write_rows

TARGET_S = 10.0
QUESTION = {"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0}


def seconds_to_first_answer(cache_dir: str) -> float:
    """Start, ask as soon as the server says it is ready, stop."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "turboserve", "serve", "--port", "0", "--cache-dir", cache_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url = next(m.group(1) for line in process.stdout if (m := re.match(r"Ready: \S+ at (http\S+)", line)))
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(QUESTION).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.load(reply)["choices"][0]["message"]["content"]
        elapsed = time.perf_counter() - started
        process.terminate()
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    add_json_option(parser)
    args = parser.parse_args()
    first, later = [], []
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as cache_dir:
            first.append(seconds_to_first_answer(cache_dir))
            later.append(seconds_to_first_answer(cache_dir))
    rows = [
        Row.at_most("first answer, first start (calibrates)", statistics.median(first), "s", TARGET_S),
        Row.at_most("first answer, later starts", statistics.median(later), "s", TARGET_S),
    ]
    print_rows(rows)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
