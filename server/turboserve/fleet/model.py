"""One model's state as the fleet keeps it: its process, who uses and waits for it, what it takes, when to try again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from turboserve.errors import ModelUnavailableError
from turboserve.fleet.budget import Holder
from turboserve.fleet.plan import ModelPlan
from turboserve.fleet.process import ModelProcess

State = Literal["unloaded", "loading", "loaded", "stopping", "failed"]
Event = Literal["starts", "start_failures", "crashes", "idle_unloads", "evictions"]

MAX_BACKOFF_S = 60.0
STEADY_S = 60.0  # a process that lived so long did not die of its start


@dataclass(slots=True)
class Backoff:
    """How long to leave a model alone that keeps failing. Times are the caller's clock's."""

    num_failures: int = 0
    not_before: float = 0.0

    def start_failed(self, now: float) -> None:
        """1 s, 2 s, 4 s, ... from now."""
        self.not_before = now + min(2.0**self.num_failures, MAX_BACKOFF_S)
        self.num_failures += 1

    def crashed(self, now: float, lived_s: float) -> None:
        """The first crash after a steady time costs no delay: the next request starts the process again."""
        if lived_s >= STEADY_S:
            self.num_failures = 0
        self.not_before = now + (min(2.0 ** (self.num_failures - 1), MAX_BACKOFF_S) if self.num_failures else 0.0)
        self.num_failures += 1

    def cleared(self) -> None:
        """It ended as it was asked to."""
        self.num_failures, self.not_before = 0, 0.0


@dataclass(slots=True)
class Facts:
    """What a loaded model said of itself; kept when it is unloaded."""

    max_model_len: int = 0
    kv_format: str = ""
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(slots=True)
class Model:
    """Changed by `Fleet` alone."""

    plan: ModelPlan
    need_bytes: int  # what its process is counted as; estimated, then corrected
    facts: Facts
    state: State = "unloaded"
    error: str = ""  # why it failed
    process: ModelProcess | None = None
    starting: asyncio.Task[None] | None = None
    stopping: asyncio.Task[None] | None = None
    num_running: int = 0
    num_waiting: int = 0
    last_used: float = 0.0
    loaded_at: float = 0.0
    backoff: Backoff = field(default_factory=Backoff)
    events: Counter[Event] = field(default_factory=Counter)

    @classmethod
    def of(cls, plan: ModelPlan) -> Model:
        """A configured model that has not been loaded yet."""
        settings = plan.settings
        return cls(plan, plan.estimate_bytes, Facts(settings.max_context_tokens, settings.kv_format))

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def is_idle(self) -> bool:
        """Loaded, and nobody uses it or is about to."""
        return self.state == "loaded" and not (self.num_running or self.num_waiting)

    @property
    def holds_memory(self) -> bool:
        """Its process lives, or will in a moment."""
        return self.state in ("loading", "loaded", "stopping")

    def holder(self) -> Holder:
        """As the budget sees it."""
        return Holder(self.name, self.need_bytes, self.last_used, self.is_idle and not self.plan.is_pinned)

    def measured(self, resident_bytes: int, *, is_fresh: bool) -> None:
        """Correct what the model is counted as. A fresh process holds its weights and hardly any KV cache yet.

        Weights in a GPU's own memory are not resident, so that files' sizes stay the least that is counted.
        """
        if self.plan.fixed_bytes or not resident_bytes:
            return
        if is_fresh:
            self.need_bytes = max(resident_bytes, self.plan.weights_bytes) + self.plan.kv_bytes
        else:
            self.need_bytes = max(self.need_bytes, resident_bytes)

    def check_backoff(self, now: float) -> None:
        """Raises ModelUnavailableError with the reason while it is too early to try again."""
        if now < self.backoff.not_before:
            raise self.unavailable(int(self.backoff.not_before - now) + 1)

    def unavailable(self, retry_after_s: int = 1) -> ModelUnavailableError:
        """What a request for this model is told after it failed."""
        return ModelUnavailableError(
            f"The model {self.name!r} is not available: {self.error}", param="model", retry_after_s=retry_after_s
        )
