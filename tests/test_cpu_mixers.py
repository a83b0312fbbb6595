"""The mixers of the CPU room against those of the reference room."""

import numpy as np
import pytest
import strategies
from hypothesis import given
from numpy.testing import assert_allclose, assert_array_equal

from fpnumba.cpu import _threads, mixers
from fpnumba.reference import mixers as reference

KINDS = [*strategies.KINDS, strategies.RING, strategies.RING_WITHOUT_TRANSPOSE]


def check(p, tolerance: float) -> None:
    for door in ("apply", "apply_transpose"):
        ours, theirs = (getattr(room, door)(p.kind, p.params, p.x) for room in (mixers, reference))
        assert ours.dtype == p.x.dtype
        assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    arguments = (p.kind, p.params, p.x, p.hbar)
    for ours, theirs in zip(mixers.cotangent(*arguments), reference.cotangent(*arguments), strict=True):
        assert ours.dtype == p.x.dtype
        assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@given(strategies.problems(kinds=KINDS, ranks=(0, 4)))
def test_against_the_reference(p) -> None:
    check(p, 1e-12)


@pytest.mark.parametrize("kind", ["householder", "kronecker", "fixed"])
def test_single_precision(kind) -> None:
    check(strategies.problem(1, kind, steps=11, dim=36, rank=3, dtype=np.float32), 3e-5)


def test_segments_of_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p = strategies.problem(2, "householder", batch=1, steps=300, dim=9)
    whole = mixers.apply(p.kind, p.params, p.x)
    monkeypatch.setattr(_threads, "count", lambda: 3)
    monkeypatch.setattr(_threads, "SMALLEST", 0)
    assert mixers.time_segments(1, 300) == 4
    assert_array_equal(mixers.apply(p.kind, p.params, p.x), whole)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="'circulant' is not a mixer"):
        mixers.apply("circulant", (), np.ones((1, 1, 1)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("d1", "d2"), [(4, 16), (5, 17), (16, 32), (8, 3), (3, 40)])
def test_small_products_in_tiles_and_at_their_edges(d1, d2, dtype, rng) -> None:
    shapes = (2, 3, d1, d1), (2, 3, d2, d2), (2, 3, d1 * d2), (2, 3, d1 * d2)
    k1, k2, x, bar = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    tolerance = 1e-12 if dtype == np.float64 else 2e-4
    for door in ("apply", "apply_transpose"):
        ours, theirs = (getattr(room, door)("kronecker", (k1, k2), x) for room in (mixers, reference))
        assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    arguments = ("kronecker", (k1, k2), x, bar)
    for ours, theirs in zip(mixers.cotangent(*arguments), reference.cotangent(*arguments), strict=True):
        assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
