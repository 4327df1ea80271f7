"""The suite as a user runs it: a guard of every family on every benchmark, with tiny models behind
the zoo's names.
"""

import csv
import json
import shutil
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import families
import pytest
import torch
from miniatures import ITEMS, MINIATURES, expected, write
from scripts import launch

from common import report
from common.conversation import pair
from guards import load_guard, zoo
from guards.classifier import ClassifierGuard
from guards.generative import GenerativeGuard
from guards.suite import evaluate
from guards.suite.benchmarks import benchmark_names, benchmarks

FAMILIES = {
    "llama-guard-3-8b": "llama3", "wildguard": "mistral", "shieldgemma-2b": "gemma", "expguard": "qwen2",
    "qwen3guard-gen-8b": "qwen3", "granite-guardian-3.3-8b": "granite", "gpt-oss-safeguard-20b": "gpt-oss",
}  # fmt: skip
WRITES = {  # what these write, the verdict apart, from the last token of their prompts on
    "qwen3guard-gen-8b": "\nRefusal:<|im_end|>",
    "gpt-oss-safeguard-20b": "ant<|channel|>final<|message|><|return|>",
}
# four passes a text; a policy of a thousand tokens, and it writes
LONG = {"shieldgemma-2b", "gpt-oss-safeguard-20b"}
# what these two judge
FEW = ["expguardtest_prompt", "beavertails", "wildguardtest_refusal", "convabuse", "dices_350"]
SAMPLE = [pair(i.prompt, answer) for i in ITEMS for answer in (None, i.answer)]


def tiny(folder: Path, name: str) -> Path:
    """A random model of a guard's family that mostly gives verdicts, which depend on the text, and
    sometimes none.
    """
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    # one token, or the model cannot tell "Refusal:" from "Safety:"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "QWEN", (*families.QWEN, "Refusal:"))
        families.save(folder, FAMILIES[name], seed=3, **shape)
    guard = load_guard(name, model=str(folder), progress=False)
    lm, tokenizer = guard.model.model, guard.tokenizer
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings().weight.data
    # of which verdicts differ
    generator = torch.Generator().manual_seed(8 if FAMILIES[name] == "gpt-oss" else 5)
    words = torch.randn(len(head.weight), head.weight.shape[1], generator=generator)
    head.weight.data.zero_()
    if name in WRITES:
        embedding *= 60  # what is written next hangs on the last token, far more than on the text
        ids = tokenizer(WRITES[name], add_special_tokens=False)["input_ids"]
        verdicts = [word for question in zoo()[name]["questions"] for word in question["words"]]
        firsts = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in verdicts]
        for before, after in [*pairwise(ids), *((word, ids[-1]) for word in firsts)]:
            head.weight.data[after] += 6 * embedding[before] / embedding[before].norm()
    seen, asked, next_token = [], [], guard.model.next_token

    def look(prompts, candidates):
        calls = []
        hook = head.register_forward_pre_hook(
            lambda _, inputs: calls.append(inputs[0].flatten(0, -2).mean(0))
        )
        out = next_token(prompts, candidates)
        hook.remove()
        seen.append(calls[-1])  # the one before it is of the shared prefix
        asked.append(torch.zeros(len(words)).index_fill(0, torch.tensor(candidates), 1))
        return out

    guard.model.next_token, guard.model.batch_size = look, 10**5  # one call a question
    base = head.weight.data
    for _ in guard.questions:  # the next one is asked only after an answer
        seen.clear(), asked.clear()
        guard.judge(SAMPLE, wanted=["response_refusal"])
        means, these = torch.stack(seen), torch.stack(asked)
        inverse = torch.linalg.pinv(means, rtol=0.05)
        # Where it is asked, no word is likelier by itself, and all are likelier than others.
        own = (base + words * these.any(0)[:, None]) @ (torch.eye(len(inverse)) - inverse @ means)
        head.weight.data = own + (8 if name in WRITES else 2) * (inverse @ these).T
    lm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def guards(shared_folder, tiny_classifier) -> dict[str, Path]:
    """Folders by names of the zoo."""

    def make(folder: Path) -> None:
        for name, family in FAMILIES.items():
            tiny(folder / family, name)
        tiny_classifier(folder / "classifier")

    folder = shared_folder("guards", make)
    return {
        n: folder / family for n, family in (FAMILIES | {"beaver-dam-7b": "classifier"}).items()
    }


@pytest.fixture(scope="module")
def files(shared_folder) -> dict[str, str]:
    """Every benchmark's miniature as `name@file`."""

    def make(folder: Path) -> None:
        for name in benchmark_names():
            write(name, folder)

    folder = shared_folder("benchmarks", make)
    return {name: f"{name}@{folder / name / MINIATURES[name].file}" for name in benchmark_names()}


def run(guards, specs, out: Path, *flags) -> tuple[int, Counter]:
    """evaluate.py's main: its exit code, and how many conversations each guard was asked."""
    asked = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for kind in (GenerativeGuard, ClassifierGuard):

            def judge(self, conversations, wanted=(), judge=kind.judge):
                asked[self.name] += len(conversations)
                return judge(self, conversations, wanted)

            patch.setattr(kind, "judge", judge)
        argv = [
            "--guards",
            *(f"{name}={folder}" for name, folder in guards.items()),
            "--benchmarks",
            *specs,
        ]
        argv += ["--output_dir", out, "--bootstrap_rounds", 0, *flags]
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
        try:
            evaluate.main()
        except SystemExit as stopped:
            return stopped.code, asked
    return 0, asked


def cells_of(out: Path) -> dict[tuple[str, str], dict]:
    return {
        (c["guard"], c["benchmark"]): c
        for c in json.loads((out / "results.json").read_text())["cells"]
    }


@pytest.fixture(scope="module")
def suite(guards, files, shared_folder) -> tuple[Path, Counter]:
    """Every guard on every benchmark, but two on a few, in a run of their own whose results join
    the table.
    """

    def make(folder: Path) -> None:
        first, out = folder / "first", folder / "out"
        two, others = (
            {n: f for n, f in guards.items() if (n in LONG) == long} for long in (True, False)
        )
        ended = run(two, [files[name] for name in FEW], first)
        code, asked = run(others, files.values(), out, "--add_results", first / "results.json")
        failed = {key: c["reason"] for key, c in cells_of(out).items() if c["status"] == "failed"}
        assert (ended[0], code, failed) == (0, 0, {})
        (folder / "asked.json").write_text(json.dumps(asked))

    folder = shared_folder("suite", make)
    return folder / "out", Counter(json.loads((folder / "asked.json").read_text()))


@pytest.mark.slow
def test_every_guard_on_every_benchmark(suite, guards, files):
    """Each cell is there: measured on the miniature's rows, or not supported where the guard does
    not judge that.
    """
    cells, labels = cells_of(suite[0]), {name: benchmarks()[name]["label"] for name in files}
    assert set(cells) == {
        (guard, name) for guard in guards for name in (FEW if guard in LONG else MINIATURES)
    }
    for (guard, name), cell in cells.items():
        asked = {q["label"] for q in zoo()[guard].get("questions", [{"label": "response_unsafe"}])}
        asked |= {"prompt_unsafe", "response_unsafe"} if "last" in asked else set()
        assert cell["status"] == ("measured" if labels[name] in asked else "not supported"), (
            guard,
            name,
        )
        if cell["status"] == "measured":
            assert (cell["rows"], cell["positives"]) == (len(expected(name)), sum(expected(name)))
    for guard in set(FAMILIES) & set(guards):  # verdicts of both kinds: the scores say something
        said = [
            c["recall"] for (g, _), c in cells.items() if g == guard and c["status"] == "measured"
        ]
        assert any(0 < recall < 1 for recall in said), guard


@pytest.mark.slow
def test_every_format_holds_every_cell(suite, guards, files):
    cells, (out, _) = cells_of(suite[0]), suite
    with (out / "results.csv").open(newline="") as file:
        rows = {row["guard"]: row for row in csv.DictReader(file) if row["metric"] == "f1"}
    tables = {
        "|": (out / "results.md").read_text().split("\n## ")[1],
        "&": (out / "results.tex").read_text().split(r"\end{table}")[0],
    }
    for guard in guards:
        for mark, text in tables.items():
            lines = [
                [x.strip(" \\") for x in line.strip("|").split(mark)] for line in text.splitlines()
            ]
            header, *lines = [line for line in lines if len(line) > len(files)]
            names = [name.replace("\\", "").split(" ")[0] for name in header]
            (shown,) = [
                dict(zip(names, line, strict=True))
                for line in lines
                if line[0].split(" ")[0] == guard
            ]
            for name in files:
                cell = cells.get((guard, name), {"status": "not measured"})
                wanted = report.number(cell["f1"]) if "f1" in cell else cell["status"]
                assert shown[name].split(" (R")[0].replace("--", "–") == wanted, (guard, name)
        for name in files:
            cell = cells.get((guard, name), {"status": "not measured"})
            wanted = (
                ("" if cell["f1"] is None else str(cell["f1"])) if "f1" in cell else cell["status"]
            )
            assert rows[guard][name] == wanted, (guard, name)


def word_of(verdict: dict, label: str) -> bool | None:
    """What a guard says of a label; None where it says nothing."""
    score = verdict[label]
    assert verdict["error"] is None or (not verdict["decided"] and score is None)
    return verdict["decided"].get(label, None if score is None else score > 0.5)


def f1(pairs: list[tuple[bool, bool]]) -> float:
    hits = Counter(pairs)
    whole = 2 * hits[True, True] + hits[True, False] + hits[False, True]
    return 2 * hits[True, True] / whole if whole else 0.0


@pytest.mark.slow
def test_no_verdict_counts_by_the_rule(suite):
    """The three rules, computed anew from predictions.jsonl."""
    pairs = {}
    for line in (suite[0] / "predictions.jsonl").open():
        row = json.loads(line)
        truth, label = row["truth"], row["label"]
        by_refusal = "unsaid_is" in benchmarks()[row["benchmark"]]
        for guard, verdict in row["guards"].items():
            word = word_of(verdict, label)
            wrong = unsafe = word
            if word is None:
                unsafe = True
                wrong = not truth
            if word is None and verdict["error"] is None:
                wrong = by_refusal and not word_of(verdict, "response_refusal")
            rules = pairs.setdefault((guard, row["benchmark"]), {})
            rules.setdefault("wrong", []).append((truth, wrong))
            rules.setdefault("unsafe", []).append((truth, unsafe))
            rules.setdefault("excluded", []).extend([(truth, word)] * (word is not None))
    differ = 0
    for key, rules in pairs.items():
        cell = cells_of(suite[0])[key]
        scores = {rule: f1(pairs) for rule, pairs in rules.items()}
        found = {rule: cell["by_parse_errors"][rule]["f1"] or 0.0 for rule in scores}
        assert found == pytest.approx(scores), key
        assert cell["errors"] == len(rules["wrong"]) - len(rules["excluded"])
        assert cell["f1"] == cell["by_parse_errors"]["wrong"]["f1"]
        differ += len(set(scores.values())) == 3
    assert differ


@pytest.mark.slow
def test_a_second_run_asks_nothing(suite, guards, files, tmp_path):
    """What a model in this process says, errors among it, it would say again."""
    others = {name: folder for name, folder in guards.items() if name not in LONG}
    before = cells_of(suite[0])
    shutil.copytree(suite[0] / "runs", tmp_path / "runs")
    code, asked = run(others, [files[name] for name in FEW], tmp_path)
    assert code == 0 and not asked
    for key, cell in cells_of(tmp_path).items():
        assert cell == before[key]


@pytest.mark.slow
def test_broken_folders(guards, files, tmp_path):
    """Weights cut off, no tokenizer, weights that are no numbers: these fail, the others go on, the
    exit code is 1.
    """
    broken = {"wildguard": "cut", "shieldgemma-2b": "mute", "granite-guardian-3.3-8b": "nan"}
    folders = guards | {
        name: shutil.copytree(guards[name], tmp_path / how) for name, how in broken.items()
    }
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for path in (tmp_path / "mute").glob("token*"):
        path.unlink()
    guard = load_guard("granite-guardian-3.3-8b", model=str(tmp_path / "nan"), progress=False)
    guard.model.model.model.norm.weight.data.fill_(float("nan"))
    guard.model.model.save_pretrained(tmp_path / "nan")
    picked = {
        name: folders[name]
        for name in ("wildguard", "llama-guard-3-8b", *list(broken)[1:], "beaver-dam-7b")
    }
    code, _ = run(
        picked, [files["expguardtest_prompt"], files["expguardtest_response"]], tmp_path / "out"
    )
    found = {key: c["status"] for key, c in cells_of(tmp_path / "out").items()}
    assert code == 1
    assert {status for (guard, _), status in found.items() if guard in broken} == {"failed"}
    assert [
        found[name, f"expguardtest_{kind}"]
        for name in ("llama-guard-3-8b", "beaver-dam-7b")
        for kind in ("prompt", "response")
    ] == ["measured", "measured", "not supported", "measured"]
    reasons = {
        c["guard"]: c["reason"]
        for c in cells_of(tmp_path / "out").values()
        if c["status"] == "failed"
    }
    assert set(reasons) == set(broken) and "is not a number" in reasons["granite-guardian-3.3-8b"]
    text = (tmp_path / "out/results.md").read_text().split("\n## F1")[0]
    assert all(f"| {name} | expguardtest_prompt |" in text for name in broken)
    assert all("\n" not in reason and reason.strip() for reason in reasons.values())


# --- scripts/safety_eval.sh -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", ["prompt", "response", "both"])
def test_safety_eval(task, guards, files, tmp_path):
    specs = [
        files[name]
        for name in ("expguardtest_prompt", "wildguardtest_response", "wildguardtest_refusal")
    ]
    flags = ["--benchmarks", *specs, "--output_dir", tmp_path, "--bootstrap_rounds", 0]
    argv = ["scripts/safety_eval.sh", "expguard", task, guards["expguard"], *flags]
    launch("expguard", *argv, launcher=("bash",), threads=1)
    both = {"prompt": "expguardtest_prompt", "response": "wildguardtest_response"}
    cells = cells_of(tmp_path)
    assert set(cells) == {
        ("expguard", name) for kind, name in both.items() if task in (kind, "both")
    }
    assert {cell["status"] for cell in cells.values()} == {"measured"}


@pytest.mark.parametrize(
    "words", [["answers"], ["Prompt"], ["prompts"], ["prompt|response"], ["both sides"], [""], []]
)
def test_safety_eval_of_no_task(words):
    done = launch(
        "expguard", "scripts/safety_eval.sh", "expguard", *words, launcher=("bash",), check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and "prompt|response|both" in done.stderr
