"""Runs the model: decode steps of all running rows, and prefill chunks (prompt_passes.py).

Owns the batched caches. Deciding who runs is the step loop's business.

Overlap. Where it is on (overlap.py), `step` enqueues a step that is fed with the last one's tokens before it reads
these: the device computes while the host delivers. A row that ends by a token that is read then has one token in its
caches that it was not meant to have, and is cut back by it when it leaves; one whose last token is on its way is left
out of the next step. `cache_len` never counts the token in flight.

Drafts. Where there is speculation (speculation.py), a step may check guessed tokens behind each row's newest one and
returns several of a row. The batch then holds them all; `take` tells which of them the row has, and whoever leaves
before is cut back to what it has. A step with drafts is computed at once, and what fails in it is computed again
without.

Graphs. Where a trial at start says that it is faster (graph_choice.py), the graph of a step without adapters is kept
and run again with the present arrays, instead of being built by the model's Python.

Rules. A mask depends on all tokens before it, so while a row has a token rule nothing is enqueued ahead: what is in
flight lands, and steps are computed at once, their masks being filled while the device computes the logits.

Failure isolation. Logits that are not finite cost their own row only. When sampling the batch raises, each row is drawn
alone, which gives the same token, and rows that raise alone are reported. When the batched forward pass raises, every
row is cut back to its length before the step and tried alone: rows that work keep their token, rows that raise are
reported. A step that raises while the last one's tokens are in flight never happened: once they are known it is tried
again without overlap. Rows whose cache cannot be trusted any more (work was already submitted to the device, or the
cache cannot be cut) are reported as lost, and the loop computes their caches again from their tokens.

Rows apart. A model whose batches were found to be wrong at start, or fail again and again although each row works
alone, is computed row by row from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from turboquant_kv.cache.batch_probe import Batching
from turboquant_kv.cache.kept_graphs import KeptGraphs
from turboquant_kv.cache.protocol import BatchRows
from turboquant_kv.cache.rows_apart import Around
from turboquant_kv.kv_bytes import KVBytes
from turboserve.engine.adapters import NO_ADAPTERS, Adapters
from turboserve.engine.draws import Flight, add_row, draw_alone, newest_tokens, read, sample, sampler_of
from turboserve.engine.evaluating_runtime import EvaluatingRuntime
from turboserve.engine.failures import known_cause
from turboserve.engine.generation import Drawn, Generation, Outcomes
from turboserve.engine.graph_choice import TRIAL_STEPS, GraphChoice, trial_room
from turboserve.engine.passes import Model, OwnPasses, Passes
from turboserve.engine.prompt_passes import PromptPasses
from turboserve.engine.row_masks import RowMasks, StepMasks
from turboserve.engine.sampling import BatchSampler, Draws
from turboserve.engine.speculation import Speculation
from turboserve.engine.speculation_step import draw_runs, fed_tokens
from turboserve.errors import StartupError

log = logging.getLogger(__name__)

MOST_FAILED_BATCHES = 2  # in a row, all of whose rows work alone; the batch is what fails then


class _DeviceError(Exception):
    """Evaluation failed, so arrays written in this step are in an unknown state."""


class Runner:
    """The model, and the rows being decoded together. One thread only."""

    def __init__(
        self,
        model: Model,
        runtime: EvaluatingRuntime,
        adapters: Adapters = NO_ADAPTERS,
        passes: Passes | None = None,
    ) -> None:
        """passes: through the model; None: in this process."""
        self._passes = OwnPasses(model) if passes is None else passes
        self._adapters = adapters
        self._runtime = runtime
        self._rows: list[Generation] = []
        self._caches: list[Any] | None = None  # batched, one per layer, rows as in _rows
        self._sampler: BatchSampler | None = None  # rows as in _rows; None: to be made of them by the next draw
        self._masks = RowMasks()
        self.apart: str | None = None  # why rows are computed one by one; None: they are computed together
        self._num_failed_batches = 0  # since the last batch of several rows that worked
        self.prompts = PromptPasses(self._passes, runtime, adapters)
        self.overlaps = False  # whether steps are enqueued ahead
        self._flight: Flight | None = None
        self.speculation: Speculation | None = None
        self.graphs: KeptGraphs | None = None  # of decode steps, where those pay; a divided model's are its passes'
        self._ahead: dict[Generation, int] = {}  # tokens of the last step that a row has in the batch and not yet
        self._is_wary = False  # a step failed: the next one is computed at once, and whoever makes it fail is found

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def batching(self) -> str:
        """How requests that run at the same time are computed, and why."""
        return "together" if self.apart is None else f"one by one ({self.apart})"

    def has(self, generation: Generation) -> bool:
        """Whether a request is decoding in the batch."""
        return any(row is generation for row in self._rows)

    def warm_up(self) -> int:
        """One real batched forward pass; returns the vocabulary's length as the logits have it.

        Decides whether rows are computed together. Raises StartupError when the model cannot compute a single token.
        """
        caches = self._runtime.make_cache()
        try:
            found = self._runtime.try_batches()
            self._use(found)
            batch = self._merge([caches])
            logits, _ = self._forward([[0]], batch)
        except Exception as exc:
            if (cause := known_cause(exc)) is not None:
                raise StartupError(cause) from exc
            log.exception("the model cannot be run")
            name = type(exc.__cause__ or exc).__name__
            raise StartupError(f"This model cannot compute a token ({name}): the log has details.") from exc
        self.prompts.can_feed_together = found.prefill is None and all(isinstance(cache, BatchRows) for cache in batch)
        self._runtime.release(batch)
        return int(logits.shape[-1])

    def _use(self, found: Batching) -> None:
        """What a trial of batches found; said once."""
        self.apart = found.decode
        if found.decode is not None:
            log.warning("requests that run at the same time are computed one by one: %s", found.decode)
        elif found.prefill is not None:
            log.warning("prompts are read one by one: %s", found.prefill)

    def prefill(self, pieces: Sequence[tuple[Generation, int]]) -> Mapping[Generation, Exception]:
        """Feed the next tokens, so many of each request, into the requests' own caches; what was raised by whom."""
        return self.prompts.feed(pieces)

    def _adapted(self, rows: Sequence[Generation]) -> Around:
        """Around a pass over some of these rows: the model computes each with its own adapter, or without."""
        return lambda places: self._adapters.applied([rows[i].adapter for i in places] if rows else [])

    def join(self, generation: Generation) -> None:
        """Let a prefilled request decode with the others; its caches move into the batch."""
        assert generation.caches is not None and generation.num_to_prefill <= 0
        joined = self._merge([generation.caches])
        self._runtime.release(generation.caches)
        generation.caches = None
        if self._caches is None:
            self._caches = joined
        else:
            self._caches = self._runtime.extend_rows(self._caches, joined)
        self._rows.append(generation)
        if self._sampler is not None:
            try:
                add_row(self._sampler, generation)
            except Exception:  # met again when the row is drawn alone
                log.exception("the sampler cannot take request %s", generation.request_id)
                self._sampler = None

    def leave(self, leaving: Sequence[Generation]) -> None:
        """Take rows out of the batch; each gets its caches back as a single sequence's."""
        if not leaving:
            return
        for generation in leaving:
            index, flight = self._rows.index(generation), self._flight
            if self._ahead.pop(generation, 0):
                generation.caches = self._runtime.fork_row(self._batch(), index, generation.cache_len)
            elif flight is not None and generation in flight:
                generation.caches = self._runtime.fork_row(self._batch(), index, generation.cache_len)
                flight.drop(generation)
            else:
                generation.caches = self._extract(index)
        if self._flight is not None and self._flight.is_empty:
            self._flight = None
        self._take_out(leaving)

    def _take_out(self, leaving: Sequence[Generation]) -> None:
        """The others stay, in their order."""
        keep = [i for i, row in enumerate(self._rows) if row not in leaving]
        self._rows = [self._rows[i] for i in keep]
        if self._sampler is not None:
            self._sampler.keep(keep)
        if keep:
            self._runtime.filter_rows(self._batch(), keep)
        else:
            self._forget_batch()

    def measure(self, generation: Generation) -> KVBytes:
        """Bytes of a request's caches, wherever they are now."""
        if generation.caches is not None:
            return self._runtime.measure(generation.caches)
        return self._runtime.measure_row(self._batch(), self._rows.index(generation))

    def usable_prefix(self, generation: Generation, length: int) -> int:
        """Longest n <= length of which `fork` can make caches without loss; a token in flight is in none."""
        if generation.caches is not None:
            return self._runtime.usable_prefix(generation.caches, length)
        if not self.has(generation):
            return 0
        length = min(length, generation.cache_len)
        return self._runtime.usable_prefix_row(self._batch(), self._rows.index(generation), length)

    def fork(self, generation: Generation, length: int) -> list[Any]:
        """Caches of a request's first `length` tokens, sharing pages; it goes on undisturbed."""
        if generation.caches is not None:
            return self._runtime.fork(generation.caches, length)
        return self._runtime.fork_row(self._batch(), self._rows.index(generation), length)

    def views(self) -> list[list[Any]]:
        """Every row's caches by themselves, sharing pages, to be released by the caller."""
        return [self._extract(i) for i in range(len(self._rows))]

    def num_in_flight(self, generation: Generation) -> int:
        """Tokens in a request's caches that were fed before they were known, or before it took them."""
        return int(self._flight is not None and generation in self._flight) + self._ahead.get(generation, 0)

    @property
    def most_in_flight(self) -> int:
        """Of any request, as `num_in_flight`."""
        return int(self._flight is not None) + max(self._ahead.values(), default=0)

    def take(self, generation: Generation) -> None:
        """A row gets the next of the several tokens that the last step has returned for it."""
        self._ahead[generation] -= 1
        if not self._ahead[generation]:
            del self._ahead[generation]
        generation.cache_len += 1
        generation.num_accepted += 1

    def step(self) -> Outcomes:
        """Feed every row's newest token and draw the next one for each.

        With overlap, the tokens that are returned are the last step's, and this one's are on their way: of rows that
        have just joined there is none yet.
        """
        flight = self._flight
        self._ahead.clear()
        is_wary = self._must_be_wary()
        has_drafts = not is_wary and self.speculation is not None and self._is_worth_drafting(self.speculation)
        must_know = is_wary or has_drafts or any(row.rule is not None for row in self._rows)
        if flight is None and (not self.overlaps or must_know or self._is_awaited):
            return self._step_at_once(has_drafts=has_drafts)
        if flight is not None and (flight.draws is None or self._sampler is None or must_know):
            return self.land()  # nothing can be built on it
        ending = [row for row in self._rows if flight is not None and row in flight and row.num_answer_left <= 1]
        for row in ending:
            row.caches = self._extract(self._rows.index(row))
        if ending:
            self._take_out(ending)
        if not self._rows:
            return self.land()
        if self.speculation is None:
            return self._fly_on(flight)
        self.speculation.begin()
        outcomes = self._fly_on(flight)
        if flight is not None:
            self.speculation.learn(None, (), len(self._rows))
        return outcomes

    @property
    def _is_awaited(self) -> bool:
        """Whether the only row has no token yet: its reader would wait until a second step has been prepared."""
        return len(self._rows) == 1 and not self._rows[0].answer

    def _is_worth_drafting(self, speculation: Speculation) -> bool:
        return bool(self._rows) and speculation.is_worth_it(self._rows, self._batch())

    def _must_be_wary(self) -> bool:
        """A row whose cache was lost may do it again; without overlap the fault is found where it happens."""
        return self._is_wary or any(row.num_recoveries for row in self._rows)

    def _fly_on(self, flight: Flight | None) -> Outcomes:
        """Enqueue the next step, then land the one before, if there is one."""
        rows = list(self._rows)
        try:
            launched = self._launch(rows, flight)
        except _DeviceError:
            log.exception("a decode step of %d rows failed on the device; their caches are computed again", len(rows))
            return {**self.land(), **self._lose_all(rows)}
        except Exception:
            log.exception("a decode step of %d rows failed; it is tried again without overlap", len(rows))
            self._is_wary = True
            lost = self._take_back(rows, flight)
            outcomes = self.land() if flight is not None else self._step_at_once()
            return {**outcomes, **dict.fromkeys(lost)}
        outcomes = self.land()
        if flight is None or self._caches is not None:  # else all was lost on landing
            self._flight = launched
        return outcomes

    def _launch(self, rows: list[Generation], flight: Flight | None) -> Flight:
        """Enqueue a step of the batch, fed with tokens in flight where a row's newest is one."""
        batch, around = self._batch(), self._adapted(rows)
        if self.graphs is not None and self._may_keep_graph(rows):
            known = mx.array([[row.newest_token()] for row in rows]) if flight is None else newest_tokens(rows, flight)
            logits = self.graphs.forward(known.astype(mx.uint32), batch)
        elif flight is None:
            logits = self._passes.logits([[row.newest_token()] for row in rows], batch, around)
        else:
            logits = self._passes.logits_of_drawn(newest_tokens(rows, flight), batch, around)
        logits = logits[:, -1, :]
        try:
            launched = Flight(rows, self._sample(logits))
        except Exception:
            log.exception("sampling failed for a batch of %d rows; each row is drawn alone", len(rows))
            self._sampler, launched = None, Flight(rows, None, logits)
        try:
            launched.start()
        except Exception as exc:
            raise _DeviceError from exc
        return launched

    def land(self) -> Outcomes:
        """The tokens of the step in flight, if there is one; nothing is in flight afterwards."""
        flight, self._flight = self._flight, None
        if flight is None:
            return {}
        try:
            drawn = flight.land()
        except Exception:
            rows = [row for row in flight.rows if row is not None]
            rows += [row for row in self._rows if row not in rows]  # a step that was built on it is lost with it
            log.exception("a decode step of %d rows failed on the device; their caches are computed again", len(rows))
            return self._lose_all(rows)
        outcomes: dict[Generation, Drawn | Exception | None] = {}
        for row, outcome in zip(flight.rows, drawn, strict=True):
            if row is not None:
                row.cache_len += 1
                outcomes[row] = outcome
        return outcomes

    def _take_back(self, rows: list[Generation], flight: Flight | None) -> list[Generation]:
        """After a step that could not be built: the rows as they were before it; returns those that are lost."""
        singles = {}
        for i, row in enumerate(rows):
            held_len = row.cache_len + (1 if flight is not None and row in flight else 0)
            singles[row] = self._roll_back(i, row, held_len)
        self._forget_rows()
        self._forget_batch()
        self._rows = [row for row in rows if singles[row] is not None]
        kept = [caches for caches in singles.values() if caches is not None]
        if kept:
            self._caches = self._merge(kept)
            for caches in kept:
                self._runtime.release(caches)
        return [row for row in rows if singles[row] is None]

    def _step_at_once(self, *, has_drafts: bool = False) -> Outcomes:
        """A step without overlap: its own tokens are returned."""
        self._is_wary = False
        if not self._rows:
            return {}
        rows = list(self._rows)
        if self.speculation is not None:
            drafts = self.speculation.drafts(rows)
            if has_drafts and drafts is not None:
                return self._step_with_drafts(self.speculation, rows, drafts)
        try:
            logits, masks = self._forward([[row.newest_token()] for row in rows], self._batch(), rows, rows)
        except _DeviceError:
            log.exception("a decode step of %d rows failed on the device; their caches are computed again", len(rows))
            return self._lose_all(rows)
        except Exception:
            log.exception("a decode step of %d rows failed; each row is tried alone", len(rows))
            return self._step_alone(rows)
        if len(rows) > 1:
            self._num_failed_batches = 0
        for row in rows:
            row.cache_len += 1
        drawn = self._draw(logits, masks)
        if self.speculation is not None:
            self.speculation.learn(None, (), len(rows))
        return dict(zip(rows, drawn, strict=True))

    @property
    def trial_room(self) -> int:
        """Tokens that each row can take and be cut back from; all that `try_graphs` needs where it will try nothing."""
        self.land()
        can_try = self._may_keep_graph(self._rows)
        return trial_room(self._batch(), self.num_rows) if can_try else TRIAL_STEPS

    @property
    def graphs_failure(self) -> Exception | None:
        """What ended the use of kept graphs that `try_graphs` chose; None while nothing did."""
        return self._passes.graphs_failure

    def try_graphs(self, wanted: str) -> GraphChoice:
        """Decide by the batch as it is whether steps keep their graphs. wanted: settings.keep_graphs."""
        self.land()
        if not self._may_keep_graph(self._rows):
            return GraphChoice(None, "rows are computed one by one, or by adapters")
        choice = self._passes.try_graphs(self._batch(), self.num_rows, wanted)
        self.graphs = choice.graphs
        return choice

    def try_guesses(self, most: int) -> None:
        """Feed rows with 1 to `most` tokens more than a step, and forget it again, so that a device compiles it."""
        batch = self._batch()
        for num_tokens in range(2, most + 2):
            self._forward([[0] * num_tokens] * len(self._rows), batch, self._rows, last_only=False)
            self._runtime.trim_rows(batch, [num_tokens] * len(self._rows))

    def _step_with_drafts(
        self, speculation: Speculation, rows: list[Generation], drafts: Sequence[list[int]]
    ) -> Outcomes:
        """One pass over each row's newest token and its drafts; what is wrong of these is cut off again."""
        tokens, lens = fed_tokens(rows, drafts)
        padding = [len(tokens[0]) - n for n in lens]
        batch = self._batch()
        try:
            self._runtime.prepare_rows(batch, lens, padding)
            logits, masks = self._forward(tokens, batch, rows, rows, last_only=False)
            self._runtime.finalize_rows(batch)
            self._sampler = None  # rows move on by different numbers of tokens
            runs = draw_runs(logits, rows, drafts, masks)
            self._runtime.trim_rows(batch, [n - len(run) for n, run in zip(lens, runs, strict=True)])
        except _DeviceError:
            log.exception("a step with drafts of %d rows failed on the device", len(rows))
            return self._lose_all(rows)
        except Exception:
            log.exception("a step with drafts of %d rows failed; each row is tried alone, without", len(rows))
            return self._step_alone(rows)
        outcomes: dict[Generation, Drawn | Exception | list[Drawn | Exception] | None] = {}
        for row, run in zip(rows, runs, strict=True):
            row.cache_len += 1
            if len(run) > 1:
                self._ahead[row] = len(run) - 1
            outcomes[row] = run if len(run) > 1 else run[0]
        speculation.learn(drafts, [len(run) - 1 for run in runs], len(rows))
        return outcomes

    def _forward(
        self,
        tokens: list[list[int]],
        caches: list[Any],
        rows: Sequence[Generation] = (),
        ruled: Sequence[Generation] = (),
        *,
        last_only: bool = True,
    ) -> tuple[mx.array, StepMasks | None]:
        """Logits (B, V) after the last of `tokens` (B, T), and the masks of `ruled`, filled while the device computes.

        rows: whose tokens they are; their adapters apply.

        Without last_only the logits are (B, T, V), after each token.
        Raises _DeviceError when evaluation fails.
        """
        if self.graphs is not None and self._may_keep_graph(rows):
            logits = self.graphs.forward(mx.array(tokens), caches)
        elif last_only and len(tokens[0]) == 1:
            logits = self._passes.token_logits(tokens, caches, self._adapted(rows))
        else:
            logits = self._passes.logits(tokens, caches, self._adapted(rows))
        if last_only and logits.ndim == 3:
            logits = logits[:, -1, :]
        masks = None
        try:
            if any(row.rule is not None for row in ruled):
                mx.async_eval(logits)  # type: ignore[no-untyped-call]  # its stubs leave types out
                masks = self._masks.fill(ruled, logits.shape[-1])
            mx.eval(logits)
            self._runtime.evaluate(caches)
        except Exception as exc:
            raise _DeviceError from exc
        return logits, masks

    def _may_keep_graph(self, rows: Sequence[Generation]) -> bool:
        """Whether these rows' step may be run by a kept graph."""
        return self.apart is None and not any(row.adapter for row in rows)

    def _step_alone(self, rows: list[Generation]) -> Outcomes:
        """After a failed batched step: one row at a time, from their state before it."""
        singles = [self._roll_back(i, row, row.cache_len) for i, row in enumerate(rows)]
        self._forget_rows()
        self._forget_batch()
        outcomes: dict[Generation, Drawn | Exception | None] = {}
        for row, caches in zip(rows, singles, strict=True):
            outcomes[row] = None if caches is None else self._try_row(row, caches)
        if len(rows) > 1 and self.num_rows == len(rows):  # each of them works alone
            self._note_failed_batch()
        return outcomes

    def _note_failed_batch(self) -> None:
        """A model whose batches fail is not asked for another one: each would cost a step and a traceback."""
        self._num_failed_batches += 1
        if self._num_failed_batches < MOST_FAILED_BATCHES or self.apart is not None:
            return
        self.prompts.can_feed_together = False
        self.apart = "several rows together failed, and each of them worked alone"
        self.speculation = None  # guesses are checked in batches
        log.warning("requests that run at the same time are computed one by one from now on: %s", self.apart)
        singles = [self._extract(i) for i in range(self.num_rows)]
        self._forget_batch()
        self._caches = self._merge(singles)
        for caches in singles:
            self._runtime.release(caches)

    def _try_row(self, row: Generation, caches: list[Any]) -> Drawn | Exception | None:
        """One decode step of one row, which joins the new batch when it works."""
        batch = self._merge([caches])
        try:
            logits, _ = self._forward([[row.newest_token()]], batch, [row])
            row.caches = self._runtime.extract_row(batch, 0)
        except _DeviceError:
            self._runtime.release(caches)
            return None
        except Exception as exc:
            log.warning("request %s fails alone as well", row.request_id, exc_info=True)
            row.caches = caches
            return exc.with_traceback(None)  # its frames would keep caches alive
        finally:
            self._runtime.release(batch)
        self._runtime.release(caches)
        row.cache_len += 1
        outcome = draw_alone(logits, row)
        self.join(row)
        return outcome

    def _lose_all(self, rows: list[Generation]) -> Outcomes:
        self._passes.note_device_failure()
        for row in rows:
            if row.caches is not None:  # it had left the batch with its last token in flight
                self._runtime.release(row.caches)
                row.caches = None
        self._forget_rows()
        self._forget_batch()
        return dict.fromkeys(rows)

    def _roll_back(self, index: int, row: Generation, held_len: int) -> list[Any] | None:
        """A row's caches with the tokens they held before the failed step, or None when that cannot be had."""
        try:
            caches = self._extract(index)
            return caches if self._runtime.cut_back(caches, held_len) else None
        except Exception:
            log.exception("the cache of request %s cannot be cut back", row.request_id)
            return None

    def _draw(self, logits: mx.array, masks: StepMasks | None) -> list[Drawn | Exception]:
        """Each row's next token from logits (B, V), or what went wrong with it."""
        try:
            drawn = read(self._sample(logits, masks))
        except Exception:
            log.exception("sampling failed for a batch of %d rows; each row is drawn alone", len(self._rows))
            self._sampler = None
            return [draw_alone(logits[i : i + 1], row) for i, row in enumerate(self._rows)]
        for place, failure in masks.failed.items() if masks is not None else ():
            drawn[place] = failure
        return drawn

    def _sample(self, logits: mx.array, masks: StepMasks | None = None) -> Draws:
        if self._sampler is None:
            self._sampler = sampler_of(self._rows)
        return sample(self._sampler, logits, masks)

    def _forget_rows(self) -> None:
        self._rows = []
        self._sampler = None

    def _merge(self, singles: list[list[Any]]) -> list[Any]:
        return self._runtime.merge_rows(singles) if self.apart is None else self._runtime.merge_apart(singles)

    def _extract(self, index: int) -> list[Any]:
        return self._runtime.extract_row(self._batch(), index)

    def _batch(self) -> list[Any]:
        assert self._caches is not None, "no rows are running"
        return self._caches

    def _forget_batch(self) -> None:
        if self._caches is not None:
            self._runtime.release(self._caches)
        self._caches = None
