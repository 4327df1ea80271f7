"""The head that starts from a linear probe: it fits, with a bias or without, and on rows shared by
processes.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

from common.head_start import fit_head

LABELS = 3


def rows() -> Dataset:
    """96 rows of 4 to 20 random ids, sorted by length; label k is true where id 50 + k is the last
    but one.
    """
    generator = torch.Generator().manual_seed(0)
    texts, labels = [], []
    for i in range(96):
        ids = torch.randint(10, 45, (4 + i // 6,), generator=generator).tolist()
        kind = i % (LABELS + 1)
        ids[-2] = 50 + kind
        texts.append(ids)
        labels.append([float(k == kind) for k in range(LABELS)])
    return Dataset.from_dict({"input_ids": texts, "labels": labels})


def loss(outputs, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels)


def of_all(model, tokenizer, data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the stock forward pass, batched in one, and the labels."""
    batch = tokenizer.pad({"input_ids": data["input_ids"]}, return_tensors="pt")
    with torch.inference_mode():
        return model.eval()(**batch).logits, torch.tensor(data["labels"])


def llama(path: str):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = LlamaForSequenceClassification.from_pretrained(
        path, num_labels=LABELS, dtype=torch.float32
    )
    tokenizer.pad_token_id, model.config.pad_token_id = 0, 0
    return model, tokenizer


def bert(path: str):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token_id = 0
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    return BertForSequenceClassification(
        BertConfig(vocab_size=500, num_labels=LABELS, **sizes)
    ), tokenizer


@pytest.mark.parametrize("build", [llama, bert])
def test_the_stock_model_then_knows_its_training_rows(build, tiny_base):
    """With a bias in the head (BERT) and without (Llama), by the stock, padded forward: better than
    any constant.
    """
    model, tokenizer = build(tiny_base)
    body = {
        name: p.clone()
        for name, p in model.named_parameters()
        if "score" not in name and "classifier" not in name
    }
    fit_head(model, tokenizer, rows(), loss, torch.device("cpu"))
    logits, labels = of_all(model, tokenizer, rows())
    constant = torch.logit(labels.mean(0)).expand_as(labels)
    fitted, best_constant = (
        loss(SimpleNamespace(logits=scores), labels) for scores in (logits, constant)
    )
    assert fitted < 0.9 * best_constant
    # the bias is there, or stood in for
    assert logits.mean().item() == pytest.approx(constant.mean().item(), abs=0.5)
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in body.items())


@pytest.mark.slow
def test_two_processes_fit_the_head_of_one(tiny_base, tmp_path):
    model, tokenizer = llama(tiny_base)
    fit_head(model, tokenizer, rows(), loss, torch.device("cpu"))
    script = tmp_path / "fit.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]}\n"
        "from test_head_start import fit_head, llama, loss, rows\n"
        "torch.distributed.init_process_group('gloo')\n"
        "model, tokenizer = llama(sys.argv[1])\n"
        "fit_head(model, tokenizer, rows(), loss, torch.device('cpu'))\n"
        "torch.save(model.score.weight, f'{sys.argv[2]}/{torch.distributed.get_rank()}.pt')\n"
        "torch.distributed.destroy_process_group()\n"
    )
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    environments = [environment | rank for rank in scripts.ranks(2)]
    done = scripts.run_together([sys.executable, script, tiny_base, tmp_path], environments)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        weight = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(weight, model.score.weight, atol=1e-3, rtol=1e-2)
