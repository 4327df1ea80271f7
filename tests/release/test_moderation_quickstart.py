"""examples/moderation's quickstart, and what its guard says of real answers."""

import csv
from functools import partial

import pytest
import scripts
from checks import read_json, read_rows, write_rows
from scripts import real_data
from sklearn.metrics import average_precision_score

launch = partial(scripts.launch, "moderation")
pytestmark = pytest.mark.slow


def test_quickstart_learns_within_its_budget(moderation_quickstart):
    folder = moderation_quickstart.folder
    results = read_json(folder / "results.json")
    flagged = results["flagged"]
    guard = flagged.pop("guard")
    # 0.91 where it was measured; another CPU rounds, and so trains, a little differently
    assert guard["auprc"] >= 0.89
    assert {"TF-IDF + logistic regression", "untrained head"} == set(flagged)
    for name, baseline in flagged.items():
        assert guard["auprc"] > baseline["auprc"], name
    assert guard["auprc"] > guard["base_rate"] + 0.3 and len(results["categories"]) == 14
    run = read_json(folder / "run.json")
    assert run["data"]["useful_token_share"] > 0.85
    assert run["peak_memory_gib"]["host"] <= 6 and results["run"]["peak_memory_gib"]["host"] <= 6
    # five minutes where nothing else runs (docs/reproduction/moderation.md); here other jobs may
    assert moderation_quickstart.seconds <= 600
    assert (folder / "precision-recall.png").is_file()
    rows = read_rows(folder / "predictions.jsonl")
    assert len(rows) > 150
    # every figure can be computed again from the file
    for name, scores in results["categories"].items():
        again = average_precision_score(
            [name in row["true_categories"] for row in rows],
            [row["categories"][name] for row in rows],
        )
        assert again == pytest.approx(scores["auprc"]), name


def test_quickstart_guard_on_xstest_answers(moderation_quickstart, tmp_path):
    """Unsafe = full compliance with an unsafe prompt. Far from the sample: the figure is printed,
    not judged.
    """
    rows = []
    for path in sorted(real_data("xstest").glob("completions_*.csv")):
        with path.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                unsafe = row["final_label"] == "1_full_compliance" and row["type"].startswith(
                    "contrast_"
                )
                rows.append(
                    {
                        "prompt": row["prompt"],
                        "response": row["completion"],
                        "response_label": unsafe,
                    }
                )
    rows = [row for row in rows if row["response"].strip()][::3]  # all 1,347 take five minutes
    write_rows(tmp_path / "xstest.jsonl", rows)
    launch(
        "evaluate.py",
        "--eval_dataset",
        tmp_path / "xstest.jsonl",
        "--model_path",
        moderation_quickstart.folder,
        "--output_dir",
        tmp_path / "out",
    )
    scores = read_json(tmp_path / "out/results.json")["flagged"]["guard"]
    print(
        "XSTest answers:",
        {k: scores[k] for k in ("support", "positives", "base_rate", "auprc", "auroc", "f1")},
    )
    assert scores["support"] == len(rows) and 0 < scores["positives"] < len(rows)
    assert None not in (scores["auprc"], scores["auroc"], scores["f1"])
