"""What a run leaves for people: tables, files, pictures."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from checks import read_json

from common import metrics, report

CELLS = [
    (None, "–"),
    (0.0, "0.000"),
    (np.float64(0.12345), "0.123"),
    (3, "3"),
    (True, "True"),
    ([0.1, None], "[0.100, –]"),
    ("a|b\nc", r"a\|b c"),
]


@pytest.mark.parametrize(("value", "cell"), CELLS)
def test_cell(value, cell):
    assert report.number(value) == cell


THRESHOLDS = [
    (None, "–"),
    (0.0, "0"),
    (0.5, "0.5"),
    (0.36249, "0.362"),
    (0.95, "0.95"),
    (0.9996, "0.9996"),
    (0.99958731, "0.999587"),
    (0.00004, "0.00004"),
    (math.nextafter(1.0, 0.0), "0.999999999999999889"),
]


@pytest.mark.parametrize(("value", "shown"), THRESHOLDS)
def test_a_threshold_is_never_shown_as_0_or_1(value, shown):
    assert report.threshold(value) == shown


def test_thresholds_in_tables_are_shown_as_they_are():
    found = {"fraud": metrics.binary([1, 0], [0.9, 0.1], 0.9996)}
    text = report.metric_table(found, report.CATEGORY_COLUMNS)
    assert "| 0.9996 |" in text


def test_metric_table_has_a_row_a_name_and_directions():
    found = {
        "guard": metrics.binary([1, 0], [0.9, 0.1]),
        "all safe": metrics.binary([0, 0], [0.9, 0.1]),
    }
    head, _, *lines = report.metric_table(found).splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")]
    assert {name for name in names if "↓" in name} == {"FPR ↓", "ECE ↓", "Brier ↓"}
    assert [line.split("|")[1].strip() for line in lines] == ["guard", "all safe"]
    column = names.index("AUPRC ↑") + 1
    assert [line.split("|")[column].strip() for line in lines] == ["1.000", "–"]


def test_results_can_be_read_again(tmp_path):
    results = {"flagged": metrics.binary([], [])}
    rows = [{"id": "1", "text": "ü\u2028\n"}, {"id": "2", "text": None}]
    folder = tmp_path / "new/folder"
    report.write_results(folder, results, "# Title – ü\n", rows)
    assert read_json(folder / "results.json") == results
    assert (folder / "results.md").read_text("utf-8") == "# Title – ü\n"
    with (folder / "predictions.jsonl").open(encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == rows


@pytest.mark.parametrize(
    ("results", "rows"),
    [({"f1": float("nan")}, []), ({}, [{"id": "1"}, {"score": float("inf")}])],
    ids=["results", "a row"],
)
def test_what_is_no_json_leaves_nothing_behind(tmp_path, results, rows):
    with pytest.raises(ValueError):
        report.write_results(tmp_path, results, "", rows)
    assert list(tmp_path.iterdir()) == []


def test_every_precision_recall_curve_is_drawn(tmp_path, monkeypatch):
    """Also more curves than line styles, and a name in dollars; the last line is the base rate."""
    drawn = []
    save = report.save_figure

    def save_figure(figure, path):
        drawn.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
        save(figure, path)

    monkeypatch.setattr(report, "save_figure", save_figure)
    names = ["guard", "a | b", "$x", "c", "d", "the sixth", "the seventh"]
    curves = dict.fromkeys(names, ([True, False, True, False], [0.9, 0.8, 0.4, 0.1]))
    report.plot_precision_recall(curves, tmp_path / "curve.png", "Title")
    assert [name.replace("\\", "") for name in drawn] == [*names, "base rate 0.50"]
    assert plt.imread(tmp_path / "curve.png").std() > 0.01
    assert not plt.get_fignums()
