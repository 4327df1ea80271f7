"""examples/lora_guard/moderate.py on tiny guards: as a command, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import read_json, read_rows, user_error, write_rows
from scripts import launch, module

from common.conversation import pair

GuardedChat = module("lora_guard", "riding").GuardedChat
moderate = module("lora_guard", "moderate")
PROMPTS = [
    "How do I cook rice?",
    "Why do people tell lies? Often they are afraid of the neighbour.",
    "Paris!",
]
CONVERSATIONS = [pair(prompt) for prompt in PROMPTS]


def command(*argv: str | Path, stdin: str = "") -> subprocess.CompletedProcess:
    """moderate.py in its folder, on the CPU."""
    words = ["moderate.py", *argv, "--device-id", "-1", "--max-new-tokens", "12"]
    return launch("lora_guard", *words, threads=1, typed=stdin, check=False)


def succeeded(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_folder_and_prompts(make_guard):
    guard = make_guard(inputs=["pair", "prompt"])
    flags = ["--threshold", "1", "--guard-every", "4"]
    said = succeeded(command(guard, "--prompt", *PROMPTS[:2], *flags))
    chat = GuardedChat(guard, device="cpu")
    options = {"max_new_tokens": 12, "guard_every": 4, "progress": False}
    for prompt, reply in zip(PROMPTS, chat.reply(CONVERSATIONS[:2], **options), strict=False):
        assert f"prompt: {prompt}\nreply: {reply.text}\n" in said
        assert f"prompt unsafe: {reply.prompt_unsafe:.3f}\nresponse unsafe: not trained\n" in said
        assert f"pair unsafe: {reply.response_unsafe:.3f}\n" in said
    assert said.count("top categories: ") == 2
    assert said.count("blocked: no") == 2


@pytest.mark.slow
def test_a_file_of_prompts_and_an_output_file(guard, tmp_path):
    system = {"role": "system", "content": "Be kind."}
    rows = [{"prompt": PROMPTS[0]}, {"messages": [system, *CONVERSATIONS[1]]}]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    out = tmp_path / "out.jsonl"
    flags = ["--prompts", prompts, "--output", out, "--stop-at", "0", "--batch-size", "1"]
    said = succeeded(command("-", guard, *flags))
    written = read_rows(out)
    assert [row["messages"][-1]["content"] for row in written] == PROMPTS[:2]
    for row in written:
        assert row["blocked"]
        assert row["reply"] is None
        assert row["stopped_after"] == 0
    assert said.count("reply: [withheld: unsafe]") == 2
    assert said.count("stopped after: 0 tokens") == 2


@pytest.mark.slow
def test_a_file_of_the_papers_is_refused_and_prompts_are_typed(make_guard, tmp_path):
    guard = make_guard(inputs=["pair"])
    config, adaptor = tmp_path / "config.json", tmp_path / "adaptor.pt"
    base = read_json(guard / "guard.json")["base_model"]
    config.write_text(json.dumps({"hf_model_id": base, "lora_r": 4, "lora_alpha": 8}))
    torch.save({}, adaptor)
    refused = command(config, adaptor)
    assert f"`python convert.py {config} {adaptor} NEW_FOLDER`" in refused.stderr
    said = succeeded(command(config, guard, "--on-unsafe", "flag", stdin=f"\ufeff{PROMPTS[0]}\n"))
    assert said.count("blocked: no") == 1
    assert said.count("prompt unsafe: not trained") == 1
    assert f"prompt: {PROMPTS[0]}\n" in said  # without the byte order mark


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: .*adapter; --help lists the flags"),
        (["{guard}", "--prompt", " "], "--prompt, field prompt: empty text"),
        (["{guard}", "--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["{guard}", "--prompts", "{bad}"], "bad.jsonl, line 2, column .*malformed JSON"),
        (["nowhere.json", "{guard}", "--prompt", "Hi"], "nowhere.json: no such file"),
        (["a", "b", "c", "--prompt", "Hi"], "c: expected .config. adapter"),
        (["{guard}", "--device-id", "99", "--prompt", "Hi"], "--device-id 99: there are"),
        (["{guard}", "--on-unsafe", "shrug", "--prompt", "Hi"], "invalid choice: 'shrug'"),
        (["{guard}", "--threshold", "2", "--prompt", "Hi"], "--threshold: must be from 0 to 1"),
        (["{guard}", "--guard-every", "0"], "--guard-every: must be 1 or more"),
        (["nowhere.pt", "--prompt", "Hi"], "nowhere.pt/guard.json: no guard of a recipe"),
    ],
)
def test_moderate_refuses_in_one_line(guard, tmp_path, monkeypatch, argv, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Hi"}\n{"prompt"\n')
    words = [word.format(guard=guard, bad=bad) for word in argv]
    monkeypatch.setattr(sys, "argv", ["moderate.py", *words])
    with user_error(message):
        moderate.main()


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_an_over_long_prompt_is_one_rows_error(guard, tmp_path, monkeypatch, capsys, ending):
    """It is named, the other rows are judged and written; the file begins with a byte order mark."""
    prompts = [PROMPTS[0], "word " * 4000, PROMPTS[2]]
    lines = [json.dumps({"prompt": text}) for text in prompts]
    if ending == "csv":
        lines = ["prompt", *(f'"{text}"' for text in prompts)]
    path = tmp_path / f"prompts.{ending}"
    out = tmp_path / "out.jsonl"
    path.write_text("\ufeff" + "\n".join(lines) + "\n")
    flags = ["--prompts", path, "--output", out, "--max-new-tokens", "4", "--device-id", "-1"]
    monkeypatch.setattr(sys, "argv", ["moderate.py", *map(str, [guard, *flags])])
    moderate.main()
    first, long, last = read_rows(out)
    number = 2 if ending == "jsonl" else 3
    where = f"{path}, line {number}: prompt and --max-new-tokens need"
    assert long["error"].startswith(where)
    assert long["unsafe"]
    assert long["reply"] is None
    for row, prompt in ((first, PROMPTS[0]), (last, PROMPTS[2])):
        assert "error" not in row
        assert row["trace"]
        assert row["messages"][0]["content"] == prompt
    assert f"error: {where}" in capsys.readouterr().out
