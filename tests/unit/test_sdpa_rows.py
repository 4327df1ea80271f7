"""What SDPA makes of rows laid end to end and of prompts padded on the left, family by family.

Without FlashAttention, which only GPUs have, `--packing` and batched generation rest on this.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from common.training import answers_loss, read_answers

WINDOW = {"sliding_window": 6}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen2, sliding": WINDOW | {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {},
    "mistral": WINDOW,
    "gemma": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "phi3": WINDOW,
    "smollm3": {},
    "olmo2": {},
    "granite": {},
}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    shape = SHAPE | FAMILIES[request.param]
    config = AutoConfig.for_model(request.param.partition(",")[0], **shape)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def rows() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(3, 100, (length,)) for length in (11, 5, 9)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_end_to_end_do_not_see_one_another(model, rows, checkpointing):
    """The loss of a packed batch is that of its rows one by one, windows and checkpointing
    included.
    """
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    examples = []
    for row in rows:
        ids = row.tolist()
        examples.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    end_to_end = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    packed = answers_loss(read_answers(model, end_to_end(examples)), 1)
    alone = DataCollatorForLanguageModeling(pad_token_id=0)
    single = sum(answers_loss(read_answers(model, alone([one])), 1) for one in examples)
    torch.testing.assert_close(packed, single)


def test_prompts_padded_on_the_left_write_what_they_write_alone(model, rows):
    """Also where the window is shorter than the padding."""
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    width = max(map(len, rows))
    padded = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        padded[place, width - len(row) :] = row
    mask = (padded != 0).long()
    together = model.generate(padded, attention_mask=mask, **options)[:, width:]
    for row, written in zip(rows, together, strict=True):
        ids = row[None]
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert alone[0, len(row) :].tolist() == written.tolist()
