"""The one saver: a trained guard as a folder that is whole or not there, and equal to what was
trained.

`whole_folder` gives a partial folder inside of the output folder. Everything is written there,
loaded from there again and compared; only then its files take the places of an earlier guard's, the
card last. A disk that fills up, a kill or a comparison that fails leaves the earlier guard as it
was.
"""

import copy
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.conversation import UserError, log_odds, one_line
from common.run import make_readable

QUANTIZED = ("Params4bit", "Int8Params")  # bitsandbytes' parameters
CHECKPOINTED = "CheckpointWrapper"  # torch's, around a layer that FSDP2 computes again
CARD_FILE = "guard.json"
PARTIAL = ".partial"
# what a model's folder holds in the end
FINISHED = (CARD_FILE, "config.json", "adapter_config.json")

# What a guard's folder holds of the guard: an earlier guard's go when a new one comes, because a
# shard of old weights beside a new config would be loaded. Checkpoints, logs and results stay.
OF_A_GUARD = (
    *FINISHED,
    "adapter",
    "adapter_model.safetensors",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "model.onnx",
    "model.onnx.data",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "README.md",
    "run.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "training.json",
    "vocab.json",
    "vocab.txt",
)


# --- the folder -----------------------------------------------------------------------------------


def refuse_to_overwrite(
    folder: Path | str,
    overwrite: bool,
    names: Sequence[str] = FINISHED,
    flag: str = "--overwrite_output_dir true",
) -> None:
    """Refuse to train into a folder that holds a model, also where its checkpoints were removed.

    Args:
        overwrite: whether the user asked for that.
        names: what marks the folder as somebody's result.
        flag: what the user can pass to have it replaced.

    Raises:
        UserError: one of `names` is there, and not of a guard whose saving was interrupted.
    """
    for name in names:
        if Path(folder, name).exists() and not (overwrite or is_unfinished(folder)):
            hint = f"pass {flag} to replace it, or another name"
            raise UserError(f"{folder} holds {name} of an earlier run; {hint}")


def is_unfinished(folder: Path | str, last: str = CARD_FILE) -> bool:
    """Whether the saving of a guard was interrupted here, and no earlier guard is left."""
    return Path(folder, PARTIAL).is_dir() and not Path(folder, last).exists()


@contextmanager
def whole_folder(folder: Path | str, last: str = CARD_FILE) -> Iterator[Path]:
    """A partial folder whose files become those of `folder` when the block ends well.

    One process enters it. Within the block an earlier guard stays whole. Then its card is taken
    away, the files change places one by one, and the new card comes last: without a card the folder
    is "not finished" to `load_guard`.

    Args:
        last: the file without which nobody takes the folder for a guard; the block must write it.

    Raises:
        UserError: the files could not be written; an earlier guard is as it was.
    """
    folder = Path(folder)
    partial = folder / PARTIAL
    unfinished = is_unfinished(folder, last)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _empty(partial)
        yield partial
        make_readable(partial)
    except BaseException as error:
        _empty(partial)
        if not unfinished and partial.is_dir():
            partial.rmdir()
        if isinstance(error, OSError | SafetensorError):
            what = f"nothing is saved ({one_line(error)}); what was there before is as it was"
            raise UserError(f"{folder}: {what}") from error
        raise
    if not (partial / last).is_file():
        raise ValueError(f"{last} was not written")
    _move(partial, folder, last)


def _move(partial, folder, last) -> None:
    """Put the files in their places. A kill at any moment leaves no card, or a whole guard."""
    names = [path.name for path in partial.iterdir() if path.name != last]
    (folder / last).unlink(missing_ok=True)
    for pattern in (*OF_A_GUARD, *names):
        for path in folder.glob(pattern):
            remove(path)
    for name in (*names, last):
        os.replace(partial / name, folder / name)
    partial.rmdir()


def remove(path: Path) -> None:
    """Remove a file, a folder with what it holds, or a link without what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _empty(folder) -> None:
    for path in folder.glob("*"):
        remove(path)


# --- weights --------------------------------------------------------------------------------------


def full_state_dict(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every weight, whole, on rank 0: FSDP2, ZeRO-3, data parallel or one process.

    Other ranks may get an empty dict. Collective: every rank must call it.
    """
    model = trainer.model
    if trainer.is_deepspeed_enabled:
        model = trainer.model_wrapped
    return trainer.accelerator.get_state_dict(model)


def save_model(
    model: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write a model folder that `from_pretrained` loads, from whole weights. One process calls it."""
    model.save_pretrained(folder, state_dict=dict(state_dict))
    tokenizer.save_pretrained(folder)


def save_adapter(
    model: PeftModel,
    state_dict: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write an adapter folder that stock PEFT loads, from whole weights, and read it again. One
    process calls it.

    With the tokenizer beside it PEFT knows that embeddings were added. PEFT's own README.md, a form
    to fill in that names a local path, is left out. Where checkpointing by FSDP2 wraps the layers,
    PEFT finds none of their adapters by name: there it is given the bare model.

    Raises:
        UserError: the file does not hold the weights that are in memory.
    """
    weights = dict(state_dict)
    for module in model.modules():
        if type(module).__name__.endswith(CHECKPOINTED):
            model = _skeleton(model)
            break
    model.save_pretrained(folder, state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    written = load_file(folder / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model, state_dict=weights)
    for name, tensor in expected.items():
        if name not in written or not torch.equal(written[name], tensor.detach().cpu()):
            raise UserError(f"{folder}: {name} is not what was trained; nothing is saved")
    trained = sum("lora_" in name for name in weights)
    if sum("lora_" in name for name in written) != trained:
        what = f"does not hold the {trained} adapters that were trained"
        raise UserError(f"{folder}: {what}; nothing is saved")


def merged_model(model: PeftModel, state_dict: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """The trained model with its adapters merged, in float32 on the CPU. One process calls it.

    The base is not loaded again: modules that its checkpoint lacks would be drawn anew, and a
    quantized base would be another one. The result holds weights to be saved; it cannot be run.

    Args:
        state_dict: every weight of `model`, whole; `model` itself may be sharded, and stays as it
            is.
    """
    unset_hf_deepspeed_config()  # the merge is done by this process alone
    base = model.get_base_model()
    skeleton = _skeleton(model)
    weights = _dequantized(model, state_dict)
    for name, tensor in weights.items():  # the merge changes them
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        weights[name] = tensor.detach().to("cpu", dtype, copy=True)
    skeleton.load_state_dict(weights, assign=True)
    skeleton.get_base_model().tie_weights()
    merged = skeleton.merge_and_unload()
    merged.generation_config = getattr(base, "generation_config", None)
    return merged


def _skeleton(model: PeftModel) -> PeftModel:
    """The same modules without weights, and without what training wraps around them."""
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = next(kind for kind in type(base).__mro__ if not issubclass(kind, FSDPModule))
    adapters = copy.deepcopy(model.peft_config["default"])
    named = adapters.base_model_name_or_path
    with torch.device("meta"):
        skeleton = get_peft_model(kind(config), adapters)
    skeleton.peft_config["default"].base_model_name_or_path = named
    return skeleton


def _dequantized(model, state_dict) -> dict[str, torch.Tensor]:
    """Weights of a 4- or 8-bit base as the numbers that the training computed with."""
    weights = dict(state_dict)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if type(own.get("weight")).__name__ not in QUANTIZED:
            continue
        for key in state_dict:
            if key.startswith((f"{name}.weight", f"{name}.SCB")):
                del weights[key]
        weights[f"{name}.weight"] = dequantize_module_weight(module)
    return weights


# --- comparing ------------------------------------------------------------------------------------

COMPARED_ROWS = 8  # are enough to compare a model in memory with the folder it was written to


def predictions(trainer: Trainer, rows: Dataset) -> np.ndarray:
    """What the model in memory predicts, in the order of the rows, and without measuring it.

    Collective: every rank must call it.
    """
    args = trainer.args
    measure = trainer.compute_metrics
    order = args.train_sampling_strategy
    trainer.compute_metrics = None
    args.train_sampling_strategy = "sequential"
    try:
        return trainer.predict(rows).predictions
    finally:
        trainer.compute_metrics = measure
        args.train_sampling_strategy = order


def free_memory(trainer: Trainer) -> None:
    """Let go of what only training needs, so that the guard can be loaded beside its model."""
    trainer.optimizer = None
    trainer.lr_scheduler = None
    trainer.accelerator.free_memory()


def check_equal(
    expected: Sequence[Mapping[str, float]],
    reloaded: Sequence[Mapping[str, float]],
    tolerance: float,
) -> None:
    """Compare what the model in memory says with what the folder says that it was written to.

    Rounding moves all scores by a little, and in a 16-bit model a few by more; another model moves
    most of them. So the mean difference is held to a fifth of the tolerance, the greatest to four
    times as much. Measured on the bundled model, mixed precision against 16 bits: 0.01 and 0.05.

    Args:
        expected: of the model in memory, one dict a row: label -> probability.
        reloaded: of the folder, on the same rows.
        tolerance: how far log-odds may lie apart, by the coarser number format of the two.

    Raises:
        UserError: they differ; the message names label and probabilities where they differ most.
    """
    differences = [0.0]
    worst = ""
    for row, (trained, said) in enumerate(zip(expected, reloaded, strict=True), start=1):
        for label, probability in trained.items():
            other = said.get(label, math.nan)
            apart = math.inf
            if math.isfinite(probability) and math.isfinite(other):
                apart = abs(log_odds(probability) - log_odds(other))
            if apart > max(differences):
                there = f"{probability:.4f} in memory, {other:.4f} from the folder"
                worst = f"row {row}, {label}: {there}"
            differences.append(apart)
    mean = np.mean(differences[1:] or [0.0])
    if not (mean <= tolerance / 5 and max(differences) <= 4 * tolerance):  # NaN is not equal
        raise UserError(f"what was saved is not what was trained: {worst}; nothing is saved")
