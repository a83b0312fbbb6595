"""CuPy arrays, and what only a device can show of the hall: layouts, streams, waiting, engines, validation."""

import contextlib
import importlib
from typing import Any

import numpy as np
import pytest
from hall import TIGHT, assert_close, extras, inputs, mixer_of
from strategies import KINDS, RING, problem

import fpnumba as fp

pytestmark = pytest.mark.gpu


@pytest.fixture
def cupy() -> Any:
    return importlib.import_module("cupy")


def _carry(p: Any, change: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `fp.fixed_point_rnn`, each array changed."""
    mixer = type(mixer_of(p))(*map(change, p.params))
    return (change(p.lam), mixer, change(p.x)), {
        n: None if a is None else change(a) for n, a in extras(p).items()
    }


def _layouts(cupy: Any) -> dict[str, Any]:
    def strided(a: Any) -> Any:
        big = cupy.full(tuple(2 * n + 1 for n in a.shape), cupy.nan, a.dtype)
        view = big[tuple(slice(1, None, 2) for _ in a.shape)]
        view[...] = cupy.asarray(a)
        return view

    def turned(a: Any) -> Any:
        flip = tuple(slice(None, None, -1) for _ in a.shape)
        return cupy.ascontiguousarray(cupy.asarray(a)[flip])[flip]

    def shifted(a: Any) -> Any:
        flat = cupy.empty(a.size + 1, a.dtype)[1:]
        flat[...] = cupy.asarray(a).ravel()
        return flat.reshape(a.shape)

    return {
        "strided": strided,
        "turned": turned,
        "fortran": lambda a: cupy.asfortranarray(cupy.asarray(a)),
        "shifted": shifted,
    }


@pytest.mark.parametrize("layout", ["strided", "turned", "fortran", "shifted"])
@pytest.mark.parametrize("kind", ["householder", "kronecker", "fixed"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_layouts_on_a_gpu(layout: str, kind: str, dtype: str, cupy: Any) -> None:
    p = problem(0, kind, batch=2, steps=5, dim=4, gated=True).astype(dtype)
    results = []
    for change in (cupy.asarray, _layouts(cupy)[layout]):
        arguments, options = _carry(p, change)
        arrays = (arguments[0], *arguments[1].params, arguments[2], *options.values())
        before = [a.copy() for a in arrays]
        solution, pullback = fp.vjp(fp.fixed_point_rnn, *arguments, **options)
        bars = pullback(change(p.hbar))
        results.append([solution.value, bars[0], *bars[1].params, bars[2], *bars.options.values()])
        for a, b in zip(arrays, before, strict=True):
            cupy.testing.assert_array_equal(a, b)
    for a, b in zip(*results, strict=True):
        assert isinstance(b, cupy.ndarray)
        assert b.flags.c_contiguous
        assert_close(b.get(), a.get(), 16 * float(np.finfo(dtype).eps))


def test_broadcasting_on_a_gpu(cupy: Any) -> None:
    p = problem(0, "dplr", batch=3, steps=5, dim=4)
    x, lam = cupy.asarray(p.x), cupy.asarray(p.lam[:1])
    expected = fp.linear_scan(cupy.repeat(lam, 3, axis=0), x)
    for form in (lam, lam[0], cupy.broadcast_to(lam, x.shape)):
        h, pullback = fp.vjp(fp.linear_scan, form, x)
        cupy.testing.assert_array_equal(h, expected)
        assert pullback(x)[0].shape == form.shape


def test_a_call_on_a_gpu_does_not_wait(cupy: Any) -> None:
    """What is launched behind a long kernel returns before that is done."""
    p = problem(0, "householder", batch=4, steps=64, dim=64).astype(np.float32)
    (lam, _, x), _ = _carry(p, cupy.asarray)
    mixer = fp.mixers.Householder(*map(cupy.asarray, p.params), alpha_max=None)  # type: ignore[arg-type]
    quiet: dict[str, Any] = {
        "solver": fp.Solver(on_failure="ignore"),
        "adjoint": fp.Adjoint(on_failure="ignore"),
    }
    sleep = cupy.RawKernel(
        'extern "C" __global__ void nap(long long n) { long long t = clock64(); while (clock64() - t < n) {} }',
        "nap",
    )
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for ticks in (1, 1_000_000_000):  # the first compiles
            sleep((1,), (1,), (np.int64(ticks),))
            solution, pullback = fp.vjp(fp.fixed_point_rnn, lam, mixer, x, **quiet)
            bars = pullback(x)
        assert not stream.done
    # looked at from another stream, it is still the right one that is waited for
    assert solution.converged.all()
    assert bars.solution.converged.all()
    assert stream.done


@pytest.mark.parametrize("kind", [*KINDS, RING])
def test_gradients_of_cupy_arrays(kind: Any, cupy: Any) -> None:
    p = problem(0, kind, batch=2, steps=4, dim=4, gated=True)
    (lam, mixer, x), options = _carry(p, cupy.asarray)
    assert fp.check_adjoint(fp.fixed_point_rnn, lam, mixer, x, **options).passed
    assert fp.check_adjoint(fp.linear_scan, lam, x, initial=options["initial"]).passed
    for method in ("apply", "apply_transpose"):
        assert fp.check_adjoint(getattr(type(mixer), method), mixer, x).passed
    assert fp.check_adjoint(type(mixer).to_dense, mixer).passed


@pytest.mark.parametrize(
    "options",
    [
        {"acceleration": "anderson"},
        {"quantile": 0.75},
        {"damping_decay": 0.9, "damping_patience": 3},
        {"criterion": "published", "quantile": 0.75},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_policies_on_a_gpu(options: dict[str, Any], dtype: str, cupy: Any) -> None:
    p = problem(0, "dense", batch=4, steps=6, dim=4).astype(dtype)
    solver = fp.Solver(rtol=1e-5, on_failure="raise", **options)
    here = fp.fixed_point_rnn(*inputs(p), solver=solver)
    arguments, _ = _carry(p, cupy.asarray)
    there = fp.fixed_point_rnn(*arguments, solver=solver)
    assert isinstance(there.value, cupy.ndarray)
    assert type(there.history) is np.ndarray
    np.testing.assert_array_equal(there.iterations, here.iterations)
    assert_close(there.value.get(), here.value, 1e-4 if dtype == "float64" else 4 * 2.0**-10)


def test_declared_ranges_on_a_gpu(cupy: Any) -> None:
    u, alpha = cupy.ones((2, 3, 1, 4), np.float32), cupy.full((2, 3, 1), 0.5, np.float32)
    fp.mixers.DPLR(u, alpha)
    alpha[1, 2, 0] = 2.25
    with pytest.raises(ValueError, match=r"`alpha`: got 2.25 at index \(1, 2, 0\), outside .*alpha_max=2.0"):
        fp.mixers.DPLR(u, alpha)
    alpha[1, 2, 0], alpha[0, 0, 0] = 1.0, cupy.nan
    fp.mixers.DPLR(u, alpha)
    with pytest.raises(ValueError, match=r"`lam`: got 2 at index"):
        fp.fixed_point_rnn(alpha + 1, fp.mixers.Fixed(cupy.eye(1, dtype=np.float32)), alpha, lam_bound=1.0)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_real_arrays_in_the_wrong_room(name: str, cupy: Any) -> None:
    x = cupy.ones((2, 1))
    with fp.arrays.use_room(name), pytest.raises(TypeError, match=r"got cupy on a GPU inside use_room"):
        fp.linear_scan(x, x)
    with fp.arrays.use_room("gpu"):
        assert isinstance(fp.linear_scan(x, x), cupy.ndarray)
        with pytest.raises(TypeError, match=r"got numpy on the CPU inside use_room"):
            fp.linear_scan(x.get(), x.get())
    with pytest.raises(TypeError, match=r"`x` and `lam` are on different devices: cpu and cuda:0"):
        fp.linear_scan(x, x.get())
    _, pullback = fp.vjp(fp.linear_scan, x, x)
    with pytest.raises(TypeError, match=r"got numpy float64 on cpu, expected cupy float64 on cuda:0 like"):
        pullback(x.get())
    with fp.arrays.use_room(name):  # a pullback stays in its room
        assert isinstance(pullback(x)[0], cupy.ndarray)


@pytest.mark.parametrize("engine", ["raw", "numba"])
def test_both_engines(engine: str, cupy: Any) -> None:
    if engine == "numba":
        pytest.importorskip("numba_cuda")
    for kind in KINDS:
        p = problem(0, kind, batch=2, steps=5, dim=4, gated=True)
        true, true_pullback = fp.vjp(fp.fixed_point_rnn, *inputs(p), **extras(p), **TIGHT)
        arguments, options = _carry(p, cupy.asarray)
        with fp.arrays.use_engine(engine):
            solution, pullback = fp.vjp(fp.fixed_point_rnn, *arguments, **options, **TIGHT)
            lam_bar, mixer_bar, x_bar = pullback(cupy.asarray(p.hbar))
        assert_close(solution.value.get(), true.value, 1e-12)
        bars = true_pullback(p.hbar)
        for a, b in zip(
            (lam_bar, *mixer_bar.params, x_bar), (bars[0], *bars[1].params, bars[2]), strict=True
        ):
            assert_close(a.get(), b, 1e-10)


def test_arrays_stay_on_their_device(cupy: Any) -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    with cupy.cuda.Device(1):
        p = problem(0, "householder", batch=2, steps=5, dim=4)
        arguments, options = _carry(p, cupy.asarray)
        hbar = cupy.asarray(p.hbar)
    assert cupy.cuda.Device().id == 0
    solution, pullback = fp.vjp(fp.fixed_point_rnn, *arguments, **options)
    bars = pullback(hbar)
    assert {a.device.id for a in (solution.value, bars[0], *bars[1].params, bars[2])} == {1}
    assert solution.converged.all()
    assert cupy.cuda.Device().id == 0
    with pytest.raises(TypeError, match=r"on different devices: cuda:1 and cuda:0"):
        fp.linear_scan(cupy.ones((1, 1)), hbar[0])


def test_streams_of_torch(cupy: Any) -> None:
    """Inputs that another stream is still computing, and a result that goes on to it."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    lam = torch.full((8, 4096, 64), 0.5, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for stream in (contextlib.nullcontext(), cupy.cuda.Stream(non_blocking=True)):
        with torch.cuda.stream(side), stream:
            x = torch.zeros_like(lam)
            for _ in range(200):
                x = x + 1 / 200
            h = fp.linear_scan(lam, x) * 2
            found = h[:, -1].cpu()
        np.testing.assert_allclose(found.numpy(), 4.0, rtol=1e-4)


def test_a_tensor_that_requires_grad_on_a_gpu(cupy: Any) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    x = torch.ones(3, 2, device="cuda", requires_grad=True)
    with pytest.raises(TypeError, match=r"^argument `x`: is a torch tensor that requires grad.*x.detach\(\)"):
        fp.linear_scan(x, x)
    assert fp.linear_scan(x.detach(), x.detach()).is_cuda


def test_the_room_is_held_to_the_reference(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fpnumba import validate

    monkeypatch.setattr(validate, "SHAPES", {"quick": ((2, 9, 6), (0, 3, 4), (2, 0, 4))})
    rows = validate.run(["gpu"], quick=True)
    assert [validate.line(row) for row in rows if not row.ok] == []
    assert [validate.line(row) for row in rows if row.absent] == []


def test_info_of_a_device(cupy: Any) -> None:
    from fpnumba import info

    x = cupy.ones((2, 3))
    fp.linear_scan(x, x)
    facts = info.gather()
    assert facts["gpu"]["absent"] is None
    assert len(facts["gpu"]["devices"]) == cupy.cuda.runtime.getDeviceCount()
    assert any(kernel.endswith(".cu") for kernel in facts["gpu"]["kernels"])
    said = info.text(facts)
    for expected in (
        "GPU 0",
        "compute capability",
        "GiB",
        "driver",
        "runtime",
        "GPU kernel cache",
        "room gpu",
    ):
        assert expected in said


@pytest.mark.parametrize("kind", ["householder", "kronecker", "fixed"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_fixed_point_mamba(kind: str, dtype: str, cupy: Any) -> None:
    p = problem(0, kind, batch=2, steps=5, dim=4, bound=0.5)
    rng = np.random.default_rng(1)
    mixer = mixer_of(p)
    rest = (
        p.x,
        rng.uniform(0.1, 0.5, p.x.shape),
        -rng.uniform(0.5, 1, (4, 3)),
        *rng.normal(size=(2, 2, 5, 3)),
    )
    options: dict[str, Any] = {"D": rng.uniform(0.3, 0.6, 4), "gate": rng.uniform(0.3, 0.8, p.x.shape)}
    rtol = 1e-10 if dtype == "float64" else 1e-5

    def run(change: Any) -> Any:
        given = type(mixer)(*map(change, mixer.params)), *map(change, rest)
        solver, adjoint = fp.Solver(rtol=rtol, max_iter=3000), fp.Adjoint(rtol=rtol)
        named = {n: change(a) for n, a in options.items()}
        solution, pullback = fp.vjp(fp.fixed_point_mamba, *given, **named, solver=solver, adjoint=adjoint)
        bars = pullback(change(p.hbar))
        assert solution.converged.all()
        assert bars.solution.converged.all()
        arrays = (solution.value, solution.last_state, *bars[0].params, *bars[1:], bars.options["D"])
        assert all(type(a) is type(arrays[0]) and a.dtype == arrays[0].dtype for a in arrays)
        return [np.asarray(a.get() if hasattr(a, "get") else a, np.float64) for a in arrays]

    wanted = run(lambda a: a.astype(np.float64) if dtype == "float64" else a.astype(dtype).astype(np.float32))
    found = run(lambda a: cupy.asarray(a.astype(dtype)))
    tolerance = {"float64": 1e-8, "float32": 1e-3, "float16": 2e-2}[dtype]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * (1 + np.abs(other).max()))
