"""What training needs beyond the trainers of Hugging Face: dead flags, checkpoints that are
compared, an order of rows that resumes, and a loss that reads logits where an answer is.
"""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput
from transformers.utils import ModelOutput, is_torch_tf32_available
from trl import ModelConfig, SFTTrainer, get_peft_config

from common.conversation import UserError, one_line
from common.hub import check_push
from common.keep import rows_digest
from common.run import (
    Stopped,
    check_output_folder,
    device,
    inference_dtype,
    is_main_process,
    write_json,
)
from common.saving import remove

logger = logging.getLogger(__name__)
TRACKERS = ("tensorboard", "trackio", "wandb")  # each an extra of that name
LAUNCHED_WITH = "ACCELERATE_MIXED_PRECISION"  # what accelerate launch tells of its flag
DEAD = "Flag of the paper's command that today's transformers has dropped; mapped to "


# --- arguments ------------------------------------------------------------------------------------


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """TrainingArguments with three differences.

    Flags of the papers' commands that died are mapped, and mentioned once. What this machine cannot
    do (bf16, tf32 and FSDP without an accelerator) is switched off and said, instead of failing or
    pretending. Defaults: length grouping on, reports to nobody.
    """

    goes_on_with = ("--resume_from_checkpoint", "latest")  # what a command has more that goes on
    starts_over_with = "--overwrite_output_dir true"

    train_sampling_strategy: str = HfArg(
        default="group_by_length", help="group_by_length | random | sequential"
    )
    report_to: str = HfArg(default="none", help="none | tensorboard | wandb | trackio")
    push_to_hub: bool = HfArg(
        default=False, help="Push the finished folder once; --hub_model_id, --hub_private_repo."
    )
    hub_overwrite: bool = HfArg(
        default=False, help="Push into a repository that holds what no recipe has pushed."
    )
    hub_strategy: str = HfArg(default="end", help="end: nothing that is half-made is pushed.")
    overwrite_output_dir: bool = HfArg(
        default=False, help="Start over although output_dir holds checkpoints or a finished model."
    )
    evaluation_strategy: str | None = HfArg(default=None, help=DEAD + "--eval_strategy")
    warmup_ratio: float | None = HfArg(
        default=None, help=DEAD + "--warmup_steps (a number below 1 is a ratio)"
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = HfArg(
        default=None, help=DEAD + "--fsdp_config"
    )

    def __post_init__(self):
        check_trackers(self.report_to)
        self.push_when_finished = self.push_to_hub  # by `common.hub`, and not by transformers
        self.push_to_hub = False
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
            _say_gone("evaluation_strategy", f"--eval_strategy {self.eval_strategy}")
        if self.warmup_ratio is not None:
            self.warmup_steps = self.warmup_ratio
            _say_gone("warmup_ratio", f"--warmup_steps {self.warmup_ratio}")
        self.evaluation_strategy = None
        self.warmup_ratio = None
        if self.warmup_steps and self.lr_scheduler_type == "constant":  # which has none
            self.lr_scheduler_type = "constant_with_warmup"
        if str(self.fsdp or "").lower() in ("", "false", "no", "0"):
            self.fsdp = None
        if device().type == "cpu":
            self._leave_out_what_a_cpu_cannot_do()
            self._join_cpu_processes()
        else:
            self._leave_out_what_this_gpu_cannot_do()
            if self.fsdp:
                self._modern_fsdp()
        super().__post_init__()
        if self.fsdp_plugin_args and self.bf16:
            # accelerate's own adds up gradients in bf16, over processes and accumulated batches
            precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
            self.fsdp_plugin_args["mixed_precision_policy"] = precision

    def _leave_out_what_a_cpu_cannot_do(self) -> None:
        if self.bf16 or self.fp16 or self.tf32:
            logger.info(
                "No accelerator: training in float32; bf16, fp16 and tf32 are off (here they are "
                "emulated, and slower)."
            )
        if self.fsdp:
            logger.info(
                "No accelerator: --fsdp is off. On a CPU accelerate's FSDP does not shard but runs "
                "plain data parallel, and so does this run; for real sharding on CPU use "
                "--deepspeed ../../launch/zero3.json."
            )
        self.dataloader_pin_memory = False
        self.bf16 = False
        self.fp16 = False
        self.tf32 = None
        self.fsdp = None
        self.fsdp_config = None
        self.fsdp_transformer_layer_cls_to_wrap = None

    def _leave_out_what_this_gpu_cannot_do(self) -> None:
        """A GPU before Ampere emulates bf16, slower than it computes in float32, and has no tf32."""
        asked = os.environ.get(LAUNCHED_WITH) == "bf16"  # of accelerate launch
        if (self.bf16 or asked) and inference_dtype() != torch.bfloat16:
            logger.info("This GPU emulates bf16: training in float32; --fp16 is faster here.")
            self.bf16 = False
            if asked:
                os.environ[LAUNCHED_WITH] = "no"
        if self.tf32 and not is_torch_tf32_available():
            logger.info("This GPU has no tf32: it is off.")
            self.tf32 = None

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
        """What transformers leaves of an old --fsdp: the layer's class, and gradient checkpointing
        as FSDP's own, which does not gather weights twice.
        """
        config = self.fsdp_config or {}
        if isinstance(config, str):
            if not config.startswith("{"):
                config = Path(config).read_text(encoding="utf-8")
            config = json.loads(config)
        layer = self.fsdp_transformer_layer_cls_to_wrap
        if layer is not None:
            config["transformer_layer_cls_to_wrap"] = [layer]
            self.fsdp_transformer_layer_cls_to_wrap = None
        if self.gradient_checkpointing:
            config["activation_checkpointing"] = True
            self.gradient_checkpointing = False
        if str(self.fsdp).lower() in ("true", "yes", "1"):
            self.fsdp = True
        self.fsdp_config = config
        _say_gone("fsdp …", f"FSDP2, {config}")


def check_trackers(names: str | Sequence[str] | None) -> None:
    """Refuse a tracker of --report_to that is not installed, in one line.

    Raises:
        UserError: names the extra that brings it.
    """
    for name in [names] if isinstance(names, str) else names or []:
        if name in TRACKERS and find_spec(name) is None:
            raise UserError(f"--report_to {name}: pip install {name} (the extra [{name}])")


def _say_gone(flag: str, now: str) -> None:
    logger.info("--%s is gone from transformers; using %s.", flag, now)


# --- the trainer ----------------------------------------------------------------------------------


class BriefProgress(ProgressCallback):
    """The stock progress bar, without the hundreds of numbers of single categories."""

    def on_log(self, args, state, control, logs, **kwargs):
        brief = {}
        for name, value in logs.items():
            if "/" not in name or "flagged/" in name:
                brief[name] = value
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
        refuse_unknown_layers(self.args, self.model)
        self.own_settings = settings or {}
        self.run_settings: dict[str, Any] = {}
        self.save_total_limit = self.args.save_total_limit
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(BriefProgress)

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = args.seed if args.data_seed is None else args.data_seed
        lengths = [len(ids) for ids in dataset["input_ids"]]
        return EpochLengthGroupedSampler(rows_a_step(args), lengths, seed, self.shuffle_batches)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        """Train, from a checkpoint where there is one.

        Raises:
            UserError: the checkpoint is of another run, or the training diverged.
            Stopped: Ctrl-C; it says how to go on.
        """
        self.run_settings = {
            **argument_settings(self.args),
            **rows_settings(self.train_dataset),
            **as_json(self.own_settings),
            "LoRA": lora_settings(self.model),
        }
        if resume_from_checkpoint is not None:
            refuse_another_run(self.args, resume_from_checkpoint, self.run_settings)
        # transformers would take what users put beside checkpoints, such as checkpoint-2-merged,
        # for old ones
        self.args.save_total_limit = None
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except KeyboardInterrupt:
            whole = checkpoints(self.args.output_dir)
            if not whole:
                raise Stopped("before the first checkpoint; to start again") from None
            raise Stopped(f"after {whole[-1].name}; to go on", self.args.goes_on_with) from None
        finally:
            self.args.save_total_limit = self.save_total_limit
        refuse_diverged(self)
        if adapters_are_zero(self):
            logger.warning(
                "The adapters are still zero after %d steps: nothing was learned; raise the "
                "learning rate, or lower --warmup_steps.",
                self.state.global_step,
            )
        return result

    def _save_checkpoint(self, model, trial):
        """The stock checkpoint, of weights that are numbers, with what its run was; old ones go."""
        refuse_diverged(self)
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            write_json(folder / SETTINGS, self.run_settings)
        super()._save_checkpoint(model, trial)
        if self.args.should_save and (self.save_total_limit or 0) > 0:
            self._drop_old_checkpoints()

    def _drop_old_checkpoints(self):
        """Keep the newest `--save_total_limit` checkpoints, the best one among them."""
        whole = checkpoints(self.args.output_dir)
        best = Path(self.state.best_model_checkpoint or "").name
        old = [path for path in whole[:-1] if path.name != best]
        surplus = max(0, len(whole) - self.save_total_limit)
        for path in old[:surplus]:
            remove_checkpoint(path)


def refuse_unknown_layers(args: TrainingArguments, model: torch.nn.Module) -> None:
    """Raise UserError where FSDP is told to split a model by layers that it does not have."""
    asked = (args.fsdp_config or {}).get("transformer_layer_cls_to_wrap") or []
    there = {type(module).__name__ for module in model.modules()}
    for name in asked if args.fsdp else ():
        if name not in there:
            own = sorted(one for one in there if one.endswith(("Layer", "Block")))
            flag = f"--fsdp_transformer_layer_cls_to_wrap {name}"
            raise UserError(f"{flag}: the model has no such layers; it has {', '.join(own)}")


# --- the loss on an answer's tokens ---------------------------------------------------------------


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
            whose `keep` says which tokens predict its labels and whose `owner` says of which row
            they are.
    """
    inputs = dict(batch)
    given = inputs.pop("labels")
    columns = inputs.pop("keep", None)
    owner = inputs.pop("owner", None)
    labels = given[:, 1:]
    if columns is None:
        columns = (labels != -100).any(0).nonzero()[:, 0]
        labels = labels[:, columns]
        starts = given[:, columns] == -100
    else:
        starts = torch.ones_like(labels, dtype=torch.bool)
        starts[0, 1:] = owner[1:] != owner[:-1]
    outputs = model(**inputs, use_cache=False, logits_to_keep=columns)
    return Answers(outputs, labels, starts)


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
    logits = answers.outputs.logits.float().flatten(0, 1)
    losses = cross_entropy(logits, labels, reduction="none")
    weights = torch.where(answers.starts, first_token_weight, 1.0).flatten()
    if count is None:
        count = (labels != -100).sum()
    return (losses * weights).sum() / torch.as_tensor(count).clamp(min=1)


class AnswerTrainer(LengthGroupedTrainer, SFTTrainer):
    """TRL's trainer with a loss that reads logits where an answer is and nowhere else.

    TRL's own scores every position, without Triton three times. What is trained is float32,
    whatever the base is.
    """

    # short rows, such as refusals and prompts alone, would all come at the end
    shuffle_batches = True

    def __init__(self, *args, first_token_weight: float = 1.0, **kwargs):
        """Take what the stock trainer takes, and the weight of an answer's first token."""
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


# --- the order of rows ----------------------------------------------------------------------------


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' LengthGroupedSampler with an order that is a function of seed and epoch (set by
    accelerate).
    """

    def __init__(
        self, batch_size: int, lengths: list[int], seed: int, shuffle_batches: bool = False
    ):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.shuffle_batches = shuffle_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = super().__iter__()
        if not self.shuffle_batches:
            return order
        batches = in_batches(list(order), self.batch_size)
        turn = torch.randperm(len(batches), generator=self.generator).tolist()
        last = len(batches) - 1  # which may be short
        turn.remove(last)
        turn.append(last)
        return chain.from_iterable(batches[i] for i in turn)


def in_batches(order: list[int], size: int) -> list[list[int]]:
    """Row numbers, `size` at a time."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def useful_token_share(lengths: Sequence[int], batch_size: int, seed: int) -> float:
    """Useful tokens / processed tokens of epoch 0 when each batch of `batch_size` rows is padded to
    its longest.
    """
    order = EpochLengthGroupedSampler(batch_size, list(lengths), seed)
    processed = 0
    for batch in in_batches(list(order), batch_size):
        longest = max(lengths[row] for row in batch)
        processed += longest * len(batch)
    return sum(lengths) / processed


# --- checkpoints ----------------------------------------------------------------------------------

NUMBERED = re.compile(r"checkpoint-0*[1-9]\d*")
# the trainer writes it last: a folder without it is half of a checkpoint
STATE = "trainer_state.json"
# written first: what the checkpoint's run was, and the mark of a folder as ours
SETTINGS = "recipe.json"


def numbered_entries(folder: Path | str) -> list[Path]:
    """What is called `checkpoint-<number>` in a folder, by number; checkpoint-0 is no step of
    training.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if NUMBERED.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def checkpoints(folder: Path | str) -> list[Path]:
    """The whole checkpoints of a run, oldest first: `checkpoint-<number>` with the trainer's state.

    Nothing else is ever resumed or removed, whatever its name begins with.
    """
    return [path for path in numbered_entries(folder) if is_whole(path)]


def is_whole(checkpoint: Path) -> bool:
    """Whether the trainer's state is there; a kill may have left half of it."""
    return _read_json(checkpoint / STATE) is not None


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint. Of a link only the link goes, not what it points to."""
    if not checkpoint.is_symlink():
        # first, so that what a kill leaves is not taken for whole
        (checkpoint / STATE).unlink(missing_ok=True)
    remove(checkpoint)


def checkpoint_to_resume(args: RecipeTrainingArguments) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means; `latest` (or `true`) is the
    newest in output_dir.

    It is asked before any work, and so is what else would end the run late.

    Raises:
        UserError: there is none, or output_dir holds one and the user said neither resume nor
            overwrite; it is of another run; output_dir cannot be written; one process has several
            GPUs.
    """
    check_output_folder(args.output_dir)
    if args.push_when_finished:
        check_push(args)
    if args.n_gpu > 1:
        raise UserError(
            "one process would share its GPUs by DataParallel: launch with torchrun or accelerate"
        )
    if args.fsdp and "LOCAL_RANK" not in os.environ:
        hint = 'launch with torchrun --nproc_per_node=1, or pass --fsdp ""'
        raise UserError(f"--fsdp splits a model over launched processes, and this is none: {hint}")
    wish = str(args.resume_from_checkpoint or "false")
    whole = checkpoints(args.output_dir)
    if wish.lower() == "false":
        if whole and not args.overwrite_output_dir:
            hint = f"pass --resume_from_checkpoint latest or {args.starts_over_with}"
            raise UserError(f"{args.output_dir} holds {whole[-1].name} of an earlier run; {hint}")
        _refuse_what_is_in_the_way(args)
        return None
    flag = f"--resume_from_checkpoint {wish}"
    if wish.lower() in ("latest", "true"):
        if not whole:
            hint = "holds no checkpoint; drop the flag to start"
            raise UserError(f"{flag}: {args.output_dir} {hint}")
        wish = str(whole[-1])
    elif not is_whole(Path(wish)):
        raise UserError(f"{flag}: no such checkpoint (a folder with {STATE})")
    if not Path(wish, SETTINGS).is_file():
        logger.info("%s does not say what its run was; it is resumed without a comparison.", wish)
    refuse_another_run(args, wish, argument_settings(args))
    return wish


def _refuse_what_is_in_the_way(args: TrainingArguments) -> None:
    """A run that starts would write its checkpoints into what bears their names and is none of
    ours.
    """
    for path in numbered_entries(args.output_dir):
        removable = args.overwrite_output_dir and (path.is_dir() or path.is_symlink())
        is_ours = is_whole(path) or (path / SETTINGS).is_file()
        if not (is_ours or removable):
            what = f"is no checkpoint of a training run (it has no {STATE})"
            raise UserError(f"{path}: {what}; move it elsewhere")


def start_over(args: TrainingArguments) -> None:
    """Remove the checkpoints of an earlier run, which `--resume_from_checkpoint latest` would take
    for this one's.

    `checkpoint_to_resume` has seen to it that they are ours, or that the user said
    `--overwrite_output_dir`.
    """
    if is_main_process():
        for path in numbered_entries(args.output_dir):
            remove_checkpoint(path)


# --- what is resumed is compared with what was asked ----------------------------------------------

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
    settings["sharding"] = "FSDP" if args.fsdp else None
    if args.deepspeed:
        settings["sharding"] = "ZeRO"
    return as_json(settings)


def rows_a_step(args: TrainingArguments) -> int:
    """Rows of an optimizer step over all processes and accumulated batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def rows_settings(rows: Dataset) -> dict[str, Any]:
    """How many encoded rows there are, and a fingerprint of their content and order."""
    names = [name for name in COMPARED_COLUMNS if name in rows.column_names]
    batches = rows.select_columns(names).iter(1000)
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
    return json.loads(json.dumps(value, default=sorted))


def refuse_another_run(args, checkpoint: str, asked: Mapping[str, Any]) -> None:
    """Raise UserError when a checkpoint is of a run with other settings than those that are asked
    for.

    Args:
        asked: some of the settings of the run that would resume.
    """
    recorded = _read_json(Path(checkpoint, SETTINGS)) or {}
    differences = []
    for name, value in asked.items():
        if recorded.get(name, value) != value:
            differences.append(f"{name} {recorded[name]} there and {value} here")
    if differences:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} is of another run: {'; '.join(differences)}; "
            f"give what it had, or start over with {args.starts_over_with}"
        )


# --- LoRA -----------------------------------------------------------------------------------------


def with_adapters(
    model: PreTrainedModel, asked: ModelConfig, where: str, layers: Sequence[int] | None = None
) -> PeftModel:
    """LoRA over a frozen model, in float32.

    Args:
        asked: TRL's words for it; `use_peft` must be true. The modules are all-linear, one pattern
            with .* for whole names, ends of names, or None for PEFT's own of the architecture.
        where: the flag that names the modules, for the message.
        layers: those that are adapted; None: all.

    Raises:
        UserError: there is no such module, or PEFT knows none for this architecture.
    """
    config = lora_config(asked)
    config.layers_to_transform = None if layers is None else list(layers)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"{where}: {one_line(error)}") from None


def lora_config(asked: ModelConfig) -> LoraConfig:
    """TRL's words as PEFT's; one name of a module is the end of a name, as several are."""
    config = get_peft_config(asked)
    modules = config.target_modules
    if isinstance(modules, str) and modules != "all-linear" and "*" not in modules:
        config.target_modules = {modules}  # as a text it would be a pattern for whole names
    return config


# --- a run that learned nothing, or diverged ------------------------------------------------------


DIVERGED = (
    "The training diverged (its {} are not numbers): nothing is saved; lower the learning rate"
)


def refuse_diverged(trainer: Trainer) -> None:
    """Raise UserError when a trained weight is no number. Collective: every rank must call it."""
    finite = all(part.isfinite().all() for _, part in trained_parts(trainer.model))
    if not everywhere(trainer, finite):
        raise UserError(DIVERGED.format("weights"))


def refuse_diverged_scores(scores: np.ndarray) -> None:
    """Raise UserError when a validation score is no number."""
    if not np.isfinite(scores).all():
        raise UserError(DIVERGED.format("scores"))


def trained_parts(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The trained parameters by name, of each what this process holds of it: ZeRO-3 or FSDP2 may
    have split it.
    """
    parts = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = getattr(parameter, "ds_tensor", parameter)
            if isinstance(part, DTensor):
                part = part.to_local()
            parts.append((name, part))
    return parts


def everywhere(trainer: Trainer, true_here: bool) -> bool:
    """Whether something is true in every process. Collective."""
    flag = torch.tensor([float(true_here)], device=trainer.args.device)
    return bool(trainer.accelerator.gather(flag).min() > 0)


def adapters_are_zero(trainer: Trainer) -> bool:
    """Whether there are LoRA adapters that are trained and that still add nothing. Collective."""
    added = [part for name, part in trained_parts(trainer.model) if "lora_B" in name]
    return everywhere(trainer, bool(added) and not any(part.any() for part in added))
