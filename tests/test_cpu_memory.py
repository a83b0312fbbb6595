"""Recycled result memory: never shared by two living arrays, bounded, and given back on request."""

import numpy as np
import pytest

from fpnumba.cpu import memory


@pytest.fixture(autouse=True)
def _start_empty():
    memory.release()
    yield
    memory.release()


def test_small_arrays_are_plain() -> None:
    assert memory.empty((3, 4), np.float64).base is None


def test_a_block_is_reused_only_when_its_last_view_is_gone() -> None:
    first = memory.empty((1 << 20,), np.float32)
    address = first.ctypes.data
    view = first[::2].reshape(2, -1)
    del first
    second = memory.empty((1 << 20,), np.float32)
    assert second.ctypes.data != address
    view[:] = 1.0
    second[:] = 2.0
    assert (view == 1.0).all()
    del view
    third = memory.empty((1 << 18, 2), np.float64)
    assert third.ctypes.data == address
    assert third.shape == (1 << 18, 2)
    assert third.dtype == np.float64
    assert third.flags.c_contiguous
    assert third.flags.writeable


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMIT", 7 << 20)  # one block of 4 MiB and its alignment, not two
    arrays = [memory.empty((1 << 20,), np.float32) for _ in range(3)]
    del arrays
    assert 0 < memory.held_bytes() <= 7 << 20
    memory.release()
    assert memory.held_bytes() == 0
