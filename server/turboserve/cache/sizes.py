"""How many bytes sequences of some length take, and how much of one can be shared. Arithmetic on a runtime's format."""

from __future__ import annotations

from collections.abc import Callable

from turboserve.cache.interfaces import CacheRuntime, HeldPages


def peak_bytes(runtime: CacheRuntime, num_tokens: int) -> int:
    """The most bytes a sequence holds on its way to `num_tokens`; never falls as that grows.

    A sequence is largest when its exact tail is a whole page, just before the page is compressed:
    `bytes_for` falls there, and a reservation must not.
    """
    fmt = runtime.fmt
    if fmt is None or num_tokens < fmt.sink_tokens:
        return runtime.bytes_for(num_tokens)
    last_full_tail = fmt.sink_tokens + (num_tokens - fmt.sink_tokens) // fmt.page_tokens * fmt.page_tokens
    return max(runtime.bytes_for(num_tokens), runtime.bytes_for(last_full_tail))


def pages_bytes(runtime: CacheRuntime, num_tokens: int) -> int:
    """Bytes of the compressed pages of a sequence of `num_tokens`, its last page counted as exact still."""
    fmt = runtime.fmt
    return 0 if fmt is None else int(fmt.num_pages(num_tokens) * fmt.page_tokens * runtime.token_bytes)


def shared_pages(runtime: CacheRuntime, pages: HeldPages | None, length: int) -> HeldPages | None:
    """Which of a sequence's pages a fork of its first `length` tokens holds as well; None when there are none."""
    fmt = runtime.fmt
    if pages is None or fmt is None:
        return None
    num_pages = max(0, length - fmt.sink_tokens) // fmt.page_tokens

    def shared(of_pool: HeldPages) -> HeldPages:
        num_shared = max(0, num_pages - of_pool.first)
        return of_pool._replace(ids=of_pool.ids[:num_shared], references=of_pool.references[:num_shared])

    return shared(pages)._replace(others=tuple(shared(other) for other in pages.others))


def usable_estimate(runtime: CacheRuntime, num_held: int, length: int, *, can_cut: bool) -> int:
    """The longest n <= length to which stored caches of `num_held` tokens can surely be cut, without reading them."""
    if length >= num_held:
        return num_held
    fmt = runtime.fmt
    if not can_cut:
        return 0
    if fmt is None or length <= fmt.sink_tokens:
        return length
    return int(fmt.page_start((length - fmt.sink_tokens) // fmt.page_tokens))


def largest_fitting(bytes_for: Callable[[int], int], budget_bytes: int, most: int) -> int:
    """The largest n <= most with bytes_for(n) <= budget; 0 when not even one token fits.

    `bytes_for` must not fall as n grows.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_for(middle) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low
