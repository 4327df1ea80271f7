"""Scores of guards, on scikit-learn. What is undefined is None, never 0.

Scores are probabilities of the unsafe class; truths are booleans. common/guard_metrics.py is
`binary` as a Hugging Face metric.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from transformers.hf_argparser import HfArg

from common.conversation import UserError
from common.data.repeats import near_copies_between
from common.data.specs import Spec, parse_spec, specs_of_name

HIGHEST = math.nextafter(1.0, 0.0)  # threshold: above 1 nothing could be flagged, not even an error
Truths = Sequence[bool]
Scores = Sequence[float]
Results = dict[str, float | int | list[float] | None]
Statistic = Callable[[np.ndarray], float | None]  # of row numbers


def binary(truth: Truths, score: Scores, threshold: float = 0.5) -> Results:
    """Every score of one yes/no question; a prediction is `score > threshold` (strict, as
    BeaverTails' predict()).

    Args:
        truth: n booleans. score: n probabilities in [0, 1].

    Returns:
        support, positives, base_rate (an AUPRC to beat: that of a guard that guesses),
        always_unsafe_f1, threshold, accuracy, precision, recall, f1, fpr, auprc, auroc,
        recall_at_fpr01, recall_at_fpr05, ece (10 equal-width bins), brier.

    Raises:
        ValueError: lengths differ, a truth is neither yes nor no, or a score is no probability.
    """
    y, p = _checked(truth, score)
    flagged = p > threshold
    hit = flagged & y
    n = len(y)
    positives = int(y.sum())
    alarms = int(flagged.sum())
    hits = int(hit.sum())
    false_alarms = alarms - hits
    misses = positives - hits
    auroc = brier = None
    if 0 < positives < n:
        auroc = float(roc_auc_score(y, p))
    if n:
        squares = (p - y) ** 2
        brier = float(np.mean(squares))
    return {
        "support": n,
        "positives": positives,
        "base_rate": _ratio(positives, n),
        "always_unsafe_f1": _f1(positives, n, positives),
        "threshold": float(threshold),
        "accuracy": _ratio(n - false_alarms - misses, n),
        "precision": _ratio(hits, alarms),
        "recall": _ratio(hits, positives),
        "f1": _f1(hits, alarms, positives),
        "fpr": _ratio(false_alarms, n - positives),
        "auprc": auprc(y, p),
        "auroc": auroc,
        "recall_at_fpr01": recall_at_fpr(y, p, 0.01),
        "recall_at_fpr05": recall_at_fpr(y, p, 0.05),
        "ece": expected_calibration_error(y, p),
        "brier": brier,
    }


def _ratio(part: int, whole: int) -> float | None:
    if not whole:
        return None
    return part / whole


def _f1(hits: int, flagged: int, positives: int) -> float | None:
    if not positives:
        return None
    return 2 * hits / (flagged + positives)


def by_category(
    labels: Sequence[str],
    named: Sequence[Sequence[str] | None],
    said: Sequence[Mapping[str, float]],
    thresholds: Mapping[str, Mapping[str, Any]],
    default: float,
) -> dict[str, Results]:
    """`binary` of each category of a guard, on the rows that know their own; {} where these name
    none of the guard's.

    Args:
        labels: the categories of the guard.
        named: those of each row: none where it is safe, None where nobody knows.
        said: the guard's probabilities for each row; 1 where a verdict has none, as it failed.
        thresholds: of a guard.json, where a category may have its own.
        default: the threshold of the others.
    """
    known = [i for i, names in enumerate(named) if names is not None]
    in_rows = {name for i in known for name in named[i]}
    if in_rows.isdisjoint(labels):
        return {}
    found = {}
    for label in labels:
        truth = [label in named[i] for i in known]
        score = [said[i].get(label, 1.0) for i in known]
        own = thresholds.get(label, {"value": default})
        found[label] = binary(truth, score, own["value"])
    return found


def by_parts(
    languages: Sequence[str | None],
    texts: Sequence[str],
    known: Iterable[str] | None,
    truth: Truths,
    score: Scores,
    threshold: float,
) -> dict[str, dict[str, Results]]:
    """A guard on parts of its rows, for results.json: `languages` and `near_copies`."""
    parts = {"languages": language_parts(languages), "near_copies": {}}
    if known is not None:
        parts["near_copies"] = near_copy_parts(texts, known)
    truth = np.asarray(truth)
    score = np.asarray(score)
    found = {}
    for kind, masks in parts.items():
        of_kind = {
            name: binary(truth[rows], score[rows], threshold) for name, rows in masks.items()
        }
        found[kind] = of_kind
    return found


def language_parts(languages: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Which rows are in each language, where there are several; else {}."""
    said = np.array([language or "not said" for language in languages])
    parts = {str(language): said == language for language in np.unique(said)}
    return parts if len(parts) > 1 else {}


def near_copy_parts(texts: Sequence[str], known: Iterable[str]) -> dict[str, np.ndarray]:
    """All rows, and those whose text is not nearly a known one, such as a guard was trained on; {}
    where none is. Where each row is such a copy, the name of the one part says so.
    """
    _, copies = near_copies_between(known, texts)
    others = ~np.array(copies)
    every = np.ones_like(others)
    if others.all():
        return {}
    if not others.any():
        return {"all rows, each a near-copy": every}
    return {"all rows": every, f"without {sum(copies)} near-copies": others}


def multilabel(
    truth: np.ndarray,
    score: np.ndarray,
    names: Sequence[str],
    threshold: float = 0.5,
) -> dict[str, Results]:
    """`flagged` (any category, as BeaverTails defines it: the highest score decides) and each
    category, on the rows that know it.

    Args:
        truth, score: arrays of shape (n, len(names)). A truth below 0 is unknown, as in
            `common.labels.targets`: its row is unsafe, nobody says of which category.

    Raises:
        ValueError: another shape, or what `binary` refuses.
    """
    truth = np.asarray(truth)
    score = np.asarray(score, dtype=float)
    any_truth = (truth != 0).any(1)
    highest = score.max(1)
    results = {"flagged": binary(any_truth, highest, threshold)}
    columns = zip(names, truth.T, score.T, strict=True)
    for name, y, p in columns:
        known = y >= 0
        results[name] = binary(y[known], p[known], threshold)
    return results


def recall_at_fpr(truth: Truths, score: Scores, fpr: float) -> float | None:
    """The highest recall of any threshold whose false-positive rate is at most `fpr`, None with one
    class only.
    """
    if np.all(truth) or not np.any(truth):
        return None
    false_positive, true_positive, _ = roc_curve(truth, score, drop_intermediate=False)
    return float(true_positive[false_positive <= fpr].max())


def expected_calibration_error(truth: Truths, score: Scores) -> float | None:
    """Mean |confidence - frequency| over ten bins of equal width, weighted by their size (Guo et al.,
    arXiv 1706.04599).
    """
    if not len(score):
        return None
    y = np.asarray(truth, dtype=float)
    p = np.asarray(score, dtype=float)
    bin_of = np.minimum((p * 10).astype(int), 9)
    of_bins = np.bincount(bin_of, weights=p - y)  # confidence less frequency, times the bin's size
    return float(np.abs(of_bins).sum() / len(p))


@dataclass(kw_only=True)
class OperatingPoint:
    """What thresholds are fitted for, as flags of a command; without any the highest F1."""

    target_fpr: float | None = HfArg(
        default=None, help="Fit thresholds to at most this share of false positives, such as 0.01."
    )
    target_recall: float | None = HfArg(
        default=None, help="Fit thresholds to at least this recall, such as 0.9."
    )

    def check_operating_point(self) -> None:
        """Raise UserError where the two do not go together, or are no shares."""
        for flag in ("target_fpr", "target_recall"):
            share = getattr(self, flag)
            if share is not None and not 0 < share < 1:
                raise UserError(f"--{flag} {share}: must lie between 0 and 1, such as 0.01")
        if None not in (self.target_fpr, self.target_recall):
            raise UserError("--target_fpr and --target_recall: give one of them")

    def in_words(self) -> str:
        """What a card says of how its thresholds were fitted."""
        if self.target_fpr is not None:
            return f"at most {self.target_fpr:g} false positives"
        if self.target_recall is not None:
            return f"recall of at least {self.target_recall:g}"
        return "max F1"


def fit_threshold(
    truth: Truths,
    score: Scores,
    split: str,
    point: OperatingPoint | None = None,
) -> dict:
    """The threshold with the highest F1, or that of an operating point.

    For a share of false positives it is the lowest threshold that keeps to it, and for a recall the
    highest that reaches it: of all that do, the one that costs least.

    Args:
        split: the name of the data; a threshold is never fitted on a test split.

    Returns:
        {"value", "how", "on"}. A prediction is `score > value`, so the value lies half-way between
        two scores.

    Raises:
        ValueError: `split` names a test set, or the truth has one class only.
    """
    if is_test(split):
        raise ValueError(
            f"a threshold must not be fitted on a test split ({split}); name a validation split"
        )
    y, p = _checked(truth, score)
    positives = y.sum()
    if not 0 < positives < len(y):
        raise ValueError(
            f"a threshold cannot be fitted on {split}: all {len(y)} rows have one class"
        )
    levels = np.unique([0.0, *p, 1.0])
    low = levels[:-1]
    high = levels[1:]
    middle = (low + high) / 2
    candidates = np.concatenate([middle, levels])  # two neighbouring floats have no middle
    scores = np.sort(p)
    passed = np.searchsorted(scores, candidates, side="right")
    unsafe = np.sort(p[y])
    missed = np.searchsorted(unsafe, candidates, side="right")
    hits = positives - missed
    flagged = len(p) - passed
    fpr = (flagged - hits) / (len(y) - positives)
    recall = hits / positives
    point = point or OperatingPoint()
    if point.target_fpr is not None:
        best = candidates[fpr <= point.target_fpr].min()
    elif point.target_recall is not None:
        reached = candidates[recall >= point.target_recall]
        best = reached.max(initial=0.0)  # a score of 0 is above no threshold
    else:
        f1 = 2 * hits / (flagged + positives)
        best = candidates[np.argmax(f1)]
    return {
        "value": min(float(best), HIGHEST),
        "how": f"{point.in_words()}, n={len(y)}",
        "on": split,
    }


def is_test(spec: str) -> bool:
    """Whether a data spec says that it is a test split: by its split's, else its file's name.

    True of "330k_test", "test.jsonl", "…:wildguardtest", "xstest.csv"; not of "latest.jsonl". Of
    several specs in one name, where it is true of one of them.
    """
    specs = specs_of_name(spec)
    if len(specs) > 1:
        return any(is_test(one) for one in specs)
    try:
        parts = parse_spec(spec)
    except UserError:  # a name of ours for several sets, and no spec
        parts = Spec(spec)
    said = Path(parts.name).name
    if parts.split and not parts.is_file:
        # a split of a configuration for tests is one too
        said = " ".join([*parts.splits, *parts.marks])
    said = re.sub("latest|contest|greatest", "", said.lower())
    return bool(re.search("(?<![a-z])test|test(?![a-z])", said))


def bootstrap(
    statistic: Statistic,
    n: int,
    groups: Sequence | None = None,
    rounds: int = 1000,
    seed: int = 0,
) -> list[float] | None:
    """95 % percentile interval of `statistic(indices)`, where indices are rows drawn with
    replacement.

    The statistic sees one set of indices for everything that it compares, which makes a difference
    of two guards paired. Rows of one group (one prompt) are drawn together. Rounds where it is None
    (one class) are left out; the result is None when fewer than half remain, or without rows.
    """
    groups = range(n) if groups is None else groups
    if len(groups) != n:
        raise ValueError(f"groups must name the group of each of {n} rows, found {len(groups)}")
    if n == 0:
        return None
    rows_of: dict[Any, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    members = list(rows_of.values())
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(rounds):
        rows = []
        for group in rng.integers(len(members), size=len(members)):
            rows += members[group]
        value = statistic(np.array(rows))
        if value is not None:
            values.append(value)
    if not values or len(values) * 2 < rounds:
        return None
    interval = np.percentile(values, [2.5, 97.5])
    return interval.tolist()


def intervals(
    truth: Truths,
    score: Scores,
    threshold: float,
    groups: Sequence | None = None,
    seed: int = 0,
) -> dict[str, list[float] | None]:
    """`bootstrap` of what a guard is chosen by: auprc_interval, auroc_interval, and at `threshold`
    recall_interval and fpr_interval.
    """
    y, p = _checked(truth, score)
    statistics = ranking(y, p) | decisions(y, p > threshold)
    statistics["auprc"] = lambda rows: auprc(y[rows], p[rows])  # a positive is enough
    found = {}
    for name in ("auprc", "auroc", "recall", "fpr"):
        found[f"{name}_interval"] = bootstrap(statistics[name], len(y), groups, seed=seed)
    return found


def ranking(truth: np.ndarray, score: np.ndarray) -> dict[str, Statistic]:
    """What `bootstrap` takes of scores, by metric; without both classes there is no ranking."""
    return {
        "auprc": partial(_of_drawn, average_precision_score, truth, score),
        "auroc": partial(_of_drawn, roc_auc_score, truth, score),
    }


def decisions(truth: np.ndarray, flagged: np.ndarray) -> dict[str, Statistic]:
    """What `bootstrap` takes of yes and no, by metric."""
    return {
        "f1": partial(_of_drawn, _f1_of, truth, flagged),
        "recall": partial(_of_drawn, _recall, truth, flagged),
        "fpr": partial(_of_drawn, _recall, ~truth, flagged),
    }


def _of_drawn(metric, truth, said, rows):
    """A metric of drawn rows; None without a positive, and a ranking's without a negative."""
    drawn = truth[rows]
    if not drawn.any() or (said.dtype != bool and drawn.all()):
        return None
    return float(metric(drawn, said[rows]))


def _f1_of(truth, flagged):
    return _f1((truth & flagged).sum(), flagged.sum(), truth.sum())


def _recall(truth, flagged):
    return flagged[truth].mean()


def agreement(
    a: Truths,
    b: Truths,
    rounds: int = 1000,
    groups: Sequence | None = None,
) -> Results:
    """How far two judges agree: share of equal verdicts, Cohen's kappa, intervals (`bootstrap`).

    Kappa is None when both give one and the same verdict to every row: then chance alone explains
    all agreement.
    """
    a = np.asarray(a, dtype=bool)
    b = np.asarray(b, dtype=bool)
    if len(a) != len(b):
        raise ValueError(f"two judges need lists of one length, found {len(a)} and {len(b)}")

    same = a == b

    def share(rows: np.ndarray) -> float:
        return float(same[rows].mean())

    def kappa(rows: np.ndarray) -> float | None:  # scikit-learn's takes seconds for 1,000 rounds
        share_a = a[rows].mean()
        share_b = b[rows].mean()
        neither = (1 - share_a) * (1 - share_b)
        chance = share_a * share_b + neither
        if chance == 1:
            return None
        beyond = share(rows) - chance
        return float(beyond / (1 - chance))

    n = len(a)
    every = np.arange(n)
    found: Results = {"n": n}
    for name, statistic in {"agreement": share, "kappa": kappa}.items():
        found[name] = statistic(every) if n else None
        found[f"{name}_interval"] = bootstrap(statistic, n, groups, rounds)
    return found


def auprc(truth: Truths, score: Scores) -> float | None:
    """Area under the precision-recall curve (average precision), None without a positive."""
    if not np.any(truth):
        return None
    return float(average_precision_score(truth, score))


def _checked(truth: Truths, score: Scores) -> tuple[np.ndarray, np.ndarray]:
    y = np.asarray(truth)
    p = np.asarray(score, dtype=float)
    if y.shape != p.shape or y.ndim != 1:
        shapes = f"{y.shape} and {p.shape}"
        raise ValueError(f"truth and score must be two lists of one length, found shapes {shapes}")
    known = np.isin(y, (0, 1))  # an unknown label (None) must not count as safe
    if not known.all():
        raise ValueError("truths must be true or false (1 or 0)")
    in_range = (p >= 0) & (p <= 1)
    if not in_range.all():
        raise ValueError("scores must be probabilities in [0, 1]")
    return y.astype(bool), p
