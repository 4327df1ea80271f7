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
from transformers import PreTrainedTokenizerBase

from common.conversation import Message, Messages, UserError, judged_turns, last_turns, pair

# Where templates are looked for; `guards` adds its own folder.
FOLDERS = [Path(__file__).parent]
ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
# jinja's own is for HTML
ENVIRONMENT.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)


class Part(NamedTuple):
    """A piece of a rendered prompt: the template's own text, or content of a message."""

    text: str
    is_content: bool


def render(
    template: str, messages: Messages, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Part]:
    """The prompt of `messages` in pieces.

    Args:
        template: the name of a jinja file in this folder or in guards/prompts, without its ending.
        It sees `prompt`
            (last user turn), `response` (answer to it), `messages` (all questions and answers, see
            `judged_turns`) and `bos_token` and `eos_token` (empty without a tokenizer that has
            them).

    Raises:
        UserError: the template is unknown, it needs a turn that the conversation lacks, or a text
        is not Unicode.
    """
    prompt, response = last_turns(messages)
    turns = judged_turns(messages)
    content = {"prompt": prompt, "response": response}
    content |= {str(number): turn["content"] for number, turn in enumerate(turns)}
    # U+E000 and U+E001 are private-use characters; content is put in only after rendering, so it
    # cannot forge them.
    markers = {name: f"\ue000{name}\ue001" for name, text in content.items() if text is not None}
    given: dict[str, Any] = {
        name: markers[name] for name in ("prompt", "response") if name in markers
    }
    if turns:
        given["messages"] = [
            {"role": turn["role"], "content": markers[str(number)]}
            for number, turn in enumerate(turns)
        ]
    specials = {name: getattr(tokenizer, name, None) or "" for name in ("bos_token", "eos_token")}
    try:
        text = _template(template).render(**given, **specials)
    except jinja2.UndefinedError as error:
        raise UserError(
            f"template {template}: the conversation has no such turn ({error.message})"
        ) from None
    if any(
        "\ud800" <= character <= "\udfff" for turn in content.values() for character in turn or ""
    ):
        raise UserError("the text holds a lone surrogate, which no tokenizer can read")
    pieces = re.split("\ue000(prompt|response|[0-9]+)\ue001", text)
    return [
        Part(content[piece] if i % 2 else piece, bool(i % 2))
        for i, piece in enumerate(pieces)
        if piece
    ]


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
        instruction that quotes
            them.
        template_kwargs: handed to the template.

    Raises:
        UserError: there is no template, or it refuses the conversation.
    """
    contents = [message["content"] for message in messages]
    marked = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
    options = {
        "tokenize": False,
        "add_generation_prompt": True,
        "chat_template": chat_template,
    } | template_kwargs
    try:
        text, plain = (
            tokenizer.apply_chat_template(wrap(m), **options) for m in (marked, messages)
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise UserError(f"the chat template refuses the conversation: {error}") from None
    pieces = re.split("\ue000([0-9]+)\ue001", text)
    quoted = [json.dumps(content, ensure_ascii=False)[1:-1] for content in contents]
    stripped = [content.strip() for content in contents]  # many templates trim
    for texts in (quoted, stripped, contents):
        parts = [Part(texts[int(p)] if i % 2 else p, bool(i % 2)) for i, p in enumerate(pieces)]
        if "".join(part.text for part in parts) == plain:
            break
    return parts


@cache
def _template(name: str) -> jinja2.Template:
    return inline_template(template_text(name))


@cache
def inline_template(text: str) -> jinja2.Template:
    """A template that fails where a turn is missing."""
    return ENVIRONMENT.from_string(text)


def template_text(name: str) -> str:
    """The text of a template file, without the line break at its end. Raises UserError when there
    is none.
    """
    found = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.jinja"))}
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
    added = tokenizer.added_tokens_decoder
    marked = {
        i for i, token in added.items() if token.special or re.search(r"[^\w\s▁]", token.content)
    }
    return (marked | set(tokenizer.all_special_ids)) - (
        {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    )


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
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path}: only a slow tokenizer; guards need a fast one to tell text from control tokens"
        )
    control = control_ids(tokenizer)
    texts = ["".join(part.text for part in parts) for parts in prompts]
    if not texts:
        return []
    batch = tokenizer(texts, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    out = []
    for parts, ids, offsets in zip(
        prompts, batch["input_ids"], batch["offset_mapping"], strict=True
    ):
        for attempt in range(16):
            forged = _forged(parts, ids, offsets, control, tokenizer)
            if not forged:
                break
            parts = _broken(parts, forged, attempt)
            one = tokenizer(
                "".join(p.text for p in parts),
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
            )
            ids, offsets = one["input_ids"], one["offset_mapping"]
        else:
            raise UserError(
                f"{tokenizer.name_or_path}: cannot keep {texts[len(out)]!r:.60} from becoming control tokens"
            )
        out.append(ids)
    return out


def _forged(
    parts: Sequence[Part],
    ids: list[int],
    offsets: list[tuple[int, int]],
    control: set[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[int, int]]:
    """Character spans of control tokens that cover content. A token added by the tokenizer itself
    covers nothing.
    """
    text, content, position = "".join(part.text for part in parts), [], 0
    for part in parts:
        if part.is_content:
            content.append((position, position + len(part.text)))
        position += len(part.text)
    spans = []
    for token, (start, end) in zip(ids, offsets, strict=True):
        unknown = token == tokenizer.unk_token_id and _spells_unknown(text[start:end], tokenizer)
        if token not in control and not unknown:
            continue
        # A template's token with lstrip/rstrip also covers the white space beside it, which is no
        # forgery.
        covered = text[start:end]
        start, end = (
            start + len(covered) - len(covered.lstrip()),
            end - len(covered) + len(covered.rstrip()),
        )
        if start < end and any(start < last and first < end for first, last in content):
            spans.append((start, end))
    return spans


def _spells_unknown(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the unknown token is there because `text` names it, and not because the vocabulary
    lacks `text`.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    return tokenizer.unk_token in (
        text if normalizer is None else f"{text}\n{normalizer.normalize_str(text)}"
    )


def _broken(parts: Sequence[Part], spans: list[tuple[int, int]], attempt: int) -> list[Part]:
    """`parts` with a space inside each span, put in its content (a span of one character becomes
    U+FFFD).

    Where that space stands at an end of the control string, because the string reaches into the
    template or begins with characters that a normalizer drops, the next attempt has spaces
    everywhere. Where it drops spaces, the one after that takes the characters away.
    """
    out, position = [], 0
    for text, is_content in parts:
        length = len(text)
        for start, end in reversed(spans) if is_content else ():
            first, last = max(start - position, 0), min(end - position, length)
            if first >= last:
                continue
            piece = text[first:last]
            if end - start == 1 or attempt > 1:
                piece = "\ufffd" * len(piece)
            elif attempt == 1:
                piece = "".join(f" {character} " for character in piece)
            else:
                piece = f"{piece[0]} {piece[1:]}"
            text = text[:first] + piece + text[last:]
        out.append(Part(text, is_content))
        position += length
    return out


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
    room = max_length - length(pair(prompt and "", response and ""))
    while room >= 16:
        asked = (
            [None]
            if prompt is None
            else _pieces(tokenizer, prompt, room if response is None else room // 2)
        )
        left = max(1, room - max(len(token_offsets(tokenizer, piece or "")) for piece in asked))
        answered = [None] if response is None else _pieces(tokenizer, response, left)
        count = max(len(asked), len(answered))
        pairs = [pair(asked[i % len(asked)], answered[i % len(answered)]) for i in range(count)]
        if max(map(length, pairs)) <= max_length:
            return pairs
        room = room * 7 // 8  # pieces can grow by a few tokens at their seams
    raise UserError(f"--max_length {max_length}: leaves no room for windows beside the template")


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, size: int) -> list[str]:
    """`text` in overlapping pieces of at most `size` tokens."""
    offsets = token_offsets(tokenizer, text)
    if len(offsets) <= size:
        return [text]
    step = max(1, size * 3 // 4)
    starts = range(0, len(offsets) - size + step, step)
    return [text[offsets[i][0] : offsets[min(i + size, len(offsets)) - 1][1]] for i in starts]


def token_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """The characters that each token of `text` covers when control strings are read as text, as
    `encode` does.
    """
    options = {
        "add_special_tokens": False,
        "split_special_tokens": True,
        "return_offsets_mapping": True,
    }
    return tokenizer(text, **options)["offset_mapping"]


def cut(ids: list[int], max_length: int, control: set[int]) -> list[int]:
    """`ids` shortened to `max_length` at the right end of the content; the closing control tokens
    (EOS) are kept.

    Content never yields control tokens, so the closing run of control tokens is the template's own.
    Cutting at the right is what BeaverTails does; keeping EOS, where the score is read, is what it
    does not.
    """
    if len(ids) <= max_length:
        return ids
    tail = next((n for n, token in enumerate(reversed(ids)) if token not in control), len(ids))
    if tail >= max_length:
        raise UserError(
            f"--max_length {max_length}: too short for the template, whose closing tokens alone are {tail}"
        )
    return ids[: max_length - tail] + ids[len(ids) - tail :]
