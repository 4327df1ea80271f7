"""FSDP2 as accelerate prepares it, sharded over two CPU processes: what a GPU would do, in float32.

`Trainer` asks accelerate for FSDP only where there is an accelerator. Here the same functions of
accelerate are called by hand.
"""

from pathlib import Path

import pytest
import scripts
import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from checks import read_json
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

DECODERS = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "mistral",
    "phi3",
    "smollm3",
    "olmo2",
]
ENCODERS = ["modernbert", "bert", "roberta", "xlm-roberta"]

SCRIPT = """
import copy, json, sys, torch
from pathlib import Path
from types import SimpleNamespace
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer
from common.saving import merged_model, save_adapter, save_model
from common.training import trained_parts

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
kind, tokenizer, folder = sys.argv[1:]
folder = Path(folder)
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
torch.manual_seed(0)
shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64)
shape |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
if kind == "lora":
    config = AutoConfig.for_model("llama", **shape, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config)
    lora = dict(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False)
    model.name_or_path = "base"  # as from_pretrained notes it
    model = get_peft_model(model, LoraConfig(**lora))
else:
    config = AutoConfig.for_model("qwen2", **shape, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
reference = copy.deepcopy(model.train())
ids = torch.randint(3, 100, (8, 12), generator=torch.Generator().manual_seed(1))

def loss_of(model, rows):
    logits = model(input_ids=rows).logits
    if kind == "lora":
        return logits.square().sum() / (8 * 3)
    labels = rows[:, 1:].flatten()
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum") / (8 * 11)

loss_of(reference, ids).backward()
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", activation_checkpointing=True
)
accelerator = SimpleNamespace(
    state=SimpleNamespace(fsdp_plugin=plugin),
    mixed_precision="no",
    is_main_process=rank == 0,
    device=torch.device("cpu"),
)
plugin.set_auto_wrap_policy(model)
model = fsdp2_prepare_model(accelerator, fsdp2_apply_ac(accelerator, model))
layers = [name for name, part in model.named_modules() if isinstance(part, FSDPModule)]

mine = ids[rank * 4 : rank * 4 + 4]
for rows, is_last in ((mine[:2], False), (mine[2:], True)):  # as accelerate accumulates
    model.set_requires_gradient_sync(is_last)
    (2 * loss_of(model, rows)).backward()
apart = [0.0]
whole = {name.replace("._checkpoint_wrapped_module", ""): p for name, p in model.named_parameters()}
for name, parameter in reference.named_parameters():
    if parameter.requires_grad:
        difference = whole[name].grad.full_tensor() - parameter.grad
        apart.append(difference.abs().max().item())
held = sum(part.numel() for _, part in trained_parts(model))
options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
state_dict = get_model_state_dict(model, options=options)  # as accelerate's get_state_dict
if rank == 0:
    assert set(state_dict) == set(reference.state_dict())
    trained = sum(p.numel() for p in reference.parameters() if p.requires_grad)
    found = dict(layers=layers, apart=max(apart), held=held / trained)
    if kind == "lora":
        save_adapter(model, state_dict, tokenizer, folder / "adapter")
        model = merged_model(model, state_dict)
        state_dict = model.state_dict()
        reference = reference.merge_and_unload()
    save_model(model, state_dict, tokenizer, folder / "model")
    torch.save(reference.state_dict(), folder / "expected")
    (folder / "found.json").write_text(json.dumps(found))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def sharded(kind: str, tokenizer: Path, folder: Path) -> dict:
    """Run the script in two processes; what the first has written down."""
    script = folder / "shard.py"
    script.write_text(SCRIPT)
    scripts.launch("moderation", script, kind, tokenizer, folder, processes=2, threads=1)
    return read_json(folder / "found.json")


def check_adapter(folder: Path) -> None:
    """It is whole: PEFT looks for adapters by the modules' names, and checkpointing changes these;
    of all weights it wrote the head alone.
    """
    written = load_file(folder / "adapter_model.safetensors")
    lora = [name for name in written if "lora_" in name]
    assert len(lora) == 2 * 7 * 2  # A and B of seven matrices in two layers
    assert "base_model.model.score.weight" in written
    config = read_json(folder / "adapter_config.json")
    assert config["base_model_name_or_path"] == "base"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model"), [("lora", "base_model.model.model"), ("tied", "model")])
def test_gradients_of_accumulated_batches_equal_one_process(kind, model, tiny_base, tmp_path):
    """With checkpointing, LoRA under a head, and an output layer that is the embedding; and what is
    saved is what was trained.
    """
    found = sharded(kind, tiny_base, tmp_path)
    assert {f"{model}.layers.0", f"{model}.layers.1"} <= set(found["layers"])
    assert found["apart"] < 1e-6
    assert found["held"] == pytest.approx(0.5, abs=0.02)  # by this process, of two
    expected = torch.load(tmp_path / "expected", weights_only=True)
    saved = load_file(tmp_path / "model/model.safetensors")
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name])
    # what is tied may be written twice: the gathered weights share no memory
    assert set(expected) - set(saved) <= {"lm_head.weight"}
    architecture = read_json(tmp_path / "model/config.json")["architectures"]
    assert not architecture[0].startswith("FSDP")
    if kind == "lora":
        check_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_a_model_names_the_layers_that_it_is_split_by(family):
    """Without --fsdp_transformer_layer_cls_to_wrap accelerate asks it, and refuses what is not
    there.
    """
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "vocab_size": 100, "pad_token_id": 0}
    if family in DECODERS:
        shape |= {"num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(family, **shape)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    names = model._no_split_modules
    assert any(name.endswith("Layer") for name in names)
    assert all(get_module_class_from_name(model, name) for name in names)
