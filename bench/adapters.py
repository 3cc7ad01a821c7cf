"""Tokens per second of a batch whose rows have LoRA adapters, beside the same batch on a server without any.

    PYTHONPATH=. python bench/adapters.py MODEL_FOLDER --rank 8 --json adapters.json

Adapters are random, of all attention and feed-forward matrices, which is the most that mlx-lm's training writes by
default. All loops decode in turn, step by step, and the fastest step of each counts: what else the machine does is left
out as far as can be.
"""

# ruff: noqa: E402 - OpenBLAS has to be in place before mlx is imported

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _rows import Row, add_json_option, print_rows, write_rows

from turboquant_kv import blas

blas.interpose()  # before MLX, like the server

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from turboserve.engine.generation import Generation
from turboserve.engine.loading import build_parts
from turboserve.engine.protocol import NullTelemetry
from turboserve.engine.step_loop import StepLoop
from turboserve.messages import Event, Request, SamplingParams
from turboserve.settings import Settings

BATCH = 8
NUM_ADAPTERS = (1, 4)


class Nobody:
    """Reads no events."""

    def put(self, event: Event) -> None:
        """Nothing."""


def write_adapters(model: Path, folder: Path, num: int, rank: int) -> list[str]:
    """Random ones in mlx-lm's format; returns what the setting `adapters` takes."""
    adapted: Any = mlx_lm.load(str(model), lazy=True)[0]
    adapted.freeze()
    parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(adapted, len(adapted.layers), parameters)
    shapes: Any = tree_flatten(adapted.trainable_parameters())
    specs = []
    for i in range(num):
        path = folder / f"a{i}"
        path.mkdir()
        tensors = {name: 0.01 * mx.random.normal(array.shape) for name, array in shapes}
        mx.save_safetensors(str(path / "adapters.safetensors"), tensors)
        config = {"fine_tune_type": "lora", "num_layers": len(adapted.layers), "lora_parameters": parameters}
        (path / "adapter_config.json").write_text(json.dumps(config))
        specs.append(f"a{i}={path}")
    return specs


def running_loop(settings: Settings, adapters: list[str]) -> StepLoop:
    """A loop whose rows all decode, row i with the i-th of `adapters` in turn ("": none)."""
    loop = StepLoop(build_parts(settings, lambda line: None), settings, NullTelemetry(), time.monotonic)
    for i in range(BATCH):
        request = Request(
            f"r{i}",
            ({"role": "user", "content": f"Tell me story number {i}."},),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=2000,
            ignore_eos=True,
        )
        loop.add(Generation(replace(request, adapter=adapters[i % len(adapters)]), Nobody(), time.monotonic()))
    while loop.num_waiting or loop.runner.num_rows < BATCH:
        loop.step()
    return loop


def timed(loop: StepLoop) -> float:
    began_s = time.perf_counter()
    loop.step()
    return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    add_json_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        specs = write_adapters(args.model, Path(folder), max(NUM_ADAPTERS), args.rank)
        names = [spec.partition("=")[0] for spec in specs]
        plain = Settings(model=str(args.model), kv_budget="1GiB")
        adapted = plain.model_copy(update={"adapters": tuple(specs)})
        loops = {"no adapters loaded": running_loop(plain, [""])}
        loops[f"{len(names)} adapters loaded, no row has one"] = running_loop(adapted, [""])
        for num in NUM_ADAPTERS:
            loops[f"all rows have one of {num}"] = running_loop(adapted, names[:num])
        loops["half of the rows have one of 4"] = running_loop(adapted, ["", names[0], "", names[1]])
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(args.steps):
            for name, loop in loops.items():
                seconds[name].append(timed(loop))
    rows, base = [], 0.0
    for name, taken in seconds.items():
        tokens_per_s = BATCH / min(taken)
        base = base or tokens_per_s
        rows.append(Row.plain(f"B={BATCH}, rank {args.rank}: {name}", tokens_per_s, "tokens/s", base))
    print_rows(rows)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
