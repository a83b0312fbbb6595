"""FP-Mamba on a GPU with a mixer of rank one or a Kronecker mixer, whose parameters kernels make on the way.

Step after step it is a product of matrices and a kernel or two a step, and does what
:func:`fpnumba.nn.matrix_ways.solve_sequential` and ``pull_sequential`` do with the doors of a room; an application to
all steps, with rank one, is a product, a scan and two kernels. Tests hold them to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

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


def applies(cell: MatrixCell) -> bool:
    """Whether there are kernels for an application of the whole map."""
    return isinstance(cell.map, LowRankMap) and serves(cell)


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


def application(cell: MatrixCell, y: Array) -> Any:
    """One application of the whole map, for its value and its adjoint."""
    if "application" not in cell.ready:
        empty = backend.empty((0,), y)
        delta = _delta(cell)
        B, C = cell.base["b"], cell.base["c"]  # for their shapes
        system = System(
            cell.map.kind, (empty, empty), cell.v, delta, cell.A, B, C, cell.skip, cell.gate, cell.norm
        )
        cell.ready["application"] = system, _given(cell)
    system, given = cell.ready["application"]
    before = y if cell.stacked is None else backend.contiguous(cell.before(y))
    doors = backend.room(y).mamba
    return doors.Application(system, given, cell.initial[1], backend.contiguous(y), before)


def absorb(bars: MatrixBars, y: Array, new_bar: Array, *, through: bool) -> Array | None:
    """As ``MatrixBars.application``."""
    cell = bars.cell
    applied = application(cell, y)
    pulled, fed_bar = applied.pull(backend.contiguous(new_bar))
    bars.base["mixer"] += pulled.params
    bars.base["b"] += pulled.B
    bars.base["c"] += pulled.C
    bars.v += pulled.x
    bars.A += pulled.A
    bars.skip += pulled.skip
    bars.norm_weight += pulled.weight
    if bars.gate is not None:
        bars.gate += pulled.gate
    if bars.norm_bias is not None:
        bars.norm_bias += pulled.bias
    bars.base["lambda"] += bars.pull_steps(pulled.delta, applied.delta, _argument(cell, y))
    if fed_bar is not None and bars.stacked is not None:
        bars.stacked += backend.product(fed_bar, rows(cell.before(y)), transposed=(True, False))
    if not through:
        return None
    y_bar: Array = pulled.y
    if fed_bar is not None and cell.stacked is not None:
        y_bar[:, :-1] += backend.product(fed_bar, cell.stacked).reshape(y_bar.shape)[:, 1:]
    return y_bar


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
