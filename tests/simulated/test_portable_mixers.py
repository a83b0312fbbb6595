"""Mixing and scanning in numba.cuda against the reference room."""

import math

import numpy as np
import pytest
import strategies
from numba import njit
from rooms import close, given, host

from fpnumba.gpu import portable
from fpnumba.reference import mixers as reference
from fpnumba.reference import scan

KINDS = [*strategies.KINDS, strategies.RING, strategies.RING_WITHOUT_TRANSPOSE]


def check(p, tolerance=1e-12) -> None:
    q = given(p)
    close(portable.apply(q.kind, q.params, q.x), reference.apply(p.kind, p.params, p.x), tolerance)
    close(
        portable.apply_transpose(q.kind, q.params, q.x),
        reference.apply_transpose(p.kind, p.params, p.x),
        tolerance,
    )
    close(
        portable.cotangent(q.kind, q.params, q.x, q.hbar),
        reference.cotangent(p.kind, p.params, p.x, p.hbar),
        tolerance,
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_against_the_reference(kind) -> None:
    p = strategies.problem(1, kind, steps=5, dim=6, rank=3)
    check(p)
    close(
        portable.to_dense(kind, given(p.params), 6),
        reference.to_dense(kind, p.params, 6),
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_small_and_empty(kind) -> None:
    for batch, steps, dim in ((0, 2, 4), (2, 0, 4), (1, 1, 1)):
        check(strategies.problem(2, kind, batch=batch, steps=steps, dim=dim, rank=1))


@pytest.mark.parametrize("kind", strategies.LOW_RANK)
def test_no_vectors_is_the_identity(kind) -> None:
    check(strategies.problem(3, kind, steps=2, dim=4, rank=0))


@pytest.mark.parametrize("kind", ["householder", "kronecker", strategies.RING_WITHOUT_TRANSPOSE], ids=str)
def test_pieces_of_time(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "PIECE", 2)
    check(strategies.problem(4, kind, steps=5, dim=4))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_transpose_is_the_adjoint(kind) -> None:
    """``<y, Q x> = <Q^T y, x>``, without the reference."""
    p = strategies.problem(5, kind, steps=3, dim=9)
    q = given(p)
    left = (p.hbar * host(portable.apply(q.kind, q.params, q.x))).sum()
    right = (host(portable.apply_transpose(q.kind, q.params, q.hbar)) * p.x).sum()
    assert abs(left - right) < 1e-12 * np.abs(p.hbar).sum()


@pytest.mark.parametrize("kind", ["dplr", "monarch", "fixed", strategies.RING], ids=str)
def test_single_precision(kind) -> None:
    check(strategies.problem(6, kind, steps=3, dim=6, dtype=np.float32), 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    p = strategies.problem(7, "householder", steps=3, dim=4).astype(dtype)
    wide = p.astype(np.float32)
    q = given(p)
    y = host(portable.apply(q.kind, q.params, q.x))
    assert y.dtype == p.x.dtype
    eps = 2.0**-10 if dtype == "float16" else 2.0**-7
    np.testing.assert_allclose(
        y.astype(float), reference.apply(p.kind, wide.params, wide.x), rtol=eps, atol=eps
    )
    bars = portable.cotangent(q.kind, q.params, q.x, q.hbar)
    assert [bar.dtype for bar in bars] == [p.x.dtype] * 2


def test_a_number_for_each_step() -> None:
    """A parameter without axes of its own is a 0-d array, in compiled functions that call others too."""

    @njit
    def turned(angle):
        return math.cos(angle)

    @njit
    def apply(x, out, angle):
        for i in range(x.shape[0]):
            out[i] = turned(angle[()]) * x[i]

    @njit
    def cotangent(x, ybar, xbar, angle, angle_bar):
        angle_bar[()] = 0.0
        for i in range(x.shape[0]):
            xbar[i] = turned(angle[()]) * ybar[i]
            angle_bar[()] -= math.sin(angle[()]) * x[i] * ybar[i]

    kind = strategies.OwnMixer("scaled", apply, cotangent)
    angle, x, ybar = np.random.default_rng(8).standard_normal((3, 2, 5, 4))
    angle = np.ascontiguousarray(angle[..., 0])
    for door in (portable.apply, portable.apply_transpose):
        close(door(kind, (given(angle),), given(x)), np.cos(angle)[..., None] * x)
    (angle_bar,) = portable.cotangent(kind, (given(angle),), given(x), given(ybar))
    close(angle_bar, -np.sin(angle) * (x * ybar).sum(axis=-1))


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="'circulant' is not a mixer"):
        portable.apply("circulant", (), given(np.ones((1, 1, 1))))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 4), (0, 3, 2), (2, 0, 3), (1, 1, 1)])
def test_linear_scan(reverse, shape, rng) -> None:
    lam, x, hbar = rng.uniform(-1, 1, (3, *shape))
    for initial in (None, rng.standard_normal(shape[::2])):
        h = portable.linear_scan(given(lam), given(x), given(initial), reverse)
        close(h, scan.linear_scan(lam, x, initial, reverse))
        bars = portable.linear_scan_vjp(given(lam), h, given(initial), reverse, given(hbar))
        expected = scan.linear_scan_vjp(lam, host(h), initial, reverse, hbar)
        close(bars[:2], tuple(expected[:2]))
        close(bars[2], expected[2])
