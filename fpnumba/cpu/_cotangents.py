"""Cotangents of all inputs of (F) at its solution, in one pass; section 6 of docs/mathematics.md.

Memory traffic: ``lam``, ``x``, ``h``, ``s`` and the parameters read once, all cotangents written once.
"""

import numpy as np

from fpnumba.cpu._jit import entry
from fpnumba.cpu._kinds import BLOCK, mix, pull


@entry
def rnn_pull(
    first, last, p, bar, lam, gate, gated, x, initial, h, s, lam_bar, gate_bar, x_bar, block, work_size, segments
):  # fmt: skip
    """Tasks are sequences times segments of time."""
    _, steps, dim = x.shape
    one = x.dtype.type(1)
    rows = np.zeros((4, BLOCK, dim), x.dtype)
    d, e, out, qd = rows[0], rows[1], rows[2], rows[3]
    work = np.empty(work_size, x.dtype)
    for task in range(first, last):
        b, j = task // segments, task % segments
        end = steps * (j + 1) // segments
        for t in range(steps * j // segments, end, block):
            n = min(block, end - t)
            for k in range(n):
                for i in range(dim):
                    g = gate[b, t + k, i] if gated else one - lam[b, t + k, i]
                    d[k, i] = x[b, t + k, i] - h[b, t + k, i]
                    e[k, i] = g * s[b, t + k, i]
            mix(p, b, t, n, d, qd, work)
            pull(p, bar, b, t, n, d, e, out, work)
            for k in range(n):
                inside = t + k > 0
                row = t + k - 1 if inside else 0
                for i in range(dim):
                    before = h[b, row, i] if inside else initial[b, i]
                    mixed = h[b, t + k, i] + qd[k, i]
                    if gated:
                        lam_bar[b, t + k, i] = s[b, t + k, i] * before
                        gate_bar[b, t + k, i] = s[b, t + k, i] * mixed
                    else:
                        lam_bar[b, t + k, i] = s[b, t + k, i] * (before - mixed)
                    x_bar[b, t + k, i] = out[k, i]
