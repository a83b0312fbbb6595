"""Language modelling of the characters of a file."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fpnumba.tasks.task import Tokens, check_sizes, name_with


@dataclass(frozen=True)
class Text:
    """Name the next character, at every position, of pieces of a text file.

    Parameters
    ----------
    path : path
        A file in UTF-8. Its different characters, in the order of their code points, are the vocabulary.
    split : {"train", "validation"}
        Which part of the file pieces are cut from.
    validation : float
        The share of the file that is not trained on: its end.

    Examples
    --------
    >>> import numpy as np, pathlib, tempfile
    >>> from fpnumba import tasks
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "abc.txt"
    ...     _ = path.write_text("abc" * 10)
    ...     task = tasks.get(f"text:{path}")
    ...     tokens, targets = task.sample(np.random.default_rng(0), batch=1, length=6)
    >>> task.decode(tokens[0]), task.decode(targets[0])
    ('cabcab', 'abcabc')
    """

    path: Path
    split: Literal["train", "validation"] = "train"
    validation: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).resolve())
        if self.split not in ("train", "validation"):
            raise ValueError(f"split: {self.split!r} is neither 'train' nor 'validation'")
        check_validation(self.validation)
        assert self._contents  # the file is read now, and once

    @cached_property
    def _contents(self) -> tuple[str, Tokens]:
        stat = self.path.stat()
        return _read(self.path, (stat.st_mtime_ns, stat.st_size))

    def _part(self) -> Tokens:
        _, tokens = self._contents
        cut = len(tokens) - round(self.validation * len(tokens))
        return tokens[:cut] if self.split == "train" else tokens[cut:]

    @property
    def name(self) -> str:
        """``text:`` and the path, and what is not usual."""
        options = {"split": (self.split, "train"), "validation": (self.validation, 0.1)}
        return name_with(f"text:{self.path}", **options)

    @property
    def characters(self) -> str:
        """The characters of the file, in the order of their tokens."""
        return self._contents[0]

    @property
    def vocab(self) -> int:
        """Number of different characters."""
        return len(self.characters)

    @property
    def vocab_out(self) -> int:
        """The same."""
        return self.vocab

    @property
    def chance(self) -> float:
        """One character of them all."""
        return 1 / self.vocab

    @property
    def held_out(self) -> "Text":
        """The end of the file."""
        return replace(self, split="validation")

    def decode(self, tokens: Tokens) -> str:
        """Tokens (T,) as text."""
        return "".join(self.characters[token] for token in tokens)

    def sample(self, rng: np.random.Generator, batch: int, length: int) -> tuple[Tokens, Tokens]:
        """Draw pieces of `length` characters, from anywhere in the part, and what follows each character.

        Raises
        ------
        ValueError
            If the part is not longer than `length`.
        """
        check_sizes(batch, length)
        part = self._part()
        if len(part) <= length:
            said = f"the {self.split} part of {self.path} has {len(part)} characters, too few"
            raise ValueError(f"length: {length}, and {said}")
        starts = rng.integers(len(part) - length, size=batch)
        pieces = part[starts[:, None] + np.arange(length + 1)]
        return pieces[:, :-1], pieces[:, 1:]


def check_validation(share: float) -> None:
    """Raise `ValueError` if that is no share to hold out."""
    if not (isinstance(share, float) and 0 < share < 1):
        raise ValueError(f"validation: {share!r} is not between 0 and 1")


@lru_cache(maxsize=4)
def _read(path: Path, stamp: tuple[int, int]) -> tuple[str, Tokens]:
    """The characters of a file and its tokens; read again once it has another time or size."""
    try:
        points: NDArray[np.uint32] = np.frombuffer(path.read_text("utf-8").encode("utf-32-le"), np.uint32)
    except UnicodeDecodeError:
        raise ValueError(f"task: {path} is no text in UTF-8") from None
    found, tokens = np.unique(points, return_inverse=True)
    if len(tokens) < 2:
        raise ValueError(f"task: {path} has {len(tokens)} characters, too few to learn from")
    tokens = tokens.astype(np.int64)
    tokens.setflags(write=False)
    return "".join(map(chr, found)), tokens
