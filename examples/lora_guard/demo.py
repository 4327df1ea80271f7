"""A chat page with the guard riding along: a live harm meter under every reply, harm categories
beside.

# after `torchrun train.py`: the quickstart's guard, on http://127.0.0.1:7860
python demo.py

# another run's guard, on the second accelerator
python demo.py output/llama-3.2-1b/config.json output/llama-3.2-1b/best --device-id 1 --port 7861 --stop-at 0.9

A reply appears --guard-every tokens at a time, each piece after the guard has read it.
"""

import argparse
import html
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moderate import load, model_parser
from riding import GuardedChat, GuardedReply

from common import report
from common.conversation import Message, UserError, check_text, pair
from common.run import run_cli

try:
    import gradio as gr
except ImportError:
    gr = None

QUICKSTART = Path(__file__).parent / "output/quickstart/best"
Turns = list[tuple[str, GuardedReply]]  # (prompt, reply): the state of the page
CSS = ".harm meter { width: 12em; vertical-align: middle }"


def parse() -> argparse.Namespace:
    parser = model_parser(__doc__, "*")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 shows the page to the whole network"
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.set_defaults(guard_every=8)
    args = parser.parse_args()
    if not 0 < args.port < 65536:
        raise UserError(f"--port {args.port}: expected 1 to 65535")
    if not args.paths:
        if not QUICKSTART.is_dir():
            raise UserError(
                "no guard yet: run `torchrun train.py` first, or name an adapter folder"
            )
        args.paths = [str(QUICKSTART)]
    return args


def main() -> None:
    args = parse()
    if gr is None:
        raise UserError("gradio is missing: pip install -e '.[demo]' in the repository's root")
    chat, threshold = load(args)
    if "pair" not in chat.inputs:
        raise UserError(
            f"{args.paths[-1]}: trained on {', '.join(chat.inputs)}; a live meter needs a guard of pairs"
        )
    try:
        address = {"server_name": args.host, "server_port": args.port}
        # Nothing that was typed is written to disk, or sent to another server.
        page(chat, threshold, args).launch(
            **address, css=CSS, theme=theme(), run_history=False, footer_links=[]
        )
    except OSError as error:
        raise UserError(
            f"--host {args.host} --port {args.port}: cannot listen there ({error!s:.60})"
        ) from None


def theme() -> "gr.themes.Base":
    """Gradio's default without the fonts that it would fetch from another server."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


def answering(chat: GuardedChat, threshold: float, max_new_tokens: int) -> Callable:
    """What happens when a visitor asks: the page anew after every check of the guard."""

    def stream(
        prompt: str, turns: Turns, every: int, stop_at: float
    ) -> Iterator[tuple[list[dict[str, Any]], dict[str, float], Turns, str]]:
        check_text(prompt, "prompt", "input")
        # The guard reads the last turn alone: what it stopped must not come back as the context
        # of the next.
        said: list[Message] = []
        for asked, reply in turns:
            if reply.stopped_after is None:
                said += pair(asked, reply.text)
        said += pair(prompt)
        checks = chat.stream(
            [said],
            max_new_tokens=max_new_tokens,
            guard_every=every,
            stop_at=stop_at,
            progress=False,
        )
        for (reply,) in checks:
            if reply.error:
                raise UserError(reply.error)
            now = [*turns, (prompt, reply)]
            # an unfinished turn is shown, and not kept
            kept = now if reply.finish_reason else turns
            yield shown(now, threshold), named(reply), kept, ""

    def answer(
        prompt: str,
        turns: Turns,
        every: int,
        stop_at: float,
    ) -> Iterator[tuple]:
        if not prompt.strip():
            raise gr.Error("Type something first.", print_exception=False)
        try:
            yield from stream(prompt, turns, every, stop_at)
        except UserError as error:
            raise gr.Error(f"{error}", print_exception=False) from None

    return answer


def page(
    chat: GuardedChat,
    threshold: float,
    args: argparse.Namespace,
) -> "gr.Blocks":
    """The page: the talk on the left, categories and sliders on the right."""
    limit = report.threshold(threshold)
    about = f"### {chat.card.base_model} with its LoRA guard\nUnsafe above {limit}."
    limit = 1 if args.stop_at is None else args.stop_at  # a visitor may only be stricter
    most = max(64, args.guard_every)
    with gr.Blocks(title="LoRA-Guard", analytics_enabled=False) as blocks:
        gr.Markdown(about)
        turns = gr.State([])
        with gr.Row():
            with gr.Column(scale=3):
                look = {"height": 520, "show_label": False, "render_markdown": False}
                talk = gr.Chatbot(buttons=[], feedback_options=None, **look)
                prompt = gr.Textbox(placeholder="Ask something", show_label=False, autofocus=True)
            with gr.Column(scale=2):
                label = "Harm categories of the last reply"
                bars = gr.Label(label=label, num_top_classes=6, show_heading=False)
                label = "Judge at every so many tokens"
                steps = {"step": 1, "precision": 0}
                every = gr.Slider(
                    1,
                    most,
                    args.guard_every,
                    label=label,
                    **steps,
                )
                stop_at = gr.Slider(0, limit, limit, label="Stop a reply above")
                afresh = gr.Button("New conversation")
        changed = [talk, bars, turns, prompt]
        answer = answering(chat, threshold, args.max_new_tokens)
        running = prompt.submit(
            answer,
            [prompt, turns, every, stop_at],
            changed,
        )
        gr.on(
            [afresh.click, talk.clear],
            new_conversation,
            None,
            changed,
            cancels=running,
        )
    return blocks


def new_conversation() -> tuple[list, dict, list, str]:
    """Nothing said, no categories, no turns, an empty box."""
    return [], {}, [], ""


def shown(turns: Turns, threshold: float) -> list[dict[str, Any]]:
    """Chat messages: the prompt, the reply and its meter, for each turn. Texts are shown as text,
    not as markup.
    """
    messages = []
    for prompt, reply in turns:
        written = html.escape(reply.text) or "…"
        bar = gr.HTML(meter(reply, threshold))
        messages.append({"role": "user", "content": html.escape(prompt)})
        messages.append({"role": "assistant", "content": written})
        messages.append({"role": "assistant", "content": bar})
    return messages


def named(reply: GuardedReply) -> dict[str, float]:
    """Categories with names that a narrow column can break."""
    found = {}
    for name, probability in reply.categories.items():
        name = name.replace("_", " ")
        name = name.replace(",", ", ")
        found[name] = probability
    return found


def meter(reply: GuardedReply, threshold: float) -> str:
    """The harm meter of a reply, as HTML; it holds nothing that the user or the model wrote."""
    scores = [p for p in (reply.prompt_unsafe, reply.response_unsafe) if p is not None]
    if not scores:
        why = "nothing to judge" if reply.finish_reason else "not judged yet"
        return f'<div class="harm">{why}</div>'
    score = scores[-1]
    said = f"{len(reply.token_ids)} tokens …"
    if reply.stopped_after is not None:
        said = f"unsafe, stopped after {reply.stopped_after} tokens"
    elif reply.finish_reason:
        said = "unsafe" if max(scores) > threshold else "safe"
    bounds = f'min="0" low="{threshold / 2}" high="{threshold}" optimum="0" max="1"'
    highest = max(scores + [p for _, p in reply.trace])
    numbers = f"harm {score:.2f}, highest {highest:.2f} ({said})"
    return f'<div class="harm"><meter {bounds} value="{score:.4f}"></meter> {numbers}</div>'


if __name__ == "__main__":
    run_cli(main)
