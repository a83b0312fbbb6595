"""Where these tests run: in the CUDA simulator (NUMBA_ENABLE_CUDASIM=1, before anything imports Numba), or on a device.

With neither there is nothing to collect. tests/test_gpu_portable.py starts the simulator in a process of its own.
"""

import sys

import numpy as np
import pytest
import rooms

if not (rooms.SIMULATED or rooms.has_device()):
    collect_ignore_glob = ["test_*.py"]

# The simulator's barriers are threads of Python that wait for each other: at the usual 5 ms between switches, for long.
if rooms.SIMULATED:
    sys.setswitchinterval(2e-5)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "simulated" in item.path.parts:
            # Simulated threads overflow as the device does, but say so.
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture(autouse=True)
def array_module(monkeypatch: pytest.MonkeyPatch) -> None:
    if rooms.SIMULATED:
        from fpnumba.gpu import _device

        monkeypatch.setattr(_device, "xp", lambda: np)
