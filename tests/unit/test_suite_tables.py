"""guards/suite/tables.py: what a column may hold, what is published, formats."""

import csv
import re
from pathlib import Path

import pandas
import pytest
import yaml
from checks import user_error

from guards import zoo
from guards.base import DECIDED_BY
from guards.suite import tables
from guards.suite.benchmarks import benchmark_names, benchmarks


def results_of(values, recall_only=(), **conventions):
    """results.json of guards with one F1 a benchmark; None is "not measured", text another status."""
    benchmarks = {}
    cells = []
    for guard, found in values.items():
        convention = {"rows": "r", "parse_errors": "wrong", "threshold": None}
        convention |= conventions.get(guard, {})
        for name, value in found.items():
            benchmarks[name] = {
                "label": "prompt_unsafe",
                "complete": True,
                "recall_only": name in recall_only,
            }
            if value is None:
                continue
            cells.append(
                {
                    "guard": guard,
                    "benchmark": name,
                    "status": value if isinstance(value, str) else "measured",
                    "f1": value,
                    "decision": "own word",
                    "convention": convention,
                }
            )
    guards = {guard: {"zoo": guard, "decided_by": DECIDED_BY} for guard in values}
    return {"benchmarks": benchmarks, "cells": cells, "guards": guards}


PAPERS = tables.published()


def test_guards_that_were_decided_by_another_rule_are_named():
    """Of added results: at the guard's own decision, and not where a score alone counts."""
    results = results_of({name: {"toxicchat": 0.5} for name in ("new", "old", "word")})
    assert not any("Decided" in note for note in tables.grid(results, "f1", PAPERS).notes)
    del results["guards"]["old"]["decided_by"]
    results["guards"]["word"]["decided_by"] = "its own word"
    unsaid, other = tables.grid(results, "f1", PAPERS).notes[-2:]
    assert unsaid.startswith("Decided by a rule that their results.json does not say: old; all ")
    assert other.startswith("Decided by its own word: word; all others by the threshold of its ")
    results["cells"] = [cell | {"auroc": 0.5} for cell in results["cells"]]
    assert not any("Decided" in note for note in tables.grid(results, "auroc", PAPERS).notes)


def test_grid_and_its_formats():
    values = {
        "x_y": {"toxicchat": 0.8, "harmbench_prompt": 0.5},
        "b": {"toxicchat": "not supported", "harmbench_prompt": None},
    }
    results = results_of(values, recall_only=("harmbench_prompt",))
    results["cells"][0]["decision"] = "score > 0.5"
    grid = tables.grid(results, "f1", PAPERS)
    assert grid.columns == ["toxicchat", "harmbench_prompt", "mean of 2: all prompt_unsafe"]
    assert grid.rows == [
        ("x_y †", "", [0.8, 0.5, 0.65]),
        ("b", "", ["not supported", "not measured", None]),
    ]
    text = tables.markdown(grid, results["benchmarks"])
    assert "| x_y † | 0.800 | 0.500 (R 0.333) | 0.650 |" in text
    assert "| b | not supported | not measured | – |" in text
    assert "Mean, all prompt_unsafe: toxicchat, harmbench_prompt" in text
    assert "† is not decided by the guard's own words" in text
    latex = tables.latex(grid, results["benchmarks"])
    assert r"x\_y $\dagger$ & 0.800 & 0.500 (R 0.333) & 0.650 \\" in latex
    assert not re.search(r"(?<!\\)[_%#]", latex)
    first, second = csv.DictReader(tables.csv_text([grid]).splitlines())
    assert first["metric"] == "f1"
    assert first["guard"] == "x_y"
    assert first["toxicchat"] == "0.8"
    assert second["toxicchat"] == "not supported"
    assert second["harmbench_prompt"] == "not measured"


PUBLIC = PAPERS["averages"]["public prompts (ExpGuard)"]


def test_a_mean_needs_a_whole_row():
    whole = dict.fromkeys(PUBLIC, 0.5) | {"aegis1_prompt": 0.2}
    failed = dict.fromkeys(PUBLIC, 0.5) | {"toxicchat": "failed"}
    grid = tables.grid(results_of({"a": whole, "b": failed}), "f1", PAPERS)
    means = ["mean of 6: public prompts (ExpGuard)", "mean of 7: all prompt_unsafe"]
    assert grid.columns[-2:] == means
    (_, _, first), (_, _, second) = grid.rows
    assert first[-2:] == [0.5, pytest.approx(3.2 / 7)]
    assert second[-2:] == [None, None]


def test_published_numbers_stand_in_rows_of_their_own():
    values = {name: dict.fromkeys(PUBLIC, 0.5) for name in ("expguard", "qwen3guard-gen-8b")}
    results = results_of(values)
    grid = tables.grid(results, "f1", PAPERS)
    found = {(label, source): values for label, source, values in grid.rows}
    assert found["expguard, published", "ExpGuard"] == [None] * 6 + [0.857]
    strict = found["qwen3guard-gen-8b (strict), published", "Qwen3Guard"]
    loose = found["qwen3guard-gen-8b (loose), published", "Qwen3Guard"]
    assert strict[0] == pytest.approx(0.689)
    assert loose[0] == pytest.approx(0.828)
    assert any("2510.14276" in note for note in grid.notes)
    assert len(tables.grid(results, "f1", PAPERS, "all").rows) > len(grid.rows)
    assert len(tables.grid(results, "f1", PAPERS, "none").rows) == 2


def test_published_numbers_at_another_decision_are_left_out():
    """GuardBench: at 0.5."""
    grid = tables.grid(results_of({"llama-guard": {"xstest_prompt": 0.5}}), "f1", PAPERS)
    assert len(grid.rows) == 1


@pytest.mark.parametrize(
    ("metric", "key", "other"),
    [
        ("f1", "parse_errors", "excluded"),
        ("auprc", "rows", "other rows"),
        ("f1_at_validation", "threshold", "fitted on other.jsonl"),
    ],
)
def test_differently_scored_cells_share_no_column(metric, key, other):
    results = results_of({"a": {"toxicchat": 0.8}, "b": {"toxicchat": 0.7}}, b={key: other})
    for cell in results["cells"]:
        cell |= {"auprc": 0.5, "f1_at_validation": 0.5, "threshold": {"value": 0.5}}
    said = rf"toxicchat, .*: a and b are scored differently \({key}: .*{other}"
    with user_error(said):
        tables.grid(results, metric, PAPERS)
    results["cells"][1]["status"] = "failed"
    assert tables.grid(results, metric, PAPERS).rows[1][2] == ["failed"]


def test_published_file():
    numbers = pandas.DataFrame(PAPERS["numbers"])
    assert len(numbers) > 300
    assert set(numbers["guard"]) <= {*zoo(), *PAPERS["elsewhere"]}
    assert set(numbers["benchmark"].dropna()) <= set(benchmark_names())
    assert set(numbers["average"].dropna()) <= set(PAPERS["averages"])
    assert set(numbers["source"]) == set(PAPERS["sources"])
    assert set(numbers["metric"]) == {"f1", "f1_at_05"}
    assert set(numbers["parse_errors"]) == {"wrong", "safe", "excluded", "unknown"}
    assert numbers["value"].between(0, 100).all()
    keys = ["guard", "source", "decision", "benchmark", "average"]
    assert not numbers.duplicated(keys).any()
    assert not set(PAPERS["elsewhere"]) & set(zoo())
    for members in PAPERS["averages"].values():
        assert set(members) <= set(benchmark_names())


def test_a_published_recall_is_shown_as_f1():
    """GuardBench gives the recall of sets without a harmless row: 83.7 % there is 2R / (1 + R) here."""
    found = {}
    for one in PAPERS["numbers"]:
        if one["source"] == "GuardBench":
            found[one["guard"], one.get("benchmark")] = one
    number = found["llama-guard", "advbench_behaviors"]
    assert number["metric"] == "f1_at_05"
    assert number["value"] == pytest.approx(2 * 83.7 / 1.837)
    assert ("llama-guard", "convabuse") not in found
    path = Path(tables.__file__).with_name("published.yaml")
    blocks = yaml.safe_load(path.read_text())["blocks"]
    (recalls,) = [block for block in blocks if block["metric"] == "recall_at_05"]
    for name in recalls["columns"]:
        assert benchmarks()[name]["gold"] == {"always": True}


def test_published_averages_are_means_of_their_columns():
    """A slip of a column would show. (gpt-4's responses are 0.85 apart in the source that was
    read.)
    """
    table = {
        (n["guard"], n.get("benchmark") or n["average"]): n["value"]
        for n in PAPERS["numbers"]
        if n["source"] == "WildGuard"
    }
    checked = 0
    for (guard, name), value in table.items():
        members = [table.get((guard, member)) for member in PAPERS["averages"].get(name, ())]
        if members and None not in members:
            assert value == pytest.approx(sum(members) / len(members), abs=0.9), (guard, name)
            checked += 1
    assert checked == 18
