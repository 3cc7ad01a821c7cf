"""An engine under watch: memory and books compared after every step, and how sure the model was of every token."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from turboserve.engine import engine as engine_module
from turboserve.engine.generation import Drawn
from turboserve.engine.row_masks import StepMasks
from turboserve.engine.runner import Runner
from turboserve.engine.step_loop import StepLoop

ORIGINAL_DRAW = Runner._draw
CHECK_EVERY = 8  # steps between two full integrity checks; bytes are compared after each


@dataclass
class Watch:
    """What the engine thread saw, step by step."""

    num_steps: int = 0
    most_allocated: int = 0
    most_committed: int = 0
    complaint: str = ""


WATCH = Watch()
# (request, place in the answer) -> (token, its lead in standard deviations of the logits); written by the engine thread
LEADS: dict[tuple[str, int], tuple[int, float]] = {}


def draw_and_note(runner: Runner, logits: mx.array, masks: StepMasks | None) -> list[Drawn | Exception]:
    """The runner's own drawing, whose leads are noted."""
    drawn = ORIGINAL_DRAW(runner, logits, masks)
    values = np.array(logits.astype(mx.float32))  # (B, V)
    best = np.partition(values, -2, axis=-1)[:, -2:]
    leads = (best[:, 1] - best[:, 0]) / values.std(axis=-1)
    for row, outcome, lead in zip(runner._rows, drawn, leads.tolist(), strict=True):
        if isinstance(outcome, Drawn):
            LEADS[row.request_id, len(row.answer)] = (outcome.token, lead)
    return drawn


class CheckedLoop(StepLoop):
    """The real loop; after each step memory must be within the budget, and every few steps all books agree."""

    def step(self) -> None:
        super().step()
        WATCH.num_steps += 1
        try:
            self._compare_bytes()
            if WATCH.num_steps % CHECK_EVERY == 0:
                self.check_integrity()
        except Exception:  # reported by the main thread, which then ends the process
            WATCH.complaint = WATCH.complaint or traceback.format_exc()

    def _compare_bytes(self) -> None:
        stats = self.snapshot()
        WATCH.most_allocated = max(WATCH.most_allocated, stats.kv.total)
        WATCH.most_committed = max(WATCH.most_committed, stats.kv_committed_bytes)
        books = (
            f"{stats.kv_committed_bytes} committed of {stats.kv_budget_bytes}, {stats.kv}, {stats.num_conversations}"
        )
        assert stats.kv_committed_bytes <= stats.kv_budget_bytes, books
        # What waits for the disk is scratch as well, but not in `kv`: here only a prompt's chunk comes on top.
        chunk_bytes = self.prefill_tokens * self._parts.runtime.chunk_token_bytes
        assert stats.kv.total <= stats.kv_budget_bytes + chunk_bytes, books
        assert stats.events.integrity_failures == 0


def watch_engine() -> None:
    """From now on every engine of this process is watched."""
    setattr(engine_module, "StepLoop", CheckedLoop)  # noqa: B010 - the module does not offer it, it uses it
    setattr(Runner, "_draw", draw_and_note)  # noqa: B010
