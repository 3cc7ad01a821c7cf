"""How much memory models and their conversations take: the tables of docs/sizing.md and its drawing.

    python bench/sizing.py            # print the tables
    python bench/sizing.py --write    # put them, and the drawing, into docs/

Nothing is measured: weights are counted from parameters, caches by `KVFormat`'s own byte counts, the budget by the rule
that `--kv-budget auto` follows on a Mac. A test holds the page to what this prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.format_name import PRESETS
from turboserve.errors import StartupError
from turboserve.machine_memory import MemoryInfo, resolve_budget

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, DRAWING = DOCS / "sizing.md", DOCS / "kv-memory.svg"
GB, GiB = 10**9, 1 << 30
F16_BYTES = 2
WEIGHT_BITS = 4.5  # MLX's 4-bit weights: a scale and a bias of 16 bits for each 64
MEMORY_GIB = (8, 16, 24, 32, 64, 128)
FORMATS = {name: KVFormat.parse(PRESETS[name]) for name in ("balanced", "compact", "tiny")}


class Model(NamedTuple):
    """What its config.json says; `parameters` in thousands of millions."""

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def weights_bytes(self) -> int:
        return int(self.parameters * 1e9 * WEIGHT_BITS / 8)

    @property
    def token_f16_bytes(self) -> int:
        return self.layers * self.kv_heads * self.head_dim * 2 * F16_BYTES

    def token_bytes(self, fmt: KVFormat) -> int:
        """One more token of a long conversation."""
        return self.layers * fmt.token_bytes(self.kv_heads, self.head_dim, self.head_dim)

    def kv_bytes(self, fmt: KVFormat, num_tokens: int) -> int:
        """One conversation: full pages, and the exact rows at its ends in float16."""
        pages = fmt.num_pages(num_tokens) * fmt.page_bytes(self.kv_heads, self.head_dim, self.head_dim)
        return self.layers * pages + min(fmt.exact_rows(num_tokens), num_tokens) * self.token_f16_bytes


MODELS = (
    Model("Llama 3.2 1B", 1.24, 16, 8, 64),
    Model("Llama 3.2 3B", 3.21, 28, 8, 128),
    Model("Qwen3 4B", 4.02, 36, 8, 128),
    Model("Qwen2.5 7B", 7.62, 28, 4, 128),
    Model("Llama 3.1 8B", 8.03, 32, 8, 128),
    Model("Qwen3 8B", 8.19, 36, 8, 128),
    Model("Mistral Nemo 12B", 12.25, 40, 8, 128),
    Model("Qwen3 14B", 14.77, 40, 8, 128),
    Model("Qwen3 32B", 32.76, 64, 8, 128),
    Model("Llama 3.3 70B", 70.55, 80, 8, 128),
)


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *rest = rows
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    yield from ("| " + " | ".join(row) + " |" for row in rest)


def token_table() -> Iterator[str]:
    head = ["model", "weights, 4 bits", "KB a token, f16", *FORMATS, "32K tokens, f16", *FORMATS]
    rows = [head]
    for model in MODELS:
        row = [model.name, f"{model.weights_bytes / GB:.1f} GB", f"{model.token_f16_bytes / 1e3:.0f}"]
        row += [f"{model.token_bytes(fmt) / 1e3:.1f}" for fmt in FORMATS.values()]
        row.append(f"{model.token_f16_bytes * 32768 / GB:.2f} GB")
        row += [f"{model.kv_bytes(fmt, 32768) / GB:.2f} GB" for fmt in FORMATS.values()]
        rows.append(row)
    return table(rows)


def budget_bytes(model: Model, memory_gib: int) -> int:
    """What `auto` gives KV caches on an idle Mac; 0 where the model does not fit."""
    total = memory_gib * GiB
    try:
        return resolve_budget("auto", MemoryInfo(total, total * 3 // 4), model.weights_bytes)
    except StartupError:
        return 0


def fitting_table() -> Iterator[str]:
    rows = [["model", *(f"{gib} GB" for gib in MEMORY_GIB)]]
    for model in MODELS:
        rows.append([model.name])
        for gib in MEMORY_GIB:
            budget = budget_bytes(model, gib)
            f16, balanced = budget // model.token_f16_bytes, budget // model.token_bytes(FORMATS["balanced"])
            rows[-1].append(f"{_thousands(f16)} → {_thousands(balanced)}" if f16 else "–")
    return table(rows)


def _thousands(num_tokens: int) -> str:
    return f"{num_tokens / 1000:,.0f}K"


def drawing(model: Model = MODELS[5]) -> str:
    """Gigabytes of one conversation over its tokens, by format, as SVG."""
    width, height, left, bottom, most_tokens = 640, 320, 56, 40, 131072
    most = model.token_f16_bytes * most_tokens
    curves: dict[str, Callable[[int], int]] = {"f16": lambda n: model.token_f16_bytes * n}
    curves |= {name: partial(model.kv_bytes, fmt) for name, fmt in FORMATS.items()}

    def place(num_tokens: int, num_bytes: int) -> str:
        x = left + (width - left - 90) * num_tokens / most_tokens
        return f"{x:.1f},{height - bottom - (height - bottom - 16) * num_bytes / most:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="12">{model.name}: GB of KV cache for one conversation, by tokens</text>',
    ]
    for step in range(5):
        x, y = place(most_tokens * step // 4, most * step // 4).split(",")
        parts.append(f'<line x1="{left}" x2="{width - 90}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y}" text-anchor="end">{most * step / 4 / GB:.1f}</text>')
        parts.append(f'<text x="{x}" y="{height - bottom + 18}" text-anchor="middle">{32 * step}K</text>')
    for (name, size), colour in zip(curves.items(), ("#888", "#00796b", "#ef6c00", "#5e35b1"), strict=True):
        points = [place(num_tokens, size(num_tokens)) for num_tokens in range(0, most_tokens + 1, 8192)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(points)}"/>')
        x, y = points[-1].split(",")
        # Neighbouring lines end a few pixels apart.
        shift = {"compact": 4, "tiny": 16, "balanced": -6}.get(name, 4)
        parts.append(f'<text x="{float(x) + 6:.0f}" y="{float(y) + shift:.0f}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def filled(page: str) -> str:
    """The page with both tables between its marks."""
    for mark, lines in (("tokens", token_table()), ("fitting", fitting_table())):
        before, begin, rest = page.partition(f"<!-- {mark} -->\n")
        _, end, after = rest.partition("\n<!-- end -->")
        page = before + begin + "\n".join(lines) + end + after
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of docs/sizing.md.")
    parser.add_argument("--write", action="store_true", help="put them and the drawing into docs/")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
        DRAWING.write_text(drawing(), "utf-8")
        return
    sys.stdout.write("\n".join([*token_table(), "", *fitting_table(), ""]))


if __name__ == "__main__":
    main()
