"""End tokens are found wherever a folder names them."""

from __future__ import annotations

import pytest

from turboserve.engine.end_tokens import end_tokens


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        ({}, {}, {7}),
        ({"eos_token_id": 3}, {}, {3, 7}),
        ({"eos_token_id": 3}, {"eos_token_id": [4, 5]}, {3, 4, 5, 7}),
        ({"text_config": {"eos_token_id": [2, 3]}}, {"eos_token_id": 9}, {2, 3, 7, 9}),
        ({"eos_token_id": None, "text_config": None}, {"eos_token_id": []}, {7}),
        ({"eos_token_id": [True, "x", -1, 1.0, 8]}, {"eos_token_id": "5"}, {7, 8}),
    ],
)
def test_all_places_count(config: dict[str, object], generation_config: dict[str, object], expected: set[int]) -> None:
    assert end_tokens([7], [config, generation_config]) == expected
