"""One engine step after another: admit, prefill some prompts, grow, decode everyone, deliver.

Runs on the engine thread only (or a test's). What to do is decided in scheduler.py and by the memory's
verdicts, computed in runner.py, and how requests end is open_requests.py's. The memory names who must
make way; the engine alone can take a request out of the batch. An exception that leaves `step` is a bug
of the engine itself and ends it; whatever one request's data can cause ends that request alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from turboserve.cache.disk.store import DEFAULT_PENDING_BYTES
from turboserve.cache.memory import Growth, Lease, Question, Refuse, Restart, Start, Wait
from turboserve.engine import scheduler
from turboserve.engine.decoding import Decoding
from turboserve.engine.device import on_cpu, own_memory_bytes
from turboserve.engine.embeddings import EmbeddingJobs
from turboserve.engine.fused_draw import draws_line
from turboserve.engine.generation import Drawn, Generation, Outcomes, Stage
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.open_requests import OpenRequests
from turboserve.engine.overlap import choose_overlap
from turboserve.engine.prepare import Preparer, tokens_to_reserve
from turboserve.engine.protocol import EngineTelemetry
from turboserve.engine.questions import Questions
from turboserve.engine.runner import Runner
from turboserve.engine.running_row import RunningRow
from turboserve.engine.scheduler import Admission, WithoutGrowth
from turboserve.engine.snapshot import take_snapshot
from turboserve.engine.speculation_choice import new_speculation, reason_against
from turboserve.engine.template import Prompt
from turboserve.engine.template_process import Patience, TemplateProcess
from turboserve.engine.token_texts import TokenTexts
from turboserve.errors import EngineFailureError, TurboServeError
from turboserve.machine_memory import give_back_heap
from turboserve.messages import Embed, EngineStats, Request, SessionCommand, TextQuestion
from turboserve.settings import Settings

log = logging.getLogger(__name__)

Clock = Callable[[], float]

REST_S = 10.0  # without work, after which scratch memory is given back
MAX_RECOVERIES = 2  # a request whose cache is lost again and again would keep the engine busy for ever


class StepLoop:
    """All requests of one loaded model."""

    def __init__(
        self,
        parts: EngineParts,
        settings: Settings,
        telemetry: EngineTelemetry,
        clock: Clock,
        process: TemplateProcess | None = None,
    ) -> None:
        """Proves that the model works with one real forward pass; raises whatever that raises.

        `process`: where chat templates are rendered; None: on the thread that reads the prompt.
        """
        self._parts, self._settings, self._telemetry, self._clock = parts, settings, telemetry, clock
        self._memory = parts.memory
        self.runner = Runner(parts.loaded.model, parts.runtime, parts.loaded.adapters, parts.passes)
        self.vocab_len = self.runner.warm_up()
        self._token_texts = TokenTexts(parts.loaded.tokenizer)
        decoding = Decoding(parts.loaded.tokenizer, self._token_texts)
        self._preparer = Preparer(
            parts.loaded, parts.memory, decoding, self.vocab_len, settings.default_max_tokens, process
        )
        self.embeddings = EmbeddingJobs(parts.loaded, self.vocab_len)
        self._questions = Questions(parts.loaded, self._preparer)
        self.overlap = choose_overlap(
            settings.overlap,
            can_cut=parts.memory.family.can_cut(parts.memory.family.default),
            backend_name=parts.runtime.backend_name,
            on_cpu=on_cpu(),
        )
        self.runner.overlaps = self.overlap.is_on
        self.graphs_line = "not tried yet"
        self._worked_s, self._has_scratch = clock(), True
        self.speculation = self._choose_speculation()
        most = scheduler.most_prefill_tokens(
            settings.prefill_chunk_tokens, on_cpu=on_cpu(), gpu_bytes=own_memory_bytes()
        )
        self.prefill_tokens = max(most, parts.loaded.prompt_block)
        self._least_chunk = scheduler.CPU_LEAST_CHUNK if on_cpu() else 0
        self._speed = scheduler.PrefillSpeed()
        self.requests = OpenRequests(self.runner, parts.memory, telemetry, clock, settings.max_running)
        self._num_steps = 0

    def _choose_speculation(self) -> str:
        """Gives the runner what guesses tokens, if anything does; why nothing does, else ""."""
        settings, family = self._settings, self._parts.memory.family
        against = reason_against(
            settings.speculate,
            has_draft_model=self._parts.draft is not None,
            can_cut=family.can_cut(family.default),
            stores_no_padding=self.runner.prompts.can_feed_together,
        )
        if against is None:
            self.runner.speculation = new_speculation(self._parts.draft, settings, self.vocab_len)
        return against or ""

    # --- from the thread that reads prompts

    def get_ready_to_read(self) -> None:
        """Try out what the chat template expects."""
        self._preparer.warm_up()

    def read_prompt(self, request: Request, patience: Patience) -> Prompt:
        """What the model reads for this request. Raises InvalidRequestError, of whatever kind, and as `patience`."""
        return self._preparer.prompt_of(request, patience)

    def answer_text(self, question: TextQuestion, patience: Patience) -> object:
        """The answer to a question about text alone; raises as `read_prompt`."""
        return self._questions.answer(question, patience)

    def read_inputs(self, question: Embed, patience: Patience) -> list[list[int]]:
        """Token ids of what embeddings are wanted of; raises as `read_prompt`."""
        return self.embeddings.read(question, patience)

    # --- from outside, between two steps

    @property
    def num_waiting(self) -> int:
        return len(self.requests.waiting)

    @property
    def num_running(self) -> int:
        return len(self.requests.running)

    @property
    def has_work(self) -> bool:
        return bool(self.requests.waiting or self.requests.running or self.embeddings.has_work)

    def add(self, generation: Generation) -> None:
        """Queue a new request behind all others."""
        self.requests.waiting.append(generation)

    def cancel(self, request_id: str) -> None:
        """End a request now; what was computed for it stays as an idle conversation. Unknown ids are ignored."""
        generation = next((g for g in self.requests.everyone() if g.request_id == request_id), None)
        if generation is not None:
            self.requests.cancel(generation)

    def fail_all(self, error: TurboServeError) -> None:
        """End every request with the same error."""
        for generation in self.requests.everyone():
            self.requests.fail(generation, error)
        self.embeddings.fail_all(error)

    def abandon(self, error: TurboServeError) -> None:
        """Tell every reader that it is over, without touching caches: for an engine beyond repair."""
        self.requests.abandon(error)
        self.embeddings.fail_all(error)

    def answer(self, asked: SessionCommand | TextQuestion) -> object:
        """A caller's command on a session of theirs. Raises the TurboServeErrors that HTTP shows."""
        assert not isinstance(asked, TextQuestion), "the thread that reads prompts answers these"
        return self._memory.answer(asked, self._clock())

    def close(self) -> None:
        """After the last request: what is idle goes to disk, as far as there is one."""
        self._memory.close()
        if self._parts.divided is not None:
            self._parts.divided.close()

    def snapshot(self) -> EngineStats:
        return take_snapshot(
            self._parts,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            scratch_bytes=self.scratch_bytes,
            now_s=self._clock(),
            more_details={
                "overlap": str(self.overlap),
                "batching": self.runner.batching,
                "step_graphs": self._graphs_now,
                "draws": draws_line(),
                "speculation": self.speculation_line,
                **({} if self._parts.divided is None else {"distributed": self._parts.divided.line}),
            },
            rows_apart=self.runner.apart is not None,
        )

    @property
    def _graphs_now(self) -> str:
        """What start-up found, and whether it still holds."""
        failure = self.runner.graphs_failure
        if failure is None:
            return self.graphs_line
        return f"built anew in every step ({type(failure).__name__}: {failure}); before that {self.graphs_line}"

    @property
    def speculation_line(self) -> str:
        """Who guesses tokens and how well, or why nobody does."""
        if self.runner.speculation is not None:
            return str(self.runner.speculation)
        return f"off ({self.speculation or 'requests are computed one by one'})"

    @property
    def scratch_bytes(self) -> int:
        """The most that one step may hold beside the budget: chunks of prompts, exact, and what is being written.

        A pass over several prompts begins with copies of their tails, so that one that fails leaves them as they were.
        """
        runtime = self._parts.runtime
        chunk = (self.prefill_tokens + self._least_chunk) * runtime.chunk_token_bytes
        chunk += self.embeddings.num_cached_tokens * runtime.token_raw_bytes
        if self.runner.prompts.can_feed_together:
            chunk += min(self._settings.max_running, self.prefill_tokens) * runtime.tail_bytes
        return int(chunk) + (DEFAULT_PENDING_BYTES if self._memory.has_disk else 0)

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError unless pools, references, trees and accounting agree."""
        alone = [g.caches for g in self.requests.running if g.caches is not None]
        views = self.runner.views()
        try:
            self._memory.check_integrity([*alone, *views])
        finally:
            for view in views:
                self._parts.runtime.release(view)

    def step(self) -> None:
        """A bounded amount of work: a few prompts prepared, one pass over prompts, one token per row."""
        self._num_steps += 1
        self._worked_s, self._has_scratch = self._clock(), True
        self._memory.expire(self._worked_s)
        self._admit()
        if self._prefill():
            self._deliver(self.runner.land())  # they are there: the chunk was waited for, and came after them
            self._memory.give_back_slack()  # of a pass over several prompts: their exact rows were there twice
        if self.embeddings.has_work and self.embeddings.step(self._prefill_budget()):
            self._deliver(self.runner.land())
        self._grow()
        self._decode()
        if self._parts.divided is not None:
            self._parts.divided.after_step()

    def tick(self) -> None:
        """What time alone asks for while there is nothing to do."""
        self._memory.expire(self._clock())
        if self._has_scratch and self._clock() - self._worked_s >= REST_S:
            mx.clear_cache()  # MLX keeps what the largest prompt needed; at rest it is the machine's again
            give_back_heap()
            self._has_scratch = False

    # --- memory: asked for, and made

    def _obtain(self, question: Question) -> Lease | Wait | Refuse:
        """A verdict carried out; asked again, a bounded number of times, when it turned out differently."""
        for _ in range(scheduler.MAX_VERDICT_ROUNDS):
            verdict = self._memory.verdict(question, self._clock())
            if not isinstance(verdict, Start):
                return verdict
            named = scheduler.to_preempt(verdict.relief.preempt, self._orders())
            for generation in [self.requests.running[i] for i in named]:
                self.requests.preempt(generation)
            lease = self._memory.carry_out(verdict, self._clock())
            if lease is not None:
                return lease
        return Wait(None)

    def _orders(self) -> list[int]:
        """Of all running requests, place by place."""
        return [_lease_of(generation).order for generation in self.requests.running]

    # --- the parts of a step

    def _admit(self) -> None:
        """Start waiting requests in order; their prompts are prepared as long as there is time."""
        num_prepared, spent_s, is_going_on = 0, 0.0, True
        while is_going_on:
            head = self.requests.waiting[0] if self.requests.waiting else None
            due = scheduler.next_admission(
                self._view_of(head) if head is not None else None,
                num_running=len(self.requests.running),
                max_running=self._settings.max_running,
                may_prepare=scheduler.has_time_to_prepare(num_prepared, spent_s),
                memory_generation=self._memory.generation,
            )
            if head is None or due is Admission.NOTHING:
                return
            if due is Admission.PREPARE:
                began_s, num_prepared = self._clock(), num_prepared + 1
                self._try_prepare(head)
                spent_s += self._clock() - began_s
            elif due is Admission.GIVE_UP:
                self.requests.fail(head, self._memory.refuse_waiting(head.ask(tokens_to_reserve(head))).error)
            else:
                is_going_on = self._try_start(head)

    def _view_of(self, head: Generation) -> scheduler.HeadView:
        since_s = head.roomless_since_s
        return scheduler.HeadView(
            is_prepared=bool(head.prompt),
            has_answer=bool(head.answer),
            roomless_s=None if since_s is None else self._clock() - since_s,
            told_to_wait_at=head.told_to_wait_at,
            since_asked_s=self._clock() - head.asked_s,
        )

    def _try_prepare(self, generation: Generation) -> None:
        try:
            self._preparer.prepare(generation)
        except Exception as exc:
            self.requests.fail(generation, exc)

    def _try_start(self, generation: Generation) -> bool:
        """Lease room and start; False when there is none now. A failing request is ended."""
        try:
            got = self._obtain(generation.ask(tokens_to_reserve(generation)))
        except Exception as exc:
            self.requests.fail(generation, exc)
            return True
        if isinstance(got, Refuse):
            self.requests.fail(generation, got.error)
        elif isinstance(got, Wait):
            generation.told_to_wait_at, generation.asked_s = got.since, self._clock()
            generation.roomless_since_s = generation.roomless_since_s or self._clock()
            return False
        else:
            self._start(generation, got)
        return True

    def _start(self, generation: Generation, lease: Lease) -> None:
        """Prefill from where the lease's caches end."""
        self.requests.start(generation)
        generation.stage, generation.lease = Stage.PREFILL, lease
        generation.caches, generation.cache_len = lease.caches, lease.cached_len
        generation.last_prefill_step = self._num_steps
        self._memory.attach(lease, RunningRow(generation, self.runner))
        if generation.order is not None:  # it was preempted: its first admission counts
            return
        generation.order, generation.cached_len = lease.order, lease.cached_len
        self._telemetry.observe_queue_time(self._clock() - generation.submitted_s)
        self._telemetry.add_prompt_tokens(len(generation.prompt), lease.cached_len)

    def _prefill(self) -> bool:
        """Compute some prompts' next tokens; whether there were any."""
        prefilling = [g for g in self.requests.running if g.stage is Stage.PREFILL]
        if not prefilling:
            return False
        chosen = self._choose_prefill(prefilling)
        pieces = [(generation, num_tokens) for generation, num_tokens in chosen if num_tokens]
        failed: Mapping[Generation, Exception] = {}
        if pieces:
            started_s = self._clock()
            failed = self.runner.prefill(pieces)
            if not failed:
                self._speed.learn(sum(num_tokens for _, num_tokens in pieces), self._clock() - started_s)
        for generation, _ in chosen:
            generation.last_prefill_step = self._num_steps
            if generation in failed:
                self.requests.fail(generation, failed[generation])
            elif generation.num_to_prefill == 0:
                self._join(generation)
        return bool(pieces)

    def _join(self, generation: Generation) -> None:
        try:
            self.runner.join(generation)
            generation.stage = Stage.DECODE
        except Exception as exc:
            log.exception("request %s could not join the batch", generation.request_id)
            self.requests.fail(generation, exc)

    def _prefill_budget(self) -> int:
        """Tokens that a step may read at once."""
        return scheduler.prefill_budget(
            self.prefill_tokens,
            streams_run=self.runner.num_rows > 0,
            tokens_per_s=self._speed.tokens_per_s,
            max_wait_s=self._settings.max_inter_token_ms / 1000,
        )

    def _choose_prefill(self, prefilling: list[Generation]) -> list[tuple[Generation, int]]:
        """Who is read in this step and how far, each from the longest beginning that there is by now."""
        budget = self._prefill_budget()
        may_group = self.runner.prompts.can_feed_together and len(prefilling) > 1
        asked: set[Generation] = set()
        while True:
            views = [self._prefill_view(generation, may_group) for generation in prefilling]
            pieces = scheduler.plan_prefill(
                views,
                budget,
                may_group=may_group,
                block=self._parts.loaded.prompt_block,
                least=self._least_chunk,
            )
            chosen = [(prefilling[piece.place], piece.num_tokens) for piece in pieces]
            concerned = scheduler.concerned(views, pieces)
            new = [prefilling[i] for i in concerned if prefilling[i] not in asked]
            changed = [self._has_better_start(generation) for generation in new]
            if not any(changed):
                return [(g, n) for g, n in chosen if g.stage is Stage.PREFILL]
            asked |= set(new)
            prefilling = [generation for generation in prefilling if generation.stage is Stage.PREFILL]

    def _prefill_view(self, generation: Generation, may_group: bool) -> scheduler.PrefillView:
        beginning, shared_len = None, generation.cache_len + scheduler.MIN_SHARED_TOKENS
        if may_group and shared_len < generation.num_tokens:
            lease = _lease_of(generation)
            beginning = lease.salt, lease.adapter, lease.wanted_format, lease.prompt[:shared_len].tobytes()
        return scheduler.PrefillView(
            generation.num_to_prefill, self._num_steps - generation.last_prefill_step, beginning
        )

    def _has_better_start(self, generation: Generation) -> bool:
        """Take one if there is; a failing request is ended. Whether either happened."""
        before = generation.cache_len
        try:
            self._take_better_start(generation)
        except Exception as exc:
            log.exception("prefill failed for request %s", generation.request_id)
            self.requests.fail(generation, exc)
            return True
        return generation.cache_len != before

    def _take_better_start(self, generation: Generation) -> None:
        """Of requests with a common beginning that came together, one computes it and the others follow."""
        assert generation.lease is not None and generation.caches is not None
        if generation.num_to_prefill <= 0:
            return
        lease = self._obtain(Restart(generation.lease))
        if not isinstance(lease, Lease):
            return
        self._parts.runtime.release(generation.caches)
        gained = lease.cached_len - generation.cache_len
        self._telemetry.add_prompt_tokens(0, gained)
        if not generation.answer:  # else it was preempted, and its prompt has been paid for
            generation.cached_len += gained
        generation.caches, generation.cache_len = lease.caches, lease.cached_len

    def _grow(self) -> None:
        """Open-ended answers reserve as they grow; one that cannot makes way, or ends if it is the oldest."""
        ahead = self.runner.most_in_flight
        near = [
            g
            for g in self.requests.running
            if g.stage is Stage.DECODE
            and (lease := g.lease) is not None
            and len(g.prompt) + len(g.answer) + ahead > lease.reserved_tokens
        ]
        for generation in [near[i] for i in scheduler.growing([self._row_view(g) for g in near])]:
            if generation.stage is not Stage.DECODE:  # it was preempted by an older one
                continue
            lease = _lease_of(generation)
            try:
                has_room = isinstance(self._obtain(Growth(lease, tokens_to_reserve(generation))), Lease)
            except Exception as exc:
                log.exception("no room could be made for request %s", generation.request_id)
                self.requests.fail(generation, exc)
                continue
            if has_room:
                continue
            if scheduler.without_growth(lease.order, self._orders()) is WithoutGrowth.MAKE_WAY:
                self.requests.preempt(generation)
                continue
            log.warning("no KV budget left to go on with request %s: ended by length", generation.request_id)
            self.requests.finish(generation, "length")

    def _row_view(self, generation: Generation) -> scheduler.RowView:
        lease = _lease_of(generation)
        num_tokens = generation.num_tokens + self.runner.num_in_flight(generation)
        return scheduler.RowView(lease.order, num_tokens, lease.reserved_tokens)

    def _decode(self) -> None:
        self._deliver(self.runner.step())
        if self.runner.speculation is not None:
            drafted, accepted = self.runner.speculation.take_counts()
            if drafted:
                self._telemetry.add_draft_tokens(drafted, accepted)

    def _deliver(self, outcomes: Outcomes) -> None:
        if not outcomes:
            return
        arrivals = _Arrivals(self._clock())
        for generation, outcome in outcomes.items():
            if isinstance(outcome, Drawn):
                self._accept(generation, outcome, arrivals)
            elif outcome is None:
                self._recover(generation)
            elif isinstance(outcome, list):
                self._accept_run(generation, outcome, arrivals)
            else:
                self.requests.fail(generation, outcome)
        arrivals.tell(self._telemetry)

    def _accept_run(self, generation: Generation, run: Sequence[Drawn | Exception], arrivals: _Arrivals) -> None:
        """Several tokens of one step, until one of them ends the answer."""
        for place, outcome in enumerate(run):
            if generation.stage is not Stage.DECODE:
                return
            if place:
                self.runner.take(generation)
            if isinstance(outcome, Exception):
                self.requests.fail(generation, outcome)
            else:
                self._accept(generation, outcome, arrivals)

    def _recover(self, generation: Generation) -> None:
        """A lost cache is computed again from the tokens, which are all still known."""
        if generation.num_recoveries >= MAX_RECOVERIES:
            self.requests.fail(
                generation, EngineFailureError("The device failed repeatedly while answering this request.")
            )
            return
        generation.num_recoveries += 1
        generation.stage = Stage.PREFILL
        assert generation.lease is not None
        generation.caches, generation.cache_len = generation.lease.runtime.make_cache(), 0
        generation.last_prefill_step = self._num_steps

    # --- one answer's tokens, and its end

    def _accept(self, generation: Generation, drawn: Drawn, arrivals: _Arrivals) -> None:
        """One new token: into the answer, the text, and out to the reader."""
        assert generation.text is not None
        arrivals.add(generation)
        token, request, rule = drawn.token, generation.request, generation.rule
        generation.answer.append(token)
        end_ids = generation.end_ids
        if token in end_ids:
            stopped_by = token if token in request.stop_token_ids else None
            self.requests.finish(generation, "stop", stopped_by=stopped_by)
            return
        try:
            if rule is not None:
                rule.accept(token)
            logprobs = drawn.logprobs
            result = generation.text.add(token, self._token_texts.logprob(token, logprobs) if logprobs else None)
            deltas = generation.reader.add(result.text, result.logprobs)
            has_ended = rule is not None and not end_ids and rule.is_complete  # no token could end it
        except Exception as exc:
            log.exception("text of request %s failed", generation.request_id)
            self.requests.fail(generation, exc)
            return
        for delta in deltas:
            self.requests.send(generation, delta)
            if generation.stage is Stage.ENDED:  # its reader failed
                return
        if result.stop is not None:
            self.requests.finish(generation, "stop", flush=False, stopped_by=result.stop)
        elif has_ended:
            self.requests.finish(generation, "stop")
        elif len(generation.answer) >= generation.max_answer_len:
            self.requests.finish(generation, "length")


class _Arrivals:
    """The tokens of one step, for the counters: those that follow tokens of one moment are told together."""

    __slots__ = ("_first_s", "_gaps", "_now_s", "_num_tokens")

    def __init__(self, now_s: float) -> None:
        self._now_s, self._num_tokens = now_s, 0
        self._gaps: dict[float, int] = {}  # how many follow a token of then
        self._first_s: list[float] = []  # of first tokens: when their request came

    def add(self, generation: Generation) -> None:
        """It has one more."""
        before_s, generation.last_token_s = generation.last_token_s, self._now_s
        self._num_tokens += 1
        if before_s is None:
            self._first_s.append(generation.submitted_s)
        else:
            self._gaps[before_s] = self._gaps.get(before_s, 0) + 1

    def tell(self, telemetry: EngineTelemetry) -> None:
        for submitted_s in self._first_s:
            telemetry.observe_ttft(self._now_s - submitted_s)
        for before_s, num_requests in self._gaps.items():
            telemetry.observe_inter_token(self._now_s - before_s, num_requests)
        telemetry.add_generation_tokens(self._num_tokens)


def _lease_of(generation: Generation) -> Lease:
    assert generation.lease is not None, "whoever runs has a lease"
    return generation.lease
