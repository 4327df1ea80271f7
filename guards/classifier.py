"""A guard that is a sequence classifier: one forward pass, one sigmoid a category."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from common.conversation import Message, Messages, UserError, Verdict, pair
from common.data import taxonomy
from common.fit import check_length, fit_classifier, positions
from common.run import device, inference_dtype, is_main_process
from common.templates import Part, control_ids, cut, encode, render, windows
from guards.base import LONG_INPUTS, Guard, check_tokenizer, number_format, seen_of
from guards.card import LabelledCard, check_labels, check_tokenizer_file

logger = logging.getLogger(__name__)
DEFAULT_LENGTH = 512


class ClassifierGuard(Guard):
    """A multi-label classifier over a rendered conversation, as `PKU-Alignment/beaver-dam-7b` and
    examples/moderation.

    The response is unsafe with the highest of its category probabilities: BeaverTails flags a pair
    when any category passes the threshold.
    """

    def __init__(
        self,
        model: str,
        *,
        card: LabelledCard | None = None,
        template: str | None = None,
        labels: Sequence[str] | None = None,
        max_length: int | None = None,
        unsafe_labels: Sequence[str] | None = None,
        thresholds: dict[str, dict[str, Any]] | None = None,
        batch_tokens: int | None = None,
        long_inputs: str = "windows",
        progress: bool = True,
        trust_remote_code: bool = False,
    ):
        """Load the model onto the accelerator, if there is one.

        Args:
            model: folder or hub id of an `AutoModelForSequenceClassification`.
            card: the guard.json of the folder. What is given beside it goes before it.
            template: name of a prompt template; needed where the 14 BeaverTails labels do not tell
            it.
            labels: category names by index; None takes them from the model's config.
            max_length: tokens a forward pass sees of one conversation; None: 512, or what the model
            sees, if that is
                less.
            unsafe_labels: the labels that make a text unsafe; None: every one.
            batch_tokens: padded tokens a batch; None chooses for the device.
            long_inputs: "windows" judges overlapping windows and takes the maximum, "error" gives
            an error verdict,
                "truncate" cuts the end off, as the paper does.

        Raises:
            UserError: the folder or id cannot be loaded, does not have these labels, or sees fewer
            tokens.
        """
        if long_inputs not in LONG_INPUTS:
            raise UserError(
                f"--long_inputs {long_inputs}: expected one of {', '.join(LONG_INPUTS)}"
            )
        if card is not None:
            check_tokenizer_file(model)
            template = template or card.template
            max_length = max_length or card.max_length
            thresholds = card.threshold_values() if thresholds is None else thresholds
        self.card = card
        self._load(model, labels, template, trust_remote_code)
        check_tokenizer(self.tokenizer, model)
        fit_classifier(self.tokenizer, self.model)
        if max_length is None:
            max_length = min(DEFAULT_LENGTH, positions(self.model) or DEFAULT_LENGTH)
        check_length(self.model, max_length)
        self.unsafe_labels = list(unsafe_labels or self.labels)
        if unknown := set(self.unsafe_labels) - set(self.labels):
            raise UserError(
                f"{model}: has no label {sorted(unknown)[0]!r}; it has {', '.join(self.labels)}"
            )
        self.name = Path(model).name
        self.template = template or "beavertails"
        self.max_length = max_length
        self.long_inputs = long_inputs
        # an unknown template is no matter of a single verdict
        render(self.template, pair("", ""), self.tokenizer)
        self.judges = self._judged()
        self.sees = seen_of(lambda messages: "".join(part.text for part in self._render(messages)))
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
        template: str | None,
        trust_remote_code: bool,
    ) -> None:
        """Set `labels`, `tokenizer` and `model`, or say why they cannot be had."""
        try:
            code = {"trust_remote_code": trust_remote_code}  # never asked on the terminal
            config = AutoConfig.from_pretrained(model, **code)
            names = [config.id2label[i] for i in range(config.num_labels)]
            if labels is None and self.card is not None:
                check_labels(self.card, names, model)
                labels = self.card.labels
            # The model's own names fix the order of its logits; a description only names what has
            # none.
            self.labels = names if labels is None or set(labels) == set(names) else list(labels)
            if len(self.labels) != len(names):
                raise UserError(
                    f"{model}: has {len(names)} labels, its description names {len(self.labels)}"
                )
            if template is None and set(names) != set(taxonomy("beavertails")):
                raise UserError(
                    f"{model}: no guard.json and no known labels; name a prompt template (template=…)"
                )
            self.tokenizer = AutoTokenizer.from_pretrained(model, **code)
            self.model, loading = AutoModelForSequenceClassification.from_pretrained(
                model, dtype=inference_dtype(), config=config, output_loading_info=True, **code
            )
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            hub = "no folder here, and no hub id that loads"
            what = "cannot be loaded as a classifier" if Path(model).is_dir() else hub
            raise UserError(f"{model}: {what}: {f'{error}'.strip():.200}".splitlines()[0]) from None
        if loading["missing_keys"]:  # transformers fills them at random and warns
            lacking = ", ".join(sorted(loading["missing_keys"]))
            raise UserError(f"{model}: not a trained classifier, it lacks {lacking:.200}")

    def _judged(self) -> tuple[str, ...]:
        """The labels that it can be asked: a template without the answer serves both turns."""
        return (
            ("prompt_unsafe", "response_unsafe")
            if self.template == "last_turn"
            else ("response_unsafe",)
        )

    def judge_valid(self, conversations: Sequence[list[Message]]) -> list[Verdict]:
        """Judge conversations; what has no answer to judge, or is too long under "error", gets an
        error verdict.
        """
        prompts, owners, verdicts = [], [], [Verdict() for _ in conversations]
        for i, messages in enumerate(conversations):
            try:
                prompts.append(self._render(messages))
                owners.append(i)
            except UserError as error:
                verdicts[i].error = str(error)
        ids = self._fit(encode(self.tokenizer, prompts), owners, conversations, verdicts)
        for owner, probabilities in zip(owners, self._probabilities(ids), strict=True):
            verdict = verdicts[owner]
            # of any window: max() would pass over it
            if not all(map(math.isfinite, probabilities)):
                verdict.error = "the model's output is not a number"
            verdict.categories = {
                name: max(p, verdict.categories.get(name, 0.0))
                for name, p in zip(self.labels, probabilities, strict=True)
            }
        for messages, verdict in zip(conversations, verdicts, strict=True):
            if verdict.error is None:
                self._conclude(verdict, messages)
            else:
                verdict.categories = {}
        return verdicts

    def _render(self, messages: Messages) -> list[Part]:
        return render(self.template, messages, self.tokenizer)

    def _conclude(self, verdict: Verdict, messages: Messages) -> None:
        """Fill in the verdict from the probabilities of its `categories`."""
        unsafe = max(verdict.categories[name] for name in self.unsafe_labels)
        if messages[-1]["role"] == "assistant":
            verdict.response_unsafe = unsafe
        else:
            verdict.prompt_unsafe = unsafe

    def _fit(
        self,
        ids: list[list[int]],
        owners: list[int],
        conversations: Sequence[Messages],
        verdicts: list[Verdict],
    ) -> list[list[int]]:
        """Bring every sequence to `max_length` as `long_inputs` says; `owners` is changed along
        with it.
        """
        fitted, fitted_owners, long = [], [], 0
        control = control_ids(self.tokenizer)
        for sequence, owner in zip(ids, owners, strict=True):
            pieces = [sequence]
            if len(sequence) > self.max_length:
                long += 1
                try:
                    if self.long_inputs == "error":
                        raise UserError(
                            f"{len(sequence)} tokens, more than --max_length {self.max_length}"
                        )
                    if self.long_inputs == "windows":
                        pieces = self._windows(conversations[owner])
                    else:
                        pieces = [cut(sequence, self.max_length, control)]
                except UserError as error:
                    verdicts[owner].error, pieces = str(error), []
            fitted += pieces
            fitted_owners += [owner] * len(pieces)
        if long:
            counts = long, len(conversations), self.max_length, self.long_inputs
            logger.info("%d of %d conversations are longer than %d tokens: %s", *counts)
        owners[:] = fitted_owners
        return fitted

    def _windows(self, messages: Messages) -> list[list[int]]:
        def ids(piece: Messages) -> list[int]:
            return encode(self.tokenizer, [render(self.template, piece, self.tokenizer)])[0]

        return list(
            map(
                ids,
                windows(self.tokenizer, lambda piece: len(ids(piece)), messages, self.max_length),
            )
        )

    @torch.inference_mode()
    def _probabilities(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Sigmoids, one row a sequence, in order; batches of similar length under a budget of
        padded tokens.
        """
        # largest first: no late out-of-memory
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        out: list[list[float]] = [[] for _ in sequences]
        hidden = not (self.progress and is_main_process())
        with tqdm(
            total=len(order), desc=f"judging with {self.name}", unit="pair", disable=hidden
        ) as bar:
            while order:
                width = len(sequences[order[0]])
                rows, order = (
                    order[: max(1, self.batch_tokens // width)],
                    order[max(1, self.batch_tokens // width) :],
                )
                texts = {"input_ids": [sequences[i] for i in rows]}
                batch = self.tokenizer.pad(texts, return_tensors="pt").to(self.device)
                logits = self.model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).logits
                for i, row in zip(rows, logits.float().sigmoid().tolist(), strict=True):
                    out[i] = row
                bar.update(len(rows))
        return out
