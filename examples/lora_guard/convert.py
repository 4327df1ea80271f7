"""Turn an adaptor of the paper's own code (a `.pt`) into an adapter folder, which PEFT and
`load_guard` read.

python convert.py run/config.json run/checkpoints/adaptor_state_dict_epoch_2.pt output/converted
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from adapter import HEAD, WEIGHTS, guard_card, with_bias
from safetensors.torch import save_file
from transformers import AutoTokenizer
from trl import ModelConfig

from common.bundled import resolve_model
from common.conversation import UserError
from common.data import read_json, taxonomy
from common.run import expand_home, loading_model, run_cli
from common.saving import refuse_to_overwrite, whole_folder
from common.training import lora_config
from guards import add_probe

CATEGORIES = taxonomy("beavertails")  # the paper's outputs, in their order
# The reference wraps the inner transformer, `model` in Llama; a classifier holds it by that name.
THEIRS = "lm_features.base_model.model."
OURS = "base_model.model.model."


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("config", type=expand_home, help="config.json of the run")
    parser.add_argument("adaptor", type=expand_home, help="the .pt file")
    parser.add_argument("folder", type=expand_home, help="the new adapter folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a guard that is there")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the base"
    )
    args = parser.parse_args()
    refuse_to_overwrite(args.folder, args.overwrite, flag="--overwrite")
    config = read_json(args.config)
    if not isinstance(config, dict):
        raise UserError(f"{args.config}: expected an object, found {config!r:.60}")
    convert_reference(
        Path(args.adaptor),
        config,
        Path(args.folder),
        args.trust_remote_code,
    )
    print(f"Wrote {args.folder}")


def convert_reference(
    pt: Path, config: Mapping[str, Any], folder: Path, trust_remote_code: bool = False
) -> None:
    """Write the adapter folder of a `.pt`, whole or not at all.

    Both versions are read: v2 with 15 outputs (unsafe first), v1 with 14, told by the shape of the
    head and not by what the config says.

    Args:
        config: the run's config.json: `hf_model_id`, and `lora_alpha` where it is not twice the
            rank.

    Raises:
        UserError: not such a file, or the base model cannot be loaded.
    """
    base = config.get("hf_model_id")
    if not isinstance(base, str):
        raise UserError("config.json, field hf_model_id: expected the name of the base model")
    tensors = read_tensors(pt)
    head = tensors.pop("clf_head.weight")
    bias = tensors.pop("clf_head.bias", None)
    lora = {}
    for key, tensor in tensors.items():
        name = key.replace(THEIRS, OURS).replace(".default.weight", ".weight")
        lora[name] = tensor.float().contiguous()
    ranks = {len(tensor) for name, tensor in lora.items() if ".lora_A." in name}
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in lora}
    asked = ModelConfig(
        use_peft=True,
        lora_task_type="SEQ_CLS",
        lora_r=max(ranks),
        lora_alpha=config.get("lora_alpha", 2 * max(ranks)),
        lora_dropout=0.0,
        lora_target_modules=sorted(modules),
        lora_modules_to_save=["classifier", "score"],
    )
    peft = lora_config(asked)
    peft.inference_mode = True
    peft.base_model_name_or_path = resolve_model(base)
    code = {"trust_remote_code": trust_remote_code}
    with loading_model(base, flag="hf_model_id"):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(base), **code)
    has_unsafe_head = len(head) > len(CATEGORIES)
    card = guard_card(
        base,
        unsafe_head=has_unsafe_head,
        inputs=["pair"],
        max_length=512,
    )
    with whole_folder(folder) as partial:
        peft.save_pretrained(partial)
        tensors = {**lora, HEAD: head.float().contiguous()}
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save_pretrained(partial)
        add_probe(partial, with_bias(card, bias), **code)


def read_tensors(pt: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adaptor file, checked; nothing but tensors is unpickled.

    Raises:
        UserError: it cannot be read, or is none of the paper's code.
    """
    if not pt.is_file():
        raise UserError(f"{pt}: no such file")
    try:
        tensors = torch.load(pt, map_location="cpu", weights_only=True)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    except Exception as error:  # what a pickle raises can be anything
        reason = type(error).__name__
        raise UserError(f"{pt}: refused, it is not made of tensors alone ({reason})") from None
    outputs = shapes.pop("clf_head.weight", (0,))[0]
    shapes.pop("clf_head.bias", None)
    if outputs not in (len(CATEGORIES), len(CATEGORIES) + 1) or not shapes:
        wanted = "expected LoRA weights and a head of 14 or 15 outputs"
        raise UserError(f"{pt}: {wanted}, found {outputs} outputs")
    for key in shapes:
        if not key.startswith(THEIRS) or ".lora_" not in key:
            raise UserError(f"{pt}: {key} is no weight that an adaptor of the paper's code has")
    return tensors


if __name__ == "__main__":
    run_cli(main)
