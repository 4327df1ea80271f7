"""What training needs beyond the Hugging Face Trainer: dead flags, checkpoints that are compared,
length grouping.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput
from transformers.utils import ModelOutput
from trl import ModelConfig, SFTTrainer, get_peft_config

from common.conversation import UserError
from common.keep import rows_digest
from common.run import Stopped, check_output_folder, device, is_main_process, write_json

logger = logging.getLogger(__name__)
DEAD = {"help": "Flag of the paper's command that today's transformers has dropped; mapped to "}


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """TrainingArguments with three differences.

    Flags of the papers' commands that died are mapped, and mentioned once. What this machine cannot
    do (bf16, tf32 and FSDP without an accelerator) is switched off and said, instead of failing or
    pretending. Defaults: length grouping on, reports to nobody.
    """

    goes_on_with = ("--resume_from_checkpoint", "latest")  # what a command has more that goes on
    starts_over_with = "--overwrite_output_dir true"

    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length | random | sequential"}
    )
    report_to: str = field(default="none", metadata={"help": "none | tensorboard | wandb | all"})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start over although output_dir holds checkpoints or a finished model."},
    )
    evaluation_strategy: str | None = field(
        default=None, metadata={"help": DEAD["help"] + "--eval_strategy"}
    )
    warmup_ratio: float | None = field(
        default=None,
        metadata={"help": DEAD["help"] + "--warmup_steps (a number below 1 is a ratio)"},
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = field(
        default=None, metadata={"help": DEAD["help"] + "--fsdp_config"}
    )

    def __post_init__(self):
        if self.evaluation_strategy is not None:
            self.eval_strategy = _mapped(
                "evaluation_strategy",
                f"--eval_strategy {self.evaluation_strategy}",
                self.evaluation_strategy,
            )
        if self.warmup_ratio is not None:
            self.warmup_steps = _mapped(
                "warmup_ratio", f"--warmup_steps {self.warmup_ratio}", self.warmup_ratio
            )
        self.evaluation_strategy = self.warmup_ratio = None
        if self.warmup_steps and self.lr_scheduler_type == "constant":  # which has none
            self.lr_scheduler_type = "constant_with_warmup"
        if device().type == "cpu":
            self.dataloader_pin_memory = False
            self._leave_out_what_a_cpu_cannot_do()
            self._join_cpu_processes()
        elif str(self.fsdp or "").lower() in ("", "false", "no", "0"):
            self.fsdp = None
        else:
            self._modern_fsdp()
        super().__post_init__()

    def _leave_out_what_a_cpu_cannot_do(self) -> None:
        if self.bf16 or self.fp16 or self.tf32:
            logger.info(
                "No accelerator: training in float32; bf16, fp16 and tf32 are off (here they are emulated, and slower)."
            )
        if self.fsdp:
            logger.info(
                "No accelerator: --fsdp is off. On a CPU accelerate's FSDP does not shard but runs plain data "
                "parallel, and so does this run; for real sharding on CPU use --deepspeed ../../launch/zero3.json."
            )
        self.bf16 = self.fp16 = False
        self.tf32 = self.fsdp = self.fsdp_config = self.fsdp_transformer_layer_cls_to_wrap = None

    def _join_cpu_processes(self) -> None:
        """One gloo group of the launched processes: without it each would train alone, and say
        nothing of it.

        Plain data parallel needs no more than `use_cpu`. With that, accelerate would leave
        DeepSpeed out; so for it the state is set up here, with the backend that transformers cannot
        be told.
        """
        if not self.deepspeed:
            self.use_cpu = True
        elif "LOCAL_RANK" in os.environ:
            with patch_environment(accelerate_use_deepspeed="true"):
                PartialState(backend="gloo")
            self.accelerator_config = {"use_configured_state": True}

    def _modern_fsdp(self) -> None:
        """FSDP2 through `fsdp_config`; gradient checkpointing as FSDP's own, which does not gather
        weights twice.
        """
        given = self.fsdp_config or {}
        if isinstance(given, str):
            given = json.loads(
                given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
            )
        words = set(self.fsdp.split()) if isinstance(self.fsdp, str) else set()
        known = {"true", "yes", "1", "full_shard", "shard_grad_op", "auto_wrap", "offload"}
        if words - known:
            raise UserError(
                f"--fsdp {self.fsdp}: FSDP2 knows full_shard, shard_grad_op, auto_wrap and offload"
            )
        config = {"version": 2, "reshard_after_forward": "shard_grad_op" not in words} | given
        if self.fsdp_transformer_layer_cls_to_wrap is not None:
            config["transformer_layer_cls_to_wrap"] = [self.fsdp_transformer_layer_cls_to_wrap]
        if self.gradient_checkpointing:
            config["activation_checkpointing"], self.gradient_checkpointing = True, False
        if "offload" in words:
            config["cpu_offload"] = True
        self.fsdp, self.fsdp_config, self.fsdp_transformer_layer_cls_to_wrap = (
            True,
            _mapped("fsdp …", f"FSDP2, {config}", config),
            None,
        )


def _mapped(flag: str, now: str, value):
    logger.info("--%s is gone from transformers; using %s.", flag, now)
    return value


class BriefProgress(ProgressCallback):
    """The stock progress bar, whose log lines leave out what has a name per category (it stays in
    the log history).
    """

    BRIEF = ("auprc", "f1", "recall", "fpr")

    def on_log(self, args, state, control, logs=None, **kwargs):
        brief = {
            k: v
            for k, v in (logs or {}).items()
            if "/" not in k or ("flagged/" in k and k.endswith(self.BRIEF))
        }
        super().on_log(args, state, control, logs=brief, **kwargs)


class LengthGroupedTrainer(Trainer):
    """A Trainer whose length-grouped order depends on seed and epoch alone, and that knows its own
    checkpoints.

    The stock sampler draws from the global generator, so that a resumed run sees another order than
    an uninterrupted one. Grouping by the GLOBAL batch gives any number of processes and
    accumulation steps the same batches.

    Each checkpoint holds what its run was (`recipe.json`), and a run that resumes is compared with
    it.
    """

    # long batches first, as in transformers; where length says something of the label, True
    shuffle_batches = False

    def __init__(self, *args, settings: Mapping[str, Any] | None = None, **kwargs):
        """Take what the stock trainer takes.

        Args:
            settings: what else makes another run than arguments, rows and LoRA do: the base model,
            weights of the loss.
        """
        super().__init__(*args, **kwargs)
        self.own_settings = as_json(dict(settings or {}))
        self.run_settings: dict[str, Any] = {}
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(BriefProgress)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        lengths = [len(ids) for ids in dataset["input_ids"]]
        return EpochLengthGroupedSampler(rows_a_step(args), lengths, seed, self.shuffle_batches)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        """Train, from a checkpoint where there is one.

        Raises:
            UserError: the checkpoint is of another run, or the training diverged.
            Stopped: Ctrl-C; it says how to go on.
        """
        self.run_settings = (
            argument_settings(self.args) | rows_settings(self.train_dataset) | self.own_settings
        )
        self.run_settings["LoRA"] = lora_settings(self.model)
        if resume_from_checkpoint is not None:
            refuse_another_run(
                resume_from_checkpoint, self.run_settings, self.args.starts_over_with
            )
            self._remove_halves()
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except KeyboardInterrupt:
            raise self._stopped() from None
        refuse_diverged(self)
        if adapters_are_zero(self):
            logger.warning(
                "The adapters are still zero after %d steps: nothing was learned.",
                self.state.global_step,
            )
        return result

    def _remove_halves(self) -> None:
        """What a kill left of a checkpoint is written anew."""
        for path in numbered_entries(self.args.output_dir) if is_main_process() else []:
            if (path / SETTINGS).is_file() and not is_whole(path):
                remove_checkpoint(path)

    def _stopped(self) -> Stopped:
        whole = checkpoints(self.args.output_dir)
        if not whole:
            return Stopped("before the first checkpoint; to start again")
        return Stopped(f"after {whole[-1].name}; to go on", self.args.goes_on_with)

    def set_initial_training_values(self, args, dataloader):
        """The stock lengths of a run; a warm-up that is longer than it is said."""
        values = super().set_initial_training_values(args, dataloader)
        warn_of_long_warmup(args, values[-1])
        return values

    def _save_checkpoint(self, model, trial):
        """The stock checkpoint, of weights that are numbers, with what its run was; old ones go."""
        refuse_diverged(self)
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            write_json(folder / SETTINGS, self.run_settings)
        with self._keeping_all():
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            drop_old_checkpoints(self.args, self.state.best_model_checkpoint)

    def _finalize_training(self, *args, **kwargs):
        if self.state.global_step == self._initial_global_step:
            logger.info(
                "Nothing is left to train: the run ended with step %d, whose weights are kept.",
                self.state.global_step,
            )
        with self._keeping_all():
            result = super()._finalize_training(*args, **kwargs)
        if self.args.should_save:
            drop_old_checkpoints(self.args, self.state.best_model_checkpoint, finished=True)
        return result

    @contextmanager
    def _keeping_all(self):
        """Within it transformers removes no checkpoint."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The stock log, without a mean loss of no steps, which would be 0."""
        if self.is_in_train and self.state.global_step == self._initial_global_step:
            logs.pop("train_loss", None)
        super().log(logs, *args, **kwargs)


# --- The loss on an answer's tokens -----------------------------------------------------------------------------------


class Answers(NamedTuple):
    """What a model says where some row of a batch has a label to predict."""

    outputs: ModelOutput  # with logits of shape (rows, n, vocabulary)
    labels: torch.Tensor  # (rows, n), -100 where a row has none
    starts: torch.Tensor  # (rows, n), whether the label is the first of its answer


def read_answers(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Answers:
    """Run a model with logits where some row has a label, and nowhere else: most of a row is a
    prompt.

    Args:
        batch: rows as TRL lays them, padded or end to end, or a tree of rows (`common.prefix`),
        whose `keep` says
            which tokens predict its labels and whose `owner` says of which row they are.
    """
    labels = batch["labels"][:, 1:]
    columns = batch.get("keep")
    if columns is None:
        columns = (labels != -100).any(0).nonzero()[:, 0]
        labels = labels[:, columns]
        starts = batch["labels"][:, columns] == -100
    else:
        owner = batch["owner"]
        starts = torch.ones_like(labels, dtype=torch.bool)
        starts[0, 1:] = owner[1:] != owner[:-1]
    inputs = {name: part for name, part in batch.items() if name not in ("labels", "keep", "owner")}
    return Answers(model(**inputs, use_cache=False, logits_to_keep=columns), labels, starts)


def answers_loss(
    answers: Answers, count: torch.Tensor | int | None = None, first_token_weight: float = 1.0
) -> torch.Tensor:
    """Log loss of the labels, summed and divided by `count`.

    Args:
        count: labels of the whole step, over all processes and accumulated batches; None: those
        that are here.
        first_token_weight: how often the first label of an answer counts in the sum.
    """
    labels = answers.labels.flatten()
    losses = cross_entropy(answers.outputs.logits.float().flatten(0, 1), labels, reduction="none")
    weights = torch.where(answers.starts, first_token_weight, 1.0).flatten()
    count = (labels != -100).sum() if count is None else torch.as_tensor(count)
    return (losses * weights).sum() / count.clamp(min=1)


class AnswerTrainer(LengthGroupedTrainer, SFTTrainer):
    """TRL's trainer with a loss that reads logits where an answer is and nowhere else.

    TRL's own scores every position, without Triton three times. What is trained is float32,
    whatever the base is.
    """

    # short rows, such as refusals and prompts alone, would all come at the end
    shuffle_batches = True

    def __init__(self, *args, first_token_weight: float = 1.0, **kwargs):
        """Take what the stock trainer takes, and the weight of an answer's first token in the loss."""
        super().__init__(*args, **kwargs)
        self.first_token_weight = first_token_weight
        for parameter in self.model.parameters():
            if parameter.requires_grad and not self.is_deepspeed_enabled:
                parameter.data = parameter.data.float()  # TRL makes those of a quantized base bf16

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean log loss of the answers' tokens over the whole step: all processes, all accumulated
        batches.
        """
        answers = read_answers(model, inputs)
        loss = answers_loss(answers, num_items_in_batch, self.first_token_weight)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the processes' gradients are averaged
        return (loss, answers.outputs) if return_outputs else loss


# --- The order of rows ------------------------------------------------------------------------------------------------


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' LengthGroupedSampler with an order that is a function of seed and epoch (set by
    accelerate).
    """

    def __init__(
        self, batch_size: int, lengths: list[int], seed: int, shuffle_batches: bool = False
    ):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.shuffle_batches = seed, shuffle_batches
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)
        self.epoch = epoch

    def __iter__(self):
        self.set_epoch(self.epoch)
        order = list(super().__iter__())
        if self.shuffle_batches:
            batches = [
                order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)
            ]
            turn = torch.randperm(len(batches), generator=self.generator).tolist()
            # the last may be short: it stays the last
            turn.append(turn.pop(turn.index(len(batches) - 1)))
            order = [row for i in turn for row in batches[i]]
        return iter(order)


def useful_token_share(lengths: Sequence[int], batch_size: int, seed: int) -> float:
    """Useful tokens / processed tokens of epoch 0 when each batch of `batch_size` rows is padded to
    its longest.
    """
    order = list(EpochLengthGroupedSampler(batch_size, list(lengths), seed))
    processed = 0
    for i in range(0, len(order), batch_size):
        batch = [lengths[j] for j in order[i : i + batch_size]]
        processed += max(batch) * len(batch)
    return sum(lengths) / processed


# --- Checkpoints ------------------------------------------------------------------------------------------------------

NUMBERED = re.compile(r"checkpoint-\d+")
# the trainer writes it last: a folder without it is half of a checkpoint
STATE = "trainer_state.json"
# written first: what the checkpoint's run was, and the mark of a folder as ours
SETTINGS = "recipe.json"


def numbered_entries(folder: Path) -> list[Path]:
    """What is called `checkpoint-<number>` in a folder, by number; checkpoint-0 is no step of
    training.
    """
    if not Path(folder).is_dir():
        return []
    found = [path for path in Path(folder).iterdir() if NUMBERED.fullmatch(path.name)]
    return sorted((path for path in found if step_of(path) > 0), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first: `checkpoint-<number>` with the trainer's state.

    Nothing else is ever resumed or removed, whatever its name begins with.
    """
    return [path for path in numbered_entries(folder) if is_whole(path)]


def is_whole(checkpoint: Path) -> bool:
    """Whether the trainer's state is there; a kill may have left half of it."""
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint. Of a link only the link goes, not what it points to."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    # first, so that what a kill leaves is not taken for whole
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def checkpoint_to_resume(args: RecipeTrainingArguments) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means; `latest` (or `true`) is the
    newest in output_dir.

    It is asked before any work, and so is what else would end the run late.

    Raises:
        UserError: there is none, or output_dir holds one and the user said neither resume nor
        overwrite; it is of
            another run; output_dir cannot be written; one process has several GPUs.
    """
    check_output_folder(args.output_dir)
    if args.n_gpu > 1:
        raise UserError(
            "one process would share its GPUs by DataParallel: launch with torchrun or accelerate"
        )
    whole = checkpoints(args.output_dir)
    wish = args.resume_from_checkpoint
    if wish and str(wish).lower() in ("latest", "true"):
        if not whole:
            raise UserError(
                f"--resume_from_checkpoint {wish}: {args.output_dir} holds no checkpoint; drop the flag to start"
            )
        return _of_this_run(args, str(whole[-1]))
    if wish and str(wish).lower() != "false":
        if not is_whole(Path(wish)):
            raise UserError(
                f"--resume_from_checkpoint {wish}: no such checkpoint (a folder with {STATE})"
            )
        return _of_this_run(args, str(wish))
    if whole and not args.overwrite_output_dir:
        raise UserError(
            f"{args.output_dir} holds {whole[-1].name} of an earlier run; "
            f"pass --resume_from_checkpoint latest or {args.starts_over_with}"
        )
    _refuse_what_is_in_the_way(args)
    return None


def _of_this_run(args: RecipeTrainingArguments, checkpoint: str) -> str:
    """The checkpoint, if the arguments are those of its run; rows and weights are compared when
    they are there.
    """
    if recorded_settings(checkpoint) is None:
        logger.info(
            "%s does not say what its run was; it is resumed without a comparison.", checkpoint
        )
    refuse_another_run(checkpoint, argument_settings(args), args.starts_over_with)
    return checkpoint


def _refuse_what_is_in_the_way(args: TrainingArguments) -> None:
    """A run that starts would write its checkpoints into what bears their names and is none of
    ours.
    """
    for path in numbered_entries(args.output_dir):
        ours = is_whole(path) or (path / SETTINGS).is_file()
        removable = path.is_dir() or path.is_symlink()
        if not ours and not (args.overwrite_output_dir and removable):
            raise UserError(
                f"{path}: is no checkpoint of a training run (it has no {STATE}); move it elsewhere"
            )


def start_over(args: TrainingArguments) -> None:
    """Remove the checkpoints of an earlier run, which `--resume_from_checkpoint latest` would take
    for this one's.

    `checkpoint_to_resume` has seen to it that they are ours, or that the user said
    `--overwrite_output_dir`.
    """
    if is_main_process():
        for path in numbered_entries(args.output_dir):
            remove_checkpoint(path)


def drop_old_checkpoints(args: TrainingArguments, best: str | None, finished: bool = False) -> None:
    """Keep the newest `--save_total_limit` checkpoints, the best one among them.

    transformers' own takes every folder for one whose name begins with "checkpoint-".

    Args:
        best: the checkpoint that will be loaded at the end.
        finished: of a limit of 1 the best one is kept then, and not the newest, which only a
        resumed run needs.
    """
    whole = checkpoints(args.output_dir)
    if not args.save_total_limit or args.save_total_limit < 1 or not whole:
        return
    kept = {Path(best).name} if best else set()
    if not (finished and kept and args.save_total_limit == 1):
        kept.add(whole[-1].name)
    surplus = len(whole) - max(args.save_total_limit, len(kept))
    for path in [path for path in whole if path.name not in kept][: max(0, surplus)]:
        remove_checkpoint(path)


# --- What is resumed is compared with what was asked ------------------------------------------------------------------

# Arguments that make another run. What is not here leaves the result as it is: logging, saving,
# evaluating, and how the rows of a step are split into processes, batches and accumulated ones.
COMPARED_ARGUMENTS = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "packing",
)
COMPARED_COLUMNS = ("input_ids", "labels", "target", "seq_lengths")
LORA_SETTINGS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "layers_to_transform",
    "modules_to_save",
    "use_rslora",
    "use_dora",
)


def argument_settings(args: TrainingArguments) -> dict[str, Any]:
    """What the arguments alone say of a run."""
    given = args.to_dict()
    settings = {name: given[name] for name in COMPARED_ARGUMENTS if name in given}
    settings["rows a step (batch x accumulation x processes)"] = rows_a_step(args)
    settings["sharding"] = "ZeRO" if args.deepspeed else "FSDP" if args.fsdp else None
    return as_json(settings)


def rows_a_step(args: TrainingArguments) -> int:
    """Rows of an optimizer step over all processes and accumulated batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def rows_settings(rows: Dataset) -> dict[str, Any]:
    """How many encoded rows there are, and a fingerprint of their content and order."""
    names = [name for name in COMPARED_COLUMNS if name in rows.column_names]
    batches = rows.select_columns(names).iter(batch_size=1000)
    return {"rows": len(rows), "content of the rows": rows_digest(batches)}


def lora_settings(model: torch.nn.Module) -> dict[str, Any] | None:
    """What LoRA changes about a model; None without it."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    (config,) = configs.values()
    return as_json({name: getattr(config, name) for name in LORA_SETTINGS})


def as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file; sets are sorted."""
    return json.loads(
        json.dumps(value, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )


def recorded_settings(checkpoint: str | Path) -> dict[str, Any] | None:
    """The settings of the run that wrote a checkpoint; None if it is older than this file."""
    try:
        return json.loads(Path(checkpoint, SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def refuse_another_run(
    checkpoint: str | Path, asked: Mapping[str, Any], starts_over_with: str
) -> None:
    """Raise UserError when a checkpoint is of a run with other settings than those that are asked
    for.

    Args:
        asked: some of the settings of the run that would resume.
        starts_over_with: what the user would do to start over.
    """
    recorded = recorded_settings(checkpoint) or {}
    differences = [
        f"{name} {recorded[name]} there and {value} here"
        for name, value in asked.items()
        if name in recorded and recorded[name] != value
    ]
    if differences:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} is of another run: {'; '.join(differences)}; "
            f"give what it had, or start over with {starts_over_with}"
        )


# --- LoRA -------------------------------------------------------------------------------------------------------------


def with_adapters(
    model: PreTrainedModel, asked: ModelConfig, where: str, layers: Sequence[int] | None = None
) -> PeftModel:
    """LoRA over a frozen model, in float32.

    Args:
        asked: TRL's words for it; `use_peft` must be true. See `target_modules` for what is
        adapted.
        where: the flag that names the modules, for the message.
        layers: those that are adapted; None: all.

    Raises:
        UserError: there is no such module, or PEFT knows none for this architecture.
    """
    config = get_peft_config(asked)
    config.target_modules = target_modules(asked.lora_target_modules)
    config.layers_to_transform = None if layers is None else list(layers)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"{where}: {str(error).strip().splitlines()[0]:.200}") from None


def target_modules(asked: str | Sequence[str] | None) -> str | set[str] | None:
    """What PEFT takes for the modules to adapt.

    Args:
        asked: all-linear; one pattern with .* for whole names; ends of names; None: PEFT's own for
        the architecture.
    """
    if asked is None:
        return None
    names = [asked] if isinstance(asked, str) else list(asked)
    if len(names) == 1 and (names[0] == "all-linear" or "*" in names[0]):
        return names[0]
    return set(names)


# --- A run that learned nothing, or diverged --------------------------------------------------------------------------


def refuse_diverged(trainer: Trainer) -> None:
    """Raise UserError when a trained weight is no number. Collective: every rank must call it."""
    trained = [own_part(p) for p in trainer.model.parameters() if p.requires_grad]
    if not everywhere(trainer, all(bool(part.isfinite().all()) for part in trained)):
        raise diverged("weights")


def refuse_diverged_scores(scores: np.ndarray) -> None:
    """Raise UserError when a validation score is no number."""
    if not np.isfinite(scores).all():
        raise diverged("scores")


def diverged(what: str) -> UserError:
    """The one line that a diverged run ends with."""
    return UserError(
        f"The training diverged (its {what} are not numbers): nothing is saved; lower the learning rate"
    )


def own_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this process holds of a parameter that ZeRO-3 or FSDP2 may have split."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def everywhere(trainer: Trainer, true_here: bool) -> bool:
    """Whether something is true in every process. Collective."""
    flag = torch.tensor([float(true_here)], device=trainer.args.device)
    return bool(trainer.accelerator.gather(flag).min() > 0)


def adapters_are_zero(trainer: Trainer) -> bool:
    """Whether there are LoRA adapters that are trained and that still add nothing. Collective."""
    named = trainer.model.named_parameters()
    added = [own_part(p) for name, p in named if "lora_B" in name and p.requires_grad]
    return everywhere(trainer, bool(added) and not any(bool(part.any()) for part in added))


def warn_of_long_warmup(args: TrainingArguments, steps: int) -> None:
    """Say that a run of so many steps ends before its warm-up does."""
    warmup = args.get_warmup_steps(steps)
    if warmup >= steps and args.lr_scheduler_type not in ("constant", "reduce_lr_on_plateau"):
        logger.warning(
            "The warm-up takes %d steps and the run has %d: the learning rate never reaches %s; lower --warmup_steps.",
            warmup,
            steps,
            args.learning_rate,
        )
