"""README.md as the hub reads it: ids and never paths, licence, data, what was measured."""

import pytest
from huggingface_hub import ModelCard

from common import bundled
from common.data.specs import about_data
from common.model_card import Measured, write_model_card

SAMPLE = "beavertails-sample:train"
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"


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


def test_the_card_has_its_text_and_names_the_base(tmp_path):
    card = written(tmp_path)
    assert card.text.startswith("\n# A guard\n\nJudges.\n\n```python\nprint(1)\n```\n")
    assert card.text.endswith("## Limits\n\nEnglish.\n")
    assert card.data.base_model == SMOLLM
    assert card.data.base_model_relation == "finetune"
    assert card.data.language == "en"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.datasets is None


def test_the_hub_reads_what_was_measured(tmp_path):
    """What is undefined, or no quality, is left out."""
    values = {"flagged": {"auprc": 0.91234, "f1": 0.5, "auroc": None, "support": 20}}
    data = written(tmp_path, measured=Measured("beavertails-sample:test", values)).data
    assert data.metrics == ["average_precision", "f1"]
    auprc, f1 = data.eval_results
    assert auprc.metric_name == "AUPRC of flagged"
    assert auprc.metric_value == 0.9123
    assert f1.metric_value == 0.5
    assert f1.dataset_name == "beavertails-sample:test"


@pytest.mark.parametrize(
    ("base", "hub_id"),
    [
        (str(bundled.cache_folder() / bundled.NAME), SMOLLM),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("/x/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abc", "Qwen/Qwen3-0.6B"),
        ("/home/me/models/llama", None),
        ("../llama", None),
        ("llama", None),
        ("folder: with # signs", None),
        ("[list]", None),
    ],
)
def test_a_base_is_a_hub_id_or_not_named(tmp_path, monkeypatch, base, hub_id):
    """A name that the hub could have may be a folder here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    card = written(tmp_path, base_model=base)
    assert card.data.base_model == hub_id
    assert hub_id == base or base not in card.content


@pytest.mark.parametrize(
    ("base", "data", "licence"),
    [
        (bundled.NAME, SAMPLE, "apache-2.0"),
        (bundled.NAME, "PKU-Alignment/BeaverTails:330k_train", "other"),
        (bundled.NAME, "rows.jsonl", "other"),
        ("gpt2", SAMPLE, "other"),
    ],
)
def test_a_licence_is_named_where_it_is_one(tmp_path, base, data, licence):
    card = written(tmp_path, base_model=base, train_data=[SAMPLE, data])
    assert card.data.license == licence


def test_data_is_named_without_folders_of_the_users(tmp_path):
    """Data of the hub by their id."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    hub = "PKU-Alignment/BeaverTails:30k_train"
    assert about_data(f"0.1 of {rows}[:50]") == {"name": "0.1 of rows.jsonl[:50]"}
    assert about_data(f"{tmp_path}:train") == {"name": f"{tmp_path.name}:train"}
    assert about_data("user/rows@v2:train") == {"name": "user/rows@v2:train", "hub": "user/rows"}
    assert about_data(hub)["licence"] == "CC BY-NC 4.0"
    card = written(tmp_path, train_data=[hub, "user/rows:train", str(rows)])
    assert card.data.datasets == ["PKU-Alignment/BeaverTails", "user/rows"]


def test_an_adapter_is_one(tmp_path):
    data = written(tmp_path, base_model="gpt2", adapter=True, task="text-generation").data
    assert data.library_name == "peft"
    assert data.base_model_relation == "adapter"
