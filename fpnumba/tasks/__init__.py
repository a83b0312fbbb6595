"""Tasks with known answers: word problems of groups, parity, arithmetic, copying, and files of text and bAbI."""

import dataclasses
import difflib
import json
import re
from pathlib import Path
from typing import Any

from fpnumba.tasks.arithmetic import Arithmetic
from fpnumba.tasks.babi import Babi
from fpnumba.tasks.copying import Copy
from fpnumba.tasks.groups import GRAMMAR, Group, group
from fpnumba.tasks.parity import Parity
from fpnumba.tasks.task import UNSCORED, Task, scaled_accuracy
from fpnumba.tasks.text import Text
from fpnumba.tasks.word_problem import WordProblem

__all__ = [
    "GRAMMAR",
    "OTHERS",
    "UNSCORED",
    "Arithmetic",
    "Babi",
    "Copy",
    "Group",
    "Parity",
    "Task",
    "Text",
    "WordProblem",
    "get",
    "group",
    "scaled_accuracy",
]

OTHERS = "parity, parity-final, modN, modN-brackets, copy, text:PATH, babi:PATH"
_MODULAR = re.compile(r"mod([0-9]{1,6})(-brackets)?")
_OPTIONS = re.compile(r"((?:,[a-z_]+=[^,]*)*)$")


def get(name: str, /, **options: Any) -> Task:
    """The task of that name.

    Parameters
    ----------
    name : str
        One of

        * a group, for its :class:`WordProblem`: ``"z5"``, ``"s3"``, ``"a5"``, ``"d4"``, ``"q8"``, or factors joined by
          ``x``: ``"s3xz2"``, ``"z2xz2xz3"``;
        * ``"parity"``, ``"parity-final"`` (:class:`Parity`);
        * ``"mod5"``, ``"mod5-brackets"``, or any other modulus (:class:`Arithmetic`);
        * ``"copy"`` (:class:`Copy`);
        * ``"text:PATH"`` (:class:`Text`) and ``"babi:PATH"`` (:class:`Babi`), of a file or folder.

        Options may follow: ``"copy,shortest=5,context=256"``, ``"s3,order=left"``.
    **options
        The same by keyword, and the stronger ones: those of the class.

    Returns
    -------
    Task
        With ``name, vocab, vocab_out, chance, held_out`` and ``sample(rng, batch, length) -> (tokens, targets)``.

    Raises
    ------
    ValueError
        If there is no such task or option; the message names near matches and what there is.
    OSError
        If a file cannot be read.

    Examples
    --------
    >>> from fpnumba import tasks
    >>> tasks.get("a5").vocab
    60
    >>> tasks.get("mod5-brackets,operators=+-*").vocab_out
    5
    >>> tasks.get("copy", shortest=5).name
    'copy,shortest=5'
    """
    found = _OPTIONS.search(name)
    assert found is not None
    for assignment in found[1].split(",")[1:]:
        option, _, value = assignment.partition("=")
        options.setdefault(option, _value(value))
    kind, colon, path = name[: found.start()].partition(":")
    kind = kind.strip().lower()
    modular = _MODULAR.fullmatch(kind)
    if colon and kind in ("text", "babi"):
        if not path:
            raise ValueError(f"task: {name!r} has no path after the colon")
        return _make(Text if kind == "text" else Babi, {"path": Path(path).expanduser()}, options)
    if not colon and kind in ("parity", "parity-final"):
        return _make(Parity, {"final": kind != "parity"}, options)
    if not colon and modular:
        given = {"modulus": int(modular[1]), "brackets": modular[2] is not None}
        return _make(Arithmetic, given, options)
    if not colon and kind == "copy":
        return _make(Copy, {}, options)
    if kind in ("text", "babi", "mod", "modulo"):
        hint = "mod5" if kind.startswith("mod") else f"{kind}:PATH"
        raise ValueError(f"task: {name!r} is not complete; write {hint} (there are also {OTHERS})")
    near = difflib.get_close_matches(kind, ["parity", "parity-final", "mod5-brackets", "copy"], n=1)
    if near and len(kind) > 3:
        raise ValueError(
            f"task: unknown task {name!r}; did you mean {near[0]}? (there are {OTHERS}; {GRAMMAR})"
        )
    try:
        found_group = group(name[: found.start()])
    except ValueError as error:
        raise ValueError(f"{error}; other tasks are {OTHERS}") from None
    return _make(WordProblem, {"group": found_group}, options)


def _make(kind: Any, given: dict[str, Any], options: dict[str, Any]) -> Task:
    there = [field.name for field in dataclasses.fields(kind) if field.name not in given]
    for option in options:
        if option not in there:
            what = f"there are {', '.join(there)}" if there else "it has none"
            raise ValueError(f"task: {kind.__name__} has no option {option!r}; {what}")
    try:
        made: Task = kind(**given, **options)
    except TypeError as error:
        raise ValueError(
            f"task: an option of {kind.__name__} has a value of the wrong kind: {error}"
        ) from None
    return made


def _value(text: str) -> Any:
    """``none``, ``true``, ``false``, a number, or else a word."""
    lowered = text.strip().lower()
    try:
        return None if lowered == "none" else json.loads(lowered)
    except ValueError:
        return text.strip()
