"""The units of work (shares.py) as they are done: what start-up does, on a miniature of the model or on random logits.

Nothing is measured and nothing kept: all that counts is what MLX compiles meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.gpu.device import compute_capability
from turboquant_kv.backends.gpu.draw_kernel import DTYPES
from turboquant_kv.backends.gpu.module_files import mlx_compiler
from turboquant_kv.backends.gpu.nvrtc import compile_in_processes
from turboquant_kv.backends.gpu.shape import MAX_QUERY_ROWS
from turboquant_kv.cache import backend_choice
from turboquant_kv.cache.calibration import Calibration, calibrate, calibration_text
from turboquant_kv.cache.probe import probe_layers
from turboquant_kv.cache.rehearsal import assumed_calibrations, assumed_cases, modules_for
from turboquant_kv.cache.trial import Plan as TrialPlan
from turboquant_kv.cache.trial import try_fused
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.format_name import PLAIN_FORMAT, PRESETS
from turboserve.cache.memory import Memory, MemoryLimits
from turboserve.engine import weights
from turboserve.engine.ahead.miniature import cut_layers
from turboserve.engine.ahead.shares import Job
from turboserve.engine.expanded_products import choose_expanded_products
from turboserve.engine.fused_draw import device_dialect, untried_draws, verdict_for
from turboserve.engine.fused_layers import prepare_fused_layers
from turboserve.engine.loaded_model import EngineParts, LoadedModel
from turboserve.engine.mlx_lm_loading import load_with_mlx_lm
from turboserve.engine.model_config import read_config
from turboserve.engine.projections import choose_projections
from turboserve.engine.protocol import NullTelemetry
from turboserve.engine.sampling import BatchSampler, row_sampling
from turboserve.engine.served_formats import ServedFormats
from turboserve.engine.step_loop import StepLoop
from turboserve.engine.warm_up import DRAWS, MOST_LOGPROBS, Plan, do_once
from turboserve.engine.weight_files import read_shapes
from turboserve.messages import SamplingParams
from turboserve.settings import AUTO_FORMAT, Settings

# No kernel depends on how long a prompt's chunk is beyond a few rows, nor on how many rows a step has beyond eight.
MOST_CHUNK_TOKENS = 1024
MOST_ROWS = 16
CONTEXT = 4096
KV_BYTES = 256 << 20  # of a miniature's conversations
GREEDY = (SamplingParams(temperature=0.0),)
FEW_ROWS = range(2, MAX_QUERY_ROWS + 1)
DRAWN_ROWS = (2, 4, 8)

Done = Callable[[], object]
"""Called between two pieces of work, when nothing is evaluated."""


class Work:
    """One process's."""

    def __init__(self, job: Job, done: Done) -> None:
        self._job, self._done = job, done
        self._settings = Settings(**job.settings)

    def do(self, unit: str) -> str:
        """What is to be told of it, if anything. Raises whatever goes wrong."""
        with nullcontext() if unit == "draws" else untried_draws():  # that one makes the trial of draws, for all
            told: str | None = getattr(self, f"_{unit}")()
        mx.synchronize()
        self._done()
        return told or ""

    # --- on a miniature

    def _kernels(self) -> str | None:
        """Compile our kernels in processes that need no GPU. What they are is found on the CPU."""
        job, fmt = self._job, self._format()
        try:
            if job.capability is None or fmt is None:
                return None
            compiler = mlx_compiler(job.capability)
            compute_capability()  # while the default device is the GPU
            device = mx.default_device()
            mx.set_default_device(mx.Device(mx.cpu))
            mx.disable_compile()  # a CPU compiles by g++, which may be missing
            try:
                model, _ = self._miniature()
                cases = assumed_cases(model, fmt, probe_layers(model))
                tried = modules_for(cases)
                # Prompts of which a few tokens are new have kernels of their own, which no start launches.
                others = [m for m in modules_for(cases, row_counts=FEW_ROWS) if m not in tried]
            finally:
                mx.enable_compile()
                mx.set_default_device(device)
            folders = [Path(folder) for folder in (*job.others, job.own)]
            count = compile_in_processes(tried, compiler, folders, job.num_compilers, job.limit_s)
            Path(job.ended).touch()
            more = compile_in_processes(others, compiler, folders, job.num_compilers, job.limit_s)
            return f"{count} of {len(tried)} for a start, {more} of {len(others)} more"
        finally:
            Path(job.ended).touch()

    def _means(self) -> None:
        fmt = self._format()
        if fmt is not None and fmt.centred:
            model, tokenizer = self._miniature()
            calibrate(model, tokenizer.encode(calibration_text(), add_special_tokens=False))

    def _model(self) -> None:
        parts = self._parts()
        loop = self._loop(parts)
        chunk = min(loop.prefill_tokens, MOST_CHUNK_TOKENS)
        rows = min(self._settings.max_running, MOST_ROWS)
        plan = Plan.for_device(chunk, rows, parts.loaded.max_context)
        do_once(loop.runner, parts, loop.vocab_len, replace(plan, draws=GREEDY, with_rules=False), "off")

    def _graphs(self) -> str:
        parts = self._parts()
        loop = self._loop(parts)
        rows = min(self._settings.max_running, MOST_ROWS)
        with_guesses = mx.default_device() != mx.Device(mx.cpu)
        plan = Plan((64, 37), (rows,) if rows > 1 else (), 2, with_guesses, GREEDY, with_rules=False)
        choice = do_once(loop.runner, parts, loop.vocab_len, plan, self._settings.keep_graphs)
        return f"step graphs {choice}"

    def _trial(self) -> None:
        """What a trial asks of MLX operations, and of our kernels, which `kernels` compiles."""
        fmt, competing = self._format(), backend_choice.device_candidates()
        if fmt is None or competing is None:
            return
        model, _ = self._miniature()
        cases = assumed_cases(model, fmt, probe_layers(model))
        self._done()
        # Operations alone first: nobody else compiles what they need.
        for new_backend in (lambda: competing.ops, competing.new_fused):
            verdict = try_fused(cases[:1], new_backend, competing.ops, plan=TrialPlan(num_rounds=1, most_s=0.0))
            mx.synchronize()
            self._done()
            if verdict.outcome == "failed":
                raise RuntimeError(verdict.detail)

    def _miniature(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        folder = Path(self._job.folder)
        model, tokenizer = load_with_mlx_lm(folder, str(read_config(folder)["model_type"]), read_shapes(folder))
        cut_layers(model)
        mx.eval(model.parameters())
        return model, tokenizer

    def _format(self) -> KVFormat | None:
        name = self._settings.kv_format
        name = PRESETS["balanced"] if name == AUTO_FORMAT else name
        return None if name == PLAIN_FORMAT else KVFormat.parse(name)

    def _parts(self) -> EngineParts:
        """All that a start-up has before its warm-up; means are assumed."""
        model, tokenizer = self._miniature()
        choose_projections(model, self._settings.projections)
        prepare_fused_layers(model, self._settings.projections)
        choose_expanded_products(model, self._settings.projections)
        mx.synchronize()
        self._done()

        def assumed() -> Calibration:
            return assumed_calibrations(model, probe_layers(model))[0]

        # Whether kernels are to be taken is not this process's question.
        is_tried = backend_choice.device_candidates() is not None
        formats = ServedFormats(model, self._format(), assumed, backend="gpu" if is_tried else "auto")
        loaded = LoadedModel(
            model=model,
            tokenizer=tokenizer,
            model_id="miniature",
            dtype=weights.activation_dtype(model),
            max_context=CONTEXT,
            weights_bytes=weights.parameter_bytes(model),
            weights_fingerprint="",
            eos_ids=frozenset(),
        )
        return EngineParts(loaded, formats.default_runtime, Memory(formats, KV_BYTES, MemoryLimits(), None))

    def _loop(self, parts: EngineParts) -> StepLoop:
        loop = StepLoop(parts, self._settings, NullTelemetry(), time.monotonic)
        mx.synchronize()
        self._done()
        return loop

    # --- of random logits

    def _draws(self) -> None:
        if device_dialect() is not None:
            for dtype in DTYPES:  # of whichever the model's logits are, and those with a bias or a mask
                verdict_for(self._job.vocab_len, dtype)
        self._draw_by(DRAWS[:3])

    def _penalties(self) -> None:
        self._draw_by(DRAWS[3:])

    def _logprobs(self) -> None:
        self._draw_by(GREEDY, num_top=MOST_LOGPROBS, masked=True)
        self._draw_by((SamplingParams(),), num_top=MOST_LOGPROBS, masked=True)
        self._draw_together()

    def _draw_by(self, ways: Sequence[SamplingParams], *, num_top: int | None = None, masked: bool = False) -> None:
        """One row, in each of the ways."""
        for params in ways:
            self._sample([params], num_top, masked)

    def _draw_together(self) -> None:
        """Rows of all ways in one batch, of which the first asks for logprobs; the more rows, the more of each way."""
        for num_rows in DRAWN_ROWS:
            self._sample([SamplingParams(), *(DRAWS[i % len(DRAWS)] for i in range(1, num_rows))], MOST_LOGPROBS, False)

    def _sample(self, rows: Sequence[SamplingParams], num_top: int | None, masked: bool) -> None:
        """num_top: logprobs of the first row; None: nobody asks for any."""
        vocab_len = self._job.vocab_len
        sampler = BatchSampler()
        for i, params in enumerate(rows):
            sampler.join(row_sampling(params, vocab_len, num_top=None if i else num_top), [1, 2, 3], [4])
        rng = np.random.default_rng(0)
        mask = np.full((len(rows), -(-vocab_len // 32)), 0xFFFFFFFF, np.uint32)
        for _ in range(2):  # the second one's penalties know the first one's token
            logits = mx.array(rng.standard_normal((len(rows), vocab_len), np.float32)).astype(mx.float16)
            draws = sampler.sample(logits, mask=mx.array(mask) if masked else None)
            mx.eval(*draws.arrays())
        if len(rows) > 1:  # one leaves
            sampler.keep(range(1, len(rows)))
            mx.eval(*sampler.sample(logits[1:]).arrays())
        mx.synchronize()
        self._done()
