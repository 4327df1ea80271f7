"""Train the arms: adapters of the guard that learn from prompts whose responses it blocked.

    ./run_experiment.sh train                          # the quickstart's arms, after process
    ./run_experiment.sh train research_config.json     # the original's values
    python train.py prepare --config F.json            # the small guards of the section `prepare`

arms.yaml says what each arm trains on. An arm that is there already is not trained again, and one
that was killed goes on from its last checkpoint. Loss of a row: soft cross-entropy on the verdict
word, the rest of the line where it is known, and for safe traffic training.kl_weight times
KL(guard before training || now) on {safe, unsafe}.
"""

import json
import logging
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from config import Config, PrepareGuard, config_from_argv
from datasets import Dataset
from guard import (
    NOTHING,
    Encoder,
    example,
    legacy_reason,
    legacy_safe,
    load_llama_guard,
    padded_batch,
    read,
    template,
    text_row,
    training_texts,
    verdict_loss,
    verdict_probabilities,
    verdict_states,
)
from peft import prepare_model_for_kbit_training
from records import (
    Row,
    check_stage,
    feedback,
    passed,
    q,
    read_blocked,
    read_processed,
    refused,
    stage_key,
    text_key,
    write_stage,
)
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, SFTConfig

from common import keep, metrics, report
from common.bundled import public_name, resolve_model
from common.conversation import Messages, UserError, pair
from common.data import load_conversations, prompt_key
from common.data.specs import about_data
from common.fit import check_ids, check_length, fit_causal_lm
from common.hub import check_push, push_finished
from common.model_card import Measured, write_model_card
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
from common.saving import check_equal, full_state_dict, save_adapter, save_model, whole_folder
from common.training import (
    AnswerTrainer,
    RecipeTrainingArguments,
    answers_loss,
    checkpoint_to_resume,
    checkpoints,
    start_over,
    with_adapters,
)
from guards import add_probe, zoo
from guards.card import (
    TOLERANCE,
    GenerativeCard,
    LinearProbeCard,
    has_card,
    local_sha256,
    read_card,
    write_card,
)
from guards.generative import GenerativeGuard
from guards.known import zoo_name

logger = logging.getLogger("feedback_guard")
HARD = 0.1  # P(unsafe) from which a harmless prompt is a hard one
ALIKE = 8  # prompts of like score and length, among which C1 permutes what responses say
WORD_OF = {"guard": "the guard itself", "judge": "another guard", "human": "people"}
PENALTY = 100.0  # of the probe, which has more dimensions than rows
# the original's
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HELD_OUT = 0.15  # of a small guard's prompts, for its threshold
SMALL_GUARD_LENGTH = 2048


# --- the arms -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """What arms.yaml says of an arm."""

    name: str
    question: str
    # how it is asked: guard, or the original's chatml and meta, whose answers are parsed
    query: str = "guard"
    parser: str = "correct"  # of such answers: strict (the original's rule) or correct
    weights_of: str | None = None  # it needs no training: the weights of that arm, asked otherwise
    probe: bool = False  # no fine-tuning: a logistic probe on the frozen guard
    learning_rate: float | None = None  # None: the config's
    warmup_steps: float | None = None  # None: the config's
    # an arm of the original's texts
    texts: bool = False
    collection: str = "correct"  # who found its blocked prompts: legacy (the original's checks)
    loss: str = "answer"  # of texts: all or answer
    augment: bool = False
    # an arm of rows in the guard's own format
    feedback: str = "outputs"  # which prompts are the unsafe ones: see `told_prompts`
    safe: bool = False
    replay: float = 0.0  # rows of the guard's own decisions for each feedback row
    hard_benign: bool = False
    explored: bool = False
    kl: bool = False
    soft: bool = False


@cache
def all_arms() -> dict[str, Arm]:
    """The arms of arms.yaml by name, in its order."""
    path = Path(__file__).with_name("arms.yaml")
    described = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: Arm(name=name, **values) for name, values in described.items()}


def arm_named(name: str) -> Arm:
    """An arm by its name. Raises UserError when there is none."""
    if name not in all_arms():
        raise UserError(f"training.arms: {name!r} is none of {', '.join(all_arms())}")
    return all_arms()[name]


def arm_folder(config: Config, name: str, seed: int) -> Path:
    """Where the weights of an arm lie, or those that it borrows."""
    owner = arm_named(name).weights_of or name
    return Path(config.training.output_dir) / owner / f"seed{seed}"


# --- the rows of an arm ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingRow:
    """One row to train on. Of the original's texts the text is trained, else the prompt."""

    id: str
    prompt: str
    target: float  # probability of unsafe
    source: str  # feedback | safe | replay | hard_benign | explored | human
    categories: list[str] | None = None
    kl: bool = False
    text: Any = field(default=None, compare=False)

    @property
    def messages(self) -> Messages:
        return pair(self.prompt)

    def as_dict(self) -> Row:
        """The row as a line of training_examples.jsonl."""
        found = {name: getattr(self, name) for name in ("id", "messages", "target", "source", "kl")}
        found["categories"] = self.categories
        if self.text is not None:
            found["text"] = "".join(part.text for part in self.text.parts) + self.text.answer
        return found


@dataclass(frozen=True)
class Told:
    """A prompt, and what an arm is told that its responses say of it."""

    id: str
    query: str
    score: float  # P(unsafe) of the prompt before training
    q: float  # the share of unsafe responses
    refused: bool
    categories: list[str] | None = None
    source: str = "feedback"


def build_rows(
    arm: Arm, processed: Sequence[Row], blocked: Sequence[Row], seed: int, config: Config
) -> list[TrainingRow]:
    """The rows of an arm. No prompt is in both classes, but where the original's texts contradict
    one another.

    Args:
        processed: lines of processed/<process_split>.jsonl.
        blocked: lines of blocked_inputs.jsonl.

    Raises:
        UserError: no prompt passed whose responses were blocked, or process ran without an arm
            that needs the original's checks.
    """
    store = config.dataset.store_dir
    if not any(feedback(row) for row in processed):
        raise UserError(
            f"{store}: none of {len(processed)} prompts passed the guard and had its responses "
            "blocked: there is nothing to learn from; process more prompts, or another "
            "assistant's responses"
        )
    if arm.collection == "legacy" and any(row["legacy"] is None for row in processed):
        raise UserError(
            f"{store}: the guard was not asked there as the original asks it; run process again, "
            f"with {arm.name} in training.arms"
        )
    if arm.texts:
        return rows_of_texts(arm, processed, blocked, seed)
    return rows_of_guard(arm, processed, seed, config)


def rows_of_guard(
    arm: Arm, processed: Sequence[Row], seed: int, config: Config
) -> list[TrainingRow]:
    """Rows in the guard's own format; arms of one seed draw the same safe and replayed prompts."""
    told = told_prompts(arm, processed, seed, config)
    rows: dict[str, TrainingRow] = {}  # each prompt once, whatever its case and spacing

    def add(some: Iterable[TrainingRow], most: float = math.inf) -> None:
        end = len(rows) + most
        for row in some:
            if len(rows) < end:
                rows.setdefault(text_key(row.prompt), row)

    add(_row(one, one.q if arm.soft else 1.0, one.source) for one in told if one.q >= 0.5)
    count = len(rows)
    harmless = [one for one in told if one.q == 0 and not one.refused]
    if arm.hard_benign:
        hard = [one for one in harmless if one.score >= HARD]
        hard.sort(key=lambda one: (-one.score, one.id))
        add((_row(one, 0.0, "hard_benign") for one in hard), count)
    if arm.explored:
        wrongly_blocked = [row for row in processed if row["shadow"] and q(row) == 0]
        free = [row for row in wrongly_blocked if not _refused(row, config)]
        add(TrainingRow(row["id"], row["query"], 0.0, "explored") for row in free)
    if arm.safe:
        pool = harmless
        if arm.soft:
            pool = [one for one in told if 0 < one.q < 0.5 or one in harmless]
        wanted = round(config.training.safe_ratio * count)
        some = _shuffled(pool, seed, "safe")
        add((_row(one, one.q if arm.soft else 0.0, "safe", arm.kl) for one in some), wanted)
    if arm.replay:
        add(replayed(arm, processed, told, set(rows), round(arm.replay * count), seed))
    return list(rows.values())


def _row(one: Told, target: float, source: str, kl: bool = False) -> TrainingRow:
    categories = one.categories if target >= 0.5 else None
    return TrainingRow(one.id, one.query, float(target), source, categories, kl)


def _refused(row: Row, config: Config) -> bool:
    return config.experiment.refusal_filter and refused(row)


def _shuffled(rows: Sequence[Any], seed: int, what: str) -> list[Any]:
    """In an order that depends on the seed and on what the rows are for, not on the arm."""
    return random.Random(f"{seed} {what}").sample(list(rows), len(rows))


def told_prompts(arm: Arm, processed: Sequence[Row], seed: int, config: Config) -> list[Told]:
    """The prompts that passed, with what the arm is told of their responses.

    outputs: what they say. permuted: what those of a prompt alike in score and length say (C1).
    suspicious: as many prompts as have unsafe responses, those of the highest score, are the unsafe
    ones (C2). human: as many prompts that people call unsafe are, those that passed first (C3).
    """
    rows = [row for row in processed if passed(row) and not row["shadow"] and q(row) is not None]
    told = []
    for row in rows:
        score = row["input_unsafe"] or 0.0
        refusal = _refused(row, config)
        told.append(Told(row["id"], row["query"], score, q(row), refusal, unsafe_categories(row)))
    count = sum(one.q >= 0.5 for one in told)
    if arm.feedback == "permuted":
        return permuted(told, seed)
    if arm.feedback == "suspicious":
        by_score = sorted(told, key=lambda one: (-one.score, one.id))
        first = {one.id for one in by_score[:count]}
        return [
            replace(one, q=float(one.id in first), refused=False, categories=None) for one in told
        ]
    if arm.feedback == "human":
        bad = _shuffled([row for row in processed if row["human_unsafe"]], seed, "human")
        bad.sort(key=lambda row: not passed(row))
        unsafe = [
            Told(row["id"], row["query"], row["input_unsafe"] or 0.0, 1.0, False, None, "human")
            for row in bad[:count]
        ]
        harmless = {row["id"] for row in rows if row["human_unsafe"] is False}
        safe = [one for one in told if one.id in harmless]
        return unsafe + [replace(one, q=0.0, refused=False, categories=None) for one in safe]
    return told


def unsafe_categories(row: Row) -> list[str] | None:
    """The categories that the guard named of a prompt's unsafe responses; None where it named none."""
    unsafe = [response for response in row["responses"] if response["decided"]]
    named = {name for response in unsafe for name in response.get("categories") or ()}
    return sorted(named) or None


def permuted(told: Sequence[Told], seed: int) -> list[Told]:
    """What is told, exchanged within blocks of prompts of like score (fifths) and like length."""
    by_score = sorted(told, key=lambda one: (one.score, one.id))
    fifth = {one.id: place * 5 // len(told) for place, one in enumerate(by_score)}
    order = sorted(told, key=lambda one: (fifth[one.id], len(one.query), one.id))
    rng = random.Random(f"{seed} permuted")
    out = []
    for start in range(0, len(order), ALIKE):
        block = order[start : start + ALIKE]
        for one, other in zip(block, rng.sample(block, len(block)), strict=True):
            said = {name: getattr(other, name) for name in ("q", "refused", "categories")}
            out.append(replace(one, **said))
    return out


def replayed(
    arm: Arm,
    processed: Sequence[Row],
    told: Sequence[Told],
    taken: set[str],
    count: int,
    seed: int,
) -> list[TrainingRow]:
    """The guard's own decisions on other prompts, in the proportion that traffic has, and at least
    one of each class.

    A prompt that passed and whose responses refuse, or are unsafe, is none of them: the decision
    may be wrong. A control knows of this what it was told, and no more.
    """
    doubted = {one.id for one in told if one.q > 0 or one.refused}
    decided: dict[bool, list[Row]] = {True: [], False: []}
    for row in _shuffled(processed, seed, "replay"):
        wrong = arm.feedback == "outputs" and row["shadow"] and q(row) == 0
        free = row["input_error"] is None and text_key(row["query"]) not in taken
        if free and not wrong and row["id"] not in doubted:
            decided[row["input_decided"]].append(row)
    share = sum(bool(row["input_decided"]) for row in processed) / len(processed)
    unsafe = decided[True][: max(1, round(share * count))]
    safe = decided[False][: max(0, count - len(unsafe))]
    return [
        TrainingRow(
            row["id"],
            row["query"],
            float(row["input_decided"]),
            "replay",
            kl=arm.kl and not row["input_decided"],
        )
        for row in unsafe + safe
    ]


def legacy_blocked(processed: Sequence[Row]) -> dict[str, str]:
    """What the original would have collected, by its own checks: id and reason. It asks for one
    response a prompt.
    """
    found = {}
    for row in processed:
        said = row["legacy"]
        if said and said["outputs"] and legacy_safe(said["input"]):
            output = said["outputs"][0]
            if not legacy_safe(output):
                found[row["id"]] = legacy_reason(output)
    return found


def rows_of_texts(
    arm: Arm, processed: Sequence[Row], blocked: Sequence[Row], seed: int
) -> list[TrainingRow]:
    """The original's texts. Where its own checks collect nothing, it gets the correct list."""
    found = {row["id"]: row["reason"] for row in blocked}
    if arm.collection == "legacy":
        collected = legacy_blocked(processed)
        if not collected:
            what = "the original's checks collect nothing here; it gets the correct list"
            logger.warning("%s: %s", arm.name, what)
        found = collected or found
    prompts = {row["id"]: row["query"] for row in processed}
    reasons = {row_id: reason for row_id, reason in found.items() if row_id in prompts}
    bad = [example(row_id, prompts[row_id], reason) for row_id, reason in reasons.items()]
    harmless = [row for row in processed if row["human_unsafe"] is False]
    if arm.collection == "correct":
        known = {text_key(one.prompt) for one in bad}
        harmless = [row for row in processed if passed(row) and q(row) == 0]
        harmless = [row for row in harmless if text_key(row["query"]) not in known]
    first = harmless[: min(len(bad), len(processed) // 2)]  # as they come
    good = [example(row["id"], row["query"], None) for row in first]
    texts = training_texts([*bad, *good], seed, augment=arm.augment, shuffle=arm.augment)
    return [
        TrainingRow(
            text.id,
            prompts[text.id],
            float(text.unsafe),
            "feedback" if text.id in reasons else "safe",
            text=text,
        )
        for text in texts
    ]


# --- training -------------------------------------------------------------------------------------


@dataclass
class ArmArguments(RecipeTrainingArguments, SFTConfig):
    """TRL's arguments with what this collection adds to transformers'."""

    goes_on_with = ()  # the same command does
    starts_over_with = "another output_dir"


class ArmTrainer(AnswerTrainer):
    """A trainer with the loss of a guard; of the original's texts, with that of their tokens."""

    encoder: Encoder
    kl_weight = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over rows; over tokens for the original's texts."""
        answers = read(model, inputs)
        if inputs["target"].min() == NOTHING:
            loss = answers_loss(answers)
        else:
            words, tokens = self.encoder.words, self.encoder.tokens
            loss = verdict_loss(answers, inputs, words, tokens, self.kl_weight)
        return (loss, answers.outputs) if return_outputs else loss


def main() -> None:
    if "prepare" in sys.argv[1:2]:
        del sys.argv[1]
        prepare(config_from_argv(__doc__))
    else:
        train(config_from_argv(__doc__))


def train(config: Config) -> list[Path]:
    """Train every arm and seed of the config; their folders.

    Raises:
        UserError: nothing was processed, or with other settings; nothing to learn from; a folder
            with another arm; a training that diverged.
    """
    check_output_folder(config.training.output_dir)
    for name in config.training.arms:
        for seed in config.training.seeds_of(name):
            if is_pushed(arm_named(name), config):
                check_push(push_arguments(name, seed, config))
    processed = read_processed(config, config.experiment.process_split)
    blocked = read_blocked(config)
    folders = []
    for name in config.training.arms:
        for seed in config.training.seeds_of(name):
            arm = arm_named(name)
            folder = arm_folder(config, name, seed)
            folders.append(folder)
            if arm.weights_of is None and not is_trained(folder, config, arm, seed):
                rows = build_rows(arm, processed, blocked, seed, config)
                logger.info("%s, seed %d: %s", name, seed, arm.question)
                steps = step_budget(arm, processed, blocked, config)
                train_arm(arm, seed, rows, steps, config)
            if is_pushed(arm, config):
                push_finished(push_arguments(name, seed, config))
    return folders


def is_pushed(arm: Arm, config: Config) -> bool:
    """Whether the hub gets an arm: adapters of its own, if training.push_to_hub asks for it."""
    return config.training.push_to_hub and not arm.probe and arm.weights_of is None


def push_arguments(name: str, seed: int, config: Config) -> ArmArguments:
    """Which repository an arm has on the hub, and what may happen there."""
    values = config.training
    family = values.hub_model_id or Path(values.output_dir).resolve().name
    return arguments_for(
        arm_folder(config, name, seed),
        push_to_hub=True,
        hub_model_id=f"{family}-{name}-seed{seed}",
        hub_private_repo=values.hub_private_repo,
        hub_overwrite=values.hub_overwrite,
    )


def is_trained(folder: Path, config: Config, arm: Arm, seed: int) -> bool:
    """Whether an arm is there.

    Raises:
        UserError: it was trained on other rows or with other settings.
    """
    if not has_card(folder):
        return False
    check_stage(folder / "stage.json", config, "train", asdict(arm), seed)
    return True


def step_budget(arm: Arm, processed: Sequence[Row], blocked: Sequence[Row], config: Config) -> int:
    """Optimizer steps: max_steps, else the epochs over the rows of A8, the same for every arm.

    The original's texts keep its own rule, -1: the epochs over their own rows.
    """
    values = config.training
    if values.max_steps > 0 or arm.texts:
        return values.max_steps
    rows = build_rows(arm_named("A8"), processed, blocked, values.seeds[0], config)
    rows_a_step = values.batch_size * values.gradient_accumulation_steps
    return math.ceil(values.epochs * len(rows) / rows_a_step)


def load_base(config: Config) -> GenerativeGuard:
    """The guard that is trained, its model ready for adapters."""
    section = config.llama_guard
    options = {"load_in_4bit": True} if section.load_in_4bit else {}
    loaded = load_llama_guard(
        section.base_model_path, section.use_official_template, progress=False, **options
    )
    if section.load_in_4bit:
        loaded.model.model = prepare_model_for_kbit_training(loaded.model.model)
    return loaded


def train_arm(arm: Arm, seed: int, rows: Sequence[TrainingRow], steps: int, config: Config) -> None:
    """Train one arm and leave its folder. Its card is written last: with it, the arm is done."""
    folder = arm_folder(config, arm.name, seed)
    base = load_base(config)
    if arm.probe:
        save_probe(base, arm, seed, rows, config)
        return
    encoder = Encoder(base, config.training.max_length)
    encoded, facts = encode_rows(arm, rows, encoder, config)
    logger.info("Rows: %s", json.dumps(facts))
    set_seed(seed)
    args = arm_arguments(arm, seed, steps, config)
    adapted = add_adapters(base.model.model, config)
    kl_weight = config.training.kl_weight if arm.kl else 0.0
    settings = {"stage": stage_key(config, "train", asdict(arm), seed)}
    trainer = fit(adapted, args, encoded, encoder, settings, kl_weight)
    state_dict = full_state_dict(trainer)  # collective
    if is_main_process():
        with whole_folder(folder) as partial:
            trained = trainer.accelerator.unwrap_model(trainer.model)
            save_adapter(trained, state_dict, encoder.tokenizer, partial)
            facts["log"] = trainer.state.log_history
            facts["steps"] = trainer.state.global_step
            describe(arm, seed, rows, facts, config, partial)
            quantized = config.llama_guard.load_in_4bit or None
            add_probe(partial, arm_card(arm, seed, config), load_in_4bit=quantized)
        start_over(args)  # the checkpoints go
    trainer.accelerator.wait_for_everyone()


def encode_rows(
    arm: Arm, rows: Sequence[TrainingRow], encoder: Encoder, config: Config
) -> tuple[list[Row], dict[str, Any]]:
    """The rows as token ids, with P(unsafe) before training where it is held; and their facts."""
    model = encoder.guard.model.model
    limit = config.training.max_length
    check_length(model, limit, "training.max_length")
    if arm.texts:
        encoded = [
            text_row(encoder.tokenizer, row.text.parts, row.text.answer, arm.loss, limit)
            for row in rows
        ]
        cut = sum(len(row["input_ids"]) == limit for row in encoded)
    else:
        encoded, cut = encoder.rows(
            [row.messages for row in rows],
            [row.target for row in rows],
            [row.categories for row in rows],
        )
    check_ids([row["input_ids"] for row in encoded], encoder.tokenizer, model)
    held = [one for one, row in zip(encoded, rows, strict=True) if row.kl]
    prompts = [one["input_ids"][: one["labels"].count(-100)] for one in held]
    for one in encoded:
        one["g0"] = NOTHING
    before = verdict_probabilities(model, prompts, encoder.tokens)
    for one, probability in zip(held, before, strict=True):
        one["g0"] = probability
    facts = {
        "rows": len(rows),
        "sources": dict(Counter(row.source for row in rows)),
        "target_mean": round(sum(row.target for row in rows) / len(rows), 4),
        "tokens": sum(len(one["input_ids"]) for one in encoded),
        "shortened_rows": cut,
    }
    return encoded, facts


def arm_arguments(arm: Arm, seed: int, steps: int, config: Config) -> ArmArguments:
    """The config's values as TRL's."""
    values = config.training
    # an arm's own, else that of all arms, else the original's
    rates = arm.learning_rate, values.arms_learning_rate, values.learning_rate
    warmups = arm.warmup_steps, values.arms_warmup_steps, values.warmup_steps
    return arguments_for(
        arm_folder(config, arm.name, seed),
        max_steps=steps,
        num_train_epochs=values.epochs,
        per_device_train_batch_size=values.batch_size,
        gradient_accumulation_steps=values.gradient_accumulation_steps,
        learning_rate=first_given(rates),
        warmup_steps=first_given(warmups),
        weight_decay=values.weight_decay,
        logging_steps=values.logging_steps,
        report_to=values.report_to,
        save_steps=values.save_steps,
        save_total_limit=values.save_total_limit,
        gradient_checkpointing=config.llama_guard.load_in_4bit,
        seed=seed,
    )


def first_given(values: Iterable[float | None]) -> float:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def arguments_for(folder: Path, **values: Any) -> ArmArguments:
    """TRL's arguments for rows that are encoded already; a killed run goes on."""
    return ArmArguments(
        output_dir=str(folder),
        lr_scheduler_type="cosine",
        bf16=inference_dtype() == torch.bfloat16,
        max_length=None,  # the encoder has seen to it
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        disable_tqdm=not logger.isEnabledFor(logging.INFO),
        resume_from_checkpoint="latest" if checkpoints(folder) else None,
        **values,
    )


def add_adapters(model: nn.Module, config: Config) -> nn.Module:
    """LoRA over the frozen model, in the last `lora_last_layers` layers or in all."""
    values = config.training
    count = model.config.get_text_config().num_hidden_layers
    layers = None
    if values.lora_last_layers is not None:
        layers = list(range(max(0, count - values.lora_last_layers), count))
    asked = ModelConfig(
        use_peft=True,
        lora_r=values.lora_r,
        lora_alpha=values.lora_alpha,
        lora_dropout=values.lora_dropout,
        lora_target_modules=list(MODULES),
    )
    return with_adapters(model, asked, config.llama_guard.base_model_path, layers)


def fit(
    model: nn.Module,
    args: ArmArguments,
    rows: list[Row],
    encoder: Encoder,
    settings: Mapping[str, Any],
    kl_weight: float = 0.0,
) -> ArmTrainer:
    """A trainer that has trained `model`, from its last checkpoint where there is one.

    Args:
        settings: what else makes another run; the checkpoint is compared with it.
    """
    checkpoint = checkpoint_to_resume(args)
    trainer = ArmTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        data_collator=padded_batch,
        processing_class=encoder.tokenizer,
        settings=settings,
    )
    trainer.encoder = encoder
    trainer.kl_weight = kl_weight
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated ones are averaged
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


# --- what an arm leaves ---------------------------------------------------------------------------


def arm_card(arm: Arm, seed: int, config: Config) -> GenerativeCard | LinearProbeCard:
    """What load_guard needs, which arm it is, and the key of all that it was made with."""
    base = config.llama_guard.base_model_path
    origin = {
        "base_model": base,
        "base_sha256": local_sha256(base),
        "arm": arm.name,
        "seed": seed,
        "fingerprint": stage_key(config, "train", asdict(arm), seed),
    }
    if arm.probe:
        return LinearProbeCard(**origin)
    name = read_card(base, GenerativeCard).guard if has_card(base) else zoo_name(base)
    return GenerativeCard(guard=name, max_length=config.training.max_length, **origin)


def describe(
    arm: Arm,
    seed: int,
    rows: Sequence[TrainingRow],
    facts: Mapping[str, Any],
    config: Config,
    folder: Path,
) -> None:
    """training_examples.jsonl, run.json and README.md (the model card)."""
    write_text(folder / "training_examples.jsonl", json_lines(row.as_dict() for row in rows))
    settings = {
        "training": config.training.model_dump(),
        "llama_guard": config.llama_guard.model_dump(),
    }
    run = manifest([settings], seed=seed, arm=asdict(arm), **facts)
    write_json(folder / "run.json", run)
    write_stage(folder / "stage.json", config, "train", asdict(arm), seed)
    if arm.probe:
        return
    base = public_name(config.llama_guard.base_model_path)
    blocked_by = WORD_OF[config.experiment.blocked_by]
    write_model_card(
        folder,
        title=f"Arm {arm.name}, seed {seed}",
        base_model=config.llama_guard.base_model_path,
        train_data=[],  # rows of the guard's own making
        adapter=True,
        task="text-generation",
        intro=f"A LoRA adapter of {base}, trained by `examples/feedback_guard/train.py` on prompts "
        f"that it passed and whose responses {blocked_by} then blocked. {arm.name} asks: {arm.question}",
        usage="import guards\n\n"
        f'guard = guards.load_guard("{base}", adapter=".")  # AutoPeftModelForCausalLM loads it, too',
        sections={
            "Rows": report.table(list(facts["sources"].items()), ["source", "rows"]),
            "Limits": "Nothing was measured here; see the results of evaluate.py. The labels of "
            f"responses are those of {blocked_by}.",
        },
    )


# --- arm C4: a logistic probe on the state that the frozen guard reads its verdict from -----------


def save_probe(
    base: GenerativeGuard, arm: Arm, seed: int, rows: Sequence[TrainingRow], config: Config
) -> None:
    """Fit a probe to the rows' targets and leave its folder with probe.json.

    A target between 0 and 1 counts in both classes, with its weight.

    Raises:
        UserError: the rows have one class only.
    """
    folder = arm_folder(config, arm.name, seed)
    prompts = base.prompt_ids([row.messages for row in rows])
    states = verdict_states(base.model.model, prompts).double().numpy()
    mean = states.mean(0)
    scale = np.maximum(states.std(0), 1e-6)
    target = np.array([row.target for row in rows])
    if not 0 < target.sum() < len(target):
        raise UserError(f"{folder}: the probe's rows are all of one class")
    twice = np.tile((states - mean) / scale, (2, 1))
    labels = np.repeat([True, False], len(rows))
    weights = np.concatenate([target, 1 - target])
    counts = weights > 0
    fitted = LogisticRegression(C=1 / PENALTY, max_iter=1000, random_state=seed)
    fitted.fit(twice[counts], labels[counts], weights[counts])
    probe = {
        "mean": mean.tolist(),
        "scale": scale.tolist(),
        "weights": fitted.coef_[0].tolist(),
        "bias": float(fitted.intercept_[0]),
    }
    if is_main_process():
        with whole_folder(folder) as partial:
            write_json(partial / "probe.json", probe)
            sources = dict(Counter(row.source for row in rows))
            facts = {"rows": len(rows), "sources": sources, "penalty": PENALTY}
            describe(arm, seed, rows, facts, config, partial)
            write_card(partial, arm_card(arm, seed, config))


def probe_scores(
    base: GenerativeGuard, folder: Path, conversations: Sequence[Messages]
) -> list[float]:
    """P(unsafe) of each by the probe in `folder`, read from the guard that it was fitted on."""
    probe = json.loads((folder / "probe.json").read_text(encoding="utf-8"))
    states = verdict_states(base.model.model, base.prompt_ids(conversations)).double().numpy()
    scaled = (states - np.array(probe["mean"])) / np.array(probe["scale"])
    odds = scaled @ np.array(probe["weights"]) + probe["bias"]
    return (1 / (1 + np.exp(-odds))).tolist()


# --- prepare: a small model becomes a guard before anything else ----------------------------------


@dataclass(frozen=True)
class Check:
    """A conversation whose last turn is labelled."""

    messages: Messages
    label: str  # prompt_unsafe or response_unsafe
    unsafe: bool
    categories: list[str] | None


def prepare(config: Config) -> None:
    """Make the guards of the section `prepare` that are not there yet."""
    for section in config.prepared().values():
        make_guard(section)


def make_guard(section: PrepareGuard) -> None:
    """Fine-tune a model to write safe or unsafe, in the Llama Guard 1 format.

    Raises:
        UserError: bad data, a test split, a base that cannot be loaded, or a folder with another
            guard.
    """
    check_output_folder(section.output_dir)
    folder = Path(section.output_dir)
    checks = read_checks(section.data)
    settings = section.model_dump(mode="json") | {
        "output_dir": None,
        "base_model": None,
        "held_out": HELD_OUT,
    }
    content = keep.fingerprint(section.base_model), [asdict(check) for check in checks]
    key = keep.digest([settings, content, template()])
    if has_card(folder):
        card = read_card(folder)
        if not isinstance(card, GenerativeCard) or card.fingerprint != key:
            raise UserError(
                f"{folder}: holds another guard; remove it, or choose another output_dir in prepare"
            )
        logger.info("%s: there already", folder)
        return
    learned, held_out = split_checks(checks, section.seed)
    encoder = load_encoder(section.base_model, folder)
    rows, cut = encoder.rows(
        [check.messages for check in learned],
        [float(check.unsafe) for check in learned],
        [check.categories for check in learned],
    )
    facts = {"rows": len(rows), "held_out": len(held_out), "shortened_rows": cut}
    logger.info("Making a guard of %s: %s", section.base_model, json.dumps(facts))
    set_seed(section.seed)
    model = trainable(encoder.guard.model.model, section.last_layers)
    args = arguments_for(
        folder,
        max_steps=section.max_steps,
        per_device_train_batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        logging_steps=5,
        save_steps=max(20, section.max_steps // 4),
        save_total_limit=1,
        gradient_checkpointing=False,
        seed=section.seed,
    )
    trainer = fit(model, args, rows, encoder, {"guard": key})
    facts["log"] = trainer.state.log_history
    state_dict = full_state_dict(trainer)  # collective
    if is_main_process():
        save_guard(encoder, held_out or learned, state_dict, section, key, facts)
        start_over(args)
    trainer.accelerator.wait_for_everyone()


def trainable(model: nn.Module, last_layers: int | None) -> nn.Module:
    """The model with all weights to be trained, or the last layers' and the final norm's."""
    model = model.float().requires_grad_(last_layers is None)
    if last_layers is not None:
        for part in (*model.model.layers[-last_layers:], model.model.norm):
            part.requires_grad_(True)
    return model


def read_checks(specs: Sequence[str]) -> list[Check]:
    """Of each row its prompt where that is labelled, and its response where that one is.

    Raises:
        UserError: a test split, bad rows, or labels of one class alone.
    """
    out = []
    for spec in specs:
        if metrics.is_test(spec):
            hint = "is a test set; a guard is not trained on one"
            raise UserError(f"prepare, field data: {spec} {hint}")
        for row in load_conversations(spec):
            messages = row["messages"]
            answered = messages[-1]["role"] == "assistant"
            asked = messages[:-1] if answered else messages
            for part, label in ((asked, "prompt_unsafe"), (messages, "response_unsafe")):
                there = answered if label == "response_unsafe" else bool(asked)
                if there and row[label] is not None:
                    out.append(Check(part, label, row[label], row["categories"]))
    if len({check.unsafe for check in out}) < 2:
        names = ", ".join(specs)
        raise UserError(f"prepare, field data: {names}: a guard needs safe and unsafe labels")
    return out


def split_checks(checks: Sequence[Check], seed: int) -> tuple[list[Check], list[Check]]:
    """Checks to learn and checks held out, all of one prompt on one side."""
    keys = [prompt_key({"messages": check.messages}) for check in checks]
    order = sorted(set(keys))
    random.Random(seed).shuffle(order)
    held = set(order[: round(HELD_OUT * len(order))])
    sides: dict[bool, list[Check]] = {True: [], False: []}
    for check, key in zip(checks, keys, strict=True):
        sides[key in held].append(check)
    return sides[False], sides[True]


def load_encoder(base_model: str, folder: Path) -> Encoder:
    """The base behind the guard's prompt; its tokenizer, with that for chat template, is saved in
    `folder`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(base_model))
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"prepare, field base_model: {base_model}: {why:.200}") from None
    if tokenizer.eos_token_id is None:
        hint = "has no EOS; verdicts would not end"
        raise UserError(f"prepare, field base_model: the tokenizer of {base_model} {hint}")
    tokenizer.chat_template = template()
    tokenizer.save_pretrained(folder)
    entry = {**zoo()["llama-guard"], "tokenizer": str(folder)}
    model = resolve_model(base_model)
    loaded = GenerativeGuard(model, entry, max_length=SMALL_GUARD_LENGTH, progress=False)
    fit_causal_lm(loaded.tokenizer, loaded.model.model)
    return Encoder(loaded, SMALL_GUARD_LENGTH, always_end=True)


def save_guard(
    encoder: Encoder,
    checks: Sequence[Check],
    state_dict: Mapping[str, torch.Tensor],
    section: PrepareGuard,
    key: str,
    facts: Mapping[str, Any],
) -> None:
    """Thresholds and numbers of the checks held out, the folder, and whether it says what the model
    in memory says.
    """
    model = encoder.guard.model.model
    prompts = encoder.guard.prompt_ids([check.messages for check in checks])
    scores = np.array(verdict_probabilities(model, prompts, encoder.tokens))
    on = f"{HELD_OUT} of {' '.join(section.data)}"
    thresholds, measured = {}, {}
    for label in ("prompt_unsafe", "response_unsafe"):
        here = np.array([check.label == label for check in checks])
        truth = np.array([check.unsafe for check in checks])[here]
        if 0 < truth.sum() < len(truth):
            thresholds[label] = metrics.fit_threshold(truth, scores[here], on)
            measured[label] = metrics.binary(truth, scores[here], thresholds[label]["value"])
    card = GenerativeCard(
        guard="llama-guard",
        max_length=SMALL_GUARD_LENGTH,
        thresholds=thresholds,
        base_model=section.base_model,
        base_sha256=local_sha256(section.base_model),
        fingerprint=key,
    )
    model.config.use_cache = True
    with whole_folder(section.output_dir) as folder:
        save_model(model, state_dict, encoder.tokenizer, folder)
        write_json(
            folder / "run.json",
            manifest([section.model_dump(mode="json")], validation=measured, **facts),
        )
        base = public_name(section.base_model)
        data = ", ".join(about_data(spec)["name"] for spec in section.data)
        write_model_card(
            folder,
            title="A small guard in the Llama Guard 1 format",
            base_model=section.base_model,
            train_data=list(section.data),
            measured=Measured(on, measured) if measured else None,
            task="text-generation",
            intro=f"{base}, fine-tuned on {data} by `examples/feedback_guard/train.py prepare` to "
            "write safe or unsafe on a user's message, or on an agent's response to it.",
            usage='import guards\n\nguard = guards.load_guard(".")',
            sections={"Limits": "A head start for experiments; no guard to rely on."},
        )
        saved = add_probe(folder, card)
        if saved is not None:  # there was memory for it
            again = verdict_probabilities(saved.model.model, prompts[:8], encoder.tokens)
            said = [[{"unsafe": float(p)} for p in some] for some in (scores[:8], again)]
            check_equal(*said, TOLERANCE[saved.dtype])


if __name__ == "__main__":
    run_cli(main)
