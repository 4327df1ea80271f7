"""What gpu.py measures itself, one thing a process; what recipes train is measured by watched.py.

python gpu_steps.py device --to device.json
python gpu_steps.py verdicts --model ~/models/guard --to verdicts.json
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

SEED = 42
TOLERANCE = {"float32": 0.02, "bfloat16": 0.5}  # of log-odds, as in guards/card.py
HARMS = 8  # kinds of harm in the rows that gpu.py writes for moderation
PADDED_TO = 4096  # the length that the paper's code pads rows of ExpGuard to
Way = Callable[[], Any]
Batch = dict[str, torch.Tensor]
Prompts = list[list[int]]


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    add = parser.add_argument
    add("what", choices=sorted(STEPS))
    add("--to", type=Path, required=True, help="a JSON file")
    add("--tiny", action="store_true", help="a few rows and tokens, for a dry run")
    add("--model", help="folder")
    add("--engine", default="transformers", help="transformers | vllm")
    add("--like", type=Path, help="results of the same step by another engine")
    add("--adapter", help="folder of a guard that rides along")
    add("--rows", help="JSON lines to train on")
    add("--shape", help="a model of gpu_plan.py")
    add("--layers", type=int, help="of that model")
    add("--folder", type=Path, help="where its weights go")
    add("--tokenizer", help="bundled name or folder")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    figures, failures = STEPS[args.what](args)
    write(args, figures, failures)


def write(args: argparse.Namespace, figures: Mapping[str, Any], failures: Sequence[str]) -> None:
    """Write what was found, also before a step ends: one that is killed keeps it."""
    found = {"figures": figures, "failures": failures}
    text = json.dumps(found, indent=2)
    args.to.write_text(text + "\n", encoding="utf-8")


Found = tuple[dict[str, Any], list[str]]  # figures, and what should have come out and did not


# --- the device, with torch alone -----------------------------------------------------------------


def device(args: argparse.Namespace) -> Found:
    """What the machine is, and how fast it multiplies matrices."""
    on_gpu = torch.cuda.is_available()
    figures: dict[str, Any] = {"device": "CPU"}
    figures["gpus"] = torch.cuda.device_count()
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        figures["device"] = properties.name
        figures["memory_gb"] = properties.total_memory / 1e9
        figures["cuda"] = torch.version.cuda
    figures["matrix_tflops"] = matrix_rate(on_gpu)
    figures["copy_gb_per_s"] = copy_rate(on_gpu)
    return figures, []


def matrix_rate(on_gpu: bool) -> float:
    """TFLOP/s of the product of two square matrices, in bf16 on a GPU, by the fastest round."""
    size = 512
    kind = {}
    if on_gpu:
        size = 8192
        kind = {"device": "cuda", "dtype": torch.bfloat16}
    left = torch.randn(size, size, **kind)
    right = torch.randn(size, size, **kind)
    took = fastest(lambda: left @ right, on_gpu)
    return 2 * size**3 / took / 1e12


def copy_rate(on_gpu: bool) -> float:
    """10⁹ bytes that are read and written in a second by a copy within the device's memory."""
    size = 2**30 if on_gpu else 2**26
    where = "cuda" if on_gpu else "cpu"
    source = torch.zeros(size, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    took = fastest(lambda: target.copy_(source), on_gpu)
    return 2 * size / took / 1e9


def fastest(work: Way, on_gpu: bool) -> float:
    """Seconds of one turn, of the round of ten that was fastest."""
    seconds = []
    for _ in range(6):  # the first warms up
        start = time.perf_counter()
        for _ in range(10):
            work()
        if on_gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        seconds.append(took / 10)
    return min(seconds[1:])


# --- weights --------------------------------------------------------------------------------------


def weights(args: argparse.Namespace) -> Found:
    """A model folder with random weights in the shape of a public model."""
    from gpu_plan import shape_of
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from common import run
    from common.bundled import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.tokenizer))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    shape = dict(shape_of(args.shape, args.tiny, args.layers))
    if shape["vocab_size"] is None:
        shape["vocab_size"] = len(tokenizer)
    config = AutoConfig.for_model(
        **shape,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(run.device()):
        model = AutoModelForCausalLM.from_config(config, dtype=run.inference_dtype())
    if args.shape == "qwen2.5-1.5b":  # moderation's head, which no launch draws like another
        model.score = torch.nn.Linear(model.config.hidden_size, HARMS, bias=False)
        model.score.to(model.lm_head.weight)
    partial_folder = args.folder.with_name(f"{args.folder.name}.partial")
    model.save_pretrained(partial_folder)
    tokenizer.save_pretrained(partial_folder)
    partial_folder.rename(args.folder)
    return {"parameters": model.num_parameters()}, []


# --- lora_guard: the guard that rides along -------------------------------------------------------


def riding(args: argparse.Namespace) -> Found:
    """Replies with the guard at every k tokens, against generation alone."""
    from lora_guard import sample_prompts
    from side_by_side import recipe_modules, take_turns

    from common.data import load_conversations

    (module,) = recipe_modules("lora_guard", "riding")
    sample = load_conversations("beavertails-sample:train")
    chat = module.GuardedChat(args.adapter)
    chat.eos = set()  # every reply has all tokens
    chat.model.generation_config.eos_token_id = None
    plan = {1: (1, 8, 16, 64), 8: (8, 16, 64), 64: (16,)}  # each size of a batch, and its k
    tokens = 64
    if args.tiny:
        plan = {1: (2, 8), 2: (8,)}
        tokens = 8
    figures: dict[str, Any] = {}
    failures = []
    for size, steps in plan.items():
        prompts = sample_prompts(sample, size)
        ways: dict[str, Way] = {}
        ways["alone"] = partial(alone, chat, prompts, tokens)
        for every in steps:
            name = f"k = {every}"
            ways[name] = partial(guarded, chat, prompts, tokens, every)
        alone(chat, prompts, 4)  # warms up, and so does the next
        guarded(chat, prompts, 4, 2)
        seconds, replies = take_turns(ways, 1, f"batch {size}, ")
        best = best_of(seconds)
        figures[f"batch {size}, tokens/s alone"] = size * tokens / best["alone"]
        for every in steps:
            name = f"k = {every}"
            figures[f"batch {size}, {name}"] = best[name] / best["alone"]
            if replies[name] != replies["alone"]:
                failures.append(f"batch {size}, {name}: other tokens than generation alone")
        write(args, figures | peak(), failures)
    return figures | peak(), failures


def best_of(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The fastest round of each way."""
    best = {}
    for name, rounds in seconds.items():
        best[name] = min(rounds)
    return best


def alone(chat, prompts, tokens: int) -> list[list[int]]:
    """What the chat model writes without its guard."""
    ids = [chat.chat_ids(messages) for messages in prompts]
    texts = {"input_ids": ids}
    padded = chat.tokenizer.pad(
        texts,
        padding_side="left",
        return_tensors="pt",
    )
    padded = padded.to(chat.device)
    written = chat.model.generate(
        input_ids=padded["input_ids"],
        attention_mask=padded["attention_mask"],
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    width = padded["input_ids"].shape[1]
    return written[:, width:].tolist()


def guarded(
    chat,
    prompts,
    tokens: int,
    every: int,
) -> list[list[int]]:
    """What it writes with its guard riding along."""
    replies = chat.reply(
        prompts,
        max_new_tokens=tokens,
        guard_every=every,
        progress=False,
    )
    return [reply.token_ids for reply in replies]


# --- verdicts -------------------------------------------------------------------------------------


def verdicts(args: argparse.Namespace) -> Found:
    """Verdicts a second: one prompt at a time, in batches, and in batches over a shared prefix.

    The bound is what the count of tokens allows: shared ones once, and a token as fast as in
    batches that share nothing.
    """
    from side_by_side import take_turns

    from common.engines import dtype_name

    model = loaded(args)
    shared = 24 if args.tiny else 386
    own_tokens = 8 if args.tiny else 90
    count = 4 if args.tiny else 256
    known = min(10_000, len(model.tokenizer))
    turns = prompts_of_turns(known, shared, own_tokens, count)
    ways = verdict_ways(model, turns)
    for way in ways.values():
        way()
    seconds, found = take_turns(ways, 1)
    best = best_of(seconds)
    figures: dict[str, Any] = {}
    for name, said in found.items():
        figures[f"{name}, verdicts/s"] = len(said) / best[name]
    tokens = count * (shared + own_tokens)
    bound = tokens / (shared + count * own_tokens)
    figures["bound"] = bound
    faster = best["apart"] / best["shared"]
    figures["share_of_bound"] = faster / bound
    figures["said"] = odds_of(found["shared"])
    other = odds_of(found.get("single", []))
    if args.like and args.like.is_file():
        text = args.like.read_text(encoding="utf-8")
        other = json.loads(text)["figures"]["said"]
    failures = []
    tolerance = TOLERANCE[dtype_name()]
    for one, another in zip(figures["said"], other, strict=False):
        difference = abs(one - another)
        if not difference <= tolerance:
            failures.append(f"log-odds differ by {difference:.3f}")
    figures["compared"] = len(other)
    return figures | peak(), failures[:1]


def prompts_of_turns(known: int, shared: int, own_tokens: int, count: int) -> list[Prompts]:
    """Prompts with a beginning in common, to warm up and to be measured. Nothing of the first turn
    comes again, because an engine may keep what it has seen.
    """
    turns = []
    for turn in range(2):
        beginning = random_ids(known, shared, f"beginning {turn}")
        prompts = []
        for place in range(count):
            rest = random_ids(known, own_tokens, f"{turn} {place}")
            prompts.append(beginning + rest)
        turns.append(prompts)
    return turns


def verdict_ways(model, turns: Sequence[Prompts]) -> dict[str, Way]:
    """Together; together, but with a first token of its own for each; and one at a time.

    Args:
        turns: prompts for each time that a way is called.
    """
    candidates = [1, 2]

    def ask(prompts: Prompts) -> list:
        return model.next_token(prompts, candidates)

    def ask_apart(prompts: Prompts) -> list:
        apart = []
        for first, ids in enumerate(prompts):
            apart.append([first, *ids[1:]])
        return ask(apart)

    def ask_single(prompts: Prompts) -> list:
        said = []
        for ids in prompts[:32]:
            said += ask([ids])
        return said

    ways: dict[str, Way] = {}
    ways["shared"] = by_turn(ask, turns)
    ways["apart"] = by_turn(ask_apart, turns)
    if model.has_beams:  # transformers; vLLM batches by itself
        ways["single"] = by_turn(ask_single, turns)
    return ways


def by_turn(way: Callable, turns: Sequence) -> Way:
    """A way that is given something else every time."""
    left = iter(turns)
    return lambda: way(next(left))


def random_ids(known: int, count: int, seed: int | str) -> list[int]:
    """So many tokens out of the first `known`."""
    rng = random.Random(seed)
    return rng.choices(range(known), k=count)


def odds_of(said: Sequence) -> list[float]:
    """The log-odds of the first candidate against the second, by prompt."""
    odds = []
    for one in said:
        first, second = one.logprobs
        odds.append(first - second)
    return odds


def loaded(args: argparse.Namespace):
    """The engine, with the model's tokenizer."""
    from transformers import AutoTokenizer

    from common.engines import load_engine

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return load_engine(args.engine, args.model, tokenizer)


# --- answers --------------------------------------------------------------------------------------


def answers(args: argparse.Namespace) -> Found:
    """Tokens a second of greedy answers to the sample's prompts, as generate_answers.py has them."""
    from side_by_side import ROOT, recipe_modules

    from common.engines import Decoding

    (module,) = recipe_modules("cross_task_defense", "prompts")
    folder = ROOT / "data/sample/cross_task_defense/evaluation_stripped"
    asked = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for instruction in content["instructions"]:
            asked.append((instruction, None))
    count = 4 if args.tiny else 256
    tokens = 4 if args.tiny else 64
    asked = random.Random(SEED).sample(asked, count)
    model = loaded(args)
    if args.engine == "transformers":
        model.model.generation_config.eos_token_id = None  # random weights end where they like
    template = module.load_template("alpaca")
    prompts = module.encode_prompts(template, model.tokenizer, asked)
    decoding = Decoding(max_new_tokens=tokens)
    model.completions(prompts[:2], decoding)  # warms up
    start = time.perf_counter()
    said = model.completions(prompts, decoding)
    took = time.perf_counter() - start
    errors = []
    for one in said:
        if one.error is not None:
            errors.append(one.error)
    figures = {
        "tokens_per_s": count * tokens / took,
        "mean_prompt_tokens": statistics.mean(map(len, prompts)),
        "seconds": took,
    }
    return figures | peak(), errors[:1]


# --- expguard: what padding costs -----------------------------------------------------------------


def padding(args: argparse.Namespace) -> Found:
    """Forward and backward of LoRA on one micro-batch, our way and padded as in the paper's code."""
    from side_by_side import recipe_modules
    from transformers import AutoTokenizer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    (module,) = recipe_modules("expguard", "rows")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoder = module.Encoder(tokenizer, PADDED_TO)
    rows = module.read_rows(args.rows, "")
    encoded, _ = encoder.training_set(rows[:4])
    batch = encoded.to_list()
    model = adapted(args.model)
    width = 1024 if args.tiny else PADDED_TO
    like = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    wide = DataCollatorForLanguageModeling(tokenizer.pad_token_id, pad_to_multiple_of=width)
    lengths = [len(row["input_ids"]) for row in batch]
    useful = sum(lengths)
    figures: dict[str, Any] = {"tokens a batch": useful}
    ways = {
        "ours": (like, at_labels),
        "padded": (wide, at_all),
        "padded, logits at labels": (wide, at_labels),  # what these save alone
    }
    losses = {}
    for name, (collate, loss_of) in ways.items():
        work = partial(backward, model, collate(batch), loss_of)
        work()
        reset_peak()
        start = time.perf_counter()
        losses[name] = work()
        took = time.perf_counter() - start
        figures[f"{name}, tokens/s"] = useful / took
        for key, value in peak().items():
            figures[f"{name}, {key}"] = value
    failures = []
    for name, loss in losses.items():
        if not math.isclose(losses["ours"], loss, rel_tol=0.02):
            failures.append(f"{name}: the loss is {loss:.4f}, ours {losses['ours']:.4f}")
    return figures, failures


def adapted(path: str):
    """The base with LoRA, as train.py has it, and gradient checkpointing."""
    from transformers import AutoModelForCausalLM
    from trl import ModelConfig

    from common import run
    from common.training import with_adapters

    base = AutoModelForCausalLM.from_pretrained(path, dtype=run.inference_dtype())
    base.to(run.device())
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    asked = ModelConfig(use_peft=True, lora_target_modules=["all-linear"])
    return with_adapters(base, asked, "--lora_target_modules").train()


def backward(model, batch: Batch, loss_of: Callable) -> float:
    """The loss of a batch, after its gradients were taken."""
    model.zero_grad()
    moved = {}
    for name, tensor in batch.items():
        moved[name] = tensor.to(model.device)
    loss = loss_of(model, moved)
    loss.backward()
    return loss.item()


def at_labels(model, batch: Batch) -> torch.Tensor:
    """The mean loss of the labels, as the recipes read it."""
    from common.training import answers_loss, read_answers

    answers = read_answers(model, batch)
    return answers_loss(answers)


def at_all(model, batch: Batch) -> torch.Tensor:
    """The same, with logits and losses at every position."""
    labels = batch.pop("labels")
    labels = labels[:, 1:].flatten()
    output = model(**batch, use_cache=False)
    logits = output.logits[:, :-1]
    logits = logits.float().flatten(0, 1)
    return cross_entropy(logits, labels)


# --- feedback_guard: a guard that has something to say --------------------------------------------


def guard(args: argparse.Namespace) -> Found:
    """A guard of random weights whose output layer lets prompts pass, and blocks responses.

    Both words are read along the direction in which the states after prompts and those after
    responses lie apart; every other word is 0. So the recipe finds what it learns from.
    """
    from side_by_side import recipe_modules
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.data import load_conversations
    from common.run import inference_dtype
    from guards.card import GenerativeCard, write_card

    (module,) = recipe_modules("feedback_guard", "guard")
    untied = {"tie_word_embeddings": False, "dtype": inference_dtype()}
    model = AutoModelForCausalLM.from_pretrained(args.model, **untied)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = module.template()
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    card = GenerativeCard(guard="llama-guard", max_length=2048)
    write_card(args.folder, card)
    folder = str(args.folder)
    base = module.load_llama_guard(folder, progress=False)
    model = base.model.model
    rows = load_conversations("toxicchat-sample:train", max_rows=16)
    answered = [row["messages"] for row in rows]
    asked = [messages[:-1] for messages in answered]
    middles = []
    for conversations in (asked, answered):
        ids = base.prompt_ids(conversations)
        states = module.verdict_states(model, ids)
        middles.append(states.mean(0))
    before, after = middles
    direction = across(before - after, before + after)
    head = model.get_output_embeddings().weight.data
    head.zero_()
    for kind in ("prompt", "response"):
        words = base.verdict_tokens(kind)
        head[words[False]] = direction.to(head)
        head[words[True]] = -direction.to(head)
    model.save_pretrained(args.folder)
    return {}, []


def across(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The part of a vector that stands across another, of length 1."""
    along = (one @ other) / (other @ other)
    part = one - along * other
    return part / part.norm()


# --- memory ---------------------------------------------------------------------------------------


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, float]:
    """The most memory that tensors took, where there is an accelerator that counts it."""
    if not torch.cuda.is_available():
        return {}
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}


STEPS = {
    "answers": answers,
    "device": device,
    "guard": guard,
    "padding": padding,
    "riding": riding,
    "verdicts": verdicts,
    "weights": weights,
}

if __name__ == "__main__":
    main()
