"""The verdicts of many arms on one base: it is loaded once, and the layers that no arm changes are
run once.
"""

import gc
import json
from collections.abc import Sequence
from typing import Any

import torch
from config import Config
from formats import log_odds, logits_at_labels, read
from train import load_base
from trunk import Trunk

from common.conversation import pair
from common.engines import apply_adapter
from guards.card import read_card
from guards.lora import find_base

BATCH = 32  # prompts of a forward pass


class SharedBase:
    """The guard that the config's arms are adapters of, and what its lower layers make of all
    prompts.
    """

    def __init__(self, config: Config, items: Sequence[Any]):
        self.config, self.texts = config, [item.text for item in items]
        self.guard = self.trunk = self.model = None
        self.fits = True  # as far as is known

    def serves(self, line: Any) -> bool:
        """Whether an arm is asked here: an adapter in the last layers of the config's base, in the
        guard's format.
        """
        values, section = self.config.training, self.config.llama_guard
        if (
            line.folder is None
            or line.probe
            or line.query != "guard"
            or values.lora_last_layers is None
        ):
            return False
        if section.engine != "transformers" or section.load_in_4bit:
            return False
        card = read_card(line.folder)
        known = json.loads((line.folder / "adapter_config.json").read_text(encoding="utf-8"))
        if card.base_model != section.base_model_path or self._load() is None:
            return False
        find_base(line.folder, card)  # the same name, and the same content
        return min(known.get("layers_to_transform") or [0]) >= self.trunk.depth

    def _load(self) -> Trunk | None:
        if self.guard is None and self.fits:
            self.guard = load_base(self.config)
            model, ids = self.guard.model.model.eval(), self._ids(self.texts)
            fits = max(map(len, ids)) <= self.guard.max_length  # longer ones are judged in windows
            self.trunk = (
                Trunk.of(model, self.config.training.lora_last_layers, ids) if fits else None
            )
            self.fits = self.trunk is not None
        return self.trunk

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Prompts with a token behind them, whose place is that of the verdict."""
        return [[*ids, 0] for ids in self.guard.prompt_ids([pair(text) for text in texts])]

    @torch.inference_mode()
    def said(self, line: Any, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Score, decision and error of each prompt, as `GenerativeGuard.judge` gives them."""
        if self.model is None:
            base = self.config.llama_guard.base_model_path
            self.model = apply_adapter(self.guard.model.model, str(line.folder), base)
        tokens, out, device = self.guard.verdict_tokens("prompt"), [], self.guard.model.model.device
        rows = [
            {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + [0]} for ids in self._ids(texts)
        ]
        self.trunk.learn(rows)
        with self.trunk.replaced():
            for some in (rows[i : i + BATCH] for i in range(0, len(rows), BATCH)):
                batch = {name: part.to(device) for name, part in self.trunk.batch(some).items()}
                logits = logits_at_labels(read(self.model, batch))
                scores, tops = (
                    log_odds(logits, tokens).sigmoid().tolist(),
                    logits.argmax(-1).tolist(),
                )
                out += [self._answer(p, top, tokens) for p, top in zip(scores, tops, strict=True)]
        return out

    def _answer(self, score: float, top: int, tokens: dict[bool, list[int]]) -> dict[str, Any]:
        if top not in tokens[True] + tokens[False]:
            written = self.guard.tokenizer.decode([top])
            return {
                "score": None,
                "decided": None,
                "error": f"it writes {written!r} where a verdict was expected",
            }
        return {"score": score, "decided": top in tokens[True], "error": None}

    def free(self) -> None:
        """Give the base's memory back, for another model; it is loaded again when an arm needs it."""
        self.guard = self.trunk = self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def let_go(self) -> None:
        """Take the arm's adapter off the base."""
        if self.model is not None:
            self.model.unload()
            self.model = None
