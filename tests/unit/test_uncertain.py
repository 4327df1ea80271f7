"""common/uncertain.py: which rows are labelled again, and that they replace the old ones."""

import math

from checks import read_rows, user_error, write_rows

from common import metrics
from common.conversation import Verdict, pair
from common.data import load_conversations
from common.data.specs import about_data
from common.data.splits import load_training_rows
from common.uncertain import ExportArguments, scored, write_uncertain

LABEL = "response_unsafe"
TALK = [*pair("A first question?", "A first answer."), *pair("And then?", "Then it ends.")]


def row(number, unsafe, messages=None, **more):
    messages = messages or pair(f"Question {number}?", f"Answer {number}.")
    return {"id": f"row {number}", "messages": messages, LABEL: unsafe, **more}


def verdict(score):
    return Verdict(error="too long") if score is None else Verdict(response_unsafe=score)


def exported(folder, scores, thresholds, count, rows=None):
    """The lines that are written where row i has the scores of `scores[i]`, one a guard."""
    judged = []
    for number, said in enumerate(scores):
        one = rows[number] if rows else row(number, number % 2 == 0)
        verdicts = {name: verdict(score) for name, score in zip(thresholds, said, strict=True)}
        judged.append(scored(one, LABEL, verdicts, thresholds))
    write_uncertain(folder, judged, count)
    return read_rows(folder / "uncertain.jsonl")


def numbers(lines, why):
    return [line["id"].removeprefix("row ") for line in lines if line["why"] == why]


def test_the_rows_nearest_the_threshold(tmp_path):
    """In log-odds: of a threshold of 0.02 a score of 0.03 is nearer than one of 0.001."""
    scores = [[0.001], [0.03], [0.9], [None], [0.015]]
    lines = exported(tmp_path, scores, {"guard": 0.02}, 2)
    assert numbers(lines, "near the threshold") == ["4", "1"]
    assert lines[0]["scores"] == {"guard": 0.015}
    assert len(lines) == 2


def test_a_score_that_is_no_number_is_none(tmp_path):
    lines = exported(tmp_path, [(math.nan,), (0.9,), (0.6,)], {"a": 0.5}, 1)
    assert numbers(lines, "near the threshold") == ["2"]


def test_the_rows_on_which_guards_disagree_come_the_furthest_apart_first(tmp_path):
    scores = [[0.9, 0.8], [0.9, 0.1], [0.99, 0.01], [0.51, 0.51], [0.2, None], [0.7, 0.2]]
    lines = exported(tmp_path, scores, {"a": 0.5, "b": 0.5}, 2)
    assert numbers(lines, "near the threshold") == ["3", "5"]
    assert numbers(lines, "guards disagree") == ["2", "1"]


def test_what_is_written_is_data(tmp_path):
    rows = [
        row(0, True, TALK, categories=["fraud"], language="en"),
        row(1, False, pair("A question?", "An answer."), prompt_unsafe=True, categories=[]),
        row(2, False, pair(None, "An answer alone.")),
    ]
    exported(tmp_path, [[0.5]] * 3, {"guard": 0.5}, 3, rows)
    found = {one["id"]: one for one in load_conversations(str(tmp_path / "uncertain.jsonl"))}
    assert found["row 0"]["messages"] == TALK
    assert found["row 0"]["categories"] == ["fraud"]
    assert (found["row 1"]["prompt_unsafe"], found["row 1"][LABEL]) == (True, False)
    assert found["row 1"]["categories"] == []
    assert found["row 2"]["messages"] == pair(None, "An answer alone.")
    assert found["row 2"]["categories"] is None


def test_labels_that_somebody_may_have_mended_stay(tmp_path):
    (tmp_path / "uncertain.jsonl").write_text("mine")
    with user_error(r"uncertain\.jsonl is there, .* move it"):
        ExportArguments(export_uncertain=3).check_export(tmp_path)
    ExportArguments().check_export(tmp_path)
    with user_error("--export_uncertain -1"):
        ExportArguments(export_uncertain=-1).check_export(tmp_path)


# --- back into training ---------------------------------------------------------------------------


def write(path, *labels):
    rows = []
    for number, label in labels:
        row = {"prompt": f"Question {number}?", "response": "Yes.", "response_label": label}
        rows.append(row)
    return str(write_rows(path, rows))


def test_later_labels_replace_those_before(tmp_path, caplog):
    """The mended file may hold safe rows alone; a repeat within one file stays a repeat."""
    caplog.set_level("INFO")
    base = write(tmp_path / "a.jsonl", (1, "unsafe"), (2, "unsafe"), (3, "safe"), (3, "safe"))
    mended = write(tmp_path / "b.jsonl", (2, "safe"), (4, "safe"))
    rows, held_out, _ = load_training_rows([base, mended], None, None, 0, require=(LABEL,))
    assert held_out is None
    asked = [messages[0]["content"] for messages in rows["messages"]]
    assert asked == [f"Question {number}?" for number in (1, 3, 3, 2, 4)]
    assert rows[LABEL] == [True, False, False, False, False]
    assert "its labels replace those of 1 rows" in caplog.text
    with user_error(r"b\.jsonl, field response_unsafe: no positive row"):
        load_training_rows([mended, base], None, None, 0, require=(LABEL,))


def test_several_data_sets_have_one_name(tmp_path):
    name = f"0.1 of {tmp_path}/base.jsonl + {tmp_path}/uncertain.jsonl"
    assert about_data(name) == {"name": "0.1 of base.jsonl + uncertain.jsonl"}
    assert not metrics.is_test(name)
    assert metrics.is_test(f"{tmp_path}/test.jsonl + {tmp_path}/uncertain.jsonl")
