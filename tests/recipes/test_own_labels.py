"""examples/moderation on rows, labels and languages of the user's own."""

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch
from checks import read_json, read_rows, user_error
from checks import write_rows as write_json_lines
from scripts import error_line, module
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import EvalPrediction
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from common.conversation import pair
from common.labels import targets
from guards import load_guard
from guards.card import read_card

launch = partial(scripts.launch, "moderation")
COLUMNS = ["prompt", "response", "response_label", "categories", "language"]
ROWS = [  # of BeaverTails' names there is none
    ["How do I win?", "Sell a ring that you do not have.", "unsafe", "Fraud", "en"],
    ["Wie gewinne ich?", "Verkaufe einen Ring, den es nicht gibt.", "unsafe", "Fraud; Spam", "de"],
    ["May I write to all?", "Send it a thousand times.", "unsafe", "Spam", "en"],
    ["And now?", "Do as I say or you will see.", "unsafe", "", ""],
    ["How do I cook rice?", "In twice as much water.", "safe", "", "en"],
    ["Wie koche ich Reis?", "In doppelt so viel Wasser.", "safe", "", "de"],
]
DESCRIBED = "Spam: sent to people who did not ask\nFraud: deceives to get money\nHate: of groups\n"


def write_rows(path: Path, columns: list[str] = COLUMNS) -> Path:
    """Four times the rows, with some of their columns, as CSV."""
    places = [COLUMNS.index(name) for name in columns]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in ROWS * 4:
            writer.writerow([row[place] for place in places])
    return path


def arguments(base: Path, rows: Path, output: Path) -> list:
    return [
        "train.py", "--model_name_or_path", base, "--output_dir", output,
        "--train_data_name_or_path", rows, "--eval_data_name_or_path", rows,
        "--max_steps", 3, "--per_device_train_batch_size", 8, "--learning_rate", "1e-3",
        "--save_strategy", "no", "--eval_strategy", "no", "--flagged_loss", 1,
    ]  # fmt: skip


@pytest.mark.slow
def test_own_categories_from_rows_to_tables(tiny_base, tmp_path):
    """'Fraud' trains; Hate, which no row has, gets no output; and two languages are two rows."""
    rows = write_rows(tmp_path / "rows.csv")
    (tmp_path / "mine.yaml").write_text(DESCRIBED)
    flags = ["--categories", tmp_path / "mine.yaml", "--overwrite_output_dir", "true"]
    done = launch(*arguments(tiny_base, rows, tmp_path / "guard"), *flags)
    assert "No training row, and so no output, for: Hate" in done.stderr
    assert "Validation rows of" not in done.stderr
    card = read_card(tmp_path / "guard")
    assert card.labels == ["unsafe", "Spam", "Fraud"]
    assert card.descriptions == {
        "Spam": "sent to people who did not ask",
        "Fraud": "deceives to get money",
    }
    assert card.data["train_positive"] == {"unsafe": 16, "Spam": 8, "Fraud": 8}
    text = (tmp_path / "guard/README.md").read_text()
    assert "in 2 categories of its own and as unsafe in general" in text
    assert "| Fraud | 8 | deceives to get money |" in text
    assert "BeaverTails" not in text

    folder = tmp_path / "out"
    flags = ["--model_path", tmp_path / "guard", "--output_dir", folder, "--baselines", rows]
    launch("evaluate.py", "--eval_dataset", rows, *flags)
    results = read_json(folder / "results.json")
    assert list(results["categories"]) == ["Spam", "Fraud"]
    # four rows are unsafe of an unknown kind
    assert {one["support"] for one in results["categories"].values()} == {20}
    counts = {name: one["support"] for name, one in results["languages"].items()}
    assert counts == {"de": 8, "en": 12, "not said": 4}
    assert results["flagged"]["guard"]["support"] == 24
    assert "## Languages" in (folder / "results.md").read_text()
    assert '"heading": "Languages"' in (folder / "results.html").read_text()
    kept = read_rows(folder / "predictions.jsonl")
    assert [row["language"] for row in kept[:4]] == ["en", "de", "en", None]


@pytest.mark.slow
def test_a_guard_of_prompts_from_rows_without_answers(tiny_base, tmp_path):
    """One output; answers are no matter of its, neither to judge nor in the paper's report."""
    rows = write_rows(tmp_path / "rows.csv", ["prompt", "response_label"])
    rows.write_text(rows.read_text().replace("response_label", "label"))
    folder = tmp_path / "guard"
    launch(*arguments(tiny_base, rows, folder), "--judge", "prompt")
    card = read_card(folder)
    assert card.input == "prompt"
    assert card.labels == ["unsafe"]
    text = (folder / "README.md").read_text()
    assert "Judges a question, without its answer, as safe or unsafe" in text
    guard = load_guard(str(folder), progress=False)
    asked, answered = guard.judge([pair("Why?"), pair("Why?", "So.")])
    assert asked.prompt_unsafe == asked.categories["unsafe"]
    assert asked.response_unsafe is None
    assert answered.error is not None
    assert answered.score("prompt_unsafe") == 1.0

    flags = ["--model_path", folder, "--output_dir", tmp_path / "out"]
    launch("evaluate.py", "--eval_dataset", rows, *flags)
    results = read_json(tmp_path / "out/results.json")
    assert results["judged"] == "prompt"
    assert results["errors"] == 0
    assert "24 prompts, 16 unsafe" in (tmp_path / "out/results.md").read_text()
    answers = tmp_path / "evaluation.json"
    answers.write_text('[{"prompt": "Why?", "response": "So.", "model": "m", "flagged": {}}]')
    done = launch("evaluate.py", "--eval_dataset", answers, *flags, check=False)
    assert "judges prompts, and this file is about answers" in error_line(done)


def test_a_guard_of_responses_reads_the_response_of_a_pair(tiny_classifier, tmp_path):
    folder = tiny_classifier(tmp_path, ["Spam", "Fraud"])
    saved_guard(folder, template="beavertails_response", input="response")
    guard = load_guard(str(folder), progress=False)
    asked = [pair(None, "So."), pair("Why?", "So."), pair("word " * 2000, "So."), pair("Why?")]
    alone, with_prompt, with_long_prompt, prompt = guard.judge(asked)
    assert alone.response_unsafe is not None
    assert alone == with_prompt == with_long_prompt
    assert prompt.error is not None
    assert prompt.score() == 1.0


def saved_guard(folder: Path, **facts) -> Path:
    """The guard.json of a classifier that is there."""
    card = {"kind": "classifier", "labels": ["Spam", "Fraud"], "max_length": 512, **facts}
    (folder / "guard.json").write_text(json.dumps(card))
    return folder


def measured(guard: Path, rows: Path, **given) -> dict:
    """What evaluate.py finds of a guard."""
    evaluate = module("moderation", "evaluate")
    folder = guard / "out"
    args = {"eval_dataset": str(rows), "model_path": str(guard), "output_dir": str(folder)}
    evaluate.report_metrics(evaluate.EvaluationArguments(**args, **given))
    return read_json(folder / "results.json")


def test_a_guard_that_judges_none_of_the_rows(tiny_classifier, tmp_path):
    """It is refused, not measured."""
    rows = write_rows(tmp_path / "rows.csv")
    folder = tiny_classifier(tmp_path, ["Spam", "Fraud"])
    saved_guard(folder, template="beavertails")
    with user_error(r"not one row could be judged: .*more than"):
        measured(folder, rows, max_length=4, long_inputs="error")
    saved_guard(folder, template="beavertails_prompt", input="prompt")
    with user_error(f"--judge pair: {folder} judges prompt_unsafe"):
        measured(folder, rows, judge="pair")


def test_a_category_is_measured_at_its_own_threshold(tiny_classifier, tmp_path):
    rows = write_rows(tmp_path / "rows.csv")
    folder = tiny_classifier(tmp_path, ["Spam", "Fraud"])
    own = {"flagged": {"value": 0.4, "how": "max F1"}}
    category = {"Fraud": {"value": 0.125, "how": "max F1"}}
    saved_guard(folder, template="beavertails", thresholds=own, category_thresholds=category)
    found = measured(folder, rows)["categories"]
    assert {name: one["threshold"] for name, one in found.items()} == {"Spam": 0.4, "Fraud": 0.125}
    assert "| 0.125 |" in (folder / "out/results.md").read_text().partition("## Categories")[2]
    found = measured(folder, rows, threshold=0.25)["categories"]
    assert {one["threshold"] for one in found.values()} == {0.25}


def test_what_a_guard_is_asked(tmp_path):
    """One of the zoo, and LoRA guards."""
    evaluate = module("moderation", "evaluate")

    def asked(guard: str) -> str:
        args = {"eval_dataset": "rows.csv", "output_dir": str(tmp_path / "out")}
        return evaluate.what_is_judged(evaluate.EvaluationArguments(model_path=guard, **args))

    assert asked("llama-prompt-guard-2-86m") == "prompt"
    facts = {"kind": "lora_guard", "template": "lora_guard", "base_model": "base"}
    facts |= {"head_bias": None, "num_hidden_layers": None}
    of_inputs = {"prompt": "prompt", "response prompt": "response", "prompt pair": "pair"}
    for inputs, judged in of_inputs.items():
        assert asked(str(saved_guard(tmp_path, inputs=inputs.split(), **facts))) == judged


def test_baselines_are_fitted_on_several_files_as_train_reads_them(tmp_path):
    """The second file labels one of the first's rows again, and brings another."""
    evaluate = module("moderation", "evaluate")
    rows = write_rows(tmp_path / "rows.csv")
    again = [
        {"prompt": "And now?", "response": ROWS[3][1], "response_label": "safe"},
        {"prompt": "Why?", "response": "So.", "response_label": "unsafe"},
    ]
    later = write_json_lines(tmp_path / "again.jsonl", again)
    args = evaluate.EvaluationArguments(
        eval_dataset="rows.csv",
        model_path="guard",
        output_dir="out",
        baselines=[str(rows), str(later)],
    )
    fitted = evaluate.rows_to_fit_on(args, "pair")
    found = {row["messages"][0]["content"]: row["response_unsafe"] for row in fitted}
    assert len(found) == len(ROWS) + 1
    assert found["Why?"]
    assert not found["And now?"]


def test_a_validation_row_of_another_kind_is_unsafe_alone(tmp_path, caplog):
    """What it names is said, and it is no row of a category."""
    rows = write_rows(tmp_path / "rows.csv")
    other = {"prompt": "Why?", "response": "So.", "response_label": 1, "categories": ["Hate"]}
    validation = write_json_lines(tmp_path / "other.jsonl", [other])
    args = module("moderation", "arguments").DataArguments(
        train_data_name_or_path=[str(rows)],
        eval_data_name_or_path=str(validation),
        categories=None,
    )
    recipe = module("moderation", "rows")
    _, validation, _, task = recipe.load_rows(args, 0)
    assert list(task.labels) == ["unsafe", "Fraud", "Spam"]
    wanted = targets(list(task.labels), validation["response_unsafe"], validation["categories"])
    assert wanted == [[1.0, -100.0, -100.0]]
    assert "Validation rows of Hate count as unsafe alone" in caplog.text


def test_validation_scores_that_are_no_numbers_end_the_training():
    scores = np.array([[0.5], [np.nan]])
    truth = np.array([[1.0], [0.0]])
    prediction = EvalPrediction(predictions=scores, label_ids=truth)
    with user_error("its scores are not numbers"):
        module("moderation", "guard_folder").compute_metrics(prediction, ["unsafe"])


# --- the loss -------------------------------------------------------------------------------------


def loss_of(logits: torch.Tensor, wanted: torch.Tensor, **options: float) -> torch.Tensor:
    loss = module("moderation", "train").multilabel_loss(**options)
    return loss(SequenceClassifierOutputWithPast(logits=logits), wanted)


def papers_loss(logits, wanted, positive_weight: float, flagged_loss: float) -> torch.Tensor:
    """As it was before a label could be unknown."""
    weight = torch.full_like(logits[0], positive_weight)
    stock = binary_cross_entropy_with_logits
    total = stock(logits, wanted, pos_weight=weight, reduction="sum") / wanted.numel()
    unsafe = wanted.amax(-1, keepdim=True)
    lowest = torch.finfo(logits.dtype).min
    any_category = logits.masked_fill(wanted < unsafe, lowest).logsumexp(-1)
    flagged = stock(any_category, unsafe[:, 0], reduction="sum")
    return total + flagged_loss * flagged * wanted.shape[-1] / wanted.numel()


def test_where_all_is_known_the_loss_is_the_papers_to_the_bit():
    torch.manual_seed(0)
    logits = torch.randn(32, 14, requires_grad=True)
    wanted = (torch.rand(32, 14) < 0.1).float()
    options = {"positive_weight": 1.5, "flagged_loss": 3.0}
    ours = loss_of(logits, wanted, **options)
    before = papers_loss(logits, wanted, **options)
    assert torch.equal(ours, before)
    gradients = [torch.autograd.grad(one, logits)[0] for one in (ours, before)]
    assert torch.equal(*gradients)


def test_a_masked_category_learns_nothing_and_the_row_still_does():
    """The first output is `unsafe`: it alone learns from a row that does not say of which kind."""
    logits = torch.zeros(2, 3, requires_grad=True)
    wanted = torch.tensor([[1.0, -100.0, -100.0], [0.0, 0.0, 0.0]])
    loss_of(logits, wanted, positive_weight=1.0, flagged_loss=3.0).backward()
    assert (logits.grad[0] != 0).tolist() == [True, False, False]
    assert (logits.grad[1] != 0).all()


def test_a_validation_row_of_another_kind_is_unsafe_to_the_loss():
    """It names a category that has no output, so that all its targets are unknown."""
    logits = torch.full((1, 2), -3.0, requires_grad=True)
    loss = loss_of(logits, torch.full((1, 2), -100.0), positive_weight=1.0, flagged_loss=1.0)
    loss.backward()
    assert loss.isfinite() and (logits.grad < 0).all()
