"""Finite groups as multiplication tables, built from permutations and numbered with 0 = the identity."""

import difflib
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int64]

MAX_ORDER = 5040
GRAMMAR = (
    "a group is zN (cyclic), sN (symmetric), aN (alternating), dN (dihedral, of order 2N, N >= 3) "
    'or q8 (quaternions), and "x" joins factors: z5, s3, a5, s3xz2, z2xz2xz3'
)
_FACTOR = re.compile(r"([zsadq])([0-9]{1,18})")
_COMMON = ["z2", "z3", "z5", "z60", "s3", "s4", "s5", "a4", "a5", "d4", "d5", "q8"]
_COMMON += ["s3xz2", "a4xz5", "z2xz2", "z2xz2xz3"]


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group given by its multiplication table.

    Attributes
    ----------
    name : str
        The name it was asked for by, in lower case: ``"s3"``, ``"a4xz5"``.
    table : ndarray of int64, shape (order, order), read-only
        ``table[i, j]`` is the number of the product ``i j``. Permutations compose as functions, so the
        product ``p q`` sends ``k`` to ``p(q(k))``. Element 0 is the identity.
    """

    name: str
    table: Table

    @property
    def order(self) -> int:
        """Number of elements."""
        return len(self.table)

    @property
    def inverses(self) -> NDArray[np.int64]:
        """The number of the inverse of every element, shape (order,)."""
        where: NDArray[np.int64] = np.argmin(self.table, axis=1)
        return where

    @property
    def abelian(self) -> bool:
        """Whether all elements commute: what a diagonal recurrence of enough layers can hope to track."""
        return bool(np.array_equal(self.table, self.table.T))

    def element_orders(self) -> NDArray[np.int64]:
        """The least ``k >= 1`` with ``a^k = identity`` for every element ``a``, shape (order,)."""
        everyone = np.arange(self.order)
        orders, power, k = np.zeros(self.order, dtype=np.int64), everyone, 1
        while not orders.all():
            orders[(power == 0) & (orders == 0)] = k
            power, k = self.table[power, everyone], k + 1
        return orders


@lru_cache(maxsize=16)
def group(name: str) -> Group:
    """The group of that name.

    Parameters
    ----------
    name : str
        ``zN``, ``sN``, ``aN``, ``dN`` (order ``2 N``, ``N >= 3``), ``q8``, and ``x`` for direct products;
        case does not matter. In a product, the first factor varies slowest in the numbering of the elements.

    Raises
    ------
    ValueError
        If the name is none of these (with near matches), or the group has more than 5040 elements.

    Examples
    --------
    >>> from fpnumba.tasks import group
    >>> group("s3").order, group("s3").abelian, group("z2xz2xz3").order
    (6, False, 12)
    """
    lowered = name.strip().lower()
    parts = [_FACTOR.fullmatch(part) for part in lowered.split("x")]
    if not all(parts):
        raise _unknown(name)
    factors = [(match[1], int(match[2])) for match in parts if match]
    for letter, n in factors:
        if n < 1 or (letter == "q" and n != 8) or (letter == "d" and n < 3):
            raise _unknown(name)
    # Counted before anything is built: "s100" has no table that would fit anywhere.
    order = math.prod(_factor_order(letter, n) for letter, n in factors)
    if order > MAX_ORDER:
        raise ValueError(f"task: the group {name!r} has more than {MAX_ORDER} elements, too many here")
    table = np.zeros((1, 1), dtype=np.int64)
    for letter, n in factors:
        table = _product(table, _permutation_table(_PERMUTATIONS[letter](n)))
    table.setflags(write=False)
    return Group(lowered, table)


def _unknown(name: str) -> ValueError:
    near = difflib.get_close_matches(name.strip().lower(), _COMMON, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"task: unknown group {name!r}{hint} ({GRAMMAR})")


def _product(left: Table, right: Table) -> Table:
    """The direct product: ``(a, b)`` is numbered ``a |right| + b``, and both parts multiply on their own."""
    n, m = len(left), len(right)
    pairs = left[:, None, :, None] * m + right[None, :, None, :]
    return pairs.reshape(n * m, n * m)


def _permutation_table(permutations: NDArray[np.int64]) -> Table:
    """``table[i, j]`` from permutations of shape (order, degree), by looking up each composition."""
    order, degree = permutations.shape
    # Each permutation is found again by a number that stands for it: a fixed random sum of its images, which
    # wraps around. The permutations are closed under composition, so distinct numbers make the look-up exact.
    weights = np.random.default_rng(0).integers(1, 2**62, degree)
    keys = permutations @ weights
    by_key = np.argsort(keys)
    ordered = keys[by_key]
    assert np.all(ordered[1:] != ordered[:-1])
    table = np.empty((order, order), dtype=np.int64)
    for i, p in enumerate(permutations):
        table[i] = by_key[np.searchsorted(ordered, p[permutations] @ weights)]
    return table


def _cyclic(n: int) -> NDArray[np.int64]:
    """Rotations of n points; element k turns by k."""
    k = np.arange(n)
    return (k[:, None] + k) % n


def _symmetric(n: int) -> NDArray[np.int64]:
    """All permutations of n points in lexicographic order."""
    return np.array(list(itertools.permutations(range(n))), dtype=np.int64)


def _alternating(n: int) -> NDArray[np.int64]:
    """The even permutations of n points in lexicographic order."""
    everyone = _symmetric(n)
    first, second = np.triu_indices(n, k=1)
    inversions = np.sum(everyone[:, first] > everyone[:, second], axis=1)
    even: NDArray[np.int64] = everyone[inversions % 2 == 0]
    return even


def _dihedral(n: int) -> NDArray[np.int64]:
    """Symmetries of the regular n-gon: n rotations, then n reflections."""
    k = np.arange(n)
    return np.concatenate([_cyclic(n), (k[:, None] - k) % n])


def _quaternion(_: int) -> NDArray[np.int64]:
    """The quaternion group acting on itself, generated by ``i`` and ``j``."""
    # points 0 to 7 stand for 1 i j k -1 -i -j -k
    i, j = (1, 4, 3, 6, 5, 0, 7, 2), (2, 7, 4, 1, 6, 3, 0, 5)
    found = {tuple(range(8))}
    fresh = found
    while fresh:
        fresh = {tuple(p[k] for k in q) for p in fresh for q in (i, j)} - found
        found = found | fresh
    return np.array(sorted(found), dtype=np.int64)


_PERMUTATIONS: dict[str, Callable[[int], NDArray[np.int64]]] = {
    "z": _cyclic,
    "s": _symmetric,
    "a": _alternating,
    "d": _dihedral,
    "q": _quaternion,
}


def _factor_order(letter: str, n: int) -> int:
    """The number of elements, counted without building anything; more than the limit is near enough."""
    if letter in "zq":
        return n
    if letter == "d":
        return 2 * n
    return math.factorial(min(n, 20)) // (2 if letter == "a" and n > 1 else 1)
