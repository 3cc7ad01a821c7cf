"""Feeds prompts to the model: chunks of one request or of several in one pass, into the requests' own caches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from turboserve.engine.adapters import Adapters
from turboserve.engine.evaluating_runtime import EvaluatingRuntime
from turboserve.engine.generation import Generation
from turboserve.engine.passes import Passes

log = logging.getLogger(__name__)

MOST_FAILED_PASSES = 2  # of several prompts in a row, all of which work alone; the pass is what fails then


class PromptPasses:
    """Passes over prompts, of the runner's thread."""

    def __init__(self, passes: Passes, runtime: EvaluatingRuntime, adapters: Adapters) -> None:
        self._passes, self._runtime, self._adapters = passes, runtime, adapters
        self.can_feed_together = False  # whether batches of this model's caches store no padding; known once warm
        self._num_failed = 0  # passes over several prompts, since the last one that worked

    def feed(self, pieces: Sequence[tuple[Generation, int]]) -> Mapping[Generation, Exception]:
        """Feed the next tokens, so many of each request, into the requests' own caches, in one pass.

        When a pass of several fails, each is tried alone; returns what was raised by those that fail alone.
        """
        if len(pieces) > 1:
            try:
                self._feed_together(pieces)
                self._num_failed = 0
                return {}
            except Exception:
                log.exception("prefill failed for %d requests together; each is tried alone", len(pieces))
        failed = {}
        for generation, num_tokens in pieces:
            try:
                self._feed_alone(generation, num_tokens)
            except Exception as exc:
                log.exception("prefill failed for request %s", generation.request_id)
                failed[generation] = exc.with_traceback(None)  # its frames would keep caches alive
        if len(pieces) > 1 and not failed:
            self._num_failed += 1
            if self._num_failed == MOST_FAILED_PASSES:
                self.can_feed_together = False
                log.warning("prompts are read one by one from now on: several failed together, and none of them alone")
        return failed

    def _feed_alone(self, generation: Generation, num_tokens: int) -> None:
        caches = generation.caches
        assert caches is not None and num_tokens <= generation.num_to_prefill
        end = generation.cache_len + num_tokens
        with self._adapters.applied([generation.adapter]):
            self._passes.fill([generation.tokens(generation.cache_len, end)], caches)
        self._runtime.evaluate(caches)
        generation.cache_len = end

    def _feed_together(self, pieces: Sequence[tuple[Generation, int]]) -> None:
        """Padded on the right, of which the caches store nothing. What raises leaves the requests as they were."""
        singles = []
        for generation, _ in pieces:
            assert generation.caches is not None
            singles.append(generation.caches)
        lens = [num_tokens for _, num_tokens in pieces]
        padding = [max(lens) - n for n in lens]
        batch = self._runtime.merge_rows(singles)
        try:
            self._runtime.prepare_rows(batch, lens, padding)
            tokens = [g.tokens(g.cache_len, g.cache_len + n) + (max(lens) - n) * [0] for g, n in pieces]
            with self._adapters.applied([generation.adapter for generation, _ in pieces]):
                self._passes.fill(tokens, batch)
            self._runtime.evaluate(batch)
            self._runtime.finalize_rows(batch)
            extended = [self._runtime.extract_row(batch, i) for i in range(len(pieces))]
        finally:
            self._runtime.release(batch)
        for (generation, num_tokens), caches in zip(pieces, extended, strict=True):
            self._runtime.release(generation.caches or [])
            generation.caches = caches
            generation.cache_len += num_tokens
