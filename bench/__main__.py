"""``python -m bench``: speed as ratios. Run from the root of the repository."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.timing import Row, table


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with what."""
    packages = {}
    for name in ("fpnumba", "numpy", "numba", "numba-cuda", "cupy-cuda12x", "cupy-cuda13x", "jax", "torch"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "packages": packages}


def _cpu(options: argparse.Namespace, report: Callable[[Row], None], rows: list[Row]) -> dict[str, Any]:
    """Run the CPU's cases and print their table."""
    from bench import cpu

    if options.layers:
        record = cpu.layers(peers=not options.no_peers, report=report)
    else:
        record = cpu.run(quick=options.quick, peers=not options.no_peers, report=report)
    record["machine"] = machine()
    copies = record["copy_bytes_per_second"]
    print(f"{record['machine']['cpu']}, {record['threads']} threads, float32")
    low, high = min(copies) / 1e9, max(copies) / 1e9
    print(f"copy bandwidth {low:.1f} to {high:.1f} GB/s, measured beside every case\n")
    print(table(rows))
    for method, fit in record["scaling"].items():
        first, last = fit["powers"][0], fit["powers"][-1]
        print(f"\n{method}: time grows as T^{fit['exponent']:.2f} from 2^{first} to 2^{last} steps")
    return record


def _gpu(options: argparse.Namespace, report: Callable[[Row], None], rows: list[Row]) -> dict[str, Any]:
    """Run the GPU's cases and print their table."""
    from bench import gpu

    if options.layers:
        record = gpu.layers(quick=options.quick, report=report)
    else:
        record = gpu.run(quick=options.quick, peers=not options.no_peers, report=report)
    record["machine"] = machine()
    copies, rate = record["copy_bytes_per_second"], record["float32_operations_per_second"]
    print(f"{record['device']}, float32 unless said")
    print(f"copy bandwidth {copies[0] / 1e12:.2f} TB/s, float32 {rate / 1e12:.1f} TFLOP/s\n")
    print(table(rows, floor="of floor"))
    for name, value in record["facts"].items():
        print(f"{name}: {value if isinstance(value, str) else format(value, '.3g')}")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--backend", choices=["cpu", "gpu"], default="cpu", help="room to measure (default: cpu)"
    )
    parser.add_argument("--quick", action="store_true", help="smaller shapes: a minute, not for quoting")
    parser.add_argument("--layers", action="store_true", help="only layers, and on a GPU also training")
    parser.add_argument("--no-peers", action="store_true", help="leave out JAX and torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole record there as well")
    options = parser.parse_args()
    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        print(f"measured {row.case} {row.shape}: {row.seconds * 1e3:.3g} ms", file=sys.stderr)

    show = {"cpu": _cpu, "gpu": _gpu}[options.backend]
    record = show(options, report, rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
