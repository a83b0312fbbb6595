"""Whose arrays, which room, what layout: everything that is decided before a kernel runs."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hall import ROOMS, TIGHT, assert_same, in_room, inputs, mixer_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, Problem, problem, problems, selective

import fpnumba as fp
from fpnumba.arrays import check

rooms = pytest.mark.parametrize("room", ROOMS)

# Things that hold numbers and are no arrays, or not such arrays
NOT_ARRAYS = [
    ([[1.0]], "got list"),
    ((1.0,), "got tuple"),
    (3, "got int"),
    (3.0, "got float"),
    (np.float64(3), "got numpy.float64"),
    ("lam", "got str"),
    (np.ndarray, "got the class numpy.ndarray"),
    (memoryview(b"12345678"), "got memoryview"),
    (np.ma.masked_array([[1.0]]), r"got numpy.ma.*MaskedArray, expected an array without a mask"),
    (np.ones((1, 1), int), "got dtype int64, expected one of float16, bfloat16, float32, float64"),
    (np.ones((1, 1), bool), "got dtype bool"),
    (np.ones((1, 1), complex), "got dtype complex128"),
    (np.ones((1, 1), object), "got dtype object"),
    (np.ones((1, 1), "datetime64[s]"), "got dtype datetime64"),
    (np.ones((1, 1), np.longdouble), r"got dtype (longdouble|float128)"),
]


@pytest.mark.parametrize(("wrong", "message"), NOT_ARRAYS, ids=[m[:40] for _, m in NOT_ARRAYS])
def test_what_is_no_floating_point_array_is_refused_by_name(wrong: Any, message: str) -> None:
    good = np.ones((1, 1))
    with pytest.raises(TypeError, match=rf"^argument `lam`: {message}"):
        fp.linear_scan(wrong, good)
    with pytest.raises(TypeError, match=rf"^argument `initial`: {message}"):
        fp.linear_scan(good, good, initial=wrong)
    with pytest.raises(TypeError, match=rf"^argument `q`: {message}"):
        fp.mixers.Fixed(wrong)
    with pytest.raises(TypeError, match=rf"^argument `delta`: {message}"):
        fp.selective_scan(good, wrong, good, good, good)
    with pytest.raises(TypeError, match=rf"^argument `gate`: {message}"):
        fp.fixed_point_rnn(good, fp.mixers.Fixed(good), good, gate=wrong)


def test_one_dtype_for_all() -> None:
    one, other = np.ones((2, 1)), np.ones((2, 1), np.float32)
    with pytest.raises(
        TypeError, match=r"^arguments `x` and `lam` are of different dtypes: float64 and float32"
    ):
        fp.linear_scan(other, one)
    with pytest.raises(TypeError, match=r"`x` and `mixer.q` are of different dtypes: float32 and float64"):
        fp.fixed_point_rnn(other, fp.mixers.Fixed(np.eye(1)), other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 3)}, None),
        ({"delta": (3, 4)}, r"`delta`: got shape \(3, 4\), expected \(..., T=3, D=6\)"),
        ({"A": (5, 4)}, r"`A`: got shape \(5, 4\), expected \(D=6, N\)"),
        ({"A": (4,)}, r"`A`: got 4 heads, which do not divide the 6 channels of `x`"),
        ({"A": (0,)}, r"`A`: got 0 heads"),
        ({"A": (2,)}, r"`delta`: got shape \(2, 3, 6\), expected \(..., T=3, H=2\)"),
        ({"A": (1, 6, 4)}, r"`A`: got shape \(1, 6, 4\), expected \(D=6, N\)"),
        ({"B": (2, 3, 5)}, r"`B`: got shape \(2, 3, 5\), expected \(..., T=3, N=4\)"),
        ({"C": (2, 2, 4)}, r"`C`: got shape \(2, 2, 4\), expected \(..., T=3, N=4\)"),
        ({"D": (1,)}, r"`D`: got shape \(1,\), expected \(D=6,\)"),
        ({"initial": (2, 4, 6)}, r"`initial`: got shape \(2, 4, 6\), expected \(..., D=6, N=4\)"),
    ],
)
def test_selective_scan_names_wrong_shapes(change: dict[str, tuple[int, ...]], message: str | None) -> None:
    p = selective(0, batch=2, steps=3, dim=6, size=4)
    arrays = {n: getattr(p, n) for n in ("x", "delta", "A", "B", "C", "D", "initial")}
    arrays |= {name: np.ones(shape) for name, shape in change.items()}
    if list(change) == ["A"] and len(change["A"]) == 1 and change["A"][0] in (0, 4):
        arrays["delta"] = np.ones((2, 3, change["A"][0]))
    keywords = {n: arrays.pop(n) for n in ("D", "initial")}
    with pytest.raises(ValueError, match=message or "got shape"):
        fp.selective_scan(*arrays.values(), **keywords)


def test_check_is_exact_about_letters() -> None:
    call = check({"a": (np.ones((3, 3)), "n n"), "b": (None, "n"), "c": (np.ones((7, 2, 3)), "... n")})
    assert (call.lead, call.sizes, call.batch, call.dtype) == ((7, 2), {"n": 3}, 14, "float64")
    assert "b" not in call
    assert call.get("b") is None
    with pytest.raises(ValueError, match=r"`a`: got shape \(2, 3\), expected \(n, n\)"):
        check({"a": (np.ones((2, 3)), "n n")})
    with pytest.raises(ValueError, match=r"`a`: got shape \(\), expected \(n,\)"):
        check({"a": (np.ones(()), "n")})


# Layout


def _strided(a: Any) -> Any:
    big = np.full(tuple(2 * n + 1 for n in a.shape), np.nan, a.dtype)
    view = big[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def _reversed(a: Any) -> Any:
    flip = tuple(slice(None, None, -1) for _ in a.shape)
    return np.ascontiguousarray(a[flip])[flip]


def _read_only(a: Any) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


def _unaligned(a: Any) -> Any:
    raw = np.zeros(a.nbytes + 1, np.uint8)[1:]
    view = raw.view(a.dtype).reshape(a.shape) if a.size else a.copy()
    view[...] = a
    return view


class Subclass(np.ndarray):
    """A subclass that adds nothing."""


LAYOUTS: dict[str, Any] = {
    "strided": _strided,
    "reversed": _reversed,
    "fortran": np.asfortranarray,
    "read-only": _read_only,
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": _unaligned,
    "subclass": lambda a: a.view(Subclass),
}


def _everything(room: str, p: Problem, arrange: Any) -> list[Any]:
    """Every public function with every array in this layout: the results; and no input has changed."""
    arranged: list[tuple[Any, Any]] = []

    def put(a: Any) -> Any:
        new = arrange(a)
        arranged.append((new, a.copy()))
        return new

    lam, x, hbar = put(p.lam), put(p.x), put(p.hbar)
    initial, gate = put(p.initial), put(p.gate)
    mixer = mixer_of(p).like(*(put(a) for a in p.params))
    results: list[Any] = []

    def keep(*found: Any) -> None:
        for bar in found:
            results.extend(bar.params if isinstance(bar, fp.mixers.Mixer) else [bar])

    for reverse in (False, True):
        h, pullback = fp.vjp(fp.linear_scan, lam, x, initial=initial, reverse=reverse)
        bars = pullback(hbar)
        keep(h, *bars, *bars.options.values())
    solution, pullback = fp.vjp(fp.fixed_point_rnn, lam, mixer, x, gate=gate, initial=initial)
    bars = pullback(hbar)
    keep(solution.value, *bars, *bars.options.values())
    keep(fp.fixed_point_rnn(lam, mixer, x, gate=gate, guess=hbar).value)
    for method in (type(mixer).apply, type(mixer).apply_transpose):
        y, pullback = fp.vjp(method, mixer, x)
        keep(y, *pullback(hbar))
    q = selective(0, batch=2, steps=p.x.shape[1], dim=p.x.shape[-1])
    out, pullback = fp.vjp(fp.selective_scan, *(put(a) for a in q[:5]), D=put(q.D), initial=put(q.initial))
    keep(*out, *pullback((put(q.ybar), put(q.last_bar))))
    for new, old in arranged:
        np.testing.assert_array_equal(new, old)
    return results


@rooms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["householder", "kronecker", "fixed"])
def test_layouts_do_not_matter(room: str, layout: str, kind: str) -> None:
    p = problem(0, kind, batch=2, steps=5, dim=4, gated=True)
    with in_room(room):
        plain = _everything(room, p, lambda a: a.copy())
        other = _everything(room, p, LAYOUTS[layout])
    assert len(plain) == len(other)
    for a, b in zip(plain, other, strict=True):
        assert type(b) is np.ndarray
        assert b.dtype == a.dtype
        assert b.dtype.isnative
        assert b.flags.writeable
        np.testing.assert_array_equal(a, b)


@rooms
@given(problems(kinds=KINDS, batches=(1, 3), steps=(1, 6)), st.sampled_from(sorted(LAYOUTS)))
def test_layouts_do_not_matter_to_solutions(room: str, p: Problem, layout: str) -> None:
    arrange = LAYOUTS[layout]
    with in_room(room):
        plain = fp.fixed_point_rnn(*inputs(p), initial=p.initial).value
        mixer = mixer_of(p).like(*map(arrange, p.params))
        initial = None if p.initial is None else arrange(p.initial)
        other = fp.fixed_point_rnn(arrange(p.lam), mixer, arrange(p.x), initial=initial).value
    np.testing.assert_array_equal(plain, other)


@rooms
def test_broadcast_inputs(room: str) -> None:
    """A stride of zero, and leading axes that are missing or of length one, mean the same."""
    p = problem(0, "dplr", batch=3, steps=5, dim=4)
    lam = p.lam[:1]
    with in_room(room):
        expected = fp.linear_scan(np.repeat(lam, 3, axis=0), p.x)
        for form in (lam, lam[0], np.broadcast_to(lam, p.x.shape)):
            np.testing.assert_array_equal(fp.linear_scan(form, p.x), expected)
        constant = np.broadcast_to(np.array([0.5]), p.x.shape)
        assert fp.linear_scan(constant, p.x).shape == p.x.shape
        # Shape of the cotangent: the one that was given
        for form in (lam, lam[0], np.broadcast_to(lam, p.x.shape)):
            _, pullback = fp.vjp(fp.linear_scan, form, p.x)
            assert pullback(p.hbar)[0].shape == form.shape
        both = fp.linear_scan(p.lam[:, None], p.x[None])
    assert both.shape == (3, 3, 5, 4)


@rooms
@pytest.mark.parametrize("batch", [(), (0,), (2,), (2, 0, 3)])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_empty_and_single_steps(room: str, batch: tuple[int, ...], steps: int) -> None:
    shape = (*batch, steps, 4)
    rng = np.random.default_rng(0)
    x, lam, initial = rng.normal(size=shape), rng.uniform(size=shape), rng.normal(size=(*batch, 4))
    n = 2
    with in_room(room):
        h, pullback = fp.vjp(fp.linear_scan, lam, x, initial=initial)
        bars = pullback(np.ones(shape))
        assert h.shape == bars[0].shape == bars[1].shape == shape
        assert bars.options["initial"].shape == initial.shape
        A, b = -np.ones((4, n)), rng.normal(size=(*batch, steps, n))
        state = rng.normal(size=(*batch, 4, n))
        (y, last), pullback = fp.vjp(fp.selective_scan, x, lam, A, b, b, initial=state)
        bars = pullback((np.ones(shape), np.ones(state.shape)))
        assert y.shape == shape
        assert last.shape == bars.options["initial"].shape == state.shape
        assert bars[2].shape == A.shape
        if steps == 0:
            np.testing.assert_array_equal(last, state)
        mixer = fp.mixers.DPLR(rng.normal(size=(*batch, steps, 1, 4)), np.full((*batch, steps, 1), 0.25))
        solution, pullback = fp.vjp(fp.fixed_point_rnn, lam, mixer, x, initial=initial, **TIGHT)
        assert solution.value.shape == shape
        assert solution.converged.all()
        assert pullback(np.ones(shape))[1].u.shape == mixer.u.shape
        assert mixer.to_dense().shape == (*shape, 4)
        assert mixer.contraction_bound().shape == (*batch, steps)


@rooms
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_floats_are_stored_small_and_computed_in_float32(room: str, dtype: str) -> None:
    small = (
        np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype)) if dtype == "bfloat16" else np.dtype(dtype)
    )
    rng = np.random.default_rng(0)
    lam, x = rng.uniform(0.5, 0.99, (2, 200, 3)).astype(small), rng.normal(size=(2, 200, 3)).astype(small)
    with in_room(room):
        h, pullback = fp.vjp(fp.linear_scan, lam, x)
        wide, wide_pullback = fp.vjp(fp.linear_scan, lam.astype(np.float32), x.astype(np.float32))
        bars, wide_bars = pullback(x), wide_pullback(x.astype(np.float32))
    assert h.dtype == small
    assert_same(h, wide.astype(small), room)
    for a, b in zip(bars, wide_bars, strict=True):
        assert a.dtype == small
        assert_same(a, b.astype(small), room)


def test_a_canonical_array_is_not_copied() -> None:
    x = np.ones((2, 5, 3))
    call = check({"x": (x, "... T D"), "y": (x[0], "... T D"), "q": (x[0, :3], "D D")})
    for name, owner in (("x", x), ("q", x)):
        assert np.shares_memory(call[name], owner)
    deep = x.reshape(1, 2, 5, 3)
    assert np.shares_memory(check({"x": (deep, "... T D")})["x"], x)
    # Broadcast: a copy that a room can read in order
    assert call["y"].shape == (2, 5, 3)
    assert call["y"].flags.c_contiguous


# Rooms


def test_rooms_are_chosen_and_given_back() -> None:
    assert fp.arrays.room().name == "cpu"
    with fp.arrays.use_room("reference") as inside:
        assert inside.name == fp.arrays.room().name == "reference"
        with pytest.raises(RuntimeError, match=r"out"), fp.arrays.use_room("cpu"):
            raise RuntimeError("out")
        assert fp.arrays.room().name == "reference"
    assert fp.arrays.room().name == "cpu"
    with pytest.raises(ValueError, match=r"`name`: got 'attic', expected one of reference, cpu, gpu"):
        fp.arrays.use_room("attic").__enter__()


class OnTheGPU:
    """An array of CUDA, from a library that takes nothing back."""

    shape = (1, 1)
    dtype = np.dtype(float)

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("never asked for")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


class Nowhere(OnTheGPU):
    """An array without a place."""

    def __dlpack_device__(self) -> tuple[int, int]:
        raise ValueError("unknown device")


class Elsewhere(OnTheGPU):
    """On the CPU, from a library that takes nothing back."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class OnAnotherGPU(OnTheGPU):
    """An array of ROCm."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 10, 0


def test_arrays_elsewhere_are_refused() -> None:
    good = np.ones((1, 1))
    with pytest.raises(
        TypeError, match=r"^argument `lam`: test_arrays.OnTheGPU .*pass cupy.from_dlpack\(x\)"
    ):
        fp.linear_scan(OnTheGPU(), good)
    with pytest.raises(
        TypeError, match=r"^argument `lam`: test_arrays.OnAnotherGPU is not on the CPU, nor on a CUDA device"
    ):
        fp.linear_scan(OnAnotherGPU(), good)
    with pytest.raises(
        TypeError, match=r"^argument `q`: test_arrays.Nowhere is not on the CPU \(unknown device\)"
    ):
        fp.mixers.Fixed(Nowhere())
    with pytest.raises(TypeError, match=r"its library has no from_dlpack"):
        fp.mixers.Fixed(Elsewhere())


def test_importing_does_next_to_nothing() -> None:
    """No compiler, no neighbour, no picture is loaded, and nothing warns."""
    code = (
        "import sys, fpnumba\n"
        "heavy = {'numba', 'jax', 'torch', 'cupy', 'matplotlib', 'scipy', 'safetensors', 'tqdm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert fpnumba.__version__\n"
        "assert 'linear_scan' in dir(fpnumba)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
