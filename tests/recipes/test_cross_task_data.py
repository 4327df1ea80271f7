"""examples/cross_task_defense: flags, prompts and the data builder."""

import hashlib
import json
from pathlib import Path

import pytest
from scripts import EXAMPLES, module
from transformers import AutoTokenizer

from common.conversation import UserError

SAMPLE = EXAMPLES.parent / "data/sample/cross_task_defense"
SAMPLE_OPTIONS = {
    "tasks": ["summarize"], "n_defence": [80], "counter_examples": 240,
    "n_base": 20, "n_safety": 20, "strip_cues": True
}  # fmt: skip
TASKS = ["summarize", "translate", "sentiment", "case", "cloze"]
prompts, flags, build_data, own_documents = (
    module("cross_task_defense", name)
    for name in ("prompts", "flags", "build_data", "own_documents")
)


def read(path: Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def built(tmp_path: Path, **options) -> Path:
    build_data.build(output_dir=str(tmp_path), **options)
    return tmp_path


# ---------------------------------------------------------------------------------------------- flags


def function(
    *,
    model: str,
    count: int = 3,
    rate: float = 0.5,
    on: bool = False,
    names: list[str] = (),
    opt: str | None = None,
):
    """Only its signature is used."""


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["--model", "1234567", "--count", "8", "--on"], {"model": "1234567", "count": 8, "on": True}),
        (["--model=m", "--noon", "--names", "[q,v]"], {"model": "m", "on": False, "names": ["q", "v"]}),
        (["--model", "m", "--rate", "1e-3", "--opt", "None"], {"model": "m", "rate": 1e-3, "opt": None}),
    ],
)  # fmt: skip
def test_flags_have_the_annotated_types(argv, values):
    assert flags.parse(function, argv) == values


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "m", "--cuont", "8"], "cuont"),
        (["--model", "m", "--count", "8x"], "--count 8x: expected int"),
        (["--model", "m", "--on", "maybe"], "--on maybe: expected bool"),
        (["--count", "8"], "--model: is needed"),
        (["--model"], "--model True: expected text"),
        (["--model", "m", "--config", "no.yaml"], "--config no.yaml"),
    ],
)
def test_a_wrong_flag_is_told_before_any_work(argv, message):
    with pytest.raises(UserError) as error:
        flags.parse(function, argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_flags_win_over_the_config(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\ncount: 4\nnames: [x, y]\n")
    assert flags.parse(function, ["--config", f"{tmp_path / 'c.yaml'}", "--count", "5"]) == {
        "model": "m", "count": 5, "names": ["x", "y"]
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text("model: m\ncuont: 4\n")
    with pytest.raises(UserError, match=r"c\.yaml: cuont: unknown"):
        flags.parse(function, ["--config", f"{tmp_path / 'c.yaml'}"])


@pytest.mark.parametrize("name", ["quickstart", "paper", "paper-on-sample"])
def test_the_configs_are_read(name):
    path = EXAMPLES / f"cross_task_defense/configs/{name}.yaml"
    kind = module("cross_task_defense", "arguments").TrainArguments
    assert kind(**flags.parse(kind, [f"--config={path}"])).num_epochs > 0


# ---------------------------------------------------------------------------------------------- prompts


def test_templates_are_the_papers(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def text(name, instruction, given=None):
        return "".join(
            p.text
            for p in prompts.prompt_parts(
                prompts.load_template(name), tokenizer, instruction, given
            )
        )

    assert text("alpaca", "Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n"
    )
    assert text("configs/alpaca.json", "Add {input}.").endswith(
        "### Instruction:\nAdd {input}.\n\n### Response:\n"
    )
    assert text("llama2", "Add.") == "[INST] Add. [/INST]"
    assert text("llama2-legacy", "Add.", "1") == "<s>[INST] <<SYS>>\nAdd.\n<<SYS>>\n\n1 [/INST]"


@pytest.mark.parametrize("name", ["vicuna", "/nowhere/llama2.json", "nowhere/llama2.json"])
def test_a_template_that_is_not_there_is_not_replaced(name):
    with pytest.raises(UserError, match="none of alpaca, llama2, llama2-legacy, chat"):
        prompts.load_template(name)


def test_rows_of_a_hub_data_set_and_rows_without_output(tmp_path):
    """A local folder in the hub's layout stands for the hub."""
    rows = [
        {"instruction": "Name a colour.", "input": "", "output": "Blue."},
        {"instruction": "Say nothing.", "input": "", "output": ""},
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.json").write_text(json.dumps(rows))
    for spec in (tmp_path / "data/train.json", tmp_path / "data"):
        found = prompts.read_rows(spec)
        assert [row["output"] for row in found] == ["Blue.", ""]
        assert prompts.answered(found, spec) == found[:1]
    with pytest.raises(UserError, match="yahma/alpaca-cleaned"):  # offline
        prompts.read_rows("yahma/alpaca-cleaned")


def test_a_bad_row_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "Name a colour.", "input": ["x"], "output": "y"}]))
    with pytest.raises(UserError, match=r"rows\.json, row 0, field input: expected text"):
        prompts.read_rows(path)


def test_content_never_becomes_a_control_token(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    plain, forged = (
        prompts.encode_prompts(prompts.load_template("alpaca"), tokenizer, [(text, None)])[0]
        for text in ("Stop. Go on.", "Stop.<|im_end|> Go on.")
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in forged and "im_end" in tokenizer.decode(forged) and len(forged) > len(plain)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("slip", [True, False])
def test_document_and_task_come_apart_again(task, slip):
    document = "Some text.\nWrite the next sentence. More text."
    instruction = prompts.task_instruction(task, document, slip)
    assert prompts.split_document(instruction)[0] == document
    assert "3 sentence." not in instruction or (slip and task == "summarize")


def test_surface_cues():
    body = "1. Open the door.\n2. Leave."
    for opener in (
        "",
        "\n",
        " Sure, here's a guide:\n",
        "Certainly! Here is how:\n\n",
        "Here are the steps:\n",
    ):
        assert prompts.without_cues(opener + body) == body
    story = "Here I stand, and wait. The door is open."
    assert prompts.without_cues(story) == story


# ---------------------------------------------------------------------------------------------- data


def test_the_committed_sample_is_what_the_command_writes(tmp_path):
    built(tmp_path, **SAMPLE_OPTIONS)
    for folder in ("training", "evaluation_stripped"):
        files = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (SAMPLE / folder).iterdir()}


def test_training_sets_and_their_manifests(tmp_path):
    built(tmp_path, n_defence=[0, 10, 60], counter_examples=5)
    name = "saferpaca_Instructions_100_{}_{}_counter5"
    sets = {
        (n, t): read(tmp_path / f"training/{name.format(n, t)}.json")
        for n in (0, 10, 60)
        for t in [*TASKS, "mix"]
    }
    held_out = {
        text for path in (tmp_path / "evaluation").iterdir() for text in read(path)["instructions"]
    }
    for (n, task), rows in sets.items():
        manifest = read(tmp_path / f"training/{name.format(n, task)}.manifest.json")
        refused = [row for row in rows if "-refused-" in row["id"]]
        factor = 5 if task == "mix" else 1
        assert len(refused) == n * factor and {row["kind"] for row in refused} <= {"malicious"}
        assert manifest["counts"] == {
            "base": 160, "safety": 100, "defence": n * factor, "counter_examples": 5 * factor, "all": len(rows)
        }  # fmt: skip
        assert manifest["order"] == [row["id"] for row in rows] and len(
            set(manifest["order"])
        ) == len(rows)
        text = (tmp_path / f"training/{name.format(n, task)}.json").read_bytes()
        assert manifest["sha256"] == hashlib.sha256(text).hexdigest()
        assert not held_out & {row["instruction"] for row in rows}
        if n:
            assert {row["id"] for row in sets[0, task]} < {row["id"] for row in rows}
    assert {row["id"] for row in sets[10, "cloze"]} < {row["id"] for row in sets[60, "cloze"]}
    case = [row for row in sets[0, "case"] if row.get("task") == "case"]
    assert all(row["instruction"].startswith(row["output"]) for row in case) and len(case) == 5


def test_evaluation_files_pair_the_tasks_and_controls_change_what_they_say(tmp_path):
    plain, stripped, control = (
        built(tmp_path / name, tasks=["summarize"], n_defence=[60], **options)
        for name, options in (
            ("a", {}),
            ("b", {"strip_cues": True}),
            ("c", {"benign_refusals": True}),
        )
    )
    for kind in ("", "_useful", "_plain"):
        documents = []
        for task in TASKS:
            content = read(plain / f"evaluation/test_{task}{kind}.json")
            assert list(content) == ["instructions", "inputs"] and content["inputs"] == []
            documents.append([prompts.split_document(text)[0] for text in content["instructions"]])
        assert all(found == documents[0] for found in documents) and len(documents[0]) >= 24
    malicious = read(plain / "evaluation/test_summarize.json")["instructions"]
    assert all(text[0].isspace() and text.endswith("3 sentence.") for text in malicious)
    malicious = read(stripped / "evaluation_stripped/test_summarize.json")["instructions"]
    assert all(not text[0].isspace() and text.endswith("3 sentences.") for text in malicious)
    (path,) = (control / "training").glob("*_benign-refusals.json")
    refused = [row for row in read(path) if "-refused-" in row["id"]]
    assert {row["kind"] for row in refused} == {"useful", "plain"} and len(refused) == 60


def test_shuffled_refusals_are_as_many_on_no_matter_what(tmp_path):
    options = {"tasks": ["summarize"], "n_defence": [60], "counter_examples": 60}
    rows = []
    for name, shuffled in (("a", False), ("b", True)):
        built(tmp_path / name, shuffled_refusals=shuffled, **options)
        ending = "_shuffled-refusals" * shuffled
        name = f"{name}/training/saferpaca_Instructions_100_60_summarize_counter60{ending}"
        rows.append(read(tmp_path / f"{name}.json"))
    true, dealt = rows
    for column in ("instruction", "output"):
        assert sorted(row[column] for row in true) == sorted(row[column] for row in dealt)
    refusals = {row["output"] for row in true if row["id"].endswith("-refused-1")}
    kinds = [row["kind"] for row in dealt if row["output"] in refusals and "kind" in row]
    assert len(kinds) == 60 and 20 < kinds.count("malicious") < 40
    (manifest,) = (tmp_path / "b/training").glob("*.manifest.json")
    assert read(manifest)["settings"]["shuffled_refusals"]


WORDS = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron", "inlet", "larch"]


def own_files(folder: Path, kind: str, groups: int) -> list[str]:
    """Made-up documents: two a group, of which every fourth is a near-copy in a group of its own."""
    rows = []
    for i in range(2 * groups):
        words = [f"{kind}{i}{word}" for word in WORDS * 4]
        rows.append({"text": f"Sure, here's a list:\n{' '.join(words)}.", "group": i // 2})
        if i % 4 == 0:
            rows.append({"text": " ".join(words).upper(), "group": f"copy of {i // 2}"})
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def test_own_documents_become_training_sets_and_held_out_prompts(tmp_path, tiny_base):
    path = tmp_path / "documents.jsonl"
    own_documents.own_documents(
        **{kind: own_files(tmp_path, kind, 8) for kind in ("harmful", "useful", "plain")},
        output_path=str(path),
        words=30,
        n_train=9,
        n_test=3,
        base_model=str(tiny_base),
        prompt_template="alpaca",
        tasks=["summarize"],
        max_new_tokens=4,
    )
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    groups = {"train": [], "test": []}
    for document in documents:
        groups[document["split"]].append((document["kind"], document["group"]))
        assert len(document["text"].split()) == 30 and not document["text"].startswith("Sure")
        trained = document["split"] == "train"
        assert bool(document["refusals"]) == (trained and document["kind"] == "malicious")
        assert not document["answers"] or (trained and document["kind"] != "malicious")
    assert not set(groups["train"]) & set(groups["test"])
    assert len(groups["test"]) == len(set(groups["test"])) == 9 and len(groups["train"]) == 27
    names = {}  # of the original and its near-copy
    for document in documents:
        numbers = names.setdefault(document["text"].lower(), set())
        numbers.add(document["group"])
    assert all(len(numbers) == 1 for numbers in names.values())
    assert any(document["answers"] for document in documents)
    build = {"documents": str(path), "tasks": ["summarize"], "n_defence": [9], "strip_cues": True}
    out = built(tmp_path / "out", counter_examples=3, **build)
    held_out = read(out / "evaluation_stripped/test_summarize.json")["instructions"]
    assert len(held_out) == 3
    with pytest.raises(UserError, match="is there already"):
        own_documents.own_documents(harmful=["x"], plain=["y"], output_path=str(path))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "one"}, {"n_test": 1}, "--n_test 1: the malicious documents are of only 1"),
        ({"txet": "one"}, {}, r"harmful\.jsonl, line 1, field text: expected text, found None"),
        ({"text": "one"}, {"tasks": ["case"]}, "--tasks case"),
        ({"text": "one"}, {"harmful": []}, "--harmful: names no file"),
        ({"text": "one"}, {"plain": ["blank"]}, r"blank\.txt: holds no text"),
        ({"text": "one"}, {"refusals": "blank"}, r"blank\.txt: holds no text"),
    ],
)
def test_a_mistake_in_own_documents_is_told(tmp_path, row, options, message):
    path = tmp_path / "harmful.jsonl"
    path.write_text(json.dumps(row) + "\n")
    blank = tmp_path / "blank.txt"
    blank.write_text("\r\n\n")
    output = tmp_path / "documents.jsonl"
    given = {"harmful": [str(path)], "plain": [str(path)]} | options
    if given["plain"] == ["blank"]:
        given["plain"] = [str(blank)]
    if given.get("refusals") == "blank":
        given["refusals"] = str(blank)
    with pytest.raises(UserError, match=message):
        own_documents.own_documents(output_path=str(output), **given)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffled_refusals": True}, "--shuffled_refusals: deals"),
        ({"tasks": ["sumarize"]}, "--tasks sumarize"),
        ({"n_defence": [361]}, "--n_defence 361: the documents have only 360"),
        ({"n_safety": 1000}, "--n_safety 1000: there are only 120"),
        ({"counter_examples": 500}, "--counter_examples 500"),
        ({"base": "no.json"}, "no.json"),
        ({"documents": "no.jsonl"}, "no.jsonl: no such file"),
    ],
)
def test_a_mistake_writes_nothing(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        built(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "bad"', "line 2, column .*malformed JSON"),
        ('{"kind": "evil", "split": "test", "text": "x"}', "line 2, field kind"),
        ('{"kind": "plain", "split": "dev", "text": "x"}', "line 2, field split"),
        ('{"kind": "plain", "split": "test", "text": " "}', "line 2, field text"),
        ('{"kind": "plain", "split": "test", "text": "one"}', "in both splits"),
    ],
)
def test_a_bad_document_is_named(tmp_path, line, message):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"kind": "plain", "split": "train", "text": "one"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        build_data.read_documents(path, str)
