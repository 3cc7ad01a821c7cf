"""Reading what a batch drew, and drawing one row by itself: the same token as in the batch, or its failure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from turboserve.engine.generation import Drawn, DrawnLogprobs, Generation
from turboserve.engine.row_masks import RowMasks, StepMasks
from turboserve.engine.sampling import BatchSampler, Draws, Logprobs

log = logging.getLogger(__name__)


class NonFiniteLogitsError(RuntimeError):
    """The model's logits hold NaN or are infinite; any token drawn from them would be noise."""


class Flight:
    """A decode step that is on its way: enqueued, its tokens not read.

    rows: None in place of one that left meanwhile. draws: None when the batch's draw raised; each row is then drawn
    alone from `logits` (B, V), which are None otherwise, once its answer up to here is known.
    """

    def __init__(self, rows: Sequence[Generation], draws: Draws | None, logits: mx.array | None = None) -> None:
        self.rows: list[Generation | None] = list(rows)
        self.places = {row: i for i, row in enumerate(rows)}
        self.draws, self.logits = draws, logits

    def __contains__(self, row: Generation) -> bool:
        return row in self.places

    @property
    def is_empty(self) -> bool:
        return not self.places

    def drop(self, row: Generation) -> None:
        """Its token is not wanted any more."""
        self.rows[self.places.pop(row)] = None

    def start(self) -> None:
        """Let the device begin; returns at once."""
        results = [self.logits] if self.draws is None else self.draws.arrays()
        if results:
            mx.async_eval(*results)  # type: ignore[no-untyped-call]  # its stubs leave types out

    def land(self) -> list[Drawn | Exception]:
        """Wait for the tokens, one for each of `rows`. Raises what the device does."""
        if self.draws is not None:
            return read(self.draws)
        assert self.logits is not None
        drawn: list[Drawn | Exception] = [Drawn(0)] * len(self.rows)
        mx.eval(self.logits)
        for i, row in enumerate(self.rows):
            if row is not None:
                drawn[i] = draw_alone(self.logits[i : i + 1], row)
        return drawn


def sampler_of(rows: Sequence[Generation]) -> BatchSampler:
    """A sampler at the tokens that these rows' answers have now."""
    sampler = BatchSampler()
    for row in rows:
        add_row(sampler, row)
    return sampler


def add_row(sampler: BatchSampler, row: Generation, ahead: Sequence[int] = ()) -> None:
    """Let a row draw with the others; of its answer nothing may be on its way.

    ahead: what its answer is taken to go on with before the draw.
    """
    assert row.sampling is not None
    sampling = row.sampling if row.rule is None else replace(row.sampling, barred_until=0)  # its mask sees to that
    sampler.join(sampling, row.prompt, [*row.answer, *ahead] if ahead else row.answer)


def sample(sampler: BatchSampler, logits: mx.array, masks: StepMasks | None) -> Draws:
    """Draws of all rows from logits (B, V), within the masks of those that have one."""
    if masks is None:
        return sampler.sample(logits)
    return sampler.sample(logits, mask=masks.mask, masked=masks.places)


def read(draws: Draws) -> list[Drawn | Exception]:
    """Each row's token, waiting once for all of them."""
    if pending := draws.arrays():
        mx.eval(*pending)
    tokens, is_broken = np.array(draws.tokens).tolist(), np.array(draws.is_broken).tolist()
    drawn: list[Drawn | Exception] = [
        NonFiniteLogitsError("the model's logits are not finite") if broken else Drawn(token)
        for token, broken in zip(tokens, is_broken, strict=True)
    ]
    if draws.logprobs is not None:
        _add_logprobs(drawn, draws.logprobs)
    return drawn


def _add_logprobs(drawn: list[Drawn | Exception], logprobs: Logprobs) -> None:
    values, ids, top = (np.array(x).tolist() for x in (logprobs.drawn, logprobs.top_ids, logprobs.top))
    for i, (place, num_top) in enumerate(zip(logprobs.places, logprobs.num_top, strict=True)):
        row = drawn[place]
        if isinstance(row, Drawn):
            likeliest = list(zip(ids[i][:num_top], top[i][:num_top], strict=True))
            drawn[place] = Drawn(row.token, DrawnLogprobs(values[i], likeliest))


def draw_alone(logits: mx.array, row: Generation) -> Drawn | Exception:
    """One row's token from its logits (1, V), the same as in a batch, or what its sampling or its rule raised."""
    try:
        masks = RowMasks().fill([row], logits.shape[-1])
        if masks is not None and masks.failed:
            return masks.failed[0]
        return read(sample(sampler_of([row]), logits, masks))[0]
    except Exception as exc:
        log.exception("sampling failed for request %s", row.request_id)
        return exc


def newest_tokens(rows: Sequence[Generation], flight: Flight) -> mx.array:
    """The tokens (B, 1) uint32 that rows are to be fed with, those in flight unread."""
    assert flight.draws is not None
    drawn = flight.draws.tokens
    tokens = drawn if isinstance(drawn, mx.array) else mx.array(drawn)
    if flight.rows == rows:  # nearly always
        return tokens[:, None]
    known = [row.newest_token() for row in rows if row not in flight]
    if known:
        tokens = mx.concatenate([tokens, mx.array(known, dtype=mx.uint32)])
    place = flight.places
    new = iter(range(len(flight.rows), len(flight.rows) + len(known)))
    return tokens[mx.array([place[row] if row in place else next(new) for row in rows])][:, None]
