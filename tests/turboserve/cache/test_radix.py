"""The radix tree against a list of sequences, and its look-up among a thousand of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboserve.cache.radix import MAX_BELOW, RadixTree, Tokens, common_prefix_len

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=14)


def array(tokens: list[int]) -> Tokens:
    return np.array(tokens, np.int32)


def tree_of(sequences: list[list[int]]) -> RadixTree[int]:
    tree: RadixTree[int] = RadixTree()
    for i, tokens in enumerate(sequences):
        tree.insert(array(tokens), i)
    return tree


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    num = common_prefix_len(np.array(a, np.int32), np.array(b, np.int32))
    assert a[:num] == b[:num]
    assert num in (len(a), len(b)) or a[num] != b[num]


@given(SEQUENCES, st.lists(st.integers(0, 2), max_size=10))
def test_find_is_the_longest_common_prefix_of_all(sequences: list[list[int]], wanted: list[int]) -> None:
    tree = tree_of(sequences)
    tree.check_integrity()
    found = list(tree.find(array(wanted)))
    lengths = {i: common_prefix_len(array(s), array(wanted)) for i, s in enumerate(sequences)}
    assert {f.holder: f.common_len for f in found} == lengths  # fewer than MAX_BELOW everywhere
    assert len(found) == len(sequences) < MAX_BELOW
    assert [f.common_len for f in found] == sorted(lengths.values(), reverse=True)
    assert all(f.is_whole == (f.common_len == len(sequences[f.holder])) for f in found)


@given(SEQUENCES, st.lists(st.integers(0, 2), max_size=10))
def test_on_path_and_beyond(sequences: list[list[int]], wanted: list[int]) -> None:
    tree = tree_of(sequences)
    assert set(tree.on_path(array(wanted))) == {i for i, s in enumerate(sequences) if wanted[: len(s)] == s}
    longer = {i for i, s in enumerate(sequences) if len(s) > len(wanted) and s[: len(wanted)] == wanted}
    assert set(tree.beyond(array(wanted))) == longer


@given(SEQUENCES, st.data())
def test_what_is_removed_leaves_no_trace(sequences: list[list[int]], data: st.DataObject) -> None:
    tree, left = tree_of(sequences), dict(enumerate(sequences))
    while left:
        gone = data.draw(st.sampled_from(sorted(left)))
        tree.remove(array(left.pop(gone)), gone)
        tree.check_integrity()
        assert sorted(h for _, h in tree.holders()) == sorted(left)
    assert tree.num_holders == 0 and list(tree.find(array([0, 1]))) == []


def test_removing_what_is_not_there_is_an_error() -> None:
    tree = tree_of([[1, 2, 3]])
    for tokens, holder in (([1, 2], 0), ([1, 2, 3], 9), ([4], 0)):
        with pytest.raises(KeyError):
            tree.remove(array(tokens), holder)


def test_below_one_point_only_some_are_looked_at() -> None:
    tree = tree_of([[1, 2, 3, i] for i in range(1000)])
    assert len(list(tree.find(array([1, 2, 3])))) <= MAX_BELOW + 1


def test_a_long_prefix_among_many_is_one_walk(rng: np.random.Generator) -> None:
    """Comparisons, not seconds: the edges on the way hold no more tokens than the prompt."""
    common = rng.integers(0, 1000, 8000).astype(np.int32)
    tree: RadixTree[int] = RadixTree()
    for i in range(200):
        cut = int(rng.integers(0, 8000))
        tree.insert(np.concatenate([common[:cut], rng.integers(1000, 2000, 500).astype(np.int32)]), i)
    path, reached = tree._walk(common)
    assert sum(len(node.edge) for node in path) <= reached + 500
