"""Tokens that end an answer, from every place where a model's folder names them.

mlx-lm lets generation_config.json replace what config.json says and looks at neither's part for text; folders exist in
which each of the three names a token that the others lack, and an answer that meets an end token it does not know goes
on to its limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping


def end_tokens(known: Iterable[int], configs: Iterable[Mapping[str, object]]) -> frozenset[int]:
    """Those that are known and all `eos_token_id` in these configurations.

    configs: of config.json and generation_config.json, whose `text_config` counts as well. An id is a whole number or
    stands in a list; whatever else stands there is left out.
    """
    found = [*known, *(token for config in configs for token in _named_in(config))]
    return frozenset(int(token) for token in found if token >= 0)


def _named_in(config: Mapping[str, object]) -> Iterator[int]:
    value = config.get("eos_token_id")
    for token in value if isinstance(value, list) else [value]:
        if isinstance(token, int) and not isinstance(token, bool):
            yield token
    inner = config.get("text_config")
    if isinstance(inner, dict):
        yield from _named_in(inner)
