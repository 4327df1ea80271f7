"""A guard that is LoRA adapters and a linear head on a frozen chat model (LoRA-Guard, arXiv
2407.02987).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from common.bundled import resolve_model
from common.conversation import (
    LABEL_OF,
    LABELS,
    Messages,
    UserError,
    Verdict,
    one_line,
    parts_of,
)
from common.data import read_json
from common.engines import apply_adapter
from common.fit import grow_embeddings
from common.run import inference_dtype, loading_model
from common.templates import Part
from guards.card import GenerativeCard, LoraCard, card_path, local_sha256
from guards.classifier import ClassifierGuard
from guards.known import zoo

CONFIG = "adapter_config.json"  # of PEFT
NOTED = "base_model_name_or_path"  # in it
WEIGHTS = "adapter_model.safetensors"
HEAD = "base_model.model.score.weight"


def is_adapter(folder: Path | str) -> bool:
    """Whether a folder holds adapters, and not a whole model."""
    return (Path(folder) / CONFIG).is_file()


def find_base(
    folder: Path | str,
    card: LoraCard | GenerativeCard,
    given: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """The folder or hub id of the base model below the adapters in `folder`.

    Args:
        given: where the user says that it lies; None takes what the card names, or else what PEFT
        has noted. In all
            of these it can be called by its name in zoo.yaml.

    Raises:
        UserError: it cannot be loaded, or is a folder with another content than the base that was
        trained on; names
            file and field.
    """
    where = "base_model"
    name = given
    if name is None:
        where = f"{card_path(folder)}, field base_model"
        name = card.base_model
    if name is None:
        path = Path(folder) / CONFIG
        where = f"{path}, field {NOTED}"
        name = str(read_json(path).get(NOTED))
    source = resolve_model(zoo().get(name, {}).get("model", name))
    try:
        AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        hint = "if it was moved, say where it is (base_model=…)"
        what = f"no model that can be loaded; {hint}: {one_line(error)}"
        raise UserError(f"{where}: {source}: {what}") from None
    found = local_sha256(source)
    if card.base_sha256 and found and card.base_sha256 != found:
        raise UserError(
            f"{card_path(folder)}, field base_sha256: {card.base_sha256:.12}… is the base that the "
            f"adapters were trained on, and {name} is another ({found:.12}…), with which they give "
            "other scores; say where the right one is (base_model=…)"
        )
    return source


class LoraGuard(ClassifierGuard):
    """The adapter folder of examples/lora_guard, as a batched judge. (Chatting with it: riding.py
    of that recipe.)

    A conversation that ends with the user's turn is judged as a prompt, one with an answer as a
    pair, an answer alone as a response; of these only what it was trained on, as guard.json's
    `inputs` says. The unsafe probability is the label `unsafe`, or without that label (the paper's
    first version) the highest of the categories.
    """

    def __init__(
        self,
        model: str,
        *,
        card: LoraCard,
        base_model: str | None = None,
        **options: Any,
    ):
        """Load base and adapters.

        Args:
            model: the adapter folder.
            card: its guard.json.
            base_model: instead of the one that the card names.
            options: of `ClassifierGuard`.

        Raises:
            UserError: a file is missing, wrong, or does not fit the others.
        """
        self.inputs, self.base_model = card.inputs, base_model
        super().__init__(model, card=card, **options)

    def _load(
        self,
        model: str,
        labels: Sequence[str] | None,
        trust_remote_code: bool,
        tokenizer: str | None,
    ) -> None:
        card = self.card
        self.labels = list(labels or card.labels)
        source = find_base(model, card, self.base_model, trust_remote_code)
        code = {"trust_remote_code": trust_remote_code}
        level = transformers.logging.get_verbosity()
        # It would report the head as missing that PEFT brings a line later.
        transformers.logging.set_verbosity_error()
        try:
            with loading_model(model, "cannot be loaded as a LoRA guard"):
                self._check_head(model)
                self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or model, **code)
                base = self._load_base(model, source, code)
        finally:
            transformers.logging.set_verbosity(level)
        self.model = apply_adapter(base, model, source)
        self.head = self.model.base_model.model.score.modules_to_save["default"]
        if card.head_bias is not None:  # a stock head has none, so it is kept beside the adapter
            self.head.bias = torch.nn.Parameter(torch.tensor(card.head_bias))
        self.head.float().register_forward_pre_hook(lambda _, features: (features[0].float(),))
        if inference_dtype() == torch.float32:  # a bf16 base would round the adapters away
            self.model = self.model.merge_and_unload()

    def _check_head(self, model: str) -> None:
        """As many labels as the head in the adapter's file has outputs."""
        with safe_open(Path(model) / WEIGHTS, "pt") as file:
            if HEAD not in file.keys():  # noqa: SIM118 (no mapping)
                return  # what is missing is named later
            outputs = file.get_slice(HEAD).get_shape()[0]
        if len(self.labels) != outputs:
            what = f"names {len(self.labels)} outputs, the head in {WEIGHTS} has {outputs}"
            raise UserError(f"{card_path(model)}, field labels: {what}")

    def _load_base(
        self, model: str, source: str, code: dict[str, bool]
    ) -> transformers.PreTrainedModel:
        """The base below a head without weights, of as many layers as the card says."""
        config = AutoConfig.from_pretrained(source, **code)
        layers = config.get_text_config().num_hidden_layers
        depth = self.card.num_hidden_layers or layers
        if depth > layers:
            what = f"{depth}; the base {source} has {layers} layers"
            raise UserError(f"{card_path(model)}, field num_hidden_layers: {what}")
        base, loading = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=len(self.labels),
            num_hidden_layers=depth,
            dtype=inference_dtype(),
            output_loading_info=True,
            **code,
        )
        lacking = [key for key in loading["missing_keys"] if not key.startswith("score.")]
        if lacking:
            raise ValueError(f"the base lacks {', '.join(sorted(lacking))}")
        grow_embeddings(self.tokenizer, base)
        return base

    def _judged(self) -> tuple[str, ...]:
        judged = {LABEL_OF[kind] for kind in self.inputs}
        return tuple(label for label in LABELS if label in judged)

    def _render(self, messages: Messages) -> list[Part]:
        *_, kind = parts_of(messages)  # a pair, if it is one
        if kind not in self.inputs:
            raise UserError(f"not trained on a {kind}, only on: {', '.join(self.inputs)}")
        return super()._render(messages)

    def _unsafe_labels(
        self,
        model: str,
        asked: Sequence[str] | None,
    ) -> list[str]:
        return ["unsafe"] if "unsafe" in self.labels else super()._unsafe_labels(model, asked)

    def _conclude(
        self,
        verdict: Verdict,
        rows: list[list[float]],
        messages: Messages,
    ) -> None:
        super()._conclude(verdict, rows, messages)
        verdict.categories.pop("unsafe", None)  # it is the verdict, and no category
