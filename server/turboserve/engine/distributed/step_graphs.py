"""How one rank runs a pass over a batch: by the model's Python, or decode steps by kept graphs (kept_graphs.py).

Ranks need not run a step in the same way. Their collectives meet by order alone, and a graph may be evaluated in any
order that its arrays allow: a traced one, whose elementwise operations are fused, in another one than the model's. Two
sums that do not depend on one another were seen to be mixed up between a rank with a kept graph and one without. So
graphs are kept only where each collective of a step depends on the one before, as in a decoder that is one block after
the other: arrays then leave one order, tracing drops and joins no collective, and the dtype and shape of what is summed
are the model's. `are_in_order` checks that for the model as it is, by the graph of a step of its own.

Owns a rank's kept graphs. A step in which one raises is run by the model: other ranks wait for its sums.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from turboquant_kv.cache.kept_graphs import KeptGraphs
from turboquant_kv.cache.rows_apart import forward

_COLLECTIVES = ("AllReduce", "AllGather", "ReduceScatter", "Send", "Recv")  # ends of MLX's names for them
_OPERATION = re.compile(r'\{ (\d+) \[label ="([^"]*)"')
_EDGE = re.compile(r'"?(\w+)"? -> "?(\w+)"?$')


class RankSteps:
    """One rank's passes over batches. Without `keep` they are all the model's."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._graphs: KeptGraphs | None = None
        self._is_keeping = False
        self._is_in_order: bool | None = None  # None: not looked at

    def forward(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        """Logits (B, T, V) of tokens (B, T), lazy. Raises what the model raises."""
        if self._graphs is None or not self._is_keeping:
            return self._by_model(tokens, cache=batch)
        logits = self._graphs.forward(tokens, batch)
        if self._is_in_order is None:  # the first step of a kind is the model's own
            self._is_in_order = are_in_order(logits)
        return logits

    def _by_model(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        return forward(self._model, tokens, cache)

    def keep(self, wanted: bool) -> None:
        """Whether decode steps keep their graphs from now on. Those that are kept stay."""
        if wanted and self._graphs is None:
            self._graphs = KeptGraphs(self._by_model, or_model=True)
        self._is_keeping = wanted

    def forget(self) -> None:
        """No graph is kept any more."""
        self._graphs, self._is_keeping = None, False

    @property
    def num_kept(self) -> int:
        """Steps that were run by kept graphs."""
        return 0 if self._graphs is None else self._graphs.num_run

    @property
    def failure(self) -> Exception | None:
        """What a kept graph raised; all steps since are the model's."""
        return None if self._graphs is None else self._graphs.failure

    @property
    def can_keep(self) -> bool:
        """Whether steps were run by kept graphs, and other ranks may run the same ones without."""
        return self.num_kept > 0 and self.failure is None and self._is_in_order is True


def are_in_order(lazy: mx.array) -> bool:
    """Whether what is left to be evaluated of an array has its collectives one after the other, each needing the last.

    By MLX's own drawing of the graph, which it makes in the order of evaluation: what is needed comes first.
    """
    drawing = io.StringIO()
    mx.export_to_dot(drawing, lazy)
    collectives: set[str] = set()
    longest: dict[str, int] = {}  # of all ways to a node: the most collectives on it
    for line in drawing.getvalue().splitlines():
        if (operation := _OPERATION.search(line)) is not None:
            if operation[2].endswith(_COLLECTIVES):
                collectives.add(operation[1])
        elif (edge := _EDGE.search(line)) is not None:
            source, target = edge.groups()
            longest[target] = max(longest.get(target, 0), longest.get(source, 0) + (target in collectives))
    return max(longest.values(), default=0) == len(collectives)
