"""What the outputs of a guard mean, what each row says of them, and the loss on that."""

import logging

import pytest
import torch
from checks import user_error
from datasets import Dataset
from torch.nn.functional import binary_cross_entropy_with_logits

from common import labels
from common.conversation import FEATURES, LABELS, pair
from common.data import taxonomy

FOURTEEN = taxonomy("beavertails")
MASKED = labels.UNKNOWN


def settled(*rows: tuple, asked: list[str] | None = None) -> dict[str, str]:
    """The outputs for rows of (unsafe, categories)."""
    unsafe, named = zip(*rows, strict=True)
    return labels.settle_labels(asked, unsafe, named)


SAFE = (False, [])
FRAUD = (True, ["Fraud"])
SPAM = (True, ["Spam", "Fraud"])
UNNAMED = (True, None)
OUTPUTS = {  # what it shows: the rows, what was asked for, the outputs
    "own names, in an order of their own": ([SPAM, FRAUD, SAFE], None, ["Fraud", "Spam"]),
    "asked for, in the order that was asked": ([SPAM, SAFE], ["Spam", "Fraud"], ["Spam", "Fraud"]),
    "safe or unsafe alone": ([UNNAMED, (False, None)], None, ["unsafe"]),
    "some rows do not say which": ([UNNAMED, FRAUD, SAFE], None, ["unsafe", "Fraud"]),
    "BeaverTails' order": ([(True, FOURTEEN[::-1]), SAFE], None, FOURTEEN),
    "none is of what was asked": ([UNNAMED, SAFE], ["Fraud"], ["unsafe"]),
    "a safe row names what was outvoted": ([(False, ["Spam"]), FRAUD], None, ["Fraud"]),
}


@pytest.mark.parametrize(("rows", "asked", "expected"), OUTPUTS.values(), ids=OUTPUTS)
def test_the_outputs_of_a_guard(rows, asked, expected):
    assert list(settled(*rows, asked=asked)) == expected
    assert list(settled(*rows[::-1], asked=asked)) == expected


def test_a_category_without_a_row_has_no_output_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert list(settled(FRAUD, SAFE, asked=["Spam", "Fraud", "Hate"])) == ["Fraud"]
    assert [record.getMessage() for record in caplog.records] == [
        "No training row, and so no output, for: Spam, Hate"
    ]


def test_commas_between_categories_are_warned_of(caplog):
    """BeaverTails' own names with commas are names."""
    with caplog.at_level(logging.WARNING):
        settled((True, FOURTEEN), SAFE)
        settled((True, ["Spam, bulk"]), FRAUD)
        assert not caplog.records
        settled((True, ["Fraud, Spam"]), FRAUD)
    assert [record.getMessage() for record in caplog.records] == [
        "'Fraud, Spam' is one category; several have semicolons between them."
    ]


def test_a_yaml_file_describes_categories(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("Fraud: deceives to get money\nSpam:\n")
    assert settled(SPAM, SAFE, asked=[str(path)]) == {
        "Fraud": "deceives to get money",
        "Spam": "",
    }
    path.write_text("[Spam, Fraud]")
    assert settled(SPAM, SAFE, asked=[str(path)]) == {"Spam": "", "Fraud": ""}
    assert labels.asked_categories(["from-data"]) is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["a", "a"], "a name is there twice"),
        (["safe"], "'safe' cannot be a category"),
        (["a", "Flagged"], "'Flagged' cannot be a category"),
        (["no: a line\n"], "False is no text; put the name in quotes"),
        (["3"], "expected lines such as"),
        (["a: [1]"], "field a: expected text"),
        (["[]"], "no names"),
    ],
)
def test_what_cannot_be_a_category_is_refused(asked, said, tmp_path):
    if len(asked) == 1 and asked != ["safe"]:
        path = tmp_path / "mine.yaml"
        path.write_text(asked[0])
        asked = [str(path)]
    with user_error(said):
        labels.LabelArguments(categories=asked).check_labels()


def test_what_is_judged_is_one_of_three():
    with user_error("--judge chat: expected one of pair, prompt, response"):
        labels.LabelArguments(judge="chat").check_labels()


def test_what_a_row_does_not_say_is_unknown():
    names = ["unsafe", "Fraud", "Spam"]
    rows = [SAFE, (False, None), FRAUD, UNNAMED, (True, ["Hate"])]
    unsafe, named = zip(*rows, strict=True)
    wanted = labels.targets(names, unsafe, named)
    assert wanted == [
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [1.0, 1.0, 0.0],
        [1.0, MASKED, MASKED],
        [1.0, MASKED, MASKED],
    ]
    without = torch.tensor(labels.targets(names[1:], unsafe, named))
    assert labels.flagged(without).tolist() == list(unsafe)


def test_the_loss_of_what_is_known_is_the_stock_one_to_the_bit():
    torch.manual_seed(0)
    logits = torch.randn(64, 14, requires_grad=True)
    wanted = (torch.rand(64, 14) < 0.2).float()
    weight = torch.linspace(0.5, 3, 14)
    stock = binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight, reduction="sum")
    ours = labels.masked_bce(logits, wanted, weight)
    assert torch.equal(ours, stock)
    gradients = [torch.autograd.grad(one, logits)[0] for one in (ours, stock)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("unknown", [MASKED, float("nan")])
def test_what_is_unknown_has_no_gradient(unknown):
    logits = torch.zeros(2, 3, requires_grad=True)
    wanted = torch.tensor([[1.0, unknown, unknown], [0.0, 1.0, 0.0]])
    labels.masked_bce(logits, wanted, torch.ones(3)).backward()
    assert (logits.grad != 0).tolist() == [[True, False, False], [True, True, True]]


def rows_of(*rows: dict) -> Dataset:
    unknown = {name: None for name in FEATURES}
    return Dataset.from_list([unknown | row for row in rows], features=FEATURES)


def test_a_guard_of_prompts_or_responses_sees_no_more_than_that():
    answered = {"messages": pair("Q", "A"), "categories": ["Fraud"], **dict.fromkeys(LABELS, True)}
    asked = {"messages": pair("Q"), "categories": ["Fraud"], "prompt_unsafe": True}
    prompts = labels.judged_rows(rows_of(answered, asked), "prompt")
    assert list(prompts["messages"]) == [pair("Q"), pair("Q")]
    assert list(prompts["categories"]) == [None, ["Fraud"]]
    (response,) = labels.judged_rows(rows_of(answered), "response")
    assert response["messages"] == pair(None, "A")
    assert response["categories"] == ["Fraud"]
    assert labels.judged_rows(prompts, "pair") is prompts
