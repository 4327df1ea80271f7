"""The saver: a folder that is whole or not there, weights that are those that were trained."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from bases import BASES, bert, qwen2
from checks import user_error
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from common import saving
from common.conversation import UserError
from common.run import atomic_path

# --- the folder -----------------------------------------------------------------------------------

MINE = {"checkpoint-4/trainer_state.json", "runs/events", "notes.txt", "results.json"}
NEW = {"config.json", "model.safetensors", "README.md", "guard.json", "adapter/adapter_config.json"}
OLD = NEW | {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter/old.txt"}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def texts(folder: Path, files: set[str]) -> set[str]:
    return {(folder / name).read_text() for name in files}


def write(folder: Path, files: set[str], text: str) -> None:
    """Files of one content, which says whose they are."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def in_a_child(work) -> int:
    """The exit status of a forked child that does this; -9 where it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except UserError:
            os._exit(2)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def folder(tmp_path) -> Path:
    """An output folder with a guard of two shards, a checkpoint, logs, and a file of the user's."""
    write(tmp_path / "out", OLD, "old")
    write(tmp_path / "out", MINE, "mine")
    return tmp_path / "out"


def test_a_new_guard_takes_the_place_of_the_old_one_and_of_nothing_else(folder):
    """No shard of the old weights stays beside the new config; the user's files do."""
    with saving.whole_folder(folder) as partial:
        write(partial, NEW, "new")
        assert texts(folder, OLD) == {"old"}
    assert names(folder) == MINE | NEW
    assert texts(folder, NEW) == {"new"}
    assert texts(folder, MINE) == {"mine"}


def test_what_fails_before_the_end_leaves_the_old_guard(folder):
    """As where what was saved is not equal to what was trained."""
    with pytest.raises(RuntimeError), saving.whole_folder(folder) as partial:
        write(partial, NEW, "new")
        raise RuntimeError
    assert names(folder) == MINE | OLD
    assert texts(folder, OLD) == {"old"}


def test_a_full_disk_leaves_the_old_guard(folder):
    """A real write that fails in the middle of the weights, as where the disk is full."""

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with saving.whole_folder(folder) as partial:
            save_file({"weight": torch.zeros(100_000)}, partial / "model.safetensors")

    assert in_a_child(save) == 2
    assert names(folder) == MINE | OLD
    assert texts(folder, OLD) == {"old"}


def saving_killed_after(folder: Path, changes: int):
    """Saving that is killed when it has made so many changes to the folder."""
    left = changes

    def stepping(change):
        def step(*args, **kwargs):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return change(*args, **kwargs)

        return step

    def save() -> None:
        with saving.whole_folder(folder) as partial:
            write(partial, NEW, "new")
            os.replace = stepping(os.replace)
            Path.unlink = stepping(Path.unlink)
            saving.shutil.rmtree = stepping(saving.shutil.rmtree)

    return save


def test_a_kill_at_any_moment_leaves_the_old_guard_or_none_or_the_new_one(folder):
    """kill -9 before each change to the folder in turn; the next saving makes it whole again."""
    changes = 0
    seen = set()
    while in_a_child(saving_killed_after(folder, changes)) == -signal.SIGKILL:
        changes += 1
        assert texts(folder, MINE) == {"mine"}
        if (folder / "guard.json").exists():
            guard = {name for name in names(folder) - MINE if saving.PARTIAL not in name}
            (text,) = texts(folder, guard)
            seen.add(text)
        else:
            seen.add("none")
            assert saving.is_unfinished(folder)
            # it stays "not finished" when the next saving fails, too
            with pytest.raises(UserError), saving.whole_folder(folder):
                raise OSError("full")
            assert saving.is_unfinished(folder)
    assert changes > 6
    assert seen == {"old", "none"}
    assert names(folder) == MINE | NEW
    assert not saving.is_unfinished(folder)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_permissions_of_any_new_file(tmp_path, umask, mode):
    """safetensors writes for the owner alone, and a guard is served by another user."""
    before = os.umask(umask)
    try:
        with saving.whole_folder(tmp_path / "out") as partial:
            save_file({"weight": torch.zeros(3)}, partial / "model.safetensors")
            (partial / "guard.json").write_text("{}")
        with atomic_path(tmp_path / "out/run.json") as temporary:
            temporary.write_text("{}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {mode}


@pytest.mark.parametrize("name", saving.FINISHED)
def test_a_model_is_replaced_only_where_that_was_asked_for(tmp_path, name):
    (tmp_path / "checkpoint-3").mkdir()
    saving.refuse_to_overwrite(tmp_path, False)
    (tmp_path / name).write_text("{}")
    with user_error(f"{name} .*--overwrite_output_dir"):
        saving.refuse_to_overwrite(tmp_path, False)
    saving.refuse_to_overwrite(tmp_path, True)


def test_a_guard_that_was_never_finished_needs_no_flag(tmp_path):
    (tmp_path / saving.PARTIAL).mkdir()
    (tmp_path / "config.json").write_text("{}")
    saving.refuse_to_overwrite(tmp_path, False)


# --- weights --------------------------------------------------------------------------------------

IDS = torch.arange(40, 70).view(2, 15)


def adapted(model, task: str):
    """Random adapters, as after training, ready to judge."""
    config = LoraConfig(task_type=task, r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).eval()


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def merged(model, folder: Path, auto):
    """The model, merged, saved and loaded again by the stock library."""
    saving.merged_model(model, model.state_dict()).save_pretrained(folder)
    return auto.from_pretrained(folder)


@pytest.mark.parametrize("family", BASES)
def test_the_merged_model_is_the_one_in_memory(family, tmp_path):
    """Modules that the base's checkpoint lacks included: loading it again would draw them anew."""
    base = BASES[family](tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = model.config.pad_token_id or 0
    model = adapted(model, "SEQ_CLS")
    expected = logits(model)
    reloaded = merged(model, tmp_path / "merged", AutoModelForSequenceClassification)
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-4, rtol=0)
    assert torch.equal(logits(model), expected), "the model in memory was changed"


def test_tied_embeddings_stay_tied(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(qwen2(tmp_path / "base", tie_word_embeddings=True))
    model = adapted(model, "CAUSAL_LM")
    reloaded = merged(model, tmp_path / "merged", AutoModelForCausalLM)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-4, rtol=0)


QUANTIZATION = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}


@pytest.mark.parametrize("kind", QUANTIZATION.values(), ids=QUANTIZATION)
def test_a_quantized_base_is_merged_as_it_was_trained(kind, tmp_path):
    """The numbers that training computed with, and not the checkpoint's, which are others."""
    pytest.importorskip("bitsandbytes")
    base = qwen2(tmp_path / "base", hidden_size=128, intermediate_size=128, head_dim=32)
    options = {"quantization_config": BitsAndBytesConfig(**kind), "dtype": torch.float32}
    model = adapted(AutoModelForCausalLM.from_pretrained(base, **options), "CAUSAL_LM")
    expected = logits(model.train())  # judging rounds activations as well
    reloaded = merged(model, tmp_path / "merged", AutoModelForCausalLM)
    assert not hasattr(reloaded.config, "quantization_config")
    plain = adapted(AutoModelForCausalLM.from_pretrained(base), "CAUSAL_LM")
    adapters = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    plain.load_state_dict(adapters, strict=False)
    of_checkpoint = (logits(plain) - expected).abs().max()
    of_folder = (logits(reloaded) - expected).abs().max()
    assert of_folder < 0.1 * of_checkpoint


def test_an_adapter_folder_names_no_local_path_in_a_form(tmp_path, make_tokenizer):
    """PEFT's README.md is an empty form with the base's path in it."""
    base = bert(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = adapted(model, "SEQ_CLS")
    out = tmp_path / "adapter"
    saving.save_adapter(model, model.state_dict(), make_tokenizer("wordpiece"), out)
    assert "README.md" not in names(out)
    assert names(out) >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}


# --- comparing ------------------------------------------------------------------------------------

NAN = float("nan")
TRAINED = [{"a": 0.5, "b": 0.3, "c": 0.001}] * 8


def test_other_scores_are_named():
    with user_error(r"row 2, a: 0\.4945 .*0\.4557"):
        saving.check_equal([{"a": 0.1}, {"a": 0.4945}], [{"a": 0.1}, {"a": 0.4557}], 0.02)


def test_rounding_is_not_another_model():
    """In 16 bits one score of many is off by more than the rest; another model moves all."""
    rounded = [{"a": 0.503, "b": 0.302, "c": 0.001}] * 7 + [{"a": 0.5, "b": 0.3, "c": 0.0018}]
    saving.check_equal(TRAINED, rounded, 0.5)
    with pytest.raises(UserError):
        saving.check_equal(TRAINED, [{"a": 0.54, "b": 0.33, "c": 0.0012}] * 8, 0.5)


@pytest.mark.parametrize(
    ("trained", "saved"),
    [
        ({"a": 1.0}, {}),
        ({"a": 1.0}, {"a": NAN}),
        ({"a": NAN}, {"a": 1.0}),
        ({"a": 0.2}, {"a": 1.0000002}),
    ],
    ids=["missing", "NaN from the folder", "NaN in memory", "above 1"],
)
def test_no_score_is_no_equal_one(trained, saved):
    with pytest.raises(UserError):
        saving.check_equal([trained], [saved], 0.02)
