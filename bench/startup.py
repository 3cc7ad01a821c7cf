"""How long from starting the server to its first answer, and whether that one waits for more than a second one does.

    python bench/startup.py --json startup.json
    python bench/startup.py --model FOLDER --json startup.json

A real server process with the embedded model, or another, answers one short request; once with an empty cache folder,
which adds the calibration and a GPU's trial and compiling, and then with a filled one. Then come two longer prompts of
one token's answer, unlike each other, on a server that has answered nothing yet. Medians over --runs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import Any

from _rows import Row, add_json_option, print_rows, write_rows

TARGET_S = 10.0
WARM_TARGET = 1.25  # of the first request's time over the second's; both are computed alike, and timers shake
WORDS = ["apple", "river", "stone", "cloud", "tiger", "metal", "forest", "silver", "window", "garden"]


def asked(url: str, content: str, **options: float) -> float:
    """Seconds of one whole answer."""
    body = {"messages": [{"role": "user", "content": content}], **options}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as reply:
        assert json.load(reply)["usage"]["completion_tokens"]
    return time.perf_counter() - started


def started_server(model: str, cache_dir: str, questions: list[dict[str, Any]]) -> list[float]:
    """Start, ask one after the other as soon as the server says it is ready, stop.

    Seconds from the start to the first answer, then of each answer by itself.
    """
    started = time.perf_counter()
    command = [sys.executable, "-m", "turboserve", "serve", *([model] if model else []), "--port", "0"]
    command += ["--cache-dir", cache_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url = next(m.group(1) for line in process.stdout if (m := re.match(r"Ready: \S+ at (http\S+)", line)))
        seconds = []
        for question in questions:
            seconds.append(asked(url, **question))
            if len(seconds) == 1:
                elapsed = time.perf_counter() - started
        process.terminate()
    return [elapsed, *seconds]


def long_questions(seed: int) -> list[dict[str, Any]]:
    """Two prompts of some 120 tokens that share no beginning."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choice(WORDS) for _ in range(100)) for _ in range(2)]
    return [{"content": text, "temperature": 1, "top_p": 0.95, "max_tokens": 1} for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder; by default the embedded model")
    parser.add_argument("--runs", type=int, default=3)
    add_json_option(parser)
    args = parser.parse_args()
    first, later, warm = [], [], []
    hello = [{"content": "Hello!", "temperature": 0, "max_tokens": 64}]
    for run in range(args.runs):
        with tempfile.TemporaryDirectory() as cache_dir:
            first.append(started_server(args.model, cache_dir, hello)[0])
            later.append(started_server(args.model, cache_dir, hello)[0])
            warm.append(started_server(args.model, cache_dir, long_questions(run))[1:])
    firsts, seconds = (statistics.median(column) for column in zip(*warm, strict=True))
    rows = [
        Row.at_most("first answer, first start (calibrates)", statistics.median(first), "s", TARGET_S),
        Row.at_most("first answer, later starts", statistics.median(later), "s", TARGET_S),
        Row.at_most("first request beside the second", firsts, "s", WARM_TARGET * seconds, seconds),
    ]
    print_rows(rows)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
