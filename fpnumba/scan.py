"""Diagonal sequence mixing: section 1 of docs/mathematics.md."""

from typing import Any

from fpnumba.arrays import Array, Checked, check


def check_linear_scan(lam: Array, x: Array, initial: Array | None) -> Checked:
    """The arrays of `linear_scan`, checked."""
    return check({"x": (x, "... T D"), "lam": (lam, "... T D"), "initial": (initial, "... D")})


def linear_scan(lam: Array, x: Array, /, *, initial: Array | None = None, reverse: bool = False) -> Array:
    """Scan a diagonal linear recurrence over time.

    ``h_t = lam_t * h_{t-1} + x_t`` with ``h_0 = initial``, or backwards in time
    ``h_t = lam_t * h_{t+1} + x_t`` with ``h_{T+1} = initial``.

    Parameters
    ----------
    lam : array (..., T, D)
        Decay of each step and channel.
    x : array (..., T, D)
        Input.
    initial : array (..., D), optional
        State before the first step (`reverse`: after the last). Zero by default.
    reverse : bool
        Run against time.

    Returns
    -------
    array (..., T, D)
        All states, in the kind and dtype of the arguments.

    Raises
    ------
    TypeError
        For lists and numbers, for arrays of different kinds or dtypes or on different devices, and for dtypes that
        are not floating point.
    ValueError
        For shapes that do not match.

    Notes
    -----
    Section 1 of docs/mathematics.md. Time and memory are linear in the size of the arguments. Its adjoint,
    through `vjp`, is the same scan the other way.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> lam = np.full((4, 1), 0.5)
    >>> fp.linear_scan(lam, np.ones((4, 1)))[:, 0]
    array([1.   , 1.5  , 1.75 , 1.875])
    >>> fp.linear_scan(lam, np.zeros((4, 1)), initial=np.array([8.0]), reverse=True)[:, 0]
    array([0.5, 1. , 2. , 4. ])
    """
    call = check_linear_scan(lam, x, initial)
    h = call.room.scan.linear_scan(call["lam"], call["x"], call.get("initial"), reverse=bool(reverse))
    return call.back(h)


def check_selective_scan(
    x: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None, initial: Array | None
) -> Checked:
    """The arrays of `selective_scan`, checked; ``H`` among the sizes tells the form of Mamba-2."""
    heads = getattr(A, "ndim", 2) == 1
    call = check(
        {
            "x": (x, "... T D"),
            "A": (A, "H" if heads else "D N"),
            "delta": (delta, "... T H" if heads else "... T D"),
            "B": (B, "... T N"),
            "C": (C, "... T N"),
            "D": (D, "D"),
            "initial": (initial, "... D N"),
        }
    )
    if heads and (call.sizes["H"] == 0 or call.sizes["D"] % call.sizes["H"]):
        raise ValueError(
            f"argument `A`: got {call.sizes['H']} heads, "
            f"which do not divide the {call.sizes['D']} channels of `x`"
        )
    return call


def selective_scan(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    /,
    *,
    D: Array | None = None,
    initial: Array | None = None,
) -> tuple[Any, Any]:
    """Scan the matrix-valued state of Mamba or Mamba-2 over time.

    ``H_t = exp(delta_t A) * H_{t-1} + (delta_t x_t) B_t^T`` and ``y_t = H_t C_t + D * x_t``.

    Parameters
    ----------
    x : array (..., T, D)
        Input.
    delta : array (..., T, D) or (..., T, H)
        Step sizes, positive: one for each channel (Mamba), or for each of H heads (Mamba-2).
    A : array (D, N) or (H,)
        Decay rates, negative. One axis says that the form of Mamba-2 is meant: the ``D = H * P`` channels are
        then ordered head by head.
    B, C : array (..., T, N)
        Input and output vectors.
    D : array (D,), optional
        Skip connection.
    initial : array (..., D, N), optional
        State before the first step. Zero by default.

    Returns
    -------
    y : array (..., T, D)
    last_state : array (..., D, N)
        The state after the last step; `initial` of the next call.

    Raises
    ------
    TypeError
        For lists and numbers, for arrays of different kinds or dtypes or on different devices, and for dtypes that
        are not floating point.
    ValueError
        For shapes that do not match, and for a number of heads that does not divide the channels.

    Notes
    -----
    Section 1 of docs/mathematics.md (Gu and Dao, arXiv 2312.00752; Dao and Gu, arXiv 2405.21060).

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> x, delta = np.ones((3, 2)), np.ones((3, 2))
    >>> A, B, C = np.full((2, 1), -np.log(2)), np.ones((3, 1)), np.ones((3, 1))
    >>> y, last = fp.selective_scan(x, delta, A, B, C)
    >>> y[:, 0]
    array([1.  , 1.5 , 1.75])
    >>> last.shape
    (2, 1)
    """
    call = check_selective_scan(x, delta, A, B, C, D, initial)
    y, last = call.room.scan.selective_scan(*selective_arguments(call), call.get("D"), call.get("initial"))
    return call.back(y), call.back(last)


def selective_arguments(call: Checked) -> tuple[Any, ...]:
    """The five arrays of a selective scan as a room takes them."""
    return call["x"], call["delta"], call["A"], call["B"], call["C"]
