"""Rules of the sample in ExpGuard's columns: no keyword, opening or length gives a label away."""

import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import pytest
from checks import read_rows
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

FOLDER = Path(__file__).resolve().parents[2] / "data/sample/expguard"
SPLITS = {name: read_rows(FOLDER / f"{name}.jsonl") for name in ("train", "validation", "test")}
ROWS = [row for rows in SPLITS.values() for row in rows]
COLUMNS = [
    "prompt",
    "response",
    "prompt_label",
    "response_label",
    "prompt_category",
    "response_category",
    "domain",
    "scenario",
]
DOMAINS = {"finance", "healthcare", "law"}
LABELS = {"safe", "unsafe"}
BENIGN = "Unharmful"
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
TERMS = {  # they stand in safe and in unsafe prompts
    "finance": """escrow, short selling, shell company, KYC, audit, credit score, invoice,
        wire transfer""",
    "healthcare": """insulin, opioid, prescription, informed consent, medical record, vaccine,
        placebo""",
    "law": """subpoena, perjury, power of attorney, privilege, settlement, affidavit, deposition,
        notary""",
}
pytestmark = pytest.mark.sample_data
split = pytest.mark.parametrize("split", SPLITS)
field = pytest.mark.parametrize("field", ["prompt", "response"])


def plain(text: str) -> str:
    """Case, spacing and punctuation apart."""
    return " ".join(re.findall(r"\w+", text.lower()))


def texts(field: str, label: str) -> list[str]:
    return [row[field] for row in ROWS if row[f"{field}_label"] == label]


def test_size():
    assert len(ROWS) >= 300
    assert sum(row["response"] is not None for row in ROWS) * 2 >= len(ROWS)
    assert len(SPLITS["train"]) > len(SPLITS["test"]) > len(SPLITS["validation"])


@split
def test_columns_and_values(split):
    for row in SPLITS[split]:
        assert list(row) == COLUMNS
        assert row["domain"] in DOMAINS
        assert row["scenario"].strip()
        assert row["prompt"] == row["prompt"].strip()
        assert 8 <= len(row["prompt"].split()) <= 35
        if row["response"] is None:
            assert row["response_label"] is row["response_category"] is None
        else:
            assert 12 <= len(row["response"].split()) <= 45
        for field in ("prompt", "response"):
            if row[field] is not None:
                assert row[f"{field}_label"] in LABELS
                known = CATEGORIES if row[f"{field}_label"] == "unsafe" else {BENIGN}
                assert row[f"{field}_category"] in known


@field
def test_every_category_is_there_to_train_on(field):
    assert {row[f"{field}_category"] for row in SPLITS["train"]} - {None, BENIGN} == CATEGORIES


@split
def test_every_domain_has_each_label_with_and_without_a_response(split):
    prompts = Counter()
    answers = set()
    for row in SPLITS[split]:
        prompts[row["domain"], row["prompt_label"], row["response"] is None] += 1
        answers.add((row["domain"], row["response_label"]))
    assert len(prompts) == 12
    assert min(prompts.values()) >= 3
    assert answers >= set(product(DOMAINS, LABELS))


@split
@field
def test_labels_are_about_balanced(split, field):
    labels = [row[f"{field}_label"] == "unsafe" for row in SPLITS[split] if row[field]]
    assert 0.4 <= sum(labels) / len(labels) <= 0.6


@split
def test_prompt_label_does_not_settle_the_response_label(split):
    found = {(row["prompt_label"], row["response_label"]) for row in SPLITS[split]}
    assert found >= set(product(LABELS, LABELS))


@field
def test_texts_are_unique_across_splits(field):
    found = [plain(row[field]) for row in ROWS if row[field]]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(("one", "other"), combinations(SPLITS, 2))
def test_no_scenario_and_no_near_duplicate_across_splits(one, other):
    scenarios = [{row["scenario"] for row in SPLITS[name]} for name in (one, other)]
    assert not scenarios[0] & scenarios[1]
    ours, others = ([row["prompt"] for row in SPLITS[name]] for name in (one, other))
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit(ours + others)
    assert (vectorizer.transform(ours) @ vectorizer.transform(others).T).max() < 0.5


@pytest.mark.parametrize("domain", TERMS)
def test_a_domains_terms_stand_in_safe_and_unsafe_prompts(domain):
    for term in re.split(r",\s+", TERMS[domain]):
        labels = set()
        for row in ROWS:
            if row["domain"] == domain and re.search(rf"(?i)\b{term}", row["prompt"]):
                labels.add(row["prompt_label"])
        assert labels == LABELS, term


@pytest.mark.parametrize(("field", "limit"), [("prompt", 0.85), ("response", 0.92)])
def test_a_bag_of_words_does_not_settle_it(field, limit):
    """Learnt on train, measured on test: well below 0.95, so there is something left to learn."""
    sets = []
    for name in ("train", "test"):
        rows = [row for row in SPLITS[name] if row[field]]
        labels = [row[f"{field}_label"] == "unsafe" for row in rows]
        sets.append(([row[field] for row in rows], labels))
    (train, labels), (test, truth) = sets
    regression = LogisticRegression(max_iter=1000)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), regression).fit(train, labels)
    assert roc_auc_score(truth, model.predict_proba(test)[:, 1]) < limit


@field
def test_length_does_not_settle_it(field):
    safe, unsafe = ([len(text.split()) for text in texts(field, label)] for label in sorted(LABELS))
    truth = [0] * len(safe) + [1] * len(unsafe)
    assert 0.3 < roc_auc_score(truth, safe + unsafe) < 0.7
    assert min(len(set(safe)), len(set(unsafe))) > 15


@pytest.mark.parametrize("mark", ["?", ",", "'", "."])
def test_punctuation_of_prompts_is_alike(mark):
    shares = []
    for label in LABELS:
        prompts = texts("prompt", label)
        shares.append(sum(mark in prompt for prompt in prompts) / len(prompts))
    assert abs(shares[0] - shares[1]) < 0.15


def test_openings_of_prompts_are_shared():
    """Most of each label's prompts begin with a word that some of the other's begin with."""
    safe, unsafe = (
        [text.split()[0] for text in texts("prompt", label)] for label in sorted(LABELS)
    )
    for ours, others in ((safe, unsafe), (unsafe, safe)):
        assert sum(word in others for word in ours) / len(ours) > 0.75


@pytest.mark.parametrize("label", sorted(LABELS))
def test_responses_begin_variously(label):
    openings = Counter(" ".join(text.lower().split()[:3]) for text in texts("response", label))
    assert max(openings.values()) <= 4
