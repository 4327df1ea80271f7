"""Fine-tune a causal LM to write verdicts on a prompt, or a prompt and its response (ExpGuard,
arXiv 2603.02588).

# the quickstart: bundled model and sample, CPU, minutes
torchrun train.py

# one GPU, LoRA
launch/lora_1gpu.sh

# the paper's command; add --stop_after_epoch 2 for the released model, --do_eval to select the
epoch on held-out rows bash scripts/train.sh
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from arguments import DataArguments, ExpGuardConfig, ModelArguments, check
from datasets import Dataset
from model import add_adapters, load_model, load_tokenizer, named_scores, verdict_scores
from rows import (
    HUB,
    Encoder,
    Validation,
    describe,
    evaluation_rows,
    folder_of,
    is_mix,
    read_rows,
    stratified_split,
)
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from common import metrics, report
from common.conversation import UserError
from common.data import overlap
from common.data.specs import about_data
from common.fit import check_ids, check_length, fit_causal_lm
from common.keep import fingerprint
from common.model_card import Measured, write_model_card
from common.prefix import shared_prefix_collator
from common.run import is_main_process, manifest, parse_args, run_cli, write_json
from common.saving import (
    check_equal,
    free_memory,
    full_state_dict,
    merged_model,
    predictions,
    refuse_to_overwrite,
    save_adapter,
    save_model,
    whole_folder,
)
from common.training import AnswerTrainer, checkpoint_to_resume, read_answers, start_over
from guards import add_probe
from guards.card import TOLERANCE, GenerativeCard, local_sha256

logger = logging.getLogger("expguard")


class GuardTrainer(AnswerTrainer):
    """A trainer that also validates where a verdict is read and nowhere else."""

    stop_after_epoch: int | None = None
    words = (0, 0)  # token ids of safe and unsafe

    def set_initial_training_values(self, args, dataloader):
        """The schedule is that of all epochs, the loop that of the first `stop_after_epoch`."""
        epochs, *rest = super().set_initial_training_values(args, dataloader)
        return min(epochs, self.stop_after_epoch or epochs), *rest

    def get_eval_dataloader(self, eval_dataset=None):
        """Packing and padding-free are for training: here a sequence is a row, or rows share what
        they begin with.
        """
        training = self.data_collator
        if training is not shared_prefix_collator:
            self.data_collator = DataCollatorForLanguageModeling(training.pad_token_id)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def get_test_dataloader(self, test_dataset):
        """As for validation."""
        return self.get_eval_dataloader(test_dataset)

    def _get_eval_sampler(self, eval_dataset):
        """In order, because a sequence finds its row by its place; the stock sampler would group by
        length.
        """
        return SequentialSampler(eval_dataset)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """P(unsafe) at each label: `predictions` of shape (sequences, 2), nan where there is no
        second verdict.
        """
        inputs = self._prepare_inputs(inputs)
        owner = inputs.get("owner")
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs, labels, _ = read_answers(model, inputs)
        row, column = (labels != -100).nonzero(as_tuple=True)
        logits = outputs.logits[row, column].float()
        owner = row if owner is None else owner
        # how many verdicts of its row stand before it
        line = (owner[:, None] == owner).tril(-1).sum(1)
        scores = torch.full((int(owner.max()) + 1, 2), torch.nan, device=logits.device)
        safe, unsafe = self.words
        scores[owner, line] = (logits[:, unsafe] - logits[:, safe]).sigmoid()
        return None, scores, scores


def main() -> None:
    model_args, data_args, args = parse_args(
        [ModelArguments, DataArguments, ExpGuardConfig],
        Path(__file__).parent / "configs/quickstart.yaml",
    )
    check(model_args, args)
    checkpoint, max_length = checkpoint_to_resume(args) if args.do_train else None, args.max_length
    if args.do_train and checkpoint is None:
        refuse_to_overwrite(args.output_dir, args.overwrite_output_dir)
    set_seed(args.seed)
    rows, held_out, val_name = load_rows(data_args, args)
    facts = {"train": describe(rows)}
    others = {spec: evaluation_rows(spec, data_args.bad_rows) for spec in data_args.overlap_with}
    if held_out is not None:
        facts["validation"], others["validation"] = describe(held_out), held_out
    facts["overlap"] = {name: overlap(rows, other) for name, other in others.items()}
    logger.info("Data: %s", json.dumps(facts))

    tokenizer = load_tokenizer(model_args, args)
    encoder = Encoder(tokenizer, max_length)
    train_set, facts["encoded"] = encoder.training_set(rows)
    logger.info("Encoded: %s", json.dumps(facts["encoded"]))
    validation = None if held_out is None else Validation(held_out, encoder, val_name)
    model = load_model(model_args, args)
    fit_causal_lm(tokenizer, model)
    check_length(model, max_length, "--max_seq_len")
    check_ids(train_set["input_ids"], tokenizer, model)
    check_layout(model, args)
    args.max_length = max_length if args.packing else None  # the encoder has seen to it
    trainer = GuardTrainer(
        model=add_adapters(model, model_args) if model_args.use_peft_lora else model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation and validation.dataset,
        data_collator=shared_prefix_collator if args.share_prefix else None,
        processing_class=tokenizer,
        compute_metrics=validation,
        settings={
            "content of the base model": fingerprint(model_args.model_name_or_path)[:16],
            "use_4bit_quantization": model_args.use_4bit_quantization,
            "use_8bit_quantization": model_args.use_8bit_quantization,
        },
    )
    trainer.stop_after_epoch, trainer.words = args.stop_after_epoch, encoder.words
    if not args.do_train:
        logger.info("Validation: %s", json.dumps(trainer.evaluate()))
        return
    if checkpoint is None:
        start_over(args)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seen = trainer.state.num_input_tokens_seen
    facts["useful_token_share"] = (
        round(trainer.state.epoch * facts["encoded"]["tokens"] / seen, 3) if seen else None
    )
    if validation is not None:
        logger.info("Validation: %s", json.dumps(trainer.evaluate()))  # of the epoch that is kept
    compared = encoder.compared(rows if held_out is None else held_out)
    arguments = (model_args, data_args, args)
    save_guard(trainer, arguments, compared, validation, facts, result.metrics, max_length)


def check_layout(model: PreTrainedModel, args: ExpGuardConfig) -> None:
    """How rows are laid out: end to end where attention is told their bounds, and what a shared
    prefix asks for.
    """
    config = model.config.get_text_config()
    args.padding_free = "flash" in str(config._attn_implementation)
    if args.share_prefix and (args.packing or config._attn_implementation != "sdpa"):
        raise UserError("--share_prefix: goes with sdpa attention, and without --packing")
    if args.share_prefix and getattr(config, "sliding_window", None):
        raise UserError("--share_prefix: not for models with sliding windows")


def load_rows(data_args: DataArguments, args: ExpGuardConfig) -> tuple[list, list | None, str]:
    """Training rows, validation rows (None without --do_eval) and the name of these."""
    rows = [
        r
        for name in data_args.dataset_name
        for r in read_rows(name, data_args.data_dir, data_args.bad_rows)
    ]
    if not args.do_eval:
        return rows, None, ""
    folders = [folder_of(name, Path(data_args.data_dir)) for name in data_args.dataset_name]
    beside = next(
        (str(f / "val.jsonl") for f in folders if f and (f / "val.jsonl").is_file()), None
    )
    given = data_args.val_data or beside
    name = given or f"{data_args.val_split_ratio} of {' '.join(data_args.dataset_name)}"
    if metrics.is_test(name):
        raise UserError(
            f"--do_eval: {name} is a test set; neither epoch nor threshold is chosen on one"
        )
    if given is None:
        return *stratified_split(rows, data_args.val_split_ratio, args.seed), name
    return rows, read_rows(given, data_args.data_dir, data_args.bad_rows), name


# --- the guard's folder -----------------------------------------------------------------------------------------------


def save_guard(
    trainer: GuardTrainer,
    arguments: tuple[ModelArguments, DataArguments, ExpGuardConfig],
    compared: Dataset,
    validation: Validation | None,
    facts: dict[str, Any],
    train_metrics: dict[str, float],
    max_length: int,
) -> None:
    """Save the guard, whole or not at all: weights, tokenizer, run.json, model card, and guard.json
    last.

    Args:
        compared: sequences on which the folder has to say what the model in memory says.
        facts: what is to know about the data.
    """
    model_args, data_args, args = arguments
    trained = [named_scores(row) for row in predictions(trainer, compared).tolist()]  # collective
    state_dict = full_state_dict(trainer)  # collective
    free_memory(trainer)
    if not is_main_process():
        return
    measured = validation.measured() if validation else {}
    card = GenerativeCard(
        guard="expguard",  # the entry of guards/zoo.yaml: prompt and verdict words
        max_length=max_length,
        thresholds=validation.thresholds() if validation else {},
        base_model=model_args.model_name_or_path,
        base_sha256=local_sha256(model_args.model_name_or_path),
        data={
            "train_data": " ".join(data_args.dataset_name),
            "validation_data": validation.name if validation else None,
            **facts,
        },
    )
    quantized = model_args.use_4bit_quantization or model_args.use_8bit_quantization
    with whole_folder(args.output_dir) as folder:
        write_weights(trainer, state_dict, model_args, max_length, folder)
        run = manifest(
            arguments, seed=args.seed, data=facts, train=train_metrics, validation=measured
        )
        best = trainer.state.best_model_checkpoint
        kept = {"best_checkpoint": best and Path(best).name, "log": trainer.state.log_history}
        write_json(folder / "run.json", run | kept)
        write_readme(folder, card, data_args.dataset_name, measured)
        unset_hf_deepspeed_config()  # the guard is loaded by this process alone
        guard = add_probe(folder, card, trust_remote_code=args.trust_remote_code)
        if guard is not None:
            tolerance = TOLERANCE["4bit" if quantized else guard.dtype]
            check_equal(
                trained, verdict_scores(guard.model.model, compared, trainer.words), tolerance
            )
    logger.info(
        "Saved the guard to %s; it says there what the model in memory says", args.output_dir
    )


def write_weights(
    trainer: GuardTrainer,
    state_dict: dict[str, torch.Tensor],
    model_args: ModelArguments,
    max_length: int,
    folder: Path,
) -> None:
    """A stock model folder with its tokenizer; after LoRA the merged model, and the PEFT adapter in
    adapter/.
    """
    tokenizer = trainer.processing_class
    tokenizer.model_max_length = max_length
    model = trainer.accelerator.unwrap_model(trainer.model)
    if model_args.use_peft_lora:
        save_adapter(model, state_dict, tokenizer, folder / "adapter")
        model = merged_model(model, state_dict)
        state_dict = model.state_dict()
    model.config.use_cache = True
    save_model(model, state_dict, tokenizer, folder)


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
    write_model_card(
        folder,
        title="Domain guard",
        base_model=card.base_model,
        train_data=train_data,
        task="text-generation",
        intro=CARD_INTRO.format(data=names, rows=card.data["train"]["rows"]),
        usage=CARD_USAGE,
        measured=Measured(validation_data, measured) if measured else None,
        sections={heading: table, "Limits": CARD_LIMITS},
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
