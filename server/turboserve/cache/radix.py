"""RadixTree: token sequences that share beginnings, and who holds the cache of each.

A node owns the tokens of the edge above it; common beginnings are stored once. Holders hang on the
node where their tokens end. What a holder is, how much of its cache can be used and what it costs
is the business of others: nothing in here knows bytes or clocks.

            [system prompt]---+---[question A]---+---[follow-up]   holder 3
                              |                  '- holder 1
                              '---[question B]   holder 2
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

H = TypeVar("H")

# Holders looked at below one point of divergence. All of them have the same tokens up to there; they
# differ only in where their exact ends and page cuts lie, so a few are as good as all.
MAX_BELOW = 16

TOKEN_BYTES = 4  # int32


def common_prefix_len(a: Tokens, b: Tokens) -> int:
    """Number of leading tokens that both have."""
    num = min(len(a), len(b))
    differs = np.flatnonzero(a[:num] != b[:num])
    return int(differs[0]) if len(differs) else num


class Found(NamedTuple, Generic[H]):
    holder: H
    common_len: int  # leading tokens that the holder has in common with what was looked for
    is_whole: bool  # these are all of the holder's tokens


class Branch(NamedTuple, Generic[H]):
    """A node as others see it."""

    parent: int | None  # its place in the outline; None: the root
    end: int  # tokens from the beginning to here
    holders: tuple[H, ...]  # whose tokens end here


class _Node(Generic[H]):
    __slots__ = ("children", "end", "holders", "parent", "raw")

    def __init__(self, raw: bytes, end: int, parent: _Node[H] | None) -> None:
        self.raw, self.end, self.parent = raw, end, parent  # `end`: tokens from the root to here
        self.children: dict[int, _Node[H]] = {}
        self.holders: list[H] = []

    @property
    def edge(self) -> Tokens:
        """Its tokens. Kept as bytes, because comparing short edges as arrays costs ten times as much."""
        return np.frombuffer(self.raw, np.int32)


class RadixTree(Generic[H]):
    """Holders by token sequence. Several holders may have the same tokens."""

    def __init__(self) -> None:
        self._root: _Node[H] = _Node(b"", 0, None)
        self.num_holders = 0

    def insert(self, tokens: Tokens, holder: H) -> None:
        node = self._root
        while node.end < len(tokens):
            rest = tokens[node.end :]
            child = node.children.get(int(rest[0]))
            if child is None:
                leaf: _Node[H] = _Node(rest.tobytes(), len(tokens), node)
                node.children[int(rest[0])] = leaf
                node = leaf
                continue
            common = common_prefix_len(child.edge, rest)
            node = child if common == len(child.edge) else self._split(child, common)
        node.holders.append(holder)
        self.num_holders += 1

    def remove(self, tokens: Tokens, holder: H) -> None:
        """Raises KeyError when that holder is not held under these tokens."""
        node = self._node_of(tokens)
        index = next((i for i, h in enumerate(node.holders) if h is holder), None) if node is not None else None
        if node is None or index is None:
            raise KeyError("no such holder under these tokens")
        del node.holders[index]
        self.num_holders -= 1
        self._tidy(node)

    def find(self, tokens: Tokens) -> Iterator[Found[H]]:
        """Holders with a common beginning, longest first; below each point of divergence only some of them.

        The tree must not change while this is read.
        """
        path, reached = self._walk(tokens)
        seen: _Node[H] | None = None
        for node in reversed(path):
            common = min(node.end, reached)
            if node.end > reached:  # the tokens part within this edge
                below = _below(node, None)
            else:
                for holder in node.holders:
                    yield Found(holder, common, True)
                below = _below(node, seen, skip_own=True)
            for _, holder in zip(range(MAX_BELOW), below, strict=False):
                yield Found(holder, common, False)
            seen = node

    def on_path(self, tokens: Tokens) -> list[H]:
        """Holders whose tokens all are a beginning of `tokens`, longest first."""
        path, reached = self._walk(tokens)
        return [h for node in reversed(path) if node.end <= reached for h in node.holders]

    def beyond(self, tokens: Tokens) -> list[H]:
        """Some holders that begin with `tokens` and go on."""
        path, reached = self._walk(tokens)
        if reached < len(tokens):
            return []
        below = _below(path[-1], None, skip_own=path[-1].end == reached)
        return [h for _, h in zip(range(MAX_BELOW), below, strict=False)]

    def holders(self) -> Iterator[tuple[int, H]]:
        """(number of tokens, holder) of all."""
        stack = [self._root]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            for holder in node.holders:
                yield node.end, holder

    def outline(self) -> list[Branch[H]]:
        """All nodes below the root, each behind its parent."""
        found: list[Branch[H]] = []
        stack: list[tuple[_Node[H], int | None]] = [(child, None) for child in self._root.children.values()]
        while stack:
            node, parent = stack.pop()
            stack.extend((child, len(found)) for child in node.children.values())
            found.append(Branch(parent, node.end, tuple(node.holders)))
        return found

    def check_integrity(self) -> None:
        """Raises AssertionError when an edge is empty, misplaced or needless, or a count is wrong."""
        num_holders, stack = 0, [self._root]
        while stack:
            node = stack.pop()
            num_holders += len(node.holders)
            if node.parent is not None:
                assert len(node.edge) > 0 and node.end == node.parent.end + len(node.edge), "an edge has a wrong length"
                assert node.parent.children.get(int(node.edge[0])) is node, "an edge hangs in a wrong place"
                assert node.holders or len(node.children) > 1, "a node is needless"
            stack.extend(node.children.values())
        assert num_holders == self.num_holders, f"{num_holders} holders in the tree, {self.num_holders} counted"

    def _walk(self, tokens: Tokens) -> tuple[list[_Node[H]], int]:
        """Nodes from the root on, and how many tokens match; the last node may match in part only."""
        path, reached, raw = [self._root], 0, tokens.tobytes()
        while reached < len(tokens):
            child = path[-1].children.get(int(tokens[reached]))
            if child is None:
                break
            path.append(child)
            if raw[reached * TOKEN_BYTES : child.end * TOKEN_BYTES] == child.raw:
                reached = child.end
                continue
            reached += common_prefix_len(child.edge, tokens[reached:])
            break
        return path, reached

    def _node_of(self, tokens: Tokens) -> _Node[H] | None:
        path, reached = self._walk(tokens)
        return path[-1] if reached == len(tokens) == path[-1].end else None

    def _split(self, node: _Node[H], at: int) -> _Node[H]:
        """A new node after the first `at` tokens of this one's edge."""
        parent = node.parent
        assert parent is not None and 0 < at * TOKEN_BYTES < len(node.raw)
        raw_upper, raw_lower = node.raw[: at * TOKEN_BYTES], node.raw[at * TOKEN_BYTES :]
        upper: _Node[H] = _Node(raw_upper, node.end - len(raw_lower) // TOKEN_BYTES, parent)
        parent.children[int(upper.edge[0])] = upper
        node.raw, node.parent = raw_lower, upper
        upper.children[int(node.edge[0])] = node
        return upper

    def _tidy(self, node: _Node[H]) -> None:
        """Drop nodes that nobody ends at any more, and join an only child with its parent."""
        parent = node.parent
        if parent is None or node.holders:
            return
        if not node.children:
            del parent.children[int(node.edge[0])]
            self._tidy(parent)
        elif len(node.children) == 1:
            (child,) = node.children.values()
            child.raw = node.raw + child.raw
            child.parent = parent
            parent.children[int(child.edge[0])] = child


def _below(node: _Node[H], seen: _Node[H] | None, *, skip_own: bool = False) -> Iterator[H]:
    """Holders in a subtree, less one branch that was seen before."""
    if not skip_own:
        yield from node.holders
    stack = [child for child in node.children.values() if child is not seen]
    while stack:
        here = stack.pop()
        yield from here.holders
        stack.extend(here.children.values())
