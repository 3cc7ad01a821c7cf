"""The figures of a launch: structs that Python fills by name and the kernels read by name.

Each NamedTuple here is one C struct of src/figures.h, which this module writes:

    python -m turboquant_kv.backends.gpu.figures > kernels/turboquant_kv/src/figures.h

A struct travels as consecutive int32 values, floats as their bits, so that a plan is one array that an addition on the
GPU can advance. Owns names, order and packing. Leaves out what the values are (plan.py, page_kernels.py, flash.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_type_hints

import mlx.core as mx
import numpy as np

LOG2_E = 1.4426950408889634
# Kernel inputs of fewer elements would come in Metal's constant address space, and so as another kernel.
MIN_ELEMENTS = 8


class StepFigures(NamedTuple):
    """A decode step's share of the plan; what all of its sequences and layers have in common."""

    tiles_per_block: int
    """Tiles of 32 tokens that a thread block takes."""
    table_width: int
    """Columns of the page table."""
    blocks_per_group: int
    """Thread blocks of a row group: one for exact rows, the others for runs of compressed tokens."""
    num_parts: int
    """Parts of the whole launch, one a block."""
    scale: float
    """Of the scores, times log2(e)."""
    reach: int
    """Keys that a query sees, itself included."""
    cap: float
    """Of the scores, times log2(e); read by kernels that cap."""


class SequenceFigures(NamedTuple):
    """One sequence of a decode step, behind the step's own figures in the plan."""

    q_start: int
    """Position of the first query."""
    num_queries: int
    """Query rows that live."""
    num_pages: int
    """Whole compressed pages."""
    sink_offset: int
    """Where its sink begins in the arrays of exact rows."""
    num_sink: int
    """Rows of the sink."""
    window_offset: int
    """Where its window begins in the arrays of exact rows."""
    window_start: int
    """Position of the window's first row."""
    num_window: int
    """Rows of the window."""


class EncodeFigures(NamedTuple):
    """A launch of the encoder."""

    num_pages: int
    """Pages to encode."""


class PutFigures(NamedTuple):
    """A launch that moves rows."""

    num_rows: int
    """Rows to move."""
    length: int
    """Elements of a row."""
    rows_each: int
    """Of the source's sequences."""


class HistoryFigures(NamedTuple):
    """One sequence of a launch that writes histories: sink rows, decoded pages, window rows."""

    first_row: int
    """Where it begins among the rows of all histories."""
    first_page_id: int
    """Where its pages begin in the page table."""
    num_columns: int
    """All of them."""
    num_sink: int
    """Exact rows in front."""
    num_tokens: int
    """Compressed tokens behind them."""
    sink_first: int
    """Where the sink begins in the array of exact rows."""
    window_first: int
    """Where the window begins in its array."""


class PrefillFigures(NamedTuple):
    """One sequence of a launch of prefill attention over such histories."""

    first_row: int
    """Where its history begins among the rows of all."""
    q_start: int
    """Position of the first query."""
    num_queries: int
    """Queries that live."""
    num_rows: int
    """Rows of queries and output; those past the queries are zeros."""
    num_sink: int
    """Columns of the sink."""
    num_tokens: int
    """Columns of decoded pages."""
    window_start: int
    """Position of the window's first row."""
    num_window: int
    """Columns of the window."""
    scale: float
    """Of the scores, times log2(e)."""
    cap: float
    """Of the scores before that scale; read by kernels that cap."""


AnyFigures = StepFigures | SequenceFigures | EncodeFigures | PutFigures | HistoryFigures | PrefillFigures
STRUCTS: tuple[type[AnyFigures], ...] = (
    StepFigures,
    SequenceFigures,
    EncodeFigures,
    PutFigures,
    HistoryFigures,
    PrefillFigures,
)


_FIELD_TYPES: dict[str, dict[str, type]] = {one.__name__: get_type_hints(one) for one in STRUCTS}


def field_types(figures: type[AnyFigures]) -> dict[str, type]:
    """A struct's fields, int or float, in order."""
    return _FIELD_TYPES[figures.__name__]


def words_of(figures: AnyFigures) -> list[int]:
    """As the int32 values that a kernel reads."""
    kinds = field_types(type(figures)).values()
    return [
        int(np.float32(x).view(np.int32)) if kind is float else int(x) for x, kind in zip(figures, kinds, strict=True)
    ]


def array_of(*figures: AnyFigures) -> mx.array:
    """Structs behind each other, flat int32, with zeros up to MIN_ELEMENTS."""
    words = [word for one in figures for word in words_of(one)]
    return mx.array(np.array([*words, *[0] * (MIN_ELEMENTS - len(words))], np.int32))


def struct_text(figures: type[AnyFigures]) -> str:
    """The C struct of a NamedTuple and the function that reads one."""
    kinds = field_types(figures)
    fields = "".join(f"  {kind.__name__} {name};\n" for name, kind in kinds.items())
    read = [f"tq_as_float(at[{i}])" if kind is float else f"at[{i}]" for i, kind in enumerate(kinds.values())]
    name = f"Tq{figures.__name__}"
    return (
        f"struct {name} {{\n{fields}}};\nTQ_CONSTANT int {constant_name(figures)} = {len(read)};\n"
        f"TQ_FN {name} {function_name(figures)}(const TQ_DEVICE int* at) {{\n  return {{{', '.join(read)}}};\n}}\n"
    )


def function_name(figures: type[AnyFigures]) -> str:
    """tq_step_figures for StepFigures."""
    return f"tq_{figures.__name__.removesuffix('Figures').lower()}_figures"


def constant_name(figures: type[AnyFigures]) -> str:
    """STEP_WORDS for StepFigures: how many int32 values one is."""
    return f"{figures.__name__.removesuffix('Figures').upper()}_WORDS"


def header_text(structs: Sequence[type[AnyFigures]] = STRUCTS) -> str:
    """src/figures.h."""
    opening = (
        "// What a launch is told, as int32 values in device memory. Written by backends/gpu/figures.py, which says\n"
        "// what each field means.\n#pragma once\n"
    )
    return opening + "".join(f"\n{struct_text(one)}" for one in structs)


if __name__ == "__main__":
    print(header_text(), end="")
