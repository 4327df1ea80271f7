"""A guard of the suite that is known by its predictions alone."""

import hashlib

import pandas
import pytest
from checks import read_rows, user_error, write_rows
from test_suite_evaluate import arguments, candidate, cells, file, run
from test_suite_own import own, row

from common.conversation import pair
from guards.suite import judge
from guards.suite.own import own_benchmarks
from guards.suite.predictions import text_hash

_ = arguments, file, own, run  # fixtures
SCORES = ("f1", "auprc", "auroc", "errors", "recall", "fpr", "decision", "by_parse_errors")


def predicted(path, name="somebody"):
    return judge.candidates([f"{name}=predictions:{path}"], {"engine": "transformers"})[0]


def somebodys(results):
    return cells(results, "somebody")


def names(way, item):
    """What names a row of a benchmark, for `way`."""
    if way == "suite":
        return {"id": item["id"]}
    if way == "own":
        return {"id": item["own_id"]}
    return {"text_sha256": text_hash(item["messages"])}


def test_the_table_is_that_of_the_guard(run, own, tmp_path):
    """Whatever names the rows."""
    specs = [str(own)]
    first = run(candidate(), benchmarks=specs)
    items = [item for made in own_benchmarks(str(own)) for item in made.rows]
    rows = {"suite": [], "own": [], "hash": []}
    for line, item in zip(read_rows(tmp_path / "out/predictions.jsonl"), items, strict=True):
        said = line["guards"]["keyword"]
        label = line["label"]
        word = {None: None, False: "safe", True: "unsafe"}[said["decided"].get(label)]
        row = {"label": label, "score": said[label], "verdict": word, "error": said["error"]}
        for way in rows:
            rows[way].append(names(way, item) | row)
    paths = {way: write_rows(tmp_path / f"{way}.jsonl", rows[way]) for way in rows}

    def table():
        guards = [predicted(path, way) for way, path in paths.items()]
        return run(
            candidate(),
            *guards,
            benchmarks=specs,
            compare="keyword,hash",
            bootstrap_rounds=20,
        )

    results = table()
    for name, cell in cells(first).items():
        expected = {score: cell[score] for score in SCORES}
        for way in rows:
            found = cells(results, way)[name]
            assert {score: found[score] for score in SCORES} == expected, way
    assert {one["f1"]["difference"] for one in results["comparison"]} == {0}
    assert table()["cells"] == results["cells"]  # from what is kept


def test_what_is_missing_is_an_error(run, own, tmp_path):
    """Never "safe": of 5 prompts, one is not in the file, and one has neither score nor word."""
    rows = [
        {"id": "one", "score": 0.9, "verdict": "unsafe"},
        {"id": "two", "score": 0.2},
        {"id": "four", "score": 0.1, "verdict": "No"},
        {"id": "five", "score": None, "verdict": ""},
        {"id": "of another file", "score": 0.5},
    ]
    path = write_rows(tmp_path / "scores.jsonl", rows)
    given = {"benchmarks": [str(own)], "task_type": "prompt"}
    cell = somebodys(run(predicted(path), **given))["mine_prompt"]
    assert cell["rows"] == 5
    assert cell["errors"] == 2
    assert cell["f1"] == 2 / 5  # right: one; missed: two, three; five counts as wrong
    errors = []
    for line in read_rows(tmp_path / "out/predictions.jsonl"):
        errors.append(line["guards"]["somebody"]["error"])
    missing = "no prediction of this row in scores.jsonl"
    assert errors == [None, None, missing, None, "neither score nor verdict"]
    cell = somebodys(run(predicted(path), **given, parse_errors="unsafe"))["mine_prompt"]
    assert cell["recall"] == 2 / 3


def test_predictions_in_csv(run, own, tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("id,score,label\none,0.9,prompt_unsafe\ntwo,,prompt_unsafe\n")
    made = predicted(path)
    found = somebodys(run(made, benchmarks=[str(own)]))
    assert found["mine_prompt"]["errors"] == 4
    assert found["mine_response"]["status"] == "not supported"
    path.write_text("id,score,label\none,0.8,prompt_unsafe\n")
    assert predicted(path).identity != made.identity


def test_numbers_of_a_column_with_a_gap(run, tmp_path):
    """Parquet of pandas has 1.0 for the id 1 then; an obfuscated row has an id of its own."""
    rows = [row("bad cat", "unsafe", id=1), row("nice cat", "safe", id=2)]
    own = write_rows(tmp_path / "mine.jsonl", rows)
    said = [{"id": 1, "score": 0.9}, {"id": 2, "score": 0.1}]
    said.append({"text_sha256": "0", "score": 0.5})
    path = tmp_path / "scores.parquet"
    pandas.DataFrame(said).to_parquet(path)
    found = somebodys(run(predicted(path), benchmarks=[str(own)]))
    assert found["mine"]["errors"] == 0
    said = [{"id": f"{number}+homoglyph", "score": 0.9} for number in (1, 2)]
    path = write_rows(tmp_path / "others.jsonl", said)
    found = somebodys(run(predicted(path), benchmarks=[f"{own}+homoglyph"], overwrite=True))
    assert found["mine+homoglyph"]["errors"] == 0


def test_one_text_twice(run, tmp_path):
    """Each of two rows of one text has its own prediction."""
    rows = write_rows(
        tmp_path / "twice.jsonl", [row("bad cat", "unsafe", id=name) for name in ("one", "two")]
    )
    said = [{"id": "one", "score": 0.9}, {"id": "two", "score": 0.1}]
    made = predicted(write_rows(tmp_path / "scores.jsonl", said))
    found = somebodys(run(made, benchmarks=[str(rows)]))
    assert found["twice"]["recall"] == 0.5


def test_the_hash_of_a_text():
    """As rrahimi-uci/safety-guard-dynamics has it: of the lower-cased text with single spaces."""
    plain = hashlib.sha256(b"how do i kill a python process?").hexdigest()
    assert text_hash(pair("How do I  kill\na Python process? ")) == plain
    assert text_hash(pair("How do I kill a Python process?", "So")) != plain


REFUSED = {
    "a score that is none": (
        [{"id": "one", "score": 1.5}],
        r"scores\.jsonl, line 1, field score: 1\.5 is no probability",
    ),
    "a log-odds": ([{"id": "one", "score": -1.6}], "field score: -1.6 is no probability"),
    "not a number": ([{"id": "one", "score": "high"}], "field score: 'high' is no probability"),
    "true": ([{"id": "one", "score": True}], "field score: True is no probability"),
    "NaN": ([{"id": "a", "score": "0.1"}, {"id": "b", "score": "inf"}], "line 2, field score"),
    "no name": ([{"score": 0.5}], r"field id: missing \(columns: score\)"),
    "a strange word": (
        [{"id": "one", "verdict": "Controversial"}],
        "field verdict: unknown label 'Controversial'",
    ),
    "a strange label": ([{"id": "one", "score": 0, "label": "toxic"}], "field label: 'toxic'"),
    "two opinions": (
        [{"id": "one", "score": 0.1}, {"id": "one", "score": 0.2}],
        "line 2: another row says something else of one",
    ),
    "no object": ([["one", 0.5]], "line 1: expected an object"),
}


@pytest.mark.parametrize(("rows", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_predictions(tmp_path, rows, said):
    path = write_rows(tmp_path / "scores.jsonl", rows)
    with user_error(said):
        predicted(path)


def test_no_such_file():
    with user_error(r"no\.jsonl: no such file"):
        predicted("no.jsonl")


def test_a_prediction_of_two_rows_is_refused(run, own, tmp_path):
    path = write_rows(tmp_path / "scores.jsonl", [{"id": "one", "score": 0.9}])
    with user_error("needs a field label"):
        run(predicted(path), benchmarks=[str(own)])
    other = write_rows(tmp_path / "theirs.jsonl", [row("something else", "safe", id="one")])
    with user_error("a prediction of one, the id of 2 rows"):
        run(predicted(path), benchmarks=[str(own), str(other)], task_type="prompt")
    assert not (tmp_path / "out").exists()


def test_predictions_are_kept_where_they_come_from(run, own, tmp_path):
    path = write_rows(tmp_path / "scores.jsonl", [{"id": "one", "score": 0.9}])
    run(predicted(path), benchmarks=[str(own)], task_type="prompt")
    files = [file.name for file in (tmp_path / "out/runs").rglob("*.jsonl")]
    assert files == ["guards.jsonl"]


def test_predictions_of_other_rows(run, own, tmp_path):
    """Nothing of them fits: that is a failure, and no table of errors."""
    path = write_rows(tmp_path / "scores.jsonl", [{"id": "another", "score": 0.9}])
    results = run(predicted(path), benchmarks=[str(own)], task_type="prompt")
    (cell,) = somebodys(results).values()
    assert cell["status"] == "failed"
    assert "none of its ids and hashes is one of these rows" in cell["reason"]


def test_plain_predictions_say_nothing_of_obfuscated_rows(run, own, tmp_path):
    rows = [{"id": name, "score": 0.9} for name in ("one", "two", "three", "four", "five")]
    path = write_rows(tmp_path / "scores.jsonl", rows)
    found = somebodys(run(predicted(path), benchmarks=[f"{own}+spaces"], task_type="prompt"))
    assert found["mine_prompt"]["errors"] == 0
    assert found["mine_prompt+spaces"]["status"] == "failed"
