"""What layers need of a device beside the solves: against the compiled kernels of the CPU."""

from typing import Any

import numpy as np
import pytest
from gpu_machine import GpuRoom as Room

from fpnumba.gpu import maps
from fpnumba.nn import mixer_kernels as cpu


def close(one: Any, other: Any, dtype: str) -> None:
    tolerance = 1e-12 if dtype == "float64" else 2e-5
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * (1 + np.abs(other).max(initial=0.0)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", [(5, 3), (7, 33), (3, 700), (0, 4), (2, 0)])
def test_rows_of_unit_length(gpu_room: Room, shape: tuple[int, int], dtype: str, rng: Any) -> None:
    y, u_bar = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    y[:1] *= 1e-9
    u, norm, y_bar = np.empty_like(y), np.empty(len(y), dtype), np.empty_like(y)
    cpu.normalize(y, 1e-5, u, norm)
    cpu.normalize_vjp(u, norm, 1e-5, u_bar, y_bar)
    found = maps.normalize(gpu_room.give(y), 1e-5)
    close(gpu_room.get(found[0]), u, dtype)
    close(gpu_room.get(found[1]), norm, dtype)
    close(gpu_room.get(maps.normalize_vjp(*found, 1e-5, gpu_room.give(u_bar))), y_bar, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("size", [1, 5, 32, 40])
@pytest.mark.parametrize("spectral", [False, True])
def test_kronecker_factors(gpu_room: Room, size: int, spectral: bool, dtype: str, rng: Any) -> None:
    count, flip = 3, size % 2 == 1
    p = rng.uniform(0.1, 1.0, (count, size * (size + 1) // 2)).astype(dtype)
    diag = rng.uniform(0.2, 0.8, (count, size)).astype(dtype)
    options = (1 / np.sqrt(2 * size), 1e-5, spectral, 0.9, flip)
    k, p_bar, diag_bar = np.empty((count, size, size), dtype), np.empty_like(p), np.empty_like(diag)
    k_bar = rng.standard_normal(k.shape).astype(dtype)
    cpu.kronecker_factor(0, count, p, diag, *options, k)
    cpu.kronecker_factor_vjp(0, count, p, diag, *options, k_bar, p_bar, diag_bar)
    give = gpu_room.give
    close(gpu_room.get(maps.kronecker_factor(give(p), give(diag), *options)), k, dtype)
    found = maps.kronecker_factor_vjp(give(p), give(diag), *options, give(k_bar))
    close(gpu_room.get(found[0]), p_bar, dtype)
    close(gpu_room.get(found[1]), diag_bar, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("size", [1, 4, 9])
def test_monarch_blocks(gpu_room: Room, size: int, dtype: str, rng: Any) -> None:
    p = rng.standard_normal((6, size * (size + 1) // 2)).astype(dtype)
    p[0] = 0
    blocks, p_bar = np.empty((6, size, size), dtype), np.empty_like(p)
    blocks_bar = rng.standard_normal(blocks.shape).astype(dtype)
    cpu.monarch_block(0, 6, p, 1e-5, blocks)
    cpu.monarch_block_vjp(0, 6, p, 1e-5, blocks_bar, p_bar)
    close(gpu_room.get(maps.monarch_block(gpu_room.give(p), 1e-5, size)), blocks, dtype)
    close(
        gpu_room.get(maps.monarch_block_vjp(gpu_room.give(p), 1e-5, gpu_room.give(blocks_bar))), p_bar, dtype
    )


def test_threads_in_any_order(simt_device: Any, rng: Any) -> None:
    p, diag = rng.uniform(0.1, 1.0, (2, 45)), rng.uniform(0.2, 0.8, (2, 9))
    k_bar, results = rng.standard_normal((2, 9, 9)), []
    for seed in range(3):
        simt_device.seed = seed
        results.append(
            [
                maps.kronecker_factor(p, diag, 0.3, 1e-5, True, 0.9, True),
                *maps.kronecker_factor_vjp(p, diag, 0.3, 1e-5, True, 0.9, True, k_bar),
            ]
        )
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
