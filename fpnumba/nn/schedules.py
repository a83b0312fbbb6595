"""Learning rates as functions of the step, counted from zero."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def _positive(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, but is {value}")


def constant(rate: float) -> Schedule:
    """The same rate at every step.

    Examples
    --------
    >>> from fpnumba.nn import schedules
    >>> schedules.constant(0.1)(5)
    0.1
    """
    _positive("rate", rate)
    return lambda step: rate


def warmup_constant(rate: float, *, warmup: int) -> Schedule:
    """Rise linearly over ``warmup`` steps, then stay.

    Examples
    --------
    >>> from fpnumba.nn import schedules
    >>> [schedules.warmup_constant(1.0, warmup=4)(step) for step in (0, 3, 100)]
    [0.25, 1.0, 1.0]
    """
    _positive("rate", rate)
    _positive("warmup", warmup)
    return lambda step: rate * min(1.0, (step + 1) / max(warmup, 1))


def warmup_cosine(rate: float, *, warmup: int, total: int, floor: float = 0.0) -> Schedule:
    """Rise linearly over ``warmup`` steps, then fall along half a cosine to ``floor`` at step ``total``.

    Examples
    --------
    >>> from fpnumba.nn import schedules
    >>> schedule = schedules.warmup_cosine(1.0, warmup=10, total=110)
    >>> [round(schedule(step), 3) for step in (0, 9, 60, 110, 500)]
    [0.1, 1.0, 0.5, 0.0, 0.0]
    """
    for name, value in (("rate", rate), ("warmup", warmup), ("floor", floor)):
        _positive(name, value)
    if total <= warmup:
        raise ValueError(f"total must exceed warmup, but is {total}, not above {warmup}")

    def schedule(step: int) -> float:
        if step < warmup:
            return rate * (step + 1) / warmup
        done = min(1.0, (step - warmup) / (total - warmup))
        return floor + (rate - floor) * 0.5 * (1.0 + math.cos(math.pi * done))

    return schedule


def warmup_linear(rate: float, *, warmup: int, total: int, floor: float = 0.0) -> Schedule:
    """Rise linearly over ``warmup`` steps, then fall linearly to ``floor`` at step ``total``.

    Examples
    --------
    >>> from fpnumba.nn import schedules
    >>> [schedules.warmup_linear(1.0, warmup=10, total=110)(step) for step in (9, 60, 110)]
    [1.0, 0.5, 0.0]
    """
    for name, value in (("rate", rate), ("warmup", warmup), ("floor", floor)):
        _positive(name, value)
    if total <= warmup:
        raise ValueError(f"total must exceed warmup, but is {total}, not above {warmup}")

    def schedule(step: int) -> float:
        if step < warmup:
            return rate * (step + 1) / warmup
        return floor + (rate - floor) * max(0.0, 1.0 - (step - warmup) / (total - warmup))

    return schedule
