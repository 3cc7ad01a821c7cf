"""What kept conversations cost and save: second turns, conversations in a budget, and the end of memory.

    python bench/sessions.py --json sessions.json
    python bench/sessions.py --tokens 1024 --held-tokens 512 --held-budget-mib 32

Real server processes with the embedded model, in float32 as a CPU runs it, asked over HTTP. `mlx_lm.server`, prompt
cache on, gets the same weights, BLAS and requests in the same run. Parts: `turns` (time to the first token of a cold
prompt, of the next turn, and of the turn after a restart), `held` (conversations kept in one budget, per format),
`memory` (resident memory per conversation; both servers with little memory left). Linux only.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _rows import Row, add_json_option, print_rows, write_rows
from _servers import Messages, Reply, Served, mlx_lm_server, turboserve

from turboquant_kv import blas

blas.interpose()  # before mlx is imported

from mlx_lm.utils import load_config, save

from turboserve.models.tiny import MODEL_PATH
from turboserve.models.tiny.evaluate import CACHE_DIR, load
from turboserve.models.tiny.prompts import load_texts

MEMORY_TARGET, DISK_TARGET = 0.05, 0.20  # of the cold time to the first token
HELD_TARGET = 4.0  # conversations in one budget, times those of the f16 format
FORMATS = ("f16", "4/4", "4/3")
ANSWER_TOKENS = 12
QUESTIONS = ("What is this text about?", "Say it in one word.", "Why?")
MiB = 1 << 20
NUM_IDLE = 8  # conversations whose resident memory is averaged
KV_LIMIT, MEMORY_LEFT = 64 * MiB, 256 * MiB  # when memory runs out: for KV caches, and for the process in all


class Library:
    """Distinct long prompts cut from the held-out texts."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer
        text = "\n\n".join(item.text for item in load_texts())
        self._ids: list[int] = tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]

    def prompt(self, index: int, num_tokens: int) -> str:
        """About `num_tokens` tokens that no other index begins with."""
        head = f"Document {index}. "
        start = (index * 997) % len(self._ids)
        ids = (self._ids[start:] + self._ids * (num_tokens // len(self._ids) + 1))[:num_tokens]
        return head + str(self._tokenizer.decode(ids))  # type: ignore[attr-defined]


def say(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def checked(reply: Reply) -> Reply:
    """The reply. Raises SystemExit when it is none: a figure of failed requests means nothing."""
    if reply.error:
        raise SystemExit(f"a request failed: {reply.error}")
    return reply


class Talk:
    """One conversation, turn by turn."""

    def __init__(self, text: str) -> None:
        self._text, self._turn = text, 0
        self._messages: Messages = []

    def next(self, server: Served) -> Reply:
        question = QUESTIONS[self._turn]
        self._messages.append(say(question if self._turn else f"{self._text}\n\n{question}"))
        reply = checked(server.ask(self._messages, ANSWER_TOKENS))
        self._messages.append({"role": "assistant", "content": reply.text})
        self._turn += 1
        return reply


def median_ttft(replies: Sequence[Reply]) -> float:
    return statistics.median(reply.ttft_s for reply in replies)


def turn_rows(library: Library, rival_folder: Path, num_tokens: int, rounds: int) -> list[Row]:
    """Cold and second turns of both servers; the third turn of ours comes after a restart."""
    talks = [Talk(library.prompt(index, num_tokens)) for index in range(rounds)]
    with tempfile.TemporaryDirectory() as store:
        flags = ("--kv-store-dir", store, "--kv-store-write-rate", "4GiB")
        with turboserve(CACHE_DIR, *flags) as server:
            checked(server.ask([say("Hello!")], 4))  # what the first request alone pays for
            cold, warm = [], []
            for talk in talks:
                cold.append(talk.next(server))
                warm.append(talk.next(server))
            wait_until_stored(server)
        with turboserve(CACHE_DIR, *flags) as server:
            checked(server.ask([say("Hello!")], 4))
            restored = [talk.next(server) for talk in talks]
    print(f"cold prompts of {cold[0].prompt_tokens} tokens; cached in turn 2: {warm[0].cached_tokens}, "
          f"in turn 3 after the restart: {restored[0].cached_tokens} of {restored[0].prompt_tokens}")  # fmt: skip
    base = median_ttft(cold)
    rows = [
        Row.plain("first token, cold", base, "s"),
        Row.at_most("first token, second turn, memory", median_ttft(warm), "s", MEMORY_TARGET * base, base),
        Row.at_most("first token, turn after restart, disk", median_ttft(restored), "s", DISK_TARGET * base, base),
    ]
    with mlx_lm_server(rival_folder) as server:
        checked(server.ask([say("Hello!")], 4))
        rivals = [Talk(library.prompt(index, num_tokens)) for index in range(rounds)]
        pairs = [(talk.next(server), talk.next(server)) for talk in rivals]
    rival_cold, rival_warm = (median_ttft(replies) for replies in zip(*pairs, strict=True))
    rows.append(Row.plain("first token, cold, mlx_lm.server", rival_cold, "s", base))
    rows.append(Row.plain("first token, second turn, mlx_lm.server", rival_warm, "s", rival_cold))
    return rows


def wait_until_stored(server: Served) -> None:
    """Until the disk store has stopped growing."""
    before = -1
    while (now := server.stats()["disk"]["bytes"]) != before:
        before = now
        time.sleep(1.0)


def held_rows(library: Library, num_tokens: int, budget_bytes: int) -> list[Row]:
    """How many conversations of one length stay in memory, and what each takes."""
    rows: list[Row] = []
    base: float | None = None
    for fmt in FORMATS:
        with turboserve(CACHE_DIR, "--kv-format", fmt, "--kv-budget", str(budget_bytes)) as server:
            held = fill(server, lambda index: library.prompt(index, num_tokens))
            kv = server.stats()["kv_bytes"]["total"]
        target = None if base is None else HELD_TARGET * base
        label = f"conversations of {num_tokens} in {budget_bytes // MiB} MiB, {fmt}"
        rows.append(Row.at_least(label, held, "", target, base))
        rows.append(Row.at_most(f"KV bytes then held, {fmt}", kv, "bytes", budget_bytes, budget_bytes))
        base = base or held
    return rows


def fill(server: Served, prompt: Callable[[int], str]) -> int:
    """New conversations until one more no longer raises the number held; that number."""
    most, without_growth, index = 0, 0, 0
    while without_growth < 3:
        checked(server.ask([say(prompt(index))], 4))
        index += 1
        held = server.stats()["num_conversations"]["memory"]
        without_growth = 0 if held > most else without_growth + 1
        most = max(most, held)
    return most


def memory_rows(library: Library, rival_folder: Path, num_tokens: int, num_talks: int) -> list[Row]:
    """Resident memory per idle conversation, then many at once with little memory left."""
    grown: dict[str, float] = {}
    for server_of in (turboserve(CACHE_DIR), mlx_lm_server(rival_folder)):
        with server_of as server:
            checked(server.ask([say(library.prompt(99, num_tokens))], 4))  # scratch of prefill is not a conversation's
            before = server.resident_bytes
            for index in range(NUM_IDLE):
                checked(server.ask([say(library.prompt(index, num_tokens))], 4))
            grown[server.name] = (server.resident_bytes - before) / NUM_IDLE
    base = grown["mlx_lm.server"]
    rows = [Row.plain(f"resident per conversation of {num_tokens}, {n}", b, "bytes", base) for n, b in grown.items()]
    limited = (
        turboserve(CACHE_DIR, "--kv-budget", str(KV_LIMIT)),
        mlx_lm_server(rival_folder, "--prompt-cache-bytes", str(KV_LIMIT)),
    )
    for server_of in limited:
        with server_of as server:
            rows += crowd_rows(server, library, num_tokens, num_talks)
    return rows


def crowd_rows(server: Served, library: Library, num_tokens: int, num_talks: int) -> list[Row]:
    """All at once, KV_LIMIT set as the limit for KV caches and MEMORY_LEFT left to the process in all."""
    checked(server.ask([say("Hello!")], 4))
    before = server.resident_bytes
    server.limit_growth(MEMORY_LEFT)
    peak = Peak(server)
    with ThreadPoolExecutor(num_talks) as pool:
        replies = list(pool.map(lambda i: server.ask([say(library.prompt(i, num_tokens))], 8), range(num_talks)))
    grown = peak.stop() - before
    failed = [reply.error for reply in replies if reply.error]
    if failed:
        status = server.process.poll()
        end = "its process goes on" if status is None else f"its process ended with status {status}"
        print(f"{server.name}: {len(failed)} of {num_talks} failed, {end}; first: {failed[0][:200]}")
    alive = server.is_alive and not server.ask([say("Hello!")], 4).error
    label = f"{num_talks} at once, {KV_LIMIT // MiB} MiB for KV, {server.name}"
    return [
        Row.plain(f"answered of {label}", num_talks - len(failed), ""),
        Row.plain(f"answers afterwards (1 yes), {label}", float(alive), ""),
        Row.plain(f"resident growth at most, {label}", max(grown, 0), "bytes"),
    ]


class Peak:
    """The largest resident size of a server until stopped."""

    def __init__(self, server: Served) -> None:
        self._server, self._most = server, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._most = max(self._most, self._server.resident_bytes)

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._most


def export_float32(model: Any, tokenizer: Any, folder: Path) -> None:
    """The embedded model as mlx_lm.server can load it: the same float32 weights that our server computes with."""
    config = {key: value for key, value in load_config(MODEL_PATH).items() if not key.startswith("quantization")}
    save(folder, str(MODEL_PATH), model, tokenizer, config)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="turns,held,memory")
    parser.add_argument("--tokens", type=int, default=8192, help="of the conversations whose second turn is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--held-tokens", type=int, default=2048)
    parser.add_argument("--held-budget-mib", type=int, default=256)
    parser.add_argument("--talks", type=int, default=12)
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    parts = args.parts.split(",")
    model, tokenizer = load(float32=True)
    library = Library(tokenizer)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        rival = Path(folder)
        export_float32(model, tokenizer, rival)
        del model
        if "turns" in parts:
            rows += turn_rows(library, rival, args.tokens, args.rounds)
        if "held" in parts:
            rows += held_rows(library, args.held_tokens, args.held_budget_mib * MiB)
        if "memory" in parts:
            rows += memory_rows(library, rival, args.held_tokens, args.talks)
    print_rows(rows)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
