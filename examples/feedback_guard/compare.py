"""Guards against one another: metrics of thousands of bootstrap draws at once, and the tests that
rest on them.

A draw is a column of weights (how often each prompt was drawn), so that a guard's scores are sorted
once for all draws instead of once a draw. All guards see the same draws, which makes every
difference a paired one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np
from scipy.stats import binomtest, norm

from common import metrics

CELLS = 2**18  # of a block of weights: what a processor's cache holds


@dataclass(frozen=True)
class Part:
    """n prompts of one split with a yes/no question: `truth` of shape (n,), `groups` the cluster of
    each prompt.
    """

    ids: Sequence[str]
    truth: np.ndarray
    groups: Sequence[str]

    @property
    def both(self) -> bool:
        """Whether there is a positive and a negative."""
        return 0 < self.truth.sum() < len(self.truth)


@dataclass(frozen=True)
class Said:
    """One guard on a `Part`: scores and decisions of shape (n,); `validation`: scores of the m rows
    of thresholds.
    """

    score: np.ndarray
    decided: np.ndarray
    validation: np.ndarray = field(default_factory=lambda: np.zeros(0))


# --- draws ------------------------------------------------------------------------------------------------------------


def draw_weights(groups: Sequence[str], draws: int, seed: int, block: int) -> Iterator[np.ndarray]:
    """How often each of n rows was drawn, in blocks of shape (n, at most `block`); rows of a group
    come together.

    The draws are those of `common.metrics.bootstrap` with the same seed.
    """
    seen: dict[str, int] = {}
    index = np.array([seen.setdefault(group, len(seen)) for group in groups], dtype=int)
    rng, size = np.random.default_rng(seed), len(seen)
    for start in range(0, draws if size else 0, block):
        rounds = min(block, draws - start)
        drawn = rng.integers(size, size=(rounds, size)) + size * np.arange(rounds)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rounds * size).reshape(rounds, size)
        yield np.ascontiguousarray(counts[:, index].T, dtype=np.float32)


def statistics(
    truth: np.ndarray,
    said: Said,
    weights: np.ndarray,
    *,
    validation_truth: np.ndarray | None = None,
    validation_weights: np.ndarray | None = None,
    target_recall: float = 0.8,
    block_rate: float | None = None,
) -> dict[str, np.ndarray]:
    """Every metric of one guard on d weighted samples of n prompts; NaN for what is undefined.

    Args:
        weights: shape (n, d). validation_weights: shape (m, d), of the rows of `validation_truth`.
        target_recall: `fpr_at_recall` is the false-positive rate at this recall on the prompts' own
        ROC curve. On
            validation it selects a threshold, anew in each sample of its rows, at which
            `fpr_at_threshold` and `recall_at_threshold` are taken.
        block_rate: the share of prompts to block for `caught`, the share of positives among what is
        blocked then.

    Returns:
        metric: shape (d,).
    """
    wide = weights.dtype
    hit = said.decided
    cells = (
        np.stack([truth & hit, ~truth & hit, truth & ~hit, ~truth & ~hit]).astype(wide) @ weights
    )
    tp, fp, fn, tn = cells
    positives, negatives = tp + fn, fp + tn
    with np.errstate(divide="ignore", invalid="ignore"):
        out = {
            "accuracy": (tp + tn) / (positives + negatives),
            "precision": tp / (tp + fp),
            "recall": tp / positives,
            "f1": np.where(positives > 0, 2 * tp / (2 * tp + fp + fn), np.nan),
            "fpr": fp / negatives,
            "flagged": (tp + fp) / (positives + negatives),
        }
        order = np.argsort(-said.score, kind="stable")
        ranked = weights[order]
        hits = np.zeros((len(order) + 1, weights.shape[1]), dtype=wide)
        blocked = np.zeros_like(hits)
        np.cumsum(ranked, axis=0, out=blocked[1:])
        np.cumsum(ranked * truth[order][:, None], axis=0, out=hits[1:])
        out |= _curve(
            said.score[order], hits, blocked, positives, negatives, target_recall, block_rate
        )
        if validation_weights is not None and validation_truth is not None:
            cuts, reached = _cuts(
                validation_truth, said.validation, validation_weights, target_recall
            )
            above = len(order) - np.searchsorted(np.sort(said.score), cuts, side="right")
            at = (above[np.maximum(reached, 0)], np.arange(weights.shape[1])) if len(cuts) else None
            unknown = np.full(weights.shape[1], np.nan)
            fpr = (blocked[at] - hits[at]) / negatives if at else unknown
            recall = hits[at] / positives if at else unknown
            out["fpr_at_threshold"] = np.where(reached < 0, np.nan, fpr)
            out["recall_at_threshold"] = np.where(reached < 0, np.nan, recall)
    return out


def _curve(
    score: np.ndarray,
    hits: np.ndarray,
    blocked: np.ndarray,
    positives: np.ndarray,
    negatives: np.ndarray,
    target_recall: float,
    block_rate: float | None,
) -> dict[str, np.ndarray]:
    """Metrics of a ranking: scikit-learn's values, from counts above each rank, of shape (n + 1,
    d).

    Prompts of equal score are blocked together: `fpr_at_recall` is that of the first score, from
    the highest, down to which the share of positives is at least the target; nothing is taken
    between two scores.
    """
    # after each run of equal scores
    ends = np.append(0, 1 + np.flatnonzero(np.append(np.diff(score) != 0, True)))
    hits, blocked = (hits, blocked) if len(ends) == len(hits) else (hits[ends], blocked[ends])
    wrong, both = blocked - hits, (positives > 0) & (negatives > 0)
    gained = np.diff(hits, axis=0)
    precision = hits[1:] / np.maximum(blocked[1:], 1)
    area = (np.diff(wrong, axis=0) * (hits[1:] + hits[:-1])).sum(0) / 2
    out = {
        "auprc": (gained * precision).sum(0) / positives,
        "auroc": area / (positives * negatives),
    }
    for name, rate in (("recall_at_fpr01", 0.01), ("recall_at_fpr05", 0.05)):
        out[name] = np.where(wrong <= rate * negatives, hits, 0).max(0) / positives
    reached = (hits >= target_recall * positives - 1e-3).argmax(0)
    out["fpr_at_recall"] = wrong[reached, np.arange(wrong.shape[1])] / negatives
    out = {name: np.where(both, values, np.nan) for name, values in out.items()}
    if block_rate is not None:  # between two scores as if equal scores came in random order
        goal = block_rate * blocked[-1]
        after = np.maximum((blocked >= goal - 1e-6).argmax(0), 1)
        column = np.arange(blocked.shape[1])
        low, high = blocked[after - 1, column], blocked[after, column]
        share = np.clip((goal - low) / np.maximum(high - low, 1e-9), 0, 1)
        caught = hits[after - 1, column] + share * (hits[after, column] - hits[after - 1, column])
        out["caught"] = np.where(positives > 0, caught / positives, np.nan)
    return out


def _cuts(
    truth: np.ndarray, score: np.ndarray, weights: np.ndarray, target_recall: float
) -> tuple[np.ndarray, np.ndarray]:
    """A threshold below each positive's score, highest first, and which of them reaches the recall
    in each draw.

    A prompt is flagged above the threshold, which lies half-way to the next lower score of any row.
    -1: no positive.
    """
    rows = np.flatnonzero(truth)
    rows = rows[np.argsort(-score[rows], kind="stable")]
    levels = np.unique(np.append(score, 0.0))
    below = levels[np.maximum(np.searchsorted(levels, score[rows]) - 1, 0)]
    middle = (below + score[rows]) / 2
    cuts = np.where(score[rows] > 0, np.where(middle < score[rows], middle, below), -1.0)
    if not len(rows):
        return cuts, np.full(weights.shape[1], -1)
    found = np.cumsum(weights[rows], axis=0)
    reached = (found >= target_recall * found[-1] - 1e-6).argmax(0)
    return cuts, np.where(found[-1] > 0, reached, -1)


def threshold_at_recall(truth: np.ndarray, score: np.ndarray, target_recall: float) -> float | None:
    """The highest threshold (flagged is `score > value`) with that recall at least; None without a
    positive.
    """
    cuts, reached = _cuts(truth, score, np.ones((len(truth), 1)), target_recall)
    return None if reached[0] < 0 else float(cuts[reached[0]])


def point(
    truth: np.ndarray, said: Said, validation_truth: np.ndarray | None = None, **options
) -> dict:
    """`statistics` of the rows as they are: metric -> number, None for what is undefined."""
    if not len(truth):
        return {}
    ones = None if validation_truth is None else np.ones((len(validation_truth), 1))
    given = {"validation_truth": validation_truth, "validation_weights": ones}
    values = statistics(truth, said, np.ones((len(truth), 1)), **given, **options)
    return {name: None if np.isnan(v[0]) else float(v[0]) for name, v in values.items()}


def bootstrap(
    test: Part,
    lines: Mapping[str, Said],
    draws: int,
    seed: int,
    validation: Part | None = None,
    **options,
) -> dict[str, dict[str, np.ndarray]]:
    """Metrics of every guard on the same draws of `test`, thresholds from the same draws of
    `validation`.

    Returns:
        guard: metric: shape (draws,), NaN where undefined.
    """
    block = max(1, CELLS // max(1, len(test.ids)))
    again = (
        iter(()) if validation is None else draw_weights(validation.groups, draws, seed + 1, block)
    )
    blocks: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in lines}
    for weights in draw_weights(test.groups, draws, seed, block):
        given = {"validation_weights": next(again, None)}
        given["validation_truth"] = None if validation is None else validation.truth
        for name, said in lines.items():
            blocks[name].append(statistics(test.truth, said, weights, **given, **options))
    return {
        name: {metric: np.concatenate([part[metric] for part in parts]) for metric in parts[0]}
        if parts
        else {}
        for name, parts in blocks.items()
    }


# --- what follows from the draws --------------------------------------------------------------------------------------


def interval(values: np.ndarray) -> list[float] | None:
    """95 % percentile interval; None when fewer than half of the draws are defined."""
    known = values[~np.isnan(values)]
    return (
        None
        if not len(known) or len(known) * 2 < len(values)
        else np.percentile(known, [2.5, 97.5]).tolist()
    )


def difference(a: float | None, b: float | None, drawn: np.ndarray, n: int | None) -> dict | None:
    """a minus b with its interval, p, standard error and power; None where one of them is
    undefined.

    Args:
        drawn: the difference in each draw. n: test prompts; None if the error does not rest on them
        alone: no power.

    Returns:
        difference, interval, p (two-sided, of the draws), standard_error, n_for_80_percent_power
        (test prompts), detectable (the difference found with 80 % power at this n), draws (that are
        defined).
    """
    if a is None or b is None:
        return None
    known = drawn[~np.isnan(drawn)].astype(float)
    out = {"difference": a - b, "interval": interval(drawn), "draws": len(known)}
    if out["interval"] is None:
        return out | dict.fromkeys(("p", "standard_error", "n_for_80_percent_power", "detectable"))
    error = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    tail = min((known <= 0).sum(), (known >= 0).sum())
    # +1: a p of 0 is no property of a finite number of draws
    p = min(1.0, float(2 * (tail + 1) / (len(known) + 1)))
    known_power = (
        dict.fromkeys(("n_for_80_percent_power", "detectable"))
        if n is None
        else power(a - b, error, n)
    )
    return out | {"p": p, "standard_error": error} | known_power


def by_seed(
    first: Mapping[str, Mapping[str, float | None]],
    second: Mapping[str, Mapping[str, float | None]],
    metric: str,
) -> list[float] | None:
    """The lowest and the highest difference of one seed; None with one seed each.

    Arms with the same seeds are paired by seed, else each of the first (of both, where the first
    has one) is taken from the other's mean. The mean over seeds of these differences is that of the
    arms.

    Args:
        first, second: metrics by name, such as A8-seed0.
    """
    a, b = (
        {name.rpartition("-seed")[2]: of.get(metric) for name, of in arm.items()}
        for arm in (first, second)
    )
    if None in [*a.values(), *b.values()] or len(a) == len(b) == 1:
        return None
    if set(a) == set(b):
        found = [a[seed] - b[seed] for seed in a]
    else:
        ours, theirs = list(a.values()), list(b.values())
        found = (
            [x - np.mean(theirs) for x in ours] if len(ours) > 1 else [ours[0] - y for y in theirs]
        )
    return [float(min(found)), float(max(found))]


def power(effect: float, standard_error: float, n: int) -> dict[str, float | int | None]:
    """How many test prompts show `effect` at 5 %, two-sided, with 80 % power, if the error falls as
    1 / sqrt(n).
    """
    factor = float(norm.ppf(0.975) + norm.ppf(0.8))
    needed = ceil(n * (factor * standard_error / effect) ** 2 - 1e-9) if effect else None
    return {"n_for_80_percent_power": needed, "detectable": factor * standard_error}


def holm(p: Mapping[str, float | None]) -> dict[str, float | None]:
    """Adjusted p-values of a family of tests (Holm 1979); one that could not be made counts in the
    family.
    """
    out: dict[str, float | None] = dict.fromkeys(p)
    largest = 0.0
    for rank, name in enumerate(sorted((k for k in p if p[k] is not None), key=lambda k: p[k])):
        largest = max(largest, min(1.0, p[name] * (len(p) - rank)))
        out[name] = largest
    return out


def mcnemar(truth: np.ndarray, a: np.ndarray, b: np.ndarray) -> dict[str, float | int]:
    """McNemar's exact test of two lists of decisions: rows that only one of them has right."""
    only_a, only_b = (
        int(((a == truth) & (b != truth)).sum()),
        int(((a != truth) & (b == truth)).sum()),
    )
    n = only_a + only_b
    return {
        "only_first_right": only_a,
        "only_second_right": only_b,
        "p": binomtest(only_a, n).pvalue if n else 1.0,
    }


# --- calibration ------------------------------------------------------------------------------------------------------


def logit(score: np.ndarray) -> np.ndarray:
    return np.log(np.clip(score, 1e-9, None)) - np.log(np.clip(1 - np.asarray(score), 1e-9, None))


def calibrated(score: np.ndarray, temperature: float, shift: float = 0.0) -> np.ndarray:
    """Probabilities with their logits divided by `temperature` and moved by `shift` (a change of
    class prior).
    """
    return 1 / (1 + np.exp(-np.clip(logit(score) / temperature + shift, -50, 50)))


def fit_calibration(truth: np.ndarray, score: np.ndarray) -> dict[str, float] | None:
    """Temperature (least log loss), and then the shift at which the mean probability is the base
    rate.

    Returns:
        {"temperature", "shift"}; None with one class only.
    """
    if not 0 < truth.sum() < len(truth):
        return None
    grid = np.geomspace(0.05, 20, 400)
    scaled = logit(score)[None] / grid[:, None]
    loss = np.logaddexp(0, np.where(truth, -scaled, scaled)).mean(1)
    temperature = float(grid[loss.argmin()])
    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if calibrated(score, temperature, middle).mean() < truth.mean()
            else (low, middle)
        )
    return {"temperature": temperature, "shift": (low + high) / 2}


def calibration(part: Part, said: Said, validation: Part) -> dict[str, float | None]:
    """ECE and Brier score before and after the temperature of the validation rows, and after its
    shift, too.
    """
    fitted = fit_calibration(validation.truth, said.validation)
    out: dict[str, float | None] = {"temperature": None, "shift": None} | (fitted or {})
    stages = {"before": said.score}
    if fitted:
        stages["after"] = calibrated(said.score, fitted["temperature"])
        stages["after_shift"] = calibrated(said.score, **fitted)
    for name, score in stages.items():
        out[f"ece_{name}"] = metrics.expected_calibration_error(part.truth, score)
        out[f"brier_{name}"] = float(np.mean((score - part.truth) ** 2)) if len(score) else None
    return out


def noise_ceiling(votes: Sequence[Sequence[bool]]) -> dict[str, float | int | None]:
    """How well one half of a prompt's responses foretells the other: AUPRC, the mean of both
    directions.

    Args:
        votes: for each prompt, whether each of its responses is unsafe; prompts with fewer than two
        are left out.
    """
    usable = [list(v) for v in votes if len(v) > 1]
    halves = [(np.mean(v[::2]), np.mean(v[1::2])) for v in usable]
    areas = [
        metrics.auprc([b >= 0.5 for _, b in pairs], [float(a) for a, _ in pairs])
        for pairs in (halves, [(b, a) for a, b in halves])
    ]
    known = [area for area in areas if area is not None]
    return {"prompts": len(usable), "auprc": float(np.mean(known)) if known else None}
