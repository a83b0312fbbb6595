"""What every task is, and what tasks share."""

from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

# The target of a position that is not scored, as in fpnumba.nn.
UNSCORED = -1


class Task(Protocol):
    """Sequences of tokens and, for every position, the class that a network should name there."""

    @property
    def name(self) -> str:
        """What :func:`fpnumba.tasks.get` makes this task of, options that are not the usual ones included."""

    @property
    def vocab(self) -> int:
        """Number of different tokens."""

    @property
    def vocab_out(self) -> int:
        """Number of different targets."""

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the answers that occur."""

    @property
    def held_out(self) -> "Task":
        """What a trained network is judged on: sequences of just the length asked for, never trained on."""

    def sample(self, rng: np.random.Generator, batch: int, length: int) -> tuple[Tokens, Tokens]:
        """Draw `batch` sequences and their answers, two arrays of int64 of one shape.

        What `length` counts is the task's to say; every batch of one length has the same shape. A target of -1 means
        that the position is not scored.
        """


class Same:
    """A task whose sequences are all fresh, so that it is its own held-out one."""

    @property
    def held_out(self) -> Self:
        """The task itself."""
        return self


def check_sizes(batch: int, length: int, least: int = 0) -> None:
    """Raise `ValueError` for sizes that are none."""
    if batch < 0:
        raise ValueError(f"batch: {batch} is negative")
    if length < least:
        what = "is negative" if least == 0 else f"is below {least}"
        raise ValueError(f"length: {length} {what}")


def draw_lengths(
    rng: np.random.Generator, shape: int | tuple[int, ...], shortest: int | None, longest: int
) -> Tokens:
    """Lengths, uniform from `shortest` to `longest`; all the longest if `shortest` is None or longer."""
    least = longest if shortest is None else min(shortest, longest)
    return rng.integers(least, longest, size=shape, endpoint=True)


def check_shortest(shortest: int | None) -> None:
    """Raise `ValueError` if that cannot be the shortest length."""
    if shortest is not None and not (isinstance(shortest, int) and shortest >= 1):
        raise ValueError(f"shortest: {shortest!r} is no positive whole number, or None for one length")


def name_with(kind: str, **options: tuple[Any, Any]) -> str:
    """The name of a task: its kind, and each of the options ``(value, usual value)`` that is not the usual one."""
    unusual = [f",{name}={value}".lower() for name, (value, usual) in options.items() if value != usual]
    return kind + "".join(unusual)


def scaled_accuracy(accuracy: float, chance: float) -> float:
    """``(accuracy - chance) / (1 - chance)``: 0 for guessing, 1 for all right; NaN where guessing is always right.

    Examples
    --------
    >>> from fpnumba import tasks
    >>> tasks.scaled_accuracy(0.625, chance=0.25)
    0.5
    """
    return (accuracy - chance) / (1 - chance) if chance < 1 else float("nan")
