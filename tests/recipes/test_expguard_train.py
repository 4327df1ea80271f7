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
from datasets import Dataset
from expguard_rows import authored, golden, prompt_tokenizer, write_rows
from moderation_server import free_port
from safetensors.torch import load_file
from scripts import EXAMPLES, TORCHRUN, launch, module
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers import PreTrainedTokenizerFast as FastTokenizer
from vllm_server import post, wait_for

from common import prefix
from common.conversation import UserError, pair
from common.engines import Decoding
from common.run import parse_args
from common.templates import encode, template_text
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
    shape = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": 4,
    }
    shape |= {"num_hidden_layers": 2, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", authored(48))


@pytest.fixture
def run(base, data, monkeypatch):
    """`run(output_dir, *flags)`: train.py in this process; its weights. Later flags win."""
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


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


# ------------------------------------------------------------------------------------------------ categories


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
    card = read(folder / "guard.json")
    assert card["policy"] == policy
    assert card["probe"]
    assert "- S2: spam" in (folder / "README.md").read_text()
    guard = load_guard(str(folder), progress=False)
    messages = pair("May I?", "You may.")
    prompt = "".join(part.text for part in guard.parts(messages))
    assert f"CATEGORIES>\n{policy}\n<END" in prompt
    assert guard.tokenizer.apply_chat_template(messages, tokenize=False) == prompt
    (folder / "guard.json").write_text(json.dumps(card | {"policy": "S1: spam"}))
    with pytest.raises(UserError, match="probe"):
        load_guard(str(folder), progress=False)


# ------------------------------------------------------------------------------------------------ served


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


# ------------------------------------------------------------------------------------------------ flags


PAPERS_FLAGS = """--model_type qwen2.5-7b --cache_dir c --data_dir d/ --dataset_name expguardmix --num_workers 2
--max_seq_len 2048 --packing --per_device_train_batch_size 3 --per_device_eval_batch_size 5 --lr_scheduler_type linear
--gradient_accumulation_steps 7 --learning_rate 1e-5 --warmup_ratio 0.1 --weight_decay 0.2 --max_grad_norm 0.5 --bf16
--epochs 4 --logging_steps 0.2 --seed 1 --deterministic --use_4bit_quantization --use_8bit_quantization --use_peft_lora
--use_gradient_checkpointing --disable_checkpointing --do_train --do_eval --do_test --local_files_only --output_dir out
--wandb_mode disabled --attn_implementation eager --model_name_or_path somewhere"""


def test_every_flag_of_the_papers_script_is_read(monkeypatch):
    model, data, args = parsed(monkeypatch, *PAPERS_FLAGS.split())
    wanted = {
        "model_type": "qwen2.5-7b", "cache_dir": "c", "model_name_or_path": "somewhere", "use_4bit_quantization": True,
        "use_8bit_quantization": True, "use_peft_lora": True, "local_files_only": True, "attn_implementation": "eager",
    }  # fmt: skip
    assert {name: getattr(model, name) for name in wanted} == wanted
    assert (data.dataset_name, data.data_dir) == (["expguardmix"], "d/")
    wanted = {
        "dataloader_num_workers": 2, "max_length": 2048, "packing": True, "per_device_train_batch_size": 3, "seed": 1,
        "per_device_eval_batch_size": 5, "gradient_accumulation_steps": 7, "lr_scheduler_type": "linear",
        "learning_rate": 1e-5, "warmup_steps": 0.1, "weight_decay": 0.2, "max_grad_norm": 0.5, "num_train_epochs": 4,
        "logging_steps": 0.2, "full_determinism": True, "gradient_checkpointing": True, "save_strategy": "no",
        "do_train": True, "do_eval": True, "do_test": True, "report_to": [], "output_dir": "out",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted


def test_defaults_are_the_papers(monkeypatch):
    model, data, args = parsed(monkeypatch)
    assert (model.model_name_or_path, data.dataset_name) == ("Qwen/Qwen2.5-7B", ["expguardmix"])
    given = parsed(monkeypatch, "--config", RECIPE / "configs/paper.yaml", "--fsdp", "")[2]
    for name in (
        "num_train_epochs",
        "learning_rate",
        "lr_scheduler_type",
        "weight_decay",
        "max_grad_norm",
        "seed",
    ):
        assert getattr(args, name) == getattr(given, name), name
    assert (args.max_length, args.warmup_steps, args.num_train_epochs, given.stop_after_epoch) == (
        4096,
        0.03,
        3,
        2,
    )
    assert args.eval_strategy == "no" and not args.load_best_model_at_end


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_4bit_quantization"], "with --use_peft_lora"),
        (
            ["--use_4bit_quantization", "--use_8bit_quantization", "--use_peft_lora"],
            "give one of them",
        ),
        (["--do_train", "false"], "neither --do_train nor --do_eval"),
        (["--model_type", "qwen2.5-7b"], "is a llama"),
        (["--model_name_or_path", "/nowhere"], "--model_name_or_path /nowhere"),
        (["--use_peft_lora", "--lora_target_modules", "nothing"], "--lora_target_modules"),
        (["--max_seq_len", "0"], "expected 1 or more"),
        (["--stop_after_epoch", "-1"], "expected 1 or more"),
        (["--num_train_epochs", "5"], "--epochs 2.0, --num_train_epochs 5.0: two names"),
        (["--max_length", "300"], "--max_seq_len 400, --max_length 300: two names"),
        (["--wandb_mode", "online"], "pip install wandb"),
        (["--share_prefix", "--packing"], "--share_prefix"),
        (["--do_eval", "--val_data", "a/test.jsonl"], "is a test set"),
        (["--bad_rows", "keep"], "must be error or skip"),
        (["--overlap_with", "nothing.jsonl"], "no such file"),
        (["--max_seq_len", "4000"], "--max_seq_len 4000: the model sees 2048 tokens"),
        (["--packed"], r"unknown argument \['--packed'\]"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, *flags)
    assert not list(tmp_path.glob("*.json*"))


def test_the_library_of_quantized_bases_is_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    model = arguments.ModelArguments(use_4bit_quantization=True, use_peft_lora=True)
    with pytest.raises(UserError, match=r"quantization"):
        arguments.check(model, None)


# ------------------------------------------------------------------------------------------------ the loss


class Batches:
    """Losses and gradients of one model on the same rows, laid out in different ways."""

    def __init__(self, base: Path, tokenizer, tmp_path: Path, rows: list):
        self.base, self.tokenizer, self.tmp_path = base, tokenizer, tmp_path
        self.encoded = rows_.Encoder(tokenizer, 400).training_set(rows)[0]

    def __call__(
        self, rows: Dataset | None = None, collator=None, size: int = 8, **options
    ) -> tuple[float, dict]:
        args = arguments.ExpGuardConfig(
            output_dir=str(self.tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=1,
            **options,
        )
        args.max_length = 800 if args.packing else None
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        trainer = train.GuardTrainer(
            model=model,
            args=args,
            train_dataset=rows or self.encoded,
            processing_class=self.tokenizer,
            data_collator=collator,
        )
        total, whole = 0.0, sum(label != -100 for row in self.encoded["labels"] for label in row)
        for batch in trainer.get_train_dataloader():
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(whole))
            loss.backward()
            total += loss.item()
        return total, {name: p.grad for name, p in model.named_parameters()}


def test_packed_shared_and_padded_rows_have_one_loss_and_one_gradient(
    base, tokenizer, data, tmp_path
):
    rows = rows_.read_rows(str(data), "")[:10]
    batches = Batches(base, tokenizer, tmp_path, [*rows, rows[0]])  # a repeated row counts twice
    loss, gradients = batches(size=1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for row in batches.encoded:  # transformers' own loss, row by row
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        count = (labels != -100).sum()
        (model(ids, labels=labels).loss * count).backward()
    whole = sum(label != -100 for row in batches.encoded["labels"] for label in row)
    assert (
        difference(gradients, {name: p.grad / whole for name, p in model.named_parameters()}) < 1e-5
    )
    ways = {
        "padded": {},
        "packed": {"packing": True},
        "shared": {"collator": prefix.shared_prefix_collator},
    }
    for name, options in ways.items():
        again, other = batches(**options)
        assert abs(again - loss) < 1e-4 and difference(gradients, other) < 1e-5, name


def test_what_rows_share_is_there_once(tokenizer, data):
    rows = [row for row in rows_.read_rows(str(data), "") if len(row["messages"]) == 1][:8]
    encoded = rows_.Encoder(tokenizer, 400).training_set(rows)[0]
    batch = prefix.shared_prefix_collator(list(encoded))
    before = len(template_text("expguard").partition("{{ prompt")[0]) and len(
        encode(tokenizer, [rows_.prompt_parts(pair("x"), tokenizer)], add_special_tokens=False)[0]
    )
    saved = sum(map(len, encoded["input_ids"])) - batch["input_ids"].shape[1]
    assert saved > 0.5 * before * (len(rows) - 1)
    assert torch.equal(batch["attention_mask"][0, 0].sum(1), batch["position_ids"][0] + 1)


# ------------------------------------------------------------------------------------------------ training


FLAGS = ["--do_eval", "--val_split_ratio", "0.25"]


def test_training_learns_and_leaves_a_guard_that_stock_libraries_load(run, base, data, tmp_path):
    """The saved folder: weights in float32, the prompt as chat template, and the verdicts that
    validation saw.
    """
    more = "--epochs 8 --learning_rate 5e-3 --share_prefix --disable_checkpointing"
    run(tmp_path, *FLAGS, *more.split())
    card, done = read(tmp_path / "guard.json"), read(tmp_path / "run.json")
    losses = [entry["loss"] for entry in done["log"] if "loss" in entry]
    assert losses[-1] < 0.1 * losses[0] and not list(tmp_path.glob("checkpoint-*"))
    assert (card["kind"], card["guard"], card["max_length"], card["base_model"]) == (
        "generative",
        "expguard",
        400,
        str(base),
    )
    assert set(card["thresholds"]) == {"prompt_unsafe", "response_unsafe"}
    assert (
        card["thresholds"]["prompt_unsafe"]["on"] == f"0.25 of {data}"
        and card["data"]["train"]["rows"] == 36
    )
    model, stock = (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32} and AutoConfig.from_pretrained(
        tmp_path
    ).use_cache
    messages = pair("May I?", "You may.")
    assert stock.apply_chat_template(messages, tokenize=False) == golden("May I?", "You may.")
    inputs = stock.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    written = stock.decode(
        model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    )
    assert written.startswith("User Safety Assessment: ") and written.endswith("<|endoftext|>")
    rows = rows_.stratified_split(rows_.read_rows(str(data), ""), 0.25, 42)[1]
    guard = load_guard(str(tmp_path), progress=False)
    verdicts = guard.judge([row["messages"] for row in rows])
    assert guard.thresholds == card["thresholds"]
    for label, measured in done["validation"].items():
        judged = [
            (row[label], getattr(v, label))
            for row, v in zip(rows, verdicts, strict=True)
            if row[label] is not None
        ]
        brier = sum((truth - score) ** 2 for truth, score in judged) / len(judged)
        assert brier == pytest.approx(measured["brier"], abs=1e-4)
    assert (
        "Measured on" in (tmp_path / "README.md").read_text()
        and str(tmp_path) not in (tmp_path / "README.md").read_text()
    )


def test_a_pad_token_outside_the_embeddings_is_left_out(run, base, tmp_path):
    """The tokenizer has a `<pad>` for which the checkpoint was never resized: EOS pads in its
    place.
    """
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
    )
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    flags = ["--max_steps", 1, "--per_device_train_batch_size", 4, "--disable_checkpointing"]
    run(tmp_path / "guard", "--model_name_or_path", tmp_path / "base", *flags)
    assert AutoTokenizer.from_pretrained(tmp_path / "guard").pad_token == tokenizer.eos_token


def test_the_epoch_with_the_best_validation_f1_is_kept(run, tmp_path):
    weights = run(tmp_path, *FLAGS, "--epochs", 3)
    f1 = {
        entry["step"]: entry["eval_f1"]
        for entry in read(tmp_path / "run.json")["log"][:-1]
        if "eval_f1" in entry
    }
    best = max(f1, key=f1.get)
    assert len(f1) == 3 and read(tmp_path / "run.json")["best_checkpoint"] == f"checkpoint-{best}"
    assert difference(weights, load_file(tmp_path / f"checkpoint-{best}/model.safetensors")) == 0


def test_stopping_early_keeps_the_schedule_of_all_epochs(run, tmp_path):
    """The released model: the second checkpoint of a schedule for three epochs."""
    run(tmp_path / "all", "--epochs", 3, "--logging_steps", 1)
    stopped = run(tmp_path / "two", "--epochs", 3, "--logging_steps", 1, "--stop_after_epoch", 2)
    rates = [
        [
            entry["learning_rate"]
            for entry in read(tmp_path / name / "run.json")["log"]
            if "learning_rate" in entry
        ]
        for name in ("all", "two")
    ]
    assert len(rates[0]) == 36 and rates[1] == rates[0][:24] and rates[1][-1] > 1e-4
    assert difference(stopped, load_file(tmp_path / "all/checkpoint-24/model.safetensors")) == 0


def test_resumed_is_uninterrupted(run, tmp_path):
    """From the middle, and from the very end, where nothing but the saving was lost; also with
    --stop_after_epoch.
    """
    more = "--epochs 3 --stop_after_epoch 2 --use_peft_lora --lora_dropout 0.1"
    flags = [*FLAGS, *more.split()]
    whole = run(tmp_path / "whole", *flags)
    with pytest.raises(UserError, match="pass --resume_from_checkpoint latest"):
        run(tmp_path / "whole", *flags)
    for last in ("checkpoint-9", "checkpoint-18"):
        shutil.copytree(tmp_path / "whole/checkpoint-9", tmp_path / last / "checkpoint-9")
        if last != "checkpoint-9":
            shutil.copytree(tmp_path / "whole" / last, tmp_path / last / last)
        again = run(tmp_path / last, *flags, "--resume_from_checkpoint", "latest")
        assert difference(whole, again) == 0
        assert read(tmp_path / last / "guard.json") == read(tmp_path / "whole/guard.json")


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


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_weights_are_float32_whatever_the_attention(monkeypatch, base, attention):
    model, _, args = parsed(
        monkeypatch, "--model_name_or_path", base, "--attn_implementation", attention, "--bf16"
    )
    arguments.check(model, args)
    loaded = model_.load_model(model, args)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.config._attn_implementation == (
        "sdpa" if attention.startswith("flash") else attention
    )


def test_validation_alone_writes_nothing(run, base, tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.raises(FileNotFoundError):
        run(tmp_path / "out", *FLAGS, "--do_train", "false")
    assert "Validation: {" in caplog.text and not list(tmp_path.rglob("*.safetensors"))


def test_overlap_with_evaluation_sets_is_printed(run, data, tmp_path, caplog):
    seen = write_rows(
        tmp_path / "seen.jsonl",
        [
            authored(48)[0],
            authored(48)[2] | {"response": "Another"},
            {"prompt": "new", "prompt_label": "safe"},
        ],
    )
    with caplog.at_level("INFO"):
        run(tmp_path / "out", "--max_steps", 1, "--overlap_with", seen)
    overlap = {"rows": 3, "prompt_in_train": 2, "pair_in_train": 1, "near_copies_of_train": 1}
    assert read(tmp_path / "out/run.json")["data"]["overlap"] == {str(seen): overlap}
    assert json.dumps(overlap) in caplog.text


@slow
def test_the_papers_script_with_two_processes_is_one_process(
    run, base, data, tmp_path, monkeypatch
):
    """scripts/train.sh with local values; what is fixed in it (sharding, precision) a CPU leaves
    out.
    """
    fixed = f"--model_type llama {TINY} --weight_decay 0.0"
    flags = [*fixed.split(), "--model_name_or_path", base, "--dataset_name", data, *FLAGS]
    batch = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    monkeypatch.setenv("NPROC", "2")
    script = ["scripts/train.sh", *flags, *batch, "--output_dir", tmp_path / "two"]
    launch("expguard", *script, launcher=("bash",), threads=1)
    one = run(tmp_path / "one", *FLAGS, "--per_device_train_batch_size", 8)
    assert difference(one, load_file(tmp_path / "two/model.safetensors")) < 2e-5
    cards = [
        read(tmp_path / name / "run.json")["validation"]["prompt_unsafe"] for name in ("one", "two")
    ]
    assert cards[0]["brier"] == pytest.approx(cards[1]["brier"], abs=1e-4)


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
    assert apart < 5e-3 and difference(one, load_file(base / "model.safetensors")) > 10 * apart
