"""examples/expguard: the training recipe, run as its README says, on tiny random models."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from checks import change_card, difference, logged, read_json, user_error, write_rows
from conftest import tiny_config
from datasets import Dataset
from expguard_rows import authored, golden, prompt_tokenizer
from moderation_server import free_port
from safetensors.torch import load_file
from scripts import EXAMPLES, TORCHRUN, launch, module
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer
from vllm_server import post, wait_for

from common import prefix
from common.conversation import pair
from common.engines import Decoding
from common.run import parse_args
from common.templates import encode
from guards import load_guard
from guards.card import GenerativeCard, write_card

RECIPE = EXAMPLES / "expguard"
arguments, rows_, model_, train = (
    module("expguard", name) for name in ("arguments", "rows", "model", "train")
)
slow = pytest.mark.slow
TINY = "--epochs 2 --learning_rate 3e-3 --max_seq_len 400"


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    return prompt_tokenizer()


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    """A tiny random causal LM to fine-tune."""
    return tiny_base(tmp_path_factory.mktemp("base"), tokenizer)


def tiny_base(folder: Path, tokenizer: FastTokenizer, hidden_size: int = 32) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size}
    LlamaForCausalLM(tiny_config(tokenizer, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", authored(48))


@pytest.fixture
def run(base, data, monkeypatch):
    """`run(output_dir, *flags)`: train.py in this process; its weights. Later flags win."""
    return in_process(monkeypatch, base, data)


def in_process(monkeypatch, base: Path, data: Path):
    # a checkpoint holds the arguments, pickled by that name
    monkeypatch.setitem(sys.modules, "arguments", arguments)

    def of(output: Path, *flags) -> dict[str, torch.Tensor]:
        words = ["--model_name_or_path", base, "--dataset_name", data, "--output_dir", output]
        words += f"{TINY} --gradient_accumulation_steps 1 --disable_tqdm true".split()
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*words, *flags])])
        train.main()
        return load_file(output / "model.safetensors")

    return of


def parsed(monkeypatch, *words) -> tuple:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    return parse_args([arguments.ModelArguments, arguments.DataArguments, arguments.ExpGuardConfig])


# --- categories -----------------------------------------------------------------------------------


def worded_base(folder: Path, tokenizer: FastTokenizer) -> Path:
    """A base that writes the words of a verdict whatever it reads, so that its guard has a probe."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base(folder, tokenizer))
    words = list(rows_.Encoder(tokenizer, 400).words)
    head = model.get_output_embeddings().weight.data
    known = head[words] * 3
    head *= 0.1
    head[words] = known
    model.save_pretrained(folder)
    return folder


@slow
def test_a_guard_of_own_categories_is_judged_with_these(run, tokenizer, tmp_path):
    """In the prompt of training, of `judge` and of the chat template; other ones are refused."""
    base = worded_base(tmp_path / "base", tokenizer)
    names = tmp_path / "mine.yaml"
    names.write_text("fraud: deceives to get money\nspam:\n")
    folder = tmp_path / "out"
    flags = ["--max_steps", 2, "--disable_checkpointing"]
    run(folder, "--model_name_or_path", base, "--categories", names, *flags)
    policy = "S1: fraud: deceives to get money\nS2: spam"
    card = read_json(folder / "guard.json")
    assert card["policy"] == policy
    assert card["probe"]
    assert "- S2: spam" in (folder / "README.md").read_text()
    guard = load_guard(str(folder), progress=False)
    messages = pair("May I?", "You may.")
    prompt = "".join(part.text for part in guard.parts(messages))
    assert f"CATEGORIES>\n{policy}\n<END" in prompt
    assert guard.tokenizer.apply_chat_template(messages, tokenize=False) == prompt
    change_card(folder, policy="S1: spam")
    with user_error("probe"):
        load_guard(str(folder), progress=False)


# --- served ---------------------------------------------------------------------------------------


@contextmanager
def chat_server(folder: Path, log: Path) -> Iterator[str]:
    """The address of transformers' own server for a model."""
    port = free_port()
    command = [Path(sys.executable).with_name("transformers"), "serve", folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(server, address, log)
        yield address
    finally:
        server.kill()
        server.wait()


@slow
def test_a_chat_server_writes_after_the_prompt_that_is_judged(tokenizer, tmp_path):
    """`/v1/chat/completions` of a stock server: it renders the folder's chat template."""
    pytest.importorskip("openai", reason="transformers' server needs it (extra [api])")
    policy = "S1: fraud: deceives to get money\nS2: spam"
    told = prompt_tokenizer()
    told.chat_template = rows_.chat_template(policy)
    folder = tiny_base(tmp_path / "guard", told)
    write_card(folder, GenerativeCard(guard="expguard", max_length=400, policy=policy))
    guard = load_guard(str(folder), progress=False)
    asked = {"model": str(folder), "temperature": 0, "max_tokens": 8}
    with chat_server(folder, tmp_path / "log") as address:
        for messages in (pair("May I?"), pair("May I?", "You may.")):
            prompts = guard.encode([guard.parts(messages)])
            (expected,) = guard.model.completions(prompts, Decoding(max_new_tokens=8))
            said = post(f"{address}/v1/chat/completions", asked | {"messages": messages})
            assert said["choices"][0]["message"]["content"] == expected.text


# --- flags ----------------------------------------------------------------------------------------


# the paper's flag, the value that it is given, the field that reads it, and what that then holds
PAPERS_FLAGS = """
    --model_type qwen2.5-7b             model_type                  qwen2.5-7b
    --cache_dir c                       cache_dir                   c
    --model_name_or_path somewhere      model_name_or_path          somewhere
    --use_4bit_quantization             use_4bit_quantization       true
    --use_8bit_quantization             use_8bit_quantization       true
    --use_peft_lora                     use_peft_lora               true
    --local_files_only                  local_files_only            true
    --attn_implementation eager         attn_implementation         eager
    --data_dir d/                       data_dir                    d/
    --dataset_name expguardmix          dataset_name                [expguardmix]
    --num_workers 2                     dataloader_num_workers      2
    --max_seq_len 2048                  max_length                  2048
    --packing                           packing                     true
    --per_device_train_batch_size 3     per_device_train_batch_size 3
    --per_device_eval_batch_size 5      per_device_eval_batch_size  5
    --gradient_accumulation_steps 7     gradient_accumulation_steps 7
    --lr_scheduler_type linear          lr_scheduler_type           linear
    --learning_rate 1e-5                learning_rate               1.0e-5
    --warmup_ratio 0.1                  warmup_steps                0.1
    --weight_decay 0.2                  weight_decay                0.2
    --max_grad_norm 0.5                 max_grad_norm               0.5
    --epochs 4                          num_train_epochs            4
    --logging_steps 0.2                 logging_steps               0.2
    --seed 1                            seed                        1
    --deterministic                     full_determinism            true
    --use_gradient_checkpointing        gradient_checkpointing      true
    --disable_checkpointing             save_strategy               "no"
    --do_train                          do_train                    true
    --do_eval                           do_eval                     true
    --do_test                           do_test                     true
    --wandb_mode disabled               report_to                   []
    --output_dir out                    output_dir                  out
"""


def test_every_flag_of_the_papers_script_is_read(monkeypatch):
    words = ["--bf16"]
    expected = {}
    for line in PAPERS_FLAGS.strip().splitlines():
        *flag, field, value = line.split()
        words += flag
        expected[field] = yaml.safe_load(value)
    model, data, args = map(vars, parsed(monkeypatch, *words))
    found = model | data | args
    assert {name: found[name] for name in expected} == expected


def test_defaults_are_the_papers(monkeypatch):
    model, data, args = parsed(monkeypatch)
    assert model.model_name_or_path == "Qwen/Qwen2.5-7B"
    assert data.dataset_name == ["expguardmix"]
    *_, given = parsed(monkeypatch, "--config", RECIPE / "configs/paper.yaml", "--fsdp", "")
    names = "num_train_epochs learning_rate lr_scheduler_type weight_decay max_grad_norm seed"
    for name in names.split():
        assert getattr(args, name) == getattr(given, name), name
    assert args.max_length == 4096
    assert args.warmup_steps == 0.03
    assert args.num_train_epochs == 3
    assert given.stop_after_epoch == 2
    assert args.eval_strategy == "no"
    assert not args.load_best_model_at_end


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--use_4bit_quantization", "with --use_peft_lora"),
        ("--use_4bit_quantization --use_8bit_quantization --use_peft_lora", "give one of them"),
        ("--do_train false", "neither --do_train nor --do_eval"),
        ("--model_type qwen2.5-7b", "is a llama"),
        ("--model_name_or_path /nowhere", "--model_name_or_path /nowhere"),
        ("--use_peft_lora --lora_target_modules nothing", "--lora_target_modules"),
        ("--max_seq_len 0", "expected 1 or more"),
        ("--stop_after_epoch -1", "expected 1 or more"),
        ("--num_train_epochs 5", "--epochs 2.0, --num_train_epochs 5.0: two names"),
        ("--max_length 300", "--max_seq_len 400, --max_length 300: two names"),
        ("--wandb_mode online", "pip install wandb"),
        ("--share_prefix --packing", "--share_prefix"),
        ("--do_eval --val_data a/test.jsonl", "is a test set"),
        ("--bad_rows keep", "must be error or skip"),
        ("--overlap_with nothing.jsonl", "no such file"),
        ("--max_seq_len 4000", "--max_seq_len 4000: the model sees 2048 tokens"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, flags, message):
    with user_error(message):
        run(tmp_path, *flags.split())
    assert not list(tmp_path.glob("*.json*"))


def test_the_library_of_quantized_bases_is_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    model = arguments.ModelArguments(use_4bit_quantization=True, use_peft_lora=True)
    with user_error(r"quantization"):
        arguments.check(model, None)


def test_a_quantized_base_is_not_split(tmp_path):
    """On GPUs it was loaded in float32, without a word."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = arguments.ModelArguments(use_4bit_quantization=True, use_peft_lora=True)
    args = arguments.ExpGuardConfig(output_dir=str(tmp_path))
    args.fsdp = True
    with user_error('not split by FSDP; add --fsdp ""'):
        arguments.check(model, args)


# --- the loss -------------------------------------------------------------------------------------


def layout(base: Path, tokenizer, rows: Dataset, folder: Path, collator=None, **options):
    """The loss and the gradients of a fresh model on all the rows, which the options lay out."""
    given = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1} | options
    args = arguments.ExpGuardConfig(output_dir=str(folder), **given)
    args.max_length = 800 if args.packing else None
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = train.GuardTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=collator,
    )
    count = torch.tensor(answer_tokens(rows))
    total = 0.0
    for batch in trainer.get_train_dataloader():
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def answer_tokens(rows: Dataset) -> int:
    return sum(label != -100 for labels in rows["labels"] for label in labels)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_packed_shared_and_padded_rows_have_one_loss_and_one_gradient(
    base, tokenizer, data, tmp_path
):
    rows = rows_.read_rows(str(data), "")[:10]
    rows.append(rows[0])  # a repeated row counts twice
    encoded = rows_.Encoder(tokenizer, 400).training_set(rows)[0]
    alone = {"per_device_train_batch_size": 1}
    loss, expected = layout(base, tokenizer, encoded, tmp_path, **alone)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for row in encoded:  # transformers' own loss, row by row
        labels = torch.tensor([row["labels"]])
        own = model(torch.tensor([row["input_ids"]]), labels=labels).loss
        (own * (labels != -100).sum() / answer_tokens(encoded)).backward()
    assert difference(expected, gradients(model)) < 1e-5
    ways = {
        "padded": {},
        "packed": {"packing": True},
        "shared": {"collator": prefix.shared_prefix_collator},
    }
    for name, options in ways.items():
        again, other = layout(base, tokenizer, encoded, tmp_path, **options)
        assert abs(again - loss) < 1e-4, name
        assert difference(expected, other) < 1e-5, name


def test_what_rows_share_is_there_once(tokenizer, data):
    rows = [row for row in rows_.read_rows(str(data), "") if len(row["messages"]) == 1][:8]
    encoded = rows_.Encoder(tokenizer, 400).training_set(rows)[0]
    batch = prefix.shared_prefix_collator(list(encoded))
    parts = [rows_.prompt_parts(pair("x"), tokenizer)]
    (prompt,) = encode(tokenizer, parts, add_special_tokens=False)
    saved = sum(map(len, encoded["input_ids"])) - batch["input_ids"].shape[1]
    assert saved > 0.5 * len(prompt) * (len(rows) - 1)
    assert torch.equal(batch["attention_mask"][0, 0].sum(1), batch["position_ids"][0] + 1)


# --- training -------------------------------------------------------------------------------------


FLAGS = ["--do_eval", "--val_split_ratio", "0.25"]


@pytest.fixture(scope="module")
def learned(base, data, tmp_path_factory) -> Path:
    """The folder of a run that has learned its rows."""
    folder = tmp_path_factory.mktemp("learned")
    flags = "--epochs 8 --learning_rate 5e-3 --share_prefix --disable_checkpointing"
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, base, data)(folder, *FLAGS, *flags.split())
    return folder


def test_training_learns_and_says_what_was_trained(learned, base, data):
    card = read_json(learned / "guard.json")
    first, *_, last = logged(learned, "loss").values()
    assert last < 0.1 * first
    assert not list(learned.glob("checkpoint-*"))
    expected = {"kind": "generative", "guard": "expguard", "max_length": 400}
    assert card.items() >= (expected | {"base_model": str(base)}).items()
    assert set(card["thresholds"]) == {"prompt_unsafe", "response_unsafe"}
    assert card["thresholds"]["prompt_unsafe"]["on"] == f"0.25 of {data}"
    assert card["data"]["train"]["rows"] == 36
    text = (learned / "README.md").read_text()
    assert "Measured on" in text
    assert str(learned) not in text


def test_a_trained_guard_writes_its_verdict_in_stock_libraries(learned):
    """The saved folder: weights in float32, and the prompt as chat template."""
    model = AutoModelForCausalLM.from_pretrained(learned)
    tokenizer = AutoTokenizer.from_pretrained(learned)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert AutoConfig.from_pretrained(learned).use_cache
    messages = pair("May I?", "You may.")
    prompt = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt == golden("May I?", "You may.")
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    (ids,) = model.generate(**inputs, max_new_tokens=24)
    written = tokenizer.decode(ids[inputs["input_ids"].shape[1] :])
    assert written.startswith("User Safety Assessment: ")
    assert written.endswith("<|endoftext|>")


def test_a_trained_guard_judges_as_validation_did(learned, data):
    measured = read_json(learned / "run.json")["validation"]
    rows = rows_.stratified_split(rows_.read_rows(str(data), ""), 0.25, 42)[1]
    guard = load_guard(str(learned), progress=False)
    verdicts = guard.judge([row["messages"] for row in rows])
    for label, scores in measured.items():
        errors = []
        for row, verdict in zip(rows, verdicts, strict=True):
            if row[label] is not None:
                errors.append((row[label] - getattr(verdict, label)) ** 2)
        assert sum(errors) / len(errors) == pytest.approx(scores["brier"], abs=1e-4)


def test_a_pad_token_outside_the_embeddings_is_left_out(run, base, tmp_path):
    """The checkpoint was never resized for the tokenizer's `<pad>`: EOS pads in its place."""
    padded = shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(padded)
    flags = ["--max_steps", 1, "--per_device_train_batch_size", 4, "--disable_checkpointing"]
    run(tmp_path / "guard", "--model_name_or_path", padded, *flags)
    assert AutoTokenizer.from_pretrained(tmp_path / "guard").pad_token == tokenizer.eos_token


def test_the_epoch_with_the_best_validation_f1_is_kept(run, tmp_path):
    weights = run(tmp_path, *FLAGS, "--epochs", 3)
    said = read_json(tmp_path / "run.json")
    evaluated = [entry for entry in said["log"][:-1] if "eval_f1" in entry]
    f1 = {entry["step"]: entry["eval_f1"] for entry in evaluated}
    best = max(f1, key=f1.get)
    assert len(f1) == 3
    assert said["best_checkpoint"] == f"checkpoint-{best}"
    assert difference(weights, load_file(tmp_path / f"checkpoint-{best}/model.safetensors")) == 0


def test_stopping_early_keeps_the_schedule_of_all_epochs(run, tmp_path):
    """The released model: the second checkpoint of a schedule for three epochs."""
    run(tmp_path / "all", "--epochs", 3, "--logging_steps", 1)
    stopped = run(tmp_path / "two", "--epochs", 3, "--logging_steps", 1, "--stop_after_epoch", 2)
    rates = logged(tmp_path / "all", "learning_rate")
    of_two = logged(tmp_path / "two", "learning_rate")
    assert (len(rates), len(of_two)) == (36, 24)
    assert of_two.items() <= rates.items()
    assert of_two[24] > 1e-4
    assert difference(stopped, load_file(tmp_path / "all/checkpoint-24/model.safetensors")) == 0


def test_resumed_is_uninterrupted(run, tmp_path):
    """Also with --stop_after_epoch. (From the very end: tests/unit/test_training.py.)"""
    more = "--epochs 3 --stop_after_epoch 2 --use_peft_lora --lora_dropout 0.1"
    flags = [*FLAGS, *more.split()]
    whole = tmp_path / "whole"
    half = tmp_path / "half"
    expected = run(whole, *flags)
    with user_error("pass --resume_from_checkpoint latest"):
        run(whole, *flags)
    shutil.copytree(whole / "checkpoint-9", half / "checkpoint-9")
    resumed = run(half, *flags, "--resume_from_checkpoint", "latest")
    assert difference(expected, resumed) == 0
    assert read_json(half / "guard.json") == read_json(whole / "guard.json")


@pytest.mark.parametrize("flags", [[], ["--use_4bit_quantization", "--use_gradient_checkpointing"]])
def test_lora_saves_the_adapter_and_the_guard_merged_with_it(run, tokenizer, tmp_path, flags):
    # a CPU judges 4-bit matrices in blocks of 32 rows
    base = tiny_base(tmp_path / "base", tokenizer, 128)
    folder = tmp_path / "guard"
    more = "--use_peft_lora --lora_r 4 --max_steps 2"
    merged = run(folder, "--model_name_or_path", base, *more.split(), *flags)
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    plain = load_file(base / "model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert not (folder / "adapter_config.json").exists()
    moved = {name for name in plain if difference({name: plain[name]}, {name: merged[name]}) > 1e-3}
    assert moved == {name for name in plain if "proj" in name}  # all linear layers but the head


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_weights_are_float32_whatever_the_attention(monkeypatch, base, attention):
    words = ["--model_name_or_path", base, "--attn_implementation", attention, "--bf16"]
    model, _, args = parsed(monkeypatch, *words)
    arguments.check(model, args)
    loaded = model_.load_model(model, args)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    usable = "sdpa" if attention.startswith("flash") else attention
    assert loaded.config._attn_implementation == usable


def test_validation_alone_writes_nothing(run, base, tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.raises(FileNotFoundError):
        run(tmp_path / "out", *FLAGS, "--do_train", "false")
    assert "Validation: {" in caplog.text
    assert not list(tmp_path.rglob("*.safetensors"))


def test_overlap_with_evaluation_sets_is_printed(run, data, tmp_path, caplog):
    same, _, other, *_ = authored(48)
    new = {"prompt": "new", "prompt_label": "safe"}
    seen = write_rows(tmp_path / "seen.jsonl", [same, other | {"response": "Another"}, new])
    with caplog.at_level("INFO"):
        run(tmp_path / "out", "--max_steps", 1, "--overlap_with", seen)
    overlap = {"rows": 3, "prompt_in_train": 2, "pair_in_train": 1, "near_copies_of_train": 1}
    assert read_json(tmp_path / "out/run.json")["data"]["overlap"] == {str(seen): overlap}
    assert json.dumps(overlap) in caplog.text


@slow
def test_the_papers_script_with_two_processes_is_one_process(
    run, base, data, tmp_path, monkeypatch
):
    """scripts/train.sh with local values, and without what a CPU lacks (sharding, precision)."""
    fixed = f"--model_type llama {TINY} --weight_decay 0.0"
    flags = [*fixed.split(), "--model_name_or_path", base, "--dataset_name", data, *FLAGS]
    batch = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    monkeypatch.setenv("NPROC", "2")
    script = ["scripts/train.sh", *flags, *batch, "--output_dir", tmp_path / "two"]
    launch("expguard", *script, launcher=("bash",), threads=1)
    one = run(tmp_path / "one", *FLAGS, "--per_device_train_batch_size", 8)
    assert difference(one, load_file(tmp_path / "two/model.safetensors")) < 2e-5
    runs = [read_json(tmp_path / name / "run.json")["validation"] for name in ("one", "two")]
    one, two = (run["prompt_unsafe"]["brier"] for run in runs)
    assert one == pytest.approx(two, abs=1e-4)


@slow
def test_zero3_on_two_processes_is_one_process(run, base, data, tmp_path):
    flags = f"""--config configs/paper.yaml --fsdp= --deepspeed ../../launch/zero3.json
        --stop_after_epoch 2 --model_type llama {TINY} --weight_decay 0.0
        --per_device_train_batch_size 4""".split()
    flags += ["--model_name_or_path", base, "--dataset_name", data]
    flags += ["--output_dir", tmp_path / "two"]
    launch("expguard", "train.py", *flags, launcher=TORCHRUN, threads=1)
    one = run(tmp_path / "one", "--per_device_train_batch_size", 8)
    apart = difference(one, load_file(tmp_path / "two/model.safetensors"))
    # DeepSpeed's own Adam rounds otherwise where a gradient is nearly nothing.
    assert apart < 5e-3
    assert difference(one, load_file(base / "model.safetensors")) > 10 * apart
