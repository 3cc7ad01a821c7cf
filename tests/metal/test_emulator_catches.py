"""Every kind of bug that the emulator promises to catch, planted once; and the same kernel without it passes."""

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from tests.metal.emulator import MetalCompileError, MetalExecutionError, MetalLimitError, run_metal

_CALL: dict[str, Any] = {
    "name": "planted",
    "input_names": ["x"],
    "output_names": ["y"],
    "inputs": [np.ones(64, np.float32)],
    "grid": (64, 1, 1),
    "threadgroup": (64, 1, 1),
    "output_shapes": [(64,)],
    "output_dtypes": [mx.float32],
    "init_value": 0.0,
}
_NAMES = "uint t = thread_index_in_threadgroup, g = threadgroup_position_in_grid.x, lane = thread_index_in_simdgroup;"
_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def run(source: str, **options: Any) -> np.ndarray:
    outputs, _ = run_metal(**{**_CALL, "source": f"{_NAMES}\n{source}", **options})
    return outputs[0]


class Planted(NamedTuple):
    """A kernel with a hole: what breaks it, what mends it, the kind reported, and a part of the message.

    Numbers fill the hole `k` as an input, so that one compilation serves both; text fills the hole `@`.
    """

    source: str
    bad: int | str
    good: int | str
    kind: str
    says: str


_SHARED = "threadgroup float kept[64];"
_FILLED = f"{_SHARED} kept[t] = t; {_BARRIER}"
PLANTED = {
    "barrier in a branch": Planted(
        f"if (t < k) {{ {_BARRIER} }} y[t] = 1;", 32, 64, "barrier-divergence", "has returned"
    ),
    "early return before a barrier": Planted(
        f"if (t == k) return; {_BARRIER} y[t] = 1;", 63, 64, "barrier-divergence", "thread 63"
    ),
    "two different barriers": Planted(
        f"if (t < k) {{ {_BARRIER} }} else {{ {_BARRIER} }} y[t] = 1;",
        32,
        64,
        "barrier-divergence",
        "threadgroup_barrier",
    ),
    "simd operation in a branch": Planted(
        "if (lane != k) y[t] = simd_sum(x[t]);", 5, 32, "simd-divergence", "simd_sum"
    ),
    "two different simd operations": Planted(
        "y[t] = lane < k ? simd_sum(x[t]) : simd_max(x[t]);", 16, 32, "simd-divergence", "simd_max"
    ),
    "barrier against simd operation": Planted(
        f"if (lane < k) {{ {_BARRIER} y[t] = simd_sum(1); }} else {{ y[t] = simd_sum(2); {_BARRIER} }}",
        3,
        32,
        "simd-divergence",
        "threadgroup_barrier",
    ),
    "shuffle from a missing lane": Planted("y[t] = simd_shuffle(x[t], lane + k);", 32, 0, "inactive-lane", "source:2"),
    "read past an input": Planted("y[t] = x[t + k];", 1, 0, "out-of-bounds-read", "offset 256 of `x`"),
    "read before an input": Planted("y[t] = x[int(t) - k];", 1, 0, "out-of-bounds-read", "offset -4 of `x`"),
    "write past an output": Planted("y[t + k] = 1;", 60, 0, "out-of-bounds-write", "`y`"),
    "wide read over an input's end": Planted(
        "y[t] = dot(*(const device float4*)(x + 4 * (t / 4 + k)), float4(1));", 1, 0, "out-of-bounds-read", "`x`"
    ),
    "read past threadgroup memory": Planted(
        f"threadgroup float other[64]; {_FILLED} other[t] = 1; threadgroup float* p = kept; y[t] = p[t + k];",
        1,
        0,
        "out-of-bounds-read",
        "offset 256 of `kept`",
    ),
    "write past threadgroup memory": Planted(
        f"{_SHARED} threadgroup float* p = kept; p[t + k] = 1; y[t] = p[t + k];", 8, 0, "out-of-bounds-write", "`kept`"
    ),
    "index past a declared array": Planted(
        "float a[4] = {1, 2, 3, 4}; y[t] = a[(t % 4) + k];", 1, 0, "index-out-of-bounds", "index 4"
    ),
    "uninitialised threadgroup memory": Planted(
        f"{_SHARED} if (t < k) kept[t] = 1; {_BARRIER} y[t] = kept[63 - t];",
        63,
        64,
        "uninitialised-read",
        "`kept` was never written",
    ),
    "threadgroup memory of the group before": Planted(
        f"threadgroup float kept[32]; if (g <= k) kept[t] = 1; {_BARRIER} y[g * 32 + t] = kept[t];",
        0,
        1,
        "uninitialised-read",
        "threadgroup (1, 0, 0)",
    ),
    "missing barrier": Planted(f"{_FILLED} kept[t] = 1; @ y[t] = kept[63 - t];", "", _BARRIER, "race", "`kept`"),
    "barrier that orders nothing": Planted(
        f"{_FILLED} kept[t] = 1; threadgroup_barrier(mem_flags::@); y[t] = kept[63 - t];",
        "mem_none",
        "mem_threadgroup",
        "race",
        "`kept`",
    ),
    "simdgroup barrier across simdgroups": Planted(
        f"{_FILLED} kept[t] = 1; simdgroup_barrier(mem_flags::mem_threadgroup); y[t] = kept[t ^ k];",
        32,
        1,
        "race",
        "`kept`",
    ),
    "overwriting what others still read": Planted(
        f"{_FILLED} y[t] = kept[63 - t]; @ kept[t] = 0;", "", _BARRIER, "race", "read"
    ),
    "two threads write one output": Planted("y[t / k] = 1;", 2, 1, "race", "`y`"),
    "two threadgroups write one output": Planted("y[t + k * g] = 1;", 0, 32, "race", "another threadgroup"),
    "shift by the whole width": Planted("y[t] = float(1u << (lane + k));", 1, 0, "bad-shift", "source:2"),
    "division by zero": Planted("y[t] = float(7 / (int(t) + k));", 0, 1, "division-by-zero", "source:2"),
    "unaligned vector": Planted("y[t] = (*(const device float2*)(x + k)).x;", 1, 2, "misaligned", "source:2"),
    "a loop without end": Planted("uint n = 0; while (n != k) n = (n + 2) & 255; y[t] = n;", 3, 4, "timeout", "loop"),
    "a recursion that eats the stack": Planted("y[t] = deep(k);", 1000000, 3, "stack-overflow", "stack"),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "threadgroup memory of the group before": {"threadgroup": (32, 1, 1)},
    "two threadgroups write one output": {"threadgroup": (32, 1, 1)},
    "a loop without end": {"seconds": 1},
    "a recursion that eats the stack": {
        "header": """inline float deep(int n) {
            float a[64];
            a[n & 63] = n;
            return n ? deep(n - 1) + a[(n * 7) & 63 & n] * 0 : 0;
        }"""
    },
}


def run_planted(planted: Planted, filling: int | str, **options: Any) -> None:
    if isinstance(filling, int):
        inputs = [np.ones(64, np.float32), mx.array(filling, mx.int32)]
        run(planted.source, input_names=["x", "k"], inputs=inputs, **options)
    else:
        run(planted.source.replace("@", filling), **options)


@pytest.mark.parametrize("what", PLANTED)
def test_planted_bug_is_caught(what: str) -> None:
    planted, options = PLANTED[what], _OPTIONS.get(what, {})
    with pytest.raises(MetalExecutionError) as caught:
        run_planted(planted, planted.bad, **options)
    assert caught.value.kind == planted.kind, caught.value
    assert planted.says in str(caught.value) and "planted" in str(caught.value)
    run_planted(planted, planted.good, **options)


def test_message_names_thread_and_line() -> None:
    with pytest.raises(MetalExecutionError) as caught:
        run("\n\nif (t == 37) {\n  y[t] = x[t * 2]; }")
    for part in ("threadgroup (0, 0, 0)", "thread (37, 0, 0)", "lane 5 of simdgroup 1", "[source:5]"):
        assert part in str(caught.value)


def test_uninitialised_output_is_caught_only_without_init_value() -> None:
    np.testing.assert_array_equal(run("y[t] += 1;"), np.ones(64))
    with pytest.raises(MetalExecutionError) as caught:
        run("y[t] += 1;", init_value=None)
    assert caught.value.kind == "uninitialised-read"


def test_threadgroup_memory_limit() -> None:
    source = f"threadgroup float a[N], b[4096]; a[t] = b[t] = 1; {_BARRIER} y[t] = a[t] + b[t];"
    run(source, template=[("N", 4096)])
    with pytest.raises(MetalLimitError, match="32768"):
        run(source, template=[("N", 4097)])


def test_thread_limit() -> None:
    run("if (t < 64) y[t] = 1;", grid=(1024, 1, 1), threadgroup=(1024, 1, 1))
    with pytest.raises(MetalLimitError, match="1025 threads"):
        run("y[t] = 1;", grid=(1025, 1, 1), threadgroup=(1025, 1, 1))


REFUSED = {
    "input is const": ("x[t] = 1;", "read-only"),
    "pointer without address space": ("const float* p = x; y[t] = p[t];", "address space"),
    "reference without address space": ("float a = 1; float& b = a; y[t] = b;", "address space"),
    "cast without address space": ("y[t] = *(float*)(y + t);", "address space"),
    "shared variable in a block": ("{ threadgroup float a[4]; a[0] = 1; } y[t] = 1;", "outermost"),
    "shared variable with a value": ("threadgroup float a = 1; y[t] = a;", "initialiser"),
    "threadgroup pointer as a device one": (
        "threadgroup float a[4]; a[0] = 1; y[t] = first(a);",
        "address space|no matching",
    ),
    "device pointer kept as a threadgroup one": (
        "threadgroup float* p = y; y[t] = p[t];",
        "address space|cannot initialize",
    ),
    "input given for writing": ("device float* p = x; y[t] = p[t];", "const"),
    "double": ("double a = 1; y[t] = a;", "double"),
    "mixed min": ("y[t] = min(t, 3);", "min"),
    "unknown name": ("y[t] = __shfl_xor_sync(~0u, x[t], 1);", "__shfl_xor_sync"),
    "stricter memory order": (
        "threadgroup atomic_int a; atomic_store_explicit(&a, 1, memory_order_seq_cst); y[t] = 1;",
        "memory_order_seq_cst",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("template", [(), [("T", mx.float32)]], ids=["plain", "template"])
def test_text_that_metal_refuses(what: str, template: list[tuple[str, mx.Dtype]]) -> None:
    source, says = REFUSED[what]
    with pytest.raises(MetalCompileError, match=says):
        run(source, header="inline float first(const device float* p) { return p[0]; }\n", template=template)


def test_calls_that_mlx_refuses() -> None:
    with pytest.raises(ValueError, match="Expected `inputs`"):
        run("y[t] = 1;", inputs=[])
