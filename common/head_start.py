"""A head that starts from a linear probe, not from noise (Kumar et al. 2022, arXiv 2202.10054)."""

import torch
from accelerate.utils import tqdm
from transformers.modeling_outputs import SequenceClassifierOutput


def fit_head(model, tokenizer, rows, loss, device: torch.device) -> None:
    """Fit the classification head, in place, on the frozen features of `rows`, by L-BFGS. It needs
    them standardised: one direction of a decoder's features is 30 times larger than the rest."""
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    name = [n for n in linear if model.get_submodule(n).out_features == model.num_labels][-1]
    head = model.to(device).eval().get_submodule(name)
    model.set_submodule(name, torch.nn.Identity())  # the logits are what the head would read
    batches = [tokenizer.pad(part, return_tensors="pt").to(device) for part in rows.iter(32)]
    labels = torch.cat([batch.pop("labels") for batch in batches])
    with torch.no_grad():
        bar = tqdm(batches, desc="fitting the head")
        features = torch.cat([model(**batch).logits.float() for batch in bar])
    model.set_submodule(name, head)
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    weight = torch.zeros(head.weight.shape, device=device, requires_grad=True)
    bias = torch.zeros(len(weight), device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        outputs = SequenceClassifierOutput(logits=(features - mean) / scale @ weight.T + bias)
        total = loss(outputs, labels) + 0.05 * weight.square().sum()
        total.backward()
        return total

    optimizer.step(step)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        rest = bias - head.weight @ mean
        if head.bias is not None:
            head.bias.copy_(rest)
        else:  # the direction in which every text is (nearly) 1 stands for the bias
            head.weight += torch.outer(rest, mean / scale.square()) / (mean / scale).square().sum()
