"""The scans of the CPU room against those of the reference room."""

import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from fpnumba.cpu import _jit, _threads, memory, scan
from fpnumba.reference import scan as reference

TOLERANCE = {np.float64: 1e-12, np.float32: 2e-5}
DTYPES = st.sampled_from([np.float64, np.float32])


def close(ours, theirs, dtype, factor: float = 1.0) -> None:
    tolerance = factor * TOLERANCE[dtype]
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == dtype
            assert_allclose(a, b, rtol=tolerance, atol=10 * tolerance)


@given(
    strategies.seeds(),
    st.integers(0, 3),
    st.integers(0, 9),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    DTYPES,
)
def test_linear_scan(seed, batch, steps, dim, reverse, start, dtype) -> None:
    p = strategies.problem(
        seed, "dplr", batch=batch, steps=steps, dim=dim, rank=1, initial=start, dtype=dtype
    )
    h = scan.linear_scan(p.lam, p.x, p.initial, reverse)
    close([h], [reference.linear_scan(p.lam, p.x, p.initial, reverse)], dtype)
    arguments = (p.lam, h, p.initial, reverse, p.hbar)
    close(scan.linear_scan_vjp(*arguments), reference.linear_scan_vjp(*arguments), dtype)


@given(strategies.selectives(), DTYPES)
def test_selective_scan(p, dtype) -> None:
    p = strategies.Selective(*(None if a is None else a.astype(dtype) for a in p))
    close(scan.selective_scan(*p.primals), reference.selective_scan(*p.primals), dtype)
    arguments = (*p.primals, p.ybar, p.last_bar)
    close(scan.selective_scan_vjp(*arguments), reference.selective_scan_vjp(*arguments), dtype, 10)


@pytest.mark.parametrize("heads", [None, 4])
def test_selective_scan_over_blocks_and_chunks(heads, monkeypatch: pytest.MonkeyPatch) -> None:
    """More channels than a block has, more steps than a chunk, and one sequence for four threads."""
    monkeypatch.setattr(_threads, "count", lambda: 4)
    monkeypatch.setattr(_threads, "SMALLEST", 0)
    p = strategies.selective(0, batch=1, steps=37, heads=heads, dim=200, size=16)
    close(scan.selective_scan(*p.primals), reference.selective_scan(*p.primals), np.float64)
    arguments = (*p.primals, p.ybar, p.last_bar)
    close(scan.selective_scan_vjp(*arguments), reference.selective_scan_vjp(*arguments), np.float64, 10)


@pytest.mark.parametrize("reverse", [False, True])
def test_channel_blocks_change_nothing(reverse, monkeypatch: pytest.MonkeyPatch) -> None:
    p = strategies.problem(1, "dplr", batch=1, steps=20, dim=331, dtype=np.float32)
    whole = scan.linear_scan(p.lam, p.x, p.initial, reverse)
    bars = scan.linear_scan_vjp(p.lam, whole, p.initial, reverse, p.hbar)
    monkeypatch.setattr(_threads, "count", lambda: 3)
    monkeypatch.setattr(_threads, "SMALLEST", 0)
    assert scan.channel_blocks(1, 331) == 3
    assert_array_equal(scan.linear_scan(p.lam, p.x, p.initial, reverse), whole)
    for a, b in zip(scan.linear_scan_vjp(p.lam, whole, p.initial, reverse, p.hbar), bars, strict=True):
        assert_array_equal(a, b)


@pytest.mark.parametrize("reverse", [False, True])
def test_writing_past_the_cache_changes_nothing(reverse, monkeypatch: pytest.MonkeyPatch) -> None:
    p = strategies.problem(2, "dplr", batch=2, steps=9, dim=136, dtype=np.float32)
    h = scan.linear_scan(p.lam, p.x, p.initial, reverse)
    bars = scan.linear_scan_vjp(p.lam, h, p.initial, reverse, p.hbar)
    monkeypatch.setattr(_jit, "STREAM_BYTES", 0)
    monkeypatch.setattr(memory, "SMALLEST", 0)  # so that every result is aligned
    assert _jit.streams(1, memory.empty(h.shape, h.dtype))
    assert_array_equal(scan.linear_scan(p.lam, p.x, p.initial, reverse), h)
    for a, b in zip(scan.linear_scan_vjp(p.lam, h, p.initial, reverse, p.hbar), bars, strict=True):
        assert_array_equal(a, b)


def test_nan_stays_in_its_sequence_and_channel() -> None:
    p = strategies.problem(3, "dplr", batch=3, steps=6, dim=5)
    clean = scan.linear_scan(p.lam, p.x)
    p.x[1, 2, 3] = np.nan
    h = scan.linear_scan(p.lam, p.x)
    assert_array_equal(np.isnan(h), np.isnan(reference.linear_scan(p.lam, p.x)))
    assert_array_equal(h[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponential(dtype) -> None:
    """Within two units of rounding, through Mamba's own scan: ``y = exp(A)`` from a state of one and no input."""
    limits = np.finfo(dtype)
    x = np.concatenate([-np.logspace(-6, np.log10(0.98 * -np.log(float(limits.tiny))), 300), [0.0]]).astype(
        dtype
    )
    one = np.ones((1, 1, 1), dtype)
    still, start = (
        (np.zeros((1, 1, len(x)), dtype), np.ones((1, 1, len(x)), dtype)),
        np.ones((1, len(x), 1), dtype),
    )
    y, _ = scan.selective_scan(*still, x[:, None], one, one, None, start)
    assert_allclose(y[0, 0], np.exp(x.astype(np.longdouble)).astype(np.float64), rtol=2 * float(limits.eps))
    x[:3] = -np.inf, np.nan, np.inf
    y, _ = scan.selective_scan(*still, x[:, None], one, one, None, start)
    assert_array_equal(y[0, 0, :3], [0.0, np.nan, np.inf])
