"""Rules of the sample in ToxicChat's columns: labels, splits apart, and something to learn."""

import re
from itertools import combinations, product
from pathlib import Path

import pytest
from checks import read_rows
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.pipeline import make_pipeline

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data/sample/toxicchat"
SPLITS = {name: read_rows(FOLDER / f"{name}.jsonl") for name in ("guard", "train", "test")}
ROWS = [row for rows in SPLITS.values() for row in rows]
TOXIC = {"plain": 0, "hard_benign": 0, "obvious": 1, "disguised": 1}  # kind -> toxicity
TYPES = {
    "conv_id": str,
    "user_input": str,
    "model_output": str,
    "human_annotation": bool,
    "toxicity": int,
    "jailbreaking": int,
    "openai_moderation": str,
    "output_unsafe": bool,
    "kind": str,
}
HARM = (
    r"\b(kill|poison|steal|st[oa]le|shoot|beat|bomb|attack|hit|hate|drunk|l[iy]e|lied|fake|scam"
    r"|fraud|thie[fv]|threat|murder|stalk|hurt|bull[iy]|rob|blackmail|burn|punish|gun|knife|crime"
    r"|starv|cheat)"
)
WORDS = {"user_input": range(5, 31), "model_output": range(4, 36)}
pytestmark = pytest.mark.sample_data
split = pytest.mark.parametrize("split", SPLITS)
text = pytest.mark.parametrize("field", WORDS)


def words(text: str) -> list[str]:
    """Case, spacing and punctuation apart."""
    return re.findall(r"\w+", text.lower())


def share(rows: list[dict], is_one) -> float:
    """How many of the rows are such."""
    return sum(map(is_one, rows)) / len(rows)


def of_kind(rows: list[dict], *kinds: str) -> list[dict]:
    return [row for row in rows if row["kind"] in kinds]


def is_toxic(row: dict) -> bool:
    return row["toxicity"] == 1


def does_harm(row: dict) -> bool:
    return row["output_unsafe"]


def learned(rows: list[dict], labels: list[bool], field: str = "user_input"):
    """A classifier of character n-grams."""
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    classifier = LogisticRegression(C=10, class_weight="balanced", max_iter=2000)
    return make_pipeline(vectors, classifier).fit([row[field] for row in rows], labels)


def scores(fitted, rows: list[dict], field: str = "user_input"):
    return fitted.predict_proba([row[field] for row in rows])[:, 1]


def test_counts_are_those_of_the_readme(monkeypatch, capsys):
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    _, section = readme.split("## `toxicchat/`")
    blocks = r"```python\n(.*?)```\s+```text\n(.*?)```"
    found = re.search(blocks, section, re.DOTALL)
    code, table = found.groups()
    monkeypatch.chdir(ROOT)
    exec(code, {})
    assert capsys.readouterr().out == table
    assert len(ROWS) >= 500


@split
def test_columns_and_values(split):
    for number, row in enumerate(SPLITS[split], start=1):
        assert list(row) == list(TYPES)
        for name, value in row.items():
            assert type(value) is TYPES[name], row
        assert row["conv_id"] == f"sample-{split}-{number:03d}"
        assert row["openai_moderation"] == "[]"
        assert row["human_annotation"] is False
        for field, lengths in WORDS.items():
            value = row[field]
            assert value == value.strip()
            assert len(value.split()) in lengths, row


@split
def test_kind_and_labels_agree(split):
    for row in SPLITS[split]:
        assert row["toxicity"] == TOXIC[row["kind"]], row
        if row["jailbreaking"]:
            assert row["kind"] == "disguised", row


@split
def test_outputs_do_harm_mostly_where_the_prompt_asks_for_it(split):
    rows = SPLITS[split]
    assert share(of_kind(rows, "plain"), does_harm) <= 0.15
    assert share(of_kind(rows, "hard_benign"), does_harm) <= 0.05
    assert 0.7 <= share(of_kind(rows, "disguised"), does_harm) <= 0.9
    assert share([row for row in rows if is_toxic(row)], does_harm) < 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_shares_of_the_rows_to_learn_and_report_on(split):
    rows = SPLITS[split]
    toxic = [row for row in rows if is_toxic(row)]
    hard = of_kind(rows, "hard_benign")
    disguised = of_kind(toxic, "disguised")
    assert 0.15 <= share(rows, is_toxic) <= 0.2
    assert 0.18 <= len(hard) / len(rows) <= 0.22
    assert len(disguised) * 2 >= len(toxic)


def test_the_head_start_knows_obvious_harm():
    rows = SPLITS["guard"]
    toxic = [row for row in rows if is_toxic(row)]
    disguised = of_kind(toxic, "disguised")
    assert 0.25 <= share(rows, is_toxic) <= 0.35
    assert len(disguised) <= 0.15 * len(toxic)


@text
def test_no_text_twice(field):
    texts = {" ".join(words(row[field])) for row in ROWS}
    assert len(texts) == len(ROWS)


@text
@pytest.mark.parametrize(("one", "other"), combinations(SPLITS, 2))
def test_no_near_duplicate_across_files(one, other, field):
    first = [set(words(row[field])) for row in SPLITS[one]]
    second = [set(words(row[field])) for row in SPLITS[other]]
    for a, b in product(first, second):
        assert len(a & b) < 0.5 * len(a | b), (a, b)


def test_words_of_harm_mark_hard_benign_rather_than_disguised():
    def names_harm(row: dict) -> bool:
        return re.search(HARM, row["user_input"], re.IGNORECASE) is not None

    assert share(of_kind(ROWS, "hard_benign"), names_harm) > 0.5
    assert share(of_kind(ROWS, "disguised"), names_harm) < 0.25
    assert share(of_kind(ROWS, "plain"), names_harm) < 0.1


def test_the_outputs_of_train_teach_what_the_head_start_does_not_know():
    """Learned on guard, then on guard and on train labelled by its outputs; measured on test."""
    guard, train, test = SPLITS.values()
    of_guard = [does_harm(row) for row in guard]
    of_train = [does_harm(row) for row in train]
    outputs = learned(guard, of_guard, "model_output")
    found = scores(outputs, train, "model_output")
    assert roc_auc_score(of_train, found) > 0.9

    labels = [is_toxic(row) for row in guard]
    start = learned(guard, labels)
    auroc = {}
    for kind in ("obvious", "disguised"):
        rows = of_kind(test, kind, "plain")
        auroc[kind] = roc_auc_score([is_toxic(row) for row in rows], scores(start, rows))
    assert auroc["obvious"] > auroc["disguised"] + 0.05

    more = [row for row in train if does_harm(row) or not is_toxic(row)]
    labels += [does_harm(row) for row in more]
    taught = learned(guard + more, labels)
    hidden = of_kind(test, "plain", "hard_benign", "disguised")
    truth = [does_harm(row) for row in hidden]
    before = average_precision_score(truth, scores(start, hidden))
    after = average_precision_score(truth, scores(taught, hidden))
    assert after > before + 0.05
