"""A guard that is LoRA adapters and a linear head on a frozen chat model (LoRA-Guard, arXiv 2407.02987)."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.bundled import resolve_model
from common.conversation import Messages, UserError, Verdict, last_turns
from common.engines import apply_adapter
from common.fit import grow_embeddings
from common.run import inference_dtype
from common.templates import Part
from guards.classifier import ClassifierGuard

INPUTS = ("pair", "prompt", "response")


def input_kind(messages: Messages) -> str:
    """Which of INPUTS a conversation is."""
    prompt, response = last_turns(messages)
    return "prompt" if response is None else "response" if prompt is None else "pair"


class LoraGuard(ClassifierGuard):
    """The adapter folder of examples/lora_guard, as a batched judge. (Chatting with it: riding.py of that recipe.)

    A conversation that ends with the user's turn is judged as a prompt, one with an answer as a pair, an answer alone
    as a response; of these only what it was trained on, as guard.json's `inputs` says. The unsafe probability is the
    label `unsafe`, or without that label (the paper's first version) the highest of the categories.
    """

    def _load(self, model: str, labels: Sequence[str] | None, template: str | None, trust_remote_code: bool) -> None:
        card = json.loads((Path(model) / "guard.json").read_text(encoding="utf-8"))
        self.labels, self.inputs = list(labels or []), card.get("inputs", ["pair"])
        depth = {"num_hidden_layers": n} if (n := card.get("num_hidden_layers")) else {}
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it would report the head as missing that PEFT brings a line later
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
            base, loading = AutoModelForSequenceClassification.from_pretrained(
                resolve_model(card["base_model"]),
                num_labels=len(self.labels),
                dtype=inference_dtype(),
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **depth,
            )
            if lacking := [key for key in loading["missing_keys"] if not key.startswith("score.")]:
                raise ValueError(f"the base lacks {', '.join(sorted(lacking))}")
            grow_embeddings(self.tokenizer, base)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(f"{model}: cannot be loaded as a LoRA guard: {error!s:.200}") from None
        finally:
            transformers.logging.set_verbosity(level)
        self.model = apply_adapter(base, model, card["base_model"])
        self.head = next(m for name, m in self.model.named_modules() if name.endswith("score.modules_to_save.default"))
        if card.get("head_bias"):  # a stock head has none, so it is kept beside the adapter
            self.head.bias = torch.nn.Parameter(torch.tensor(card["head_bias"]))
        self.head.float().register_forward_pre_hook(lambda _, features: (features[0].float(),))
        if inference_dtype() == torch.float32:  # a bf16 base would round the adapters away
            self.model = self.model.merge_and_unload()

    def _judged(self) -> tuple[str, ...]:
        prompts, others = "prompt" in self.inputs, bool({"pair", "response"} & set(self.inputs))
        return ("prompt_unsafe",) * prompts + ("response_unsafe",) * others

    def _render(self, messages: Messages) -> list[Part]:
        kind = input_kind(messages)
        if kind not in self.inputs:
            raise UserError(f"not trained on a {kind}, only on: {', '.join(self.inputs)}")
        return super()._render(messages)

    def _conclude(self, verdict: Verdict, messages: Messages) -> None:
        unsafe = verdict.categories.pop("unsafe", None)
        unsafe = max(verdict.categories.values()) if unsafe is None else unsafe
        if input_kind(messages) == "prompt":
            verdict.prompt_unsafe = unsafe
        else:
            verdict.response_unsafe = unsafe
