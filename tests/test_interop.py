"""Real arrays of JAX and torch, and of anything with DLPack: the same kind out, without a copy."""

import importlib
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from hall import assert_close, inputs, mixer_of
from strategies import problem

import fpnumba as fp
from fpnumba.arrays import check, neighbour


@pytest.fixture(autouse=True)
def _in_the_reference_room(request: pytest.FixtureRequest) -> Any:
    # Exchange is the hall's business; one room of the CPU is enough
    library = request.getfixturevalue("library") if "library" in request.fixturenames else None
    with nullcontext() if library is not None and library.device else fp.arrays.use_room("reference"):
        yield


class Wrapped:
    """An array of a small library of its own: DLPack, and a namespace with from_dlpack."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __array_namespace__(self, **_: Any) -> Any:
        return Wrapped

    @staticmethod
    def from_dlpack(array: Any) -> "Wrapped":
        return Wrapped(np.from_dlpack(array))


class Library:
    """What the tests need of one neighbour, on the CPU or on a GPU."""

    def __init__(self, name: str) -> None:
        self.name, _, self.device = name.partition(" on ")
        if self.name == "jax":
            self.jax, self.jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
            try:
                self.place = self.jax.devices(self.device or "cpu")[0]
            except RuntimeError as reason:
                pytest.skip(f"JAX without CUDA: {reason}")
        elif self.name == "torch":
            self.torch = pytest.importorskip("torch")
            if self.device and not self.torch.cuda.is_available():
                pytest.skip("torch without CUDA")
        elif self.name == "numba":
            pytest.importorskip("numba_cuda")
            self.cuda = importlib.import_module("numba.cuda")
        elif self.name == "cupy":
            self.cupy = importlib.import_module("cupy")

    def make(self, a: Any) -> Any:
        """The numbers of a NumPy array, in the library's own memory."""
        if self.name == "jax":
            return self.jax.device_put(a, self.place)
        if self.name == "torch":
            return self.torch.tensor(a, device=self.device or "cpu")
        if self.name == "numba":
            return self.cuda.to_device(a)
        return self.cupy.asarray(a) if self.name == "cupy" else Wrapped(a.copy())

    def back(self, a: Any) -> Any:
        if self.name == "torch":
            return a.cpu().numpy()
        if self.name == "numba":
            return a.copy_to_host()
        if self.name == "cupy":
            return a.get()
        return a.array if isinstance(a, Wrapped) else np.asarray(a)

    def pointer(self, a: Any) -> int:
        if self.name == "jax":
            return int(a.unsafe_buffer_pointer())
        if self.name == "torch":
            return int(a.data_ptr())
        if self.device:
            return int(a.__cuda_array_interface__["data"][0])
        return int(a.array.ctypes.data)

    def owns(self, a: Any) -> bool:
        """Whether it is one of the library's arrays, and where the library's arrays were."""
        if self.name == "jax":
            return isinstance(a, self.jnp.ndarray) and a.devices() == {self.place}
        if self.name == "torch":
            return isinstance(a, self.torch.Tensor) and a.device.type == (self.device or "cpu")
        if self.name == "numba":
            return bool(self.cuda.is_cuda_array(a)) and type(a).__name__ == "DeviceNDArray"
        return isinstance(a, self.cupy.ndarray if self.name == "cupy" else Wrapped)

    def same(self, got: Any, want: Any) -> None:
        """Equal to the reference's numbers; from a GPU, where sums go another way, to rounding."""
        if not self.device:
            np.testing.assert_array_equal(self.back(got), want)
            return
        assert self.back(got).dtype == want.dtype
        assert_close(self.back(got), want, 32 * float(np.finfo(want.dtype).eps))

    @property
    def where(self) -> str:
        return "cuda:0" if self.device else "cpu"


ON_GPU = [
    pytest.param(name, marks=pytest.mark.gpu)
    for name in ("cupy on cuda", "torch on cuda", "jax on gpu", "numba on cuda")
]


@pytest.fixture(params=["jax", "torch", "own", *ON_GPU])
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)


def test_the_same_kind_out(library: Library) -> None:
    p = problem(0, "householder", batch=2, steps=5, dim=4).astype(np.float32)
    make = library.make
    initial = make(p.initial)
    mixer = type(mixer_of(p))(*(make(a) for a in p.params))
    with fp.arrays.use_room("reference"):
        expected, plain_pullback = fp.vjp(fp.fixed_point_rnn, *inputs(p), initial=p.initial)
    solution, pullback = fp.vjp(fp.fixed_point_rnn, make(p.lam), mixer, make(p.x), initial=initial)
    assert library.owns(solution.value)
    library.same(solution.value, expected.value)
    assert type(solution.status) is np.ndarray  # what is said of a solve is NumPy
    bars, plain = pullback(make(p.hbar)), plain_pullback(p.hbar)
    for got, want in (
        (bars[0], plain[0]),
        (bars[1].u, plain[1].u),
        (bars[1].alpha, plain[1].alpha),
        (bars[2], plain[2]),
        (bars.options["initial"], plain.options["initial"]),
    ):
        assert library.owns(got)
        library.same(got, want)
    for method in ("to_dense", "contraction_bound"):
        assert library.owns(getattr(mixer, method)())
    assert library.owns(mixer.apply(make(p.x)))
    assert library.owns(fp.linear_scan(make(p.lam), make(p.x)))
    assert f"{tuple(p.params[0].shape)}" in repr(mixer)


def test_nothing_is_copied_on_the_way_in(library: Library) -> None:
    x = library.make(np.ones((2, 64, 8), np.float32))
    call = check({"x": (x, "... T D")})
    found = call["x"]
    assert (found.data.ptr if library.device else found.ctypes.data) == library.pointer(x)


def test_nothing_is_copied_on_the_way_out(library: Library) -> None:
    like = library.make(np.ones((2, 3), np.float32))
    if library.device:
        result = importlib.import_module("cupy").ones((2, 24), np.float32)
        given_back = neighbour(check({"x": (like, None)}).kind).give(result, like)
        assert library.owns(given_back)
        assert library.pointer(given_back) == result.data.ptr
        return
    room = np.zeros(64 * 3 + 16, np.float32)
    start = (-room.ctypes.data) % 64 // 4  # JAX takes over memory at multiples of 64 bytes
    result = room[start : start + 48].reshape(2, 24)
    given_back = neighbour(check({"x": (like, None)}).kind).give(result, like)
    assert library.owns(given_back)
    assert library.pointer(given_back) == result.ctypes.data
    # Elsewhere it is one copy, and the same numbers
    odd = np.arange(8, dtype=np.float32)[1:]
    np.testing.assert_array_equal(
        library.back(neighbour(check({"x": (like, None)}).kind).give(odd, like)), odd
    )


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (0, 2), (1, 2)])
def test_empty_arrays(library: Library, shape: tuple[int, ...]) -> None:
    h = fp.linear_scan(*(library.make(np.ones(shape, np.float32)) for _ in range(2)))
    assert library.owns(h)
    assert tuple(h.shape) == shape


def test_float16_comes_back_as_float16(library: Library) -> None:
    lam, x = np.full((9, 2), 0.75, np.float16), np.ones((9, 2), np.float16)
    h = fp.linear_scan(library.make(lam), library.make(x))
    assert "float16" in str(h.dtype)
    with fp.arrays.use_room("reference"):
        library.same(h, fp.linear_scan(lam, x))


def test_bfloat16(library: Library) -> None:
    if library.name in ("own", "numba"):
        pytest.skip("has no bfloat16")
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(0)
    arrays = [rng.uniform(size=(2, 50, 3)).astype(np.float32) for _ in range(2)]
    if library.name == "torch":
        small = [library.make(a).bfloat16() for a in arrays]
    else:
        small = [library.make(a.astype(bfloat16)) for a in arrays]

    def widen(a: Any) -> Any:
        return library.back(a.float() if library.name == "torch" else a).astype(np.float32)

    call = check({"x": (small[0], None)})
    if library.device:  # read as it lies
        assert call["x"].data.ptr == library.pointer(small[0])
        assert call["x"].dtype.name == "bfloat16"
    h, pullback = fp.vjp(fp.linear_scan, *small)
    assert "bfloat16" in str(h.dtype)
    assert "bfloat16" in str(pullback(h)[0].dtype)
    assert library.owns(h)
    with fp.arrays.use_room("reference"):
        wide = fp.linear_scan(*map(widen, small))
    np.testing.assert_allclose(widen(h), wide, rtol=2**-8)


def test_kinds_are_not_mixed(library: Library) -> None:
    x = np.ones((3, 2), np.float32)
    kind, other = fp.arrays.kind_of("x", library.make(x)), "numpy"
    what, got, expected = "are of different kinds", f"{kind} float32", "numpy float32"
    if library.device:
        what, got, expected = "are on different devices", f"{got} on cuda:0", f"{expected} on cpu"
        kind, other = "cuda:0", "cpu"
    with pytest.raises(TypeError, match=rf"^arguments `x` and `lam` {what}: {kind} and {other}"):
        fp.linear_scan(x, library.make(x))
    with pytest.raises(TypeError, match=rf"^arguments `x` and `mixer.q` {what}: {other} and {kind}"):
        fp.fixed_point_rnn(x, fp.mixers.Fixed(library.make(np.eye(2, dtype=np.float32))), x)
    _, pullback = fp.vjp(fp.linear_scan, x, x)
    with pytest.raises(TypeError, match=rf"`out_bar`: got {got}, expected {expected}"):
        pullback(library.make(x))


def test_integers_are_refused(library: Library) -> None:
    x = library.make(np.ones((3, 2), np.int32))
    with pytest.raises(TypeError, match=r"^argument `x`: got dtype int32"):
        fp.linear_scan(x, x)


def test_check_adjoint_takes_any_kind(library: Library) -> None:
    x = library.make(np.ones((3, 2), np.float32))
    assert fp.check_adjoint(fp.linear_scan, x, x).passed


@pytest.mark.parametrize("library", ON_GPU, indirect=True)
def test_one_kind_on_a_gpu(library: Library) -> None:
    other = Library("torch on cuda" if library.name == "cupy" else "cupy on cuda")
    x = np.ones((3, 2), np.float32)
    one, two = library.make(x), other.make(x)
    with pytest.raises(TypeError, match=r"^arguments `x` and `lam` are of different kinds"):
        fp.linear_scan(one, two)


@pytest.mark.filterwarnings("ignore:.*Grid size.*under-utilization")  # numba.cuda's own kernel for x.T
@pytest.mark.parametrize("library", ON_GPU, indirect=True)
def test_views_on_a_gpu(library: Library) -> None:
    """Read where they lie, with whatever strides the library has."""
    a = np.arange(24, dtype=np.float32).reshape(4, 6) / 24
    with fp.arrays.use_room("reference"):
        turned, stepped = fp.linear_scan(a.T, a.T), fp.linear_scan(a[::2], a[::2])
    x = library.make(a)
    library.same(fp.linear_scan(x.T, x.T), turned)
    library.same(fp.linear_scan(x[::2], x[::2]), stepped)
    np.testing.assert_array_equal(library.back(x), a)


# One library at a time


def test_jax_arrays_stay_as_they_were_and_traced_ones_are_refused() -> None:
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    x = jnp.arange(6.0).reshape(3, 2)
    before = np.array(x)
    fp.linear_scan(x, x)
    np.testing.assert_array_equal(np.asarray(x), before)
    with pytest.raises(TypeError, match=r"^argument `x`: is a traced JAX array; .* outside jit"):
        jax.jit(lambda x: fp.linear_scan(x, x))(x)


def test_jax_float64() -> None:
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    with jax.enable_x64(True):
        x = jnp.full((3, 2), 0.5, dtype=jnp.float64)
        h = fp.linear_scan(x, x)
        assert h.dtype == jnp.float64


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(TypeError, match=r"^argument `x`: is a torch tensor that requires grad.*x.detach\(\)"):
        fp.linear_scan(x, x)
    with pytest.raises(TypeError, match=r"^argument `x`: .* is not on the CPU"):
        fp.linear_scan(torch.ones(3, 2, device="meta"), torch.ones(3, 2, device="meta"))
    with pytest.raises(TypeError, match=r"^argument `x`: "):
        fp.linear_scan(torch.ones(3, 2).to_sparse(), torch.ones(3, 2).to_sparse())
    # Strides and broadcasting as torch has them
    base = torch.arange(12.0, dtype=torch.float64).reshape(2, 6)
    turned, wide = base.T, torch.full((1, 2), 0.5, dtype=torch.float64).expand(6, 2)
    h = fp.linear_scan(wide, turned)
    np.testing.assert_array_equal(h.numpy(), fp.linear_scan(wide.numpy().copy(), turned.numpy().copy()))
    assert h.is_contiguous()
    h += 1  # writable, and nobody else's
