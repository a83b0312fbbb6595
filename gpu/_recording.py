"""Whether what is launched now is recorded; see `fpnumba.gpu.capture`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_now: ContextVar[Any] = ContextVar("fpnumba_gpu_recording", default=None)


@contextmanager
def into(recording: Any) -> Iterator[None]:
    """Inside, launches go into a recording."""
    token = _now.set(recording)
    try:
        yield
    finally:
        _now.reset(token)


def recording() -> Any:
    """The recording that goes on in this context, or None."""
    return _now.get()


def afterwards(act: Callable[[], None]) -> None:
    """Do what cannot be recorded: now, or, while something is recorded, once that is over."""
    going_on = _now.get()
    if going_on is None:
        act()
    else:
        going_on.afterwards.append(act)


_rehearsal: ContextVar[list[int] | None] = ContextVar("fpnumba_gpu_rehearsal", default=None)


@contextmanager
def rehearsing(counts: list[int]) -> Iterator[None]:
    """Inside, what waits for the device leaves in `counts` what it has seen: numbers of iterations, decisions."""
    token = _rehearsal.set(counts)
    try:
        yield
    finally:
        _rehearsal.reset(token)


def rehearsal() -> bool:
    """Whether what runs now will be recorded next."""
    return _rehearsal.get() is not None


def blind() -> bool:
    """Whether something is recorded of which no run before has told what it looks at."""
    now = _now.get()
    return now is not None and not now.rehearsed


def took(count: int) -> None:
    """An iteration that waits for the device has ended after so many steps, or a decision is this."""
    counts = _rehearsal.get()
    if counts is not None:
        counts.append(count)


def rehearsed() -> int | None:
    """The next number that was left when what is recorded now ran for real; None if nothing is recorded."""
    now = _now.get()
    return None if now is None or not now.counts else int(now.counts.pop(0))
