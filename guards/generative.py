"""A guard that is a causal LM: its verdict is read where it would write it, from one forward pass,
without generating.

A guard is data (zoo.yaml): how its prompt is written, what it writes before its verdict, and the
words that it answers with. The tokens of these words are looked up with its own tokenizer and
checked when it is loaded. The word with the most likely first token is its native verdict, as
greedy decoding would write it; if the most likely token belongs to no word, the verdict is an
error. The probability is that of the words for unsafe, over those of all words.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from common.bundled import resolve_model
from common.conversation import LABELS, Message, Messages, UserError, Verdict, last_turns, pair
from common.engines import Completion, Decoding, Engine, load_engine
from common.run import inference_dtype
from common.templates import (
    Part,
    encode,
    inline_template,
    render,
    render_chat,
    template_text,
    windows,
)
from guards.base import LONG_INPUTS, Guard, check_tokenizer, number_format, seen_of

logger = logging.getLogger(__name__)
MODES = ("strict", "loose")
# the label of the last turn, by its kind
LAST = {"prompt": "prompt_unsafe", "response": "response_unsafe"}


@dataclass
class _Case:
    """One text to be judged: a conversation, or a window of it, under one of the guard's policies."""

    owner: int
    kind: str  # of the last turn: prompt or response
    variant: str
    parts: list[Part]
    said: str = ""  # what the guard has written so far
    written: str | None = None  # all that it writes, where its format has no fixed beginning
    # label: probability, native word
    found: dict[str, tuple[float | None, str]] = field(default_factory=dict)
    error: str | None = None


class GenerativeGuard(Guard):
    """Any guard of zoo.yaml with kind generative, and the folders that examples/expguard writes."""

    def __init__(
        self,
        model: str,
        entry: Mapping[str, Any],
        *,
        max_length: int | None = None,
        thresholds: dict[str, dict[str, Any]] | None = None,
        engine: str = "transformers",
        mode: str = "strict",
        long_inputs: str = "windows",
        categories: bool = False,
        chat_template: str | None = None,
        progress: bool = True,
        trust_remote_code: bool = False,
        **options: Any,
    ):
        """Load tokenizer and model.

        Args:
            model: folder or hub id of the causal LM.
            entry: its description, as in zoo.yaml.
            max_length: tokens that it sees of one conversation.
            engine: transformers, vllm (in this process) or server (`server_url`, `server_model`).
            mode: strict counts a word between safe and unsafe ("Controversial") as unsafe, loose as
            safe.
            long_inputs: see `ClassifierGuard`; turns before the last two are left out where these
            need the room.
            categories: let it write on after an unsafe verdict, to name categories.
            chat_template: instead of its tokenizer's.
            options: of `common.engines.load_engine`.

        Raises:
            UserError: the model cannot be loaded, or its tokenizer does not fit the description.
        """
        for flag, value, known in (
            ("--long_inputs", long_inputs, LONG_INPUTS),
            ("--mode", mode, MODES),
        ):
            if value not in known:
                raise UserError(f"{flag} {value}: expected one of {', '.join(known)}")
        self.name, self.entry, self.mode, self.long_inputs = (
            Path(model).name,
            entry,
            mode,
            long_inputs,
        )
        self.max_length, self.thresholds = (
            max_length or entry.get("max_length", 4096),
            thresholds or {},
        )
        # conversations that are longer than the maximum
        self.with_categories, self._long = categories, set()
        try:
            source = entry.get("tokenizer", model)
            self.tokenizer = AutoTokenizer.from_pretrained(
                resolve_model(source), trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            what = (
                "tokenizer cannot be loaded"
                if Path(model).is_dir()
                else "no folder here, and no hub id that loads"
            )
            raise UserError(f"{model}: {what}: {f'{error}'.strip():.200}") from None
        check_tokenizer(self.tokenizer, source)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        # what must hold before the first verdict
        self.pending_check: Callable[[], None] | None = None
        self.questions = entry["questions"]
        asked = {label for question in self.questions for label in self._labels(question)}
        self.judges = tuple(label for label in LABELS if label in asked)
        self._words: dict[tuple[int, str], dict[str, list[int]]] = {}
        self._check_tokens()
        variant = next(iter(entry.get("variants", [""])))
        self.sees = seen_of(
            lambda messages: "".join(part.text for part in self._parts(messages, variant))
        )
        options |= {"adapter": options.get("adapter") or entry.get("adapter"), "progress": progress}
        self.model: Engine = load_engine(
            engine,
            model,
            self.tokenizer,
            trust_remote_code=trust_remote_code,
            name=self.name,
            **options,
        )
        if self.max_length > (room := self.model.window or math.inf):
            raise UserError(
                f"{model}: max_length {self.max_length}: the model sees {room} tokens; lower it to that"
            )
        if engine == "server":
            self.dtype = "server"
        elif engine == "vllm":
            self.dtype = str(inference_dtype()).removeprefix("torch.")
        else:
            self.dtype = number_format(self.model.model)

    # --- the verdict --------------------------------------------------------------------------------------------------

    def judge_valid(self, conversations: Sequence[list[Message]]) -> list[Verdict]:
        """Judge the last turn of each; a turn that the guard does not judge gets an error verdict."""
        if self.pending_check is not None:
            check, self.pending_check = self.pending_check, None
            check()
        verdicts, cases, self._long = [Verdict() for _ in conversations], [], set()
        for i, messages in enumerate(conversations):
            try:
                cases += self._cases(i, messages)
            except UserError as error:
                verdicts[i].error = str(error)
        if self._long:
            counts = len(self._long), len(conversations), self.max_length, self.long_inputs
            logger.info("%d of %d conversations are longer than %d tokens: %s", *counts)
        for number, question in enumerate(self.questions):
            # what shares most of its prompt is asked together
            groups: dict[tuple[str, str], list[_Case]] = {}
            for case in cases:
                if case.error is None and self._is_asked(question, case.kind):
                    groups.setdefault((case.kind, case.variant), []).append(case)
            for group in groups.values():
                self._ask(number, question, group)
        if self.with_categories and "categories" in self.entry:
            self._name_categories(cases, verdicts)
        for case in cases:
            self._conclude(case, verdicts[case.owner])
        return verdicts

    def _is_asked(self, question: Mapping[str, Any], kind: str) -> bool:
        """Whether a question is for turns of this kind, and what is generated for it is wanted."""
        if question.get("when", kind) != kind:
            return False
        (label,) = self._labels(question, kind)
        return "anchor" not in question or label == LAST[kind] or label in self.wanted

    def _ask(self, number: int, question: Mapping[str, Any], cases: list[_Case]) -> None:
        """Fill in `found` and `said`, or `error`, of cases of one kind."""
        if "anchor" in question:
            cases = self._write_to_anchor(question, cases)
        prefix = question.get("prefix", "")
        prompts = self._ids([[*case.parts, Part(case.said + prefix, False)] for case in cases])
        tokens = [self._word_tokens(number, case.kind, case.said + prefix) for case in cases]
        candidates = sorted({i for words in tokens for ids in words.values() for i in ids})
        read = self.model.next_token(prompts, candidates)
        for case, words, said in zip(cases, tokens, read, strict=True):
            if said.error is not None:
                case.error = said.error
                continue
            of = dict(zip(candidates, map(math.exp, said.logprobs), strict=True))
            masses = {word: sum(of[i] for i in ids) for word, ids in words.items()}
            word = next((word for word, ids in words.items() if said.top in ids), None)
            if not all(map(math.isfinite, masses.values())):
                case.error = "the model's output is not a number"
            elif word is None:
                written = self.tokenizer.decode([said.top])
                self._fail(
                    case,
                    f"it writes {written!r} where {' or '.join(map(repr, words))} was expected",
                )
            else:
                case.found[self._labels(question, case.kind)[0]] = (
                    self._probability(question, masses, word),
                    word,
                )
                case.said += prefix + word

    def _fail(self, case: _Case, error: str) -> None:
        """What it has not written makes an error, but for what comes after its word for the turn:
        that stands.
        """
        case.error = None if LAST[case.kind] in case.found else error

    def _probability(
        self, question: Mapping[str, Any], masses: Mapping[str, float], word: str
    ) -> float | None:
        """Probability of the words for unsafe over all words with an opinion; None if the native
        word has none.
        """
        if question["words"][word] is None:
            return None
        yes = sum(mass for w, mass in masses.items() if self._means(question, w))
        whole = sum(mass for w, mass in masses.items() if question["words"][w] is not None)
        return yes / whole

    def _means(self, question: Mapping[str, Any], word: str) -> bool:
        value = question["words"][word]
        return self.mode == "strict" if value == "strict" else bool(value)

    def _conclude(self, case: _Case, verdict: Verdict) -> None:
        """Merge a case into its conversation's verdict: the highest probability counts."""
        if case.error is not None or verdict.error is not None:
            error = verdict.error or case.error
            vars(verdict).update(vars(Verdict(error=error)))
            return
        for question in self.questions:
            label = self._labels(question, case.kind)[0]
            if question.get("when", case.kind) != case.kind or label not in case.found:
                continue
            probability, word = case.found[label]
            if probability is None:
                verdict.native.setdefault(label, word.strip())
                continue
            if case.variant:
                verdict.categories[case.variant] = max(
                    probability, verdict.categories.get(case.variant, 0.0)
                )
            if probability >= (getattr(verdict, label) or 0.0):
                setattr(verdict, label, probability)
                verdict.native[label] = word.strip()
            verdict.decided[label] = self._means(question, word) or verdict.decided.get(
                label, False
            )

    # --- text that the guard writes -----------------------------------------------------------------------------------

    def _write_to_anchor(self, question: Mapping[str, Any], cases: list[_Case]) -> list[_Case]:
        """Let the guard write, and keep what stands before its verdict; what has no anchor is an
        error.
        """
        fresh = [case for case in cases if case.written is None]
        prompts = self._ids([case.parts for case in fresh])
        for case, completion in zip(
            fresh, self.written(prompts, self.entry["generate"]), strict=True
        ):
            case.written = completion.text
            case.error = completion.error
        found = []
        for case in cases:
            if case.error is not None:
                continue
            match = re.search(question["anchor"], case.written)
            if match is None:
                self._fail(
                    case, f"no {question['anchor']} in what it wrote: {case.written[-60:]!r}"
                )
            else:
                case.said = case.written[: match.end()]
                found.append(case)
        return found

    def written(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Completion]:
        """What the guard writes greedily after prompts (token ids), special tokens included."""
        decoding = Decoding(max_new_tokens=new_tokens)
        return self.model.completions(prompts, decoding, skip_special_tokens=False)

    def _name_categories(self, cases: list[_Case], verdicts: Sequence[Verdict]) -> None:
        """What the guard writes after an unsafe verdict; a named category gets the verdict's
        probability.
        """
        known, unsafe = self.entry["categories"], []
        for case in cases:
            probability = case.found.get(LAST[case.kind], (None,))[0]
            if case.error is None and probability is not None and self._decided(case):
                unsafe.append((case, probability))
        prompts = self._ids([[*case.parts, Part(case.said, False)] for case, _ in unsafe])
        completions = self.written(prompts, 32)
        for (case, probability), completion in zip(unsafe, completions, strict=True):
            for code in re.findall(known["pattern"], completion.text):
                name = known.get("names", {}).get(code, code)
                verdicts[case.owner].categories[name] = probability
        if errors := [one.error for one in completions if one.error is not None]:
            logger.warning(
                "%d of %d unsafe texts: the categories are not known, the verdicts stand (%s)",
                *(len(errors), len(completions), errors[0]),
            )

    def _decided(self, case: _Case) -> bool:
        label = LAST[case.kind]
        question = next(q for q in self.questions if label in self._labels(q, case.kind))
        return self._means(question, case.found[label][1])

    # --- the prompt ---------------------------------------------------------------------------------------------------

    def prompt_ids(self, conversations: Sequence[Messages]) -> list[list[int]]:
        """Token ids of all that stands before the verdict on each, uncut: what a training row has
        to begin with.

        Raises:
            UserError: the guard asks several questions, or several times, or writes something
            first.
        """
        if (
            len(self.questions) > 1
            or len(self.entry.get("variants", [""])) > 1
            or "anchor" in self.questions[0]
        ):
            raise UserError(
                f"{self.name}: its verdict is not one word after one prompt; it cannot be trained here"
            )
        return self._ids([self.prompt_parts(messages) for messages in conversations])

    def prompt_parts(self, messages: Messages) -> list[Part]:
        """`prompt_ids` before encoding: text that this class writes, and content."""
        variant = next(iter(self.entry.get("variants", [""])))
        return [*self._parts(messages, variant), Part(self.questions[0].get("prefix", ""), False)]

    def verdict_tokens(self, kind: str) -> dict[bool, list[int]]:
        """The first tokens of the words for unsafe (True) and safe (False), after a prompt or after
        a response.
        """
        question = self.questions[0]
        tokens: dict[bool, list[int]] = {True: [], False: []}
        for word, ids in self._word_tokens(0, kind, question.get("prefix", "")).items():
            if question["words"][word] is not None:
                tokens[self._means(question, word)] += ids
        return tokens

    def _cases(self, owner: int, messages: Messages) -> list[_Case]:
        """The texts to be judged of one conversation."""
        kind = "prompt" if last_turns(messages)[1] is None else "response"
        if LAST[kind] not in self.judges:
            raise UserError(
                f"{self.name} judges {', '.join(self.judges)}, not a conversation that ends with a {kind}"
            )
        out = []
        for variant in self.entry.get("variants", {"": {}}):
            pieces = [messages]
            if (length := self._length(messages, variant)) > self.max_length:
                self._long.add(owner)
                if self.long_inputs == "error":
                    raise UserError(f"{length} tokens, more than --max_length {self.max_length}")
                length_of = partial(self._length, variant=variant)
                pieces = windows(self.tokenizer, length_of, messages, self.max_length)
                pieces = pieces[:1] if self.long_inputs == "truncate" else pieces
            out += [_Case(owner, kind, variant, self._parts(piece, variant)) for piece in pieces]
        return out

    def _length(self, messages: Messages, variant: str) -> int:
        return len(self._ids([self._parts(messages, variant)])[0]) + self._reserve

    @cached_property
    def _reserve(self) -> int:
        """Tokens that the guard writes before its last verdict."""
        written = "".join(q.get("prefix", "") + max(q["words"], key=len) for q in self.questions)
        return self.entry.get("generate", 0) + len(
            self.tokenizer(written, add_special_tokens=False)["input_ids"]
        )

    def _parts(self, messages: Messages, variant: str) -> list[Part]:
        """The prompt in pieces, the guard's own text and content apart."""
        if "template" in self.entry:
            if self.entry.get("strip"):
                messages = [
                    {**message, "content": message["content"].strip()} for message in messages
                ]
            return render(self.entry["template"], messages, self.tokenizer)
        kwargs = self.entry.get("variants", {}).get(variant, {})
        kind = "prompt" if last_turns(messages)[1] is None else "response"
        kwargs = self.entry.get("template_kwargs", {}) | kwargs.get(kind, kwargs)
        return render_chat(self.tokenizer, _alternating(messages), None, self._wrap, **kwargs)

    def _wrap(self, messages: Messages) -> list[dict[str, Any]]:
        """What the chat template gets: the turns, and instructions that may quote them."""
        prompt, response = last_turns(messages)
        seen = {k: v for k, v in (("prompt", prompt), ("response", response)) if v is not None}
        out: list[dict[str, Any]] = []
        for message in self.entry["messages"]:
            if message == "conversation":
                out += messages
                continue
            text = (
                template_text(message["content_file"])
                if "content_file" in message
                else message["content"]
            )
            out.append({"role": message["role"], "content": inline_template(text).render(**seen)})
        if self.entry.get("content") == "parts":
            out = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in out]
        return out

    def _ids(self, prompts: Sequence[Sequence[Part]]) -> list[list[int]]:
        raw = "template" in self.entry and self.entry.get("add_special_tokens", True)
        return encode(self.tokenizer, prompts, add_special_tokens=raw)

    # --- the words ----------------------------------------------------------------------------------------------------

    def _labels(self, question: Mapping[str, Any], kind: str | None = None) -> list[str]:
        """The labels that a question answers, of conversations of one kind or of both."""
        if question["label"] != "last":
            return [question["label"]]
        kinds = [kind] if kind else [question["when"]] if "when" in question else list(LAST)
        return [LAST[k] for k in kinds]

    def _check_tokens(self) -> None:
        """Look up the words' tokens in a prompt of each kind, before the weights are loaded."""
        for kind, messages in (("prompt", pair("Hello")), ("response", pair("Hello", "Hi"))):
            if LAST[kind] not in self.judges:
                continue
            variant = next(iter(self.entry.get("variants", [""])))
            (ids,) = self._ids([self._parts(messages, variant)])
            if ids[:2] == [self.tokenizer.bos_token_id] * 2:
                raise UserError(
                    f"{self.name}: its prompt begins with {self.tokenizer.bos_token} twice"
                )
            said = ""
            for number, question in enumerate(self.questions):
                if "anchor" not in question and question.get("when", kind) == kind:
                    said += question.get("prefix", "")
                    self._word_tokens(number, kind, said)
                    said += next(iter(question["words"]))

    def _word_tokens(self, number: int, kind: str, said: str) -> dict[str, list[int]]:
        """First tokens of each word after `said`; none is shared by two words.

        A word that is written without a blank before it also counts with one, as SentencePiece has
        it.

        Raises:
            UserError: the tokenizer writes two words alike, or swallows the end of the prompt with
            a word.
        """
        key = (number, json.dumps([kind, said[-24:]]))
        if key not in self._words:
            messages = pair("Hello", None if kind == "prompt" else "Hi")
            parts = self._parts(messages, next(iter(self.entry.get("variants", [""]))))
            words = list(self.questions[number]["words"])
            forms = {word: dict.fromkeys((word, f" {word.strip()}")) for word in words}
            texts = [said, *(said + form for of in forms.values() for form in of)]
            before, *after = self._ids([[*parts, Part(text, False)] for text in texts])
            following, tokens = iter(after), {}
            for word, of in forms.items():
                each = [next(following) for _ in of]
                tokens[word] = {
                    ids[len(before)] for ids in each if ids[: len(before)] == before < ids
                }
            shared = {
                i
                for word in words
                for i in tokens[word]
                for w in words
                if w != word and i in tokens[w]
            }
            for word in words:
                if not tokens[word] - shared:
                    raise UserError(
                        f"{self.name}: its tokenizer has no token that tells {word!r} from {words}"
                    )
            self._words[key] = {word: sorted(tokens[word] - shared) for word in words}
        return self._words[key]


def _alternating(messages: Messages) -> list[Message]:
    """Messages that begin with the user's turn, as most chat templates ask for."""
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), 0)
    if messages[first]["role"] != "assistant":
        return list(messages)
    if any(m["role"] == "user" for m in messages):  # a greeting: nothing is judged by it
        return [*messages[:first], *_alternating(messages[first + 1 :])]
    return [*messages[:first], {"role": "user", "content": ""}, *messages[first:]]
