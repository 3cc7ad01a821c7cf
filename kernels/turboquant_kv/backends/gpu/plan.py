"""What a decode kernel is compiled for, how its work is split over the GPU, and the figures it is told.

Owns shapes, their checks, tuning and the `plan` array. Leaves text to source.py and launches to launch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.gpu.source import Dialect, Variant
from turboquant_kv.codec.format import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, UnsupportedFormatError, code_bytes

TILE_TOKENS = 32  # the plan's unit
MAX_QUERY_ROWS = 8  # per sequence; more is prefill
MAX_PARTS = 256  # of one sequence: the combine kernel keeps a weight of each in shared memory
NO_WINDOW = 1 << 30
LOG2_E = 1.4426950408889634
# Kernel inputs of fewer elements would come in Metal's constant address space, and so as another kernel.
MIN_ELEMENTS = 8

Figures = tuple[int, ...]
"""One sequence as the kernels see it: first query's position, queries, pages, sink offset, sink rows, window offset,
window's position, window rows. Offsets are rows into the batch's joined exact arrays."""


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What a decode kernel is compiled for."""

    num_q_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    k_bits: int
    v_bits: int
    page_tokens: int
    sink_tokens: int
    num_rows: int  # query rows per sequence
    dtype: mx.Dtype  # of queries and output
    exact_dtype: mx.Dtype

    def check(self) -> None:
        """Raises UnsupportedFormatError for a shape without a kernel: nothing is launched on a guess."""
        for name, value, known in (
            ("k_dim", self.k_dim, SUPPORTED_HEAD_DIMS),
            ("v_dim", self.v_dim, SUPPORTED_HEAD_DIMS),
            ("k_bits", self.k_bits, SUPPORTED_BITS),
            ("v_bits", self.v_bits, SUPPORTED_BITS),
            ("num_rows", self.num_rows, range(1, MAX_QUERY_ROWS + 1)),
        ):
            if value not in known:
                raise UnsupportedFormatError(f"no GPU kernel for {name}={value}")
        if self.num_q_heads % self.num_kv_heads or self.page_tokens % 16:
            raise UnsupportedFormatError(f"no GPU kernel for {self}")

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def tile(self) -> int:
        """Tokens that a warp of the tensor-core variant takes at once; they never straddle a page."""
        return 32 if max(self.k_dim, self.v_dim) <= 128 and self.page_tokens % 32 == 0 else 16

    @property
    def has_mma(self) -> bool:
        """Whether the tensor-core variant covers it (on CUDA)."""
        dims = (self.k_dim, self.v_dim)
        if self.tile // 4 * code_bytes(self.v_dim, self.v_bits) % 16:  # a block of a tile's values is copied as a whole
            return False
        return all(d % 16 == 0 and d <= 256 for d in dims) and max(self.k_bits, self.v_bits) <= 4

    @property
    def has_simd(self) -> bool:
        """Whether the variant on 8x8 matrices covers it (on Metal)."""
        return max(self.k_dim, self.v_dim) <= 256

    @property
    def has_exact_mma(self) -> bool:
        """Whether its exact rows may use tensor cores as well."""
        return self.dtype == self.exact_dtype and self.dtype != mx.float32

    def rows_per_block(self, variant: Variant) -> int:
        """Query rows that share one unpacking; Metal's 32 KB of threadgroup memory hold four of 512 dims."""
        if variant != "portable":
            return 8
        return min(8 if max(self.k_dim, self.v_dim) <= 256 else 4, self.group * self.num_rows)

    def live_rows(self, variant: Variant) -> int:
        return min(self.rows_per_block(variant), self.group * self.num_rows)

    def num_chunks(self, variant: Variant) -> int:
        return -(-self.group * self.num_rows // self.rows_per_block(variant))


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a decode kernel is cut; measured figures are in docs/performance.md."""

    warps: int = 4
    tile: int = 32  # tokens a warp takes at once (mma)
    stages: int = 2  # of those, how many lie in its ring (mma)
    pitch: int = 128  # bytes between entries of the table of pairs; 256 saves an instruction an entry (mma)
    bulk: bool = False  # tiles are copied by Hopper's copy engine (mma)
    blocks: int = 528  # thread blocks that run at the same time
    resident: int = 1  # blocks that share a processor (mma)
    fused: bool = True  # the last block of a row group merges, instead of a second launch (mma)

    @property
    def threads(self) -> int:
        return 32 * self.warps


@dataclass(frozen=True, slots=True)
class Device:
    """What a GPU offers to a kernel."""

    processors: int
    shared_bytes: int  # of one thread block at most
    has_bulk_copies: bool


HOPPER = Device(132, 227 << 10, True)
AMPERE = Device(108, 163 << 10, False)
SMALL = Device(84, 99 << 10, False)  # consumers' cards; their number of processors varies and is not told
PORTABLE = Tuning()
# Metal does not tell how many cores there are, 8 to 40 in Macs; about four such blocks fit the registers of one.
SIMD = Tuning(blocks=128)
# Matrices cost the same for one row as for eight. Modelled from counted operations and published throughputs, not
# measured: from so many rows on, the worse of the model's two assumptions loses less with them (docs/metal.md).
MIN_SIMD_ROWS = 3


MIN_CAPABILITY = (8, 0)  # of CUDA devices: asynchronous copies and the tensor cores' products


@cache
def compute_capability() -> tuple[int, int]:
    """Of the CUDA device that MLX uses; (0, 0) where there is none."""
    if not mx.cuda.is_available():
        return 0, 0
    info = mx.device_info()
    return int(info["compute_capability_major"]), int(info["compute_capability_minor"])


def this_device() -> Device:
    """The CUDA device that MLX uses, by its compute capability: MLX tells no more."""
    capability = compute_capability()
    if capability[0] in (9, 10):
        return HOPPER
    return AMPERE if capability == (8, 0) else SMALL


@lru_cache(maxsize=256)
def tuning_for(shape: DecodeShape, variant: Variant, device: Device) -> Tuning:
    """Constants but for tensor cores: as many warps in a block as registers allow, fewer where memory is small."""
    if variant != "mma":
        return SIMD if variant == "simd" else PORTABLE
    narrow = max(shape.k_dim, shape.v_dim) <= 128
    by_bytes = max(shape.k_bits, shape.v_bits) >= 3  # pairs of codes are found by whole bytes
    bulk = device.has_bulk_copies
    choices = [
        Tuning(12 if narrow else 8, shape.tile, 2, 256 if by_bytes else 128, bulk, device.processors),
        Tuning(8, shape.tile, 2, 128, bulk, device.processors),
        Tuning(4, 16, 2, 128, bulk, device.processors),
    ]
    return next((t for t in choices if arena_bytes(shape, t) + STATIC_BYTES <= device.shared_bytes), choices[-1])


STATIC_BYTES = 4096  # shared memory beside the arena, generously
MAX_PAD = 128


def v_gap(shape: DecodeShape, tile: int) -> int:
    """Bytes between a tile's blocks of values in shared memory: blocks must begin 32 or 96 bytes apart, modulo 128."""
    block = tile // 4 * code_bytes(shape.v_dim, shape.v_bits)
    return next(gap for gap in range(0, MAX_PAD, 16) if (block + gap) % 128 in (32, 96) or block % 32)


def table_layout(shape: DecodeShape, tuning: Tuning) -> dict[str, int]:
    """Where the tables of pairs lie in shared memory and how long all are, by their names in the kernel's text.

    With a pitch of 256 there are two tables side by side, of up to 256 entries of 128 bytes; codes of 3 bits have two.
    """
    tables: list[tuple[int, bool]] = []  # bits, and whether entries are told by a byte's high bits

    def place(bits: int, high: bool) -> int:
        if (bits, high) not in tables:
            tables.append((bits, high))
        index = tables.index((bits, high))
        if tuning.pitch == 256:
            return index // 2 * (256 << 8) + index % 2 * 128
        return 128 * sum(1 << (2 * bits) for bits, _ in tables[:index])

    offsets = {}
    for name, bits in (("K", shape.k_bits), ("V", shape.v_bits)):
        offsets[f"{name}_TABLE"] = place(bits, False)
        offsets[f"{name}_HIGH_TABLE"] = place(bits, bits == 3 and tuning.pitch == 256)
    if tuning.pitch == 256:
        lengths = [256 << 8 if bits >= 3 else 256 << (2 * bits) for bits, _ in tables]
        total = max(index // 2 * (256 << 8) + length for index, length in enumerate(lengths))
    else:
        total = 128 * sum(1 << (2 * bits) for bits, _ in tables)
    return {**offsets, "TABLE_BYTES": total}


def arena_bytes(shape: DecodeShape, tuning: Tuning) -> int:
    """Dynamic shared memory of the tensor-core kernel (src/mma_shared.h has the same formulas)."""
    tables = table_layout(shape, tuning)["TABLE_BYTES"]
    queries = 16 * (shape.k_dim + 8)
    stage = tuning.tile * (code_bytes(shape.k_dim, shape.k_bits) + code_bytes(shape.v_dim, shape.v_bits) + 4)
    stage += 4 * v_gap(shape, tuning.tile)
    rings = tuning.warps * tuning.stages * stage
    # dense rotations: queries in float and partial sums, before the rings are used; sums of the values at the end
    scratch = 32 * shape.k_dim * (1 + tuning.warps) if shape.k_dim & (shape.k_dim - 1) else 0
    totals = tuning.warps * 8 * (shape.v_dim + 4) * 4
    exact = 16 * (shape.k_dim + 8) if shape.has_exact_mma else tuning.warps * 128 * 4
    finish = 4 * (tuning.warps * MAX_PARTS + (8 + max(8, tuning.warps)) * shape.v_dim)
    finish += 32 * shape.v_dim * tuning.warps if shape.v_dim & (shape.v_dim - 1) else 0
    return max(tables + queries + max(rings, scratch), totals, exact, finish)


# Of a block beside its tokens, in tokens: start, table, merge. Measured on an H100: about 5 us, and 6 ns a token.
BLOCK_COST = 800


def split(
    shape: DecodeShape, variant: Variant, tuning: Tuning, figures: Sequence[Figures], reach: int
) -> tuple[int, int]:
    """Tiles of 32 tokens per block and blocks per row group of the longest sequence, the exact rows' block included.

    Every block gets the same number of tokens, whatever the sequences' lengths, so that none waits for a long one: the
    number with which all are done soonest, `tuning.blocks` at a time.
    """
    unseen = [max(0, f[0] - shape.sink_tokens + 1 - reach) // TILE_TOKENS for f in figures]
    held = [-(-f[2] * shape.page_tokens // TILE_TOKENS) for f in figures]
    num_tiles = [max(0, n - before) for n, before in zip(held, unseen, strict=True)]
    # tiles that give every warp one, or what a page has
    least = max(1, min(tuning.warps * tuning.tile, shape.page_tokens) // TILE_TOKENS)
    longest, total = max(num_tiles, default=0), sum(num_tiles)
    groups = shape.num_kv_heads * shape.num_chunks(variant)
    at_once = max(1, tuning.blocks // groups)
    best, best_time = max(1, longest), float("inf")
    for wanted in sorted({max(1, at_once * waves - k) for waves in (1, 2, 3) for k in range(len(figures) + 2)}):
        tiles = max(least, -(-total // wanted), -(-longest // (MAX_PARTS - 1)))
        tiles = -(-tiles // least) * least
        blocks = sum(-(-n // tiles) for n in num_tiles)
        # the exact rows' blocks are short
        waves = -(-(blocks + len(figures) // 2 + len(figures) % 2) // at_once)
        time = waves * (tiles * TILE_TOKENS + BLOCK_COST)
        if time < best_time:
            best, best_time = tiles, time
    return best, 1 + -(-longest // best)


def make_plan(
    figures: tuple[Figures, ...],
    tiles_per_block: int,
    table_width: int,
    num_blocks: int,
    num_parts: int,
    scale: float,
    reach: int,
) -> mx.array:
    """The plan array of src/plan.h."""
    scale_bits = int(np.float32(scale * LOG2_E).view(np.int32))
    head = (tiles_per_block, table_width, num_blocks, num_parts, scale_bits, reach, 0, 0)
    return mx.array(np.array([*head, *(x for row in figures for x in row)], np.int32))


def variant_for(dialect: Dialect, shape: DecodeShape) -> Variant:
    """Matrices where they are written for it and expected to pay, the portable body elsewhere."""
    if dialect == "metal":
        return "simd" if shape.has_simd and shape.group * shape.num_rows >= MIN_SIMD_ROWS else "portable"
    return "mma" if shape.has_mma else "portable"
