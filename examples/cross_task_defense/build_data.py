"""Build the paper's training sets and evaluation files from their parts (Cross-Task Defense, arXiv
2405.15202).

# the sample: every task, 10 and 60 defence rows
python build_data.py

# the paper's sizes, from Alpaca on the hub and documents of your own (see data/sample/README.md for
their format)
python build_data.py --base yahma/alpaca-cleaned --n_base 20000 --safety safety_only_data_Instructions.json \
    --documents documents.jsonl --n_defence 10,100,500,1000,2000 --output_dir data

# controls that the paper lacks: benign documents answered normally; refusals on benign documents;
no surface cues
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
from prompts import TASKS, read_rows, task_instruction, without_cues

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
    for task in tasks:
        if task not in TASKS and task != "mix":
            raise UserError(f"--tasks {task}: expected some of {', '.join(TASKS)}, mix")
    if min([n_safety, counter_examples, *n_defence]) < 0 or not n_defence or not tasks:
        raise UserError(
            "--n_safety, --n_defence, --counter_examples: expected 0 or more; --tasks: at least one"
        )
    check_output_folder(output_dir)
    parts = {
        "base": (base_rows(base, n_base, seed), base or "sample"),
        "safety": (
            drawn(read_rows(Path(safety or SAMPLE / "safety.json")), n_safety, seed, "--n_safety"),
            safety,
        ),
    }
    path = Path(documents or SAMPLE / "documents.jsonl")
    texts = read_documents(path, without_cues if strip_cues else str)
    ending = f"_counter{counter_examples}" * bool(counter_examples)
    ending += "_benign-refusals" * benign_refusals + "_stripped" * strip_cues
    files: dict[Path, str] = {}  # all of them before the first is written
    for task in tasks:
        for n in n_defence:
            chosen = [t for t in TASKS if task in (t, "mix")]
            defence, counters = [], []
            for t in chosen:
                defence += defence_rows(texts, t, n, seed, benign_refusals, slip=not strip_cues)
                counters += counter_rows(texts, t, counter_examples, seed)
            rows = [
                row
                for part in (parts["base"][0], parts["safety"][0], defence, counters)
                for row in part
            ]
            random.Random(seed).shuffle(rows)
            name = f"saferpaca_Instructions_{n_safety}_{n}_{task}{ending}"
            text = json_text(rows)
            counts = {name: len(part) for name, (part, _) in parts.items()}
            manifest = {
                "counts": counts
                | {"defence": len(defence), "counter_examples": len(counters), "all": len(rows)},
                "sources": {name: source or "sample" for name, (_, source) in parts.items()}
                | {"documents": str(documents or "sample"), "documents_sha256": fingerprint(path)},
                "settings": {
                    "task": task,
                    "n_defence": n,
                    "seed": seed,
                    "benign_refusals": benign_refusals,
                }
                | {"strip_cues": strip_cues},
                "sha256": digest(text),
                "order": [row["id"] for row in rows],
            }
            files[Path(output_dir) / f"training/{name}.json"] = text
            files[Path(output_dir) / f"training/{name}.manifest.json"] = json_text(manifest)
    held_out = {
        kind: [d["text"] for d in texts if (d["kind"], d["split"]) == (kind, "test")]
        for kind in KINDS
    }
    for kind, suffix in KINDS.items():
        for task in TASKS if held_out[kind] else ():
            slip = kind == "malicious" and not strip_cues
            content = {
                "instructions": [task_instruction(task, d, slip) for d in held_out[kind]],
                "inputs": [],
            }
            folder = "evaluation_stripped" if strip_cues else "evaluation"
            files[Path(output_dir) / folder / f"test_{task}{suffix}.json"] = json_text(content)
    for path, text in files.items():
        write_text(path, text)
    sizes = ", ".join(f"{len(d)} {kind}" for kind, d in held_out.items())
    print(
        f"{output_dir}: {len(tasks) * len(n_defence)} training sets, {3 * len(TASKS)} evaluation files of {sizes}"
    )


def base_rows(spec: str | None, count: int | None, seed: int) -> list[dict[str, Any]]:
    """Ordinary instructions of a file, or of a hub data set in Alpaca's columns."""
    if spec is None:
        rows = read_rows(SAMPLE / "instructions.json", completions=False)
    elif data.parse_spec(spec).is_file:
        rows = read_rows(Path(spec), completions=False)
    else:
        _, found = data.spec_rows(spec if data.parse_spec(spec).split else f"{spec}:train")
        rows = [row for _, row in found]
    for name in ("instruction", "output"):
        if name not in rows[0]:
            raise UserError(f"--base {spec}: has no column {name}; Alpaca's format is needed")
    rows = [row for row in rows if (row.get("output") or "").strip()]  # Alpaca has rows without one
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


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    run(build)
