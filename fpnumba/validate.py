"""Every primitive of a room against the reference in float64: the engine of ``fpnumba validate``.

An error is the largest deviation from the reference in float64, relative to the largest entry of the array.
It is held to twice the error of a plain implementation in the same dtype, which the reference is, plus `SLACK`
units in the last place. A solve by iteration is measured against the direct one, and is granted its tolerance
as well. In float64 the plain error of rounding is the one of float32 scaled by the ratio of the units: the two
computations are the same, rounded differently.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fpnumba as fp
from fpnumba.arrays import Room, to_numpy, use_room
from fpnumba.mixers import CustomKind

Array = NDArray[Any]
Args = Mapping[str, Any]
Shape = tuple[int, int, int]

SLACK = 8
# The tolerance that solves are asked for; float16 is stored small and solved in float32.
RTOL = {"float16": 1e-5, "float32": 1e-5, "float64": 1e-11}
DTYPES = ("float32", "float64")

SHAPES: dict[str, tuple[Shape, ...]] = {
    "quick": ((2, 17, 6), (3, 33, 32), (1, 70, 16), (0, 5, 4), (2, 0, 4)),
    "full": (
        (1, 1, 4),
        (2, 17, 6),
        (3, 64, 32),
        (1, 257, 64),
        (5, 130, 48),
        (0, 5, 4),
        (2, 0, 4),
        (1, 64, 256),
    ),
}


Compute = Callable[[Room, Args, float], Sequence[Array | None]]


@dataclass(frozen=True)
class Case:
    """One primitive on one set of inputs.

    Attributes
    ----------
    primitive : str
    args : dict
        Arrays in float64; they are cast to the dtype in question, and from there back for the reference.
    compute : callable
        ``compute(room, args, rtol)`` gives the arrays to compare.
    truth, plain : callable, optional
        What the reference computes in float64, and what in the same dtype, where that differs from `compute`:
        an iterative solve is measured against the direct one, and may err twice as much as the plain parallel
        iteration.
    shared : str
        Cases of one shape with this name in common have `args`, `truth` and `plain` in common.
    tolerance : bool
        Whether the requested tolerance is granted.
    dtypes : tuple of str
    """

    primitive: str
    args: Args
    compute: Compute
    truth: Compute | None = None
    plain: Compute | None = None
    shared: str = ""
    tolerance: bool = False
    dtypes: tuple[str, ...] = DTYPES


@dataclass
class Row:
    """The verdict on one primitive in one dtype, over all shapes; error and bound are of the closest call.

    Attributes
    ----------
    room, primitive, dtype : str
    shapes : int
        How many shapes were tried.
    error, bound : float
    worst : list of int
        The shape with the largest ratio of error to bound.
    failure : str
        What went wrong, if the primitive raised or did not converge.
    absent : str
        What the room says of a primitive that it does not have: that is no miss.
    """

    room: str
    primitive: str
    dtype: str
    shapes: int = 0
    error: float = 0.0
    bound: float = 0.0
    worst: list[int] = field(default_factory=list)
    failure: str = ""
    absent: str = ""

    @property
    def ratio(self) -> float:
        """Error over bound; a NaN counts as a miss."""
        return self.error / self.bound if self.bound else 0.0

    @property
    def ok(self) -> bool:
        """Whether every shape met its bound."""
        return not self.failure and self.ratio <= 1.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        known = {name: getattr(self, name) for name in ("room", "primitive", "dtype", "shapes", "worst")}
        finite = {name: _plain(getattr(self, name)) for name in ("error", "bound", "ratio")}
        return {**known, **finite, "ok": self.ok, "failure": self.failure, "absent": self.absent}


def _plain(value: float) -> float | str:
    return float(value) if np.isfinite(value) else str(value)


def rooms_present() -> list[str]:
    """The rooms on this machine that are held to the reference."""
    return ["cpu"] if rooms_absent() else ["cpu", "gpu"]


def rooms_absent() -> dict[str, str]:
    """The rooms that this machine has not, and why."""
    from fpnumba.gpu import absent

    why = absent()
    return {} if why is None else {"gpu": why}


def run(
    rooms: Sequence[str] | None = None,
    *,
    quick: bool = False,
    seed: int = 0,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Hold rooms to the reference.

    Parameters
    ----------
    rooms : sequence of str, optional
        All that are present, if left out.
    quick : bool
        Fewer and smaller shapes.
    seed : int
        Of the inputs.
    report : callable
        Called with each finished `Row`.

    Returns
    -------
    list of Row
        One for each primitive and dtype.

    Examples
    --------
    >>> from fpnumba import validate
    >>> rows = validate.run(["reference"], quick=True)
    >>> all(row.ok for row in rows)
    True
    """
    shapes = SHAPES["quick" if quick else "full"]
    rows: list[Row] = []
    for room in rooms_present() if rooms is None else rooms:
        grouped: dict[str, list[tuple[Shape, Case]]] = {}
        for shape in shapes:
            rng = np.random.default_rng([seed, *shape])
            for case in cases(rng, shape):
                grouped.setdefault(case.primitive, []).append((shape, case))
        reference = _Reference()
        for primitive, tried in grouped.items():
            for dtype in tried[0][1].dtypes:
                row = Row(room, primitive, dtype)
                for shape, case in tried:
                    _judge(row, shape, case, reference)
                rows.append(row)
                report(row)
    return rows


class _Reference:
    """What the reference says, asked once for each question."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Any] = {}

    def truth(self, shape: Shape, case: Case, dtype: str) -> Sequence[Array | None]:
        """Float64, on the inputs as they are once rounded to `dtype`."""
        return self._ask("truth", shape, case, dtype)

    def errors(self, shape: Shape, case: Case, dtype: str) -> list[float]:
        """The errors that a plain implementation makes in `dtype`, one for each output."""
        # Rounding is visible in float32; in float64 the truth rounds just as much, so that errors are scaled.
        # What an iteration leaves undone is no rounding, and is seen in any dtype.
        stand_in = "float32" if dtype == "float64" and not case.tolerance else dtype
        scale = float(np.finfo(dtype).eps) / float(np.finfo(stand_in).eps)
        pairs = zip(self._ask("plain", shape, case, stand_in), self.truth(shape, case, stand_in), strict=True)
        return [0.0 if a is None or b is None else scale * _deviation(a, b) for a, b in pairs]

    def _ask(self, role: str, shape: Shape, case: Case, dtype: str) -> Sequence[Array | None]:
        key = (role, shape, case.shared or case.primitive, dtype)
        if key not in self._known:
            args, rtol = _cast(case.args, dtype), RTOL[dtype]
            if role == "truth":
                args, rtol = _cast(args, "float64"), RTOL["float64"]
            compute = (case.truth if role == "truth" else case.plain) or case.compute
            self._known[key] = compute(Room("reference"), args, rtol)
        known: Sequence[Array | None] = self._known[key]
        return known


def _judge(row: Row, shape: Shape, case: Case, reference: _Reference) -> None:
    """Try one case and let the row remember the closest call."""
    row.shapes += 1
    if row.failure or row.absent or np.isnan(row.ratio):
        return
    truth = reference.truth(shape, case, row.dtype)
    usual = reference.errors(shape, case, row.dtype)
    eps, rtol = float(np.finfo(row.dtype).eps), RTOL[row.dtype]
    args = _cast(case.args, row.dtype)
    try:
        found = _fetched(case.compute(Room(row.room), _mapped(args, _carrier(row.room)), rtol))
        _same_outputs(found, truth, row.dtype)
    except Exception as failure:
        if isinstance(failure, NotImplementedError) and row.room == "gpu":
            row.absent = str(failure).splitlines()[0]
            return
        row.failure, row.worst = f"{type(failure).__name__}: {failure}".splitlines()[0], list(shape)
        row.error = float("nan")
        return
    for ours, true, plain in zip(found, truth, usual, strict=True):
        if ours is None or true is None:
            continue
        error = _deviation(ours, true)
        bound = 2 * plain + SLACK * eps + rtol * case.tolerance
        # A NaN is larger than anything, and stays.
        if not (error / bound <= row.ratio or np.isnan(row.ratio)) or not row.bound:
            row.error, row.bound, row.worst = error, bound, list(shape)


def _same_outputs(found: Sequence[Array | None], truth: Sequence[Array | None], dtype: str) -> None:
    """Raise unless the outputs are those of the reference in number, shape and kind."""
    ours = [None if a is None else (str(a.dtype), a.shape) for a in found]
    theirs = [None if a is None else (dtype, a.shape) for a in truth]
    if ours != theirs:
        raise ValueError(f"gave {ours}, expected {theirs}")


def _deviation(found: Array, true: Array) -> float:
    if true.size == 0:
        return 0.0
    difference = float(np.max(np.abs(found.astype(np.float64) - true)))
    scale = float(np.max(np.abs(true)))
    return difference / scale if scale else difference


def _cast(args: Args, dtype: str) -> dict[str, Any]:
    return _mapped(args, lambda array: array.astype(dtype))


def _mapped(args: Args, change: Callable[[Array], Any]) -> dict[str, Any]:
    def mapped(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(mapped(v) for v in value)
        return change(value) if isinstance(value, np.ndarray) else value

    return {name: mapped(value) for name, value in args.items()}


def _carrier(room: str) -> Callable[[Array], Any]:
    """What carries an array to where the room computes."""
    return Room(room).xp.asarray  # type: ignore[no-any-return]


def _fetched(outputs: Sequence[Any]) -> list[Array | None]:
    return [None if a is None else to_numpy(a) for a in outputs]


# --- the cases --------------------------------------------------------------------------------


def cases(rng: np.random.Generator, shape: Shape) -> Iterator[Case]:
    """Every primitive on random inputs of that shape ``(B, T, D)``."""
    # here, because that module takes its words from this one
    from fpnumba.validate_mamba import mamba_cases

    yield from _scan_cases(rng, shape)
    yield from _selective_cases(rng, shape)
    for name, kind, params in _mixers(rng, shape):
        yield from _mixer_cases(rng, shape, name, kind, params)
        yield from _solve_cases(rng, shape, name, kind, params)
        yield from mamba_cases(rng, shape, name, kind, params)
    yield from _public_cases(rng, shape)


def _scan_cases(rng: np.random.Generator, shape: Shape) -> Iterator[Case]:
    batch, _, dim = shape
    args = {
        "lam": rng.uniform(-0.99, 0.99, shape),
        "x": rng.standard_normal(shape),
        "initial": rng.standard_normal((batch, dim)),
        "hbar": rng.standard_normal(shape),
    }
    for reverse in (False, True):
        name = "linear_scan" + (" reverse" if reverse else "")

        def value(room: Room, a: Args, _: float, reverse: bool = reverse) -> Sequence[Array]:
            return (room.scan.linear_scan(a["lam"], a["x"], a["initial"], reverse),)

        def gradient(room: Room, a: Args, _: float, reverse: bool = reverse) -> Sequence[Array]:
            # Everyone differentiates at the same point, so that errors of the value do not count twice.
            cotangents: Sequence[Array] = room.scan.linear_scan_vjp(
                a["lam"], a["h"], a["initial"], reverse, a["hbar"]
            )
            return cotangents

        (h,) = value(Room("reference"), args, 0.0)
        yield Case(name, args, value)
        yield Case(f"{name} vjp", {**args, "h": h}, gradient)


def _selective_cases(rng: np.random.Generator, shape: Shape) -> Iterator[Case]:
    batch, steps, dim = shape
    size, heads = 5, 2
    common = {
        "x": rng.standard_normal(shape),
        "B": rng.standard_normal((batch, steps, size)),
        "C": rng.standard_normal((batch, steps, size)),
        "D": rng.standard_normal(dim),
        "initial": rng.standard_normal((batch, dim, size)),
        "ybar": rng.standard_normal(shape),
        "last_bar": rng.standard_normal((batch, dim, size)),
    }
    forms = {
        "mamba": {"A": -rng.uniform(0.2, 4, (dim, size)), "delta": rng.uniform(0.01, 1, shape)},
        "mamba2": {"A": -rng.uniform(0.2, 4, heads), "delta": rng.uniform(0.01, 1, (batch, steps, heads))},
    }
    names = ("x", "delta", "A", "B", "C", "D", "initial")

    def value(room: Room, a: Args, _: float) -> Sequence[Array]:
        pair: Sequence[Array] = room.scan.selective_scan(*(a[n] for n in names))
        return pair

    def gradient(room: Room, a: Args, _: float) -> Sequence[Array]:
        bars: Sequence[Array] = room.scan.selective_scan_vjp(*(a[n] for n in names), a["ybar"], a["last_bar"])
        return bars

    for form, own in forms.items():
        yield Case(f"selective_scan {form}", {**common, **own}, value)
        yield Case(f"selective_scan {form} vjp", {**common, **own}, gradient)


def _mixers(
    rng: np.random.Generator, shape: Shape
) -> Iterator[tuple[str, str | CustomKind, tuple[Array, ...]]]:
    """Every mixer with a contraction of about 0.9 at the most, so that all ways of solving exist."""
    batch, steps, dim = shape
    d1 = max(d for d in range(1, dim + 1) if dim % d == 0 and d * d <= dim)
    blocks = 2

    def contraction(*dims: int) -> Array:
        """Random matrices of spectral norm at most 0.9 (the Frobenius norm bounds it)."""
        m = rng.standard_normal(dims)
        scaled: Array = 0.9 * m / np.maximum(np.linalg.norm(m, axis=(-2, -1), keepdims=True), 1e-300)
        return scaled

    def reflections(rank: int) -> tuple[Array, Array]:
        u = rng.standard_normal((batch, steps, rank, dim))
        u /= np.linalg.norm(u, axis=-1, keepdims=True)
        # ||P|| <= sum of alpha for DPLR, and 1 - prod(1 - alpha) <= sum for Householder products
        return u, rng.uniform(0.05, 0.9 / rank, (batch, steps, rank))

    eye = np.eye(dim)
    yield "dplr r=1", "dplr", reflections(1)
    yield "dplr r=3", "dplr", reflections(3)
    yield "householder r=1", "householder", reflections(1)
    yield "householder r=3", "householder", reflections(3)
    yield (
        "kronecker",
        "kronecker",
        (contraction(batch, steps, d1, d1), contraction(batch, steps, dim // d1, dim // d1)),
    )
    sizes = (batch, steps, blocks)
    yield (
        "monarch",
        "monarch",
        (contraction(*sizes, dim // blocks, dim // blocks), rng.uniform(0.1, 0.95, sizes)),
    )
    yield "dense", "dense", (eye - contraction(batch, steps, dim, dim),)
    yield "fixed", "fixed", (eye - contraction(dim, dim),)
    yield "a user's own", FLIP, (rng.uniform(-0.8, 0.8, shape),)


def _mixer_cases(
    rng: np.random.Generator, shape: Shape, name: str, kind: str | CustomKind, params: tuple[Array, ...]
) -> Iterator[Case]:
    args = {"params": params, "x": rng.standard_normal(shape), "y": rng.standard_normal(shape)}

    def value(room: Room, a: Args, _: float) -> Sequence[Array]:
        return (room.mixers.apply(kind, a["params"], a["x"]),)

    def transpose(room: Room, a: Args, _: float) -> Sequence[Array]:
        return (room.mixers.apply_transpose(kind, a["params"], a["y"]),)

    def gradient(room: Room, a: Args, _: float) -> Sequence[Array]:
        bars: Sequence[Array] = room.mixers.cotangent(kind, a["params"], a["x"], a["y"])
        return bars

    yield Case(f"{name}: apply", args, value)
    yield Case(f"{name}: apply_transpose", args, transpose)
    yield Case(f"{name}: cotangent", args, gradient)


def _solve_cases(
    rng: np.random.Generator, shape: Shape, name: str, kind: str | CustomKind, params: tuple[Array, ...]
) -> Iterator[Case]:
    batch, _, dim = shape
    args: dict[str, Any] = {
        "params": params,
        "lam": rng.uniform(0.05, 0.95, shape),
        "gate": rng.uniform(0.05, 0.95, shape),
        "x": rng.standard_normal(shape),
        "initial": rng.standard_normal((batch, dim)),
        "hbar": rng.standard_normal(shape),
        "h": rng.standard_normal(shape),
        "s": rng.standard_normal(shape),
    }

    def iterate(room: Room, a: Args, _: float) -> Sequence[Array]:
        problem = (kind, a["params"], a["lam"], a["gate"])
        step = room.solve.iterate(*problem, a["x"], a["initial"], a["h"])
        return step, room.solve.iterate_adjoint(*problem, a["hbar"], a["s"])

    def cotangents(room: Room, a: Args, _: float) -> Sequence[Array | None]:
        out: list[Array | None] = []
        for gate in (None, a["gate"]):
            *bars, params_bar = room.solve.rnn_cotangents(
                kind, a["params"], a["lam"], gate, a["x"], a["initial"], a["h"], a["s"]
            )
            out += [*bars, *params_bar]
        return out

    def solved(method: str, adjoint: bool, options: Mapping[str, Any]) -> Compute:
        def compute(room: Room, a: Args, rtol: float) -> Sequence[Array]:
            # In the adjoint the gate is 1 - lam, in the solve it is one of its own: both forms are tried.
            how = {
                "method": method,
                "chunk": None,
                "rtol": rtol,
                "atol": 0.0,
                "max_iter": 1000,
                "damping": 1.0,
            }
            how |= options
            if adjoint:
                result = room.solve.solve_adjoint(kind, a["params"], a["lam"], None, a["hbar"], None, **how)
            else:
                problem = (kind, a["params"], a["lam"], a["gate"], a["x"], a["initial"], None)
                result = room.solve.solve(*problem, **how)
            if (result.status != 0).any():
                raise RuntimeError(f"status {sorted(set(result.status.tolist()))}, expected all converged")
            return (result.value,)

        return compute

    yield Case(f"{name}: one iteration, both ways", args, iterate)
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("parallel", "parallel", {}),
        ("chunked", "chunked", {}),
        ("chunked by 7", "chunked", {"chunk": 7}),
        ("sequential", "sequential", {}),
    ]
    # Only low-rank mixers have a direct way in every room.
    if kind in ("dplr", "householder"):
        ways.append(("direct", "direct", {}))
    for adjoint in (False, True):
        title = f"{name}: solve{' adjoint' if adjoint else ''}"
        truth, plain = solved("direct", adjoint, {}), solved("parallel", adjoint, {})
        for label, method, options in ways:
            compute = solved(method, adjoint, options)
            if method == "direct":
                yield Case(f"{title}, {label}", args, compute)
            else:
                yield Case(f"{title}, {label}", args, compute, truth, plain, title, tolerance=True)
    yield Case(f"{name}: rnn_cotangents", args, cotangents)


def _public_cases(rng: np.random.Generator, shape: Shape) -> Iterator[Case]:
    """What is stored in float16 goes through the hall, which computes in float32 and stores small again."""
    batch, steps, dim = shape
    u = rng.standard_normal((batch, steps, 1, dim))
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    size = 3
    args = {
        "lam": rng.uniform(0.05, 0.95, shape),
        "x": rng.standard_normal(shape),
        "out_bar": rng.standard_normal(shape),
        "u": u,
        "alpha": rng.uniform(0.05, 0.9, (batch, steps, 1)),
        "delta": rng.uniform(0.01, 1, shape),
        "A": -rng.uniform(0.2, 4, (dim, size)),
        "B": rng.standard_normal((batch, steps, size)),
        "C": rng.standard_normal((batch, steps, size)),
    }

    def scan(room: Room, a: Args, _: float) -> Sequence[Array]:
        with use_room(room.name):
            h, pullback = fp.vjp(fp.linear_scan, a["lam"], a["x"])
            return h, *pullback(a["out_bar"])

    def selective(room: Room, a: Args, _: float) -> Sequence[Array]:
        with use_room(room.name):
            y, last = fp.selective_scan(*(a[n] for n in ("x", "delta", "A", "B", "C")))
        return y, last

    def rnn(room: Room, a: Args, rtol: float) -> Sequence[Array]:
        mixer = fp.mixers.Householder(a["u"], a["alpha"])
        solver, adjoint = fp.Solver(rtol=rtol, on_failure="raise"), fp.Adjoint(rtol=rtol, on_failure="raise")
        with use_room(room.name):
            solution, pullback = fp.vjp(
                fp.fixed_point_rnn, a["lam"], mixer, a["x"], solver=solver, adjoint=adjoint
            )
            lam_bar, mixer_bar, x_bar = pullback(a["out_bar"])
        return solution.value, lam_bar, *mixer_bar.params, x_bar

    yield Case("fp.linear_scan and its vjp", args, scan, dtypes=("float16",))
    yield Case("fp.selective_scan", args, selective, dtypes=("float16",))
    yield Case("fp.fixed_point_rnn and its vjp", args, rnn, tolerance=True, dtypes=("float16",))


def _flip_apply(x: Any, out: Any, a: Any) -> None:
    n = x.shape[0]
    for i in range(n):
        out[i] = x[i] - a[i] * x[n - 1 - i]


def _flip_cotangent(x: Any, ybar: Any, xbar: Any, a: Any, a_bar: Any) -> None:
    n = x.shape[0]
    for i in range(n):
        xbar[i] = ybar[i] - a[n - 1 - i] * ybar[n - 1 - i]
        a_bar[i] = -ybar[i] * x[n - 1 - i]


# Q x = x - a * (x back to front): a mixer that the library does not have
FLIP = CustomKind("flip", _flip_apply, _flip_cotangent)


def table(rows: Sequence[Row]) -> str:
    """The verdicts as an aligned table."""
    return "\n".join([header(rows), *(line(row) for row in rows), footer(rows)])


_WIDTHS = "{room:<10}{primitive:<40} {dtype:<8} {shapes:>6} {error:>9} {bound:>9} {ratio:>6}  {verdict}"


def header(rows: Sequence[Row] = ()) -> str:
    """What the columns are."""
    notes = (
        "error: largest deviation from the reference in float64, relative to the largest entry of the array\n"
        f"bound: twice the error of the reference in the same dtype + {SLACK} eps; for a solve, + its rtol "
        f"({', '.join(f'{dtype} {rtol:g}' for dtype, rtol in RTOL.items())})\n"
    )
    names = ("room", "primitive", "dtype", "shapes", "error", "bound", "ratio", "verdict")
    return notes + _WIDTHS.format(**{name: name for name in names})


def line(row: Row) -> str:
    """One verdict."""
    verdict = "ok" if row.ok else f"MISS at shape {tuple(row.worst)} {row.failure}".rstrip()
    verdict = f"not in this room: {row.absent}" if row.absent else verdict
    return _WIDTHS.format(
        room=row.room,
        primitive=row.primitive,
        dtype=row.dtype,
        shapes=row.shapes,
        error=f"{row.error:.1e}",
        bound=f"{row.bound:.1e}",
        ratio=f"{row.ratio:.2f}",
        verdict=verdict,
    )


def footer(rows: Sequence[Row]) -> str:
    """The verdict on everything."""
    missed, absent = sum(not row.ok for row in rows), sum(bool(row.absent) for row in rows)
    said = "all within their bounds" if not missed else f"{missed} MISSED"
    return f"{len(rows)} rows, {said}" + (f", {absent} not in their room" if absent else "")
