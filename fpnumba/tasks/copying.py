"""Copying: say again what was read."""

from dataclasses import dataclass, replace

import numpy as np

from fpnumba.tasks.task import UNSCORED, Tokens, check_shortest, check_sizes, draw_lengths, name_with

LETTERS = 26
BEGIN, MARK, PAD = LETTERS, LETTERS + 1, LETTERS + 2


@dataclass(frozen=True)
class Copy:
    """Copying strings of uniform letters, after Jelassi et al., "Repeat after me" (arXiv 2402.01032).

    An example is ``BEGIN string MARK string MARK``: 29 tokens, 26 letters, the beginning, the mark that asks for the
    copy and ends it, and padding. Scored are the letters of the copy, each named one position ahead: the first at the
    mark, the last at the letter before it.

    Parameters
    ----------
    shortest : int or None
        Strings have uniform lengths from here up to the one that is asked for; None for that one alone.
    context : int, optional
        Fill sequences of so many tokens with examples, one after the other, as published; one that is cut off at the
        end is not scored. Otherwise a sequence has one example.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import tasks
    >>> task = tasks.get("copy", shortest=None)
    >>> tokens, targets = task.sample(np.random.default_rng(0), batch=1, length=3)
    >>> task.decode(tokens[0])
    '^qnh|qnh|'
    >>> targets[0]
    array([-1, -1, -1, -1, 16, 13,  7, -1, -1])
    """

    shortest: int | None = 1
    context: int | None = None

    def __post_init__(self) -> None:
        check_shortest(self.shortest)
        if self.context is not None and self.context < 5:
            raise ValueError(
                f"context: {self.context} has no room for an example, which has 5 tokens or more"
            )

    @property
    def name(self) -> str:
        """``copy``, and what is not usual."""
        return name_with("copy", shortest=(self.shortest, 1), context=(self.context, None))

    @property
    def vocab(self) -> int:
        """29 tokens."""
        return LETTERS + 3

    @property
    def vocab_out(self) -> int:
        """29 as well, of which only letters are answers."""
        return LETTERS + 3

    @property
    def chance(self) -> float:
        """One letter in 26."""
        return 1 / LETTERS

    @property
    def held_out(self) -> "Copy":
        """One example in each sequence, of just the length that is asked for."""
        return replace(self, shortest=None, context=None)

    def decode(self, tokens: Tokens) -> str:
        """Tokens (T,) as text: letters, ``^`` for the beginning, ``|`` for the mark, ``.`` for padding."""
        return "".join("abcdefghijklmnopqrstuvwxyz^|."[token] for token in tokens)

    def sample(self, rng: np.random.Generator, batch: int, length: int) -> tuple[Tokens, Tokens]:
        """Draw sequences and their answers.

        Parameters
        ----------
        rng : numpy.random.Generator
        batch : int
        length : int
            Of the longest strings.

        Returns
        -------
        tokens, targets : ndarray of int64, shape (batch, 2 * length + 3), or (batch, context)

        Raises
        ------
        ValueError
            If a size is not possible, or `context` has no room for an example of that length.
        """
        check_sizes(batch, length, 1)
        width = 2 * length + 3 if self.context is None else self.context
        if width < 2 * length + 3:
            raise ValueError(
                f"length: an example of {length} letters needs {2 * length + 3} tokens, context has {width}"
            )
        least = length if self.shortest is None else min(self.shortest, length)
        count = 1 if self.context is None else -(-width // (2 * least + 3))
        lengths = draw_lengths(rng, (batch, count), self.shortest, length)
        letters = rng.integers(LETTERS, size=(batch, width))

        starts = np.cumsum(2 * lengths + 3, axis=1) - (2 * lengths + 3)
        where, which = np.arange(width), np.arange(batch)[:, None]
        opened = np.zeros((batch, width), np.int64)
        opened[np.nonzero(starts < width)[0], starts[starts < width]] = 1
        example = opened.cumsum(axis=1) - 1
        size, start = lengths[which, example], starts[which, example]
        at = where - start
        # where each letter of the copy was read
        source = np.where((at > size + 1) & (at < 2 * size + 2), where - size - 1, where)
        tokens = letters[which, source]
        tokens[at == 0] = BEGIN
        tokens[(at == size + 1) | (at == 2 * size + 2)] = MARK
        tokens[at > 2 * size + 2] = PAD
        targets = np.full((batch, width), UNSCORED)
        scored = (at > size) & (at < 2 * size + 1) & (start + 2 * size + 3 <= width)
        rows, columns = np.nonzero(scored)
        targets[rows, columns] = tokens[rows, columns + 1]
        return tokens, targets
