"""Hadamard matrices and the randomised rotation of every supported head dimension."""

from __future__ import annotations

import numpy as np
import pytest

from turboquant_kv.codec.format import SUPPORTED_HEAD_DIMS, UnsupportedFormatError
from turboquant_kv.codec.rotation import Which, hadamard, rotate, rotation_matrix, signs, unrotate

every_head_dim = pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)


@every_head_dim
def test_hadamard_matrix(head_dim: int) -> None:
    matrix = hadamard(head_dim).astype(np.int64)
    assert set(np.unique(matrix)) == {-1, 1}
    assert np.array_equal(matrix @ matrix.T, head_dim * np.eye(head_dim, dtype=np.int64))


@every_head_dim
def test_rotation_matrix_is_orthonormal(head_dim: int, rng: np.random.Generator) -> None:
    matrix = rotation_matrix(head_dim, int(rng.integers(2**31)), "k")
    assert matrix.dtype == np.float32
    # entries are +-1/sqrt(d) rounded to float32, all alike: a relative error of at most 2 * 2^-24
    gram = matrix.astype(np.float64) @ matrix.astype(np.float64).T
    assert np.allclose(gram, np.eye(head_dim), rtol=0, atol=2e-7)
    assert np.allclose(np.abs(matrix), head_dim**-0.5, rtol=1e-6)


@every_head_dim
@pytest.mark.parametrize("which", ["k", "v"])
def test_fast_rotation_is_the_matrix_product(head_dim: int, which: Which, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, head_dim))
    matrix = rotation_matrix(head_dim, 7, which).astype(np.float64)
    # the matrix is float32: relative 6e-8 on values of about 1
    assert np.allclose(rotate(x, 7, which), x @ matrix.T, rtol=0, atol=1e-6)
    assert np.allclose(unrotate(x, 7, which), x @ matrix, rtol=0, atol=1e-6)


@every_head_dim
def test_unrotate_undoes_rotate_and_keeps_norms(head_dim: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, head_dim))
    y = rotate(x, 7, "v")
    assert np.allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12)
    assert np.allclose(unrotate(y, 7, "v"), x, rtol=0, atol=1e-12)


def test_dtype_is_kept_and_the_input_untouched(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 80)).astype(np.float32)
    before = x.copy()
    assert rotate(x, 1, "k").dtype == unrotate(x, 1, "k").dtype == np.float32
    assert np.array_equal(x, before)


def test_keys_values_seeds_and_dims_have_signs_of_their_own() -> None:
    variants = [signs(128, 2504, "k"), signs(128, 2504, "v"), signs(128, 2505, "k"), signs(256, 2504, "k")[:128]]
    for i, a in enumerate(variants):
        for b in variants[:i]:
            # fixed inputs, so no chance is involved: independent signs agree in 64 +- 6 places
            assert 40 < np.sum(a == b) < 88


def test_signs_are_pinned() -> None:
    """Stored pages were rotated by these; a change of theirs is a change of format."""
    packed = {which: np.packbits(signs(64, 2504, which) < 0, bitorder="little").tobytes().hex() for which in ("k", "v")}
    assert packed == {"k": "7d60b2083892bfd4", "v": "725af79472b9037c"}
    assert "".join(np.where(hadamard(96)[5, :16] < 0, "-", "+")) == "+-+--+-++-+--+-+"
    assert "".join(np.where(hadamard(112)[5, :16] < 0, "-", "+")) == "-+-+-+-++-+--+-+"


@pytest.mark.parametrize("head_dim", [0, 24, 100, 576])
def test_other_head_dims_are_refused_with_those_that_are_not(head_dim: int) -> None:
    with pytest.raises(UnsupportedFormatError, match="has no rotation here; supported: 32, 48"):
        rotation_matrix(head_dim, 0, "k")
    with pytest.raises(UnsupportedFormatError):
        rotate(np.ones((1, head_dim)), 0, "k")


def test_which_is_k_or_v() -> None:
    with pytest.raises(ValueError, match="which"):
        signs(64, 0, "q")
