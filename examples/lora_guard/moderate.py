"""Chat with a model whose LoRA guard judges the prompt, the reply while it is written, and both
together.

# the paper's command: the run's config.json and its adapter
python moderate.py output/quickstart/config.json output/quickstart/best --device-id 0

# the adapter alone; the reply is stopped as soon as the guard is sure enough
python moderate.py output/quickstart/best --prompt "How do I cook rice?" "Why lie?" --stop-at 0.9

# prompts from a file (rows {"prompt": …} or {"messages": […]}), everything into a file
python moderate.py output/quickstart/best --prompts prompts.jsonl --output replies.jsonl

Without --prompt and --prompts it asks on the terminal. An adaptor of the paper's own code (`.pt`)
is made a folder by convert.py.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from riding import GuardedChat, GuardedReply

from common import report
from common.conversation import Message, UserError, check_text, pair
from common.data import conversation_row, plain_columns, read_json, read_rows
from common.run import expand_home, json_lines, run_cli, write_text

logger = logging.getLogger("lora_guard")
Asked = tuple[str, list[Message]]  # where a conversation comes from, and the conversation


# --- arguments ------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def model_parser(description: str, paths: str) -> Parser:
    """The flags that moderate.py and demo.py share; `paths` is argparse's nargs."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=kind, allow_abbrev=False)
    add = parser.add_argument
    about = 'config.json of the run ("-": none), adapter folder'
    add(
        "paths",
        nargs=paths,
        type=expand_home,
        metavar="[config] adapter",
        help=about,
    )
    add("--device-id", type=int, help="number of the accelerator; -1: CPU; default: what is there")
    add("--trust-remote-code", action="store_true", help="run code that comes with the models")
    add(
        "--max-new-tokens", type=count, default=200, help="of a reply (%(default)s; the paper: 200)"
    )
    add("--guard-every", type=count, default=16, help="judge at every so many tokens (%(default)s)")
    add("--stop-at", type=probability, help="stop a reply whose unsafe probability is above this")
    about = "unsafe above this; default: guard.json's, else 0.5"
    add("--threshold", type=probability, help=about)
    return parser


def parse() -> argparse.Namespace:
    parser = model_parser(__doc__, "+")
    add = parser.add_argument
    add("--prompt", nargs="+", metavar="TEXT", help="prompts")
    add("--prompts", type=expand_home, metavar="FILE", help="rows with prompt or messages")
    about = "withhold an unsafe reply, or say so"
    add(
        "--on-unsafe",
        choices=("block", "flag"),
        default="block",
        help=about,
    )
    add("--batch-size", type=count, default=8, help="prompts that are answered together (8)")
    about = "JSON lines with all that is printed"
    add("--output", type=expand_home, metavar="FILE", help=about)
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.prompt and args.prompts:
        raise UserError("--prompt, --prompts: give one of them")
    return args


# --- the run --------------------------------------------------------------------------------------


def main() -> None:
    args = parse()
    prompts = read_prompts(args)  # before the model: a bad file should say so at once
    chat, threshold = load(args)
    rows: list[dict[str, Any]] = []
    batches = typed_prompts() if prompts is None else chunks(prompts, args.batch_size)
    for batch in batches:
        replies = chat.reply(
            [messages for _, messages in batch],
            max_new_tokens=args.max_new_tokens,
            guard_every=args.guard_every,
            stop_at=args.stop_at,
            temperature=args.temperature,
            seed=args.seed + len(rows),
        )
        for asked, reply in zip(batch, replies, strict=True):
            rows.append(verdict(chat, asked, reply, threshold, args.on_unsafe))
            print(shown(rows[-1], chat, threshold), flush=True)
        if args.output:
            write_text(args.output, json_lines(rows))  # whole batches, whenever it is killed


def load(args: argparse.Namespace) -> tuple[GuardedChat, float]:
    """The chat model with its adapter, and the threshold above which it calls a text unsafe."""
    *before, adapter = args.paths
    if len(before) > 1:
        raise UserError(f"{adapter}: expected [config] adapter and flags")
    if Path(adapter).is_file():
        command = f"python convert.py {' '.join(args.paths)} NEW_FOLDER"
        raise UserError(f"{adapter}: expected an adapter folder; for a .pt run `{command}` first")
    config = {}
    if before and before != ["-"]:
        config = read_json(before[0])
    if not isinstance(config, dict):
        raise UserError(f"{before[0]}: expected an object, found {config!r:.60}")
    chat = GuardedChat(
        adapter,
        base_model=config.get("hf_model_id") or config.get("base_model"),
        device=named_device(args.device_id),
        trust_remote_code=args.trust_remote_code,
    )
    fitted = chat.card.thresholds.get("flagged")
    if args.threshold is not None:
        return chat, args.threshold
    return chat, 0.5 if fitted is None else fitted.value


def named_device(number: int | None) -> str | None:
    """What `--device-id` means, for torch; None leaves the choice."""
    if number is None:
        return None
    if number == -1:
        return "cpu"
    there = 0
    if torch.accelerator.is_available():
        there = torch.accelerator.device_count()
    if not 0 <= number < there:
        raise UserError(f"--device-id {number}: there are {there} accelerators; -1 is the CPU")
    return f"{torch.accelerator.current_accelerator().type}:{number}"


def read_prompts(args: argparse.Namespace) -> list[Asked] | None:
    """The conversations to reply to; None asks on the terminal."""
    asked: list[Asked] = []
    if args.prompt:
        for number, text in enumerate(args.prompt, start=1):
            asked.append((f"--prompt {number}", pair(check_text(text, "prompt", "--prompt"))))
    elif args.prompts:
        for where, row in read_rows(args.prompts, suffix=".jsonl"):
            asked.append((where, messages_of(row, where)))
        if not asked:
            raise UserError(f"--prompts {args.prompts}: holds no rows")
    else:
        return None
    return asked


def chunks(asked: Sequence[Asked], size: int) -> Iterator[Sequence[Asked]]:
    """As many at a time as are replied to in one batch."""
    for start in range(0, len(asked), size):
        yield asked[start : start + size]


def messages_of(row: Any, where: str) -> list[Message]:
    """The conversation of a row; an answer that stands beside a prompt is not replied to."""
    if isinstance(row, dict):
        row = plain_columns(row, where)
        name = "prompt" if row.get("messages") is None else "messages"
        row = {name: row.get(name)}
    messages = conversation_row(row, where)["messages"]
    if messages[-1]["role"] != "user":
        said = "ends with an answer; there is nothing to reply to"
        raise UserError(f"{where}, field messages: {said}")
    return messages


def typed_prompts() -> Iterator[list[Asked]]:
    """What is typed or piped, one prompt a line, until the end or an empty line."""
    sys.stdin.reconfigure(encoding="utf-8-sig")  # a piped file may begin with a byte order mark
    while True:
        if sys.stdin.isatty():
            print("prompt (empty to leave): ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield [("input", pair(check_text(line, "prompt", "input")))]


# --- what is written ------------------------------------------------------------------------------


def verdict(
    chat: GuardedChat, asked: Asked, reply: GuardedReply, threshold: float, on_unsafe: str
) -> dict[str, Any]:
    """A row of the output file.

    Unsafe: any score above the threshold, or the guard stopped the reply, or there is none.
    """
    where, messages = asked
    alone = None
    if "response" in chat.inputs and reply.text.strip():
        ((alone, _),) = chat.judge_texts([pair(None, reply.text)])
    scores = {
        "prompt_unsafe": reply.prompt_unsafe,
        "response_unsafe": alone,
        "pair_unsafe": reply.response_unsafe,
    }
    above = [score for score in scores.values() if score is not None and score > threshold]
    unsafe = bool(above) or reply.finish_reason in ("stopped", "error")
    blocked = unsafe and on_unsafe == "block"
    row = {
        "messages": messages,
        "reply": None if blocked else reply.text,
        **scores,
        "categories": reply.categories,
        "trace": reply.trace,
        "tokens": len(reply.token_ids),
        "stopped_after": reply.stopped_after,
        "finish_reason": reply.finish_reason,
        "unsafe": unsafe,
        "blocked": blocked,
    }
    if reply.error:
        row["error"] = f"{where}: {reply.error}"
        logger.warning("%s", row["error"])
    return row


def shown(
    row: dict[str, Any],
    chat: GuardedChat,
    threshold: float,
) -> str:
    """A row as text."""
    lines = [f"prompt: {row['messages'][-1]['content']}"]
    if "error" in row:
        return "\n".join([*lines, f"error: {row['error']}", ""])
    lines.append("reply: " + ("[withheld: unsafe]" if row["blocked"] else row["reply"]))
    for name in ("prompt", "response", "pair"):
        score = row[f"{name}_unsafe"]
        said = "nothing to judge"
        if name not in chat.inputs:
            said = "not trained"
        if score is not None:
            said = f"{score:.3f}"
        lines.append(f"{name} unsafe: {said}")
    categories = row["categories"]
    top = sorted(
        categories,
        key=categories.get,
        reverse=True,
    )[:3]
    named = [f"{name} {categories[name]:.3f}" for name in top]
    if named:
        lines.append("top categories: " + ", ".join(named))
    if row["stopped_after"] is not None:
        lines.append(f"stopped after: {row['stopped_after']} tokens")
    blocked = "yes" if row["blocked"] else "no"
    unsafe = " (unsafe)" if row["unsafe"] else ""
    lines.append(f"blocked: {blocked}{unsafe}, above {report.threshold(threshold)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_cli(main)
