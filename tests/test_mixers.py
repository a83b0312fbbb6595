"""The public mixers over every room: their matrices, declared ranges, and a user's own."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hall import ROOMS, Ring, assert_close, in_room, mixer_of
from hypothesis import given
from strategies import KINDS, RING, RING_WITHOUT_TRANSPOSE, Problem, problem, problems

import fpnumba as fp

ALL = (*KINDS, RING, RING_WITHOUT_TRANSPOSE)
rooms = pytest.mark.parametrize("room", ROOMS)


@rooms
@given(problems(kinds=ALL, bound=1.9))
def test_they_are_their_matrices(room: str, p: Problem) -> None:
    mixer = mixer_of(p)
    dim = p.x.shape[-1]
    with in_room(room):
        q = np.broadcast_to(mixer.to_dense(), (*p.x.shape, dim))
        assert_close(mixer.apply(p.x), np.einsum("...ij,...j->...i", q, p.x), 1e-13)
        assert_close(mixer.apply_transpose(p.x), np.einsum("...ij,...i->...j", q, p.x), 1e-13)
        bound = np.broadcast_to(mixer.contraction_bound(), p.x.shape[:-1])
    if q.size:
        assert_close(bound, np.linalg.norm(np.eye(dim) - q, 2, axis=(-2, -1)), 1e-12)


@rooms
def test_definitions(room: str) -> None:
    """Section 2, written out for one step."""
    rng = np.random.default_rng(0)
    u, alpha = rng.normal(size=(1, 2, 6)), rng.uniform(size=(1, 2))
    k1, k2 = rng.normal(size=(1, 2, 2)), rng.normal(size=(1, 3, 3))
    blocks, strengths = rng.normal(size=(1, 2, 3, 3)), rng.normal(size=(1, 2))
    eye = np.eye(6)
    first, second = (eye - a * np.outer(v, v) for a, v in zip(alpha[0], u[0], strict=True))
    block = np.zeros((6, 6))
    block[:3, :3], block[3:, 3:] = strengths[0, 0] * blocks[0, 0], strengths[0, 1] * blocks[0, 1]
    expected = {
        fp.mixers.DPLR(u, alpha): first + second - eye,
        fp.mixers.Householder(u, alpha): second @ first,
        fp.mixers.Kronecker(k1, k2): eye - np.kron(k1[0], k2[0]),
        fp.mixers.Monarch(blocks, strengths): eye - block,
    }
    with in_room(room):
        for mixer, q in expected.items():
            assert_close(mixer.to_dense()[0], q, 1e-14)


@pytest.mark.parametrize("cls", [fp.mixers.DPLR, fp.mixers.Householder])
def test_alpha_is_held_to_its_range(cls: Any) -> None:
    u, alpha = np.ones((2, 3, 1, 4)), np.full((2, 3, 1), 0.5)
    alpha[1, 2, 0], alpha[0, 1, 0] = 2.25, 2.125
    with pytest.raises(
        ValueError, match=r"`alpha`: got 2.25 at index \(1, 2, 0\), outside .* \[0.0, 2.0\] \(alpha_max=2.0\)"
    ):
        cls(u, alpha)
    assert cls(u, alpha, alpha_max=3).alpha_max == 3.0
    assert cls(u, alpha, alpha_max=None).alpha_max is None
    alpha[:] = 0.5
    alpha[0, 0, 0] = -0.125
    with pytest.raises(ValueError, match=r"`alpha`: got -0.125 at index \(0, 0, 0\)"):
        cls(u, alpha)
    # NaN is for the solve to flag, for its sequence alone; it does not hide what is out of range
    alpha[0, 0, 0] = np.nan
    cls(u, alpha)
    alpha[1, 1, 0] = 5.0
    with pytest.raises(ValueError, match=r"`alpha`: got 5 at index \(1, 1, 0\)"):
        cls(u, alpha)
    assert cls(u[:0], alpha[:0]).lead == (0,)
    assert cls(u.astype(np.float16), np.full((2, 3, 1), 2.0, np.float16)).rank == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: m.DPLR(np.ones((2, 3)), np.ones(2)),
            r"`u`: got shape \(2, 3\), expected \(..., T, r, D\)",
        ),
        (
            lambda m: m.DPLR(np.ones((2, 1, 3)), np.ones((2, 2))),
            r"`alpha`: got shape \(2, 2\), expected \(..., T=2, r=1\)",
        ),
        (
            lambda m: m.Householder(np.ones((4, 2, 1, 3)), np.ones((3, 2, 1))),
            r"`alpha`: got leading axes \(3,\), expected",
        ),
        (
            lambda m: m.Kronecker(np.ones((1, 2, 3)), np.ones((1, 2, 2))),
            r"`k1`: got shape \(1, 2, 3\), expected \(..., T, d1, d1\)",
        ),
        (
            lambda m: m.Monarch(np.ones((1, 2, 3, 3)), np.ones((1, 3))),
            r"`alpha`: got shape \(1, 3\), expected \(..., T=1, J=2\)",
        ),
        (lambda m: m.Dense(np.ones((1, 2, 3))), r"`q`: got shape \(1, 2, 3\), expected \(..., T, D, D\)"),
        (lambda m: m.Fixed(np.ones((1, 2, 2))), r"`q`: got shape \(1, 2, 2\), expected \(D, D\)"),
        (
            lambda m: Ring(np.ones((1, 2)), np.ones(1)),
            r"`scale`: got shape \(1,\), expected \(..., T=1, one\)",
        ),
    ],
)
def test_wrong_shapes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(fp.mixers)


def test_wrong_arrays_are_named() -> None:
    with pytest.raises(TypeError, match=r"`q`: got dtype int64"):
        fp.mixers.Dense(np.ones((1, 2, 2), int))
    with pytest.raises(TypeError, match=r"`u` and `alpha` are of different dtypes: float64 and float32"):
        fp.mixers.DPLR(np.ones((1, 1, 2)), np.ones((1, 1), np.float32))
    mixer = fp.mixers.Fixed(np.eye(3))
    with pytest.raises(ValueError, match=r"`q`: got shape \(3, 3\), expected \(D=4, D=4\)"):
        mixer.apply(np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"`mixer`: Kronecker.* is for 1 channels, expected 4 as in `x`"):
        fp.mixers.Kronecker(np.ones((2, 1, 1)), np.ones((2, 1, 1))).apply(np.ones((2, 4)))


def test_repr_and_description() -> None:
    p = problem(0, "householder", batch=2, steps=3, dim=4, rank=2)
    mixer = mixer_of(p)
    assert repr(mixer) == "Householder(u: (2, 3, 2, 4) float64, alpha: (2, 3, 2) float64)"
    assert (mixer.lead, mixer.steps, mixer.channels) == ((2,), 3, 4)
    fixed = fp.mixers.Fixed(np.eye(3))
    assert (fixed.lead, fixed.steps, fixed.channels) == ((), None, 3)
    bar = mixer.like(mixer.params[0], -9 * mixer.params[1])
    assert type(bar) is type(mixer)
    assert bar.alpha.min() < 0  # type: ignore[attr-defined]


def test_nan_in_one_sequence_of_a_bound() -> None:
    for kind in KINDS[:-1]:
        p = problem(0, kind, batch=2, steps=3, dim=4)
        clean = mixer_of(p)
        p.params[0][1, 1].flat[0] = np.nan
        with fp.arrays.use_room("reference"):
            before, after = clean.contraction_bound(), mixer_of(p).contraction_bound()
        assert np.isnan(after[1, 1])
        np.testing.assert_array_equal(after[0], before[0])


# A user's own


@rooms
def test_own_mixer_without_channels_in_its_shapes(room: str) -> None:
    def apply(x: Any, out: Any, scale: Any) -> None:
        for i in range(x.shape[0]):
            out[i] = scale[0] * x[i]

    def cotangent(x: Any, ybar: Any, xbar: Any, scale: Any, scale_bar: Any) -> None:
        total = 0.0
        for i in range(x.shape[0]):
            xbar[i] = scale[0] * ybar[i]
            total += x[i] * ybar[i]
        scale_bar[0] = total

    Scale = fp.mixers.define("Scale", apply, cotangent, params={"scale": "one"})
    mixer = Scale(np.full((3, 1), 0.75))  # type: ignore[call-arg]
    assert mixer.channels is None
    x = np.ones((2, 3, 5))
    with in_room(room):
        np.testing.assert_array_equal(mixer.apply(x), 0.75 * x)
        assert fp.check_adjoint(Scale.apply, mixer, x).passed
        for method in (mixer.to_dense, mixer.contraction_bound):
            with pytest.raises(ValueError, match=r"do not tell the number of channels"):
                method()


@rooms
def test_own_mixer_with_one_number_a_step(room: str) -> None:
    """Its parameter of one step is a 0-d array, to be read and written as ``scale[()]``."""

    def apply(x: Any, out: Any, scale: Any) -> None:
        for i in range(x.shape[0]):
            out[i] = scale[()] * x[i]

    def cotangent(x: Any, ybar: Any, xbar: Any, scale: Any, scale_bar: Any) -> None:
        total = 0.0
        for i in range(x.shape[0]):
            xbar[i] = scale[()] * ybar[i]
            total += x[i] * ybar[i]
        scale_bar[()] = total

    Scale = fp.mixers.define("Scale", apply, cotangent, params={"scale": ""})
    mixer = Scale(np.full(3, 0.75))  # type: ignore[call-arg]
    x = np.ones((2, 3, 5))
    with in_room(room):
        np.testing.assert_array_equal(mixer.apply(x), 0.75 * x)
        np.testing.assert_array_equal(mixer.apply_transpose(x), 0.75 * x)
        assert fp.check_adjoint(Scale.apply, mixer, x).passed


def test_define_refuses_what_cannot_work() -> None:
    def function(*arrays: Any) -> None: ...

    with pytest.raises(TypeError, match=r"`cotangent`: got NoneType, expected a function"):
        fp.mixers.define("M", function, None, params={"a": "D"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`params`: got no parameters"):
        fp.mixers.define("M", function, function, params={})
    for name in ("apply", "params", "two words"):
        with pytest.raises(ValueError, match=rf"`params`: '{name}' cannot name a parameter"):
            fp.mixers.define("M", function, function, params={name: "D"})
    with pytest.raises(ValueError, match=r"`params`: got 'T D' for 'a'"):
        fp.mixers.define("M", function, function, params={"a": "T D"})
    with pytest.raises(TypeError, match=r"Ring takes 2 arrays \(weight, scale\), got 1"):
        Ring(np.ones((1, 2)))  # type: ignore[call-arg]


@rooms
def test_the_worked_example_of_the_documentation(room: str) -> None:
    text = (Path(__file__).parent.parent / "docs" / "own-mixer.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 5
    code = compile("\n".join(blocks), "docs/own-mixer.md", "exec")
    with in_room(room):
        exec(code, {"__name__": "own_mixer"})
