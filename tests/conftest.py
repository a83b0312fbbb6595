"""Profiles and fixtures shared by the whole suite.

The quick profile is the default; ``pytest --hypothesis-profile=thorough`` looks much harder. ``--room=gpu`` runs the
cases of that room and nothing else.
"""

import os
from collections.abc import Iterator
from typing import Any

# Plots are drawn without a screen; set before anything imports matplotlib.
os.environ.setdefault("MPLBACKEND", "Agg")
# JAX must not take most of a GPU's memory for itself
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_machine
import hypothesis
import numpy as np
import pytest
from gpu_machine import GpuRoom
from hall import ABSENT

# On a machine with a GPU its arrays are exchanged as well; elsewhere JAX need not look for one.
if ABSENT is not None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--room", action="append", metavar="ROOM", help="only the cases of this room (repeatable)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--room")
    if wanted:
        room = {item: getattr(item, "callspec", None) for item in items}
        kept = [i for i in items if (spec := room[i]) is not None and spec.params.get("room") in wanted]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


hypothesis.settings.register_profile(
    "quick",
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile(
    "thorough",
    max_examples=300,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("quick")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed, so that a failing test fails again."""
    return np.random.default_rng(20250310)


@pytest.fixture(params=["simt", pytest.param("cupy", marks=pytest.mark.gpu)])
def gpu_room(request: pytest.FixtureRequest) -> GpuRoom:
    """The GPU room on NumPy arrays and the CPU, and on a device where there is one."""
    if request.param == "simt":
        request.getfixturevalue("simt_device")
        return GpuRoom("simt", lambda a: a, lambda a: a)
    import cupy

    return GpuRoom(
        "cupy",
        lambda a: None if a is None else cupy.asarray(a),
        lambda a: None if a is None else cupy.asnumpy(a),
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are left out where there is no device."""
    if item.get_closest_marker("gpu") and not gpu_machine.has_device():
        if gpu_machine.required():
            pytest.fail(f"FPNUMBA_REQUIRE_GPU is set, but {gpu_machine.reason()}", pytrace=False)
        pytest.skip(gpu_machine.reason())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests were left out because there is no GPU."""
    skipped = terminalreporter.stats.get("skipped", ())
    missed = sum(f"Skipped: {gpu_machine.REASON}" in str(report.longrepr) for report in skipped)
    if missed:
        terminalreporter.write_line(f"skipped for want of a GPU: {missed}", yellow=True)


@pytest.fixture
def simt_device() -> Iterator[Any]:
    """NumPy and the CPU in the place of CuPy and the GPU: a `simt.Device`."""
    simt = pytest.importorskip("simt")
    if simt.compiler() is None:
        pytest.skip("no g++: CUDA C is not run on the CPU")
    with simt.device() as machine:
        yield machine
