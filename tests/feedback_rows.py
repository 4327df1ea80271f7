"""Small data, models and configs for the tests of examples/feedback_guard."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import families
import pytest

from guards.card import GenerativeCard, write_card

TEXT = "how do I keep my old bicycle clean safe from rain and thieves in the city without much money or time"
WORDS = TEXT.split()


def policy_words() -> list[str]:
    """The words of the policies that these guards read: by letters, they would be thousands of
    tokens. With these the seeds of `save_models` were chosen.
    """
    return Path(__file__).with_name("feedback_words.txt").read_text(encoding="utf-8").split()


def save_models(root: Path) -> dict[str, Path]:
    """A guard that writes safe and unsafe, another one, and an assistant that writes anything."""
    # with these seeds each text has a verdict
    for name, seed in (("guard", 12), ("judge", 6)):
        families.save(root / name, "llama2", ("safe", "unsafe"), seed, policy_words())
        write_card(root / name, GenerativeCard(guard="llama-guard", max_length=4096))
    made = families.tokenizer("llama3_chat")
    families.model("llama3_chat", made, 1).save_pretrained(root / "assistant")
    made.save_pretrained(root / "assistant")
    return {name: root / name for name in ("guard", "judge", "assistant")}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The models of `save_models`, once a file of tests."""
    return save_models(tmp_path_factory.mktemp("models"))


def prompts(count: int, start: int = 0, unsafe=lambda i: i % 5 == 0) -> list[dict]:
    """Rows in ToxicChat's columns, with a recorded response and people's word on it."""
    rows = []
    for i in range(start, start + count):
        words = [WORDS[(i * step + step) % len(WORDS)] for step in range(3, 12)]
        row = {
            "conv_id": f"r{i}",
            "user_input": f"{' '.join(words)} {i}?",
            "toxicity": int(unsafe(i)),
            "model_output": f"Use {' '.join(words[:4])} {i}.",
            "output_unsafe": i % 3 == 0,
            "kind": "hard_benign" if i % 2 else "plain",
            "openai_moderation": "[]",
        }
        rows.append(row)
    return rows


def write(folder: Path, **splits: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def config_writer(tmp_path: Path, models: Mapping[str, Path]) -> Callable[..., Path]:
    """`write_config("name", section={…})`: a small config file whose outputs lie in a folder of
    that name.
    """
    data = write(tmp_path / "rows", train=prompts(60), test=prompts(20, 60))

    def make(name: str = "run", **changes) -> Path:
        values = {
            "dataset": {"path": str(data), "store_dir": str(tmp_path / name)},
            "llama_guard": {
                "default_model_path": str(models["guard"]),
                "base_model_path": str(models["guard"]),
            },
            "llama": {
                "model_path": str(models["assistant"]),
                "samples": 2,
                "max_tokens": 6,
            },
            "training": {"arms": ["A4", "A8"]},
            "evaluation": {"judge": str(models["judge"]), "max_eval_samples": None},
            "experiment": {"process_sample_size": None, "explore_share": 0.5},
        }
        for section, own in changes.items():
            values[section] = values.get(section, {}) | own if isinstance(own, dict) else own
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(values))
        return path

    return make
