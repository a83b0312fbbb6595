"""The public surface: every name is there, documented, with an example that runs."""

import doctest
import importlib
import inspect
import sys
from typing import Any

import pytest

import fpnumba as fp

MODULES = ("arrays", "dotproduct", "mixers", "outcome", "relax", "rnn", "scan", "solve", "vjp")
# Public classes and functions of the hall
NAMES = [n for n in fp.__all__ if inspect.isclass(getattr(fp, n)) or inspect.isfunction(getattr(fp, n))]
METHODS = ("apply", "apply_transpose", "to_dense", "contraction_bound")


@pytest.mark.parametrize("room", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["", *MODULES])
def test_examples_run(room: str, name: str) -> None:
    # By its full name: `fp.vjp` is the function, not the module
    full = f"fpnumba.{name}".rstrip(".")
    importlib.import_module(full)
    with fp.arrays.use_room(room):
        result = doctest.testmod(sys.modules[full])
    assert result.attempted > 0
    assert result.failed == 0


def _documented() -> list[Any]:
    from_mixers = [getattr(fp.mixers, n) for n in fp.mixers.__all__]
    methods = [getattr(fp.mixers.Mixer, n) for n in METHODS]
    of_arrays = [getattr(fp.arrays, n) for n in ("room", "use_room", "use_engine", "kind_of", "check")]
    return [*(getattr(fp, n) for n in NAMES), *from_mixers, *methods, *of_arrays]


@pytest.mark.parametrize("thing", _documented(), ids=lambda t: t.__qualname__)
def test_every_public_name_is_documented_with_an_example(thing: Any) -> None:
    text = inspect.getdoc(thing) or ""
    assert "Examples\n--------\n>>> " in text
    if inspect.isfunction(thing):
        parameters = [p for p in inspect.signature(thing).parameters if p != "self"]
        for parameter in parameters:
            assert parameter in text, f"{parameter} is not described"
        assert "Returns\n-------" in text or thing.__name__ in ("use_room", "use_engine")


def test_the_contract() -> None:
    """The surface that other pieces of work build on."""
    assert str(inspect.signature(fp.linear_scan)).startswith("(lam: Any, x: Any, /, *, initial: ")
    assert list(inspect.signature(fp.selective_scan).parameters) == [
        "x",
        "delta",
        "A",
        "B",
        "C",
        "D",
        "initial",
    ]
    rnn = list(inspect.signature(fp.fixed_point_rnn).parameters)
    assert rnn[:5] == ["lam", "mixer", "x", "gate", "initial"]
    assert rnn[-2:] == ["solver", "adjoint"]
    assert {"DPLR", "Householder", "Kronecker", "Monarch", "Dense", "Fixed"} < set(fp.mixers.__all__)
    with pytest.raises(AttributeError, match="no attribute 'attic'"):
        fp.attic  # noqa: B018
