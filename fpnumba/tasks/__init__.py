"""Tasks with known answers: word problems over finite groups."""

from typing import Literal

from fpnumba.tasks.groups import GRAMMAR, Group, group
from fpnumba.tasks.word_problem import WordProblem

__all__ = ["GRAMMAR", "Group", "WordProblem", "get", "group"]


def get(
    name: str, /, *, order: Literal["right", "left"] = "right", identity_first: bool = False
) -> WordProblem:
    """The word problem over the group of that name.

    Parameters
    ----------
    name : str
        ``"z5"``, ``"s3"``, ``"a5"``, ``"d4"``, ``"q8"``, or factors joined by ``x``: ``"s3xz2"``,
        ``"z2xz2xz3"``.
    order, identity_first
        See :class:`WordProblem`.

    Raises
    ------
    ValueError
        If there is no such group; the message names near matches and the grammar.

    Examples
    --------
    >>> from fpnumba import tasks
    >>> tasks.get("a5").vocab
    60
    """
    return WordProblem(group(name), order=order, identity_first=identity_first)
