"""The readable twin of the GPU room in numba.cuda, which also takes a user's own mixer.

Sections 1, 2, 3, 6 and 7 of docs/mathematics.md. The same doors and the same stopping rules as the CPU room
and as the tuned kernels, in Python from end to end: `fpnumba.gpu._portable_kinds` (one step of each mixer),
`fpnumba.gpu._portable_kernels` (scans, mixing, the chunked solve) and `fpnumba.gpu._portable_lowrank` (one
step of a low-rank mixer at a time). It also runs in the CUDA simulator, on a machine with no GPU: with numba-cuda
installed, and ``NUMBA_ENABLE_CUDASIM=1`` set before Numba is imported.

A user's own functions (`fpnumba.mixers.CustomKind`) are compiled for the device here. They may use what
numba.cuda compiles: loops, numbers, `math`, and other functions compiled with ``numba.njit`` or
``numba.cuda.jit(device=True)``; they allocate nothing. Each thread takes a step of its own, so that a solve
in long chunks, or in parallel, has the most work to hand out.

Nothing is imported or compiled before the first call. Arrays in half precision are converted to float32 and
back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, TypeVar

import numpy as np

from fpnumba.gpu import _device, _report, _shapes
from fpnumba.gpu._report import Solved

__all__ = [
    "apply",
    "apply_transpose",
    "cotangent",
    "default_chunk",
    "iterate",
    "linear_scan",
    "linear_scan_vjp",
    "pull",
    "solve",
    "solve_direct",
    "to_dense",
]

Array = Any
Params = tuple[Any, ...]
Door = TypeVar("Door", bound=Callable[..., Any])

# Steps of a chunk where the caller does not say: each of them is a thread's, where the mixer is a user's own.
CHUNK = 128

# Steps of a sequence that one block takes where steps do not depend on each other: one for each thread.
PIECE = 128

MISSING = (
    "mixers of your own on a GPU, and the rest of the readable GPU room, need numba-cuda: "
    "pip install 'fpnumba[cuda13]' for a driver of CUDA 13, or 'fpnumba[cuda12]' for one of CUDA 12 "
    "(for the CUDA simulator, numba-cuda alone)"
)


@contextmanager
def _explained() -> Iterator[None]:
    """What it means when Numba cannot be imported, or cannot compile at all."""
    try:
        yield
    except ImportError as reason:
        raise ImportError(MISSING) from reason
    except AttributeError as reason:
        # numba-cuda 0.30.4 wants functions of NumPy that NumPy 2.5 has dropped, row_stack for one.
        if not str(reason).startswith("module 'numpy'"):
            raise
        raise ImportError(
            f"the installed numba-cuda does not work with NumPy {np.__version__} ({reason}): "
            "pip install 'numpy<2.5', or a numba-cuda later than 0.30.4"
        ) from reason


@cache
def _kernels() -> tuple[Any, Any, Any]:
    """The modules of device code."""
    with _explained():
        from numba import cuda

        # What Numba itself still brings along is a frozen copy, and its simulator mixes up threads: it gives a
        # module its simulated threadIdx while a function of that module runs, and takes it away when the first
        # thread leaves.
        if getattr(cuda, "implementation", "Built-in") == "Built-in":
            raise ImportError("numba-cuda is not installed")
        from fpnumba.gpu import _portable_kernels, _portable_kinds, _portable_lowrank

    return _portable_kernels, _portable_kinds, _portable_lowrank


def _launch(kernel: Any, blocks: int, *arguments: Any, numbers: int = 0) -> None:
    """Launch on the current stream of the array module. In the simulator arrays stay NumPy's.

    `numbers` is what the kernel needs of shared memory besides one number for each thread.
    """
    kernels, _, _ = _kernels()
    shared = 8 * (kernels.THREADS + numbers)
    if kernels.SIMULATED:
        kernel[blocks, kernels.THREADS, 0, shared](*arguments)
        return
    cuda = kernels.cuda
    stream = cuda.external_stream(_device.xp().cuda.get_current_stream().ptr)
    given = [_on_device(cuda, a) for a in arguments]
    with _explained():
        kernel[max(blocks, kernels.FEWEST_BLOCKS), kernels.THREADS, stream, shared](*given)


def _on_device(cuda: Any, argument: Any) -> Any:
    """Arrays as Numba's, in tuples and named tuples too."""
    if isinstance(argument, tuple):
        parts = [_on_device(cuda, a) for a in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    return cuda.as_cuda_array(argument, sync=False) if hasattr(argument, "shape") else argument


# Half precision


def _each(argument: Any, change: Callable[[Array], Array]) -> Any:
    """`change` of every array of a door's argument or result."""
    if isinstance(argument, tuple):
        parts = [_each(a, change) for a in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    return change(argument) if hasattr(argument, "astype") else argument


def _computed_wide(door: Door) -> Door:
    """The same door for arrays in half precision: converted to float32 on the way in, and back on the way out."""

    @wraps(door)
    def wide(*arguments: Any, **options: Any) -> Any:
        stored: list[Any] = []
        _each(arguments, lambda a: stored.append(a.dtype))
        if stored[0].itemsize != 2:
            return door(*arguments, **options)
        result = door(*_each(arguments, lambda a: a.astype(np.float32)), **options)
        return _each(result, lambda a: a.astype(stored[0]) if a.dtype == np.float32 else a)

    return wide  # type: ignore[return-value]


# Mixers


def _is_low_rank(kind: Any) -> bool:
    return isinstance(kind, str) and kind in ("dplr", "householder")


def _mixer(kind: Any, params: Params) -> Any:
    """The device functions of a mixer."""
    _, kinds, _ = _kernels()
    if not isinstance(kind, str):
        transpose = getattr(kind, "apply_transpose", None)
        return kinds.own(kind.apply, kind.cotangent, transpose, tuple(p.ndim for p in params))
    if kind not in kinds.BUILT_IN:
        known = ", ".join(kinds.BUILT_IN)
        raise ValueError(f"kind: {kind!r} is not a mixer; expected one of {known} or a custom kind")
    return kinds.BUILT_IN[kind]


def _at_least_one_vector(kind: Any, params: Params) -> Params:
    """``Q = I`` is a low-rank mixer without vectors; for the device, one vector that does nothing."""
    if not _is_low_rank(kind) or params[0].shape[2] > 0:
        return params
    batch, steps, _, dim = params[0].shape
    xp, dtype = _device.xp(), params[0].dtype
    return xp.zeros((batch, steps, 1, dim), dtype), xp.zeros((batch, steps, 1), dtype)


def _given(kind: Any, params: Params, blocks: int) -> Params:
    """Parameters as kernels take them: with room for unwanted cotangents, where `cotangent` has to transpose."""
    params = _at_least_one_vector(kind, params)
    if isinstance(kind, str) or getattr(kind, "apply_transpose", None) is not None:
        return params
    xp, (kernels, _, _) = _device.xp(), _kernels()
    unwanted = (xp.empty((blocks, kernels.THREADS, *p.shape[2:]), p.dtype) for p in params)
    return (*params, *unwanted)


def _work(kind: Any, params: Params, blocks: int, like: Array) -> Array:
    """Scratch for the steps of a mixer."""
    size, dim = 1, like.shape[-1]
    if _is_low_rank(kind):
        size = max(params[0].shape[2], 1) * dim
    elif isinstance(kind, str) and kind in ("kronecker", "monarch"):
        size = dim
    return _device.xp().empty((blocks, size), like.dtype)


def _pieces(like: Array) -> int:
    """How many blocks take a batch of sequences in pieces of time."""
    return int(like.shape[0] * -(-like.shape[1] // PIECE))


def _mix(kind: Any, params: Params, x: Array, transposed: bool) -> Array:
    y = _device.xp().empty(x.shape, x.dtype)
    mixer = _mixer(kind, params)
    if y.size:
        kernel, blocks = _kernels()[0].apply(mixer, transposed), _pieces(x)
        _launch(kernel, blocks, (_given(kind, params, blocks), x, y, _work(kind, params, blocks, x)), PIECE)
    return y


def _pull_back(kind: Any, params: Params, x: Array, ybar: Array) -> tuple[Array, Params]:
    """``Q^T ybar``, and the cotangents of the parameters of ``y = Q x``."""
    xp = _device.xp()
    mixer = _mixer(kind, params)
    xbar = xp.empty(x.shape, x.dtype)
    given = _at_least_one_vector(kind, params)
    bars = tuple(xp.zeros(p.shape, p.dtype) for p in given)
    if xbar.size:
        kernel, blocks = _kernels()[0].pull(mixer), _pieces(x)
        _launch(kernel, blocks, (given, bars, x, ybar, xbar, _work(kind, params, blocks, x)), PIECE)
    if kind == "fixed":
        dim = x.shape[-1]
        bars = (ybar.reshape(-1, dim).T @ x.reshape(-1, dim),)
    return xbar, bars if given is params else tuple(xp.zeros(p.shape, p.dtype) for p in params)


@_computed_wide
def apply(kind: Any, params: Params, x: Array) -> Array:
    """``Q_t x_t`` for every step.

    Section 2 of docs/mathematics.md; as `fpnumba.cpu.mixers.apply`.

    Parameters
    ----------
    kind : str or CustomKind
    params : tuple of arrays (B, T, ...)
        C-contiguous and of the dtype of `x`.
    x : (B, T, D) array

    Returns
    -------
    (B, T, D) array

    Raises
    ------
    ValueError
        If `kind` is a name of no mixer.
    ImportError
        If numba-cuda is missing or broken.
    """
    return _mix(kind, params, x, False)


@_computed_wide
def apply_transpose(kind: Any, params: Params, y: Array) -> Array:
    """``Q_t^T y_t`` for every step.

    Section 2 of docs/mathematics.md; as `fpnumba.cpu.mixers.apply_transpose`.

    Parameters
    ----------
    kind, params
        As for `apply`.
    y : (B, T, D) array

    Returns
    -------
    (B, T, D) array

    Raises
    ------
    ValueError, ImportError
        As `apply`.
    """
    return _mix(kind, params, y, True)


@_computed_wide
def cotangent(kind: Any, params: Params, x: Array, ybar: Array) -> Params:
    """Cotangents of the parameters of ``y = Q x``.

    Section 6 of docs/mathematics.md; as `fpnumba.cpu.mixers.cotangent`.

    Parameters
    ----------
    kind, params
        As for `apply`.
    x, ybar : (B, T, D) arrays

    Returns
    -------
    tuple of arrays, each of the shape of its parameter

    Raises
    ------
    ValueError, ImportError
        As `apply`.
    """
    return _pull_back(kind, params, x, ybar)[1]


@_computed_wide
def to_dense(kind: Any, params: Params, dim: int) -> Array:
    """``Q_t`` as matrices: what it makes of the unit vectors.

    Section 2 of docs/mathematics.md; as `fpnumba.cpu.mixers.to_dense`.

    Parameters
    ----------
    kind, params
        As for `apply`.
    dim : int
        ``D``.

    Returns
    -------
    (B, T, D, D) array; (D, D) for "fixed"

    Raises
    ------
    ValueError, ImportError
        As `apply`.
    """
    xp = _device.xp()
    _mixer(kind, params)  # raises if there is none
    if isinstance(kind, str) and kind in ("dense", "fixed"):
        return params[0].copy()
    batch, steps = params[0].shape[:2]
    # Each step D times over, once for each unit vector.
    units = xp.tile(xp.eye(dim, dtype=params[0].dtype), (batch, steps, 1))
    columns = _mix(kind, tuple(xp.repeat(p, dim, axis=1) for p in params), units, False)
    return xp.ascontiguousarray(columns.reshape(batch, steps, dim, dim).swapaxes(-1, -2))


# Scans


def default_chunk(kind: Any, params: Params, dim: int, dtype: Any) -> int:
    """Steps of a chunk where the caller does not say."""
    return CHUNK


def _zeros_if_none(initial: Array | None, like: Array) -> Array:
    return _device.xp().zeros(like.shape[::2], like.dtype) if initial is None else initial


def _channels(like: Array) -> int:
    """How many blocks have a thread for each channel of each sequence."""
    return int(-(-like.shape[0] * like.shape[2] // _kernels()[0].THREADS))


@_computed_wide
def linear_scan(lam: Array, x: Array, initial: Array | None = None, reverse: bool = False) -> Array:
    """Diagonal linear recurrence ``h_t = lam_t * h_{t-1} + x_t`` with ``h_0 = initial``.

    Section 1 of docs/mathematics.md; as `fpnumba.cpu.scan.linear_scan`.

    Parameters
    ----------
    lam, x : (B, T, D) C-contiguous arrays of one dtype
    initial : (B, D) array, optional
        Zeros if left out.
    reverse : bool
        Time runs backwards, and `initial` enters after the last step.

    Returns
    -------
    h : (B, T, D) array

    Raises
    ------
    ImportError
        If numba-cuda is missing or broken.
    """
    kernels = _kernels()[0]
    h = _device.xp().empty(x.shape, x.dtype)
    if h.size:
        _launch(kernels.scan, _channels(x), (lam, x, _zeros_if_none(initial, x), h), reverse)
    return h


@_computed_wide
def linear_scan_vjp(
    lam: Array, h: Array, initial: Array | None, reverse: bool, hbar: Array
) -> tuple[Array, Array, Array]:
    """Cotangents of `linear_scan` at its output `h`.

    Section 1 of docs/mathematics.md; as `fpnumba.cpu.scan.linear_scan_vjp`.

    Parameters
    ----------
    lam : (B, T, D) array
    h : (B, T, D) array
        What `linear_scan` returned.
    initial : (B, D) array or None
    reverse : bool
        As given to `linear_scan`.
    hbar : (B, T, D) array
        Cotangent of `h`.

    Returns
    -------
    lam_bar, x_bar : (B, T, D) arrays
    initial_bar : (B, D) array

    Raises
    ------
    ImportError
        If numba-cuda is missing or broken.
    """
    xp, kernels = _device.xp(), _kernels()[0]
    lam_bar, x_bar = xp.empty(h.shape, h.dtype), xp.empty(h.shape, h.dtype)
    initial_bar = xp.zeros(h.shape[::2], h.dtype)
    if h.size:
        arrays = (lam, h, _zeros_if_none(initial, h), hbar, lam_bar, x_bar, initial_bar)
        _launch(kernels.scan_vjp, _channels(h), arrays, reverse)
    return lam_bar, x_bar, initial_bar


# Solves


def _system(lam: Array, gate: Array | None, source: Array, initial: Array | None) -> Any:
    kernels, _, _ = _kernels()
    given = lam if gate is None else gate
    return kernels.System(lam, given, gate is not None, source, _zeros_if_none(initial, source))


def _stopping(like: Array, rtol: float, atol: float, max_iter: int, damping: float) -> Any:
    eps = float(np.finfo(_shapes.real(like.dtype)).eps)
    return _kernels()[0].Stopping(eps, float(rtol), float(atol), int(max_iter), float(damping))


def _summary(
    value: Array, report: Any, direct: bool, inputs: tuple[Any, ...], kind: Any, params: Params
) -> Solved:
    """The room's result from a report. `inputs` are arrays with an entry for each sequence, or None."""
    xp, (kernels, _, _) = _device.xp(), _kernels()
    batch, chunks = report.counts.shape
    solved = Solved(
        value,
        xp.zeros(batch, np.int64),
        xp.zeros(batch, np.float64),
        xp.zeros(batch, np.int8),
        xp.zeros((batch, chunks), np.int64),
    )
    if value.size == 0:
        return solved
    arrays = [a for a in (*inputs, *(() if kind == "fixed" else params)) if a is not None and a.size]
    fields = [a.reshape(batch, -1) for a in arrays]
    if kind == "fixed":
        fields.append(params[0].reshape(1, -1))
    tiny = float(np.finfo(value.dtype).tiny)
    eps = float(np.finfo(value.dtype).eps)
    _launch(kernels.summarise, batch, report, tuple(fields), solved, direct, eps, tiny)
    return solved


def _relaxed(
    kind: Any,
    params: Params,
    system: Any,
    value: Array,
    start: int,
    adjoint: bool,
    chunk: int,
    stop: Any,
) -> Any:
    """Iterate `value`, chunk after chunk; returns the report."""
    xp, (kernels, _, _) = _device.xp(), _kernels()
    batch, steps, dim = value.shape
    report = _report.blank(batch, -(-steps // chunk))
    mixer = _mixer(kind, params)
    if value.size:
        d, mixed = (xp.empty((batch, min(chunk, steps), dim), value.dtype) for _ in range(2))
        scratch = kernels.Scratch(value, d, mixed, _work(kind, params, batch, value))
        kernel = kernels.relax(mixer, adjoint)
        _launch(kernel, batch, system, _given(kind, params, batch), scratch, report, start, chunk, stop)
    return report


def _stepwise(
    kind: Any, params: Params, system: Any, value: Array, adjoint: bool, direct: bool, stop: Any
) -> Any:
    """Step after step in ``r`` unknowns each; returns the report."""
    batch, steps, _ = value.shape
    report = _report.blank(batch, min(steps, 1) if direct else steps)
    if value.size:
        u, alpha = _at_least_one_vector(kind, params)
        rank, lowrank = int(u.shape[2]), _kernels()[2]
        kernel = lowrank.solve(rank, kind == "householder", adjoint, direct)
        numbers = lowrank.shared_numbers(rank)
        _launch(kernel, batch, system, (u, alpha, value), report, stop, numbers=numbers)
    return report


@_computed_wide
def solve(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    guess: Array | None,
    *,
    adjoint: bool,
    chunk: int,
    rtol: float,
    atol: float,
    max_iter: int,
    damping: float,
) -> Solved:
    """The fixed point of (F), or of its adjoint, chunk after chunk.

    Sections 3, 6 and 7 of docs/mathematics.md; as `fpnumba.cpu.solve.solve` and `solve_adjoint`. Low-rank
    mixers take a chunk of one step in ``r`` unknowns, where there is neither a guess nor damping.

    Parameters
    ----------
    kind, params
        As for `apply`.
    lam : (B, T, D) array
    gate : (B, T, D) array or None
        None is ``1 - lam``.
    source : (B, T, D) array
        ``x``, or ``hbar`` in the adjoint.
    initial : (B, D) array or None
        None is zero; always None in the adjoint.
    guess : (B, T, D) array or None
        Where the iteration starts; None is zero.
    adjoint : bool
    chunk : int
        Steps of a chunk.
    rtol, atol, max_iter, damping
        As for `fpnumba.cpu.solve.solve`.

    Returns
    -------
    Solved

    Raises
    ------
    ValueError, ImportError
        As `apply`.
    """
    xp, system = _device.xp(), _system(lam, gate, source, initial)
    stop = _stopping(source, rtol, atol, max_iter, damping)
    inputs = (lam, gate, source, initial, guess)
    if _is_low_rank(kind) and chunk == 1 and guess is None and damping == 1:
        value = xp.empty(source.shape, source.dtype)
        report = _stepwise(kind, params, system, value, adjoint, False, stop)
    else:
        start = _kernels()[0].COLD if guess is None else _kernels()[0].GUESS
        value = xp.empty(source.shape, source.dtype) if guess is None else guess.copy()
        report = _relaxed(kind, params, system, value, start, adjoint, chunk, stop)
    return _summary(value, report, False, inputs, kind, params)


@_computed_wide
def solve_direct(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    *,
    adjoint: bool,
) -> Solved:
    """The fixed point of (F), or of its adjoint, for low-rank mixers: one ``r x r`` system for each step.

    Section 3 of docs/mathematics.md; as ``method="direct"`` of `fpnumba.cpu.solve.solve`.

    Parameters
    ----------
    kind, params, lam, gate, source, initial, adjoint
        As for `solve`.

    Returns
    -------
    Solved

    Raises
    ------
    ValueError
        If the mixer is not of low rank.
    ImportError
        As `apply`.
    """
    if not _is_low_rank(kind):
        name = kind if isinstance(kind, str) else kind.name
        raise ValueError(f"the direct way needs a mixer of low rank (dplr, householder), got {name!r}")
    value, system = _device.xp().empty(source.shape, source.dtype), _system(lam, gate, source, initial)
    stop = _stopping(source, 0.0, 0.0, 1, 1.0)
    report = _stepwise(kind, params, system, value, adjoint, True, stop)
    return _summary(value, report, True, (lam, gate, source, initial), kind, params)


@_computed_wide
def iterate(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    value: Array,
    *,
    adjoint: bool,
) -> Array:
    """One parallel iteration of (F), or of its adjoint: mix all steps from `value`, and scan over time.

    Sections 3 and 6 of docs/mathematics.md; as `fpnumba.cpu.solve.iterate` and `iterate_adjoint`.

    Parameters
    ----------
    kind, params, lam, gate, source, initial, adjoint
        As for `solve`.
    value : (B, T, D) array
        The previous iterate.

    Returns
    -------
    (B, T, D) array

    Raises
    ------
    ValueError, ImportError
        As `apply`.
    """
    new, system = value.copy(), _system(lam, gate, source, initial)
    stop = _stopping(source, 0.0, 0.0, 1, 1.0)
    _relaxed(kind, params, system, new, _kernels()[0].ITERATE, adjoint, max(source.shape[1], 1), stop)
    return new


@_computed_wide
def pull(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    x: Array,
    initial: Array | None,
    h: Array,
    s: Array,
) -> tuple[Array, Array | None, Array, Array, Params]:
    """Cotangents of all inputs of (F) from the solution `h` and its adjoint `s`.

    Section 6 of docs/mathematics.md, equation by equation; as `fpnumba.cpu.solve.rnn_cotangents`.

    Parameters
    ----------
    kind, params, lam, gate, x, initial
        As for `solve`.
    h, s : (B, T, D) arrays
        What the solve and the adjoint solve found.

    Returns
    -------
    lam_bar : (B, T, D) array
    gate_bar : (B, T, D) array, or None without a gate
    x_bar : (B, T, D) array
    initial_bar : (B, D) array
    params_bar : tuple of arrays of the shapes of `params`

    Raises
    ------
    ValueError, ImportError
        As `apply`.
    """
    xp = _device.xp()
    d, e = x - h, (1 - lam if gate is None else gate) * s
    m = h + _mix(kind, params, d, False)
    x_bar, params_bar = _pull_back(kind, params, d, e)
    before = xp.concatenate([_zeros_if_none(initial, x)[:, None], h[:, :-1]], axis=1)
    lam_bar = s * before if gate is not None else s * (before - m)
    gate_bar = s * m if gate is not None else None
    initial_bar = lam[:, 0] * s[:, 0] if x.shape[1] else xp.zeros(x.shape[::2], x.dtype)
    return lam_bar, gate_bar, x_bar, initial_bar, params_bar
