"""Small data, models and configs for the tests of examples/feedback_guard."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import families

from guards.card import GenerativeCard, write_card

TEXT = "how do I keep my old bicycle clean safe from rain and thieves in the city without much money or time"
WORDS = TEXT.split()
ROOT = Path(__file__).resolve().parents[1]


# of the vocabulary with which the seeds of `save_models` were chosen
MORE_WORDS = (
    "Feedback Guard Llama Nothing QUERIES Source What abc anew arm arms asii collections come "
    "finetuning github import included mov quirks reproduce switches templates typing uses"
)
PROMPTS = [
    *("aegis_defensive", "aegis_permissive", "expguard", "gpt_oss_safeguard"),
    *("granite_guardian_4", "harmbench_llama2", "harmbench_mistral", "md_judge", "nemoguard"),
    *("polyguard", "wildguard"),
]


def policy_words() -> list[str]:
    """The words of the policies that these guards read: by letters, they would be thousands of
    tokens.
    """
    recipe = (ROOT / "examples/feedback_guard/guard.py").read_text(encoding="utf-8")
    texts = [MORE_WORDS, recipe[recipe.index("# --- the original's prompts") :]]
    for name in PROMPTS:
        path = ROOT / f"guards/prompts/{name}.jinja"
        texts.append(path.read_text(encoding="utf-8"))
    return sorted({word for text in texts for word in re.findall(r"[A-Za-z]{3,}", text)})


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


def prompts(count: int, start: int = 0, unsafe=lambda i: i % 5 == 0) -> list[dict]:
    rows = []
    for i in range(start, start + count):
        words = [WORDS[(i * step + step) % len(WORDS)] for step in range(3, 12)]
        row = {
            "conv_id": f"r{i}",
            "user_input": f"{' '.join(words)} {i}?",
            "toxicity": int(unsafe(i)),
        }
        row |= {"model_output": f"Use {' '.join(words[:4])} {i}.", "output_unsafe": i % 3 == 0}
        rows.append(row | {"kind": ("plain", "hard_benign")[i % 2], "openai_moderation": "[]"})
    return rows


def write(folder: Path, **splits: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
