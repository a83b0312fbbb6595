"""What kernels of the GPU take: compiled by NVRTC, with no device, no driver and no toolkit.

``python tests/gpu_resources.py --update`` writes the table anew, `gpu/kernels/resources.json`; without the option it
shows how what is there now differs from the table. Both need ``pip install -e ".[cuda-check]"``.
"""

import argparse
import importlib
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).resolve().parents[1] / "gpu" / "kernels" / "resources.json"

# All are compiled for the first; a part of them, taken evenly from each file, for the others too.
ARCHITECTURES = ("sm_90", "sm_80", "sm_100")
# What CuPy adds to the options of a kernel.
CUPY = ("-ftz=true", "--device-as-default-execution-space")
# How many of a file's kernels are compiled for the others.
ELSEWHERE = 2
# Registers that a kernel may take beyond the table.
ALLOWED = 8

Kernel = Any


class Used(NamedTuple):
    """What one kernel takes on one architecture: registers of a thread, the rest in bytes."""

    registers: int
    stack: int
    spills: int


class Job(NamedTuple):
    """One compilation; plain text, so that another process can do it."""

    key: str
    architecture: str
    function: str
    source: str
    options: tuple[str, ...]


class Done(NamedTuple):
    """What became of it: `used` is None where it failed."""

    key: str
    architecture: str
    used: Used | None
    log: str
    seconds: float


def modules() -> list[str]:
    """The modules of the GPU room that have kernels of their own: each says by `representative()` which shape classes
    stand for all.
    """
    paths = [
        path
        for folder in importlib.import_module("fpnumba.gpu").__path__
        for path in Path(folder).glob("*.py")
    ]
    texts = {path.stem: path.read_text(encoding="utf-8") for path in paths if path.stem != "_device"}
    return sorted(
        name for name, text in texts.items() if "Kernel.of(" in text or "def representative" in text
    )


def representatives(module: str) -> list[Kernel]:
    """The shape classes that stand for all of a module's. No device is asked, so that they are the same everywhere."""
    import simt

    with simt.device():
        return list(importlib.import_module(f"fpnumba.gpu.{module}").representative())


def everything() -> list[Kernel]:
    """Those of all modules."""
    return [kernel for module in modules() for kernel in representatives(module)]


def entries() -> set[tuple[str, str]]:
    """File and name of every kernel there is."""
    from fpnumba.gpu import _device

    found = set()
    for path in _device.KERNELS.glob("*.cu"):
        text = re.sub(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)", "", path.read_text(encoding="utf-8"))
        found |= {(path.name, name) for name in re.findall(r"__global__[\w\s]*?\b(\w+)\s*\(", text)}
    return found


def key(kernel: Kernel) -> str:
    """How the table calls a kernel."""
    return " ".join([kernel.file, kernel.function, *(f"{name}={value}" for name, value in kernel.macros)])


def jobs(kernels: Iterable[Kernel]) -> list[Job]:
    """The compilations that are done for these kernels, each once."""
    from fpnumba.gpu import _device

    unique = {key(kernel): kernel for kernel in kernels}
    files: dict[str, list[str]] = {}
    for name, kernel in sorted(unique.items()):
        files.setdefault(kernel.file, []).append(name)
    many = {name for names in files.values() for name in names[:: -(-len(names) // ELSEWHERE)]}

    def runs(kernel: Kernel, architecture: str) -> bool:
        clusters = dict(kernel.macros).get("CLUSTER", "1") != "1"
        return not (clusters and architecture == "sm_80")  # which has none

    return [
        Job(name, architecture, kernel.function, _device.source(kernel.file), kernel.options)
        for name, kernel in sorted(unique.items())
        for architecture in (ARCHITECTURES if name in many else ARCHITECTURES[:1])
        if runs(kernel, architecture)
    ]


def version() -> str:
    """Of NVRTC."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def read(log: str, function: str) -> Used:
    """What ptxas says of a function in its log."""
    part = log.split(f"Compiling entry function '{function}'")[-1].split("Compiling entry function")[0]
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
    registers = re.search(r"Used (\d+) registers", part)
    if not stack or not registers:
        raise ValueError(f"{function} is not in the log of ptxas:\n{log}")
    return Used(int(registers.group(1)), int(stack.group(1)), int(stack.group(2)) + int(stack.group(3)))


def compiled(job: Job) -> Done:
    """Compile for a real architecture, down to what the device runs."""
    from cuda.bindings import nvrtc

    def fine(answer: tuple[Any, ...]) -> Any:
        if answer[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC: {answer[0]}")
        return answer[1] if len(answer) > 1 else None

    begun = time.perf_counter()
    program = fine(nvrtc.nvrtcCreateProgram(job.source.encode(), job.function.encode(), 0, [], []))
    options = [*job.options, *CUPY, f"-arch={job.architecture}", "--ptxas-options=-v"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
    log = b" " * fine(nvrtc.nvrtcGetProgramLogSize(program))
    fine(nvrtc.nvrtcGetProgramLog(program, log))
    fine(nvrtc.nvrtcDestroyProgram(program))
    told = log.rstrip(b"\0 \n").decode()
    used = read(told, job.function) if status == nvrtc.nvrtcResult.NVRTC_SUCCESS else None
    return Done(job.key, job.architecture, used, told, time.perf_counter() - begun)


def run(todo: list[Job], processes: int = 2) -> list[Done]:
    """Compile all."""
    if not todo:
        return []
    fresh = multiprocessing.get_context("spawn")
    # long ones first; long sources come near to that
    todo = sorted(todo, key=lambda job: -len(job.source))
    with ProcessPoolExecutor(processes, mp_context=fresh) as pool:
        return list(pool.map(compiled, todo))


def table() -> dict[str, Any]:
    """The table as committed: what was compiled by which NVRTC."""
    return dict(json.loads(TABLE.read_text(encoding="utf-8")))


def write(done: Iterable[Done]) -> None:
    """Write the table, a line for each kernel."""
    kernels: dict[str, dict[str, Used]] = {}
    for one in done:
        if one.used is None:
            raise RuntimeError(f"{one.key} on {one.architecture}:\n{one.log}")
        kernels.setdefault(one.key, {})[one.architecture] = one.used
    lines = [
        f"    {json.dumps(name)}: " + json.dumps({a: list(used[a]) for a in ARCHITECTURES if a in used})
        for name, used in sorted(kernels.items())
    ]
    fields = json.dumps(Used._fields)
    body = ",\n".join(lines)
    text = f'{{\n  "nvrtc": "{version()}",\n  "fields": {fields},\n  "kernels": {{\n{body}\n  }}\n}}\n'
    TABLE.write_text(text, encoding="utf-8")


def complaints(done: Iterable[Done], known: Mapping[str, Any]) -> list[str]:
    """What is worse than the table says, or is not in it."""
    found = []
    for one in done:
        place = f"{one.key} on {one.architecture}"
        if one.used is None:
            continue
        row = known["kernels"].get(one.key, {}).get(one.architecture)
        if row is None:
            found.append(f"{place}: not in the table")
            continue
        before = Used(*row)
        if one.used.registers > before.registers + ALLOWED:
            found.append(f"{place}: {one.used.registers} registers, {before.registers} in the table")
        for what in ("stack", "spills"):
            now, then = getattr(one.used, what), getattr(before, what)
            if now > then:
                found.append(f"{place}: {now} bytes of {what}, {then} in the table")
    return found


def stale(todo: Iterable[Job], known: Mapping[str, Any]) -> list[str]:
    """Rows of the table that no kernel answers to."""
    return sorted(set(known["kernels"]) - {job.key for job in todo})


def main() -> int:
    """Update the table, or say how it differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the table anew")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    todo = jobs(everything())
    done = run(todo, given.processes)
    for one in sorted(done):
        print(f"{one.seconds:5.1f} s  {one.architecture:7}{one.used and tuple(one.used)}  {one.key}")
        if one.used is None:
            print(one.log)
    print(f"{len(done)} compilations, {sum(one.seconds for one in done):.0f} s")
    if given.update:
        write(done)
        return 0
    known = table()
    found = complaints(done, known) + [f"{name}: in the table only" for name in stale(todo, known)]
    print("\n".join(found))
    return int(len(found) > 0 or any(one.used is None for one in done))


if __name__ == "__main__":
    sys.exit(main())
