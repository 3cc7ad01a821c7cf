"""Three servers on one CPU, side by side: TurboServe, mlx_lm.server and llama.cpp, with the same model.

    python bench/cpu_server.py --model FOLDER --json cpu_server.json \\
        --llama-cpp "python -m llama_cpp.server --model FILE.gguf --n_ctx 9216 --n_threads 2 \\
            --interrupt_requests False --port {port}"

Each figure is a median over rounds in which the servers are asked in turn, so that a ratio compares neighbours in time.
--llama-cpp is a command, in which {port} stands for a free port, or the URL of a server that runs already, whose memory
is not read then. mlx_lm.server is asked for short prompts only: on a CPU it takes minutes for others. Prompts begin
differently each time, so that nobody reads them from a cache. After --minutes no other round begins. Linux only.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
from _rows import Row, add_json_option, print_rows, write_rows
from _servers import Reply, Served, foreign_server, mlx_lm_server, turboserve

OURS, MLX, LLAMA = "turboserve", "mlx_lm.server", "llama.cpp"
DECODE_TARGETS = {140: 1.2, 1500: 1.2, 8000: 2.0}  # times llama.cpp's speed, by the prompt's tokens
PREFILL_TARGETS = {140: 1.0, 1500: 1.0}
STREAMS, STREAM_TOKENS, STREAMS_TARGET = 8, 341, 1.5
MEMORY_TARGET = 1.1  # times llama.cpp's resident memory after the longest prompt
MLX_TOKENS = 140
MOST_ANSWERS = 12  # to one prompt, until one is long enough to say how fast it was
WORDS = ("river", "stone", "window", "garden", "winter", "summer", "letter", "island", "market", "mountain", "shadow")
TOKENS_A_WORD = 1.1  # of these words; how many a prompt has, the servers say


@dataclass
class Bench:
    """The servers that are asked, and what they said, by (server, tokens)."""

    servers: dict[str, Served]
    answer_tokens: int
    rng: random.Random
    decode: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    prefill: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    streams: dict[str, list[float]] = field(default_factory=dict)

    def prompt(self, num_tokens: int) -> str:
        words = [self.rng.choice(WORDS) for _ in range(int(num_tokens / TOKENS_A_WORD))]
        return f"{self.rng.getrandbits(32)} Tell a long story with these words: {' '.join(words)}"

    def ask(self, name: str, prompt: str) -> Reply:
        reply = self.servers[name].ask([{"role": "user", "content": prompt}], self.answer_tokens, temperature=1)
        if reply.error:
            raise SystemExit(f"{name}: {reply.error}")
        return reply

    def one_stream(self, num_tokens: int) -> None:
        """Each server in turn."""
        prompt = self.prompt(num_tokens)
        for name in self.servers:
            if name == MLX and num_tokens > MLX_TOKENS:
                continue
            reply = self.ask(name, prompt)
            self.prefill.setdefault((name, num_tokens), []).append(num_tokens / reply.ttft_s)
            for _ in range(MOST_ANSWERS):
                if reply.num_pieces > self.answer_tokens // 4:  # an answer that ends at once says nothing of speed
                    speed = (reply.num_pieces - 1) / (reply.last_s - reply.ttft_s)
                    self.decode.setdefault((name, num_tokens), []).append(speed)
                    break
                reply = self.ask(name, prompt)  # which it now has in its cache

    def many_streams(self) -> None:
        """Tokens per second of several streams in all, from the first byte sent to the last read."""
        for name in self.servers:
            if name == MLX:
                continue
            prompts = [self.prompt(STREAM_TOKENS) for _ in range(STREAMS)]
            began_s = time.perf_counter()
            with ThreadPoolExecutor(STREAMS) as pool:
                total = sum(reply.num_pieces for reply in pool.map(partial(self.ask, name), prompts))
            self.streams.setdefault(name, []).append(total / (time.perf_counter() - began_s))

    def rows(self, tokens: list[int]) -> list[Row]:
        rows = []
        for n in tokens:
            rows += self._compared(f"decode of one stream at {n} tokens", self.decode, n, DECODE_TARGETS.get(n))
            rows += self._compared(f"prefill of {n} tokens", self.prefill, n, PREFILL_TARGETS.get(n))
        if LLAMA in self.streams:
            by_name = {(name, STREAMS): values for name, values in self.streams.items()}
            text = f"{STREAMS} streams of {STREAM_TOKENS} tokens, in all"
            rows += self._compared(text, by_name, STREAMS, STREAMS_TARGET)
        return rows + self._memory()

    def _compared(
        self, text: str, speeds: dict[tuple[str, int], list[float]], key: int, target: float | None
    ) -> list[Row]:
        rows, ours = [], speeds.get((OURS, key))
        for rival in (LLAMA, MLX):
            theirs = speeds.get((rival, key))
            if ours and theirs:
                value, base = statistics.median(ours), statistics.median(theirs)
                bound = target * base if rival == LLAMA and target is not None else None
                rows.append(Row.at_least(f"{text}, beside {rival}", value, "tok/s", bound, base))
        return rows

    def _memory(self) -> list[Row]:
        resident = {name: served.resident_bytes / 2**20 for name, served in self.servers.items()}
        ours, theirs = resident[OURS], resident.get(LLAMA, 0.0)
        if not ours:  # it has ended, as after an interrupt
            return []
        if not theirs:
            return [Row.plain("resident memory", ours, "MiB")]
        return [Row.at_most("resident memory, beside llama.cpp", ours, "MiB", MEMORY_TARGET * theirs, theirs)]


def running(args: argparse.Namespace, stack: ExitStack) -> dict[str, Served]:
    """The servers that are wanted, ours first."""
    cache_dir = Path(args.cache_dir or stack.enter_context(tempfile.TemporaryDirectory()))
    flags = [str(args.model), "--max-context-tokens", str(args.context), "--kv-budget", args.kv_budget, *args.flags]
    servers = {OURS: stack.enter_context(turboserve(cache_dir, *flags))}
    if args.llama_cpp.startswith(("http://", "https://")):
        url = args.llama_cpp.rstrip("/").removesuffix("/v1")
        httpx.get(f"{url}/v1/models", timeout=10).raise_for_status()
        servers[LLAMA] = Served(LLAMA, _NoProcess(), url)  # type: ignore[arg-type]  # nothing of it is asked for
    elif args.llama_cpp:
        servers[LLAMA] = stack.enter_context(foreign_server(LLAMA, shlex.split(args.llama_cpp)))
    if args.mlx_lm:
        servers[MLX] = stack.enter_context(mlx_lm_server(args.model))
    return servers


class _NoProcess:
    """In place of a process that was there before."""

    pid = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder in MLX's format")
    parser.add_argument("--llama-cpp", default="", metavar="COMMAND_OR_URL", help="its server, with the same model")
    parser.add_argument("--mlx-lm", action="store_true", help="ask mlx_lm.server as well")
    parser.add_argument("--tokens", default="140,1500,8000", help="lengths of prompts of one stream")
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=30, help="after which no other round begins")
    parser.add_argument("--no-streams", action="store_true", help=f"leave out {STREAMS} streams at once")
    parser.add_argument("--context", type=int, default=9216, help="of our server; llama.cpp's is in its command")
    parser.add_argument("--kv-budget", default="1GiB")
    parser.add_argument("--cache-dir", help="of our server, to be kept")
    parser.add_argument("flags", nargs="*", help="more flags for our server, after --")
    add_json_option(parser)
    args = parser.parse_args()
    tokens = [int(n) for n in args.tokens.split(",") if n]
    with ExitStack() as stack:
        bench = Bench(running(args, stack), args.answer_tokens, random.Random())
        for name in bench.servers:
            bench.ask(name, bench.prompt(20))  # what is slower once
        latest_s = time.monotonic() + 60 * args.minutes
        try:
            for i in range(args.rounds):
                if i and time.monotonic() > latest_s:
                    print(f"{args.minutes:g} minutes are over: medians of {i} rounds")
                    break
                for n in tokens:
                    if n <= 2000 or i < (args.rounds + 1) // 2:  # long prompts take most of the time
                        bench.one_stream(n)
                if not args.no_streams and i < (args.rounds + 1) // 2:
                    bench.many_streams()
        except KeyboardInterrupt:
            print("interrupted: medians of the rounds until here")
        rows = bench.rows(tokens)
        if bench.servers[OURS].resident_bytes:  # not after an interrupt
            print(f"prompts: {bench.servers[OURS].stats()['details']['prompts']}")
    print_rows(rows)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
