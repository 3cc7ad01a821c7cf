"""The decode kernels' texts: attention to parts in one of three variants, and the parts' merge.

Owns which constants, tables and arguments each gets. The functions that are called lie in src/decode_portable.h,
src/decode_simd.h, src/decode_mma.h and src/combine.h.
"""

from __future__ import annotations

import mlx.core as mx

from turboquant_kv.backends.gpu.arena import MAX_PARTS, decode_arena
from turboquant_kv.backends.gpu.shape import DecodeShape, Variant, is_power_of_two
from turboquant_kv.backends.gpu.source import (
    PLACE,
    Constants,
    Dialect,
    KernelText,
    codec_table,
    header_text,
    lookup_text,
    strided,
    table_text,
)
from turboquant_kv.backends.gpu.tuning import Tuning

DECODE_INPUTS = ("queries", "plan", "page_table", "k_codes", "k_scales", "v_codes", "v_scales", "k_constants", "fence")
FUSED_INPUTS = (*DECODE_INPUTS, "v_constants", "counters")
EXACT_INPUTS = ("sink_k", "sink_v", "window_k", "window_v")
# Of a kernel that writes new rows sinks and windows lie in the same arrays, which it is given once.
OWN_INPUTS = ("rows_k", "rows_v")
NEW_INPUTS = ("new_k", "new_v")
COMBINE_INPUTS = ("parts", "plan", "sinks", "v_constants")
LANE_COMBINE_THREADS = 256
_NO_SINKS = "static_cast<const float*>(nullptr)"


def decode_text(
    dialect: Dialect,
    shape: DecodeShape,
    variant: Variant,
    tuning: Tuning,
    fused: bool,
    appends: bool,
    sink_dtype: mx.Dtype | None,
    balanced: bool = False,
) -> KernelText:
    """The decode kernel of a shape. fused: the last block of a row group merges (mma). appends: it writes new rows.

    balanced: it multiplies queries and new keys by the layer's factors.

    `fence` is not read: it orders the launch behind those that wrote pages and exact rows in place, and the output of
    that name orders the next ones behind this.
    """
    if variant == "mma":
        return _mma_text(shape, tuning, fused, appends, sink_dtype, balanced)
    constants = {**_decode_constants(shape, variant, sink_dtype), "WARPS": tuning.warps}
    constants |= {"APPENDS": appends, "BALANCED": balanced}
    if variant == "simd":
        constants["Piece"] = mx.float32 if shape.dtype == mx.float32 else mx.float16  # of a matrix's operands
    k_table, v_table = codec_table(shape.k_bits, shape.k_trellis), codec_table(shape.v_bits, shape.v_trellis)
    tables = table_text("tq_k_book", k_table) + table_text("tq_v_book", v_table)
    exact = OWN_INPUTS if appends else EXACT_INPUTS
    names = (*_with_turns(DECODE_INPUTS, shape), *exact, *(NEW_INPUTS if appends else ()))
    source = (
        f"{_strides_comment(exact)}TQ_SHARED_VARIABLE(Tq{variant.capitalize()}Shared, shared);\n"
        f"tq_decode_{variant}({PLACE[dialect]}, {_inputs(shape)}, {_exact_rows(exact)}, "
        f"{_new_rows(appends)}, parts, shared);\n"
    )
    head = header_text(dialect, constants, tables, f"decode_{variant}")
    return KernelText(f"decode_{variant}", names, ("parts", "fence_out"), source, head)


def _mma_text(
    shape: DecodeShape, tuning: Tuning, fused: bool, appends: bool, sink_dtype: mx.Dtype | None, balanced: bool
) -> KernelText:
    arena = decode_arena(shape, tuning)
    constants: Constants = {
        **_decode_constants(shape, "mma", sink_dtype),
        **{"WARPS": tuning.warps, "TILE": tuning.tile, "STAGES": tuning.stages, "PITCH": tuning.pitch},
        **{"BULK": tuning.bulk, "EXACT_MMA": shape.has_exact_mma},
        **{"APPENDS": appends, "BALANCED": balanced},
        **arena.constants,
    }
    inputs, outputs = (FUSED_INPUTS, ("out", "parts")) if fused else (DECODE_INPUTS, ("parts",))
    exact = OWN_INPUTS if appends else EXACT_INPUTS
    inputs = (*_with_turns(inputs, shape), *exact, *(NEW_INPUTS if appends else ()))
    if fused and sink_dtype is not None:
        inputs = (*inputs, "sinks")
    finish = f"{{v_constants, counters, out}}, {_NO_SINKS if sink_dtype is None else 'sinks'}, " if fused else ""
    source = (
        f"{_strides_comment(exact)}tq_decode_mma{'_fused' if fused else ''}"
        f"({PLACE['cuda']}, {_inputs(shape)}, {_exact_rows(exact)}, {_new_rows(appends)}, {finish}parts);\n"
    )
    k_table, v_table = codec_table(shape.k_bits, shape.k_trellis), codec_table(shape.v_bits, shape.v_trellis)
    tables = lookup_text("tq_k_book_at", k_table) + lookup_text("tq_v_book_at", v_table)
    # the comment: one name per type of the inputs
    head = f"// {sink_dtype}\n{header_text('cuda', constants, tables, 'decode_mma')}"
    return KernelText(
        "decode_mma",
        inputs,
        (*outputs, "fence_out"),
        source,
        head,
        arena.num_bytes,
        (tuning.threads, tuning.resident),
    )


def _exact_rows(names: tuple[str, ...]) -> str:
    """TqExactRows of src/work.h."""
    given = [f"TQ_ROWS({name})" for name in names]
    return f"TqExactRows {{{', '.join(given * (4 // len(given)))}}}"


def _new_rows(appends: bool) -> str:
    """TqNewRows of src/work.h."""
    members = [", ".join([name, *(f"{name}_strides[{i}]" for i in (0, 1, 3))]) for name in NEW_INPUTS]
    return f"TqNewRows {{{', '.join(members)}}}" if appends else "TqNewRows {}"


# TqDecodeInputs of src/work.h, the same for all variants.
def _inputs(shape: DecodeShape) -> str:
    turns = "turns" if shape.pairs else "k_constants"  # anything of its type that is not read
    return f"{{{strided('queries', 4)}, plan, page_table, k_codes, k_scales, v_codes, v_scales, k_constants, {turns}}}"


def _with_turns(names: tuple[str, ...], shape: DecodeShape) -> tuple[str, ...]:
    return (*names, "turns") if shape.pairs else names


def _strides_comment(names: tuple[str, ...]) -> str:
    """MLX hands over the strides that a body names; it sees no further than a macro's name."""
    return f"// {' '.join(f'{name}_strides' for name in names)}\n"


def _rotation_size(dim: int) -> int:
    """Elements of a rotation in a side's constants: a first row of signs, or the matrix."""
    return dim if is_power_of_two(dim) else dim**2


def _common_constants(shape: DecodeShape, variant: Variant, sink_dtype: mx.Dtype | None) -> Constants:
    return {
        **{"G": shape.group, "HEADS": shape.num_kv_heads, "QROWS": shape.num_rows, "PAGE": shape.page_tokens},
        **{"ROWS": shape.rows_per_block(variant), "LIVE": shape.live_rows(variant), "SINK": shape.sink_tokens},
        **{"DV": shape.v_dim, "V_ROTATION": _rotation_size(shape.v_dim)},
        **{"TURN_PAIRS": shape.pairs, "NEIGHBOURS": shape.neighbours, "TURN_PARTS": shape.turn_parts},
        **{"USE_SINKS": sink_dtype is not None, "In": shape.dtype, "Out": shape.dtype, "Exact": shape.exact_dtype},
    }


def _decode_constants(
    shape: DecodeShape, variant: Variant, sink_dtype: mx.Dtype | None
) -> dict[str, int | bool | mx.Dtype]:
    return {
        **_common_constants(shape, variant, sink_dtype),
        **{"D": shape.k_dim, "K_ROTATION": _rotation_size(shape.k_dim), "KBITS": shape.k_bits, "VBITS": shape.v_bits},
        **{"K_TRELLIS": shape.k_trellis, "V_TRELLIS": shape.v_trellis, "CAPPED": shape.capped},
    }


def combine_width(v_dim: int) -> int:
    """Threads of one run over an output row: whole warps."""
    return -(-v_dim // 32) * 32


def combine_threads(v_dim: int) -> int:
    """Of the merging kernel: eight warps, or as many runs of whole warps over a row as 512 threads hold."""
    if is_power_of_two(v_dim):
        return LANE_COMBINE_THREADS
    width = combine_width(v_dim)
    return width * max(1, 512 // width)


def combine_text(dialect: Dialect, shape: DecodeShape, variant: Variant, sink_dtype: mx.Dtype | None) -> KernelText:
    """The merging kernel of a shape."""
    threads, width = combine_threads(shape.v_dim), combine_width(shape.v_dim)
    constants: Constants = {
        **_common_constants(shape, variant, sink_dtype),
        **{"COMBINE_WARPS": threads // 32, "RUNS": max(1, threads // width), "WIDTH": width, "MAX_PARTS": MAX_PARTS},
    }
    way = "lanes" if is_power_of_two(shape.v_dim) else "dense"
    source = (
        f"TQ_SHARED_VARIABLE(Tq{way.capitalize()}Shared, shared);\n"
        f"tq_combine_{way}({PLACE[dialect]}, {{parts, plan, v_constants}}, sinks, out, shared);\n"
    )
    head = f"// {sink_dtype}\n{header_text(dialect, constants, '', 'combine')}"
    return KernelText("combine", COMBINE_INPUTS, ("out",), source, head, contiguous=True)
