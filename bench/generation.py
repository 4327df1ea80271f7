"""Speed of the Cross-Task Defense recipe against the original's loops: same model, adapter, prompts
and decoding.

    cd bench && python generation.py
    python generation.py --beams --rows 64  # training alone

Generation: 24 prompts, 64 new tokens, greedy and 4 beams. Ours: `TransformersEngine`, adapter
merged, left-padded batches of like length. Original: one prompt at a time, adapter not merged. The
exit code is 1 if a text differs. vLLM, where it is installed, answers the same prompts (greedy),
its adapter not merged either: last of all and apart, because its processes go on using cores.
Training: the quickstart's rows in random order, each batch padded to its longest (the original's),
in batches of like length, and packed.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from side_by_side import ROOT, SEED, recipe_modules
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from common import report
from common.bundled import resolve_model
from common.data import read_rows
from common.engines import Decoding, load_engine
from common.run import device, inference_dtype, manifest, run_cli, write_json

TARGETS = {1: 9.0, 4: 4.5}  # by the number of beams


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="bundled name, hub id or folder"
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--beams", type=int, nargs="*", default=[1, 4])
    parser.add_argument(
        "--rows", type=int, default=96, help="rows to train on; 0 leaves training out"
    )
    parser.add_argument("--rounds", type=int, default=1, help="how often the ways take turns")
    parser.add_argument("--output", type=Path, default=ROOT / "output/bench/generation.json")
    args = parser.parse_args()
    set_seed(SEED)
    (prompts,) = recipe_modules("cross_task_defense", "prompts")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.model))
    sample = ROOT / "data/sample/cross_task_defense"
    rows = prompts.read_rows(sample / "safety.json") + prompts.read_rows(
        sample / "instructions.json"
    )
    rows = random.Random(SEED).sample(rows, args.prompts)
    asked = [(row["instruction"], None) for row in rows]
    ids = prompts.encode_prompts(prompts.load_template("alpaca"), tokenizer, asked)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as adapter:
        save_adapter(args.model, adapter)
        for beams in args.beams:
            results[f"{beams} beams"] = found = generation(args, adapter, tokenizer, ids, beams)
            lines = [[name, *values] for name, values in found["ways"].items()]
            print(report.table(lines, [f"{beams} beams", "s, best", "s, median", "ratio"]))
            target = TARGETS.get(beams)
            print(
                f"{beams} beams: {found['ratio']:.1f}x (target {target}x), equal {found['equal']} of {len(ids)}\n"
            )
        equal = all(result["equal"] == len(ids) for result in results.values())
        if args.rows:
            results["training"] = found = training(args)
            print(
                report.table(
                    [[name, *values] for name, values in found.items()], ["training", *TRAINING]
                )
            )
        if 1 in args.beams and find_spec("vllm"):
            results["vllm"] = found = vllm_generation(
                args, adapter, tokenizer, ids, results["1 beams"]["texts"]
            )
            print(
                f"vLLM, greedy: {min(found['seconds']):.1f} s, equal {found['equal']} of {len(ids)}"
            )
    write_json(args.output, manifest([vars(args)], seed=SEED, results=results))
    sys.exit(not equal)


def save_adapter(name: str, folder: str) -> None:
    """An adapter as training leaves it: LoRA on q and v that changes what is said."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)


def generation(args, adapter: str, tokenizer, ids: list[list[int]], beams: int) -> dict[str, Any]:
    """Seconds of both ways for all prompts, and how many texts are equal."""
    options = {"adapter": adapter, "batch_size": len(ids), "progress": False}
    engine = load_engine("transformers", args.model, tokenizer, **options)
    base = AutoModelForCausalLM.from_pretrained(
        resolve_model(args.model), dtype=inference_dtype()
    ).to(device())
    apart = PeftModel.from_pretrained(base, adapter).eval()

    def ours() -> list[str]:
        return [one.text for one in engine.completions(ids, Decoding(args.new_tokens, beams))]

    def original() -> list[str]:
        texts = []
        options = {"max_new_tokens": args.new_tokens, "num_beams": beams, "do_sample": False}
        for row in ids:
            prompt = torch.tensor([row], device=device())
            with torch.inference_mode():
                out = apart.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), **options
                )
            texts.append(tokenizer.decode(out[0, len(row) :], skip_special_tokens=True))
        return texts

    ways = {"ours": ours, "original": original}
    seconds, texts = {name: [] for name in ways}, {}
    for turn in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            texts[name] = way()
            seconds[name].append(time.perf_counter() - start)
            print(
                f"{beams} beams, round {turn + 1}, {name}: {seconds[name][-1]:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    median = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        "ways": {
            name: (min(s), median[name], median["original"] / median[name])
            for name, s in seconds.items()
        },
        "ratio": median["original"] / median["ours"],
        "equal": sum(a == b for a, b in zip(texts["ours"], texts["original"], strict=True)),
        "texts": texts["original"],
    }


def vllm_generation(
    args, adapter: str, tokenizer, ids: list[list[int]], reference: list[str]
) -> dict[str, Any]:
    """Seconds that vLLM takes for all prompts, greedy, after a first turn, and how many texts are
    equal.
    """
    engine, seconds = (
        load_engine("vllm", args.model, tokenizer, adapter=adapter, progress=False),
        [],
    )
    for _ in range(args.rounds + 1):
        start = time.perf_counter()
        answers = engine.completions(ids, Decoding(args.new_tokens))
        seconds.append(time.perf_counter() - start)
    equal = sum(one.text == text for one, text in zip(answers, reference, strict=True))
    return {"seconds": seconds, "equal": equal}


TRAINING = ("useful tokens/s", "useful tokens", "ratio")


def training(args) -> dict[str, tuple[float, float, float]]:
    """Useful tokens a second, their share of all tokens, and the speed over the original's way, by
    way.
    """
    (train,) = recipe_modules("cross_task_defense", "train")
    (path,) = (ROOT / "data/sample/cross_task_defense/training").glob("*_stripped.json")
    rows = [row for _, row in read_rows(path)][: args.rows]
    ways = {
        "packed": {"packing": True, "micro_batch_size": 2},
        "like length": {"micro_batch_size": 8},
    }
    ways["padded, random order"] = {"micro_batch_size": 8, "group_by_length": False}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        options = {
            "base_model": args.model,
            "data_path": f"{folder}/rows.json",
            "prompt_template_name": "alpaca",
        }
        for name, way in ways.items():
            output = f"{folder}/{name}"
            train.train(
                **options,
                **way,
                output_dir=output,
                num_epochs=1,
                batch_size=way["micro_batch_size"],
            )
            run = json.loads(Path(output, "run.json").read_text(encoding="utf-8"))
            found[name] = (
                run["data"]["tokens"] / run["train"]["train_runtime"],
                run["data"]["useful_token_share"],
            )
    original = found["padded, random order"][0]
    return {name: (*values, values[0] / original) for name, values in found.items()}


if __name__ == "__main__":
    run_cli(main)
