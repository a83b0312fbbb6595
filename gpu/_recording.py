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
