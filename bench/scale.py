"""How many machines so many conversations take, on paper: the table of docs/scale.md.

    python bench/scale.py            # print it
    python bench/scale.py --write    # put it into docs/scale.md

Nothing is measured here. Bytes are `KVFormat`'s own counts, speeds those that docs/performance.md has of one machine,
and the arithmetic is `turboserve plan`'s. A test holds the page to what this prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from sizing import FORMATS, MODELS, Model, table

from turboserve.machine_memory import MemoryInfo, resolve_budget
from turboserve.sizing.load import Habits, Need, Wanted, machines_for
from turboserve.sizing.speeds import Speeds

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
GB = 10**9

MODEL: Model = next(model for model in MODELS if model.name == "Qwen3 32B")
MEMORY_BYTES = 141 * GB  # an H200

# A 32B shape of 4-bit weights, one stream, float16 caches (docs/performance.md): 45.5 tokens/s at 16K and 38.9 at 64K.
_F16_BYTES = {16_384: 4.295 * GB, 65_536: 17.18 * GB}
_STEP_S = {16_384: 1 / 45.5, 65_536: 1 / 38.9}
KV_S_PER_BYTE = (_STEP_S[65_536] - _STEP_S[16_384]) / (_F16_BYTES[65_536] - _F16_BYTES[16_384])
FIXED_S = _STEP_S[16_384] - _F16_BYTES[16_384] * KV_S_PER_BYTE
# Not measured: 64 billion operations a token at half of what the GPU's 16-bit matrices do.
ROW_S = 64e9 / 400e12
PREFILL_TOKENS_PER_S = {"f16": 2076.0, "balanced": 1964.0}  # measured as 4/3; smaller formats encode as fast
SPEEDS = Speeds(FIXED_S, ROW_S, KV_S_PER_BYTE, 0.0)

USERS = (100, 1_000, 10_000)
CONTEXTS = (8_192, 32_768)
QUESTION, ANSWER, THINK_S = 300, 400, 120.0
WANTED = Wanted(min_tokens_per_s=10.0, max_ttft_s=3.0, max_running=256)


def need(users: int, context: int, name: str) -> Need:
    """Machines for so many users, all of whose conversations stay in memory."""
    held = MODEL.token_f16_bytes * context if name == "f16" else MODEL.kv_bytes(FORMATS[name], context)
    rate = PREFILL_TOKENS_PER_S.get(name, PREFILL_TOKENS_PER_S["balanced"])
    speeds = Speeds(SPEEDS.fixed_s, SPEEDS.row_s, SPEEDS.kv_s_per_byte, rate)
    budget = resolve_budget("auto", MemoryInfo(MEMORY_BYTES, MEMORY_BYTES), MODEL.weights_bytes)
    return machines_for(users, budget, speeds, Habits(QUESTION, ANSWER, THINK_S, held), WANTED)


def plan_table() -> Iterator[str]:
    rows = [["conversations, tokens each", "format", "one machine holds", "serves", "machines", "decided by", "TTFT",
             "tokens/s of a user"]]  # fmt: skip
    for context in CONTEXTS:
        for users in USERS:
            for name in ("f16", *FORMATS):
                found = need(users, context, name)
                rows.append(
                    [
                        f"{users:,} of {context // 1024}K",
                        name,
                        f"{found.users_by_memory:,}",
                        f"{found.users_by_speed:,}",
                        f"{found.machines:,}" if found.machines else "–",
                        found.by,
                        f"{found.seen.ttft_s:.2f} s",
                        f"{found.seen.tokens_per_s:.0f}",
                    ]
                )
    return table(rows)


def filled(page: str) -> str:
    """The page with the table between its marks."""
    before, begin, rest = page.partition("<!-- plan -->\n")
    _, end, after = rest.partition("<!-- end -->")
    return before + begin + "\n".join(plan_table()) + "\n" + end + after


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the table of docs/scale.md.")
    parser.add_argument("--write", action="store_true", help="put it into docs/scale.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
        return
    sys.stdout.write("\n".join([*plan_table(), ""]))


if __name__ == "__main__":
    main()
