"""Profiles and fixtures shared by the whole suite.

The quick profile is the default; ``pytest --hypothesis-profile=thorough`` looks much harder.
"""

import os
from collections.abc import Iterator
from typing import Any

# Plots are drawn without a screen; set before anything imports matplotlib.
os.environ.setdefault("MPLBACKEND", "Agg")
# JAX on the CPU only, whatever else the machine has: these tests are about exchange of arrays.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gpu_machine
import hypothesis
import numpy as np
import pytest

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
