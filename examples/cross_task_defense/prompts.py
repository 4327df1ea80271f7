"""The five tasks' wording, rows of instruction files, and the one prompt builder of training and
generation.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common import data
from common.conversation import UserError, pair
from common.templates import Part, encode, render_chat, token_offsets

# The document comes first and the instruction follows it; wording and white space as in the paper's
# evaluation files.
TASKS = {
    "summarize": "Summarize the above article briefly in 3 sentences.",
    "translate": "Translate the above article from English to Chinese: ",
    "sentiment": "\nHow would you describe the sentiment of this document?",
    "case": "\nWrite the above sentence using proper case.",
    "cloze": "\n\nWrite the next sentence.",
}
# in the paper's malicious files alone
SLIP = "Summarize the above article briefly in 3 sentence."
# A first line such as "Sure, here's a guide to …:", which opens 88 of the paper's 100 malicious
# documents.
OPENER = re.compile(
    r"\s*(?:(?:sure|certainly|absolutely|of course|here)\b[^\n]{0,200}[:!.]\s*\n)?\s*",
    re.IGNORECASE,
)
CONFIGS = Path(__file__).parent / "configs"
HOLE = re.compile(r"\{(instruction|input)\}")  # of a template


def without_cues(document: str) -> str:
    """The document without what tells malicious files from others at a glance: leading white space,
    its opener.
    """
    return document[OPENER.match(document).end() :] or document.strip()


def task_instruction(task: str, document: str, slip: bool = False) -> str:
    """Document and task as one instruction; `slip` takes the wording of the paper's malicious
    files.
    """
    return document + (SLIP if slip and task == "summarize" else TASKS[task])


def split_document(instruction: str) -> tuple[str, str]:
    """(document, task instruction) of such an instruction; ("", instruction) where it ends with no
    known task.
    """
    for wording in (SLIP, *TASKS.values()):
        stripped = wording.rstrip()
        if instruction.endswith((wording, stripped)):
            at = instruction.rindex(stripped)
            return instruction[:at], instruction[at:]
    return "", instruction


def load_template(name_or_path: str) -> dict[str, str] | None:
    """A template in the paper's JSON format: a name in configs/, or a path; None for "chat", the
    tokenizer's own. What is written as a path is never looked for elsewhere.

    Raises:
        UserError: no such template, or it lacks prompt_input or prompt_no_input.
    """
    if name_or_path == "chat":
        return None
    path = Path(name_or_path)
    if not path.is_file() and path.parent in (Path(), Path("configs")):  # a name
        path = CONFIGS / f"{path.name.removesuffix('.json')}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.json")))
        raise UserError(f"template {name_or_path!r}: no such file, and none of {known}, chat")
    template = data.read_json(path)
    try:
        with_input = HOLE.findall(template["prompt_input"])
        without = HOLE.findall(template["prompt_no_input"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no template with prompt_input and prompt_no_input ({error!r:.100})"
        ) from None
    if set(with_input) != {"instruction", "input"} or set(without) != {"instruction"}:
        raise UserError(
            f"{path}: expected {{instruction}} and {{input}} in prompt_input, "
            "{instruction} in the other"
        )
    return template


def prompt_parts(
    template: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    given: str | None,
) -> list[Part]:
    """The prompt of a row in pieces. `given` is the row's `input`; the chat template gets it behind
    the instruction.
    """
    if template is None:
        text = f"{instruction}\n\n{given}" if given else instruction
        return render_chat(tokenizer, pair(text))
    content = {"instruction": instruction, "input": given}
    name = "prompt_input" if given else "prompt_no_input"
    parts = []
    for i, piece in enumerate(HOLE.split(template[name])):
        is_content = i % 2 == 1  # between two pieces of the template
        if piece:
            text = content[piece] if is_content else piece
            parts.append(Part(text, is_content))
    return parts


def encode_prompts(
    template: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, str | None]],
) -> list[list[int]]:
    """Token ids of the prompts of (instruction, input) rows; text never becomes a control token."""
    if template is None and not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: has no chat template; choose alpaca or llama2")
    parts = [prompt_parts(template, tokenizer, *row) for row in rows]
    return encode(tokenizer, parts, add_special_tokens=template is not None)


def read_rows(spec: str | Path) -> list[dict[str, Any]]:
    """Rows {"instruction", "input", "output", …} in Alpaca's format; some outputs may be empty.

    Args:
        spec: a file of any type that `common.data` reads, or a hub id; its split is train unless
            the id names another (user/name:split).

    Raises:
        UserError: names file, row and field.
    """
    spec = str(spec)
    parsed = data.parse_spec(spec)
    if not parsed.is_file and not parsed.split:
        spec = f"{spec}:train"
    _, found = data.spec_rows(spec)
    rows = []
    for where, row in found:
        if isinstance(row, UserError):
            raise row
        check_row(row, where)
        rows.append(row)
    return rows


def answered(rows: list[dict[str, Any]], spec: str | Path) -> list[dict[str, Any]]:
    """The rows that have an output; Alpaca has some without."""
    found = [row for row in rows if row["output"].strip()]
    if not found:
        raise UserError(f"{spec}: no rows with instruction and output")
    return found


def check_row(row: Any, where: str) -> None:
    """Raise UserError for a row that is none of Alpaca's; its output may be empty."""
    fields = row if isinstance(row, dict) else {}
    for name in ("instruction", "output", "input"):
        value = fields.get(name)
        if name == "input" and value is None:
            continue
        is_text = isinstance(value, str)
        if not is_text or (name == "instruction" and not value.strip()):
            raise UserError(f"{where}, field {name}: expected text, found {value!r:.60}")


# --- Training rows ------------------------------------------------------------------------------


def encode_rows(
    rows: Sequence[Mapping[str, Any]],
    template: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    train_on_inputs: bool,
    add_eos_token: bool,
) -> tuple[Dataset, dict[str, int]]:
    """`input_ids` and `labels` (-100 where no loss is taken) of each row, and what was done to long
    ones.

    The answer is tokenized by itself, as it is generated: after the prompt's last token.
    """
    plain = [(row["instruction"], row.get("input")) for row in rows]
    prompts = encode_prompts(template, tokenizer, plain)
    parts = [[Part(row["output"], True)] for row in rows]
    answers = encode(tokenizer, parts, add_special_tokens=False)
    facts = {
        "rows": len(rows),
        "documents_shortened": 0,
        "answers_cut": 0,
        "tokens": 0,
        "answer_tokens": 0,
    }
    encoded = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if add_eos_token:
            answer = [*answer, tokenizer.eos_token_id]
        if len(prompt) + len(answer) > cutoff_len:
            shorter = shortened(plain[i], template, tokenizer, cutoff_len - len(answer))
            if shorter is not None:
                facts["documents_shortened"] += 1
                prompt = shorter
            else:
                facts["answers_cut"] += 1
                instruction, _ = plain[i]
                room = room_of_answer(instruction, len(prompt), len(answer), cutoff_len, i + 1)
                answer = answer[:room]
        facts["tokens"] += len(prompt) + len(answer)
        facts["answer_tokens"] += len(answer)
        before = prompt if train_on_inputs else [-100] * len(prompt)
        encoded.append({"input_ids": prompt + answer, "labels": before + answer})
    return Dataset.from_list(encoded), facts


def room_of_answer(instruction: str, prompt: int, answer: int, cutoff_len: int, row: int) -> int:
    """Tokens that are left for the answer of an ordinary row, which ends early.

    Raises:
        UserError: there are none, or the answer may be a refusal.
    """
    if split_document(instruction)[0]:
        raise UserError(
            f"--cutoff_len {cutoff_len}: row {row} has an answer of {answer} tokens, "
            "a refusal maybe"
        )
    if prompt >= cutoff_len:
        raise UserError(
            f"--cutoff_len {cutoff_len}: row {row} has an instruction of {prompt} tokens"
        )
    return cutoff_len - prompt


def shortened(
    row: tuple[str, str | None],
    template: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
) -> list[int] | None:
    """Prompt ids of at most `room` tokens, the document cut at its end; None if there is no
    document to cut.

    The document is the row's input, or what is before the task's wording in the instruction.
    """
    instruction, given = row
    document = given
    if not given:
        document, task = split_document(instruction)
    spans = token_offsets(tokenizer, document)
    keep = len(spans)
    while keep > 0:
        _, end = spans[keep - 1]
        text = document[:end]
        cut = (instruction, text) if given else (text + task, None)
        (ids,) = encode_prompts(template, tokenizer, [cut])
        if len(ids) <= room:
            return ids
        keep -= max(1, len(ids) - room)
    return None
