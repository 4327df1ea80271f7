"""The hub, by its real clients against a hub of this machine: what recipes read, and what they push.

Rows are mild, in the columns and files that the data sets have.
"""

import gzip
import io
import json
import lzma

import feedback_guards
import pandas
import pytest
from hub_server import TOKEN, USER, hub_server
from scripts import EXAMPLES

from common.data import taxonomy

pytestmark = pytest.mark.slow
base, plain, settings = (
    feedback_guards.base,
    feedback_guards.plain,
    feedback_guards.settings,
)  # fixtures
CATEGORIES = taxonomy("beavertails")
PAIRS = [("How do I cook rice?", "Rinse it first."), ("May I read his letters?", "Take them.")]


@pytest.fixture
def hub():
    with hub_server() as hub:
        yield hub


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def beavertails(hub):
    """Two sizes, packed in two ways, one configuration: as in the data set's card."""
    rows = []
    for number, (prompt, response) in enumerate(PAIRS):
        category = dict.fromkeys(CATEGORIES, False)
        category["privacy_violation"] = number == 1
        row = {"prompt": prompt, "response": response, "category": category}
        rows.append(row | {"is_safe": number == 0})
    files = {}
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for size, pack, ending in (("30k", gzip, "gz"), ("330k", lzma, "xz")):
        for part in ("train", "test"):
            path = f"round0/{size}/{part}.jsonl.{ending}"
            files[path] = pack.compress(lines(rows))
            card += f"  - split: {size}_{part}\n    path: {path}\n"
    hub.add("datasets", "PKU-Alignment/BeaverTails", files | {"README.md": card + "---\n"})


def toxicchat(hub):
    """Two configurations whose labels differ, as CSV."""
    files = {}
    card = "---\nconfigs:\n"
    for number, name in enumerate(("toxicchat1123", "toxicchat0124")):
        card += f"- config_name: {name}\n  data_files:\n"
        for part in ("train", "test"):
            rows = []
            for prompt, response in PAIRS:
                row = {"conv_id": "c", "user_input": prompt, "model_output": response}
                row |= {"human_annotation": True, "toxicity": number, "jailbreaking": 0}
                rows.append(row | {"openai_moderation": "[]"})
            path = f"data/{name}/{part}.csv"
            files[path] = pandas.DataFrame(rows).to_csv(index=False)
            card += f"  - split: {part}\n    path: {path}\n"
    hub.add("datasets", "lmsys/toxic-chat", files | {"README.md": card + "---\n"})


def expguardmix(hub):
    row = {"prompt": "May I sell it?", "response": "Yes.", "prompt_label": "safe"}
    row |= {"response_label": "safe", "domain": "finance"}
    packed = io.BytesIO()
    pandas.DataFrame([row, row]).to_parquet(packed)
    card = "---\nconfigs:\n- config_name: expguardtrain\n  data_files:\n"
    card += "  - split: train\n    path: expguardtrain.parquet\n---\n"
    files = {"expguardtrain.parquet": packed.getvalue(), "README.md": card}
    hub.add("datasets", "6rightjade/expguardmix", files, gated=True)


READ = """
import json, sys
from common.data import load_conversations
rows = load_conversations(sys.argv[1])
keys = ("id", "messages", "prompt_unsafe", "response_unsafe", "categories")
print(json.dumps([{key: row[key] for key in keys} for row in rows]))
"""


def read(hub, folder, spec, **more):
    """The rows of a spec, or what is said of it."""
    script = READ.replace("rows = load", "from common.run import run_cli\nrows = load")
    (folder / "read.py").write_text(script)
    done = hub.python(folder, folder / "read.py", spec, **more)
    if done.returncode:
        return done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("split", ["330k_train", "330k_test", "30k_train"])
def test_beavertails_in_its_columns(hub, tmp_path, split):
    beavertails(hub)
    rows = read(hub, tmp_path, f"PKU-Alignment/BeaverTails:{split}")
    assert [row["response_unsafe"] for row in rows] == [False, True]
    assert [row["categories"] for row in rows] == [[], ["privacy_violation"]]
    assert rows[0]["messages"][0]["content"] == "How do I cook rice?"


def test_toxicchat_of_a_configuration_and_a_revision(hub, tmp_path):
    toxicchat(hub)
    rows = read(hub, tmp_path, "lmsys/toxic-chat@toxicchat0124:train[:1]")
    assert [row["prompt_unsafe"] for row in rows] == [True]
    said = read(hub, tmp_path, "lmsys/toxic-chat:train")
    assert "name a configuration: " in said
    assert "lmsys/toxic-chat@toxicchat0124:train" in said
    repository = hub.repositories["datasets", "lmsys/toxic-chat"]
    first, path = repository.commits[0], "data/toxicchat0124/train.csv"
    repository.commits.append(first | {path: first[path].replace(b"rice", b"beans")})
    repository.names["v1"] = 0
    for mark, word in (("@v1", "rice"), ("", "beans")):
        rows = read(hub, tmp_path, f"lmsys/toxic-chat@toxicchat0124{mark}:train")
        assert word in rows[0]["messages"][0]["content"]


EXPGUARD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from rows import read_rows
print(json.dumps(read_rows("expguardmix", "nowhere")))
"""


def test_a_gated_set_names_its_page_until_its_terms_are_accepted(hub, tmp_path):
    expguardmix(hub)
    (tmp_path / "read.py").write_text(EXPGUARD)
    words = tmp_path / "read.py", EXAMPLES / "expguard"
    for token in (None, "hf_of_somebody_else"):
        done = hub.python(tmp_path, *words, token=token)
        page = "accept the terms on https://huggingface.co/datasets/6rightjade/expguardmix"
        assert page in done.stderr.splitlines()[-1]
    done = hub.python(tmp_path, *words, token=TOKEN)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout)) == 2


ALPACA = """
import json, sys
sys.path.insert(0, sys.argv[1])
from prompts import read_rows
print(json.dumps(read_rows("yahma/alpaca-cleaned")))
"""


def test_alpaca_cleaned_by_its_id(hub, tmp_path):
    rows = [{"instruction": "Name a colour.", "input": "", "output": "Blue."}]
    hub.add("datasets", "yahma/alpaca-cleaned", {"alpaca_data_cleaned.json": json.dumps(rows)})
    (tmp_path / "read.py").write_text(ALPACA)
    done = hub.python(tmp_path, tmp_path / "read.py", EXAMPLES / "cross_task_defense")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == rows


# --- what is pushed -------------------------------------------------------------------------------


def train(hub, base, folder, *flags, token=TOKEN):
    words = [
        EXAMPLES / "moderation/train.py", "--model_name_or_path", base, "--output_dir", folder / "guard",
        "--train_data_name_or_path", "beavertails-sample:train", "--max_train_rows", 16, "--max_steps", 2,
        "--per_device_train_batch_size", 8, "--save_steps", 1, "--eval_strategy", "no", "--push_to_hub", *flags,
    ]  # fmt: skip
    return hub.python(folder, *words, token=token)


LOAD = """
import sys
from huggingface_hub import snapshot_download
from guards import load_guard
guard = load_guard(snapshot_download(sys.argv[1]), progress=False)
print(guard.judge([[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]])[0].error)
"""


def test_the_finished_guard_is_pushed_once_and_privately(hub, tiny_base, tmp_path):
    done = train(hub, tiny_base, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    repository = hub.repositories["models", f"{USER}/guard"]
    assert repository.private
    assert len([path for path in hub.asked if "/commit/" in path]) == 1
    names = set(repository.commits[-1])
    assert {
        "model.safetensors",
        "config.json",
        "guard.json",
        "README.md",
        "tokenizer.json",
    } <= names
    assert not [name for name in names if "checkpoint" in name or name == "run.json"]
    assert (tmp_path / "guard/checkpoint-1").is_dir()
    assert TOKEN not in done.stderr + done.stdout + (tmp_path / "guard/run.json").read_text()
    (tmp_path / "load.py").write_text(LOAD)
    loaded = hub.python(tmp_path, tmp_path / "load.py", f"{USER}/guard", token=TOKEN)
    assert loaded.stdout.splitlines()[-1:] == ["None"], loaded.stderr[-2000:]


@pytest.mark.parametrize(
    ("flags", "token", "message"),
    [
        ([], None, "log in with `hf auth login`"),
        ([], "hf_wrong", "log in with `hf auth login`"),
        (["--hub_strategy", "every_save"], TOKEN, "what is half-made is not pushed; drop the flag"),
        (
            ["--hub_model_id", f"{USER}/open"],
            TOKEN,
            f"{USER}/open is there and public; name another",
        ),
        (
            ["--hub_model_id", f"{USER}/mine"],
            TOKEN,
            f"{USER}/mine holds model.safetensors and was not pushed by a recipe; name another",
        ),
    ],
    ids=["nobody", "a wrong token", "half-made", "public", "of other work"],
)
def test_a_push_that_cannot_be_is_refused_before_any_work(
    hub, tiny_base, tmp_path, flags, token, message
):
    hub.add("models", f"{USER}/open", {"README.md": "Mine."})
    hub.add("models", f"{USER}/mine", {"model.safetensors": "Mine."}, private=True)
    done = train(hub, tiny_base, tmp_path, *flags, token=token)
    assert done.returncode == 2, done.stderr[-3000:]
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "guard").exists()
    for name in ("open", "mine"):
        assert len(hub.repositories["models", f"{USER}/{name}"].commits) == 1


PUSH = """
import sys
from common.hub import check_push, push_finished
from common.run import run_cli
from common.training import RecipeTrainingArguments
overwrite = "overwrite" in sys.argv
args = RecipeTrainingArguments(output_dir=sys.argv[1], push_to_hub=True, hub_overwrite=overwrite)
def push():
    check_push(args)
    push_finished(args, last="adapter_config.json")
run_cli(push)
"""


def test_a_later_push_takes_what_is_no_longer_there(hub, tmp_path):
    """An old shard beside new weights would be loaded; what is no guard's file stays."""
    old = {"model-00001-of-00002.safetensors": "old", "notes.txt": "mine", "adapter/old.txt": "old"}
    titles = {0: "A guard of Guardrail Recipes"}
    repository = hub.add("models", f"{USER}/out", old, private=True, titles=titles)
    (tmp_path / "push.py").write_text(PUSH)
    folder = tmp_path / "out"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2/adapter_config.json").write_text("{}")
    half = hub.python(tmp_path, tmp_path / "push.py", folder, token=TOKEN)
    assert "is not finished (adapter_config.json is missing)" in half.stderr
    assert len(repository.commits) == 1
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/mine/base"})
    )
    (folder / "README.md").write_text("# New\n")
    done = hub.python(tmp_path, tmp_path / "push.py", folder, token=TOKEN)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "adapter_config.json names paths of this machine (/mine/base)" in done.stderr
    assert set(repository.commits[-1]) == {"adapter_config.json", "README.md", "notes.txt"}


def test_other_work_of_the_same_name_stays_unless_that_is_asked_for(hub, tmp_path):
    """What only the hub has put there, or what we have pushed before, is no other work."""
    (tmp_path / "push.py").write_text(PUSH)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    words = tmp_path / "push.py", folder
    other = {".gitattributes": "", "adapter_config.json": "of somebody's own training"}
    repository = hub.add("models", f"{USER}/out", other, private=True)
    refused = hub.python(tmp_path, *words, token=TOKEN)
    assert refused.returncode == 2
    assert "holds adapter_config.json and was not pushed by a recipe" in refused.stderr
    assert repository.commits == [{name: text.encode() for name, text in other.items()}]
    for flags in (["overwrite"], []):
        (folder / "README.md").write_text(f"# {flags}")
        done = hub.python(tmp_path, *words, *flags, token=TOKEN)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(repository.commits) == 3
    assert repository.commits[-1]["adapter_config.json"] == b"{}"
    repository = hub.add("models", f"{USER}/out", {".gitattributes": ""}, private=True)
    done = hub.python(tmp_path, *words, token=TOKEN)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_feedback_guard_pushes_each_adapter(hub, settings, tmp_path):
    """Its repositories are looked at before any work; probes and rows stay here."""
    settings(arms=["A4", "C4"], max_steps=1, push_to_hub=True, hub_model_id=f"{USER}/arms")
    words = EXAMPLES / "feedback_guard/train.py", "--config", tmp_path / "config.json"
    name = f"{USER}/arms-A4-seed0"
    hub.add("models", name, {"model.safetensors": "Mine."}, private=True)
    refused = hub.python(tmp_path, *words, token=TOKEN)
    assert refused.returncode == 2
    assert f"{name} holds model.safetensors" in refused.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("arms/**/guard.json"))
    hub.repositories.clear()
    done = hub.python(tmp_path, *words, token=TOKEN)
    assert done.returncode == 0, done.stderr[-3000:]
    ((kind, found), repository) = hub.repositories.popitem()
    assert (kind, found, len(hub.repositories)) == ("models", name, 0)
    assert repository.private
    pushed = set(repository.commits[-1])
    assert {"adapter_model.safetensors", "adapter_config.json", "guard.json"} <= pushed
    assert not pushed & {"training_examples.jsonl", "stage.json", "run.json"}
