"""data/sample as the loader gives it, and whether its texts are those that were checked."""

import json

import pytest
import sample_data

from common.conversation import UserError
from common.data import load_conversations, taxonomy
from common.data.tables import plain_row


def written(name: str) -> list[dict]:
    lines = (sample_data.FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_texts_are_those_that_were_checked():
    """The checks run when this fails, and with `-m sample_data`."""
    message = f"data/sample has changed; when its checks pass, renew the hash: {sample_data.HOW}"
    assert sample_data.is_checked(), message


def test_another_text_is_another_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_data, "FOLDER", tmp_path)
    found = set()
    for name, content in (("a", "x"), ("a", "y"), ("b", "y")):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / name).write_text(content)
        found.add(sample_data.digest())
    assert len(found) == 3


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_beavertails(split):
    names = taxonomy("beavertails")
    needed = ("response_unsafe", "categories")
    rows = load_conversations(f"beavertails-sample:{split}", categories=names, require=needed)
    unsafe = [not row["is_safe"] for row in written(f"beavertails/{split}")]
    assert list(rows["response_unsafe"]) == unsafe


@pytest.mark.parametrize("split", ["guard", "train", "test"])
def test_toxicchat_has_both_labels(split):
    rows = load_conversations(
        f"toxicchat-sample:{split}", require=["prompt_unsafe", "response_unsafe"]
    )
    known = written(f"toxicchat/{split}")
    assert rows["prompt_unsafe"] == [bool(row["toxicity"]) for row in known]
    assert rows["response_unsafe"] == [row["output_unsafe"] for row in known]
    assert rows[0]["id"] == f"sample-{split}-001"
    assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant"]


def test_a_response_without_a_label():
    """ToxicChat's own rows: the label is about the prompt alone."""
    own = ("output_unsafe", "kind")
    row = {name: value for name, value in written("toxicchat/guard")[0].items() if name not in own}
    for official in (row, row | {"output_unsafe": None}):
        plain = plain_row(official, "row 1")
        assert (plain["response"], plain["response_label"]) == (None, None)


def test_toxicchat_names_its_splits():
    with pytest.raises(
        UserError, match="toxicchat-sample has no split 'validation'; it has toxicchat-sample:guard"
    ):
        load_conversations("toxicchat-sample:validation")
