"""The reference room: plain NumPy, one function per equation of docs/mathematics.md. What is true.

`scan` mixes along the sequence, `mixers` across channels (`kinds` has the equations), `solve` finds the fixed
point and its adjoint (`direct` has the exact step), `mamba` that with a matrix state. Arrays are ``(..., T, D)``;
leading axes are arbitrary and broadcast, and a cotangent has the shape of its primal. Slow, and what every other
room is tested against.
"""

from fpnumba.reference import direct, kinds, mamba, mixers, products, scan, solve

__all__ = ["direct", "kinds", "mamba", "mixers", "products", "scan", "solve"]
