"""The tree of a caller's sessions against the tokens themselves, and the pages that they share."""

from __future__ import annotations

import numpy as np
from tests.turboserve.cache.fakes import PAGE, FakeFamily, converse, memory_for

from turboserve.cache import session_commands
from turboserve.cache.memory import Memory
from turboserve.cache.radix import common_prefix_len
from turboserve.messages import DeleteSession, ForkSession, GetSessionTree, PageCounts, SessionTree

ROOMY = 10_000_000


def tree_of(memory: Memory, salt: str = "") -> SessionTree:
    tree = memory.answer(GetSessionTree(salt), 0.0)
    assert isinstance(tree, SessionTree)
    return tree


def beginnings(tree: SessionTree, name: str) -> list[int]:
    """Tokens of the nodes that lead to a session, from the root on."""
    (at,) = [i for i, node in enumerate(tree.nodes) if name in node.session_ids]
    found = [tree.nodes[at].tokens]
    while (parent := tree.nodes[at].parent) is not None:
        assert parent < at
        at = parent
        found.append(tree.nodes[at].tokens)
    return found[::-1]


def test_two_sessions_part_where_their_tokens_do(rng: np.random.Generator) -> None:
    memory = memory_for(FakeFamily("4/4"), ROOMY)
    said: dict[str, list[int]] = {}
    for i in range(12):
        source = list(said.values())[int(rng.integers(len(said)))] if said and rng.random() < 0.8 else []
        kept = source[: int(rng.integers(len(source) + 1))]
        said[f"s{i}"] = [*kept, *rng.integers(0, 500, int(rng.integers(1, 3 * PAGE))).tolist()]
        converse(memory, said[f"s{i}"], session_id=f"s{i}")
    tree = tree_of(memory)
    tokens = {c.conversation_id: c.tokens for c in memory.idle}
    assert {info.session_id for info, _ in tree.sessions} == set(said) == set(tokens)
    paths = {name: beginnings(tree, name) for name in said}
    for one, path in paths.items():
        assert path[-1] == len(tokens[one]) and path == sorted(set(path))
        for other, its in paths.items():
            common = common_prefix_len(tokens[one], tokens[other])
            shared = [a for a, b in zip(path, its, strict=False) if a == b and a <= common]
            assert max(shared, default=0) == common, (one, other)


def test_pages_of_a_fork_are_shared_until_they_are_not(rng: np.random.Generator) -> None:
    family = FakeFamily("4/4")
    memory = memory_for(family, ROOMY)
    num = int(rng.integers(4, 9)) * PAGE + int(rng.integers(PAGE))
    converse(memory, rng.integers(0, 500, num).tolist(), session_id="a")
    (held,) = memory.idle
    pages = len(family.held_pages(held.caches).ids)  # type: ignore[union-attr, arg-type]
    alone = PageCounts(pages, 0, len(held.tokens) - pages * PAGE)
    assert {info.session_id: counts for info, counts in tree_of(memory).sessions} == {"a": alone}
    memory.answer(ForkSession("", "a", "b"), 0.0)
    tree = tree_of(memory)
    both = PageCounts(pages, pages, alone.exact_tokens)
    assert {info.session_id: counts for info, counts in tree.sessions} == {"a": both, "b": both}
    (node,) = tree.nodes
    assert sorted(node.session_ids) == ["a", "b"] and node.parent is None and node.tokens == len(held.tokens)
    memory.answer(DeleteSession("", "a"), 0.0)
    assert [counts for _, counts in tree_of(memory).sessions] == [alone]


def test_callers_see_their_own_and_the_newest(rng: np.random.Generator) -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY)
    most = session_commands.MAX_TREE_SESSIONS
    for i in range(most + 3):
        converse(memory, rng.integers(0, 500, 3).tolist(), session_id=f"s{i}", now_s=float(i))
    assert tree_of(memory, "somebody else") == SessionTree()
    tree = tree_of(memory)
    newest = [f"s{i}" for i in reversed(range(3, most + 3))]
    assert [info.session_id for info, _ in tree.sessions] == newest
    assert sorted(name for node in tree.nodes for name in node.session_ids) == sorted(newest)
    assert tree.has_more
    assert all(counts == PageCounts(0, 0, info.tokens) for info, counts in tree.sessions), "f16 has no pages"
