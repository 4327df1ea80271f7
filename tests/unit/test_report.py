"""What a run leaves for people: tables, files, pictures."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from common import metrics, report

PNG = b"\x89PNG\r\n\x1a\n"
TRUTH, SCORE = [True, False, True, False], [0.9, 0.8, 0.4, 0.1]


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
    written = report.table([["a", 1], ["b", None]], ["", "F1 ↑"])
    assert written == "|  | F1 ↑ |\n| --- | --- |\n| a | 1 |\n| b | – |\n"


def test_metric_table_has_a_row_a_name_and_directions():
    found = {
        "guard": metrics.binary([1, 0], [0.9, 0.1]),
        "all safe": metrics.binary([0, 0], [0.9, 0.1]),
    }
    lines = report.metric_table(found).splitlines()
    head, _, guard, safe = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert head == ["", *report.COLUMNS.values()]
    assert {name for name in head if "↓" in name} == {"FPR ↓", "ECE ↓", "Brier ↓"}
    auprc, fpr = head.index("AUPRC ↑"), head.index("FPR ↓")
    assert (guard[0], guard[auprc], safe[auprc], safe[fpr]) == ("guard", "1.000", "–", "0.500")


def test_columns_are_metrics():
    assert set(report.COLUMNS) <= set(metrics.binary([1, 0], [0.9, 0.1]))


def test_results_can_be_read_again(tmp_path):
    results = {"flagged": metrics.binary([], [])}
    rows = [{"id": "1", "text": "ü\u2028\n"}, {"id": "2", "text": None}]
    folder = tmp_path / "new" / "folder"
    report.write_results(folder, results, "# Title – ü\n", rows)
    assert {path.name for path in folder.iterdir()} == {
        "predictions.jsonl",
        "results.json",
        "results.md",
    }
    assert json.loads((folder / "results.json").read_text("utf-8")) == results
    with (folder / "predictions.jsonl").open(encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == rows
    assert (folder / "results.md").read_text("utf-8") == "# Title – ü\n"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object()])
def test_what_is_no_json_leaves_nothing_behind(tmp_path, bad):
    for results, rows in (({"f1": bad}, []), ({}, [{"id": "1"}, {"score": bad}])):
        with pytest.raises((ValueError, TypeError)):
            report.write_results(tmp_path, results, "", rows)
    assert list(tmp_path.iterdir()) == []


def test_precision_recall_picture(tmp_path):
    names = ["guard", "a | b", "$x", "c", "d", "the sixth"]
    before = plt.get_fignums()
    curves = dict.fromkeys(names, (TRUTH, SCORE))
    report.plot_precision_recall(curves, tmp_path / "curve.png", "Title")
    assert plt.get_fignums() == before
    (path,) = tmp_path.iterdir()
    assert path.read_bytes().startswith(PNG)
    assert plt.imread(path).std() > 0.01


def test_every_curve_is_drawn(tmp_path, monkeypatch):
    """Also more curves than line styles; the curve is scikit-learn's, the dotted line the base
    rate.
    """
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    names = [f"guard {number}" for number in range(7)]
    report.plot_precision_recall(dict.fromkeys(names, (TRUTH, SCORE)), tmp_path / "x.png", "Title")
    (axes,) = figures[0].axes
    plt.close(figures[0])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [*names, "base rate 0.50"]
    recall, precision = np.round(axes.lines[0].get_data(), 3)
    points = set(zip(recall, precision, strict=True))
    assert points == {(1.0, 0.5), (1.0, 0.667), (0.5, 0.5), (0.5, 1.0), (0.0, 1.0)}
    assert axes.lines[0].get_drawstyle() == "steps-post"
    assert (axes.get_title(), axes.get_ylabel()) == ("Title", "Precision")
