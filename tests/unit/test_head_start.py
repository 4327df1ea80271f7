"""The head that starts from a linear probe: it fits, with a bias or without, in processes too."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts
import torch
from bases import bert
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.head_start import fit_head

LABELS = 3


def rows() -> Dataset:
    """96 rows of 4 to 20 random ids, by length; label k is true where id 50 + k is last but one."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    labels = []
    for i in range(96):
        ids = torch.randint(10, 45, (4 + i // 6,), generator=generator).tolist()
        kind = i % (LABELS + 1)
        ids[-2] = 50 + kind
        texts.append(ids)
        labels.append([float(k == kind) for k in range(LABELS)])
    return Dataset.from_dict({"input_ids": texts, "labels": labels})


def loss(outputs, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels)


def load(base: Path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=LABELS)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token_id = model.config.pad_token_id = 0
    return model, tokenizer


@pytest.mark.parametrize("family", ["llama", "bert"], ids=["without bias", "with a bias"])
def test_the_stock_model_then_knows_its_training_rows(family, tiny_base, tmp_path):
    """By the stock, padded forward: better than any constant, and the body is as it was."""
    model, tokenizer = load(tiny_base if family == "llama" else bert(tmp_path))
    before = {name: tensor.clone() for name, tensor in model.base_model.named_parameters()}
    fit_head(model, tokenizer, rows(), loss, torch.device("cpu"))
    batch = tokenizer.pad({"input_ids": rows()["input_ids"]}, return_tensors="pt")
    labels = torch.tensor(rows()["labels"])
    with torch.inference_mode():
        logits = model.eval()(**batch).logits
    constant = torch.logit(labels.mean(0)).expand_as(labels)
    best_constant = loss(SimpleNamespace(logits=constant), labels)
    assert loss(SimpleNamespace(logits=logits), labels) < 0.9 * best_constant
    # the bias is there, or stood in for
    assert logits.mean().item() == pytest.approx(constant.mean().item(), abs=0.5)
    for name, tensor in model.base_model.named_parameters():
        assert torch.equal(tensor, before[name]), name


SCRIPT = """
import sys
import torch
sys.path[:0] = sys.argv[3:]
from test_head_start import fit_head, load, loss, rows
torch.distributed.init_process_group("gloo")
model, tokenizer = load(sys.argv[1])
fit_head(model, tokenizer, rows(), loss, torch.device("cpu"))
torch.save(model.score.weight, f"{sys.argv[2]}/{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_fit_the_head_of_one(tiny_base, tmp_path):
    model, tokenizer = load(tiny_base)
    fit_head(model, tokenizer, rows(), loss, torch.device("cpu"))
    (tmp_path / "fit.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "fit.py", tiny_base, tmp_path]
    command += Path(__file__).parents[:2]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = scripts.run_together(command, [environment | rank for rank in scripts.ranks(2)])
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        weight = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(weight, model.score.weight, atol=1e-3, rtol=1e-2)
