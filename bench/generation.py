"""Speed of the Cross-Task Defense recipe against the original's loops: same model, adapter, prompts
and decoding.

    cd bench && python generation.py
    python generation.py --beams --rows 64  # training alone

Generation: 24 prompts, 64 new tokens, greedy and 4 beams. Ours: `TransformersEngine`, stock
`generate` in left-padded batches of like length, the adapter merged. Original: one prompt at a
time, adapter not merged. The exit code is 1 if a text differs. vLLM, where it is installed, answers
the same prompts (greedy), its adapter not merged either: last of all and apart, because its
processes go on using cores. Training: the quickstart's rows in random order, each batch padded to
its longest (the original's), in batches of like length, and packed.
"""

import json
import random
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from side_by_side import (
    ROOT,
    SEED,
    bench_parser,
    medians,
    recipe_modules,
    take_turns,
    write_results,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig

from common import report
from common.bundled import resolve_model
from common.data import read_rows
from common.engines import Decoding, load_engine
from common.run import device, inference_dtype, run_cli
from common.training import with_adapters

TARGET = 5.9  # times the original's loop: what stock `generate` reached in batches, with 4 beams
SAMPLE = ROOT / "data/sample/cross_task_defense"


def main() -> None:
    parser = bench_parser(__doc__, "generation", rounds=1)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--beams", type=int, nargs="*", default=[1, 4])
    parser.add_argument(
        "--rows",
        type=int,
        default=96,
        help="rows to train on; 0 leaves training out",
    )
    args = parser.parse_args()
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.model))
    ids = prompt_ids(tokenizer, args.prompts)
    results: dict[str, Any] = {}
    equal = True
    with tempfile.TemporaryDirectory() as adapter:
        save_adapter(args.model, adapter)
        for beams in args.beams:
            found = generation(args, adapter, tokenizer, ids, beams)
            results[f"{beams} beams"] = found
            equal = equal and found["equal"] == len(ids)
        if args.rows:
            results["training"] = training(args)
        if 1 in args.beams and find_spec("vllm"):
            reference = results["1 beams"]["texts"]
            results["vllm"] = vllm_generation(args, adapter, tokenizer, ids, reference)
    write_results(args, results)
    sys.exit(not equal)


def prompt_ids(tokenizer, count: int) -> list[list[int]]:
    """Prompts of the recipe, of some instructions of the sample."""
    (prompts,) = recipe_modules("cross_task_defense", "prompts")
    rows = []
    for name in ("safety.json", "instructions.json"):
        rows += prompts.read_rows(SAMPLE / name)
    chosen = random.Random(SEED).sample(rows, count)
    asked = [(row["instruction"], None) for row in chosen]
    template = prompts.load_template("alpaca")
    return prompts.encode_prompts(template, tokenizer, asked)


def save_adapter(name: str, folder: str) -> None:
    """An adapter as training leaves it: LoRA on q and v that changes what is said."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32)
    asked = ModelConfig(use_peft=True, lora_r=8, lora_alpha=16, lora_dropout=0.0)
    model = with_adapters(model, asked, "LoRA")
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)


# --- Generation ---------------------------------------------------------------------------------


def generation(
    args,
    adapter: str,
    tokenizer,
    ids: list[list[int]],
    beams: int,
) -> dict[str, Any]:
    """Seconds of both ways for all prompts, and how many texts are equal."""
    engine = load_engine(
        "transformers",
        args.model,
        tokenizer,
        adapter=adapter,
        batch_size=len(ids),
    )
    decoding = Decoding(args.new_tokens, beams)
    path = resolve_model(args.model)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=inference_dtype())
    base = base.to(device())
    apart = PeftModel.from_pretrained(base, adapter)
    apart.eval()

    def ours() -> list[str]:
        completions = engine.completions(ids, decoding)
        return [one.text for one in completions]

    def original() -> list[str]:
        return one_at_a_time(apart, tokenizer, ids, decoding)

    ways = {"ours": ours, "original": original}
    seconds, texts = take_turns(ways, args.rounds, f"{beams} beams, ")
    median = medians(seconds)
    speeds = {}
    for name in ways:
        ratio = median["original"] / median[name]
        speeds[name] = (min(seconds[name]), median[name], ratio)
    ratio = median["original"] / median["ours"]
    equal = count_equal(texts["ours"], texts["original"])
    lines = [[name, *values] for name, values in speeds.items()]
    header = [f"{beams} beams", "s, best", "s, median", "ratio"]
    print(report.table(lines, header))
    print(
        f"{beams} beams: {ratio:.1f}x (target {TARGET}x), equal {equal} of {len(ids)}\n",
        flush=True,
    )
    return {
        "ways": speeds,
        "ratio": ratio,
        "equal": equal,
        "texts": texts["original"],
    }


@torch.inference_mode()
def one_at_a_time(
    model,
    tokenizer,
    ids: list[list[int]],
    decoding: Decoding,
) -> list[str]:
    """The original's loop."""
    texts = []
    for row in ids:
        prompt = torch.tensor([row], device=device())
        written = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=False,
        )
        answer = written[0, len(row) :]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        texts.append(text)
    return texts


def vllm_generation(
    args,
    adapter: str,
    tokenizer,
    ids: list[list[int]],
    reference: list[str],
) -> dict[str, Any]:
    """Seconds that vLLM takes for all prompts, greedy, after a first turn, and how many texts are
    equal.
    """
    engine = load_engine("vllm", args.model, tokenizer, adapter=adapter)
    ways = {"vLLM": lambda: engine.completions(ids, Decoding(args.new_tokens))}
    seconds, answers = take_turns(ways, args.rounds + 1)
    texts = [one.text for one in answers["vLLM"]]
    equal = count_equal(texts, reference)
    print(f"vLLM, greedy: {min(seconds['vLLM']):.1f} s, equal {equal} of {len(ids)}")
    return {"seconds": seconds["vLLM"], "equal": equal}


def count_equal(texts: list[str], reference: list[str]) -> int:
    equal = 0
    for text, other in zip(texts, reference, strict=True):
        if text == other:
            equal += 1
    return equal


# --- Training -----------------------------------------------------------------------------------

TRAINING = {
    "packed": {"packing": True, "micro_batch_size": 2},
    "like length": {"micro_batch_size": 8},
    "padded, random order": {"micro_batch_size": 8, "group_by_length": False},
}


def training(args) -> dict[str, tuple[float, float, float]]:
    """Useful tokens a second, their share of all tokens, and the speed over the original's way, by
    way.
    """
    (recipe,) = recipe_modules("cross_task_defense", "train")
    (path,) = (SAMPLE / "training").glob("*_stripped.json")
    rows = [row for _, row in read_rows(path)]
    rows = rows[: args.rows]
    speeds = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.json")
        data.write_text(json.dumps(rows), encoding="utf-8")
        for name, way in TRAINING.items():
            output = Path(folder, name)
            recipe.train(
                base_model=args.model,
                data_path=str(data),
                prompt_template_name="alpaca",
                output_dir=str(output),
                num_epochs=1,
                batch_size=way["micro_batch_size"],
                **way,
            )
            run = json.loads((output / "run.json").read_text(encoding="utf-8"))
            facts = run["data"]
            speed = facts["tokens"] / run["train"]["train_runtime"]
            speeds[name] = (speed, facts["useful_token_share"])
    original, _ = speeds["padded, random order"]
    found = {}
    for name, (speed, share) in speeds.items():
        found[name] = (speed, share, speed / original)
    lines = [[name, *values] for name, values in found.items()]
    header = ["training", "useful tokens/s", "useful tokens", "ratio"]
    print(report.table(lines, header))
    return found


if __name__ == "__main__":
    run_cli(main)
