"""guards/suite/tables.py: what a column may hold, what is published, formats."""

import csv
import re

import pytest

from common.conversation import UserError
from guards import zoo
from guards.suite import tables
from guards.suite.benchmarks import benchmark_names


def results_of(values, complete=True, recall_only=(), **conventions):
    """results.json of guards with one F1 a benchmark; None is "not measured", text another status."""
    names = {name: None for found in values.values() for name in found}
    facts = {"label": "prompt_unsafe", "complete": complete}
    out = {
        "benchmarks": {n: facts | {"recall_only": n in recall_only} for n in names},
        "cells": [],
        "guards": {},
    }
    for guard, found in values.items():
        out["guards"][guard] = {"zoo": guard.split()[0]}
        for name, value in found.items():
            scored = {"rows": "r", "parse_errors": "wrong", "threshold": None}
            cell = {
                "guard": guard,
                "benchmark": name,
                "status": "measured",
                "f1": value,
                "decision": "own word",
            }
            cell |= {"status": value} if isinstance(value, str) else {}
            cell["convention"] = scored | conventions.get(guard, {})
            out["cells"] += [cell] if value is not None else []
    return out


PAPERS = tables.published()


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
    assert (
        "| x_y † | 0.800 | 0.500 (R 0.333) | 0.650 |\n| b | not supported | not measured | – |"
        in text
    )
    assert (
        "Mean, all prompt_unsafe: toxicchat, harmbench_prompt" in text and "† has no word" in text
    )
    latex = tables.latex(grid, results["benchmarks"])
    assert r"x\_y $\dagger$ & 0.800 & 0.500 (R 0.333) & 0.650 \\" in latex and not re.search(
        r"(?<!\\)[_%#]", latex
    )
    first, second = csv.DictReader(tables.csv_text([grid]).splitlines())
    assert (first["metric"], first["guard"], first["source"], first["toxicchat"]) == (
        "f1",
        "x_y",
        "",
        "0.8",
    )
    assert (second["toxicchat"], second["harmbench_prompt"]) == ("not supported", "not measured")


def test_a_mean_needs_a_whole_row():
    names = PAPERS["averages"]["public prompts (ExpGuard)"]
    values = {
        "a": dict.fromkeys(names, 0.5) | {"aegis1_prompt": 0.2},
        "b": dict.fromkeys(names, 0.5) | {"toxicchat": "failed"},
    }
    grid = tables.grid(results_of(values), "f1", PAPERS)
    assert grid.columns[-2:] == [
        "mean of 6: public prompts (ExpGuard)",
        "mean of 7: all prompt_unsafe",
    ]
    assert [values[-2:] for _, _, values in grid.rows] == [
        [0.5, pytest.approx(3.2 / 7)],
        [None, None],
    ]


def test_published_numbers_stand_in_rows_of_their_own():
    names = PAPERS["averages"]["public prompts (ExpGuard)"]
    values = {"expguard": dict.fromkeys(names, 0.5), "qwen3guard-gen-8b": dict.fromkeys(names, 0.6)}
    grid = tables.grid(results_of(values), "f1", PAPERS)
    found = {(label, source): values for label, source, values in grid.rows}
    assert found["expguard, published", "ExpGuard"] == [None] * 6 + [0.857]
    strict, loose = (
        found[f"qwen3guard-gen-8b ({mode}), published", "Qwen3Guard"]
        for mode in ("strict", "loose")
    )
    assert (strict[0], loose[0]) == pytest.approx((0.689, 0.828)) and strict[-1] is None
    assert any(note.startswith("[Qwen3Guard] ") and "2510.14276" in note for note in grid.notes)
    every = tables.grid(results_of(values), "f1", PAPERS, "all").rows
    assert (
        len(every)
        > len(grid.rows)
        > len(tables.grid(results_of(values), "f1", PAPERS, "none").rows)
        == 2
    )
    assert not tables.grid(results_of({"llama-guard": {"xstest_prompt": 0.5}}), "f1", PAPERS).rows[
        1:
    ]  # GuardBench: at 0.5


def test_published_numbers_of_other_rows_are_left_out():
    grid = tables.grid(results_of({"wildguard": {"toxicchat": 0.5}}, complete=False), "f1", PAPERS)
    assert len(grid.rows) == 1 and "left out" in grid.notes[-1] and "toxicchat" in grid.notes[-1]


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
    with pytest.raises(
        UserError, match=rf"toxicchat, .*: a and b are scored differently \({key}: .*{other}"
    ):
        tables.grid(results, metric, PAPERS)
    results["cells"][1]["status"] = "failed"
    assert tables.grid(results, metric, PAPERS).rows[1][2] == ["failed"]


def test_published_file():
    numbers = PAPERS["numbers"]
    assert {n["guard"] for n in numbers} <= {*zoo(), *PAPERS["elsewhere"]} and not set(
        PAPERS["elsewhere"]
    ) & set(zoo())
    assert {n["benchmark"] for n in numbers if "benchmark" in n} <= set(benchmark_names())
    assert {name for members in PAPERS["averages"].values() for name in members} <= set(
        benchmark_names()
    )
    assert {n["source"] for n in numbers} == set(PAPERS["sources"])
    assert {n["metric"] for n in numbers} == {"f1", "f1_at_05"} and all(
        0 <= n["value"] <= 100 for n in numbers
    )
    assert {n["parse_errors"] for n in numbers} == {"wrong", "safe", "excluded", "unknown"}
    keys = [
        (n["guard"], n["source"], n["decision"], n.get("benchmark") or n["average"])
        for n in numbers
    ]
    assert len(keys) == len(set(keys)) > 300


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
