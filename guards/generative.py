"""A guard that is a causal LM and writes its verdict.

The verdict is read where the guard would write it, from one forward pass, without generating. A
guard is data (zoo.yaml): how its prompt is written, what it writes before its verdict, and the
words that it answers with. The tokens of these words are looked up with its own tokenizer and
checked when it is loaded. The word with the most likely first token is its native verdict, as
greedy decoding would write it. If the most likely token belongs to no word, the verdict is an
error. The probability is that of the words for unsafe, over those of all words.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common.bundled import resolve_model
from common.conversation import (
    LABEL_OF,
    LABELS,
    Message,
    Messages,
    UserError,
    Verdict,
    check_option,
    last_turns,
    pair,
    with_question,
)
from common.engines import Completion, Decoding, Engine, dtype_name, load_engine
from common.run import judging_bar, loading_model
from common.templates import (
    Part,
    encode,
    inline_template,
    render,
    render_chat,
    template_text,
    windows,
)
from guards.base import (
    LONG_INPUTS,
    Guard,
    check_tokenizer,
    each,
    number_format,
    refuse_foreign,
    seen_of,
)
from guards.known import SYSTEM, policy_text

Ids = list[int]  # of tokens
MODES = ("strict", "loose")
# The kinds of a last turn, and a conversation that ends with one.
EXAMPLES = {"prompt": pair("Hello"), "response": pair("Hello", "Hi")}
CATEGORY_TOKENS = 32  # enough to name the categories of what is unsafe

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """The word that a guard answers a question with. Without an opinion ("n/a") both others are
    None.
    """

    word: str
    unsafe: bool | None
    probability: float | None

    def rank(self) -> float:
        return -1.0 if self.probability is None else self.probability


@dataclass(frozen=True)
class Question:
    """A word that the guard writes, as zoo.yaml describes it."""

    label: str  # what it tells; "last" stands for the label of the last turn
    words: Mapping[str, bool | None]  # whether a word means unsafe, or a refusal; None: no opinion
    prefix: str = ""  # what is written before the word
    anchor: str | None = None  # or the pattern of what is, where that has to be generated
    when: str | None = None  # the only kind of last turn that it is asked of

    @classmethod
    def read(cls, entry: Mapping[str, Any], mode: str) -> "Question":
        """A question of zoo.yaml, where a word between safe and unsafe counts by the mode."""
        words = dict(entry["words"])
        for word, meaning in words.items():
            if meaning == "strict":
                words[word] = mode == "strict"
        return cls(**{**entry, "words": words})

    def is_for(self, kind: str) -> bool:
        return self.when in (None, kind)

    def label_of(self, kind: str) -> str:
        return LABEL_OF[kind] if self.label == "last" else self.label

    def answer(self, word: str, masses: Mapping[str, float]) -> Answer:
        """The meaning of a word, and the probability of unsafe over all words with an opinion."""
        meaning = self.words[word]
        if meaning is None:
            return Answer(word.strip(), None, None)
        unsafe = whole = 0.0
        for one, mass in masses.items():
            if self.words[one] is not None:
                whole += mass
            if self.words[one]:
                unsafe += mass
        return Answer(word.strip(), meaning, unsafe / whole)


@dataclass
class Case:
    """One text to be judged: a conversation, or a window of it, under one of the guard's policies."""

    kind: str  # of the last turn: prompt or response
    variant: str
    parts: list[Part]
    said: str = ""  # what the guard has written so far
    written: str | None = None  # all that it writes, where its format has no fixed beginning
    found: dict[str, Answer] = field(default_factory=dict)  # by label
    error: str | None = None

    @property
    def prompt(self) -> list[Part]:
        """All that stands before what the guard writes next."""
        return [*self.parts, Part(self.said, False)]

    def fail(self, error: str) -> None:
        """What the guard should have written is not there. Its word for the turn stands, if it
        came before that.
        """
        self.error = None if LABEL_OF[self.kind] in self.found else error


class GenerativeGuard(Guard):
    """Any guard of zoo.yaml with kind generative, and the folders that examples/expguard writes.

    Args:
        model: folder or hub id of the causal LM.
        entry: its description, as in zoo.yaml.
        max_length: tokens that it sees of one conversation.
        engine: transformers, vllm (in this process) or server (`server_url`, `server_model`).
        mode: strict counts a word between safe and unsafe ("Controversial") as unsafe, loose
            as safe.
        long_inputs: see `ClassifierGuard`; turns before the last two are left out where these
            need the room.
        categories: let it write on after an unsafe verdict, to name categories.
        chat_template: instead of its tokenizer's.
        policy: for a guard that judges by a user's rules (its entry has a `policy`): a file (.md,
            .txt) or a text; "system" takes each conversation's system prompt, and a conversation
            without one is an error verdict.
        options: of `common.engines.load_engine`.

    Raises:
        UserError: the model cannot be loaded, or its tokenizer does not fit the description.
    """

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
        policy: str | None = None,
        progress: bool = True,
        trust_remote_code: bool = False,
        adapter: str | None = None,
        **options: Any,
    ):
        """Load tokenizer and model."""
        check_option("--long_inputs", long_inputs, LONG_INPUTS)
        check_option("--mode", mode, MODES)
        self.name = Path(model).name
        self.entry = entry
        self.max_length = max_length or entry.get("max_length", 4096)
        self.thresholds = thresholds or {}
        self.progress = progress
        self.long_inputs = long_inputs
        self.too_long: set[int] = set()  # conversations of one call of `judge`
        self.with_categories = categories
        self.pending_check: Callable[[], bool] | None = None  # must hold before the first verdict
        self.policy = self._policy(policy)
        self.questions = [Question.read(question, mode) for question in entry["questions"]]
        self.variants = entry.get("variants", {"": {}})
        self.judges = self._judged()
        self._words: dict[Any, dict[str, Ids]] = {}
        if engine == "transformers":
            refuse_foreign(model, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, trust_remote_code)
        self._load_tokenizer(entry.get("tokenizer", model), chat_template, trust_remote_code)
        self._adds_bos = entry.get("add_special_tokens", True)
        if "messages" in entry:
            self._bring_bos()
        self._check_tokens()
        self.sees = seen_of(self.parts)
        self.model: Engine = load_engine(
            engine,
            model,
            self.tokenizer,
            adapter=adapter or entry.get("adapter"),
            trust_remote_code=trust_remote_code,
            **options,
        )
        room = self.model.window
        if room is not None and self.max_length > room:
            what = f"max_length {self.max_length}: the model sees {room} tokens"
            raise UserError(f"{model}: {what}; lower it to that")
        if engine == "transformers":
            self.dtype = number_format(self.model.model)
        else:  # nobody knows it of a server
            self.dtype = "server" if engine == "server" else dtype_name()

    def _policy(self, given: str | None) -> str | None:
        """The rules that it judges by, if it judges by a user's: those that were given, or its own."""
        if given is None:
            return self.entry.get("policy")
        if "policy" not in self.entry:
            raise UserError(f"{self.name}: has a fixed policy; policy=… is for guards without one")
        if given == SYSTEM and "policy" in self.entry.get("template_kwargs", {}):
            # what a chat template is told beside the messages is not kept from control tokens
            raise UserError(f"{self.name}: takes one policy for all; policy=system is not for it")
        return policy_text(given)

    def _judged(self) -> tuple[str, ...]:
        """The labels that its questions tell."""
        asked = set()
        for question in self.questions:
            for kind in EXAMPLES:
                if question.is_for(kind):
                    asked.add(question.label_of(kind))
        return tuple(label for label in LABELS if label in asked)

    def _load_tokenizer(
        self, source: str, chat_template: str | None, trust_remote_code: bool
    ) -> None:
        with loading_model(source, "tokenizer cannot be loaded"):
            self.tokenizer = AutoTokenizer.from_pretrained(
                resolve_model(source), trust_remote_code=trust_remote_code
            )
        check_tokenizer(self.tokenizer, source)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template

    # --- the verdict ------------------------------------------------------------------------------

    def judge_valid(self, conversations: Sequence[list[Message]]) -> list[Verdict]:
        """Judge the last turn of each; a turn that the guard does not judge is an error verdict."""
        if self.pending_check is not None:
            self._check_first()
        self.too_long = set()
        verdicts, cases_of = each(conversations, self._cases)
        if self.too_long:
            counts = len(self.too_long), len(conversations), self.max_length, self.long_inputs
            logger.info("%d of %d conversations are longer than %d tokens: %s", *counts)
        groups: dict[tuple[str, str], list[Case]] = {}  # what shares most of its prompt
        for cases in cases_of.values():
            for case in cases:
                groups.setdefault((case.kind, case.variant), []).append(case)
        for question in self.questions:
            for (kind, _), group in groups.items():
                asked = [case for case in group if case.error is None]
                if asked and self._is_asked(question, kind):
                    self._ask(question, asked)
        for place, cases in cases_of.items():
            verdicts[place] = _verdict(cases)
        if self.with_categories and "categories" in self.entry:
            self._name_categories(cases_of, verdicts)
        return verdicts

    def _check_first(self) -> None:
        """Make the check that is pending. Until it passes, each call makes it again: what it has
        refused is never believed.
        """
        check, self.pending_check = self.pending_check, None  # it judges the probe by this guard
        passed = False
        try:
            passed = check()
        finally:
            if not passed:
                self.pending_check = check

    def _is_asked(self, question: Question, kind: str) -> bool:
        """Whether a question is for turns of this kind, and what is generated for it is wanted."""
        label = question.label_of(kind)
        wanted = question.anchor is None or label == LABEL_OF[kind] or label in self.wanted
        return wanted and question.is_for(kind)

    def _ask(self, question: Question, cases: list[Case]) -> None:
        """Fill in the answers, or the errors, of cases of one kind."""
        if question.anchor is not None:
            cases = self._write_to_anchor(question.anchor, cases)
        words_of = []
        candidates: set[int] = set()
        for case in cases:
            case.said += question.prefix
            words = self._word_tokens(question, case.kind, case.said)
            words_of.append(words)
            candidates.update(*words.values())
        prompts = self.encode([case.prompt for case in cases])
        ordered = sorted(candidates)
        read = self.model.next_token(prompts, ordered, judging_bar(self.name, self.progress))
        for case, words, said in zip(cases, words_of, read, strict=True):
            if said.error is not None:
                case.error = said.error
                continue
            logprob = dict(zip(ordered, said.logprobs, strict=True))
            masses = {}
            written = None
            for word, ids in words.items():
                masses[word] = sum(math.exp(logprob[i]) for i in ids)
                if said.top in ids:
                    written = word
            if not all(map(math.isfinite, masses.values())):
                case.error = "the model's output is not a number"
            elif written is not None:
                case.said += written
                case.found[question.label_of(case.kind)] = question.answer(written, masses)
            else:
                other = self.tokenizer.decode([said.top])
                expected = " or ".join(map(repr, words))
                case.fail(f"it writes {other!r} where {expected} was expected")

    # --- text that the guard writes ---------------------------------------------------------------

    def _write_to_anchor(
        self,
        anchor: str,
        cases: list[Case],
    ) -> list[Case]:
        """Let the guard write, and keep what stands before its verdict. What has no anchor is an
        error.
        """
        fresh = [case for case in cases if case.written is None]
        prompts = self.encode([case.parts for case in fresh])
        completions = self.written(prompts, self.entry["generate"])
        for case, completion in zip(fresh, completions, strict=True):
            case.written = completion.text
            case.error = completion.error
        found = []
        for case in cases:
            if case.error is not None:
                continue
            match = re.search(anchor, case.written)
            if match is None:
                case.fail(f"no {anchor} in what it wrote: {case.written[-60:]!r}")
            else:
                case.said = case.written[: match.end()]
                found.append(case)
        return found

    def written(
        self,
        prompts: Sequence[Ids],
        new_tokens: int,
    ) -> list[Completion]:
        """What the guard writes greedily after prompts (token ids), special tokens included."""
        decoding = Decoding(max_new_tokens=new_tokens)
        return self.model.completions(prompts, decoding, skip_special_tokens=False)

    def _name_categories(
        self, cases_of: Mapping[int, list[Case]], verdicts: Sequence[Verdict]
    ) -> None:
        """What the guard writes after an unsafe verdict. A named category gets the verdict's
        probability.
        """
        known = self.entry["categories"]
        names = known.get("names", {})
        unsafe = []
        for place, cases in cases_of.items():
            for case in cases:
                answer = case.found.get(LABEL_OF[case.kind])
                if verdicts[place].error is None and answer is not None and answer.unsafe:
                    unsafe.append((case, answer, verdicts[place]))
        prompts = self.encode([case.prompt for case, _, _ in unsafe])
        completions = self.written(prompts, CATEGORY_TOKENS)
        for (_, answer, verdict), completion in zip(unsafe, completions, strict=True):
            written = f"{answer.word}\n{completion.text}"  # the word itself may be a category
            for code in re.findall(known["pattern"], written):
                verdict.categories[names.get(code, code)] = answer.probability
        errors = [one.error for one in completions if one.error is not None]
        if errors:
            logger.warning(
                "%d of %d unsafe texts: the categories are not known, the verdicts stand (%s)",
                *(len(errors), len(completions), errors[0]),
            )

    # --- the prompt -------------------------------------------------------------------------------

    def prompt_ids(self, conversations: Sequence[Messages]) -> list[Ids]:
        """Token ids of all that stands before the verdict on each, uncut: what a training row has
        to begin with.

        Raises:
            UserError: the guard asks several questions, or several times, or writes something
                first.
        """
        several = len(self.questions) + len(self.variants) > 2
        if several or self.questions[0].anchor is not None:
            what = "its verdict is not one word after one prompt"
            raise UserError(f"{self.name}: {what}; it cannot be trained here")
        return self.encode([self.prompt_parts(messages) for messages in conversations])

    def prompt_parts(self, messages: Messages) -> list[Part]:
        """`prompt_ids` before encoding: text that this class writes, and content."""
        return [
            *self.parts(messages),
            Part(self.questions[0].prefix, False),
        ]

    def verdict_tokens(self, kind: str) -> dict[bool, Ids]:
        """The first tokens of the words for unsafe (True) and safe (False), after a prompt or after
        a response.
        """
        question = self.questions[0]
        tokens: dict[bool, Ids] = {True: [], False: []}
        for word, ids in self._word_tokens(
            question,
            kind,
            question.prefix,
        ).items():
            meaning = question.words[word]
            if meaning is not None:
                tokens[meaning] += ids
        return tokens

    def _cases(self, messages: Messages) -> list[Case]:
        """The texts to be judged of one conversation."""
        kind = _kind(messages)
        if LABEL_OF[kind] not in self.judges:
            judged = ", ".join(self.judges)
            what = f"not a conversation that ends with a {kind}"
            raise UserError(f"{self.name} judges {judged}, {what}")
        if self.policy == SYSTEM and messages[0]["role"] != "system":
            raise UserError(f"{self.name}: no system prompt, which policy=system takes for rules")
        cases = []
        for variant in self.variants:
            for piece in self._fitting(messages, variant):
                cases.append(Case(kind, variant, self.parts(piece, variant)))
        return cases

    def _fitting(self, messages: Messages, variant: str) -> list[Messages]:
        """The conversation, or of one that is too long what `long_inputs` says."""
        length = self._length(messages, variant)
        if length <= self.max_length:
            return [messages]
        self.too_long.add(id(messages))
        if self.long_inputs == "error":
            raise UserError(f"{length} tokens, more than --max_length {self.max_length}")
        length_of = partial(self._length, variant=variant)
        pieces = windows(self.tokenizer, length_of, messages, self.max_length)
        return pieces[:1] if self.long_inputs == "truncate" else pieces

    def _length(self, messages: Messages, variant: str) -> int:
        (ids,) = self.encode([self.parts(messages, variant)])
        return len(ids) + self._reserve

    @cached_property
    def _reserve(self) -> int:
        """Tokens that the guard writes before its last verdict."""
        written = ""
        for question in self.questions:
            written += question.prefix + max(question.words, key=len)
        ids = self.tokenizer(written, add_special_tokens=False)["input_ids"]
        return self.entry.get("generate", 0) + len(ids)

    def parts(self, messages: Messages, variant: str = "") -> list[Part]:
        """The prompt in pieces, the guard's own text and content apart.

        Args:
            variant: one of the guard's policies; "" is the first.
        """
        if "template" in self.entry:
            how = self.entry.get("strip")
            if how == "each":
                messages = [turn | {"content": turn["content"].strip()} for turn in messages]
            rules = self._rules(messages)
            parts = render(self.entry["template"], messages, self.tokenizer, rules)
            return _stripped(parts) if how == "all" else parts
        policy = self.variants[variant or next(iter(self.variants))]
        kwargs = dict(self.entry.get("template_kwargs", {}))
        kwargs |= policy.get(_kind(messages), {})
        if "policy" in kwargs:
            kwargs["policy"] = self.policy
        turns = _alternating(messages)
        return render_chat(self.tokenizer, turns, wrap=self._wrap, **kwargs)

    def _rules(self, messages: Messages) -> str | None:
        """The user's policy for one conversation."""
        if self.policy != SYSTEM:
            return self.policy
        system = [turn["content"] for turn in messages if turn["role"] == "system"]
        return system[0] if system else self.entry.get("policy")

    def _wrap(self, messages: Messages) -> list[dict[str, Any]]:
        """What the chat template gets: the turns, and instructions that may quote them."""
        prompt, response = last_turns(messages)
        turns = [turn for turn in messages if turn["role"] != "system"]
        seen: dict[str, Any] = {"prompt": prompt, "policy": self._rules(messages)}
        seen["messages"] = turns
        if response is not None:
            seen["response"] = response
        out: list[dict[str, Any]] = []
        for message in self.entry["messages"]:
            if message == "conversation":
                out += messages
                continue
            if message == "last_turns":
                out += pair(prompt, response)
                continue
            text = message.get("content") or template_text(message["content_file"])
            text = inline_template(text).render(**seen)
            out.append({"role": message["role"], "content": text})
        if self.entry.get("content") == "parts":
            for i, turn in enumerate(out):
                part = {"type": "text", "text": turn["content"]}
                out[i] = turn | {"content": [part]}
        return out

    def encode(self, prompts: Sequence[Sequence[Part]]) -> list[Ids]:
        """Token ids of prompts."""
        return encode(self.tokenizer, prompts, add_special_tokens=self._adds_bos)

    def _bring_bos(self) -> None:
        """Have the chat template write the BOS that the tokenizer would put before its prompt.

        Llama Guard's brings none, those of its successors do. So a prompt has one in any case, and
        a tokenizer that is saved renders what was judged.
        """
        kind = "prompt" if LABEL_OF["prompt"] in self.judges else "response"
        template = self.tokenizer.chat_template
        bos = self.tokenizer.bos_token
        prompt = self.parts(EXAMPLES[kind])
        self._adds_bos = bos is not None and not prompt[0].text.startswith(bos)
        (ids,) = self.encode([prompt])
        if not self._adds_bos or ids[0] != self.tokenizer.bos_token_id:
            return
        self._adds_bos = False
        for blank in ("", " "):  # SentencePiece begins a text with one
            self.tokenizer.chat_template = f"{{{{ bos_token + {blank!r} }}}}{template}"
            if self.encode([self.parts(EXAMPLES[kind])]) == [ids]:
                return
        self._adds_bos = True
        self.tokenizer.chat_template = template

    # --- the words --------------------------------------------------------------------------------

    def _check_tokens(self) -> None:
        """Look up the words' tokens in a prompt of each kind, before the weights are loaded."""
        for kind in EXAMPLES:
            said = ""
            for question in self.questions if LABEL_OF[kind] in self.judges else ():
                if question.anchor is None and question.is_for(kind):
                    said += question.prefix
                    self._word_tokens(question, kind, said)
                    said += next(iter(question.words))

    def _word_tokens(
        self,
        question: Question,
        kind: str,
        said: str,
    ) -> dict[str, Ids]:
        """First tokens of each word after `said`; none is shared by two words.

        A word that is written without a blank before it also counts with one, as SentencePiece has
        it.

        Raises:
            UserError: the tokenizer writes two words alike, or swallows the end of the prompt with
                a word.
        """
        key = (question.label, kind, said[-24:])
        if key in self._words:
            return self._words[key]
        first = {word: self._first_tokens(word, kind, said) for word in question.words}
        count = Counter()
        for ids in first.values():
            count.update(ids)
        tokens = {}
        for word, ids in first.items():
            tokens[word] = sorted(i for i in ids if count[i] == 1)
            if not tokens[word]:
                what = f"no token that tells {word!r} from {list(first)}"
                raise UserError(f"{self.name}: its tokenizer has {what}")
        self._words[key] = tokens
        return tokens

    def _first_tokens(
        self,
        word: str,
        kind: str,
        said: str,
    ) -> set[int]:
        """What a word begins with after `said`."""
        case = Case(kind, "", self.parts(EXAMPLES[kind]), said)
        (before,) = self.encode([case.prompt])
        found = set()
        for form in (word, f" {word.strip()}"):
            case.said = said + form
            (ids,) = self.encode([case.prompt])
            if ids[: len(before)] == before < ids:
                found.add(ids[len(before)])
        return found


def _verdict(cases: list[Case]) -> Verdict:
    """What the cases of one conversation say: the highest probability counts. Where one has failed,
    the conversation has no verdict.
    """
    verdict = Verdict()
    answers: dict[str, list[Answer]] = {}
    for case in cases:
        if case.error is not None:
            return Verdict(error=case.error)
        for label, answer in case.found.items():
            answers.setdefault(label, []).append(answer)
            if case.variant:
                before = verdict.categories.get(case.variant, 0.0)
                verdict.categories[case.variant] = max(before, answer.probability)
    for label, every in answers.items():
        highest = max(every, key=Answer.rank)
        verdict.native[label] = highest.word
        if highest.probability is not None:
            setattr(verdict, label, highest.probability)
            verdict.decided[label] = any(answer.unsafe for answer in every)
    return verdict


def _kind(messages: Messages) -> str:
    """What is judged of a conversation: its prompt, or the response to that."""
    return "prompt" if last_turns(messages)[1] is None else "response"


def _stripped(parts: list[Part]) -> list[Part]:
    """A prompt whose contents are stripped of white space as one text, with what is between them."""
    out = list(parts)
    places = [place for place, part in enumerate(parts) if part.is_content]
    inside = range(places[0], places[-1] + 1)
    for order, strip in ((inside, str.lstrip), (reversed(inside), str.rstrip)):
        for place in order:
            text = strip(out[place].text)
            out[place] = out[place]._replace(text=text)
            if text:
                break
    return out


def _alternating(messages: Messages) -> list[Message]:
    """Messages that begin with the user's turn, as most chat templates ask for: without a greeting,
    or with an empty question before an answer alone.
    """
    turns = with_question(messages)
    asked = [turn["role"] for turn in turns].index("user")
    system = [turn for turn in turns[:asked] if turn["role"] == "system"]
    return system + turns[asked:]
