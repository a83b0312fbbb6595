"""The reference mixers against their matrices, and their cotangents against complex steps."""

from typing import Any

import numpy as np
import pytest
from derivatives import assert_transposed, complex_step, like
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    KINDS,
    LOW_RANK,
    RING,
    RING_WITHOUT_TRANSPOSE,
    Array,
    OwnMixer,
    mixer_params,
    problem,
    problems,
    seeds,
)

from fpnumba.reference import kinds, mixers

ALL = (*KINDS, RING, RING_WITHOUT_TRANSPOSE)
EMPTY_TOO: dict[str, Any] = {"ranks": (0, 3), "bound": 1.7}


@pytest.mark.parametrize("kind", ALL, ids=str)
@given(data=st.data())
def test_apply_is_the_dense_matrix(kind: Any, data: st.DataObject) -> None:
    p = data.draw(problems(kinds=[kind], **EMPTY_TOO))
    q = mixers.to_dense(p.kind, p.params, p.x.shape[-1])
    y = mixers.apply(p.kind, p.params, p.x)
    assert y.shape == p.x.shape
    np.testing.assert_allclose(y, np.einsum("...ij,...j->...i", q, p.x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ALL, ids=str)
@given(data=st.data())
def test_transpose_passes_the_dot_product_test(kind: Any, data: st.DataObject) -> None:
    p = data.draw(problems(kinds=[kind], **EMPTY_TOO))
    y, back = mixers.apply(p.kind, p.params, p.x), mixers.apply_transpose(p.kind, p.params, p.hbar)
    assert back.shape == p.x.shape
    assert_transposed((p.hbar, y), (back, p.x))


@pytest.mark.parametrize("kind", ALL, ids=str)
@given(data=st.data(), seed=seeds())
def test_cotangents_of_parameters(kind: Any, data: st.DataObject, seed: int) -> None:
    p = data.draw(problems(kinds=[kind], **EMPTY_TOO))
    tangents = like(np.random.default_rng(seed), p.params)
    bars = mixers.cotangent(p.kind, p.params, p.x, p.hbar)
    assert [b.shape for b in bars] == [q.shape for q in p.params]
    moved = complex_step(lambda *params: mixers.apply(p.kind, params, p.x), p.params, tangents)
    assert_transposed((p.hbar, moved), (bars, tangents))


@pytest.mark.parametrize("kind", ALL, ids=str)
@given(data=st.data())
def test_contraction_bound_is_the_norm_of_p(kind: Any, data: st.DataObject) -> None:
    p = data.draw(problems(kinds=[kind], **EMPTY_TOO))
    dim = p.x.shape[-1]
    bound = mixers.contraction_bound(p.kind, p.params, dim)
    P = np.eye(dim) - mixers.to_dense(p.kind, p.params, dim)
    assert bound.shape == P.shape[:-2]
    if P.size:
        np.testing.assert_allclose(bound, np.linalg.norm(P, 2, axis=(-2, -1)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", LOW_RANK, ids=str)
@given(data=st.data())
def test_low_rank_factors(kind: Any, data: st.DataObject) -> None:
    p = data.draw(problems(kinds=[kind], **EMPTY_TOO))
    factors = mixers.low_rank(p.kind, p.params)
    assert factors is not None
    u, S = factors
    q = np.eye(p.x.shape[-1]) - np.swapaxes(u, -1, -2) @ S @ u
    np.testing.assert_allclose(q, mixers.to_dense(p.kind, p.params, p.x.shape[-1]), rtol=1e-12, atol=1e-12)


def test_other_kinds_are_not_low_rank(rng: np.random.Generator) -> None:
    for kind in ("kronecker", "monarch", "dense", "fixed"):
        assert mixers.low_rank(kind, mixer_params(rng, kind, 1, 2, 4)) is None


def test_reflection_one_comes_first() -> None:
    first, second = np.array([1.0, 0.0]), np.array([0.6, 0.8])
    params = np.stack([first, second]), np.array([1.5, 0.5])
    x = np.array([2.0, -1.0])
    after_first = x - 1.5 * first * (first @ x)
    after_both = after_first - 0.5 * second * (second @ after_first)
    np.testing.assert_allclose(mixers.apply("householder", params, x), after_both, rtol=1e-15)
    assert not np.allclose(mixers.apply_transpose("householder", params, x), after_both)


def test_one_reflection_is_a_rank_one_dplr(rng: np.random.Generator) -> None:
    params, x = mixer_params(rng, "dplr", 2, 3, 5, rank=1), rng.standard_normal((2, 3, 5))
    np.testing.assert_allclose(
        mixers.apply("householder", params, x), mixers.apply("dplr", params, x), rtol=1e-14, atol=1e-15
    )
    np.testing.assert_array_equal(mixers.wy_triangle(*params)[..., 0, 0], params[1][..., 0])


def test_wy_triangle_is_lower_and_takes_zero_alpha(rng: np.random.Generator) -> None:
    u, alpha = mixer_params(rng, "householder", 1, 4, 6, rank=3)
    alpha[..., 1] = 0
    S = mixers.wy_triangle(u, alpha)
    np.testing.assert_array_equal(S, np.tril(S))
    q = np.eye(6) - np.swapaxes(u, -1, -2) @ S @ u
    np.testing.assert_allclose(q, kinds.householder_dense((u, alpha)), rtol=1e-13, atol=1e-14)


def test_a_full_reflection_is_orthogonal(rng: np.random.Generator) -> None:
    u, _ = mixer_params(rng, "householder", 2, 3, 5, rank=3)
    q = mixers.to_dense("householder", (u, np.full(u.shape[:-1], 2.0)), 5)
    np.testing.assert_allclose(np.swapaxes(q, -1, -2) @ q, np.broadcast_to(np.eye(5), q.shape), atol=1e-14)


def test_kronecker_sees_vectors_as_matrices_row_by_row() -> None:
    k1, k2 = np.array([[0.0, 1.0], [0.0, 0.0]]), np.diag([1.0, 2.0, 3.0])
    x = np.arange(6.0)
    np.testing.assert_array_equal(x - mixers.apply("kronecker", (k1, k2), x), [3.0, 8.0, 15.0, 0.0, 0.0, 0.0])


def test_contraction_bound_of_nearly_parallel_reflections(rng: np.random.Generator) -> None:
    # opposite signs leave P tiny beside its terms; a Gram matrix would lose half of the digits
    u = np.zeros((1, 2, 4))
    u[0, :, 0] = 1.0
    u[0, 1, 1] = 1e-6
    params = u, np.array([[1.0, -1.0]])
    P = u[0].T @ np.diag(params[1][0]) @ u[0]
    np.testing.assert_allclose(mixers.contraction_bound("dplr", params), np.linalg.norm(P, 2), rtol=1e-9)


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_contraction_bound_says_nan_of_a_nan_and_leaves_the_rest(kind: Any) -> None:
    if kind == "fixed":
        pytest.skip("one matrix for all sequences")
    p = problem(3, kind)
    before = mixers.contraction_bound(kind, p.params, 6)
    p.params[0][1, 3] = np.nan
    after = mixers.contraction_bound(kind, p.params, 6)
    assert np.isnan(after[1, 3])
    np.testing.assert_array_equal(after[0], before[0])


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_leading_axes_broadcast(kind: Any, rng: np.random.Generator) -> None:
    params = mixer_params(rng, kind, 2, 3, 6)
    x, ybar = rng.standard_normal((4, 2, 3, 6)), rng.standard_normal((4, 2, 3, 6))
    if not isinstance(kind, str):  # a user's own has the leading axes of the vectors
        params = tuple(q[None] for q in params)
    y, back = mixers.apply(kind, params, x), mixers.apply_transpose(kind, params, ybar)
    bars = mixers.cotangent(kind, params, x, ybar)
    assert [b.shape for b in bars] == [q.shape for q in params]
    sums = [np.zeros(q.shape) for q in params]
    for i in range(4):
        one = params if isinstance(kind, str) else tuple(q[0] for q in params)
        np.testing.assert_array_equal(y[i], mixers.apply(kind, one, x[i]))
        np.testing.assert_array_equal(back[i], mixers.apply_transpose(kind, one, ybar[i]))
        for total, bar in zip(sums, mixers.cotangent(kind, one, x[i], ybar[i]), strict=True):
            total += bar
    for total, bar in zip(sums, bars, strict=True):
        np.testing.assert_allclose(bar, total, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_float32_stays_float32_and_inputs_are_only_read(kind: Any) -> None:
    p = problem(1, kind, dtype=np.float32)
    for array in (*p.params, p.x, p.hbar):
        array.flags.writeable = False
    results = [
        mixers.apply(kind, p.params, p.x),
        mixers.apply_transpose(kind, p.params, p.hbar),
        *mixers.cotangent(kind, p.params, p.x, p.hbar),
        mixers.to_dense(kind, p.params, 6),
        mixers.contraction_bound(kind, p.params, 6),
    ]
    assert {r.dtype for r in results} == {np.dtype(np.float32)}


def test_a_users_own_mixer_without_parameters() -> None:
    class Flip:
        name = "flip"
        apply_transpose = None

        @staticmethod
        def apply(x: Array, out: Array) -> None:
            out[:] = x[::-1]

        @staticmethod
        def cotangent(x: Array, ybar: Array, xbar: Array) -> None:
            xbar[:] = ybar[::-1]

    kind, x = Flip(), np.arange(6.0).reshape(1, 2, 3)
    np.testing.assert_array_equal(mixers.apply(kind, (), x), x[..., ::-1])
    np.testing.assert_array_equal(mixers.apply_transpose(kind, (), x), x[..., ::-1])
    np.testing.assert_array_equal(mixers.to_dense(kind, (), 3), np.eye(3)[::-1])
    assert mixers.cotangent(kind, (), x, x) == ()
    with pytest.raises(ValueError, match="dim: missing"):
        mixers.contraction_bound(kind, ())


def test_one_number_per_step_arrives_as_a_zero_dimensional_array(rng: np.random.Generator) -> None:
    class Scale:
        name = "scale"
        apply_transpose = None

        @staticmethod
        def apply(x: Array, out: Array, c: Array) -> None:
            out[:] = c[()] * x

        @staticmethod
        def cotangent(x: Array, ybar: Array, xbar: Array, c: Array, c_bar: Array) -> None:
            xbar[:] = c[()] * ybar
            c_bar[()] = x @ ybar

    c, x, ybar = rng.uniform(size=(2, 3)), rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 4))
    np.testing.assert_array_equal(mixers.apply(Scale(), (c,), x), c[..., None] * x)
    (c_bar,) = mixers.cotangent(Scale(), (c,), x, ybar)
    np.testing.assert_allclose(c_bar, (x * ybar).sum(axis=-1), rtol=1e-13)


def test_compiled_functions_run_as_the_python_they_came_from(rng: np.random.Generator) -> None:
    class Compiled:
        """What a dispatcher looks like from here: it keeps its Python function."""

        def __init__(self, function: object) -> None:
            self.py_func = function

    kind = OwnMixer("compiled", *(Compiled(f) for f in RING[1:3]))  # type: ignore[arg-type]
    params, x = mixer_params(rng, RING, 1, 2, 3), rng.standard_normal((1, 2, 3))
    np.testing.assert_array_equal(mixers.apply(kind, params, x), mixers.apply(RING, params, x))
    np.testing.assert_array_equal(
        mixers.apply_transpose(kind, params, x), mixers.apply_transpose(RING, params, x)
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda x: mixers.apply("toeplitz", (), x),
        lambda x: mixers.apply_transpose("toeplitz", (), x),
        lambda x: mixers.cotangent("toeplitz", (), x, x),
        lambda x: mixers.to_dense("toeplitz", (), 3),
        lambda x: mixers.steps_shape("toeplitz", (), 1),
    ],
)
def test_no_such_mixer(call: object) -> None:
    with pytest.raises(ValueError, match="no mixer is named 'toeplitz'; expected one of dplr"):
        call(np.ones((1, 3)))  # type: ignore[operator]
