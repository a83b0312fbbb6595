"""The hall and the GPU room: who is served where, in which dtype, and when anybody waits.

None of it needs a device: `pretend` stands in. tests/test_gpu_arrays.py is about real ones.
"""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from types import SimpleNamespace
from typing import Any

import numpy as np
import pretend
import pytest
from hall import assert_close, carried, inputs, mixer_of
from strategies import KINDS, RING, problem

import fpnumba as fp
import fpnumba.gpu
from fpnumba.gpu import _device, _host


@pytest.fixture
def host() -> Iterator[pretend.Host]:
    """NumPy arrays are carried to a device that is not there."""
    with pretend.device() as made, carried(), fp.arrays.use_room("gpu"):
        yield made


class Missing(MetaPathFinder):
    """A package that cannot be imported."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == self._name:
            raise ModuleNotFoundError(f"No module named {name!r}")


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
        pytest.raises(TypeError, match=r"layers and models compute NumPy's arrays on the CPU"),
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
        # not None in its place: array-api-compat looks there
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Missing("cupy"), *sys.meta_path])
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


def test_what_a_recording_says_is_fetched_behind_its_last_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stream that is current then; otherwise behind the solve, on its own."""

    class Told:
        device = SimpleNamespace(id=0)

        def get(self, stream: Any = None) -> Any:
            return np.array([stream is not None])

    cuda = SimpleNamespace(get_current_stream=object, runtime=SimpleNamespace(getDevice=lambda: 0))
    monkeypatch.setattr(_host, "xp", lambda: SimpleNamespace(cuda=cuda))
    for going_on, own_stream in ((None, True), (object(), False)):
        monkeypatch.setattr(_host, "recording", lambda going_on=going_on: going_on)
        (fetch,) = _host.later(Told())
        assert fetch()[0] == own_stream
