"""Verdicts that others published, as guards of the suite: its tables against what they print.

Where GUARDRAIL_RECIPES_DATA names a folder with guard_scores_6vendors/ and do_not_answer/ in it. The
ledger's figures: pytest -rP tests/release/test_published_scores.py
"""

import os
import sys

import pandas
import pytest
from checks import read_json
from scipy.special import expit
from scripts import real_data

from guards.suite import evaluate
from guards.suite.benchmarks import load_benchmark
from guards.suite.predictions import text_hash

ROUNDS = int(os.environ.get("BOOTSTRAP_ROUNDS", "100"))  # the ledger's intervals have 1000


def run(folder, rows, guards, *flags):
    """The suite on own rows {name: table} and predictions {guard: table}; returns results.json."""
    argv = ["evaluate.py", "--output_dir", str(folder / "out"), "--bootstrap_rounds", str(ROUNDS)]
    argv += ["--guards"]
    for name, table in guards.items():
        path = folder / f"{name}.scores.jsonl"
        table.to_json(path, orient="records", lines=True, double_precision=15)
        argv.append(f"{name}=predictions:{path}")
    argv += ["--benchmarks"]
    for name, table in rows.items():
        path = folder / f"{name}.rows.jsonl"
        table.to_json(path, orient="records", lines=True)
        argv.append(f"{name}={path}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, *flags])
        evaluate.main()
    return read_json(folder / "out/results.json")


# --- rrahimi-uci/safety-guard-dynamics --------------------------------------------------------------------------------

# artifacts/starting_type_adaptation_v1/analysis/ensembling_percheckpoint.csv at b5319c333cda, columns
# base_rep and base_trans: the mean average precision of the sources of id_test and of transfer_test
MACRO_AP = {
    "granite_guardian_31_2b": (0.8472088478572676, 0.9451064737540525),
    "qwen25_15b": (0.6308274770264124, 0.8170835333832955),
    "qwen3_4b": (0.8866714823603449, 0.942497184734556),
    "qwen3guard_gen_06b": (0.902273601735239, 0.9510745338998928),
    "qwen3guard_gen_4b": (0.8769698509376166, 0.9310083204615733),
    "shieldgemma_2b": (0.76936044303385, 0.8524346566183569),
    "smollm2_17b": (0.45048759421576184, 0.7892667816621879),
    "smollm3_3b": (0.665070644849375, 0.9103080638978079),
    "wildguard_7b": (0.88177473930874, 0.9703005425727624),
}


@pytest.fixture(scope="module")
def scores():
    return pandas.read_csv(real_data("guard_scores_6vendors", "unmodified_scores.csv.gz"))


def test_hashes_and_labels_of_xstest(scores):
    """The rows whose texts are here: 240 of 450, each with the label that it has there."""
    loaded = load_benchmark(f"xstest_prompt@{real_data('xstest', 'xstest_prompts.csv')}")
    rows = scores[scores.source == "xstest"]
    gold = dict(zip(rows.content_sha256, rows.gold, strict=True))
    ours = {text_hash(row["messages"]): row["label"] for row in loaded.rows}
    both = gold.keys() & ours.keys()
    assert len(both) == len(gold) == 240
    assert all(gold[key] == ours[key] for key in both)


@pytest.mark.slow
def test_six_vendors(scores, tmp_path):
    """Average precision as printed there. The texts are not here: their hashes are in their place,
    which no guard is asked to read.
    """
    rows = {}
    tested = scores[scores.split.isin(["id_test", "transfer_test"])]
    for source, table in tested.groupby("source"):
        once = table.drop_duplicates("sample_id")
        columns = {"id": once.sample_id, "prompt": once.content_sha256, "prompt_label": once.gold}
        rows[f"{source}-part"] = pandas.DataFrame(columns)
    guards = {}
    for name in MACRO_AP:
        table = tested[tested.starting_model_key == name]
        # a word that is neither (Qwen3Guard's Controversial): the score decides
        words = table.parse_status.where(table.parse_status.isin(["safe", "unsafe"]), None)
        # probability_raw has six digits, of which the surest verdicts share one
        score = expit(table.score_raw)
        columns = {"id": table.sample_id, "score": score, "verdict": words}
        guards[name] = pandas.DataFrame(columns)
    results = run(tmp_path, rows, guards, "--compare", "wildguard_7b,qwen3guard_gen_4b")
    found = {(cell["guard"], cell["benchmark"]): cell for cell in results["cells"]}
    splits = tested.drop_duplicates("source").groupby("split").source.apply(list)
    for name, printed in MACRO_AP.items():
        for split, value in zip(("id_test", "transfer_test"), printed, strict=True):
            ours = [found[name, f"{source}-part"]["auprc"] for source in splits[split]]
            assert sum(ours) / len(ours) == pytest.approx(value, abs=1e-9)
    for cell in found.values():
        assert cell["errors"] == 0
        low, high = cell["intervals"]["auprc"]
        assert low <= cell["auprc"] <= high
    assert all(difference["auprc"]["interval"] for difference in results["comparison"])


# --- Do-Not-Answer ----------------------------------------------------------------------------------------------------

# README of Libr-AI/do-not-answer: share of harmless answers by people, GPT-4 and Longformer, %
HARMLESS = {
    "llama2-7b-chat": (99.7, 99.4, 99.3),
    "ChatGPT": (98.5, 97.7, 97.9),
    "Claude": (98.3, 98.3, 97.6),
    "GPT4": (97.6, 96.5, 97.2),
    "vicuna-7b": (94.5, 94.9, 95.0),
    "ChatGLM2": (90.9, 92.9, 92.9),
}
FOLLOWS = 6  # GPT-4's number for an answer that follows the instruction; -1: none could be read


def review(judge, model):
    path = real_data("do_not_answer", "Review", judge, f"annotated_response_{model}.csv.gz")
    return pandas.read_csv(path)


@pytest.mark.slow
def test_do_not_answer(tmp_path):
    """The shares as printed, and what they hide: how far each judge agrees with people."""
    rows = {}
    gpt4 = []
    longformer = []
    for model in HARMLESS:
        people = review("Human", model)
        ids = [f"{model}-{number}" for number in range(len(people))]
        columns = {"id": ids, "prompt": people.question, "response": people.response}
        rows[model] = pandas.DataFrame(columns | {"response_label": people.harmful})
        action = review("GPT4", model).action
        words = (action == FOLLOWS).astype(int).where(action != -1, None)
        gpt4.append(pandas.DataFrame({"id": ids, "verdict": words}))
        harmful = review("Longformer", model).harmful
        longformer.append(pandas.DataFrame({"id": ids, "verdict": harmful}))
    rows["all"] = pandas.concat(rows.values())
    guards = {"gpt4": pandas.concat(gpt4), "longformer": pandas.concat(longformer)}
    results = run(tmp_path, rows, guards, "--compare", "gpt4,longformer")
    items = pandas.read_json(tmp_path / "out/predictions.jsonl", lines=True)
    for model, printed in HARMLESS.items():
        part = items[items.benchmark == model]
        said = pandas.json_normalize(part.guards)
        shares = [part.truth.mean()]
        for name in guards:
            flagged = said[f"{name}.decided.response_unsafe"] == True  # noqa: E712
            shares.append(flagged.mean())
        assert [round(100 * (1 - share), 1) for share in shares] == list(printed)
    cells = {(cell["guard"], cell["benchmark"]): cell for cell in results["cells"]}
    assert cells["gpt4", "all"]["rows"] == 5634
    assert cells["gpt4", "all"]["errors"] == 9
