"""Which models are loaded: on demand, within the memory budget, until they are idle or make way for another.

Owns all processes. Everything happens on one event loop; decisions that follow from memory are made one after
another (`_deciding`), so that two models never take the same room. HTTP is not known here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from functools import partial

import httpx

from turboserve.errors import EngineUnavailableError, ModelUnavailableError, OverloadedError
from turboserve.fleet.budget import victims
from turboserve.fleet.model import Event, Model
from turboserve.fleet.plan import Catalogue, ModelPlan
from turboserve.fleet.process import Launcher, ModelProcess, StartFailure, StreamName
from turboserve.settings import Settings

logger = logging.getLogger("turboserve.fleet")

TICK_S = 0.5  # how late an idle model may be unloaded
MEASURE_EVERY_S = 10.0
FACTS_TIMEOUT_S = 10.0
RETRY_AFTER_S = 10  # when the memory is taken by models that are in use

OnOutput = Callable[[str, StreamName, str], None]


class Fleet:
    """All configured models. `use` is the door for requests; `begin` and `stop` are the server's."""

    def __init__(
        self,
        catalogue: Catalogue,
        budget_bytes: int,
        settings: Settings,
        *,
        launcher: Launcher,
        on_output: OnOutput,
    ) -> None:
        """`on_output` gets every line that a model's process says, with the model's name."""
        self.budget_bytes = budget_bytes
        self._models = {plan.name: Model.of(plan) for plan in catalogue}
        self._settings, self._launcher, self._on_output = settings, launcher, on_output
        self._deciding = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    @property
    def loaded(self) -> list[Model]:
        """Models that answer now, the most recently used first."""
        return sorted((model for model in self if model.state == "loaded"), key=lambda m: -m.last_used)

    def begin(self) -> None:
        """Loads pinned models in the background, and from now on unloads idle ones."""
        self._spawn(self._tick_forever())

    async def stop(self) -> None:
        """Drains and ends all processes."""
        self._is_closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        starting = [model.starting for model in self if model.starting is not None]
        for start in starting:
            start.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        await asyncio.gather(*(self._ended(model, None) for model in self if model.process is not None))

    @asynccontextmanager
    async def use(self, plan: ModelPlan) -> AsyncIterator[ModelProcess]:
        """The process of a loaded model, which stays loaded for as long as it is used.

        Raises ModelUnavailableError when it cannot be loaded, OverloadedError when there is no room for it now, too
        many requests wait for it, or it takes too long.
        """
        model = self._models[plan.name]
        process = await self._loaded(model)
        try:
            yield process
        finally:
            model.num_running -= 1
            model.last_used = time.monotonic()

    async def _loaded(self, model: Model) -> ModelProcess:
        """Returns with the use counted, so that nobody stops the model in between."""
        if model.state != "loaded" and model.num_waiting >= model.plan.settings.max_queued:
            raise OverloadedError(f"Too many requests wait for the model {model.name!r} to be loaded.")
        model.num_waiting += 1
        try:
            async with asyncio.timeout(self._settings.model_wait_timeout_s):
                while model.state != "loaded":
                    await self._started(model)
        except TimeoutError:
            raise ModelUnavailableError(
                f"The model {model.name!r} is still being loaded.", retry_after_s=RETRY_AFTER_S
            ) from None
        finally:
            model.num_waiting -= 1
        assert model.process is not None
        model.num_running += 1
        model.last_used = time.monotonic()
        return model.process

    async def _started(self, model: Model) -> None:
        """One start, shared by all who wait for it. It goes on when they leave, and logs under no request's id."""
        if model.starting is None:
            model.check_backoff(time.monotonic())
            model.starting = asyncio.create_task(self._start(model), context=Context())
            model.starting.add_done_callback(_retrieve)
        await asyncio.shield(model.starting)

    async def _start(self, model: Model) -> None:
        try:
            await self._reserve(model)
            try:
                await self._launch(model)
            except StartFailure as exc:
                await self._start_failed(model, str(exc))
                raise model.unavailable() from exc
            except BaseException:  # the server shuts down while this model loads
                model.state = "stopping" if model.process else "unloaded"
                raise
        finally:
            model.starting = None

    async def _reserve(self, model: Model) -> None:
        """Takes the room that the model needs, from idle models if need be. Raises OverloadedError."""
        async with self._deciding:
            if self._is_closing:
                raise EngineUnavailableError("The server is shutting down.", retry_after_s=RETRY_AFTER_S)
            if model.stopping is not None:
                await asyncio.shield(model.stopping)
            if model.need_bytes > self.budget_bytes:
                model.state = "failed"
                model.error = f"it needs {_mib(model.need_bytes)}, models_memory is {_mib(self.budget_bytes)}"
                model.backoff.start_failed(time.monotonic())
                raise model.unavailable(RETRY_AFTER_S)
            names = victims(model.need_bytes, self.budget_bytes, [m.holder() for m in self if m.holds_memory])
            if names is None:
                raise OverloadedError(
                    f"No memory now for the model {model.name!r}, which needs {_mib(model.need_bytes)}: the models in "
                    "use, or pinned, take the rest.",
                    retry_after_s=RETRY_AFTER_S,
                )
            model.state = "loading"  # from here on its need is counted
            ends = [self._unload(self._models[name], "evictions") for name in names]
            try:
                await asyncio.gather(*(asyncio.shield(end) for end in ends))
            except BaseException:
                model.state = "unloaded"
                raise

    async def _launch(self, model: Model) -> None:
        """Raises StartFailure."""
        model.events["starts"] += 1
        logger.info("loading %s", model.name)
        router_key = secrets.token_urlsafe(32)
        command = self._launcher(model.plan, router_key)
        model.process = await ModelProcess.start(
            command, router_key, lambda stream, line: self._on_output(model.name, stream, line)
        )
        began = time.monotonic()
        await model.process.wait_ready(self._settings.model_start_timeout_s)
        await self._learn_facts(model, model.process)
        model.measured(await model.process.resident_bytes(), is_fresh=True)
        if not model.process.is_alive:
            raise StartFailure(model.process.reason)
        model.state, model.error = "loaded", ""
        model.loaded_at = model.last_used = time.monotonic()
        self._spawn(self._watch(model, model.process))
        logger.info("loaded %s in %.1f s: %s", model.name, model.loaded_at - began, _mib(model.need_bytes))

    async def _learn_facts(self, model: Model, process: ModelProcess) -> None:
        """What `/v1/models` shows. A process that does not tell serves all the same."""
        headers = introduction(process, "", "req-facts")
        with suppress(httpx.HTTPError, ValueError, LookupError, TypeError):
            reply = await process.http.get("/v1/models", headers=headers, timeout=FACTS_TIMEOUT_S)
            shown = reply.json()["data"][0]
            model.facts.max_model_len = int(shown["max_model_len"])
            model.facts.kv_format = str(shown["kv_format"])
            model.facts.created = int(shown["created"])

    async def _start_failed(self, model: Model, reason: str) -> None:
        logger.error("%s cannot be loaded: %s", model.name, reason)
        model.events["start_failures"] += 1
        model.error = reason
        if model.process is not None:
            model.process.kill()
            await model.process.close()
        model.process = None
        model.state = "failed"
        model.backoff.start_failed(time.monotonic())

    async def _watch(self, model: Model, process: ModelProcess) -> None:
        """Notices when a loaded model's process ends by itself."""
        await process.wait_exit()
        if model.process is not process or model.state != "loaded":
            return
        now = time.monotonic()
        model.state, model.process, model.error = "failed", None, process.reason
        model.events["crashes"] += 1
        model.backoff.crashed(now, now - model.loaded_at)
        await process.close()
        if model.process is None and model.state == "failed":
            model.error = process.reason  # now that all it said is read
        logger.error("%s has died: %s", model.name, process.reason)

    def _unload(self, model: Model, why: Event) -> asyncio.Task[None]:
        """Begins to stop an idle model; nobody gets its process from here on."""
        assert model.is_idle
        model.state = "stopping"
        model.stopping = asyncio.create_task(self._ended(model, why))
        return model.stopping

    async def _ended(self, model: Model, why: Event | None) -> None:
        """Drains the model's process, which writes its conversations where a store is configured, until it is gone."""
        process = model.process
        assert process is not None
        model.state = "stopping"
        await process.stop(self._settings.shutdown_grace_s)
        model.state, model.process, model.stopping = "unloaded", None, None
        model.backoff.cleared()
        if why is not None:
            model.events[why] += 1
            logger.info("unloaded %s (%s)", model.name, why)

    async def _tick_forever(self) -> None:
        next_measurement = 0.0
        while True:
            now = time.monotonic()
            if now >= next_measurement:
                next_measurement = now + MEASURE_EVERY_S
                await self._measure()
            self._start_pinned(now)
            self._unload_idle(now)
            await asyncio.sleep(TICK_S)

    def _start_pinned(self, now: float) -> None:
        """At start, and again after a failure once its back-off is over. One after another, in the file's order."""
        if any(model.starting for model in self if model.plan.is_pinned):
            return
        for model in self:
            if model.plan.is_pinned and model.state in ("unloaded", "failed") and now >= model.backoff.not_before:
                model.starting = asyncio.create_task(self._start(model), context=Context())
                model.starting.add_done_callback(partial(self._pinned_started, model))
                return

    def _pinned_started(self, model: Model, task: asyncio.Task[None]) -> None:
        """Without room it is tried again later; other failures have had their back-off already."""
        if not task.cancelled() and isinstance(error := task.exception(), OverloadedError) and model.state != "failed":
            model.state, model.error = "failed", error.message
            model.backoff.start_failed(time.monotonic())
            logger.error("the pinned model %s cannot be loaded: %s", model.name, error.message)

    def _unload_idle(self, now: float) -> None:
        for model in self:
            limit_s = model.plan.idle_unload_s
            if limit_s and model.is_idle and not model.plan.is_pinned and now - model.last_used >= limit_s:
                self._unload(model, "idle_unloads")

    async def _measure(self) -> None:
        """Corrects what loaded models are counted as; what turns out too much makes way while it is idle."""
        for model in self.loaded:
            if model.process is not None:
                model.measured(await model.process.resident_bytes(), is_fresh=False)
        async with self._deciding:
            names = victims(0, self.budget_bytes, [model.holder() for model in self if model.holds_memory])
            for name in names or ():
                self._unload(self._models[name], "evictions")

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def introduction(process: ModelProcess, tenant: str, request_id: str) -> dict[str, str]:
    """The headers by which a model's process knows its router, and whose request this is."""
    return {
        "x-turboserve-router-key": process.router_key,
        "x-turboserve-tenant": tenant,
        "x-turboserve-request-id": request_id,
    }


def _retrieve(task: asyncio.Task[None]) -> None:
    """Whoever waited has the error; when nobody does any more, the log has it."""
    if not task.cancelled():
        task.exception()


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
