"""A reduced set of GPU kernels, each run once: what compute-sanitizer watches. ``python tests/gpu_small.py``"""

from typing import Any

import cupy
import numpy as np

from fpnumba.gpu import mixers, scan, solve


def draw(batch: int, steps: int, dim: int, rank: int, dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    u = rng.standard_normal((batch, steps, rank, dim))
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    found = {
        "lam": rng.uniform(0.05, 0.95, (batch, steps, dim)),
        "u": u,
        "alpha": rng.uniform(0.05, 0.9, (batch, steps, rank)) / rank,
        "x": rng.standard_normal((batch, steps, dim)),
        "hbar": rng.standard_normal((batch, steps, dim)),
        "gate": rng.uniform(0.1, 0.9, (batch, steps, dim)),
        "initial": rng.standard_normal((batch, dim)),
    }
    return {k: cupy.asarray(a.astype(dtype)) for k, a in found.items()}


def low_rank(batch: int, steps: int, dim: int, rank: int, dtype: Any, kind: str) -> None:
    p = draw(batch, steps, dim, rank, dtype)
    scan.linear_scan_vjp(
        p["lam"], scan.linear_scan(p["lam"], p["x"], p["initial"]), p["initial"], False, p["hbar"]
    )
    whole(kind, (p["u"], p["alpha"]), p, ("direct", "sequential", "chunked"))


def whole(kind: str, params: Any, p: dict[str, Any], methods: tuple[str, ...]) -> None:
    """Value and gradient of one mixer, each way."""
    for method in methods:
        options: dict[str, Any] = {"method": method, "chunk": 4 if method == "chunked" else None}
        for gate in (None, p["gate"]):
            h = solve.solve(kind, params, p["lam"], gate, p["x"], p["initial"], None, **options).value
            args = (kind, params, p["lam"], gate, p["x"], p["initial"], h, p["hbar"], None)
            solved, _ = solve.rnn_pullback(*args, **options)
            solve.rnn_cotangents(*args[:-2], solved.value)
    y = mixers.apply(kind, params, p["x"])
    mixers.apply_transpose(kind, params, y)
    mixers.cotangent(kind, params, p["x"], y)


def selective(batch: int, steps: int, dim: int, heads: int, size: int, dtype: Any) -> None:
    """Value and gradient of Mamba's scan; of Mamba-2's with heads."""
    rng = np.random.default_rng(2)
    shapes = (
        (batch, steps, dim),
        (batch, steps, heads or dim),
        (heads,) if heads else (dim, size),
        (batch, steps, size),
        (batch, steps, size),
        (dim,),
        (batch, dim, size),
        (batch, steps, dim),
        (batch, dim, size),
    )
    arrays = [rng.uniform(0.1, 1.0, shape) for shape in shapes]
    arrays[2] = -arrays[2]
    given = [cupy.asarray(a.astype(dtype)) for a in arrays]
    scan.selective_scan(*given[:7])
    scan.selective_scan_vjp(*given)


def main() -> None:
    selective(2, 19, 141, 0, 16, np.float32)
    selective(1, 300, 9, 3, 20, np.float64)  # split in time
    selective(1, 70, 33, 0, 5, np.float16)
    low_rank(2, 9, 70, 1, np.float32, "householder")
    low_rank(1, 200, 64, 2, np.float64, "householder")  # split in time
    low_rank(2, 5, 33, 5, np.float16, "dplr")
    low_rank(1, 4, 8192, 4, np.float32, "dplr")  # a cluster of blocks
    rng = np.random.default_rng(1)
    p = draw(2, 9, 24, 1, np.float32)

    def small(*shape: int) -> Any:
        return cupy.asarray((rng.standard_normal(shape) * 0.3 / shape[-1] ** 0.5).astype(np.float32))

    whole("kronecker", (small(2, 9, 4, 4), small(2, 9, 6, 6)), p, ("chunked", "parallel"))
    whole("monarch", (small(2, 9, 3, 8, 8), small(2, 9, 3)), p, ("chunked",))
    whole("dense", (small(2, 9, 24, 24) + cupy.eye(24, dtype=np.float32),), p, ("chunked",))
    whole("fixed", (small(24, 24) + cupy.eye(24, dtype=np.float32),), p, ("chunked",))
    cupy.cuda.Device().synchronize()
    print("done")


if __name__ == "__main__":
    main()
