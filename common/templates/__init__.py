"""Prompt templates, and the one encoder that keeps text under moderation from becoming control
tokens.

A template is a jinja file in this folder. It is rendered with place-holders where content goes, so
that the result is known piece by piece as template text or content. `encode` then tokenizes the
whole text once, exactly as the reference call `tokenizer(text)` would, and looks at every control
token of the result: one that covers content did not come from the template. Only then is the
content changed, by a space inside the string that was taken for a control token.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from common.conversation import Message, Messages, UserError, judged_turns, last_turns, pair

# Where templates are looked for; `guards` adds its own folder.
FOLDERS = [Path(__file__).parent]
ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
# jinja's own is for HTML
ENVIRONMENT.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)


Span = tuple[int, int]  # the first character, and the one after the last


class Part(NamedTuple):
    """A piece of a rendered prompt: the template's own text, or content of a message."""

    text: str
    is_content: bool


def render(
    template: str,
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase | None = None,
    policy: str | None = None,
) -> list[Part]:
    """The prompt of `messages` in pieces.

    Args:
        template: the name of a jinja file in this folder or in guards/prompts, without its ending.
            It sees `prompt` (last user turn), `response` (answer to it), `messages` (all questions
            and answers, see `judged_turns`), `policy` if there is one, and `bos_token` and `eos_token` (empty without a
            tokenizer that has them).

    Raises:
        UserError: the template is unknown, or it needs a turn that the conversation lacks.
    """
    contents: list[str] = []

    def marked(content: str) -> str:
        contents.append(content)
        return _mark(len(contents) - 1)

    prompt, response = last_turns(messages)
    given: dict[str, Any] = {
        "bos_token": getattr(tokenizer, "bos_token", None) or "",
        "eos_token": getattr(tokenizer, "eos_token", None) or "",
    }
    if prompt is not None:
        given["prompt"] = marked(prompt)
    if response is not None:
        given["response"] = marked(response)
    if policy is not None:
        given["policy"] = marked(policy)
    turns = []
    for turn in judged_turns(messages):
        turns.append(turn | {"content": marked(turn["content"])})
    if turns:
        given["messages"] = turns
    try:
        text = _template(template).render(given)
    except jinja2.UndefinedError as error:
        raise UserError(
            f"template {template}: the conversation has no such turn ({error.message})"
        ) from None
    return _parts(text, contents)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    chat_template: str | None = None,
    wrap: Callable[[Messages], list[dict[str, Any]]] = list,
    **template_kwargs: Any,
) -> list[Part]:
    """The prompt of a chat model in pieces: its chat template with the generation prompt.

    The template writes the special tokens itself: encode the parts with `add_special_tokens=False`.

    Args:
        chat_template: instead of the tokenizer's own.
        wrap: what is given to the template, made of the messages: the turns themselves, or an
            instruction that quotes them.
        template_kwargs: handed to the template.

    Raises:
        UserError: there is no template, or it refuses the conversation.
    """

    def rendered(turns: Messages) -> str:
        options = {"tokenize": False, "add_generation_prompt": True} | template_kwargs
        return tokenizer.apply_chat_template(wrap(turns), chat_template=chat_template, **options)

    contents = [message["content"] for message in messages]
    marked = []
    for number, message in enumerate(messages):
        marked.append(message | {"content": _mark(number)})
    try:
        text = rendered(marked)
        plain = rendered(messages)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise UserError(f"the chat template refuses the conversation: {error}") from None
    quoted = [json.dumps(content, ensure_ascii=False)[1:-1] for content in contents]
    trimmed = [content.strip() for content in contents]
    for written in (quoted, trimmed, contents):  # what the template did to the contents
        parts = _parts(text, written)
        if text_of(parts) == plain:
            break
    return parts


def _mark(number: int) -> str:
    """What stands for a content while the template is rendered. Content is put in only afterwards,
    so it cannot forge these private-use characters.
    """
    return f"\ue000{number}\ue001"


def _parts(text: str, contents: Sequence[str]) -> list[Part]:
    """A rendered text with contents in the place of their marks."""
    parts = []
    for index, piece in enumerate(re.split("\ue000([0-9]+)\ue001", text)):
        if index % 2:
            parts.append(Part(contents[int(piece)], True))
        elif piece:
            parts.append(Part(piece, False))
    return parts


def text_of(parts: Sequence[Part]) -> str:
    """A prompt in one piece."""
    return "".join(part.text for part in parts)


@cache
def inline_template(text: str) -> jinja2.Template:
    """A template that fails where a turn is missing."""
    return ENVIRONMENT.from_string(text)


@cache
def _template(name: str) -> jinja2.Template:
    return inline_template(template_text(name))


def template_text(name: str) -> str:
    """The text of a template file, without the line break at its end. Raises UserError when there
    is none.
    """
    found = {}
    for folder in FOLDERS:
        for path in folder.glob("*.jinja"):
            found[path.stem] = path
    if name not in found:
        raise UserError(f"template {name!r}: unknown; the templates are {', '.join(sorted(found))}")
    return found[name].read_text(encoding="utf-8").removesuffix("\n")


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that steer a model: special tokens, and other added tokens that look like markup
    (`<tool_call>`).

    Added tokens of letters, digits and spaces alone are ordinary vocabulary (runs of blanks, domain
    words). The unknown token is not in the set: content that the tokenizer has no token for yields
    it rightly. Where it is EOS as well, as in GPT-2 and OPT, it is: a byte-level vocabulary never
    yields it for text.
    """
    control = set(tokenizer.all_special_ids)
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special or re.search(r"[^\w\s▁]", token.content):
            control.add(number)
    return control - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Part]],
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """Token ids of rendered prompts; no id of `control_ids` comes from content.

    Content that holds no control string gives exactly `tokenizer(text,
    add_special_tokens=…)["input_ids"]`.

    Returns:
        One list of ids a prompt, unpadded and uncut.

    Raises:
        UserError: the tokenizer cannot say which characters a token covers (no fast version).
    """
    if not prompts:
        return []
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path}: only a slow tokenizer; guards need a fast one to tell text "
            "from control tokens"
        )
    control = control_ids(tokenizer)

    def encoded(prompts: Sequence[Sequence[Part]]) -> list[Encoding]:
        texts = [text_of(parts) for parts in prompts]
        return tokenizer(texts, add_special_tokens=add_special_tokens).encodings

    out = []
    for prompt, encoding in zip(prompts, encoded(prompts), strict=True):
        parts = prompt
        spans = _forged(parts, encoding, control, tokenizer)
        attempt = 0
        while spans and attempt < 16:
            parts = _broken(parts, spans, attempt)
            (encoding,) = encoded([parts])
            spans = _forged(parts, encoding, control, tokenizer)
            attempt += 1
        if spans:
            raise UserError(
                f"{tokenizer.name_or_path}: cannot keep {text_of(prompt)!r:.60} from becoming "
                "control tokens"
            )
        out.append(encoding.ids)
    return out


def _forged(
    parts: Sequence[Part],
    encoding: Encoding,
    control: set[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Span]:
    """Character spans of control tokens that cover content. A token added by the tokenizer itself
    covers nothing.
    """
    text = text_of(parts)
    is_content = _content_flags(parts)
    spans = []
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        covered = text[start:end]
        is_unknown = token == tokenizer.unk_token_id
        if token not in control and not (is_unknown and _spells_unknown(covered, tokenizer)):
            continue
        # A template's token with lstrip/rstrip also covers the white space beside it, which is no
        # forgery.
        start += len(covered) - len(covered.lstrip())
        end = start + len(covered.strip())
        if any(is_content[start:end]):
            spans.append((start, end))
    return spans


def _content_flags(parts: Sequence[Part]) -> list[bool]:
    """For each character whether it is content."""
    flags = []
    for part in parts:
        flags += [part.is_content] * len(part.text)
    return flags


def _spells_unknown(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the unknown token is there because `text` names it, and not because the vocabulary
    lacks `text`.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    seen = normalizer.normalize_str(text) if normalizer else text
    return tokenizer.unk_token in text or tokenizer.unk_token in seen


def _broken(parts: Sequence[Part], spans: list[Span], attempt: int) -> list[Part]:
    """`parts` with a space inside each span, put in its content.

    That space may be at an end of the control string, because the string reaches into the template
    or begins with characters that a normalizer drops: the second attempt puts spaces everywhere. A
    normalizer may drop spaces: from the third on, characters become U+FFFD, and so does a span of
    one character.
    """
    changes: dict[int, str] = {}
    text = text_of(parts)
    is_content = _content_flags(parts)
    for start, end in spans:
        inside = [index for index in range(start, end) if is_content[index]]
        if attempt == 0:
            inside = inside[:1]
        for index in inside:
            spaced = f"{text[index]} " if attempt == 0 else f" {text[index]} "
            replaceable = attempt < 2 and end - start > 1
            changes[index] = spaced if replaceable else "\ufffd"
    changed = []
    place = 0
    for part in parts:
        written = ""
        for index, character in enumerate(part.text, place):
            written += changes.get(index, character)
        changed.append(Part(written, part.is_content))
        place += len(part.text)
    return changed


def windows(
    tokenizer: PreTrainedTokenizerBase,
    length: Callable[[Messages], int],
    messages: Messages,
    max_length: int,
) -> list[list[Message]]:
    """Overlapping windows (by a quarter) over a conversation whose prompt is longer than
    `max_length` tokens.

    Each window is a conversation of a piece of the answer and, if the question fills more than half
    of the room, a piece of it; every piece of both is in at least one window. Turns before the last
    two have no room.

    Args:
        length: tokens of the prompt of a conversation.
    """
    prompt, response = last_turns(messages)
    empty = pair(prompt and "", response and "")
    room = max_length - length(empty)
    while room >= 16:
        room_of_prompt = room if response is None else room // 2
        asked = _pieces(tokenizer, prompt, room_of_prompt)
        asked_tokens = [len(token_offsets(tokenizer, piece or "")) for piece in asked]
        rest = max(1, room - max(asked_tokens))
        answered = _pieces(tokenizer, response, rest)
        count = max(len(asked), len(answered))
        pairs = []
        for number in range(count):
            question = asked[number % len(asked)]
            answer = answered[number % len(answered)]
            pairs.append(pair(question, answer))
        if max(map(length, pairs)) <= max_length:
            return pairs
        room = room * 7 // 8  # pieces can grow by a few tokens at their seams
    raise UserError(f"--max_length {max_length}: leaves no room for windows beside the template")


def _pieces(
    tokenizer: PreTrainedTokenizerBase,
    text: str | None,
    size: int,
) -> list[str | None]:
    """`text` in overlapping pieces of at most `size` tokens."""
    offsets = token_offsets(tokenizer, text or "")
    if len(offsets) <= size:
        return [text]
    step = max(1, size * 3 // 4)
    end = len(offsets) - size + step
    pieces = []
    for start in range(0, end, step):
        covered = offsets[start : start + size]
        first, _ = covered[0]
        _, last = covered[-1]
        pieces.append(text[first:last])
    return pieces


def token_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Span]:
    """The characters that each token of `text` covers when control strings are read as text, as
    `encode` does.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True}
    return tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]


def cut(ids: list[int], max_length: int, control: set[int]) -> list[int]:
    """`ids` shortened to `max_length` at the right end of the content; the closing control tokens
    (EOS) are kept.

    Content never yields control tokens, so the closing run of control tokens is the template's own.
    Cutting at the right is what BeaverTails does; keeping EOS, where the score is read, is what it
    does not.
    """
    if len(ids) <= max_length:
        return ids
    body = len(ids)  # where the closing control tokens begin
    while body and ids[body - 1] in control:
        body -= 1
    closing = ids[body:]
    kept = max_length - len(closing)
    if kept <= 0:
        raise UserError(
            f"--max_length {max_length}: too short for the template, whose closing tokens alone "
            f"are {len(closing)}"
        )
    return ids[:kept] + closing
