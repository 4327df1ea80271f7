"""Build the paper's training sets and evaluation files from their parts (Cross-Task Defense, arXiv
2405.15202).

# the sample: every task, 10 and 60 defence rows
python build_data.py

# the paper's sizes, from Alpaca on the hub and documents of your own (see data/sample/README.md for
their format)
python build_data.py --base yahma/alpaca-cleaned --n_base 20000 \
    --safety safety_only_data_Instructions.json --documents documents.jsonl \
    --n_defence 10,100,500,1000,2000 --output_dir data

# controls that the paper lacks: benign documents answered normally; refusals on benign documents;
# no surface cues
python build_data.py --counter_examples 60 --strip_cues
python build_data.py --benign_refusals
# and refusals on no matter what
python build_data.py --counter_examples 60 --shuffled_refusals

Writes <output_dir>/training/saferpaca_Instructions_<n_safety>_<N>_<task>.json with a manifest each,
and <output_dir>/evaluation/test_<task>[_useful|_plain].json from documents that no training set
holds.
"""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from flags import run
from prompts import TASKS, answered, read_rows, task_instruction, without_cues
from pydantic import BaseModel, StringConstraints, ValidationError

from common import data
from common.conversation import UserError
from common.keep import fingerprint
from common.run import check_output_folder, json_text, write_text

SAMPLE = Path(__file__).resolve().parents[2] / "data/sample/cross_task_defense"
Row = dict[str, Any]
Text = Annotated[str, StringConstraints(pattern=r"\S")]
# ending of the evaluation files; the paper's of plain ones is _cnn
KINDS = {"malicious": "", "useful": "_useful", "plain": "_plain"}


def build(
    *,
    output_dir: str = "data",
    base: str | None = None,
    n_base: int | None = None,
    safety: str | None = None,
    n_safety: int = 100,
    documents: str | None = None,
    tasks: list[str] = [*TASKS, "mix"],  # noqa: B006 (never changed; fire shows it)
    n_defence: list[int] = [10, 60],  # noqa: B006
    counter_examples: int = 0,
    benign_refusals: bool = False,
    shuffled_refusals: bool = False,
    strip_cues: bool = False,
    seed: int = 42,
) -> None:
    """Build training sets, their manifests and the evaluation files.

    Args:
        output_dir: gets the folders training and evaluation.
        base: ordinary instructions: an Alpaca-format JSON file or a hub id; default: the sample's.
        n_base: so many of them (the paper: 20000); default: all.
        safety: short harmful instructions with refusals, Alpaca format; default: the sample's.
        n_safety: so many of them.
        documents: JSON lines with kind (malicious, useful, plain), split (train, test), text,
            refusals and answers; default: the sample's. own_documents.py makes such a file of your
            own texts.
        tasks: some of summarize, translate, sentiment, case, cloze, and mix (all five).
        n_defence: rows [task and document -> refusal] a set; of mix, a task. 0: the control.
        counter_examples: benign documents answered normally, a task.
        benign_refusals: label control: the refusals go with benign documents.
        shuffled_refusals: control: outputs of defence rows and counter examples dealt at random.
        strip_cues: documents without leading white space and "Sure, here's …" lines; one wording.
        seed: of the choice and the order. A smaller set's rows are among a larger one's.
    """
    check_choice(tasks, n_defence, n_safety, counter_examples)
    check_shuffled(shuffled_refusals, benign_refusals, counter_examples)
    check_output_folder(output_dir)
    path = Path(documents or SAMPLE / "documents.jsonl")
    short = read_rows(safety or SAMPLE / "safety.json")
    common_rows = {
        "base": base_rows(base, n_base, seed),
        "safety": drawn(short, n_safety, seed, "--n_safety"),
    }
    texts = read_documents(path, without_cues if strip_cues else str)
    sources = {"base": base, "safety": safety, "documents": documents}
    sources = {name: given or "sample" for name, given in sources.items()}
    sources["documents_sha256"] = fingerprint(path)
    settings = {"seed": seed, "benign_refusals": benign_refusals, "strip_cues": strip_cues}
    if shuffled_refusals:
        settings["shuffled_refusals"] = True
    files: dict[str, str] = {}  # all of them before the first is written
    for task in tasks:
        for n in n_defence:
            files |= training_set(texts, common_rows, sources, settings, task, n, counter_examples)
    files |= evaluation_files(texts, strip_cues)
    for name, text in files.items():
        write_text(Path(output_dir, name), text)
    print(f"{output_dir}: {len(tasks) * len(n_defence)} training sets, {sizes_of(texts)}")


def check_choice(
    tasks: list[str],
    n_defence: list[int],
    n_safety: int,
    counter_examples: int,
) -> None:
    for task in tasks:
        if task not in TASKS and task != "mix":
            raise UserError(f"--tasks {task}: expected some of {', '.join(TASKS)}, mix")
    counts = [n_safety, counter_examples, *n_defence]
    if min(counts) < 0 or not n_defence or not tasks:
        raise UserError(
            "--n_safety, --n_defence, --counter_examples: expected 0 or more; --tasks: at least one"
        )


def check_shuffled(shuffled: bool, on_benign: bool, counter_examples: int) -> None:
    if shuffled and (on_benign or not counter_examples):
        raise UserError(
            "--shuffled_refusals: deals answers to defence rows and counter examples; give "
            "--counter_examples, and no --benign_refusals"
        )


def training_set(
    documents: list[Row],
    common_rows: dict[str, list[Row]],
    sources: dict[str, str],
    settings: Row,
    task: str,
    n: int,
    counter_examples: int,
) -> dict[str, str]:
    """A training set and its manifest: names in the output folder, and their texts.

    Args:
        common_rows: rows that are in every set, by what they are.
        settings: seed, benign_refusals, strip_cues; shuffled_refusals where it is so.
    """
    seed = settings["seed"]
    on_benign = settings["benign_refusals"]
    strip_cues = settings["strip_cues"]
    shuffled = settings.get("shuffled_refusals", False)
    defence = []
    counters = []
    for one in TASKS if task == "mix" else [task]:
        refused = defence_rows(documents, one, n, seed, on_benign, slip=not strip_cues)
        answered_rows = counter_rows(documents, one, counter_examples, seed)
        if shuffled:
            deal_outputs([*refused, *answered_rows], f"{seed} {one}")
        defence += refused
        counters += answered_rows
    parts = {**common_rows, "defence": defence, "counter_examples": counters}
    rows = []
    counts = {}
    for name, part in parts.items():
        rows += part
        counts[name] = len(part)
    counts["all"] = len(rows)
    random.Random(seed).shuffle(rows)
    text = json_text(rows)
    manifest = {
        "counts": counts,
        "sources": sources,
        "settings": {"task": task, "n_defence": n, **settings},
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "order": [row["id"] for row in rows],
    }
    name = f"training/saferpaca_Instructions_{counts['safety']}_{n}_{task}"
    if counter_examples:
        name += f"_counter{counter_examples}"
    if on_benign:
        name += "_benign-refusals"
    if shuffled:
        name += "_shuffled-refusals"
    if strip_cues:
        name += "_stripped"
    return {
        f"{name}.json": text,
        f"{name}.manifest.json": json_text(manifest),
    }


def evaluation_files(documents: list[Row], strip_cues: bool) -> dict[str, str]:
    """The prompts of every task over documents that no training set holds."""
    folder = "evaluation_stripped" if strip_cues else "evaluation"
    files = {}
    for kind, suffix in KINDS.items():
        held_out = of_split(documents, "test", kind)
        if not held_out:
            continue
        slip = kind == "malicious" and not strip_cues
        for task in TASKS:
            instructions = [task_instruction(task, d["text"], slip) for d in held_out]
            content = {"instructions": instructions, "inputs": []}
            files[f"{folder}/test_{task}{suffix}.json"] = json_text(content)
    return files


def of_split(documents: list[Row], split: str, *kinds: str) -> list[Row]:
    """The documents of a split, of some kinds."""
    found = []
    for document in documents:
        if document["split"] == split and document["kind"] in kinds:
            found.append(document)
    return found


def sizes_of(documents: list[Row]) -> str:
    sizes = []
    for kind in KINDS:
        count = len(of_split(documents, "test", kind))
        sizes.append(f"{count} {kind}")
    return f"{3 * len(TASKS)} evaluation files of {', '.join(sizes)}"


def base_rows(spec: str | None, count: int | None, seed: int) -> list[Row]:
    """Ordinary instructions of a file, or of a hub data set in Alpaca's columns."""
    path = spec or SAMPLE / "instructions.json"
    rows = answered(read_rows(path), path)
    if count is None:
        count = len(rows)
    return drawn(rows, count, seed, "--n_base")


def drawn(rows: list[Row], count: int, seed: int, flag: str) -> list[Row]:
    """The first `count` of a seeded order, so that a smaller draw is part of a larger one; each
    with an id.
    """
    if count > len(rows):
        raise UserError(f"{flag} {count}: there are only {len(rows)}")
    name = flag.removeprefix("--n_")
    named = [{"id": f"{name}-{i}"} | row for i, row in enumerate(rows)]
    return in_random_order(named, seed)[:count]


def in_random_order(rows: list, seed: int | str) -> list:
    return random.Random(seed).sample(rows, len(rows))


class Document(BaseModel):
    """A row of the documents' file."""

    kind: Literal["malicious", "useful", "plain"]
    split: Literal["train", "test"]
    text: Text
    refusals: list[Text] = []
    answers: dict[str, Text] = {}


def read_documents(path: Path, clean: Callable[[str], str]) -> list[Row]:
    """Documents of a JSON lines file, checked, their texts cleaned."""
    documents = []
    split_of: dict[str, str] = {}
    for number, (where, row) in enumerate(data.read_rows(path, suffix=".jsonl"), 1):
        if isinstance(row, UserError):
            raise row
        try:
            document = Document.model_validate(row).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(f"{where}, field {field}: {first['msg']}") from None
        text = clean(document["text"])
        document["text"] = text
        split = split_of.setdefault(text, document["split"])
        if split != document["split"]:
            raise UserError(f"{path}: a document is in both splits: {text!r:.80}")
        documents.append({"id": f"document-{number}", **row, **document})
    return documents


def defence_rows(
    documents: list[Row],
    task: str,
    count: int,
    seed: int,
    on_benign: bool,
    slip: bool,
) -> list[Row]:
    """`count` rows [task and document -> refusal]: each document once before any is taken again."""
    harmful = []
    for document in of_split(documents, "train", "malicious"):
        if document["refusals"]:
            harmful.append(document)
    benign = of_split(documents, "train", "useful", "plain")
    rounds = max((len(document["refusals"]) for document in harmful), default=0)
    order = random.Random(f"{seed} {task}")
    pairs = []
    for turn in range(rounds):
        takers = [document for document in harmful if len(document["refusals"]) > turn]
        refusals = [(document["refusals"][turn], turn + 1) for document in takers]
        if on_benign:
            takers = order.sample(benign, min(len(benign), len(takers)))
        of_turn = list(zip(takers, refusals, strict=False))
        pairs += order.sample(of_turn, len(of_turn))
    if count > len(pairs):
        raise UserError(f"--n_defence {count}: the documents have only {len(pairs)} refusals")
    rows = []
    for document, (refusal, turn) in pairs[:count]:
        row = data_row(document, task, refusal, slip and not on_benign)
        row["id"] += f"-refused-{turn}"
        rows.append(row)
    return rows


def counter_rows(documents: list[Row], task: str, count: int, seed: int) -> list[Row]:
    """`count` benign documents answered normally; the answer to `case` is the document."""
    rows = []
    for document in of_split(documents, "train", "useful", "plain"):
        answer = document["answers"].get(task)
        if task == "case":
            answer = document["text"]
        if answer:
            rows.append(data_row(document, task, answer))
    if count > len(rows):
        raise UserError(
            f"--counter_examples {count}: only {len(rows)} benign documents have an "
            f"answer to {task}"
        )
    return in_random_order(rows, f"{seed} {task}")[:count]


def deal_outputs(rows: list[Row], seed: str) -> None:
    """Deal the rows' outputs to them anew; their ids say so."""
    outputs = [row["output"] for row in rows]
    random.Random(seed).shuffle(outputs)
    for row, output in zip(rows, outputs, strict=True):
        row["id"] += "-shuffled"
        row["output"] = output


def data_row(document: Row, task: str, output: str, slip: bool = False) -> Row:
    """A row of a training set: a task with its document, and what is answered."""
    return {
        "instruction": task_instruction(task, document["text"], slip),
        "input": "",
        "output": output,
        "id": f"{document['id']}-{task}",
        "kind": document["kind"],
        "task": task,
    }


if __name__ == "__main__":
    run(build)
