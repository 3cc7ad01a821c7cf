"""The emulator computes what kernels say: signature, types, grids, simd operations, matrices, atomics."""

import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.metal.emulator import Report, last_report, metal_kernel, run_metal
from tests.metal.emulator.launch import _given, dtype_name
from tests.metal.emulator.signature import KernelText


def run(source: str, inputs: dict[str, Any], out: Any, **options: Any) -> tuple[np.ndarray, Report]:
    """One kernel with one output `y` of (shape, dtype) `out`; one threadgroup of 32 threads unless told."""
    shape, dtype = out
    call: dict[str, Any] = {"grid": (32, 1, 1), "threadgroup": (32, 1, 1), **options}
    outputs, report = run_metal(
        name="probe",
        input_names=list(inputs),
        output_names=["y"],
        source=source,
        inputs=list(inputs.values()),
        output_shapes=[shape],
        output_dtypes=[dtype],
        **call,
    )
    return outputs[0], report


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_elementwise_over_a_partial_grid(rng: np.random.Generator, dtype: mx.Dtype) -> None:
    x = mx.array(rng.normal(size=77).astype(np.float32)).astype(dtype)
    y, report = run(
        "uint i = thread_position_in_grid.x; y[i] = T(x[i] * T(3)) + T(1);",
        {"x": x},
        ((77,), dtype),
        template=[("T", dtype)],
        grid=(77, 1, 1),
    )
    wanted = np.array((x * mx.array(3, dtype) + mx.array(1, dtype)).astype(mx.float32))
    np.testing.assert_array_equal(y.astype(np.float32), wanted)
    assert report.num_threadgroups == 3
    assert report.device_read_bytes == report.device_write_bytes == 77 * dtype.size


def test_threadgroup_reduction(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 256)).astype(np.float32)
    source = """
        threadgroup float partial[8];
        uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
        float total = simd_sum(x[thread_position_in_grid.y * 256 + thread_position_in_grid.x]);
        if (lane == 0) partial[group] = total;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (group == 0) {
            total = simd_sum(lane < 8 ? partial[lane] : 0.0f);
            if (lane == 0) y[threadgroup_position_in_grid.y] = total;
        }
    """
    y, report = run(source, {"x": x}, ((3,), np.float32), grid=(256, 3, 1), threadgroup=(256, 1, 1))
    np.testing.assert_allclose(y, x.sum(1), rtol=1e-5, atol=1e-5)  # two orders of adding 256 floats
    assert (report.barriers, report.simd_ops, report.threadgroup_bytes) == (3, 27, 32)


def test_strided_input_with_shape_and_strides(rng: np.random.Generator) -> None:
    x = rng.integers(0, 99, size=(6, 10)).astype(np.int32)[::2, 1:9:3]
    source = """
        uint i = thread_position_in_grid.x;
        y[i] = x[(i / x_shape[1]) * x_strides[0] + (i % x_shape[1]) * x_strides[1]] + x_ndim;
    """
    y, _ = run(source, {"x": x}, ((9,), np.int32), grid=(9, 1, 1), ensure_row_contiguous=False)
    np.testing.assert_array_equal(y, x.reshape(-1) + 2)


def test_scalars_and_small_inputs_are_constants() -> None:
    source = "uint i = thread_position_in_grid.x; y[i] = table[i % 4] * factor + (flag ? N : 0);"
    inputs = {"table": np.array([1, 2, 3, 4], np.float32), "factor": 2.5, "flag": True}
    y, report = run(source, inputs, ((32,), np.float32), template=[("N", -3)])
    np.testing.assert_array_equal(y, np.tile([1, 2, 3, 4], 8) * 2.5 - 3)
    assert report.device_read_bytes == 0 and report.constant_read_bytes > 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_matrix_product_by_elements_and_by_loads(rng: np.random.Generator, dtype: str) -> None:
    a, b = rng.normal(size=(2, 8, 8)).astype(dtype)
    source = """
        uint lane = thread_index_in_simdgroup, quad = lane / 4;
        uint row = (quad & 4) + (lane / 2) % 4, column = (quad & 2) * 2 + (lane % 2) * 2;
        simdgroup_matrix<T, 8, 8> left, right;
        simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.5f);
        left.thread_elements()[0] = a[row * 8 + column];
        left.thread_elements()[1] = a[row * 8 + column + 1];
        simdgroup_load(right, b, 8, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(sum, left, right, sum);
        simdgroup_store(sum, y, 8);
    """
    y, report = run(source, {"a": a, "b": b}, ((8, 8), np.float32), template=[("T", dtype)])
    wanted = a.astype(np.float64) @ b.astype(np.float64).T + 0.5
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)  # eight float32 products and sums
    assert report.matrix_ops == 1


def test_shuffles_scans_votes_and_broadcasts(rng: np.random.Generator) -> None:
    x = rng.integers(1, 50, size=32).astype(np.uint32)
    source = """
        uint i = thread_index_in_simdgroup, v = x[i];
        y[i] = simd_shuffle_xor(v, 5); y[32 + i] = simd_shuffle_down(v, 3); y[64 + i] = simd_shuffle_up(v, 3);
        y[96 + i] = simd_prefix_exclusive_sum(v); y[128 + i] = simd_max(v); y[160 + i] = simd_broadcast(v, 9);
        y[192 + i] = simd_any(v == x[7]) && !simd_all(v == x[7] + 100); y[224 + i] = simd_shuffle(v, 31 - i);
    """
    y, _ = run(source, {"x": x}, ((8, 32), np.uint32))
    lanes = np.arange(32)
    down, up = np.where(lanes < 29, np.roll(x, -3), x), np.where(lanes > 2, np.roll(x, 3), x)
    scan = np.concatenate([[0], np.cumsum(x)[:-1]])
    wanted = [x[lanes ^ 5], down, up, scan, np.full(32, x.max()), np.full(32, x[9]), np.ones(32), x[::-1]]
    np.testing.assert_array_equal(y, np.array(wanted))


def test_vectors_macros_and_words(rng: np.random.Generator) -> None:
    header = """
        #include <metal_stdlib>
        using namespace metal;
        #define SHARED threadgroup
        #define READ const device
        constant float table[4] = {0.5h, 1.0f, 2.0f, 4.0f};
        template <typename T> inline float4 widen(READ T* p) { return float4(p[0], p[1], p[2], p[3]); }
        struct Pair { float2 both; float sum() const thread { return both.x + both.y; } };
    """
    source = """
        SHARED float4 kept[4 * (16 / 2)], spare;
        uint i = thread_position_in_grid.x;
        float4 v = widen(x + 4 * i);
        v.xy = v.yx * 2.0f;
        kept[i] = max(v, float4(0)) + float4(table[i & 3]);
        if (i == 0) { spare = v.wzyx; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint word = as_type<uint>(half2(kept[31 - i].xw));
        Pair pair{float2(as_type<half2>(word))};
        const threadgroup float4* other = kept;
        y[i] = pair.sum() + fast::exp2(float(popcount(i))) + other[i].z + spare.x;
    """
    x = rng.integers(-8, 8, size=(32, 4)).astype(np.float16)
    y, report = run(source, {"x": x}, ((32,), np.float32), header=header)
    v = np.stack([x[:, 1] * 2, x[:, 0] * 2, x[:, 2], x[:, 3]], 1).astype(np.float32)
    kept = np.maximum(v, 0) + np.array([0.5, 1, 2, 4], np.float32)[np.arange(32) % 4][:, None]
    ones = np.array([2.0 ** int(i).bit_count() for i in range(32)])
    np.testing.assert_array_equal(y, kept[::-1, 0] + kept[::-1, 3] + ones + kept[:, 2] + x[0, 3])
    assert report.threadgroup_bytes == 33 * 16


def test_atomics_and_initial_value() -> None:
    source = """
        threadgroup atomic_uint count;
        if (thread_index_in_threadgroup == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint before = atomic_fetch_add_explicit(&count, 2u, memory_order_relaxed);
        atomic_fetch_add_explicit(&y[before / 64], 1u, memory_order_relaxed);
    """
    call = {"atomic_outputs": True, "init_value": 0, "grid": (128, 1, 1), "threadgroup": (64, 1, 1)}
    y, _ = run(source, {"x": 0}, ((2,), np.uint32), **call)
    np.testing.assert_array_equal(y, [64, 64])


def test_register_estimate_sees_local_arrays() -> None:
    source = "float a[N]; for (int i = 0; i < N; ++i) a[i] = i; y[thread_position_in_grid.x] = a[N - 1];"
    small, big = (run(source, {"x": 0}, ((32,), np.float32), template=[("N", n)])[1] for n in (4, 200))
    assert big.registers_estimate - small.registers_estimate == 196
    assert any("registers" in warning for warning in big.warnings) and not small.warnings


def test_drop_in_gives_mlx_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    source = "uint i = thread_position_in_grid.x; y[i] = x[i] / T(2);"
    kernel: Any = mx.fast.metal_kernel(name="half_of", input_names=["x"], output_names=["y"], source=source)
    x = mx.arange(9).astype(mx.bfloat16)
    (y,) = kernel(
        inputs=[x],
        template=[("T", mx.bfloat16)],
        grid=(9, 1, 1),
        threadgroup=(8, 1, 1),
        output_shapes=[(9,)],
        output_dtypes=[mx.bfloat16],
    )
    assert y.dtype == mx.bfloat16 and mx.array_equal(y, x / 2)
    assert last_report().num_threadgroups == 2


def test_order_of_lanes_does_not_matter(rng: np.random.Generator) -> None:
    x = rng.normal(size=64).astype(np.float32)
    source = "uint i = thread_position_in_grid.x; y[i] = simd_sum(x[i]) + simd_shuffle_xor(x[i], 1);"
    out = ((64,), np.float32)
    forward, backward = (run(source, {"x": x}, out, grid=(64, 1, 1), reverse=r)[0] for r in (False, True))
    np.testing.assert_array_equal(forward, backward)


def test_signature_is_the_one_mlx_prints(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Without Metal, MLX still records a kernel for export, and prints the text it generates when asked to."""
    source = """
        uint i = thread_position_in_grid.x + simdgroup_index_in_threadgroup;
        y[i] = x[i] * x_shape[0] * x_strides[0] + s + t[0];
    """
    template = [("T", mx.bfloat16), ("N", -3), ("B", True)]
    inputs = [mx.zeros((4, 4), mx.float16), mx.array(2.0), mx.array([1, 2])]
    names = ["x", "s", "t"]

    def launch(x: mx.array) -> mx.array:
        kernel: Any = mx.fast.metal_kernel("probe", input_names=names, output_names=["y"], source=source, header="//\n")
        made: mx.array = kernel(
            inputs=[x, *inputs[1:]],
            template=template,
            grid=(4, 1, 1),
            threadgroup=(4, 1, 1),
            output_shapes=[(4,)],
            output_dtypes=[mx.bfloat16],
            verbose=True,
        )[0]
        return made

    mx.export_function(str(tmp_path / "f"), launch, inputs[0])
    printed = re.search(r"```\n(.*)\n```", capfd.readouterr().out, re.DOTALL)
    assert printed is not None
    ours = KernelText(
        "probe",
        tuple(names),
        ("y",),
        source,
        "//\n",
        False,
        tuple(_given(i, True).type for i in inputs),
        ("bfloat16",),
        tuple((k, v if isinstance(v, int) else dtype_name(v)) for k, v in template),
    )
    assert printed.group(1) == ours.full_source()


def test_operations_are_counted_by_kind() -> None:
    """64 threads, N fused multiplications each, an exponential, a division; loads and simd operations count nothing."""
    source = """
        uint i = thread_position_in_grid.x;
        float a = x[i], sum = 0;
        for (int k = 0; k < N; ++k) sum = sum * a + x[(i + k) & 63];
        y[i] = simd_sum(exp(sum)) / a;
    """
    x = np.linspace(0.1, 0.2, 64, dtype=np.float32)
    found = [
        run(source, {"x": x}, ((64,), np.float32), grid=(64, 1, 1), template=[("N", n)], count_ops=True)[1].operations
        for n in (4, 36)
    ]
    assert found[0] is not None and found[1] is not None
    assert found[1].float_ops - found[0].float_ops == 64 * 32
    assert 64 * 32 <= found[1].int_ops - found[0].int_ops <= 6 * 64 * 32  # the index, and the loop unless unrolled
    assert found[0].special_ops == 128 and found[0].convert_ops == 0
