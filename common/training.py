"""What training needs beyond the Hugging Face Trainer: dead flags mapped, length grouping that resumes, one saver."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from common.conversation import UserError
from common.run import device, is_main_process

logger = logging.getLogger(__name__)
DEAD = {"help": "Flag of the paper's command that today's transformers has dropped; mapped to "}


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """TrainingArguments with three differences.

    Flags of the papers' commands that died are mapped, and mentioned once. What this machine cannot do (bf16, tf32 and
    FSDP without an accelerator) is switched off and said, instead of failing or pretending. Defaults: length grouping
    on, reports to nobody.
    """

    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length | random | sequential"}
    )
    report_to: str = field(default="none", metadata={"help": "none | tensorboard | wandb | all"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start over although output_dir holds checkpoints."}
    )
    evaluation_strategy: str | None = field(default=None, metadata={"help": DEAD["help"] + "--eval_strategy"})
    warmup_ratio: float | None = field(
        default=None, metadata={"help": DEAD["help"] + "--warmup_steps (a number below 1 is a ratio)"}
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = field(
        default=None, metadata={"help": DEAD["help"] + "--fsdp_config"}
    )

    def __post_init__(self):
        if self.evaluation_strategy is not None:
            self.eval_strategy = _mapped(
                "evaluation_strategy", f"--eval_strategy {self.evaluation_strategy}", self.evaluation_strategy
            )
        if self.warmup_ratio is not None:
            self.warmup_steps = _mapped("warmup_ratio", f"--warmup_steps {self.warmup_ratio}", self.warmup_ratio)
        self.evaluation_strategy = self.warmup_ratio = None
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
        """One gloo group of the launched processes: without it each would train alone, and say nothing of it.

        Plain data parallel needs no more than `use_cpu`. With that, accelerate would leave DeepSpeed out; so for it the
        state is set up here, with the backend that transformers cannot be told.
        """
        if not self.deepspeed:
            self.use_cpu = True
        elif "LOCAL_RANK" in os.environ:
            with patch_environment(accelerate_use_deepspeed="true"):
                PartialState(backend="gloo")
            self.accelerator_config = {"use_configured_state": True}

    def _modern_fsdp(self) -> None:
        """FSDP2 through `fsdp_config`; gradient checkpointing as FSDP's own, which does not gather weights twice."""
        given = self.fsdp_config or {}
        if isinstance(given, str):
            given = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8"))
        words = set(self.fsdp.split()) if isinstance(self.fsdp, str) else set()
        known = {"true", "yes", "1", "full_shard", "shard_grad_op", "auto_wrap", "offload"}
        if words - known:
            raise UserError(f"--fsdp {self.fsdp}: FSDP2 knows full_shard, shard_grad_op, auto_wrap and offload")
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
    """The stock progress bar, whose log lines leave out what has a name per category (it stays in the log history)."""

    BRIEF = ("auprc", "f1", "recall", "fpr")

    def on_log(self, args, state, control, logs=None, **kwargs):
        brief = {k: v for k, v in (logs or {}).items() if "/" not in k or ("flagged/" in k and k.endswith(self.BRIEF))}
        super().on_log(args, state, control, logs=brief, **kwargs)


class LengthGroupedTrainer(Trainer):
    """A Trainer whose length-grouped order depends on seed and epoch alone.

    The stock sampler draws from the global generator, so that a resumed run sees another order than an uninterrupted
    one. Grouping by the GLOBAL batch gives any number of processes and accumulation steps the same batches.
    """

    shuffle_batches = False  # long batches first, as in transformers; where length says something of the label, True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(BriefProgress)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return EpochLengthGroupedSampler(batch, [len(ids) for ids in dataset["input_ids"]], seed, self.shuffle_batches)


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' LengthGroupedSampler with an order that is a function of seed and epoch (set by accelerate)."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int, shuffle_batches: bool = False):
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
            batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
            turn = torch.randperm(len(batches), generator=self.generator).tolist()
            turn.append(turn.pop(turn.index(len(batches) - 1)))  # the last may be short: it stays the last
            order = [row for i in turn for row in batches[i]]
        return iter(order)


def useful_token_share(lengths: Sequence[int], batch_size: int, seed: int) -> float:
    """Useful tokens / processed tokens of epoch 0 when each batch of `batch_size` rows is padded to its longest."""
    order = list(EpochLengthGroupedSampler(batch_size, list(lengths), seed))
    processed = 0
    for i in range(0, len(order), batch_size):
        batch = [lengths[j] for j in order[i : i + batch_size]]
        processed += max(batch) * len(batch)
    return sum(lengths) / processed


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means; `latest` (or `true`) is the newest in output_dir.

    Raises:
        UserError: there is none, or output_dir holds one and the user said neither resume nor overwrite.
    """
    # The trainer writes the state last: a folder without it is half of a checkpoint.
    whole = [path.parent for path in Path(args.output_dir).glob("checkpoint-*/trainer_state.json")]
    last = str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
    wish = args.resume_from_checkpoint
    if wish and str(wish).lower() in ("latest", "true"):
        if last is None:
            raise UserError(
                f"--resume_from_checkpoint {wish}: {args.output_dir} holds no checkpoint; drop the flag to start"
            )
        return last
    if wish and str(wish).lower() != "false":
        if not Path(wish, "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {wish}: no such checkpoint (a folder with trainer_state.json)")
        return str(wish)
    if last is not None and not args.overwrite_output_dir:
        raise UserError(
            f"{args.output_dir} holds {Path(last).name} of an earlier run; "
            "pass --resume_from_checkpoint latest or --overwrite_output_dir true"
        )
    return None


def start_over(args: TrainingArguments) -> None:
    """Remove the checkpoints of an earlier run, which `--resume_from_checkpoint latest` would take for this one's."""
    if is_main_process():
        for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def full_state_dict(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every weight, whole, on rank 0 (other ranks may get an empty dict): FSDP2, ZeRO-3, data parallel or one process.

    Collective: every rank must call it.
    """
    if any(isinstance(p, DTensor) for p in trainer.model.parameters()):
        return sharded_state_dict(trainer.model)
    wrapped = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    return trainer.accelerator.get_state_dict(wrapped)


def sharded_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The full weights of a model that `fully_shard` split into DTensors, on the CPU of rank 0. Collective."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_full(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a model folder that `from_pretrained` loads, from whole weights, on rank 0 only."""
    if is_main_process():
        model.save_pretrained(folder, state_dict=state_dict)
