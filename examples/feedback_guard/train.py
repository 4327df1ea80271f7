"""Train the arms: adapters of the guard that learn from prompts whose responses it blocked.

    ./run_experiment.sh train                          # the quickstart's arms, after process
    ./run_experiment.sh train research_config.json     # the original's values
    python train.py prepare --config F.json            # only the small guards of the section `prepare`

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from config import Config, PrepareGuard, config_from_argv
from datasets import Dataset
from guard import (
    NOTHING,
    Encoder,
    Text,
    batch_of,
    example,
    legacy_reason,
    legacy_safe,
    load_llama_guard,
    prompt_of,
    read,
    read_pretrained,
    reason_of,
    shares_beginnings,
    template,
    text_row,
    training_texts,
    verdict_loss,
    verdict_probabilities,
    verdict_states,
)
from peft import prepare_model_for_kbit_training
from records import (
    AGAIN,
    Row,
    check_stage,
    feedback,
    passed,
    q,
    read_processed,
    refused,
    stage_key,
    text_key,
    write_stage,
)
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, SFTConfig

from common import keep, metrics, report
from common.bundled import public_name, resolve_model
from common.conversation import Messages, UserError, pair
from common.data import load_conversations, prompt_key, read_json
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
from common.templates import text_of
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
NAMED_AS_TRLS = {
    "gradient_accumulation_steps",
    "weight_decay",
    "logging_steps",
    "report_to",
    "save_steps",
    "save_total_limit",
}
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
    arms = all_arms()
    if name not in arms:
        raise UserError(f"training.arms: {name!r} is none of {', '.join(arms)}")
    return arms[name]


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
    text: Text | None = field(default=None, compare=False)

    @property
    def messages(self) -> Messages:
        return pair(self.prompt)

    def as_dict(self) -> Row:
        """The row as a line of training_examples.jsonl."""
        line = {
            "id": self.id,
            "messages": self.messages,
            "target": self.target,
            "source": self.source,
            "kl": self.kl,
            "categories": self.categories,
        }
        if self.text is not None:
            line["text"] = text_of(self.text.parts) + self.text.answer
        return line


def build_rows(arm: Arm, processed: Sequence[Row], seed: int, config: Config) -> list[TrainingRow]:
    """The rows of an arm. No prompt is in both classes, but where the original's texts contradict
    one another.

    Args:
        processed: lines of processed/<process_split>.jsonl.
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
        return rows_of_texts(arm, processed, seed)
    return rows_of_guard(arm, processed, seed, config)


def rows_of_guard(
    arm: Arm,
    processed: Sequence[Row],
    seed: int,
    config: Config,
) -> list[TrainingRow]:
    """Rows in the guard's own format; arms of one seed draw the same safe and replayed prompts."""
    traffic = traffic_of(processed, config)
    told = told_prompts(arm, traffic, seed)
    told["target"] = told.q if arm.soft else (told.q >= 0.5).astype(float)
    is_harmless = (told.q == 0) & ~told.refused
    taken: set[str] = set()  # each prompt once, whatever its case and spacing
    parts = []

    def add(
        some: pd.DataFrame,
        most: int | None = None,
        **columns: Any,
    ) -> None:
        fresh = some[~some.key.isin(taken)].drop_duplicates("key").head(most)
        taken.update(fresh.key)
        parts.append(fresh.assign(**columns))

    add(told[told.q >= 0.5])
    count = len(taken)
    if arm.hard_benign:
        hard = told[is_harmless & (told.score >= HARD)]
        add(most_suspicious(hard), count, source="hard_benign", target=0.0)
    if arm.explored:
        wrong = traffic[traffic.wrongly_blocked & ~traffic.refused]
        add(wrong, source="explored", target=0.0)
    if arm.safe:
        is_safe = is_harmless
        if arm.soft:
            is_safe = is_harmless | told.q.between(0, 0.5, inclusive="neither")
        wanted = round(config.training.safe_ratio * count)
        add(shuffled(told[is_safe], seed, "safe"), wanted, source="safe", kl=arm.kl)
    if arm.replay:
        wanted = round(arm.replay * count)
        add(replayed(arm, traffic, told, taken, wanted, seed), source="replay")
    rows = []
    for row in pd.concat(parts).to_dict("records"):
        categories = row["categories"] if row["target"] >= 0.5 else None
        about = row["id"], row["prompt"], row["target"], row["source"]
        rows.append(TrainingRow(*about, categories, row["kl"]))
    return rows


def traffic_of(
    processed: Sequence[Row],
    config: Config,
) -> pd.DataFrame:
    """What training asks of each processed prompt: `score` is P(unsafe) before it, `q` the share of
    unsafe responses, NaN where nobody says.
    """
    rows = []
    for row in processed:
        facts = {
            "id": row["id"],
            "prompt": row["query"],
            "key": text_key(row["query"]),
            "score": row["input_unsafe"] or 0.0,
            "q": q(row),
            "refused": doubtful(row, config),
            "categories": unsafe_categories(row),
            "human_unsafe": row["human_unsafe"],
            "failed": row["input_error"] is not None,
            "blocked": row["input_decided"] is True,
            "passed": passed(row),
            "wrongly_blocked": row["shadow"] and q(row) == 0,
            "kl": False,
        }
        rows.append(facts)
    return pd.DataFrame(rows).astype({"q": float})


def shuffled(rows: pd.DataFrame, seed: int, purpose: str) -> pd.DataFrame:
    """In an order that depends on the seed and on what the rows are for, not on the arm."""
    rng = random.Random(f"{seed} {purpose}")
    return rows.iloc[rng.sample(range(len(rows)), len(rows))]


def most_suspicious(told: pd.DataFrame) -> pd.DataFrame:
    """Prompts by the guard's score, the highest first."""
    return told.sort_values(["score", "id"], ascending=[False, True])


def doubtful(
    row: Row,
    config: Config,
) -> bool:
    """Whether a refusal keeps harmless responses from saying that the prompt is harmless."""
    return config.experiment.refusal_filter and refused(row)


def told_prompts(arm: Arm, traffic: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The prompts that passed, with what the arm is told of their responses.

    outputs: what they say. permuted: what those of a prompt alike in score and length say (C1).
    suspicious: as many prompts as have unsafe responses, those of the highest score, are the unsafe
    ones (C2). human: as many prompts that people call unsafe are, those that passed first (C3).
    """
    told = traffic[traffic.passed & traffic.q.notna()].assign(source="feedback")
    count = sum(told.q >= 0.5)
    if arm.feedback == "permuted":
        return permuted(told, seed)
    unsaid = told.assign(refused=False, categories=None)
    if arm.feedback == "suspicious":
        first = most_suspicious(told).id[:count]
        return unsaid.assign(q=told.id.isin(first).astype(float))
    if arm.feedback == "human":
        named = shuffled(traffic[traffic.human_unsafe], seed, "human")
        named = named.sort_values("passed", ascending=False, kind="stable").head(count)
        named = named.assign(q=1.0, source="human", refused=False, categories=None)
        return pd.concat([named, unsaid[~told.human_unsafe].assign(q=0.0)])
    return told


def unsafe_categories(row: Row) -> list[str] | None:
    """The categories that the guard named of a prompt's unsafe responses; None where it named none."""
    named = set()
    for response in row["responses"]:
        if response["decided"]:
            named.update(response.get("categories") or ())
    return sorted(named) or None


def permuted(
    told: pd.DataFrame,
    seed: int,
) -> pd.DataFrame:
    """What is told, exchanged within blocks of prompts of like score (fifths) and like length."""
    order = told.sort_values(["score", "id"])
    order["fifth"] = np.arange(len(order)) * 5 // len(order)
    order["length"] = order.prompt.str.len()
    order = order.sort_values(["fifth", "length", "id"])
    rng = random.Random(f"{seed} permuted")
    others = []
    for start in range(0, len(order), ALIKE):
        block = range(len(order))[start : start + ALIKE]
        others += rng.sample(block, len(block))
    for name in ("q", "refused", "categories"):
        order[name] = order[name].iloc[others].array
    return order


def replayed(
    arm: Arm,
    traffic: pd.DataFrame,
    told: pd.DataFrame,
    taken: set[str],
    count: int,
    seed: int,
) -> pd.DataFrame:
    """The guard's own decisions on other prompts, in the proportion that traffic has, and at least
    one of each class.

    A prompt that passed and whose responses refuse, or are unsafe, is none of them: the decision
    may be wrong. A control knows of this what it was told, and no more.
    """
    doubted = told[(told.q > 0) | told.refused]
    left = shuffled(traffic, seed, "replay")
    left = left[~left.failed & ~left.id.isin(doubted.id) & ~left.key.isin(taken)]
    if arm.feedback == "outputs":
        left = left[~left.wrongly_blocked]
    left = left.assign(target=left.blocked.astype(float), categories=None)
    left["kl"] = arm.kl & ~left.blocked
    unsafe = left[left.blocked].head(max(1, round(traffic.blocked.mean() * count)))
    safe = left[~left.blocked].head(max(0, count - len(unsafe)))
    return pd.concat([unsafe, safe])


def legacy_blocked(processed: Sequence[Row]) -> dict[str, str]:
    """What the original would have collected, by its own checks: id and reason. It asks for one
    response a prompt.
    """
    found = {}
    for row in processed:
        said = row["legacy"]
        if not said["outputs"] or not legacy_safe(said["input"]):
            continue
        output = said["outputs"][0]
        if not legacy_safe(output):
            found[row["id"]] = legacy_reason(output)
    return found


def rows_of_texts(arm: Arm, processed: Sequence[Row], seed: int) -> list[TrainingRow]:
    """The original's texts. Where its own checks collect nothing, it gets the correct list."""
    prompts = {row["id"]: row["query"] for row in processed}
    found = [row for row in processed if feedback(row)]
    reasons = {row["id"]: reason_of(unsafe_categories(row) or ()) for row in found}
    harmless = [row for row in processed if row["human_unsafe"] is False]
    if arm.collection == "legacy":
        reasons = legacy_blocked(processed) or reasons
        if not legacy_blocked(processed):
            what = "the original's checks collect nothing here; it gets the correct list"
            logger.warning("%s: %s", arm.name, what)
    else:
        known = {text_key(prompts[row_id]) for row_id in reasons}
        answered = [row for row in processed if passed(row) and q(row) == 0]
        harmless = [row for row in answered if text_key(row["query"]) not in known]
    examples = [example(row_id, prompts[row_id], reason) for row_id, reason in reasons.items()]
    most = min(len(examples), len(processed) // 2)
    for row in harmless[:most]:  # as they come
        examples.append(example(row["id"], row["query"], None))
    rows = []
    for text in training_texts(examples, seed, arm.augment):
        source = "feedback" if text.id in reasons else "safe"
        target = float(text.unsafe)
        rows.append(TrainingRow(text.id, prompts[text.id], target, source, text=text))
    return rows


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
            words = self.encoder.words
            tokens = self.encoder.tokens
            loss = verdict_loss(answers, inputs, words, tokens, self.kl_weight)
        return (loss, answers.outputs) if return_outputs else loss


def main() -> None:
    only_prepare = sys.argv[1:2] == ["prepare"]
    if only_prepare:
        del sys.argv[1]
    config = config_from_argv(__doc__)
    if only_prepare:
        prepare(config)
    else:
        train(config)


def train(config: Config) -> list[Path]:
    """Train every arm and seed of the config; their folders.

    Raises:
        UserError: nothing was processed, or with other settings; nothing to learn from; a folder
            with another arm; a training that diverged.
    """
    check_output_folder(config.training.output_dir)
    asked = []
    for name in config.training.arms:
        asked += [(arm_named(name), seed) for seed in config.training.seeds_of(name)]
    own = [(arm, seed) for arm, seed in asked if arm.weights_of is None]
    pushed = {}
    for arm, seed in own:
        if config.training.push_to_hub and not arm.probe:
            pushed[arm.name, seed] = push_arguments(arm, seed, config)
            check_push(pushed[arm.name, seed])
    processed = read_processed(config, config.experiment.process_split)
    for arm, seed in own:
        if not is_trained(arm, seed, config):
            rows = build_rows(arm, processed, seed, config)
            logger.info("%s, seed %d: %s", arm.name, seed, arm.question)
            steps = step_budget(arm, processed, config)
            train_arm(arm, seed, rows, steps, config)
        if (arm.name, seed) in pushed:
            push_finished(pushed[arm.name, seed])
    return [arm_folder(config, arm.name, seed) for arm, seed in asked]


def push_arguments(arm: Arm, seed: int, config: Config) -> ArmArguments:
    """Which repository an arm has on the hub, and what may happen there."""
    values = config.training
    family = values.hub_model_id or Path(values.output_dir).resolve().name
    return arguments_for(
        arm_folder(config, arm.name, seed),
        push_to_hub=True,
        hub_model_id=f"{family}-{arm.name}-seed{seed}",
        hub_private_repo=values.hub_private_repo,
        hub_overwrite=values.hub_overwrite,
    )


def is_trained(arm: Arm, seed: int, config: Config) -> bool:
    """Whether an arm is there."""
    folder = arm_folder(config, arm.name, seed)
    if not has_card(folder):
        return False
    check_stage(folder / "stage.json", config, "train", asdict(arm), seed)
    return True


def step_budget(arm: Arm, processed: Sequence[Row], config: Config) -> int:
    """Optimizer steps: max_steps, else the epochs over the rows of A8, the same for every arm.

    The original's texts keep its own rule, -1: the epochs over their own rows.
    """
    values = config.training
    if values.max_steps > 0 or arm.texts:
        return values.max_steps
    rows = build_rows(arm_named("A8"), processed, values.seeds[0], config)
    rows_a_step = values.batch_size * values.gradient_accumulation_steps
    return math.ceil(values.epochs * len(rows) / rows_a_step)


def load_base(config: Config) -> GenerativeGuard:
    """The guard that is trained, its model ready for adapters."""
    section = config.llama_guard
    options = {"load_in_4bit": True} if section.load_in_4bit else {}
    path = section.base_model_path
    loaded = load_llama_guard(path, section.use_official_template, progress=False, **options)
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
        facts["log"] = trainer.state.log_history
        facts["steps"] = trainer.state.global_step
        trained = trainer.accelerator.unwrap_model(trainer.model)
        with whole_folder(folder) as partial_folder:
            save_adapter(trained, state_dict, encoder.tokenizer, partial_folder)
            write_facts(arm, seed, rows, facts, config, partial_folder)
            write_readme(arm, seed, facts["sources"], config, partial_folder)
            quantized = config.llama_guard.load_in_4bit or None
            add_probe(partial_folder, arm_card(arm, seed, config), load_in_4bit=quantized)
        start_over(args)  # the checkpoints go
    trainer.accelerator.wait_for_everyone()


def encode_rows(
    arm: Arm,
    rows: Sequence[TrainingRow],
    encoder: Encoder,
    config: Config,
) -> tuple[list[Row], dict[str, Any]]:
    """The rows as token ids, with P(unsafe) before training where it is held; and their facts."""
    model = encoder.guard.model.model
    limit = config.training.max_length
    check_length(model, limit, "training.max_length")
    if arm.texts:
        texts = [row.text for row in rows]
        encoded = [text_row(encoder.tokenizer, text, arm.loss, limit) for text in texts]
        cut = sum(len(row["input_ids"]) == limit for row in encoded)
    else:
        encoded, cut = encoder.rows(
            [row.messages for row in rows],
            [row.target for row in rows],
            [row.categories for row in rows],
        )
    check_ids([row["input_ids"] for row in encoded], encoder.tokenizer, model)
    held = [one for one, row in zip(encoded, rows, strict=True) if row.kl]
    prompts = [prompt_of(row) for row in held]
    before = verdict_probabilities(encoder.guard, prompts, encoder.tokens)
    for row in encoded:
        row["g0"] = NOTHING
    for row, probability in zip(held, before, strict=True):
        row["g0"] = probability
    facts = {
        "rows": len(rows),
        "sources": Counter(row.source for row in rows),
        "target_mean": round(sum(row.target for row in rows) / len(rows), 4),
        "tokens": sum(len(row["input_ids"]) for row in encoded),
        "shortened_rows": cut,
    }
    return encoded, facts


def arm_arguments(arm: Arm, seed: int, steps: int, config: Config) -> ArmArguments:
    """The config's values as TRL's."""
    values = config.training
    # an arm's own, else that of all arms, else the original's
    rates = [arm.learning_rate, values.arms_learning_rate, values.learning_rate]
    warmups = [arm.warmup_steps, values.arms_warmup_steps, values.warmup_steps]
    return arguments_for(
        arm_folder(config, arm.name, seed),
        **values.model_dump(include=NAMED_AS_TRLS),
        learning_rate=first_given(rates),
        warmup_steps=first_given(warmups),
        max_steps=steps,
        num_train_epochs=values.epochs,
        per_device_train_batch_size=values.batch_size,
        gradient_checkpointing=config.llama_guard.load_in_4bit,
        seed=seed,
    )


def first_given(values: Sequence[float | None]) -> float:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def arguments_for(
    folder: Path,
    **values: Any,
) -> ArmArguments:
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


def add_adapters(
    model: nn.Module,
    config: Config,
) -> nn.Module:
    """LoRA over the frozen model, in the last `lora_last_layers` layers or in all."""
    values = config.training
    asked = ModelConfig(
        use_peft=True,
        lora_r=values.lora_r,
        lora_alpha=values.lora_alpha,
        lora_dropout=values.lora_dropout,
        lora_target_modules=list(MODULES),
    )
    layers = None
    if values.lora_last_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        first = max(0, count - values.lora_last_layers)
        layers = range(first, count)
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
    longest = max(len(row["input_ids"]) for row in rows)
    trainer = ArmTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        data_collator=partial(batch_of, shared=shares_beginnings(model, longest)),
        processing_class=encoder.tokenizer,
        settings=settings,
    )
    trainer.encoder = encoder
    trainer.kl_weight = kl_weight
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated ones are averaged
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


# --- what an arm leaves ---------------------------------------------------------------------------


def arm_card(
    arm: Arm,
    seed: int,
    config: Config,
) -> GenerativeCard | LinearProbeCard:
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


def write_facts(
    arm: Arm,
    seed: int,
    rows: Sequence[TrainingRow],
    facts: Mapping[str, Any],
    config: Config,
    folder: Path,
) -> None:
    """training_examples.jsonl, run.json and stage.json."""
    lines = json_lines(row.as_dict() for row in rows)
    write_text(folder / "training_examples.jsonl", lines)
    settings = {
        "training": config.training.model_dump(),
        "llama_guard": config.llama_guard.model_dump(),
    }
    run = manifest([settings], seed=seed, arm=asdict(arm), **facts)
    write_json(folder / "run.json", run)
    write_stage(folder / "stage.json", config, "train", asdict(arm), seed)


def write_readme(
    arm: Arm,
    seed: int,
    sources: Mapping[str, int],
    config: Config,
    folder: Path,
) -> None:
    """The model card of an adapter."""
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
            "Rows": report.table(list(sources.items()), ["source", "rows"]),
            "Limits": "Nothing was measured here; see the results of evaluate.py. The labels of "
            f"responses are those of {blocked_by}.",
        },
    )


# --- arm C4: a logistic probe on the state that the frozen guard reads its verdict from -----------


def save_probe(
    base: GenerativeGuard,
    arm: Arm,
    seed: int,
    rows: Sequence[TrainingRow],
    config: Config,
) -> None:
    """Fit a probe to the rows' targets and leave its folder with probe.json.

    A target between 0 and 1 counts in both classes, with its weight.
    """
    folder = arm_folder(config, arm.name, seed)
    target = np.array([row.target for row in rows])
    if not 0 < target.sum() < len(target):
        raise UserError(f"{folder}: the probe's rows are all of one class")
    states = states_of(base, [row.messages for row in rows])
    mean = states.mean(0)
    scale = np.maximum(states.std(0), 1e-6)
    twice = np.tile((states - mean) / scale, (2, 1))
    labels = np.repeat([True, False], len(rows))
    weights = np.concatenate([target, 1 - target])
    fitted = LogisticRegression(C=1 / PENALTY, max_iter=1000, random_state=seed)
    counts = weights > 0
    fitted.fit(twice[counts], labels[counts], weights[counts])
    per_state = fitted.coef_[0] / scale
    bias = fitted.intercept_[0] - per_state @ mean
    probe = {"weights": per_state.tolist(), "bias": float(bias)}
    sources = Counter(row.source for row in rows)
    facts = {"rows": len(rows), "sources": sources, "penalty": PENALTY}
    if is_main_process():
        with whole_folder(folder) as partial_folder:
            write_json(partial_folder / "probe.json", probe)
            write_facts(arm, seed, rows, facts, config, partial_folder)
            write_card(partial_folder, arm_card(arm, seed, config))


def probe_scores(
    base: GenerativeGuard,
    folder: Path,
    conversations: Sequence[Messages],
) -> list[float]:
    """P(unsafe) of each by the probe in `folder`, read from the guard that it was fitted on.

    Raises:
        UserError: the probe is of an earlier version, whose weights are for scaled states.
    """
    path = folder / "probe.json"
    probe = read_json(path)
    if "mean" in probe:
        raise UserError(f"{path}, field mean: a probe of an earlier version; {AGAIN['train']}")
    odds = states_of(base, conversations) @ np.array(probe["weights"]) + probe["bias"]
    return expit(odds).tolist()


def states_of(
    base: GenerativeGuard,
    conversations: Sequence[Messages],
) -> np.ndarray:
    """The states that a guard reads its verdicts from, of shape (conversations, hidden)."""
    prompts = base.prompt_ids(conversations)
    return verdict_states(base.model.model, prompts).double().numpy()


# --- prepare: a small model becomes a guard before anything else ----------------------------------


# conversations whose last turn is labelled: prompt_unsafe or response_unsafe, and whether it is
CHECK = ["messages", "label", "unsafe", "categories"]


def prepare(config: Config) -> None:
    """Make the guards of the section `prepare` that are not there yet."""
    for section in config.prepared().values():
        make_guard(section)


def make_guard(section: PrepareGuard) -> None:
    """Fine-tune a model to write safe or unsafe, in the Llama Guard 1 format."""
    check_output_folder(section.output_dir)
    folder = Path(section.output_dir)
    checks = read_checks(section.data)
    key = guard_key(section, checks)
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
    rows, cut = encoder.rows(learned.messages, learned.unsafe, learned.categories)
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
        checks = held_out if len(held_out) else learned
        save_guard(encoder, checks, state_dict, section, key, facts)
        start_over(args)
    trainer.accelerator.wait_for_everyone()


def guard_key(
    section: PrepareGuard,
    checks: pd.DataFrame,
) -> str:
    """A digest of all that a small guard depends on."""
    settings = section.model_dump(mode="json")
    settings |= {"output_dir": None, "base_model": None, "held_out": HELD_OUT}
    base = keep.fingerprint(section.base_model)
    content = checks.to_dict("records")
    return keep.digest([settings, [base, content], template()])


def trainable(
    model: nn.Module,
    last_layers: int | None,
) -> nn.Module:
    """The model with all weights to be trained, or the last layers' and the final norm's."""
    model = model.float()
    model.requires_grad_(last_layers is None)
    if last_layers is not None:
        decoder = model.model
        decoder.layers[-last_layers:].requires_grad_(True)
        decoder.norm.requires_grad_(True)
    return model


def read_checks(specs: Sequence[str]) -> pd.DataFrame:
    """The columns of CHECK: of each row its prompt where that is labelled, and its response where
    that one is.
    """
    checks = []
    for spec in specs:
        if metrics.is_test(spec):
            hint = "is a test set; a guard is not trained on one"
            raise UserError(f"prepare, field data: {spec} {hint}")
        for row in load_conversations(spec):
            turns = {"prompt_unsafe": row["messages"]}
            if row["messages"][-1]["role"] == "assistant":
                turns = {"prompt_unsafe": row["messages"][:-1], "response_unsafe": row["messages"]}
            for label, messages in turns.items():
                if messages and row[label] is not None:
                    checks.append([messages, label, row[label], row["categories"]])
    found = pd.DataFrame(checks, columns=CHECK)
    if found.unsafe.nunique() < 2:
        names = ", ".join(specs)
        raise UserError(f"prepare, field data: {names}: a guard needs safe and unsafe labels")
    return found


def split_checks(
    checks: pd.DataFrame,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Checks to learn and checks held out, all of one prompt on one side."""
    keys = checks.messages.map(lambda messages: prompt_key({"messages": messages}))
    order = sorted(set(keys))
    random.Random(seed).shuffle(order)
    is_held_out = keys.isin(order[: round(HELD_OUT * len(order))])
    return checks[~is_held_out], checks[is_held_out]


def load_encoder(
    base_model: str,
    folder: Path,
) -> Encoder:
    """The base behind the guard's prompt; its tokenizer, with that for chat template, is saved in
    `folder`.
    """
    tokenizer = read_pretrained(AutoTokenizer, "prepare.base_model", base_model)
    if tokenizer.eos_token_id is None:
        hint = "has no EOS; verdicts would not end"
        raise UserError(f"field prepare.base_model: the tokenizer of {base_model} {hint}")
    tokenizer.chat_template = template()
    tokenizer.save_pretrained(folder)
    entry = {**zoo()["llama-guard"], "tokenizer": str(folder)}
    model = resolve_model(base_model)
    loaded = GenerativeGuard(model, entry, max_length=SMALL_GUARD_LENGTH, progress=False)
    fit_causal_lm(loaded.tokenizer, loaded.model.model)
    return Encoder(loaded, SMALL_GUARD_LENGTH, always_end=True)


def save_guard(
    encoder: Encoder,
    checks: pd.DataFrame,
    state_dict: Mapping[str, torch.Tensor],
    section: PrepareGuard,
    key: str,
    facts: Mapping[str, Any],
) -> None:
    """Thresholds and numbers of the checks held out, the folder, and whether it says what the model
    in memory says.
    """
    model = encoder.guard.model.model.eval()
    model.config.use_cache = True
    rows, cut = encoder.rows(checks.messages, checks.unsafe, checks.categories)
    if cut:
        said = "%s of %s texts that the thresholds are fitted on were shortened to %s tokens"
        logger.warning(said, cut, len(rows), SMALL_GUARD_LENGTH)
    prompts = [prompt_of(row) for row in rows]
    scores = verdict_probabilities(encoder.guard, prompts, encoder.tokens)
    on = f"{HELD_OUT} of {' '.join(section.data)}"
    thresholds, measured = measure_checks(checks, scores, on)
    card = GenerativeCard(
        guard="llama-guard",
        max_length=SMALL_GUARD_LENGTH,
        thresholds=thresholds,
        base_model=section.base_model,
        base_sha256=local_sha256(section.base_model),
        fingerprint=key,
    )
    run = manifest([section.model_dump(mode="json")], validation=measured, **facts)
    base = public_name(section.base_model)
    data = ", ".join(about_data(spec)["name"] for spec in section.data)
    with whole_folder(section.output_dir) as folder:
        save_model(model, state_dict, encoder.tokenizer, folder)
        write_json(folder / "run.json", run)
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
            again = verdict_probabilities(saved, prompts[:8], encoder.tokens)
            in_memory = [{"unsafe": p} for p in scores[:8]]
            on_disk = [{"unsafe": p} for p in again]
            check_equal(in_memory, on_disk, TOLERANCE[saved.dtype])


def measure_checks(
    checks: pd.DataFrame,
    scores: Sequence[float],
    on: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A threshold and its metrics for each label whose checks have both classes.

    Args:
        on: what is said of the data that the thresholds were fitted on.
    """
    thresholds = {}
    measured = {}
    for label, some in checks.assign(score=scores).groupby("label"):
        if some.unsafe.nunique() == 2:
            thresholds[label] = metrics.fit_threshold(some.unsafe, some.score, on)
            value = thresholds[label]["value"]
            measured[label] = metrics.binary(some.unsafe, some.score, value)
    return thresholds, measured


if __name__ == "__main__":
    run_cli(main)
