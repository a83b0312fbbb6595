"""The ``fpnumba`` command: info, validate, train, evaluate, plot, import-weights."""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from fpnumba import train as training

# Whatever a subcommand needs is imported when it runs: --help is for people who wait for it.

FOUND_WRONG, USER_ERROR, INTERRUPTED = 1, 2, 130


class UserError(Exception):
    """Something that the user can put right; one line."""


class Failure(Exception):
    """Something that went wrong in the work itself; one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process if left out.

    Returns
    -------
    int
        Exit code: 0, or 1 if something was found wrong, 2 for a user's error, 130 if interrupted.

    Examples
    --------
    >>> from fpnumba.cli import main
    >>> main(["info", "--json"])  # doctest: +ELLIPSIS
    {...}
    0
    """
    try:
        options = _parser().parse_args(argv)
        code: int = options.command(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"fpnumba: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except Failure as error:
        print(f"fpnumba: {' '.join(str(error).split())}", file=sys.stderr)
        return FOUND_WRONG
    except KeyboardInterrupt:
        print("fpnumba: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `fpnumba validate | head`: the reader has seen enough, and Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FOUND_WRONG


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Make one line of what goes wrong for reasons outside the library; a bug of ours keeps its traceback."""
    from fpnumba import train

    try:
        yield
    except (train.CheckpointError, train.RunError, train.ConfigError, train.MissingExtra) as error:
        raise UserError(str(error)) from error
    except (train.WeightsError, train.ParallelError) as error:
        raise UserError(str(error)) from error
    except train.TrainingError as error:
        raise Failure(str(error)) from error
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error


# --- info -------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    from fpnumba.info import gather, text

    facts = gather()
    print(json.dumps(facts, indent=2) if options.json else text(facts))
    return 0


# --- validate ---------------------------------------------------------------------------------


def _validate(options: argparse.Namespace) -> int:
    from fpnumba import validate

    present = validate.rooms_present()
    absent = validate.rooms_absent()
    for room in options.room or ():
        if room not in present:
            why = f": {absent[room]}" if room in absent else ""
            raise UserError(
                f"argument --room: {room!r} is not present here (there is {', '.join(present)}){why}"
            )
    if options.json is not None and options.json.exists():
        raise UserError(f"argument --json: {options.json} exists, and nothing is overwritten")
    for room, why in absent.items() if options.room is None else ():
        print(f"room {room}: no device, so not validated: {why}")
    print(validate.header(), flush=True)
    rows = validate.run(
        options.room,
        quick=options.quick,
        seed=options.seed,
        report=lambda row: print(validate.line(row), flush=True),
    )
    print(validate.footer(rows))
    if options.json is not None:
        with _user_errors():
            record = {"ok": all(row.ok for row in rows), "rows": [row.as_dict() for row in rows]}
            options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.ok for row in rows) else FOUND_WRONG


# --- train ------------------------------------------------------------------------------------

# Options of `fpnumba train` that are options of the configuration, and what they are called there.
_OVERRIDES = {
    "seed": "seed",
    "steps": "steps",
    "batch": "batch",
    "length": "length",
    "lr": "learning_rate",
    "dtype": "dtype",
    "device": "device",
    "precision": "precision",
    "target": "target_accuracy",
    "baseline": "baseline",
    "lengths": "eval_lengths",
}


def _train(options: argparse.Namespace) -> int:
    from fpnumba import train

    with _user_errors():
        group = train.group()
    try:
        with _user_errors(), group.together():
            return _trained(options, group)
    except Exception:
        if group.rank == 0:
            raise
        return 0  # what went wrong in all processes is said by the first


def _trained(options: argparse.Namespace, group: "training.Group") -> int:
    from fpnumba import train

    train.need_all("safetensors", "tqdm", "matplotlib")
    config, folder = group.first(lambda: _wanted(options))
    model = train.build_model(config)
    held_config = train.baseline_of(config) if config.baseline else None
    outcome = train.run(
        config,
        folder.path,
        resume=options.resume is not None,
        minutes=options.minutes,
        quiet=options.quiet,
        label="fixed point" if model.iterates else str(model.layer_options["kind"]),
        group=group,
    )
    if held_config is not None and outcome.reason != "interrupted":
        # The same updates on the same sequences, so that the iterations are all that differs.
        held = train.run(
            held_config,
            folder.baseline.path,
            resume=group.first(folder.baseline.holds_run),
            stop=outcome.step,
            quiet=options.quiet,
            label="one iteration",
            group=group,
        )
        if held.reason == "interrupted":
            outcome = held
    if outcome.reason == "interrupted":
        if group.rank == 0:
            where = f"at step {outcome.step}; go on with: fpnumba train --resume {folder.path}"
            print(f"fpnumba: interrupted {where}", file=sys.stderr)
        return INTERRUPTED
    group.first(lambda: _judged(options, folder, outcome))
    return 0


def _wanted(options: argparse.Namespace) -> "tuple[training.Config, training.Folder]":
    """What to train, and where."""
    from fpnumba import train

    if options.resume is not None:
        return _resumed(options)
    config = _configured(options)
    folder = train.Folder(options.out or Path("runs") / f"{_short(config.task)}-{options.preset}")
    folder.refuse_occupied()
    return config, folder


def _judged(options: argparse.Namespace, folder: "training.Folder", outcome: "training.Outcome") -> None:
    """What is said and drawn at the end of training."""
    from fpnumba import train

    if not options.quiet:
        ends = {"steps": "all steps made", "target": "target accuracy reached", "minutes": "out of time"}
        said = f"{ends[outcome.reason]}: step {outcome.step}, {outcome.seconds:.0f} s of training"
        print(f"{said}\n", file=sys.stderr)
    print(train.table(train.evaluate(folder.path)))
    pictures = train.plot(folder.path)
    if not options.quiet:
        _say_written(pictures)


def _short(task: str) -> str:
    """The name of a task as part of the name of a folder; of a file its stem."""
    kind, colon, path = task.partition(":")
    name = f"{kind}-{Path(path).stem}" if colon else task
    return re.sub(r"[^\w.+-]+", "-", name)


def _configured(options: argparse.Namespace) -> "training.Config":
    from fpnumba import train
    from fpnumba.nn.model import PLAIN

    if options.task is None:
        raise UserError("argument TASK: missing; s3, for example (or --resume RUN)")
    config = train.preset(options.preset, options.task)
    changes: dict[str, Any] = {}
    for option, name in _OVERRIDES.items():
        if getattr(options, option) is not None:
            changes[name] = getattr(options, option)
    if "length" in changes:  # of all updates, whatever the preset's grow to
        changes["curriculum"] = ()
    model = dict(config.model)
    for assignment in sorted(options.set or (), key=lambda one: not one.startswith("model.layer.kind=")):
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"argument --set: {assignment!r} is not of the form NAME=VALUE")
        with contextlib.suppress(ValueError):  # a word needs no quotes
            value = json.loads(value)
        part, dot, key = name.partition(".")
        if not dot:
            changes[name] = value
        elif part == "model":
            if key == "layer.kind" and value in PLAIN:
                model["layer"] = {}  # the preset's options are those of a fixed point
            _assign(model, key, value)
        else:
            raise UserError(
                f"argument --set: {name!r}: only the model's options have dots (model.d_model=64)"
            )
    return train.Config.from_dict({**config.to_dict(), "model": model, **changes})


def _assign(options: dict[str, Any], name: str, value: Any) -> None:
    """``solver.rtol`` into the dict within the dict."""
    head, dot, rest = name.partition(".")
    if not dot:
        options[head] = value
        return
    inner = options.get(head, {})
    options[head] = dict(inner) if isinstance(inner, dict) else {}
    _assign(options[head], rest, value)


def _resumed(options: argparse.Namespace) -> "tuple[training.Config, training.Folder]":
    from fpnumba import train

    folder = train.Folder(options.resume)
    config = folder.config()
    given = [f"--{name}" for name in (*_OVERRIDES, "out", "set") if getattr(options, name) is not None]
    if given:
        raise UserError(f"argument {given[0]}: a resumed run keeps its own configuration")
    if options.task is not None and config.replace(task=options.task).task != config.task:
        raise UserError(
            f"argument TASK: {options.task!r}, and the run in {folder.path} is of {config.task!r}"
        )
    return config, folder


def _say_written(paths: Sequence[Path]) -> None:
    names = ", ".join(path.name for path in paths)
    print(f"\npictures in {paths[0].parent}: {names}", file=sys.stderr)


# --- evaluate, plot ---------------------------------------------------------------------------


def _evaluate(options: argparse.Namespace) -> int:
    from fpnumba import train

    with _user_errors():
        train.need_all("safetensors")
        judgement = train.evaluate(
            options.run,
            lengths=options.lengths,
            cuts=train.CUTS if options.iterations is None else options.iterations,
            batch=options.batch,
        )
        print(train.table(judgement))
    return 0


# What `fpnumba plot` draws besides, and the options of each.
_PLOTS = {
    "one run": (),
    "several runs": ("length",),
    "iterations": ("length", "chunk", "batch", "history"),
    "ways": ("lengths", "batch"),
}


def _plot(options: argparse.Namespace) -> int:
    from fpnumba import train

    words: list[str] = options.run
    what = "one run" if len(words) == 1 else "several runs"
    # A run whose folder is called so is still a run.
    if words[0] in ("iterations", "ways") and not train.Folder(words[0]).holds_run():
        what, words = words[0], words[1:]
        if len(words) != 1:
            raise UserError(f"argument RUN: plot {what} draws one run, not {len(words)}")
    given = {name: getattr(options, name) for name in ("length", "lengths", "chunk", "batch", "history")}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in _PLOTS[what]:
            of = [
                f"plot {kind}" if " " not in kind else kind for kind, names in _PLOTS.items() if name in names
            ]
            raise UserError(f"argument --{name}: is an option of {' and of '.join(of)}")
    with _user_errors():
        train.need_all("matplotlib")
        if what == "one run":
            written = train.plot(words[0], out=options.out)
        elif what == "several runs":
            written = train.compare(words, out=options.out, **given)
        else:
            train.need_all("safetensors")
            draw = train.plot_iterations if what == "iterations" else train.plot_ways
            written = draw(words[0], out=options.out, **given)
        _say_written(written)
    return 0


# --- import-weights ---------------------------------------------------------------------------


def _import_weights(options: argparse.Namespace) -> int:
    from fpnumba import train

    with _user_errors():
        train.need_all("safetensors")
        found = train.import_weights(options.file, options.out, config=options.config)
    layer, arrays = found.layer, found.params.values()
    numbers, dtype = sum(array.size for array in arrays), next(iter(arrays)).dtype
    print(f"{type(layer).__name__}, d_model {layer.d_model}, mixer {layer.mixer}")
    print(f"{len(arrays)} arrays, {numbers} numbers of {dtype}, all finite")
    print(f"a forward pass over noise: {found.iterations} iterations, output finite")
    print(f"written to {found.path}; fpnumba.train.load_weights({str(options.out)!r}) gives (layer, params)")
    return 0


# --- the arguments ----------------------------------------------------------------------------


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return value


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of minutes")
    return value


def _version() -> str:
    import fpnumba

    return fpnumba.__version__


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fpnumba",
        description="Fixed-Point RNNs on NumPy and Numba: train one, judge it, check the kernels here.",
        epilog="fpnumba COMMAND --help says more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"fpnumba {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    info = commands.add_parser(
        "info",
        help="versions, threads, rooms, where compiled kernels are kept",
        description="What this installation is and what it would compute with.",
    )
    info.add_argument("--json", action="store_true", help="the same, for programs")
    info.set_defaults(command=_info)

    validate = commands.add_parser(
        "validate",
        help="hold every primitive on this machine to the reference",
        description=(
            "Run every primitive, value and gradient, of every room present over a grid of shapes and "
            "dtypes, compare with the reference in float64, and print error, bound and verdict. The exit "
            "code is 1 if any bound is missed. The first run compiles the kernels, which takes longer."
        ),
    )
    validate.add_argument("--quick", action="store_true", help="fewer and smaller shapes")
    validate.add_argument("--room", action="append", metavar="ROOM", help="only this room (may be repeated)")
    validate.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    validate.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there as well")
    validate.set_defaults(command=_validate)

    _train_parser(commands)

    evaluate = commands.add_parser(
        "evaluate",
        help="token accuracy and iterations of a trained run, by length",
        description=(
            "Judge a run on new sequences: its network, the same network held to one iteration if that was "
            "trained (--baseline), and the trained network with its iteration cut short. Prints a table and "
            "writes evaluation.json into the run (evaluation-2.json if there is one already, and so on)."
        ),
    )
    evaluate.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    evaluate.add_argument(
        "--lengths", type=_positive, nargs="+", metavar="N", help="sequence lengths (default: the run's own)"
    )
    evaluate.add_argument(
        "--iterations",
        type=_positive,
        nargs="*",
        metavar="K",
        help="where to cut the iteration (default: 1 2 4 8)",
    )
    evaluate.add_argument("--batch", type=_positive, metavar="N", help="sequences at each length")
    evaluate.set_defaults(command=_evaluate)

    plot = commands.add_parser(
        "plot",
        help="pictures of evaluated runs",
        usage="fpnumba plot [iterations | ways] RUN [RUN ...] [options]",
        description=(
            "Draw runs as PNG and SVG. One RUN: accuracy and iterations against length, and the loss, from the "
            "newest evaluation. Several: the same against length, and accuracy at a longer length against the "
            "time of training; runs that differ by the seed alone are one curve with its range. iterations RUN: "
            "iterations of the trained network over batch and time. ways RUN: the fixed points that it has step "
            "after step, chunk after chunk and all at once."
        ),
    )
    plot.add_argument("run", nargs="+", metavar="RUN", help="folder of a run")
    plot.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the pictures go (default: into the run; beside the first of several)",
    )
    plot.add_argument(
        "--length",
        type=_positive,
        metavar="N",
        help="iterations: of its sequences; several runs: at which time is compared (default: the longest)",
    )
    plot.add_argument(
        "--lengths",
        type=_positive,
        nargs="+",
        metavar="N",
        help="ways: sequence lengths (default: the run's own)",
    )
    plot.add_argument(
        "--chunk", type=_positive, metavar="N", help="iterations: steps of a chunk (default: length / 16)"
    )
    plot.add_argument("--batch", type=_positive, metavar="N", help="iterations, ways: number of sequences")
    plot.add_argument(
        "--history",
        action="store_true",
        default=None,
        help="iterations: draw the residual after each iteration as well",
    )
    plot.set_defaults(command=_plot)

    weights = commands.add_parser(
        "import-weights",
        help="bring over the weights of a published FPMamba or FPRNN",
        description=(
            "Read the state dict of a layer of the published PyTorch implementation, check that it fits its "
            "configuration, that all numbers are finite and that a forward pass is, and write a checkpoint "
            "that fpnumba.train.load_weights loads. Nothing is overwritten, and torch is not needed."
        ),
        epilog=(
            'The configuration is JSON: {"cls": "FPMamba", "d_model": 128, "config": {"mixer_type": '
            '"kronecker", ...}}, where "config" holds the arguments of the constructor by their published '
            'names; "train" and "optimizer" (of the fixed-point loop) may be there, too.'
        ),
    )
    weights.add_argument("file", type=Path, metavar="FILE.safetensors", help="the state dict")
    weights.add_argument(
        "--config",
        type=Path,
        metavar="CONFIG.json",
        help="its configuration (default: what the file's metadata hold under 'config')",
    )
    weights.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for the checkpoint")
    weights.set_defaults(command=_import_weights)
    return parser


def _train_parser(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a fixed-point RNN to track a group, or on another task",
        description=(
            "Train a fixed-point RNN on the word problem of a group, or on another task, judge it and draw the "
            "result. Ctrl-C or SIGTERM finishes the step, leaves a checkpoint and says how to go on. Nothing is "
            "overwritten. Under mpirun -n K, so many processes share every batch."
        ),
        epilog=(
            "TASK is a group (zN cyclic, sN symmetric, aN alternating, dN dihedral, q8, or factors joined by "
            "x, such as s3xz2), parity, parity-final, modN, modN-brackets, copy, text:FILE or babi:FOLDER, with "
            "options behind it: copy,shortest=5,context=256. --set model.layer.kind=LSTM (or Mamba, FPMamba, "
            "FPMamba2) trains another network. Example: fpnumba train s3 --preset cpu --baseline"
        ),
    )
    train.add_argument("task", nargs="?", metavar="TASK", help="what to learn, such as s3")
    train.add_argument("--preset", default="cpu", metavar="NAME", help="sizes and schedule (default: cpu)")
    train.add_argument("--out", type=Path, metavar="FOLDER", help="the new run (default: runs/TASK-PRESET)")
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with that run, bitwise")
    train.add_argument(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        help="train the same network held to one iteration as well, a diagonal RNN",
    )
    train.add_argument(
        "--minutes", type=_minutes, metavar="M", help="stop the fixed-point network after that time"
    )
    train.add_argument(
        "--target", type=float, metavar="ACCURACY", help="stop at this token accuracy, such as 0.99"
    )
    train.add_argument("--steps", type=_positive, metavar="N", help="updates")
    train.add_argument("--batch", type=_positive, metavar="N", help="sequences per update")
    train.add_argument("--length", type=_positive, metavar="N", help="steps per training sequence")
    train.add_argument("--lengths", type=_positive, nargs="+", metavar="N", help="lengths to judge it at")
    train.add_argument("--lr", type=float, metavar="RATE", help="learning rate")
    train.add_argument("--seed", type=int, metavar="N", help="of parameters and data")
    train.add_argument("--dtype", metavar="KIND", help="float32 or float64")
    train.add_argument("--device", choices=("cpu", "gpu"), help="where to train (default: the preset's)")
    train.add_argument("--precision", metavar="KIND", help="of a GPU's products: float32, tf32 or bfloat16")
    train.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="any other option: weight_decay=0.1, model.d_model=128, model.solver.rtol=1e-4 (repeatable)",
    )
    train.add_argument("--quiet", action="store_true", help="no progress")
    train.set_defaults(command=_train)
