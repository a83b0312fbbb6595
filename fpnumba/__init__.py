"""Fixed-Point RNNs on NumPy arrays: dense recurrences as fixed points of diagonal ones, with exact gradients.

>>> import numpy as np
>>> import fpnumba as fp
>>> lam, x = np.full((1, 6, 2), 0.5), np.ones((1, 6, 2))
>>> swap = fp.mixers.Fixed(np.array([[0.0, 1.0], [1.0, 0.0]]))
>>> fp.fixed_point_rnn(lam, swap, x).converged
array([ True])
"""

import importlib
from typing import Any

from fpnumba import arrays, mixers
from fpnumba.dotproduct import AdjointError, AdjointReport, check_adjoint
from fpnumba.mamba import MatrixSolution, fixed_point_mamba
from fpnumba.rnn import fixed_point_rnn
from fpnumba.scan import linear_scan, selective_scan
from fpnumba.solve import Adjoint, ConvergenceError, ConvergenceWarning, Solution, Solver, Status
from fpnumba.vjp import Cotangents, vjp

__all__ = [
    "Adjoint",
    "AdjointError",
    "AdjointReport",
    "ConvergenceError",
    "ConvergenceWarning",
    "Cotangents",
    "MatrixSolution",
    "Solution",
    "Solver",
    "Status",
    "__version__",
    "arrays",
    "check_adjoint",
    "fixed_point_mamba",
    "fixed_point_rnn",
    "linear_scan",
    "mixers",
    "nn",
    "selective_scan",
    "tasks",
    "train",
    "vjp",
]

__version__ = "0.1.0"

# Rooms for which one has to ask: `fp.nn` is imported when it is first looked at.
_LAZY = ("nn", "tasks", "train")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"fpnumba.{name}")
    raise AttributeError(f"module 'fpnumba' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
