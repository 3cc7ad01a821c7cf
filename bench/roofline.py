"""A model of decode attention on Apple GPUs from counted operations: what binds, and how fast against float16.

    PYTHONPATH=. python bench/roofline.py [--json FILE]

Modelled, not measured: no Apple GPU took part. A KV element costs the longest of three times: its bytes of device
memory, its instructions, its reads of threadgroup memory. The last is taken in two ways, which bound the truth: every
read costs all its lanes' bytes, or one address read by all lanes of a simdgroup costs nothing. float16 attention is
taken to run at the speed of its bytes. What it leaves out: latency, occupancy, bank conflicts, launches, and that
shifts have a pipe of their own at a quarter of the rate. Needs x86-64, for the counts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NamedTuple

from _counted import Counts, count
from _rows import Row, add_json_option, print_rows, write_rows

from turboquant_kv.backends.gpu.shape import Variant
from turboquant_kv.backends.gpu.variants import MIN_SIMD_ROWS

DIM = 128
FORMATS = ((4, 4), (4, 3), (3, 3))
ROWS = (1, 2, 3, 4, 5, 8)

# philipturner/metal-benchmarks (README, M1 and M2): lanes of a core; cycles per simdgroup of an 8x8x8 product, float32
# and float16 alike, of a shuffle, of exp2; bytes a core reads from threadgroup memory in a cycle. For M3 and M4 nobody
# has published them.
LANES = 128
MATRIX_CYCLES = 20.1
SIMD_CYCLES = 2.0
SPECIAL_CYCLES = 4.0
THREADGROUP_BYTES = 64.0


@dataclass(frozen=True, slots=True)
class Chip:
    """Cores and GB/s from Apple's specifications; TFLOPS (float32) as Apple, or for M3 and M4 the press, has them."""

    name: str
    cores: int
    gigabytes: float
    teraflops: float

    @property
    def bytes_per_cycle(self) -> float:
        """Of device memory, for one core."""
        gigahertz = self.teraflops * 1e3 / (2 * LANES * self.cores)
        return self.gigabytes / (self.cores * gigahertz)


CHIPS = (
    Chip("M1", 8, 68, 2.6),
    Chip("M2", 10, 100, 3.6),
    Chip("M3", 10, 100, 3.5),
    Chip("M4", 10, 120, 4.3),
    Chip("M1 Max", 32, 400, 10.4),
    Chip("M4 Max", 40, 546, 17.0),
)


class Cost(NamedTuple):
    """Cycles of a core for one KV element."""

    instructions: float
    threadgroup: float  # every read at its lanes' bytes
    lookups: float  # without reads of one address by all lanes

    def compute(self, broadcasts_are_free: bool) -> float:
        return max(self.instructions, self.lookups if broadcasts_are_free else self.threadgroup)


def cost_of(counts: Counts, lookup_bytes: float) -> Cost:
    slots = counts.float_ops + counts.int_ops + counts.convert_ops
    slots += SPECIAL_CYCLES * counts.special_ops + SIMD_CYCLES * counts.simd_ops + MATRIX_CYCLES * counts.matrix_ops
    return Cost(slots / LANES, counts.threadgroup_bytes / THREADGROUP_BYTES, lookup_bytes / THREADGROUP_BYTES)


def costs(counted: dict[tuple[Variant, int], Counts]) -> dict[tuple[Variant, int], Cost]:
    """The portable kernel's broadcasts are its queries, so its lookups are what it reads for no rows at all."""
    one, two = (counted["portable", rows].threadgroup_bytes for rows in (1, 2))
    made = {}
    for (variant, rows), counts in counted.items():
        lookups = 2 * one - two if variant == "portable" else counts.threadgroup_bytes
        made[variant, rows] = cost_of(counts, lookups)
    return made


def speedup(chip: Chip, cost: Cost, bits: tuple[int, int], broadcasts_are_free: bool) -> float:
    """Over float16, whose two bytes an element are all that it is taken to cost."""
    packed = sum(bits) / 16 + 2 / DIM  # codes, and a float16 scale for each vector
    compute = cost.compute(broadcasts_are_free)
    return 2 / chip.bytes_per_cycle / max(packed / chip.bytes_per_cycle, compute)


def prefers_matrices(portable: Cost, simd: Cost) -> bool:
    """Whether matrices lose less where they are the wrong choice than the portable kernel where it is."""
    ratios = [portable.compute(free) / simd.compute(free) for free in (False, True)]
    return max(ratios) * min(ratios) > 1


def chip_rows(bits: tuple[int, int], made: dict[tuple[Variant, int], Cost]) -> list[Row]:
    rows = []
    for (variant, num_rows), cost in made.items():
        for chip in CHIPS:
            low, high = (speedup(chip, cost, bits, free) for free in (False, True))
            name = f"{chip.name}, {bits[0]}/{bits[1]}, G={num_rows}, {variant}"
            rows.append(Row.plain(f"{name}, every read paid", low, "x f16"))
            rows.append(Row.plain(f"{name}, broadcasts free", high, "x f16"))
    return rows


def print_chips(bits: tuple[int, int], made: dict[tuple[Variant, int], Cost]) -> None:
    """As docs/metal.md has it: times faster than float16, from the dearer to the cheaper reads; `m` on matrices."""
    print(f"\n{bits[0]}/{bits[1]} | " + " | ".join(f"G={n}" for n in ROWS) + " | G=8 m")
    for chip in CHIPS:
        columns = [made["portable", n] for n in ROWS] + [made["simd", ROWS[-1]]]
        spans = [tuple(f"{speedup(chip, cost, bits, free):.1f}" for free in (False, True)) for cost in columns]
        print(f"{chip.name} | " + " | ".join(low if low == high else f"{low}–{high}" for low, high in spans))
    print()


def counted_rows(bits: tuple[int, int], counted: dict[tuple[Variant, int], Counts]) -> list[Row]:
    rows = []
    for (variant, num_rows), counts in counted.items():
        name = f"counted, {bits[0]}/{bits[1]}, G={num_rows}, {variant}"
        rows.append(Row.plain(f"{name}: float", counts.float_ops, "1/elt"))
        rows.append(Row.plain(f"{name}: integer", counts.int_ops, "1/elt"))
        rows.append(Row.plain(f"{name}: shuffles", counts.simd_ops, "1/elt"))
        rows.append(Row.plain(f"{name}: matrix lanes", counts.matrix_ops, "1/elt"))
        rows.append(Row.plain(f"{name}: threadgroup reads", counts.threadgroup_bytes, "B/elt"))
        rows.append(Row.plain(f"{name}: instruction slots", cost_of(counts, 0).instructions * LANES, "1/elt"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    options = parser.parse_args()
    variants: tuple[Variant, ...] = ("portable", "simd")
    written = []
    print("modelled from counted operations, not measured\n")
    for bits in FORMATS:
        counted = {(variant, n): count(DIM, bits, n, variant) for variant in variants for n in ROWS}
        made = costs(counted)
        first = next(n for n in ROWS if prefers_matrices(made["portable", n], made["simd", n]))
        verdict = Row.near(f"{bits[0]}/{bits[1]}: rows from which matrices pay", first, "rows", MIN_SIMD_ROWS, 0)
        rows = [*counted_rows(bits, counted), verdict]
        print_rows(rows)
        print_chips(bits, made)
        written += [*rows, *chip_rows(bits, made)]
    write_rows(options.json, written)


if __name__ == "__main__":
    main()
