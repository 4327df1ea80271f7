"""LoRA instruction tuning that teaches a model to refuse harmful documents (Cross-Task Defense,
arXiv 2405.15202).

# the quickstart: bundled model and sample, CPU, minutes
torchrun train.py

# the paper's command
python train.py --base_model meta-llama/Llama-2-7b-hf \
    --data_path data/training/saferpaca_Instructions_100_10_summarize.json \
    --output_dir output/llama2-summarize-10 \
    --num_epochs 3 --cutoff_len 1024 --val_set_size 0 --prompt_template_name llama2

# several GPUs; with DeepSpeed
torchrun --nproc_per_node=4 train.py --config configs/paper.yaml
torchrun --nproc_per_node=4 train.py --config configs/paper.yaml \
    --load_in_8bit False --deepspeed ../../launch/zero3.json

Data: build_data.py. The answers: generate_answers.py.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arguments import TrainArguments, accumulation, check, training_arguments
from flags import run
from peft import PeftModel, prepare_model_for_kbit_training
from prompts import answered, encode_rows, load_template, read_rows
from training_record import record_of
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import ModelConfig, SFTTrainer

from common import report
from common.bundled import resolve_model
from common.conversation import UserError
from common.engines import quantization_config
from common.fit import check_ids, check_length, fit_causal_lm
from common.hub import push_finished
from common.keep import digest, fingerprint
from common.model_card import write_model_card
from common.run import inference_dtype, is_main_process, loading_model, manifest, write_json
from common.saving import full_state_dict, refuse_to_overwrite, save_adapter, whole_folder
from common.training import AnswerTrainer, checkpoint_to_resume, start_over, with_adapters

logger = logging.getLogger("cross_task_defense")


def train(**flags: Any) -> None:
    """Train LoRA adapters on instruction rows; the flags are the fields of `TrainArguments`."""
    # --- 1. Arguments ---------------------------------------------------------------------------
    args = TrainArguments(**flags)
    check(args)
    training = training_arguments(args, accumulation(args))
    checkpoint = checkpoint_to_resume(training)
    if checkpoint is None:
        flag = "--overwrite_output_dir"
        refuse_to_overwrite(args.output_dir, args.overwrite_output_dir, flag=flag)

    # --- 2. Data --------------------------------------------------------------------------------
    template = load_template(args.prompt_template_name)
    rows, without_output = training_rows(args)

    # --- 3. Model -------------------------------------------------------------------------------
    set_seed(args.seed)
    model, tokenizer = load_model(args)
    model = add_adapters(model, args)
    encoded, facts = encode_rows(
        rows, template, tokenizer, args.cutoff_len, args.train_on_inputs, args.add_eos_token
    )
    facts["rows_without_output"] = without_output
    facts["train_sha256"] = digest(
        [(row["instruction"], row.get("input"), row["output"]) for row in rows]
    )
    check_ids(encoded["input_ids"], tokenizer, model)
    logger.info("Data: %s", json.dumps(facts))

    # --- 4. Trainer -----------------------------------------------------------------------------
    held_out = None
    if args.val_set_size:
        split = encoded.train_test_split(args.val_set_size, seed=args.seed)
        encoded, held_out = split["train"], split["test"]
    trainer = AnswerTrainer(
        model=model,
        args=training,
        train_dataset=encoded,
        eval_dataset=held_out,
        processing_class=tokenizer,
        settings=run_settings(args),
        first_token_weight=args.first_token_weight,
    )
    if checkpoint is None:
        start_over(training)
        save_untrained(model, tokenizer, args)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    useful = trainer.state.epoch * sum(len(ids) for ids in encoded["input_ids"])
    # the rest is padding
    facts["useful_token_share"] = round(useful / trainer.state.num_input_tokens_seen, 3)

    # --- 5. Save --------------------------------------------------------------------------------
    state_dict = full_state_dict(trainer)  # collective
    if is_main_process():
        trained = trainer.accelerator.unwrap_model(trainer.model)
        with whole_folder(args.output_dir, last="adapter_config.json") as folder:
            save_adapter(trained, state_dict, tokenizer, folder)
            describe(args, template, facts, result.metrics, trainer, folder)
        logger.info("Saved the adapter to %s", args.output_dir)
    push_finished(training, last="adapter_config.json")


def training_rows(args: TrainArguments) -> tuple[list[dict[str, Any]], int]:
    """The rows of --data_path that have an output, and how many have none."""
    found = read_rows(args.data_path)
    rows = answered(found, args.data_path)
    if args.val_set_size >= len(rows):
        there = f"{args.data_path} has only {len(rows)} rows"
        raise UserError(f"--val_set_size {args.val_set_size}: {there}")
    return rows, len(found) - len(rows)


def load_model(args: TrainArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model (bf16 on a GPU, 8 or 4 bits when asked) and its tokenizer."""
    source = {
        "pretrained_model_name_or_path": resolve_model(args.base_model),
        "trust_remote_code": args.trust_remote_code,
    }
    quantization = quantization_config(args.load_in_8bit, args.load_in_4bit, double=False)
    with loading_model(args.base_model, flag="--base_model"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source,
            dtype=inference_dtype(),
            attn_implementation=args.attn_implementation,
            quantization_config=quantization,
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--base_model {args.base_model}: its tokenizer has no EOS token; answers would not end"
        )
    fit_causal_lm(tokenizer, model)
    if not args.packing:  # each row of a packed sequence has positions of its own
        check_length(model, args.cutoff_len, "--cutoff_len")
    model.config.use_cache = False
    if quantization is not None:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=args.gradient_checkpointing
        )
    return model, tokenizer


def add_adapters(model: PreTrainedModel, args: TrainArguments) -> PeftModel:
    """LoRA over the frozen model, in float32."""
    asked = ModelConfig(
        use_peft=True,
        lora_r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        lora_target_modules=args.lora_target_modules,
    )
    return with_adapters(model, asked, "--lora_target_modules")


def save_untrained(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, args: TrainArguments
) -> None:
    """The adapter that changes nothing yet, which is what training is compared with."""
    if is_main_process():
        folder = Path(args.output_dir) / "checkpoint-0"
        save_adapter(model, model.state_dict(), tokenizer, folder)


def run_settings(args: TrainArguments) -> dict[str, Any]:
    """What makes another run, beside the rows and what the trainer knows."""
    return {
        "load_in_8bit": args.load_in_8bit,
        "load_in_4bit": args.load_in_4bit,
        "first_token_weight": args.first_token_weight,
        "content of the base model": fingerprint(args.base_model)[:16],
    }


def describe(
    args: TrainArguments,
    template: dict[str, str] | None,
    facts: dict[str, Any],
    metrics: dict[str, Any],
    trainer: SFTTrainer,
    folder: Path,
) -> None:
    """run.json, training.json and the model card beside the adapter."""
    log = trainer.state.log_history
    best = trainer.state.best_model_checkpoint
    record = {"data": facts, "train": metrics, "prompt_template_text": template}
    record["best_checkpoint"] = best and Path(best).name
    what = manifest([args], **record, log=log)
    write_json(folder / "run.json", what)
    write_json(folder / "training.json", asdict(record_of(what)))
    losses = [[entry["step"], entry["loss"]] for entry in log if "loss" in entry]
    table = report.table(losses, ["step", "loss"]) if losses else "Fewer than 10 steps."
    write_model_card(
        folder,
        title="Refusal adapter",
        base_model=args.base_model,
        train_data=[args.data_path],
        adapter=True,
        task="text-generation",
        intro=CARD_INTRO.format(data=Path(args.data_path).name, template=args.prompt_template_name),
        usage=CARD_USAGE,
        sections={"Training loss": table},
    )


CARD_INTRO = (
    "LoRA adapters that teach a model to refuse harmful documents (arXiv 2405.15202). Trained on "
    "{data} by `examples/cross_task_defense/train.py`, prompt template {template}. The licences "
    "of the base model and the data apply."
)
CARD_USAGE = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")"""


if __name__ == "__main__":
    run(train, Path(__file__).parent / "configs/quickstart.yaml", TrainArguments)
