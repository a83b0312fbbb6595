"""Every kernel of the GPU compiles for real architectures, and takes no more of them than it did.

No device, driver or toolkit is needed, only NVRTC: ``pip install -e ".[cuda-check]"``.
"""

import gpu_resources
import pytest

# The list of a module is a choice, not everything there is: it is compiled again and again.
MOST = 40


@pytest.mark.parametrize("module", gpu_resources.modules())
def test_modules_say_what_stands_for_their_kernels(module: str) -> None:
    names = [gpu_resources.key(kernel) for kernel in gpu_resources.representatives(module)]
    assert 0 < len(names) <= MOST
    assert len(set(names)) == len(names)


def test_no_kernel_is_left_out() -> None:
    told = {(kernel.file, kernel.function) for kernel in gpu_resources.everything()}
    assert told == gpu_resources.entries()


def test_kernels_compile_within_the_table() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason='no NVRTC: pip install -e ".[cuda-check]"')
    todo = gpu_resources.jobs(gpu_resources.everything())
    done = gpu_resources.run(todo)
    failed = [f"{one.key} on {one.architecture}:\n{one.log}" for one in done if one.used is None]
    assert not failed, "\n\n".join(failed)
    known = gpu_resources.table()
    if known["nvrtc"] != gpu_resources.version():
        pytest.skip(
            f"compiled, but the table is of NVRTC {known['nvrtc']} and this is {gpu_resources.version()}: "
            'pip install -e ".[cuda-check]"'
        )
    found = gpu_resources.complaints(done, known)
    found += [f"{name}: in the table, but nothing stands for it" for name in gpu_resources.stale(todo, known)]
    assert not found, "\n".join([*found, "python tests/gpu_resources.py --update writes the table anew"])


def test_what_is_worse_is_found() -> None:
    used = gpu_resources.Used(40, 0, 0)
    known = {"kernels": {"a": {"sm_90": list(used)}}}

    def complaints(key: str, now: gpu_resources.Used, architecture: str = "sm_90") -> list[str]:
        return gpu_resources.complaints([gpu_resources.Done(key, architecture, now, "", 0.0)], known)

    assert not complaints("a", used._replace(registers=48))
    assert "49 registers, 40 in the table" in complaints("a", used._replace(registers=49))[0]
    assert "16 bytes of spills" in complaints("a", used._replace(spills=16))[0]
    assert "8 bytes of stack" in complaints("a", used._replace(stack=8))[0]
    assert "not in the table" in complaints("b", used)[0]
    assert "not in the table" in complaints("a", used, "sm_80")[0]


def test_log_of_ptxas_is_read() -> None:
    log = """ptxas info    : Compiling entry function 'other' for 'sm_90'
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compiling entry function 'mine' for 'sm_90'
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 472 bytes cmem[0]"""
    assert gpu_resources.read(log, "mine") == (32, 0, 0)
    assert gpu_resources.read(log, "other") == (255, 8, 16)
    with pytest.raises(ValueError, match="nobody"):
        gpu_resources.read(log, "nobody")
