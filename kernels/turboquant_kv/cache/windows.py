"""How much of a conversation layers with a sliding window keep, and what that costs. Arithmetic on positions alone.

A query at position p sees keys j with p - window < j <= p. What no later query can see is given back, page by page, and
the sink as a whole; positions and page numbers stay what they were. A page and a few tokens more are kept, so that a
conversation can be cut back to the start of its latest page.
"""

from __future__ import annotations

from turboquant_kv.backends.base import LayerShape, narrower
from turboquant_kv.codec.format import KVFormat, exact_capacity

SPARE_TOKENS = 16


def spare(fmt: KVFormat) -> int:
    """Tokens behind the window that are kept."""
    return fmt.page_tokens + SPARE_TOKENS


def forgotten_after(fmt: KVFormat, window: int, num_tokens: int) -> int:
    """The first position that a conversation of `num_tokens` keeps: 0, or the start of a page (then without sink)."""
    first_needed = num_tokens - window + 1 - spare(fmt)
    return fmt.page_start((first_needed - fmt.sink_tokens) // fmt.page_tokens) if first_needed >= fmt.sink_tokens else 0


def first_page(fmt: KVFormat, forgotten: int) -> int:
    """Number of the first page that is kept by a conversation whose tokens before `forgotten` are gone."""
    return max(0, forgotten - fmt.sink_tokens) // fmt.page_tokens


def bytes_for(fmt: KVFormat, shape: LayerShape, window: int, num_tokens: int) -> int:
    """The most that a conversation takes in such a layer on its way to `num_tokens`, between two steps.

    While a chunk of a prompt is read, all pages that it fills are there.
    """

    def held(num_pages: int, exact_rows: int) -> int:
        page_bytes = fmt.page_bytes(shape.num_kv_heads, shape.k_dim, shape.v_dim)
        return num_pages * page_bytes + exact_rows * shape.raw_token_bytes

    page, sink = fmt.page_tokens, fmt.sink_tokens
    at_first_drop = window - 1 + spare(fmt) + sink
    before = min(num_tokens, at_first_drop)
    full_tail = sink + (before - sink) // page * page if before > sink else 0  # the last page still exact
    most = max(held(fmt.num_pages(n), fmt.exact_rows(n)) for n in (before, full_tail))
    if num_tokens >= at_first_drop:
        kept = window + spare(fmt) + page - 2  # at most, with the rest of the first page
        most = max(most, held((kept - page) // page, page), held((kept - 1) // page, exact_capacity(kept % page, page)))
    return most


def longest_bytes(fmt: KVFormat, shape: LayerShape, window: int) -> float:
    """What a long conversation takes on average: about half a page exactly, the rest through its codes."""
    kept = window - 1 + spare(fmt) + fmt.page_tokens / 2
    exact = (fmt.page_tokens + 1) / 2
    codes = fmt.token_bytes(shape.num_kv_heads, shape.k_dim, shape.v_dim)
    return exact * shape.raw_token_bytes + (kept - exact) * codes


def window_to_ask(own: int, asked: int | None, as_array: bool) -> int | None:
    """The window that a mask has to say for a layer that keeps to a window of its own (0: none) by itself.

    asked: by the model. None: "causal" is enough.
    """
    if not own:
        return asked
    narrowest = narrower(own, asked)
    return narrowest if as_array or narrowest < own else None
