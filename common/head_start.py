"""A head that starts from a linear probe instead of noise (LP-FT: Kumar et al. 2022, arXiv
2202.10054, section 4).
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.conversation import UserError

BATCH, WEIGHT_DECAY, ITERATIONS = 32, 0.1, 60


def fit_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    loss: Callable,
    device: torch.device,
) -> None:
    """Fit the classification head, in place, on the frozen features of `rows`; a whole, unsharded
    model.

    The features of a decoder at its last token share one direction that is 30 times larger than
    what tells texts apart: Adam spends a short run on it. L-BFGS on standardised features finds the
    best head at once, and the standardisation is folded back into the stock head. Launched
    processes share the rows; each ends with the same head.

    Args:
        rows: with `input_ids` and `labels`, sorted by length.
        loss: of (an object with `logits` [n, labels], labels [n, labels]), the mean over rows.
    """
    if len(rows) < max(2, PartialState().num_processes):
        raise UserError(f"{len(rows)} rows are too few to fit a head on")
    head = [
        m
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and m.out_features == model.num_labels
    ][-1]
    features, labels = _features(model.to(device).eval(), head, tokenizer, rows)
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    standard = (features - mean) / scale
    weight = torch.zeros(head.out_features, head.in_features, device=device, requires_grad=True)
    bias = torch.zeros(head.out_features, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        total = (
            loss(SimpleNamespace(logits=standard @ weight.T + bias), labels)
            + WEIGHT_DECAY / 2 * weight.square().sum()
        )
        total.backward()
        return total

    optimizer.step(step)
    with torch.no_grad():
        weight, bias = weight / scale, bias - (weight / scale) @ mean
        # most decoders: the direction in which every text is (nearly) 1 stands for the bias
        if head.bias is None:
            constant = mean / scale.square()
            weight, bias = weight + bias[:, None] * constant / (constant @ mean), None
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    model.train()


@torch.no_grad()
def _features(model, head, tokenizer, rows: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head reads [rows, hidden] and the labels [rows, labels], gathered from all
    processes.
    """
    state, seen = PartialState(), []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features, labels, mine = (
        [],
        [],
        rows.shard(state.num_processes, state.process_index, contiguous=False),
    )
    for start in tqdm(
        range(0, len(mine), BATCH), desc="fitting the head", disable=not state.is_main_process
    ):
        part = mine[start : start + BATCH]
        batch = tokenizer.pad({"input_ids": part["input_ids"]}, return_tensors="pt").to(
            model.device
        )
        model(**batch)
        read = seen.pop()
        if read.dim() == 3:  # a score at every position: the last attended one counts
            last = (
                batch["attention_mask"] * torch.arange(read.shape[1], device=read.device)
            ).argmax(-1)
            read = read[torch.arange(len(read), device=read.device), last]
        features.append(read.float().cpu())
        labels.append(torch.tensor(part["labels"]))
    hook.remove()
    gathered = [(torch.cat(features), torch.cat(labels))]
    # a gather of gloo with itself made every later step of training a third slower
    if state.num_processes > 1:
        gathered = gather_object(gathered)
    return tuple(torch.cat(parts).to(model.device) for parts in zip(*gathered, strict=True))
