"""Runs every script on tiny random models and records what it leaves. Clones that agree are equal.

python tests/golden.py ROOT OUT.json [name ...]     # the scripts of the clone at ROOT; see RUNS
python tests/golden.py --compare A.json B.json      # a line a difference; exit code 1 if any
python tests/golden.py --compare A.json B.json --tolerance 1e-3     # for another processor

A name brings the runs that it needs. Every script is a process of its own in a temporary folder,
one after the other, on one thread of the CPU; nothing is written to ROOT. Inputs come from the
clone of this file, so that they are the same for every ROOT.

With a tolerance numbers may differ by so much (relative to the greater one, if that is above 1),
and checksums are not compared.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
os.environ["PYTHONHASHSEED"] = "0"  # PEFT writes sets

import families
import feedback_rows
import torch
from checks import read_rows, write_rows
from golden_digest import checksum, differences, files, folder_digest, text_of
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

SAMPLE = Path(__file__).resolve().parents[1] / "data/sample"

# --- The runs ---------------------------------------------------------------------------------
# Paths are relative to the temporary folder. {out} is the folder of the run, which has its name;
# a run whose command holds the name of another one needs it.

MODERATION = """moderation/train.py --model_name_or_path models/base --output_dir {out}
    --train_data_name_or_path data/pairs-train.jsonl --num_train_epochs 1 --logging_steps 1
    --per_device_train_batch_size 8 --learning_rate 1e-3"""
LORA_GUARD = """lora_guard/train.py models/base {out} --train-data data/pairs-train.jsonl
    --eval-data data/pairs-validation.jsonl --epochs 1 --per-device-batch-size 8 --seed 1
    --eval-batch-size 16 --learning-rate 1e-3 --lora-r 4 --lora-alpha 8 --logging-steps 1"""
DEFENCE = """cross_task_defense/train.py --base_model models/base --output_dir {out} --lora_r 4
    --num_epochs 1 --batch_size 8 --micro_batch_size 4 --learning_rate 3e-3 --lora_alpha 8
    --warmup_steps 0 --save_steps 4"""
ANSWERS = """cross_task_defense/generate_answers.py --base_model models/base --output_path {out}
    --prompt_template_path chat --input_path data/questions --max_new_tokens 12"""
EXPGUARD = """expguard/train.py --model_name_or_path models/base --output_dir {out}
    --dataset_name data/expert-train.jsonl --learning_rate 3e-3 --gradient_accumulation_steps 1
    --max_seq_len 512 --disable_tqdm true"""
SUITE = """expguard/evaluate.py --output_dir {out} --benchmarks
    expguardtest_prompt@data/expert-test.jsonl expguardtest_response@data/expert-test.jsonl"""
FEEDBACK = """--config feedback.json --set dataset.store_dir=feedback_guard-process"""
ZOO = {  # the words that a tiny guard may write, and a seed with which it gives verdicts
    "expguard": ("safe unsafe", 0),
    "llama-guard": ("safe unsafe", 0),
    "llama-guard-2-8b": ("safe unsafe", 0),
    "llama-guard-3-8b": ("safe unsafe", 0),
    "llama-guard-3-1b": ("safe unsafe", 0),
    "md-judge-v0.1": ("safe unsafe", 0),
    "wildguard": ("yes no", 4),
    "harmbench-llama-2-13b": ("yes no", 2),
    "granite-guardian-3.3-8b": ("yes no", 0),
    "shieldgemma-2b": ("Yes No", 0),
    "qwen3guard-gen-0.6b": ("Safe Unsafe", 0),
    "nemotron-3.5-content-safety": ("safe unsafe", 1),
}
GUARDS = " ".join(f"{name}=models/{name}" for name in ZOO)

RUNS = {
    "moderation-full": f"{MODERATION} --eval_strategy no --save_strategy no",
    "moderation-lora": f"""{MODERATION} --eval_strategy no --save_strategy no --use_peft
        --lora_r 4 --flagged_loss 1 --head_fit_rows 32 --num_hidden_layers 2""",
    "moderation-eval-rows": f"""{MODERATION} --eval_strategy epoch --save_strategy epoch
        --eval_data_name_or_path data/pairs-validation.jsonl --positive_weight 2""",
    "moderation-evaluate": """moderation/evaluate.py --model_path moderation-eval-rows
        --eval_dataset data/pairs-test.jsonl --baselines data/pairs-train.jsonl
        --output_dir {out}""",
    "moderation-flagged": """moderation/evaluate.py --model_path moderation-full
        --eval_dataset data/evaluation.json --max_length 48 --output_dir {out}""",
    "lora_guard-lora": f"""{LORA_GUARD} --guard-inputs pair prompt
        --train-data data/labelled-train.jsonl --eval-data data/labelled-validation.jsonl""",
    "lora_guard-head-only": f"""{LORA_GUARD} --head-only --no-unsafe-head --head-fit-rows 32
        --guard-layers 2""",
    "lora_guard-evaluate": """lora_guard/evaluate.py --eval_data data/pairs-test.jsonl
        --guards lora_guard-lora/best lora_guard-head-only/best --prefix_tokens 4 16
        --output_dir {out}""",
    "lora_guard-moderate": """lora_guard/moderate.py lora_guard-lora/best --device-id -1
        --max-new-tokens 12 --guard-every 4 --threshold 1 --prompts data/prompts.jsonl
        --output {out}/replies.jsonl""",
    "cross_task-build": """cross_task_defense/build_data.py --tasks summarize,mix --n_defence 4
        --n_base 8 --n_safety 8 --counter_examples 4 --strip_cues --output_dir {out}""",
    "cross_task-train": f"""{DEFENCE} --prompt_template_name chat --cutoff_len 192
        --val_set_size 0 --first_token_weight 5 --data_path
        cross_task-build/training/saferpaca_Instructions_8_4_summarize_counter4_stripped.json""",
    "cross_task-train-packed": f"""{DEFENCE} --prompt_template_name alpaca --cutoff_len 256
        --packing --val_set_size 4 --data_path data/safety.json""",
    "cross_task-answers": f"{ANSWERS} --num_beams 1",
    "cross_task-answers-trained": f"{ANSWERS} --num_beams 2 --lora_weights cross_task-train",
    "cross_task-evaluate": """cross_task_defense/evaluate.py --guard moderation-full --answers
        cross_task-answers/models/base,cross_task-answers-trained/cross_task-train
        --output_dir {out}""",
    "expguard-full": f"""{EXPGUARD} --epochs 2 --do_eval
        --val_data data/expert-validation.jsonl""",
    "expguard-lora": f"{EXPGUARD} --epochs 1 --use_peft_lora --lora_r 4 --share_prefix",
    "expguard-evaluate": f"""{SUITE} --guards expguard=expguard-full moderation-full
        lora_guard-lora/best --validation data/expert-validation.jsonl
        --train_data data/expert-train.jsonl --bootstrap_rounds 50
        --compare expguard,moderation-full""",
    "expguard-evaluate-zoo": f"{SUITE} --bootstrap_rounds 0 --guards {GUARDS}",
    "feedback_guard-prepare": "feedback_guard/train.py prepare --config feedback.json",
    "feedback_guard-assistant": """feedback_guard/process.py --config feedback.json --set
        dataset.store_dir={out} llama.use_recorded=false evaluation.t2_label=judge""",
    "feedback_guard-process": f"feedback_guard/process.py {FEEDBACK}",
    "feedback_guard-train": f"feedback_guard/train.py {FEEDBACK}",
    "feedback_guard-evaluate": f"""feedback_guard/evaluate.py {FEEDBACK}
        training.output_dir=feedback_guard-train""",
}


def needed(names: list[str]) -> list[str]:
    """These runs and those that they need, in the order of RUNS."""
    wanted = set(names)
    for name in reversed(RUNS):
        if name in wanted:
            words = re.split(r"[/=,\s]+", RUNS[name])
            wanted |= {other for other in RUNS if other in words}
    return [name for name in RUNS if name in wanted]


# --- What the runs read -----------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_inputs() -> None:
    """Models, data and configs in the current folder."""
    make_base(Path("models/base"))
    for name, (words, seed) in ZOO.items():
        families.save(Path("models", name), families.GUARDS[name], words.split(), seed)
    made = feedback_rows.save_models(Path("models/feedback"))
    Path("data/questions").mkdir(parents=True)
    for name, count in (("train", 48), ("validation", 24), ("test", 24)):
        cut(f"beavertails/{name}.jsonl", f"data/pairs-{name}.jsonl", count)
        cut(f"expguard/{name}.jsonl", f"data/expert-{name}.jsonl", count)
        rows = [labelled(row) for row in read_rows(Path(f"data/pairs-{name}.jsonl"))]
        write_rows(Path(f"data/labelled-{name}.jsonl"), rows)
    rows = [{"prompt": row["prompt"]} for row in read_rows(Path("data/pairs-test.jsonl"))[::4]]
    write_rows(Path("data/prompts.jsonl"), rows)
    judged = json.loads((SAMPLE / "beavertails/evaluation.json").read_text())
    Path("data/evaluation.json").write_text(json.dumps(judged[:24]))
    safety = json.loads((SAMPLE / "cross_task_defense/safety.json").read_text())
    Path("data/safety.json").write_text(json.dumps(safety[:20]))
    for task in ("summarize", "cloze", "summarize_useful", "summarize_plain"):
        path = SAMPLE / f"cross_task_defense/evaluation_stripped/test_{task}.json"
        content = {key: value[:4] for key, value in json.loads(path.read_text()).items()}
        Path(f"data/questions/test_{task}.json").write_text(json.dumps(content))
    write_feedback_config(made)


def cut(name: str, path: str, count: int) -> None:
    """So many rows of a file of the sample, evenly spaced."""
    rows = read_rows(SAMPLE / name)
    write_rows(Path(path), [rows[i * len(rows) // count] for i in range(count)])


def labelled(row: dict) -> dict:
    """A BeaverTails row in the plain format, with a label for its prompt, too."""
    label = "safe" if row["is_safe"] else "unsafe"
    categories = [name for name, present in row["category"].items() if present]
    labels = {"prompt_label": label, "response_label": label, "categories": categories}
    return {"prompt": row["prompt"], "response": row["response"]} | labels


def make_base(folder: Path) -> None:
    """A random chat model of hidden size 32 whose tokenizer has learned the sample's English."""
    text = (SAMPLE / "expguard/train.jsonl").read_text(encoding="utf-8")
    words = "safe unsafe Safe Unsafe SAFE UNSAFE\nsafe\nunsafe\n"
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = families.byte_level_backend([text, *[words] * 20], 1500, specials)
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = FastTokenizer(tokenizer_object=backend, **roles)
    tokenizer.chat_template = CHAT_TEMPLATE
    shape = families.SHAPE | families.special_ids(tokenizer)
    shape |= {"num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_feedback_config(made: dict[str, Path]) -> None:
    """feedback.json: recorded responses, two steps an arm, few draws, and a guard to prepare."""
    training = {"arms": ["A2", "A2-parser", "A4", "A8", "C1", "C4"], "seeds": [0], "max_steps": 2}
    training |= {"batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
    training |= {"headline": {"arms": ["A8"], "seeds": [0, 1]}, "warmup_steps": 0}
    training |= {"output_dir": "feedback_guard-train"}
    evaluation = {"judge": str(made["judge"]), "t2_label": "human", "draws": 100}
    evaluation |= {"results_dir": "feedback_guard-evaluate"}
    guard = {"base_model": "models/base", "data": ["data/pairs-train.jsonl"], "max_steps": 3}
    guard |= {"output_dir": "feedback_guard-prepare", "last_layers": 2}
    feedback_rows.config_writer(Path("."), made)(
        "feedback",
        llama={"use_recorded": True},
        llama_guard={"legacy_new_tokens": 3},
        training=training,
        evaluation=evaluation,
        experiment={"results_dir": "feedback_guard-experiment"},
        prepare={"guard": guard},
    )


# --- Running ----------------------------------------------------------------------------------

TIMED = re.compile(r"_runtime|^\[\d{4}-")  # lines that say how long, or when


def record(root: Path, names: list[str]) -> dict[str, Any]:
    """What the runs leave, by name; a run that fails leaves its error."""
    os.environ["PYTHONPATH"] = str(root)
    os.environ["HF_DATASETS_CACHE"] = str(Path("datasets").resolve())
    make_inputs()
    inputs = b"".join(path.read_bytes() for path in files(Path(".")))
    found: dict[str, Any] = {"inputs": {"sha256": checksum(inputs)}}
    for name in needed(names or list(RUNS)):
        start, out = time.time(), Path(name)
        out.mkdir(exist_ok=True)
        script, *flags = shlex.split(RUNS[name].format(out=out))
        command = [sys.executable, str(root / "examples" / script), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            error = done.stderr.strip().splitlines()
            print(name, *error[-12:], sep="\n", file=sys.stderr)
            found[name] = {"exit code": done.returncode, "error": error[-1:]}
            continue
        said = [line for line in done.stdout.splitlines(True) if not TIMED.search(line)]
        (out / "stdout.txt").write_text("".join(said))
        found[name] = folder_digest(out)
        print(f"{name}: {time.time() - start:.1f} s", file=sys.stderr, flush=True)
    return found


# --- The command line -------------------------------------------------------------------------


def main() -> int:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE")
    parser.add_argument("--tolerance", type=float, default=0.0)
    parser.add_argument("words", nargs="*", metavar="ROOT OUT.json [name ...]")
    args = parser.parse_args()
    if args.compare:
        one, other = (json.loads(path.read_text(encoding="utf-8")) for path in args.compare)
        lines = list(differences(one, other, args.tolerance))
        print(*(lines or ["equal"]), sep="\n")
        return bool(lines)
    if len(args.words) < 2 or set(args.words[2:]) - set(RUNS):
        parser.error(f"expected ROOT OUT.json and none or some of: {', '.join(RUNS)}")
    root, out = (Path(word).resolve() for word in args.words[:2])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = record(root, args.words[2:])
        os.chdir("/")
    out.write_text(text_of(found), encoding="utf-8")
    return any("error" in run for run in found.values())


if __name__ == "__main__":
    sys.exit(main())
