"""An exponential that LLVM can vectorise: Numba's own is a call per number wherever Intel's SVML is missing.

``exp(x) = 2^n exp(r)`` with ``n = round(x / ln 2)`` and ``|r| <= ln 2 / 2``, by its Taylor series. Within 2
units of rounding. Where the result would be subnormal it is zero.
"""

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from fpnumba.cpu._jit import OPTIONS, bits_of, from_bits

# Adding this to a number leaves the nearest integer in the low bits of the sum.
ROUND_32, ROUND_64 = np.float32(1.5 * 2**23), np.float64(1.5 * 2**52)
LOG2_E_32, LOG2_E_64 = np.float32(1 / math.log(2)), np.float64(1 / math.log(2))
# ln 2 in two parts, the first with so few digits that its product with n is exact.
HIGH_32 = np.float32(0.693359375)
LOW_32 = np.float32(-2.12194440054690582767e-4)
HIGH_64 = float.fromhex("0x1.62e42feep-1")
LOW_64 = 1.9082149292705877e-10

SERIES_32 = tuple(np.float32(1 / math.factorial(k)) for k in range(8))
SERIES_64 = tuple(1 / math.factorial(k) for k in range(14))


def exp(x: Any) -> Any:
    """Declared here, defined by the overload below."""
    raise NotImplementedError


# Without reassociation, also where it is inlined: the order of the sums is what makes them exact.
@overload(exp, jit_options=OPTIONS | {"fastmath": {"contract"}})
def exp_by_width(x):
    if x == types.float32:
        c0, c1, c2, c3, c4, c5, c6, c7 = SERIES_32

        def exp_32(x):
            shifted = x * LOG2_E_32 + ROUND_32
            n = shifted - ROUND_32
            r = (x - n * HIGH_32) - n * LOW_32
            series = c0 + r * (c1 + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * c7))))))
            power = from_bits(np.int32((bits_of(shifted) + np.int32(127)) << np.int32(23)))
            result = series * power
            result = np.float32(0) if x < np.float32(-87) else result
            return np.float32(np.inf) if x > np.float32(88) else result

        return exp_32
    if x == types.float64:
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, b0, b1, b2, b3 = SERIES_64

        def exp_64(x):
            shifted = x * LOG2_E_64 + ROUND_64
            n = shifted - ROUND_64
            r = (x - n * HIGH_64) - n * LOW_64
            tail = a7 + r * (a8 + r * (a9 + r * (b0 + r * (b1 + r * (b2 + r * b3)))))
            series = a0 + r * (a1 + r * (a2 + r * (a3 + r * (a4 + r * (a5 + r * (a6 + r * tail))))))
            power = from_bits((bits_of(shifted) + np.int64(1023)) << np.int64(52))
            result = series * power
            result = 0.0 if x < -708.0 else result
            return np.inf if x > 709.0 else result

        return exp_64
    return None
