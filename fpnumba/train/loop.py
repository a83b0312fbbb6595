"""The training loop: sample, solve, differentiate, update; log, evaluate, checkpoint; stop cleanly."""

import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from fpnumba import nn, tasks
from fpnumba.train import checkpoint as checkpoints
from fpnumba.train.build import (
    build_model,
    build_optimizer,
    initial_params,
    load_checkpoint,
    stream,
    training_models,
)
from fpnumba.train.checkpoint import Arrays, Checkpoint
from fpnumba.train.config import Config, ConfigError
from fpnumba.train.device import OnDevice
from fpnumba.train.evaluation import judge, summary_of
from fpnumba.train.extras import need
from fpnumba.train.folder import Folder
from fpnumba.train.parallel import ALONE, Group
from fpnumba.train.threads import one_blas_thread

# A GPU is let run ahead of what is told by so many steps at most.
AT_ONCE = 256


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why. The last checkpoint is untouched."""


@dataclass(frozen=True)
class Outcome:
    """How a call of :func:`run` ended.

    Attributes
    ----------
    step : int
        Updates made in all, those of earlier calls included.
    reason : {"steps", "target", "minutes", "interrupted"}
    accuracy : float or None
        Token accuracy of the last evaluation at the training length.
    seconds : float
        Time spent in all, that of earlier calls included.
    """

    step: int
    reason: str
    accuracy: float | None
    seconds: float


class Interrupt:
    """Makes the first Ctrl-C or SIGTERM a flag that the loop reads between steps; the second one kills."""

    def __init__(self) -> None:
        self.raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        # Only the main thread may set handlers; elsewhere the caller's own rules stay.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def run(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    stop: int | None = None,
    minutes: float | None = None,
    quiet: bool = False,
    label: str = "",
    group: Group = ALONE,
) -> Outcome:
    """Train a network, or go on training one.

    Parameters
    ----------
    config : Config
        What to train. With `resume`, it has to be the run's own.
    out : path
        Folder of the run (:mod:`fpnumba.train.folder`). Without `resume` it must not exist or be empty.
    resume : bool
        Go on from the checkpoint in `out`. Parameters, optimiser state and metrics become, bitwise, what they
        would have been without the pause (on the same machine, versions and number of threads and processes).
    stop : int, optional
        Stop at this step instead of ``config.steps``.
    minutes : float, optional
        Stop after that much time in this call.
    quiet : bool
        No progress on standard error.
    label : str
        What the progress is labelled with.
    group : Group
        The processes that share the work (:mod:`fpnumba.train.parallel`); all of them make this call.

    Returns
    -------
    Outcome

    Raises
    ------
    RunError, CheckpointError
        If `out` already holds something, or, with `resume`, holds nothing that can be continued.
    ConfigError
        If the configuration cannot be trained here.
    TrainingError
        If the loss is no finite number.
    """
    folder = Folder(out)
    last = config.steps if stop is None else min(stop, config.steps)
    if config.device == "cpu" and config.precision != "float32":
        raise ConfigError(
            f"precision: {config.precision!r} is of a GPU; a CPU has float32 (and dtype float64)"
        )
    if config.batch < group.size:
        raise ConfigError(f"batch: {config.batch} sequences are too few for {group.size} processes")
    task, model, optimizer = tasks.get(config.task), build_model(config), build_optimizer(config)
    params = initial_params(config, model)
    state = optimizer.init(params)
    before = Outcome(0, "interrupted", None, 0.0)
    if resume:
        saved = group.first(lambda: load_checkpoint(folder, config, params, state))
        params, state = saved.params, saved.optimizer
        before = Outcome(saved.step, saved.extra["reason"], saved.extra["accuracy"], saved.extra["seconds"])
        if before.reason == "target":
            return before
        if before.step >= last:
            return replace(before, reason="steps")
        group.first(lambda: folder.forget_metrics_after(saved.step))
    work: Any
    if config.device == "gpu":
        work = OnDevice(config, task, optimizer, params, state, before.step, group)
    else:
        work = OnHost(config, task, optimizer, params, state, before.step, group)
    started = saved_at = time.perf_counter()
    step, accuracy, reason = before.step, before.accuracy, "steps"

    def save(why: str) -> Outcome:
        outcome = Outcome(step, why, accuracy, before.seconds + time.perf_counter() - started)
        extra = {"reason": why, "accuracy": accuracy, "seconds": outcome.seconds}
        rng = {"derived_from": "seed and step", "seed": config.seed, "step": step}
        if group.rank == 0:
            trained, moments = work.fetched()
            state_of_run = Checkpoint(trained, moments, step, config.to_dict(), rng, extra)
            checkpoints.save(folder.checkpoint_file, state_of_run)
        return outcome

    quiet = quiet or group.rank > 0
    if not resume:
        group.first(lambda: folder.create(config))
        save("interrupted")  # whatever happens from here on, there is something to go on from
    if not quiet:
        count = sum(value.size for value in params.values())
        lengths = sorted(
            {config.length_at(at) for at in (step, *(s for s, _ in config.curriculum if s >= step))}
        )
        which = f"length {lengths[0]}" if len(lengths) == 1 else f"lengths {lengths[0]} to {lengths[-1]}"
        said = f"{count:,} parameters, steps {step} to {last} of {config.batch} sequences of {which}"
        print(f"{label or config.task}: {said}, in {folder.path}", file=sys.stderr, flush=True)

    with (
        one_blas_thread(),
        Interrupt() as interrupt,
        _Progress(before.step, last, quiet=quiet, label=label) as progress,
        open(folder.metrics_file if group.rank == 0 else os.devnull, "a", encoding="utf-8") as metrics,
    ):
        told = step

        def tell() -> None:
            nonlocal told
            seconds = before.seconds + time.perf_counter() - started
            for at, row in enumerate(work.rows(), told + 1):
                if not math.isfinite(row["loss"]):
                    raise TrainingError(
                        f"the loss at step {at} is {row['loss']}; a smaller learning_rate may help"
                    )
                length = config.length_at(at - 1)
                row = {"step": at, "kind": "train", "length": length, **row, "seconds": round(seconds, 3)}
                progress.step(row)
                if at % config.log_every == 0 or at == last:
                    _write(metrics, row)
            told = step

        while step < last:
            work.advance(config.length_at(step))
            step += 1
            due_to_tell = step % config.log_every == 0 or step % config.eval_every == 0 or step == last
            if config.device == "cpu" or due_to_tell or step - told >= AT_ONCE:
                tell()
            if step % config.eval_every == 0 or step == last:
                judged = group.first(partial(judge, model, work.params, task, config, config.length))
                accuracy = judged["accuracy"]
                _write(metrics, {"step": step, "kind": "evaluation", **judged})
                progress.evaluation(step, judged)
                if config.target_accuracy is not None and accuracy >= config.target_accuracy:
                    reason = "target"
                    break
            now = time.perf_counter()
            late = minutes is not None and now - started >= 60 * minutes
            interrupted, late = group.any(interrupt.raised, late)
            if interrupted or late:
                reason = "interrupted" if interrupted else "minutes"
                tell()  # what is saved has to be finite
                break
            due = config.checkpoint_minutes and now - saved_at >= 60 * config.checkpoint_minutes
            if (step % config.checkpoint_every == 0 or due) and step < last:
                tell()
                save("interrupted")
                saved_at = time.perf_counter()
    return save(reason)


class OnHost:
    """The steps of a run on the CPU; what :class:`fpnumba.train.device.OnDevice` does on a GPU."""

    def __init__(
        self,
        config: Config,
        task: Any,
        optimizer: Any,
        params: Arrays,
        state: Arrays,
        step: int,
        group: Group,
    ) -> None:
        self._config, self._task, self._optimizer, self._group = config, task, optimizer, group
        self._model_at = training_models(config)
        self.params, self._state, self._step = params, state, step
        self._rows: list[dict[str, Any]] = []

    def advance(self, length: int) -> None:
        """Make the next update, on sequences of that length."""
        config, step = self._config, self._step
        whole = self._task.sample(stream(config.seed, "data", step), config.batch, length)
        tokens, targets = self._group.share(*whole)
        row, self.params, self._state = update(
            self._model_at(step), self._optimizer, self.params, self._state, tokens, targets, self._group
        )
        self._rows.append(row)
        self._step += 1

    def rows(self) -> list[dict[str, Any]]:
        """What the updates since the last call told."""
        rows, self._rows = self._rows, []
        return rows

    def fetched(self) -> tuple[Arrays, Arrays]:
        """Parameters and optimiser state."""
        return self.params, self._state


def update(
    model: Any,
    optimizer: Any,
    params: Arrays,
    state: Arrays,
    tokens: Any,
    targets: Any,
    group: Group = ALONE,
) -> tuple[dict[str, Any], Arrays, Arrays]:
    """One step of training: loss and what was seen on the way, new parameters, new optimiser state."""
    record: list[Any] = []
    logits, pullback = model.vjp(params, tokens, record=record)
    loss, logits_bar = nn.cross_entropy_vjp(logits, targets)
    grads, _ = pullback(logits_bar)
    row = {"loss": float(loss), "accuracy": float(nn.accuracy(logits, targets)), **summary_of(record)}
    grads, row = group.mean(grads, row, targets)
    params, state = optimizer.update(params, grads, state)
    return row, params, state


def _write(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


class _Progress:
    """A bar on a terminal; a line per evaluation anywhere else; nothing when quiet."""

    def __init__(self, step: int, last: int, *, quiet: bool, label: str) -> None:
        self._lines = not quiet and not sys.stderr.isatty()
        self._label = label
        self._bar = need("tqdm").tqdm(
            desc=label or None,
            total=last,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=quiet or not sys.stderr.isatty(),
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, row: dict[str, Any]) -> None:
        shown = {"loss": f"{row['loss']:.3f}", "accuracy": f"{row['accuracy']:.3f}"}
        if "iterations" in row:
            shown["iterations"] = f"{row['iterations']:.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def evaluation(self, step: int, judged: dict[str, Any]) -> None:
        if self._lines:
            said = f"step {step}: token accuracy {judged['accuracy']:.4f} at length {judged['length']}"
            print(f"{self._label}: {said}" if self._label else said, file=sys.stderr, flush=True)
