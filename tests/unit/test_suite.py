"""The suite as a user runs it: a guard of every family on every benchmark, with tiny models behind
the zoo's names.
"""

import shutil
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import families
import pytest
import torch
from checks import read_json
from miniatures import ITEMS, MINIATURES, expected, write
from scripts import EXAMPLES, launch

from common.conversation import pair
from guards import load_guard, zoo
from guards.classifier import ClassifierGuard
from guards.generative import GenerativeGuard
from guards.suite import evaluate
from guards.suite.benchmarks import benchmark_names, benchmarks

FAMILIES = {
    "llama-guard-3-8b": "llama3",
    "wildguard": "mistral",
    "shieldgemma-2b": "gemma",
    "expguard": "qwen2",
    "qwen3guard-gen-8b": "qwen3",
    "granite-guardian-3.3-8b": "granite",
    "gpt-oss-safeguard-20b": "gpt-oss",
}
WRITES = {  # what these write, the verdict apart, from the last token of their prompts on
    "qwen3guard-gen-8b": "\nRefusal:<|im_end|>",
    "gpt-oss-safeguard-20b": "ant<|channel|>final<|message|><|return|>",
}
# four passes a text; a policy of a thousand tokens, and it writes
LONG = {"shieldgemma-2b", "gpt-oss-safeguard-20b"}
# what these two judge
FEW = ["expguardtest_prompt", "beavertails", "wildguardtest_refusal", "convabuse", "dices_350"]
SAMPLE = [pair(i.prompt, answer) for i in ITEMS for answer in (None, i.answer)]


def write_on(guard: GenerativeGuard, text: str) -> None:
    """What is written next hangs on the last token, far more than on the text: `text`, with any
    verdict in it.
    """
    embedding = guard.model.model.get_input_embeddings().weight.data
    embedding *= 60
    head = guard.model.model.get_output_embeddings().weight.data
    ids = guard.tokenizer(text, add_special_tokens=False)["input_ids"]
    pairs = list(pairwise(ids))
    for question in guard.questions:
        for word in question.words:
            first, *_ = guard.tokenizer(word, add_special_tokens=False)["input_ids"]
            pairs.append((first, ids[-1]))
    for before, after in pairs:
        head[after] += 6 * embedding[before] / embedding[before].norm()


def read_and_asked(guard: GenerativeGuard) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each question that is asked of SAMPLE: what the head reads on average, and 1 for each
    token that may answer.
    """
    head = guard.model.model.get_output_embeddings()
    next_token = guard.model.next_token
    means = []
    asked = []

    def look(prompts, candidates, bar):
        read = []
        hook = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        out = next_token(prompts, candidates, bar)
        hook.remove()
        means.append(read[-1].flatten(0, -2).mean(0))  # the one before is of the shared prefix
        asked.append(torch.zeros(len(head.weight)).index_fill(0, torch.tensor(candidates), 1))
        return out

    guard.model.next_token = look
    guard.judge(SAMPLE, wanted=["response_refusal"])
    guard.model.next_token = next_token
    return torch.stack(means), torch.stack(asked)


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
    guard.model.batch_size = 10**5  # one call a question
    lm = guard.model.model
    head = lm.get_output_embeddings()
    # of which verdicts differ
    generator = torch.Generator().manual_seed(8 if FAMILIES[name] == "gpt-oss" else 5)
    words = torch.randn(head.weight.shape, generator=generator)
    head.weight.data.zero_()
    if name in WRITES:
        write_on(guard, WRITES[name])
    base = head.weight.data
    for _ in guard.questions:  # the next one is asked only after an answer
        means, asked = read_and_asked(guard)
        inverse = torch.linalg.pinv(means, rtol=0.05)
        # Where it is asked, no word is likelier by itself, and all are likelier than others.
        differing = base + words * asked.any(0)[:, None]
        even = differing @ (torch.eye(len(inverse)) - inverse @ means)
        head.weight.data = even + (8 if name in WRITES else 2) * (inverse @ asked).T
    lm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def guards(shared_folder, tiny_classifier) -> dict[str, Path]:
    """Folders by names of the zoo."""

    def make(folder: Path) -> None:
        for name in FAMILIES:
            tiny(folder / name, name)
        tiny_classifier(folder / "beaver-dam-7b")

    folder = shared_folder("guards", make)
    return {name: folder / name for name in (*FAMILIES, "beaver-dam-7b")}


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
    argv = ["evaluate.py", "--guards"]
    argv += [f"{name}={folder}" for name, folder in guards.items()]
    argv += ["--benchmarks", *specs, "--output_dir", str(out), "--bootstrap_rounds", "0"]
    argv += [str(flag) for flag in flags]
    with pytest.MonkeyPatch.context() as patch:
        for kind in (GenerativeGuard, ClassifierGuard):

            def judge(self, conversations, wanted=(), judge=kind.judge):
                asked[self.name] += len(conversations)
                return judge(self, conversations, wanted)

            patch.setattr(kind, "judge", judge)
        patch.setattr(sys, "argv", argv)
        try:
            evaluate.main()
        except SystemExit as stopped:
            return stopped.code, asked
    return 0, asked


def cells_of(out: Path) -> dict[tuple[str, str], dict]:
    results = read_json(out / "results.json")
    return {(cell["guard"], cell["benchmark"]): cell for cell in results["cells"]}


@pytest.fixture(scope="module")
def suite(guards, files, shared_folder) -> Path:
    """Every guard on every benchmark, but two on a few, in a run of their own whose results join
    the table.
    """

    def make(folder: Path) -> None:
        first = folder / "first"
        out = folder / "out"
        two = {name: guards[name] for name in LONG}
        others = {name: guards[name] for name in guards if name not in LONG}
        code, _ = run(two, [files[name] for name in FEW], first)
        assert code == 0
        code, _ = run(others, files.values(), out, "--add_results", first / "results.json")
        assert code == 0
        assert not [cell for cell in cells_of(out).values() if cell["status"] == "failed"]

    return shared_folder("suite", make) / "out"


def judged_by(guard: str) -> set[str]:
    """The labels that a guard of the zoo gives."""
    questions = zoo()[guard].get("questions", [{"label": "response_unsafe"}])
    labels = {question["label"] for question in questions}
    return labels | {"prompt_unsafe", "response_unsafe"} if "last" in labels else labels


@pytest.mark.slow
def test_every_guard_on_every_benchmark(suite, guards):
    """Each cell is there: measured on the miniature's rows, or not supported where the guard does
    not judge that.
    """
    cells = cells_of(suite)
    recalls = {guard: [] for guard in guards}
    for guard in guards:
        for name in FEW if guard in LONG else MINIATURES:
            cell = cells.pop((guard, name))
            if benchmarks()[name]["label"] not in judged_by(guard):
                assert cell["status"] == "not supported", (guard, name)
                continue
            assert cell["status"] == "measured", (guard, name)
            assert cell["rows"] == len(expected(name))
            assert cell["positives"] == sum(expected(name))
            recalls[guard].append(cell["recall"] or 0.0)
    assert not cells
    for guard in FAMILIES:  # verdicts of both kinds: the scores say something
        assert any(0 < recall < 1 for recall in recalls[guard]), guard


@pytest.mark.slow
def test_a_second_run_asks_nothing(suite, guards, files, tmp_path):
    """What a model in this process says, errors among it, it would say again."""
    others = {name: folder for name, folder in guards.items() if name not in LONG}
    shutil.copytree(suite / "runs", tmp_path / "runs")
    code, asked = run(others, [files[name] for name in FEW], tmp_path)
    assert code == 0
    assert not asked
    assert cells_of(tmp_path).items() <= cells_of(suite).items()


# --- scripts/safety_eval.sh -------------------------------------------------------------------------------------------


SAFETY_EVAL = "scripts/safety_eval.sh"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "measured"),
    [
        ("prompt", ["expguardtest_prompt"]),
        ("response", ["wildguardtest_response"]),
        ("both", ["expguardtest_prompt", "wildguardtest_response"]),
    ],
)
def test_safety_eval(task, measured, guards, files, tmp_path):
    """Name, task, local model, then flags of evaluate.py."""
    names = ("expguardtest_prompt", "wildguardtest_response", "wildguardtest_refusal")
    flags = ["--benchmarks", *(files[name] for name in names), "--output_dir", tmp_path]
    flags += ["--bootstrap_rounds", 0]
    argv = [SAFETY_EVAL, "expguard", task, guards["expguard"], *flags]
    launch("expguard", *argv, launcher=("bash",), threads=1)
    cells = cells_of(tmp_path)
    assert sorted(cells) == [("expguard", name) for name in measured]
    assert {cell["status"] for cell in cells.values()} == {"measured"}


@pytest.mark.parametrize("words", [["answers"], ["prompt|response"], ["both sides"], [""], []])
def test_safety_eval_of_no_task(words):
    argv = [SAFETY_EVAL, "expguard", *words]
    done = launch("expguard", *argv, launcher=("bash",), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "prompt|response|both" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_safety_eval_of_no_folder():
    argv = [SAFETY_EVAL, "beaver-dam-7b", "both", "no/folder"]
    done = launch("expguard", *argv, launcher=("bash",), check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (EXAMPLES / "expguard" / SAFETY_EVAL).stat().st_mode & 0o100
