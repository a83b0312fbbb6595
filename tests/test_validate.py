"""The yardstick measured: what is right passes, what is wrong by a little, or in kind, does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pretend
import pytest

from fpnumba import cli, validate
from fpnumba.arrays import Room
from fpnumba.cpu import scan as cpu_scan

SMALL = ((2, 9, 6), (0, 3, 4), (2, 0, 4))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes on which the whole grid is a matter of seconds."""
    monkeypatch.setattr(validate, "SHAPES", {"quick": SMALL[:1], "full": SMALL})


def only(monkeypatch: pytest.MonkeyPatch, *primitives: str) -> None:
    """Leave these primitives of the grid."""
    cases = validate.cases

    def fewer(rng: np.random.Generator, shape: validate.Shape) -> Any:
        return (case for case in cases(rng, shape) if case.primitive in primitives)

    monkeypatch.setattr(validate, "cases", fewer)


def break_scan(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> list[validate.Row]:
    """Verdicts on a room whose scan is changed."""
    only(monkeypatch, "linear_scan", "linear_scan vjp")
    scan = cpu_scan.linear_scan
    monkeypatch.setattr(cpu_scan, "linear_scan", lambda *args: change(scan(*args)))
    rows = validate.run(["cpu"])
    assert [row.ok for row in rows if row.primitive == "linear_scan vjp"] == [True, True]
    return [row for row in rows if row.primitive == "linear_scan"]


@pytest.mark.parametrize("room", ["reference", "cpu"])
def test_every_primitive_meets_its_bound(room: str) -> None:
    rows = validate.run([room])
    missed = [validate.line(row) for row in rows if not row.ok]
    assert missed == []
    assert all(row.shapes == len(SMALL) for row in rows)
    assert len({(row.primitive, row.dtype) for row in rows}) == len(rows)


def test_the_grid_covers_every_primitive() -> None:
    names = {case.primitive for case in validate.cases(np.random.default_rng(0), (1, 2, 4))}
    mixers = ["dplr r=1", "dplr r=3", "householder r=1", "householder r=3"]
    others = ["kronecker", "monarch", "dense", "fixed", "a user's own"]
    ways = ["parallel", "chunked", "chunked by 7", "sequential"]
    for mixer in mixers + others:
        what = ["apply", "apply_transpose", "cotangent", "one iteration, both ways", "rnn_cotangents"]
        for solve in ("solve", "solve adjoint"):
            what += [f"{solve}, {way}" for way in ways + (["direct"] if mixer in mixers else [])]
        assert {f"{mixer}: {one}" for one in what} <= names
    for scan in ("linear_scan", "linear_scan reverse", "selective_scan mamba", "selective_scan mamba2"):
        assert {scan, f"{scan} vjp"} <= names
    for mixer in ("householder r=1", "householder r=3", "kronecker", "fixed"):
        assert {f"{mixer}: matrix state", f"{mixer}: matrix state, gradient"} <= names


@pytest.mark.parametrize("size", [1e-5, -1e-5, np.nan, np.inf])
def test_a_wrong_number_is_a_miss(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def nudge(h: Any) -> Any:
        wrong = h.copy()
        wrong[..., -1:, :1] += h.dtype.type(size)
        return wrong

    rows = break_scan(monkeypatch, nudge)
    assert [row.ok for row in rows] == [False, False]
    # the shape with steps is named, also where empty shapes come after it
    assert all(row.worst == [2, 9, 6] for row in rows)
    assert all("MISS at shape (2, 9, 6)" in validate.line(row) for row in rows)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h.astype(np.float16), "float16"),
        (lambda h: h[..., :-1, :], "(2, 8, 6)"),
        (lambda h: 1 // 0, "ZeroDivisionError"),
    ],
)
def test_a_wrong_kind_is_a_miss(
    change: Callable[[Any], Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = break_scan(monkeypatch, change)
    assert [row.ok for row in rows] == [False, False]
    assert all(says in row.failure for row in rows)


def test_a_solve_that_did_not_converge_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    from fpnumba.cpu import solve as cpu_solve

    only(monkeypatch, "fixed: solve, parallel")
    solve = cpu_solve.solve

    def hurried(*args: Any, **options: Any) -> Any:
        return solve(*args, **{**options, "max_iter": 2})

    monkeypatch.setattr(cpu_solve, "solve", hurried)
    rows = validate.run(["cpu"])
    assert [row.ok for row in rows] == [False, False]
    assert all("status [1]" in row.failure for row in rows)


def test_truth_is_asked_on_the_rounded_inputs() -> None:
    """A room is not blamed for the rounding of its inputs: the reference sees the same float32 numbers."""
    x = np.array([1.0 + 1e-9])

    def same(room: Room, args: validate.Args, rtol: float) -> Any:
        return (args["x"],)

    case = validate.Case("nothing", {"x": x}, same)
    row = validate.Row("reference", "nothing", "float32")
    validate._judge(row, (1, 1, 1), case, validate._Reference())
    assert row.error == 0.0


@pytest.mark.parametrize("good", [True, False])
def test_the_command_prints_verdicts_and_exits_by_them(
    good: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    only(monkeypatch, "linear_scan")
    if not good:
        scan = cpu_scan.linear_scan
        monkeypatch.setattr(cpu_scan, "linear_scan", lambda *args: scan(*args) * 1.001)
    record = tmp_path / "verdicts.json"
    command = ["validate", "--quick", "--room", "cpu", "--json", str(record)]
    assert cli.main(command) == (0 if good else 1)
    out = capsys.readouterr().out
    assert "verdict" in out
    assert out.splitlines()[-1] == f"2 rows, {'all within their bounds' if good else '2 MISSED'}"
    assert out.count(" ok\n") == (2 if good else 0)
    verdicts = json.loads(record.read_text())
    assert verdicts["ok"] is good
    assert [row["dtype"] for row in verdicts["rows"]] == ["float32", "float64"]
    assert cli.main(command) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert json.loads(record.read_text()) == verdicts


def test_columns_line_up(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "linear_scan", "a user's own: one iteration, both ways")
    rows = validate.run(["reference"])
    lines = validate.table(rows).splitlines()
    head = next(line for line in lines if line.startswith("room"))
    start = head.index("verdict")
    assert all(line[start:] == "ok" for line in lines[lines.index(head) + 1 : -1])


def test_a_machine_without_a_device_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fpnumba.gpu

    only(monkeypatch, "linear_scan")
    monkeypatch.setattr(fpnumba.gpu, "absent", lambda: "there is none")
    assert validate.rooms_present() == ["cpu"]
    assert cli.main(["validate", "--quick"]) == 0
    assert capsys.readouterr().out.startswith("room gpu: no device, so not validated: there is none\n")
    assert cli.main(["validate", "--quick", "--room", "gpu"]) == 2
    assert "'gpu' is not present here (there is cpu): there is none" in capsys.readouterr().err
    monkeypatch.setattr(fpnumba.gpu, "absent", lambda: None)
    assert validate.rooms_present() == ["cpu", "gpu"]


def test_what_the_gpu_room_has_not_is_no_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(room: Room, args: validate.Args, rtol: float) -> Any:
        if room.name != "reference":
            raise NotImplementedError("no such kernels\nyet")
        return (args["x"],)

    case = validate.Case("nothing", {"x": np.ones(1)}, missing)
    rows = [validate.Row(room, "nothing", "float32") for room in ("cpu", "gpu")]
    with pretend.device():
        for row in rows:
            validate._judge(row, (1, 1, 1), case, validate._Reference())
    cpu, gpu = rows
    assert (cpu.ok, cpu.failure) == (False, "NotImplementedError: no such kernels")
    assert (gpu.ok, gpu.failure, gpu.absent) == (True, "", "no such kernels")
    assert "not in this room: no such kernels" in validate.line(gpu)
    assert validate.footer([gpu]) == "1 rows, all within their bounds, 1 not in their room"
    assert gpu.as_dict()["absent"] == "no such kernels"


def test_a_device_is_given_its_own_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a device that is not there, but for the room's doors."""
    only(monkeypatch, "linear_scan", "dplr r=3: solve, direct")
    with pretend.device() as host:
        host.current.append(0)
        rows = validate.run(["gpu"])
    assert [row.ok for row in rows] == [True] * 4
    assert host.dtypes == {"float32", "float64"}
