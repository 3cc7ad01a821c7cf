"""Which sequences of a prefill pass share launches, and what these are told; made once for all layers of a step.

The histories of a group's sequences exist at once, one behind the other: of each (H, places) rows, its sink, its pages
decoded, its window, and what fills the last tile where histories are tiles (src/history.h). Owns where each lies and
the groups' bound; kernels are page_kernels.py's and flash.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.gpu.figures import LOG2_E, HistoryFigures, PrefillFigures, SequenceFigures, array_of

# Columns of the histories of one group: as much memory as one conversation of 32K tokens takes in any case. One that is
# longer is a group of its own.
MAX_COLUMNS = 32768


class PrefillSequence(NamedTuple):
    """One sequence of a group."""

    figures: SequenceFigures
    num_tokens: int
    """Compressed ones."""
    first_place: int
    """Places of the group's histories before its own."""
    num_columns: int
    """0 of a sequence that has no query in this step."""
    num_places: int
    """Of its columns and what fills their last tile."""


class PrefillGroup:
    """Sequences first .. last - 1 of a step."""

    def __init__(
        self, first: int, sequences: Sequence[PrefillSequence], num_kv_heads: int, table_width: int, tile: int = 1
    ) -> None:
        """table_width: columns of the step's page table (B, width). tile: columns of a tile; 1: histories are rows."""
        self.first, self.last = first, first + len(sequences)
        self.sequences, self.num_kv_heads, self.tile = sequences, num_kv_heads, tile
        self.num_places = sum(one.num_places for one in sequences)
        self.most_places = max(one.num_places for one in sequences)
        self.most_pages = max(one.figures.num_pages for one in sequences)
        self._table_width = table_width
        self._history_figures: mx.array | None = None
        self._prefill_figures: dict[tuple[int, float, float], mx.array] = {}

    @property
    def num_rows(self) -> int:
        """Of all histories and heads."""
        return self.num_kv_heads * self.num_places

    def rows_of(self, sequence: PrefillSequence) -> slice:
        """Among them."""
        first = self.num_kv_heads * sequence.first_place
        return slice(first, first + self.num_kv_heads * sequence.num_places)

    @property
    def history_figures(self) -> mx.array:
        """HistoryFigures of each sequence, flat; page ids are found in the whole step's table."""
        if self._history_figures is None:
            self._history_figures = array_of(
                *(
                    HistoryFigures(
                        first_row=self.rows_of(one).start,
                        first_page_id=(self.first + i) * self._table_width,
                        num_columns=one.num_columns,
                        num_sink=one.figures.num_sink,
                        num_tokens=one.num_tokens,
                        sink_first=one.figures.sink_offset,
                        window_first=one.figures.window_offset,
                    )
                    for i, one in enumerate(self.sequences)
                )
            )
        return self._history_figures

    def prefill_figures(self, num_rows: int, scale: float, cap: float = 0.0) -> mx.array:
        """PrefillFigures of each sequence, flat. num_rows: of queries and output, of each sequence and head."""
        key = num_rows, scale, cap
        if key not in self._prefill_figures:
            self._prefill_figures[key] = array_of(
                *(
                    PrefillFigures(
                        first_row=self.rows_of(one).start,
                        q_start=one.figures.q_start,
                        num_queries=one.figures.num_queries,
                        num_rows=num_rows,
                        num_sink=one.figures.num_sink,
                        num_tokens=one.num_tokens,
                        window_start=one.figures.window_start,
                        num_window=one.figures.num_window,
                        scale=scale * LOG2_E,
                        cap=cap / scale,
                    )
                    for one in self.sequences
                )
            )
        return self._prefill_figures[key]


def prefill_groups(
    words: npt.NDArray[np.int64], page_tokens: int, num_kv_heads: int, table_width: int, tile: int = 1
) -> tuple[PrefillGroup, ...]:
    """Neighbouring sequences as long as their histories have no more than MAX_COLUMNS columns in all, filled tiles.

    words (B, SequenceFigures) of a step's sequences. tile: as PrefillGroup's.
    """
    groups: list[PrefillGroup] = []
    sequences: list[PrefillSequence] = []
    for i, row in enumerate(words.tolist()):
        figures = SequenceFigures(*row)
        num_tokens = figures.num_pages * page_tokens if figures.num_queries else 0
        num_columns = figures.num_sink + num_tokens + figures.num_window if figures.num_queries else 0
        num_places = -(-num_columns // tile) * tile
        first_place = sequences[-1].first_place + sequences[-1].num_places if sequences else 0
        if sequences and first_place + num_places > MAX_COLUMNS:
            groups.append(PrefillGroup(i - len(sequences), sequences, num_kv_heads, table_width, tile))
            sequences, first_place = [], 0
        sequences.append(PrefillSequence(figures, num_tokens, first_place, num_columns, num_places))
    groups.append(PrefillGroup(len(words) - len(sequences), sequences, num_kv_heads, table_width, tile))
    return tuple(groups)
