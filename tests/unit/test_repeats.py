"""Repeated pairs, prompt-grouped splits, and what two splits share."""

import random

import datasets
import pytest
from checks import user_error, write_rows

from common.conversation import FEATURES, LABELS, pair
from common.data import (
    deduplicate,
    grouped_split,
    near_copies_between,
    overlap,
    prompt_key,
    taxonomy,
)
from common.data.splits import load_training_rows

A, B, C = taxonomy("beavertails")[:3]


def answered(prompt: str, response: str = "Hello", unsafe=False, categories=None) -> dict:
    """A row that labels its response."""
    row = {"id": prompt, "messages": pair(prompt, response), "source": "test", "language": None}
    labels = dict.fromkeys(LABELS) | {"response_unsafe": unsafe, "categories": categories}
    return row | labels


def dataset(*rows: dict) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows), features=FEATURES)


SAFE = (False, [])
VOTES = {  # what it shows: annotations of one pair, the label and the categories, conflicting
    "agreed": ([(True, [A, B]), (True, [B, A])], (True, [A, B]), 0),
    "majority": ([(True, [A]), SAFE, SAFE], SAFE, 1),
    "a tie is safe, as in GuardBench": ([(True, [A]), SAFE], SAFE, 1),
    "categories by majority": ([(True, [A, B]), (True, [A]), SAFE], (True, [A]), 1),
    "no majority, the most often named": ([(True, [A]), (True, [B]), SAFE], (True, [A, B]), 1),
    "one named most often": ([(True, [A])] * 2 + [(True, [B]), (True, [C])], (True, [A]), 1),
    "nothing known": ([(None, None)] * 2, (None, None), 0),
    "whoever does not know does not vote": ([(True, None), (True, [A])], (True, [A]), 1),
    "unsafe of an unknown kind": ([(True, None)] * 2 + [SAFE], (True, None), 1),
}


@pytest.mark.parametrize(("votes", "expected", "conflicting"), VOTES.values(), ids=VOTES)
def test_deduplicate_votes(votes, expected, conflicting):
    rows = [answered("Hi", unsafe=unsafe, categories=named) for unsafe, named in votes]
    unique, report = deduplicate(dataset(*rows))
    (row,) = unique
    assert (row["response_unsafe"], row["categories"]) == expected
    assert report == {"rows": len(votes), "unique": 1, "conflicting": conflicting}


def test_deduplicate_keeps_order_and_other_answers():
    rows = dataset(answered("One"), answered("Two"), answered("One"), answered("One", "Another"))
    unique, report = deduplicate(rows)
    texts = [pair("One", "Hello"), pair("Two", "Hello"), pair("One", "Another")]
    assert list(unique["messages"]) == texts
    assert report == {"rows": 4, "unique": 3, "conflicting": 0}


@pytest.mark.parametrize(
    ("prompts", "ratio", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.3, 3), (57, 0.2, 11)]
)
def test_grouped_split(prompts, ratio, held_out):
    """No prompt on both sides, no row lost, and never an empty side."""
    spellings = ("Prompt {}", "  prompt  {}", "PROMPT {}")
    texts = [text.format(number) for number in range(prompts) for text in spellings]
    rows = dataset(*map(answered, texts))
    train, test = grouped_split(rows, ratio, 0)
    assert sorted([*train["id"], *test["id"]]) == sorted(texts)
    assert not set(map(prompt_key, train)) & set(map(prompt_key, test))
    assert len(set(map(prompt_key, test))) == held_out
    assert grouped_split(rows, ratio, 0)[1].to_list() == test.to_list()


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan")])
def test_grouped_split_needs_a_share_and_two_prompts(ratio):
    with user_error("eval_split_ratio"):
        grouped_split(dataset(answered("Hi"), answered("Bye")), ratio, 0)
    with user_error("prompt"):
        grouped_split(dataset(answered("Hi"), answered("hi")), 0.5, 0)


def test_overlap_counts_prompts_and_pairs():
    test = dataset(answered("hi "), answered("HI", "Another answer"), answered("Bye"))
    found = overlap(dataset(answered("Hi")), test)
    assert list(found.values()) == [3, 2, 1, 1]
    assert list(found) == ["rows", "prompt_in_train", "pair_in_train", "near_copies_of_train"]


LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_near_copies_between_two_sets():
    """The same but for case and signs; a word more at the end; half of it; something else."""
    train = [LONG.upper() + "!", "quite another text of some length", f"{LONG} and"]
    test = [LONG, f"{LONG} fifteen", LONG[:30], "something else here", LONG]
    of_train, of_test = near_copies_between(iter(train), test)
    assert of_train == [True, False, True]
    assert of_test == [True, True, False, False, True]
    assert near_copies_between([], test) == ([], [False] * 5)
    assert near_copies_between(train, []) == ([False] * 3, [])


def test_near_copies_between_are_the_pairs_of_near_copies():
    """Against every pair of a few hundred texts, compared one by one."""
    draw = random.Random(0)
    words = [f"w{number}" for number in range(40)]
    base = [draw.choices(words, k=draw.randint(3, 30)) for _ in range(60)]
    texts = []
    for text in base * 4:
        changed = list(text)
        for _ in range(draw.randint(0, 2)):
            changed[draw.randrange(len(changed))] = "new"
        texts.append(" ".join(changed))
    many, few = texts[:150], texts[150:]

    def shingles(text):
        found = text.split()
        return set(zip(found, found[1:], found[2:], strict=False))

    def alike(one, other):
        shared = shingles(one) & shingles(other)
        return len(shared) >= 0.8 * len(shingles(one) | shingles(other))

    of_many, of_few = near_copies_between(many, few)
    assert of_many == [any(alike(one, other) for other in few) for one in many]
    assert of_few == [any(alike(one, other) for one in many) for other in few]
    assert 0 < sum(of_few) < len(few)


def prompts(path, *texts: str) -> str:
    rows = [{"prompt": text, "prompt_label": "safe"} for text in texts]
    return str(write_rows(path, rows))


def test_deduplicated_training_rows_hold_no_copy_of_validation_rows(tmp_path, caplog):
    twice = "Quite another text"
    training = prompts(tmp_path / "train.jsonl", f"{LONG} and", "Hi", twice, twice)
    validation = prompts(tmp_path / "validation.jsonl", LONG, "Hello")
    files = (training, validation)
    with caplog.at_level("INFO"):
        train, held_out, shared = load_training_rows(*files, None, 0, one_row_a_pair=True)
    assert [prompt_key(row) for row in train] == ["hi", "quite another text"]
    assert len(held_out) == 2
    assert shared["left_out_of_train"] == 1
    assert "1 training rows are near-copies of validation rows" in caplog.text
    plain, _, shared = load_training_rows(*files, None, 0)
    assert len(plain) == 4
    assert shared["near_copies_of_train"] == 1
    with user_error("every training row is a near-copy"):
        load_training_rows(validation, validation, None, 0, one_row_a_pair=True)


def answers(path, *rows: tuple[str, str, int]) -> str:
    lines = []
    for prompt, response, label in rows:
        row = {"prompt": prompt, "response": response}
        lines.append(row | {"prompt_label": label, "response_label": label})
    return str(write_rows(path, lines))


@pytest.fixture
def base(tmp_path) -> str:
    """Two answers to one prompt, and two others."""
    rows = [("Bad", "A", 1), ("Bad", "B", 1), ("Good", "C", 0), ("Mended", "D", 0)]
    return answers(tmp_path / "base.jsonl", *rows)


@pytest.fixture
def held_out(tmp_path) -> str:
    """One of its prompts with another answer, and one of its answers to another prompt."""
    return answers(tmp_path / "validation.jsonl", ("Good", "Z", 0), ("Worse", "C", 1))


def test_prompts_are_corrected_and_deduplicated(base, held_out, tmp_path):
    """Other answers do not make another prompt."""
    later = answers(tmp_path / "later.jsonl", ("Mended", "E", 1))
    options = {"judge": "prompt", "require": ("prompt_unsafe",), "one_row_a_pair": True}
    train, _, _ = load_training_rows([base, later], None, None, 0, **options)
    assert list(train["messages"]) == [pair("Bad"), pair("Good"), pair("Mended")]
    assert list(train["prompt_unsafe"]) == [True, False, True]
    _, _, shared = load_training_rows(base, held_out, None, 0, **options)
    assert shared["left_out_of_train"] == 1
    assert shared["pair_in_train"] == 0


def test_responses_are_split(base, held_out):
    """Other prompts do not make another answer."""
    options = {"judge": "response", "require": ("response_unsafe",)}
    train, validation, shared = load_training_rows(base, None, 0.5, 3, **options)
    assert len(train) == len(validation) == 2
    assert shared["pair_in_train"] == 0
    assert all(messages[0]["role"] == "assistant" for messages in train["messages"])
    _, _, shared = load_training_rows(base, held_out, None, 0, **options)
    assert shared["pair_in_train"] == 1
    assert shared["near_copies_of_train"] == 1


LEFT = {  # how the last unsafe row goes: the files of labels by question, options
    "relabelled": ([{"Bad": 1, "Good": 0}, {"Bad": 0}], {}),
    "held out": ([{"Bad": 1, "Good": 0}], {"held_out_share": 0.5}),
    "a near-copy": (
        [{"Bad": 1, "Good": 0}],
        {"validation": {"bad!": 1, "Else": 0}, "one_row_a_pair": True},
    ),
}


def labelled(path, labels: dict[str, int]) -> str:
    rows = [{"prompt": text, "label": label} for text, label in labels.items()]
    return str(write_rows(path, rows))


@pytest.mark.parametrize(("files", "options"), LEFT.values(), ids=LEFT)
def test_an_unsafe_row_is_left_to_train_on(tmp_path, files, options):
    specs = []
    for number, labels in enumerate(files):
        specs.append(labelled(tmp_path / f"{number}.jsonl", labels))
    given = {"validation": None, "held_out_share": None, "require": ("prompt_unsafe",)} | options
    if given["validation"] is not None:
        given["validation"] = labelled(tmp_path / "validation.jsonl", given["validation"])
    with user_error("no unsafe row is left to train on"):
        load_training_rows(specs, seed=1, **given)  # which holds out the unsafe one of two


def test_training_rows_that_are_all_unsafe_are_warned_of(tmp_path, caplog):
    spec = labelled(tmp_path / "rows.jsonl", {"Bad": 1, "Worse": 1})
    load_training_rows(spec, None, None, 0, require=("prompt_unsafe",))
    assert "no safe row; the guard can only learn to flag everything" in caplog.text
