"""The whole server as its users see it: streaming clients at temperature 1, beside mlx_lm.server with the same weights.

    PYTHONPATH=. python bench/serving.py MODEL_FOLDER --json serving.json
    PYTHONPATH=. python bench/serving.py MODEL_FOLDER --streams 1 8 32 --prompt-tokens 1000 --formats f16 4/4 4/3

Real processes asked over HTTP, one after the other in one run, by the client of `turboserve bench serve`. Each stream
sends one prompt of its own and reads its answer to the end; answers are kept from ending early by a bias against the
model's end tokens. A warm-up of as many streams comes first, so that compiling kernels is no part of the figures. Owns
the choice of servers and the rows; processes are _servers.py's, load and figures turboserve.bench_client's.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from _rows import Row, add_json_option, print_rows, write_rows
from _servers import Served, mlx_lm_server, turboserve
from mlx_lm.utils import load_tokenizer

from turboserve.bench_client import report
from turboserve.bench_client.asking import Target
from turboserve.bench_client.mix import Mix, Pace, Span
from turboserve.bench_client.session import Plan, measure


def measured(served: Served, model: str, mix: Mix, streams: list[int]) -> dict[int, tuple[float, float]]:
    """(tokens/s of all streams together, median seconds to the first text) by number of streams.

    Raises SystemExit when a request fails.
    """
    found = {}
    for num_streams in streams:
        own = replace(mix, seed=num_streams)  # no prompt comes twice, or the second is answered from a cache
        plan = Plan(own, Pace(num_streams, num_requests=num_streams), warm_up=num_streams)
        (server,) = measure(plan, [Target(f"{served.url}/v1", model)])
        if server.has_failed:
            raise SystemExit("\n".join([served.name, *report.notes(plan, server)]))
        figures = server.medians
        found[num_streams] = figures["tokens_per_s"], figures["ttft_p50_s"]
        print(f"{served.name} {num_streams} streams: {figures['tokens_per_s']:.1f} tokens/s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--formats", nargs="+", default=["4/4"])
    add_json_option(parser)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    end_tokens = tuple(int(i) for i in tokenizer.eos_token_ids)
    prompts, answers = (Span(n, n) for n in (arguments.prompt_tokens, arguments.answer_tokens))
    mix = Mix(prompts, answers, end_tokens=end_tokens)
    name, path = arguments.model.resolve().name, str(arguments.model)
    rows = []
    with tempfile.TemporaryDirectory() as cache_dir:
        with mlx_lm_server(arguments.model) as served:
            rival = measured(served, path, mix, arguments.streams)
        for fmt in arguments.formats:
            server: AbstractContextManager[Served] = turboserve(Path(cache_dir), path, "--kv-format", fmt)
            with server as served:
                ours = measured(served, name, mix, arguments.streams)
            for n, (rate, ttft_s) in ours.items():
                base_rate, base_ttft_s = rival[n]
                rows.append(Row.plain(f"{fmt}, {n} streams: all tokens/s beside mlx_lm.server", rate, "1/s", base_rate))
                rows.append(Row.plain(f"{fmt}, {n} streams: median TTFT", ttft_s, "s", base_ttft_s))
    print_rows(rows)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
