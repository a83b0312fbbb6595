"""Parity: whether the number of ones is odd, so far or in all."""

from dataclasses import dataclass

import numpy as np

from fpnumba.tasks.task import UNSCORED, Same, Tokens, check_sizes


@dataclass(frozen=True)
class Parity(Same):
    """Parity of uniform bits: the word problem of two elements.

    Parameters
    ----------
    final : bool
        Whether only the parity of the whole sequence is scored, at its last position, as in Deletang et al., "Neural
        networks and the Chomsky hierarchy" (arXiv 2207.02098); otherwise that of the bits so far, at every position.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import tasks
    >>> tokens, targets = tasks.get("parity-final").sample(np.random.default_rng(0), batch=1, length=5)
    >>> tokens, targets
    (array([[1, 1, 1, 0, 0]]), array([[-1, -1, -1, -1,  1]]))
    """

    final: bool = False

    @property
    def name(self) -> str:
        """``parity``, or ``parity-final``."""
        return "parity-final" if self.final else "parity"

    @property
    def vocab(self) -> int:
        """Two bits."""
        return 2

    @property
    def vocab_out(self) -> int:
        """Even and odd."""
        return 2

    @property
    def chance(self) -> float:
        """One half."""
        return 0.5

    def sample(self, rng: np.random.Generator, batch: int, length: int) -> tuple[Tokens, Tokens]:
        """Draw sequences of `length` bits and their parities, each of shape (batch, length)."""
        check_sizes(batch, length)
        tokens = rng.integers(2, size=(batch, length))
        targets = tokens.cumsum(axis=1) % 2
        if self.final:
            targets[:, :-1] = UNSCORED
        return tokens, targets
