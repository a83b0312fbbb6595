"""A step of training beside the network, on the device alone: data, loss, optimiser, and what is told of the step.

Everything that changes from step to step hangs on a number on the device, so that a step can be recorded once
(`fpnumba.gpu.capture`) and launched again and again. ``kernels/train.cu`` says what is computed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fpnumba.gpu import _device, _recording
from fpnumba.gpu._report import store

Array = Any

THREADS = 256
# Numbers of a parameter that a block updates, and the alignment of parameters in their array.
PIECE, ALIGNED = 4096, 64
# Of what is told of a step: see `Log`.
COLUMNS = ("loss", "accuracy", "norm", "iterations", "iterations_max", "unconverged")


def _kernel(function: str, dtype: Any = "float32") -> _device.Kernel:
    return _device.Kernel.of("train.cu", function, {"STORE": store(str(dtype)), "THREADS": THREADS})


def word_problem(
    table: Array,
    seed: int,
    step: Array,
    tokens: Array,
    targets: Array,
    *,
    identity_first: bool = False,
) -> None:
    """Draw sequences of uniform elements of a group, and their running products.

    Counter-based random numbers (Philox 4x32-10): those of a step depend on `seed`, the step and the place alone. An
    element's probability is off by less than ``2**-32``.

    Parameters
    ----------
    table : (n, n) int32 array
        ``table[state, element]`` is the next state.
    seed : int
    step : (1,) int64 array
    tokens, targets : (B, T) int64 arrays
        Written.
    identity_first : bool
        Whether the first element is number 0.
    """
    batch, steps = tokens.shape
    numbers = np.int64(len(table)), np.int64(identity_first), np.int64(seed & (2**63 - 1))
    sizes = np.int64(batch), np.int64(steps)
    arguments = (table, *numbers, step, *sizes, tokens, targets)
    _device.launch(_kernel("word_problem"), -(-batch // THREADS), THREADS, arguments)


class Loss:
    """Mean cross-entropy and accuracy of logits, told on the device.

    Attributes
    ----------
    bar : array
        The gradient, of the shape of the logits.
    told : (blocks, 2) float64 array
        Sums of losses and of right answers.
    count : (1,) int64 array
        Targets that counted.
    """

    def __init__(self, logits: Array, targets: Array, *, ignore: int = -1) -> None:
        xp, classes, rows = _device.xp(), logits.shape[-1], targets.size
        self.count, self.bar = xp.empty(1, np.int64), xp.empty(logits.shape, logits.dtype)
        blocks = -(-rows // (THREADS // 32))
        self.told = xp.zeros((blocks, 2), np.float64)
        arguments: tuple[Any, ...] = (targets, np.int64(rows), np.int64(ignore), self.count)
        _device.launch(_kernel("count_targets"), 1, THREADS, arguments, shared=8 * THREADS)
        sizes = np.int64(rows), np.int64(classes), np.int64(ignore)
        arguments = (logits, targets, *sizes, self.count, self.bar, self.told)
        kernel = _kernel("cross_entropy", logits.dtype)
        _device.launch(kernel, blocks, THREADS, arguments, shared=16 * THREADS // 32)


class AdamW:
    """AdamW with clipping over all parameters at once, which lie in one array.

    Parameters
    ----------
    params, state : mapping of arrays
        Of `fpnumba.nn.AdamW`, on the host or on the device.
    rates : (steps,) array of float64
        The learning rate of each step.
    decays : mapping of bool
        Which parameters weight decay reaches.
    betas, eps, weight_decay, clip
        As of `fpnumba.nn.AdamW`; `clip` 0 for none.

    Attributes
    ----------
    params : dict of arrays
        Views into the array; an update writes them.
    norm : (1,) float64 array
        Of the last gradient.
    """

    def __init__(
        self,
        params: Mapping[str, Array],
        state: Mapping[str, Array],
        rates: Array,
        decays: Mapping[str, bool],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip: float,
    ) -> None:
        xp = _device.xp()
        self._numbers = tuple(np.float64(n) for n in (clip, weight_decay, *betas, eps))
        dtype, begins, total = next(iter(params.values())).dtype, {}, 0
        for name, value in params.items():
            begins[name] = total
            total += -(-value.size // ALIGNED) * ALIGNED
        self._names = list(params)
        self._p, self._m, self._v = (xp.zeros(total, dtype) for _ in range(3))
        self.params, self._first, self._second = (
            {
                name: flat[begins[name] : begins[name] + value.size].reshape(value.shape)
                for name, value in params.items()
            }
            for flat in (self._p, self._m, self._v)
        )
        for name, value in params.items():
            self.params[name][...] = xp.asarray(value)
            self._first[name][...] = xp.asarray(state[f"m.{name}"])
            self._second[name][...] = xp.asarray(state[f"v.{name}"])
        pieces = [
            (i, begin, begins[name] + begin, min(PIECE, params[name].size - begin))
            for i, name in enumerate(params)
            for begin in range(0, params[name].size, PIECE)
        ]
        self._pieces = xp.asarray(np.array(pieces, np.int64))
        self._decays = xp.asarray(np.array([decays[name] for name in params], np.int64))
        self._rates = xp.asarray(np.asarray(rates, np.float64))
        self._addresses: Array | None = None
        self._found = xp.zeros(len(pieces), np.float64)
        self.norm = xp.zeros(1, np.float64)

    def update(self, grads: Mapping[str, Array], step: Array) -> None:
        """One step, the number `step` of which is on the device."""
        xp = _device.xp()
        kept = [xp.ascontiguousarray(grads[name]) for name in self._names]
        # A recording has the table of the run before it, which nothing else in the recording can have written
        addresses = self._addresses if self._addresses is not None else xp.empty(len(kept), np.int64)
        self._addresses = None if _recording.recording() is not None else addresses
        where = np.array([_device.address(g) for g in kept], np.int64)
        # the gradients have to live as long as a recording does
        _recording.afterwards(lambda kept=kept: put(addresses, where))  # type: ignore[misc]
        blocks, dtype, shared = len(self._pieces), self._p.dtype, 8 * THREADS
        arguments = (self._pieces, addresses, self._found)
        _device.launch(_kernel("squares", dtype), blocks, THREADS, arguments, shared=shared)
        state = (self._decays, self._rates, step, *self._numbers, self._p, self._m, self._v, self.norm)
        arguments = (self._pieces, addresses, self._found, np.int64(blocks), *state)
        _device.launch(_kernel("adamw", dtype), blocks, THREADS, arguments, shared=shared)

    def state(self) -> dict[str, Array]:
        """The moments, by the names of `fpnumba.nn.AdamW`."""
        first = {f"m.{name}": value for name, value in self._first.items()}
        return first | {f"v.{name}": value for name, value in self._second.items()}


def put(target: Array, source: Any) -> None:
    """Copy an array of the host into one of the device."""
    if isinstance(target, np.ndarray):
        target[...] = source
    else:
        target.set(source)


class Log:
    """What the last `size` steps told, on the device.

    Attributes
    ----------
    step : (1,) int64 array
        Steps made.
    rows : (size, 6) float64 array
        `COLUMNS` of step ``k`` in row ``k % size``.
    """

    def __init__(self, size: int, step: int) -> None:
        xp = _device.xp()
        self.step, self.rows = xp.full(1, step, np.int64), xp.zeros((size, len(COLUMNS)), np.float64)

    def tell(self, loss: Loss, norm: Array, iterations: Array, status: Array) -> None:
        """Write the row of a step, which ends with that."""
        sizes = np.int64(iterations.size), np.int64(len(self.rows))
        blocks = np.int64(len(loss.told))
        arguments = (loss.told, blocks, loss.count, norm, iterations, status, *sizes, self.rows, self.step)
        _device.launch(_kernel("tell"), 1, THREADS, arguments, shared=8 * THREADS)


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    found = [_kernel(name) for name in ("word_problem", "count_targets", "tell")]
    for name in ("cross_entropy", "squares", "adamw"):
        found += [_kernel(name, dtype) for dtype in ("float32", "float64")]
    return found
