"""What a run leaves for people: tables, files, pictures, model cards."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from common import metrics, report

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (None, "–"),
        (0.0, "0.000"),
        (np.float64(0.12345), "0.123"),
        (3, "3"),
        (True, "True"),
        ([0.1, None], "[0.100, –]"),
        ("a|b\nc", r"a\|b c"),
    ],
)
def test_cell(value, cell):
    assert report.number(value) == cell


def test_table():
    assert (
        report.table([["a", 1], ["b", None]], ["", "F1 ↑"])
        == "|  | F1 ↑ |\n| --- | --- |\n| a | 1 |\n| b | – |\n"
    )


def test_metric_table_has_a_row_a_name_and_directions():
    found = {
        "guard": metrics.binary([1, 0], [0.9, 0.1]),
        "all safe": metrics.binary([0, 0], [0.9, 0.1]),
    }
    head, _, guard, safe = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.metric_table(found).splitlines()
    ]
    assert len(head) == len(guard) == len(safe) == 1 + len(report.COLUMNS)
    assert {h for h in head if "↓" in h} == {"FPR ↓", "ECE ↓", "Brier ↓"}
    assert {"AUPRC ↑", "AUROC ↑", "F1 ↑", "precision ↑", "recall ↑", "recall at FPR 5 % ↑"} < set(
        head
    )
    assert (guard[0], guard[head.index("AUPRC ↑")], safe[head.index("AUPRC ↑")]) == (
        "guard",
        "1.000",
        "–",
    )
    assert safe[head.index("FPR ↓")] == "0.500"


def test_columns_are_metrics():
    assert set(report.COLUMNS) <= set(metrics.binary([1, 0], [0.9, 0.1]))


def test_results_can_be_read_again(tmp_path):
    results, rows = (
        {"flagged": metrics.binary([], [])},
        [{"id": "1", "text": "ü\u2028\n"}, {"id": "2", "text": None}],
    )
    report.write_results(tmp_path / "new" / "folder", results, "# Title – ü\n", rows)
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == [
        "predictions.jsonl",
        "results.json",
        "results.md",
    ]
    assert json.loads((folder / "results.json").read_text("utf-8")) == results
    assert [
        json.loads(line) for line in (folder / "predictions.jsonl").open(encoding="utf-8")
    ] == rows
    assert (folder / "results.md").read_text("utf-8") == "# Title – ü\n"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object()])
@pytest.mark.parametrize("where", ["results", "predictions"])
def test_what_is_no_json_leaves_nothing_behind(tmp_path, bad, where):
    results, rows = ({"f1": bad}, []) if where == "results" else ({}, [{"id": "1"}, {"score": bad}])
    with pytest.raises((ValueError, TypeError)):
        report.write_results(tmp_path, results, "", rows)
    assert list(tmp_path.iterdir()) == []


def test_precision_recall_picture(tmp_path):
    truth, score = [True, False, True, False], [0.9, 0.8, 0.4, 0.1]
    names = ["guard", "a | b", "$x", "c", "d", "the sixth"]
    before = plt.get_fignums()
    report.plot_precision_recall(
        {n: (truth, score) for n in names}, tmp_path / "curve.png", "Title"
    )
    assert plt.get_fignums() == before
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]
    assert (tmp_path / "curve.png").read_bytes()[:8] == PNG
    assert plt.imread(tmp_path / "curve.png").std() > 0.01


def test_every_curve_is_drawn(tmp_path, monkeypatch):
    """Also more curves than line styles; the curve is scikit-learn's, the dotted line the base
    rate.
    """
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    truth, score = [True, False, True, False], [0.9, 0.8, 0.4, 0.1]
    report.plot_precision_recall(
        {f"guard {i}": (truth, score) for i in range(7)}, tmp_path / "x.png", "Title"
    )
    (axes,) = figures[0].axes
    plt.close(figures[0])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"guard {i}" for i in range(7)] + ["base rate 0.50"]
    points = set(zip(*map(np.round, axes.lines[0].get_data(), (3, 3)), strict=True))
    assert points == {(1.0, 0.5), (1.0, 0.667), (0.5, 0.5), (0.5, 1.0), (0.0, 1.0)}
    assert axes.lines[0].get_drawstyle() == "steps-post"
    assert (axes.get_title(), axes.get_ylabel()) == ("Title", "Precision")
