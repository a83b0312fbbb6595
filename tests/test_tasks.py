"""Word problems: the groups are the groups they are named after, and the targets are the products."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fpnumba import tasks
from fpnumba.tasks import Group, group

# name: (order, abelian, {element order: how many elements have it}); from any text book
KNOWN = {
    "z1": (1, True, {1: 1}),
    "z5": (5, True, {1: 1, 5: 4}),
    "z60": (60, True, None),
    "s1": (1, True, {1: 1}),
    "s3": (6, False, {1: 1, 2: 3, 3: 2}),
    "s4": (24, False, {1: 1, 2: 9, 3: 8, 4: 6}),
    "s5": (120, False, {1: 1, 2: 25, 3: 20, 4: 30, 5: 24, 6: 20}),
    "a1": (1, True, {1: 1}),
    "a2": (1, True, {1: 1}),
    "a3": (3, True, {1: 1, 3: 2}),
    "a4": (12, False, {1: 1, 2: 3, 3: 8}),
    "a5": (60, False, {1: 1, 2: 15, 3: 20, 5: 24}),
    "d3": (6, False, {1: 1, 2: 3, 3: 2}),
    "d4": (8, False, {1: 1, 2: 5, 4: 2}),
    "q8": (8, False, {1: 1, 2: 1, 4: 6}),
    "s3xz2": (12, False, {1: 1, 2: 7, 3: 2, 6: 2}),
    "z2xz2xz3": (12, True, {1: 1, 2: 3, 3: 2, 6: 6}),
}
SMALL = [name for name, (order, _, _) in KNOWN.items() if order <= 60]


@pytest.mark.parametrize("name", KNOWN)
def test_it_is_the_group(name: str) -> None:
    order, abelian, element_orders = KNOWN[name]
    g = group(name)
    everyone = np.arange(order)
    assert g.order == order
    assert g.abelian is abelian
    np.testing.assert_array_equal(g.table[0], everyone)
    np.testing.assert_array_equal(g.table[:, 0], everyone)
    np.testing.assert_array_equal(g.table[everyone, g.inverses], 0)
    np.testing.assert_array_equal(g.table[g.inverses, everyone], 0)
    # A Latin square: every row and every column holds every element once.
    np.testing.assert_array_equal(np.sort(g.table, axis=1), np.broadcast_to(everyone, (order, order)))
    np.testing.assert_array_equal(np.sort(g.table.T, axis=1), np.broadcast_to(everyone, (order, order)))
    if element_orders is not None:
        orders, counts = np.unique(g.element_orders(), return_counts=True)
        assert dict(zip(orders.tolist(), counts.tolist(), strict=True)) == element_orders


@pytest.mark.parametrize("name", SMALL)
def test_products_associate(name: str) -> None:
    table = group(name).table
    np.testing.assert_array_equal(table[table], table[:, table])


@pytest.mark.parametrize("n", [2, 3, 4])
def test_symmetric_groups_compose_permutations_as_functions(n: int) -> None:
    permutations = list(itertools.permutations(range(n)))
    g = group(f"s{n}")
    for (i, p), (j, q) in itertools.product(enumerate(permutations), repeat=2):
        assert permutations[g.table[i, j]] == tuple(p[q[k]] for k in range(n))


def test_direct_product_multiplies_each_part() -> None:
    left, right, both = group("s3"), group("z4"), group("s3xz4")
    for a, b in itertools.product(range(both.order), repeat=2):
        (a1, a2), (b1, b2) = divmod(a, 4), divmod(b, 4)
        assert both.table[a, b] == left.table[a1, b1] * 4 + right.table[a2, b2]


def test_names_are_found_in_any_case_and_tables_are_shared_and_read_only() -> None:
    assert group(" S3xZ2 ").name == "s3xz2"
    assert group("s3") is group("s3")
    with pytest.raises(ValueError, match="read-only"):
        group("s3").table[0, 0] = 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("s33x", "unknown group 's33x'"),
        ("x", "unknown group"),
        ("", "unknown group ''"),
        ("z0", "did you mean z"),
        ("a55", "more than 5040"),
        ("s99999999999", "more than 5040"),
        ("z99999999999", "more than 5040"),
        ("q4", "or q8"),
        ("s3*z2", "did you mean s3xz2"),
        ("d2", "unknown group"),
        ("m11", '"x" joins factors'),
    ],
)
def test_other_names_are_refused_in_one_line(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^task: ") as caught:
        tasks.get(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def _one_by_one(g: Group, word: list[int], order: str) -> list[int]:
    """Running products by associating the other way: each prefix is multiplied out from its far end."""
    products = []
    for t in range(1, len(word) + 1):
        prefix = word[:t] if order == "right" else word[:t][::-1]
        value = 0
        for a in reversed(prefix):
            value = int(g.table[a, value])
        products.append(value)
    return products


@hypothesis.given(
    name=st.sampled_from(["z7", "s3", "a4", "a5", "q8", "s3xz2"]),
    order=st.sampled_from(["right", "left"]),
    identity_first=st.booleans(),
    batch=st.integers(0, 4),
    length=st.integers(0, 20),
    seed=st.integers(0, 2**32),
)
def test_targets_are_the_running_products(
    name: str, order: str, identity_first: bool, batch: int, length: int, seed: int
) -> None:
    task = tasks.get(name, order=order, identity_first=identity_first)  # type: ignore[arg-type]
    tokens, targets = task.sample(np.random.default_rng(seed), batch, length)
    assert tokens.shape == targets.shape == (batch, length)
    assert tokens.dtype == targets.dtype == np.int64
    assert np.all((tokens >= 0) & (tokens < task.vocab))
    if identity_first:
        assert not tokens[:, :1].any()
    for word, answer in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert answer == _one_by_one(task.group, word, order)
    again, _ = task.sample(np.random.default_rng(seed), batch, length)
    np.testing.assert_array_equal(tokens, again)


def test_targets_of_permutations_move_points() -> None:
    """Nothing of the table: the products of S4 computed by moving points about."""
    permutations = list(itertools.permutations(range(4)))
    tokens, targets = tasks.get("s4", order="left").sample(np.random.default_rng(3), 5, 12)
    for word, answers in zip(tokens, targets, strict=True):
        points = list(range(4))
        for a, answer in zip(word, answers, strict=True):
            points = [permutations[a][k] for k in points]
            assert permutations[answer] == tuple(points)


def test_tokens_are_uniform() -> None:
    tokens, targets = tasks.get("s3").sample(np.random.default_rng(0), 1000, 60)
    for drawn in (tokens, targets):
        counts = np.bincount(drawn.ravel(), minlength=6)
        # six standard deviations of a binomial count
        spread = 6 * math.sqrt(60_000 * (1 / 6) * (5 / 6))
        assert np.all(np.abs(counts - 10_000) < spread)


def test_bad_sizes_and_options_are_named() -> None:
    task = tasks.get("s3")
    with pytest.raises(ValueError, match="batch: -1"):
        task.sample(np.random.default_rng(0), -1, 3)
    with pytest.raises(ValueError, match="length: -2"):
        task.sample(np.random.default_rng(0), 1, -2)
    with pytest.raises(ValueError, match="order: 'up'"):
        tasks.get("s3", order="up")  # type: ignore[arg-type]
