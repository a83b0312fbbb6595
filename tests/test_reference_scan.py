"""The reference scans against matrices written out, and their cotangents against complex steps."""

from typing import Any

import numpy as np
import pytest
from derivatives import assert_transposed, complex_step, like
from hypothesis import given
from hypothesis import strategies as st
from strategies import Array, Problem, Selective, problems, seeds, selective, selectives

from fpnumba.reference.scan import linear_scan, linear_scan_vjp, selective_scan, selective_scan_vjp, sum_to


def written_out(lam: Array, x: Array, initial: Array | None, reverse: bool) -> Array:
    """``h = M [initial, x]`` with the matrix of all products of ``lam``."""
    if reverse:
        return written_out(lam[:, ::-1], x[:, ::-1], initial, False)[:, ::-1]
    h = np.zeros(x.shape)
    for t in range(x.shape[1]):
        for source in range(t + 1):
            h[:, t] += np.prod(lam[:, source + 1 : t + 1], axis=1) * x[:, source]
        if initial is not None:
            h[:, t] += np.prod(lam[:, : t + 1], axis=1) * initial
    return h


@given(problems(kinds=("dense",)), st.booleans())
def test_linear_scan_is_its_matrix(p: Problem, reverse: bool) -> None:
    h = linear_scan(p.lam, p.x, p.initial, reverse)
    np.testing.assert_allclose(h, written_out(p.lam, p.x, p.initial, reverse), rtol=1e-12, atol=1e-13)


@given(problems(kinds=("dense",)), st.booleans(), seeds())
def test_linear_scan_cotangents(p: Problem, reverse: bool, seed: int) -> None:
    def scan(lam: Array, x: Array, initial: Array | None) -> Array:
        return linear_scan(lam, x, initial, reverse)

    primals = [p.lam, p.x, p.initial]
    tangents = like(np.random.default_rng(seed), primals)
    h = scan(p.lam, p.x, p.initial)
    bars = linear_scan_vjp(p.lam, h, p.initial, reverse, p.hbar)
    assert [b.shape for b in bars] == [p.lam.shape, p.x.shape, (p.x.shape[0], p.x.shape[2])]
    if p.initial is None:
        # what is left out is zero, and has a cotangent all the same
        primals[2], tangents[2] = np.zeros_like(bars[2]), np.ones_like(bars[2])
    assert_transposed((p.hbar, complex_step(scan, primals, tangents)), (bars, tangents))


def test_linear_scan_reversed_is_the_scan_of_the_reversed(rng: np.random.Generator) -> None:
    lam, x, initial = rng.uniform(size=(2, 5, 3)), rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 3))
    flipped = linear_scan(lam[:, ::-1], x[:, ::-1], initial)[:, ::-1]
    np.testing.assert_array_equal(linear_scan(lam, x, initial, reverse=True), flipped)


@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan_of_no_steps(reverse: bool) -> None:
    none = np.zeros((2, 0, 3))
    assert linear_scan(none, none, np.ones((2, 3)), reverse).shape == (2, 0, 3)
    lam_bar, x_bar, initial_bar = linear_scan_vjp(none, none, np.ones((2, 3)), reverse, none)
    assert lam_bar.shape == x_bar.shape == (2, 0, 3)
    np.testing.assert_array_equal(initial_bar, np.zeros((2, 3)))


def test_leading_axes_broadcast_and_cotangents_have_the_shapes_of_their_primals(
    rng: np.random.Generator,
) -> None:
    lam, x = rng.uniform(size=(4, 3)), rng.standard_normal((5, 1, 4, 3))
    initial, hbar = rng.standard_normal((2, 3)), rng.standard_normal((5, 2, 4, 3))
    h = linear_scan(lam, x, initial)
    full: Any = [np.broadcast_to(a, h.shape).copy() for a in (lam, x)]
    np.testing.assert_array_equal(h, linear_scan(*[*full, np.broadcast_to(initial, (5, 2, 3))]))
    lam_bar, s, initial_bar = linear_scan_vjp(lam, h, initial, False, hbar)
    assert (lam_bar.shape, s.shape, initial_bar.shape) == ((4, 3), h.shape, (2, 3))
    whole = linear_scan_vjp(full[0], h, initial, False, hbar)
    np.testing.assert_allclose(lam_bar, whole[0].sum(axis=(0, 1)), rtol=1e-12)
    np.testing.assert_allclose(sum_to(s, x.shape), s.sum(axis=1, keepdims=True), rtol=1e-12)


def test_a_sequence_with_a_nan_leaves_the_others_bitwise_alone(rng: np.random.Generator) -> None:
    lam, x = rng.uniform(size=(3, 6, 2)), rng.standard_normal((3, 6, 2))
    before = linear_scan(lam, x)
    x[1, 2, 0] = np.nan
    after = linear_scan(lam, x)
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert np.isnan(after[1, 2:, 0]).all()
    np.testing.assert_array_equal(after[1, :, 1], before[1, :, 1])


def per_channel(a: Selective) -> tuple[Array, Array]:
    """Mamba's ``A`` and ``delta``, whichever form."""
    if a.A.ndim == 2:
        return a.A, a.delta
    channels, size = a.x.shape[-1], a.B.shape[-1]
    head = np.arange(channels) // (channels // len(a.A))
    return np.repeat(a.A[head][:, None], size, axis=1), a.delta[..., head]


@given(selectives())
def test_selective_scan_is_a_linear_scan_of_every_entry_of_the_state(a: Selective) -> None:
    (A, delta), (batch, steps, dim), size = per_channel(a), a.x.shape, a.B.shape[-1]
    decay = np.exp(delta[..., None] * A).reshape(batch, steps, dim * size)
    drive = ((delta * a.x)[..., None] * a.B[..., None, :]).reshape(batch, steps, dim * size)
    start = np.zeros((batch, dim, size)) if a.initial is None else a.initial
    states = linear_scan(decay, drive, start.reshape(batch, dim * size)).reshape(batch, steps, dim, size)
    y, last = selective_scan(*a.primals)
    expected = np.einsum("btdn,btn->btd", states, a.C) + (0 if a.D is None else a.D * a.x)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(last, states[:, -1] if steps else start)


@given(selectives(), seeds())
def test_selective_scan_cotangents(a: Selective, seed: int) -> None:
    tangents = like(np.random.default_rng(seed), a.primals)
    bars = selective_scan_vjp(*a)
    for bar, primal in zip(bars[:6], a.primals[:6], strict=True):
        assert bar is primal or (bar is not None and bar.shape == primal.shape)
    assert bars[6].shape == a.last_bar.shape
    outputs = [
        complex_step(lambda *primals, i=i: selective_scan(*primals)[i], a.primals, tangents) for i in (0, 1)
    ]
    assert_transposed(([a.ybar, a.last_bar], outputs), (bars, tangents))


def test_selective_scan_without_last_cotangent(rng: np.random.Generator) -> None:
    a = selective(rng)
    zero = np.zeros_like(a.last_bar)
    for bar, same in zip(
        selective_scan_vjp(*a[:8], None),
        selective_scan_vjp(*a._replace(last_bar=zero)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(bar), np.asarray(same))


@pytest.mark.parametrize("heads", [None, 2])
def test_selective_scan_goes_on_from_its_last_state(rng: np.random.Generator, heads: int | None) -> None:
    a = selective(rng, steps=7, heads=heads)
    y, last = selective_scan(*a.primals)
    state, parts = a.initial, []
    for steps in (slice(0, 3), slice(3, 3), slice(3, 7)):
        x, delta, B, C = (v[:, steps] for v in (a.x, a.delta, a.B, a.C))
        part, state = selective_scan(x, delta, a.A, B, C, a.D, state)
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), y)
    np.testing.assert_array_equal(state, last)


def test_selective_scan_broadcasts_leading_axes(rng: np.random.Generator) -> None:
    a = selective(rng, batch=3)
    args: Any = (a.x, a.delta[:1], a.A, a.B[0], a.C, a.D, a.initial[None] if a.initial is not None else None)
    y, last = selective_scan(*args)
    assert (y.shape, last.shape) == ((1, *a.x.shape), (1, *a.last_bar.shape))
    B = np.broadcast_to(a.B[:1], a.B.shape)
    whole, _ = selective_scan(a.x, np.broadcast_to(a.delta[:1], a.delta.shape), a.A, B, a.C, a.D, a.initial)
    np.testing.assert_array_equal(y[0], whole)
    bars = selective_scan_vjp(*[*args, a.ybar[None], None])
    assert [np.shape(np.asarray(b)) for b in bars] == [np.shape(v) for v in args]


def test_float32_stays_float32(rng: np.random.Generator) -> None:
    a = selective(rng, dtype=np.float32)
    assert {v.dtype for v in selective_scan(*a.primals)} == {np.dtype(np.float32)}
    bars = selective_scan_vjp(*a)
    assert {b.dtype for b in bars if b is not None} == {np.dtype(np.float32)}
    assert linear_scan(a.delta, a.x).dtype == np.float32


def test_read_only_inputs_are_enough(rng: np.random.Generator) -> None:
    a = selective(rng)
    for v in a:
        if v is not None:
            v.flags.writeable = False
    selective_scan_vjp(*a)
    h = linear_scan(a.delta, a.x)
    h.flags.writeable = False
    linear_scan_vjp(a.delta, h, None, True, a.ybar)
