"""One of two real ranks, joined by MLX's ring, that keeps graphs; test_graphs_of_two_ranks.py starts them.

The model is divided and its sums are MLX's own; kernels only sum, so that a CPU can trace a GPU's steps. Rank 0 prints
one line of JSON for each thing that was tried.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

import mlx.core as mx
from tests.turboquant_kv import small_models
from tests.turboquant_kv.summing_kernels import FMT, summing_backend
from tests.turboserve.cache.fakes import GuardedMemory
from tests.turboserve.engine.fakes import make_loop, make_parts, request, run, text_of

from turboquant_kv.cache import runtime
from turboquant_kv.cache.backend_choice import Chosen
from turboquant_kv.cache.batch_probe import Batching
from turboquant_kv.cache.kept_graphs import KeptGraphs
from turboserve.cache.memory import MemoryLimits
from turboserve.engine import graph_choice
from turboserve.engine.distributed.following import Follower
from turboserve.engine.distributed.leading import Lead, LeadingFormats, LeadingRuntime
from turboserve.engine.distributed.leading_passes import LeadingPasses
from turboserve.engine.distributed.place import place_in
from turboserve.engine.distributed.ranks import FirstRank, OtherRank, join
from turboserve.engine.distributed.sharding import shard
from turboserve.engine.distributed.step_graphs import RankSteps, are_in_order
from turboserve.engine.served_formats import ServedFormats
from turboserve.engine.warm_up import Plan, warm_up
from turboserve.messages import SamplingParams

CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2}
PLAN = Plan((100, 37), (2,), 2, draws=(SamplingParams(temperature=0),), with_rules=False)
# Who fails to run a kept graph, and when: never, from the first one on, after some steps of answers.
SCENES = ("kept", "anew", "rank 1 cannot trace", "rank 0 cannot trace", "rank 1 fails later", "rank 0 fails later")
LATER = 60  # steps by graphs; the trial has fewer


def check_order(group: Any) -> dict[str, bool]:
    """Of one sum after the other, and of two that do not depend on one another."""

    def summed(x: mx.array) -> mx.array:
        return mx.distributed.all_sum(x, group=group)

    x = mx.ones((2, 8))
    once = mx.tanh(summed(mx.sin(x)))
    chained = {"one after the other": once + summed(once * 2), "none": x + 1}
    apart = {"side by side": mx.tanh(summed(mx.sin(x))) + summed(3 * x), "twice": summed(x) + summed(x)}
    return {name: are_in_order(y) for name, y in {**chained, **apart}.items()}


def fail_as(scene: str, rank: int, steps: RankSteps) -> None:
    """Have this rank's graphs raise as the scene says."""
    keep, most = steps.keep, {"cannot trace": 0, "fails later": LATER}.get(scene.removeprefix(f"rank {rank} "))

    limited: list[KeptGraphs] = []

    def keep_failing(wanted: bool) -> None:
        keep(wanted)
        graphs = steps._graphs
        if graphs is None or most is None or graphs in limited:
            return
        launch = graphs._launch

        def launch_some(*args: Any) -> Any:
            if graphs.num_run >= most:
                raise ValueError("as a test wants it")
            return launch(*args)

        limited.append(graphs)
        vars(graphs)["_launch"] = launch_some

    steps.keep = keep_failing  # type: ignore[method-assign]


def lead(ranks: FirstRank, model: Any, formats: ServedFormats, scene: str) -> dict[str, Any]:
    leader = Lead(ranks, formats)
    family = LeadingFormats(leader, model)
    passes = LeadingPasses(leader, model)
    fail_as(scene, 0, passes._steps)
    parts = make_parts(small_models.dense(5, 3), fmt=FMT)  # of a whole model, which needs no other rank
    memory = GuardedMemory(family, 1 << 28, MemoryLimits(), None)
    loaded = replace(parts.loaded, model=None)
    parts = replace(parts, loaded=loaded, runtime=family.default_runtime, memory=memory, passes=passes, divided=leader)
    loop = make_loop(parts, overlap="on")
    graph_choice.TOLERANCE = -1.0 if scene == "anew" else 0.02  # the same trial, with another end
    _, choice = warm_up(loop.runner, parts, small_models.VOCAB, PLAN, "on")
    prompts = [list(range(i, 60 + 7 * i)) for i in range(4)]
    sinks = run(loop, *(request(f"r{i}", text_of(p), max_tokens=40) for i, p in enumerate(prompts)))
    loop.check_integrity()
    loop.close()
    return {
        "scene": scene,
        "choice": str(choice),
        "tokens": [sink.tokens for sink in sinks],
        "num_compared": leader.num_compared,
    }


def main() -> None:
    vars(runtime)["choose"] = lambda *args, **options: Chosen(summing_backend(), None)
    LeadingRuntime.try_batches = lambda self: Batching()  # type: ignore[method-assign]  # sums depend on a row's place
    for scene in SCENES:
        ranks = join(place_in(os.environ))
        if ranks.rank == 0 and scene == SCENES[0]:
            print(json.dumps(check_order(ranks.group)), flush=True)
        model = small_models.dense(5, 3)
        shard(model, CONFIG, ranks.group)
        formats = ServedFormats(model, FMT)
        if isinstance(ranks, FirstRank):
            print(json.dumps(lead(ranks, model, formats, scene)), flush=True)
            continue
        assert isinstance(ranks, OtherRank)
        follower = Follower(ranks, model, formats, None)
        fail_as(scene, 1, follower._steps)
        follower._verbs["keep_graphs"] = follower._steps.keep
        follower.run()
        num_kept = follower._steps.num_kept
        ranks.close()
        print(json.dumps({"scene": scene, "num_kept": num_kept}), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # connections of six runs have threads that wait
