"""What a long conversation's KV cache holds in memory, and the process's peak while its prompt is read.

    python bench/memory.py --json memory.json

Each cache runs in a process of its own: the embedded model in float32 reads 8192 held-out tokens in the server's
chunks. Bytes are those of the allocated arrays (codes, scales, exact windows, page slack); peaks are the kernel's
VmHWM, reset after loading. Baselines: mlx-lm's cache stored in float16 for bytes, and mlx-lm's cache as it is, in
the model's dtype, for peaks. Linux only.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported
from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _rows import Row, add_json_option, write_rows

from turboquant_kv import blas

blas.interpose()  # before mlx is imported

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from turboserve.models.tiny.evaluate import load, parse_format, runtime_for
from turboserve.models.tiny.prompts import load_texts

FORMATS = ("4/4", "4/3", "3/3")
HALF, OWN = "float16", "f16"  # mlx-lm's cache storing float16; mlx-lm's cache in the model's dtype
TARGET_RATIO = {"4/3": 4.0}  # float16 bytes over resident bytes, at least
NUM_TOKENS = 8192
CHUNK_TOKENS = 256  # as the server reads prompts on a CPU
MiB = 1 << 20


class HalfCache(KVCache):  # type: ignore[misc]
    """mlx-lm's cache holding float16 whatever the model computes in."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        k, v = super().update_and_fetch(keys.astype(mx.float16), values.astype(mx.float16))
        return k.astype(keys.dtype), v.astype(values.dtype)


def status_bytes(field: str) -> int:
    """A memory figure of this process, such as VmRSS or VmHWM, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def settle() -> None:
    """Give back what the allocators keep for later, so that resident memory is memory in use."""
    gc.collect()
    mx.clear_cache()
    ctypes.CDLL(None).malloc_trim(0)


def held_out_ids(tokenizer: Any, num_tokens: int) -> list[int]:
    """The beginnings of the held-out texts, one after the other."""
    ids: list[int] = []
    for item in load_texts():
        ids += tokenizer.encode(item.text + "\n\n", add_special_tokens=False)
    if len(ids) < num_tokens:
        raise SystemExit(f"the held-out texts have only {len(ids)} tokens")
    return ids[:num_tokens]


def measure_here(format_name: str, num_tokens: int, chunk_tokens: int) -> dict[str, float]:
    """Bytes and peaks of one prompt, in this process."""
    model, tokenizer = load()
    half = format_name == HALF
    runtime = runtime_for(model, tokenizer, None if half else parse_format(format_name))
    ids = held_out_ids(tokenizer, num_tokens)
    caches = [HalfCache() for _ in runtime.make_cache()] if half else runtime.make_cache()
    settle()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start = status_bytes("VmRSS"), time.monotonic()
    for first in range(0, num_tokens, chunk_tokens):
        mx.eval(model(mx.array(ids[first : first + chunk_tokens])[None], cache=caches)[:, -1])
        runtime.evaluate(caches)
        mx.clear_cache()
    seconds, peak = time.monotonic() - start, status_bytes("VmHWM")
    settle()
    return {
        "kv_bytes": sum(cache.nbytes for cache in caches) if half else runtime.measure(caches).total,
        "peak_growth": peak - before,
        "resident_growth": status_bytes("VmRSS") - before,
        "loaded": before,
        "seconds": seconds,
    }


def measure_apart(format_name: str, num_tokens: int, chunk_tokens: int) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--here", format_name]
    command += ["--tokens", str(num_tokens), "--chunk", str(chunk_tokens)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def print_table(figures: dict[str, dict[str, float]], num_tokens: int) -> None:
    print(f"{num_tokens} tokens; process after loading: {figures[OWN]['loaded'] / MiB:.0f} MiB")
    print("| cache | KV bytes | float16 / this | prefill peak over loaded | resident after | prefill |")
    print("|---|---|---|---|---|---|")
    for name, row in figures.items():
        label = {HALF: "mlx-lm, float16", OWN: "mlx-lm, float32"}.get(name, name)
        print(
            f"| {label} | {row['kv_bytes']:,.0f} | {figures[HALF]['kv_bytes'] / row['kv_bytes']:.2f} "
            f"| {row['peak_growth'] / MiB:.1f} MiB | {row['resident_growth'] / MiB:.1f} MiB | {row['seconds']:.0f} s |"
        )


def rows_of(figures: dict[str, dict[str, float]], formats: list[str], num_tokens: int) -> list[Row]:
    """Per format: its ratio against float16, and its prefill peak against the uncompressed run's."""
    rows = []
    for name in formats:
        row = figures[name]
        rows.append(
            Row.at_least_ratio(
                f"KV bytes {name} at {num_tokens} tokens",
                row["kv_bytes"],
                "bytes",
                figures[HALF]["kv_bytes"],
                TARGET_RATIO.get(name),
            )
        )
        baseline = figures[OWN]["peak_growth"]
        rows.append(Row.at_most(f"prefill peak {name}", row["peak_growth"], "bytes", baseline, baseline))
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--chunk", type=int, default=CHUNK_TOKENS)
    parser.add_argument("--here", help=argparse.SUPPRESS)  # the child: measure this cache, print one JSON line
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.here:
        print(json.dumps(measure_here(args.here, args.tokens, args.chunk)))
        return
    formats = args.formats.split(",")
    figures = {name: measure_apart(name, args.tokens, args.chunk) for name in (HALF, OWN, *formats)}
    print_table(figures, args.tokens)
    write_rows(args.json, rows_of(figures, formats, args.tokens))


if __name__ == "__main__":
    main()
