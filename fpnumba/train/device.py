"""Training on a GPU: a step is recorded once and launched as one, and the host only looks on.

Data, network, loss, gradient and optimiser stay on the device. Word problems are drawn there too; other tasks are drawn
on the host and copied. A network whose solve waits for the host (the parallel and chunked ways do) is trained the same
way, launch by launch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fpnumba.arrays import to_numpy
from fpnumba.nn import AdamW, Model
from fpnumba.nn.backend import joined
from fpnumba.nn.optim import decays
from fpnumba.tasks import WordProblem
from fpnumba.train.build import build_model, stream, training_models, with_solver
from fpnumba.train.checkpoint import Arrays
from fpnumba.train.config import Config, ConfigError
from fpnumba.train.parallel import ALONE, Group

# Steps that may be told of later.
LOG = 1024


def quiet(config: Config) -> Config:
    """The same run, with solves that tell of failures in the log alone: to raise or to warn is to wait."""
    if not build_model(config).iterates:
        return config
    layer = with_solver(config.model.get("layer", {}), {"on_failure": "ignore"})
    layer["adjoint"] = {**layer.get("adjoint", {}), "on_failure": "ignore"}
    return config.replace(model={**config.model, "layer": layer})


class OnDevice:
    """The steps of a run on the current GPU.

    Parameters
    ----------
    config : Config
    task : Task
    optimizer : AdamW
    params, state : dict of ndarray
        Where the run stands.
    step : int
        Updates made.
    group : Group
        The processes that share the work; the gradients of several are averaged launch by launch.

    Raises
    ------
    ConfigError
        If there is no GPU here.
    """

    def __init__(
        self,
        config: Config,
        task: Any,
        optimizer: AdamW,
        params: Arrays,
        state: Arrays,
        step: int,
        group: Group = ALONE,
    ) -> None:
        from fpnumba import gpu

        reason = gpu.absent()
        if reason is not None:
            raise ConfigError(f"device: {reason}")
        from fpnumba.gpu import training

        self._gpu, self._training, self._xp = gpu, training, gpu.xp()
        if group.size > 1:
            cuda = self._xp.cuda
            cuda.Device(group.local_rank % cuda.runtime.getDeviceCount()).use()
        self._config, self._task, self._group, self._step = config, task, group, step
        self._model_at = training_models(quiet(config))
        self._told = step
        self._log = training.Log(LOG, step)
        self._optimizer = training.AdamW(
            params,
            state,
            np.array([optimizer.rate(k) for k in range(config.steps)]),
            {name: decays(name, value) for name, value in params.items()},
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            clip=optimizer.clip or 0.0,
        )
        self._table = self._xp.asarray(task.table.astype(np.int32)) if isinstance(task, WordProblem) else None
        self._work: dict[tuple[int, int], tuple[Any, Any, Callable[[], Any]]] = {}
        self._seed = int(stream(config.seed, "data").integers(2**62))

    def advance(self, length: int) -> None:
        """Make the next update, on sequences of that length; nothing waits."""
        model = self._model_at(self._step)
        key = (length, id(model))
        known = key in self._work
        if not known:
            self._work[key] = self._buffers(length, model)
        tokens, targets, go = self._work[key]
        if self._table is None:
            found = self._task.sample(
                stream(self._config.seed, "data", self._step), self._config.batch, length
            )
            for buffer, drawn in zip((tokens, targets), self._group.share(*found), strict=True):
                self._training.put(buffer, np.ascontiguousarray(drawn))
        with self._gpu.use_precision(self._config.precision):
            if known or self._group.size > 1:
                go()
            else:
                self._work[key] = tokens, targets, self._recorded(go)
        self._step += 1

    def _buffers(self, length: int, model: Model) -> tuple[Any, Any, Callable[[], Any]]:
        here = len(self._group.share(range(self._config.batch))[0])
        if self._table is None:  # a task may add to what it is asked for
            length = self._task.sample(stream(self._config.seed, "data"), 1, length)[0].shape[1]
        tokens, targets = (self._xp.zeros((here, length), np.int64) for _ in range(2))
        return tokens, targets, lambda: self._update(model, tokens, targets)

    def _recorded(self, go: Callable[[], Any]) -> Callable[[], Any]:
        """Make one update, and what makes the others."""
        try:
            return self._gpu.capture(go)  # type: ignore[no-any-return]
        except self._gpu.NotRecorded:
            return go

    def _update(self, model: Model, tokens: Any, targets: Any) -> None:
        training, log = self._training, self._log
        if self._table is not None:
            self._draw(tokens, targets)
        record: list[Any] = []
        logits, pullback = model.vjp(self._optimizer.params, tokens, record=record)
        loss = training.Loss(logits, targets)
        grads, _ = pullback(loss.bar)
        grads, _ = self._group.mean(grads, {}, targets)
        self._optimizer.update(grads, log.step)
        told = [[self._flat(one, name) for one in record] for name in ("iterations", "status")]
        nothing = self._xp.empty(0, np.int64), self._xp.empty(0, np.int8)
        joined = (self._joined(parts, none) for parts, none in zip(told, nothing, strict=True))
        log.tell(loss, self._optimizer.norm, *joined)

    def _draw(self, tokens: Any, targets: Any) -> None:
        task, batch = self._task, (self._config.batch, tokens.shape[1])
        alone = self._group.size == 1
        whole = (tokens, targets) if alone else tuple(self._xp.empty(batch, np.int64) for _ in range(2))
        first = task.identity_first
        self._training.word_problem(self._table, self._seed, self._log.step, *whole, identity_first=first)
        if not alone:
            tokens[...], targets[...] = self._group.share(*whole)

    def _flat(self, solution: Any, name: str) -> Any:
        return self._xp.asarray(solution.unfetched(name)).reshape(-1)

    def _joined(self, parts: list[Any], none: Any) -> Any:
        return joined(parts) if len(parts) > 1 else parts[0] if parts else none

    def rows(self) -> list[dict[str, Any]]:
        """What the updates since the last call told; waits for them."""
        first, self._told = self._told, self._step
        if first == self._step:
            return []
        kept = to_numpy(self._log.rows)
        solved = self._model_at(first).iterates
        rows = []
        for step in range(max(first, self._step - LOG), self._step):
            row = dict(zip(self._training.COLUMNS, kept[step % LOG].tolist(), strict=True))
            row["iterations_max"] = int(row["iterations_max"])
            if not solved:
                row = {name: value for name, value in row.items() if name in ("loss", "accuracy", "norm")}
            rows.append(row)
        return rows

    @property
    def params(self) -> Arrays:
        """The parameters, on the device."""
        return self._optimizer.params

    def fetched(self) -> tuple[Arrays, Arrays]:
        """Parameters and optimiser state, on the host."""
        params = {name: to_numpy(value).copy() for name, value in self._optimizer.params.items()}
        state = {name: to_numpy(value).copy() for name, value in self._optimizer.state().items()}
        return params, {"step": np.asarray(self._step, np.int64), **state}
