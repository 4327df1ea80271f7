"""The saver: a folder that is whole or not there, weights that are those that were trained."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from bases import BASES, bert, qwen2
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common import saving
from common.conversation import UserError
from common.run import atomic_path


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def write_guard(folder: Path, text: str, *more: str) -> None:
    """A guard's files as a recipe writes them, all with the same content."""
    for name in ("config.json", "model.safetensors", "README.md", "guard.json", *more):
        (folder / name).parent.mkdir(exist_ok=True)
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


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """An output folder with a guard of two shards, a checkpoint, logs, and a file of the user's."""
    out = tmp_path / "out"
    out.mkdir()
    shards = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter/old.txt"]
    write_guard(out, "old", *shards)
    for name in ("checkpoint-4/trainer_state.json", "runs/events", "notes.txt", "results.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    return out


MINE = {"checkpoint-4/trainer_state.json", "runs/events", "notes.txt", "results.json"}
NEW = {"config.json", "model.safetensors", "README.md", "guard.json", "adapter/adapter_config.json"}


def test_a_new_guard_takes_the_place_of_the_old_one_and_of_nothing_else(folder):
    """No shard of the old weights stays beside the new config; checkpoints and the user's files do."""
    with saving.whole_folder(folder) as partial:
        write_guard(partial, "new", "adapter/adapter_config.json")
        assert (folder / "guard.json").read_text() == "old", (
            "the old guard is whole until the new one is"
        )
    assert names(folder) == MINE | NEW
    assert {(folder / name).read_text() for name in NEW} == {"new"}
    assert {(folder / name).read_text() for name in MINE} == {"mine"}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("not equal")]
)
def test_what_fails_before_the_end_leaves_the_old_guard(folder, error):
    before = names(folder)
    kind = UserError if isinstance(error, OSError) else RuntimeError
    with (
        pytest.raises(kind, match=r"No space left|not equal"),
        saving.whole_folder(folder) as partial,
    ):
        write_guard(partial, "new")
        raise error
    assert names(folder) == before and (folder / "model.safetensors").read_text() == "old"
    assert not (folder / saving.PARTIAL).exists()


def test_a_full_disk_leaves_the_old_guard(folder):
    """A real write that fails in the middle of the weights, as where the disk is full."""

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with saving.whole_folder(folder) as partial:
            (partial / "config.json").write_text("new")
            save_file({"weight": torch.zeros(100_000)}, partial / "model.safetensors")
            (partial / "guard.json").write_text("new")

    before = names(folder)
    assert in_a_child(save) == 2
    assert names(folder) == before
    assert {(folder / name).read_text() for name in before - MINE} == {"old"}


def test_a_kill_at_any_moment_leaves_the_old_guard_or_none_or_the_new_one(folder, monkeypatch):
    """kill -9 before each change to the folder in turn; the next saving makes it whole again."""
    steps = 0

    def replaced(number: int):
        """Saving that is killed before its change number `number`."""
        count = 0

        def stepping(change):
            def step(*args, **kwargs):
                nonlocal count
                count += 1
                if count > number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **kwargs)

            return step

        def save() -> None:
            with saving.whole_folder(folder) as partial:
                write_guard(partial, "new", "adapter/adapter_config.json")
                os.replace = stepping(os.replace)
                Path.unlink = stepping(Path.unlink)
                saving.shutil.rmtree = stepping(saving.shutil.rmtree)

        return save

    seen = set()
    while in_a_child(replaced(steps)) == -signal.SIGKILL:
        steps += 1
        if (folder / "guard.json").exists():
            texts = {
                (folder / name).read_text()
                for name in names(folder) - MINE
                if saving.PARTIAL not in name
            }
            assert len(texts) == 1, "files of two guards below one card"
            seen |= texts
        else:
            assert saving.is_unfinished(folder)
            seen.add("none")
        assert names(folder) >= MINE
        # what was half moved stays "not finished" when the next saving fails, too
        if "none" in seen:
            with pytest.raises(UserError), saving.whole_folder(folder):
                raise OSError("full")
            assert saving.is_unfinished(folder)
    assert steps > 6 and seen == {"old", "none"}
    assert names(folder) == MINE | NEW and not saving.is_unfinished(folder)


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    """safetensors writes for the owner alone; a folder that is served by another user could not be
    read.
    """
    for umask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(umask)
        try:
            with saving.whole_folder(tmp_path / oct(umask)) as partial:
                save_file({"weight": torch.zeros(3)}, partial / "model.safetensors")
                (partial / "guard.json").write_text("{}")
            with atomic_path(tmp_path / oct(umask) / "run.json") as temporary:
                temporary.write_text("{}")
        finally:
            os.umask(before)
        modes = {path.stat().st_mode & 0o777 for path in (tmp_path / oct(umask)).iterdir()}
        assert modes == {mode}


@pytest.mark.parametrize("name", saving.FINISHED)
def test_a_model_is_replaced_only_where_that_was_asked_for(tmp_path, name):
    saving.refuse_to_overwrite(tmp_path / "nothing", False)
    (tmp_path / "checkpoint-3").mkdir()
    saving.refuse_to_overwrite(tmp_path, False)
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        UserError, match=f"holds {name} of an earlier run; pass --overwrite_output_dir"
    ):
        saving.refuse_to_overwrite(tmp_path, False)
    saving.refuse_to_overwrite(tmp_path, True)


def test_a_guard_that_was_never_finished_needs_no_flag(tmp_path):
    (tmp_path / saving.PARTIAL).mkdir()
    (tmp_path / "config.json").write_text("{}")
    saving.refuse_to_overwrite(tmp_path, False)


# --- weights ----------------------------------------------------------------------------------------------------------


def adapted(model, task: str):
    """Random adapters, as after training, ready to judge."""
    config = LoraConfig(task_type=task, r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).eval()


IDS = torch.arange(40, 70).view(2, 15)


@pytest.mark.parametrize("family", BASES)
def test_the_merged_model_is_the_one_in_memory(family, tmp_path):
    """Modules that the base's checkpoint lacks included: loading it again would draw them anew."""
    base = BASES[family](tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = model.config.pad_token_id or 0
    model = adapted(model, "SEQ_CLS")
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits
    saving.merged_model(model, model.state_dict()).save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.inference_mode():
        torch.testing.assert_close(reloaded(input_ids=IDS).logits, expected, atol=1e-4, rtol=0)
        assert torch.equal(model(input_ids=IDS).logits, expected), "the model in memory was changed"


def test_tied_embeddings_stay_tied(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(qwen2(tmp_path / "base", tie_word_embeddings=True))
    model = adapted(model, "CAUSAL_LM")
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits
    saving.merged_model(model, model.state_dict()).save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert reloaded.config.tie_word_embeddings
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    with torch.inference_mode():
        torch.testing.assert_close(reloaded(input_ids=IDS).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_merged_as_it_was_trained(bits, tmp_path):
    """The numbers that training computed with, and not the checkpoint's, which are others."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    kind: dict = {"load_in_8bit": True}
    if bits == 4:
        kind = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
    base = qwen2(tmp_path / "base", hidden_size=128, intermediate_size=128, head_dim=32)
    options = {"quantization_config": BitsAndBytesConfig(**kind), "dtype": torch.float32}
    model = adapted(AutoModelForCausalLM.from_pretrained(base, **options), "CAUSAL_LM")
    with torch.inference_mode():
        expected = model.train()(input_ids=IDS).logits.float()  # judging rounds activations as well
    saving.merged_model(model, model.state_dict()).save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(reloaded.config, "quantization_config")
    plain = adapted(AutoModelForCausalLM.from_pretrained(base), "CAUSAL_LM")
    adapters = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    plain.load_state_dict(adapters, strict=False)
    with torch.inference_mode():
        of_checkpoint = (plain(input_ids=IDS).logits - expected).abs().max()
        of_folder = (reloaded(input_ids=IDS).logits - expected).abs().max()
    assert of_folder < 0.1 * of_checkpoint


def test_an_adapter_folder_names_no_local_path_in_a_form(tmp_path, make_tokenizer):
    """PEFT's README.md is an empty form with the base's path in it."""
    model = AutoModelForSequenceClassification.from_pretrained(
        bert(tmp_path / "base"), num_labels=3
    )
    model = adapted(model, "SEQ_CLS")
    saving.save_adapter(
        model, model.state_dict(), make_tokenizer("wordpiece"), tmp_path / "adapter"
    )
    assert "README.md" not in names(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names(
        tmp_path / "adapter"
    )


# --- comparing --------------------------------------------------------------------------------------------------------


def test_other_scores_are_named():
    saving.check_equal([{"a": 0.5, "b": 1.0}], [{"a": 0.501, "b": 1.0}], 0.02)
    saving.check_equal([], [], 0.02)
    with pytest.raises(
        UserError, match=r"row 2, a: 0.4945 in memory, 0.4557 from the folder; nothing is saved"
    ):
        saving.check_equal([{"a": 0.1}, {"a": 0.4945}], [{"a": 0.1}, {"a": 0.4557}], 0.02)


def test_rounding_is_not_another_model():
    """In 16 bits one score of many may be off by more than the rest; another model moves all of
    them.
    """
    expected = [{"a": 0.5, "b": 0.3, "c": 0.001} for _ in range(8)]
    rounded = [{"a": 0.503, "b": 0.302, "c": 0.001} for _ in range(7)] + [
        {"a": 0.5, "b": 0.3, "c": 0.0018}
    ]
    saving.check_equal(expected, rounded, 0.5)
    with pytest.raises(UserError, match="not what was trained"):
        saving.check_equal(expected, [{"a": 0.54, "b": 0.33, "c": 0.0012} for _ in range(8)], 0.5)


@pytest.mark.parametrize("said", [{}, {"a": float("nan")}])
def test_a_missing_score_is_no_equal_one(said):
    with pytest.raises(UserError, match="not what was trained"):
        saving.check_equal([{"a": 1.0}], [said], 0.02)
    with pytest.raises(UserError, match="not what was trained"):
        saving.check_equal([{"a": float("nan")}], [{"a": 1.0}], 0.02)
