"""Make a small model a guard: fine-tune it on labelled prompts and responses, in the Llama Guard 1
format.

python prepare.py                      # the quickstart's: the bundled model
python prepare.py --config F.json      # what its section "prepare" asks for: a guard, a judge, or both

This is a head start for models that are no guards yet; with Llama Guard itself there is nothing to
prepare.
"""

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from config import Config, PrepareGuard, config_from_argv
from formats import Encoder, template, verdict_probabilities
from train import ArmConfig, fitted, goes_on
from transformers import AutoTokenizer, set_seed

from common import keep, metrics, report
from common.bundled import public_name, resolve_model
from common.conversation import Message, UserError
from common.data import load_conversations, prompt_key
from common.data.specs import about_data
from common.fit import fit_causal_lm
from common.model_card import Measured, write_model_card
from common.run import (
    check_output_folder,
    inference_dtype,
    is_main_process,
    manifest,
    run_cli,
    write_json,
)
from common.saving import check_equal, full_state_dict, save_model, spread, whole_folder
from common.training import start_over
from guards import Guard, add_probe, zoo
from guards.card import TOLERANCE, GenerativeCard, has_card, local_sha256, read_card
from guards.generative import GenerativeGuard

logger = logging.getLogger("feedback_guard")
HELD_OUT = 0.15  # of the prompts, for the threshold
MAX_LENGTH = 2048
# conversation, label, its value, categories
Item = tuple[list[Message], str, bool, list[str] | None]


def main() -> None:
    prepare(config_from_argv(__doc__))


def prepare(config: Config) -> list[Path]:
    """Make the guards that the config asks for and that are not there yet; their folders."""
    if config.prepare is None:
        raise UserError("the config has no section prepare: there is nothing to prepare")
    sections = [
        section for section in (config.prepare.guard, config.prepare.judge) if section is not None
    ]
    for section in sections:
        make_guard(section)
    return [Path(section.output_dir) for section in sections]


def make_guard(section: PrepareGuard) -> None:
    """Fine-tune one guard, unless its folder holds it; after a kill, from its last checkpoint.

    Raises:
        UserError: bad data, a test split, a base that cannot be loaded, or a folder with another
        guard.
    """
    check_output_folder(section.output_dir)
    items = read_items(section.data)
    settings = section.model_dump(mode="json") | {
        "output_dir": None,
        "base_model": None,
        "held_out": HELD_OUT,
    }
    fingerprint = keep.digest([settings, keep.fingerprint(section.base_model), template(), items])
    folder = Path(section.output_dir)
    if has_card(folder):
        card = read_card(folder)
        if not isinstance(card, GenerativeCard) or card.fingerprint != fingerprint:
            raise UserError(
                f"{folder}: holds another guard; remove it, or choose another output_dir in prepare"
            )
        logger.info("%s: there already", folder)
        return
    train_items, held_out = split_items(items, section.seed)
    encoder = load_encoder(section.base_model, folder)
    rows, cut = encoder.rows(
        [i[0] for i in train_items], [float(i[2]) for i in train_items], [i[3] for i in train_items]
    )
    facts: dict[str, Any] = {"rows": len(rows), "unsafe": sum(item[2] for item in train_items)}
    facts |= {"held_out": len(held_out), "shortened_rows": cut, "data": list(section.data)}
    logger.info("Making a guard of %s: %s", section.base_model, json.dumps(facts))
    args = _arguments(section, folder, fingerprint)
    set_seed(section.seed)
    model = encoder.guard.model.model.float().requires_grad_(True)
    if section.last_layers is not None:  # a third of the time, for a third of the layers
        model.requires_grad_(False)
        for part in (*model.model.layers[-section.last_layers :], model.model.norm):
            part.requires_grad_(True)
    trainer = fitted(model, args, rows, encoder)
    thresholds, measured = _measured(encoder, held_out, section)
    state_dict = full_state_dict(trainer)  # collective
    if is_main_process():
        model.config.use_cache = True
        card = GenerativeCard(
            guard="llama-guard",
            max_length=MAX_LENGTH,
            thresholds=thresholds,
            base_model=section.base_model,
            base_sha256=local_sha256(section.base_model),
            fingerprint=fingerprint,
        )
        with whole_folder(folder) as partial:
            save_model(
                trainer.accelerator.unwrap_model(trainer.model),
                state_dict,
                encoder.tokenizer,
                partial,
            )
            run = manifest(
                [section.model_dump(mode="json")],
                data=facts,
                validation=measured,
                log=trainer.state.log_history,
            )
            write_json(partial / "run.json", run)
            _card(partial, section, measured)
            compare(encoder, held_out or train_items, add_probe(partial, card))
        start_over(args)
        (folder / "unfinished.json").unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()


# --- data -------------------------------------------------------------------------------------------------------------


def read_items(specs: Sequence[str]) -> list[Item]:
    """Checks to learn: of a prompt where its label is known, and of its response where that one's
    is.

    Raises:
        UserError: a test split, bad rows, or no labels.
    """
    out: list[Item] = []
    for spec in specs:
        if metrics.is_test(spec):
            raise UserError(
                f"prepare, field data: {spec} is a test set; a guard is not trained on one"
            )
        for row in load_conversations(spec):
            messages = row["messages"]
            asked = (
                messages[: max(i for i, m in enumerate(messages) if m["role"] == "user") + 1]
                if _asks(row)
                else []
            )
            if asked and row["prompt_unsafe"] is not None:
                out.append((asked, "prompt_unsafe", row["prompt_unsafe"], row["categories"]))
            if messages[-1]["role"] == "assistant" and row["response_unsafe"] is not None:
                out.append((messages, "response_unsafe", row["response_unsafe"], row["categories"]))
    if len({item[2] for item in out}) < 2:
        raise UserError(
            f"prepare, field data: {', '.join(specs)} has no safe or no unsafe labels; a guard needs both"
        )
    return out


def _asks(row: dict[str, Any]) -> bool:
    return any(message["role"] == "user" for message in row["messages"])


def split_items(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """Items to train on and items held out, all of one prompt on one side."""
    keys = [prompt_key({"messages": item[0]}) for item in items]
    order = sorted(set(keys))
    random.Random(seed).shuffle(order)
    held = set(order[: round(HELD_OUT * len(order))])
    sides = zip(items, keys, strict=True)
    chosen = [(item, key in held) for item, key in sides]
    return [item for item, out in chosen if not out], [item for item, out in chosen if out]


# --- model ------------------------------------------------------------------------------------------------------------


def load_encoder(base_model: str, folder: Path) -> Encoder:
    """The base behind the guard's prompt; its tokenizer, with that for chat template, is saved in
    `folder`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(base_model))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"prepare, field base_model: {base_model}: {str(error).strip().splitlines()[0]:.200}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"prepare, field base_model: the tokenizer of {base_model} has no EOS; verdicts would not end"
        )
    tokenizer.chat_template = template()
    if is_main_process():
        tokenizer.save_pretrained(folder)
    entry = {**zoo()["llama-guard"], "tokenizer": str(folder)}
    guard = GenerativeGuard(resolve_model(base_model), entry, max_length=MAX_LENGTH, progress=False)
    fit_causal_lm(guard.tokenizer, guard.model.model)
    return Encoder(guard, MAX_LENGTH, always_end=True)


def _arguments(section: PrepareGuard, folder: Path, fingerprint: str) -> ArmConfig:
    return ArmConfig(
        output_dir=str(folder),
        resume_from_checkpoint="latest" if goes_on(folder, fingerprint) else None,
        max_steps=section.max_steps,
        per_device_train_batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        logging_steps=5,
        save_steps=max(20, section.max_steps // 4),
        save_total_limit=1,
        gradient_checkpointing=False,
        bf16=inference_dtype() == torch.bfloat16,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="random",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=not logger.isEnabledFor(logging.INFO),
        seed=section.seed,
    )


def _measured(
    encoder: Encoder, held_out: Sequence[Item], section: PrepareGuard
) -> tuple[dict, dict[str, Any]]:
    """Thresholds, fitted on the held-out items, and what they measure there, by label."""
    name, thresholds, measured = f"{HELD_OUT} of {' '.join(section.data)}", {}, {}
    for label in ("prompt_unsafe", "response_unsafe"):
        items = [item for item in held_out if item[1] == label]
        truth = [item[2] for item in items]
        if len(set(truth)) < 2:
            continue
        prompts = encoder.guard.prompt_ids([item[0] for item in items])
        scores = verdict_probabilities(encoder.guard.model.model, prompts, encoder.tokens)
        thresholds[label] = metrics.fit_threshold(truth, scores, name)
        measured[label] = metrics.binary(truth, scores, thresholds[label]["value"])
    return thresholds, measured


def compare(encoder: Encoder, items: Sequence[Item], saved: Guard | None) -> None:
    """Compare P(unsafe) of the model in memory with that of the guard that was loaded from its
    folder.

    Args:
        saved: None where there was no memory for it.

    Raises:
        UserError: they differ.
    """
    if saved is None:
        return
    prompts = encoder.guard.prompt_ids([item[0] for item in spread(items)])
    scores = []
    for model in (encoder.guard.model.model, saved.model.model):
        probabilities = verdict_probabilities(model, prompts, encoder.tokens)
        scores.append([{"unsafe": probability} for probability in probabilities])
    check_equal(*scores, TOLERANCE[saved.dtype])


def _card(folder: Path, section: PrepareGuard, measured: dict[str, Any]) -> None:
    base = public_name(section.base_model)
    data = ", ".join(about_data(spec)["name"] for spec in section.data)
    on = f"{HELD_OUT} of {' '.join(section.data)}"
    write_model_card(
        folder,
        title="A small guard in the Llama Guard 1 format",
        base_model=section.base_model,
        train_data=list(section.data),
        measured=Measured(on, measured) if measured else None,
        task="text-generation",
        intro=f"{base}, fine-tuned on {data} by `examples/feedback_guard/prepare.py` "
        "to write safe or unsafe on a user's message, or on an agent's response to it.",
        usage=CARD_USAGE,
        sections={
            "Measured on held-out rows": report.metric_table(measured)
            if measured
            else "Nothing was measured.",
            "Limits": "A head start for experiments; no guard to rely on.",
        },
    )


CARD_USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
messages = [{"role": "user", "content": "…"}]  # and {"role": "assistant", "content": "…"}, to judge the answer
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)  # the guard's prompt
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]))"""


if __name__ == "__main__":
    run_cli(main)
