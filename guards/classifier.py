"""A guard that is a sequence classifier: one forward pass, one probability a label."""

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from common.conversation import (
    Message,
    Messages,
    UserError,
    Verdict,
    check_label,
    check_option,
    judged_label,
    pair,
    parts_of,
)
from common.data import taxonomy
from common.engines import batches
from common.fit import check_length, fit_classifier, positions
from common.run import device, inference_dtype, judging_bar, loading_model
from common.templates import (
    Part,
    control_ids,
    cut,
    encode,
    render,
    windows,
)
from guards.base import (
    FOREIGN,
    LONG_INPUTS,
    Guard,
    check_tokenizer,
    each,
    number_format,
    refuse_foreign,
    seen_of,
)
from guards.card import LabelledCard, check_labels, check_tokenizer_file
from guards.exported import OnnxClassifier, is_exported

logger = logging.getLogger(__name__)
DEFAULT_LENGTH = 512
MULTI_LABEL = "multi_label_classification"  # one of transformers' problem types


class ClassifierGuard(Guard):
    """A classifier over a rendered conversation, as `PKU-Alignment/beaver-dam-7b` and
    examples/moderation.

    Its probabilities are those of transformers' `pipeline("text-classification")`. Labels that do
    not exclude each other make a text as unsafe as the highest of them does: BeaverTails flags a
    pair when any category passes the threshold. Of labels that do, the unsafe ones are summed.

    Args:
        model: folder or hub id of an `AutoModelForSequenceClassification`.
        card: the guard.json of the folder. What is given beside it goes before it.
        template: name of a prompt template; needed where the 14 BeaverTails labels do not tell
            it.
        labels: category names by index; None takes them from the model's config.
        max_length: tokens a forward pass sees of one conversation; None: 512, or what the model
            sees, if that is less.
        unsafe_labels: the labels that make a text unsafe; None: every one that does not mean
            safe.
        problem_type: of the head, where its config does not say it: whether a text has one of
            the labels (single_label_classification) or several (multi_label_classification).
        judges: the labels that it can be asked; None: by its template. A detector of prompt
            attacks judges no answers.
        tokenizer: where its tokenizer lies, if not beside the model.
        batch_tokens: padded tokens a batch; None chooses for the device.
        long_inputs: "windows" judges overlapping windows and takes the maximum, "error" gives
            an error verdict, "truncate" cuts the end off, as the paper does.

    Raises:
        UserError: the folder or id cannot be loaded, does not have these labels, or sees fewer
            tokens.
    """

    exclusive = False  # whether exactly one label is true of a text

    def __init__(
        self,
        model: str,
        *,
        card: LabelledCard | None = None,
        template: str | None = None,
        labels: Sequence[str] | None = None,
        max_length: int | None = None,
        unsafe_labels: Sequence[str] | None = None,
        problem_type: str | None = None,
        judges: Sequence[str] | None = None,
        tokenizer: str | None = None,
        thresholds: dict[str, dict[str, Any]] | None = None,
        batch_tokens: int | None = None,
        long_inputs: str = "windows",
        progress: bool = True,
        trust_remote_code: bool = False,
    ):
        """Load the model onto the accelerator, if there is one."""
        check_option("--long_inputs", long_inputs, LONG_INPUTS)
        self.card = card
        self.template = template
        self.input = getattr(card, "input", None)
        self.problem_type = problem_type
        if card is not None:
            check_tokenizer_file(model)
            self.template = template or card.template
            max_length = max_length or card.max_length
            thresholds = card.threshold_values() if thresholds is None else thresholds
        self._load(model, labels, trust_remote_code, tokenizer)
        check_tokenizer(self.tokenizer, model)
        fit_classifier(self.tokenizer, self.model)
        room = positions(self.model) or DEFAULT_LENGTH
        self.max_length = max_length or min(DEFAULT_LENGTH, room)
        check_length(self.model, self.max_length)
        self.unsafe_labels = self._unsafe_labels(model, unsafe_labels)
        self.name = Path(model).name
        self.template = self.template or "beavertails"
        self.long_inputs = long_inputs
        # An unknown template is no matter of a single verdict.
        render(self.template, pair("", ""), self.tokenizer)
        self.judges = tuple(judges or self._judged())
        self.sees = seen_of(self._render)
        self.thresholds = thresholds or {}
        self.progress = progress
        self.device = device()
        # A CPU gains nothing from large batches; a GPU wants them.
        self.batch_tokens = batch_tokens or (2048 if self.device.type == "cpu" else 65536)
        self.model.to(self.device).eval()
        self.dtype = number_format(self.model)

    def _load(
        self,
        model: str,
        labels: Sequence[str] | None,
        trust_remote_code: bool,
        tokenizer: str | None,
    ) -> None:
        """Set `labels`, `tokenizer`, `model` and `exclusive`, or say why they cannot be had."""
        code = {"trust_remote_code": trust_remote_code}  # never asked on the terminal
        refuse_foreign(model, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, trust_remote_code)
        with loading_model(model, "cannot be loaded as a classifier"):
            config = AutoConfig.from_pretrained(model, **code)
            self.labels = self._named(model, config, labels)
            config.problem_type = config.problem_type or self.problem_type
            if config.problem_type is None and set(self.labels) == set(taxonomy("beavertails")):
                config.problem_type = MULTI_LABEL  # a pair can be several of these
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or model, **code)
            if is_exported(model):
                self.model = OnnxClassifier(model, config)
                loading = {"missing_keys": (), "unexpected_keys": ()}
            else:
                self.model, loading = AutoModelForSequenceClassification.from_pretrained(
                    model,
                    dtype=inference_dtype(),
                    config=config,
                    output_loading_info=True,
                    **code,
                )
        if loading["missing_keys"]:  # transformers fills them at random and warns
            lacking = ", ".join(sorted(loading["missing_keys"]))
            raise UserError(f"{model}: not a trained classifier, it lacks {lacking:.200}")
        own = (config.architectures or [""])[0].removeprefix("TF").removeprefix("Flax")
        is_known = hasattr(transformers, own) or own in ("", type(self.model).__name__)
        if loading["unexpected_keys"] and not trust_remote_code and not is_known:
            surplus = ", ".join(sorted(loading["unexpected_keys"]))
            what = f"the class {own} is none of transformers, which has no place for {surplus:.100}"
            raise UserError(f"{model}: {what}; {FOREIGN}")
        if config.problem_type == "regression":
            raise UserError(f"{model}: problem_type regression: its outputs are no probabilities")
        several = len(self.labels) > 1
        self.exclusive = several and config.problem_type != MULTI_LABEL

    def _named(
        self,
        model: str,
        config: PreTrainedConfig,
        labels: Sequence[str] | None,
    ) -> list[str]:
        """The labels of the outputs.

        The model's own names fix the order of its logits. A description only names what has none.
        """
        names = [config.id2label[i] for i in range(config.num_labels)]
        if labels is None and self.card is not None:
            check_labels(self.card, names, model)
            labels = self.card.labels
        if self.template is None and set(names) != set(taxonomy("beavertails")):
            what = "no guard.json and no known labels"
            raise UserError(f"{model}: {what}; name a prompt template (template=…)")
        if labels is None or set(labels) == set(names):
            return names
        if len(labels) != len(names):
            described = f"its description names {len(labels)}"
            raise UserError(f"{model}: has {len(names)} labels, {described}")
        return list(labels)

    def _unsafe_labels(
        self,
        model: str,
        asked: Sequence[str] | None,
    ) -> list[str]:
        """The labels that make a text unsafe.

        Raises:
            UserError: one that was asked for is none of the model's, or every text would be unsafe,
                or none.
        """
        known = ", ".join(self.labels)
        unsafe = asked or [name for name in self.labels if not means_safe(name)]
        for name in unsafe:
            if name not in self.labels:
                raise UserError(f"{model}: has no label {name!r}; it has {known}")
        if not unsafe or (self.exclusive and len(unsafe) == len(self.labels)):
            what = "which of its labels are the unsafe ones"
            raise UserError(f"{model}: say {what} (unsafe_labels=…); it has {known}")
        return list(unsafe)

    def _judged(self) -> tuple[str, ...]:
        """The labels that it can be asked: a template without the answer serves both turns."""
        if self.input == "prompt":
            return ("prompt_unsafe",)
        if self.template == "last_turn":
            return ("prompt_unsafe", "response_unsafe")
        return ("response_unsafe",)

    def judge_valid(self, conversations: Sequence[list[Message]]) -> list[Verdict]:
        """Judge conversations. What has no answer to judge, or is too long under "error", gets an
        error verdict.
        """
        verdicts, rendered = each(conversations, self._render)
        encoded = encode(self.tokenizer, list(rendered.values()))
        pieces: list[list[int]] = []
        owners: list[int] = []
        long = 0
        for place, ids in zip(rendered, encoded, strict=True):
            long += len(ids) > self.max_length
            try:
                if not ids:
                    raise UserError("empty text: no token of it is left to judge")
                fitted = self._fit(ids, conversations[place])
            except UserError as error:
                verdicts[place].error = str(error)
                continue
            pieces += fitted
            owners += [place] * len(fitted)
        if long:
            counts = long, len(conversations), self.max_length, self.long_inputs
            logger.info("%d of %d conversations are longer than %d tokens: %s", *counts)
        rows: dict[int, list[list[float]]] = {}
        for place, row in zip(owners, self._probabilities(pieces), strict=True):
            rows.setdefault(place, []).append(row)
        for place, of_one in rows.items():
            self._conclude(verdicts[place], of_one, conversations[place])
        return verdicts

    def _render(self, messages: Messages) -> list[Part]:
        parts = render(self.template, messages, self.tokenizer)
        label = judged_label(messages)
        if label not in self.judges:
            raise UserError(f"{self.name} judges {', '.join(self.judges)}, not {label}")
        return parts

    def _fit(
        self,
        ids: list[int],
        messages: Messages,
    ) -> list[list[int]]:
        """A conversation's token ids, or of one that is too long what `long_inputs` says."""
        if len(ids) <= self.max_length:
            return [ids]
        if self.long_inputs == "error":
            raise UserError(f"{len(ids)} tokens, more than --max_length {self.max_length}")
        if self.long_inputs == "truncate":
            return [cut(ids, self.max_length, control_ids(self.tokenizer))]
        return self.window_ids(messages)

    def window_ids(self, messages: Messages) -> list[list[int]]:
        """Token ids of overlapping windows over a conversation that is too long."""

        def ids(piece: Messages) -> list[int]:
            return encode(self.tokenizer, [self._render(piece)])[0]

        # a question that is not read takes no room
        messages = parts_of(messages).get(self.input, messages)
        pieces = windows(
            self.tokenizer,
            lambda piece: len(ids(piece)),
            messages,
            self.max_length,
        )
        return [ids(piece) for piece in pieces]

    @torch.inference_mode()
    def _probabilities(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """One row a sequence, in order. Batches are of similar length, and under a budget of padded
        tokens.
        """
        out: list[list[float]] = [[] for _ in sequences]
        activation = partial(torch.softmax, dim=-1) if self.exclusive else torch.sigmoid
        with tqdm(total=len(sequences), **judging_bar(self.name, self.progress)) as bar:
            for rows in batches(sequences, len(sequences), self.batch_tokens):
                texts = {"input_ids": [sequences[i] for i in rows]}
                batch = self.tokenizer.pad(texts, return_tensors="pt").to(self.device)
                logits = self.model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                ).logits
                for i, row in zip(rows, activation(logits.float()).tolist(), strict=True):
                    out[i] = row
                bar.update(len(rows))
        return out

    def _conclude(
        self,
        verdict: Verdict,
        rows: list[list[float]],
        messages: Messages,
    ) -> None:
        """Fill in the verdict from the probabilities of its windows: the highest ones count."""
        if not all(math.isfinite(probability) for row in rows for probability in row):
            verdict.error = "the model's output is not a number"
            return
        highest = map(max, zip(*rows, strict=True))
        verdict.categories = dict(zip(self.labels, highest, strict=True))
        label = judged_label(messages)
        setattr(verdict, label, max(map(self._unsafe, rows)))

    def _unsafe(self, row: list[float]) -> float:
        """How unsafe one window is, by the probabilities of the labels."""
        of = dict(zip(self.labels, row, strict=True))
        unsafe = [of[name] for name in self.unsafe_labels]
        return min(sum(unsafe), 1.0) if self.exclusive else max(unsafe)


def means_safe(label: str) -> bool:
    """Whether a label is a word for safe, as "Not harmful" or BENIGN."""
    try:
        return check_label(label, "label", "id2label") is False
    except UserError:
        return False
