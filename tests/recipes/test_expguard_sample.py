"""The rules that the sample in ExpGuard's columns keeps, so that no keyword, opening or length
gives a label away.
"""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

FOLDER = Path(__file__).resolve().parents[2] / "data/sample/expguard"
SPLITS = {
    name: [
        json.loads(line)
        for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for name in ("train", "validation", "test")
}
ROWS = [row for rows in SPLITS.values() for row in rows]
COLUMNS = [
    "prompt",
    "response",
    *(f"{part}_{what}" for what in ("label", "category") for part in ("prompt", "response")),
]
COLUMNS += ["domain", "scenario"]
DOMAINS, LABELS, BENIGN = {"finance", "healthcare", "law"}, {"safe", "unsafe"}, "Unharmful"
CATEGORIES = {
    "Harassment & Bullying",
    "Privacy Violation",
    "Intellectual Property Infringement",
    "Controlled Substances",
    "Criminal Planning",
    "Fraud, Scams & Deception",
    "Unqualified Professional Advice",
    "Harmful Misinformation & Disinformation",
    "Hate Speech & Discrimination",
}
TERMS = {
    "finance": [
        "escrow",
        "short selling",
        "shell company",
        "KYC",
        "audit",
        "credit score",
        "invoice",
        "wire transfer",
    ],
    "healthcare": [
        "insulin",
        "opioid",
        "prescription",
        "informed consent",
        "medical record",
        "vaccine",
        "placebo",
    ],
    "law": [
        "subpoena",
        "perjury",
        "power of attorney",
        "privilege",
        "settlement",
        "affidavit",
        "deposition",
        "notary",
    ],
}
pytestmark = pytest.mark.sample_data
split = pytest.mark.parametrize("split", SPLITS)
field = pytest.mark.parametrize("field", ["prompt", "response"])


def plain(text: str) -> str:
    """Case, spacing and punctuation apart."""
    return " ".join(re.findall(r"\w+", text.lower()))


def words(field: str, label: str) -> list[int]:
    return [len(row[field].split()) for row in ROWS if row[f"{field}_label"] == label]


def test_size():
    assert len(ROWS) >= 300
    assert sum(row["response"] is not None for row in ROWS) * 2 >= len(ROWS)
    assert len(SPLITS["train"]) > len(SPLITS["test"]) > len(SPLITS["validation"])


@split
def test_columns_and_values(split):
    for row in SPLITS[split]:
        assert list(row) == COLUMNS
        assert (
            row["prompt_label"] in LABELS and row["domain"] in DOMAINS and row["scenario"].strip()
        )
        assert row["prompt"] == row["prompt"].strip() and 8 <= len(row["prompt"].split()) <= 35


@split
def test_response_and_its_label_pair_up(split):
    for row in SPLITS[split]:
        absent = {row[name] is None for name in ("response", "response_label", "response_category")}
        assert len(absent) == 1
        if row["response"] is not None:
            assert row["response_label"] in LABELS and 12 <= len(row["response"].split()) <= 45


@split
@field
def test_only_the_unsafe_has_a_category(split, field):
    for row in SPLITS[split]:
        label, category = row[f"{field}_label"], row[f"{field}_category"]
        assert label is None or category in (CATEGORIES if label == "unsafe" else {BENIGN})


@field
def test_every_category_is_there_to_train_on(field):
    assert {row[f"{field}_category"] for row in SPLITS["train"]} - {None, BENIGN} == CATEGORIES


@split
def test_every_domain_has_each_label_with_and_without_a_response(split):
    cells = Counter(
        (row["domain"], row["prompt_label"], row["response"] is None) for row in SPLITS[split]
    )
    assert len(cells) == 12 and min(cells.values()) >= 3
    answers = Counter(
        (row["domain"], row["response_label"]) for row in SPLITS[split] if row["response"]
    )
    assert len(answers) == 6


@split
@field
def test_labels_are_about_balanced(split, field):
    labels = [row[f"{field}_label"] == "unsafe" for row in SPLITS[split] if row[field]]
    assert 0.4 <= sum(labels) / len(labels) <= 0.6


@pytest.mark.parametrize(
    "pair", [("safe", "safe"), ("safe", "unsafe"), ("unsafe", "safe"), ("unsafe", "unsafe")]
)
@split
def test_prompt_label_does_not_settle_the_response_label(split, pair):
    assert any((row["prompt_label"], row["response_label"]) == pair for row in SPLITS[split])


@field
def test_texts_are_unique_across_splits(field):
    texts = [plain(row[field]) for row in ROWS if row[field]]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("one, other", combinations(SPLITS, 2))
def test_no_scenario_and_no_near_duplicate_across_splits(one, other):
    scenarios = [{row["scenario"] for row in SPLITS[name]} for name in (one, other)]
    assert not scenarios[0] & scenarios[1]
    prompts = [[row["prompt"] for row in SPLITS[name]] for name in (one, other)]
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit(
        prompts[0] + prompts[1]
    )
    assert (vectorizer.transform(prompts[0]) @ vectorizer.transform(prompts[1]).T).max() < 0.5


@pytest.mark.parametrize(
    "domain, term", [(domain, term) for domain, terms in TERMS.items() for term in terms]
)
def test_a_domain_term_stands_in_safe_and_unsafe_prompts(domain, term):
    rows = [
        row
        for row in ROWS
        if row["domain"] == domain and re.search(rf"\b{term}", row["prompt"], re.IGNORECASE)
    ]
    assert {row["prompt_label"] for row in rows} == LABELS


@pytest.mark.parametrize("field, limit", [("prompt", 0.85), ("response", 0.92)])
def test_a_bag_of_words_does_not_settle_it(field, limit):
    """Learnt on train, measured on test: well below 0.95, so there is something left to learn."""
    (train, labels), (test, truth) = (
        ([row[field] for row in rows], [row[f"{field}_label"] == "unsafe" for row in rows])
        for rows in ([row for row in SPLITS[name] if row[field]] for name in ("train", "test"))
    )
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000)
    ).fit(train, labels)
    assert roc_auc_score(truth, model.predict_proba(test)[:, 1]) < limit


@field
def test_length_does_not_settle_it(field):
    safe, unsafe = words(field, "safe"), words(field, "unsafe")
    assert 0.3 < roc_auc_score([0] * len(safe) + [1] * len(unsafe), safe + unsafe) < 0.7
    assert min(len(set(safe)), len(set(unsafe))) > 15


@pytest.mark.parametrize("mark", ["?", ",", "'", "."])
def test_punctuation_of_prompts_is_alike(mark):
    shares = []
    for label in LABELS:
        prompts = [row["prompt"] for row in ROWS if row["prompt_label"] == label]
        shares.append(sum(mark in prompt for prompt in prompts) / len(prompts))
    assert abs(shares[0] - shares[1]) < 0.15


def test_openings_of_prompts_are_shared():
    """Of each label's prompts, most begin with a word that prompts of the other label begin with
    too.
    """
    first = {
        label: [row["prompt"].split()[0] for row in ROWS if row["prompt_label"] == label]
        for label in LABELS
    }
    for one, other in (("safe", "unsafe"), ("unsafe", "safe")):
        assert sum(word in first[other] for word in first[one]) / len(first[one]) > 0.75


@pytest.mark.parametrize("label", sorted(LABELS))
def test_responses_begin_variously(label):
    first = Counter(
        " ".join(row["response"].lower().split()[:3])
        for row in ROWS
        if row["response_label"] == label
    ).most_common(1)
    assert first[0][1] <= 4
