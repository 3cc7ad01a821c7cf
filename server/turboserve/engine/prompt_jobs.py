"""Prompts are read, and questions about text answered, on a thread of their own, while streams go on.

One thread, because a tokenizer serves one at a time; short texts go before long ones, so that one of megabytes does not
hold up the rest. A request is here, with the makers of rules, in the engine's inbox or with the step loop, and moves
from one to the next under the engine's lock.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from turboserve.engine.failures import as_failure
from turboserve.engine.generation import Generation
from turboserve.engine.inbox import RETRY_AFTER_START_S, Call, InboxItem, ReadInputs, Refused
from turboserve.engine.template import Prompt
from turboserve.engine.template_process import Patience
from turboserve.errors import EngineUnavailableError, RequestCancelledError, TurboServeError
from turboserve.logs import request_id as log_request_id
from turboserve.messages import Embed, Request, TextQuestion

log = logging.getLogger(__name__)


class ReadsPrompts(Protocol):
    """What is used of the step loop: none of it touches the model or the memory."""

    def read_prompt(self, request: Request, patience: Patience) -> Prompt:
        """What the model reads for this request."""
        ...

    def answer_text(self, question: TextQuestion, patience: Patience) -> object:
        """The answer to a question about text alone."""
        ...

    def read_inputs(self, question: Embed, patience: Patience) -> list[list[int]]:
        """Token ids of each input."""
        ...


class PromptJobs:
    """Requests and questions whose text is being read. Methods take the engine's lock, which their caller may hold."""

    def __init__(
        self,
        changed: threading.Condition,
        inbox: deque[InboxItem],
        on_read: Callable[[Generation], None],
        timeout_s: float,
        logs_prompts: bool = False,
    ) -> None:
        """changed: the engine's lock, notified of every change; inbox: where refusals go; on_read: told with the lock
        that a request's prompt is there; logs_prompts: their texts go into the log."""
        self._changed, self._inbox, self._on_read, self._timeout_s = changed, inbox, on_read, timeout_s
        self._logs_prompts = logs_prompts
        self._generations: dict[Generation, None] = {}
        self._queue: queue.PriorityQueue[tuple[bool, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._reader: ReadsPrompts | None = None
        self._thread = threading.Thread(target=self._run, name="prompts", daemon=True)
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._generations)

    def open(self, reader: ReadsPrompts, warm_up: Callable[[], None]) -> Future[None]:
        """The model is there; the future ends when prompts can be read."""
        self._reader = reader
        ready: Future[None] = Future()

        def begin() -> None:
            try:
                warm_up()
                ready.set_result(None)
            except Exception as exc:
                ready.set_exception(exc)

        self._queue.put((False, next(self._numbers), begin))
        self._thread.start()
        return ready

    def add(self, generation: Generation, *, is_long: bool) -> None:
        """Read this request's prompt, then tell so; or leave in the inbox the news that there is none."""
        with self._changed:
            self._generations[generation] = None
            self._put(is_long, lambda: self._read(generation))

    def ask(self, call: Call, *, is_long: bool) -> None:
        """Answer a question about text; of one for embeddings, the inbox gets the tokens."""
        self._put(is_long, lambda: self._answer(call))

    def cancel(self, request_id: str) -> bool:
        """Whether a request with this id was here; it is taken out, and the inbox told."""
        with self._changed:
            generation = next((g for g in self._generations if g.request_id == request_id), None)
            if generation is not None:
                self._refuse(generation, RequestCancelledError("The request was cancelled."))
            return generation is not None

    def take_all(self) -> list[Generation]:
        """Everyone who is here; nothing will become of their prompts."""
        with self._changed:
            left = list(self._generations)
            self._generations.clear()
            return left

    def close(self) -> None:
        """Read no more. A prompt that is being read is given up at its next piece."""
        self._is_closed = True
        self._queue.put((False, -1, None))

    def _put(self, is_long: bool, work: Callable[[], None]) -> None:
        self._queue.put((is_long, next(self._numbers), work))

    def _run(self) -> None:
        while not self._is_closed:
            self._work()
        while not self._queue.empty():  # questions hear that it is over
            self._work()

    def _work(self) -> None:
        work = self._queue.get()[2]
        if work is not None:
            work()

    def _read(self, generation: Generation) -> None:
        assert self._reader is not None
        if generation not in self._generations:
            return
        patience = self._patience(lambda: generation not in self._generations)
        try:
            read, error = self._reader.read_prompt(generation.request, patience), None
            self._log_text(read.text, generation.request_id)
        except Exception as exc:
            read, error = None, _as_error(exc, f"the prompt of request {generation.request_id} could not be made")
        with self._changed:
            if generation not in self._generations:  # cancelled, or the engine has ended
                return
            if error is not None:
                self._refuse(generation, error)
                return
            del self._generations[generation]
            generation.read = read
            self._on_read(generation)

    def _answer(self, call: Call) -> None:
        reader, asked = self._reader, call.asked
        assert reader is not None
        if self._is_closed:
            call.refuse(_shutting_down())
            return
        patience = self._patience(call.future.cancelled)
        if not isinstance(asked, Embed):
            call.run(lambda question: reader.answer_text(question, patience))  # type: ignore[arg-type]  # no command
            return
        try:
            tokens = reader.read_inputs(asked, patience)
            for given in asked.inputs:
                self._log_text(given if isinstance(given, str) else f"{len(given)} token ids")
        except Exception as exc:
            call.refuse(_as_error(exc, "inputs for embeddings could not be read"))
            return
        with self._changed:
            self._inbox.append(ReadInputs(call, tokens))
            self._changed.notify()

    def _log_text(self, text: str, request_id: str = "") -> None:
        """Only where the operator wants it: texts are their writers' own."""
        if self._logs_prompts:
            context = log_request_id.set(request_id)
            log.info("prompt: %s", text, extra={"fields": {"prompt": text}})
            log_request_id.reset(context)

    def _patience(self, has_left: Callable[[], bool]) -> Patience:
        def is_over() -> bool:
            if self._is_closed:
                raise _shutting_down()
            return has_left()

        return Patience(self._timeout_s, is_over)

    def _refuse(self, generation: Generation, error: TurboServeError) -> None:
        self._generations.pop(generation, None)
        self._inbox.append(Refused(generation, error))
        self._changed.notify()


def _shutting_down() -> EngineUnavailableError:
    return EngineUnavailableError("The server is shutting down.", retry_after_s=RETRY_AFTER_START_S)


def _as_error(exc: Exception, what: str) -> TurboServeError:
    if not isinstance(exc, TurboServeError):
        log.exception(what)
    return as_failure(exc, RETRY_AFTER_START_S)
