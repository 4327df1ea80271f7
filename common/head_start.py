"""A head that starts from a linear probe, not from noise (Kumar et al. 2022, arXiv 2202.10054)."""

import torch
from accelerate.utils import tqdm
from transformers.modeling_outputs import SequenceClassifierOutput


def fit_head(model, tokenizer, rows, loss, device: torch.device) -> None:
    """Fit the classification head, in place, on the frozen features of `rows`, by L-BFGS.

    L-BFGS needs features that are standardised: one direction of a decoder's features is 30 times
    larger than the rest.
    """
    for name, module in model.to(device).eval().named_modules():
        if getattr(module, "out_features", None) == model.num_labels:
            name_of_head = name  # the last one
    head = model.get_submodule(name_of_head)
    model.set_submodule(name_of_head, torch.nn.Identity())  # the logits are what the head reads
    found = []
    labels = []
    for part in tqdm(rows.iter(32), total=-(-len(rows) // 32), desc="fitting the head"):
        batch = tokenizer.pad(part, return_tensors="pt").to(device)
        labels.append(batch.pop("labels"))
        with torch.no_grad():
            found.append(model(**batch).logits.float())
    model.set_submodule(name_of_head, head)
    features = torch.cat(found)
    mean = features.mean(0)
    scale = features.std(0, correction=0).clamp(min=1e-6)
    weight = torch.zeros(head.weight.shape, device=device, requires_grad=True)
    bias = torch.zeros(len(weight), device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        logits = (features - mean) / scale @ weight.T + bias
        total = loss(SequenceClassifierOutput(logits=logits), torch.cat(labels))
        total += 0.05 * weight.square().sum()
        total.backward()
        return total

    optimizer.step(step)
    fitted = weight.detach() / scale
    rest = bias.detach() - fitted @ mean
    if head.bias is None:  # the direction in which every text is (nearly) 1 stands for the bias
        fitted += torch.outer(rest, mean / scale.square()) / (mean / scale).square().sum()
    else:
        head.bias.data.copy_(rest)
    head.weight.data.copy_(fitted)
