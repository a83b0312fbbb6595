"""catbAbI: stories of bAbI, one after the other, with questions to be answered on the way."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpnumba.tasks.task import UNSCORED, Tokens, check_sizes, name_with
from fpnumba.tasks.text import check_validation

Split = Literal["train", "validation", "test"]
# How the files of each part end.
ENDINGS = {"train": "_train.txt", "validation": "_valid.txt", "test": "_test.txt"}
END = "<eos>"


class Story(NamedTuple):
    """One story: its tokens after the mark that opens it, what follows each, and where an answer follows."""

    tokens: Tokens
    following: Tokens
    asked: NDArray[np.bool_]


@dataclass(frozen=True)
class Babi:
    """Stories of bAbI as one stream of words, after Schlag et al., "Learning associative inference using fast weight
    memory" (arXiv 2011.07831).

    Words are in lower case; full stops and question marks are words, an answer is one word even if it has commas, and
    supporting facts are left out. Every story begins with the word that ends all stories. A sequence is random stories,
    one after the other, the last one cut off.

    Parameters
    ----------
    path : path
        A folder with bAbI's files, such as ``tasks_1-20_v1-2/en-valid-10k`` (``qa*_train.txt``, ``qa*_valid.txt`` and
        ``qa*_test.txt``), or one such file.
    mode : {"qa", "lm"}
        Whether only answers are scored, at the question mark before each, or the next word everywhere.
    split : {"train", "validation", "test"}
    validation : float
        Where there are no files for validation, this share of the stories of each file for training, its last ones, is
        held out.

    Examples
    --------
    >>> import numpy as np, pathlib, tempfile
    >>> from fpnumba import tasks
    >>> story = "1 Mary went home.\\n2 Where is Mary?\\thome\\t1\\n"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "qa1_train.txt"
    ...     _ = path.write_text(story * 10)
    ...     task = tasks.get(f"babi:{path}")
    ...     tokens, targets = task.sample(np.random.default_rng(0), batch=1, length=9)
    >>> task.decode(tokens[0])
    '<eos> mary went home . where is mary ?'
    >>> task.words[targets[0, -1]], (targets[0, :-1] == -1).all()
    ('home', np.True_)
    """

    path: Path
    mode: Literal["qa", "lm"] = "qa"
    split: Split = "train"
    validation: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).resolve())
        if self.mode not in ("qa", "lm"):
            raise ValueError(f"mode: {self.mode!r} is neither 'qa' nor 'lm'")
        if self.split not in ENDINGS:
            raise ValueError(f"split: {self.split!r} is none of {', '.join(ENDINGS)}")
        check_validation(self.validation)
        if not self._contents.stories[self.split]:
            raise ValueError(f"task: there are no stories for {self.split} in {self.path}")

    @cached_property
    def _contents(self) -> "_Contents":
        files = self._files()
        stamps = tuple((stat.st_mtime_ns, stat.st_size) for stat in (file.stat() for file in files))
        return _read(files, stamps, self.validation)

    def _files(self) -> tuple[Path, ...]:
        if not self.path.is_dir():
            return (self.path,)
        found = [file for ending in ENDINGS.values() for file in sorted(self.path.glob(f"qa*{ending}"))]
        if not any(file.name.endswith(ENDINGS["train"]) for file in found):
            raise ValueError(f"task: there is no qa*_train.txt in {self.path}")
        return tuple(found)

    @property
    def name(self) -> str:
        """``babi:`` and the path, and what is not usual."""
        return name_with(
            f"babi:{self.path}",
            mode=(self.mode, "qa"),
            split=(self.split, "train"),
            validation=(self.validation, 0.1),
        )

    @property
    def words(self) -> tuple[str, ...]:
        """The words of all files, in the order of their tokens."""
        return self._contents.words

    @property
    def vocab(self) -> int:
        """Number of different words."""
        return len(self.words)

    @property
    def vocab_out(self) -> int:
        """The same, though only some are answers."""
        return self.vocab

    @property
    def chance(self) -> float:
        """One answer of all that occur, or one word."""
        return 1 / (self._contents.answers if self.mode == "qa" else self.vocab)

    @property
    def held_out(self) -> "Babi":
        """The stories for validation."""
        return replace(self, split="validation")

    def decode(self, tokens: Tokens) -> str:
        """Tokens (T,) as text."""
        return " ".join(self.words[token] for token in tokens)

    def sample(self, rng: np.random.Generator, batch: int, length: int) -> tuple[Tokens, Tokens]:
        """Draw sequences of `length` words and what is to be said at each, each of shape (batch, length)."""
        check_sizes(batch, length)
        stories = self._contents.stories[self.split]
        tokens, targets = (np.empty((batch, length), np.int64) for _ in range(2))
        for row in range(batch):
            at = 0
            while at < length:
                story = stories[rng.integers(len(stories))]
                here = slice(at, min(at + len(story.tokens), length))
                count = here.stop - at
                scored = story.asked[:count] | (self.mode == "lm")
                tokens[row, here] = story.tokens[:count]
                targets[row, here] = np.where(scored, story.following[:count], UNSCORED)
                at = here.stop
        return tokens, targets


class _Contents(NamedTuple):
    """What the files hold: words, stories of each part, and how many different answers there are."""

    words: tuple[str, ...]
    stories: dict[str, list[Story]]
    answers: int


@lru_cache(maxsize=4)
def _read(files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...], validation: float) -> _Contents:
    """The contents of some files; read again once one has another time or size."""
    texts: dict[str, list[list[tuple[str, bool]]]] = {part: [] for part in ENDINGS}
    separate = any(file.name.endswith(ENDINGS["validation"]) for file in files) and len(files) > 1
    for file in files:
        stories = list(_stories(file))
        part = next((part for part, ending in ENDINGS.items() if file.name.endswith(ending)), "train")
        if len(files) == 1 or (part == "train" and not separate):
            held = min(max(1, round(validation * len(stories))), len(stories))
            texts["train"] += stories[: len(stories) - held]
            texts["validation"] += stories[len(stories) - held :]
        else:
            texts[part] += stories
    everything = [pair for stories in texts.values() for story in stories for pair in story]
    words = (END, *sorted({word for word, _ in everything} - {END}))
    number = {word: k for k, word in enumerate(words)}

    def made(text: list[tuple[str, bool]]) -> Story:
        inner = [number[word] for word, _ in text]
        asked = np.array([answer for _, answer in text] + [False])
        return Story(np.array([0, *inner]), np.array([*inner, 0]), asked)

    answers = {word for word, answer in everything if answer}
    return _Contents(words, {part: [*map(made, texts[part])] for part in texts}, max(len(answers), 1))


def _stories(file: Path) -> Iterator[list[tuple[str, bool]]]:
    """The stories of a file: words, and whether each is an answer."""
    try:
        lines = file.read_text("utf-8").lower().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"task: {file} is no text in UTF-8") from None
    story: list[tuple[str, bool]] = []
    for count, line in enumerate(lines, 1):
        number, _, text = line.strip().partition(" ")
        if not (number.isdecimal() and text):
            raise ValueError(f"task: {file}, line {count}: {line!r} is not of bAbI, a number and a sentence")
        if number == "1" and story:
            yield story
            story = []
        sentence, *answer = (piece.strip() for piece in text.split("\t"))
        mark = "?" if answer else "."
        story += [(word, False) for word in sentence.removesuffix(mark).split()]
        story.append((mark, False))
        if answer:
            story.append((answer[0], True))
    if story:
        yield story
