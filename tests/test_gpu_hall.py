"""The hall and the GPU room: who is served where, in which dtype, and when anybody waits.

The first half needs no device, but for `pretend`; the second is about real ones.
"""

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pretend
import pytest
from hall import ABSENT, TIGHT, assert_close, carried, extras, in_room, inputs, mixer_of, with_device
from strategies import KINDS, RING, problem

import fpnumba as fp
import fpnumba.gpu
from fpnumba.gpu import _device, _host


@pytest.fixture
def host() -> Iterator[pretend.Host]:
    """NumPy arrays are carried to a device that is not there."""
    with pretend.device() as made, carried(), fp.arrays.use_room("gpu"):
        yield made


class OnDevice:
    """An array of a small library of its own, on some device."""

    shape, ndim, dtype = (1, 1), 2, np.dtype(float)

    def __init__(self, *device: int) -> None:
        self._device = device

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("never asked for")

    def __dlpack_device__(self) -> tuple[int, ...]:
        return self._device

    def __array_namespace__(self, **_: Any) -> Any:
        return SimpleNamespace(from_dlpack=np.from_dlpack)


class Interface:
    """Memory of a device, from a library that takes nothing back."""

    @property
    def __cuda_array_interface__(self) -> Any:
        return {}


# --- who is served where ----------------------------------------------------------------------------------------


def test_arrays_on_different_devices_are_refused_by_name() -> None:
    here, there = np.ones((1, 1)), OnDevice(2, 0)
    different = r"`x` and `lam` are on different devices: {} and {}; move them to one first"
    with pytest.raises(TypeError, match=different.format("cpu", "cuda:0")):
        fp.linear_scan(there, here)
    with pytest.raises(TypeError, match=different.format("cuda:0", "cpu")):
        fp.linear_scan(here, there)
    with pytest.raises(TypeError, match=different.format("cuda:1", "cuda:0")):
        fp.linear_scan(there, OnDevice(2, 1))
    with pytest.raises(TypeError, match=r"`x` and `mixer.q` are on different devices: cuda:0 and cpu"):
        fp.fixed_point_rnn(there, fp.mixers.Fixed(here), there)
    # Pinned memory is the CPU's, managed memory the GPU's
    with pytest.raises(TypeError, match=different.format("cpu", "cuda:0")):
        fp.linear_scan(OnDevice(13, 0), OnDevice(3, 0))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_room_of_the_cpu_refuses_what_is_on_a_gpu(name: str) -> None:
    with (
        fp.arrays.use_room(name),
        pytest.raises(
            TypeError, match=rf"`q`: got test_gpu_hall on a GPU inside use_room\('{name}'\), .*x.cpu"
        ),
    ):
        fp.mixers.Fixed(OnDevice(2, 0))


def test_the_gpu_room_refuses_what_is_on_the_cpu() -> None:
    with (
        pretend.device(),
        fp.arrays.use_room("gpu"),
        pytest.raises(TypeError, match=r"`x`: got numpy on the CPU inside use_room\('gpu'\), .*cupy.asarray"),
    ):
        fp.linear_scan(np.ones((1, 1)), np.ones((1, 1)))


def test_layers_do_not_run_inside_the_gpu_room() -> None:
    layer = fp.nn.FPRNN(4, solver=fp.Solver(max_iter=2, on_failure="ignore"))
    params, x = layer.init(np.random.default_rng(0)), np.ones((1, 3, 4), np.float32)
    with (
        pretend.device(),
        fp.arrays.use_room("gpu"),
        pytest.raises(TypeError, match=r"layers and models compute on the CPU"),
    ):
        layer(params, x)


def test_memory_that_cannot_be_given_back_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`q`: .*Interface can be read through .*pass cupy.asarray\(x\)"):
        fp.mixers.Fixed(Interface())
    with pytest.raises(TypeError, match=r"`q`: got the class test_gpu_hall.Interface"):
        fp.mixers.Fixed(Interface)


# --- what is missing --------------------------------------------------------------------------------------------


class CudaError(RuntimeError):
    pass


def _cupy(driver: int = 13000, count: Any = 1) -> Any:
    """As much of CuPy as is asked whether there is a device."""

    def devices() -> int:
        if isinstance(count, str):
            raise CudaError(count)
        return int(count)

    runtime = SimpleNamespace(
        getDeviceCount=devices,
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: 13020,
        CUDARuntimeError=CudaError,
    )
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))


@pytest.mark.parametrize(
    ("cupy", "error", "message"),
    [
        (None, ImportError, r"needs CuPy: pip install 'fpnumba\[cuda13\]'"),
        (
            _cupy(0, "cudaErrorInsufficientDriver: ..."),
            RuntimeError,
            r"needs an NVIDIA driver, and there is none",
        ),
        (
            _cupy(12020, "cudaErrorInsufficientDriver: ..."),
            RuntimeError,
            r"serves CUDA 12.2 at most, and the installed CuPy is for CUDA 13.2.*fpnumba\[cuda12\]",
        ),
        (
            _cupy(count="cudaErrorNoDevice: ..."),
            RuntimeError,
            r"no CUDA device.*: CUDA_VISIBLE_DEVICES is '7'$",
        ),
        (_cupy(count=0), RuntimeError, r"no CUDA device"),
        (_cupy(count="cudaErrorUnknown: broken"), RuntimeError, r"does not answer: cudaErrorUnknown: broken"),
    ],
)
def test_what_is_missing_is_said_at_first_use(
    cupy: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host, "_ready", False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    if cupy is None:
        monkeypatch.setitem(sys.modules, "cupy", None)
    else:
        monkeypatch.setattr(_device, "xp", lambda: cupy)
    with pytest.raises(error, match=message):
        fp.arrays.use_room("gpu").__enter__()
    assert fp.arrays.room().name == "cpu"
    with pytest.raises(error, match=message):  # by their place alone
        fp.linear_scan(OnDevice(2, 0), OnDevice(2, 0))
    assert message.split(r".*")[0].replace("\\", "").rstrip("$") in str(fpnumba.gpu.absent())


def test_a_device_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_host, "_ready", False)
    monkeypatch.setattr(_device, "xp", _cupy)
    assert fpnumba.gpu.absent() is None
    monkeypatch.setattr(_device, "xp", lambda: _cupy(count=0))
    assert fpnumba.gpu.absent() is None


def test_engines_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fpnumba.gpu.engine()
    with fp.arrays.use_engine("raw"):
        assert fpnumba.gpu.engine() == "raw"
        with pytest.raises(RuntimeError, match=r"out"), fp.arrays.use_engine("raw"):
            raise RuntimeError("out")
    assert fpnumba.gpu.engine() == before
    with pytest.raises(ValueError, match=r"`name`: got 'steam', expected one of raw, numba"):
        fp.arrays.use_engine("steam").__enter__()
    monkeypatch.setattr(_host, "find_spec", lambda name: None)
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    with pytest.raises(ImportError, match=r"needs numba-cuda: pip install 'fpnumba\[cuda13\]'"):
        fp.arrays.use_engine("numba").__enter__()
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    with fp.arrays.use_engine("numba"):
        assert fpnumba.gpu.engine() == "numba"


def test_nothing_is_looked_for_at_import() -> None:
    code = (
        "import sys, fpnumba, fpnumba.gpu\n"
        "fpnumba.gpu.engine()\n"
        "heavy = {'numba', 'cupy', 'numba_cuda', 'fpnumba.gpu._device', 'fpnumba.gpu._host', 'fpnumba.gpu.solve'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    with pytest.raises(AttributeError, match=r"no attribute 'window'"):
        fpnumba.gpu.window  # noqa: B018


# --- in which dtype ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, RING])
def test_small_floats_reach_the_room_as_they_are_stored(kind: Any, host: pretend.Host) -> None:
    p = problem(0, kind, batch=2, steps=5, dim=4, gated=True).astype(np.float16)
    mixer = mixer_of(p)
    solution, pullback = fp.vjp(fp.fixed_point_rnn, p.lam, mixer, p.x, gate=p.gate, initial=p.initial)
    bars = pullback(p.hbar)
    for method in (mixer.apply, mixer.apply_transpose):
        y, to_x = fp.vjp(method, p.x)
        assert {y.dtype, to_x(y)[0].dtype} == {np.dtype(np.float16)}
    dense, to_params = fp.vjp(type(mixer).to_dense, mixer)
    assert {a.dtype for a in (dense, *to_params(dense)[0].params)} == {np.dtype(np.float16)}
    h, to_inputs = fp.vjp(fp.linear_scan, p.lam, p.x, initial=p.initial)
    to_inputs(h)
    assert host.dtypes == {"float16"}
    for a in (solution.value, bars[0], *bars[1].params, bars[2], *bars.options.values()):
        assert a.dtype == np.float16


@pytest.mark.parametrize("room", ["cpu", "gpu"])
def test_what_takes_several_rounds_goes_round_in_float32(room: str) -> None:
    """In float16 the iteration would stall long before it met this tolerance."""
    p = problem(0, "dense", batch=2, steps=5, dim=4).astype(np.float16)
    wide = p.astype(np.float32)
    solver = fp.Solver(rtol=1e-6, acceleration="anderson", on_failure="raise")
    adjoint = fp.Adjoint("neumann", terms=60, on_failure="raise")
    true, true_pullback = fp.vjp(fp.fixed_point_rnn, *inputs(wide), solver=solver, adjoint=adjoint)
    with pretend.device() as made, carried(), fp.arrays.use_room(room):
        solution, pullback = fp.vjp(fp.fixed_point_rnn, *inputs(p), solver=solver, adjoint=adjoint)
        bars = pullback(p.hbar)
    assert bars.solution.converged.all()
    if room == "gpu":
        assert made.dtypes == {"float32"}
    for a, b in zip(
        (solution.value, bars[0], bars[2]), (true.value, *true_pullback(wide.hbar)[::2]), strict=True
    ):
        assert a.dtype == np.float16
        assert_close(a, b.astype(np.float16), 4 * 2.0**-10)


def test_cotangents_are_summed_in_the_larger_dtype(host: pretend.Host) -> None:
    """One bias for 4096 sequences: added up in float16, small terms vanish beside a large sum."""
    lam, x = np.zeros((1, 1, 1), np.float16), np.ones((4096, 1, 1), np.float16)
    _, pullback = fp.vjp(fp.linear_scan, x, lam)
    assert pullback(np.ones_like(x))[1].item() == 4096
    assert host.dtypes == {"float16"}


# --- when anybody waits -----------------------------------------------------------------------------------------

ENTRIES = ("status", "iterations", "residual", "chunk_iterations")


@pytest.mark.parametrize("method", ["auto", "parallel", "chunked"])
@pytest.mark.parametrize("on_failure", ["ignore", "warn", "raise"])
def test_a_call_waits_only_where_it_has_to_speak(method: str, on_failure: str, host: pretend.Host) -> None:
    p = problem(0, "householder", batch=2, steps=5, dim=4)
    mixer = fp.mixers.Householder(*p.params, alpha_max=None)  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "solver": fp.Solver(method, on_failure=on_failure),
        "adjoint": fp.Adjoint(on_failure=on_failure),
    }
    waits = [0] if on_failure == "ignore" else [1]
    solution, pullback = fp.vjp(fp.fixed_point_rnn, p.lam, mixer, p.x, initial=p.initial, **options)
    assert [len(host.fetched)] == waits
    host.fetched.clear()
    bars = pullback(p.hbar)
    assert [len(host.fetched)] == waits
    host.fetched.clear()
    for found in (solution, bars.solution):
        for name in ENTRIES:
            first = getattr(found, name)
            assert type(first) is np.ndarray
            assert getattr(found, name) is first
    assert len(host.fetched) == 2 * (len(ENTRIES) - waits[0])
    assert "2 of 2 converged" in repr(solution)


def test_a_truncated_series_waits_for_nothing(host: pretend.Host) -> None:
    p = problem(0, "dense", batch=2, steps=5, dim=4)
    quiet = fp.Solver(on_failure="ignore")
    _, pullback = fp.vjp(fp.fixed_point_rnn, *inputs(p), solver=quiet, adjoint=fp.Adjoint("neumann", terms=2))
    bars = pullback(p.hbar)
    assert host.fetched == []
    assert (bars.solution.iterations == 3).all()
    assert len(host.fetched) == 1


def test_a_solution_that_waits_is_like_any_other(host: pretend.Host) -> None:
    p = problem(0, "dense", batch=2, steps=5, dim=4)
    solution = fp.fixed_point_rnn(*inputs(p), solver=fp.Solver(on_failure="ignore"))
    with pytest.raises(AttributeError, match=r"'Solution' object has no attribute 'iteration'"):
        solution.iteration  # noqa: B018
    with pytest.raises(AttributeError):
        solution.status = solution.status  # type: ignore[misc]
    other = pickle.loads(pickle.dumps(solution))
    for name in ("value", *ENTRIES):
        np.testing.assert_array_equal(getattr(other, name), getattr(solution, name))
    assert repr(other) == repr(solution)
    assert (solution.method, solution.history) == (other.method, other.history) == ("chunked", None)


# --- with a device ----------------------------------------------------------------------------------------------


@pytest.fixture
def cupy() -> Any:
    if ABSENT is not None:
        pytest.skip(f"no GPU room here: {ABSENT}")
    import cupy

    return cupy


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


@with_device
def test_selective_scan_is_not_there_and_says_so() -> None:
    x = np.ones((2, 1))
    with in_room("gpu"), pytest.raises(NotImplementedError, match=r"selective_scan .*GPU"):
        fp.selective_scan(x, x, -x[:1], x, x)


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
    assert {row.primitive.partition(" ")[0] for row in rows if row.absent} == {
        "selective_scan",
        "fp.selective_scan",
    }


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
