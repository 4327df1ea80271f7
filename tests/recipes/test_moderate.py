"""examples/lora_guard/moderate.py on tiny guards: as a command, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import launch, module

from common.conversation import UserError, pair

GuardedChat = module("lora_guard", "riding").GuardedChat
moderate = module("lora_guard", "moderate")
PROMPTS = [
    "How do I cook rice?",
    "Why do people tell lies? Often they are afraid of the neighbour.",
    "Paris!",
]
CONVERSATIONS = [pair(prompt) for prompt in PROMPTS]


def reference_adaptor(guard: Path, folder: Path) -> tuple[Path, Path]:
    """config.json and .pt of `guard` as the paper's code writes them (bf16, private key names)."""
    tensors, out = load_file(guard / "adapter_model.safetensors"), {}
    for key, value in tensors.items():
        if ".lora_" in key:
            name = key.removeprefix("base_model.model.model.").replace(".weight", ".default.weight")
            out[f"lm_features.base_model.model.{name}"] = value.bfloat16()
    out["clf_head.weight"] = tensors["base_model.model.score.weight"].bfloat16()
    torch.save(out, folder / "adaptor.pt")
    config = {
        "hf_model_id": json.loads((guard / "guard.json").read_text())["base_model"],
        "lora_r": 4,
        "lora_alpha": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json", folder / "adaptor.pt"


def command(*argv: str | Path, stdin: str = "") -> subprocess.CompletedProcess:
    """moderate.py in its folder, on the CPU."""
    words = ["moderate.py", *argv, "--device-id", "-1", "--max-new-tokens", "12"]
    return launch("lora_guard", *words, threads=1, typed=stdin, check=False)


@pytest.mark.slow
def test_moderate_as_a_command(make_guard, tmp_path):
    """Folder and prompts; a file and an output file; a converted `.pt` and prompts that are typed;
    an error.
    """
    guard = make_guard(inputs=["pair", "prompt"])
    done = command(guard, "--prompt", *PROMPTS[:2], "--threshold", "1", "--guard-every", "4")
    assert done.returncode == 0, done.stderr
    replies = GuardedChat(guard, device="cpu").reply(
        CONVERSATIONS[:2], max_new_tokens=12, guard_every=4, progress=False
    )
    for prompt, reply in zip(PROMPTS, replies, strict=False):
        assert f"prompt: {prompt}\nreply: {reply.text}\n" in done.stdout
        assert (
            f"prompt unsafe: {reply.prompt_unsafe:.3f}\nresponse unsafe: not trained\n"
            in done.stdout
        )
        assert f"pair unsafe: {reply.response_unsafe:.3f}\n" in done.stdout
    assert done.stdout.count("top categories: ") == done.stdout.count("blocked: no") == 2

    rows = [
        {"prompt": PROMPTS[0]},
        {"messages": [{"role": "system", "content": "Be kind."}, *CONVERSATIONS[1]]},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl"]
    done = command("-", guard, *files, "--stop-at", "0", "--batch-size", "1")
    assert done.returncode == 0, done.stderr
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in out] == PROMPTS[:2]
    assert all(row["blocked"] and row["reply"] is None and row["stopped_after"] == 0 for row in out)
    assert (
        done.stdout.count("reply: [withheld: unsafe]")
        == done.stdout.count("stopped after: 0 tokens")
        == 2
    )

    config, pt = reference_adaptor(make_guard(bias=False), tmp_path)
    assert f"`python convert.py {config} {pt} NEW_FOLDER`" in command(config, pt).stderr
    launch("lora_guard", "convert.py", config, pt, tmp_path / "new", threads=1)
    done = command(config, tmp_path / "new", "--on-unsafe", "flag", stdin=f"\ufeff{PROMPTS[0]}\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("blocked: no") == done.stdout.count("prompt unsafe: not trained") == 1
    assert f"prompt: {PROMPTS[0]}\n" in done.stdout  # without the byte order mark

    done = command(tmp_path, "--prompt", "Hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path}/guard.json: no guard of a recipe"
    )
    assert "Traceback" not in done.stderr


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
    monkeypatch.setattr(
        sys, "argv", ["moderate.py", *(word.format(guard=guard, bad=bad) for word in argv)]
    )
    with pytest.raises(UserError, match=message) as caught:
        moderate.main()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_an_over_long_prompt_is_one_rows_error(guard, tmp_path, monkeypatch, capsys, ending):
    """It is named, the other rows are judged and written; the file begins with a byte order mark."""
    prompts = [PROMPTS[0], "word " * 4000, PROMPTS[2]]
    lines = [json.dumps({"prompt": text}) for text in prompts]
    if ending == "csv":
        lines = ["prompt", *(f'"{text}"' for text in prompts)]
    path, out = tmp_path / f"prompts.{ending}", tmp_path / "out.jsonl"
    path.write_text("\ufeff" + "\n".join(lines) + "\n")
    flags = ["--prompts", path, "--output", out, "--max-new-tokens", "4", "--device-id", "-1"]
    monkeypatch.setattr(sys, "argv", ["moderate.py", *map(str, [guard, *flags])])
    moderate.main()
    first, long, last = [json.loads(line) for line in out.read_text().splitlines()]
    number = 2 if ending == "jsonl" else 3
    where = f"{path}, line {number}: prompt and --max-new-tokens need"
    assert long["error"].startswith(where) and long["unsafe"] and long["reply"] is None
    assert "error" not in first | last and first["trace"] and last["trace"]
    assert [row["messages"][0]["content"] for row in (first, last)] == [PROMPTS[0], PROMPTS[2]]
    assert f"error: {where}" in capsys.readouterr().out
