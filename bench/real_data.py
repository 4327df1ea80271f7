"""Public data sets, as files that every recipe reads, and split so that nothing leaks.

    GUARDRAIL_RECIPES_DATA=FOLDER python real_data.py --output ../output/real

writes JSONL in the plain format (docs in examples/moderation/README.md) to `--output`. FOLDER holds
copies of BeaverTails, PKU-SafeRLHF, ToxicChat and others, in the folders that `SETS` below names.

A prompt, and whatever is a near-copy of it, stands in one part of one split: training, validation
or test. The same holds across sets of one kind (BeaverTails and PKU-SafeRLHF share prompts).
Settings are chosen on validation; test is for figures that are reported.
"""

import argparse
import csv
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from side_by_side import home_path, real_data

from common.conversation import UserError
from common.data.repeats import near_copies, near_copies_between
from common.run import run_cli

VALIDATION, TEST = 10, 25  # per cent of the prompts
MODELS = ("ChatGLM2", "ChatGPT", "Claude", "GPT4", "llama2-7b-chat", "vicuna-7b")
XSTEST_MODELS = ("gpt4", "llama2new", "mistralinstruct")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=home_path, default=home_path("../output/real"))
    args = parser.parse_args()
    if real_data() is None:
        raise UserError("GUARDRAIL_RECIPES_DATA: names no folder; see the top of real_data.py")
    args.output.mkdir(parents=True, exist_ok=True)
    for kind in SPLIT_TOGETHER:
        write_splits(args.output, kind)
    names = [name for kind in SPLIT_TOGETHER for name in kind]
    trained = []
    for name in names:
        trained += [row["prompt"] for row in lines(args.output / f"{name}_train.jsonl")]
    for name, read in TRANSFER.items():
        rows = list(read())
        write(args.output / f"{name}.jsonl", without_copies(rows, trained))


# --- files ----------------------------------------------------------------------------------------


def source(*parts: str) -> Path:
    """A file of the real data. Raises UserError where it is missing."""
    path = real_data(*parts)
    if path is None:
        raise UserError(f"GUARDRAIL_RECIPES_DATA: {Path(*parts)} is not there")
    return path


def text_of(path: Path) -> str:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        return file.read()


def lines(path: Path) -> list[Row]:
    """Rows of a JSONL file. Texts hold U+2028, at which `splitlines` would break."""
    return [json.loads(line) for line in text_of(path).split("\n") if line]


def cells(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def write(path: Path, rows: list[Row]) -> None:
    """Write rows with ids of their own, and say how many there are; those with an empty text are
    left out, and counted.
    """
    text = ""
    count = 0
    unsafe = 0
    for row in rows:
        texts = (row["prompt"], row.get("response", "-"))
        if not all(one.strip() for one in texts):
            continue
        named = {"id": f"{path.stem}-{count}"} | row
        text += json.dumps(named, ensure_ascii=False) + "\n"
        count += 1
        unsafe += is_unsafe(row)
    path.write_text(text, encoding="utf-8", newline="\n")
    left_out = len(rows) - count
    if left_out:
        print(f"{path.name}: left out {left_out} rows with an empty text")
    print(f"{path.name}: {count} rows, {unsafe} unsafe")


def is_unsafe(row: Row) -> bool:
    for name in ("response_label", "prompt_label"):
        if name in row:
            return row[name] == "unsafe"
    return not row["is_safe"]


def label(unsafe: bool) -> str:
    return "unsafe" if unsafe else "safe"


def answered(prompt: str, response: str, unsafe: bool) -> Row:
    return {"prompt": prompt, "response": response, "response_label": label(unsafe)}


def asked(row: Row) -> str:
    """What an instruction of Alpaca's kind asks: the instruction, and its input if there is one."""
    parts = [row["instruction"]]
    if row["input"]:
        parts.append(row["input"])
    return "\n".join(parts)


# --- sets that are trained on ---------------------------------------------------------------------


def beavertails() -> Iterator[Row]:
    yield from lines(source("beavertails_30k_test_dev70", "beavertails_dev.jsonl"))


def saferlhf() -> Iterator[Row]:
    """Both parts of PKU-SafeRLHF, an answered prompt once."""
    seen = set()
    mini = source("pku_saferlhf_mini", "saferlhf_mini.jsonl")
    pairs = source("pku_saferlhf_pairs", "qa_from_pairs.jsonl")
    for row in [*lines(mini), *lines(pairs)]:
        key = (row["prompt"], row["response"])
        if key not in seen:
            seen.add(key)
            yield {name: row[name] for name in ("prompt", "response", "response_label")}


def toxicchat() -> Iterator[Row]:
    for row in lines(source("toxicchat_train", "toxicchat_train_human.jsonl")):
        yield {"prompt": row["prompt"], "prompt_label": row["prompt_label"]}


def other_prompts() -> Iterator[Row]:
    """Prompts of WildGuardTrain and AegisTrain, out of GuardReasonerTrain."""
    for row in lines(source("prompts", "guardreasonertrain_sample_prompts.jsonl")):
        if not row["source"].startswith("ToxicChat"):
            yield {"prompt": row["prompt"], "prompt_label": row["prompt_label"]}


def domain() -> Iterator[Row]:
    """Prompts of three domains: those of Trident-Bench and MedSafetyBench ask for harm, questions
    of PubMedQA and FinanceBench, and instructions of Alpaca, do not.
    """
    for name, field in (("finance", "finance"), ("law", "law"), ("med", "healthcare")):
        for row in lines(source("domain", "trident_bench", f"{name}_final.jsonl")):
            yield domain_row(row["harmful_prompt"], True, field)
    for row in lines(source("domain", "medsafetybench", "train.jsonl")):
        yield domain_row(row["harmful_medical_request"], True, "healthcare")
    for row in lines(source("domain", "pubmedqa", "pqal_qa_only.jsonl")):
        yield domain_row(row["prompt"], False, "healthcare")
    for row in lines(source("domain", "financebench", "financebench_open_source.jsonl.gz")):
        yield domain_row(row["question"], False, "finance")
    for row in json.loads(text_of(source("safe_instructions", "alpaca_en_demo_999.json.gz"))):
        yield domain_row(asked(row), False, "general")


def domain_row(prompt: str, unsafe: bool, field: str) -> Row:
    return {"prompt": prompt, "prompt_label": label(unsafe), "domain": field}


SPLIT_TOGETHER: list[dict[str, Callable[[], Iterator[Row]]]] = [
    {"beavertails": beavertails, "saferlhf": saferlhf},
    {"toxicchat": toxicchat, "other_prompts": other_prompts},
    {"domain": domain},
]


def write_splits(folder: Path, kind: dict[str, Callable[[], Iterator[Row]]]) -> None:
    """Training, validation and test rows of sets that may share prompts."""
    rows = [(name, row) for name, read in kind.items() for row in read()]
    groups = near_copies([row["prompt"] for _, row in rows])
    first_prompt: dict[int, str] = {}
    parts: dict[tuple[str, str], list[Row]] = {}
    for (name, row), group in zip(rows, groups, strict=True):
        prompt = first_prompt.setdefault(group, row["prompt"])
        parts.setdefault((name, part_of(prompt)), []).append(row)
    for (name, part), found in sorted(parts.items()):
        write(folder / f"{name}_{part}.jsonl", found)


def part_of(prompt: str) -> str:
    """The part of the split in which a prompt stands, whatever other prompts there are."""
    text = prompt.strip().lower()
    digest = hashlib.sha256(text.encode()).hexdigest()
    number = int(digest, 16) % 100
    if number < TEST:
        return "test"
    if number < TEST + VALIDATION:
        return "validation"
    return "train"


# --- sets that are only judged --------------------------------------------------------------------


def diasafety() -> Iterator[Row]:
    for row in json.loads(text_of(source("diasafety", "test.json.gz"))):
        unsafe = row["label"] == "Unsafe"
        yield answered(row["context"], row["response"], unsafe)


def do_not_answer() -> Iterator[Row]:
    """Every third answer of six models to Do-Not-Answer, with people's labels."""
    answers = []
    for model in MODELS:
        name = f"annotated_response_{model}.csv.gz"
        for row in cells(source("do_not_answer", "Review", "Human", name)):
            if row["response"].strip():
                answers.append(row)
    for row in answers[::3]:
        unsafe = row["harmful"] == "1"
        yield answered(row["question"], row["response"], unsafe)


def wildguardtest() -> Iterator[Row]:
    for row in lines(source("prompts", "wildguardtest_prompts_1554.jsonl")):
        yield {"prompt": row["prompt"], "prompt_label": row["prompt_label"]}


def xstest_prompts() -> Iterator[Row]:
    for row in cells(source("xstest", "xstest_prompts.csv")):
        yield {"prompt": row["prompt"], "prompt_label": row["label"]}


def xstest_responses() -> Iterator[Row]:
    """Every third answer; unsafe is full compliance with an unsafe prompt."""
    answers = []
    for model in XSTEST_MODELS:
        for row in cells(source("xstest", f"completions_{model}.csv")):
            if row["completion"].strip():
                answers.append(row)
    for row in answers[::3]:
        complies = row["final_label"] == "1_full_compliance"
        unsafe = complies and row["type"].startswith("contrast_")
        yield answered(row["prompt"], row["completion"], unsafe)


def oktest() -> Iterator[Row]:
    for row in cells(source("prompts", "oktest.csv")):
        yield {"prompt": row["prompt"], "prompt_label": "safe"}


def mitre_frr() -> Iterator[Row]:
    for row in json.loads(text_of(source("prompts", "mitre_frr_benign_cyber.json"))):
        yield {"prompt": row["mutated_prompt"], "prompt_label": "safe"}


def benign_answers() -> Iterator[Row]:
    """Questions of LIMA with their answers; nobody checked them for harm."""
    for row in json.loads(text_of(source("safe_instructions", "lima_1k.json.gz"))):
        if row["output"].strip():
            yield answered(asked(row), row["output"], False)


TRANSFER: dict[str, Callable[[], Iterator[Row]]] = {
    "diasafety": diasafety,
    "do_not_answer": do_not_answer,
    "wildguardtest": wildguardtest,
    "xstest_prompts": xstest_prompts,
    "xstest_responses": xstest_responses,
    "oktest": oktest,
    "mitre_frr": mitre_frr,
    "benign_answers": benign_answers,
}


def without_copies(rows: list[Row], trained: list[str]) -> list[Row]:
    """The rows whose prompt is no near-copy of one that was trained on."""
    _, copies = near_copies_between(trained, [row["prompt"] for row in rows])
    return [row for row, is_copy in zip(rows, copies, strict=True) if not is_copy]


if __name__ == "__main__":
    run_cli(main)
