"""One engine process under stress: plays a plan with many client threads, checks itself after every step.

    python -m tests.stress.child JOB.json      (see `run.py`, which writes the job and reads the answers)

Every finished turn becomes one line of JSON in the job's answer file, so that a killed process loses nothing that
a client had seen; beside each token stands its lead over the next likely one. What is checked after each step is
`watch.py`'s; a broken check ends the process with a status other than 0.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from turboquant_kv import blas

if __name__ == "__main__":
    blas.interpose()  # before mlx is imported

import orjson
from tests.stress.plan import Plan, Turn, make_plans
from tests.stress.watch import LEADS, WATCH, watch_engine

from turboserve.cli.distributed import follow
from turboserve.engine.distributed.place import place_in
from turboserve.engine.distributed.ranks import ALONE, join
from turboserve.engine.engine import TurboEngine
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.loading import build_parts
from turboserve.engine.progress import Progress
from turboserve.errors import OverloadedError, RequestCancelledError, SessionExistsError, SessionNotFoundError
from turboserve.messages import Event, Failed, Finished, ForkSession, Request, SamplingParams, TextDelta
from turboserve.settings import Settings

T = TypeVar("T")
WAIT_S = 300.0  # only a hang reaches it


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer; `leads` of each token over the next likely one, in standard deviations of the logits."""

    text: str
    tokens: list[int]
    leads: list[float]


Answers = dict[tuple[int, int], Answer]  # by conversation and turn


@dataclass(frozen=True, slots=True)
class Job:
    """What `run.py` asks of one process."""

    answers: str
    settings: dict[str, Any]
    num_conversations: int
    num_turns: int
    num_forks: int
    seed: int
    num_clients: int
    order_seed: int
    num_ranks: int = 1
    history: str = ""  # answers to build on, a file of an earlier run; "": this run's own


@dataclass
class Client:
    """The waiting end of one request."""

    cancel_after: int | None = None
    parts: list[str] = field(default_factory=list)
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)

    def put(self, event: Event) -> None:
        self.events.put(event)


class Player:
    """Plays plans against one engine, from several threads."""

    def __init__(self, engine: TurboEngine, job: Job) -> None:
        self._engine, self._job = engine, job
        self._out = open(job.answers, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
        self._lock = threading.Lock()
        self._said = read_answers(Path(job.answers))
        self._history = read_answers(Path(job.history)) if job.history else self._said
        self._plans = make_plans(job.num_conversations, job.num_turns, job.num_forks, job.seed)
        self._complaints: list[str] = []

    def play(self) -> list[str]:
        """All turns that have no answer yet, first turns before second ones; what went wrong."""
        for turn in range(self._job.num_turns):
            todo: queue.SimpleQueue[Plan] = queue.SimpleQueue()
            # Forks last: their first turn is their source's.
            for plan in sorted(self._plans, key=lambda plan: (plan.forks is not None, self._shuffled(plan))):
                if (plan.index, turn) not in self._said:
                    todo.put(plan)
            threads = [threading.Thread(target=self._work, args=(todo, turn)) for _ in range(self._job.num_clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return self._complaints

    def _shuffled(self, plan: Plan) -> int:
        return hash((self._job.order_seed, plan.index)) % 1_000_003

    def _work(self, todo: queue.SimpleQueue[Plan], turn: int) -> None:
        while not self._complaints and not WATCH.complaint:
            try:
                plan = todo.get_nowait()
            except queue.Empty:
                return
            try:
                self._take_turn(plan, turn)
            except Exception:
                self._complaints.append(f"conversation {plan.index}, turn {turn}: {traceback.format_exc()}")

    def _take_turn(self, plan: Plan, turn: int) -> None:
        if plan.forks is not None and turn == 0:
            self._fork(plan)
            return
        asked = plan.turns[turn]
        if asked.cancel_after is not None:
            self._ask(plan, turn, asked, f"c{plan.index}-{turn}-cancelled", asked.cancel_after)
        text = self._ask(plan, turn, asked, f"c{plan.index}-{turn}", None)
        noted = [LEADS[key] for key in sorted(key for key in LEADS if key[0] == f"c{plan.index}-{turn}")]
        self._record(plan, turn, Answer(text, [token for token, _ in noted], [lead for _, lead in noted]))

    def _fork(self, plan: Plan) -> None:
        """The source's first answer is the fork's; a session that memory pressure took is simply begun anew."""
        source = self._plans[plan.forks or 0]
        assert source.session_id is not None
        while (source.index, 0) not in self._said:
            time.sleep(0.01)
            if self._complaints or WATCH.complaint:
                return
        try:
            info = self._wait(self._engine.session(ForkSession(plan.tenant, source.session_id, plan.session_id)))
            assert info.session_id == plan.session_id and info.is_explicit
        except (SessionNotFoundError, SessionExistsError, OverloadedError):
            pass  # gone, forked before the restart, or no room: all of these a client must live with
        self._record(plan, 0, self._said[source.index, 0])

    def _wait(self, future: Future[T]) -> T:
        return future.result(timeout=WAIT_S)

    def _messages(self, plan: Plan, turn: int) -> tuple[dict[str, str], ...]:
        messages: list[dict[str, str]] = []
        for earlier in range(turn + 1):
            messages.append({"role": "user", "content": plan.turns[earlier].text})
            if earlier < turn:
                messages.append({"role": "assistant", "content": self._history[plan.index, earlier].text})
        return tuple(messages)

    def _ask(self, plan: Plan, turn: int, asked: Turn, request_id: str, cancel_after: int | None) -> str:
        request = Request(
            request_id=request_id,
            messages=self._messages(plan, turn),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=asked.max_tokens if cancel_after is None else 200,
            tenant=plan.tenant,
            session_id=plan.session_id,
            kv_format=plan.kv_format,
        )
        while True:
            client = Client()
            try:
                self._engine.submit(request, client)
                return self._follow(client, request_id, cancel_after)
            except OverloadedError as exc:  # what an OpenAI client does, only sooner
                time.sleep(min(exc.retry_after_s or 1, 1) * 0.2)

    def _follow(self, client: Client, request_id: str, cancel_after: int | None) -> str:
        parts: list[str] = []
        while True:
            if cancel_after is not None and len(parts) >= cancel_after:
                self._engine.cancel(request_id)
                cancel_after = None
            event = client.events.get(timeout=WAIT_S)
            if isinstance(event, TextDelta):
                parts.append(event.text)
            elif isinstance(event, Finished):
                return "".join(parts)
            elif isinstance(event, Failed):
                if isinstance(event.error, RequestCancelledError):
                    return ""
                assert not parts or not isinstance(event.error, OverloadedError), "refused in the middle of an answer"
                raise event.error

    def _record(self, plan: Plan, turn: int, answer: Answer) -> None:
        line = json.dumps({"conversation": plan.index, "turn": turn, **asdict(answer)})
        with self._lock:
            self._said[plan.index, turn] = answer
            self._out.write(line + "\n")
            self._out.flush()


def read_answers(path: Path) -> Answers:
    """What was said, by conversation and turn. A last line that a kill cut off is taken as not said."""
    said: Answers = {}
    lines = path.read_text("utf-8").split("\n") if path.exists() else []
    if lines and lines[-1]:
        path.write_text("".join(line + "\n" for line in lines[:-1]), "utf-8")
    for line in lines[:-1]:
        entry = json.loads(line)
        key = (entry.pop("conversation"), entry.pop("turn"))
        assert key not in said, f"answered twice: {key}"
        said[key] = Answer(**entry)
    return said


def main() -> int:
    faulthandler.register(signal.SIGUSR1)  # for whoever finds it hanging
    job = Job(**json.loads(Path(sys.argv[1]).read_text("utf-8")))
    settings = Settings(**job.settings)
    place = place_in(os.environ) if settings.distributed else None
    if place is not None and not place.is_first:
        follow(settings, place)
        return 0
    watch_engine()

    def build(settings: Settings, progress: Progress) -> EngineParts:
        return build_parts(settings, progress, ALONE if place is None else join(place))

    engine = TurboEngine(settings, build, model_id="tiny", progress=lambda line: None)
    engine.start()
    engine.wait_until_ready(WAIT_S)
    complaints = Player(engine, job).play()
    report: dict[str, Any] = {"stats": _settled(engine), "watch": WATCH}
    engine.stop()
    if WATCH.complaint:
        complaints.append(WATCH.complaint)
    report["complaints"] = complaints
    Path(job.answers).with_suffix(".report.json").write_bytes(orjson.dumps(report))
    sys.stderr.write("\n".join(complaints))
    sys.stderr.flush()
    os._exit(1 if complaints else 0)  # threads may still wait for answers that never come


def _settled(engine: TurboEngine) -> Any:
    """Statistics once nothing runs."""
    deadline = time.monotonic() + 60
    while (stats := engine.stats()).num_running or stats.num_waiting:
        assert time.monotonic() < deadline, "requests were left in the engine"
        time.sleep(0.02)
    return stats


if __name__ == "__main__":
    main()
