"""Fine-tune a causal LM to write verdicts on a prompt, or a prompt and its response (ExpGuard,
arXiv 2603.02588).

# the quickstart: bundled model and sample, CPU, minutes
torchrun train.py

# one GPU, LoRA
launch/lora_1gpu.sh

# the paper's command, 4 GPUs; 8 GPUs by FSDP2 or DeepSpeed
bash scripts/train.sh
launch/fsdp2_8gpu.sh
launch/zero3_8gpu.sh

# the released model; select the epoch, and fit thresholds, on held-out rows
bash scripts/train.sh --stop_after_epoch 2
bash scripts/train.sh --do_eval
"""

import json
import logging
from pathlib import Path
from typing import Any

from arguments import DataArguments, ExpGuardConfig, ModelArguments, check
from datasets import Dataset
from model import (
    GuardTrainer,
    add_adapters,
    load_encoder,
    load_model,
    named_scores,
    verdict_scores,
    write_weights,
)
from rows import HUB, Validation, facts_of, is_mix, load_rows
from transformers import PreTrainedModel, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common import report
from common.conversation import UserError
from common.data.specs import about_data, in_one_name
from common.fit import check_ids, check_length, fit_causal_lm
from common.hub import push_finished
from common.keep import fingerprint
from common.model_card import Measured, write_model_card
from common.prefix import shared_prefix_collator
from common.run import is_main_process, manifest, parse_args, run_cli, write_json
from common.saving import (
    check_equal,
    free_memory,
    full_state_dict,
    predictions,
    refuse_to_overwrite,
    whole_folder,
)
from common.training import checkpoint_to_resume, start_over
from guards import add_probe
from guards.card import TOLERANCE, GenerativeCard, local_sha256

logger = logging.getLogger("expguard")


def main() -> None:
    # --- 1. Arguments ---------------------------------------------------------------------------
    model_args, data_args, args = parse_args(
        [ModelArguments, DataArguments, ExpGuardConfig],
        Path(__file__).parent / "configs/quickstart.yaml",
    )
    check(model_args, args)
    data_args.check_operating_point()
    checkpoint = checkpoint_to_resume(args) if args.do_train else None
    if args.do_train and checkpoint is None:
        refuse_to_overwrite(args.output_dir, args.overwrite_output_dir)
    set_seed(args.seed)

    # --- 2. Data --------------------------------------------------------------------------------
    rows, held_out, validation_name = load_rows(data_args, args)
    facts = facts_of(rows, held_out, data_args)
    logger.info("Data: %s", json.dumps(facts))
    encoder = load_encoder(model_args, data_args, args)
    train_set, facts["encoded"] = encoder.training_set(rows)
    logger.info("Encoded: %s", json.dumps(facts["encoded"]))
    validation = None
    if held_out is not None:
        validation = Validation(held_out, encoder, validation_name)

    # --- 3. Model -------------------------------------------------------------------------------
    model = load_model(model_args, args)
    fit_causal_lm(encoder.tokenizer, model)
    check_length(model, encoder.max_length, "--max_seq_len")
    check_ids(train_set["input_ids"], encoder.tokenizer, model)
    encoder.tokenizer.model_max_length = encoder.max_length
    lay_out_rows(model, args)
    if model_args.use_peft_lora:
        model = add_adapters(model, model_args)

    # --- 4. Trainer -----------------------------------------------------------------------------
    trainer = GuardTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation and validation.dataset,
        data_collator=shared_prefix_collator if args.share_prefix else None,
        processing_class=encoder.tokenizer,
        compute_metrics=validation,
        settings=settings_of(model_args),
    )
    trainer.words = encoder.words
    if args.do_train:
        if checkpoint is None:
            start_over(args)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        facts["useful_token_share"] = useful_token_share(trainer, facts["encoded"]["tokens"])
    if validation is not None:  # of the epoch that is kept
        logger.info("Validation: %s", json.dumps(trainer.evaluate()))

    # --- 5. Save --------------------------------------------------------------------------------
    if args.do_train:
        compared = encoder.compared(rows if held_out is None else held_out)
        arguments = (model_args, data_args, args)
        save_guard(trainer, compared, validation, encoder.policy, facts, result.metrics, arguments)
        push_finished(args)


# --- Trainer ------------------------------------------------------------------------------------


def lay_out_rows(model: PreTrainedModel, args: ExpGuardConfig) -> None:
    """Lay rows end to end where attention is told their bounds; check what a shared prefix asks
    for.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    args.padding_free = "flash" in str(attention)
    if not args.packing:
        args.max_length = None  # the encoder has seen to it
    if args.share_prefix and (args.packing or attention != "sdpa"):
        raise UserError("--share_prefix: goes with sdpa attention, and without --packing")
    if args.share_prefix and getattr(config, "sliding_window", None):
        raise UserError("--share_prefix: not for models with sliding windows")


def settings_of(model_args: ModelArguments) -> dict[str, Any]:
    """What a run that resumes has to have in common with this one, beside the arguments."""
    return {
        "content of the base model": fingerprint(model_args.model_name_or_path)[:16],
        "use_4bit_quantization": model_args.use_4bit_quantization,
        "use_8bit_quantization": model_args.use_8bit_quantization,
    }


def useful_token_share(trainer: GuardTrainer, tokens: int) -> float | None:
    """Tokens of the rows over tokens that were processed, pads included."""
    seen = trainer.state.num_input_tokens_seen
    return round(trainer.state.epoch * tokens / seen, 3) if seen else None


# --- The guard's folder -------------------------------------------------------------------------


def save_guard(
    trainer: GuardTrainer,
    compared: Dataset,
    validation: Validation | None,
    policy: str | None,
    facts: dict[str, Any],
    train_metrics: dict[str, float],
    arguments: tuple[ModelArguments, DataArguments, ExpGuardConfig],
) -> None:
    """Save the guard, whole or not at all: weights, tokenizer, run.json, model card, and guard.json
    last.

    Args:
        compared: sequences on which the folder has to say what the model in memory says.
        policy: the categories in its prompt; None is the paper's.
        facts: what is to be known of the data.
    """
    model_args, data_args, args = arguments
    trained = [named_scores(row) for row in predictions(trainer, compared).tolist()]  # collective
    state_dict = full_state_dict(trainer)  # collective
    free_memory(trainer)
    if not is_main_process():
        return
    measured = validation.measured() if validation else {}
    run = manifest(arguments, seed=args.seed, data=facts, train=train_metrics, validation=measured)
    best = trainer.state.best_model_checkpoint
    run["best_checkpoint"] = best and Path(best).name
    run["log"] = trainer.state.log_history
    card = GenerativeCard(
        guard="expguard",  # the entry of guards/zoo.yaml: prompt and verdict words
        policy=policy,
        max_length=trainer.processing_class.model_max_length,
        thresholds=validation.thresholds(data_args) if validation else {},
        base_model=model_args.model_name_or_path,
        base_sha256=local_sha256(model_args.model_name_or_path),
        data={
            "train_data": in_one_name(data_args.dataset_name),
            "validation_data": validation.name if validation else None,
            **facts,
        },
    )
    with whole_folder(args.output_dir) as folder:
        write_weights(trainer, state_dict, folder)
        write_json(folder / "run.json", run)
        write_readme(folder, card, data_args.dataset_name, measured)
        unset_hf_deepspeed_config()  # the guard is loaded by this process alone
        guard = add_probe(folder, card, trust_remote_code=args.trust_remote_code)
        if guard is not None:
            quantized = model_args.use_4bit_quantization or model_args.use_8bit_quantization
            said = verdict_scores(guard.model.model, compared, trainer.words)
            check_equal(trained, said, TOLERANCE["4bit" if quantized else guard.dtype])
    logger.info("Saved the guard to %s; it is equal to the model in memory", args.output_dir)


def write_readme(
    folder: Path, card: GenerativeCard, dataset_names: list[str], measured: dict[str, Any]
) -> None:
    """README.md, the model card."""
    train_data = [HUB if is_mix(name) else name for name in dataset_names]
    names = " ".join(about_data(name)["name"] for name in train_data)
    validation_data = card.data["validation_data"]
    heading, table = "Measured", "Nothing was measured."
    if measured:
        heading = f"Measured on {about_data(validation_data)['name']}"
        table = report.metric_table(measured)
    sections = {heading: table, "Limits": CARD_LIMITS}
    if card.policy is not None:
        lines = [f"- {line}" for line in card.policy.splitlines()]
        sections = {"Unsafe content categories": "\n".join(lines)} | sections
    write_model_card(
        folder,
        title="Domain guard",
        base_model=card.base_model,
        train_data=train_data,
        task="text-generation",
        intro=CARD_INTRO.format(data=names, rows=card.data["train"]["rows"]),
        usage=CARD_USAGE,
        measured=Measured(validation_data, measured) if measured else None,
        sections=sections,
    )


CARD_INTRO = """Writes whether a user's message, and the agent's response if there is one, is safe or unsafe (ExpGuard,
arXiv 2603.02588). Trained on {data} ({rows} rows) by `examples/expguard/train.py`. The licences of the base model and
the data apply."""
CARD_LIMITS = """The scores hold for text like the training data. A guard that was trained on sample data shows that the
recipe runs, not that the guard is good."""
CARD_USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
messages = [{"role": "user", "content": "…"}]  # and {"role": "assistant", "content": "…"}, to judge the answer, too
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)  # the guard's prompt
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]))"""


if __name__ == "__main__":
    run_cli(main)
