"""One step with drafts: what is fed, and which of the drawn tokens count.

Each row is fed with its newest token and its drafts, so that the logits behind each of them come from one pass. At
each place the token is drawn that a step by itself would draw there: a draw depends on the logits, the row's seed and
the place alone (sampling.py), and penalties count the drafts before it. A draft is accepted where it equals the draw.
So the tokens are those that come without drafts, at any temperature, but for the rounding of a wider product.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from turboserve.engine.draws import add_row, draw_alone, read, sample
from turboserve.engine.generation import Drawn, Generation
from turboserve.engine.row_masks import StepMasks
from turboserve.engine.sampling import BatchSampler

log = logging.getLogger(__name__)

Run = list[Drawn | Exception]
"""A row's next tokens: at least one, and another for each draft that was accepted. What failed ends it."""


def fed_tokens(rows: Sequence[Generation], drafts: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Tokens (B, T), padded on the right, and how many of each row are none of the padding."""
    lens = [1 + len(draft) for draft in drafts]
    longest = max(lens)
    tokens = [
        [row.newest_token(), *draft, *[0] * (longest - n)] for row, draft, n in zip(rows, drafts, lens, strict=True)
    ]
    return tokens, lens


def draw_runs(
    logits: mx.array, rows: Sequence[Generation], drafts: Sequence[list[int]], masks: StepMasks | None
) -> list[Run]:
    """Each row's next tokens from logits (B, T, V). Rows of `masks` have no drafts.

    Where drawing for all raises, each row's one next token is drawn alone.
    """
    lens = [1 + len(draft) for draft in drafts]
    starts = [sum(lens[:i]) for i in range(len(lens))]
    try:
        drawn = read(sample(_sampler_of(rows, drafts), _rows_of(logits, lens), _moved(masks, starts)))
    except Exception:
        log.exception("sampling failed for %d rows with drafts; each row is drawn alone", len(rows))
        return [[draw_alone(logits[i : i + 1, 0], row)] for i, row in enumerate(rows)]
    for place, failure in masks.failed.items() if masks is not None else ():
        drawn[starts[place]] = failure
    return [_accepted(drawn[start : start + n], draft) for start, n, draft in zip(starts, lens, drafts, strict=True)]


def _sampler_of(rows: Sequence[Generation], drafts: Sequence[list[int]]) -> BatchSampler:
    sampler = BatchSampler()
    for row, draft in zip(rows, drafts, strict=True):
        for i in range(len(draft) + 1):
            add_row(sampler, row, draft[:i])
    return sampler


def _rows_of(logits: mx.array, lens: Sequence[int]) -> mx.array:
    """(sum of lens, V): those that are none of the padding."""
    longest, flat = logits.shape[1], logits.reshape(-1, logits.shape[-1])
    if min(lens) == longest:
        return flat
    return flat[mx.array([i * longest + t for i, n in enumerate(lens) for t in range(n)])]


def _moved(masks: StepMasks | None, starts: Sequence[int]) -> StepMasks | None:
    return None if masks is None else replace(masks, places=[starts[place] for place in masks.places])


def _accepted(drawn: Run, draft: Sequence[int]) -> Run:
    """Up to the first token that is not the draft's."""
    for i, (outcome, token) in enumerate(zip(drawn, draft, strict=False)):
        if isinstance(outcome, Exception) or outcome.token != token:
            return drawn[: i + 1]
    return drawn
