"""Tokenizers of three families and tiny random models, built in code: no test downloads anything."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are imported
if "PYTEST_XDIST_WORKER" in os.environ:
    # or the workers' threads spin for one another
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import pytest
import sample_data
import scripts
import torch
from families import SHAPE, byte_level_backend, sentencepiece, special_ids
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from common.data import taxonomy
from guards import add_probe
from guards.card import LoraCard, Threshold, write_card


def pytest_configure(config: pytest.Config) -> None:
    """All workers share one fork server."""
    if not hasattr(config, "workerinput"):
        scripts.share_server()


def pytest_report_header() -> str:
    state = "as it was checked" if sample_data.is_checked() else "changed since it was checked"
    return f"data/sample: {state}; to check it: {sample_data.HOW}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the checks of data/sample while it is as it was checked, unless they are asked for."""
    if "sample_data" in config.option.markexpr or not sample_data.is_checked():
        return
    left_out = [item for item in items if item.get_closest_marker("sample_data")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("sample_data")]


def pytest_collection_finish() -> None:
    """Spare what the imports left in memory from every later collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        scripts.leave_server()


TEXTS = [
    "BEGINNING OF CONVERSATION: USER: How do I keep my bicycle from being stolen? ASSISTANT: Use two locks.",
    "What is the capital of France? The capital of France is Paris, a city on the river Seine.",
    "Please tell me how to cook rice. Rinse it, add twice as much water, and let it simmer for ten minutes.",
    "I cannot help with that. It would be unfair to the neighbour, and it is against the law.",
    "Why do people tell lies? Often they are afraid, or want to be kind, or hope to gain something.",
    "Take the letters from his box and read them; nobody will notice that they are missing.",
    "The weather in the mountains changes quickly. Carry a jacket, a map, and something to eat!",
    "Über den Fluß führt eine Brücke. Les élèves étudient à l'école. El niño come una manzana.",
    "abcdefghijklmnopqrstuvwxyza, 01234567890.",
    "(one), [two], {three}: a-b_c = d/e + f * g; x < y > z | 'quoted' \"twice\" # end @ home & more %",
]


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's; pad is EOS, as in SmolLM2; a markup token and a run of blanks are
    among the added.
    """
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(TEXTS, 420, specials),
        unk_token=specials[0],
        bos_token=specials[1],
        eos_token=specials[2],
        pad_token=specials[2],
    )
    added = [AddedToken(text, normalized=False) for text in ("<tool_call>", "  ")]
    tokenizer.add_tokens(added)
    return tokenizer


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's, with NFKC."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=200, show_progress=False))
    learned = json.loads(trained.to_str())["model"]["vocab"]
    return sentencepiece([tuple(piece) for piece in learned], normalizers.NFKC())


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece as BERT's: lower-cased, `[CLS] … [SEP]`, no EOS."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        TEXTS,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False),
    )
    framing = [("[CLS]", specials.index("[CLS]")), ("[SEP]", specials.index("[SEP]"))]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=framing
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{token.strip('[]').lower()}_token": token for token in specials},
    )


TOKENIZERS = {"bpe": bpe_tokenizer, "unigram": unigram_tokenizer, "wordpiece": wordpiece_tokenizer}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerBase]:
    """Builds a fresh tokenizer ("bpe", "unigram" or "wordpiece") that a test may change."""
    return lambda family: TOKENIZERS[family]()


@pytest.fixture(scope="session", params=list(TOKENIZERS))
def tokenizer(request) -> PreTrainedTokenizerBase:
    """Each family in turn; not to be changed."""
    return TOKENIZERS[request.param]()


def tiny_config(tokenizer: PreTrainedTokenizerBase, **changes) -> LlamaConfig:
    """A Llama of hidden size 32; weights wide enough that different texts give clearly different
    logits.
    """
    given = SHAPE | special_ids(tokenizer) | changes
    return LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **given)


def classifier(
    tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] | None = None
) -> PreTrainedModel:
    """A tiny random classifier over the 14 BeaverTails labels, or over `labels`."""
    labels = labels or taxonomy("beavertails")
    torch.manual_seed(0)
    config = tiny_config(
        tokenizer,
        problem_type="multi_label_classification",
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture(scope="session")
def make_classifier() -> Callable[..., PreTrainedModel]:
    """`make_classifier(tokenizer, labels=None)`: a tiny random Llama classifier in memory."""
    return classifier


@pytest.fixture(scope="session")
def tiny_classifier() -> Callable[..., Path]:
    """`tiny_classifier(folder, labels=None)` saves one in the layout of
    PKU-Alignment/beaver-dam-7b: no guard.json.
    """

    def save(folder: Path, labels: Sequence[str] | None = None) -> Path:
        tokenizer = bpe_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        classifier(tokenizer, labels).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`shared_folder(name, make)`: a folder that all workers share; who asks first fills it by
    `make(folder)`.

    It is not to be changed afterwards.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / f"shared-{name}", root / f"shared-{name}.done"
        with FileLock(root / f"shared-{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one who failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def tiny_base(shared_folder) -> Path:
    """The folder of a tiny random causal LM to fine-tune, whose pad token is its EOS; not to be
    changed.
    """

    def save(folder: Path) -> None:
        tokenizer = bpe_tokenizer()
        torch.manual_seed(0)
        LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return shared_folder("tiny-base", save)


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def bases(make_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Tiny random chat models of two families that share a tokenizer with a chat template."""
    tokenizer: PreTrainedTokenizerFast = make_tokenizer("bpe")
    tokenizer.chat_template = CHAT_TEMPLATE
    shape = SHAPE | special_ids(tokenizer)
    shape |= {
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "initializer_range": 0.3,
    }
    llama = LlamaForCausalLM, LlamaConfig
    qwen2 = Qwen2ForCausalLM, Qwen2Config
    folders = {}
    for name, (model, config) in {"llama": llama, "qwen2": qwen2}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(1)
        model(config(**shape)).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def make_guard(bases, tmp_path_factory):
    """`make_guard(base, layers=None, bias=True, unsafe=True, inputs=…)`: an adapter folder as
    training leaves it.
    """

    def make(
        base="llama", layers=None, bias=True, unsafe=True, inputs=("pair", "prompt", "response")
    ) -> Path:
        folder = tmp_path_factory.mktemp("guard")
        labels = ["unsafe"] * unsafe + taxonomy("beavertails")
        depth = {"num_hidden_layers": layers} if layers else {}
        torch.manual_seed(2)
        model = AutoModelForSequenceClassification.from_pretrained(
            bases[base], num_labels=len(labels), **depth
        )
        config = LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]
        )
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
            elif "score" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(bases[base]).save_pretrained(folder)
        card = LoraCard(
            template="lora_guard",
            labels=labels,
            inputs=list(inputs),
            head_bias=torch.linspace(-0.5, 0.5, len(labels)).tolist() if bias else None,
            max_length=512,
            num_hidden_layers=layers,
            thresholds={"flagged": Threshold(value=0.4, how="max F1")},
            base_model=str(bases[base]),
        )
        write_card(folder, card)
        add_probe(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def guard(make_guard) -> Path:
    return make_guard()
