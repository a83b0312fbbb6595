"""A user's own mixer inside the kernels: its functions compiled, and inlined where the built-in steps would be.

`fpnumba.mixers.CustomKind` says what the functions are. Numba specialises every kernel of the room for them, once per
process: what a user writes is not cached on disk.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from fpnumba.cpu._jit import uncached
from fpnumba.cpu._kinds import Custom, defines, mix, mix_transpose, pull

_compiled: WeakKeyDictionary[Callable[..., Any], Any] = WeakKeyDictionary()


def compiled(function: Callable[..., Any]) -> Any:
    """`function` as kernels can call it; always the same for the same function, so that nothing compiles twice."""
    if hasattr(function, "py_func"):
        return function
    if function not in _compiled:
        _compiled[function] = uncached(function)
    return _compiled[function]


def as_mixer(kind: Any, params: tuple[Any, ...]) -> Custom:
    """The named tuple that kernels take for a user's own `kind`."""
    transpose = getattr(kind, "apply_transpose", None)
    batch = params[0].shape[0] if params else 0
    # Where the transpose has to be taken from `cotangent`, what that writes besides goes here.
    spare = (
        () if transpose is not None else tuple(np.zeros((batch, 1, *p.shape[2:]), p.dtype) for p in params)
    )
    functions = (
        compiled(kind.apply),
        None if transpose is None else compiled(transpose),
        compiled(kind.cotangent),
    )
    return Custom(*functions, tuple(params), spare)


def _arguments(arrays: Any, tuple_name: str, step: str) -> str:
    """What is a step's of each parameter; where that is one number, a 0-d array and not the number itself."""
    return "".join(
        f", {tuple_name}[{i}][b, {step} : {step} + 1].reshape(())"
        if array.ndim == 2
        else f", {tuple_name}[{i}][b, {step}, ...]"
        for i, array in enumerate(arrays)
    )


def _written(head: str, call: str) -> Callable[..., Any]:
    """A step function written out for the number of parameters that a mixer has."""
    source = f"def step({head}):\n    for k in range(n):\n        {call}\n"
    names: dict[str, Any] = {}
    exec(source, names)
    step: Callable[..., Any] = names["step"]
    return step


MIX, PULL = "p, b, t, n, d, out, work", "p, bar, b, t, n, d, e, out, work"


@defines(mix, Custom, by_type=True)
def custom_mix(p: Any) -> Callable[..., Any]:
    arrays = p.types[3]
    return _written(MIX, f"p.apply(d[k], out[k]{_arguments(arrays, 'p.arrays', 't + k')})")


@defines(mix_transpose, Custom, by_type=True)
def custom_transpose(p: Any) -> Callable[..., Any]:
    arrays = _arguments(p.types[3], "p.arrays", "t + k")
    if len(p.types[4]) == 0 and len(p.types[3]) > 0:
        return _written(MIX, f"p.transpose(d[k], out[k]{arrays})")
    # The vector at which the cotangents of the parameters are taken does not matter to Q^T y.
    return _written(MIX, f"p.cotangent(d[k], d[k], out[k]{arrays}{_arguments(p.types[3], 'p.spare', '0')})")


@defines(pull, Custom, by_type=True)
def custom_pull(p: Any) -> Callable[..., Any]:
    arrays = _arguments(p.types[3], "p.arrays", "t + k")
    bars = _arguments(p.types[3], "bar.arrays", "t + k")
    return _written(PULL, f"p.cotangent(d[k], e[k], out[k]{arrays}{bars})")
