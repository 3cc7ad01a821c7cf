"""The codec's distortion against theory: rotations, bit widths, inputs, and the meanings of the stored scale.

    PYTHONPATH=. python bench/distortion.py --json distortion.json

Random vectors through the float64 reference (no model, no MLX). D is the mean of |x - x_hat|^2 / |x|^2; slope and v
belong to inner products of unit vectors: the slope of the estimate on the truth, and head_dim * E[error^2] for
orthogonal pairs. Owns these tables; what compression does to a model is quality.py's. Results: docs/codec.md.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import numpy as np
from _rows import Row, add_json_option, print_rows, write_rows
from numpy.typing import NDArray
from tests.turboquant_kv.product_form import decode_product, draw_sketch, encode_product

from turboquant_kv.codec.codebook import expected_distortion
from turboquant_kv.codec.format import SUPPORTED_HEAD_DIMS, ScaleKind
from turboquant_kv.codec.reference import decode, encode
from turboquant_kv.codec.rotation import rotation_matrix
from turboquant_kv.codec.scalar import ScalarCodec

Floats = NDArray[np.floating[Any]]
BITS = (2, 3, 4)
CHUNK = 10_000  # vectors at a time; bounds the scratch memory to some 100 MB

# Least distortion of a scalar quantiser on the sphere marginal, 2, 3 and 4 bits. Ours may be 1% off.
OPTIMAL = {
    64: (0.11453, 0.033391, 0.0091315),
    80: (0.11511, 0.033620, 0.0092045),
    96: (0.11551, 0.033773, 0.0092534),
    128: (0.11600, 0.033966, 0.0093148),
    256: (0.11674, 0.034256, 0.0094075),
}
UNBIASED_V = (0.132, 0.035, 0.0093)  # head_dim 128
PRODUCT_V = (0.568, 0.182, 0.053)  # head_dim 128, Gaussian sketch
VECTOR_BYTES = (34, 50, 66)  # head_dim 128


class Quality(NamedTuple):
    """Means over vectors (D) and pairs (slope, v)."""

    distortion: float
    slope: float
    variance: float


# --- inputs: (generator, number of vectors, head_dim) -> (n, head_dim) --------------------------------------------


def gaussian(rng: np.random.Generator, num_vectors: int, head_dim: int) -> Floats:
    return rng.standard_normal((num_vectors, head_dim))


def hot(num_hot: int) -> Callable[[np.random.Generator, int, int], Floats]:
    """Vectors of zeros but for `num_hot` equal entries."""

    def make(rng: np.random.Generator, num_vectors: int, head_dim: int) -> Floats:
        first = rng.integers(head_dim, size=num_vectors)
        x = np.zeros((num_vectors, head_dim))
        for i in range(num_hot):
            x[np.arange(num_vectors), (first + i * rng.integers(1, head_dim, size=num_vectors)) % head_dim] = 1
        return x

    return make


def four_loud_channels(rng: np.random.Generator, num_vectors: int, head_dim: int) -> Floats:
    x = gaussian(rng, num_vectors, head_dim)
    x[:, rng.choice(head_dim, 4, replace=False)] *= 20
    return x


def one_channel_at_fifty(rng: np.random.Generator, num_vectors: int, head_dim: int) -> Floats:
    x = gaussian(rng, num_vectors, head_dim)
    x[:, rng.integers(head_dim)] = 50
    return x


INPUTS = {
    "Gaussian": gaussian,
    "one-hot": hot(1),
    "two-hot": hot(2),
    "4 channels x20": four_loud_channels,
    "1 channel at 50": one_channel_at_fifty,
}
OUTLIERS = ("4 channels x20", "1 channel at 50")


def hadamard(rng: np.random.Generator, head_dim: int) -> Floats:
    return rotation_matrix(head_dim, int(rng.integers(2**31)), "k")


def dense(rng: np.random.Generator, head_dim: int) -> Floats:
    """A uniformly random orthonormal matrix, the paper's rotation."""
    q, r = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))
    return np.asarray(q * np.sign(np.diag(r)))


SCHEMES: dict[str, tuple[Callable[[np.random.Generator, int], Floats], ScaleKind]] = {
    "dense, plain": (dense, "plain"),
    "Hadamard, plain": (hadamard, "plain"),
    "Hadamard, least squares": (hadamard, "least_squares"),
    "Hadamard, unbiased": (hadamard, "unbiased"),
}


# --- measurements -------------------------------------------------------------------------------------------------


def distortion(x: Floats, decoded: Floats) -> float:
    return float(np.mean(np.sum((x - decoded) ** 2, axis=-1) / np.sum(x * x, axis=-1)))


def chunks(num_vectors: int, chunk: int) -> Iterator[int]:
    yield from (min(chunk, num_vectors - start) for start in range(0, num_vectors, chunk))


def isotropic(rng: np.random.Generator, head_dim: int, bits: int, num_vectors: int) -> float:
    """D of Gaussian vectors under the shipped rotation and the plain scale."""
    rotation, parts = rotation_matrix(head_dim, 2504, "k"), list(chunks(num_vectors, CHUNK))
    values, codec = [], ScalarCodec(bits, "plain")
    for count in parts:
        x = gaussian(rng, count, head_dim)
        values.append(distortion(x, decode(encode(x, codec, rotation), codec, head_dim, rotation)))
    return float(np.average(values, weights=parts))


def over_rotations(
    rng: np.random.Generator, scheme: str, kind: str, head_dim: int, bits: int, num_vectors: int
) -> float:
    """D of one kind of input, a fresh rotation for every 200 vectors."""
    draw, scale = SCHEMES[scheme]
    values, codec = [], ScalarCodec(bits, scale)
    for count in chunks(num_vectors, 200):
        x, rotation = INPUTS[kind](rng, count, head_dim), draw(rng, head_dim)
        values.append(distortion(x, decode(encode(x, codec, rotation), codec, head_dim, rotation)))
    return float(np.mean(values))


def product_quality(rng: np.random.Generator, scheme: str, bits: int, num_vectors: int) -> Quality:
    """D, slope and v at head_dim 128 of a scale kind, or of `gaussian` or `orthogonal` product form."""
    head_dim, num_queries, results = 128, 8, []
    rotation = rotation_matrix(head_dim, 2504, "k")
    for count in chunks(num_vectors, 2_000):
        x = gaussian(rng, count, head_dim)
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
        if scheme in get_args(ScaleKind):
            codec = ScalarCodec(bits, scheme)  # type: ignore[arg-type]
            decoded = decode(encode(x, codec, rotation), codec, head_dim, rotation)
        else:
            sketch = draw_sketch(head_dim, rng, scheme)  # type: ignore[arg-type]
            decoded = decode_product(encode_product(x, bits, rotation, sketch), bits, head_dim, rotation, sketch)
        along, errors = np.sum(x * decoded, axis=-1), []
        for _ in range(num_queries):
            z = gaussian(rng, count, head_dim)
            z -= np.sum(z * x, axis=-1, keepdims=True) * x
            errors.append(np.sum(z * decoded, axis=-1) / np.linalg.norm(z, axis=-1))
        # q = x/2 + sqrt(3/4) z: the estimate of <q, x> = 1/2, over 1/2
        slope = float(np.mean(along) + np.sqrt(3) * np.mean(errors))
        results.append([distortion(x, decoded), slope, head_dim * float(np.mean(np.square(errors)))])
    return Quality(*(float(value) for value in np.mean(results, axis=0)))


# --- tables -------------------------------------------------------------------------------------------------------


def isotropic_table(rng: np.random.Generator, num_vectors: int) -> Iterator[Row]:
    print("\n## D of isotropic vectors, Hadamard rotation, plain scale: measured / expected of our tables")
    print("| head_dim | " + " | ".join(f"{bits} bits" for bits in (*BITS, 8)) + " |\n|---|---|---|---|---|")
    for head_dim in SUPPORTED_HEAD_DIMS:
        cells = []
        for i, bits in enumerate((*BITS, 8)):
            measured, expected = isotropic(rng, head_dim, bits, num_vectors), expected_distortion(bits, head_dim)
            cells.append(f"{measured:.4g} / {expected:.4g}")
            name = f"D isotropic d={head_dim} b={bits}"
            if bits == 8 or head_dim not in OPTIMAL:
                yield Row.plain(name, measured, "", expected)
            else:
                yield Row.near(name, measured, "", OPTIMAL[head_dim][i], relative=0.01)
        print(f"| {head_dim} | " + " | ".join(cells) + " |")


def rotation_table(rng: np.random.Generator, num_vectors: int) -> Iterator[Row]:
    print("\n## D over the optimum of isotropic vectors, 2 / 3 / 4 bits")
    print("| head_dim | input | " + " | ".join(SCHEMES) + " |\n|---|---|" + "---|" * len(SCHEMES))
    for head_dim in (128, 80):
        for kind in INPUTS:
            cells = []
            for scheme in SCHEMES:
                measured = [over_rotations(rng, scheme, kind, head_dim, bits, num_vectors) for bits in BITS]
                ratios = [d / optimum for d, optimum in zip(measured, OPTIMAL[head_dim], strict=True)]
                cells.append(" / ".join(f"{ratio:.2f}" for ratio in ratios))
                for bits, d, optimum in zip(BITS, measured, OPTIMAL[head_dim], strict=True):
                    aimed = head_dim == 128 and scheme == "Hadamard, least squares" and kind in (*OUTLIERS, "one-hot")
                    target = 1.10 * optimum if aimed else None
                    yield Row.at_most(f"D {kind} d={head_dim} b={bits} {scheme}", d, "", target, optimum)
            print(f"| {head_dim} | {kind} | " + " | ".join(cells) + " |")


def scale_table(rng: np.random.Generator, num_vectors: int) -> Iterator[Row]:
    print("\n## What the one stored scalar means, head_dim 128: D / slope / v")
    print("| | 2 bits | 3 bits | 4 bits |\n|---|---|---|---|")
    for scheme in (*get_args(ScaleKind)[::-1], "gaussian", "orthogonal"):
        results = [product_quality(rng, scheme, bits, num_vectors) for bits in BITS]
        label = f"product form, {scheme} S" if scheme in ("gaussian", "orthogonal") else scheme.replace("_", " ")
        print(
            f"| {label} | "
            + " | ".join(f"{r.distortion:.4g} / {r.slope:.3f} / {r.variance:.3g}" for r in results)
            + " |"
        )
        for i, (bits, r) in enumerate(zip(BITS, results, strict=True)):
            yield Row.plain(f"D {label} b={bits}", r.distortion, "", OPTIMAL[128][i])
            if scheme == "unbiased":
                yield Row.near(f"slope {label} b={bits}", r.slope, "", 1.0, relative=0.002)
                yield Row.near(f"v {label} b={bits}", r.variance, "", UNBIASED_V[i], relative=0.03)
            elif scheme == "gaussian":
                yield Row.near(f"slope {label} b={bits}", r.slope, "", 1.0, relative=0.005)
                yield Row.near(f"v {label} b={bits}", r.variance, "", PRODUCT_V[i], relative=0.05)
            else:
                yield Row.plain(f"slope {label} b={bits}", r.slope, "")
                yield Row.plain(f"v {label} b={bits}", r.variance, "", UNBIASED_V[i])


def bytes_rows() -> Iterator[Row]:
    rotation = rotation_matrix(128, 2504, "k")
    for bits, target in zip(BITS, VECTOR_BYTES, strict=True):
        codec = ScalarCodec(bits)
        encoded = encode(np.ones(128), codec, rotation)
        num_bytes = encoded.codes.nbytes + encoded.scales.nbytes
        assert num_bytes == codec.vector_bytes(128)
        yield Row.near(f"bytes of a stored 128-vector b={bits}", num_bytes, "bytes", target, relative=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=40_000, help="vectors per isotropic figure (default 40000)")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="default: a new one, printed")
    add_json_option(parser)
    args = parser.parse_args()
    print(f"seed {args.seed}, {args.vectors} vectors an isotropic figure")
    rng = np.random.default_rng(args.seed)
    rows = [
        *isotropic_table(rng, args.vectors),
        # 50 rotations and 20 000 vectors a figure by default
        *rotation_table(rng, max(200, args.vectors // 4)),
        *scale_table(rng, max(2_000, args.vectors // 2)),
        *bytes_rows(),
    ]
    print("\n## Targets")
    print_rows([row for row in rows if row.target is not None])
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
