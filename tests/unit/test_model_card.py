"""README.md as the hub reads it: ids and never paths, licence, data, what was measured."""

import pytest
from huggingface_hub import ModelCard

from common import bundled
from common.data.specs import about_data
from common.model_card import Measured, write_model_card

SAMPLE = "beavertails-sample:train"


def written(folder, **changes) -> ModelCard:
    options = {
        "title": "A guard",
        "base_model": bundled.NAME,
        "train_data": [SAMPLE],
        "intro": "Judges.",
        "usage": "\nprint(1)\n",
        "sections": {"Limits": "English.\n"},
    }
    write_model_card(folder, **(options | changes))
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_what_was_measured(tmp_path):
    values = {"flagged": {"auprc": 0.91234, "f1": 0.5, "auroc": None, "support": 20}}
    card = written(tmp_path, measured=Measured("beavertails-sample:test", values))
    data = card.data
    assert (data.base_model, data.base_model_relation) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "finetune",
    )
    assert (data.license, data.language, data.pipeline_tag) == (
        "apache-2.0",
        "en",
        "text-classification",
    )
    assert data.metrics == ["average_precision", "f1"] and data.datasets is None
    found = {
        (r.metric_type, r.metric_value, r.metric_name, r.dataset_name) for r in data.eval_results
    }
    sample = "beavertails-sample:test"
    wanted = {
        ("average_precision", 0.9123, "AUPRC of flagged", sample),
        ("f1", 0.5, "F1 of flagged", sample),
    }
    assert found == wanted
    assert card.text.startswith("\n# A guard\n\nJudges.\n\n```python\nprint(1)\n```\n")
    assert card.text.endswith("## Limits\n\nEnglish.\n")


@pytest.mark.parametrize(
    ("base", "hub_id"),
    [
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (str(bundled.cache_folder() / bundled.NAME), "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("/x/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abc", "Qwen/Qwen3-0.6B"),
        ("/home/me/models/llama", None),
        ("../llama", None),
        ("folder: with # signs", None),
        ("[list]", None),
    ],
)
def test_a_base_is_a_hub_id_or_not_named(tmp_path, base, hub_id):
    card = written(tmp_path, base_model=base)
    assert card.data.base_model == hub_id
    assert hub_id == base or base not in card.content


def test_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    """`llama` is a name that the hub could have, and here it is a folder."""
    monkeypatch.chdir(tmp_path)
    assert bundled.hub_id("llama") == "llama"
    (tmp_path / "llama").mkdir()
    assert bundled.hub_id("llama") is None


@pytest.mark.parametrize(
    ("base", "data", "licence"),
    [
        (bundled.NAME, [SAMPLE], "apache-2.0"),
        (bundled.NAME, [SAMPLE, "PKU-Alignment/BeaverTails:330k_train"], "other"),
        (bundled.NAME, ["rows.jsonl"], "other"),
        ("gpt2", [SAMPLE], "other"),
    ],
)
def test_a_licence_is_named_where_it_is_one(tmp_path, base, data, licence):
    assert written(tmp_path, base_model=base, train_data=data).data.license == licence


def test_data_is_named_without_folders_of_the_users(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    assert about_data(str(rows)) == {"name": "rows.jsonl"}
    assert about_data(f"0.1 of {rows}[:50]") == {"name": "0.1 of rows.jsonl[:50]"}
    assert about_data(f"{tmp_path}:train") == {"name": f"{tmp_path.name}:train"}
    beavertails = {"hub": "PKU-Alignment/BeaverTails", "licence": "CC BY-NC 4.0", "language": "en"}
    spec = "PKU-Alignment/BeaverTails:30k_train"
    assert about_data(spec) == beavertails | {"name": spec}
    assert about_data("user/rows@v2:train") == {"name": "user/rows@v2:train", "hub": "user/rows"}
    card = written(tmp_path, train_data=[spec, "user/rows:train", str(rows)])
    assert card.data.datasets == ["PKU-Alignment/BeaverTails", "user/rows"]


def test_an_adapter_is_one(tmp_path):
    data = written(tmp_path, base_model="gpt2", adapter=True, task="text-generation").data
    assert (data.library_name, data.base_model_relation) == ("peft", "adapter")
