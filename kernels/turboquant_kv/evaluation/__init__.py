"""What a KV format costs in quality: the same model over the same tokens, with compressed caches and without.

`evaluate` compares formats and rivals over texts and gives plain data; `compare` does one text with given caches;
`svg` draws. Texts and how results are shown are the caller's. docs/evaluation.md has an example.
"""

from __future__ import annotations

from turboquant_kv.evaluation.comparison import Comparison, compare
from turboquant_kv.evaluation.evaluate import Evaluation, Figures, Plan, Result, evaluate
from turboquant_kv.evaluation.rivals import Rival, standard_rivals
from turboquant_kv.evaluation.statistics import Estimate
from turboquant_kv.evaluation.svg import svg

__all__ = [
    "Comparison",
    "Estimate",
    "Evaluation",
    "Figures",
    "Plan",
    "Result",
    "Rival",
    "compare",
    "evaluate",
    "standard_rivals",
    "svg",
]
