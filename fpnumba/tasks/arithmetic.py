"""Modular arithmetic: the value of an expression, with brackets or without."""

from dataclasses import dataclass, replace

import numpy as np

from fpnumba.tasks.task import UNSCORED, Tokens, check_shortest, check_sizes, draw_lengths, name_with

SYMBOLS = "+-*()=."
PLUS, MINUS, TIMES, OPEN, CLOSE, EQUALS, PAD = range(len(SYMBOLS))


@dataclass(frozen=True)
class Arithmetic:
    """Expressions of digits, modulo a number, after Deletang et al., "Neural networks and the Chomsky hierarchy"
    (arXiv 2207.02098); the only answer is the value, at the equals sign.

    Without brackets, digits and operators take turns, and products come first. With brackets, an expression of one to
    four tokens is ``d``, ``-d``, ``(d)`` or ``(-d)``, and a longer one ``(left operator right)``, where the length of
    ``left`` is uniform.

    Parameters
    ----------
    modulus : int
        At least two; digits are the numbers below it.
    brackets : bool
    operators : str, optional
        Those of ``+-*`` that occur; all of them without brackets and ``+-`` with brackets unless given, as published.
    shortest : int or None
        Expressions have uniform lengths, in tokens, from here up to the one that is asked for; None for that one alone.
        Without brackets lengths are odd, and an even one is made one less.

    Notes
    -----
    Tokens are the digits, then ``+ - * ( ) =`` and padding, which follows the equals sign of the shorter ones.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import tasks
    >>> task = tasks.get("mod5-brackets", shortest=None)
    >>> tokens, targets = task.sample(np.random.default_rng(0), batch=1, length=12)
    >>> task.decode(tokens[0]), targets[0, -1]
    ('((0+-0)-(1))=', np.int64(4))
    """

    modulus: int = 5
    brackets: bool = False
    operators: str | None = None
    shortest: int | None = 1

    def __post_init__(self) -> None:
        check_shortest(self.shortest)
        if self.modulus < 2:
            raise ValueError(f"modulus: {self.modulus} is below 2")
        given = self.operators
        if given is not None and (not given or set(given) - set("+-*") or len(set(given)) != len(given)):
            raise ValueError(f"operators: {given!r} is not some of +-*, each once")

    @property
    def name(self) -> str:
        """``mod5``, ``mod5-brackets``, and what is not usual."""
        kind = f"mod{self.modulus}{'-brackets' if self.brackets else ''}"
        return name_with(kind, operators=(self.operators, None), shortest=(self.shortest, 1))

    @property
    def vocab(self) -> int:
        """Digits and symbols."""
        return self.modulus + len(SYMBOLS)

    @property
    def vocab_out(self) -> int:
        """Digits."""
        return self.modulus

    @property
    def chance(self) -> float:
        """One digit of them all."""
        return 1 / self.modulus

    @property
    def held_out(self) -> "Arithmetic":
        """Expressions of just the length that is asked for."""
        return replace(self, shortest=None)

    def decode(self, tokens: Tokens) -> str:
        """Tokens (T,) as text that Python would read, up to the equals sign; ``.`` is padding."""
        return "".join(str(t) if t < self.modulus else SYMBOLS[t - self.modulus] for t in tokens)

    def sample(self, rng: np.random.Generator, batch: int, length: int) -> tuple[Tokens, Tokens]:
        """Draw expressions and their values.

        Parameters
        ----------
        rng : numpy.random.Generator
        batch : int
        length : int
            Tokens of the longest expressions, without the equals sign.

        Returns
        -------
        tokens, targets : ndarray of int64, shape (batch, length + 1)
        """
        check_sizes(batch, length, 1)
        lengths = draw_lengths(rng, batch, self.shortest, length)
        if not self.brackets:
            lengths -= (lengths + 1) % 2
        tokens = np.full((batch, length + 1), self.modulus + PAD)
        write = self._with_brackets if self.brackets else self._without_brackets
        values, every = write(rng, tokens, lengths), np.arange(batch)
        tokens[every, lengths] = self.modulus + EQUALS
        targets = np.full(tokens.shape, UNSCORED)
        targets[every, lengths] = values
        return tokens, targets

    def _draw_operators(self, rng: np.random.Generator, shape: int | tuple[int, ...]) -> Tokens:
        given = self.operators or ("+-" if self.brackets else "+-*")
        return np.array([SYMBOLS.index(o) for o in given])[rng.integers(len(given), size=shape)]

    def _without_brackets(self, rng: np.random.Generator, tokens: Tokens, lengths: Tokens) -> Tokens:
        """Write expressions of odd lengths into the rows of `tokens`, and return their values."""
        batch, most = len(tokens), (tokens.shape[1] - 1) // 2
        digits = rng.integers(self.modulus, size=(batch, most + 1))
        operators = self._draw_operators(rng, (batch, most))
        for k in range(most + 1):
            here = lengths > 2 * k
            tokens[here, 2 * k] = digits[here, k]
            if k:
                tokens[here, 2 * k - 1] = self.modulus + operators[here, k - 1]
        # the sum of all terms but the last one, and the last one
        total, term = np.zeros(batch, np.int64), digits[:, 0].copy()
        for k in range(1, most + 1):
            here, digit, operator = lengths > 2 * k, digits[:, k], operators[:, k - 1]
            ended = here & (operator != TIMES)
            total[ended] += term[ended]
            factor = np.where(operator == TIMES, term, np.where(operator == PLUS, 1, -1))
            term[here] = (factor * digit)[here] % self.modulus
        return (total + term) % self.modulus

    def _with_brackets(self, rng: np.random.Generator, tokens: Tokens, lengths: Tokens) -> Tokens:
        """Write bracketed expressions into the rows of `tokens`, and return their values.

        All expressions of one depth are split at once, and then evaluated from the deepest ones up.
        """
        row, begin, size = np.arange(len(tokens)), np.zeros_like(lengths), lengths
        levels = []
        while row.size:
            symbol = self.modulus
            opened = size >= 3
            tokens[row[opened], begin[opened]] = symbol + OPEN
            tokens[row[opened], (begin + size - 1)[opened]] = symbol + CLOSE
            digit = rng.integers(self.modulus, size=row.size)
            leaf, negative = size < 5, size % 2 == 0
            middle = begin + size // 2
            tokens[row[leaf], middle[leaf]] = digit[leaf]
            signed = leaf & negative
            tokens[row[signed], middle[signed] - 1] = symbol + MINUS
            value = np.where(negative, -digit, digit) % self.modulus
            split = ~leaf
            row, begin, size = row[split], begin[split], size[split]
            left = rng.integers(1, size - 3)
            operator = self._draw_operators(rng, row.size)
            tokens[row, begin + 1 + left] = symbol + operator
            levels.append((value, split, operator))
            row = np.concatenate([row, row])
            begin = np.concatenate([begin + 1, begin + 2 + left])
            size = np.concatenate([left, size - left - 3])
        below = np.zeros(0, np.int64)
        for value, split, operator in reversed(levels):
            a, b = np.split(below, 2)
            both = np.choose(operator, [a + b, a - b, a * b]) % self.modulus
            value[split] = both
            below = value
        return below
