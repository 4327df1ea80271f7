"""The rules that the sample in ToxicChat's columns keeps: counts, labels, splits apart, and
something to learn.
"""

import json
import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.pipeline import make_pipeline

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data/sample/toxicchat"
SPLITS = {
    name: [
        json.loads(line)
        for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for name in ("guard", "train", "test")
}
ROWS = [row for rows in SPLITS.values() for row in rows]
TOXIC = {"plain": 0, "hard_benign": 0, "obvious": 1, "disguised": 1}  # kind -> toxicity
TYPES = {"conv_id": str, "user_input": str, "model_output": str, "human_annotation": bool}
TYPES |= {
    "toxicity": int,
    "jailbreaking": int,
    "openai_moderation": str,
    "output_unsafe": bool,
    "kind": str,
}
HARM = r"\b(kill|poison|steal|st[oa]le|shoot|beat|bomb|attack|hit|hate|drunk|l[iy]e|lied|fake|scam|fraud|thie[fv]"
HARM += r"|threat|murder|stalk|hurt|bull[iy]|rob|blackmail|burn|punish|gun|knife|crime|starv|cheat)"
TEXTS = ("user_input", "model_output")
pytestmark = pytest.mark.sample_data
split = pytest.mark.parametrize("split", SPLITS)
text = pytest.mark.parametrize("field", TEXTS)


def words(text: str) -> list[str]:
    """Case, spacing and punctuation apart."""
    return re.findall(r"\w+", text.lower())


def kinds(split: str) -> Counter:
    return Counter(row["kind"] for row in SPLITS[split])


def model(texts: list[str], labels: list[bool]):
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    classifier = LogisticRegression(C=10, class_weight="balanced", max_iter=2000)
    return make_pipeline(vectors, classifier).fit(texts, labels)


def scores(fitted, rows: list[dict], field: str):
    return fitted.predict_proba([row[field] for row in rows])[:, 1]


def test_counts_are_those_of_the_readme(monkeypatch, capsys):
    section = (FOLDER.parent / "README.md").read_text(encoding="utf-8").split("## `toxicchat/`")[1]
    code, table = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", section, re.DOTALL).groups()
    monkeypatch.chdir(ROOT)
    exec(code, {})
    assert capsys.readouterr().out == table
    assert len(ROWS) >= 500


@split
def test_columns_and_values(split):
    for row in SPLITS[split]:
        assert {name: type(value) for name, value in row.items()} == TYPES and list(row) == list(
            TYPES
        )
        assert row["openai_moderation"] == "[]" and row["human_annotation"] is False
        for field, lengths in zip(TEXTS, (range(5, 31), range(4, 36)), strict=True):
            assert row[field] == row[field].strip() and len(row[field].split()) in lengths, row
    assert [row["conv_id"] for row in SPLITS[split]] == [
        f"sample-{split}-{i:03d}" for i in range(1, len(SPLITS[split]) + 1)
    ]


@split
def test_kind_and_labels_agree(split):
    for row in SPLITS[split]:
        assert row["toxicity"] == TOXIC[row["kind"]], row
        assert row["kind"] == "disguised" or not row["jailbreaking"], row


@split
def test_outputs_do_harm_mostly_where_the_prompt_asks_for_it(split):
    for kind, (low, high) in {
        "plain": (0, 0.15),
        "hard_benign": (0, 0.05),
        "disguised": (0.7, 0.9),
    }.items():
        rows = [row for row in SPLITS[split] if row["kind"] == kind]
        assert low <= sum(row["output_unsafe"] for row in rows) / len(rows) <= high, kind
    assert any(row["toxicity"] and not row["output_unsafe"] for row in SPLITS[split])


@pytest.mark.parametrize("split", ["train", "test"])
def test_shares_of_the_rows_to_learn_and_report_on(split):
    found, size = kinds(split), len(SPLITS[split])
    toxic = found["obvious"] + found["disguised"]
    assert 0.15 <= toxic / size <= 0.2 and 0.18 <= found["hard_benign"] / size <= 0.22
    assert found["disguised"] * 2 >= toxic


def test_the_head_start_knows_obvious_harm():
    found = kinds("guard")
    toxic = found["obvious"] + found["disguised"]
    assert 0.25 <= toxic / len(SPLITS["guard"]) <= 0.35 and found["disguised"] <= 0.15 * toxic


@text
def test_no_text_twice(field):
    texts = [" ".join(words(row[field])) for row in ROWS]
    assert len(set(texts)) == len(texts)


@text
@pytest.mark.parametrize("one, other", combinations(SPLITS, 2))
def test_no_near_duplicate_across_files(one, other, field):
    sides = [[set(words(row[field])) for row in SPLITS[name]] for name in (one, other)]
    for a, b in product(*sides):
        assert len(a & b) < 0.5 * len(a | b), (a, b)


def test_words_of_harm_mark_hard_benign_rather_than_disguised():
    share = {
        kind: sum(bool(re.search(HARM, row["user_input"], re.IGNORECASE)) for row in rows)
        / len(rows)
        for kind in TOXIC
        if (rows := [row for row in ROWS if row["kind"] == kind])
    }
    assert share["hard_benign"] > 0.5 and share["disguised"] < 0.25 and share["plain"] < 0.1


def test_the_outputs_of_train_teach_what_the_head_start_does_not_know():
    """Character n-grams: learnt on guard, then on guard and on train labelled by its outputs;
    measured on test.
    """
    guard, train, test = SPLITS.values()
    outputs = model([row["model_output"] for row in guard], [row["output_unsafe"] for row in guard])
    assert (
        roc_auc_score(
            [row["output_unsafe"] for row in train], scores(outputs, train, "model_output")
        )
        > 0.9
    )

    start = model([row["user_input"] for row in guard], [bool(row["toxicity"]) for row in guard])
    found = scores(start, test, "user_input")
    auroc = {}
    for kind in ("obvious", "disguised"):
        pairs = [
            (row["kind"] == kind, s)
            for row, s in zip(test, found, strict=True)
            if row["kind"] in (kind, "plain")
        ]
        auroc[kind] = roc_auc_score(*zip(*pairs, strict=True))
    assert auroc["obvious"] > auroc["disguised"] + 0.05

    learnt = [row for row in train if row["output_unsafe"] or not row["toxicity"]]
    labels = [bool(row["toxicity"]) for row in guard] + [row["output_unsafe"] for row in learnt]
    taught = model([row["user_input"] for row in guard + learnt], labels)
    hidden = [row for row in test if row["kind"] != "obvious"]
    truth = [row["output_unsafe"] for row in hidden]
    before, after = (
        average_precision_score(truth, scores(m, hidden, "user_input")) for m in (start, taught)
    )
    assert after > before + 0.05
