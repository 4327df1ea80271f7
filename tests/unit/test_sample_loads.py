"""data/sample as the loader gives it, and whether its texts are those that were checked."""

import pytest
import sample_data
from checks import read_rows

from common.data import load_conversations, taxonomy


def written(name: str) -> list[dict]:
    return read_rows(sample_data.FOLDER / f"{name}.jsonl")


def test_the_texts_are_those_that_were_checked():
    """The checks run when this fails, and with `-m sample_data`."""
    message = f"data/sample has changed; when its checks pass, renew the hash: {sample_data.HOW}"
    assert sample_data.is_checked(), message


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_beavertails(split):
    names = taxonomy("beavertails")
    needed = ("response_unsafe", "categories")
    rows = load_conversations(f"beavertails-sample:{split}", categories=names, require=needed)
    known = written(f"beavertails/{split}")
    assert list(rows["response_unsafe"]) == [not row["is_safe"] for row in known]


@pytest.mark.parametrize("split", ["guard", "train", "test"])
def test_toxicchat_has_both_labels(split):
    rows = load_conversations(f"toxicchat-sample:{split}")
    known = written(f"toxicchat/{split}")
    assert rows["prompt_unsafe"] == [bool(row["toxicity"]) for row in known]
    assert rows["response_unsafe"] == [row["output_unsafe"] for row in known]
    assert rows[0]["id"] == f"sample-{split}-001"
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
