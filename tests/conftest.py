"""Profiles and fixtures shared by the whole suite.

The quick profile is the default; ``pytest --hypothesis-profile=thorough`` looks much harder. ``--room gpu`` runs the
cases of that room and nothing else.
"""

import os

# Plots are drawn without a screen; set before anything imports matplotlib.
os.environ.setdefault("MPLBACKEND", "Agg")
# JAX must not take most of a GPU's memory for itself
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import numpy as np
import pytest
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
