"""Where everything lies in the dynamic shared memory of the tensor-core kernels, and how much that is.

The only place that computes it: the kernels' text gets the offsets as constants, under the names used here
(src/mma_*.h, src/prefill.h, src/prefill_hopper.h). Owns the layout of decoding's and of prefill's arena.

    decode, while codes are read   | pair tables | queries (8, Q_PITCH) | turned | a ring of STAGES tiles a warp |
    decode, exact rows             | queries, or weights for each warp |
    decode, the warps' merge       | sums (WARPS, LIVE, SUMS_PITCH) |
    decode, the parts' merge       | weights | exact totals | work | partial sums of a dense rotation |
    prefill                        | queries | STAGES tiles of keys | STAGES tiles of values |
    prefill on Hopper              | the same | spans of all queries | barriers |, all from a multiple of 1024 on
"""

from __future__ import annotations

from dataclasses import dataclass

from turboquant_kv.backends.gpu.shape import DecodeShape, is_power_of_two
from turboquant_kv.backends.gpu.tuning import Tuning
from turboquant_kv.codec.format import code_bytes

MAX_PARTS = 256  # of one sequence: merging keeps a weight of each in shared memory
FLOAT_BYTES, HALF_BYTES = 4, 2
MMA_ROWS = 8  # query rows of a block
MAX_PAD = 128
SPAN_BYTES, BARRIER_BYTES = 12, 8  # of a query of a Hopper kernel; of each stage there are four barriers
TILE_ALIGNMENT = 1024  # of what a Hopper kernel's products read; shared memory itself begins anywhere
PIECE_BYTES = 16  # of a row of a prefill tile; rows are whole multiples of eight pieces


@dataclass(frozen=True, slots=True)
class Arena:
    """Dynamic shared memory of a kernel: its size, and offsets in bytes (others as named) for the text."""

    num_bytes: int
    constants: dict[str, int]


def decode_arena(shape: DecodeShape, tuning: Tuning) -> Arena:
    """The tensor-core decode kernel's."""
    live, warps = shape.live_rows("mma"), tuning.warps
    k_bytes, v_bytes = code_bytes(shape.k_dim, shape.k_bits), code_bytes(shape.v_dim, shape.v_bits)
    tables = table_layout(shape, tuning)
    q_pitch = shape.k_dim + 8  # elements; eight more, so that rows begin in different banks
    queries_bytes = MMA_ROWS * q_pitch * HALF_BYTES
    turn_at = tables["TABLE_BYTES"] + queries_bytes
    # cosines' and sines' factors of each row, and what halves leave out of them (src/mma_queries.h)
    turn_pitch = shape.turn_parts * 2 * (-(-shape.pairs // 8) * 8) + 8 if shape.pairs else 0
    rings_at = -(-(turn_at + MMA_ROWS * turn_pitch * HALF_BYTES) // 128) * 128 if shape.pairs else turn_at
    # a tile: keys, values in four blocks of tokens, key scales, value scales
    v_at = tuning.tile * k_bytes
    v_block = tuning.tile // 4 * v_bytes + v_gap(shape, tuning.tile)
    scales_at = v_at + 4 * v_block
    stage_bytes = scales_at + 2 * tuning.tile * HALF_BYTES
    # dense rotations, before the rings are used: queries in float, then each warp's partial sums
    k_scratch = FLOAT_BYTES * MMA_ROWS * shape.k_dim * (1 + warps) if not is_power_of_two(shape.k_dim) else 0
    sums_pitch = shape.v_dim + 4  # floats
    # merging all parts of a row group: `runs` warps share a row
    runs = max(1, warps // live)
    exact_totals_at = FLOAT_BYTES * warps * MAX_PARTS
    work_at = exact_totals_at + FLOAT_BYTES * live * shape.v_dim
    partial_at = work_at + FLOAT_BYTES * runs * live * shape.v_dim
    v_scratch = FLOAT_BYTES * live * shape.v_dim * warps if not is_power_of_two(shape.v_dim) else 0
    num_bytes = max(
        rings_at + max(warps * tuning.stages * stage_bytes, k_scratch),
        FLOAT_BYTES * warps * live * sums_pitch,
        queries_bytes if shape.has_exact_mma else FLOAT_BYTES * warps * MMA_ROWS * 16,
        partial_at + v_scratch,
    )
    constants = {
        **{name: at for name, at in tables.items() if name != "TABLE_BYTES"},
        **{"QUERIES_AT": tables["TABLE_BYTES"], "Q_PITCH": q_pitch, "TURN_AT": turn_at, "RINGS_AT": rings_at},
        **{"V_AT": v_at, "V_BLOCK_BYTES": v_block, "SCALES_AT": scales_at, "STAGE_BYTES": stage_bytes},
        **{"SUMS_PITCH": sums_pitch, "RUNS": runs, "MAX_PARTS": MAX_PARTS},
        **{"EXACT_TOTALS_AT": exact_totals_at, "WORK_AT": work_at, "PARTIAL_AT": partial_at},
    }
    return Arena(num_bytes, constants)


def v_gap(shape: DecodeShape, tile: int) -> int:
    """Bytes between a tile's blocks of values, which must begin 32 or 96 bytes apart, modulo 128, against conflicts."""
    block = tile // 4 * code_bytes(shape.v_dim, shape.v_bits)
    return next(gap for gap in range(0, MAX_PAD, 16) if (block + gap) % 128 in (32, 96) or block % 32)


def table_layout(shape: DecodeShape, tuning: Tuning) -> dict[str, int]:
    """Where the tables of pairs lie and how long all are, by their names in the kernel's text.

    With a pitch of 256 there are two tables side by side, of up to 256 entries of 128 bytes; codes of 3 bits have two.
    A trellis' pairs of levels are bytes, which keys and values have in different orders: each has a table of its own.
    """
    by_bytes = tuning.pitch == 256  # bits of a byte that no pair needs are then part of its entry's number
    tables: list[tuple[int, str]] = []  # entries, and what tells them

    def place(entries: int, what: str) -> int:
        if (entries, what) not in tables:
            tables.append((entries, what))
        index = tables.index((entries, what))
        if by_bytes:
            return index // 2 * (256 << 8) + index % 2 * 128
        return 128 * sum(entries for entries, _ in tables[:index])

    offsets = {}
    for name, bits, trellis in (("K", shape.k_bits, shape.k_trellis), ("V", shape.v_bits, shape.v_trellis)):
        high = "pairs"
        if trellis:
            what = high = f"trellis of {name}"
            entries = 256 if by_bytes or bits >= 3 else 128 if name == "K" else 64
        else:
            what = "pairs"
            entries = 256 if by_bytes and bits >= 3 else 1 << (2 * bits)
            if by_bytes and bits == 3:  # each pair is the low or the high bits of a byte
                what, high = "low bits", "high bits"
        offsets[f"{name}_TABLE"] = place(entries, what)
        offsets[f"{name}_HIGH_TABLE"] = place(entries, high)
    if by_bytes:
        total = max(index // 2 * (256 << 8) + (entries << 8) for index, (entries, _) in enumerate(tables))
    else:
        total = 128 * sum(entries for entries, _ in tables)
    return {**offsets, "TABLE_BYTES": total}


def prefill_arena(k_dim: int, v_dim: int, rows: int, columns: int, stages: int) -> Arena:
    """The prefill kernel's, for blocks of `rows` queries and tiles of `columns` keys and values of 16 bits."""
    k_pitch, v_pitch = (-(-dim * HALF_BYTES // PIECE_BYTES // 8) * 8 for dim in (k_dim, v_dim))  # pieces
    keys_at = rows * k_pitch * PIECE_BYTES
    k_tile, v_tile = columns * k_pitch * PIECE_BYTES, columns * v_pitch * PIECE_BYTES
    values_at = keys_at + stages * k_tile
    constants = {
        **{"K_PITCH": k_pitch, "V_PITCH": v_pitch, "KEYS_AT": keys_at, "VALUES_AT": values_at},
        **{"K_TILE_BYTES": k_tile, "V_TILE_BYTES": v_tile},
    }
    return Arena(values_at + stages * v_tile, constants)


def hopper_prefill_arena(k_dim: int, v_dim: int, rows: int, columns: int, stages: int) -> Arena:
    """Hopper's prefill kernel's; dims are multiples of 64, `rows` and `columns` of 8."""
    k_tile, v_tile = columns * k_dim * HALF_BYTES, columns * v_dim * HALF_BYTES
    keys_at = rows * k_dim * HALF_BYTES
    values_at = keys_at + stages * k_tile
    spans_at = values_at + stages * v_tile
    barriers_at = spans_at + rows * SPAN_BYTES
    constants = {
        **{"KEYS_AT": keys_at, "VALUES_AT": values_at, "K_TILE_BYTES": k_tile, "V_TILE_BYTES": v_tile},
        **{"SPANS_AT": spans_at, "BARRIERS_AT": barriers_at},
    }
    return Arena(barriers_at + 4 * stages * BARRIER_BYTES + TILE_ALIGNMENT, constants)
