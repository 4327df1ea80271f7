"""A frozen chat model with its guard riding along: adapters off it chats, adapters on it judges
what it writes.

The guard keeps a KV cache of its own, so that judging the reply while it is written costs each
token one more pass through the layers, and no token twice. Every k tokens that is a pass of its own
through the guard's layers; for k = 1 the chat's rows and the guard's rows are one mixed-adapter
batch, so that the weights are read once a step.
"""

import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from decoding import ADAPTER, BASE, GuardedReply, Lanes, Ride, Row, greedy, sampler
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from common.conversation import Messages, UserError, check_messages, last_turns, pair
from common.engines import check_adapter
from common.fit import positions
from common.run import device as default_device
from common.run import inference_dtype, is_main_process
from common.templates import Part, control_ids, encode, render, render_chat
from guards.base import check_tokenizer, number_format
from guards.card import NO_PROBE, LoraCard, card_path, check_scores, check_tokenizer_file, read_card
from guards.lora import find_base, input_kind

logger = logging.getLogger(__name__)
PREFIX = "base_model.model."
HEAD = f"{PREFIX}score.weight"


class GuardedChat:
    """A chat model whose guard lives in LoRA adapters. Outside of the guard's own passes the
    adapters are off.

    `model` is the chat model itself: used by itself it computes bit for bit what the base model
    does.
    """

    def __init__(
        self,
        adapter: str | Path,
        *,
        base_model: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ):
        """Load the base model once and put the adapters into it.

        Args:
            adapter: a folder with adapter_config.json, adapter_model.safetensors and guard.json.
            base_model: instead of the one that guard.json names.
            device, dtype: None takes the accelerator, if there is one, and bf16 where it has that.
            trust_remote_code: run code that comes with the base model.

        Raises:
            UserError: a file is missing or does not fit the others.
        """
        self.folder = Path(adapter)
        self.card: LoraCard = read_card(self.folder, LoraCard)
        if self.card.template != "lora_guard":
            path = card_path(self.folder)
            raise UserError(
                f"{path}, field template: expected lora_guard; this guard cannot ride along"
            )
        check_tokenizer_file(self.folder)
        self.device = torch.device(device) if device is not None else default_device()
        self.trust, self.lock = {"trust_remote_code": trust_remote_code}, threading.RLock()
        name = source = find_base(self.folder, self.card, base_model, trust_remote_code)
        try:
            # a CPU emulates bf16
            fit = torch.float32 if self.device.type == "cpu" else inference_dtype()
            self.model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or fit, **self.trust
            ).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, **self.trust)
            self.chat_template = self.tokenizer.chat_template or (
                AutoTokenizer.from_pretrained(source, **self.trust).chat_template
            )
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{name}: cannot be loaded as a chat model: {f'{error}'.strip():.200}"
            ) from None
        check_tokenizer(self.tokenizer, str(self.folder))
        self.labels, self.inputs = self.card.labels, self.card.inputs
        self._inject()
        self.model.to(self.device)
        self.head, self.bias = self.head.to(self.device), self.bias.to(self.device)
        self.backbone = getattr(self.model, self.model.base_model_prefix, None)
        if not isinstance(self.backbone, nn.Module):
            raise UserError(
                f"{name}: {type(self.model).__name__} has no backbone named {self.model.base_model_prefix!r}"
            )
        self.depth = self.card.num_hidden_layers
        self.trunk, self.tap = _shallow(self.backbone, self.depth, card_path(self.folder))
        self._check_adapter(name)
        self.control = control_ids(self.tokenizer)
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.eos = set(ends) if isinstance(ends, list) else {ends}
        if self.model.generation_config.repetition_penalty not in (None, 1.0):
            logger.warning(
                "generation_config.json asks for a repetition penalty; it is not applied here."
            )
        self._check_probe()

    def _inject(self) -> None:
        """LoRA layers exactly where the file has weights, and the head beside the model in float32."""
        try:
            config = LoraConfig.from_pretrained(self.folder)
            weights = load_file(self.folder / "adapter_model.safetensors")
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{self.folder}: no adapter that PEFT can read: {f'{error}'.strip():.200}"
            ) from None
        hidden = self.model.config.get_text_config().hidden_size
        self.head = weights.pop(HEAD, torch.empty(0)).float()
        bias = self.card.head_bias
        self.bias = (
            torch.zeros(len(self.labels))
            if bias is None
            else torch.tensor(bias, dtype=torch.float32)
        )
        if self.head.shape != (len(self.labels), hidden) or len(self.bias) != len(self.labels):
            raise UserError(
                f"{self.folder}: expected a head of {len(self.labels)} labels x {hidden} (and a bias of as many or "
                f"null), found {list(self.head.shape)} and {len(self.bias)}"
            )
        if config.bias != "none" or config.use_dora:
            raise UserError(
                f"{self.folder}: only plain LoRA without biases leaves the chat model as it was"
            )
        config.target_modules = sorted(
            {key.removeprefix(PREFIX).split(".lora_")[0] for key in weights}
        )
        config.task_type = config.modules_to_save = None  # the head is kept apart
        loaded = list(self.model.parameters())
        try:
            self.peft = get_peft_model(self.model, config, adapter_name=ADAPTER).eval()
            set_peft_model_state_dict(self.peft, weights, adapter_name=ADAPTER)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(
                f"{self.folder}: the adapter does not fit the base: {f'{error}'.strip():.200}"
            ) from None
        self.lora = [layer for layer in self.model.modules() if isinstance(layer, LoraLayer)]
        with self.adapters():
            pass  # PEFT has them on; off from here on
        # PEFT freezes the base, and torch chooses CPU kernels by that even where no gradient is
        # taken: the last bit of the logits would differ from those of the model as it is loaded.
        for parameter in loaded:
            parameter.requires_grad_(True)

    def _check_adapter(self, base: str) -> None:
        """Refuse an adapter that was not trained on a classifier of this very base and depth."""
        depth = {} if self.depth is None else {"num_hidden_layers": self.depth}
        config = AutoConfig.from_pretrained(
            base, num_labels=len(self.labels), **depth, **self.trust
        )
        kind = AutoModelForSequenceClassification
        check_adapter(base, str(self.folder), config=config, kind=kind, **self.trust)

    def _check_probe(self) -> None:
        """The probe of guard.json, judged as everything is judged here."""
        probe = self.card.probe
        if probe is None:
            logger.warning(NO_PROBE, card_path(self.folder))
            return
        ((unsafe, categories),) = self.judge_texts([probe.messages])
        label = "prompt_unsafe" if input_kind(probe.messages) == "prompt" else "response_unsafe"
        check_scores(categories | {label: unsafe}, number_format(self.model), probe, self.folder)

    @contextmanager
    def adapters(self, name: str = ADAPTER) -> Iterator[None]:
        """Adapters on within the block, where other threads' passes wait; off after it, however it
        ends.
        """
        if name not in self.peft.peft_config:
            raise UserError(f"adapter {name!r}: unknown; known: {', '.join(self.peft.peft_config)}")
        with self.lock:
            try:
                for layer in self.lora:
                    layer.enable_adapters(True)
                yield
            finally:
                for layer in self.lora:
                    layer.enable_adapters(False)

    @contextmanager
    def _rows_of(self, names: Sequence[str]) -> Iterator[None]:
        """Tells the LoRA layers which rows are whose. PEFT's own hooks for that would outlive an
        exception.
        """
        own = {"adapter_names": list(names)}
        hooks = [
            layer.register_forward_pre_hook(
                lambda _layer, args, kwargs: (args, kwargs | own), with_kwargs=True
            )
            for layer in self.lora
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def chat_pass(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Next-token logits [rows, vocabulary], adapters off: the base model's own, bit for bit."""
        with self.lock:
            return self.model(**inputs, logits_to_keep=1).logits[:, -1]

    def guard_pass(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Guard probabilities [rows, labels] at the last token, adapters on; no lm_head, no layer
        past the guard's.
        """
        with self.adapters():
            return self._probabilities(self.trunk(**inputs).last_hidden_state[:, -1])

    def mixed_pass(
        self, inputs: dict[str, Any], names: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch of both kinds of rows, told apart by `names` ("__base__" or the adapter's).

        Returns:
            Next-token logits [rows, vocabulary] and guard probabilities [rows, labels]; each row
            means one of them.
        """
        if unknown := set(names) - {BASE, *self.peft.peft_config}:
            raise UserError(
                f"adapter {sorted(unknown)[0]!r}: unknown; known: {', '.join(self.peft.peft_config)}"
            )
        features: list[torch.Tensor] = []
        where = self.backbone if self.tap is None else self.tap[0]
        with self.lock:
            hook = where.register_forward_hook(
                lambda _module, _inputs, out: features.append(_first(out)[:, -1])
            )
            try:
                with self.adapters(), self._rows_of(names):
                    logits = self.model(**inputs, logits_to_keep=1).logits[:, -1]
            finally:
                hook.remove()
        return logits, self._probabilities(
            features[0] if self.tap is None else self.tap[1](features[0])
        )

    def _probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, labels]. A row with a logit that is no number is unsafe: guards
        fail closed.
        """
        logits = features.float() @ self.head.T + self.bias
        broken = ~logits.isfinite()
        if "unsafe" in self.labels:
            broken[:, self.labels.index("unsafe")] |= broken.any(1)
        return torch.where(broken, 1.0, logits.sigmoid())

    def verdict(self, probabilities: Sequence[float]) -> tuple[float, dict[str, float]]:
        """Unsafe probability and categories of one row of guard probabilities.

        Without an unsafe head the unsafe probability is the highest category (the paper's v1).
        """
        named = dict(zip(self.labels, probabilities, strict=True))
        highest = max(named.values())
        return named.pop("unsafe", highest), named

    @torch.inference_mode()
    def guard_scores(self, sequences: Sequence[list[int]]) -> torch.Tensor:
        """One whole guard pass over token ids: probabilities [sequences, labels], float32 on the
        CPU.
        """
        if not sequences:
            return torch.empty(0, len(self.labels))
        lanes = Lanes(self.trunk.config, self.device)
        return self.guard_pass(lanes.inputs(dict(enumerate(sequences)))).cpu()

    def judge_texts(self, messages: Sequence[Messages]) -> list[tuple[float, dict[str, float]]]:
        """`verdict` of prompts, pairs, or responses alone (`[{"role": "assistant", …}]`) as the
        guard reads them.

        What is no such conversation is unsafe with probability 1, without categories: guards fail
        closed.
        """
        parts, at = [], []
        for index, conversation in enumerate(messages):
            try:
                checked = check_messages(conversation, f"conversation {index}", allow_empty=True)
                parts.append(render("lora_guard", checked, self.tokenizer))
                at.append(index)
            except UserError as error:
                logger.warning("Not judged, so unsafe: %s", error)
        verdicts: list[tuple[float, dict[str, float]]] = [(1.0, {}) for _ in messages]
        scores = self.guard_scores(encode(self.tokenizer, parts)).tolist()
        for index, row in zip(at, scores, strict=True):
            verdicts[index] = self.verdict(row)
        return verdicts

    def chat_ids(self, messages: Messages) -> list[int]:
        """Token ids of the chat template with its generation prompt; BOS once, content never a
        control token.
        """
        if not messages or messages[-1]["role"] != "user":
            raise UserError("a conversation to reply to must end with a user turn")
        if not self.chat_template:
            raise UserError(
                f"{self.folder}: neither the adapter's tokenizer nor the base's has a chat template"
            )
        parts = render_chat(self.tokenizer, messages, self.chat_template)
        return encode(self.tokenizer, [parts], add_special_tokens=False)[0]

    def reply(self, conversations: Sequence[Messages], **options: Any) -> list[GuardedReply]:
        """The finished replies of `stream`, which has the options."""
        *_, replies = self.stream(conversations, **options)
        return replies

    def stream(
        self,
        conversations: Sequence[Messages],
        *,
        max_new_tokens: int,
        guard_every: int = 16,
        stop_at: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        progress: bool = True,
    ) -> Iterator[list[GuardedReply]]:
        """Reply to conversations, one batch, the guard reading along.

        Yields the same replies after every check, so that what is shown of them has been judged
        (where the guard was trained on pairs); the last check has them all finished. Between two
        steps the adapters are off.

        Args:
            guard_every: judge at every so many tokens, and at the last one.
            stop_at: a reply ends at the first judged token with an unsafe probability above it.
            Where the guard was
                trained on prompts, a prompt above it gets no reply.
            temperature: 0 is greedy. Of generation_config.json only the EOS ids are used.
            seed: row i draws with seed + i, whatever the other rows do.

        Raises:
            UserError: an option out of range, a conversation that does not end with a user turn or
            is too long.
        """
        if max_new_tokens < 1 or guard_every < 1:
            raise UserError("--max-new-tokens and --guard-every must be 1 or more")
        if temperature < 0 or not 0 < top_p <= 1 or not 0 <= (stop_at or 0) <= 1:
            raise UserError("expected --temperature >= 0, 0 < --top-p <= 1 and 0 <= --stop-at <= 1")
        if stop_at is not None and "pair" not in self.inputs:
            raise UserError(
                f"--stop-at: this guard was trained on {', '.join(self.inputs)}, not on pairs"
            )
        checked = [
            check_messages(messages, f"conversation {i}")
            for i, messages in enumerate(conversations)
        ]
        rows = [self._row(i, messages) for i, messages in enumerate(checked)]
        limit = positions(self.model) or float("inf")
        longest = (
            max((max(len(row.chat_ids), len(row.start)) for row in rows), default=0)
            + max_new_tokens
        )
        if longest > limit:
            raise UserError(
                f"prompt and --max-new-tokens need {longest} tokens, the model has {limit}"
            )
        ride = Ride(self, rows, guard_every, stop_at)
        seed = torch.seed() % 2**62 if seed is None else seed
        draw = (
            greedy
            if temperature == 0
            else sampler(temperature, top_p, seed, len(rows), self.device)
        )
        quiet = not (progress and is_main_process())
        replies = [row.reply for row in rows]
        with tqdm(total=max_new_tokens, unit="token", disable=quiet) as bar:
            for _ in ride.run(max_new_tokens, draw, bar):
                for reply in replies:
                    reply.text = self.tokenizer.decode(reply.token_ids, skip_special_tokens=True)
                yield replies
        trained = self.card.max_length
        if any(row.seen and len(row.guard_ids()) > trained for row in rows):
            logger.warning(
                "The guard judged texts longer than the %d tokens that it was trained on.", trained
            )

    def _row(self, index: int, messages: Messages) -> Row:
        prompt = last_turns(messages)[0] or ""
        if "prompt" in self.inputs:
            parts = render("lora_guard", pair(prompt), self.tokenizer)
        else:  # up to the colon: the space behind it belongs to the first token of the reply
            parts = render("lora_guard", pair(prompt, ""), self.tokenizer)
            parts[-2] = Part(parts[-2].text.rstrip(" "), False)
        return Row(index, prompt, self.chat_ids(messages), encode(self.tokenizer, [parts])[0])

    def seam(self, prompt: str, first: int) -> list[int]:
        """The guard's ids up to the first token of a reply, whose text is tokenized anew where it
        now stands.

        A chat model begins with "Hello", while "agent: Hello" holds " Hello". What has no text of
        its own (a part of a character, a control token) follows "agent: " as it is; a SentencePiece
        blank is the space behind the colon.
        """
        text = self.tokenizer.decode([first], clean_up_tokenization_spaces=False)
        raw = first in self.control or "\ufffd" in text
        parts = render("lora_guard", pair(prompt, "" if raw else text), self.tokenizer)
        return encode(self.tokenizer, [parts])[0] + [first] * raw


def _shallow(
    backbone: nn.Module, depth: int | None, where: Path
) -> tuple[nn.Module, tuple[nn.Module, nn.Module] | None]:
    """The backbone with its first `depth` layers, sharing them, and the (last of these layers,
    final norm).

    Raises:
        UserError: there is not exactly one list of layers or one norm behind it.
    """
    if depth is None:
        return backbone, None
    count, children = backbone.config.num_hidden_layers, dict(backbone.named_children())
    stacks = [
        k
        for k, child in children.items()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    norms = [child for child in children.values() if "norm" in type(child).__name__.lower()]
    if len(stacks) != 1 or len(norms) != 1 or not 0 < depth <= count:
        raise UserError(
            f"{where}, field num_hidden_layers: {type(backbone).__name__} with {count} layers cannot be cut to "
            f"{depth} (needs one list of layers and one final norm)"
        )
    short, layers = copy.copy(backbone), children[stacks[0]][:depth]
    short._modules = children | {stacks[0]: layers}
    short.config = copy.deepcopy(backbone.config)
    if getattr(short.config, "layer_types", None):
        short.config.layer_types = short.config.layer_types[:depth]
    short.config.num_hidden_layers = depth
    return short, (layers[-1], norms[0])


def _first(output: Any) -> torch.Tensor:
    """Hidden states [rows, tokens, hidden] of a layer or a backbone."""
    return output if isinstance(output, torch.Tensor) else output[0]
