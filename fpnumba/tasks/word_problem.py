"""Word problems: name the running product of a sequence of group elements, at every step."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fpnumba.tasks.groups import Group
from fpnumba.tasks.task import Same, Tokens, check_sizes, name_with


@dataclass(frozen=True)
class WordProblem(Same):
    """The word problem of a finite group.

    Tokens are uniform group elements ``a_1, a_2, ...``; the target of step ``t`` is their product so far,
    starting from the identity, so that the first target is ``a_1`` itself. This is the state-tracking task of
    Merrill et al., "The Illusion of State in State-Space Models" (arXiv 2404.08819).

    Parameters
    ----------
    group : Group
        The group; its elements are tokens and targets alike.
    order : {"right", "left"}
        ``"right"``, as in the data of Merrill et al.: ``target_t = target_{t-1} a_t = a_1 a_2 ... a_t``.
        ``"left"``: each token acts on what came before, ``target_t = a_t target_{t-1}``.
    identity_first : bool
        Whether every sequence opens with the identity, so that the state before the first random token is
        spelled out; the sequence keeps its length.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import tasks
    >>> task = tasks.get("s3")
    >>> tokens, targets = task.sample(np.random.default_rng(0), batch=2, length=5)
    >>> tokens.shape, targets.shape, bool((tokens[:, 0] == targets[:, 0]).all())
    ((2, 5), (2, 5), True)
    """

    group: Group
    order: Literal["right", "left"] = "right"
    identity_first: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("right", "left"):
            raise ValueError(f"order: {self.order!r} is neither 'right' nor 'left'")

    @property
    def name(self) -> str:
        """The group's name, and what is not usual."""
        options = {"order": (self.order, "right"), "identity_first": (self.identity_first, False)}
        return name_with(self.group.name, **options)

    @property
    def vocab(self) -> int:
        """Number of different tokens."""
        return self.group.order

    @property
    def vocab_out(self) -> int:
        """Number of different targets."""
        return self.group.order

    @property
    def chance(self) -> float:
        """One element of them all."""
        return 1 / self.group.order

    @property
    def table(self) -> Tokens:
        """``table[state, token]`` is the next state."""
        return self.group.table if self.order == "right" else self.group.table.T

    def targets(self, tokens: Tokens) -> Tokens:
        """The running products of tokens (..., T); same shape, int64."""
        table = self.table
        products = np.empty(tokens.shape, dtype=np.int64)
        state = np.zeros(tokens.shape[:-1], dtype=np.int64)
        for t in range(tokens.shape[-1]):
            products[..., t] = state = table[state, tokens[..., t]]
        return products

    def sample(self, rng: np.random.Generator, batch: int, length: int) -> tuple[Tokens, Tokens]:
        """Draw sequences and their answers.

        Parameters
        ----------
        rng : numpy.random.Generator
            The only source of randomness: the same state gives the same sequences.
        batch, length : int
            Number of sequences and steps in each; zero is allowed.

        Returns
        -------
        tokens, targets : ndarray of int64, shape (batch, length)

        Raises
        ------
        ValueError
            If ``batch`` or ``length`` is negative.
        """
        check_sizes(batch, length)
        tokens = rng.integers(self.vocab, size=(batch, length))
        if self.identity_first:
            tokens[:, :1] = 0
        return tokens, self.targets(tokens)
