"""Parity, arithmetic, copying, text and bAbI: answers against independent ways to find them, names, chance levels."""

import doctest
import importlib
import itertools
import math
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fpnumba import tasks

SEEDS = st.integers(0, 2**32)


def check_shapes(task: tasks.Task, tokens: Any, targets: Any) -> None:
    assert tokens.shape == targets.shape
    assert tokens.dtype == targets.dtype == np.int64
    assert np.all((tokens >= 0) & (tokens < task.vocab))
    assert np.all((targets >= -1) & (targets < task.vocab_out))


def is_near(count: int, total: int, chance: float) -> bool:
    """Within six standard deviations of a binomial count."""
    return abs(count - total * chance) < 6 * math.sqrt(total * chance * (1 - chance))


# --- parity --------------------------------------------------------------------------------------------------


@hypothesis.given(final=st.booleans(), batch=st.integers(0, 3), length=st.integers(0, 20), seed=SEEDS)
def test_parity(final: bool, batch: int, length: int, seed: int) -> None:
    task = tasks.get("parity-final" if final else "parity")
    tokens, targets = task.sample(np.random.default_rng(seed), batch, length)
    check_shapes(task, tokens, targets)
    assert tokens.shape == (batch, length)
    products = tasks.get("z2").targets(tokens)  # type: ignore[attr-defined]
    for row, bits, product in zip(targets.tolist(), tokens.tolist(), products.tolist(), strict=True):
        whole = [sum(bits[: t + 1]) % 2 for t in range(length)]
        assert whole == product
        assert row == ([-1] * (length - 1) + whole[-1:] if final else whole)


# --- arithmetic ----------------------------------------------------------------------------------------------


def in_python(text: str, modulus: int) -> int:
    """Python's own arithmetic."""
    return eval(text, {"__builtins__": {}}) % modulus  # type: ignore[no-any-return]


@hypothesis.given(
    modulus=st.sampled_from([2, 5, 7, 12]),
    brackets=st.booleans(),
    operators=st.sampled_from([None, "+", "-*", "+-*"]),
    shortest=st.sampled_from([None, 1, 3, 50]),
    batch=st.integers(0, 5),
    length=st.integers(1, 40),
    seed=SEEDS,
)
def test_answers_are_pythons(
    modulus: int,
    brackets: bool,
    operators: str | None,
    shortest: int | None,
    batch: int,
    length: int,
    seed: int,
) -> None:
    task = tasks.Arithmetic(modulus, brackets, operators, shortest)
    tokens, targets = task.sample(np.random.default_rng(seed), batch, length)
    check_shapes(task, tokens, targets)
    assert tokens.shape == (batch, length + 1)
    for row, answers in zip(tokens, targets, strict=True):
        text, equals, rest = task.decode(row).partition("=")
        assert equals
        assert set(rest) <= {"."}
        (at,) = np.flatnonzero(answers != -1)
        size = int(np.flatnonzero(row == modulus + 5)[0])
        assert at == size
        assert answers[at] == in_python(text, modulus)
        longest = length if brackets else length - (length + 1) % 2
        least = min(shortest or length, length)
        assert least - (not brackets) <= size <= longest
        allowed = operators or ("+-" if brackets else "+-*")
        assert set(text) - set("0123456789()-") <= set(allowed)
        assert brackets or not set(text) & set("()")


def test_lengths_and_values_spread() -> None:
    task = tasks.get("mod5-brackets", shortest=3)
    tokens, _ = task.sample(np.random.default_rng(0), 6000, 12)
    sizes = np.argmax(tokens == 10, axis=1)
    assert all(is_near(int((sizes == n).sum()), 6000, 0.1) for n in range(3, 13))
    exact, answers = task.held_out.sample(np.random.default_rng(0), 6000, 12)
    assert (exact[:, -1] == 10).all()
    counts = np.bincount(answers[:, -1], minlength=5)
    assert all(is_near(int(count), 6000, task.chance) for count in counts)
    assert tasks.scaled_accuracy(task.chance, task.chance) == 0
    assert tasks.scaled_accuracy(1.0, task.chance) == 1
    assert math.isnan(tasks.scaled_accuracy(1.0, 1.0))


def test_every_short_expression_occurs() -> None:
    task = tasks.get("mod3", shortest=None)
    tokens, _ = task.sample(np.random.default_rng(0), 2000, 3)
    found = {task.decode(row) for row in tokens}  # type: ignore[attr-defined]
    assert found == {f"{a}{o}{b}=" for a, o, b in itertools.product("012", "+-*", "012")}
    task = tasks.get("mod2-brackets", shortest=None)
    for size, wanted in ((1, {"0", "1"}), (2, {"-0", "-1"}), (3, {"(0)", "(1)"}), (4, {"(-0)", "(-1)"})):
        tokens, _ = task.sample(np.random.default_rng(0), 50, size)
        assert {task.decode(row)[:-1] for row in tokens} == wanted  # type: ignore[attr-defined]


# --- copying -------------------------------------------------------------------------------------------------


@hypothesis.given(
    shortest=st.sampled_from([None, 1, 4]), batch=st.integers(0, 5), length=st.integers(1, 30), seed=SEEDS
)
def test_copies_are_what_was_read(shortest: int | None, batch: int, length: int, seed: int) -> None:
    task = tasks.Copy(shortest)
    tokens, targets = task.sample(np.random.default_rng(seed), batch, length)
    check_shapes(task, tokens, targets)
    assert tokens.shape == (batch, 2 * length + 3)
    for row, answers in zip(tokens, targets, strict=True):
        string, copy, rest = task.decode(row)[1:].split("|")
        assert task.decode(row)[0] == "^"
        assert string == copy
        assert set(rest) <= {"."}
        assert min(shortest or length, length) <= len(string) <= length
        assert task.decode(answers[answers >= 0]) == string
        assert np.flatnonzero(answers >= 0)[0] == len(string) + 1
        assert (answers >= 0).sum() == len(string)


@hypothesis.given(
    shortest=st.sampled_from([None, 1, 4]), room=st.integers(0, 60), length=st.integers(1, 15), seed=SEEDS
)
def test_a_context_is_full_of_examples(shortest: int | None, room: int, length: int, seed: int) -> None:
    task = tasks.Copy(shortest, context=2 * length + 3 + room)
    tokens, targets = task.sample(np.random.default_rng(seed), 4, length)
    check_shapes(task, tokens, targets)
    for row, answers in zip(tokens, targets, strict=True):
        text = task.decode(row)
        assert "." not in text
        scored = ""
        for example in text.split("^")[1:]:
            string, _, rest = example.partition("|")
            copy, mark, _ = rest.partition("|")
            assert string.startswith(copy)
            if mark:
                assert copy == string
                scored += string
        assert task.decode(answers[answers >= 0]) == scored
        ahead = answers[:-1] >= 0
        np.testing.assert_array_equal(answers[:-1][ahead], row[1:][ahead])


def test_letters_are_uniform() -> None:
    task = tasks.get("copy")
    assert (task.vocab, task.vocab_out) == (29, 29)
    _, targets = task.sample(np.random.default_rng(0), 1000, 30)
    counts = np.bincount(targets[targets >= 0], minlength=29)
    assert not counts[26:].any()
    assert all(is_near(int(count), int(counts.sum()), task.chance) for count in counts[:26])
    with pytest.raises(ValueError, match="context has 20"):
        tasks.get("copy,context=20").sample(np.random.default_rng(0), 1, 10)


# --- files ---------------------------------------------------------------------------------------------------


@hypothesis.given(
    text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r"), min_size=40), seed=SEEDS
)
def test_text(tmp_path_factory: pytest.TempPathFactory, text: str, seed: int) -> None:
    path = tmp_path_factory.mktemp("text") / "File, with a comma.txt"
    path.write_bytes(text.encode())
    task = tasks.get(f"text:{path},validation=0.25")
    assert isinstance(task, tasks.Text)
    assert task.characters == "".join(sorted(set(text)))
    cut = len(text) - round(0.25 * len(text))
    assert (task.vocab, task.vocab_out, task.chance) == (len(set(text)), len(set(text)), 1 / len(set(text)))
    for part, whole in ((task, text[:cut]), (task.held_out, text[cut:])):
        tokens, targets = part.sample(np.random.default_rng(seed), 5, 7)
        check_shapes(task, tokens, targets)
        for row, following in zip(tokens, targets, strict=True):
            piece = part.decode(row) + part.decode(following[-1:])
            assert piece in whole
            assert part.decode(following) == piece[1:]
    with pytest.raises(ValueError, match="too few"):
        task.sample(np.random.default_rng(0), 1, len(text))
    assert tasks.get(task.name) == task
    assert tasks.get(task.held_out.name) == task.held_out


STORIES = """\
1 Mary moved to the bathroom.
2 John went to the {place}.
3 Where is John? \t{place}\t2
4 John got the milk there.
5 Where is the milk?\tJohn,milk\t4
1 Sandra is {place}ed.
2 Is Sandra well?\tno\t1
"""


def stories_of(*places: str) -> str:
    return "".join(STORIES.format(place=place) for place in places)


def test_babi_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "qa1_train.txt"
    path.write_text(stories_of(*"abcdefghij"))
    task = tasks.get(f"babi:{path}")
    assert isinstance(task, tasks.Babi)
    assert task.chance == 1 / 12  # ten places, "john,milk" and "no"
    first = "<eos> mary moved to the bathroom . john went to the {0} . where is john ? {0} john got the milk there . "
    first += "where is the milk ? john,milk"
    second = "<eos> sandra is {0}ed . is sandra well ? no"
    for part, places in ((task, "abcdefghi"), (task.held_out, "j")):
        whole = [form.format(place) for place in places for form in (first, second)]
        tokens, targets = part.sample(np.random.default_rng(1), 40, 60)
        check_shapes(task, tokens, targets)
        seen = set()
        for row, answers in zip(tokens, targets, strict=True):
            text = part.decode(row)
            pieces = ["<eos>" + piece.rstrip() for piece in text.split("<eos>")[1:]]
            assert set(pieces[:-1]) <= set(whole)
            assert any(story.startswith(pieces[-1]) for story in whole)
            seen |= set(pieces[:-1])
            words = text.split()
            questions = [t for t, word in enumerate(words) if word == "?"]
            np.testing.assert_array_equal(np.flatnonzero(answers >= 0), questions)
            for t in questions:
                if t + 1 < len(words):
                    assert task.words[answers[t]] == words[t + 1]
        assert seen == set(whole)
    model = tasks.get(f"babi:{path}", mode="lm")
    tokens, targets = model.sample(np.random.default_rng(1), 4, 60)
    np.testing.assert_array_equal(targets[:, :-1], tokens[:, 1:])
    assert model.chance == 1 / model.vocab
    assert tasks.get(model.held_out.name) == model.held_out


def test_babi_of_a_folder(tmp_path: Path) -> None:
    for kind, places in (("train", "ab"), ("valid", "c"), ("test", "d")):
        for number in (1, 2):
            (tmp_path / f"qa{number}_{kind}.txt").write_text(stories_of(*places))
    task = tasks.get(f"babi:{tmp_path}")
    rng = np.random.default_rng(0)
    for part, there in ((task, "ab"), (task.held_out, "c"), (tasks.get(task.name, split="test"), "d")):
        tokens, _ = part.sample(rng, 30, 30)
        assert set(part.decode(tokens.ravel()).split()) & set("abcd") == set(there)  # type: ignore[attr-defined]
        assert part.vocab == task.vocab
    (tmp_path / "qa1_test.txt").unlink()
    (tmp_path / "qa2_test.txt").unlink()
    with pytest.raises(ValueError, match="no stories for test"):
        tasks.get(f"babi:{tmp_path},split=test")


def test_files_that_are_not_right(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tasks.get(f"text:{tmp_path}/nothing.txt")
    (tmp_path / "data").write_bytes(b"\xff\xfe\xff")
    for kind in ("text", "babi"):
        with pytest.raises(ValueError, match="no text in UTF-8"):
            tasks.get(f"{kind}:{tmp_path}/data")
    (tmp_path / "data").write_text("a")
    with pytest.raises(ValueError, match="too few to learn from"):
        tasks.get(f"text:{tmp_path}/data")
    with pytest.raises(ValueError, match="line 1: 'a' is not of bAbI"):
        tasks.get(f"babi:{tmp_path}/data")
    (tmp_path / "data").write_text("1 One story.\n")
    with pytest.raises(ValueError, match="no stories for train"):
        tasks.get(f"babi:{tmp_path}/data")
    with pytest.raises(ValueError, match="no qa"):
        tasks.get(f"babi:{tmp_path}")


# --- names ---------------------------------------------------------------------------------------------------

NAMES = [
    *(
        "s5",
        "a5",
        "a5xz2,order=left",
        "s3,identity_first=true",
        "parity",
        "parity-final",
        "mod5",
        "mod97-brackets",
    ),
    *("mod5,shortest=none", "mod7-brackets,operators=+-*,shortest=3", "copy", "copy,shortest=5,context=256"),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_go_round(name: str) -> None:
    task = tasks.get(name)
    assert task.name == name
    again = tasks.get(task.name)
    one, other = (t.sample(np.random.default_rng(5), 3, 9) for t in (task, again))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    assert tasks.get(task.held_out.name).name == task.held_out.name
    assert tasks.get(f" {name.replace('mod', 'MOD')}").name == name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("coppy", "did you mean copy?"),
        ("paritty", "did you mean parity?"),
        ("mod", "write mod5"),
        ("text", "write text:PATH"),
        ("babi:", "no path"),
        ("m11", "other tasks are parity, parity-final, modN"),
        ("copy,size=3", "Copy has no option 'size'; there are shortest, context"),
        ("parity,final=true", "Parity has no option 'final'; it has none"),
        ("copy,shortest=0", "shortest: 0"),
        ("copy,shortest=many", "shortest: 'many'"),
        ("copy,context=3", "context: 3"),
        ("copy,context=x", "wrong kind"),
        ("mod1", "modulus: 1"),
        ("mod5,operators=+/", "operators: '+/'"),
        ("s3,order=up", "order: 'up'"),
    ],
)
def test_other_names_are_refused_in_one_line(name: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        tasks.get(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["parity", "mod5", "mod5-brackets", "copy"])
def test_sizes_are_checked(name: str) -> None:
    task = tasks.get(name)
    with pytest.raises(ValueError, match="batch: -1"):
        task.sample(np.random.default_rng(0), -1, 3)
    with pytest.raises(ValueError, match="length: -2"):
        task.sample(np.random.default_rng(0), 1, -2)


@pytest.mark.parametrize(
    "name", ["", "arithmetic", "babi", "copying", "groups", "parity", "task", "text", "word_problem"]
)
def test_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fpnumba.tasks.{name}".rstrip(".")))
    assert result.attempted > 0
    assert result.failed == 0
