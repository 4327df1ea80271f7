"""Arm C4: is fine-tuning needed at all? A logistic probe on what the frozen guard reads its verdict
from.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import Row
from formats import verdict_states
from sklearn.linear_model import LogisticRegression

from common.conversation import Messages, UserError
from common.run import write_json
from guards.generative import GenerativeGuard

STRENGTH = 0.01  # inverse of the penalty: there are more dimensions than rows


def fit_probe(
    guard: GenerativeGuard, rows: Sequence[Row], folder: Path, seed: int
) -> dict[str, Any]:
    """Fit a probe to the rows' targets and write probe.json: mean, scale, weights, bias, of the
    hidden size.

    A target between 0 and 1 counts in both classes, with its weight.

    Raises:
        UserError: the rows have one class only.
    """
    states = (
        verdict_states(guard.model.model, guard.prompt_ids([row.messages for row in rows]))
        .double()
        .numpy()
    )
    mean, scale = states.mean(0), np.maximum(states.std(0), 1e-6)
    target = np.array([row.target for row in rows])
    twice, labels = np.tile((states - mean) / scale, (2, 1)), np.repeat([True, False], len(rows))
    weights = np.concatenate([target, 1 - target])
    if not 0 < target.sum() < len(target):
        raise UserError(f"{folder}: the probe's rows are all of one class")
    fit = LogisticRegression(C=STRENGTH, max_iter=1000, random_state=seed)
    fit.fit(twice[weights > 0], labels[weights > 0], weights[weights > 0])
    value = {"mean": mean, "scale": scale, "weights": fit.coef_[0], "bias": fit.intercept_}
    write_json(folder / "probe.json", {name: array.tolist() for name, array in value.items()})
    return {"probe": {"dimensions": len(mean), "penalty": 1 / STRENGTH}}


def probe_scores(
    guard: GenerativeGuard, folder: Path, conversations: Sequence[Messages]
) -> list[float]:
    """P(unsafe) of each by the probe in `folder`, read from the guard that it was fitted on.

    Raises:
        UserError: no probe, or one of another guard.
    """
    try:
        probe = json.loads((Path(folder) / "probe.json").read_text(encoding="utf-8"))
        mean, scale, weights = (np.array(probe[name]) for name in ("mean", "scale", "weights"))
        bias = probe["bias"][0]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{folder}/probe.json: no probe ({error!r:.80}); run train.py with arm C4"
        ) from None
    states = verdict_states(guard.model.model, guard.prompt_ids(conversations)).double().numpy()
    if states.shape[1] != len(mean):
        raise UserError(
            f"{folder}: its probe reads {len(mean)} numbers, {guard.name} has {states.shape[1]}"
        )
    odds = ((states - mean) / scale) @ weights + bias
    return (1 / (1 + np.exp(-odds))).tolist()
