"""The fixed point with a matrix state: the rooms agree, and the gradients are derivatives."""

import numpy as np
import pytest

import fpnumba as fp
from fpnumba.cpu import mamba as compiled
from fpnumba.reference import mamba as plain
from fpnumba.reference.mamba import Norm, System

KINDS = ["householder", "dplr", "kronecker", "monarch", "dense", "fixed"]
NORMS = ["layer", "rms", None]


def problem(rng, kind, norm, *, gated=True, heads=None, dtype=np.float64, batch=2, steps=5, dim=6, size=3):
    """A system whose steps are well within where they contract, and an initial state."""

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    u = normal(batch, steps, 2, dim)
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    alpha = rng.uniform(0.1, 0.6, (batch, steps, 2)).astype(dtype)
    matrix = np.eye(dim, dtype=dtype) + normal(batch, steps, dim, dim, scale=0.1)
    params = {
        "householder": (u, alpha),
        "dplr": (u, alpha),
        "kronecker": (normal(batch, steps, 2, 2, scale=0.4), normal(batch, steps, 3, 3, scale=0.4)),
        "monarch": (normal(batch, steps, 2, 3, 3, scale=0.3), alpha),
        "dense": (matrix,),
        "fixed": (matrix[0, 0],),
    }[kind]
    A = -rng.uniform(0.3, 1.5, (dim, size) if heads is None else heads).astype(dtype)
    weight, bias = rng.uniform(0.5, 1.0, dim).astype(dtype), normal(dim)
    norms = {"layer": Norm(weight, bias, 1e-5, True), "rms": Norm(weight, None, 1e-5, False), None: None}
    delta = rng.uniform(0.1, 0.6, (batch, steps, dim if heads is None else heads)).astype(dtype)
    gate = rng.uniform(0.4, 0.9, (batch, steps, dim)).astype(dtype) if gated else None
    system = System(
        kind,
        params,
        normal(batch, steps, dim, scale=4.0),
        delta,
        A,
        normal(batch, steps, size, scale=0.5),
        normal(batch, steps, size, scale=0.5),
        rng.uniform(0.3, 0.8, dim).astype(dtype),
        gate,
        norms[norm],
    )
    return system, normal(batch, dim, size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_rooms_agree(kind, norm, dtype, rng):
    if dtype == np.float32 and (kind not in ("householder", "kronecker") or norm != "layer"):
        pytest.skip("single precision differs in nothing that a mixer or a norm decides")
    double, initial = problem(
        rng, kind, norm, heads=2 if norm == "rms" else None, gated=norm != "rms", steps=19
    )
    options = {"rtol": 1e-13, "max_iter": 4000}
    wanted = plain.solve(double, initial, **options)
    assert (wanted.status == 0).all()
    assert np.abs(plain.iterate(double, initial, wanted.value) - wanted.value).max() < 1e-11
    y_bar, last_bar = rng.standard_normal(wanted.value.shape), rng.standard_normal(initial.shape)
    bars, _ = plain.pullback(double, initial, wanted.value, y_bar, last_bar)

    def cast(a):
        if isinstance(a, tuple):
            made = [cast(b) for b in a]
            return type(a)(*made) if hasattr(a, "_fields") else tuple(made)
        return a.astype(dtype) if isinstance(a, np.ndarray) else a

    system, start = cast(double), cast(initial)
    if dtype == np.float32:
        options = {"rtol": 1e-6, "max_iter": 4000}
    found = compiled.solve(system, start, **options)
    tolerance = 1e-11 if dtype == np.float64 else 3e-4
    assert (found.status == 0).all()
    np.testing.assert_allclose(found.value, wanted.value, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.last_state, wanted.last_state, rtol=0, atol=tolerance)
    y_bar, last_bar = cast(y_bar), cast(last_bar)
    theirs, status = compiled.pullback(system, start, cast(wanted.value), y_bar, last_bar, **options)
    assert (status == 0).all()
    for name in bars._fields:
        pairs = [(getattr(theirs, name), getattr(bars, name))]
        if name == "params":
            pairs = list(zip(theirs.params, bars.params, strict=True))
        for mine, right in pairs:
            assert (mine is None) == (right is None)
            if right is not None:
                assert mine.dtype == dtype
                np.testing.assert_allclose(
                    mine, right, rtol=0, atol=10 * tolerance * (1 + np.abs(right).max())
                )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_derivative(kind, rng):
    system, initial = problem(rng, kind, "layer")
    options = {"rtol": 1e-14, "max_iter": 4000}
    y_bar, last_bar = rng.standard_normal(system.x.shape), rng.standard_normal(initial.shape)

    def value(system, initial):
        solved = plain.solve(system, initial, **options)
        return float(np.vdot(solved.value, y_bar) + np.vdot(solved.last_state, last_bar))

    bars, _ = plain.pullback(system, initial, plain.solve(system, initial, **options).value, y_bar, last_bar)
    for name in ("x", "delta", "A", "B", "C", "skip", "gate", "initial"):
        point = initial if name == "initial" else getattr(system, name)
        direction = rng.standard_normal(point.shape)
        slopes = []
        for h in (1e-5, -1e-5):
            moved = point + h * direction
            slopes.append(
                value(system, moved)
                if name == "initial"
                else value(system._replace(**{name: moved}), initial)
            )
        slope = (slopes[0] - slopes[1]) / 2e-5
        assert float(np.vdot(getattr(bars, name), direction)) == pytest.approx(slope, rel=1e-6, abs=1e-7), (
            name
        )
    for k, point in enumerate(system.params):
        direction, slopes = rng.standard_normal(point.shape), []
        for h in (1e-5, -1e-5):
            params = list(system.params)
            params[k] = point + h * direction
            slopes.append(value(system._replace(params=tuple(params)), initial))
        slope = (slopes[0] - slopes[1]) / 2e-5
        assert float(np.vdot(bars.params[k], direction)) == pytest.approx(slope, rel=1e-6, abs=1e-7)


CLASSES = {"householder": "Householder", "kronecker": "Kronecker", "fixed": "Fixed"}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("room", ["reference", "cpu"])
def test_public_function_and_its_adjoint(kind, room, rng):
    s, initial = problem(rng, kind, "layer", steps=3)
    mixer = getattr(fp.mixers, CLASSES[kind])(*s.params)
    options = {"D": s.skip, "gate": s.gate, "weight": s.norm.weight, "bias": s.norm.bias, "initial": initial}
    tight = {"rtol": 1e-13, "max_iter": 4000}
    options |= {"solver": fp.Solver(**tight), "adjoint": fp.Adjoint(**tight)}
    arguments = (mixer, s.x, s.delta, s.A, s.B, s.C)
    with fp.arrays.use_room(room):
        solution, pullback = fp.vjp(fp.fixed_point_mamba, *arguments, **options)
        y_bar = rng.standard_normal(solution.value.shape)
        bars = pullback(y_bar)
        options["adjoint"] = fp.Adjoint("neumann", terms=300)
        series = fp.vjp(fp.fixed_point_mamba, *arguments, **options)[1](y_bar)
        # two halves, the second from where the first ended
        first, second = (
            fp.fixed_point_mamba(
                mixer if kind == "fixed" else type(mixer)(*(p[:, at] for p in s.params)),
                *(a[:, at] for a in (s.x, s.delta)),
                s.A,
                s.B[:, at],
                s.C[:, at],
                **options | {"gate": s.gate[:, at], "initial": start},
            )
            for at, start in ((slice(0, 2), initial), (slice(2, 3), None))
        )
    assert solution.converged.all()
    expected = plain.iterate(s, initial, solution.value)
    np.testing.assert_allclose(solution.value, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(first.value, solution.value[:, :2], rtol=0, atol=1e-10)
    assert first.last_state.shape == second.last_state.shape == initial.shape
    assert bars.solution.converged.all()
    for mine, other in zip(bars[1:], series[1:], strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-9)
    for name, bar in bars.options.items():
        np.testing.assert_allclose(bar, series.options[name], rtol=0, atol=1e-9)


def test_refusals_name_the_argument(rng):
    s, _ = problem(rng, "kronecker", "layer", steps=2)
    mixer, rest = fp.mixers.Kronecker(*s.params), (s.x, s.delta, s.A, s.B, s.C)
    for options, message in (
        ({"solver": fp.Solver("direct")}, "`solver`"),
        ({"norm": "batch"}, "`norm`"),
        ({"norm": "rms", "bias": s.skip}, "`bias`"),
        ({"gate": s.gate[:, :1]}, "`gate`"),
    ):
        with pytest.raises(ValueError, match=message):
            fp.fixed_point_mamba(mixer, *rest, **options)
    with pytest.raises(TypeError, match="`mixer`"):
        fp.fixed_point_mamba(s.x, *rest)
