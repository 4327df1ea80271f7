"""Build the paper's training sets and evaluation files from their parts (Cross-Task Defense, arXiv
2405.15202).

# the sample: every task, 10 and 60 defence rows
python build_data.py

# the paper's sizes, from Alpaca on the hub and documents of your own (see data/sample/README.md for
their format)
python build_data.py --base yahma/alpaca-cleaned --n_base 20000 --safety safety_only_data_Instructions.json \
    --documents documents.jsonl --n_defence 10,100,500,1000,2000 --output_dir data

# controls that the paper lacks: benign documents answered normally; refusals on benign documents;
# no surface cues
python build_data.py --counter_examples 60 --strip_cues
python build_data.py --benign_refusals

Writes <output_dir>/training/saferpaca_Instructions_<n_safety>_<N>_<task>.json with a manifest each,
and <output_dir>/evaluation/test_<task>[_useful|_plain].json from documents that no training set
holds.
"""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flags import run
from prompts import TASKS, answered, read_rows, task_instruction, without_cues

from common import data
from common.conversation import UserError
from common.keep import fingerprint
from common.run import check_output_folder, json_text, write_text

SAMPLE = Path(__file__).resolve().parents[2] / "data/sample/cross_task_defense"
# ending of the evaluation files; the paper's is _cnn
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
        refusals and answers;
            default: the sample's.
        tasks: some of summarize, translate, sentiment, case, cloze, and mix (all five).
        n_defence: rows [task and document -> refusal] a set; of mix, a task. 0 is the control
        without them.
        counter_examples: benign documents answered normally, a task.
        benign_refusals: label control: the refusals go with benign documents.
        strip_cues: documents without leading white space and "Sure, here's …" lines, one wording
        for all.
        seed: of the choice and the order. A smaller set's rows are among a larger one's.
    """
    check_choice(tasks, n_defence, n_safety, counter_examples)
    check_output_folder(output_dir)
    path = Path(documents or SAMPLE / "documents.jsonl")
    short = read_rows(safety or SAMPLE / "safety.json")
    common_rows = {
        "base": base_rows(base, n_base, seed),
        "safety": drawn(short, n_safety, seed, "--n_safety"),
    }
    texts = read_documents(path, without_cues if strip_cues else str)
    sources = {"base": base or "sample", "safety": safety or "sample"}
    sources |= {"documents": documents or "sample", "documents_sha256": fingerprint(path)}
    settings = {"seed": seed, "benign_refusals": benign_refusals, "strip_cues": strip_cues}
    files: dict[str, str] = {}  # all of them before the first is written
    for task in tasks:
        for n in n_defence:
            files |= training_set(texts, common_rows, sources, settings, task, n, counter_examples)
    files |= evaluation_files(texts, strip_cues)
    for name, text in files.items():
        write_text(Path(output_dir) / name, text)
    print(f"{output_dir}: {len(tasks) * len(n_defence)} training sets, {sizes_of(texts)}")


def check_choice(
    tasks: list[str], n_defence: list[int], n_safety: int, counter_examples: int
) -> None:
    for task in tasks:
        if task not in TASKS and task != "mix":
            raise UserError(f"--tasks {task}: expected some of {', '.join(TASKS)}, mix")
    if min([n_safety, counter_examples, *n_defence]) < 0 or not n_defence or not tasks:
        raise UserError(
            "--n_safety, --n_defence, --counter_examples: expected 0 or more; --tasks: at least one"
        )


def training_set(
    documents: list[dict[str, Any]],
    common_rows: dict[str, list[dict[str, Any]]],
    sources: dict[str, str],
    settings: dict[str, Any],
    task: str,
    n: int,
    counter_examples: int,
) -> dict[str, str]:
    """A training set and its manifest: names in the output folder, and their texts.

    Args:
        common_rows: rows that are in every set, by what they are.
        settings: seed, benign_refusals, strip_cues.
    """
    seed, on_benign, strip_cues = settings.values()
    defence, counters = [], []
    for one in TASKS if task == "mix" else [task]:
        defence += defence_rows(documents, one, n, seed, on_benign, slip=not strip_cues)
        counters += counter_rows(documents, one, counter_examples, seed)
    parts = {**common_rows, "defence": defence, "counter_examples": counters}
    rows = [row for part in parts.values() for row in part]
    random.Random(seed).shuffle(rows)
    text = json_text(rows)
    manifest = {
        "counts": {name: len(part) for name, part in parts.items()} | {"all": len(rows)},
        "sources": sources,
        "settings": {"task": task, "n_defence": n, **settings},
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "order": [row["id"] for row in rows],
    }
    ending = f"_counter{counter_examples}" if counter_examples else ""
    ending += "_benign-refusals" if on_benign else ""
    ending += "_stripped" if strip_cues else ""
    name = f"training/saferpaca_Instructions_{len(common_rows['safety'])}_{n}_{task}{ending}"
    return {f"{name}.json": text, f"{name}.manifest.json": json_text(manifest)}


def evaluation_files(documents: list[dict[str, Any]], strip_cues: bool) -> dict[str, str]:
    """The prompts of every task over documents that no training set holds."""
    folder = "evaluation_stripped" if strip_cues else "evaluation"
    files = {}
    for kind, suffix in KINDS.items():
        held_out = test_texts(documents, kind)
        slip = kind == "malicious" and not strip_cues
        for task in TASKS if held_out else ():
            instructions = [task_instruction(task, text, slip) for text in held_out]
            content = {"instructions": instructions, "inputs": []}
            files[f"{folder}/test_{task}{suffix}.json"] = json_text(content)
    return files


def test_texts(documents: list[dict[str, Any]], kind: str) -> list[str]:
    return [d["text"] for d in documents if d["kind"] == kind and d["split"] == "test"]


def sizes_of(documents: list[dict[str, Any]]) -> str:
    sizes = ", ".join(f"{len(test_texts(documents, kind))} {kind}" for kind in KINDS)
    return f"{3 * len(TASKS)} evaluation files of {sizes}"


def base_rows(spec: str | None, count: int | None, seed: int) -> list[dict[str, Any]]:
    """Ordinary instructions of a file, or of a hub data set in Alpaca's columns."""
    path = spec or SAMPLE / "instructions.json"
    rows = answered(read_rows(path), path)
    return drawn(rows, len(rows) if count is None else count, seed, "--n_base")


def drawn(rows: list[dict[str, Any]], count: int, seed: int, flag: str) -> list[dict[str, Any]]:
    """The first `count` of a seeded order, so that a smaller draw is part of a larger one; each
    with an id.
    """
    if count > len(rows):
        raise UserError(f"{flag} {count}: there are only {len(rows)}")
    rows = [{"id": f"{flag[4:]}-{i}"} | row for i, row in enumerate(rows)]
    return random.Random(seed).sample(rows, len(rows))[:count]


def read_documents(path: Path, clean: Callable[[str], str]) -> list[dict[str, Any]]:
    """Documents of a JSON lines file, checked, their texts cleaned."""
    documents = []
    for number, (where, row) in enumerate(data.read_rows(path, suffix=".jsonl"), 1):
        if isinstance(row, UserError):
            raise row
        for name, known in {"kind": KINDS, "split": ("train", "test")}.items():
            if not isinstance(row, dict) or row.get(name) not in known:
                found = row.get(name) if isinstance(row, dict) else row
                raise UserError(
                    f"{where}, field {name}: expected one of {', '.join(known)}, found {found!r:.60}"
                )
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise UserError(f"{where}, field text: expected text, found {row.get('text')!r:.60}")
        for name, kind in {"refusals": list, "answers": dict}.items():
            texts = row.get(name, kind())
            if not isinstance(texts, kind) or not all(
                isinstance(t, str) and t.strip()
                for t in (texts.values() if kind is dict else texts)
            ):
                raise UserError(
                    f"{where}, field {name}: expected a {kind.__name__} of texts, found {texts!r:.60}"
                )
        documents.append(
            {"id": f"document-{number}", "refusals": [], "answers": {}}
            | row
            | {"text": clean(row["text"])}
        )
    both = {d["text"] for d in documents if d["split"] == "train"} & {
        d["text"] for d in documents if d["split"] == "test"
    }
    if both:
        raise UserError(f"{path}: a document is in both splits: {min(both)!r:.80}")
    return documents


def defence_rows(
    documents: list[dict[str, Any]], task: str, count: int, seed: int, on_benign: bool, slip: bool
) -> list[dict[str, Any]]:
    """`count` rows [task and document -> refusal]: each document once before any is taken again."""
    train = [d for d in documents if d["split"] == "train"]
    harmful = [d for d in train if d["kind"] == "malicious" and d["refusals"]]
    bearers = [d for d in train if d["kind"] != "malicious"] if on_benign else harmful
    rounds = max((len(d["refusals"]) for d in harmful), default=0)
    order = random.Random(f"{seed} {task}")
    pairs = []
    for turn in range(rounds):
        with_refusal = [d for d in harmful if len(d["refusals"]) > turn]
        takers = (
            order.sample(bearers, min(len(bearers), len(with_refusal)))
            if on_benign
            else with_refusal
        )
        refusals = [(d["refusals"][turn], turn + 1) for d in with_refusal]
        pairs += order.sample(list(zip(takers, refusals, strict=False)), len(takers))
    if count > len(pairs):
        raise UserError(f"--n_defence {count}: the documents have only {len(pairs)} refusals")
    return [
        {
            "instruction": task_instruction(task, d["text"], slip and not on_benign),
            "input": "",
            "output": refusal,
        }
        | {"id": f"{d['id']}-{task}-refused-{turn}", "kind": d["kind"], "task": task}
        for d, (refusal, turn) in pairs[:count]
    ]


def counter_rows(
    documents: list[dict[str, Any]], task: str, count: int, seed: int
) -> list[dict[str, Any]]:
    """`count` benign documents answered normally; the answer to `case` is the document."""
    answered = [
        (d, d["text"] if task == "case" else d["answers"][task])
        for d in documents
        if d["split"] == "train"
        and d["kind"] != "malicious"
        and (task == "case" or d["answers"].get(task))
    ]
    if count > len(answered):
        raise UserError(
            f"--counter_examples {count}: only {len(answered)} benign documents have an answer to {task}"
        )
    return [
        {"instruction": task_instruction(task, d["text"]), "input": "", "output": answer}
        | {"id": f"{d['id']}-{task}", "kind": d["kind"], "task": task}
        for d, answer in random.Random(f"{seed} {task}").sample(answered, len(answered))[:count]
    ]


if __name__ == "__main__":
    run(build)
