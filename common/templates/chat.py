"""A chat template that renders the very text that a classifier was trained on.

Servers and libraries that take `messages` render them with the tokenizer's chat template and
tokenize the result without adding special tokens. A guard that keeps its base's chat template would
be given a chat there, which it has never seen.
"""

from transformers import PreTrainedTokenizerBase

from common.conversation import Messages, pair, parts_of
from common.templates import encode, render, template_text

# Sets prompt and response as `render` does: the last user turn, and the answer to it.
HEAD = """{%- set turns = namespace(prompt=none, response=none) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- set turns.prompt = message['content'] -%}
{%- endif -%}
{%- endfor -%}
{%- if messages[-1]['role'] == 'assistant' -%}
{%- set turns.response = messages[-1]['content'] -%}
{%- endif -%}
"""
TAIL = """{%- set prompt, response = turns.prompt, turns.response -%}
"""
REFUSED = {  # what is judged: where there is none of it, and what is said then
    "pair": (
        "turns.prompt is none or turns.response is none",
        "This guard judges the answer to a question: end with a user and an assistant turn",
    ),
    "prompt": (
        "turns.prompt is none or messages[-1]['role'] != 'user'",
        "This guard judges a question: end with a user turn",
    ),
    "response": (
        "turns.response is none",
        "This guard judges an answer: end with an assistant turn",
    ),
}
EXAMPLES = (
    pair(
        "How do I keep my bicycle from being stolen?", "Use two locks, and take the lamps with you."
    ),
    pair("  Two lines,\nblanks around them.  ", " Yes.\n"),
    pair("Why?", ""),
    [
        {"role": "system", "content": "Be kind."},
        *pair("Hello.", "Hello!"),
        *pair("And then?", "Then we left."),
    ],
)


def chat_template_of(
    template: str, tokenizer: PreTrainedTokenizerBase, judge: str = "pair"
) -> str | None:
    """The chat template after which stock consumers see the ids that `encode` gives what is judged.

    It writes what the tokenizer puts around a text itself (BOS, `[CLS]`, `[SEP]`), because nobody
    adds that to a rendered chat. SentencePiece tokenizers begin the first word of a text, but not
    one that follows a special token, with a blank: some need it written.

    Args:
        template: the name of a prompt template.
        judge: what it needs: a pair (prompt and response), a prompt, or a response.

    Returns:
        None where no such text gives those ids.
    """
    before, after = _framing(tokenizer)
    lacking, said = REFUSED[judge]
    refusal = f"{{%- if {lacking} -%}}{{{{- raise_exception('{said}') -}}}}{{%- endif -%}}\n"
    head = HEAD + refusal + TAIL
    examples = [parts_of(messages)[judge] for messages in EXAMPLES]
    if judge == "pair":
        examples = EXAMPLES
    for blank in ("", " "):
        written = head + _quoted(before + blank) + template_text(template) + _quoted(after)
        if all(_sees_the_same(written, template, tokenizer, messages) for messages in examples):
            return written
    return None


def _framing(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the tokenizer puts before and after a text."""
    framed = tokenizer("x", return_special_tokens_mask=True)
    tokens = tokenizer.convert_ids_to_tokens(framed["input_ids"])
    added = framed["special_tokens_mask"]
    before = added.index(0)
    after = len(added) - added[::-1].index(0)
    return "".join(tokens[:before]), "".join(tokens[after:])


def _quoted(text: str) -> str:
    """Text as it is, whatever it looks like to jinja."""
    return "{{ " + repr(text) + " }}" if text else ""


def _sees_the_same(
    chat_template: str, template: str, tokenizer: PreTrainedTokenizerBase, messages: Messages
) -> bool:
    """Whether a consumer of the chat template sees the ids that the guard was trained on."""
    (trained,) = encode(tokenizer, [render(template, messages, tokenizer)])
    text = tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"] == trained
