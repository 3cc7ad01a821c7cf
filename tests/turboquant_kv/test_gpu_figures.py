"""Structs that Python fills and the GPU kernels read: one definition, written as C into src/figures.h."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest

from turboquant_kv.backends.gpu.figures import (
    MIN_ELEMENTS,
    STRUCTS,
    AnyFigures,
    PutFigures,
    SequenceFigures,
    StepFigures,
    array_of,
    header_text,
)


def test_the_kernels_structs_are_pythons() -> None:
    """`python -m turboquant_kv.backends.gpu.figures` writes the file anew."""
    assert resources.files("turboquant_kv").joinpath("src/figures.h").read_text(encoding="utf-8") == header_text()


def test_a_plan_is_its_structs_behind_each_other() -> None:
    """Floats as their bits; whole numbers of a float field too."""
    step = StepFigures(tiles_per_block=3, table_width=8, blocks_per_group=2, num_parts=4, scale=2, reach=7, cap=3)
    sequences = [SequenceFigures(*range(start, start + 8)) for start in (100, 200)]
    words = np.array(array_of(step, *sequences))
    assert words.dtype == np.int32
    scale, cap = (int(np.float32(x).view(np.int32)) for x in (2, 3))
    assert words[:7].tolist() == [3, 8, 2, 4, scale, 7, cap]
    assert words[7:].tolist() == [*range(100, 108), *range(200, 208)]


@pytest.mark.parametrize("struct", STRUCTS)
def test_short_arrays_are_padded(struct: type[AnyFigures]) -> None:
    """Metal passes inputs of fewer elements in another address space."""
    assert array_of(struct(*[1] * len(struct._fields))).size >= MIN_ELEMENTS
    assert np.array(array_of(PutFigures(num_rows=5, length=7, rows_each=9))).tolist() == [5, 7, 9, 0, 0, 0, 0, 0]
