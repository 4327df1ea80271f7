"""Chat with a model whose LoRA guard judges the prompt, the reply while it is written, and both
together.

# the paper's command: the run's config.json and its adapter (a folder, or a .pt of the paper's own
code)
python moderate.py output/quickstart/config.json output/quickstart/best --device-id 0

# the adapter folder alone; prompts on the command line; the reply is stopped as soon as the guard
is sure enough
python moderate.py output/quickstart/best --prompt "How do I cook rice?" "Why do people lie?" --stop-at 0.9

# prompts from a file (rows {"prompt": …} or {"messages": […]}), everything into a file
python moderate.py output/quickstart/best --prompts prompts.jsonl --output replies.jsonl

Without --prompt and --prompts it asks on the terminal.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from adapter import convert_reference
from riding import GuardedChat, GuardedReply

from common.conversation import Message, UserError, check_text, pair
from common.data import conversation_row, plain_columns, read_json, read_rows
from common.run import expand_home, json_lines, run_cli, write_text

logger = logging.getLogger("lora_guard")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def home_path(text: str) -> Path:
    return Path(expand_home(text))


def model_parser(description: str, paths: str) -> Parser:
    """What moderate.py and demo.py ask alike; `paths` is argparse's nargs."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    about = 'config.json of the run ("-": none), adapter'
    parser.add_argument(
        "paths", nargs=paths, type=expand_home, metavar="[config] adapter", help=about
    )
    parser.add_argument(
        "--device-id", type=int, help="number of the accelerator; -1: CPU; default: what there is"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the models"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, help="of a reply (%(default)s; the paper: 200)"
    )
    parser.add_argument(
        "--guard-every", type=int, default=16, help="judge at every so many tokens (%(default)s)"
    )
    parser.add_argument(
        "--stop-at", type=float, help="stop a reply whose unsafe probability is above this"
    )
    parser.add_argument(
        "--threshold", type=float, help="unsafe above this; default: guard.json's, else 0.5"
    )
    return parser


def parse() -> argparse.Namespace:
    parser = model_parser(__doc__, "+")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="prompts")
    parser.add_argument(
        "--prompts", type=home_path, metavar="FILE", help="rows with prompt or messages"
    )
    parser.add_argument(
        "--on-unsafe",
        choices=("block", "flag"),
        default="block",
        help="withhold an unsafe reply, or say so",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="prompts that are answered together (8)"
    )
    parser.add_argument(
        "--output", type=home_path, metavar="FILE", help="JSON lines with all that is printed"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.prompt and args.prompts:
        raise UserError("--prompt, --prompts: give one of them")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be 1 or more")
    return args


def main() -> None:
    args = parse()
    conversations = read_prompts(args)  # before the model: a bad file should say so at once
    chat, threshold = load(args)
    rows: list[dict[str, Any]] = []
    batches = [
        conversations[i : i + args.batch_size]
        for i in range(0, len(conversations or []), args.batch_size)
    ]
    for batch in batches if conversations is not None else asked():
        replies = chat.reply(
            batch,
            max_new_tokens=args.max_new_tokens,
            guard_every=args.guard_every,
            stop_at=args.stop_at,
            temperature=args.temperature,
            seed=args.seed + len(rows),
        )
        for messages, reply, alone in zip(batch, replies, alone_scores(chat, replies), strict=True):
            rows.append(verdict(messages, reply, alone, threshold, args.on_unsafe))
            print(shown(rows[-1], chat, threshold), flush=True)
        if args.output:
            write_text(args.output, json_lines(rows))  # whole batches, whenever it is killed


def load(args: argparse.Namespace) -> tuple[GuardedChat, float]:
    """The chat model with its adapter, and the threshold; a `.pt` of the paper's code is converted
    on the way.
    """
    if len(args.paths) > 2:
        raise UserError(f"{args.paths[2]}: expected [config] adapter and flags")
    if min(args.max_new_tokens, args.guard_every) < 1 or not 0 <= (args.stop_at or 0) <= 1:
        raise UserError(
            "expected --max-new-tokens and --guard-every of 1 or more, --stop-at from 0 to 1"
        )
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: must be from 0 to 1")
    adapter, config = Path(args.paths[-1]), {}
    if len(args.paths) == 2 and args.paths[0] != "-":
        config = read_json(args.paths[0])
        if not isinstance(config, dict):
            raise UserError(f"{args.paths[0]}: expected an object, found {config!r:.60}")
    base, device = config.get("hf_model_id") or config.get("base_model"), None
    if args.device_id is not None:
        count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        if not -1 <= args.device_id < count:
            raise UserError(
                f"--device-id {args.device_id}: there are {count} accelerators; -1 is the CPU"
            )
        kind = torch.accelerator.current_accelerator().type if count else "cpu"
        device = "cpu" if args.device_id == -1 else f"{kind}:{args.device_id}"
    options = {"base_model": base, "device": device, "trust_remote_code": args.trust_remote_code}
    if adapter.suffix != ".pt":
        if adapter.is_file():
            raise UserError(f"{adapter}: expected an adapter folder, or a .pt of the paper's code")
        chat = GuardedChat(adapter, **options)
    elif not adapter.is_file():
        raise UserError(f"{adapter}: no such file")
    elif not config:
        raise UserError(f"{adapter}: a .pt needs the config.json of its run before it")
    else:
        with tempfile.TemporaryDirectory() as folder:
            convert_reference(adapter, config, Path(folder), args.trust_remote_code)
            chat = GuardedChat(folder, **options)
    if args.threshold is not None:
        return chat, args.threshold
    fitted = chat.card.thresholds.get("flagged")
    return chat, 0.5 if fitted is None else fitted.value


def read_prompts(args: argparse.Namespace) -> list[list[Message]] | None:
    """Conversations to reply to; None asks on the terminal."""
    if args.prompt:
        return [pair(check_text(text, "prompt", "--prompt")) for text in args.prompt]
    if not args.prompts:
        return None
    conversations = []
    for where, row in read_rows(args.prompts, suffix=".jsonl"):
        if isinstance(row, dict):
            row = plain_columns(row, where)
            name = "prompt" if row.get("messages") is None else "messages"
            row = {name: row.get(name)}  # an answer that stands beside a prompt is not replied to
        messages = conversation_row(row, where)["messages"]
        if messages[-1]["role"] != "user":
            raise UserError(
                f"{where}, field messages: ends with an answer; there is nothing to reply to"
            )
        conversations.append(messages)
    if not conversations:
        raise UserError(f"--prompts {args.prompts}: holds no rows")
    return conversations


def asked() -> Iterator[list[list[Message]]]:
    """What is typed, one prompt a line, until the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("prompt (empty to leave): ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield [pair(check_text(line.strip(), "prompt", "input"))]


def alone_scores(chat: GuardedChat, replies: list[GuardedReply]) -> list[float | None]:
    """Unsafe probabilities of the replies without their prompts, where the guard was trained on
    such.
    """
    written = [
        i for i, reply in enumerate(replies) if reply.text.strip() and "response" in chat.inputs
    ]
    scores: list[float | None] = [None] * len(replies)
    for i, (unsafe, _) in zip(
        written, chat.judge_texts([pair(None, replies[i].text) for i in written]), strict=True
    ):
        scores[i] = unsafe
    return scores


def verdict(
    messages: list[Message],
    reply: GuardedReply,
    alone: float | None,
    threshold: float,
    on_unsafe: str,
) -> dict[str, Any]:
    """A row of the output file. Unsafe: any score above the threshold, or the guard stopped the
    reply.
    """
    scores = {
        "prompt_unsafe": reply.prompt_unsafe,
        "response_unsafe": alone,
        "pair_unsafe": reply.response_unsafe,
    }
    unsafe = reply.stopped_after is not None or any(
        p is not None and p > threshold for p in scores.values()
    )
    blocked = unsafe and on_unsafe == "block"
    return {
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


def shown(row: dict[str, Any], chat: GuardedChat, threshold: float) -> str:
    """A row as text."""
    lines = [f"prompt: {row['messages'][-1]['content']}"]
    lines.append("reply: " + ("[withheld: unsafe]" if row["blocked"] else row["reply"]))
    for name in ("prompt", "response", "pair"):
        value = row[f"{name}_unsafe"]
        text = (
            "not trained"
            if name not in chat.inputs
            else "nothing to judge"
            if value is None
            else f"{value:.3f}"
        )
        lines.append(f"{name} unsafe: {text}")
    top = sorted(row["categories"].items(), key=lambda item: -item[1])[:3]
    lines.append("top categories: " + ", ".join(f"{name} {p:.3f}" for name, p in top))
    if row["stopped_after"] is not None:
        lines.append(f"stopped after: {row['stopped_after']} tokens")
    lines.append(
        f"blocked: {'yes' if row['blocked'] else 'no'}"
        + " (unsafe)" * row["unsafe"]
        + f", above {threshold:.3f}"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_cli(main)
