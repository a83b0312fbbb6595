"""FP-Mamba on a GPU with a mixer of rank one or a Kronecker mixer, whose parameters kernels make on the way.

Step after step it is a product of matrices and a kernel or two a step, and does what
:func:`fpnumba.nn.matrix_ways.solve_sequential` and ``pull_sequential`` do with the doors of a room; an application to
all steps is a product, a scan and two kernels. Tests hold them to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from fpnumba.arrays import namespace
from fpnumba.nn import backend
from fpnumba.nn.basic import rows
from fpnumba.nn.mixer_maps import KroneckerMap, LowRankMap
from fpnumba.nn.recurrence import Solve
from fpnumba.nn.ways import Verdict
from fpnumba.reference.mamba import System
from fpnumba.solve import Adjoint, Solution, Solved

if TYPE_CHECKING:
    from fpnumba.nn.matrix_state import MatrixBars, MatrixCell

Array = NDArray[Any]


@dataclass
class Kept:
    """What the way back needs: the arguments, and what the room kept."""

    given: Any
    made: Any


def serves(cell: MatrixCell) -> bool:
    """Whether there are kernels for this recurrence, step after step."""
    if backend.on_host(cell.v) or cell.fixed is not None:
        return False
    if not isinstance(cell.map, LowRankMap | KroneckerMap) or cell.map.stack.factored:
        return False
    if isinstance(cell.map, LowRankMap) and cell.map.rank != 1:
        return False
    if "serves" not in cell.ready:  # asked in every iteration
        doors = backend.room(cell.v).mamba
        cell.ready["serves"] = doors.makes(_system(cell, empty=True), cell.map.activation)
    return bool(cell.ready["serves"])


def before(cell: MatrixCell, y: Array) -> Array:
    """``y_{t-1}`` for every ``t``, as products take it; of the last two that were asked about it is known."""
    for of, found in cell.ready.get("before", ()):
        if of is y:
            return found  # type: ignore[no-any-return]
    joined = backend.joined([cell.initial[0][:, None], y[:, :-1]], axis=1)[:, : y.shape[1]]
    return _remembered(cell, y, backend.operand(joined))


def _remembered(cell: MatrixCell, y: Array, before: Array) -> Array:
    """What :func:`before` knows from now on."""
    cell.ready["before"] = [*cell.ready.get("before", ())[-1:], (y, before)]
    return before


def _system(cell: MatrixCell, *, empty: bool = False) -> System:
    """The system, without the numbers of what the kernels make."""
    batch, steps, dim = cell.v.shape
    shape = (batch, 0 if empty else steps)
    base, kind = cell.base, cell.map.kind
    if isinstance(cell.map, KroneckerMap):  # the edges are all that is looked at
        params = tuple(backend.empty((batch, 0, edge, edge), cell.v) for edge in cell.map.sizes)
    else:
        params = backend.empty((*shape, 1, dim), cell.v), backend.empty((*shape, 1), cell.v)
    if empty:
        B, C, delta = base["b"], base["c"], base["lambda"]
    else:
        B, C = (backend.empty(base[name].shape, cell.v) for name in ("b", "c"))
        delta = _delta(cell)
    return System(kind, params, cell.v, delta, cell.A, B, C, cell.skip, cell.gate, cell.norm)


def _delta(cell: MatrixCell) -> Array:
    """``delta``; not filled in where it sees the hidden state."""
    if "lambda" not in cell.feedback:
        return cell.steps.delta(cell.base["lambda"])
    return backend.empty((*cell.v.shape[:2], len(cell.steps.bias)), cell.v)


def _argument(cell: MatrixCell, y: Array) -> Array:
    """What ``delta`` is made from."""
    argument = cell.base["lambda"]
    if "lambda" not in cell.feedback:
        return argument
    fed = backend.product(rows(cell.before(y)), cell.feedback["lambda"], transposed=(False, True))
    return argument + fed.reshape(argument.shape)


def _given(cell: MatrixCell) -> Any:
    """The arguments as the room takes them."""
    map = cell.map
    assert isinstance(map, LowRankMap | KroneckerMap)
    return backend.room(cell.v).mamba.Arguments(
        *(backend.contiguous(cell.base[name]) for name in ("mixer", "b", "c")),
        cell.stacked,
        tuple(cell.feedback),
        map.activation,
        map.alpha_max,
        map.norm_eps,
        cell.bc_eps,
        isinstance(map, KroneckerMap) and map.spectral,
        *((cell.steps, cell.base["lambda"]) if "lambda" in cell.feedback else ()),
    )


def application(cell: MatrixCell, y: Array, *, first: bool = False) -> Any:
    """One application of the whole map, for its value and its adjoint; `first` says that `y` is zero. The last one is
    kept."""
    known = cell.ready.get("applied")
    if known is not None and known[0] is y:
        return known[1]
    if "application" not in cell.ready:
        empty = backend.empty((0,), y)
        delta = _delta(cell)
        B, C = cell.base["b"], cell.base["c"]  # for their shapes
        params: Any = (empty, empty)
        if isinstance(cell.map, KroneckerMap):  # the edges are all that is looked at
            params = tuple(backend.empty((0, edge, edge), y) for edge in cell.map.sizes)
        system = System(cell.map.kind, params, cell.v, delta, cell.A, B, C, cell.skip, cell.gate, cell.norm)
        given = _given(cell)
        if given.stacked is not None:
            given = given._replace(stacked=backend.operand(given.stacked))
        cell.ready["application"] = system, given._replace(mixer=backend.operand(given.mixer))
    system, given = cell.ready["application"]
    zero = first and cell.still
    seen = None if zero or cell.stacked is None else before(cell, y)
    iterate = None if first else backend.contiguous(y)  # a zero need not be read
    applied = backend.room(y).mamba.Application(system, given, cell.initial[1], iterate, seen)
    cell.ready["applied"] = y, applied
    return applied


def advance(cell: MatrixCell, y: Array, pace: Array, published: bool, *, first: bool) -> tuple[Array, Array]:
    """As ``MatrixCell.advance``."""
    applied = application(cell, y, first=first)
    handed = None
    if y.shape[1]:
        handed = namespace(y).empty(y.shape, backend.operand(cell.initial[0][:0]).dtype)
        handed[:, 0] = cell.initial[0]
    new, told = applied.advance(None if first else y, pace, published, handed)
    if handed is not None:
        _remembered(cell, new, handed)
    return new, told


def transposed(cell: MatrixCell, y: Array, new_bar: Array) -> Array:
    """As ``MatrixCell.transposed``."""
    pulled, fed_bar = application(cell, y).pull(backend.contiguous(new_bar), through=True)
    return _through(cell, pulled.y, fed_bar)


def _through(cell: MatrixCell, y_bar: Array, fed_bar: Array | None) -> Array:
    """The cotangent of the iterate, with what comes to it through the parameters of the steps after."""
    if fed_bar is not None and cell.stacked is not None:
        backend.add_to_past(y_bar, fed_bar, cell.stacked)
    return y_bar


def absorb(bars: MatrixBars, y: Array, new_bar: Array, *, through: bool) -> Array | None:
    """As ``MatrixBars.application``."""
    cell = bars.cell
    applied = application(cell, y)
    pulled, fed_bar = applied.pull(backend.contiguous(new_bar), through=through)
    found = {"mixer": pulled.params, "b": pulled.B, "c": pulled.C}
    argument = cell.base["lambda"] if applied.argument is None else applied.argument
    found["lambda"] = bars.pull_steps(pulled.delta, applied.delta, argument)
    bars.base = {name: backend.plus(bars.base.get(name), bar) for name, bar in found.items()}
    bars.v, bars.A = backend.plus(bars.v, pulled.x), backend.plus(bars.A, pulled.A)
    bars.skip = backend.plus(bars.skip, pulled.skip)
    bars.norm_weight = backend.plus(bars.norm_weight, pulled.weight)
    if pulled.gate is not None:
        bars.gate = backend.plus(bars.gate, pulled.gate)
    if pulled.bias is not None:
        bars.norm_bias = backend.plus(bars.norm_bias, pulled.bias)
    if fed_bar is not None:
        own = backend.product(fed_bar, rows(before(cell, y)), transposed=(True, False))
        bars.stacked = backend.plus(bars.stacked, own)
    return _through(cell, pulled.y, fed_bar) if through else None


def solve(cell: MatrixCell, options: dict[str, Any], *, keep: bool) -> tuple[Solve, tuple[Array, Array]]:
    """As :func:`fpnumba.nn.matrix_ways.solve_sequential`."""
    doors, given = backend.room(cell.v).mamba, _given(cell)
    y, last, solved, made = doors.solve_made(_system(cell), given, cell.initial, keep=keep, **options)
    verdict = Verdict(len(y))
    iterations, residual, status = solved
    verdict.add(Solved(y, iterations, residual, status, iterations))
    end = y[:, -1] if y.shape[1] else cell.initial[0]
    found = Solve(y, verdict.solution(y, "sequential"), steps=[Kept(given, made)] if keep else [])
    return found, (backend.contiguous(end), last)


def _at(cell: MatrixCell, y: Array) -> tuple[Any, ...]:
    """What is known of the steps at a `y`."""
    given = _given(cell)
    given = given._replace(mixer=given.mixer.astype(y.dtype))
    seen = None if cell.stacked is None else before(cell, y)
    return _system(cell), given, cell.initial[1], y, seen, application(cell, y)


def alone(cell: MatrixCell, y: Array, options: dict[str, Any]) -> Iterator[tuple[slice, Array, Array]]:
    """As ``MatrixCell.alone``."""
    y = backend.contiguous(y)
    for one in backend.room(y).mamba.solve_alone(*_at(cell, y), keep=False, **options):
        yield one.steps, one.y, one.status


def keep(cell: MatrixCell, y: Array) -> Kept:
    """What :func:`solve` keeps, for a `y` that was found in another way."""
    known = _at(cell, y)
    return Kept(known[1], backend.room(y).mamba.keep_made(*known))


def pull(cell: MatrixCell, found: Solve, y_bar: Array, adjoint: Adjoint) -> tuple[MatrixBars, Solution]:
    """As :func:`fpnumba.nn.matrix_ways.pull_sequential`."""
    kept, bars, y = found.steps[0], cell.bars(), found.h
    options = {"rtol": adjoint.rtol * cell.share(), "max_iter": adjoint.max_iter}
    pulled, fed_bar, status = backend.room(y).mamba.pull_made(
        kept.made, kept.given, y, backend.contiguous(y_bar), None, **options
    )
    bars.base = {"mixer": pulled.params, "b": pulled.B, "c": pulled.C}
    bars.v, bars.A, bars.skip, bars.gate = pulled.x, pulled.A, pulled.skip, pulled.gate
    bars.norm_weight, bars.norm_bias = pulled.weight, pulled.bias
    delta = kept.made.system.delta
    bars.base["lambda"] = bars.pull_steps(pulled.delta, delta, _argument(cell, y))
    if cell.stacked is not None:
        bars.stacked = backend.product(rows(fed_bar), rows(cell.before(y)), transposed=(True, False))
    verdict = Verdict(len(y))
    verdict.add_status(status)
    return bars, verdict.solution(pulled.y, "sequential")
