"""examples/cross_task_defense: flags, prompts, the data builder and documents of one's own."""

import hashlib
import json
from pathlib import Path

import pytest
from checks import cases, read_json, read_rows, user_error, write_rows
from scripts import EXAMPLES, module
from transformers import AutoTokenizer

RECIPE = EXAMPLES / "cross_task_defense"
SAMPLE = EXAMPLES.parent / "data/sample/cross_task_defense"
TASKS = ["summarize", "translate", "sentiment", "case", "cloze"]
prompts = module("cross_task_defense", "prompts")
flags = module("cross_task_defense", "flags")
build_data = module("cross_task_defense", "build_data")
own_documents = module("cross_task_defense", "own_documents")


def built(folder: Path, **options) -> Path:
    build_data.build(output_dir=str(folder), **options)
    return folder


# --- flags ----------------------------------------------------------------------------------------


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


@cases(
    "line, values",
    {
        "digits of a text stay text": ("--model 1234567", {"model": "1234567"}),
        "numbers": ("--model m --count 8 --rate 1e-3", {"model": "m", "count": 8, "rate": 1e-3}),
        "a bare flag is true": ("--model=m --on", {"model": "m", "on": True}),
        "no before a flag is false": ("--model=m --noon", {"model": "m", "on": False}),
        "a list in brackets": ("--model m --names [q,v]", {"model": "m", "names": ["q", "v"]}),
        "none": ("--model m --opt None", {"model": "m", "opt": None}),
    },
)
def test_flags_have_the_annotated_types(line, values):
    assert flags.parse(function, line.split()) == values


@cases(
    "line, message",
    {
        "misspelt": ("--model m --cuont 8", "cuont"),
        "no int": ("--model m --count 8x", "--count 8x: expected int"),
        "no bool": ("--model m --on maybe", "--on maybe: expected bool"),
        "required is absent": ("--count 8", "--model: is needed"),
        "text without value": ("--model", "--model True: expected text"),
        "no such config": ("--model m --config no.yaml", "--config no.yaml"),
    },
)
def test_a_wrong_flag_is_told_before_any_work(line, message):
    with user_error(message):
        flags.parse(function, line.split())


def test_flags_win_over_the_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ncount: 4\nnames: [x, y]\n")
    values = flags.parse(function, [f"--config={path}", "--count", "5"])
    assert values == {"model": "m", "count": 5, "names": ["x", "y"]}
    path.write_text("model: m\ncuont: 4\n")
    with user_error(r"c\.yaml: cuont: unknown"):
        flags.parse(function, [f"--config={path}"])


@pytest.mark.parametrize("name", ["quickstart", "paper", "paper-on-sample"])
def test_the_configs_are_read(name):
    kind = module("cross_task_defense", "arguments").TrainArguments
    path = RECIPE / f"configs/{name}.yaml"
    values = flags.parse(kind, [f"--config={path}"])
    assert kind(**values).num_epochs > 0


# --- prompts --------------------------------------------------------------------------------------

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nAdd {input}.\n\n### Response:\n"
)


@cases(
    "template, instruction, given, text",
    {
        "alpaca with input": ("alpaca", "Add.", "1 2", ALPACA),
        "braces of an instruction are text": (
            "configs/alpaca.json",
            "Add {input}.",
            None,
            WITHOUT_INPUT,
        ),
        "llama2": ("llama2", "Add.", None, "[INST] Add. [/INST]"),
        "llama2 with the papers faults": (
            "llama2-legacy",
            "Add.",
            "1",
            "<s>[INST] <<SYS>>\nAdd.\n<<SYS>>\n\n1 [/INST]",
        ),
    },
)
def test_templates_are_the_papers(tiny_base, template, instruction, given, text):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    loaded = prompts.load_template(template)
    parts = prompts.prompt_parts(loaded, tokenizer, instruction, given)
    assert "".join(part.text for part in parts) == text


@pytest.mark.parametrize("name", ["vicuna", "/nowhere/llama2.json", "nowhere/llama2.json"])
def test_a_template_that_is_not_there_is_not_replaced(name):
    with user_error("none of alpaca, llama2, llama2-legacy, chat"):
        prompts.load_template(name)


@cases(
    "content",
    {
        "one is missing": {"prompt_input": "{instruction} {input}"},
        "the input has no place": {
            "prompt_input": "{instruction}",
            "prompt_no_input": "{instruction}",
        },
    },
)
def test_a_template_without_its_fields_is_named(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with user_error(r"mine\.json: .*prompt_input"):
        prompts.load_template(str(path))


@pytest.mark.parametrize("place", ["data/train.json", "data"])
def test_rows_of_a_file_and_of_the_hubs_layout(tmp_path, place):
    """Those without an output are read, and left out where an answer is needed."""
    rows = [
        {"instruction": "Name a colour.", "input": "", "output": "Blue."},
        {"instruction": "Say nothing.", "input": "", "output": ""},
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.json").write_text(json.dumps(rows))
    found = prompts.read_rows(tmp_path / place)
    assert [row["output"] for row in found] == ["Blue.", ""]
    assert prompts.answered(found, place) == found[:1]


def test_a_bad_row_is_named(tmp_path):
    path = tmp_path / "rows.json"
    row = {"instruction": "Name a colour.", "input": ["x"], "output": "y"}
    path.write_text(json.dumps([row]))
    with user_error(r"rows\.json, row 0, field input: expected text"):
        prompts.read_rows(path)


def test_content_never_becomes_a_control_token(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    template = prompts.load_template("alpaca")
    rows = [("Stop.<|im_end|> Go on.", None)]
    (ids,) = prompts.encode_prompts(template, tokenizer, rows)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    assert "im_end" in tokenizer.decode(ids)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("slip", [True, False])
def test_document_and_task_come_apart_again(task, slip):
    document = "Some text.\nWrite the next sentence. More text."
    instruction = prompts.task_instruction(task, document, slip)
    assert prompts.split_document(instruction)[0] == document
    has_slip = "3 sentence." in instruction
    assert has_slip == (slip and task == "summarize")


@pytest.mark.parametrize(
    "opener",
    [
        "",
        "\n",
        " Sure, here's a guide:\n",
        "Certainly! Here is how:\n\n",
        "Here are the steps:\n",
    ],
)
def test_openers_are_left_out(opener):
    """And a story that begins like one is whole."""
    for body in ("1. Open the door.\n2. Leave.", "Here I stand, and wait. The door is open."):
        assert prompts.without_cues(opener + body) == body


# --- training sets and evaluation files -----------------------------------------------------------


def test_the_committed_sample_is_what_the_command_writes(tmp_path):
    built(
        tmp_path,
        tasks=["summarize"],
        n_defence=[80],
        counter_examples=240,
        n_base=20,
        n_safety=20,
        strip_cues=True,
    )
    for folder in ("training", "evaluation_stripped"):
        committed = list((SAMPLE / folder).iterdir())
        assert len(committed) == len(list((tmp_path / folder).iterdir()))
        for path in committed:
            made = tmp_path / folder / path.name
            assert made.read_bytes() == path.read_bytes(), path.name


SIZES = (0, 10, 60)
COUNTERS = 5


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Training sets of every task and size, and the evaluation files."""
    folder = tmp_path_factory.mktemp("sets")
    return built(folder, n_defence=list(SIZES), counter_examples=COUNTERS)


def path_of(sets: Path, n: int, task: str) -> Path:
    return sets / f"training/saferpaca_Instructions_100_{n}_{task}_counter{COUNTERS}.json"


def ids_of(sets: Path, n: int, task: str) -> set[str]:
    return {row["id"] for row in read_json(path_of(sets, n, task))}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("task", [*TASKS, "mix"])
def test_a_training_set_and_its_manifest(sets, n, task):
    path = path_of(sets, n, task)
    rows = read_json(path)
    manifest = read_json(path.with_suffix(".manifest.json"))
    refused = [row for row in rows if "-refused-" in row["id"]]
    tasks = 5 if task == "mix" else 1
    assert len(refused) == n * tasks
    assert all(row["kind"] == "malicious" for row in refused)
    assert manifest["counts"] == {
        "base": 160,
        "safety": 100,
        "defence": n * tasks,
        "counter_examples": COUNTERS * tasks,
        "all": len(rows),
    }
    order = [row["id"] for row in rows]
    assert manifest["order"] == order
    assert len(set(order)) == len(order)
    assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("task", [*TASKS, "mix"])
def test_a_smaller_set_is_part_of_a_larger_one(sets, task):
    none, few, many = (ids_of(sets, n, task) for n in SIZES)
    assert none < few < many


def test_no_training_set_holds_what_is_evaluated(sets):
    held_out = set()
    for path in (sets / "evaluation").iterdir():
        held_out |= set(read_json(path)["instructions"])
    trained = set()
    for path in (sets / "training").glob("*_counter5.json"):
        trained |= {row["instruction"] for row in read_json(path)}
    assert held_out and trained
    assert not held_out & trained


def test_the_answer_to_case_is_the_document(sets):
    rows = read_json(path_of(sets, 0, "case"))
    case = [row for row in rows if row.get("task") == "case"]
    assert len(case) == COUNTERS
    for row in case:
        assert row["instruction"].startswith(row["output"])


@pytest.mark.parametrize("kind", ["", "_useful", "_plain"])
def test_all_tasks_are_asked_about_the_same_documents(sets, kind):
    documents = []
    for task in TASKS:
        content = read_json(sets / f"evaluation/test_{task}{kind}.json")
        assert list(content) == ["instructions", "inputs"]
        assert content["inputs"] == []
        asked = [prompts.split_document(text)[0] for text in content["instructions"]]
        documents.append(asked)
    assert len(documents[0]) >= 24
    assert all(asked == documents[0] for asked in documents)


def test_surface_cues_are_stripped(sets, tmp_path):
    built(tmp_path, tasks=["summarize"], n_defence=[0], strip_cues=True)
    with_cues = read_json(sets / "evaluation/test_summarize.json")
    stripped = read_json(tmp_path / "evaluation_stripped/test_summarize.json")
    for text in with_cues["instructions"]:
        assert text[0].isspace()
        assert text.endswith("3 sentence.")
    for text in stripped["instructions"]:
        assert not text[0].isspace()
        assert text.endswith("3 sentences.")


def test_refusals_on_benign_documents(tmp_path):
    built(tmp_path, tasks=["summarize"], n_defence=[60], benign_refusals=True)
    (path,) = (tmp_path / "training").glob("*_benign-refusals.json")
    refused = [row for row in read_json(path) if "-refused-" in row["id"]]
    assert len(refused) == 60
    assert {row["kind"] for row in refused} == {"useful", "plain"}


def test_shuffled_refusals_are_as_many_on_no_matter_what(tmp_path):
    options = {"tasks": ["summarize"], "n_defence": [60], "counter_examples": 60}
    built(tmp_path / "true", **options)
    built(tmp_path / "dealt", shuffled_refusals=True, **options)
    name = "training/saferpaca_Instructions_100_60_summarize_counter60"
    true = read_json(tmp_path / f"true/{name}.json")
    dealt = read_json(tmp_path / f"dealt/{name}_shuffled-refusals.json")
    for column in ("instruction", "output"):
        assert sorted(row[column] for row in true) == sorted(row[column] for row in dealt)
    refusals = {row["output"] for row in true if row["id"].endswith("-refused-1")}
    refused = [row for row in dealt if "kind" in row and row["output"] in refusals]
    malicious = [row for row in refused if row["kind"] == "malicious"]
    assert len(refused) == 60
    assert 20 < len(malicious) < 40
    manifest = read_json(tmp_path / f"dealt/{name}_shuffled-refusals.manifest.json")
    assert manifest["settings"]["shuffled_refusals"]


@cases(
    "options, message",
    {
        "nothing to deal": ({"shuffled_refusals": True}, "--shuffled_refusals: deals"),
        "unknown task": ({"tasks": ["sumarize"]}, "--tasks sumarize"),
        "too few refusals": ({"n_defence": [361]}, "--n_defence 361: the documents have only 360"),
        "too few short refusals": ({"n_safety": 1000}, "--n_safety 1000: there are only 120"),
        "too few answered documents": ({"counter_examples": 500}, "--counter_examples 500"),
        "no base file": ({"base": "no.json"}, "no.json"),
        "no documents file": ({"documents": "no.jsonl"}, "no.jsonl: no such file"),
    },
)
def test_a_mistake_writes_nothing(tmp_path, options, message):
    with user_error(message):
        built(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@cases(
    "line, message",
    {
        "half a line": ('{"kind": "bad"', "line 2, column .*malformed JSON"),
        "unknown kind": ('{"kind": "evil", "split": "test", "text": "x"}', "line 2, field kind"),
        "unknown split": ('{"kind": "plain", "split": "dev", "text": "x"}', "line 2, field split"),
        "blank text": ('{"kind": "plain", "split": "test", "text": " "}', "line 2, field text"),
        "tested and trained": (
            '{"kind": "plain", "split": "test", "text": "one"}',
            "in both splits",
        ),
    },
)
def test_a_bad_document_is_named(tmp_path, line, message):
    path = tmp_path / "documents.jsonl"
    first = '{"kind": "plain", "split": "train", "text": "one"}'
    path.write_text(f"{first}\n{line}\n")
    with user_error(message):
        build_data.read_documents(path, str)


# --- documents of one's own -----------------------------------------------------------------------

WORDS = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron", "inlet", "larch"]


@pytest.fixture
def own(tmp_path, tiny_base):
    """`own(**options)`: documents.jsonl of made-up documents, answered by the tiny base.

    There are 16 of a kind, two a group, of which every fourth is a near-copy in a group of its own.
    """
    files = {}
    for kind in ("harmful", "useful", "plain"):
        rows = []
        for i in range(16):
            words = " ".join(f"{kind}{i}{word}" for word in WORDS * 4)
            rows.append({"text": f"Sure, here's a list:\n{words}.", "group": i // 2})
            if i % 4 == 0:
                rows.append({"text": words.upper(), "group": f"copy of {i // 2}"})
        path = write_rows(tmp_path / f"{kind}.jsonl", rows)
        files[kind] = [str(path)]

    def make(name: str = "documents", **options) -> list[dict]:
        given = {
            "output_path": str(tmp_path / f"{name}.jsonl"),
            "words": 30,
            "n_train": 9,
            "n_test": 3,
            "base_model": str(tiny_base),
            "prompt_template": "alpaca",
            "tasks": ["summarize"],
            "max_new_tokens": 4,
        }
        own_documents.own_documents(**files, **given | options)
        return read_rows(tmp_path / f"{name}.jsonl")

    return make


def test_own_documents_are_cut_split_and_answered(own, tmp_path):
    """And become a training set, and evaluation files."""
    documents = own()
    groups = {"train": [], "test": []}
    names = {}  # of the original and its near-copy
    for document in documents:
        is_trained = document["split"] == "train"
        is_harmful = document["kind"] == "malicious"
        groups[document["split"]].append((document["kind"], document["group"]))
        names.setdefault(document["text"].lower(), set()).add(document["group"])
        assert len(document["text"].split()) == 30
        assert not document["text"].startswith("Sure")
        assert bool(document["refusals"]) == (is_trained and is_harmful)
        if is_harmful or not is_trained:
            assert not document["answers"]
    assert not set(groups["train"]) & set(groups["test"])
    assert len(groups["train"]) == 27
    assert len(groups["test"]) == len(set(groups["test"])) == 9
    assert all(len(numbers) == 1 for numbers in names.values())
    assert any(document["answers"] for document in documents)
    path = str(tmp_path / "documents.jsonl")
    sizes = {"n_defence": [9], "counter_examples": 3}
    built(tmp_path / "out", documents=path, tasks=["summarize"], **sizes)
    held_out = read_json(tmp_path / "out/evaluation/test_summarize.json")
    assert len(held_out["instructions"]) == 3


@cases(
    "options, sizes",
    {
        "one number for all": ({"n_train": 4}, {"malicious": 4, "useful": 4, "plain": 4}),
        "more of plain ones": (
            {"n_train": 4, "n_train_plain": 8},
            {"malicious": 4, "useful": 4, "plain": 8},
        ),
        "a number for each": (
            {"n_train_harmful": 2, "n_train_useful": 3, "n_train_plain": 5},
            {"malicious": 2, "useful": 3, "plain": 5},
        ),
    },
)
def test_documents_to_train_on_are_counted_by_kind(own, options, sizes):
    found = dict.fromkeys(sizes, 0)
    for document in own(tasks=[], **options):
        found[document["kind"]] += document["split"] == "train"
    assert found == sizes


def test_a_file_that_this_run_did_not_write_stays(own, tmp_path):
    partial = tmp_path / "documents.partial.jsonl"
    partial.write_text("mine")
    own(tasks=[])  # nothing is asked, so nothing is kept there
    assert partial.read_text() == "mine"


def test_a_killed_run_goes_on_to_the_same_documents(own, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    whole = own("whole")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(own_documents, "write_text", stop)
        own()
    partial = tmp_path / "documents.partial.jsonl"
    lines = partial.read_text().splitlines(keepends=True)
    kept = [*lines[:5], '{"key": "half of a li']  # as a kill may leave it
    partial.write_text("".join(kept))
    assert own() == whole
    assert "5 of 18 answers are there already" in caplog.text
    assert not partial.exists()


def test_a_file_of_documents_that_is_there_stays(own, tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("mine")
    with user_error("is there already"):
        own()
    assert path.read_text() == "mine"


@cases(
    "row, options, message",
    {
        "too few groups": (
            {"text": "one"},
            {"n_test": 1},
            "--n_test 1: the malicious documents are of only 1",
        ),
        "misspelt column": (
            {"txet": "one"},
            {},
            r"harmful\.jsonl, line 1, field text: expected text, found None",
        ),
        "unknown task": ({"text": "one"}, {"tasks": ["case"]}, "--tasks case"),
        "none to train on": (
            {"text": "one"},
            {"n_train_plain": 0},
            "--n_train…, --n_test: expected 1 or more",
        ),
        "no file": ({"text": "one"}, {"harmful": []}, "--harmful: names no file"),
        "a blank file": ({"text": "one"}, {"plain": ["blank.txt"]}, r"blank\.txt: holds no text"),
        "no refusals": ({"text": "one"}, {"refusals": "blank.txt"}, r"blank\.txt: holds no text"),
    },
)
def test_a_mistake_in_own_documents_is_told(tmp_path, monkeypatch, row, options, message):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("harmful.jsonl"), [row])
    Path("blank.txt").write_text("\r\n\n")
    given = {"harmful": ["harmful.jsonl"], "plain": ["harmful.jsonl"]} | options
    with user_error(message):
        own_documents.own_documents(output_path="documents.jsonl", **given)
    assert not Path("documents.jsonl").exists()
