"""Do-Not-Answer as rows of examples/feedback_guard: 939 prompts that nobody should answer, what six
assistants answered, and what people say of each answer; beside them benign prompts with answers.

In examples/feedback_guard:

    python ../../bench/do_not_answer.py                           # all from the hub
    python ../../bench/do_not_answer.py --answers reviews --benign alpaca.json --guard toxic.jsonl
    ./run_experiment.sh full configs/do_not_answer.json

A prompt's response is blocked if people call any of its answers harmful; the row then holds the
first such answer, else one of the others by lot. `--answers` is a data set in the columns of
LibrAI/do-not-answer (question, <model>_response, <model>_harmful), or a folder with a table a
model, annotated_response_<model>.csv (question, response, harmful), packed or not.

Writes OUTPUT_DIR/rows.jsonl and guard.jsonl, the prompts that a small guard is made of, and prints
what they hold.
"""

import gzip
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from common import metrics
from common.conversation import UserError, check_text, last_turns, one_line
from common.data import load_conversations, spec_rows
from common.data.files import parse_json
from common.run import check_output_folder, json_lines, parse_args, run_cli, write_text

Row = dict[str, Any]
REVIEW = "annotated_response_"


@dataclass
class Arguments:
    answers: str = field(
        default="LibrAI/do-not-answer:train",
        metadata={"help": "Do-Not-Answer: a data spec, or a folder with a table a model"},
    )
    benign: list[str] = field(
        default_factory=lambda: ["yahma/alpaca-cleaned:train[:2000]"],
        metadata={"help": "harmless rows {instruction, input, output}: specs, or JSON files"},
    )
    benign_rows: int = field(default=200, metadata={"help": "drawn from all of these"})
    guard: str = field(
        default="lmsys/toxic-chat@toxicchat0124:train",
        metadata={"help": "labelled prompts that a small guard is made of: a spec"},
    )
    guard_safe: int = field(default=3, metadata={"help": "safe ones of these for each unsafe one"})
    longest: int = field(
        default=300, metadata={"help": "characters; longer prompts are left out: a CPU is slow"}
    )
    seed: int = 0
    output_dir: str = "output/do_not_answer/rows"


@dataclass(frozen=True)
class Answer:
    """What one assistant answered, and whether people call that harmful."""

    model: str
    text: str
    harmful: bool


Asked = tuple[str, list[Answer]]  # a prompt, and the answers to it


def main() -> None:
    (given,) = parse_args([Arguments])
    check_output_folder(given.output_dir)
    asked = read_answers(given.answers)
    rows = []
    for number, (prompt, answers) in enumerate(asked):
        rows.append(answered_row(number, prompt, answers, given.seed))
    benign = benign_rows(given.benign, given.benign_rows, given.longest, given.seed)
    prompts = guard_rows(given.guard, given.guard_safe, given.longest, given.seed)
    folder = Path(given.output_dir)
    write_text(folder / "rows.jsonl", json_lines(rows + benign))
    write_text(folder / "guard.jsonl", json_lines(prompts))
    found = facts(asked)
    found["benign"] = len(benign)
    found["prompts_of_the_guard"] = len(prompts)
    print(json.dumps(found, indent=2))


# --- the answers ----------------------------------------------------------------------------------


def read_answers(source: str) -> list[Asked]:
    """The prompts with their answers, those of each prompt in the order of the models' names.

    Raises:
        UserError: a table cannot be read, a column or a cell is missing, or two tables have other
            prompts.
    """
    folder = Path(source)
    table = joined_tables(folder) if folder.is_dir() else pd.DataFrame(plain_rows(source))
    labels = [name for name in map(str, table) if name.endswith("_harmful")]
    models = sorted(name.removesuffix("_harmful") for name in labels)
    if not models or "question" not in table:
        raise UserError(f"{source}: no columns question and <model>_harmful; see --help")
    asked = []
    for number, row in enumerate(table.to_dict("records")):
        prompt = check_text(row["question"], "question", f"{source}, row {number}")
        answers = []
        for model in models:
            text = row.get(f"{model}_response")
            harmful = row[f"{model}_harmful"]
            if not isinstance(text, str) or harmful not in (0, 1):
                where = f"{source}, question {prompt!r:.60}"
                hint = "expected a text, and 0 or 1"
                raise UserError(f"{where}: {model}_response or {model}_harmful: {hint}")
            answers.append(Answer(model, text, bool(harmful)))
        asked.append((prompt, answers))
    return asked


def plain_rows(spec: str) -> list[Row]:
    """The rows of a data set as they are. Raises UserError at the first that cannot be read."""
    _, rows = spec_rows(spec)
    found = []
    for _, row in rows:
        if isinstance(row, UserError):
            raise row
        found.append(row)
    return found


def joined_tables(folder: Path) -> pd.DataFrame:
    """The tables of a folder, a model each, in the columns of the hub's data set."""
    joined = pd.DataFrame()
    for path in sorted(folder.glob(f"{REVIEW}*.csv*")):
        table = read_table(path)
        missing = {"question", "response", "harmful"} - set(table)
        if missing:
            raise UserError(f"{path}: no column {', '.join(sorted(missing))}")
        if joined.empty:
            joined["question"] = table.question
        if not table.question.equals(joined.question):
            raise UserError(f"{path}: has other questions than the tables before it")
        model, _, _ = path.name.removeprefix(REVIEW).partition(".csv")
        joined[f"{model}_response"] = table.response
        joined[f"{model}_harmful"] = table.harmful
    return joined


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file, packed or not. An empty cell alone is missing: an answer may be "None" or "N/A".

    Raises:
        UserError: it cannot be read.
    """
    try:
        return pd.read_csv(path, keep_default_na=False, na_values=[""])
    except (OSError, EOFError, ValueError) as error:  # pandas' own are ValueErrors
        raise UserError(f"{path}: no CSV file that can be read ({one_line(error)})") from None


def answered_row(
    number: int,
    prompt: str,
    answers: list[Answer],
    seed: int,
) -> Row:
    """A row of the recipe: the first harmful answer, or, where there is none, any."""
    harmful = [answer for answer in answers if answer.harmful]
    any_of = random.Random(f"{seed} {number}")
    shown = harmful[0] if harmful else any_of.choice(answers)
    return {
        "conv_id": f"do_not_answer-{number}",
        "user_input": prompt,
        "toxicity": 1,  # all of them ask for something harmful
        "model_output": shown.text,
        "output_unsafe": bool(harmful),
        "kind": "do_not_answer",
        "answered_by": shown.model,
        "harmful_answers": len(harmful),
    }


def facts(asked: list[Asked]) -> dict[str, Any]:
    """How many answers are harmful, and whether half of the assistants predicts the other half."""
    first = []
    second = []
    prompts = 0
    by_model: Counter = Counter()
    for _, answers in asked:
        harmful = [answer.harmful for answer in answers]
        first.append(any(harmful[::2]))
        second.append(any(harmful[1::2]))
        prompts += any(harmful)
        for answer in answers:
            by_model[answer.model] += answer.harmful
    halves = metrics.agreement(first, second)
    return {
        "prompts": len(asked),
        "prompts_with_a_harmful_answer": prompts,
        "harmful_answers": by_model,
        "halves_kappa": halves["kappa"],
        "halves_kappa_interval": halves["kappa_interval"],
    }


# --- what stands beside them ----------------------------------------------------------------------


def benign_rows(
    sources: list[str],
    count: int,
    longest: int,
    seed: int,
) -> list[Row]:
    """Harmless prompts with their answers, drawn from all sources. Nobody has labelled the answers;
    they count as harmless.
    """
    rows = []
    for source in sources:
        for number, row in enumerate(instructions(source)):
            prompt, output = instruction(row, f"{source}, row {number}")
            if prompt and output and len(prompt) <= longest:
                made = {
                    "conv_id": f"benign-{Path(source).name}-{number}",
                    "user_input": prompt,
                    "toxicity": 0,
                    "model_output": output,
                    "output_unsafe": False,
                    "kind": "benign",
                }
                rows.append(made)
    if len(rows) < count:
        raise UserError(
            f"--benign: {len(rows)} rows of at most {longest} characters, {count} asked"
        )
    return random.Random(seed).sample(rows, count)


def instruction(row: Any, where: str) -> tuple[str, str]:
    """The prompt and the answer of a row. Raises UserError where a field is missing, or no text."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with instruction and output")
    texts = {}
    for name in ("instruction", "input", "output"):
        value = row.get(name)
        if value is None and name == "input":  # it often has none
            value = ""
        texts[name] = check_text(value, name, where, allow_empty=True)
    parts = [texts["instruction"], texts["input"]]
    prompt = "\n".join(filter(None, parts))
    return prompt, texts["output"]


def instructions(source: str) -> list[Row]:
    """The rows of a JSON file, packed or not, or of a spec."""
    if not source.endswith(".json.gz"):
        return plain_rows(source)
    try:
        packed = Path(source).expanduser().read_bytes()
        text = gzip.decompress(packed).decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{source}: cannot be read ({one_line(error)})") from None
    rows = parse_json(text, source)
    if not isinstance(rows, list):
        raise UserError(f"{source}: expected a JSON list of rows, found {type(rows).__name__}")
    return rows


def guard_rows(
    spec: str,
    safe_for_each: int,
    longest: int,
    seed: int,
) -> list[Row]:
    """The unsafe prompts of a data set, and for each of them so many safe ones by lot."""
    unsafe = []
    safe = []
    for row in load_conversations(spec, bad_rows="skip"):
        prompt, _ = last_turns(row["messages"])
        if row["prompt_unsafe"] is None or not prompt or len(prompt) > longest:
            continue
        label = "unsafe" if row["prompt_unsafe"] else "safe"
        side = unsafe if row["prompt_unsafe"] else safe
        side.append({"prompt": prompt, "prompt_label": label})
    count = min(len(safe), safe_for_each * len(unsafe))
    rows = unsafe + random.Random(seed).sample(safe, count)
    if not unsafe or not safe:
        raise UserError(f"--guard {spec}: no safe, or no unsafe, prompts of {longest} characters")
    return rows


if __name__ == "__main__":
    run_cli(main)
