"""Counts arithmetic by basic block: the compiler marks every block, each mark becomes a counter.

Owns what an x86-64 instruction counts as. A kernel compiled for x86 without vectorisation does one scalar operation per
instruction, close to what a GPU's lane does, after the same unrolling and common subexpressions; the counts are a
model's input, not a GPU's. Emulating simd operations counts nothing, and neither do loads, stores and moves.
Leaves out other processors.
"""

import re
from collections import Counter
from typing import NamedTuple

_MARK = re.compile(r"^\s+(call|jmp)\s+__sanitizer_cov_trace_pc(?:@PLT)?\s*$")
_FUNCTION = re.compile(r"^\s+\.type\s+(\S+), @function")
# Bodies of the shim's simd and matrix operations, and of what they call, where they are not inlined.
_EMULATION = re.compile(r"_ZZNK?5metal|_ZNK?5metal(?:8gathered|\d+(?:emu_|simd))")
_MATHS = re.compile(r"^(?:call|jmp)\s+(?:exp|exp2|exp10|log|log2|log10|pow|sin|cos|tan|tanh|atan2|fmod)\w*f(?:@PLT)?$")
_FLOAT = re.compile(r"v?(?:add|sub|mul|max|min|ucomi|comi)ss|vf\w+ss|v?(?:and|andn|or|xor)p[sd]|v?(?:cmp\w*|round)ss")
_SPECIAL = re.compile(r"v?(?:div|sqrt|rsqrt|rcp)ss")
_CONVERT = re.compile(r"v?cvt\w+")
_INT = re.compile(
    r"(?:add|sub|imul|mul|and|or|xor|not|neg|shl|sal|shr|sar|rol|ror|lea|cmp|test|inc|dec|popcnt|bsr|bsf|tzcnt|lzcnt|bt"
    r"|sbb|adc|i?div)[bwlq]?|cmov\w+|set\w+|movz\w+|movs[bwl][wlq]|cltq|bt[src]?[lq]"
)


class Operations(NamedTuple):
    """Instructions executed by all threads: float (an fma is one), integer, conversions, divisions and functions."""

    float_ops: int
    int_ops: int
    convert_ops: int
    special_ops: int


def kind_of(instruction: str) -> str | None:
    """ "float", "int", "convert", "special", or None for what is no arithmetic."""
    name, _, operands = instruction.partition("\t")
    first, _, second = operands.replace(" ", "").partition(",")
    if _MATHS.match(instruction.replace("\t", " ")) or _SPECIAL.fullmatch(name):
        return "special"
    clears = name.lstrip("v").startswith(("xor", "pxor")) and first == second.split(",")[0]
    moves_stack = operands.endswith("%rsp") or (name.startswith("lea") and "%rsp" in operands)
    if clears or moves_stack:
        return None
    for kind, pattern in (("convert", _CONVERT), ("float", _FLOAT), ("int", _INT)):
        if pattern.fullmatch(name):
            return kind
    return None


def instrument(assembly: str) -> tuple[str, list[Operations]]:
    """Assembly whose blocks count themselves in `emu_block_counts`, and what one pass through each block costs."""
    lines, blocks = [], [Counter[str]()]
    skipped = False
    for line in assembly.splitlines():
        function = _FUNCTION.match(line)
        if function:
            # Block 0 collects what is never counted: code before a function's first mark.
            skipped = _EMULATION.match(function.group(1)) is not None
            blocks.append(Counter())
        mark = _MARK.match(line)
        if mark:
            blocks.append(Counter())
            lines.append(f"\tincq\t.Lemu_blocks+{8 * (len(blocks) - 1)}(%rip)")
            lines += ["\tret"] if mark.group(1) == "jmp" else []  # a function's end, where nothing but the mark is left
            continue
        kind = kind_of(line.strip()) if line.startswith("\t") and not line.startswith("\t.") else None
        if kind and not skipped:
            blocks[-1][kind] += 1
        lines.append(line)
    lines.append(
        f"\t.globl\temu_block_counts\n\t.bss\n\t.align 32\n\t.type\temu_block_counts, @object\n"
        f"\t.size\temu_block_counts, {8 * len(blocks)}\nemu_block_counts:\n.Lemu_blocks:\n\t.zero\t{8 * len(blocks)}\n"
        '\t.section\t.note.GNU-stack,"",@progbits\n'
    )
    return "\n".join(lines), [Operations(b["float"], b["int"], b["convert"], b["special"]) for b in blocks]


def total(passes: list[int], costs: list[Operations]) -> Operations:
    """What `passes[i]` passes through block i cost together."""
    sums = [sum(n * cost[kind] for n, cost in zip(passes, costs, strict=True)) for kind in range(4)]
    return Operations(*sums)
