"""Train the arms: adapters of the guard that learn from prompts whose responses it blocked.

# the quickstart's arms, after process.py
python train.py

# the original's values, three seeds of every arm
python train.py --config research_config.json

One process loads the guard once and trains all arms that are not there yet; run again after a kill,
it goes on where it was. Loss of a row: soft cross-entropy on the verdict word, the rest of the line
where it is known, and for safe traffic training.kl_weight times KL(guard before training || now) on
{safe, unsafe}.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from arms import Arm, Row, arm, arm_folder, build_rows, legacy_facts
from config import Config, config_from_argv
from datasets import Dataset
from formats import (
    NOTHING,
    Encoder,
    collator_for,
    load_llama_guard,
    read,
    template,
    text_row,
    verdict_loss,
)
from formats import verdict_probabilities as probabilities
from peft import prepare_model_for_kbit_training
from probe import fit_probe
from records import read_blocked, read_processed
from torch import nn
from transformers import PreTrainedModel, set_seed
from trl import ModelConfig, SFTConfig
from trunk import Trunk

from common import report
from common.bundled import public_name
from common.conversation import UserError
from common.fit import check_ids, check_length
from common.keep import digest
from common.model_card import write_model_card
from common.run import (
    check_output_folder,
    inference_dtype,
    is_main_process,
    json_lines,
    manifest,
    run_cli,
    write_json,
    write_text,
)
from common.saving import full_state_dict, save_adapter, whole_folder
from common.training import (
    AnswerTrainer,
    RecipeTrainingArguments,
    answers_loss,
    checkpoint_to_resume,
    checkpoints,
    remove_checkpoint,
    start_over,
    with_adapters,
)
from guards import add_probe
from guards.card import (
    ArmOrigin,
    GenerativeCard,
    LinearProbeCard,
    has_card,
    local_sha256,
    read_card,
    write_card,
)
from guards.generative import GenerativeGuard
from guards.identity import guard_identity
from guards.known import zoo_name

logger = logging.getLogger("feedback_guard")
# the original's
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# rows of a forward pass with a loss on every token: their logits are what fills the memory
TEXT_BATCH = 4


@dataclass
class ArmConfig(RecipeTrainingArguments, SFTConfig):
    """TRL's arguments with what this collection adds to transformers' (CPU)."""

    goes_on_with = ()  # the same command does
    starts_over_with = "another output_dir"


class ArmTrainer(AnswerTrainer):
    """A trainer with the loss of a guard; of the original's texts, with that of their tokens."""

    words = (0, 0)  # token ids of safe and unsafe, as training writes them
    # all first tokens of the words for unsafe (True) and safe
    tokens: Mapping[bool, list[int]] = {}
    kl_weight = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over rows; over tokens for the original's texts."""
        answers = read(model, inputs)
        if inputs["target"].min() == NOTHING:
            loss = answers_loss(answers)
        else:
            loss = verdict_loss(answers, inputs, self.words, self.tokens, self.kl_weight)
        return (loss, answers.outputs) if return_outputs else loss


def main() -> None:
    train(config_from_argv(__doc__))


def train(config: Config) -> list[Path]:
    """Train every arm and seed that is not there yet; their folders.

    Raises:
        UserError: nothing processed, or with other settings, nothing to learn from, or folders that
        hold arms of other
            settings.
    """
    check_output_folder(config.training.output_dir)
    processed = read_processed(config, config.experiment.process_split)
    blocked = read_blocked(config)
    jobs, folders = [], []
    for name in config.training.arms:
        for seed in config.training.seeds_of(name):
            folders.append(arm_folder(config, name, seed))
            if arm(name).trains:
                rows = build_rows(arm(name), processed, blocked, seed, config)
                facts = legacy_facts(arm(name), processed, blocked, seed) if arm(name).texts else {}
                jobs.append(
                    Job(
                        arm(name),
                        seed,
                        rows,
                        folders[-1],
                        _fingerprint(config, arm(name), rows),
                        facts,
                    )
                )
    missing = [job for job in jobs if not job.done()]
    logger.info("%d arms to train; %d are there", len(missing), len(jobs) - len(missing))
    if not missing:
        return folders
    encoder = Encoder(load_base(config), config.training.max_length)
    check_length(encoder.guard.model.model, config.training.max_length, "training.max_length")
    encoded = {id(job): encoded_rows(job, encoder, config) for job in jobs if not job.arm.probe}
    every = [row["input_ids"] for rows, _ in encoded.values() for row in rows]
    check_ids(every, encoder.tokenizer, encoder.guard.model.model)
    shared = Shared(
        encoder, Trunk.of(encoder.guard.model.model, config.training.lora_last_layers, every)
    )
    for number, job in enumerate(missing, start=1):
        if job.facts.get("legacy_collection") == "empty":
            logger.warning(
                "%s: the original's checks collect nothing here; it gets the correct list",
                job.arm.name,
            )
        logger.info(
            "%s, seed %d (%d of %d): %s",
            job.arm.name,
            job.seed,
            number,
            len(missing),
            job.arm.question,
        )
        if job.arm.probe:
            _fit_probe(job, encoder.guard, config)
        else:
            train_arm(job, shared, config, *encoded[id(job)])
    return folders


@dataclass
class Shared:
    """What all arms of a run use: the guard's format, its frozen layers' work, P(unsafe) before
    training by prompt.
    """

    encoder: Encoder
    trunk: Trunk | None
    before: dict[tuple[int, ...], float] = field(default_factory=dict)


def _fingerprint(config: Config, arm: Arm, rows: Sequence[Row]) -> str:
    """Of all that an arm's weights depend on."""
    values, guard = config.training.model_dump(mode="json"), config.llama_guard
    for name in (
        "output_dir",
        "arms",
        "seeds",
        "headline",
        "logging_steps",
        "save_steps",
        "save_total_limit",
    ):
        values.pop(name)
    about = asdict(arm)
    about.pop("question")
    base = guard_identity(guard.base_model_path, {})
    prompt = None if guard.use_official_template else template()
    made = [values, base, prompt, guard.load_in_4bit, about]
    return digest([made, [row.as_dict() for row in rows]])


@dataclass
class Job:
    """One arm with one seed. Its card is written last: with it, the arm is done."""

    arm: Arm
    seed: int
    rows: list[Row]
    folder: Path
    fingerprint: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def done(self) -> bool:
        """Whether its folder holds this very arm. Raises UserError when it holds another one."""
        if not has_card(self.folder):
            return False
        card = read_card(self.folder)
        if not isinstance(card, ArmOrigin) or card.fingerprint != self.fingerprint:
            raise UserError(
                f"{self.folder}: was trained on other rows or with other settings; remove it, or choose another "
                "training.output_dir"
            )
        return True

    def resumes(self) -> bool:
        """Whether checkpoints of this very arm lie there. Raises UserError when they are another
        one's.
        """
        return goes_on(self.folder, self.fingerprint)

    def close(self) -> None:
        """Remove what only an unfinished arm needs."""
        for checkpoint in checkpoints(self.folder):
            remove_checkpoint(checkpoint)
        (self.folder / "unfinished.json").unlink(missing_ok=True)


def goes_on(folder: Path, fingerprint: str) -> bool:
    """Whether a folder holds checkpoints of a run; it is marked as this run's.

    Args:
        fingerprint: of all that the run's weights depend on.

    Raises:
        UserError: the checkpoints are of other rows or settings.
    """
    mark = folder / "unfinished.json"
    same = (
        mark.is_file()
        and json.loads(mark.read_text(encoding="utf-8"))["fingerprint"] == fingerprint
    )
    whole = checkpoints(folder)
    if whole and not same:
        raise UserError(
            f"{folder}: holds {whole[-1].name} of other rows or settings; remove it, or choose another output_dir"
        )
    if not same and is_main_process():
        write_json(mark, {"fingerprint": fingerprint})
    return same and bool(whole)


def load_base(config: Config) -> GenerativeGuard:
    """The guard that is trained, its model ready for adapters."""
    section = config.llama_guard
    options = {"load_in_4bit": True} if section.load_in_4bit else {}
    guard = load_llama_guard(
        section.base_model_path, section.use_official_template, progress=False, **options
    )
    model = guard.model.model
    if section.load_in_4bit:
        guard.model.model = prepare_model_for_kbit_training(model)
    return guard


def add_adapters(model: PreTrainedModel, config: Config) -> nn.Module:
    """LoRA over the frozen model, in float32, in the last `lora_last_layers` layers or in all."""
    values, layers = config.training, model.config.get_text_config().num_hidden_layers
    last = (
        None
        if values.lora_last_layers is None
        else list(range(max(0, layers - values.lora_last_layers), layers))
    )
    asked = ModelConfig(
        use_peft=True,
        lora_r=values.lora_r,
        lora_alpha=values.lora_alpha,
        lora_dropout=values.lora_dropout,
        lora_target_modules=list(MODULES),
    )
    return with_adapters(model, asked, config.llama_guard.base_model_path, last)


# --- one arm ----------------------------------------------------------------------------------------------------------


def encoded_rows(
    job: Job, encoder: Encoder, config: Config
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The job's rows as token ids, and what run.json says of them."""
    limit = config.training.max_length
    if job.arm.texts:
        rows = [
            text_row(encoder.tokenizer, r.text.parts, r.text.answer, job.arm.loss, limit)
            for r in job.rows
        ]
        cut = sum(len(row["input_ids"]) == limit for row in rows)
    else:
        given = zip(*((row.messages, row.target, row.categories) for row in job.rows), strict=True)
        rows, cut = encoder.rows(*given)
    facts = {
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "shortened_rows": cut,
    }
    facts["sources"] = dict(Counter(row.source for row in job.rows))
    facts["target_mean"] = round(sum(row.target for row in job.rows) / len(rows), 4)
    return rows, {**job.facts, **facts}


def add_reference(job: Job, rows: Sequence[dict[str, Any]], shared: Shared) -> None:
    """Put P(unsafe) before training into `g0` of the rows whose drift is held down; each prompt is
    asked once a run.
    """
    prompts = [tuple(row["input_ids"][: row["labels"].count(-100)]) for row in rows]
    held = [
        prompt
        for prompt, row in zip(prompts, job.rows, strict=True)
        if row.kl and prompt not in shared.before
    ]
    if held:
        model, tokens = shared.encoder.guard.model.model, shared.encoder.tokens
        shared.before.update(
            zip(held, probabilities(model, list(map(list, held)), tokens), strict=True)
        )
    for prompt, row, source in zip(prompts, rows, job.rows, strict=True):
        row["g0"] = shared.before[prompt] if source.kl else NOTHING


def training_arguments(job: Job, config: Config) -> ArmConfig:
    """The config's values as TRL's."""
    values, accumulation = config.training, config.training.gradient_accumulation_steps
    batch = values.batch_size
    if job.arm.texts and batch > TEXT_BATCH and batch % TEXT_BATCH == 0:
        batch, accumulation = TEXT_BATCH, accumulation * batch // TEXT_BATCH
    rates = (job.arm.learning_rate, values.arms_learning_rate, values.learning_rate)
    warmups = (job.arm.warmup_steps, values.arms_warmup_steps, values.warmup_steps)
    return ArmConfig(
        output_dir=str(job.folder),
        max_steps=values.max_steps,
        num_train_epochs=values.epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="cosine",
        weight_decay=values.weight_decay,
        logging_steps=values.logging_steps,
        save_steps=values.save_steps,
        save_total_limit=values.save_total_limit,
        gradient_checkpointing=config.llama_guard.load_in_4bit,
        bf16=inference_dtype() == torch.bfloat16,
        max_length=None,  # the encoder has seen to it
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="random",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=not logger.isEnabledFor(logging.INFO),
        resume_from_checkpoint="latest" if job.resumes() else None,
        seed=job.seed,
        learning_rate=next(rate for rate in rates if rate is not None),
        warmup_steps=next(steps for steps in warmups if steps is not None),
    )


def train_arm(
    job: Job, shared: Shared, config: Config, rows: list[dict[str, Any]], facts: Mapping[str, Any]
) -> None:
    """Train one arm and leave its folder; the guard's model is afterwards what it was."""
    args, encoder, trunk = training_arguments(job, config), shared.encoder, shared.trunk
    add_reference(job, rows, shared)
    logger.info("Rows: %s", json.dumps(facts))
    base = encoder.guard.model.model
    if trunk is not None:
        trunk.learn(rows)
    set_seed(job.seed)
    model = add_adapters(base, config)
    with trunk.replaced() if trunk else nullcontext():
        weight = config.training.kl_weight if job.arm.kl else 0.0
        trainer = fitted(model, args, rows, encoder, weight, trunk.batch if trunk else None)
    state_dict = full_state_dict(trainer)  # collective
    if is_main_process():
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        quantized = config.llama_guard.load_in_4bit
        with whole_folder(job.folder) as folder:
            save_adapter(unwrapped, state_dict, encoder.tokenizer, folder)
            describe(job, config, {**facts, "log": trainer.state.log_history}, folder)
            add_probe(folder, arm_card(job, config), load_in_4bit=True if quantized else None)
        job.close()
    trainer.accelerator.wait_for_everyone()
    model.unload()
    base.__dict__.pop("forward", None)  # TRL's, wrapped around the one before with every trainer


def fitted(
    model: nn.Module,
    args: ArmConfig,
    rows: list[dict[str, Any]],
    encoder: Encoder,
    kl_weight: float = 0.0,
    collator: Callable | None = None,
) -> ArmTrainer:
    """A trainer that has trained `model` on encoded rows, from its last checkpoint where args say
    so.
    """
    checkpoint = checkpoint_to_resume(args)
    trainer = ArmTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        data_collator=collator or collator_for(model),
        processing_class=encoder.tokenizer,
    )
    trainer.words, trainer.tokens, trainer.kl_weight = encoder.words, encoder.tokens, kl_weight
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated ones are averaged
    if checkpoint is None:
        start_over(args)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def _fit_probe(job: Job, guard: GenerativeGuard, config: Config) -> None:
    job.resumes()
    if is_main_process():
        with whole_folder(job.folder) as folder:
            facts = fit_probe(guard, job.rows, folder, job.seed)
            describe(job, config, facts | {"rows": len(job.rows)}, folder)
            write_card(folder, arm_card(job, config))
        job.close()


def arm_card(job: Job, config: Config) -> GenerativeCard | LinearProbeCard:
    """What load_guard needs, and what the arm is."""
    base = config.llama_guard.base_model_path
    origin = {"base_model": base, "base_sha256": local_sha256(base)}
    origin |= {"arm": job.arm.name, "seed": job.seed, "fingerprint": job.fingerprint}
    if job.arm.probe:
        return LinearProbeCard(**origin)
    name = read_card(base, GenerativeCard).guard if has_card(base) else zoo_name(base)
    return GenerativeCard(guard=name, max_length=config.training.max_length, **origin)


def describe(job: Job, config: Config, facts: Mapping[str, Any], folder: Path) -> None:
    """training_examples.jsonl, run.json and README.md (the model card)."""
    write_text(folder / "training_examples.jsonl", json_lines(row.as_dict() for row in job.rows))
    settings = {
        "training": config.training.model_dump(mode="json"),
        "llama_guard": config.llama_guard.model_dump(),
    }
    run = manifest([settings], seed=job.seed, arm=asdict(job.arm), **facts)
    write_json(folder / "run.json", run)
    if job.arm.probe:
        return
    base, sources = public_name(config.llama_guard.base_model_path), facts["sources"]
    write_model_card(
        folder,
        title=f"Arm {job.arm.name}, seed {job.seed}",
        base_model=config.llama_guard.base_model_path,
        train_data=[],  # rows of the guard's own making
        adapter=True,
        task="text-generation",
        intro=f"A LoRA adapter of {base}, trained by `examples/feedback_guard/train.py` on prompts that it passed and "
        f"whose responses it then blocked. {job.arm.name} asks: {job.arm.question}",
        usage=CARD_USAGE.format(base=base),
        sections={
            "Rows": report.table(list(sources.items()), ["source", "rows"]),
            "Limits": "Nothing was measured here; see the results of evaluate.py. The labels are the guard's own. A "
            "guard that was trained on sample data shows that the recipe runs, not that the guard is good.",
        },
    )


CARD_USAGE = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model, tokenizer = AutoPeftModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
# or, with its verdicts read: guards.load_guard("{base}", adapter=".")"""


if __name__ == "__main__":
    run_cli(main)
