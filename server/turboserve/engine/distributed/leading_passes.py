"""A divided model's forward passes on rank 0, which every rank takes part in, and its trial of kept graphs.

Each pass is told to the others before it is built (leading.py); how this rank runs a step, step_graphs.py says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from turboquant_kv.cache.rows_apart import Around
from turboserve.cache.interfaces import Caches
from turboserve.engine.distributed.leading import Lead, Numbered
from turboserve.engine.distributed.step_graphs import RankSteps
from turboserve.engine.graph_choice import GraphChoice, try_ways


class LeadingPasses:
    """Implements engine.passes.Passes for a divided model."""

    def __init__(self, lead: Lead, model: Any) -> None:
        self._lead, self._model = lead, model
        self._steps = RankSteps(model)

    def fill(self, tokens: list[list[int]], caches: Caches) -> None:
        with self._lead.doing("fill", self._lead.number_of(caches), tokens):
            self._model(mx.array(tokens), cache=caches)

    def logits(self, tokens: list[list[int]], batch: Caches, around: Around | None = None) -> mx.array:
        """As Passes has it; there are no adapters, which `around` is for."""
        with self._lead.doing("logits", self._lead.number_of(batch), tokens):
            return self._steps.forward(mx.array(tokens), batch)

    def token_logits(self, tokens: list[list[int]], batch: Caches, around: Around | None = None) -> mx.array:
        return self.logits(tokens, batch, around)[:, -1, :]

    def logits_of_drawn(self, tokens: mx.array, batch: Caches, around: Around | None = None) -> mx.array:
        """The others get the tokens from this rank's device, without waiting for the host to read them."""
        with self._lead.doing("logits_of_drawn", self._lead.number_of(batch), tokens.shape[0]):
            return self._steps.forward(shared_tokens(tokens, self._lead.ranks.group), batch)

    def try_graphs(self, batch: Caches, num_rows: int, wanted: str) -> GraphChoice:
        """All ranks run the trial's steps; its verdict is this rank's, if all can keep graphs (step_graphs.py).

        Raises what passes raise on every rank, and RanksEndedError for what may have been this rank's device.
        """
        ways = _Ways(self._lead, self, self._steps)
        try:
            is_better, reason = try_ways(ways, batch, num_rows, wanted)
        except Exception:
            if not ways.has_raised:
                self.note_device_failure()
            self._forget_graphs()
            raise
        if is_better and not self._can_all_keep():
            is_better, reason = False, "not every rank can keep them, or sums between ranks have no order of their own"
        if is_better:
            ways.keep(True)
        else:
            self._forget_graphs()
        return GraphChoice(None, reason, by_ranks=is_better)

    def _can_all_keep(self) -> bool:
        with self._lead.doing("can_keep_graphs"):
            return self._lead.ranks.all_agree("kept graphs", self._steps.can_keep)

    def _forget_graphs(self) -> None:
        with self._lead.doing("forget_graphs"):
            self._steps.forget()

    @property
    def graphs_failure(self) -> Exception | None:
        return self._steps.failure

    def note_device_failure(self) -> None:
        """Raises RanksEndedError: what the other ranks' devices did is unknown."""
        self._lead.ranks.explain()
        self._lead.ranks.end_because("the device of rank 0 failed in a step")


class _Ways:
    """Implements graph_choice.Ways: each step is told to the others, and the way in which it is run."""

    def __init__(self, lead: Lead, passes: LeadingPasses, steps: RankSteps) -> None:
        self._lead, self._passes, self._steps = lead, passes, steps
        self._is_keeping: bool | None = None
        self.has_raised = False  # in a pass, and so on every rank

    @property
    def num_kept(self) -> int:
        return self._steps.num_kept

    def keep(self, wanted: bool) -> None:
        if wanted != self._is_keeping:
            with self._lead.doing("keep_graphs", wanted):
                self._steps.keep(wanted)
            self._is_keeping = wanted

    def kept(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        self.keep(True)
        return self._step(tokens, batch)

    def built(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        self.keep(False)
        return self._step(tokens, batch)

    def _step(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        assert isinstance(batch, Numbered)
        try:
            return self._passes.logits_of_drawn(tokens, batch)
        except Exception:
            self.has_raised = True
            raise

    def cut(self, batch: Sequence[Any], counts: Sequence[int]) -> None:
        runtime, number = self._lead.formats.default_runtime, self._lead.number_of(batch)
        with self._lead.doing("evaluate", number):
            runtime.evaluate(batch)
        with self._lead.doing("trim_rows", number, list(counts)):
            runtime.trim_rows(batch, counts)


def shared_tokens(tokens: mx.array, group: Any) -> mx.array:
    """Rank 0's tokens (B, 1), on every rank: the sum with the zeros of all others."""
    summed: mx.array = mx.distributed.all_sum(tokens.astype(mx.int32), group=group)
    return summed
