"""The GPU room against the floor and against what a user would pick instead, everything in one run.

The floor of a case is the largest of three times: its bytes (each input read once, each output written once) over the
measured copy bandwidth and, where arithmetic counts, its operations over the measured float32 rate and its
exponentials over the measured rate of those.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fpnumba as fp
from bench.timing import Row

SCANS = ((256, 512, 1024), (64, 2048, 1024), (8, 65536, 1536), (1, 65536, 1024))
SELECTIVES = ((64, 2048, 1024), (512, 17, 1024))
STATES = 16
SOLVES = ((256, 512, 1024), (64, 2048, 1024), (1, 65536, 1024))
# Layers of FP-Mamba: (B, T), the mixer, the way to the fixed point and the gradient.
LAYERS = (
    ((512, 17), "householder", "sequential", "exact"),
    ((512, 17), "householder", "sequential", "one-step"),
    ((512, 17), "kronecker", "sequential", "exact"),
    ((512, 17), "kronecker", "sequential", "one-step"),
    ((512, 17), "householder", "parallel", "one-step"),
    ((512, 17), "kronecker", "parallel", "one-step"),
    ((64, 2048), "householder", "parallel", "one-step"),
    ((64, 2048), "kronecker", "parallel", "one-step"),
    ((64, 2048), "householder", "parallel", "exact"),
)
# Networks of which an update is timed, with everything that belongs to it: the width, the mixer, products of matrices.
UPDATES = ((256, "householder", "tf32"), (512, "householder", "bfloat16"), (512, "kronecker", "bfloat16"))
RTOL = 1e-6
LONG_ENOUGH = 0.02  # seconds that a measurement takes at least
QUIET: dict[str, Any] = {"on_failure": "ignore"}  # nothing is asked of the device until the end


def seconds_on_device(run: Callable[[], object], *, repeats: int = 5) -> float:
    """Time of one call on the device: events around calls in a row, the median of repeats.

    So many calls that the device's wait for the first of them does not count: it is not a part of any.
    """
    import cupy

    def seconds(calls: int) -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) * 1e-3 / calls

    for _ in range(3):
        run()
    calls = max(2, min(200, round(LONG_ENOUGH / seconds(2))))
    return statistics.median(seconds(calls) for _ in range(repeats))


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large copy on the device."""
    import cupy

    source = cupy.random.random(2**29, dtype=cupy.float32)
    target = cupy.empty_like(source)
    return 2 * source.nbytes / seconds_on_device(lambda: cupy.copyto(target, source))


_FLOPS = r"""
extern "C" __global__ void __launch_bounds__(256) flops(float* out, int rounds) {
  float a[8];
  for (int i = 0; i < 8; ++i) a[i] = threadIdx.x + i;
  for (int k = 0; k < rounds; ++k)
    for (int i = 0; i < 8; ++i) a[i] = fmaf(a[i], 0.999f, 0.5f);
  float total = 0;
  for (int i = 0; i < 8; ++i) total += a[i];
  if (total == -1) out[threadIdx.x] = total;
}
"""


def float32_rate() -> float:
    """Float32 operations per second in registers: fused multiply-adds, each two operations."""
    import cupy

    kernel = cupy.RawKernel(_FLOPS, "flops")
    out, rounds = cupy.empty(256, cupy.float32), 20000
    blocks = 8 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    seconds = seconds_on_device(lambda: kernel((blocks,), (256,), (out, np.int32(rounds))))
    return blocks * 256 * 8 * 2 * rounds / seconds


_EXPS = r"""
extern "C" __global__ void __launch_bounds__(256) exps(float* out, int rounds) {
  float a[8];
  for (int i = 0; i < 8; ++i) a[i] = threadIdx.x + i;
  for (int k = 0; k < rounds; ++k)
    for (int i = 0; i < 8; ++i) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(a[i]));
  float total = 0;
  for (int i = 0; i < 8; ++i) total += a[i];
  if (total == -1) out[threadIdx.x] = total;
}
"""


def exponential_rate() -> float:
    """Float32 powers of two per second in registers."""
    import cupy

    kernel = cupy.RawKernel(_EXPS, "exps")
    out, rounds = cupy.empty(256, cupy.float32), 5000
    blocks = 8 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    seconds = seconds_on_device(lambda: kernel((blocks,), (256,), (out, np.int32(rounds))))
    return blocks * 256 * 8 * rounds / seconds


def selective_problem(shape: tuple[int, int, int], size: int, dtype: Any, seed: int = 0) -> dict[str, Any]:
    """Mamba's scan as its layers start: A = -1, ..., -N for every channel, steps between 0.001 and 0.1."""
    import cupy

    rng = cupy.random.default_rng(seed)
    batch, steps, dim = shape
    rates = cupy.broadcast_to(-cupy.arange(1, size + 1, dtype=cupy.float32), (dim, size))
    found = {
        "x": rng.standard_normal(shape, dtype=cupy.float32),
        "delta": cupy.exp(rng.random(shape, dtype=cupy.float32) * np.float32(np.log(100.0)))
        * np.float32(1e-3),
        "A": cupy.ascontiguousarray(rates),
        "B": rng.standard_normal((batch, steps, size), dtype=cupy.float32),
        "C": rng.standard_normal((batch, steps, size), dtype=cupy.float32),
        "D": cupy.ones(dim, cupy.float32),
        "ybar": rng.standard_normal(shape, dtype=cupy.float32),
    }
    return {name: array.astype(dtype) for name, array in found.items()}


def low_rank_problem(shape: tuple[int, int, int], rank: int, dtype: Any, seed: int = 0) -> dict[str, Any]:
    """A Householder problem on the device: lam in (0.05, 0.95), alpha in (0.05, 0.95) over the root of the rank."""
    import cupy

    rng = cupy.random.default_rng(seed)
    batch, steps, dim = shape
    u = rng.standard_normal((batch, steps, rank, dim), dtype=cupy.float32)
    u /= cupy.sqrt((u * u).sum(axis=-1, keepdims=True))
    lam = rng.random(shape, dtype=cupy.float32) * 0.9 + 0.05
    alpha = (rng.random((batch, steps, rank), dtype=cupy.float32) * 0.9 + 0.05) / np.float32(rank**0.5)
    x = rng.standard_normal(shape, dtype=cupy.float32)
    hbar = rng.standard_normal(shape, dtype=cupy.float32)
    lam, u, alpha, x, hbar = (a.astype(dtype) for a in (lam, u, alpha, x, hbar))
    return {"lam": lam, "x": x, "hbar": hbar, "mixer": fp.mixers.Householder(u, alpha, alpha_max=None)}


def kronecker_problem(shape: tuple[int, int, int], factor: int, seed: int = 0) -> dict[str, Any]:
    """Factors of equal size, the norm of their product bounded by 0.8."""
    import cupy

    rng = cupy.random.default_rng(seed)
    batch, steps, dim = shape

    def contraction(d: int) -> Any:
        k = rng.standard_normal((batch, steps, d, d), dtype=cupy.float32)
        return k * np.float32(0.8**0.5) / cupy.sqrt((k * k).sum(axis=(-2, -1), keepdims=True))

    return {
        "lam": rng.random(shape, dtype=cupy.float32) * 0.9 + 0.05,
        "x": rng.standard_normal(shape, dtype=cupy.float32),
        "hbar": rng.standard_normal(shape, dtype=cupy.float32),
        "mixer": fp.mixers.Kronecker(contraction(factor), contraction(dim // factor)),
    }


def monarch_problem(shape: tuple[int, int, int], size: int, seed: int = 0) -> dict[str, Any]:
    """Blocks whose norm is bounded by 0.8."""
    import cupy

    rng = cupy.random.default_rng(seed)
    batch, steps, dim = shape
    blocks = rng.standard_normal((batch, steps, dim // size, size, size), dtype=cupy.float32)
    blocks /= cupy.sqrt((blocks * blocks).sum(axis=(-2, -1), keepdims=True))
    return {
        "lam": rng.random(shape, dtype=cupy.float32) * 0.9 + 0.05,
        "x": rng.standard_normal(shape, dtype=cupy.float32),
        "hbar": rng.standard_normal(shape, dtype=cupy.float32),
        "mixer": fp.mixers.Monarch(blocks, cupy.full((batch, steps, dim // size), 0.8, cupy.float32)),
    }


class Bench:
    """One run: the ceilings, and the rows so far."""

    def __init__(self, report: Callable[[Row], None]) -> None:
        self.rows: list[Row] = []
        self.report = report
        self.copies = [copy_bandwidth()]
        self.rate = float32_rate()
        self.exps = exponential_rate()
        self.facts: dict[str, Any] = {}

    def add(
        self,
        case: str,
        shape: tuple[int, ...],
        seconds: float,
        nbytes: int | None,
        *,
        operations: float = 0,
        exponentials: float = 0,
        note: str = "",
    ) -> float:
        """Keep one row; `of_copy` is the fraction of its floor."""
        share = None
        if nbytes is not None:
            floor = max(nbytes / self.copies[-1], operations / self.rate, exponentials / self.exps)
            share = floor / seconds
        label = "x".join(str(n) for n in shape)
        work = {"operations": operations, "exponentials": exponentials}
        self.rows.append(Row(case, label, seconds, nbytes, share, note, work))
        self.report(self.rows[-1])
        return seconds


def clean() -> None:
    """Give the memory of finished cases back."""
    import cupy

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()


def _mixer_bytes(mixer: Any) -> int:
    return sum(int(a.nbytes) for a in mixer.params)


def _scan_case(bench: Bench, shape: tuple[int, int, int]) -> None:
    import cupy

    p = low_rank_problem(shape, 1, cupy.float32)
    lam, x, hbar = p["lam"], p["x"], p["hbar"]
    bench.add("linear_scan", shape, seconds_on_device(lambda: fp.linear_scan(lam, x)), 3 * x.nbytes)
    _, pull = fp.vjp(fp.linear_scan, lam, x)
    bench.add("  its gradient", shape, seconds_on_device(lambda: pull(hbar)), 5 * x.nbytes)


def _selective_case(bench: Bench, shape: tuple[int, int, int], dtype: Any, name: str) -> None:
    """Value, and the pullback; one exponential for each number of state, as if the gradient had those of the value."""
    p = selective_problem(shape, STATES, dtype)
    arguments = [p[argument] for argument in ("x", "delta", "A", "B", "C")]
    x, B, exponentials = p["x"], p["B"], float(p["x"].size) * STATES
    case = f"selective_scan, N {STATES}, {name}"
    nbytes = 3 * x.nbytes + 2 * B.nbytes
    value = seconds_on_device(lambda: fp.selective_scan(*arguments, D=p["D"]))
    bench.add(case, shape, value, nbytes, exponentials=exponentials)
    _, pull = fp.vjp(fp.selective_scan, *arguments, D=p["D"])
    # x, delta, ybar, B, C read, and the cotangents of all but ybar written
    gradient = seconds_on_device(lambda: pull((p["ybar"], None)))
    bench.add("  its gradient", shape, gradient, 5 * x.nbytes + 4 * B.nbytes, exponentials=exponentials)


def _solve_case(
    bench: Bench,
    case: str,
    p: dict[str, Any],
    solver: fp.Solver,
    *,
    gradient: bool = True,
    per_iteration: float = 0.0,
) -> tuple[float, float | None]:
    """Time the value, and value and exact gradient; floors as the module says."""
    lam, x, mixer, hbar = p["lam"], p["x"], p["mixer"], p["hbar"]
    adjoint = fp.Adjoint(rtol=RTOL, **QUIET)
    solution = fp.fixed_point_rnn(lam, mixer, x, solver=solver)
    counts = int(np.max(solution.iterations))
    failed = int((~solution.converged).sum())
    work = (
        per_iteration * float(np.asarray(solution.chunk_iterations, np.float64).mean())
        if per_iteration
        else 0.0
    )
    nbytes = 3 * x.nbytes + _mixer_bytes(mixer)
    note = f"iterations {counts}" + (f", {failed} not converged" if failed else "")
    value = bench.add(
        case,
        x.shape,
        seconds_on_device(lambda: fp.fixed_point_rnn(lam, mixer, x, solver=solver)),
        nbytes,
        operations=work,
        note=note,
    )
    if not gradient:
        return value, None

    def both() -> object:
        _, pull = fp.vjp(fp.fixed_point_rnn, lam, mixer, x, solver=solver, adjoint=adjoint)
        return pull(hbar)

    # the value's bytes; then lam, x, the mixer, h and hbar read, the adjoint and all cotangents written
    more = nbytes + 7 * x.nbytes + 2 * _mixer_bytes(mixer)
    seconds = bench.add(
        "  value and exact gradient", x.shape, seconds_on_device(both), more, operations=2 * work, note=""
    )
    return value, seconds


def _replayed(bench: Bench, shape: tuple[int, int, int], solver: fp.Solver) -> None:
    """The same call captured into a CUDA graph: what is left when the host has no part in it."""
    import cupy

    p = low_rank_problem(shape, 1, cupy.float32)
    lam, x, mixer = p["lam"], p["x"], p["mixer"]
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(3):  # compiled, and memory in the pool of this stream
            kept = fp.fixed_point_rnn(lam, mixer, x, solver=solver)
        stream.synchronize()
        stream.begin_capture()
        kept = fp.fixed_point_rnn(lam, mixer, x, solver=solver)
        graph = stream.end_capture()
        seconds = seconds_on_device(lambda: graph.launch(stream))
    right = fp.fixed_point_rnn(lam, mixer, x, solver=solver)
    assert bool((kept.value == right.value).all())
    bench.add("fixed_point_rnn, direct, as a CUDA graph", shape, seconds, 3 * x.nbytes + _mixer_bytes(mixer))


def _layer_case(
    bench: Bench, shape: tuple[int, int], mixer: str, way: str, gradient: str, width: int
) -> None:
    """A training step of a layer, products of matrices in bfloat16; recorded and launched as one.

    Step after step to a tolerance, or in parallel to the published stopping rule of training.
    """
    import cupy

    from fpnumba import gpu, nn

    if way == "sequential":
        solver = fp.Solver(rtol=1e-3, **QUIET)
    else:
        rule: dict[str, Any] = {"criterion": "published", "rtol": 0.1, "quantile": 0.75, "max_iter": 16}
        solver = fp.Solver("parallel", **rule, damping=0.99, damping_decay=0.9, **QUIET)
    adjoint = fp.Adjoint("one-step") if gradient == "one-step" else fp.Adjoint(rtol=1e-3, **QUIET)
    options: dict[str, Any] = {"solver": solver, "adjoint": adjoint, "train_mode": way == "parallel"}
    layer = nn.FPMamba(width, mixer=mixer, alpha_max=1.0, **options)
    rng, record = np.random.default_rng(0), list[Any]()
    params = {name: cupy.asarray(value) for name, value in layer.init(rng).items()}
    x = cupy.asarray(rng.standard_normal((*shape, width)).astype(np.float32))
    y_bar = cupy.ones_like(x)

    def both() -> object:
        y, pullback = layer.vjp(params, x)
        return y, *pullback(y_bar)

    with gpu.use_precision("bfloat16"):
        layer(params, x, record=record)
        forward = seconds_on_device(lambda: layer(params, x), repeats=3)
        seconds = seconds_on_device(both, repeats=3)
        told = f"forward {forward * 1e3:.2f} ms, iterations {int(record[0].iterations.max())}"
        recorded = seconds_on_device(gpu.capture(both, same_iterations=True), repeats=3)
        told += f"; launch by launch {seconds * 1e3:.2f} ms"
    bench.add(f"FPMamba {width}, {mixer}, {way}, {gradient}", (*shape, width), recorded, None, note=told)


def _memory(bench: Bench, shape: tuple[int, int], width: int) -> None:
    """The most memory that a training step holds, for few iterations and for many."""
    import cupy

    from fpnumba import nn

    x = cupy.asarray(np.random.default_rng(1).standard_normal((*shape, width)).astype(np.float32))
    for count in (4, 60):  # too few for a solve that settles
        solver = fp.Solver("parallel", rtol=1e-30, max_iter=count, **QUIET)
        layer = nn.FPMamba(width, solver=solver, adjoint=fp.Adjoint("one-step"))
        params = {n: cupy.asarray(v) for n, v in layer.init(np.random.default_rng(0)).items()}
        clean()
        y, pullback = layer.vjp(params, x)
        pullback(y)
        cupy.cuda.Device().synchronize()
        bench.facts[f"bytes held at most, {count} iterations"] = cupy.get_default_memory_pool().total_bytes()
        del y, pullback
        clean()


def _update_case(bench: Bench, width: int, mixer: str, precision: str) -> None:
    """An update of ``fpnumba train a5 --preset gpu`` at its full length: data, network, gradient, clipping, AdamW."""
    from fpnumba import tasks
    from fpnumba.train.build import build_model, build_optimizer, initial_params
    from fpnumba.train.config import preset
    from fpnumba.train.device import OnDevice

    config = preset("gpu", "a5")
    layer = {**config.model["layer"], "mixer": mixer}
    config = config.replace(model={"d_model": width, "layer": layer}, precision=precision)
    params, optimizer = initial_params(config, build_model(config)), build_optimizer(config)
    work = OnDevice(config, tasks.get(config.task), optimizer, params, optimizer.init(params), 0)
    seconds = seconds_on_device(lambda: work.advance(config.length), repeats=3)
    case = f"update of the A5 network, {mixer}, d_model {width}, {precision}"
    bench.add(case, (config.batch, config.length), seconds, None)


def run(*, quick: bool, peers: bool, report: Callable[[Row], None]) -> dict[str, Any]:
    """Measure every case, hand each row to `report` as it comes, and return the machine-readable record."""
    import cupy
    import ml_dtypes

    bench = Bench(report)
    solver = fp.Solver(rtol=RTOL, **QUIET)
    iterated = fp.Solver("sequential", rtol=RTOL, **QUIET)
    small = (16, 256, 512)
    for shape in (small,) if quick else SCANS:
        _scan_case(bench, shape)
        clean()
    for shape in (small,) if quick else SELECTIVES:
        for name, dtype in (("float32", cupy.float32), ("bfloat16", ml_dtypes.bfloat16)):
            _selective_case(bench, shape, dtype, name)
            clean()
    values: dict[tuple[int, ...], float] = {}
    for shape in (small,) if quick else SOLVES:
        p = low_rank_problem(shape, 1, cupy.float32)
        values[shape], _ = _solve_case(bench, "fixed_point_rnn, direct", p, solver)
        _solve_case(bench, "fixed_point_rnn, sequential", p, iterated)
        del p
        clean()
    _replayed(bench, small if quick else SOLVES[-1], solver)
    clean()
    main = small if quick else (256, 512, 1024)
    p = low_rank_problem(main, 1, cupy.float32)
    times = {}
    for count in (1, 2, 4, 8):
        few = fp.Solver("sequential", rtol=RTOL, max_iter=count, **QUIET)
        times[count], _ = _solve_case(bench, f"fixed_point_rnn, {count} iterations", p, few, gradient=False)
    bench.facts["iterations 1 to 8, slowest over fastest"] = max(times.values()) / min(times.values())
    del p
    clean()
    for name, dtype in (("float16", cupy.float16), ("bfloat16", ml_dtypes.bfloat16)):
        p = low_rank_problem(main, 1, dtype)
        half, _ = _solve_case(bench, f"fixed_point_rnn, direct, {name}", p, solver)
        bench.facts[f"{name} over float32"] = values[main] / half
        del p
        clean()
    wide = small if quick else (64, 2048, 1024)
    for rank in (4, 8):
        p = low_rank_problem(wide, rank, cupy.float32)
        _solve_case(bench, f"fixed_point_rnn, direct, rank {rank}", p, solver)
        del p
        clean()
    chunked = fp.Solver("chunked", rtol=RTOL, **QUIET)
    factor = 16 if quick else 32
    p = kronecker_problem(wide, factor)
    # two products of d1 x d1 x d2 and d1 x d2 x d2 for each step and iteration
    other = wide[2] // factor
    per = 2.0 * wide[0] * wide[1] * factor * other * (factor + other)
    _solve_case(bench, "fixed_point_rnn, Kronecker", p, chunked, per_iteration=per)
    del p
    clean()
    p = monarch_problem(small if quick else (64, 512, 1024), 64)
    per = 2.0 * p["x"].size * 64
    _solve_case(bench, "fixed_point_rnn, Monarch 64", p, chunked, per_iteration=per)
    del p
    clean()
    if peers:
        _peers(bench, wide, values[wide], solver)
    return _record(bench)


def layers(*, quick: bool, report: Callable[[Row], None]) -> dict[str, Any]:
    """The same of layers and of updates of a network, which have a record of their own."""
    bench = Bench(report)
    for shape, mixer, way, gradient in LAYERS:
        if not quick or shape == LAYERS[0][0]:
            _layer_case(bench, (8, 17) if quick else shape, mixer, way, gradient, 64 if quick else 512)
            clean()
    _memory(bench, (8, 17) if quick else LAYERS[0][0], 64 if quick else 512)
    for width, mixer, precision in UPDATES:
        if not quick:
            _update_case(bench, width, mixer, precision)
            clean()
    return _record(bench)


def _record(bench: Bench) -> dict[str, Any]:
    import cupy

    return {
        "device": cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "copy_bytes_per_second": bench.copies,
        "float32_operations_per_second": bench.rate,
        "float32_exponentials_per_second": bench.exps,
        "facts": bench.facts,
        "rows": [row.as_dict() for row in bench.rows],
    }


def _wall(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of a call that waits for the device."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _peers(bench: Bench, shape: tuple[int, int, int], ours: float, solver: fp.Solver) -> None:
    """JAX and torch on the same arrays; a peer whose answer is another one does not count."""
    import cupy

    p = low_rank_problem(shape, 1, cupy.float32)
    u, alpha = p["mixer"].params
    arrays = (p["lam"], cupy.ascontiguousarray(u[..., 0, :]), alpha, p["x"])
    answer = fp.fixed_point_rnn(p["lam"], p["mixer"], p["x"], solver=solver).value
    scale = float(cupy.abs(answer).max())

    def keep(name: str, call: Callable[[], Any]) -> None:
        found = cupy.from_dlpack(call())
        error = float(cupy.abs(found - answer).max()) / scale
        assert error < 1e-4, f"{name}: the answer differs by {error:.1e}"
        del found
        seconds = _wall(call)
        bench.facts[f"{name} over fixed_point_rnn"] = seconds / ours
        bench.add(name, shape, seconds, None, note=f"{seconds / ours:.0f} x as long")

    from bench import peers

    def attempt(name: str, make: Callable[[], Callable[[], Any]]) -> None:
        try:
            keep(name, make())
        except Exception as reason:  # a peer that does not run is said, not hidden
            bench.facts[name] = f"did not run: {type(reason).__name__}: {str(reason)[:200]}"
        clean()

    def jax_loop(function: Callable[..., Any]) -> Callable[[], Any]:
        import jax

        theirs = [jax.dlpack.from_dlpack(a) for a in arrays]
        return lambda: function(*theirs).block_until_ready()

    def torch_loop() -> Callable[[], Any]:
        import torch

        theirs = [torch.from_dlpack(a) for a in arrays]
        function = peers.torch_iteration(20)

        def call() -> Any:
            found = function(*theirs)
            torch.cuda.synchronize()
            return found

        return call

    attempt("JAX jit, loop of associative_scan", lambda: jax_loop(peers.jax_iteration(RTOL)))
    attempt("JAX jit, lax.scan, direct", lambda: jax_loop(peers.jax_direct()))
    attempt("torch.compile, loop of associative_scan", torch_loop)
